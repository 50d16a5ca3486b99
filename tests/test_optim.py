"""The optimizer against float64 transcriptions of the published update rules, and the exactness of bf16 masters."""

import dataclasses
import math
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.config import ModelConfig, preset
from core.models.gpt2 import GPT
from core.optim import (
    ADAM_GROUPS,
    Gradients,
    Muon,
    MuonPart,
    Optimizer,
)
from core.params import MuonView
from kernels import adam_update, extension, gemm, muon_update, polar_express
from kernels.adam_update import ADAM_EPS, adam_hyper, adam_update_ref
from kernels.dispatch import Backends
from kernels.master import join_master, split_master
from kernels.muon_update import BETA2
from kernels.polar_express import COEFFICIENTS, SAFETY
from tests.harness import CUDA, DEVICE, NO_CUDA


def test_constants_are_the_published_ones():
    """nanochat 92d63d4: betas and decay by group, eps, safety; the polynomials have a test of their own."""
    assert not any(group.cautious for group in ADAM_GROUPS.values())
    assert {name: group[:2] for name, group in ADAM_GROUPS.items()} == {
        "lm_head": ((0.8, 0.96), 0.01),
        "wte": ((0.8, 0.995), 0.001),
        "value_embeds": ((0.8, 0.995), 0.01),
        "resid_lambdas": ((0.8, 0.95), 0.05),
        "x0_lambdas": ((0.96, 0.95), 0.0),
        "gates": ((0.8, 0.95), 0.0),
    }
    assert (ADAM_EPS, BETA2, SAFETY, len(COEFFICIENTS)) == (1e-10, 0.9, 1.01, 5)


def rel_rms(a, b):
    return ((a - b).pow(2).mean().sqrt() / b.pow(2).mean().sqrt()).item()


def muon_oracle(p, g, buf, second, *, lr, wd, mu, beta2=0.9):
    """One matrix in float64, from facts of the published rule; returns (p, buf, second)."""
    rows, cols = p.shape
    buf = mu * buf + (1 - mu) * g
    x = (1 - mu) * g + mu * buf
    target = x.norm() / math.sqrt(rows)
    x = torch.stack([row * target / max(row.norm().item(), 1e-6) for row in x])
    x = x / (1.01 * x.norm() + 1e-6)
    for a, b, c in COEFFICIENTS:
        if rows > cols:
            A = x.T @ x
            x = a * x + x @ (b * A + c * A @ A)
        else:
            A = x @ x.T
            x = a * x + (b * A + c * A @ A) @ x
    x = x * math.sqrt(min(rows, cols)) / max(x.norm().item(), 1e-6)
    dim, n = (1, cols) if rows >= cols else (0, rows)
    v = (x**2).mean(dim=dim, keepdim=True)
    old = (n * v.sum()).sqrt()
    second = beta2 * second + (1 - beta2) * v
    s = second.clamp(min=1e-10) ** -0.5
    new = (n * v * s**2).sum().sqrt()
    x = x * s * old / max(new.item(), 1e-10)
    lr = lr * math.sqrt(max(1.0, rows / cols))
    mask = (x * p >= 0).double()
    return p - lr * x - lr * wd * p * mask, buf, second


def muon_step(p, g, buf, second, backend="ref", *, lr, wd, mu, transposed=False, dtype=torch.float32):
    """second is as stored."""
    backends = Backends(backend, device=p.device, dtype=torch.float32)
    hyper = torch.tensor([lr, wd, mu], device=p.device)
    turn = MuonView(transposed=transposed)
    factor = torch.full((p.size(0),), turn.lr_scale(p.shape), device=p.device)
    part = MuonPart(0, MuonView(), [(slice(0, p.size(0)), turn)], p, None, buf, second, factor)
    Muon(backends, [part], compute_dtype=dtype, ns_steps=5).step([g], hyper)


def by_arena(optimizer, grads):
    """Gradients by name as the optimizer takes them."""
    made = []
    for arena in optimizer.arenas:
        made.append(torch.full(arena.shape, torch.nan, dtype=grads[arena.params[0].name].dtype))
        for name, part in arena.cut(made[-1]).items():
            part.copy_(grads[name])
    return made


