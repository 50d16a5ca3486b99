"""The chunked loss against autograd in float64 on the same inputs, by the law err <= 2 err(torch, same type) + tiny."""

import pytest
import torch
import torch.nn.functional as F

from core import loss as loss_module
from core.loss import linear_cross_entropy

TINY = 1e-7


def reference(x, w, targets, cap, reduction, upstream):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    z = (x @ w.T).to(torch.promote_types(x.dtype, torch.float32))
    y = cap * torch.tanh(z / cap) if cap else z
    value = F.cross_entropy(y, targets, ignore_index=-1, reduction=reduction)
    (value * upstream).backward()
    return {"loss": value.detach(), "dx": x.grad, "dw": w.grad}


def ours(x, w, targets, cap, reduction, upstream):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    value = linear_cross_entropy(x, w, targets, softcap=cap, reduction=reduction)
    (value * upstream).backward()
    return {"loss": value.detach(), "dx": x.grad, "dw": w.grad}


def error(got, want):
    return ((got.double() - want).pow(2).mean() / want.pow(2).mean().clamp_min(1e-300)).sqrt().item()


def case(M=37, C=24, V=101, scale=1.0, dtype=torch.float32, ignored=5):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(M, C, generator=g).to(dtype)
    w = (scale * torch.randn(V, C, generator=g)).to(dtype)
    targets = torch.randint(0, V, (M,), generator=g)
    targets[:ignored] = -1
    return x, w, targets


def check(x, w, targets, cap, reduction, upstream=0.7):
    want = reference(x.double(), w.double(), targets, cap, reduction, upstream)
    torch_same = reference(x, w, targets, cap, reduction, upstream)
    got = ours(x, w, targets, cap, reduction, upstream)
    for name in want:
        bound = 2 * error(torch_same[name], want[name]) + TINY
        assert got[name].dtype == torch_same[name].dtype, name
        assert error(got[name], want[name]) <= bound, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [15.0, 0.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_matches_autograd_in_float64(monkeypatch, dtype, cap, reduction):
    monkeypatch.setitem(loss_module.CHUNK_LOGITS, "cpu", 8 * 101)  # ragged last chunk
    check(*case(dtype=dtype), cap, reduction)


@pytest.mark.parametrize("M", [1, 8, 9])
def test_row_counts(monkeypatch, M):
    monkeypatch.setitem(loss_module.CHUNK_LOGITS, "cpu", 8 * 101)
    check(*case(M=M, ignored=0), 15.0, "mean")


def test_confident_and_saturated():
    x, w, targets = case(scale=8.0, ignored=0)
    targets[:30] = (x @ w.T).argmax(-1)[:30]
    y = 15 * torch.tanh(x @ w.T / 15)
    assert y.abs().max() > 14.9
    check(x, w, targets, 15.0, "mean")
    check(x, w, targets, 0.0, "mean")
    assert (x @ w.T).softmax(-1).gather(1, targets[:, None])[:30].max() > 0.999


def test_nothing_to_predict_is_zero():
    x, w, targets = case(ignored=37)
    got = ours(x, w, targets, 15.0, "mean", 1.0)
    assert got["loss"] == 0 and not got["dx"].any() and not got["dw"].any()


def test_without_gradients_nothing_is_kept():
    x, w, targets = case()
    with torch.no_grad():
        value = linear_cross_entropy(x, w, targets, softcap=15.0, reduction="sum")
    assert value.item() == pytest.approx(reference(x, w, targets, 15.0, "sum", 1.0)["loss"].item(), rel=1e-6)


def test_logits_exist_by_the_chunk(monkeypatch):
    """The largest tensor the loss makes, beyond inputs and gradients, is one chunk of logits."""
    monkeypatch.setitem(loss_module.CHUNK_LOGITS, "cpu", 16 * 512)
    x, w, targets = torch.randn(256, 8), torch.randn(512, 8), torch.randint(0, 512, (256,))
    sizes = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Record():
        ours(x, w, targets, 15.0, "mean", 1.0)
    assert max(sizes) == 16 * 512
