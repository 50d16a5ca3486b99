"""Muon's step without the orthogonalisation, on a bank of matrices: `muon_momentum` before it, `muon_apply` after it.

muon_momentum   buf = buf + (1 - momentum) (g - buf),   u = g + momentum (buf - g)    Nesterov [nanochat 92d63d4]
                x_i = u_i / max(r_i, 1e-6),  r_i = ||u_i||, row by row                equilibration [MuonEq]
                scale = t / (safety t ||x||_F + 1e-6),  t = sqrt(sum r_i^2 / rows):
                Polar Express starts at scale x, whose rows have one length and whose Frobenius norm is just below 1
muon_apply      y = x sqrt(min(R, C)) / max(||x||_F, 1e-6)                            Muon+
                v = mean of y^2 over the longer side, so that there are max(R, C) of them
                second = second + (1 - beta2) (v - second),  s = max(second, 1e-10)^-1/2
                z = y s ||y||_F / max(||y s||_F, 1e-10)                               NorMuon [arXiv 2510.05491]
                p = p - lr' weight_decay p [z p >= 0] - lr' z                         cautious decay
                lr' = lr lr_scale,  lr_scale = sqrt(max(1, rows / cols))

Shapes      g, buf, x, p, low (K, R, C) as stored. Muon's (rows, cols) are (R, C), or (C, R) if transposed: the second
            matrix of the MLP lies (4C, C) in memory. scale, lr_scale (K,); second (K, R, 1), a number a stored row, or
            (K, 1, C), one a stored column; hyper (3,): lr, weight_decay, momentum, on the device, so that no step
            recompiles or waits
Dtypes      g bf16 or fp32; buf, scale, second, hyper, lr_scale fp32; x bf16 or fp32; p fp32, or bf16 with low (int16),
            which together hold an fp32 master
Rounding    arithmetic in fp32. x is rounded once, or twice if transposed: u is stored before its column norms are
            known. A master is not rounded: kernels/master.py
In place    buf, x, scale; p, second, low: x and scale may be parts of larger tensors, so that Polar Express takes the
            matrices of several banks at a time
Backward    none
Sums        partial sums are added in a fixed order, without atomics: bitwise repeatable
Launches    momentum 2, transposed 3; apply 3; each 1 for matrices that fit a program (SMALL). By csrc/muon_update.cu as
            many for all banks of a model together
Limits      in the kernels K <= 65535 and 1 <= R, C <= 16384. Elements of a row are adjacent; rows and matrices may be
            any stride apart, except for x, second, scale and lr_scale, which are contiguous
Bound       memory: `muon_momentum_cost`, `muon_apply_cost`. Bytes moved per element, with g in fp32 and x in bf16:
            momentum 14, transposed 18 (u is written, read, and written again as x), apply 12 (x is read twice)
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import extension, sizes
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
    dtype_name,
    needs_triton,
    takes_dtypes,
    wide,
)
from kernels.tile import SAFETY, launch

BETA2 = 0.9  # nanochat 92d63d4, optim.py
MAX_SIDE = 16384
MAX_MATRICES = 65535  # of the third dimension of a grid


# reference


def muon_momentum_ref(
    g: Tensor,
    buf: Tensor,
    x: Tensor,
    scale: Tensor,
    hyper: Tensor,
    *,
    transposed: bool,
    safety: float = SAFETY,
) -> None:
    momentum, g = hyper[2].to(buf.dtype), g.to(buf.dtype)
    buf.lerp_(g, 1 - momentum)
    u = torch.lerp(g, buf, momentum)
    u = u.mT if transposed else u
    norm = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    w = u / norm.clamp_min(1e-6)
    target = torch.linalg.matrix_norm(u) / u.size(-2) ** 0.5
    scale.copy_(target / (safety * target * torch.linalg.matrix_norm(w) + 1e-6))
    x.copy_(w.mT if transposed else w)


def muon_apply_ref(
    p: Tensor,
    x: Tensor,
    second: Tensor,
    lr_scale: Tensor,
    hyper: Tensor,
    *,
    low: Tensor | None = None,
    beta2: float = BETA2,
) -> None:
    acc_dtype = second.dtype
    master = p.to(acc_dtype)
    if low is not None:
        master = join_master(p, low)
    y = x.to(acc_dtype)
    lr, weight_decay, _ = hyper.to(acc_dtype).unbind()
    lr = (lr * lr_scale.to(acc_dtype))[:, None, None]
    y = y * (min(x.shape[1:]) ** 0.5 / torch.linalg.matrix_norm(y, keepdim=True).clamp_min(1e-6))
    second.lerp_(y.square().mean(dim=-1 if _per_row(x, second) else -2, keepdim=True), 1 - beta2)
    z = y * second.clamp_min(1e-10).rsqrt()
    z = z * (torch.linalg.matrix_norm(y, keepdim=True) / torch.linalg.matrix_norm(z, keepdim=True).clamp_min(1e-10))
    master = master - master * torch.where(z * master >= 0, lr * weight_decay, 0.0)
    master = master - lr * z
    if low is None:
        p.copy_(master)
    else:
        high, rest = split_master(master)
        p.copy_(high)
        low.copy_(rest)


def _per_row(x: Tensor, second: Tensor) -> bool:
    """Whether second has a number for each stored row, not for each column."""
    return second.shape[1:] == (x.size(1), 1)


# Triton

SMALL = 4096  # elements up to which a program holds a whole matrix


def _config(R: int, C: int, work: str, dtype: torch.dtype, arch: tuple[int, int]) -> dict[str, int]:
    """Tile, tiles that a program takes one below the other, and warps of one kind of work. Not measured on a GPU yet.

    rows      whole rows in registers, 32 elements a lane
    columns   tall tiles, several a program, whose sums down the columns leave one part for 256 rows or more
    map       8 elements a thread: one 16-byte load of bf16, two of fp32
    """
    side = max(16, triton.next_power_of_2(C))
    if is_small(R, C):
        rows = triton.next_power_of_2(R)
        # no more threads than elements: a tile that several warps hold would be read by one after another has written
        return {"BLOCK_R": rows, "BLOCK_C": side, "STEPS": 1, "num_warps": max(1, min(4, rows * side // 32))}
    if work == "rows":
        return {
            "BLOCK_R": max(1, 1024 // side), "BLOCK_C": side, "STEPS": 1, "num_warps": min(16, max(1, side // 1024))
        }  # fmt: skip
    block = min(128, side)
    if work == "columns":
        return {"BLOCK_R": 4096 // block, "BLOCK_C": block, "STEPS": 8, "num_warps": 4}
    return {"BLOCK_R": 1024 // block, "BLOCK_C": block, "STEPS": 1, "num_warps": 4}


def is_small(R: int, C: int) -> bool:
    return triton.next_power_of_2(R) * max(16, triton.next_power_of_2(C)) <= SMALL


@triton.jit
def _tile(step, R, C, STEPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's tile: matrix, rows, columns, and the masks of those that exist."""
    block_c, block_r, k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_r = (block_r.to(tl.int64) * STEPS + step) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = block_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    return k.to(tl.int64), offs_r, offs_c, offs_r < R, offs_c < C


