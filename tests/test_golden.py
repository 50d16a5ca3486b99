"""Ten steps of a small model on fixed tokens give the losses that were committed, and predicted memory is about right.

A change of numerics shows here first. After an intended one: `python -m tests.test_golden` prints the new losses.
"""

import dataclasses

import pytest
import torch

from core import schedule
from core.config import ModelConfig, OptimConfig
from core.models.gpt2 import GPT
from core.optim import Gradients, Optimizer, learning_rates
from core.plan import activation_bytes

CFG = ModelConfig(depth=4, d_model=64, d_head=16, n_kv_head=2, seq_len=160, vocab_size=257, window_pattern="SL")
LAWS = OptimConfig(scaling_laws=False, warmup_steps=2, momentum_warmup_steps=5)
GOLDEN = [5.548676, 5.546932, 5.551415, 5.553165, 5.567512, 5.449355, 5.206047, 5.111176, 5.131982, 5.187076]


def ten_losses():
    model = GPT(CFG)
    model.init_weights(0)
    optimizer = Optimizer(
        model, lrs=learning_rates(LAWS, 64, 1), weight_decay=0.1, ns_steps=5, compute_dtype=torch.float32
    )
    grads = Gradients(list(model.parameters()))
    # a fixed text: sums of earlier tokens, so that there is something to learn
    tokens = [1, 2]
    for i in range(10 * 4 * 161):
        tokens.append((tokens[-1] + tokens[-2] + i % 7) % 257)
    rows = torch.tensor(tokens[: 10 * 4 * 161]).view(10, 4, 161)
    losses = []
    for step, row in enumerate(rows):
        loss = model(row[:, :-1], row[:, 1:])
        loss.backward()
        optimizer.step(grads, step=step, **schedule.at(step, 10, LAWS))
        grads.zero()
        losses.append(loss.item())
    return losses


def test_golden_losses():
    assert ten_losses() == pytest.approx(GOLDEN, rel=1e-4)


def test_two_runs_are_bitwise_equal():
    assert ten_losses() == ten_losses()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [{}, {"value_embeds": False, "rope": False}, {"depth": 8, "d_model": 128}])
@pytest.mark.parametrize("rows", [1, 8])
def test_predicted_activations_are_what_autograd_keeps(changes, rows, dtype):
    """On real tensors, masks included."""
    cfg = dataclasses.replace(CFG, **changes)
    model = GPT(cfg)
    model.init_weights(0)
    for row in model.table:
        p = model.get_parameter(row.name)
        p.data = p.data.to(row.dtype(dtype))
    saved = {}

    def keep(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    idx = torch.zeros(rows, cfg.seq_len, dtype=torch.int64)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        hidden = model.hidden(idx)
    measured = sum(size for pointer, size in saved.items() if pointer not in own)
    assert hidden.requires_grad
    assert activation_bytes(cfg, rows, dtype, "cpu") == pytest.approx(measured, rel=1e-4)


if __name__ == "__main__":
    print(ten_losses())
