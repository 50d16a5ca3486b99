"""Tensors in fp8, each with one scale: x ~ x_fp8 * scale. What fp8 GEMMs need of their operands.

Tensor cores multiply fp8 operands only where both are stored with K, the summed dimension, last. A weight that takes
part in a forward and a backward product is therefore kept twice, the second copy transposed.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import extension
from kernels.op import Device, UserError, capability, check_number, check_tensor, describe, needs_triton
from kernels.sizes import round_up
from kernels.tile import launch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
E4M3_MAX, E5M2_MAX = torch.finfo(E4M3).max, torch.finfo(E5M2).max
FP8_CAPABILITY = (8, 9)
ROW_MULTIPLE = 16  # rows of so many elements begin at multiples of 16 bytes in every dtype
TINY_SCALE = 1e-12  # the scale of a tensor of zeros


def lacks_fp8(device: Device) -> str | None:
    """Why the device makes no fp8 numbers; None if it does."""
    if device.capability is not None and device.capability < FP8_CAPABILITY:
        least = ".".join(map(str, FP8_CAPABILITY))
        return f"fp8 needs compute capability {least} or newer, {device.name} has {device.capability}: omit --fp8-head"
    return None


def needs_fp8(device: Device) -> str | None:
    """Why a Triton kernel that makes fp8 numbers cannot run on the device; None if it can."""
    return lacks_fp8(device) or needs_triton(device)


def check_capability(op: str, device: torch.device) -> None:
    """UserError where the device has no fp8."""
    if (here := capability(device)) < FP8_CAPABILITY:
        least, has = (".".join(map(str, version)) for version in (FP8_CAPABILITY, here))
        raise UserError(f"{op}: fp8 needs a GPU of compute capability {least} or newer, not {has}; leave it out")


def aligned_empty(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised (rows, columns) tensor whose rows begin at multiples of 16 bytes."""
    return like.new_empty(rows, round_up(columns, ROW_MULTIPLE), dtype=dtype)[:, :columns]


def amax_scale(t: Tensor, limit: float) -> Tensor:
    """The fp32 scale with which the largest |t| becomes the limit."""
    if t.numel() == 0:
        return torch.ones((), device=t.device)
    amax: Tensor = torch.linalg.vector_norm(t, ord=math.inf).float()
    return (amax / limit).clamp_min(TINY_SCALE)


