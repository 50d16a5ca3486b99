"""Muon's orthogonalisation: the nearest semi-orthogonal matrices to a batch, by five odd quintic polynomials.

    X = x / (safety |x|_F + 1e-6),  then five times                           [Amsel 2025, arXiv 2505.16932]
        wide matrices (rows <= cols)    A = X X^T,  B = b A + c A A,  X = a X + B X
        tall matrices                   A = X^T X,  B = b A + c A A,  X = a X + X B
Each step maps a singular value s to a s + b s^3 + c s^5 and keeps the singular vectors. Zero stays zero.

Shapes    x (K, rows, cols) -> (K, rows, cols); scale (K,) fp32, if given, replaces 1 / (safety |x|_F + 1e-6)
Dtypes    bf16 or fp32; A, B and X are stored in that dtype between products
Rounding  products are summed in fp32; A, B and X are each rounded once. x is not rescaled in memory: scale^2 multiplies
          the first A, scale the first new X
Kernels   one GEMM, out = alpha left right + beta add, in five uses. A and B are symmetric: only tiles on and below the
          diagonal are computed, and those below it are stored a second time, transposed. The products read transposes
          in place, so tall matrices need no copy. Matrices of up to SMALL_SIDE rows and columns take one launch in all:
          a program makes the five steps of one in registers
Limits    rows and cols are at least 1. Where cols, or the shorter side, is no multiple of 16 bytes, the batch is copied
          and padded with zeros, which change nothing (not for small matrices); an x with gaps between its rows is
          copied too
Bound     arithmetic: `polar_express_cost`, which counts half of each symmetric product
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import sizes
from kernels.gemm import for_descriptor, halves, has_large_shared_memory, launch_persistent, num_programs
from kernels.op import (
    DTYPES,
    Backend,
    Op,
    Problem,
    capability,
    check_tensor,
    describe,
    needs_triton,
    takes_dtypes,
    wide,
)
from kernels.tile import SAFETY, launch

COEFFICIENTS = (
    # five steps, safety 2e-2, cushion 2 [computed by the method of arXiv 2505.16932; as in nanochat and modded-nanogpt]
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
TINY_NORM = 1e-6
SMALL_SIDE = 64

Coefficients = tuple[tuple[float, float, float], ...]


# reference


def polar_express_ref(
    x: Tensor, scale: Tensor | None = None, *, coefficients: Coefficients = COEFFICIENTS, safety: float = SAFETY
) -> Tensor:
    if scale is None:
        acc_dtype = wide(x.dtype)
        x = x / (safety * torch.linalg.matrix_norm(x.to(acc_dtype), keepdim=True) + TINY_NORM).to(x.dtype)
    else:
        x = x * scale.to(x.dtype)[:, None, None]
    tall = x.size(-2) > x.size(-1)
    for a, b, c in coefficients:
        gram = x.mT @ x if tall else x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, poly, beta=a) if tall else torch.baddbmm(x, poly, x, beta=a)
    return x


# Triton


def _config(rows: int, cols: int, symmetric: bool, dtype: torch.dtype, arch: tuple[int, int]) -> dict[str, int]:
    """Tile sizes, warps, stages and programs per multiprocessor for a result of rows x cols. Not measured on a GPU yet.

    Tiles of symmetric results are square, as mirroring needs; wide ones are finished in two halves (SPLIT), which
    keeps registers free. They fit an SM of sm_90 without spills; two programs
    share one, so that the epilogue of one overlaps with the products of the other. Small results take small tiles, so
    that there are enough for all SMs.
    """
    if dtype == torch.float32:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "SPLIT": 1, "num_warps": 8, "num_stages": 2, "per_sm": 1}
    if not has_large_shared_memory(arch):
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "SPLIT": 1, "num_warps": 4, "num_stages": 3, "per_sm": 3}
    if min(rows, cols) <= 512:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT": 1, "num_warps": 4, "num_stages": 2, "per_sm": 5}
    if symmetric or arch == (8, 0):
        return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "SPLIT": 1, "num_warps": 8, "num_stages": 2, "per_sm": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "SPLIT": 2, "num_warps": 8, "num_stages": 3, "per_sm": 1}


def num_tiles(K: int, M: int, N: int, symmetric: bool, config: dict[str, int]) -> int:
    """Tiles of K results (M, N) that are computed."""
    tiles_m, tiles_n = triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(N, config["BLOCK_N"])
    return K * (tiles_m * (tiles_m + 1) // 2 if symmetric else tiles_m * tiles_n)


@triton.jit
def _tile(desc, k, row, col, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(ROWS, COLS) at (row, col) of matrix k; with TRANSPOSED, of its transpose."""
    if TRANSPOSED:
        return desc.load([k, col, row]).reshape(COLS, ROWS).T
    return desc.load([k, row, col]).reshape(ROWS, COLS)


