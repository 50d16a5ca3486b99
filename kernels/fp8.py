"""Tensors in fp8, each with one scale: x ~ x_fp8 * scale. What fp8 GEMMs need of their operands.

Tensor cores multiply fp8 operands only where both are stored with K, the summed dimension, last. A weight that takes
part in a forward and a backward product is therefore kept twice, the second copy transposed.
"""

import math
from collections.abc import Sequence
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
MOST_ATOMICS = 8192  # of a launch: they are of one number, and one after another


def lacks_fp8(device: Device) -> str | None:
    """Why the device makes no fp8 numbers; None if it does."""
    if device.capability is not None and device.capability < FP8_CAPABILITY:
        least = ".".join(map(str, FP8_CAPABILITY))
        return f"fp8 needs compute capability {least} or newer, {device.name} has {device.capability}"
    return None


def needs_fp8(device: Device) -> str | None:
    """Why a Triton kernel that makes fp8 numbers cannot run on the device; None if it can."""
    return lacks_fp8(device) or needs_triton(device)


def check_capability(op: str, device: torch.device) -> None:
    """UserError where the device has no fp8."""
    if (here := capability(device)) < FP8_CAPABILITY:
        least, has = (".".join(map(str, version)) for version in (FP8_CAPABILITY, here))
        raise UserError(f"{op}: fp8 needs a GPU of compute capability {least} or newer, not {has}; leave it out")


def aligned_empty(like: Tensor, rows: int, columns: int, dtype: torch.dtype, bank: Sequence[int] = ()) -> Tensor:
    """An uninitialised (rows, columns) tensor whose rows begin at multiples of 16 bytes, or a bank of such."""
    return like.new_empty(*bank, rows, round_up(columns, ROW_MULTIPLE), dtype=dtype)[..., :columns]


def amax_scale(t: Tensor, limit: float, dim: tuple[int, ...] | None = None) -> Tensor:
    """The fp32 scale with which the largest |t|, of all or over these dimensions, becomes the limit."""
    if t.numel() == 0:
        return torch.ones((), device=t.device)
    amax: Tensor = torch.linalg.vector_norm(t, ord=math.inf, dim=dim).float()
    return (amax / limit).clamp_min(TINY_SCALE)


def matrix_scales(w: Tensor) -> Tensor:
    """The e4m3 scale of w (V, C), or of each matrix of w (n, V, C)."""
    return amax_scale(w, E4M3_MAX, dim=(-2, -1))


