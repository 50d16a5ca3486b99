"""Every op on the tracks' shapes, forward and backward: `pytest bench/bench_ops.py -k rms_norm`."""

from bench.ops import op_items
from kernels.ops import BY_NAME

ITEMS = [item for op in BY_NAME.values() for item in op_items(op)]


def test_op(record):
    record()
