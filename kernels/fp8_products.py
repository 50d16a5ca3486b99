"""What the ops in fp8 share: a tensor quantised and transposed in one pass, and scaled products of such tensors.

Each is a torch op with the ways that an op's backends take: cuda quantises by csrc/quantise_weight.cu, cuBLAS
multiplies through torch._scaled_mm, else both are Triton's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import extension
from kernels.fp8 import (
    E4M3,
    E5M2,
    ROW_MULTIPLE,
    Fp8Tensor,
    Site,
    amax_scale,
    check_capability,
    needs_fp8,
    transpose,
)
from kernels.gemm import gemm
from kernels.op import Backend, Device, Shape, check_number, check_tensor, dtype_name, takes_dtypes
from kernels.sizes import round_up
from kernels.tile import as_rows

# quantising


@torch.library.custom_op("redline::fp8_quantise", mutates_args=("amax",))
def _quantise(t: Tensor, scale: Tensor, amax: Tensor | None, gradient: bool, cuda: bool) -> tuple[Tensor, Tensor]:
    """q (M, C) of t (..., C), in e5m2 if t is a gradient, and q_t (C, M'); amax is raised to max |t|.

    M' is M rounded up to ROW_MULTIPLE: columns beyond M are zeros, which add nothing to a sum over rows.
    """
    check_capability("fp8_quantise", t.device)
    t, dtype = as_rows(t), E5M2 if gradient else E4M3
    M, C = t.shape
    q, q_t = t.new_empty(M, C, dtype=dtype), t.new_empty(C, round_up(M, ROW_MULTIPLE), dtype=dtype)
    if M:
        transpose(t, q, q_t, scale, cuda, amax)
    return q, q_t


@_quantise.register_fake
def _(t, scale, amax, gradient, cuda):
    M, C = t.reshape(-1, t.size(-1)).shape
    q = t.new_empty(M, C, dtype=E5M2 if gradient else E4M3)
    return q, q.new_empty(C, round_up(M, ROW_MULTIPLE))


def quantise(t: Tensor, site: Site | None, *, gradient: bool = False, cuda: bool = False) -> Fp8Tensor:
    """t (..., C) as (M, C) in e4m3, or of a gradient in e5m2, with the scale of the site, else its own."""
    amax, scale = site or (None, None)
    if scale is None:
        scale = amax_scale(t, torch.finfo(E5M2 if gradient else E4M3).max)
    q, q_t = _quantise(t, scale, amax, gradient, cuda)
    return Fp8Tensor(q, q_t, scale)


# products


def by_cublas(how: str, dtype: torch.dtype) -> bool:
    """Whether the backend of that name multiplies by cuBLAS: cuda where cuBLAS takes the dtype of the result."""
    return how == "scaled_mm" or (how == "cuda" and dtype == torch.bfloat16)


def _by_cublas(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Accumulates fast, which is in the tensor core, where `gemm` does: in products without a gradient."""
    fast = E5M2 not in (a.dtype, b.dtype)
    return torch._scaled_mm(a, b.T, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast)


@torch.library.custom_op("redline::fp8_product", mutates_args=())
def _product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, cublas: bool) -> Tensor:
    """(M, N) of a (M, K) and b (N, K), scaled, rounded once."""
    if 0 in a.shape:  # nothing to launch
        return a.new_zeros(a.size(0), b.size(0), dtype=dtype)
    if cublas:
        return _by_cublas(a, b, a_scale, b_scale, dtype)
    out = a.new_empty(a.size(0), b.size(0), dtype=dtype)
    gemm(a, b, out, (a_scale, b_scale))
    return out


@_product.register_fake
def _(a, b, a_scale, b_scale, dtype, cublas):
    return a.new_empty(a.size(0), b.size(0), dtype=dtype)