def quantised(t: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """t / scale in an fp8 type, saturated. PyTorch; `transpose` is the kernel."""
    limit = torch.finfo(dtype).max
    return (t.float() / scale).clamp(-limit, limit).to(dtype)


@triton.jit
def clamped(x, limit):
    """x between -limit and limit; NaN stays NaN."""
    x = tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(x, -limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _quotient(x, scale, limit):
    """x / scale in fp32, to be rounded to fp8: as PyTorch's division rounds, and cut to what rounds to the limit.

    Triton's `/` is approximate and decides ties otherwise; tl.div_rn branches for each element, and calls a function
    for each zero. The scale, which is positive, being one number, one reciprocal serves all: x / scale is
    q = x * reciprocal less what the exact remainder q * scale - x says that it is too much [Markstein 1990]. Hazards:
    far from 1, x and scale are first brought nearer by a power of two, or the remainder would not be exact; what is
    lost of an x there rounds to zero, or is cut. A remainder of zero is +0 and its product -0, so that q keeps the sign
    of a zero x. An infinite scale has no remainder.
    """
    power = tl.where(scale < 2.0**-80, 2.0**96, tl.where(scale > 2.0**100, 2.0**-40, 1.0))
    scale *= power
    reciprocal, multiple = tl.div_rn(1.0, scale), tl.where(scale == float("inf"), 0.0, scale)
    x = clamped(x * power, limit * scale * (1.0 + 2.0**-20))
    q = x * reciprocal
    # Triton's -x is 0 - x, which has no -0
    return tl.fma(tl.fma(q, multiple, x * -1.0), reciprocal * -1.0, q)


def _config(dtype: torch.dtype, arch: tuple[int, int]) -> dict[str, int]:
    """Rows and columns that a program transposes, and warps. Not measured on a GPU yet."""
    return {"ROWS": 64, "COLUMNS": 64, "num_warps": 4}


# a scale or an amax may be an element of a larger tensor, at any alignment: one kernel for all
@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=["scale_ptr", "amax_ptr"])
def _transpose_kernel(
    x_ptr, q_ptr, q_t_ptr, scale_ptr, amax_ptr, R, columns_t, C, limit,
    matrix_x, stride_x, matrix_q, stride_q, matrix_t, stride_t,
    QUANTISE: tl.constexpr, HAS_AMAX: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """q_t (C, columns_t) = x (R, C) transposed, then zeros, for each matrix of a bank. QUANTISE: both q and q_t hold
    x / scale in fp8.

    A program takes STEPS tiles, one below the other; what a step computes is not kept for the next one, which would
    take registers. columns_t is R rounded up to ROW_MULTIPLE, which Triton can see, so that stores are wide.

    HAS_AMAX: amax is raised to the largest |x|. Sizes are compared as the integers that their bits are, which have the
    order of the numbers, with NaN behind infinity: no atomic maximum of floats keeps NaN. Hazard: all programs raise
    one number, in any order, which is exact for a maximum. None may read it.
    """
    matrix = tl.program_id(2).to(tl.int64)
    offs_c = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    largest = 0
    for step in tl.range(STEPS, num_stages=1, disable_licm=True):
        offs_r = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = (offs_r < R)[:, None] & (offs_c < C)[None, :]
        from_ptr = x_ptr + matrix * matrix_x + offs_r[:, None] * stride_x + offs_c[None, :]
        q = tl.load(from_ptr, mask=inside, other=0.0)
        if HAS_AMAX:
            largest = tl.maximum(largest, tl.max(q.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF))
        if QUANTISE:
            q = _quotient(q.to(tl.float32), tl.load(scale_ptr + matrix), limit).to(q_ptr.dtype.element_ty)
            tl.store(q_ptr + matrix * matrix_q + offs_r[:, None] * stride_q + offs_c[None, :], q, mask=inside)
        inside_t = (offs_c < C)[:, None] & (offs_r < columns_t)[None, :]
        to_ptr = q_t_ptr + matrix * matrix_t + offs_c[:, None] * stride_t + offs_r[None, :]
        tl.store(to_ptr, tl.trans(q), mask=inside_t)
    if HAS_AMAX:
        tl.atomic_max(amax_ptr.to(tl.pointer_type(tl.int32), bitcast=True), largest, sem="relaxed")


def padded_columns(t: Tensor) -> int:
    """Columns of t (..., rows, columns) rounded up to ROW_MULTIPLE, if its memory has room for them: a copy that
    torch.compile makes of an argument that is written ends with its last element, and another matrix may be next."""
    columns = room = round_up(t.size(-1), ROW_MULTIPLE)
    steps = [(t.stride(d), t.size(d)) for d in range(t.dim() - 1) if t.size(d) > 1 or d == t.dim() - 2]
    for stride, size in sorted(steps):
        if stride < room:
            return t.size(-1)
        room += (size - 1) * stride
    fits = (t.storage_offset() + room) * t.itemsize <= t.untyped_storage().nbytes()
    return columns if fits else t.size(-1)


def strides(t: Tensor | None) -> tuple[int, int]:
    """From a matrix of t to the next, and from a row to the next; 0 where there is none."""
    if t is None:
        return 0, 0
    return (t.stride(0) if t.dim() == 3 and t.size(0) > 1 else 0), t.stride(-2)


def transpose(
    x: Tensor, q: Tensor | None, q_t: Tensor, scale: Tensor | None, cuda: bool = False, amax: Tensor | None = None
) -> None:
    """Fills q_t (C, R) with x (R, C) transposed; with q and scale, q with x / scale in its fp8 type, saturated, and q_t
    with the same transposed. Or the same of each matrix of a bank x (n, R, C), with a scale each, which lie side by
    side. Columns of q_t beyond the rows of x, up to ROW_MULTIPLE where there is room, are zeros. amax, one fp32 number
    that is none of the others, is raised to the largest |x| in the same pass, NaN being larger than infinity. By
    Triton, or by csrc/quantise_weight.cu."""
    (R, C), n = x.shape[-2:], x.size(0) if x.dim() == 3 else 1
    (matrix_x, stride_x), (matrix_q, stride_q), (matrix_t, stride_t) = strides(x), strides(q), strides(q_t)
    if cuda:
        extension.call(
            "fp8_transpose", x, dtype=x.dtype, q_dtype=q_t.dtype, x=x, q=q, q_t=q_t, scale=scale, amax=amax, n=n, R=R,
            C=C, columns_t=padded_columns(q_t), matrix_x=matrix_x, stride_x=stride_x, matrix_q=matrix_q,
            stride_q=stride_q, matrix_t=matrix_t, stride_t=stride_t,
        )  # fmt: skip
        return
    config = _config(x.dtype, capability(x.device))
    down, across = triton.cdiv(R, config["ROWS"]), triton.cdiv(C, config["COLUMNS"])
    steps = 1 if amax is None else triton.next_power_of_2(triton.cdiv(down * across * n, MOST_ATOMICS))
    launch(
        _transpose_kernel, (triton.cdiv(down, steps), across, n),
        x, q, q_t, scale, amax, R, padded_columns(q_t), C, torch.finfo(q_t.dtype).max,
        matrix_x, stride_x, matrix_q, stride_q, matrix_t, stride_t,
        QUANTISE=q is not None, HAS_AMAX=amax is not None, STEPS=steps, **config,
    )  # fmt: skip


# a matrix and its transpose


class Fp8Tensor(NamedTuple):
    """A matrix (R, C) in fp8, the same transposed, and their scale: t ~ scale * q. Or a bank (n, R, C) of them, with a
    scale for each."""

    q: Tensor
    q_t: Tensor
    scale: Tensor


class Site(NamedTuple):
    """A place of a model where a tensor is quantised, one fp32 number each.

    amax is raised to the largest size that was there. scale is the delayed one, which follows from the amax of earlier
    steps; None: the tensor's own.
    """

    amax: Tensor
    scale: Tensor | None = None


def empty_fp8(w: Tensor) -> Fp8Tensor:
    """Room for a copy in fp8 of w (V, C), or of a bank (n, V, C)."""
    *bank, V, C = w.shape
    q_t = aligned_empty(w, C, V, E4M3, bank)
    return Fp8Tensor(w.new_empty(w.shape, dtype=E4M3), q_t, w.new_empty(bank, dtype=torch.float32))


def fill_fp8(w: Tensor, copy: Fp8Tensor) -> None:
    """Fills the copy from w, in PyTorch."""
    copy.scale.copy_(matrix_scales(w))
    copy.q.copy_(quantised(w, copy.scale.reshape(*w.shape[:-2], 1, 1), E4M3))
    copy.q_t.copy_(copy.q.mT)


def fp8_copy(w: Tensor) -> Fp8Tensor:
    """A copy of w in fp8, made in PyTorch; of one on the meta device, room for it."""
    w = w.detach()
    copy = empty_fp8(w)
    if not w.is_meta:
        fill_fp8(w, copy)
    return copy


def check_fp8_weight(op: str, w: Tensor, copy: Fp8Tensor) -> None:
    """ValueError unless the copy is one that `empty_fp8` makes for w."""
    made = "of the copy that quantise_weight makes"
    check_tensor(op, f"q {made}", copy.q, w.shape, (E4M3,), w.device, contiguous=True)
    check_tensor(op, f"q_t {made}", copy.q_t, w.mT.shape, (E4M3,), w.device)
    if w.dim() == 2:
        check_number(op, f"the scale {made}", copy.scale, (torch.float32,), w.device)
    else:
        check_tensor(op, f"scale {made}", copy.scale, w.shape[:1], (torch.float32,), w.device, contiguous=True)
    if copy.q_t.stride(-1) != 1 or any(stride % 16 for stride in copy.q_t.stride()[:-1]):
        raise ValueError(f"{op}: q_t is {describe(copy.q_t)}; expected rows that begin at multiples of 16 bytes")


def fp8_rows(x: Tensor, scale: Tensor) -> Fp8Tensor:
    """x (..., C) as (M, C) in e4m3 with a given scale, made in PyTorch. The transposed copy has zeros in the columns
    beyond M, up to ROW_MULTIPLE."""
    q = quantised(x.detach().reshape(-1, x.size(-1)), scale, E4M3)
    q_t = q.new_zeros(q.size(1), round_up(q.size(0), ROW_MULTIPLE))
    q_t[:, : q.size(0)] = q.T
    return Fp8Tensor(q, q_t, scale)