@pytest.mark.parametrize("backend", ["ref", "triton", CUDA])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24)])
def test_muon_matches_the_rule(shape, transposed, backend):
    """shape is Muon's; transposed matrices are stored the other way."""

    def stored(t):
        return (t.mT.contiguous() if transposed else t).to(DEVICE)

    g = torch.Generator().manual_seed(0)
    start = torch.randn(3, *shape, generator=g)
    rows, cols = shape
    p, buf = stored(start), torch.zeros_like(stored(start))
    second = torch.zeros(3, rows, 1) if rows >= cols else torch.zeros(3, 1, cols)
    want = [(start[i].double(), torch.zeros(shape).double(), second[i].double()) for i in range(3)]
    second = stored(second)
    for _ in range(4):
        grad = torch.randn(3, *shape, generator=g)
        muon_step(p, stored(grad), buf, second, backend, lr=0.05, wd=0.3, mu=0.9, transposed=transposed)
        want = [muon_oracle(*want[i][:1], grad[i].double(), *want[i][1:], lr=0.05, wd=0.3, mu=0.9) for i in range(3)]
    for i in range(3):
        got = [t[i].mT if transposed else t[i] for t in (p, buf, second)]
        for ours, expected in zip(got, want[i]):
            assert rel_rms(ours.double().cpu(), expected) < 1e-5


def test_muon_leaves_weights_alone_without_gradient():
    p = torch.randn(1, 8, 8)
    before = p.clone()
    muon_step(p, torch.zeros_like(p), torch.zeros_like(p), torch.zeros(1, 8, 1), lr=0.1, wd=0.0, mu=0.9)
    assert torch.equal(p, before)


def adamw_step(p, g, m, v, *, lr, betas, weight_decay, t):
    adam_update_ref(p, g, m, v, torch.tensor(adam_hyper(lr, betas, weight_decay, t)))


def test_adamw_matches_torch():
    p = torch.randn(50, dtype=torch.float64).float()
    ours, ref = p.clone(), torch.nn.Parameter(p.double())
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    torch_adam = torch.optim.AdamW([ref], lr=0.02, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    for t in range(1, 6):
        g = torch.randn(50)
        adamw_step(ours, g, m, v, lr=0.02, betas=(0.8, 0.95), weight_decay=0.1, t=t)
        ref.grad = g.double()
        torch_adam.step()
    assert rel_rms(ours.double(), ref.detach()) < 1e-6


def test_adamw_in_bf16_rounds_once():
    p = torch.randn(64).bfloat16()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    p32, m32, v32 = p.float(), m.float(), v.float()
    g = torch.randn(64)
    adamw_step(p, g, m, v, lr=0.1, betas=(0.8, 0.9), weight_decay=0.1, t=1)
    adamw_step(p32, g, m32, v32, lr=0.1, betas=(0.8, 0.9), weight_decay=0.1, t=1)
    assert torch.equal(p, p32.bfloat16()) and torch.equal(m, m32.bfloat16()) and torch.equal(v, v32.bfloat16())


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_master_round_trip_is_exact_on_all_bit_patterns(bits):
    master = torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32).copy())
    high, low = split_master(master)
    assert torch.equal(join_master(high, low).view(torch.int32), master.view(torch.int32))


def test_bf16_half_of_a_master_is_nearest():
    exponents = torch.arange(-90, 111, dtype=torch.float32)  # results stay normal numbers
    master = torch.randn(201, 64) * 2 ** exponents[:, None]
    high, low = split_master(master)
    tie = low == -(2**15)
    assert torch.equal(high[~tie], master.bfloat16()[~tie])
    ulp = (master - high.float()).abs() / master.abs()
    assert ulp.max() <= 2**-8
    tie = torch.tensor([1.0 + 2**-8, -(1.0 + 2**-8)])
    assert split_master(tie)[0].tolist() == [1.0 + 2**-7, -(1.0 + 2**-7)]


ONE_LAYER = ModelConfig(depth=1, d_model=32, d_head=8, seq_len=16, vocab_size=64)
TINY = ModelConfig(depth=6, d_model=32, d_head=8, seq_len=16, vocab_size=64, n_kv_head=2)


