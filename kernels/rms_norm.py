"""RMSNorm without gain, alone or at the end of a sum of two or three streams.

    h = a (x + x1) + b x0                        when x0 is given; x1 may be missing; a and b default to 1
    y = h rstd,  rstd = (mean_N(h^2) + eps)^-1/2                                    [Zhang & Sennrich 2019, eq. 4]
    q = e4m3(y (1 / scale)),  q_t = q^T when scale is given: y ~ scale q, for products in fp8
    first = the leading `first` channels of y, as a tensor of its own, when first > 0

x and x0 alone are the residual add and norm. With x1, what a layer adds to the stream is summed in the pass that the
next layer begins with: x + x1 is never stored.

Shapes    x, x0, x1, h, y (..., N); first (..., first); a, b, scale: one element. M is the product of the leading sizes.
          q (M, N); q_t (N, M'), where M' is M rounded up to ROW_MULTIPLE: columns beyond M are zeros, which add nothing
          to a sum over rows
Dtypes    x, x0, x1, h, y, first bf16 or fp32, all the same; a, b, scale fp32
Rounding  arithmetic in fp32. h is rounded to its dtype, once: x + x1 is not; y is the norm of the rounded h and rounded
          once; q is made from the rounded y and saturates at 448, the largest e4m3 number; NaN stays NaN. With
          `norm_scale` nothing saturates, and scaling is exact
Unread    with scale y is not stored: who multiplies by q does not read it. A placeholder carries its gradient dy, which
          is an ordinary tensor; it holds one NaN for all elements, so that reading it by mistake is loud
Backward  with dy the gradient of y plus, in its channels, that of first:
          g = dh + rstd (dy - xhat mean_N(dy xhat)),  xhat = h rstd:
          dx = dx1 = a g,  dx0 = dx0_in + b g,  da = sum(g (x + x1)),  db = sum(g x0), each rounded once; q, q_t
          and scale have none. da and db add one partial sum per program in a fixed order: bitwise repeatable, no
          atomics
Chain     with a or b, RMSNorm.x0 is x0 again, for whoever uses x0 next: dx0_in is the gradient that arrives there, so
          that the gradients of an x0 that every layer uses are summed without passes of their own. Where nobody uses
          it, nothing is read or added
Saves     rstd (4 B a row) and h; with a or b instead the inputs x, x0 and x1, from which backward recomputes the
          rounded h
Limits    1 <= N <= 16384 in the Triton kernel, 4096 in the CUDA one (csrc/rms_norm.cu); first <= 64. Rows may be any
          stride apart; where the elements of a row are not adjacent, x is copied first. One pass of the Triton kernel
          writes both q and q_t up to N = 2048; else a second one transposes q
Bound     memory: `rms_norm_cost`
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import extension, sizes
from kernels.fp8 import E4M3, E4M3_MAX, ROW_MULTIPLE, Fp8Tensor, check_capability, clamped, transpose
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
from kernels.sizes import round_up
from kernels.tile import as_rows, launch

EPS = torch.finfo(torch.float32).eps
MAX_N = 16384
AT_ONCE_N = 2048  # up to which one pass of the Triton kernel writes both copies in fp8
CUDA_MAX_N = 4096
MAX_FIRST = 64


class RMSNorm(NamedTuple):
    """What rms_norm returns; None for what was not asked."""

    y: Tensor  # with scale a placeholder: see Unread
    h: Tensor | None = None
    fp8: Fp8Tensor | None = None  # q and q_t, and the scale that was given
    x0: Tensor | None = None  # x0 again: see Chain
    first: Tensor | None = None


def norm_scale(N: int) -> float:
    """The least power of two that is not below sqrt(N) / 448: a scale for normed rows of N channels.

    |y| <= sqrt(N) in such a row, since sum(y^2) <= N; so |y| / scale <= 448, and nothing saturates. (What rounding adds
    to y is less than half of a step of e4m3 there.) No amax and no history of one is needed, and dividing by a power of
    two is exact.
    """
    return 2.0 ** math.ceil(math.log2(N) / 2 - math.log2(E4M3_MAX))


# reference


def rms_norm_ref(
    x: Tensor,
    x0: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    x1: Tensor | None = None,
    first: int = 0,
    scale: Tensor | None = None,
    eps: float = EPS,
) -> RMSNorm:
    h = x
    if x0 is not None:
        acc_dtype = wide(x.dtype)
        h, h0 = x.to(acc_dtype), x0.to(acc_dtype)
        h = h if x1 is None else h + x1.to(acc_dtype)
        h = (h if a is None else a * h) + (h0 if b is None else b * h0)
        h = h.to(x.dtype)
    y = F.rms_norm(h, (h.size(-1),), eps=eps)
    mixed = None if x0 is None else h
    chain = None if a is None and b is None else x0
    part = y[..., :first] if first else None
    if scale is None:
        return RMSNorm(y, mixed, None, chain, part)
    q = (y.detach().to(wide(y.dtype)) * (1 / scale)).clamp(-E4M3_MAX, E4M3_MAX).reshape(-1, y.size(-1))
    if y.dtype != torch.float64:  # there it is the oracle of the rounded one
        q = q.to(E4M3)
    q_t = q.new_zeros(q.size(1), round_up(q.size(0), ROW_MULTIPLE))
    q_t[:, : q.size(0)] = q.T
    return RMSNorm(y + torch.nan, mixed, Fp8Tensor(q, q_t, scale), chain, part)  # unread, with the gradient of y


# Triton


def _config(N: int, dtype: torch.dtype, arch: tuple[int, int]) -> dict[str, int]:
    """Rows and columns of a tile, tiles that a program takes one after another, and warps. Not measured on a GPU yet.

    Up to 1024 columns a warp holds whole rows, so that the reduction needs no barrier, and each lane has several
    16-byte loads in flight. Such a program takes 4 rows or more: a new one for each row is much to start for little.
    """
    block_n = max(16, triton.next_power_of_2(N))
    block_m = max(1, 1024 // block_n)
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_TILES": max(1, 4 // block_m) if block_n <= 1024 else 1,
        "num_warps": min(16, max(1, block_n // 1024)),
    }


def _fp8_config(N: int, dtype: torch.dtype, arch: tuple[int, int]) -> dict[str, int]:
    """Of forward with scale where one pass writes both copies: ROW_MULTIPLE whole rows, in chunks of which a thread has
    16 numbers, so that it writes 16 bytes of either copy. Not measured on a GPU yet.

    Rows of up to 3 KiB leave room for two such programs on an SM, of which one loads while the other stores; 128
    registers a thread are what that takes. Longer rows spill there, and have twice the threads; on sm_100 those of
    3 KiB do.
    """
    most = 3072 if arch[0] == 9 else 2048
    block_n = min(256 if N * dtype.itemsize <= most else 512, max(16, triton.next_power_of_2(N)))
    warps = max(1, block_n // 32)
    return {"BLOCK_M": ROW_MULTIPLE, "BLOCK_N": block_n, "BLOCK_TILES": 1, "num_warps": warps, "maxnreg": 128}


def _mix_bwd_config(N: int, dtype: torch.dtype, arch: tuple[int, int]) -> dict[str, int]:
    """Of backward with a or b, which holds three streams in registers across the mean. Not measured on a GPU yet.

    Up to 4096 columns a thread has 8 numbers of each stream: 64 registers at 1536 columns, with 32 numbers 128.
    """
    config = _config(N, dtype, arch)
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    if block_n > 4096:
        return config
    return config | {
        "BLOCK_TILES": max(1, 4 // block_m) if block_n <= 2048 else 1,
        "num_warps": max(1, block_m * block_n // 256),
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
    x_ptr, x0_ptr, x1_ptr, a_ptr, b_ptr, scale_ptr,
    y_ptr, h_ptr, rstd_ptr, q_ptr, q_t_ptr, first_ptr,
    stride_x_row, stride_x0_row, stride_x1_row, M, eps, fp8_max, columns_t,
    N: tl.constexpr, PADDED_FIRST: tl.constexpr, MIX: tl.constexpr, HAS_X1: tl.constexpr, HAS_A: tl.constexpr,
    HAS_B: tl.constexpr, QUANTISE: tl.constexpr, TRANSPOSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TILES: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """A tile is BLOCK_M whole rows, in CHUNKS of BLOCK_N columns, which stay in registers from the only read to the
    last write.

    QUANTISE: q is stored instead of y, and with TRANSPOSE q_t (N, columns_t) too. BLOCK_M is then ROW_MULTIPLE, so
    that the programs together write columns_t columns, 16 bytes of a row each, those beyond M as zeros.
    """
    for tile in range(BLOCK_TILES):
        offs_m = (tl.program_id(0).to(tl.int64) * BLOCK_TILES + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        chunks = ()
        for chunk in tl.static_range(CHUNKS):
            offs_n = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
            mask = mask_m[:, None] & (offs_n < N)[None, :]
            offs_out = offs_m[:, None] * N + offs_n[None, :]
            h = tl.load(x_ptr + offs_m[:, None] * stride_x_row + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
            if MIX:
                if HAS_X1:
                    offs_x1 = offs_m[:, None] * stride_x1_row + offs_n[None, :]
                    h += tl.load(x1_ptr + offs_x1, mask=mask, other=0.0).to(tl.float32)
                offs_x0 = offs_m[:, None] * stride_x0_row + offs_n[None, :]
                x0 = tl.load(x0_ptr + offs_x0, mask=mask, other=0.0).to(tl.float32)
                stored = _mix(h, x0, a_ptr, b_ptr, HAS_A, HAS_B).to(h_ptr.dtype.element_ty)
                tl.store(h_ptr + offs_out, stored, mask=mask)
                h = stored.to(tl.float32)
            chunks = chunks + (h,)
        squares = h * h
        for chunk in tl.static_range(CHUNKS - 1):
            squares += chunks[chunk] * chunks[chunk]
        rstd = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=1) / N + eps)  # (BLOCK_M,)
        tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)
        if QUANTISE:
            inverse = tl.div_rn(1.0, tl.load(scale_ptr))
        for chunk in tl.static_range(CHUNKS):
            offs_n = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
            mask = mask_m[:, None] & (offs_n < N)[None, :]
            offs_out = offs_m[:, None] * N + offs_n[None, :]
            y = (chunks[chunk] * rstd[:, None]).to(y_ptr.dtype.element_ty)
            if not QUANTISE:
                tl.store(y_ptr + offs_out, y, mask=mask)
            if PADDED_FIRST > chunk * BLOCK_N:
                # into rows of 16-byte multiples, filled: as wide as the store of y
                offs_first = offs_m[:, None] * PADDED_FIRST + offs_n[None, :]
                tl.store(first_ptr + offs_first, y, mask=mask & (offs_n < PADDED_FIRST)[None, :])
            if QUANTISE:
                q = clamped(y.to(tl.float32) * inverse, fp8_max)
                if TRANSPOSE:  # rows beyond M as zeros, which they are not if a factor is NaN or the scale 0
                    q = tl.where(mask_m[:, None], q, 0.0)
                q = q.to(q_ptr.dtype.element_ty)
                tl.store(q_ptr + offs_out, q, mask=mask)
                if TRANSPOSE:
                    offs_t = offs_n[:, None].to(tl.int64) * columns_t + offs_m[None, :]
                    mask_t = (offs_n < N)[:, None] & (offs_m < columns_t)[None, :]
                    tl.store(q_t_ptr + offs_t, tl.trans(q), mask=mask_t)


@triton.jit(do_not_specialize_on_alignment=["a_ptr", "b_ptr"])
def _rms_norm_bwd_kernel(
    dy_ptr, dh_ptr, dfirst_ptr, dx0_in_ptr, h_ptr, x_ptr, x0_ptr, x1_ptr, a_ptr, b_ptr, rstd_ptr,
    dx_ptr, dx0_ptr, da_ptr, db_ptr,
    stride_dy_row, stride_dh_row, stride_dfirst_row, stride_dx0_in_row, stride_h_row, stride_x_row, stride_x0_row,
    stride_x1_row, M,
    N: tl.constexpr, FIRST: tl.constexpr, HAS_DH: tl.constexpr, HAS_DX0_IN: tl.constexpr, HAS_X1: tl.constexpr,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)
    da = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(BLOCK_TILES):
        offs_m = (pid.to(tl.int64) * BLOCK_TILES + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask = mask_m[:, None] & (offs_n < N)[None, :]
        offs_out = offs_m[:, None] * N + offs_n[None, :]
        if HAS_A or HAS_B:
            x = tl.load(x_ptr + offs_m[:, None] * stride_x_row + offs_n[None, :], mask=mask, other=0.0)
            dtype: tl.constexpr = x.dtype
            x = x.to(tl.float32)
            if HAS_X1:
                offs_x1 = offs_m[:, None] * stride_x1_row + offs_n[None, :]
                x += tl.load(x1_ptr + offs_x1, mask=mask, other=0.0).to(tl.float32)
            offs_x0 = offs_m[:, None] * stride_x0_row + offs_n[None, :]
            x0 = tl.load(x0_ptr + offs_x0, mask=mask, other=0.0).to(tl.float32)
            h = _mix(x, x0, a_ptr, b_ptr, HAS_A, HAS_B).to(dtype).to(tl.float32)
        else:
            h = tl.load(h_ptr + offs_m[:, None] * stride_h_row + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        dy = tl.load(dy_ptr + offs_m[:, None] * stride_dy_row + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        if FIRST:
            offs_first = offs_m[:, None] * stride_dfirst_row + offs_n[None, :]
            mask_first = mask & (offs_n < FIRST)[None, :]
            dy += tl.load(dfirst_ptr + offs_first, mask=mask_first, other=0.0).to(tl.float32)
        xhat = h * rstd
        g = rstd * (dy - xhat * (tl.sum(dy * xhat, axis=1) / N)[:, None])
        if HAS_DH:
            offs_dh = offs_m[:, None] * stride_dh_row + offs_n[None, :]
            g += tl.load(dh_ptr + offs_dh, mask=mask, other=0.0).to(tl.float32)
        dx = g
        if HAS_A:
            dx = g * tl.load(a_ptr)
            da += g * x
        if HAS_A or HAS_B:  # otherwise dx0 is dx
            dx0 = g
            if HAS_B:
                dx0 = g * tl.load(b_ptr)
                db += g * x0
            if HAS_DX0_IN:
                offs_dx0_in = offs_m[:, None] * stride_dx0_in_row + offs_n[None, :]
                dx0 += tl.load(dx0_in_ptr + offs_dx0_in, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx0_ptr + offs_out, dx0.to(dx0_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + offs_out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if HAS_A:
        tl.store(da_ptr + pid, tl.sum(tl.sum(da, axis=1), axis=0))
    if HAS_B:
        tl.store(db_ptr + pid, tl.sum(tl.sum(db, axis=1), axis=0))


# torch ops


def _like(t: Tensor, wanted: bool) -> Tensor:
    """An uninitialised tensor like t; an empty one if it is not wanted, since a torch op cannot return None."""
    if not wanted:
        return t.new_empty(0)
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


def _copies(x: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised q (M, N) and q_t (N, M') of x; empty ones if they are not wanted."""
    if not wanted:
        return x.new_empty(0), x.new_empty(0)
    M, N = x.numel() // x.size(-1), x.size(-1)
    return x.new_empty(M, N, dtype=E4M3), x.new_empty(N, round_up(M, ROW_MULTIPLE), dtype=E4M3)


