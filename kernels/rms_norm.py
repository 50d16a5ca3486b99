"""RMSNorm without gain, alone or at the end of a sum of two streams.

    h = a x + b x0                               when x0 is given; a and b default to 1: residual add and norm
    y = h rstd,  rstd = (mean_N(h^2) + eps)^-1/2                                    [Zhang & Sennrich 2019, eq. 4]
    y_fp8 = e4m3(y (1 / scale)),  amax = max |y| when scale is given; y ~ y_fp8 * scale

Shapes    x, x0, h, y, y_fp8 (..., N); a, b, scale, amax: one element. M is the product of the leading sizes
Dtypes    x, x0, h, y bf16 or fp32, all the same; a, b, scale, amax fp32
Rounding  arithmetic in fp32. h is rounded to its dtype, y is the norm of the rounded h and rounded once; y_fp8 is made
          from the rounded y and saturates at 448, the largest e4m3 number. amax is inf where y is NaN
Backward  g = dh + rstd (dy - xhat mean_N(dy xhat)),  xhat = h rstd:
          dx = a g,  dx0 = b g,  da = sum(g x),  db = sum(g x0), each rounded once; y_fp8 and amax have no gradient.
          da and db add one partial sum per program in a fixed order: bitwise repeatable, no atomics
Saves     rstd (4 B a row) and h; with a or b instead the inputs x and x0, from which backward recomputes the rounded h
Limits    1 <= N <= 16384 in the kernel. Rows may be any stride apart; where the elements of a row are not adjacent, x
          is copied first
Bound     memory: `rms_norm_cost`
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import sizes
from kernels.fp8 import E4M3, E4M3_MAX, check_capability
from kernels.op import (
    DTYPES,
    Backend,
    Op,
    Problem,
    Shape,
    capability,
    check_number,
    check_tensor,
    describe,
    needs_triton,
    takes_dtypes,
    wide,
)
from kernels.tile import launch

EPS = torch.finfo(torch.float32).eps
MAX_N = 16384


class RMSNorm(NamedTuple):
    """What rms_norm returns; None for what was not asked."""

    y: Tensor
    h: Tensor | None = None
    y_fp8: Tensor | None = None
    amax: Tensor | None = None


# reference


def rms_norm_ref(
    x: Tensor,
    x0: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    eps: float = EPS,
) -> RMSNorm:
    h = x
    if x0 is not None:
        acc_dtype = wide(x.dtype)
        h, h0 = x.to(acc_dtype), x0.to(acc_dtype)
        h = (h if a is None else a * h) + (h0 if b is None else b * h0)
        h = h.to(x.dtype)
    y = F.rms_norm(h, (h.size(-1),), eps=eps)
    mixed = None if x0 is None else h
    if scale is None:
        return RMSNorm(y, mixed)
    wide_y = y.detach().to(torch.promote_types(y.dtype, torch.float32))
    y_fp8 = (wide_y * (1 / scale)).clamp(-E4M3_MAX, E4M3_MAX)
    if y.dtype != torch.float64:  # there it is the oracle of the rounded one
        y_fp8 = y_fp8.to(E4M3)
    amax = wide_y.abs().nan_to_num(nan=torch.inf).amax() if y.numel() else wide_y.new_zeros(())
    return RMSNorm(y, mixed, y_fp8, amax)


# Triton


def _config(N: int, dtype: torch.dtype, arch: tuple[int, int]) -> dict[str, int]:
    """Rows and columns of a program's tile, and warps. Not measured on a GPU yet.

    Up to 1024 columns a warp holds whole rows, so that the reduction needs no barrier, and each lane has several
    16-byte loads in flight.
    """
    block_n = max(16, triton.next_power_of_2(N))
    return {
        "BLOCK_M": max(1, 1024 // block_n),
        "BLOCK_N": block_n,
        "num_warps": min(16, max(1, block_n // 1024)),
    }


@triton.jit
def _mix(x, x0, a_ptr, b_ptr, HAS_A: tl.constexpr, HAS_B: tl.constexpr):
    """a x + b x0 in fp32; a missing coefficient is 1. The fma is explicit: backward must round h as forward did."""
    if HAS_B:
        b = tl.load(b_ptr)
        h = tl.fma(x, tl.load(a_ptr), b * x0) if HAS_A else tl.fma(x0, b, x)
    else:
        h = tl.fma(x, tl.load(a_ptr), x0) if HAS_A else x + x0
    return h


# a scalar may be an element of a larger tensor, at any alignment: one kernel for all, not one for each alignment
@triton.jit(do_not_specialize_on_alignment=["a_ptr", "b_ptr", "scale_ptr"])
def _rms_norm_fwd_kernel(
    x_ptr, x0_ptr, a_ptr, b_ptr, scale_ptr,
    y_ptr, h_ptr, rstd_ptr, y_fp8_ptr, row_amax_ptr,
    stride_x_row, stride_x0_row, M, eps, fp8_max,
    N: tl.constexpr, MIX: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr, QUANTISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask = mask_m[:, None] & (offs_n < N)[None, :]
    offs_out = offs_m[:, None] * N + offs_n[None, :]
    h = tl.load(x_ptr + offs_m[:, None] * stride_x_row + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    if MIX:
        x0 = tl.load(x0_ptr + offs_m[:, None] * stride_x0_row + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        stored = _mix(h, x0, a_ptr, b_ptr, HAS_A, HAS_B).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + offs_out, stored, mask=mask)
        h = stored.to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(h * h, axis=1) / N + eps)  # (BLOCK_M,)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)
    y = (h * rstd[:, None]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs_out, y, mask=mask)
    if QUANTISE:
        y = y.to(tl.float32)
        size = tl.where(y == y, tl.abs(y), float("inf"))
        tl.store(row_amax_ptr + offs_m, tl.max(size, axis=1), mask=mask_m)
        y = tl.clamp(y * tl.div_rn(1.0, tl.load(scale_ptr)), -fp8_max, fp8_max, propagate_nan=tl.PropagateNan.ALL)
        tl.store(y_fp8_ptr + offs_out, y.to(y_fp8_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["a_ptr", "b_ptr"])
def _rms_norm_bwd_kernel(
    dy_ptr, dh_ptr, h_ptr, x_ptr, x0_ptr, a_ptr, b_ptr, rstd_ptr,
    dx_ptr, dx0_ptr, da_ptr, db_ptr,
    stride_dy_row, stride_dh_row, stride_h_row, stride_x_row, stride_x0_row, M,
    N: tl.constexpr, HAS_DH: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    offs_m = pid.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask = mask_m[:, None] & (offs_n < N)[None, :]
    offs_out = offs_m[:, None] * N + offs_n[None, :]
    if HAS_A or HAS_B:
        x = tl.load(x_ptr + offs_m[:, None] * stride_x_row + offs_n[None, :], mask=mask, other=0.0)
        x0 = tl.load(x0_ptr + offs_m[:, None] * stride_x0_row + offs_n[None, :], mask=mask, other=0.0)
        dtype: tl.constexpr = x.dtype
        x, x0 = x.to(tl.float32), x0.to(tl.float32)
        h = _mix(x, x0, a_ptr, b_ptr, HAS_A, HAS_B).to(dtype).to(tl.float32)
    else:
        h = tl.load(h_ptr + offs_m[:, None] * stride_h_row + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
    dy = tl.load(dy_ptr + offs_m[:, None] * stride_dy_row + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    xhat = h * rstd
    g = rstd * (dy - xhat * (tl.sum(dy * xhat, axis=1) / N)[:, None])
    if HAS_DH:
        g += tl.load(dh_ptr + offs_m[:, None] * stride_dh_row + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    dx = g
    if HAS_A:
        dx = g * tl.load(a_ptr)
        tl.store(da_ptr + pid, tl.sum(tl.sum(g * x, axis=1), axis=0))
    tl.store(dx_ptr + offs_out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if HAS_A or HAS_B:  # otherwise dx0 is dx
        dx0 = g
        if HAS_B:
            dx0 = g * tl.load(b_ptr)
            tl.store(db_ptr + pid, tl.sum(tl.sum(g * x0, axis=1), axis=0))
        tl.store(dx0_ptr + offs_out, dx0.to(dx0_ptr.dtype.element_ty), mask=mask)


# torch ops


def _rows(t: Tensor) -> Tensor:
    """(M, N) of t, elements of a row side by side; a copy only where no single stride leads from row to row."""
    rows = t.reshape(-1, t.size(-1))
    return rows if rows.stride(1) == 1 or rows.size(1) == 1 else rows.contiguous()


def _like(t: Tensor, wanted: bool, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor like t; an empty one if it is not wanted, since a torch op cannot return None."""
    if not wanted:
        return t.new_empty(0)
    return torch.empty(t.shape, dtype=dtype or t.dtype, device=t.device)