def test_muon_sees_separate_matrices_and_factors():
    model = GPT(TINY)
    model.init_weights(0)
    views = {
        row.name: [
            (tuple(v.take(p).shape), v.transposed, v.second_shape(v.stored(row.shape)))
            for p in (model.get_parameter(row.name),)
            for v in row.views
        ]
        for row in model.table
        if row.group == "matrices"
    }
    for row in model.table:  # the arithmetic on shapes is that on tensors
        assert all(v.stored(row.shape) == tuple(v.take(model.get_parameter(row.name)).shape) for v in row.views)
    kv = ((4, 16, 32), False, (4, 1, 32))
    assert views["attn_qkv.0"] == [((4, 32, 32), False, (4, 32, 1)), kv, kv]
    assert [shape for shape, *_ in views["attn_qkv.1"]] == [(2, 32, 32), (2, 16, 32), (2, 16, 32)]
    assert views["mlp_up.0"] == [((4, 128, 32), False, (4, 128, 1))]
    assert views["mlp_down.0"] == [((4, 128, 32), True, (4, 1, 128))]
    assert views["ve_gate.0"] == [((3, 2, 12), False, (3, 1, 12))]
    taken = [v.take(model.attn_qkv[0]) for v in model.table[0].views]
    assert torch.equal(torch.cat(taken, dim=1), model.attn_qkv[0]) and taken[1].data_ptr() != taken[2].data_ptr()
    square = GPT(dataclasses.replace(TINY, n_kv_head=None))
    square.init_weights(0)
    (qkv,) = (v.take(square.attn_qkv[0]) for v in square.table[0].views)
    assert qkv.shape == (12, 32, 32)
    assert torch.equal(qkv[1], square.attn_qkv[0][0, 32:64])  # the first layer's k


LRS = {
    "lm_head": 0.01,
    "wte": 0.1,
    "value_embeds": 0.1,
    "resid_lambdas": 0.01,
    "x0_lambdas": 0.1,
    "gates": 0.1,
    "matrices": 0.05,
}


def make(dtype, cfg=TINY, backend="ref", ns_steps=5):
    model = GPT(cfg)
    model.init_weights(0)
    model = model.double() if dtype == torch.float64 else model
    backends = Backends(backend, device=torch.device("cpu"), dtype=dtype)
    return model, Optimizer(model, lrs=LRS, weight_decay=0.1, ns_steps=ns_steps, compute_dtype=dtype, backends=backends)


def weights_after(steps, dtype, backend):
    """Masters after steps on random gradients, the same for every dtype and backend."""
    model, optimizer = make(dtype, ONE_LAYER, backend, ns_steps=2)  # few products: the interpreter is slow
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        grads = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
        grads = {n: g.double() if dtype == torch.float64 else g for n, g in grads.items()}
        optimizer.step(by_arena(optimizer, grads), step=step, lr_mult=1.0, momentum=0.9, decay_mult=1.0)
    lows = {n: optimizer.state.get(f"{n}.low") for n, _ in model.named_parameters()}
    return {
        n: (p.data if lows[n] is None else join_master(p.data, lows[n])).double() for n, p in model.named_parameters()
    }


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels are compared on the CPU, in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_twenty_steps_with_kernels_are_those_of_the_reference(dtype, backend):
    exact = weights_after(20, torch.float64, "ref")
    ref, ours = (weights_after(20, dtype, each) for each in ("ref", backend))
    start, _ = make(torch.float32, ONE_LAYER)
    begin = {n: p.data.double() for n, p in start.named_parameters()}
    for name, want in exact.items():
        moved = (want - begin[name]).norm()
        errors = [((got[name] - want).norm() / moved).item() for got in (ref, ours)]
        few = want.numel() < 16  # a draw rather than a mean
        assert errors[1] <= (5 if few else 2) * errors[0] + 1e-6, (name, errors)