@triton.jit
def _inverse(squares):
    """1 / r of rows whose squares are summed."""
    return tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(squares), 1e-6))


@triton.jit
def _scale(squares, rows, safety):
    """scale of a matrix, from r^2 of its rows (a float). Rows of x have length min(1, r / 1e-6)."""
    target = tl.sqrt_rn(tl.div_rn(tl.sum(squares, axis=0), rows))
    norm = tl.sqrt_rn(tl.sum(tl.minimum(squares * 1e12, 1.0), axis=0))
    return tl.div_rn(target, safety * target * norm + 1e-6)


@triton.jit
def _muon_momentum_kernel(
    g_ptr, buf_ptr, x_ptr, parts_ptr, scale_ptr, hyper_ptr,
    stride_g_k, stride_g_r, stride_buf_k, stride_buf_r, R, C, rows, safety,
    TRANSPOSED: tl.constexpr, SMALL: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """buf and x, with r^2 (K, 1, R). Transposed: buf and u, with parts (K, programs down a column, C) of r^2. Small:
    buf, x and scale."""
    totals = tl.zeros((BLOCK_C,), tl.float32)
    rest = 1.0 - tl.load(hyper_ptr + 2)
    for step in range(STEPS):
        k, offs_r, offs_c, mask_r, mask_c = _tile(step, R, C, STEPS, BLOCK_R, BLOCK_C)
        mask = mask_r[:, None] & mask_c[None, :]
        offs_buf = k * stride_buf_k + offs_r[:, None] * stride_buf_r + offs_c[None, :]
        g_ptrs = g_ptr + k * stride_g_k + offs_r[:, None] * stride_g_r + offs_c[None, :]
        g = tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32)
        buf = tl.load(buf_ptr + offs_buf, mask=mask, other=0.0).to(tl.float32)
        buf = tl.fma(g - buf, rest, buf)
        tl.store(buf_ptr + offs_buf, buf, mask=mask)
        u = tl.fma(g - buf, rest, buf)
        if TRANSPOSED:
            totals += tl.sum(u * u, axis=0)
            if SMALL:
                u = u * _inverse(totals)[None, :]
                tl.store(scale_ptr + k, _scale(totals, rows, safety))
        else:
            squares = tl.sum(u * u, axis=1)
            u = u * _inverse(squares)[:, None]
            if SMALL:
                tl.store(scale_ptr + k, _scale(squares, rows, safety))
            else:
                tl.store(parts_ptr + k * R + offs_r, squares, mask=mask_r)
        tl.store(x_ptr + (k * R + offs_r[:, None]) * C + offs_c[None, :], u.to(x_ptr.dtype.element_ty), mask=mask)
    if TRANSPOSED and not SMALL:
        k, _, offs_c, _, mask_c = _tile(0, R, C, STEPS, BLOCK_R, BLOCK_C)
        tl.store(parts_ptr + (k * tl.num_programs(1) + tl.program_id(1)) * C + offs_c, totals, mask=mask_c)


