"""relu2_mlp: `pytest bench/bench_relu2_mlp.py`. Each backend that can run here, on the shapes of the tracks, forward and backward."""

from bench.ops import op_items
from kernels.relu2_mlp import relu2_mlp

ITEMS = op_items(relu2_mlp)


def test_relu2_mlp(record):
    record()