@pytest.mark.parametrize("backend", ["ref", "triton", CUDA])
def test_the_optimizer_is_the_rules_parameter_by_parameter(backend):
    """Three steps with changing hyperparameters, grouped key/value heads, against the rules in float64 applied by
    hand."""
    cfg = dataclasses.replace(TINY, depth=1)
    model = GPT(cfg)
    model.init_weights(0)
    backends = Backends(backend, device=torch.device("cpu"), dtype=torch.float32)
    optimizer = Optimizer(model, lrs=LRS, weight_decay=0.1, ns_steps=5, compute_dtype=torch.float32, backends=backends)
    want = {n: p.detach().double() for n, p in model.named_parameters()}
    states, adams = {}, {}
    for step, (lr_mult, momentum, decay_mult) in enumerate(((0.5, 0.8, 1.0), (1.0, 0.9, 0.7), (0.25, 0.95, 0.2))):
        generator = torch.Generator().manual_seed(step)
        grads = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
        optimizer.step(by_arena(optimizer, grads), step=step, lr_mult=lr_mult, momentum=momentum, decay_mult=decay_mult)
        for name, start in want.items():
            group = next(row.group for row in model.table if row.name == name)
            if group != "matrices":
                (beta1, beta2), decay, _ = ADAM_GROUPS[group]
                if name not in adams:
                    p = torch.nn.Parameter(start)
                    adams[name] = p, torch.optim.AdamW([p], betas=(beta1, beta2), eps=ADAM_EPS, weight_decay=decay)
                p, adam = adams[name]
                adam.param_groups[0]["lr"] = LRS[group] * lr_mult
                p.grad = grads[name].double()
                adam.step()
                want[name] = p.detach()
                continue
            kind = name.split(".")[0]
            rows = {"attn_qkv": ((0, 32), (32, 48), (48, 64))}.get(kind, ((0, start.size(1)),))
            moved = start.clone()
            for layer in range(start.size(0)):
                for a, b in rows:
                    turn = (lambda t: t.T) if kind == "mlp_down" else (lambda t: t)
                    p, g = (turn(t[layer, a:b].double()) for t in (start, grads[name]))
                    empty = torch.zeros(p.size(0), 1) if p.size(0) >= p.size(1) else torch.zeros(1, p.size(1))
                    buf, second = states.get((name, layer, a), (torch.zeros_like(p), empty.double()))
                    new, *states[name, layer, a] = muon_oracle(
                        p, g, buf, second, lr=LRS["matrices"] * lr_mult, wd=0.1 * decay_mult, mu=momentum
                    )
                    moved[layer, a:b] = turn(new)
            want[name] = moved
    for name, p in model.named_parameters():
        assert rel_rms(p.detach().double(), want[name]) < 1e-5, name


def test_every_parameter_moves():
    model, optimizer = make(torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients = [torch.randn(arena.shape) for arena in optimizer.arenas]
    optimizer.step(gradients, step=0, lr_mult=1.0, momentum=0.9, decay_mult=1.0)
    for n, p in model.named_parameters():
        assert not torch.equal(p, before[n]), n


def test_bf16_masters_follow_the_fp32_run_exactly_where_gradients_agree():
    """The master of a bf16 run is an fp32 weight: fed the same gradients, AdamW on the head gives the same bits."""
    m32, o32 = make(torch.float32)
    m16, o16 = make(torch.bfloat16)
    assert (
        m16.lm_head.dtype == torch.bfloat16
        and m16.wte.dtype == torch.bfloat16
        and m16.resid_lambdas.dtype == torch.float32
    )
    for step in range(5):
        grads = {
            n: torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) for n, p in m32.named_parameters()
        }
        for opt in (o32, o16):
            opt.step(by_arena(opt, grads), step=step, lr_mult=1.0, momentum=0.9, decay_mult=1.0)
    master = join_master(m16.lm_head.data, o16.state["lm_head.low"])
    assert torch.equal(master, m32.lm_head.data)
    assert torch.equal(m16.lm_head.data, split_master(m32.lm_head.data)[0])
    moved = join_master(m16.mlp_up[0].data, o16.state["mlp_up.0.low"])
    assert rel_rms(moved, m32.mlp_up[0].data) < 0.02  # Polar Express itself runs in bf16


def test_masters_begin_as_the_weights_that_they_were():
    """Also those that lie in the middle between two numbers of bf16."""
    model = GPT(TINY)
    model.init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p.view(-1)[:2] = torch.tensor([1 + 2**-8, -1 - 3 * 2**-8])[: p.numel()]
    want = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = Optimizer(model, lrs=LRS, weight_decay=0.1, ns_steps=1, compute_dtype=torch.bfloat16)
    lows = [n for n in want if f"{n}.low" in optimizer.state]
    assert {"attn_qkv.0", "attn_qkv.1", "mlp_down.0", "lm_head"} <= set(lows)
    for n in lows:
        assert torch.equal(join_master(model.get_parameter(n).data, optimizer.state[f"{n}.low"]), want[n]), n