@triton.jit
def _muon_columns_kernel(
    x_ptr, squares_ptr, R, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr
):  # fmt: skip
    """Divides u by its column norms, in place, where Muon's rows are columns."""
    k, offs_r, offs_c, mask_r, mask_c = _tile(0, R, C, STEPS, BLOCK_R, BLOCK_C)
    mask = mask_r[:, None] & mask_c[None, :]
    x_ptrs = x_ptr + (k * R + offs_r[:, None]) * C + offs_c[None, :]
    squares = tl.load(squares_ptr + k * C + offs_c, mask=mask_c, other=1.0)
    u = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_ptrs, (u * _inverse(squares)[None, :]).to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _total(parts_ptr, k, n_parts, n, BLOCK: tl.constexpr):
    """Sum of parts (K, n_parts, n) of matrix k, in order."""
    offs = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(0, n_parts):
        total += tl.load(parts_ptr + (k * n_parts + part) * n + offs, mask=offs < n, other=0.0)
    return total


@triton.jit
def _muon_scale_kernel(parts_ptr, squares_ptr, scale_ptr, n_parts, n, rows, safety, BLOCK: tl.constexpr):
    """scale of one matrix and r^2 of its n rows, from their parts (rows is n as a float)."""
    k = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    squares = _total(parts_ptr, k, n_parts, n, BLOCK)
    tl.store(scale_ptr + k, _scale(squares, rows, safety))
    if n_parts > 1:  # one part is r^2 itself
        tl.store(squares_ptr + k * n + offs, squares, mask=offs < n)


