"""rope_qk_norm: `pytest bench/bench_rope_qk_norm.py`. Each backend that can run here, on the shapes of the tracks, forward and backward."""

from bench.ops import op_items
from kernels.rope_qk_norm import rope_qk_norm

ITEMS = op_items(rope_qk_norm)


def test_rope_qk_norm(record):
    record()
