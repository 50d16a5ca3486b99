"""What several kernels share: a constant, device functions, and the preparation of launches."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Polar Express starts from matrices of Frobenius norm 1 / SAFETY: that norm bounds the largest singular value, and this keeps
# rounding inside [nanochat 92d63d4, optim.py]
SAFETY = 1.01
PROGRAMS_WITHOUT_GPU = 132  # multiprocessors of an H100


@triton.jit
def join_master(high, low):
    """The fp32 number whose bits are those of a bf16 number, followed by 16 zeros, plus a signed 16-bit difference."""
    return ((high.to(tl.int16, bitcast=True).to(tl.int32) << 16) + low.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def split_master(x):
    """Inverse of `join_master`: the nearest bf16 number, ties away from zero, and the difference of the bit patterns."""
    bits = x.to(tl.int32, bitcast=True)
    high = (bits + 0x8000) >> 16  # wraps around for NaNs of large payload, and so does the way back
    return high.to(tl.int16).to(tl.bfloat16, bitcast=True), (bits - (high << 16)).to(tl.int16)


# what launches share


def has_large_shared_memory(arch: tuple[int, int]) -> bool:
    """Whether a block may have 160 KiB or more: the data-centre parts. Others end at 99 KiB."""
    return arch in ((8, 0), (9, 0), (10, 0), (10, 3))


def num_programs(device: torch.device) -> int:
    """Of a persistent kernel: one for each multiprocessor."""
    if device.type != "cuda":
        return PROGRAMS_WITHOUT_GPU
    return torch.cuda.get_device_properties(device).multi_processor_count


def for_descriptor(t: Tensor) -> Tensor:
    """t without gaps and at an address that is a multiple of 16 bytes, as tensor descriptors want it; copied only if it is not."""
    t = t.contiguous()
    return t.clone() if t.data_ptr() % 16 else t


def allow_descriptors(device: torch.device) -> None:
    """Gives Triton memory for the descriptors that the next launches of this thread make on the device."""
    # the closure lives until the next call: it must not hold a tensor
    triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=device))