@triton.jit
def _muon_squares_kernel(
    x_ptr, parts_ptr, stride_x_k, stride_x_r, R, C,
    PER_ROW: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Sums of x^2: (K, 1, R) of whole rows, or parts (K, programs down a column, C) of columns."""
    totals = tl.zeros((BLOCK_C,), tl.float32)
    for step in range(STEPS):
        k, offs_r, offs_c, mask_r, mask_c = _tile(step, R, C, STEPS, BLOCK_R, BLOCK_C)
        x_ptrs = x_ptr + k * stride_x_k + offs_r[:, None] * stride_x_r + offs_c[None, :]
        x = tl.load(x_ptrs, mask=mask_r[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
        if PER_ROW:
            tl.store(parts_ptr + k * R + offs_r, tl.sum(x * x, axis=1), mask=mask_r)
        else:
            totals += tl.sum(x * x, axis=0)
    if not PER_ROW:
        k, _, offs_c, _, mask_c = _tile(0, R, C, STEPS, BLOCK_R, BLOCK_C)
        tl.store(parts_ptr + (k * tl.num_programs(1) + tl.program_id(1)) * C + offs_c, totals, mask=mask_c)


@triton.jit
def _factor(sums, second, n_other, root, beta2):
    """New second, and factor = z / x, from sums of n_other squares each. root is sqrt(min(R, C))."""
    size = tl.sqrt_rn(tl.sum(sums, axis=0))
    rescale = tl.div_rn(root, tl.maximum(size, 1e-6))  # y / x
    squares = sums * rescale * rescale
    second = tl.fma(tl.div_rn(squares, n_other) - second, 1.0 - beta2, second)
    inverse = tl.div_rn(1.0, tl.maximum(second, 1e-10))
    new_size = tl.sqrt_rn(tl.sum(squares * inverse, axis=0))
    keep = tl.div_rn(size * rescale, tl.maximum(new_size, 1e-10))
    return second, rescale * tl.sqrt_rn(inverse) * keep


@triton.jit
def _muon_factor_kernel(
    parts_ptr, second_ptr, factor_ptr, n_parts, n, n_other, root, beta2, BLOCK: tl.constexpr
):  # fmt: skip
    """second and factor of one matrix, from parts of its n sums."""
    k = tl.program_id(0).to(tl.int64)
    offs, mask = k * n + tl.arange(0, BLOCK), tl.arange(0, BLOCK) < n
    sums = _total(parts_ptr, k, n_parts, n, BLOCK)
    second = tl.load(second_ptr + offs, mask=mask, other=1.0)
    second, factor = _factor(sums, second, n_other, root, beta2)
    tl.store(second_ptr + offs, second, mask=mask)
    tl.store(factor_ptr + offs, factor, mask=mask)


@triton.jit
def _muon_apply_kernel(
    p_ptr, low_ptr, x_ptr, second_ptr, factor_ptr, lr_scale_ptr, hyper_ptr,
    stride_p_k, stride_p_r, stride_low_k, stride_low_r, stride_x_k, stride_x_r, R, C, n_other, root, beta2,
    MASTER: tl.constexpr, PER_ROW: tl.constexpr, SMALL: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """p from x and factor; small: from x and second, which is updated."""
    k, offs_r, offs_c, mask_r, mask_c = _tile(0, R, C, STEPS, BLOCK_R, BLOCK_C)
    mask = mask_r[:, None] & mask_c[None, :]
    p_ptrs = p_ptr + k * stride_p_k + offs_r[:, None] * stride_p_r + offs_c[None, :]
    x_ptrs = x_ptr + k * stride_x_k + offs_r[:, None] * stride_x_r + offs_c[None, :]
    low_ptrs = low_ptr + k * stride_low_k + offs_r[:, None] * stride_low_r + offs_c[None, :] if MASTER else p_ptrs
    lr = tl.load(hyper_ptr) * tl.load(lr_scale_ptr + k)
    decay = lr * tl.load(hyper_ptr + 1)
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    if SMALL:
        if PER_ROW:
            second_ptrs, inside, sums = second_ptr + k * R + offs_r, mask_r, tl.sum(x * x, axis=1)
        else:
            second_ptrs, inside, sums = second_ptr + k * C + offs_c, mask_c, tl.sum(x * x, axis=0)
        second = tl.load(second_ptrs, mask=inside, other=1.0)
        second, factor = _factor(sums, second, n_other, root, beta2)
        tl.debug_barrier()  # all warps hold second: without it one could read what another has written
        tl.store(second_ptrs, second, mask=inside)
    elif PER_ROW:
        factor = tl.load(factor_ptr + k * R + offs_r, mask=mask_r, other=0.0)
    else:
        factor = tl.load(factor_ptr + k * C + offs_c, mask=mask_c, other=0.0)
    z = x * (factor[:, None] if PER_ROW else factor[None, :])
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
    return (triton.cdiv(C, config["BLOCK_C"]), triton.cdiv(R, config["BLOCK_R"] * config["STEPS"]), K)


def _parts(t: Tensor, per_row: bool, config: dict[str, int]) -> Tensor:
    """Room for the sums of squares that each program finds: (K, parts, rows or columns)."""
    K, R, C = t.shape
    shape = (K, 1, R) if per_row else (K, _grid(t, config)[1], C)
    return t.new_empty(shape, dtype=torch.float32)


def _vector(n: int) -> dict[str, int]:
    """Block and warps of a program that holds a whole vector in registers."""
    block = max(16, triton.next_power_of_2(n))
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}


@torch.library.custom_op("redline::muon_momentum", mutates_args=("buf", "x", "scale"))
def _muon_momentum(
    g: Tensor, buf: Tensor, x: Tensor, scale: Tensor, hyper: Tensor, transposed: bool, safety: float, cuda: bool
) -> None:
    (K, R, C), arch = g.shape, capability(g.device)
    if not K:
        return
    if cuda:
        arguments = {"g": g, "buf": buf, "x": x, "scale": scale, "hyper": hyper}
        _run_banks("muon_momentum", "safety", SAFETY, [arguments | {"transposed": transposed, "safety": safety}])
        return
    small, rows = is_small(R, C), C if transposed else R
    config = _config(R, C, "columns" if transposed else "rows", g.dtype, arch)
    parts = None if small else _parts(g, not transposed, config)
    launch(
        _muon_momentum_kernel, _grid(g, config),
        g, buf, x, parts, scale, hyper, g.stride(0), g.stride(1), buf.stride(0), buf.stride(1), R, C,
        float(rows), safety, TRANSPOSED=transposed, SMALL=small, **config,
    )  # fmt: skip
    if parts is None:
        return
    squares = parts if parts.size(1) == 1 else parts.new_empty(K, 1, rows)
    launch(
        _muon_scale_kernel, (K,), parts, squares, scale, parts.size(1), rows, float(rows), safety, **_vector(rows)
    )  # fmt: skip
    if transposed:
        config = _config(R, C, "map", x.dtype, arch)
        launch(_muon_columns_kernel, _grid(x, config), x, squares, R, C, **config)


@_muon_momentum.register_fake
def _(g, buf, x, scale, hyper, transposed, safety, cuda):
    return None


@torch.library.custom_op("redline::muon_apply", mutates_args=("p", "second", "low"))
def _muon_apply(
    p: Tensor, x: Tensor, second: Tensor, lr_scale: Tensor, hyper: Tensor, low: Tensor | None, beta2: float, cuda: bool
) -> None:
    (K, R, C), arch = p.shape, capability(p.device)
    if not K:
        return
    if cuda:
        arguments = {"p": p, "x": x, "second": second, "lr_scale": lr_scale, "hyper": hyper}
        _run_banks("muon_apply", "beta2", BETA2, [arguments | {"low": low, "beta2": beta2}])
        return
    per_row, small = _per_row(x, second), is_small(R, C)
    n, root = R if per_row else C, min(R, C) ** 0.5
    n_other, factor = float(R * C // n), None
    if not small:
        config = _config(R, C, "rows" if per_row else "columns", x.dtype, arch)
        parts = _parts(x, per_row, config)
        launch(
            _muon_squares_kernel, _grid(x, config),
            x, parts, x.stride(0), x.stride(1), R, C, PER_ROW=per_row, **config,
        )  # fmt: skip
        factor = parts.new_empty(K, n)
        launch(_muon_factor_kernel, (K,), parts, second, factor, parts.size(1), n, n_other, root, beta2, **_vector(n))
    low_strides = (0, 0) if low is None else (low.stride(0), low.stride(1))
    config = _config(R, C, "map", p.dtype, arch)
    launch(
        _muon_apply_kernel, _grid(p, config),
        p, low, x, second, factor, lr_scale, hyper,
        p.stride(0), p.stride(1), *low_strides, x.stride(0), x.stride(1), R, C, n_other, root, beta2,
        MASTER=low is not None, PER_ROW=per_row, SMALL=small, **config,
    )  # fmt: skip


@_muon_apply.register_fake
def _(p, x, second, lr_scale, hyper, low, beta2, cuda):
    return None


def _muon_momentum_triton(
    g: Tensor,
    buf: Tensor,
    x: Tensor,
    scale: Tensor,
    hyper: Tensor,
    *,
    transposed: bool,
    safety: float = SAFETY,
    cuda: bool = False,
) -> None:
    _muon_momentum(g, buf, x, scale, hyper, transposed, safety, cuda)


def _muon_apply_triton(
    p: Tensor,
    x: Tensor,
    second: Tensor,
    lr_scale: Tensor,
    hyper: Tensor,
    *,
    low: Tensor | None = None,
    beta2: float = BETA2,
    cuda: bool = False,
) -> None:
    _muon_apply(p, x, second, lr_scale, hyper, low, beta2, cuda)


# CUDA


def _muon_momentum_cuda(*args: Any, **options: Any) -> None:
    """The same by csrc/muon_update.cu."""
    _muon_momentum_triton(*args, **options, cuda=True)


def _muon_apply_cuda(*args: Any, **options: Any) -> None:
    """The same by csrc/muon_update.cu."""
    _muon_apply_triton(*args, **options, cuda=True)


def _muon_momentum_many(calls: Sequence[dict[str, Any]]) -> None:
    """Several by csrc/muon_update.cu, in the launches of one."""
    _run_banks("muon_momentum", "safety", SAFETY, calls)
    extension.written(calls, "buf", "x", "scale")


def _muon_apply_many(calls: Sequence[dict[str, Any]]) -> None:
    """Several by csrc/muon_update.cu, in the launches of one."""
    _run_banks("muon_apply", "beta2", BETA2, calls)
    extension.written(calls, "p", "second", "low")


def _run_banks(function: str, constant: str, default: float, calls: Sequence[dict[str, Any]]) -> None:
    """Calls csrc's function of that name on all banks whose constant is the same."""
    calls = [arguments for arguments in calls if arguments["x"].size(0)]
    for value, group in extension.grouped(calls, constant, default).items():
        first = group[0]["x"]
        module = extension.module(first.device)
        banks = [_bank(module, {k: v for k, v in arguments.items() if k != constant}) for arguments in group]
        workspace = first.new_empty(module.muon_workspace(banks), dtype=torch.float32)
        extension.call(function, first, banks=banks, workspace=workspace, **{constant: value})


def _bank(module: Any, arguments: dict[str, Any]) -> Any:
    """The arguments of one call as csrc's MuonBank."""
    transposed = arguments.get("transposed")
    tensors: dict[str, Tensor] = {name: t for name, t in arguments.items() if isinstance(t, Tensor)}
    x, matrices = tensors["x"], {name: t for name, t in tensors.items() if name in ("g", "buf", "x", "p", "low")}
    K, R, C = x.shape
    return module.MuonBank(
        **{name: extension.pointer(t) for name, t in tensors.items()},
        **{f"{name}_dtype": dtype_name(t.dtype) for name, t in tensors.items() if name in ("g", "x", "p")},
        **{f"{name}_k": t.stride(0) for name, t in matrices.items()},
        **{f"{name}_r": t.stride(1) for name, t in matrices.items()},
        K=K,
        R=R,
        C=C,
        by_columns=not _per_row(x, tensors["second"]) if transposed is None else transposed,
    )


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
    x: Tensor,
    scale: Tensor,
    hyper: Tensor,
    *,
    transposed: bool,
    safety: float = SAFETY,
) -> Problem:
    state = wide(x.dtype)
    _check_bank("muon_momentum", "g", g, g.shape, (*DTYPES, state), g.device)
    _check_bank("muon_momentum", "buf", buf, g.shape, (state,), g.device)
    check_tensor("muon_momentum", "x", x, g.shape, (*DTYPES, torch.float64), g.device, contiguous=True)
    check_tensor("muon_momentum", "scale", scale, g.shape[:1], (state,), g.device, contiguous=True)
    check_tensor("muon_momentum", "hyper", hyper, (3,), (torch.float32,), g.device, contiguous=True)
    return Problem(tuple(g.shape), x.dtype, g.device)