@torch.library.custom_op("redline::rms_norm_fwd", mutates_args=())
def _rms_norm_fwd(
    x: Tensor, x0: Tensor | None, a: Tensor | None, b: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, h (empty without x0), rstd (M,), y_fp8 (empty without scale), amax."""
    if scale is not None:
        check_capability("rms_norm", x.device)
    rows, rows0 = _rows(x), None if x0 is None else _rows(x0)
    (M, N), fp8 = rows.shape, scale is not None
    y, h, y_fp8 = _like(x, True), _like(x, x0 is not None), _like(x, fp8, E4M3)
    rstd, row_amax = rows.new_empty(M, dtype=torch.float32), rows.new_empty(M if fp8 else 0, dtype=torch.float32)
    config = _config(N, x.dtype, capability(x.device))
    if M:
        launch(
            _rms_norm_fwd_kernel, (triton.cdiv(M, config["BLOCK_M"]),),
            rows, rows0, a, b, scale, y, h, rstd, y_fp8, row_amax,
            rows.stride(0), 0 if rows0 is None else rows0.stride(0), M, eps, E4M3_MAX,
            N=N, MIX=x0 is not None, HAS_A=a is not None, HAS_B=b is not None, QUANTISE=fp8, **config,
        )  # fmt: skip
    return y, h, rstd, y_fp8, row_amax.amax() if row_amax.numel() else rstd.new_zeros(())


@_rms_norm_fwd.register_fake
def _(x, x0, a, b, scale, eps):
    fp8 = scale is not None
    rstd = x.new_empty(x.numel() // x.size(-1), dtype=torch.float32)
    return _like(x, True), _like(x, x0 is not None), rstd, _like(x, fp8, E4M3), x.new_empty((), dtype=torch.float32)


@torch.library.custom_op("redline::rms_norm_bwd", mutates_args=())
def _rms_norm_bwd(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor | None,
    x: Tensor | None,
    x0: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dx0 (empty without a and b: it is dx), da, db (fp32, one element; empty without a, b). h, or x and x0."""
    like = x if x is not None else h
    assert like is not None, "backward needs h, or x and x0"
    dy_rows = _rows(dy)
    dh_rows, h_rows, x_rows, x0_rows = (None if t is None else _rows(t) for t in (dh, h, x, x0))
    M, N = dy_rows.shape
    config = _config(N, like.dtype, capability(like.device))
    programs = triton.cdiv(M, config["BLOCK_M"])
    mixed = x is not None
    dx, dx0 = _like(like, True), _like(like, mixed)
    da, db = (rstd.new_empty(programs if t is not None else 0) for t in (a, b))

    def stride(rows: Tensor | None) -> int:
        return 0 if rows is None else rows.stride(0)

    if M:
        launch(
            _rms_norm_bwd_kernel, (programs,),
            dy_rows, dh_rows, h_rows, x_rows, x0_rows, a, b, rstd,
            dx, dx0, da, db,
            stride(dy_rows), stride(dh_rows), stride(h_rows), stride(x_rows), stride(x0_rows), M,
            N=N, HAS_DH=dh is not None, HAS_A=a is not None, HAS_B=b is not None, **config,
        )  # fmt: skip
    return dx, dx0, da if a is None else da.sum(), db if b is None else db.sum()


@_rms_norm_bwd.register_fake
def _(dy, dh, h, x, x0, a, b, rstd):
    like = h if x is None else x
    return _like(like, True), _like(like, x is not None), *(rstd.new_empty((0,) if t is None else ()) for t in (a, b))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, x0, a, b, _, _ = inputs
    _, h, rstd, y_fp8, amax = output
    ctx.mark_non_differentiable(rstd, y_fp8, amax)
    ctx.set_materialize_grads(False)
    ctx.mixed = x0 is not None
    if a is not None or b is not None:
        ctx.save_for_backward(None, x, x0, a, b, rstd)
    else:
        ctx.save_for_backward(h if ctx.mixed else x, None, None, None, None, rstd)


def _backward(ctx: Any, dy: Tensor | None, dh: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    h, x, x0, a, b, rstd = ctx.saved_tensors
    like = h if x is None else x
    dy = torch.zeros_like(like) if dy is None else dy
    dx, dx0, da, db = _rms_norm_bwd(dy, dh if ctx.mixed else None, h, x, x0, a, b, rstd)
    dx0 = dx0 if x is not None else dx if ctx.mixed else None
    da, db = (None if t is None else dt.reshape(t.shape) for t, dt in ((a, da), (b, db)))
    return dx, dx0, da, db, None, None


_rms_norm_fwd.register_autograd(_backward, setup_context=_setup_context)


def _rms_norm_triton(
    x: Tensor,
    x0: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    eps: float = EPS,
) -> RMSNorm:
    y, h, _, y_fp8, amax = _rms_norm_fwd(x, x0, a, b, scale, eps)
    fp8 = (None, None) if scale is None else (y_fp8, amax)
    return RMSNorm(y, None if x0 is None else h, *fp8)


# cost


def rms_norm_cost(
    shape: tuple[int, int], dtype: torch.dtype, form: str = "plain", backward: bool = False
) -> tuple[int, int]:
    """The least FLOPs and bytes of forward or backward: each (M, N) tensor of the form is read or written once."""
    M, N = shape
    # tensors: x | x x0 -> h y;  backward: dy h -> dx | dy dh h -> dx (x0 has the same) | dy dh x x0 -> dx dx0
    tensors = {"plain": (2, 3), "add": (4, 4), "mix": (4, 6), "mix_fp8": (4, 6)}[form][backward]
    flops = {"plain": (3, 7), "add": (4, 8), "mix": (6, 14), "mix_fp8": (9, 14)}[form][backward]
    fp8_bytes = M * N if form == "mix_fp8" and not backward else 0
    return flops * M * N, tensors * M * N * dtype.itemsize + fp8_bytes


# interface


def _check(
    x: Tensor,
    x0: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    eps: float = EPS,
) -> Problem:
    if x.dim() == 0 or x.size(-1) == 0 or x.dtype not in (*DTYPES, torch.float64):
        raise ValueError(f"rms_norm: x is {describe(x)}; expected (..., N) bfloat16 or float32 with 1 <= N")
    if x0 is None and (a is not None or b is not None):
        raise ValueError("rms_norm: a and b scale a sum of two streams; give x0 with them")
    if x0 is not None:
        check_tensor("rms_norm", "x0", x0, x.shape, (x.dtype,), x.device)
    for name, t in (("a", a), ("b", b), ("scale", scale)):
        if t is not None:
            check_number("rms_norm", name, t, (wide(x.dtype),), x.device)
    return Problem((x.numel() // x.size(-1), x.size(-1)), x.dtype, x.device)


def _limits(shape: Shape, dtype: torch.dtype) -> str | None:
    return takes_dtypes(shape, dtype) or (
        None if 1 <= shape[1] <= MAX_N else f"takes rows of 1 to {MAX_N} elements, not {shape[1]}"
    )


def _mix_inputs(make: Callable[..., Tensor], M: int, N: int) -> dict[str, Tensor]:
    scalars = {name: make(dtype=torch.float32) for name in ("a", "b")}
    return {"x": make(M, N), "x0": make(M, N), **scalars}


rms_norm = Op(
    "rms_norm",
    dims=("M", "N"),
    cases=sizes.cases(lambda size: (size.tokens, size.C)),
    forms={
        "plain": lambda make, M, N: {"x": make(M, N)},
        "add": lambda make, M, N: {"x": make(M, N), "x0": make(M, N)},
        "mix": _mix_inputs,
        "mix_fp8": lambda make, M, N: _mix_inputs(make, M, N) | {"scale": make(dtype=torch.float32).detach().abs()},
    },
    cost=rms_norm_cost,
    check=_check,
    backends={"ref": Backend(rms_norm_ref), "triton": Backend(_rms_norm_triton, needs_triton, _limits)},
)
