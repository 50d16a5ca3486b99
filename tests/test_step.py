"""What a training step asks of the device: nothing that waits for it, and as many launches as a formula says.

On a CPU nothing waits, so the trace shows what would: operators that read a number or a size off the device, and calls
that copy a tensor to pageable memory. Copies that operators of PyTorch make within themselves cannot be told here.
"""

import gc
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import train
from core.communication import World
from core.config import ModelConfig, OptimConfig
from core.fp8 import Recipe
from core.models.gpt2 import GPT
from core.optim import Gradients, Optimizer, learning_rates
from core.timing import StepTimes
from kernels.dispatch import Backends
from tests.harness import DEVICE
from tests.test_train import run

NOT_MADE = pytest.mark.skipif(DEVICE == "cuda", reason="launches are counted, not made")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
WAITING_OPS = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}
WAITING_CALLS = ("cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__", "__index__")


@pytest.fixture
def launches(monkeypatch):
    """Kernels by name, as kernels.tile.launch would launch them; none runs."""
    counts = Counter()

    def launch(kernel, grid, first, *args, **options):
        name = kernel.__name__
        counts[f"{kernel.fn.__module__}.{name}" if name == "_gemm_kernel" else name] += 1  # two are called that

    for name, module in list(sys.modules.items()):
        if name.startswith("kernels.") and hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", launch)
    return counts


def trainer_of(dtype, backend, depth=2, micro_steps=3, recipe=None):
    """A model wide enough for the kernels that large ones take, and batches of two rows."""
    cfg = ModelConfig(depth=depth, d_model=256, d_head=128, seq_len=8, vocab_size=300)
    rows, device = 2, torch.device(DEVICE)
    backends = Backends(backend, device=device, dtype=dtype)
    with device:
        model = GPT(cfg, backends, rows, recipe=recipe)
    model.init_weights(0)
    optimizer = Optimizer(
        model, lrs=learning_rates(OptimConfig(), 256, 1), weight_decay=0.1, ns_steps=5, compute_dtype=dtype,
        backends=backends,
    )  # fmt: skip
    tokens = torch.randint(cfg.vocab_size, (micro_steps, rows, cfg.seq_len + 1), device=device)
    batch = tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous()
    return train.Trainer(
        cfg=SimpleNamespace(optim=OptimConfig()),
        plan=SimpleNamespace(grad_accum_steps=micro_steps, steps=10),
        world=World(0, 1, device),
        model=model,
        forward=model,
        optimizer=optimizer,
        gradients=Gradients(model, optimizer),
        loader=SimpleNamespace(next_step=lambda: batch, fault_ahead=lambda steps: None),
        times=StepTimes(device),
    )


@pytest.fixture
def calls(monkeypatch):
    """Names of the methods of tensors that Python calls: those that wait, and `to` where it names the CPU."""
    names = set()

    def watch(name):
        honest = getattr(torch.Tensor, name)

        def method(*args, **kwargs):
            given = [str(a) for a in (*args[1:], *kwargs.values()) if isinstance(a, (str, torch.device))]
            if name != "to" or any(a.startswith("cpu") for a in given):
                names.add(name)
            return honest(*args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, method)

    for name in (*WAITING_CALLS, "to"):
        watch(name)
    return names


def waits(trainer, calls):
    """What of a step would wait for a GPU."""
    calls.clear()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        outcome = train.train_step(trainer, 1, SimpleNamespace(wanted=False))
        found = set(calls)
    names = {event.name for event in trace.events()}
    assert {"aten::mm", "aten::copy_", "aten::add_"} <= names  # the trace is not empty
    delayed = trainer.model.in_fp8 is not None and trainer.model.in_fp8.recipe.scales == "delayed"
    assert outcome.shape == ((3,) if delayed else (2,))
    return (WAITING_OPS & names) | found


RECIPES = pytest.mark.parametrize("recipe", [None, Recipe(), Recipe("dynamic")], ids=["bf16", "delayed", "dynamic"])


@NOT_MADE
@RECIPES
@DTYPES
@pytest.mark.parametrize("backend", ["ref", "triton"])
def test_nothing_in_a_step_waits_for_the_device(backend, dtype, recipe, launches, calls):
    trainer = trainer_of(dtype, backend, recipe=recipe)
    assert waits(trainer, calls) == set()
    assert (sum(launches.values()) > 0) == (backend == "triton")


@pytest.mark.skipif(DEVICE != "cuda", reason="asks the driver")
@RECIPES
def test_nothing_in_a_step_waits_for_the_gpu(recipe):
    """PyTorch raises where it would; a first step has compiled the kernels."""
    trainer = trainer_of(torch.bfloat16, "auto", recipe=recipe)
    flag = SimpleNamespace(wanted=False)
    train.train_step(trainer, 0, flag)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train.train_step(trainer, 1, flag)
    finally:
        torch.cuda.set_sync_debug_mode("default")


PLANTED = {
    "item": lambda t: t.item(),
    "__bool__": lambda t: bool(t > 0),
    "__float__": lambda t: float(t),
    "__int__": lambda t: int(t),
    "__index__": lambda t: range(t.long()),
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "to": lambda t: t.to(device=torch.device("cpu"), dtype=torch.float64),
    "numpy": lambda t: t.numpy(),
    "aten::nonzero": lambda t: t.view(1)[t.view(1) > 0],
    "aten::equal": lambda t: torch.equal(t, t),
    "aten::is_nonzero": lambda t: torch.ops.aten.is_nonzero(t),
    "aten::item": lambda t: torch.full((2,), t),
    "aten::_local_scalar_dense": lambda t: torch.ops.aten._local_scalar_dense(t),
}


