"""Muon's step without the orthogonalisation, on a bank of matrices: `muon_momentum` before it, `muon_apply` after it.

muon_momentum   buf = buf + (1 - momentum) (g - buf),   u = g + momentum (buf - g)    Nesterov [nanochat 92d63d4]
                w_i = u_i / max(r_i, 1e-6),  r_i = ||u_i||, row by row                equilibration [MuonEq]
                x = w,  scale = t / (safety t ||w||_F + 1e-6),  t = sqrt(sum r_i^2 / rows):
                Polar Express starts at scale x, whose rows have one length and whose Frobenius norm is just below 1
muon_apply      y = x sqrt(min(rows, cols)) / max(||x||_F, 1e-6)                      Muon+
                v = mean of y^2 over cols if rows >= cols, else over rows,
                second = second + (1 - beta2) (v - second),  s = max(second, 1e-10)^-1/2
                z = y s ||y||_F / max(||y s||_F, 1e-10)                               NorMuon [arXiv 2510.05491]
                p = p - lr' weight_decay p [z p >= 0] - lr' z                         cautious decay
                lr' = lr sqrt(max(1, rows / cols))

Shapes      g, buf, x, p, low (K, R, C) as stored. Muon's (rows, cols) are (R, C), or (C, R) if transposed: the second
            matrix of the MLP lies (4C, C) in memory. scale (K,); second (K, rows, 1) if rows >= cols, else (K, 1,
            cols); hyper (3,): lr, weight_decay, momentum, on the device, so that no step recompiles or waits
Dtypes      g bf16 or fp32; buf, scale, second, hyper fp32; x bf16 or fp32; p fp32, or bf16 with low (int16), which
            together hold an fp32 master
Rounding    arithmetic in fp32. x is rounded once, or twice if transposed: u is stored before its column norms are
            known. A master is not rounded: kernels/master.py
In place    buf; p, second, low. x and scale are new
Backward    none
Sums        partial sums are added in a fixed order, without atomics: bitwise repeatable
Limits      in the kernels K <= 65535 and 1 <= R, C <= 16384. Elements of a row are adjacent; rows and matrices may be
            any stride apart, except for second
Bound       memory: `muon_momentum_cost`, `muon_apply_cost`. Bytes moved per element, with g in fp32 and x in bf16:
            momentum 14, transposed 18 (u is written, read, and written again as w), apply 12 (x is read twice)
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import sizes
from kernels.master import join_master, join_tile, split_master, split_tile
from kernels.op import (
    DTYPES,
    Backend,
    Op,
    Problem,
    Shape,
    capability,
    check_tensor,
    describe,
    needs_triton,
    takes_dtypes,
    wide,
)
from kernels.tile import SAFETY, launch

BETA2 = 0.9  # nanochat 92d63d4, optim.py
MAX_SIDE = 16384
MAX_MATRICES = 65535  # of the third dimension of a grid


class MuonMomentum(NamedTuple):
    """What muon_momentum returns. The orthogonalisation starts at scale[k] * x[k]."""

    x: Tensor
    scale: Tensor


# reference


def muon_momentum_ref(
    g: Tensor,
    buf: Tensor,
    hyper: Tensor,
    *,
    transposed: bool,
    out_dtype: torch.dtype = torch.bfloat16,
    safety: float = SAFETY,
) -> MuonMomentum:
    momentum, g = hyper[2].to(buf.dtype), g.to(buf.dtype)
    buf.lerp_(g, 1 - momentum)
    u = torch.lerp(g, buf, momentum)
    u = u.mT if transposed else u
    norm = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    w = u / norm.clamp_min(1e-6)
    target = torch.linalg.matrix_norm(u) / u.size(-2) ** 0.5
    scale = target / (safety * target * torch.linalg.matrix_norm(w) + 1e-6)
    x = (w.mT if transposed else w).contiguous()
    return MuonMomentum(x if x.dtype == torch.float64 else x.to(out_dtype), scale)  # in float64 it is the oracle


def muon_apply_ref(
    p: Tensor,
    x: Tensor,
    second: Tensor,
    hyper: Tensor,
    *,
    transposed: bool,
    low: Tensor | None = None,
    beta2: float = BETA2,
) -> None:
    acc_dtype = second.dtype
    master = p.to(acc_dtype)
    if low is not None:
        master = join_master(p, low)
    y = (x.mT if transposed else x).to(acc_dtype)
    rows, cols = y.shape[-2:]
    lr, weight_decay, _ = hyper.to(acc_dtype).unbind()
    lr = lr * max(1.0, rows / cols) ** 0.5
    y = y * (min(rows, cols) ** 0.5 / torch.linalg.matrix_norm(y, keepdim=True).clamp_min(1e-6))
    second.lerp_(y.square().mean(dim=-1 if rows >= cols else -2, keepdim=True), 1 - beta2)
    z = y * second.clamp_min(1e-10).rsqrt()
    z = z * (torch.linalg.matrix_norm(y, keepdim=True) / torch.linalg.matrix_norm(z, keepdim=True).clamp_min(1e-10))
    z = z.mT if transposed else z
    master = master - master * torch.where(z * master >= 0, lr * weight_decay, 0.0)
    master = master - lr * z
    if low is None:
        p.copy_(master)
    else:
        high, rest = split_master(master)
        p.copy_(high)
        low.copy_(rest)


# Triton


def _config(C: int, work: str, dtype: torch.dtype, arch: tuple[int, int]) -> dict[str, int]:
    """Tile and warps of one kind of work. Not measured on a GPU yet.

    rows      whole rows in registers, 32 elements a lane
    columns   tall tiles, whose sums down the columns leave one part for every 32 rows or more
    map       8 elements a thread: one 16-byte load of bf16, two of fp32
    """
    side = triton.next_power_of_2(C)
    if work == "rows":
        block = max(16, side)
        return {"BLOCK_R": max(1, 1024 // block), "BLOCK_C": block, "num_warps": min(16, max(1, block // 1024))}
    block = min(128, max(16, side))
    return {"BLOCK_R": (4096 if work == "columns" else 1024) // block, "BLOCK_C": block, "num_warps": 4}


@triton.jit
def _tile(R, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's tile: matrix, block of rows, rows, columns, and the masks of those that exist."""
    block_c, block_r, k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_r = block_r.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = block_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    return k.to(tl.int64), block_r, offs_r, offs_c, offs_r < R, offs_c < C


