"""The parameter table: the model's storage, the optimizer's state and the predicted bytes are what its rows say."""

import dataclasses

import pytest
import torch

from core import params
from core.config import ModelConfig
from core.models.gpt2 import COUNTED, GPT, parameter_table
from core.optim import ADAM_GROUPS, Gradients, Optimizer, learning_rates
from core.params import MUON, MuonView
from core.plan import predict_memory
from tests.test_golden import LAWS

CFG = ModelConfig(depth=6, d_model=64, d_head=16, n_kv_head=2, seq_len=32, vocab_size=100)
CONFIGS = [CFG, dataclasses.replace(CFG, untied_head=False), dataclasses.replace(CFG, value_embeds=False, smear=False)]


def build(cfg, dtype=torch.float32):
    model = GPT(cfg)
    model.init_weights(0)
    return model, Optimizer(model, lrs=learning_rates(LAWS, 64, 1), weight_decay=0.1, ns_steps=5, compute_dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cfg", CONFIGS)
def test_storage_and_state_are_those_of_the_rows(cfg, dtype):
    model, optimizer = build(cfg, dtype)
    rows = {row.name: row for row in model.table}
    stored = dict(model.named_parameters())
    assert rows.keys() == stored.keys() and len(rows) == len(model.table)
    for name, p in stored.items():
        assert p.shape == rows[name].shape and p.dtype == rows[name].dtype(dtype), name
    want = {f"{row.name}.{state}": spec for row in model.table for state, spec in row.states(dtype).items()}
    assert {n: (tuple(t.shape), t.dtype) for n, t in optimizer.state.items()} == want
    memory = predict_memory(cfg, 1, dtype, "cpu")
    assert memory["weights"] == sum(p.nbytes for p in stored.values())
    assert memory["optimizer"] == sum(t.nbytes for t in optimizer.state.values())
    assert memory["gradients"] == sum(4 * p.numel() for p in stored.values())


def test_types_in_bf16():
    """Matrices and head have exact masters, embeddings neither masters nor wide moments, scalars are fp32."""
    model, optimizer = build(CFG, torch.bfloat16)
    state = optimizer.state
    assert model.wte.dtype == model.attn_qkv[0].dtype == torch.bfloat16 and model.smear_gate.dtype == torch.float32
    assert state["lm_head.low"].dtype == state["attn_qkv.1.low"].dtype == torch.int16
    assert state["lm_head.exp_avg"].dtype == state["mlp_up.0.momentum"].dtype == torch.float32
    assert state["wte.exp_avg"].dtype == state["value_embeds.exp_avg_sq"].dtype == torch.bfloat16
    assert not {"wte.low", "value_embeds.low", "x0_lambdas.low"} & state.keys()
    assert state["x0_lambdas.exp_avg"].dtype == torch.float32


def test_a_tied_head_is_updated_as_a_head():
    model, optimizer = build(CONFIGS[1], torch.bfloat16)
    assert [row.name for row in model.table if row.group == "lm_head"] == ["wte"]
    assert "wte.low" in optimizer.state
    assert model.lm_head is model.wte


def test_banks_differ_and_hold_four_layers():
    model, _ = build(CFG)
    assert [len(bank) for bank in model.attn_qkv] == [4, 2] and [len(bank) for bank in model.ve_gate] == [3]
    assert not torch.equal(model.attn_qkv[0][0], model.attn_qkv[1][0])
    assert not torch.equal(model.attn_qkv[0][0], model.attn_qkv[0][1])


def test_every_row_has_a_rule_a_rate_and_a_count():
    rates = learning_rates(LAWS, 64, 1)
    for row in parameter_table(CFG):
        assert row.group in (MUON, *ADAM_GROUPS) and row.group in rates and row.counts_as in COUNTED
        assert (row.group == MUON) == bool(row.views)


def test_views_give_out_the_banks_own_storage():
    bank = torch.arange(2 * 6 * 3.0).view(2, 6, 3)
    for view in (MuonView(), MuonView(rows=(2, 5)), MuonView(split=2), MuonView(transposed=True)):
        taken = view.take(bank)
        assert taken.untyped_storage().data_ptr() == bank.untyped_storage().data_ptr()
        assert view.stored(bank.shape) == tuple(taken.shape)
    assert MuonView(split=2).take(bank)[1].tolist() == bank[0, 3:].tolist()
    assert MuonView().second_shape((2, 6, 3)) == (2, 6, 1) and MuonView(transposed=True).second_shape((2, 6, 3)) == (
        2,
        1,
        6,
    )


@pytest.mark.parametrize("cfg", [*CONFIGS, dataclasses.replace(CFG, n_kv_head=None)])
def test_arenas_hold_every_parameter_once(cfg):
    """Weights, states and gradients lie side by side, whole banks one after the other; Muon's part of an arena is that
    of its banks."""
    model, optimizer = build(cfg, torch.bfloat16)
    names = [p.name for arena in optimizer.arenas for p in arena.params]
    assert sorted(names) == sorted(row.name for row in model.table) and len(optimizer.arenas) <= 9
    gradients = Gradients(model, optimizer)
    for arena, total in zip(optimizer.arenas, gradients.sums):
        n = torch.Size(arena.shape).numel()
        assert n == sum(p.numel for p in arena.params) == total.numel()
        end = optimizer.params[arena.params[0].name].data_ptr()
        for p in arena.params:
            stored = optimizer.params[p.name]
            assert stored.data_ptr() == end and stored.is_contiguous()
            end += stored.nbytes
            # a number at each parameter's place in the arena's gradient is found in the parameter's own
            place = torch.zeros(arena.shape)
            arena.cut(place)[p.name].fill_(1.0)
            total.copy_(place)
            assert all(gradients(optimizer.params[q.name]).all() == (q is p) for q in arena.params)
        if arena.views:
            assert len({p.group for p in arena.params}) == 1
            runs = [(run.stop - run.start, turn.transposed) for run, turn in arena.turned()]
            counts = {t: 0 for t in (False, True)}
            for p in arena.params:
                counts[p.views[0].transposed] += p.shape[0] * p.views[0].split
            assert runs == [(k, t) for t, k in counts.items() if k]


def test_matrices_of_one_shape_share_an_arena():
    """q, k, v and o; both matrices of the MLP, one of which is stored transposed; all small parameters."""
    square = dataclasses.replace(CFG, n_kv_head=None)
    kinds = [{p.name.split(".")[0] for p in arena.params} for arena in params.arenas(parameter_table(square))]
    assert {"attn_qkv", "attn_out"} in kinds and {"mlp_up", "mlp_down"} in kinds
    assert {"resid_lambdas", "x0_lambdas", "smear_gate", "smear_lambda", "backout_lambda"} in kinds
    shapes = [arena.shape for arena in params.arenas(parameter_table(square))]
    assert (24, 64, 64) in shapes and (12, 256, 64) in shapes and (3, 4, 12) in shapes
    grouped = [{p.name.split(".")[0] for p in arena.params} for arena in params.arenas(parameter_table(CFG))]
    assert {"attn_qkv"} in grouped and {"attn_out"} in grouped  # k and v are narrower


def test_transposed_square_matrices_lie_apart():
    """Their second moments are those of columns."""
    rows = [
        params.Param(name, (2, 8, 8), params.constant(0.0), MUON, "x", True, True, True, (view,))
        for name, view in (("a", MuonView()), ("b", MuonView(transposed=True)))
    ]
    assert [arena.shape for arena in params.arenas(rows)] == [(2, 8, 8), (2, 8, 8)]
    assert rows[1].views[0].second_stored((2, 8, 8)) == (2, 1, 8)
    assert MuonView(transposed=True).second_stored((2, 8, 3)) == MuonView().second_stored((2, 8, 3)) == (2, 8, 1)
    assert MuonView().lr_scale((2, 12, 3)) == 2.0 and MuonView(transposed=True).lr_scale((2, 12, 3)) == 1.0


def test_initialisation_of_a_row_does_not_depend_on_the_others():
    rows = [params.Param(name, (8,), params.normal(1.0), "gates", "scalars") for name in ("a", "b")]
    values = []
    for table in (rows, rows[1:]):
        module = torch.nn.Module()
        params.register(module, table)
        params.init_weights(module, table, seed=3)
        values.append(module.b.detach().clone())
    assert torch.equal(*values)
    params.init_weights(module, rows[1:], seed=4)
    assert not torch.equal(module.b, values[1])


def test_whoever_writes_a_weight_refreshes_its_copies(monkeypatch):
    calls = []
    monkeypatch.setattr(GPT, "refresh_copies", lambda self: calls.append(self.lm_head.dtype))
    model = GPT(CFG, fp8_head=True)
    model.init_weights(0)
    assert calls == [torch.float32]
    optimizer = Optimizer(
        model, lrs=learning_rates(LAWS, 64, 1), weight_decay=0.1, ns_steps=5, compute_dtype=torch.bfloat16
    )
    assert calls[1:] == [torch.bfloat16]  # after the cast: a copy of the fp32 weight would round differently
    optimizer.step(
        [torch.zeros(arena.shape) for arena in optimizer.arenas], step=0, lr_mult=1.0, momentum=0.9, decay_mult=1.0
    )
    assert len(calls) == 3
