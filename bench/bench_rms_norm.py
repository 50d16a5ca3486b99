"""rms_norm: `pytest bench/bench_rms_norm.py`. Each backend that can run here, on the shapes of the tracks, forward and backward.

On a GPU `extra_info` has the median time with a cold L2 cache, GB/s of the least traffic (`rms_norm_cost`) and the fraction
of what copying a large tensor reaches in the same run. A backend whose results are wrong gets no number.
"""

import functools

import pytest
import torch

from kernels.dispatch import Device
from kernels.rms_norm import rms_norm

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
CASES = rms_norm.cases if CUDA else {"quickstart": rms_norm.cases["quickstart"]}
COPY_BYTES = 2**30


def make(*size, dtype=DTYPE):
    return torch.randn(size, device=DEVICE, dtype=dtype)


def median_ms(function, **options):
    from triton.testing import do_bench

    return do_bench(function, warmup=50, rep=200, return_mode="median", **options)


@functools.cache
def copy_bandwidth():
    """Bytes per second read and written by a large copy."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / (median_ms(lambda: target.copy_(source)) * 1e-3)


def compiled():
    torch.compiler.reset()
    return torch.compile(rms_norm.backends["ref"], fullgraph=True, dynamic=False)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("form", rms_norm.forms)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["ref", "torch.compile", "triton"] if CUDA else ["ref"])
def test_rms_norm(benchmark, backend, case, form, backward):
    shape = CASES[case]
    if backend == "torch.compile":
        op = compiled()
    elif obstacle := rms_norm.obstacle(backend, shape, DTYPE, Device.of(DEVICE)):
        pytest.skip(obstacle)
    else:
        op = rms_norm.backends[backend]
    inputs = rms_norm.forms[form](make, *shape)
    if "scale" in inputs:
        inputs["scale"] = inputs["scale"].abs()
    leaves = [t.requires_grad_() for name, t in inputs.items() if name != "scale"]
    out, want = op(**inputs), rms_norm.backends["ref"](**inputs)
    torch.testing.assert_close(out.y, want.y, rtol=0.02, atol=0.02)
    heads = [t for t in (out.y, out.h) if t is not None]
    grads = [torch.randn_like(t) for t in heads]

    def forward():
        with torch.no_grad():
            op(**inputs)

    def backwards():
        torch.autograd.grad(heads, leaves, grads, retain_graph=True)

    function = backwards if backward else forward
    flops, nbytes = rms_norm.cost(shape, DTYPE, form, backward)
    benchmark.extra_info |= {"device": Device.of(DEVICE).name, "shape": list(shape), "flops": flops, "bytes": nbytes}
    if not CUDA:
        benchmark(function)
        return
    ms = median_ms(function)
    gb_per_s = nbytes / ms / 1e6
    benchmark.extra_info |= {"ms": ms, "gb_per_s": gb_per_s, "copy_fraction": 1e9 * gb_per_s / copy_bandwidth()}
    benchmark.pedantic(lambda: (function(), torch.cuda.synchronize()), rounds=20, warmup_rounds=3)
