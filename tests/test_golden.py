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
from core.plan import activation_bytes, predict_memory
from kernels import adam_update, muon_update, polar_express
from kernels.dispatch import Backends
from tests.harness import DEVICE

CFG = ModelConfig(depth=4, d_model=64, d_head=16, n_kv_head=2, seq_len=160, vocab_size=257, window_pattern="SL")
LAWS = OptimConfig(scaling_laws=False, warmup_steps=2, momentum_warmup_steps=5)
GOLDEN = [5.548676, 5.546932, 5.551415, 5.553165, 5.567512, 5.449355, 5.206047, 5.111176, 5.131982, 5.187076]


def ten_losses():
    model = GPT(CFG)
    model.init_weights(0)
    optimizer = Optimizer(
        model, lrs=learning_rates(LAWS, 64, 1), weight_decay=0.1, ns_steps=5, compute_dtype=torch.float32
    )
    grads = Gradients(model, optimizer)
    # a fixed text: sums of earlier tokens, so that there is something to learn
    tokens = [1, 2]
    for i in range(10 * 4 * 161):
        tokens.append((tokens[-1] + tokens[-2] + i % 7) % 257)
    rows = torch.tensor(tokens[: 10 * 4 * 161]).view(10, 4, 161)
    losses = []
    for step, row in enumerate(rows):
        loss = model(row[:, :-1], row[:, 1:])
        loss.backward()
        optimizer.step(grads.sums, step=step, **schedule.at(step, 10, LAWS))
        grads.zero()
        losses.append(loss.item())
    return losses


def test_golden_losses():
    assert ten_losses() == pytest.approx(GOLDEN, rel=1e-4)


def test_two_runs_are_bitwise_equal():
    assert ten_losses() == ten_losses()


def saved_bytes(model, rows, dtype):
    """What autograd keeps of the forward of so many rows, parameters and buffers left out."""
    for row in model.table:
        p = model.get_parameter(row.name)
        p.data = p.data.to(row.dtype(dtype))
    saved = {}

    def keep(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    idx = torch.zeros(rows, model.dims.seq_len, dtype=torch.int64, device=model.wte.device)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        hidden = model.hidden(idx)
    assert hidden.requires_grad
    return sum(size for pointer, size in saved.items() if pointer not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [{}, {"value_embeds": False, "rope": False}, {"depth": 8, "d_model": 128}])
@pytest.mark.parametrize("rows", [1, 8])
def test_predicted_activations_are_what_autograd_keeps(changes, rows, dtype):
    """On real tensors, masks included."""
    cfg = dataclasses.replace(CFG, **changes)
    model = GPT(cfg)
    model.init_weights(0)
    assert activation_bytes(cfg, rows, dtype, "cpu") == pytest.approx(saved_bytes(model, rows, dtype), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_predicted_activations_on_a_gpu_are_what_the_triton_kernels_keep(dtype):
    """Counted without running a kernel; here they run (interpreted, on a CPU)."""
    cfg = dataclasses.replace(CFG, depth=2, d_model=32, n_kv_head=1, seq_len=12, window_pattern="L")
    with torch.device(DEVICE):
        model = GPT(cfg, Backends("triton", device=torch.device(DEVICE), dtype=dtype), 2)
    model.init_weights(0)
    assert activation_bytes(cfg, 2, dtype, "cuda") == pytest.approx(saved_bytes(model, 2, dtype), rel=1e-4)
    assert activation_bytes(cfg, 2, dtype, "cuda") < activation_bytes(cfg, 2, dtype, "cpu")


def peak_bytes(work):
    """What PyTorch allocates on this device at most beyond what was there, and what is left at the end."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, now


@pytest.mark.skipif(DEVICE == "cuda", reason="the profile is of the CPU's allocator")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_predicted_memory_of_the_update_is_what_the_triton_kernels_need(dtype, monkeypatch):
    """Beyond weights, sums and state: what Polar Express starts from, and its work on the MLPs' matrices. Nothing is
    launched: memory is PyTorch's."""
    for module in (muon_update, adam_update, polar_express):
        monkeypatch.setattr(module, "launch", lambda *args, **options: None)
    monkeypatch.setattr(polar_express, "launch_persistent", lambda *args, **options: None)
    cfg = dataclasses.replace(CFG, depth=2, d_model=96, d_head=48, n_kv_head=1, seq_len=8)
    backends = Backends("triton", device=torch.device(DEVICE), dtype=dtype)
    model = GPT(cfg, backends, 2)
    model.init_weights(0)
    optimizer = Optimizer(
        model, lrs=learning_rates(LAWS, 96, 1), weight_decay=0.1, ns_steps=5, compute_dtype=dtype, backends=backends
    )
    grads = Gradients(model, optimizer)
    for total in grads.sums:
        total.normal_()
    peak, left = peak_bytes(lambda: optimizer.step(grads.sums, step=0, **schedule.at(0, 10, LAWS)))
    predicted = predict_memory(cfg, 2, dtype, "cuda", graph_optimizer=True)["update"]
    # blocks of 64 bytes and more, hyperparameters, and sums of rows come on top
    assert predicted <= peak <= 1.05 * predicted and left < 0.01 * predicted


if __name__ == "__main__":
    print(ten_losses())
