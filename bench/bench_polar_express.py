"""polar_express: `pytest bench/bench_polar_express.py`. Each backend that can run here, on the banks of the tracks."""

from bench.ops import measure, parameters
from kernels.polar_express import polar_express


@parameters(polar_express)
def test_polar_express(benchmark, backend, case, form, backward):
    measure(benchmark, polar_express, backend, case, form, backward)
