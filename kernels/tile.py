"""Device functions that several kernels share."""

import triton
import triton.language as tl


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
