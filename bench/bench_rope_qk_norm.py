"""rope_qk_norm: `pytest bench/bench_rope_qk_norm.py`. Each backend that can run here, on the shapes of the tracks, forward and backward."""

from bench.ops import measure, parameters
from kernels.rope_qk_norm import rope_qk_norm


@parameters(rope_qk_norm)
def test_rope_qk_norm(benchmark, backend, case, form, backward):
    measure(benchmark, rope_qk_norm, backend, case, form, backward)
