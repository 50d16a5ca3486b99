"""The roofline of this GPU as measured in this process: how fast a large copy and a large product of matrices are.

A kernel's fraction of it is the time that its least work would take at these two speeds, over the time it took. It is
near 1 for a perfect kernel, and a little above where the kernel multiplies better than the library, or finds part of
its data cached. What multiplies in fp8 is held to a product in fp8.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from bench.timing import GraphSampler, interleave
from kernels.fp8 import E4M3, Fp8Tensor
from kernels.op import Op

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
def multiplies_in(op: Op, form: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of what the op's products multiply: fp8 where a form has operands in it."""

    def make(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)

    inputs: dict[str, Any] = op.forms[form](make, *next(iter(op.cases.values())))
    return E4M3 if any(isinstance(value, Fp8Tensor) for value in inputs.values()) else dtype


@functools.cache
def measured(dtype: torch.dtype) -> Roofline:
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    eight = dtype == E4M3
    a, b = (torch.randn(GEMM, GEMM, device="cuda", dtype=torch.bfloat16 if eight else dtype) for _ in range(2))
    if eight:
        q, q_t, one = a.to(E4M3), b.to(E4M3).T, torch.ones((), device="cuda")
        gemm = functools.partial(
            torch._scaled_mm, q, q_t, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    else:
        gemm = functools.partial(torch.mm, a, b)
    calls = {"copy": lambda: target.copy_(source), "gemm": gemm}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    spread = interleave({name: GraphSampler([call], stream) for name, call in calls.items()}, seconds=SECONDS)
    return Roofline(copy=2 * COPY_BYTES / spread["copy"].median, gemm=2 * GEMM**3 / spread["gemm"].median)
