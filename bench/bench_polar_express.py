"""polar_express: `pytest bench/bench_polar_express.py`. Each backend that can run here, on the banks of the tracks."""

from bench.ops import op_items
from kernels.polar_express import polar_express

ITEMS = op_items(polar_express)


def test_polar_express(record):
    record()
