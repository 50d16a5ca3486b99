"""What the persistent GEMMs share: the loop over K, the halves of an accumulator, and a launch with tensor descriptors.

A persistent GEMM runs as many programs as fit on the GPU at a time; each takes tiles of the result in turn. Operands and
results move through tensor descriptors, that is in bulk copies (TMA) on Hopper and newer.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tile import launch

PROGRAMS_WITHOUT_GPU = 132  # multiprocessors of an H100


# Triton


@triton.jit
def product(
    a_desc, b_desc, m, n, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IMPRECISE: tl.constexpr = None,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) fp32 of a b^T at row m and column n, with a (M, K) and b (N, K).

    IMPRECISE: after so many products the sum goes on in fp32 registers. Hopper's tensor cores add fp8 products with fewer
    bits than fp32 has.
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
    """Left and right half (BLOCK_M, PART) of an accumulator, so that an epilogue holds results of one half at a time."""
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