def _check_apply(
    p: Tensor,
    x: Tensor,
    second: Tensor,
    lr_scale: Tensor,
    hyper: Tensor,
    *,
    low: Tensor | None = None,
    beta2: float = BETA2,
) -> Problem:
    state = wide(x.dtype)
    _check_bank("muon_apply", "p", p, p.shape, (state if low is None else torch.bfloat16,), p.device)
    _check_bank("muon_apply", "x", x, p.shape, (*DTYPES, torch.float64), p.device)
    if low is not None:
        _check_bank("muon_apply", "low", low, p.shape, (torch.int16,), p.device)
    K, R, C = p.shape
    shape = (K, R, 1) if _per_row(x, second) else (K, 1, C)
    check_tensor("muon_apply", "second", second, shape, (state,), p.device, contiguous=True)
    check_tensor("muon_apply", "lr_scale", lr_scale, (K,), (torch.float32,), p.device, contiguous=True)
    check_tensor("muon_apply", "hyper", hyper, (3,), (torch.float32,), p.device, contiguous=True)
    return Problem((K, R, C), x.dtype, p.device)


def _limits(shape: Shape, dtype: torch.dtype) -> str | None:
    if why := takes_dtypes(shape, dtype):
        return why
    K, R, C = shape
    if not (1 <= R <= MAX_SIDE and 1 <= C <= MAX_SIDE):
        return f"takes sides of 1 to {MAX_SIDE}, not {R} and {C}"
    return None if K <= MAX_MATRICES else f"takes up to {MAX_MATRICES} matrices, not {K}"


