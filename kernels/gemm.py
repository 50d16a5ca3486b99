"""Persistent GEMMs: what they share, and `gemm`, which stores or adds a scaled product.

A persistent GEMM runs as many programs as fit on the GPU at a time; each takes tiles of the result in turn. Operands
and results move through tensor descriptors: bulk copies (TMA) on Hopper and newer.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from kernels.fp8 import E5M2
from kernels.op import capability, check_tensor, describe, interpreted, wide
from kernels.tile import launch

PROGRAMS_WITHOUT_GPU = 132  # multiprocessors of an H100
L2_BYTES = 50 * 2**20  # of an H100
SQUARE_SPEED = 0.9  # of 128 x 128 tiles, relative to 128 x 256: they read a third more from the L2 cache. A guess


# Triton


@triton.jit
def product(
    a_desc, b_desc, m, n, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IMPRECISE: tl.constexpr = None,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) fp32 of a b^T at row m and column n, with a (M, K) and b (N, K).

    IMPRECISE: after so many products the sum goes on in fp32 registers, because Hopper's tensor cores add fp8 products
    with fewer bits than fp32 has.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        a, b = a_desc.load([m, k]), b_desc.load([n, k]).T
        acc = tl.dot(a, b, acc, input_precision="ieee", max_num_imprecise_acc=IMPRECISE)
    return acc


@triton.jit
def transposed_product(
    a_desc, b_desc, m, n, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) fp32 of a^T b at row m and column n, with a (K, M) and b (K, N)."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(a_desc.load([k, m]).T, b_desc.load([k, n]), acc, input_precision="ieee")
    return acc


@triton.jit
def halves(acc, BLOCK_M: tl.constexpr, PART: tl.constexpr):
    """Left and right half (BLOCK_M, PART) of an accumulator, so that an epilogue handles one half at a time."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, PART)), (0, 2, 1)))


@triton.jit
def tile_at(index, tiles_m, tiles_n, group):
    """Row and column of the tile at an index: `group` rows of tiles after each other, within them rows fastest."""
    first = index // (group * tiles_n) * group
    rows = tl.minimum(tiles_m - first, group)
    within = index % (group * tiles_n)
    return first + within % rows, within // rows


# launches


def has_large_shared_memory(arch: tuple[int, int]) -> bool:
    """Whether a block may have 160 KiB or more: on data-centre GPUs. Others end at 99 KiB."""
    return arch in ((8, 0), (9, 0), (10, 0), (10, 3))


def num_programs(device: torch.device, tiles: int, per_sm: int = 1) -> int:
    """Programs of a persistent kernel: as many as fit on the GPU at a time, and no more than tiles."""
    sms = PROGRAMS_WITHOUT_GPU
    if device.type == "cuda":
        sms = torch.cuda.get_device_properties(device).multi_processor_count
    return min(per_sm * sms, tiles)


def for_descriptor(t: Tensor) -> Tensor:
    """t as tensor descriptors want it: contiguous, at a multiple of 16 bytes. A copy only where t is not."""
    t = t.contiguous()
    return t.clone() if t.data_ptr() % 16 else t


def launch_persistent(kernel: Any, programs: int, first: Tensor, *args: Any, **options: Any) -> None:
    """`launch` of a kernel that makes tensor descriptors, for which Triton asks for device memory.

    Triton has one allocator for all libraries of a thread: this one follows the current device.
    """
    triton.set_allocator(_scratch)
    launch(kernel, (programs,), first, *args, **options)


