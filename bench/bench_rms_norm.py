"""rms_norm: `pytest bench/bench_rms_norm.py`. Each backend that can run here, on the shapes of the tracks, forward and backward."""

from bench.ops import op_items
from kernels.rms_norm import rms_norm

ITEMS = op_items(rms_norm)


def test_rms_norm(record):
    record()
