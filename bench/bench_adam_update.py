"""adam_update: `pytest bench/bench_adam_update.py`. Each backend that can run here, on the head and the embeddings of the tracks."""

from bench.ops import op_items
from kernels.adam_update import adam_update

ITEMS = op_items(adam_update)


def test_adam_update(record):
    record()