def _scratch(size: int, align: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


# the order of tiles


class Tiling(NamedTuple):
    """A product (M, N, K), its tiles, and the programs that take consecutive tiles at a time."""

    M: int
    N: int
    K: int
    tile: tuple[int, int]
    programs: int
    itemsize: int  # of the operands
    out_itemsize: int

    @property
    def tiles(self) -> tuple[int, int]:
        return triton.cdiv(self.M, self.tile[0]), triton.cdiv(self.N, self.tile[1])

    @property
    def least_reads(self) -> int:
        """Bytes of both operands."""
        return (self.M + self.N) * self.K * self.itemsize

    def panels(self, begin: int, end: int, group: int) -> tuple[set[int], set[int]]:
        """Rows and columns of the tiles that `tile_at` finds at these indices."""
        (tiles_m, tiles_n), rows, columns = self.tiles, set[int](), set[int]()
        size = group * tiles_n
        for block in range(begin // size, (end - 1) // size + 1):
            first, height = block * group, min(tiles_m - block * group, group)
            low, high = max(begin - block * size, 0), min(end - block * size, height * tiles_n)
            rows.update(first + i % height for i in range(low, min(high, low + height)))
            columns.update(range(low // height, (high - 1) // height + 1))
        return rows, columns


def modelled_reads(tiling: Tiling, group: int, l2: int = L2_BYTES, enough: float = math.inf) -> int:
    """Bytes of the operands that come from memory, with an L2 cache that evicts what was not used for the longest time.

    Programs are in step: a wave of tiles reads each of its panels, (rows of a tile, K) of an operand, once, and the
    panel is still there for a later wave if no more than l2 bytes were read and written from there on. Counts no
    further than `enough`.
    """
    (tiles_m, tiles_n), (height, width) = tiling.tiles, tiling.tile
    # bytes of the panels of a, then of b, the last of which may be ragged
    sizes = [min(height, tiling.M - i * height) for i in range(tiles_m)]
    sizes += [min(width, tiling.N - i * width) for i in range(tiles_n)]
    sizes = [size * tiling.K * tiling.itemsize for size in sizes]
    last = [-1] * len(sizes)  # wave that used a panel
    used: list[int] = []  # by wave, bytes that no later wave used
    reads = 0
    for wave, begin in enumerate(range(0, tiles_m * tiles_n, tiling.programs)):
        end = min(begin + tiling.programs, tiles_m * tiles_n)
        rows, columns = tiling.panels(begin, end, group)
        now = [*rows, *(tiles_m + n for n in columns)]
        for p in now:
            if last[p] >= 0:
                used[last[p]] -= sizes[p]
        used.append(sum(sizes[p] for p in now) + (end - begin) * height * width * tiling.out_itemsize)
        kept, since = wave, used[wave]  # the first wave whose panels are still there, and what came after it
        while kept > 0 and since <= l2:
            kept -= 1
            since += used[kept]
        for p in now:
            if not kept <= last[p] < wave:
                reads += sizes[p]
            last[p] = wave
        if reads > enough:
            break
    return reads


@functools.cache
def best_group(tiling: Tiling, l2: int = L2_BYTES) -> int:
    """Rows of tiles in a group for the least modelled reads: 1 is a row after the other, all are columns."""
    tiles_m, tiles_n = tiling.tiles
    if tiles_m * tiles_n <= tiling.programs:
        return 1
    best, least = 1, modelled_reads(tiling, 1, l2)
    for group in (tiles_m, *(2**i for i in range(tiles_m.bit_length(), 0, -1) if 2**i < tiles_m)):
        if least <= tiling.least_reads:
            break
        reads = modelled_reads(tiling, group, l2, enough=least)
        if reads < least:
            best, least = group, reads
    return best


# gradients of weights, summed over micro-steps


def check_sum(op: str, name: str, total: Tensor, w: Tensor) -> None:
    """ValueError unless the gradient of w can be added to total: like w, contiguous, fp32 (float64 of float64)."""
    check_tensor(op, name, total, w.shape, (wide(w.dtype),), w.device, contiguous=True)
    if total.requires_grad:
        raise ValueError(f"{op}: {name} has a gradient itself; give it detached")


@torch.library.custom_op("redline::add_to_sum", mutates_args=("total",))
def _add_to_sum(total: Tensor, gradient: Tensor) -> None:
    total.add_(gradient)


@_add_to_sum.register_fake
def _(total, gradient):
    return None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, total: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        ctx.total = total  # not saved for backward: autograd would refuse what was added to since
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        _add_to_sum(ctx.total, grads[0])
        return None, None


def summed(w: Tensor, total: Tensor | None) -> Tensor:
    """w, whose gradient is added to total where there is one, instead of becoming w's: made first, in w's dtype. For
    references, and for products that no op makes."""
    return w if total is None else _Summed.apply(w, total)


# a GEMM with an optional scale, which stores or adds


def useful_share(M: int, N: int, tile: tuple[int, int], sms: int) -> float:
    """Of the time in which some SM has a tile: what SMs without one, and edges of ragged tiles, leave of it."""
    tiles = triton.cdiv(M, tile[0]) * triton.cdiv(N, tile[1])
    return M * N / (triton.cdiv(tiles, sms) * sms * tile[0] * tile[1]) if tiles else 1.0


def _config(
    M: int, N: int, dtype: torch.dtype, promoted: bool, arch: tuple[int, int], sms: int = PROGRAMS_WITHOUT_GPU
) -> dict[str, int]:
    """Tiles, warps, stages and programs per SM, for an SM of sm_90 without spills. Not measured on a GPU yet.

    128 x 256, one program an SM, asks the least of the L2 cache. 128 x 128, two programs an SM, so that one's epilogue
    runs beside the other's products, where that many more tiles fill the SMs better. promoted: 128 x 128 alone, for
    fp8 sums that go through fp32 registers, which leave room for one program.
    """
    if dtype.itemsize == 4:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "SPLIT": 1, "num_warps": 8, "num_stages": 2, "per_sm": 1}
    k = 128 // dtype.itemsize
    if not has_large_shared_memory(arch):
        return {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": k, "SPLIT": 1, "num_warps": 4, "num_stages": 2, "per_sm": 1}
    square = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": k, "num_warps": 8, "num_stages": 3}
    if promoted or arch == (8, 0):
        return square | {"SPLIT": 2, "per_sm": 1}
    if SQUARE_SPEED * useful_share(M, N, (128, 128), sms) > useful_share(M, N, (128, 256), sms):
        return square | {"SPLIT": 4, "per_sm": 2}
    return square | {"BLOCK_N": 256, "SPLIT": 2, "per_sm": 1}


@triton.jit
def _finish(acc, m, n, out_desc, alpha, ACCUMULATE: tl.constexpr, BULK: tl.constexpr):
    acc *= alpha
    if ACCUMULATE and not BULK:
        out_desc.store([m, n], acc + out_desc.load([m, n]))
    elif ACCUMULATE:
        # A bulk reduction: the L2 cache adds, and nothing waits for what was there. Each element has one addend in a
        # launch, and launches follow each other, so the sum is the same in every run.
        out_desc.atomic_add([m, n], acc)
    else:
        out_desc.store([m, n], acc.to(out_desc.dtype))


@triton.jit(do_not_specialize=["M", "K", "group"], do_not_specialize_on_alignment=["alpha_ptr", "other_alpha_ptr"])
def _gemm_kernel(
    a_ptr, b_ptr, out_ptr, alpha_ptr, other_alpha_ptr, M, N, K, stride_a, stride_b, stride_out, group,
    TRANSPOSED: tl.constexpr, ACCUMULATE: tl.constexpr, SCALED: tl.constexpr, IMPRECISE: tl.constexpr,
    BULK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """out (M, N) = or += alpha a b^T, with a (M, K) and b (N, K), or both TRANSPOSED in memory."""
    PART: tl.constexpr = BLOCK_N // SPLIT
    if TRANSPOSED:
        a_desc = tl.make_tensor_descriptor(a_ptr, [K, M], [stride_a, 1], [BLOCK_K, BLOCK_M])
        b_desc = tl.make_tensor_descriptor(b_ptr, [K, N], [stride_b, 1], [BLOCK_K, BLOCK_N])
    else:
        a_desc = tl.make_tensor_descriptor(a_ptr, [M, K], [stride_a, 1], [BLOCK_M, BLOCK_K])
        b_desc = tl.make_tensor_descriptor(b_ptr, [N, K], [stride_b, 1], [BLOCK_N, BLOCK_K])
    out_desc = tl.make_tensor_descriptor(out_ptr, [M, N], [stride_out, 1], [BLOCK_M, PART])
    alpha = 1.0
    if SCALED:
        alpha = tl.load(alpha_ptr) * tl.load(other_alpha_ptr)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=False):
        row, column = tile_at(tile, tiles_m, tiles_n, group)
        m, n = row * BLOCK_M, column * BLOCK_N
        if TRANSPOSED:
            acc = transposed_product(a_desc, b_desc, m, n, K, BLOCK_M, BLOCK_N, BLOCK_K)
        else:
            acc = product(a_desc, b_desc, m, n, K, BLOCK_M, BLOCK_N, BLOCK_K, IMPRECISE)
        if SPLIT == 4:
            left, right = halves(acc, BLOCK_M, 2 * PART)
            first, second = halves(left, BLOCK_M, PART)
            third, fourth = halves(right, BLOCK_M, PART)
            _finish(first, m, n, out_desc, alpha, ACCUMULATE, BULK)
            _finish(second, m, n + PART, out_desc, alpha, ACCUMULATE, BULK)
            _finish(third, m, n + 2 * PART, out_desc, alpha, ACCUMULATE, BULK)
            _finish(fourth, m, n + 3 * PART, out_desc, alpha, ACCUMULATE, BULK)
        elif SPLIT == 2:
            left, right = halves(acc, BLOCK_M, PART)
            _finish(left, m, n, out_desc, alpha, ACCUMULATE, BULK)
            _finish(right, m, n + PART, out_desc, alpha, ACCUMULATE, BULK)
        else:
            _finish(acc, m, n, out_desc, alpha, ACCUMULATE, BULK)


def _adds_in_bulk() -> bool:
    """Whether a descriptor's `atomic_add` runs: not in Triton's interpreter, unless somebody has taught it to."""
    return not interpreted() or hasattr(interpreter.InterpreterBuilder, "create_descriptor_reduce")


def gemm(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    alphas: tuple[Tensor, Tensor] | None = None,
    *,
    transposed: bool = False,
    accumulate: bool = False,
) -> None:
    """out (M, N) = or += alpha a b^T; a (M, K), b (N, K), or transposed (K, M), (K, N). Rows may have gaps.

    What is added to is fp32.
    """
    M, N = out.shape
    K = a.size(0) if transposed else a.size(1)
    if accumulate and (out.dtype != torch.float32 or out.data_ptr() % 16):
        raise ValueError(
            f"gemm: out is {describe(out)}; expected float32 that begins at a multiple of 16 bytes, to add to"
        )
    precise = E5M2 in (a.dtype, b.dtype)  # a gradient
    config = _config(M, N, a.dtype, precise, capability(a.device), num_programs(a.device, M * N))
    per_sm, tile = config.pop("per_sm"), (config["BLOCK_M"], config["BLOCK_N"])
    tiles = triton.cdiv(M, tile[0]) * triton.cdiv(N, tile[1])
    programs = num_programs(a.device, tiles, per_sm)
    group = best_group(Tiling(M, N, K, tile, programs, a.dtype.itemsize, out.dtype.itemsize))
    launch_persistent(
        _gemm_kernel, programs,
        a, b, out, *(alphas or (None, None)), M, N, K, a.stride(0), b.stride(0), out.stride(0), group,
        TRANSPOSED=transposed, ACCUMULATE=accumulate, SCALED=alphas is not None,
        IMPRECISE=config["BLOCK_K"] if precise else None, BULK=_adds_in_bulk(), **config,
    )  # fmt: skip


def add_product(a: Tensor, b: Tensor, total: Tensor, add: bool = True) -> None:
    """total (N, K) = or += a (M, N)^T b (M, K), a weight's gradient: of bf16 in fp32, or all fp32.

    On a GPU by cuBLAS, which with large products reaches 77 % of the peak [cutlass#1662], where `gemm` gets operands
    out of the L2 cache for 60 %. `gemm` is what the interpreter runs in bf16.
    """
    if a.dtype == torch.float32:
        torch.addmm(total, a.T, b, beta=float(add), out=total)  # with beta = 0 PyTorch ignores what total holds
    elif total.is_cuda:
        torch.addmm(total, a.T, b, beta=float(add), out_dtype=torch.float32, out=total)
    elif a.size(0):
        gemm(a, b, total, transposed=True, accumulate=add)
    elif not add:
        total.zero_()


# torch.compile does not know addmm with another type of sum [pytorch#163880]
@torch.library.custom_op("redline::add_product", mutates_args=("total",))
def _add_product(a: Tensor, b: Tensor, total: Tensor) -> None:
    add_product(a, b, total)


@_add_product.register_fake
def _(a, b, total):
    return None


def weight_gradient(a: Tensor, b: Tensor, total: Tensor | None) -> Tensor | None:
    """a^T b; where there is a total, None, and added to it. For code that torch.compile sees through."""
    if total is None:
        return a.T @ b
    _add_product(a, b, total)
    return None
