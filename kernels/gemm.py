"""Persistent GEMMs: what they share, and `gemm`, which stores or adds a scaled product.

A persistent GEMM runs as many programs as fit on the GPU at a time; each takes tiles of the result in turn. Operands
and results move through tensor descriptors: bulk copies (TMA) on Hopper and newer.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8 import E5M2
from kernels.op import capability
from kernels.tile import launch

PROGRAMS_WITHOUT_GPU = 132  # multiprocessors of an H100


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


# a GEMM with an optional scale, which stores or adds


def _config(dtype: torch.dtype, promoted: bool, arch: tuple[int, int]) -> dict[str, int]:
    """Tiles, warps and stages that fit an SM of sm_90 without spills. Not measured on a GPU yet.

    promoted: smaller tiles, for sums that go through fp32 registers or are added to out.
    """
    if dtype.itemsize == 4:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "SPLIT": 1, "num_warps": 8, "num_stages": 2}
    k = 128 // dtype.itemsize
    if not has_large_shared_memory(arch):
        return {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": k, "SPLIT": 1, "num_warps": 4, "num_stages": 2}
    if promoted or arch == (8, 0):
        return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": k, "SPLIT": 2, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": k, "SPLIT": 2, "num_warps": 8, "num_stages": 3}


@triton.jit
def _finish(acc, m, n, out_desc, alpha, ACCUMULATE: tl.constexpr):
    acc *= alpha
    if ACCUMULATE:
        acc += out_desc.load([m, n])
    out_desc.store([m, n], acc.to(out_desc.dtype))


@triton.jit(do_not_specialize=["M", "K"])
def _gemm_kernel(
    a_ptr, b_ptr, out_ptr, alpha_ptr, other_alpha_ptr, M, N, K, stride_a, stride_b, stride_out,
    TRANSPOSED: tl.constexpr, ACCUMULATE: tl.constexpr, SCALED: tl.constexpr, IMPRECISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
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
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tiles_n, tl.num_programs(0), flatten=False):
        m, n = (tile // tiles_n) * BLOCK_M, (tile % tiles_n) * BLOCK_N
        if TRANSPOSED:
            acc = transposed_product(a_desc, b_desc, m, n, K, BLOCK_M, BLOCK_N, BLOCK_K)
        else:
            acc = product(a_desc, b_desc, m, n, K, BLOCK_M, BLOCK_N, BLOCK_K, IMPRECISE)
        if SPLIT == 2:
            left, right = halves(acc, BLOCK_M, PART)
            _finish(left, m, n, out_desc, alpha, ACCUMULATE)
            _finish(right, m, n + PART, out_desc, alpha, ACCUMULATE)
        else:
            _finish(acc, m, n, out_desc, alpha, ACCUMULATE)


def gemm(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    alphas: tuple[Tensor, Tensor] | None = None,
    *,
    transposed: bool = False,
    accumulate: bool = False,
) -> None:
    """out (M, N) = or += alpha a b^T; a (M, K), b (N, K), or transposed (K, M), (K, N). Rows may have gaps."""
    M, N = out.shape
    K = a.size(0) if transposed else a.size(1)
    precise = a.dtype == E5M2  # a gradient
    config = _config(a.dtype, accumulate or precise, capability(a.device))
    tiles = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])
    launch_persistent(
        _gemm_kernel, num_programs(a.device, tiles),
        a, b, out, *(alphas or (None, None)), M, N, K, a.stride(0), b.stride(0), out.stride(0),
        TRANSPOSED=transposed, ACCUMULATE=accumulate, SCALED=alphas is not None,
        IMPRECISE=config["BLOCK_K"] if precise else None, **config,
    )  # fmt: skip