def _momentum_inputs(make: Callable[..., Tensor], K: int, R: int, C: int, transposed: bool) -> dict[str, Any]:
    g, buf = (make(K, R, C, dtype=torch.float32).detach() for _ in range(2))
    x, scale, hyper = make(K, R, C).detach(), buf.new_empty(K), g.new_tensor([0.02, 0.1, 0.95])
    return {"g": g, "buf": buf, "x": x, "scale": scale, "hyper": hyper, "transposed": transposed}


def _apply_inputs(make: Callable[..., Tensor], K: int, R: int, C: int, per_row: bool) -> dict[str, Any]:
    """In bf16 a weight has low bits."""
    p, x = make(K, R, C).detach(), make(K, R, C).detach()
    second = (make(K, R, 1) if per_row else make(K, 1, C)).detach().float().square()
    hyper = p.new_tensor([0.02, 0.1, 0.95], dtype=torch.float32)
    low = make(K, R, C, dtype=torch.int16) if p.dtype == torch.bfloat16 else None
    return {"p": p, "x": x, "second": second, "lr_scale": second.new_ones(K), "hyper": hyper, "low": low}


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
    backends={
        "ref": Backend(muon_momentum_ref),
        "triton": Backend(_muon_momentum_triton, needs_triton, _limits),
        "cuda": Backend(_muon_momentum_cuda, extension.needs_extension, _limits, _muon_momentum_many),
    },
)

muon_apply = Op(
    "muon_apply",
    dims=("K", "R", "C"),
    cases=sizes.muon_cases(),
    forms={
        "rows": lambda make, K, R, C: _apply_inputs(make, K, R, C, per_row=True),
        "columns": lambda make, K, R, C: _apply_inputs(make, K, R, C, per_row=False),
    },
    cost=muon_apply_cost,
    check=_check_apply,
    backends={
        "ref": Backend(muon_apply_ref),
        "triton": Backend(_muon_apply_triton, needs_triton, _limits),
        "cuda": Backend(_muon_apply_cuda, extension.needs_extension, _limits, _muon_apply_many),
    },
)
