"""The roofline of this GPU as measured in this process: how fast a large copy and a large product of matrices are.

A kernel's fraction of it is the time that its least work would take at these two speeds, over the time it took. It is
near 1 for a perfect kernel, and a little above where the kernel multiplies better than the library, or finds part of
its data cached.
"""

import functools
from dataclasses import dataclass

import torch

from bench.timing import GraphSampler, interleave

COPY_BYTES = 2**30
GEMM = 8192  # rows, columns and inner size
SECONDS = 0.3


@dataclass(frozen=True)
class Roofline:
    """copy: bytes read and written per second; gemm: FLOP per second in one dtype."""

    copy: float
    gemm: float

    def seconds(self, flops: int, nbytes: int) -> float:
        return max(flops / self.gemm, nbytes / self.copy)


@functools.cache
def measured(dtype: torch.dtype) -> Roofline:
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(GEMM, GEMM, device="cuda", dtype=dtype) for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "gemm": lambda: torch.mm(a, b)}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    spread = interleave({name: GraphSampler([call], stream) for name, call in calls.items()}, seconds=SECONDS)
    return Roofline(copy=2 * COPY_BYTES / spread["copy"].median, gemm=2 * GEMM**3 / spread["gemm"].median)