@triton.jit
def _finish(
    acc, k, m, n, add_desc, out_desc, alpha, beta, factor, ADD: tl.constexpr, SCALE_POWER: tl.constexpr
):  # fmt: skip
    """Stores factor (alpha acc + beta add) at (m, n) of matrix k, and returns it as stored."""
    acc = acc * alpha
    if ADD:
        acc += beta * add_desc.load([k, m, n]).reshape(acc.shape).to(tl.float32)
    if SCALE_POWER > 0:
        acc = acc * factor
    out = acc.to(out_desc.dtype)
    out_desc.store([k, m, n], out.reshape(1, acc.shape[0], acc.shape[1]))
    return out


@triton.jit
def _gemm_kernel(
    left_ptr, right_ptr, add_ptr, scale_ptr, out_ptr, K, alpha, beta,
    M: tl.constexpr, N: tl.constexpr, L: tl.constexpr, LEFT_T: tl.constexpr, RIGHT_T: tl.constexpr,
    ADD: tl.constexpr, SYMMETRIC: tl.constexpr, SCALE_POWER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """out (K, M, N) = scale^SCALE_POWER (alpha left (K, M, L) right (K, L, N) + beta add (K, M, N)).

    LEFT_T, RIGHT_T: the operand is stored transposed. SYMMETRIC: M = N, and tiles above the diagonal are mirrored, not
    computed.
    """
    # one constant a size: Triton 3.6 has no constant lists
    left_rows: tl.constexpr = L if LEFT_T else M
    left_cols: tl.constexpr = M if LEFT_T else L
    LEFT_ROWS: tl.constexpr = BLOCK_K if LEFT_T else BLOCK_M
    LEFT_COLS: tl.constexpr = BLOCK_M if LEFT_T else BLOCK_K
    right_rows: tl.constexpr = N if RIGHT_T else L
    right_cols: tl.constexpr = L if RIGHT_T else N
    RIGHT_ROWS: tl.constexpr = BLOCK_N if RIGHT_T else BLOCK_K
    RIGHT_COLS: tl.constexpr = BLOCK_K if RIGHT_T else BLOCK_N
    left_desc = tl.make_tensor_descriptor(
        left_ptr, [K, left_rows, left_cols], [M * L, left_cols, 1], [1, LEFT_ROWS, LEFT_COLS]
    )
    right_desc = tl.make_tensor_descriptor(
        right_ptr, [K, right_rows, right_cols], [L * N, right_cols, 1], [1, RIGHT_ROWS, RIGHT_COLS]
    )
    PART: tl.constexpr = BLOCK_N // SPLIT
    out_desc = tl.make_tensor_descriptor(out_ptr, [K, M, N], [M * N, N, 1], [1, BLOCK_M, PART])
    add_desc = out_desc
    if ADD:
        add_desc = tl.make_tensor_descriptor(add_ptr, [K, M, N], [M * N, N, 1], [1, BLOCK_M, PART])
    tiles_m: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tiles: tl.constexpr = tiles_m * (tiles_m + 1) // 2 if SYMMETRIC else tiles_m * tiles_n  # of one matrix
    for tile in tl.range(tl.program_id(0), K * tiles, tl.num_programs(0), flatten=False):
        k = tile // tiles
        t = tile % tiles
        if SYMMETRIC:
            # tile t of the lower triangle, row by row: row i begins at i (i + 1) / 2; the fp32 root may be off by one
            i = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
            i = tl.where(i * (i + 1) // 2 > t, i - 1, i)
            i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
            j = t - i * (i + 1) // 2
        else:
            i, j = t // tiles_n, t % tiles_n
        m, n = i * BLOCK_M, j * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for l in range(0, L, BLOCK_K):
            left = _tile(left_desc, k, m, l, LEFT_T, BLOCK_M, BLOCK_K)
            right = _tile(right_desc, k, l, n, RIGHT_T, BLOCK_K, BLOCK_N)
            acc = tl.dot(left, right, acc, input_precision="ieee")
        factor = 1.0
        if SCALE_POWER > 0:
            scale = tl.load(scale_ptr + k)
            factor = scale * scale if SCALE_POWER == 2 else scale
        if SPLIT == 2:
            left_acc, right_acc = halves(acc, BLOCK_M, PART)
            _finish(left_acc, k, m, n, add_desc, out_desc, alpha, beta, factor, ADD, SCALE_POWER)
            _finish(right_acc, k, m, n + PART, add_desc, out_desc, alpha, beta, factor, ADD, SCALE_POWER)
        else:
            out = _finish(acc, k, m, n, add_desc, out_desc, alpha, beta, factor, ADD, SCALE_POWER)
            if SYMMETRIC:
                if i != j:
                    out_desc.store([k, n, m], out.T.reshape(1, BLOCK_M, BLOCK_N))


@triton.jit
def _small_kernel(
    x_ptr, scale_ptr, out_ptr, COEFFICIENTS: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All steps of one matrix (R, C), rounded where the products of larger ones are."""
    k = tl.program_id(0).to(tl.int64)
    offs_r, offs_c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    mask = (offs_r < R)[:, None] & (offs_c < C)[None, :]
    offs = (k * R + offs_r[:, None]) * C + offs_c[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    scale = tl.load(scale_ptr + k)
    for i in tl.static_range(0, len(COEFFICIENTS), 3):
        a = COEFFICIENTS[i]
        b = COEFFICIENTS[i + 1]
        c = COEFFICIENTS[i + 2]
        if R > C:
            gram = tl.dot(tl.trans(x), x, input_precision="ieee")
        else:
            gram = tl.dot(x, tl.trans(x), input_precision="ieee")
        gram = (gram * scale * scale).to(x.dtype)
        poly = (c * tl.dot(gram, gram, input_precision="ieee") + b * gram.to(tl.float32)).to(x.dtype)
        if R > C:
            y = tl.dot(x, poly, input_precision="ieee")
        else:
            y = tl.dot(poly, x, input_precision="ieee")
        x = ((y + a * x.to(tl.float32)) * scale).to(x.dtype)
        scale = 1.0
    tl.store(out_ptr + offs, x, mask=mask)


def _gemm(
    left: Tensor,
    right: Tensor,
    *,
    left_t: bool = False,
    right_t: bool = False,
    symmetric: bool = False,
    alpha: float = 1.0,
    add: Tensor | None = None,
    beta: float = 0.0,
    scale: Tensor | None = None,
    scale_power: int = 0,
) -> Tensor:
    """scale^scale_power (alpha left right + beta add) for each matrix of a batch; left_t, right_t transpose first."""
    K, M, L = (left.mT if left_t else left).shape
    N = (right.mT if right_t else right).size(2)
    config = _config(M, N, symmetric, left.dtype, capability(left.device))
    tiles, per_sm = num_tiles(K, M, N, symmetric, config), config.pop("per_sm")
    programs = num_programs(left.device, tiles, per_sm)
    out = left.new_empty(K, M, N)
    launch_persistent(
        _gemm_kernel, programs,
        left, right, add, scale, out, K, alpha, beta,
        M=M, N=N, L=L, LEFT_T=left_t, RIGHT_T=right_t, ADD=add is not None, SYMMETRIC=symmetric,
        SCALE_POWER=scale_power if scale is not None else 0, **config,
    )  # fmt: skip
    return out


# torch ops


@torch.library.custom_op("redline::polar_express", mutates_args=())
def _polar_express(x: Tensor, scale: Tensor, coefficients: list[float]) -> Tensor:
    """coefficients: a, b, c of each step, one after the other."""
    K, R, C = x.shape
    if max(R, C) <= SMALL_SIDE:
        out, blocks = x.new_empty(K, R, C), [max(16, triton.next_power_of_2(n)) for n in (R, C)]
        launch(
            _small_kernel, (K,),
            x.contiguous(), scale, out, COEFFICIENTS=tuple(coefficients),
            R=R, C=C, BLOCK_R=blocks[0], BLOCK_C=blocks[1], num_warps=4,
        )  # fmt: skip
        return out
    x, tall = for_descriptor(x), R > C
    steps = list(zip(*[iter(coefficients)] * 3, strict=True))
    for i, (a, b, c) in enumerate(steps):
        first = scale if i == 0 else None
        gram = _gemm(x, x, left_t=tall, right_t=not tall, symmetric=True, scale=first, scale_power=2)
        poly = _gemm(gram, gram, right_t=True, symmetric=True, alpha=c, add=gram, beta=b)
        # no names for the operands: they would keep them through the next step's products
        x = _gemm(*((x, poly) if tall else (poly, x)), add=x, beta=a, scale=first, scale_power=1)
    return x


@_polar_express.register_fake
def _(x, scale, coefficients):
    return x.new_empty(x.shape)


def _polar_express_triton(
    x: Tensor, scale: Tensor | None = None, *, coefficients: Coefficients = COEFFICIENTS, safety: float = SAFETY
) -> Tensor:
    if x.size(0) == 0:
        return torch.empty_like(x)
    if scale is None:
        scale = 1 / (safety * torch.linalg.matrix_norm(x.float()) + TINY_NORM)
    scale = scale.contiguous()
    flat = [float(number) for step in coefficients for number in step]
    unit, (_, rows, cols) = 16 // x.dtype.itemsize, x.shape
    # A is square with the shorter side
    if max(rows, cols) > SMALL_SIDE and (min(rows, cols) % unit or cols % unit):
        padded = x.new_zeros(x.size(0), sizes.round_up(rows, unit), sizes.round_up(cols, unit))
        padded[:, :rows, :cols] = x
        y: Tensor = _polar_express(padded, scale, flat)
        return y[:, :rows, :cols].contiguous()
    y = _polar_express(x, scale, flat)
    return y


# cost


def polar_express_cost(
    shape: tuple[int, int, int], dtype: torch.dtype, form: str = "plain", backward: bool = False
) -> tuple[int, int]:
    """The least FLOPs and bytes of five steps: half of each symmetric product; x is read and written once."""
    K, rows, cols = shape
    n, m = min(rows, cols), max(rows, cols)
    products = n * n * m + n * n * n + 2 * n * n * m  # A (half), A A (half), B X
    return len(COEFFICIENTS) * K * products, 2 * K * rows * cols * dtype.itemsize


# interface


def _is_triple(step: Any) -> bool:
    numbers = step if isinstance(step, (tuple, list)) else ()
    return len(numbers) == 3 and all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers)


def _check(
    x: Tensor, scale: Tensor | None = None, *, coefficients: Coefficients = COEFFICIENTS, safety: float = SAFETY
) -> Problem:
    if x.dim() != 3 or 0 in x.shape[1:] or x.dtype not in (*DTYPES, torch.float64):
        raise ValueError(f"polar_express: x is {describe(x)}; expected (K, rows, cols) bfloat16 or float32")
    if scale is not None:
        check_tensor("polar_express", "scale", scale, x.shape[:1], (wide(x.dtype),), x.device)
    if not coefficients or not all(_is_triple(step) for step in coefficients):
        raise ValueError(
            f"polar_express: coefficients are {coefficients!r}; expected (a, b, c), three finite numbers, for each step"
        )
    return Problem(tuple(x.shape), x.dtype, x.device)


def _inputs(make: Any, K: int, rows: int, cols: int) -> dict[str, Any]:
    return {"x": make(K, rows, cols).detach()}


polar_express = Op(
    "polar_express",
    dims=("K", "rows", "cols"),
    cases=sizes.muon_cases(),
    forms={"plain": _inputs},
    cost=polar_express_cost,
    check=_check,
    backends={"ref": Backend(polar_express_ref), "triton": Backend(_polar_express_triton, needs_triton, takes_dtypes)},
)
