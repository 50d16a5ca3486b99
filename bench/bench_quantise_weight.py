"""quantise_weight: `pytest bench/bench_quantise_weight.py`. Both copies of the head, on the shapes of the tracks."""

from bench.ops import op_items
from kernels.quantise_weight import quantise_weight

ITEMS = op_items(quantise_weight)


def test_quantise_weight(record):
    record()
