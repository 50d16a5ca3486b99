"""lm_head_loss: `pytest bench/bench_lm_head_loss.py`. Loss alone, and with its gradients, on the shapes of the tracks."""

from bench.ops import op_items
from kernels.lm_head_loss import lm_head_loss

ITEMS = op_items(lm_head_loss)


def test_lm_head_loss(record):
    record()
