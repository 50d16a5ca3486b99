"""rms_norm: `pytest bench/bench_rms_norm.py`. Each backend that can run here, on the shapes of the tracks, forward and backward."""

from bench.ops import measure, parameters
from kernels.rms_norm import rms_norm


@parameters(rms_norm)
def test_rms_norm(benchmark, backend, case, form, backward):
    measure(benchmark, rms_norm, backend, case, form, backward)
