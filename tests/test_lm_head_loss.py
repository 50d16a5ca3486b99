"""lm_head_loss: both backends against autograd on whole logits in float64, chunks, fp8, memory, what is refused,
mutations."""

import math
import sys
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

import kernels.lm_head_loss as module
from bench.law import error, fill_dynamo_tables, judge, judge_rows, poisoned_allocations, same_form
from kernels import extension, gemm, sizes
from kernels import fp8 as fp8_module
from kernels.fp8 import E4M3, E4M3_MAX, E5M2, E5M2_MAX, Fp8Tensor, empty_fp8
from kernels.lm_head_loss import (
    LEAST_ROWS,
    LOGIT_BYTES,
    Softcap,
    chunk_rows,
    lm_head_loss,
    lm_head_loss_cost,
    lm_head_loss_ref,
    most_rows,
    reference_bytes,
    softcapped_logits,
    tanh_cap,
)
from kernels.op import Device, Op, UserError
from kernels.quantise_weight import quantise_weight
from kernels.sizes import round_up
from tests.harness import DEVICE, ORDERS, Failed, check_op, in_order, mutant, mutant_cuda, noticed
from tests.mutations import Edit, mutations

CAPS = {"tanh": tanh_cap(15.0), "sigmoid": Softcap(23.0, 5.0, 7.5), "none": None}
DTYPES = (torch.bfloat16, torch.float32)
BACKENDS = ("ref", "triton", "cuda")
RESULTS = ("loss", "dx", "dw")
every_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)  # else the kernels alone


def whole(x, w, targets, weights=None, *, softcap=None, reduction="mean", vocab_size=None, ignore_index=-1):
    """The same on all logits at once, by autograd: the oracle in float64, and PyTorch's own error in the dtype of x."""
    V = vocab_size or len(w)
    z = x @ w[:V].T
    z = z.to(torch.promote_types(x.dtype, torch.float32))
    y = z if softcap is None else softcap.height * torch.sigmoid((z + softcap.shift) / softcap.width)
    logp = torch.log_softmax(y, dim=-1)
    targets = targets if targets.dim() == 2 else targets[:, None]
    counts = targets != ignore_index
    weights = counts.to(y.dtype) if weights is None else torch.where(counts, weights.to(y.dtype), 0.0)
    losses = -(weights * torch.where(counts, logp.gather(1, targets.clamp_min(0)), 0.0)).sum(1)
    if reduction == "none":
        return losses
    return losses.sum() / (weights.sum() if reduction == "mean" else 1.0)


def case(M=37, C=32, V=101, padded=112, K=1, dtype=torch.float32, scale=1.0, ignored=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, V, (M, K) if K > 1 else (M,), generator=g)
    targets[:ignored] = -1
    if K > 1 and M > 7:
        targets[7, 1] = targets[7, 0]  # twice the same
        targets[8, 0] = -1
    weights = 0.1 + torch.rand(targets.shape, generator=g) if K > 1 else None
    x, w = torch.randn(M, C, generator=g), scale * torch.randn(padded, C, generator=g)
    move = {"x": x.to(dtype), "w": w.to(dtype), "targets": targets} | ({"weights": weights} if K > 1 else {})
    return {name: t.to(DEVICE) for name, t in move.items()} | {"vocab_size": V}


def evaluate(function, args, upstream, wide=False, **options):
    own = {name: t.detach().clone() if isinstance(t, Tensor) else t for name, t in args.items()}
    for name in ("x", "w"):
        own[name] = (own[name].double() if wide else own[name]).requires_grad_()
    loss = function(**own, **options)
    dx, dw = torch.autograd.grad(upstream * loss, (own["x"], own["w"]))
    return dict(zip(RESULTS, (loss.detach(), dx, dw)))


def error_of_a_sum(args, **options):
    """What PyTorch's roundings in the dtype of x, independent from row to row, leave in the sum of the losses, over
    that sum: a loss is one number, whose own error may be 0 by luck."""
    wide = {name: args[name].double() for name in ("x", "w")}
    like, want = (whole(**args | change, **options | {"reduction": "none"}) for change in ({}, wide))
    return (like - want).square().sum().sqrt().item() / (want.sum().abs().item() or 1.0)


def check(args, op: Op = lm_head_loss, backend="triton", upstream=-1.7, **options):
    fill_dynamo_tables()
    want = evaluate(whole, args, upstream, wide=True, **options)
    like = evaluate(whole, args, upstream, **options)
    with poisoned_allocations():
        got = evaluate(op.backends[backend], args, upstream, **options)
    same_form(like, got)
    for name in RESULTS:
        off = error(got[name], want[name])
        if name == "loss":  # one number
            judge(name, [off], [error_of_a_sum(args, **options)], len(args["x"]))
        else:
            judge(name, [off], [error(like[name], want[name])], want[name].numel())
            judge_rows(name, got[name], like[name], want[name])
    for order in ORDERS if backend == "cuda" else ORDERS[:1]:
        with poisoned_allocations(), in_order(backend, order):
            again = evaluate(op.backends[backend], args, upstream, **options)
        if any(not torch.equal(got[name], again[name]) for name in RESULTS):
            raise Failed(f"a result differs between two runs, one with {order}")
    V = args["vocab_size"]
    if got["dw"][V:].any():
        raise Failed("padded columns have a gradient")
    return got


# the law ------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_agrees_with_autograd_in_float64(backend, dtype, cap, K, reduction):
    check(case(dtype=dtype, K=K), backend=backend, softcap=CAPS[cap], reduction=reduction)


def small_chunks(monkeypatch):
    """Of 16 rows, as where one tile of rows fills the memory."""
    for name, value in (("LOGIT_BYTES", 0), ("CHUNK_MULTIPLE", 16), ("LEAST_ROWS", 16)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "chunk_rows", chunk_rows.__wrapped__)  # whose cache knows nothing of this
    assert module.chunk_rows(40, 112, 32, 2) == 16