def test_steps_smaller_than_bf16_can_hold_reach_every_master():
    """Among them q, k and v, which are views of one bank and have low bits each: a write lost there would not show in
    the bf16 half."""
    (m32, o32), (m16, o16) = make(torch.float32), make(torch.bfloat16)

    def masters():
        high = dict(m16.named_parameters())
        return {n: join_master(high[n].data, o16.state[f"{n}.low"]) for n in high if f"{n}.low" in o16.state}

    start = {n: p.detach().clone() for n, p in m32.named_parameters()}
    assert all(torch.equal(t, start[n]) for n, t in masters().items())
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        grads = {n: torch.randn(p.shape, generator=generator) for n, p in start.items()}
        for opt in (o32, o16):
            opt.step(by_arena(opt, grads), step=step, lr_mult=1e-3, momentum=0.9, decay_mult=1.0)
    moved = dict(m32.named_parameters())
    assert {"attn_qkv.0", "attn_qkv.1", "mlp_down.0", "lm_head"} <= masters().keys()
    for name, t in masters().items():
        want = moved[name].detach().double() - start[name].double()
        assert rel_rms(t.double() - start[name].double(), want) < 0.05, name  # Polar Express itself runs in bf16


def test_bf16_gradients_accumulate_in_fp32():
    model, optimizer = make(torch.bfloat16)
    grads, p = Gradients(model, optimizer), model.wte
    for _ in range(300):  # in bf16, 256 + 1 = 256
        (p * 1.0).sum().backward()
    assert (grads(p) == 300.0).all() and grads(p).dtype == torch.float32 and p.grad is None
    assert not grads(model.lm_head).any()
    grads.zero()
    assert not grads(p).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_autograd(dtype):
    """Two micro-steps into the sums, some by the ops themselves, against a model that leaves all to autograd.

    Of tables autograd rounds a micro-step's gradient to bf16, an ulp of 2^-8: what is added to the sums is not rounded.
    """
    (model, optimizer), (plain, _) = make(dtype), make(dtype)
    grads = Gradients(model, optimizer)
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(64, (2, 3, 17), generator=generator)
    for m in (model, plain):
        with torch.no_grad():  # at first, what adds to the stream is zero
            m.smear_lambda.fill_(0.5)
            for bank in (*m.attn_out, *m.mlp_down):
                bank.copy_(0.1 * torch.randn(bank.shape, generator=torch.Generator().manual_seed(1)))
    want = {n: torch.zeros(p.shape) for n, p in plain.named_parameters()}
    for idx in batches:
        model(idx[:, :-1], idx[:, 1:]).backward()
        plain.zero_grad()
        plain(idx[:, :-1], idx[:, 1:]).backward()
        for n, p in plain.named_parameters():
            want[n] += p.grad.float()
    for n, p in model.named_parameters():
        rounded = dtype == torch.bfloat16 and n in ("wte", "value_embeds")
        assert want[n].any() and rel_rms(grads(p), want[n]) < (2**-9 if rounded else 1e-6), n
    grads.zero()
    model(idx[:, :-1], idx[:, 1:]).backward()  # the places are kept
    assert rel_rms(grads(model.attn_qkv[1]), plain.attn_qkv[1].grad.float()) < 1e-6
    assert rel_rms(grads(model.smear_gate), plain.smear_gate.grad) < 1e-6


