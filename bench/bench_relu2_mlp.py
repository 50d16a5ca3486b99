"""relu2_mlp: `pytest bench/bench_relu2_mlp.py`. Each backend that can run here, on the shapes of the tracks, forward and backward."""

from bench.ops import measure, parameters
from kernels.relu2_mlp import relu2_mlp


@parameters(relu2_mlp)
def test_relu2_mlp(benchmark, backend, case, form, backward):
    measure(benchmark, relu2_mlp, backend, case, form, backward)