def quantised(t: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """t / scale in an fp8 type, saturated. PyTorch; `transpose` is the kernel."""
    limit = torch.finfo(dtype).max
    return (t.float() / scale).clamp(-limit, limit).to(dtype)


@triton.jit
def clamped(x, limit):
    """x between -limit and limit; NaN stays NaN."""
    x = tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(x, -limit, propagate_nan=tl.PropagateNan.ALL)


def _config(dtype: torch.dtype, arch: tuple[int, int]) -> dict[str, int]:
    """Rows and columns that a program transposes, and warps. Not measured on a GPU yet."""
    return {"BLOCK": 64, "num_warps": 4}


@triton.jit(do_not_specialize=["R"])
def _transpose_kernel(
    x_ptr, q_ptr, q_t_ptr, scale_ptr, R, columns_t, C, limit, stride_x, stride_q, stride_t,
    QUANTISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """q_t (C, columns_t) = x (R, C) transposed, then zeros. QUANTISE: both q and q_t hold x / scale in fp8.

    The division rounds to nearest, as PyTorch's: Triton's `/` is approximate, and decides ties otherwise.

    columns_t is R rounded up to ROW_MULTIPLE, which Triton can see, so that stores are wide.
    """
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_c = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (offs_r < R)[:, None] & (offs_c < C)[None, :]
    q = tl.load(x_ptr + offs_r[:, None] * stride_x + offs_c[None, :], mask=inside, other=0.0)
    if QUANTISE:
        q = clamped(tl.div_rn(q.to(tl.float32), tl.load(scale_ptr)), limit).to(q_ptr.dtype.element_ty)
        tl.store(q_ptr + offs_r[:, None] * stride_q + offs_c[None, :], q, mask=inside)
    inside_t = (offs_c < C)[:, None] & (offs_r < columns_t)[None, :]
    tl.store(q_t_ptr + offs_c[:, None] * stride_t + offs_r[None, :], tl.trans(q), mask=inside_t)


def padded_columns(t: Tensor) -> int:
    """Columns of t rounded up to ROW_MULTIPLE, if its memory has room for them: a copy that torch.compile makes of an
    argument that is written ends with its last element."""
    columns = round_up(t.size(1), ROW_MULTIPLE)
    end = t.storage_offset() + (t.size(0) - 1) * t.stride(0) + columns
    fits = columns <= t.stride(0) and end * t.itemsize <= t.untyped_storage().nbytes()
    return columns if fits else t.size(1)


def transpose(x: Tensor, q: Tensor | None, q_t: Tensor, scale: Tensor | None, cuda: bool = False) -> None:
    """Fills q_t with x transposed; with q and scale, q with x / scale in its fp8 type, saturated, and q_t with the same
    transposed. Columns of q_t beyond the rows of x, up to ROW_MULTIPLE where there is room, are zeros. By Triton, or by
    csrc/quantise_weight.cu."""
    R, C = x.shape
    if cuda:
        extension.call(
            "fp8_transpose", x, dtype=x.dtype, q_dtype=q_t.dtype, x=x, q=q, q_t=q_t, scale=scale, R=R, C=C,
            columns_t=padded_columns(q_t), stride_x=x.stride(0), stride_q=0 if q is None else q.stride(0),
            stride_t=q_t.stride(0),
        )  # fmt: skip
        return
    config = _config(x.dtype, capability(x.device))
    grid = (triton.cdiv(R, config["BLOCK"]), triton.cdiv(C, config["BLOCK"]))
    launch(
        _transpose_kernel, grid,
        x, q, q_t, scale, R, padded_columns(q_t), C, torch.finfo(q_t.dtype).max,
        x.stride(0), 0 if q is None else q.stride(0), q_t.stride(0),
        QUANTISE=q is not None, **config,
    )  # fmt: skip


# a weight and its transpose


class Fp8Weight(NamedTuple):
    """w of (V, C) in e4m3, the same transposed, and their scale: w ~ scale * q."""

    q: Tensor
    q_t: Tensor
    scale: Tensor


def empty_fp8(w: Tensor) -> Fp8Weight:
    """Room for a copy of w (V, C) in fp8."""
    q_t = aligned_empty(w, w.size(1), w.size(0), E4M3)
    return Fp8Weight(w.new_empty(w.shape, dtype=E4M3), q_t, w.new_empty((), dtype=torch.float32))


def fill_fp8(w: Tensor, copy: Fp8Weight) -> None:
    """Fills the copy from w, in PyTorch."""
    copy.scale.copy_(amax_scale(w, E4M3_MAX))
    copy.q.copy_(quantised(w, copy.scale, E4M3))
    copy.q_t.copy_(copy.q.T)


def fp8_copy(w: Tensor) -> Fp8Weight:
    """A copy of w in fp8, made in PyTorch; of one on the meta device, room for it."""
    w = w.detach()
    copy = empty_fp8(w)
    if not w.is_meta:
        fill_fp8(w, copy)
    return copy


def check_fp8_weight(op: str, w: Tensor, copy: Fp8Weight) -> None:
    """ValueError unless the copy is one that `empty_fp8` makes for w."""
    made = "of the copy that quantise_weight makes"
    check_tensor(op, f"q {made}", copy.q, w.shape, (E4M3,), w.device, contiguous=True)
    check_tensor(op, f"q_t {made}", copy.q_t, w.shape[::-1], (E4M3,), w.device)
    check_number(op, f"the scale {made}", copy.scale, (torch.float32,), w.device)
    if copy.q_t.stride(1) != 1 or copy.q_t.stride(0) % 16:
        raise ValueError(f"{op}: q_t is {describe(copy.q_t)}; expected rows that begin at multiples of 16 bytes")