@torch.library.custom_op("redline::fp8_add_product", mutates_args=("total",))
def _add_product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, total: Tensor, cublas: bool) -> None:
    """total (M, N) += the same in fp32. `gemm` adds in bulk; cuBLAS, which cannot add to a sum in fp8, is followed by a
    pass over the weight's size."""
    if not a.size(1):
        return
    if cublas:
        total += _by_cublas(a, b, a_scale, b_scale, torch.float32)
    else:
        gemm(a, b, total, (a_scale, b_scale), accumulate=True)


@_add_product.register_fake
def _(a, b, a_scale, b_scale, total, cublas):
    return None


def product(a: Tensor, b: Tensor, scales: tuple[Tensor, Tensor], dtype: torch.dtype, how: str) -> Tensor:
    """a (M, K) b (N, K)^T, scaled, rounded once to the dtype, by the backend of that name."""
    return _product(a, b, *scales, dtype, by_cublas(how, dtype))


def weight_gradient(
    a: Tensor, b: Tensor, scales: tuple[Tensor, Tensor], dtype: torch.dtype, total: Tensor | None, how: str
) -> Tensor | None:
    """a (N, M) b (K, M)^T, scaled; where there is a total, None, and added to it, unrounded."""
    if total is None:
        return product(a, b, scales, dtype, how)
    _add_product(a, b, *scales, total, by_cublas(how, dtype))
    return None


# sites


@torch.library.custom_op("redline::fp8_note", mutates_args=("amax",))
def note(t: Tensor, amax: Tensor) -> None:
    """Raises amax to max |t|, in PyTorch; NaN stays NaN."""
    if t.numel():
        amax.copy_(torch.maximum(amax, t.abs().amax().to(amax.dtype)))


@note.register_fake
def _(t, amax):
    return None


def check_site(op: str, name: str, site: Site, device: torch.device) -> None:
    """ValueError unless its numbers are fp32 numbers on the device."""
    check_number(op, f"amax of {name}", site.amax, (torch.float32,), device)
    if site.scale is not None:
        check_number(op, f"the scale of {name}", site.scale, (torch.float32,), device)


def check_rows(op: str, x: Tensor, rows: Fp8Tensor) -> None:
    """ValueError unless the rows are what `quantise` makes of x (..., K)."""
    K = x.size(-1)
    M, device = x.numel() // K, x.device
    check_tensor(op, "q of x_fp8", rows.q, (M, K), (E4M3,), device, contiguous=True)
    check_tensor(op, "q_t of x_fp8", rows.q_t, (K, round_up(M, ROW_MULTIPLE)), (E4M3,), device, contiguous=True)
    check_number(op, "the scale of x_fp8", rows.scale, (torch.float32,), device)


# backends


def _needs_cuda(device: Device) -> str | None:
    return needs_fp8(device) or extension.needs_extension(device)


def kernels_of(through: Callable[[str], Callable[..., Any]], *dims: str) -> dict[str, Backend]:
    """The backends of an op but for its reference. through: the op by the backend of a name; dims: names of the second
    and third number of its shape, of which rows in fp8 consist."""

    def limits(shape: Shape, dtype: torch.dtype) -> str | None:
        if why := takes_dtypes(shape, dtype):
            return why
        if all(n % ROW_MULTIPLE == 0 for n in shape[1:]):
            return None
        given = " and ".join(map(str, shape[1:]))
        return f"takes {' and '.join(dims)} that are multiples of {ROW_MULTIPLE}, not {given}"

    def cublas_limits(shape: Shape, dtype: torch.dtype) -> str | None:
        if why := limits(shape, dtype):
            return why
        return None if dtype == torch.bfloat16 else f"takes bfloat16, not {dtype_name(dtype)}"

    return {
        "triton": Backend(through("triton"), needs_fp8, limits),
        "scaled_mm": Backend(through("scaled_mm"), needs_fp8, cublas_limits),
        "cuda": Backend(through("cuda"), _needs_cuda, limits),
    }