@NOT_MADE
@pytest.mark.parametrize("where", ["forward", "backward", "update"])
def test_what_waits_is_seen(where, monkeypatch, launches, calls):
    """Planted into each part of a step, on a number of its own: losses and gradients are what memory held before, as no
    kernel runs."""
    one = torch.ones(())
    assert PLANTED.keys() == WAITING_OPS | {*WAITING_CALLS, "to"}
    trainer = trainer_of(torch.float32, "triton", depth=1, micro_steps=1)
    now = None  # what is planted
    if where == "forward":
        honest = trainer.forward
        trainer.forward = lambda *batch: (honest(*batch), now(one))[0]
    elif where == "backward":
        p = trainer.model.resid_lambdas
        p.register_post_accumulate_grad_hook(lambda p: (now(one), None)[1])
    else:
        honest = trainer.optimizer._set_hyper
        monkeypatch.setattr(trainer.optimizer, "_set_hyper", lambda values: (honest(values), now(one)))
    for found, now in PLANTED.items():  # noqa: B007
        assert found in waits(trainer, calls)


def expected_launches(layers, micro_steps, dtype):
    """By kernel, of a step with every op on Triton. The update's do not depend on layers or micro-steps."""
    with_values = layers // 2
    # weight gradients of qkv and out; in bf16 also of the MLP and the head, which on a GPU are cuBLAS's
    gemms = 2 * layers + (2 * layers + 1 if dtype == torch.bfloat16 else 0)
    micro_step = {
        "_rms_norm_fwd_kernel": 2 * layers + 2,  # two a layer, the embedding's and the last
        "_rms_norm_bwd_kernel": 2 * layers + 2,
        "_rope_qk_norm_fwd_kernel": layers,
        "_rope_qk_norm_bwd_kernel": layers,
        "_attention_fwd_kernel": layers,
        "_attention_dq_kernel": layers,
        "_attention_dkv_kernel": layers,
        "kernels.gemm._gemm_kernel": gemms,
        "_relu2_gemm_kernel": 2 * layers,  # forward and backward
        "_runs_kernel": 1 + with_values,  # a table's part each: tokens, values of a layer
        "_carry_kernel": 1 + with_values,
        "_row_kernel": 1,  # of a chunk, and this batch is one
    }
    # three shapes: squares of attention; the MLP's, half of them transposed; gates, which fit a program
    update = {
        "_muon_momentum_kernel": 1 + 2 + 1,
        "_muon_scale_kernel": 1 + 2,
        "_muon_columns_kernel": 1,
        "kernels.polar_express._gemm_kernel": 2 * 5 * 3,
        "_small_kernel": 1,
        "_muon_squares_kernel": 2,
        "_muon_factor_kernel": 2,
        "_muon_apply_kernel": 3,
        "_adam_update_kernel": 4,  # tokens, values, head, small ones
    }
    return Counter({name: micro_steps * n for name, n in micro_step.items()}) + Counter(update)


@NOT_MADE
@DTYPES
@pytest.mark.parametrize("layers, micro_steps", [(2, 1), (2, 3), (4, 2)])
def test_launches_of_a_step(layers, micro_steps, dtype, launches):
    trainer = trainer_of(dtype, "triton", layers, micro_steps)
    expected = expected_launches(layers, micro_steps, dtype)
    for step in range(3):
        launches.clear()
        train.train_step(trainer, step, SimpleNamespace(wanted=False))
        assert launches == expected, step
    a_micro_step = 16 * layers + 8 if dtype == torch.bfloat16 else 14 * layers + 7
    assert launches.total() == micro_steps * a_micro_step + 50


@NOT_MADE
@pytest.mark.parametrize("layers, micro_steps", [(2, 1), (2, 3), (4, 2)])
def test_launches_of_a_step_in_fp8(layers, micro_steps, launches):
    """With delayed scales: four passes a layer quantise, of the gradient of q, k and v, attention's output and its
    gradient, and the gradient of the MLP's output; once a step one for each bank of weights. Norms and the MLP's
    epilogues do the rest."""
    trainer = trainer_of(torch.bfloat16, "triton", layers, micro_steps, Recipe())
    micro_step = {
        "_transpose_kernel": 4 * layers,
        "kernels.gemm._gemm_kernel": 2 * 3 * layers + 4 * layers + 1,  # projections, the MLP, the head
        "_fp8_relu2_kernel": 2 * layers,
    }
    expected = expected_launches(layers, micro_steps, torch.bfloat16)
    del expected["_relu2_gemm_kernel"]
    expected |= {name: micro_steps * n for name, n in micro_step.items()}
    expected["_transpose_kernel"] += 4
    for step in range(3):
        launches.clear()
        train.train_step(trainer, step, SimpleNamespace(wanted=False))
        assert launches == expected, step


def test_the_collector_passes_over_what_was_there_before_the_loop(tiny, tmp_path, monkeypatch):
    counts, honest = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *args: (counts.append(gc.get_freeze_count()), honest(*args))[1])
    run(tiny, tmp_path / "run", "--steps", "2")
    assert len(counts) == 2 and min(counts) > 100_000 and gc.get_freeze_count() == 0
