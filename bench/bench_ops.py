"""Every op on the tracks' shapes, forward and backward: `pytest bench/bench_ops.py -k rms_norm`."""

from bench.ops import op_items
from kernels import dispatch

ITEMS = [item for op in dispatch.ops().values() for item in op_items(op)]


def test_op(record):
    record()