@triton.jit
def _muon_momentum_kernel(
    g_ptr, buf_ptr, x_ptr, parts_ptr, hyper_ptr,
    stride_g_k, stride_g_r, stride_buf_k, stride_buf_r, R, C,
    TRANSPOSED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """buf and w, with r^2 (K, R). Transposed: buf and u, with parts (K, blocks of rows, C) of r^2."""
    k, block_r, offs_r, offs_c, mask_r, mask_c = _tile(R, C, BLOCK_R, BLOCK_C)
    mask = mask_r[:, None] & mask_c[None, :]
    offs_g = k * stride_g_k + offs_r[:, None] * stride_g_r + offs_c[None, :]
    offs_buf = k * stride_buf_k + offs_r[:, None] * stride_buf_r + offs_c[None, :]
    rest = 1.0 - tl.load(hyper_ptr + 2)
    g = tl.load(g_ptr + offs_g, mask=mask, other=0.0).to(tl.float32)
    buf = tl.load(buf_ptr + offs_buf, mask=mask, other=0.0).to(tl.float32)
    buf = tl.fma(g - buf, rest, buf)
    tl.store(buf_ptr + offs_buf, buf, mask=mask)
    u = tl.fma(g - buf, rest, buf)
    if TRANSPOSED:
        offs_part = (k * tl.num_programs(1) + block_r) * C + offs_c
        tl.store(parts_ptr + offs_part, tl.sum(u * u, axis=0), mask=mask_c)
    else:
        squares = tl.sum(u * u, axis=1)
        tl.store(parts_ptr + k * R + offs_r, squares, mask=mask_r)
        u = u * tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(squares), 1e-6))[:, None]
    tl.store(x_ptr + (k * R + offs_r[:, None]) * C + offs_c[None, :], u.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _muon_columns_kernel(x_ptr, squares_ptr, R, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Divides u by its column norms, in place, where Muon's rows are columns."""
    k, _, offs_r, offs_c, mask_r, mask_c = _tile(R, C, BLOCK_R, BLOCK_C)
    mask = mask_r[:, None] & mask_c[None, :]
    x_ptrs = x_ptr + (k * R + offs_r[:, None]) * C + offs_c[None, :]
    squares = tl.load(squares_ptr + k * C + offs_c, mask=mask_c, other=1.0)
    u = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    w = u * tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(squares), 1e-6))[None, :]
    tl.store(x_ptrs, w.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _muon_scale_kernel(squares_ptr, scale_ptr, n, rows, safety, BLOCK: tl.constexpr):
    """scale of one matrix, from r^2 of its n rows (rows is n as a float). Rows of w have length min(1, r / 1e-6)."""
    k = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    squares = tl.load(squares_ptr + k * n + offs, mask=offs < n, other=0.0)
    target = tl.sqrt_rn(tl.div_rn(tl.sum(squares, axis=0), rows))
    norm = tl.sqrt_rn(tl.sum(tl.minimum(squares * 1e12, 1.0), axis=0))
    tl.store(scale_ptr + k, tl.div_rn(target, safety * target * norm + 1e-6))


@triton.jit
def _muon_squares_kernel(
    x_ptr, parts_ptr, stride_x_k, stride_x_r, R, C,
    PER_ROW: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of x^2: (K, R) of whole rows, or parts (K, blocks of rows, C) of columns."""
    k, block_r, offs_r, offs_c, mask_r, mask_c = _tile(R, C, BLOCK_R, BLOCK_C)
    mask = mask_r[:, None] & mask_c[None, :]
    x_ptrs = x_ptr + k * stride_x_k + offs_r[:, None] * stride_x_r + offs_c[None, :]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    if PER_ROW:
        tl.store(parts_ptr + k * R + offs_r, tl.sum(x * x, axis=1), mask=mask_r)
    else:
        offs_part = (k * tl.num_programs(1) + block_r) * C + offs_c
        tl.store(parts_ptr + offs_part, tl.sum(x * x, axis=0), mask=mask_c)


@triton.jit
def _muon_sum_kernel(parts_ptr, sums_ptr, n_parts, n, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Adds parts (K, n_parts, n) to sums (K, n) in a fixed order; a program takes some columns of one matrix."""
    k = tl.program_id(1).to(tl.int64)
    offs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, n_parts, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask = (offs_p < n_parts)[:, None] & (offs < n)[None, :]
        ptrs = parts_ptr + (k * n_parts + offs_p[:, None]) * n + offs[None, :]
        total += tl.sum(tl.load(ptrs, mask=mask, other=0.0), axis=0)
    tl.store(sums_ptr + k * n + offs, total, mask=offs < n)


@triton.jit
def _muon_factor_kernel(sums_ptr, second_ptr, factor_ptr, n, n_other, root, beta2, BLOCK: tl.constexpr):
    """second and factor = z / x of one matrix, from n sums of n_other squares. root is sqrt(min(rows, cols))."""
    offs = tl.program_id(0).to(tl.int64) * n + tl.arange(0, BLOCK)
    mask = tl.arange(0, BLOCK) < n
    sums = tl.load(sums_ptr + offs, mask=mask, other=0.0)
    second = tl.load(second_ptr + offs, mask=mask, other=1.0)
    size = tl.sqrt_rn(tl.sum(sums, axis=0))
    rescale = tl.div_rn(root, tl.maximum(size, 1e-6))  # y / x
    squares = sums * rescale * rescale
    second = tl.fma(tl.div_rn(squares, n_other) - second, 1.0 - beta2, second)
    tl.store(second_ptr + offs, second, mask=mask)
    inverse = tl.div_rn(1.0, tl.maximum(second, 1e-10))
    new_size = tl.sqrt_rn(tl.sum(squares * inverse, axis=0))
    keep = tl.div_rn(size * rescale, tl.maximum(new_size, 1e-10))
    tl.store(factor_ptr + offs, rescale * tl.sqrt_rn(inverse) * keep, mask=mask)


@triton.jit
def _muon_apply_kernel(
    p_ptr, low_ptr, x_ptr, factor_ptr, hyper_ptr,
    stride_p_k, stride_p_r, stride_low_k, stride_low_r, stride_x_k, stride_x_r, R, C, lr_scale,
    MASTER: tl.constexpr, PER_ROW: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    k, _, offs_r, offs_c, mask_r, mask_c = _tile(R, C, BLOCK_R, BLOCK_C)
    mask = mask_r[:, None] & mask_c[None, :]
    p_ptrs = p_ptr + k * stride_p_k + offs_r[:, None] * stride_p_r + offs_c[None, :]
    x_ptrs = x_ptr + k * stride_x_k + offs_r[:, None] * stride_x_r + offs_c[None, :]
    low_ptrs = low_ptr + k * stride_low_k + offs_r[:, None] * stride_low_r + offs_c[None, :] if MASTER else p_ptrs
    lr = tl.load(hyper_ptr) * lr_scale
    decay = lr * tl.load(hyper_ptr + 1)
    if PER_ROW:
        factor = tl.load(factor_ptr + k * R + offs_r, mask=mask_r, other=0.0)[:, None]
    else:
        factor = tl.load(factor_ptr + k * C + offs_c, mask=mask_c, other=0.0)[None, :]
    z = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32) * factor
    if MASTER:
        p = join_tile(tl.load(p_ptrs, mask=mask), tl.load(low_ptrs, mask=mask))
    else:
        p = tl.load(p_ptrs, mask=mask, other=0.0).to(tl.float32)
    # every fma is explicit: a master's bits must not depend on where the compiler fuses
    p = tl.fma(tl.where(z * p >= 0, -decay, 0.0), p, p)
    p = tl.fma(-lr, z, p)
    if MASTER:
        high, low = split_tile(p)
        tl.store(p_ptrs, high, mask=mask)
        tl.store(low_ptrs, low, mask=mask)
    else:
        tl.store(p_ptrs, p, mask=mask)


# torch ops


def _grid(t: Tensor, config: dict[str, int]) -> tuple[int, int, int]:
    K, R, C = t.shape
    return (triton.cdiv(C, config["BLOCK_C"]), triton.cdiv(R, config["BLOCK_R"]), K)


def _parts(t: Tensor, per_row: bool, config: dict[str, int]) -> Tensor:
    """Room for the partial sums of squares of each tile of t: (K, parts, rows or columns)."""
    K, R, C = t.shape
    shape = (K, 1, R) if per_row else (K, triton.cdiv(R, config["BLOCK_R"]), C)
    return t.new_empty(shape, dtype=torch.float32)


def _sum(parts: Tensor) -> Tensor:
    """(K, parts, n) to (K, n)."""
    K, n_parts, n = parts.shape
    if n_parts == 1:
        return parts.view(K, n)
    sums = parts.new_empty(K, n)
    launch(_muon_sum_kernel, (triton.cdiv(n, 64), K), parts, sums, n_parts, n, BLOCK_P=32, BLOCK_N=64, num_warps=4)
    return sums


def _vector(n: int) -> dict[str, int]:
    """Block and warps of a program that holds a whole vector in registers."""
    block = max(16, triton.next_power_of_2(n))
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}


@torch.library.custom_op("redline::muon_momentum", mutates_args=("buf",))
def _muon_momentum(
    g: Tensor, buf: Tensor, hyper: Tensor, transposed: bool, out_dtype: torch.dtype, safety: float
) -> tuple[Tensor, Tensor]:
    (K, R, C), arch = g.shape, capability(g.device)
    x, scale = g.new_empty(K, R, C, dtype=out_dtype), g.new_empty(K, dtype=torch.float32)
    if not K:
        return x, scale
    config = _config(C, "columns" if transposed else "rows", g.dtype, arch)
    parts = _parts(g, not transposed, config)
    launch(
        _muon_momentum_kernel, _grid(g, config),
        g, buf, x, parts, hyper, g.stride(0), g.stride(1), buf.stride(0), buf.stride(1), R, C,
        TRANSPOSED=transposed, **config,
    )  # fmt: skip
    squares = _sum(parts)
    n = squares.size(1)
    launch(_muon_scale_kernel, (K,), squares, scale, n, float(n), safety, **_vector(n))
    if transposed:
        config = _config(C, "map", out_dtype, arch)
        launch(_muon_columns_kernel, _grid(x, config), x, squares, R, C, **config)
    return x, scale


@_muon_momentum.register_fake
def _(g, buf, hyper, transposed, out_dtype, safety):
    return g.new_empty(g.shape, dtype=out_dtype), g.new_empty(g.size(0), dtype=torch.float32)


@torch.library.custom_op("redline::muon_apply", mutates_args=("p", "second", "low"))
def _muon_apply(
    p: Tensor, x: Tensor, second: Tensor, hyper: Tensor, transposed: bool, low: Tensor | None, beta2: float
) -> None:
    (K, R, C), arch = p.shape, capability(p.device)
    if not K:
        return
    rows, cols = (C, R) if transposed else (R, C)
    # second has one number per row of Muon's matrix if rows >= cols, else per column; find that axis in the storage
    per_row = (rows >= cols) != transposed
    config = _config(C, "rows" if per_row else "columns", x.dtype, arch)
    parts = _parts(x, per_row, config)
    launch(_muon_squares_kernel, _grid(x, config), x, parts, x.stride(0), x.stride(1), R, C, PER_ROW=per_row, **config)
    sums = _sum(parts)
    factor = torch.empty_like(sums)
    n, root = sums.size(1), min(rows, cols) ** 0.5
    launch(_muon_factor_kernel, (K,), sums, second, factor, n, float(rows * cols // n), root, beta2, **_vector(n))
    low_strides = (0, 0) if low is None else (low.stride(0), low.stride(1))
    config = _config(C, "map", p.dtype, arch)
    launch(
        _muon_apply_kernel, _grid(p, config),
        p, low, x, factor, hyper, p.stride(0), p.stride(1), *low_strides, x.stride(0), x.stride(1), R, C,
        max(1.0, rows / cols) ** 0.5, MASTER=low is not None, PER_ROW=per_row, **config,
    )  # fmt: skip


@_muon_apply.register_fake
def _(p, x, second, hyper, transposed, low, beta2):
    return None


def _muon_momentum_triton(
    g: Tensor,
    buf: Tensor,
    hyper: Tensor,
    *,
    transposed: bool,
    out_dtype: torch.dtype = torch.bfloat16,
    safety: float = SAFETY,
) -> MuonMomentum:
    return MuonMomentum(*_muon_momentum(g, buf, hyper, transposed, out_dtype, safety))


def _muon_apply_triton(
    p: Tensor,
    x: Tensor,
    second: Tensor,
    hyper: Tensor,
    *,
    transposed: bool,
    low: Tensor | None = None,
    beta2: float = BETA2,
) -> None:
    _muon_apply(p, x, second, hyper, transposed, low, beta2)


# cost


def muon_momentum_cost(
    shape: tuple[int, int, int], dtype: torch.dtype, form: str = "rows", backward: bool = False
) -> tuple[int, int]:
    """The least FLOPs and bytes: g (fp32) and buf read once, buf and x (of dtype) written once."""
    K, R, C = shape
    return 9 * K * R * C, (12 + dtype.itemsize) * K * R * C


def muon_apply_cost(
    shape: tuple[int, int, int], dtype: torch.dtype, form: str = "rows", backward: bool = False
) -> tuple[int, int]:
    """The least FLOPs and bytes: x (of dtype) read once, the four bytes of a weight read and written once."""
    K, R, C = shape
    return 8 * K * R * C, (8 + dtype.itemsize) * K * R * C


# interface


def _check_bank(
    op: str, name: str, t: Tensor, shape: Shape, dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """Matrices may lie any stride apart, and so may their rows; the elements of a row may not."""
    check_tensor(op, name, t, shape, dtypes, device)
    if t.dim() != 3 or 0 in t.shape[1:] or (t.stride(2) != 1 and t.size(2) > 1):
        raise ValueError(f"{op}: {name} is {describe(t)}; expected (K, R, C) with 1 <= R, C and the last stride 1")


def _check_momentum(
    g: Tensor,
    buf: Tensor,
    hyper: Tensor,
    *,
    transposed: bool,
    out_dtype: torch.dtype = torch.bfloat16,
    safety: float = SAFETY,
) -> Problem:
    if out_dtype not in (*DTYPES, torch.float64):
        raise ValueError(f"muon_momentum: out_dtype is {out_dtype}; expected torch.bfloat16 or torch.float32")
    state = wide(out_dtype)
    _check_bank("muon_momentum", "g", g, g.shape, (*DTYPES, state), g.device)
    _check_bank("muon_momentum", "buf", buf, g.shape, (state,), g.device)
    check_tensor("muon_momentum", "hyper", hyper, (3,), (torch.float32,), g.device, contiguous=True)
    return Problem(tuple(g.shape), out_dtype, g.device)


def _check_apply(
    p: Tensor,
    x: Tensor,
    second: Tensor,
    hyper: Tensor,
    *,
    transposed: bool,
    low: Tensor | None = None,
    beta2: float = BETA2,
) -> Problem:
    state = wide(x.dtype)
    _check_bank("muon_apply", "p", p, p.shape, (state if low is None else torch.bfloat16,), p.device)
    _check_bank("muon_apply", "x", x, p.shape, (*DTYPES, torch.float64), p.device)
    if low is not None:
        _check_bank("muon_apply", "low", low, p.shape, (torch.int16,), p.device)
    K, R, C = p.shape
    rows, cols = (C, R) if transposed else (R, C)
    shape = (K, rows, 1) if rows >= cols else (K, 1, cols)
    check_tensor("muon_apply", "second", second, shape, (state,), p.device, contiguous=True)
    check_tensor("muon_apply", "hyper", hyper, (3,), (torch.float32,), p.device, contiguous=True)
    return Problem(tuple(p.shape), x.dtype, p.device)


def _limits(shape: Shape, dtype: torch.dtype) -> str | None:
    if why := takes_dtypes(shape, dtype):
        return why
    K, R, C = shape
    if not (1 <= R <= MAX_SIDE and 1 <= C <= MAX_SIDE):
        return f"takes sides of 1 to {MAX_SIDE}, not {R} and {C}"
    return None if K <= MAX_MATRICES else f"takes up to {MAX_MATRICES} matrices, not {K}"


def _momentum_inputs(make: Callable[..., Tensor], K: int, R: int, C: int, transposed: bool) -> dict[str, Any]:
    g, buf = (make(K, R, C, dtype=torch.float32).detach() for _ in range(2))
    hyper = g.new_tensor([0.02, 0.1, 0.95])
    return {"g": g, "buf": buf, "hyper": hyper, "transposed": transposed, "out_dtype": make(0).dtype}


def _apply_inputs(make: Callable[..., Tensor], K: int, R: int, C: int, transposed: bool) -> dict[str, Any]:
    """In bf16 a weight has low bits."""
    p, x = make(K, R, C).detach(), make(K, R, C).detach()
    rows, cols = (C, R) if transposed else (R, C)
    second = make(K, rows, 1) if rows >= cols else make(K, 1, cols)
    second, hyper = second.detach().float().square(), p.new_tensor([0.02, 0.1, 0.95], dtype=torch.float32)
    low = make(K, R, C, dtype=torch.int16) if p.dtype == torch.bfloat16 else None
    return {"p": p, "x": x, "second": second, "hyper": hyper, "transposed": transposed, "low": low}


muon_momentum = Op(
    "muon_momentum",
    dims=("K", "R", "C"),
    cases=sizes.muon_cases(),
    forms={
        "rows": lambda make, K, R, C: _momentum_inputs(make, K, R, C, transposed=False),
        "transposed": lambda make, K, R, C: _momentum_inputs(make, K, R, C, transposed=True),
    },
    cost=muon_momentum_cost,
    check=_check_momentum,
    backends={"ref": Backend(muon_momentum_ref), "triton": Backend(_muon_momentum_triton, needs_triton, _limits)},
)

muon_apply = Op(
    "muon_apply",
    dims=("K", "R", "C"),
    cases=sizes.muon_cases(),
    forms={
        "rows": lambda make, K, R, C: _apply_inputs(make, K, R, C, transposed=False),
        "transposed": lambda make, K, R, C: _apply_inputs(make, K, R, C, transposed=True),
    },
    cost=muon_apply_cost,
    check=_check_apply,
    backends={"ref": Backend(muon_apply_ref), "triton": Backend(_muon_apply_triton, needs_triton, _limits)},
)