def _stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)


@torch.library.custom_op("redline::rms_norm_fwd", mutates_args=())
def _rms_norm_fwd(
    x: Tensor,
    x0: Tensor | None,
    x1: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: Tensor | None,
    first: int,
    eps: float,
    cuda: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """By Triton or by CUDA: y (empty with scale), h (empty without x0), rstd (M,), q and q_t (empty without scale), and
    the first channels in padded rows."""
    if scale is not None:
        check_capability("rms_norm", x.device)
    rows, rows0, rows1 = as_rows(x), None if x0 is None else as_rows(x0), None if x1 is None else as_rows(x1)
    (M, N), fp8 = rows.shape, scale is not None
    y, h, rstd = _like(x, not fp8), _like(x, x0 is not None), rows.new_empty(M, dtype=torch.float32)
    q, q_t = _copies(x, fp8)
    part = x.new_empty(*x.shape[:-1], round_up(first, ROW_MULTIPLE))
    at_once = fp8 and not cuda and N <= AT_ONCE_N
    if M and cuda:
        extension.call(
            "rms_norm_forward", rows, dtype=x.dtype, x=rows, x0=rows0, x1=rows1, a=a, b=b, scale=scale,
            y=None if fp8 else y, h=None if x0 is None else h, rstd=rstd, q=q if fp8 else None,
            first=part if first else None, stride_x=_stride(rows), stride_x0=_stride(rows0), stride_x1=_stride(rows1),
            M=M, N=N, padded_first=part.size(-1), eps=eps,
        )  # fmt: skip
    elif M:
        config = (_fp8_config if at_once else _config)(N, x.dtype, capability(x.device))
        launch(
            _rms_norm_fwd_kernel, (triton.cdiv(M, config["BLOCK_M"] * config["BLOCK_TILES"]),),
            rows, rows0, rows1, a, b, scale, y, h, rstd, q, q_t, part,
            _stride(rows), _stride(rows0), _stride(rows1), M, eps, E4M3_MAX, q_t.size(-1),
            N=N, PADDED_FIRST=part.size(-1), MIX=x0 is not None, HAS_X1=x1 is not None, HAS_A=a is not None,
            HAS_B=b is not None, QUANTISE=fp8, TRANSPOSE=at_once, CHUNKS=triton.cdiv(N, config["BLOCK_N"]), **config,
        )  # fmt: skip
    if M and fp8 and not at_once:
        transpose(q, None, q_t, None, cuda)
    return y, h, rstd, q, q_t, part


@_rms_norm_fwd.register_fake
def _(x, x0, x1, a, b, scale, first, eps, cuda):
    fp8 = scale is not None
    rstd = x.new_empty(x.numel() // x.size(-1), dtype=torch.float32)
    part = x.new_empty(*x.shape[:-1], round_up(first, ROW_MULTIPLE))
    return _like(x, not fp8), _like(x, x0 is not None), rstd, *_copies(x, fp8), part


@torch.library.custom_op("redline::rms_norm_bwd", mutates_args=())
def _rms_norm_bwd(
    dy: Tensor,
    dh: Tensor | None,
    dfirst: Tensor | None,
    dx0_in: Tensor | None,
    h: Tensor | None,
    x: Tensor | None,
    x0: Tensor | None,
    x1: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    rstd: Tensor,
    cuda: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dx0 (empty without a and b: it is dx), da, db (fp32, one element; empty without a, b). h, or x, x0 and x1."""
    like = x if x is not None else h
    assert like is not None, "backward needs h, or x and x0"
    mixed = x is not None
    dy_rows = as_rows(dy)
    given = (dh, dfirst, dx0_in, h, x, x0, x1)
    dh_rows, dfirst_rows, dx0_in_rows, h_rows, x_rows, x0_rows, x1_rows = rows = [
        None if t is None else as_rows(t) for t in given
    ]
    M, N = dy_rows.shape
    config = (_mix_bwd_config if mixed else _config)(N, like.dtype, capability(like.device))
    programs = triton.cdiv(M, config["BLOCK_M"] * config["BLOCK_TILES"])
    if M and cuda:
        programs = extension.module(like.device).rms_norm_backward_blocks(M, N)
    dx, dx0 = _like(like, True), _like(like, mixed)
    da, db = (rstd.new_empty(programs if t is not None else 0) for t in (a, b))
    channels = 0 if dfirst is None else dfirst.size(-1)
    if M and cuda:
        extension.call(
            "rms_norm_backward", dy_rows, dtype=like.dtype, dy=dy_rows, dh=dh_rows, dfirst=dfirst_rows,
            dx0_in=dx0_in_rows, x=x_rows if mixed else h_rows, x0=x0_rows, x1=x1_rows, a=a, b=b, rstd=rstd,
            dx=dx, dx0=dx0 if mixed else None, da=None if a is None else da, db=None if b is None else db,
            stride_dy=_stride(dy_rows), stride_dh=_stride(dh_rows), stride_dfirst=_stride(dfirst_rows),
            stride_dx0_in=_stride(dx0_in_rows), stride_x=_stride(x_rows if mixed else h_rows),
            stride_x0=_stride(x0_rows), stride_x1=_stride(x1_rows), M=M, N=N, first=channels,
        )  # fmt: skip
    elif M:
        launch(
            _rms_norm_bwd_kernel, (programs,),
            dy_rows, dh_rows, dfirst_rows, dx0_in_rows, h_rows, x_rows, x0_rows, x1_rows, a, b, rstd,
            dx, dx0, da, db,
            _stride(dy_rows), *map(_stride, rows), M,
            N=N, FIRST=channels, HAS_DH=dh is not None, HAS_DX0_IN=dx0_in is not None,
            HAS_X1=x1 is not None, HAS_A=a is not None, HAS_B=b is not None, **config,
        )  # fmt: skip
    return dx, dx0, da if a is None else da.sum(), db if b is None else db.sum()


@_rms_norm_bwd.register_fake
def _(dy, dh, dfirst, dx0_in, h, x, x0, x1, a, b, rstd, cuda):
    like = h if x is None else x
    return _like(like, True), _like(like, x is not None), *(rstd.new_empty((0,) if t is None else ()) for t in (a, b))


class _RMSNorm(torch.autograd.Function):
    """A custom op cannot return one of its arguments, which the chain of x0 does; so the formula stands here."""

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]  # torch declares (ctx, *args, **kwargs)
        ctx: Any,
        x: Tensor,
        x0: Tensor | None,
        x1: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        scale: Tensor | None,
        first: int,
        eps: float,
        cuda: bool,
    ) -> tuple[Tensor | None, ...]:
        y, h, rstd, q, q_t, part = _rms_norm_fwd(x, x0, x1, a, b, scale, first, eps, cuda)
        ctx.set_materialize_grads(False)
        ctx.cuda = cuda
        part = part[..., :first] if first else None
        ctx.streams, chain = (True, x0 is not None, x1 is not None), None
        if x0 is not None and (a is not None or b is not None):
            ctx.save_for_backward(None, x, x0, x1, a, b, rstd)
            chain = x0.view_as(x0)
        else:
            ctx.save_for_backward(x if x0 is None else h, None, None, None, None, None, rstd)
        h = None if x0 is None else h
        if scale is None:
            return y, h, None, None, chain, part
        ctx.mark_non_differentiable(q, q_t)
        return x.new_full((), torch.nan).expand(x.shape), h, q, q_t, chain, part

    @staticmethod
    def backward(  # pyrefly: ignore[bad-override]  # torch declares (ctx, *args)
        ctx: Any,
        dy: Tensor | None,
        dh: Tensor | None,
        _q: Any,
        _q_t: Any,
        dx0_in: Tensor | None,
        dfirst: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        h, x, x0, x1, a, b, rstd = ctx.saved_tensors
        if dy is None and dh is None and dfirst is None:  # x0 alone was used
            return None, dx0_in, None, None, None, None, None, None, None
        if dy is None:
            dy = torch.zeros_like(h if x is None else x)
        dx, dx0, da, db = _rms_norm_bwd(dy, dh, dfirst, dx0_in, h, x, x0, x1, a, b, rstd, ctx.cuda)
        streams = (dx, dx if x is None else dx0, dx)
        scalars = (None if t is None else dt.reshape(t.shape) for t, dt in ((a, da), (b, db)))
        return *(t if there else None for t, there in zip(streams, ctx.streams)), *scalars, None, None, None, None


@torch.compiler.allow_in_graph  # Dynamo would make zeros of gradients that are not there, and refuse one tensor twice
def _apply(*args: Any) -> tuple[Tensor | None, ...]:
    outputs: tuple[Tensor | None, ...] = _RMSNorm.apply(*args)
    return outputs


def _rms_norm_triton(
    x: Tensor,
    x0: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    x1: Tensor | None = None,
    first: int = 0,
    scale: Tensor | None = None,
    eps: float = EPS,
    cuda: bool = False,
) -> RMSNorm:
    y, h, q, q_t, chain, part = _apply(x, x0, x1, a, b, scale, first, eps, cuda)  # pyrefly: ignore[not-callable]
    assert y is not None
    if scale is None:
        return RMSNorm(y, h, None, chain, part)
    assert q is not None and q_t is not None
    return RMSNorm(y, h, Fp8Tensor(q, q_t, scale), chain, part)


def _rms_norm_cuda(x: Tensor, *args: Any, **options: Any) -> RMSNorm:
    """The same by csrc/rms_norm.cu."""
    return _rms_norm_triton(x, *args, **options, cuda=True)


# cost


def rms_norm_cost(
    shape: tuple[int, int], dtype: torch.dtype, form: str = "plain", backward: bool = False
) -> tuple[int, int]:
    """The least FLOPs and bytes of forward or backward: each (M, N) tensor of the form is read or written once."""
    M, N = shape
    # tensors: x -> y | x x0 -> h y | x x0 x1 -> h y;  backward: dy h -> dx | dy dh h -> dx, which is dx0 too |
    # dy dh x x0 dx0_in -> dx dx0 | dy dh x x0 x1 dx0_in -> dx dx0
    known = {"plain": (2, 3), "add": (4, 4), "mix": (4, 7), "mix3": (5, 8)}
    work = {"plain": (3, 7), "add": (4, 8), "mix": (6, 15), "mix3": (7, 16)}
    kind, _, more = form.partition("_")
    flops, nbytes = work[kind][backward] * M * N, known[kind][backward] * M * N * dtype.itemsize
    if form in ("mix3_first", "mix3_fp8"):
        nbytes += M * sizes.VE_GATE_CHANNELS * dtype.itemsize
    if more == "fp8" and not backward:  # scaled; q and q_t instead of y
        flops, nbytes = flops + M * N, nbytes + (2 - dtype.itemsize) * M * N
    return flops, nbytes


# interface


def _check(
    x: Tensor,
    x0: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    x1: Tensor | None = None,
    first: int = 0,
    scale: Tensor | None = None,
    eps: float = EPS,
) -> Problem:
    if x.dim() == 0 or x.size(-1) == 0 or x.dtype not in (*DTYPES, torch.float64):
        raise ValueError(f"rms_norm: x is {describe(x)}; expected (..., N) bfloat16 or float32 with 1 <= N")
    if x0 is None and (a is not None or b is not None):
        raise ValueError("rms_norm: a and b scale a sum of two streams; give x0 with them")
    if x0 is None and x1 is not None:
        raise ValueError("rms_norm: x1 is the third stream of a sum; give x0 with it, or one other stream as x0")
    for name, t in (("x0", x0), ("x1", x1)):
        if t is not None:
            check_tensor("rms_norm", name, t, x.shape, (x.dtype,), x.device)
    most = min(MAX_FIRST, x.size(-1))
    if not isinstance(first, int) or not 0 <= first <= most:
        raise ValueError(f"rms_norm: first is {first}; expected 0 to {most} of the {x.size(-1)} channels")
    for name, t in (("a", a), ("b", b), ("scale", scale)):
        if t is not None:
            check_number("rms_norm", name, t, (wide(x.dtype),), x.device)
    return Problem((x.numel() // x.size(-1), x.size(-1)), x.dtype, x.device)


def _limits(shape: Shape, dtype: torch.dtype, most: int = MAX_N) -> str | None:
    return takes_dtypes(shape, dtype) or (
        None if 1 <= shape[1] <= most else f"takes rows of 1 to {most} elements, not {shape[1]}"
    )


def _cuda_limits(shape: Shape, dtype: torch.dtype) -> str | None:
    return _limits(shape, dtype, CUDA_MAX_N)


def _inputs(make: Callable[..., Tensor], M: int, N: int, *streams: str, **options: Any) -> dict[str, Any]:
    scalars = {name: make(dtype=torch.float32) for name in ("a", "b")}
    return {name: make(M, N) for name in ("x", "x0", *streams)} | scalars | options


rms_norm = Op(
    "rms_norm",
    dims=("M", "N"),
    cases=sizes.cases(lambda size: (size.tokens, size.C)),
    forms={
        "plain": lambda make, M, N: {"x": make(M, N)},
        "add": lambda make, M, N: {"x": make(M, N), "x0": make(M, N)},
        "mix": _inputs,
        "mix_fp8": lambda make, M, N: _inputs(make, M, N) | {"scale": make(dtype=torch.float32).detach().abs()},
        "mix3": lambda make, M, N: _inputs(make, M, N, "x1"),
        "mix3_fp8": lambda make, M, N: (
            _inputs(make, M, N, "x1", first=min(sizes.VE_GATE_CHANNELS, N))
            | {"scale": make(dtype=torch.float32).detach().abs()}
        ),
        "mix3_first": lambda make, M, N: _inputs(make, M, N, "x1", first=min(sizes.VE_GATE_CHANNELS, N)),
    },
    cost=rms_norm_cost,
    check=_check,
    backends={
        "ref": Backend(rms_norm_ref),
        "triton": Backend(_rms_norm_triton, needs_triton, _limits),
        "cuda": Backend(_rms_norm_cuda, extension.needs_extension, _cuda_limits),
    },
)
