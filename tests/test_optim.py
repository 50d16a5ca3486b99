"""The optimizer against float64 transcriptions of the published update rules, and the exactness of bf16 masters."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.config import ModelConfig
from core.model import GPT
from core.optim import (
    ADAM_EPS,
    ADAM_GROUPS,
    MUON_BETA2,
    POLAR_EXPRESS,
    Gradients,
    Optimizer,
    adamw_update,
    join_master,
    muon_update,
    muon_views,
    polar_express,
    split_master,
)

# by exact arithmetic from the coefficients in the facts, apart from the code
PUBLISHED_POLYNOMIAL = [1.027110178427, 1.059161137958, 0.910610875741, 0.859128963113]


def test_constants_are_the_published_ones():
    """nanochat 92d63d4: betas and decay by group, eps; Polar Express for five steps."""
    assert ADAM_GROUPS == {
        "lm_head": ((0.8, 0.96), 0.01),
        "wte": ((0.8, 0.995), 0.001),
        "value_embeds": ((0.8, 0.995), 0.01),
        "resid_lambdas": ((0.8, 0.95), 0.05),
        "x0_lambdas": ((0.96, 0.95), 0.0),
        "gates": ((0.8, 0.95), 0.0),
    }
    assert (ADAM_EPS, MUON_BETA2, len(POLAR_EXPRESS)) == (1e-10, 0.9, 5)
    # what the five polynomials make of singular values from 0.01 to 1, in float64
    x = torch.tensor([0.01, 0.1, 0.5, 1.0], dtype=torch.float64)
    for a, b, c in POLAR_EXPRESS:
        x = a * x + b * x**3 + c * x**5
    assert x.tolist() == pytest.approx(PUBLISHED_POLYNOMIAL, rel=1e-9)


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
    for a, b, c in POLAR_EXPRESS:
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


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24)])
def test_muon_matches_the_rule(shape):
    g = torch.Generator().manual_seed(0)
    p = torch.randn(3, *shape, generator=g)
    buf, rows, cols = torch.zeros_like(p), *shape
    second = torch.zeros(3, rows, 1) if rows >= cols else torch.zeros(3, 1, cols)
    want = [(p[i].double(), buf[i].double(), second[i].double()) for i in range(3)]
    for _ in range(4):
        grad = torch.randn(3, *shape, generator=g)
        hyper = dict(lr=0.05, momentum=0.9)
        muon_update(p, grad, buf, second, weight_decay=0.3, compute_dtype=torch.float32, ns_steps=5, **hyper)
        want = [muon_oracle(*want[i][:1], grad[i].double(), *want[i][1:], lr=0.05, wd=0.3, mu=0.9) for i in range(3)]
    for i in range(3):
        for got, expected in zip((p[i], buf[i], second[i]), want[i]):
            assert rel_rms(got.double(), expected) < 1e-5


def test_muon_leaves_weights_alone_without_gradient():
    p = torch.randn(1, 8, 8)
    before = p.clone()
    muon_update(
        p, torch.zeros_like(p), torch.zeros_like(p), torch.zeros(1, 8, 1),
        lr=0.1, weight_decay=0.0, momentum=0.9, compute_dtype=torch.float32, ns_steps=5,
    )  # fmt: skip
    assert torch.equal(p, before)


@pytest.mark.parametrize("shape", [(32, 32), (64, 16), (16, 64)])
def test_polar_express_orthogonalises(shape):
    x = torch.randn(4, *shape, dtype=torch.float64)
    singular = torch.linalg.svdvals(polar_express(x))
    assert singular.max() < 1.2 and singular[:, : min(shape) // 2].min() > 0.7
    assert torch.equal(polar_express(torch.zeros(1, *shape)), torch.zeros(1, *shape))


def test_adamw_matches_torch():
    p = torch.randn(50, dtype=torch.float64).float()
    ours, ref = p.clone(), torch.nn.Parameter(p.double())
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    torch_adam = torch.optim.AdamW([ref], lr=0.02, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    for t in range(1, 6):
        g = torch.randn(50)
        adamw_update(ours, g, m, v, lr=0.02, betas=(0.8, 0.95), weight_decay=0.1, t=t)
        ref.grad = g.double()
        torch_adam.step()
    assert rel_rms(ours.double(), ref.detach()) < 1e-6


def test_adamw_in_bf16_rounds_once():
    p = torch.randn(64).bfloat16()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    p32, m32, v32 = p.float(), m.float(), v.float()
    g = torch.randn(64)
    adamw_update(p, g, m, v, lr=0.1, betas=(0.8, 0.9), weight_decay=0.1, t=1)
    adamw_update(p32, g, m32, v32, lr=0.1, betas=(0.8, 0.9), weight_decay=0.1, t=1)
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


TINY = ModelConfig(depth=6, d_model=32, d_head=8, seq_len=16, vocab_size=64, n_kv_head=2)


def test_muon_sees_separate_matrices_and_factors():
    model = GPT(TINY)
    shapes = {
        n: [tuple(v.shape) for v in muon_views(n, p, model.dims)] for n, p in model.named_parameters() if p.dim() == 3
    }
    assert shapes["attn_qkv.0"] == [(4, 32, 32), (4, 16, 32), (4, 16, 32)]
    assert shapes["attn_qkv.1"] == [(2, 32, 32), (2, 16, 32), (2, 16, 32)]
    assert shapes["mlp_up.0"] == [(4, 128, 32)]
    assert shapes["mlp_down.0"] == [(4, 32, 128)]
    assert shapes["ve_gate.0"] == [(3, 2, 12)]
    square = GPT(dataclasses.replace(TINY, n_kv_head=None))
    square.init_weights(0)
    (qkv,) = muon_views("attn_qkv.0", square.attn_qkv[0], square.dims)
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


def make(dtype, cfg=TINY):
    model = GPT(cfg)
    model.init_weights(0)
    return model, Optimizer(model, lrs=LRS, weight_decay=0.1, ns_steps=5, compute_dtype=dtype)


def test_every_parameter_is_in_one_group_and_moves():
    model, optimizer = make(torch.float32)
    assert sorted(n for g in optimizer.groups.values() for n in g.params) == sorted(
        n for n, _ in model.named_parameters()
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step(lambda p: torch.randn_like(p), step=0, lr_mult=1.0, momentum=0.9, decay_mult=1.0)
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
        for model, opt in ((m32, o32), (m16, o16)):
            by_param = {p: grads[n] for n, p in model.named_parameters()}
            opt.step(by_param.__getitem__, step=step, lr_mult=1.0, momentum=0.9, decay_mult=1.0)
    master = join_master(m16.lm_head.data, o16.state["lm_head.low"])
    assert torch.equal(master, m32.lm_head.data)
    assert torch.equal(m16.lm_head.data, split_master(m32.lm_head.data)[0])
    moved = join_master(m16.mlp_up[0].data, o16.state["mlp_up.0.low"])
    assert rel_rms(moved, m32.mlp_up[0].data) < 0.02  # Polar Express itself runs in bf16


def test_bf16_gradients_accumulate_in_fp32():
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    grads = Gradients([p])
    for _ in range(300):  # in bf16, 256 + 1 = 256
        (p * 1.0).sum().backward()
    assert grads(p).item() == 300.0 and grads(p).dtype == torch.float32
    grads.zero()
    assert grads(p).item() == 0.0
