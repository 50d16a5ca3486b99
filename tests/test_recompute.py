"""--recompute: backward finds a layer's inputs and makes the rest again. The same bits, in the memory predicted."""

import dataclasses
import json
import shutil

import pytest
import torch

import train
from core import checkpoint
from core import plan as plan_module
from core.config import ModelConfig, preset
from core.fp8 import Recipe
from core.models.gpt2 import GPT
from core.plan import activation_bytes, make_plan
from core.stopping import UserError
from tests import test_fp8_training as eight
from tests.test_golden import peak_bytes
from tests.test_model import CFG, awake, loss_and_gradients, tokens
from tests.test_train import final_tensors, losses, run


def both(cfg=CFG):
    kept, recomputed = awake(cfg), GPT(cfg, recompute=True)
    recomputed.load_state_dict(kept.state_dict())
    return kept, recomputed


@pytest.mark.parametrize("changes", [{}, {"x0_lambdas": False, "backout": False, "value_embeds": False}], ids=str)
def test_gradients_are_the_same_bits_and_the_model_one_graph(changes):
    kept, recomputed = both(dataclasses.replace(CFG, **changes))
    want = loss_and_gradients(kept, kept)
    torch._dynamo.reset()
    compiled = torch.compile(recomputed, backend="aot_eager", fullgraph=True)
    for call in (recomputed, compiled):
        got = loss_and_gradients(call, recomputed)
        assert all(torch.equal(got[name], t) for name, t in want.items())


def test_layers_run_twice_where_gradients_are_recorded_and_once_elsewhere():
    _, model = both()
    calls = []
    honest = model.rope_qk_norm
    model.rope_qk_norm = lambda *args, **options: calls.append(0) or honest(*args, **options)
    loss_and_gradients(model, model)
    assert len(calls) == 2 * CFG.depth
    with torch.no_grad():
        model(tokens())
    assert len(calls) == 3 * CFG.depth


@pytest.mark.parametrize("scales", ["delayed", "dynamic"])
def test_scales_of_fp8_are_the_same(monkeypatch, scales):
    """A layer that runs again notes the same largest sizes again."""
    monkeypatch.setattr("core.fp8.LEAST_SIDE", 16)
    found = []
    for recompute in (False, True):
        model = GPT(eight.CFG, recipe=Recipe(scales), recompute=recompute)
        model.init_weights(0)
        eight.awaken(model)
        grads = eight.loss_and_gradients(model, model)
        found.append(grads | {name: t.clone() for name, t in model.in_fp8.state().items()})
    assert len(found[0]) > len(dict(model.named_parameters()))
    assert all(torch.equal(found[1][name], t) for name, t in found[0].items())


def test_memory_is_what_is_predicted():
    """Forward and backward of 12 layers: what recomputing saves at the peak is what the prediction says."""
    cfg = dataclasses.replace(CFG, depth=12, seq_len=128, window_pattern="L")
    idx, found = torch.zeros(8, 128, dtype=torch.int64), {}
    for recompute, model in zip((False, True), both(cfg)):
        predicted = activation_bytes(cfg, 8, torch.float32, "cpu", None, recompute)
        model.zero_grad(set_to_none=True)
        found[recompute] = predicted, peak_bytes(lambda: model.hidden(idx).sum().backward())[0]  # noqa: B023
    (plain, plain_peak), (less, less_peak) = found[False], found[True]
    assert less < 0.35 * plain and plain - less == pytest.approx(plain_peak - less_peak, rel=0.05)


def test_more_rows_fit_a_gpu():
    cfg = dataclasses.replace(preset("gpt2", "cuda"), model=ModelConfig(depth=26))
    plans = [
        make_plan(dataclasses.replace(cfg, recompute=recompute), device_type="cuda", compute_dtype=torch.bfloat16)
        for recompute in (False, True)
    ]
    assert plans[1].device_batch_size > plans[0].device_batch_size
    assert plans[1].total_batch_size == plans[0].total_batch_size


@pytest.mark.parametrize(
    "gigabytes, changes, says",
    [
        (24, {}, None),
        (24, {"device_batch_size": 16}, r"16 rows .* need .* GB by prediction, the GPU has 24.0: try --recompute or "
                                       r"--device-batch-size \d$"),
        (24, {"device_batch_size": 16, "recompute": True}, None),
        (8, {}, "1 rows .* the GPU has 8.0: try --recompute or a shorter --seq-len or a smaller model"),
        (8, {"recompute": True}, "the GPU has 8.0: try a shorter --seq-len or a smaller model"),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused_before_anything_is_built(monkeypatch, gigabytes, changes, says):
    monkeypatch.setattr(plan_module.torch.cuda, "is_available", lambda: True)
    device = type("Properties", (), {"total_memory": gigabytes * 10**9})
    monkeypatch.setattr(plan_module.torch.cuda, "get_device_properties", lambda i: device)
    cfg = dataclasses.replace(preset("gpt2", "cuda"), model=ModelConfig(depth=20), **changes)

    def plan():
        return make_plan(cfg, device_type="cuda", compute_dtype=torch.bfloat16)

    if says is None:
        assert plan().memory_bytes["total"] <= gigabytes * 1e9
        return
    with pytest.raises(UserError, match=says) as refused:
        plan()
    assert "\n" not in str(refused.value)


def test_a_run_may_change_to_it(tiny, tmp_path):
    """Another way to the same bits, from a checkpoint on too."""
    whole = run(tiny, tmp_path / "whole", "--keep-checkpoints", "9")
    changed = tmp_path / "changed"
    shutil.copytree(whole, changed)
    for path in checkpoint.checkpoints(changed)[1:]:
        shutil.rmtree(path)
    train.main(["--resume", str(changed), "--recompute"])
    assert json.loads((changed / "config.json").read_text())["recompute"]
    assert losses(changed) == losses(whole)
    a, b = final_tensors(whole), final_tensors(changed)
    assert a.keys() == b.keys() and all(torch.equal(b[name], t) for name, t in a.items())