def moved(model, optimizer):
    """Three steps with changing hyperparameters, and what they leave behind."""
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        gradients = by_arena(
            optimizer, {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
        )
        optimizer.step(gradients, step=step, lr_mult=1.0 + step, momentum=0.9 + 0.01 * step, decay_mult=1.0)
    return snapshot(model, optimizer)


def snapshot(model, optimizer):
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    return weights | {n: t.clone() for n, t in optimizer.state.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["ref", "triton", CUDA])
def test_warming_up_changes_nothing(dtype, backend):
    """Not even of an optimizer that goes on from a checkpoint."""
    model, optimizer = make(dtype, ONE_LAYER, backend, ns_steps=1)
    moved(model, optimizer)
    before = snapshot(model, optimizer)
    optimizer.warm_up([torch.randn(arena.shape) for arena in optimizer.arenas])
    after = snapshot(model, optimizer)
    assert all(torch.equal(t, after[n]) for n, t in before.items())


def test_a_recorded_step_takes_the_hyperparameters_of_its_time(monkeypatch):
    """With what stands for a CUDA graph: it holds what was recorded, and recording runs nothing."""

    class Graph:
        def replay(self):
            for function, args in self.recorded:
                function(*args)

    @contextmanager
    def recording(graph):
        graph.recorded, update = [], Optimizer._update
        monkeypatch.setattr(Optimizer, "_update", lambda *args: graph.recorded.append((update, args)))
        yield
        monkeypatch.setattr(Optimizer, "_update", update)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    want = moved(*make(torch.float32))
    model, optimizer = make(torch.float32)
    gradients = [torch.zeros(arena.shape) for arena in optimizer.arenas]
    optimizer.warm_up(gradients, record=True)
    monkeypatch.setattr(Optimizer, "_update", None)  # from here on the graph alone
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        new = by_arena(optimizer, {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()})
        torch._foreach_copy_(gradients, new)
        optimizer.step(gradients, step=step, lr_mult=1.0 + step, momentum=0.9 + 0.01 * step, decay_mult=1.0)
    got = snapshot(model, optimizer)
    assert all(torch.equal(t, got[n]) for n, t in want.items())
    with pytest.raises(ValueError, match="reads other gradients"):
        optimizer.step([g.clone() for g in gradients], step=3, lr_mult=1.0, momentum=0.9, decay_mult=1.0)


@pytest.mark.skipif(DEVICE == "cuda", reason="counts without launching")
def test_launches_of_a_step_do_not_grow_with_depth(monkeypatch):
    """Of the gpt2 preset, narrower: the number of matrices and their shapes decide, not their size."""
    launched = []
    for module in (muon_update, adam_update, gemm, polar_express):
        monkeypatch.setattr(module, "launch", lambda kernel, *args, **options: launched.append(kernel.__name__))
    counts = []
    for depth in (12, 24):
        cfg = dataclasses.replace(preset("gpt2", "cuda").model, depth=depth, d_model=128, d_head=64, vocab_size=256)
        _, optimizer = make(torch.bfloat16, cfg, "triton")
        launched.clear()
        gradients = [torch.empty(arena.shape) for arena in optimizer.arenas]
        optimizer.step(gradients, step=0, lr_mult=1.0, momentum=0.9, decay_mult=1.0)
        counts.append(Counter(launched))
    # two shapes of large matrices, five steps of three products each; the gates' take one launch
    assert counts[0]["_gemm_kernel"] == 30 and counts[0]["_small_kernel"] == 1
    assert counts[0]["_adam_update_kernel"] == 4  # both embeddings, the head, everything small
    assert counts[0] == counts[1] and counts[0].total() == 50


@pytest.mark.skipif(NO_CUDA is not None or DEVICE == "cuda", reason="counts emulated launches")
def test_csrc_takes_all_tensors_of_a_step_together(monkeypatch):
    """Of the gpt2 preset, narrower: one call for momentum, one for the update of matrices, one for AdamW."""
    calls = []
    monkeypatch.setattr(extension, "call", lambda function, *args, **arguments: calls.append((function, arguments)))
    cfg = dataclasses.replace(preset("gpt2", "cuda").model, depth=12, d_model=128, d_head=64, vocab_size=256)
    model = GPT(cfg)
    chosen = "muon_momentum=cuda,muon_apply=cuda,adam_update=cuda"
    backends = Backends(chosen, device=torch.device("cpu"), dtype=torch.bfloat16)
    optimizer = Optimizer(model, lrs=LRS, weight_decay=0.1, ns_steps=1, compute_dtype=torch.bfloat16, backends=backends)
    gradients = [torch.empty(arena.shape) for arena in optimizer.arenas]
    optimizer.step(gradients, step=0, lr_mult=1.0, momentum=0.9, decay_mult=1.0)
    assert [function for function, _ in calls] == ["muon_momentum", "adam_update", "muon_apply"]
    assert len(calls[1][1]["tensors"]) == 4 and len(calls[0][1]["banks"]) >= 3
