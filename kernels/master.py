"""An exact fp32 master in two halves: a bf16 weight and the 16 bits that it lacks. For PyTorch and inside kernels.

The bf16 half is the master rounded to nearest, which keeps it unbiased: truncation would shrink every weight. The low
half is the signed difference of the bit patterns. Ties go away from zero, because a tie towards zero would need a
difference of +2^15, which 16 signed bits do not hold.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 to (bf16, int16); `join_master` gives back every bit."""
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join_master(high: Tensor, low: Tensor) -> Tensor:
    """Inverse of `split_master`: bf16 and int16 to fp32."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)).view(torch.float32)


@triton.jit
def split_tile(x):
    """`split_master` of a tile."""
    bits = x.to(tl.int32, bitcast=True)
    high = (bits + 0x8000) >> 16  # wraps around for NaNs of large payload, and so does the way back
    return high.to(tl.int16).to(tl.bfloat16, bitcast=True), (bits - (high << 16)).to(tl.int16)


@triton.jit
def join_tile(high, low):
    """`join_master` of a tile."""
    return ((high.to(tl.int16, bitcast=True).to(tl.int32) << 16) + low.to(tl.int32)).to(tl.float32, bitcast=True)