@every_backend
@pytest.mark.parametrize("M", [1, 16, 17, 40])
def test_chunks_of_rows(backend, M, monkeypatch):
    """The last one ragged: 16 rows in the kernel, 10 in the reference on a CPU."""
    monkeypatch.setattr(module, "CACHED_LOGITS", 10 * 112)
    small_chunks(monkeypatch)
    for dtype in DTYPES:
        for K in (1, 3):
            args = case(M=M, ignored=M // 3, dtype=dtype, K=K)
            check(args, backend=backend, softcap=CAPS["tanh"])


@pytest.mark.parametrize("V, padded", [(1, 1), (7, 7), (16, 16), (1000, 1024), (1025, 1040)])
def test_vocabularies(V, padded, backend):
    for dtype in DTYPES:
        check(case(M=20, V=V, padded=padded, dtype=dtype, ignored=1), softcap=CAPS["sigmoid"], backend=backend)


SHORT_TILES = {"BLOCK": 64, "num_warps": 1}  # of which a row of the tests has many, as real rows have of 2,048 columns


def several_passes(monkeypatch):
    """Rows of many tiles in Triton; in CUDA none stay in shared memory."""
    monkeypatch.setattr(module, "_row_config", lambda V, dtype: SHORT_TILES)
    monkeypatch.setattr(module, "MOST_SHARED", 0)


TALL = {"at the limit": Softcap(module.FIXED_HEIGHT, 5.0, 7.5), "beyond it": Softcap(200.0, 5.0, 7.5)}


def test_real_rows_have_several_tiles():
    for dtype in (torch.bfloat16, torch.float32):
        assert all(module._row_config(size.V, dtype)["BLOCK"] < size.V for size in sizes.SIZES.values())


@pytest.mark.parametrize("cap", CAPS | TALL)
@pytest.mark.parametrize("V, padded", [(151, 160), (128, 128), (64, 256), (20, 200)], ids=str)
def test_rows_of_several_tiles(cap, V, padded, monkeypatch, backend):
    """The vocabulary ends within a tile, at its end, and tiles before the columns do. In CUDA rows are read twice."""
    several_passes(monkeypatch)
    for dtype in DTYPES:
        args = case(M=5, V=V, padded=padded, C=16, ignored=1, K=3, dtype=dtype)
        check(args, softcap=(CAPS | TALL)[cap], backend=backend)


def test_rows_of_several_tiles_in_fp8(monkeypatch, backend):
    args = case(M=9, V=601, padded=608, dtype=torch.bfloat16)
    copy = copied(args["w"])
    want = evaluate(lm_head_loss.backends[backend], args, 1.0, softcap=CAPS["tanh"], fp8=copy)
    several_passes(monkeypatch)
    with poisoned_allocations():
        got = evaluate(lm_head_loss.backends[backend], args, 1.0, softcap=CAPS["tanh"], fp8=copy)
    assert all(error(got[name], want[name].double()) < 0.01 for name in RESULTS)


@pytest.mark.parametrize("cap", CAPS | TALL)
@pytest.mark.parametrize("K", [1, 3])
def test_a_confident_row_keeps_its_small_loss(cap, K, backend):
    """Each within two roundings of a number near 1, as with a softmax whose largest term is 1."""
    check_confident_rows(lm_head_loss, (CAPS | TALL)[cap], K, backend)


def check_confident_rows(op, softcap, K=1, backend="triton"):
    M, V, C = 24, 101, 16
    x, w = torch.zeros(M, C, device=DEVICE), torch.zeros(112, C, device=DEVICE)
    x[:, 0], w[:V, 0], w[20:23, 0] = torch.linspace(8, 13, M), -9.0, -1.0  # three that count beside the target
    x[:, 1], w[5, 0], w[5, 1] = torch.linspace(5, 10, M), 0.0, 1.0
    x[:, 2], w[:V, 2] = 1.0, -15.0 if softcap in TALL.values() else 0.0  # all terms far below the cap's
    targets = torch.full((M, K) if K > 1 else (M,), 5, device=DEVICE)
    args = {"x": x, "w": w, "targets": targets, "vocab_size": V, "softcap": softcap}
    args |= {"weights": torch.tensor([0.2, 0.3, 0.5], device=DEVICE).expand(M, 3)} if K > 1 else {}
    wide = args | {"x": x.double(), "w": w.double(), "reduction": "none"}
    want = whole(**wide)
    assert want.min() < 1e-4 and want.max() < 0.1
    with torch.no_grad():
        got = op.backends[backend](**args, reduction="none")
    if not (off := (got - want).abs().max()) <= 2 * torch.finfo(torch.float32).eps:
        raise Failed(f"losses are off by {off:.2e}")


@pytest.mark.parametrize("cap", CAPS | TALL)
def test_extreme_logits(cap, backend):
    """All terms as small as a softcap allows, all of them as large, and a target whose term is next to nothing."""
    softcap = (CAPS | TALL)[cap]
    for low, high in ((-1e3, -1e3), (1e3, 1e3), (-1e3, 1e3), (-60.0, 0.0)):
        args = case(M=6, C=16, V=24, padded=32, ignored=0)
        args["x"], args["w"] = torch.zeros(6, 16, device=DEVICE), torch.zeros(32, 16, device=DEVICE)
        args["x"][:, 0], args["w"][:, 0] = 1.0, low
        args["w"][3, 0], args["targets"][:] = high, 4
        wide = {**args, "x": args["x"].double(), "w": args["w"].double()}
        want = whole(**wide, softcap=softcap, reduction="none")
        with torch.no_grad():
            got = lm_head_loss.backends[backend](**args, softcap=softcap, reduction="none")
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


@every_backend
def test_targets_that_lie_column_by_column(backend):
    """As torch.stack(shifted targets).T leaves them."""
    args = case(K=3)
    for name in ("targets", "weights"):
        args[name] = args[name].T.contiguous().T
        assert not args[name].is_contiguous()
    check(args, backend=backend, softcap=CAPS["tanh"])


@pytest.mark.parametrize("target", [101, 105, 500, -100])
def test_a_target_that_does_not_exist_is_seen(target, backend):
    """Nothing is written beside its row: the others have the gradients that they would have."""
    args = case(ignored=0)
    args["targets"][11] = target
    got = evaluate(lm_head_loss.backends[backend], args, 1.0, softcap=CAPS["tanh"], reduction="sum")
    assert got["loss"].isnan()
    right = {**args, "targets": args["targets"].clone()}
    right["targets"][11] = 0
    want = evaluate(lm_head_loss.backends[backend], right, 1.0, softcap=CAPS["tanh"], reduction="sum")
    others = torch.arange(37, device=DEVICE) != 11
    assert torch.equal(got["dx"][others], want["dx"][others])
    if DEVICE == "cpu":
        with pytest.raises(RuntimeError):
            evaluate(lm_head_loss.backends["ref"], args, 1.0)


@every_backend
def test_without_gradients_none_are_made(backend, monkeypatch):
    args = case()
    want = evaluate(whole, args, 1.0)["loss"]
    monkeypatch.setattr(torch, "mm", lambda *a, out=None: out.copy_(a[0] @ a[1]) if out.shape[1] > 32 else 1 / 0)
    args["x"].requires_grad_()
    with torch.no_grad():
        torch.testing.assert_close(lm_head_loss.backends[backend](**args), want)


@every_backend
def test_confident_and_saturated(backend):
    args = case(scale=8.0, ignored=0, padded=101)
    z = args["x"] @ args["w"].T
    args["targets"][:30] = z.argmax(-1)[:30]
    assert (15 * torch.tanh(z / 15)).abs().max() > 14.9
    assert z.softmax(-1).gather(1, args["targets"][:, None])[:30].max() > 0.999
    for cap in CAPS.values():
        check(args, backend=backend, softcap=cap)


@every_backend
def test_the_upstream_gradient_is_not_rounded(backend):
    """With three accumulation steps it is 1/3, which bf16 misses by 0.1 %."""
    args = case(dtype=torch.bfloat16)
    one, third = (evaluate(lm_head_loss.backends[backend], args, upstream) for upstream in (1.0, 1 / 3))
    exact = torch.tensor(1 / 3, device=DEVICE) * one["dx"].float()
    assert torch.equal(third["dx"], exact.bfloat16())
    assert not torch.equal(third["dx"], one["dx"] * torch.tensor(1 / 3, device=DEVICE).bfloat16())


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_counts(backend, reduction):
    for args in (case(ignored=37), case(M=0, ignored=0)):
        got = evaluate(lm_head_loss.backends[backend], args, 1.0, softcap=CAPS["tanh"], reduction=reduction)
        assert got["loss"] == 0 and not got["dx"].any() and not got["dw"].any()


@every_backend
def test_an_ignore_index_of_ones_own(backend):
    args = case()
    args["targets"][:5] = 50
    got = evaluate(lm_head_loss.backends[backend], args, 1.0, ignore_index=50)
    args["targets"][args["targets"] == 50] = -1
    want = evaluate(lm_head_loss.backends[backend], args, 1.0)
    assert all(torch.equal(got[name], want[name]) for name in RESULTS)


@every_backend
@pytest.mark.parametrize("K", [1, 2])
def test_losses_by_row(backend, K):
    args, options = case(K=K), {"softcap": CAPS["sigmoid"], "reduction": "none"}
    with torch.no_grad():
        got = lm_head_loss.backends[backend](**args, **options)
        want = whole(**{**args, "x": args["x"].double(), "w": args["w"].double()}, **options)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    args["x"].requires_grad_()
    with pytest.raises(ValueError, match="forward only"):
        lm_head_loss.checked(backend)(**args, **options)


@every_backend
def test_a_broken_input_is_seen(backend):
    """Not a number, in x or in w, reaches the loss and the gradients."""
    for name in ("x", "w"):
        args = case(ignored=0)
        args[name][3, 4] = torch.nan
        got = evaluate(lm_head_loss.backends[backend], args, 1.0, softcap=CAPS["tanh"])
        assert got["loss"].isnan() and got["dx"].isnan().any() and got["dw"].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(dtype, backend):
    args = case(dtype=dtype)
    want = evaluate(lm_head_loss.backends[backend], args, 1.0)
    gaps = {
        n: torch.full((len(args[n]), 41), torch.nan, dtype=dtype, device=DEVICE)[:, 3:35].copy_(args[n])
        for n in ("x", "w")
    }
    gaps |= {"targets": torch.stack((args["targets"],) * 2, dim=1)[:, 0]}
    options = {"vocab_size": args["vocab_size"]}
    x, w = gaps["x"].requires_grad_(), gaps["w"].requires_grad_()
    loss = lm_head_loss.backends[backend](x, w, gaps["targets"], **options)
    got = torch.autograd.grad(loss, (x, w))
    assert torch.equal(got[0], want["dx"]) and torch.equal(got[1], want["dw"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_a_torch_op_and_compiles(dtype, backend):
    """opcheck, fullgraph and the rest of the harness, which takes the reference as its oracle."""
    args = case(dtype=dtype) | {"softcap": CAPS["tanh"]}
    check_op(lm_head_loss, args, factor=2.0, opcheck=True, compiled=True, backend=backend)


@pytest.mark.parametrize("fp8", [False, True])
def test_the_compiled_reference_is_one_node_however_many_chunks(monkeypatch, fp8):
    """With the bits of the eager one."""
    args = case(M=40, C=16, V=64, padded=64)
    w = args["w"].detach()
    options = {"softcap": CAPS["tanh"]}
    if fp8:
        copy = empty_fp8(w)
        quantise_weight.backends["ref"](w, *copy)
        options["fp8"] = copy
    want = evaluate(lm_head_loss_ref, args, 1.0, **options)
    sizes = []

    def count(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=count, bw_compiler=count)
    for chunk in (40, 1):
        monkeypatch.setattr(module, "reference_rows", lambda V, device, chunk=chunk: chunk)
        torch.compiler.reset()
        compiled = torch.compile(lm_head_loss_ref, fullgraph=True, dynamic=False, backend=backend)
        got = evaluate(compiled, args, 1.0, **options)
        if chunk == 40:
            assert all(torch.equal(t, want[name]) for name, t in got.items())
    assert len(sizes) == 4 and sizes[:2] == sizes[2:]


def test_inference():
    x, w = torch.randn(5, 3, 16), torch.randn(24, 16)
    for cap in (15.0, 0.0):
        z = (x @ w.T)[..., :20]
        want = cap * torch.tanh(z / cap) if cap else z
        torch.testing.assert_close(softcapped_logits(x, w, tanh_cap(cap), 20), want, atol=1e-5, rtol=1e-5)
    assert softcapped_logits(x.bfloat16(), w.bfloat16(), tanh_cap(15.0), 24).dtype == torch.float32


BAD = {
    "reduction": ({"reduction": "avg"}, "reduction is 'avg'"),
    "shapes": ({"w": torch.ones(112, 16)}, "expected .M, C. and .V, C."),
    "dtypes": ({"w": torch.ones(112, 32).bfloat16()}, "one dtype"),
    "vocabulary": ({"vocab_size": 113}, "expected 1 to 112"),
    "targets": ({"targets": torch.zeros(36, dtype=torch.int64)}, "targets is .36,"),
    "target type": ({"targets": torch.zeros(37, dtype=torch.int32)}, "int64"),
    "too many": ({"targets": torch.zeros(37, 17, dtype=torch.int64)}, "17 targets a row"),
    "weights": ({"weights": torch.ones(36)}, "weights is"),
    "scale": ({"x_scale": 0.1}, "x_scale is 0.1; expected one float32"),
    "gradient of weights": ({"weights": torch.ones(37, requires_grad=True)}, "give them detached"),
    "fp8": ({"fp8": Fp8Tensor(torch.ones(2, 2), torch.ones(2, 2), torch.ones(()))}, "quantise_weight"),
}  # fmt: skip


@every_backend
@pytest.mark.parametrize("name", BAD)
def test_bad_calls_are_refused(backend, name):
    change, says = BAD[name]
    change = {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in change.items()}
    with pytest.raises(ValueError, match=says):
        lm_head_loss.checked(backend)(**{**case(), **change})


def test_the_kernel_refuses_what_it_cannot_take(backend):
    with pytest.raises(ValueError, match="multiple of 16, not 24"):
        lm_head_loss.checked(backend)(**case(C=24))


# rows by CUDA ---------------------------------------------------------------

KEPT = 226 * 1024  # bytes of the longest row that stays in shared memory where tests run


def check_rows(V, dtype, out_dtype, cap, K=1, *, confident=False, grad=True):
    """Losses and gradient of rows of logits, whose padding and surroundings are NaN, held to the law against autograd
    in fp32, and the same in every order of threads; returns both. Rows are many: what a CPU's exponentials make of a
    few confident ones is luck."""
    M, g, columns = max(10, min(200, 20_000 // V)), torch.Generator().manual_seed(V), round_up(V, 16)
    softcap, factor = (CAPS | TALL)[cap], torch.tensor(0.37, device=DEVICE)
    targets = torch.randint(0, V, (M, K), generator=g).to(DEVICE)
    targets[1], targets[2:5, 0] = targets[1, 0], V - 1 - torch.arange(3, device=DEVICE).remainder(V)
    weights = torch.rand(M, K, generator=g).to(DEVICE) - 0.2
    weights[3, -1] = 0.0
    values = 1.5 * torch.randn(M, V, generator=g).to(DEVICE)
    if confident:  # in the middle of what a cap bends, where the others' gradients are small as well
        values[torch.arange(M), targets[:, 0]] = 25.0
    values = values.to(dtype)

    def by_autograd(wide):
        z = values.to(wide).requires_grad_()
        y = z if softcap is None else softcap.height * torch.sigmoid((z + softcap.shift) / softcap.width)
        losses = -(weights.to(wide) * torch.log_softmax(y, dim=-1).gather(1, targets)).sum(1)
        dz = torch.autograd.grad(losses.sum() * factor, z, retain_graph=True)[0]
        taken = torch.autograd.grad((weights.to(wide) * y.gather(1, targets)).sum() * factor, z)[0]
        return losses.detach(), dz, taken.gather(1, targets)

    (want, want_dz, taken), (like, like_dz, _) = by_autograd(torch.float64), by_autograd(torch.float32)
    results = []
    for order in ("lowest first", *ORDERS):
        around = torch.full((M + 2, columns), torch.nan, dtype=dtype, device=DEVICE)
        z, losses = around[1:-1, :V].copy_(values), around.new_empty(M, dtype=torch.float32)
        out = torch.ones(M + 2, columns + 16, device=DEVICE).to(out_dtype)
        dz = (z if dtype == out_dtype else out[1:-1, :V]) if grad else None
        with in_order("cuda", order):
            limit = torch.finfo(out_dtype).max
            module._rows(z, dz, losses, targets, weights, factor, limit, list(softcap or ()), V, True)
        results.append((losses, torch.zeros_like(z) if dz is None else dz.clone()))
        if not around[[0, -1]].isnan().all() or not (out[[0, -1]].float() == 1).all():
            raise Failed("wrote beside the rows")
        if grad and (z if dtype == out_dtype else out[1:-1]).as_strided((M, columns), dz.stride())[:, V:].float().any():
            raise Failed("the padding of the gradient is not zeros")
    for losses, dz in results:
        if not torch.equal(losses, results[0][0]) or not torch.equal(dz.float(), results[0][1].float()):
            raise Failed("a result depends on the order of threads")
    judge("losses", [error(losses, want)], [error(like, want)], M)
    if grad:
        ours, theirs = dz.double(), like_dz.to(out_dtype).double()
        # A target's gradient is a term of the softmax less what is taken from it: of a confident row rounding alone is
        # left, so its error is relative to what is taken.
        off = [(t - want_dz).gather(1, targets) for t in (ours, theirs)]
        judge("dz of targets", *([error(taken + t, taken)] for t in off), taken.numel())
        # The others' are terms, those of a confident row next to nothing: errors are relative to each row.
        norms = want_dz.scatter(1, targets, 0.0).norm(dim=1, keepdim=True).clamp_min(1e-300)
        rows = [(t / norms).scatter(1, targets, 0.0) for t in (ours, theirs, want_dz)]
        once = out_dtype != torch.float32  # is what these are rounded: an error of their exponents would be seen
        errors = ([error(t, rows[2])] for t in rows[:2])
        judge("dz of no target", *errors, dz.numel(), 1.25 if once else 2.0)
        judge_rows("dz of no target", *rows)
    return losses, dz


INTO = ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, E5M2), (torch.float32, E5M2))


@pytest.mark.parametrize("cap", CAPS | TALL)
@pytest.mark.parametrize("dtype, out_dtype", INTO, ids=str)
@pytest.mark.parametrize("V", [1, 15, 515, 2000, 9001])
def test_rows_by_cuda(V, dtype, out_dtype, cap, cuda, monkeypatch):
    """That stay in shared memory, that are read twice, and without a gradient: losses are the same to the last bit."""
    for K in (1, 3):
        kept = check_rows(V, dtype, out_dtype, cap, K)
        monkeypatch.setattr(module, "MOST_SHARED", 0)
        read_twice = check_rows(V, dtype, out_dtype, cap, K)
        assert torch.equal(kept[0], read_twice[0])
        assert torch.equal(kept[0], check_rows(V, dtype, out_dtype, cap, K, grad=False)[0])
        monkeypatch.undo()
    check_rows(V, dtype, out_dtype, cap, confident=True)


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("dtype, out_dtype", INTO, ids=str)
def test_rows_beyond_shared_memory(dtype, out_dtype, more, cuda):
    """The longest that a block keeps, and the next."""
    check_rows(KEPT // dtype.itemsize + more, dtype, out_dtype, "tanh")


@pytest.mark.parametrize("dtype, out_dtype", INTO, ids=str)
@pytest.mark.parametrize("cap", CAPS)
def test_what_is_not_a_number_fills_its_row(cap, dtype, out_dtype, cuda):
    check_not_a_number(cap, dtype, out_dtype)


def check_not_a_number(cap, dtype, out_dtype):
    z = torch.zeros(2, 1040, dtype=dtype, device=DEVICE)
    z[1, 1000] = torch.nan
    dz = z if dtype == out_dtype else torch.zeros(2, 1040, device=DEVICE).to(out_dtype)
    losses, targets = torch.empty(2, device=DEVICE), torch.full((2, 1), 3, device=DEVICE)
    weights, softcap, limit = torch.ones(2, 1, device=DEVICE), list(CAPS[cap] or ()), torch.finfo(out_dtype).max
    module._rows(z, dz, losses, targets, weights, weights[0, 0], limit, softcap, 1040, True)
    if not (losses.isnan().tolist() == [False, True] and dz[1].isnan().all() and not dz[0].isnan().any()):
        raise Failed("NaN is lost, or reaches another row")


BAD_ROWS = {
    "columns": ({"columns": 40}, "40 columns of 40; expected 1 or more, and with their padding a multiple of 16"),
    "stride": ({"stride_z": 40}, "are 40 and 48 elements apart"),
    "targets": ({"K": 17}, "K is 17; expected 1 to 16 targets"),
    "dtype": ({"dtype": "float16"}, "dtype is float16"),
    "place": ({"z": 8 + 2**20}, "expected multiples of 16 elements and of 16 bytes"),
    "gradient": ({"out_dtype": "float32"}, "gradient of bfloat16 is float32"),
}


def test_rows_of_the_least_numbers(cuda):
    """Of all finite ones: every term counts."""
    z = torch.full((1, 48), torch.finfo(torch.float32).min, device=DEVICE)
    losses, one, target = (
        torch.empty(1, device=DEVICE),
        torch.ones(1, 1, device=DEVICE),
        torch.zeros(1, 1, device=DEVICE),
    )
    module._rows(z, z, losses, target.long(), one, one[0, 0], 1.0, [], 33, True)
    assert losses.item() == pytest.approx(math.log(33)) and z[0, 1].item() == pytest.approx(1 / 33)


def test_cuda_needs_what_its_products_need(monkeypatch):
    """Of a bf16 weight's gradient, in Triton's interpreter."""
    monkeypatch.setenv("REDLINE_EMULATE", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = Device("cpu", "cpu", None)
    assert "TRITON_INTERPRET" in lm_head_loss.obstacle("cuda", (8, 16, 32), torch.bfloat16, cpu)


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_refused(name, cuda):
    change, says = BAD_ROWS[name]
    sizes = {"vocab": 40, "columns": 48, "stride_z": 48, "stride_out": 48, "M": 2, "K": 1, "most_shared": 0, "limit": 1}
    scales = {"gain": 1, "offset": 1, "height2": 1, "steep": 1, "cap": False, "fixed": False}
    tensors = dict.fromkeys(("z", "out", "losses", "targets", "weights", "factor"), torch.empty(2, 48, device=DEVICE))
    dtypes = {"dtype": torch.bfloat16, "out_dtype": torch.bfloat16}
    with pytest.raises(ValueError, match=says):
        extension.call("lm_head_loss_rows", tensors["z"], **tensors | sizes | scales | dtypes | change)


# a sum of gradients --------------------------------------------------------


def micro_steps(function, dtype, steps=2, wide=False, **options):
    """The sum of dw over a few micro-steps, which begins with ones, and the last dx."""
    w = case(dtype=dtype, K=3)["w"]
    w = (w.double() if wide else w).requires_grad_()
    total = torch.ones_like(w, dtype=torch.float64 if wide else torch.float32)
    for step in range(steps):
        args = case(dtype=dtype, K=3, seed=1 + step) | {"w": w}
        x = (args.pop("x").double() if wide else args.pop("x")).requires_grad_()
        (function(x, **args, softcap=CAPS["tanh"], dw_sum=total, **options) * (0.3 + step)).backward()
    if w.grad is not None:
        raise Failed("w has a gradient beside its sum")
    return {"dx": x.grad, "dw": total}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_backend
def test_a_sum_of_two_micro_steps(backend, dtype):
    want = micro_steps(lm_head_loss.checked("ref"), dtype, wide=True)
    like, got = (micro_steps(lm_head_loss.checked(b), dtype) for b in ("ref", backend))
    for name, t in got.items():
        judge(name, [error(t, want[name])], [error(like[name], want[name])], t.numel())
        judge_rows(name, t, like[name], want[name])
        assert t.dtype == like[name].dtype
    assert (got["dw"][101:] == 1).all()  # padded columns


def test_the_kernel_adds_what_it_has_not_rounded(backend):
    """A step's dw in bf16 is off by 0.2 %, its products by less."""
    want = micro_steps(lm_head_loss.checked("ref"), torch.bfloat16, wide=True, steps=1)["dw"] - 1
    ref, triton = (micro_steps(lm_head_loss.checked(b), torch.bfloat16, steps=1)["dw"] - 1 for b in ("ref", backend))
    assert error(triton, want) < 0.9 * error(ref, want)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("through", ["aot_eager", "inductor"])
@every_backend
def test_a_sum_compiles_as_one_graph(backend, through, fp8):
    dtype = torch.bfloat16 if fp8 else torch.float32
    options = {"fp8": copied(case(dtype=dtype, K=3)["w"])} if fp8 else {}
    fill_dynamo_tables()
    torch.compiler.reset()
    function = lm_head_loss.checked(backend)
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=through)
    want, got = (micro_steps(f, dtype, **options) for f in (function, compiled))
    for name, t in got.items():
        assert torch.equal(t, want[name]) if through == "aot_eager" else error(t, want[name].double()) < 0.01, name


@every_backend
def test_a_sum_without_gradients_stays(backend):
    args, total = case(), torch.ones(112, 32, device=DEVICE)
    args["w"].requires_grad_()
    with torch.no_grad():
        lm_head_loss.checked(backend)(**args, dw_sum=total)
    assert (total == 1).all()


BAD_SUMS = {
    "dtype": (torch.zeros(112, 32).bfloat16(), "dw_sum is .* bfloat16 .*; expected contiguous .112, 32. float32"),
    "shape": (torch.zeros(101, 32), "dw_sum is .101, 32."),
    "strides": (torch.zeros(32, 112).T, "dw_sum is .* strides .1, 112."),
    "device": (torch.zeros(112, 32, device="meta"), "dw_sum is .* on meta"),
    "gradient": (torch.zeros(112, 32, requires_grad=True), "dw_sum has a gradient itself"),
}


@every_backend
@pytest.mark.parametrize("name", BAD_SUMS)
def test_a_sum_that_does_not_fit_is_refused(backend, name):
    total, says = BAD_SUMS[name]
    with pytest.raises(ValueError, match=f"lm_head_loss: {says}"):
        lm_head_loss.checked(backend)(**case(), dw_sum=total if total.is_meta else total.to(DEVICE))


# fp8 ----------------------------------------------------------------------


def copied(w, backend="ref"):
    copy = empty_fp8(w)
    quantise_weight.backends[backend](w, *copy)
    return copy


def fp8_oracle(x, w, targets, *, softcap, vocab_size, upstream):
    """What the products of rounded operands are, in float64."""
    w_scale, x_scale = w.abs().max().float() / E4M3_MAX, x.abs().max().float() / E4M3_MAX
    xq, wq = ((t.float() / s).to(E4M3).double() * s.double() for t, s in ((x, x_scale), (w, w_scale)))
    wq = wq[:vocab_size]
    z = (xq @ wq.T).to(x.dtype).double()
    s = torch.sigmoid((z + softcap.shift) / softcap.width)
    logp = torch.log_softmax(softcap.height * s, dim=-1)
    n = (targets >= 0).sum()
    hot = torch.nn.functional.one_hot(targets.clamp_min(0), vocab_size)
    dz = torch.where(targets[:, None] >= 0, logp.exp() - hot, 0) * softcap.height / softcap.width * s * (1 - s)
    g_scale = softcap.steepest / E5M2_MAX
    dz = (dz / g_scale).to(E5M2).double() * g_scale / n * upstream
    loss = -torch.where(targets >= 0, logp.gather(1, targets.clamp_min(0)[:, None])[:, 0], 0).sum() / n
    dw = torch.zeros_like(w, dtype=torch.float64)
    dw[:vocab_size] = dz.T @ xq
    return {"loss": loss, "dx": dz @ wq, "dw": dw}


@every_backend
@pytest.mark.parametrize("M", [15, 37])
@pytest.mark.parametrize("cap", ["tanh", "sigmoid"])
def test_fp8_is_the_product_of_rounded_operands(backend, M, cap, monkeypatch):
    """e5m2 has two bits: where an fp32 rounding meets a tie, one number in many hundreds comes out a step apart."""
    small_chunks(monkeypatch)
    monkeypatch.setattr(gemm, "PROGRAMS_WITHOUT_GPU", 2)
    args = case(M=M, dtype=torch.bfloat16)
    copy = copied(args["w"], backend)
    want = fp8_oracle(**args, softcap=CAPS[cap], upstream=0.3)
    with poisoned_allocations():
        got = evaluate(lm_head_loss.backends[backend], args, 0.3, softcap=CAPS[cap], fp8=copy)
    bounds = {"loss": 1e-3, "dx": 0.02, "dw": 0.02}
    for name in RESULTS:
        assert error(got[name], want[name]) < bounds[name], (name, error(got[name], want[name]))
    assert not got["dw"][args["vocab_size"] :].any()
    exact = evaluate(whole, args, 0.3, wide=True, softcap=CAPS[cap])
    assert 0.01 < error(got["dx"], exact["dx"]) < 0.1  # rounded it is, and not beyond recognition


@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="no fp8")
@pytest.mark.parametrize("M", [16, 37])
def test_scaled_mm_is_the_product_of_rounded_operands(M, monkeypatch):
    """What the kernel computes, through another product, which is given what cuBLAS takes."""
    small_chunks(monkeypatch)
    args = case(M=M, dtype=torch.bfloat16)
    copy = copied(args["w"])
    honest, calls = torch._scaled_mm, []

    def watched(a, b, *, scale_a, scale_b, out_dtype, use_fast_accum, out):
        (rows, K), (_, N) = a.shape, b.shape
        assert K % 16 == 0 == N % 16 and a.stride(1) == 1 == b.stride(0)  # row-major, column-major
        assert a.stride(0) % 16 == 0 == b.stride(1) % 16 and out.is_contiguous() and out.dtype == out_dtype
        assert all(s.numel() == 1 and s.dtype == torch.float32 for s in (scale_a, scale_b))
        assert use_fast_accum == (a.dtype == E4M3) and b.dtype == E4M3
        calls.append((rows, N))
        return honest(
            a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=out_dtype, use_fast_accum=use_fast_accum, out=out
        )

    monkeypatch.setattr(torch, "_scaled_mm", watched)
    want = fp8_oracle(**args, softcap=CAPS["tanh"], upstream=0.3)
    with poisoned_allocations():
        got = evaluate(lm_head_loss.backends["scaled_mm"], args, 0.3, softcap=CAPS["tanh"], fp8=copy)
    assert calls == [(n, N) for n in [16] * (M // 16) + [M % 16] * (M % 16 > 0) for N in (112, 32)]
    for name, bound in {"loss": 1e-3, "dx": 0.02, "dw": 0.02}.items():
        assert error(got[name], want[name]) < bound, (name, error(got[name], want[name]))
    if DEVICE == "cpu":  # in the same order of roundings
        like = evaluate(lm_head_loss.backends["triton"], args, 0.3, softcap=CAPS["tanh"], fp8=copy)
        assert all(error(got[name], like[name].double()) < 0.005 for name in RESULTS)


def test_scaled_mm_is_the_kernel_otherwise():
    """Without fp8, with a sum, compiled."""
    args = case(dtype=torch.bfloat16, K=3)
    want, got = (evaluate(lm_head_loss.checked(b), args, 0.3, softcap=CAPS["tanh"]) for b in ("triton", "scaled_mm"))
    assert all(torch.equal(got[name], want[name]) for name in RESULTS)
    function, copy = lm_head_loss.checked("scaled_mm"), copied(args["w"])
    fill_dynamo_tables()
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    some, others = (micro_steps(f, torch.bfloat16, fp8=copy) for f in (function, compiled))
    assert all(torch.equal(some[name], others[name]) for name in some)
    kernel = micro_steps(lm_head_loss.checked("triton"), torch.bfloat16, fp8=copy)
    assert all(error(some[name], kernel[name].double()) < 0.005 for name in some)


def test_what_scaled_mm_cannot_take():
    h100, a100 = (Device("cuda", name, arch) for name, arch in (("H100", (9, 0)), ("A100", (8, 0))))
    assert "fp8" in lm_head_loss.obstacle("scaled_mm", (32, 32, 48), torch.bfloat16, a100)
    limits = lm_head_loss.backends["scaled_mm"].limits
    assert "multiple of 16, not 50257" in limits((32, 32, 50257), torch.bfloat16)
    assert "float32" in limits((32, 32, 48), torch.float32) and "16, not 24" in limits((32, 24, 48), torch.bfloat16)
    assert limits((32, 32, 48), torch.bfloat16) is None
    assert lm_head_loss.pick((32, 32, 48), torch.bfloat16, h100)[0] in ("triton", "ref")  # unmeasured


def test_fp8_with_a_given_scale_of_x(backend):
    """A scale that is too large loses small numbers, one that is too small saturates; both are used as they are."""
    args = case(dtype=torch.bfloat16)
    copy = copied(args["w"])
    dynamic = args["x"].abs().max().float() / E4M3_MAX
    results = {}
    for b in ("ref", backend):
        for factor in (1.0, 2.0**-3):
            options = {"fp8": copy, "softcap": CAPS["tanh"], "x_scale": dynamic * factor}
            results[b, factor] = evaluate(lm_head_loss.backends[b], args, 1.0, **options)
        same = evaluate(lm_head_loss.backends[b], args, 1.0, fp8=copy, softcap=CAPS["tanh"])
        assert torch.equal(results[b, 1.0]["dx"], same["dx"])
        assert error(results[b, 2.0**-3]["dx"], same["dx"]) > 0.05
    for factor in (1.0, 2.0**-3):
        for name in RESULTS:
            assert error(results[backend, factor][name], results["ref", factor][name]) < 0.02, name


@every_backend
def test_fp8_with_weights_of_both_signs(backend):
    """No gradient saturates: the largest is that of the sum of their sizes."""
    args = case(K=2, dtype=torch.bfloat16, ignored=0)
    args["weights"][:, 1] = -0.9 * args["weights"][:, 0]
    exact = evaluate(whole, args, 1.0, wide=True, softcap=CAPS["tanh"], reduction="sum")
    options = {"softcap": CAPS["tanh"], "fp8": copied(args["w"], backend), "reduction": "sum"}
    got = evaluate(lm_head_loss.backends[backend], args, 1.0, **options)
    assert error(got["dx"], exact["dx"]) < 0.12 and error(got["dw"], exact["dw"]) < 0.12


@every_backend
def test_fp8_compiles_as_one_graph(backend):
    args = case(dtype=torch.bfloat16)
    copy = copied(args["w"])
    function = lm_head_loss.backends[backend]
    fill_dynamo_tables()
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    want = evaluate(function, args, 0.5, softcap=CAPS["tanh"], fp8=copy)
    got = evaluate(compiled, args, 0.5, softcap=CAPS["tanh"], fp8=copy)
    assert all(torch.equal(got[name], want[name]) for name in RESULTS)


def test_fp8_losses_by_row_and_large_weights(backend):
    args = case(K=3, dtype=torch.bfloat16)
    args["weights"] *= 1000
    copy = copied(args["w"])
    with torch.no_grad():
        ref, triton = (
            lm_head_loss.backends[b](**args, fp8=copy, softcap=CAPS["tanh"], reduction="none") for b in ("ref", backend)
        )
    torch.testing.assert_close(triton, ref, rtol=2e-3, atol=0.1)
    ref, triton = (
        evaluate(lm_head_loss.backends[b], args, 1.0, fp8=copy, softcap=CAPS["tanh"]) for b in ("ref", backend)
    )
    assert all(error(triton[name], ref[name]) < 0.02 and triton[name].isfinite().all() for name in RESULTS)


@pytest.mark.skipif(DEVICE == "cuda", reason="pretends to compile for another GPU")
def test_an_older_gpu_is_told_that_it_has_no_fp8(monkeypatch):
    from kernels import op

    args = case(dtype=torch.bfloat16)
    copy = copied(args["w"])
    monkeypatch.setattr(op, "COMPILED_FOR", (8, 0))
    op.capability.cache_clear()
    try:
        with pytest.raises(UserError, match="lm_head_loss: fp8 needs a GPU of compute capability 8.9 or .*, not 8.0"):
            lm_head_loss.backends["triton"](**args, fp8=copy)
        with pytest.raises(UserError, match="quantise_weight: fp8 needs a GPU of compute capability 8.9"):
            quantise_weight.backends["triton"](args["w"], *copy)
        assert lm_head_loss.backends["triton"](**args).isfinite()
    finally:
        op.capability.cache_clear()


# memory -------------------------------------------------------------------


class Memory(torch.utils._python_dispatch.TorchDispatchMode):
    """Most bytes of storages alive that were made inside."""

    def __init__(self, *inputs):
        super().__init__()
        self.now = self.peak = 0
        self.known = {t.untyped_storage()._cdata: 0 for t in inputs if t is not None}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        import weakref

        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self.known:
                storage = t.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self.known[key] = size
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, key)
        return out

    def forget(self, key):
        self.now -= self.known.pop(key, 0)


@pytest.mark.parametrize("C", [768, 1536])
@pytest.mark.parametrize("backend, fp8", [("ref", False), ("triton", False), ("triton", True)])
def test_memory_at_64k_rows_and_50304_columns(backend, fp8, C, monkeypatch):
    """On tensors without storage, as on a GPU: beyond the inputs, dx and dw, logits and a few vectors."""
    M, V = 65536, 50304
    monkeypatch.setattr(module, "reference_rows", lambda V, device: most_rows(V, module.REFERENCE_COPIES * 4))
    launched = []

    class Launch:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.append(grid)

    for place, kernel in ((module, "_row_kernel"), (gemm, "_gemm_kernel"), (fp8_module, "_transpose_kernel")):
        monkeypatch.setattr(place, kernel, Launch())
    monkeypatch.setattr(module, "for_descriptor", lambda t: t)
    with torch.device("meta"):
        x, w = (torch.empty(n, C, dtype=torch.bfloat16) for n in (M, V))
        targets, weights, scale = torch.empty(M, 1, dtype=torch.int64), torch.empty(M, 1), torch.empty(())
        q = empty_fp8(w) if fp8 else (None, None, None)
    memory = Memory(x, w, targets, weights, scale, *q)
    with memory:
        if backend == "triton":
            _, _, dx, dw = module._by_chunks(
                x, w, targets, weights, scale, [30.0, 0.0, 7.5], V, True, *q, None, "triton"
            )
        else:
            _, dx, dw = module._reference(x, w, targets, weights, scale, CAPS["tanh"], V, None, None, None, True)
    assert launched or backend == "ref"
    assert dw.dtype == torch.float32
    extra = memory.peak - dx.nbytes - dw.nbytes
    operands = 2 * C * most_rows(V, 4) if fp8 else 0  # a chunk of x in e4m3, twice
    small = 32 * M + 16 * V * (backend == "ref") + operands
    assert LOGIT_BYTES // 2 < extra <= LOGIT_BYTES + small == 2**30 + small, extra


@pytest.mark.parametrize("bytes_per_logit", [2, 4], ids=["bf16", "fp8 or fp32"])
@pytest.mark.parametrize("V", range(32768, 65537, 4096))
def test_chunks_are_large_and_alike(V, bytes_per_logit):
    """None under 1,024 rows, the last at least half of the others, and all within the memory, for each size's rows and
    channels, and for numbers of rows that no chunk divides."""
    for C in range(768, 2049, 256):
        for M in {size.tokens for size in sizes.SIZES.values()} | {1, 1000, 2049, 10_007, 45_000, 99_991}:
            rows = chunk_rows(M, V, C, bytes_per_logit)
            every = [part.stop - part.start for part in module.chunks(M, rows)]
            assert sum(every) == M and set(every[:-1]) <= {rows} and rows % 128 == 0
            assert min(every) >= min(M, LEAST_ROWS) == min(M, 1024) and 2 * every[-1] >= max(every), (M, C, every)
            assert rows * V * bytes_per_logit <= LOGIT_BYTES == 2**30


def test_chunks_fill_the_multiprocessors():
    """No fewer waves of tiles are wasted by more or by fewer rows: the share of tiles in the waves of all products."""
    for M, V, C, bytes_per_logit in ((32768, 32768, 1536, 2), (32768, 32768, 1536, 4), (65536, 32768, 768, 4)):
        rows = chunk_rows(M, V, C, bytes_per_logit)
        for columns in (V, C):
            tiles = (rows // 128) * (columns // 256)
            assert tiles / (132 * module._waves(rows, columns)) > 0.95, (M, V, C, rows)


def test_a_vocabulary_too_large_for_the_least_rows_keeps_to_the_memory():
    assert chunk_rows(10**5, 2**20, 768, 4) == 256 and chunk_rows(10**5, 2**24, 768, 4) == 128


def test_the_prediction_of_the_plan_holds_on_a_cpu():
    args = case(M=300, C=32, V=4096, padded=4096, ignored=0)
    memory = Memory(args["x"], args["w"], args["targets"])
    with memory:
        got = evaluate(lm_head_loss.backends["ref"], args, 1.0, softcap=CAPS["tanh"])
    beyond = memory.peak - sum(t.nbytes for t in (args["x"], args["w"], got["dx"], got["dw"]))
    predicted = reference_bytes(300, 32, 4096, "cpu")
    assert 0.5 * predicted < beyond < 1.25 * predicted, (beyond, predicted)


def test_cost():
    """Of 4 rows, 8 channels and 16 columns: x and w once, with gradients twice; 12 bytes of target and weight."""
    assert lm_head_loss_cost((4, 8, 16), torch.bfloat16) == (2 * 4 * 8 * 16, 2 * (32 + 128) + 48)
    assert lm_head_loss_cost((4, 8, 16), torch.bfloat16, "mean", True) == (6 * 4 * 8 * 16, 2 * 2 * (32 + 128) + 48)
    assert lm_head_loss_cost((4, 8, 16), torch.float32, "mean", True)[1] == 2 * 4 * (32 + 128) + 48


# a small model in fp8 -----------------------------------------------------


def test_the_fp8_loss_curve_follows_fp32():
    """300 steps of a bigram model, its head in fp8 by rounding through the dtypes: within 1 % of fp32 at every tenth
    step."""
    V, C, M = 96, 32, 256
    g = torch.Generator().manual_seed(0)
    chain = torch.softmax(3 * torch.randn(V, V, generator=g), dim=1)

    def curve(fp8):
        g = torch.Generator().manual_seed(1)
        table = torch.randn(V, C, generator=g).requires_grad_()
        w = (0.02 * torch.randn(V, C, generator=g)).requires_grad_()
        optimizer = torch.optim.Adam((table, w), lr=0.02)
        losses, copy = [], empty_fp8(w.detach())
        for _ in range(300):
            tokens = torch.randint(V, (M,), generator=g)
            targets = torch.multinomial(chain[tokens], 1, generator=g)[:, 0]
            x = torch.nn.functional.rms_norm(table[tokens], (C,))
            quantise_weight.backends["ref"](w.detach(), *copy)
            loss = lm_head_loss.backends["ref"](x, w, targets, softcap=CAPS["tanh"], fp8=copy if fp8 else None)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    exact, rounded = curve(False), curve(True)
    assert exact[-10:].mean() < 0.75 * exact[0] and abs(exact[0].item() - math.log(V)) < 0.1
    apart = (rounded - exact).abs() / exact
    assert 1e-5 < apart[::10].max() < 0.01, apart.max()


# mutations ----------------------------------------------------------------

MUTATIONS = {
    "padded columns count": {"inside = full + offs < vocab\n": "inside = full + offs < columns\n"},
    "the last tile is left out": {"if full < vocab:": "if full < 0:"},
    "the first tiles are left out": {"0, full, BLOCK):\n        z =": "0, full, 2 * BLOCK):\n        z ="},
    "the gradient of padded columns stays": {"g = tl.where(start + offs < vocab, g, 0.0)": "g = g"},
    "the gradient of padded columns is not written": {"range(full, columns, BLOCK)": "range(full, vocab, BLOCK)"},
    "no target": {" * S - tl.sum(same, axis=1)": " * S"},
    "the last of equal targets only": {
        "t[:, None] == t[None, :]": "(t[:, None] == t[None, :]) & (ks[:, None] == ks[None, :])"
    },
    "weights are ones in the gradient": {"S = tl.sum(w, axis=0)": "S = tl.sum(tl.where(w == 0.0, 0.0, 1.0), axis=0)"},
    "weights are ones in the loss": {"0.0, w * loss)": "0.0, loss)"},
    "the softcap has no slope": {"g *= s - s * s": "g *= 1.0"},
    "the softcap has no slope at targets": {"g *= s_t - s_t * s_t": "g *= 1.0"},
    "the slope is not divided by the width": {'"steep": height / width if': '"steep": height if'},
    "the shift is left out": {"tl.fma(z, gain, offset)": "tl.fma(z, gain, 0.0)"},
    "no terms are relative to the largest": {"larger = tl.maximum(tops, x,": "larger = tl.maximum(0.0 * x, 0.0 * x,"},
    "the sum is not brought to the largest of all": {"totals *= tl.exp2((tops - top) * UNIT)": "totals *= 1.0"},
    "a difference of logarithms": {
        "loss = tl.log2(tl.div_rn(total, e_t)) * LN2": "loss = (tl.log2(total) - x_t) * LN2"
    },
    "any softcap has a fixed maximum": {" and abs(height) <= FIXED_HEIGHT": ""},
    "dx of the first chunk everywhere": {"dz, part, dx[chunk], dw,": "dz, part, dx[: len(dz)], dw,"},
    "dw of the last chunk alone": {"add=chunk.start > 0": "add=False"},
    "dw begins with what was there": {"add=chunk.start > 0": "add=True"},
    "the upstream gradient is one": {
        "* dloss).to(dx.dtype), torch.mul(dw, dloss,": ").to(dx.dtype), torch.mul(dw, 1.0,"
    },
    "a sum takes dw without the upstream gradient": {"dw_sum.addcmul_(dw, dloss)": "dw_sum.add_(dw)"},
    "a sum is overwritten": {"dw_sum.addcmul_(dw, dloss)": "dw_sum.copy_(dw * dloss)"},
    "the loss is 0.5 % off": {"return losses.sum() * scale, losses": "return losses.sum() * scale * 1.005, losses"},
    "the factor of the reduction is left out": {
        "factor, limit = scale, torch.finfo(x.dtype).max": "factor, limit = torch.ones_like(scale), "
        "torch.finfo(x.dtype).max"
    },
}
# one for each class of failure; the others run by `pytest -m mutations`
CLASSES = [
    "padded columns count",
    "the gradient of padded columns stays",
    "the last of equal targets only",
    "weights are ones in the gradient",
    "no terms are relative to the largest",
    "a difference of logarithms",
    "any softcap has a fixed maximum",
    "dx of the first chunk everywhere",
    "dw begins with what was there",
    "the upstream gradient is one",
    "the loss is 0.5 % off",
]


BARRIERS = {  # by what stands after each
    "before the gradient of a row": r"for start",
    "before the gradients of targets": r"same =",
}


@pytest.mark.skipif(DEVICE == "cuda", reason="races show in the interpreter")
@pytest.mark.parametrize("name", BARRIERS)
def test_a_missing_barrier_is_noticed(name, tmp_path):
    edit = Edit(rf"tl\.debug_barrier\(\)(.*\n +{BARRIERS[name]})", r"pass\1", within="_row_kernel")
    racing = mutant(module, [edit], tmp_path)
    with pytest.raises(Failed, match="no barrier"):
        evaluate(racing.lm_head_loss.backends["triton"], case(M=5), 1.0)


SMALL_CHUNKS = {
    "LOGIT_BYTES = 2**30": "LOGIT_BYTES = 0",
    "CHUNK_MULTIPLE = 128": "CHUNK_MULTIPLE = 16",
    "LEAST_ROWS = 1024": "LEAST_ROWS = 16",
}


def stress(op, monkeypatch):
    monkeypatch.setattr(gemm, "PROGRAMS_WITHOUT_GPU", 2)
    for K in (1, 3):
        check(case(M=40, K=K, dtype=torch.bfloat16), op=op, softcap=CAPS["sigmoid"])
    check(case(M=20, V=300, padded=304, dtype=torch.bfloat16), op=op, softcap=CAPS["tanh"])
    check(case(M=20, scale=40.0), op=op)
    for cap in TALL.values():
        check_confident_rows(op, cap)
    want, got = (
        micro_steps(o.checked(b), torch.float32, wide=b == "ref") for o, b in ((lm_head_loss, "ref"), (op, "triton"))
    )
    if any(error(got[name], t) > 1e-5 for name, t in want.items()):
        raise Failed("a sum")
    monkeypatch.setitem(op.backends["triton"].function.__globals__, "_row_config", lambda V, dtype: SHORT_TILES)
    for cap in ("tanh", "none"):
        check(case(M=5, V=150, padded=256, ignored=1), op=op, softcap=CAPS[cap])


@pytest.mark.skipif(DEVICE == "cuda", reason="a broken kernel may end the CUDA context of the other tests")
@pytest.mark.parametrize("name", mutations(MUTATIONS, always=CLASSES))
def test_a_broken_kernel_is_noticed(name, tmp_path, monkeypatch):
    broken = mutant(module, SMALL_CHUNKS | MUTATIONS[name], tmp_path).lm_head_loss
    with pytest.raises(Failed):
        stress(broken, monkeypatch)


GEMM_MUTATIONS = {
    "chunks overwrite dw": {"out_desc.atomic_add([m, n], acc)": "out_desc.store([m, n], acc)"},
    "the sum starts at one": {"acc = tl.zeros(": "acc = 1.0 + tl.zeros("},
    "the last rows of a chunk are left out": {"range(0, K, BLOCK_K)": "range(0, K - BLOCK_K + 1, BLOCK_K)"},
    "all tiles are those of the first rows": {"a_desc.load([k, m])": "a_desc.load([k, 0])"},
}


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
@pytest.mark.parametrize("name", GEMM_MUTATIONS)
def test_a_broken_gemm_is_noticed(name, tmp_path, monkeypatch):
    path = Path(mutant(gemm, GEMM_MUTATIONS[name], tmp_path).__file__)
    monkeypatch.syspath_prepend(tmp_path)
    imported = {"from kernels.gemm import": f"from {path.stem} import"}
    broken = mutant(module, SMALL_CHUNKS | imported, tmp_path).lm_head_loss
    monkeypatch.setattr(sys.modules[path.stem], "PROGRAMS_WITHOUT_GPU", 2)
    with pytest.raises(Failed):
        check(case(M=40, C=144, V=300, padded=304, dtype=torch.bfloat16), op=broken, softcap=CAPS["sigmoid"])


# csrc/lm_head_loss.cu

CUDA_MUTATIONS = {
    "no barrier before the gradients of targets": {"__syncthreads();  // before it": "//"},
    "a target's logit is read after the barriers": {
        "if (target >= 0) z_t = to_float(z[target]);": "",
        "const Term t = term<CAP>(z_t, p);\n        const float x_t": "if (target >= 0) z_t = to_float(z[target]);\n"
        "        const Term t = term<CAP>(z_t, p);\n        const float x_t",
    },
    "padded columns count": {
        "full = p.vocab / VEC": "full = (p.vocab + VEC - 1) / VEC",
        "if (p.vocab % VEC && thread": "if (false && thread",
    },
    "the last columns are left out": {"if (p.vocab % VEC && thread": "if (false && thread"},
    "columns beyond the last count": {"j < inside ? t.x : -INFINITE": "t.x"},
    "the gradient of padded columns stays": {"g[j] = 0.0f;\n": ";\n"},
    "the gradient of padded columns is not written": {"u < p.columns / WIDTH": "u < p.vocab / WIDTH"},
    "a vector of a batch is left out": {"i < BATCH; ++i)\n            if (first + i * threads < full) add":
                                        "i < BATCH - 1; ++i)\n            if (first + i * threads < full) add"},
    "rows follow each other as those of z": {"row * p.stride_out": "row * p.stride_z"},
    "the swizzle is that of writes alone": {"raw = kept[place<GROUP>(v)]": "raw = kept[v]"},
    "half of the warp is waited for": {"__shfl_sync(FULL_WARP, weight": "__shfl_sync(0xffffu, weight"},
    "the last of equal targets only": {"if (other == target) same": "if (k == thread) same"},
    "weights are ones in the gradient": {"const float S = *sum_of_weights": "const float S = p.K"},
    "weights are ones in the loss": {"weight * (loss * LN2)": "loss * LN2"},
    "the softcap has no slope": {"g[i * VEC + j] *= sigma - sigma * sigma;": ";"},
    "the softcap has no slope at targets": {"gradient *= t.sigma - t.sigma * t.sigma;": ";"},
    "the slope is not divided by the width": {"S * (*p.factor * p.steep)": "S * *p.factor"},
    "the shift is left out": {"__fmaf_rn(z, p.gain, p.offset)": "z * p.gain"},
    "no terms are relative to the largest": {"larger = fmaxf(larger, x[j])": "larger = 0.0f"},
    "the sum is not brought to the largest of all": {"power_of_two(relative<CAP>(top, largest))": "1.0f"},
    "a difference of logarithms": {"CAP == Cap::fixed ? log2f(__fdiv_rn(total, e_t)) : log2f(total)": "log2f(total)"},
    "sigmas of twelve bits": {"LEVELS = 65535.0f": "LEVELS = 4095.0f"},
    "the cubic is a little off": {"0.69326097f": "0.68f"},
    "the cubic's power of two is another": {"__float_as_uint(shifted) << 23": "__float_as_uint(shifted) << 22"},
    "NaN is clamped away": {"x > limit ? limit : x < -limit ? -limit : x": "fminf(fmaxf(x, -limit), limit)"},
    "gradients are truncated": {
        "store(out + u * WIDTH, g);": "for (float& x : g) x = __uint_as_float(__float_as_uint(x) & "
        "(sizeof(Out) == 2 ? 0xffff0000u : 0xffe00000u));\n            store(out + u * WIDTH, g);"
    },
    "every row is the first": {"row = blockIdx.x;": "row = 0 * blockIdx.x;"},
}  # fmt: skip
CUDA_CLASSES = [
    "no barrier before the gradients of targets",
    "a target's logit is read after the barriers",
    "padded columns count",
    "the swizzle is that of writes alone",
    "half of the warp is waited for",
    "sigmas of twelve bits",
    "NaN is clamped away",
]


def stress_rows(monkeypatch):
    for most in (module.MOST_SHARED, 0):
        monkeypatch.setattr(module, "MOST_SHARED", most)
        for dtype, out_dtype in INTO:
            for cap in ("sigmoid", "none", "at the limit", "beyond it"):
                check_rows(2003, dtype, out_dtype, cap, K=3)
            check_not_a_number("tanh", dtype, out_dtype)
    check_rows(20_001, torch.bfloat16, torch.bfloat16, "tanh")
    for cap in CAPS | TALL:
        check_confident_rows(lm_head_loss, (CAPS | TALL)[cap], backend="cuda")


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
@pytest.mark.parametrize("name", mutations(CUDA_MUTATIONS, always=CUDA_CLASSES))
def test_a_broken_cuda_kernel_is_noticed(name, tmp_path, monkeypatch, cuda):
    broken = mutant_cuda("lm_head_loss.cu", CUDA_MUTATIONS[name], tmp_path)
    monkeypatch.setattr("kernels.extension.module", lambda device: broken)
    assert noticed(lambda: stress_rows(monkeypatch))


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
def test_cuda_kernels_that_are_not_broken_pass(monkeypatch, cuda):
    stress_rows(monkeypatch)


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
def test_a_copy_that_is_not_broken_passes(tmp_path, monkeypatch):
    stress(mutant(module, SMALL_CHUNKS, tmp_path).lm_head_loss, monkeypatch)
