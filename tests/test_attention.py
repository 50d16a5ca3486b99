"""Attention: the reference against the formula, our kernels against the law: windows and documents to the key.

Other backends: tests/test_attention_libraries.py.
"""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

import kernels.op
from bench.law import Failed, evaluate
from kernels import attention as module
from kernels import windows
from kernels.attention import MAX_TILE, attention, attention_cost, attention_ref
from kernels.op import Device
from kernels.windows import documents_at, documents_of
from tests.harness import DEVICE, LAYOUTS, check_op, mutant, randn

H100 = Device("cuda", "NVIDIA H100 80GB HBM3", (9, 0))
BF16, FP32 = torch.bfloat16, torch.float32
ADJACENT = [layout for layout in LAYOUTS if layout != "transposed"]  # channels, as the contract asks
BULK, POINTERS = 16, 24  # channels of a head that bulk copies take, and that they do not
EDGES = (0, 1, 63, 64, 65, 127, 128, 129, 191)  # windows: those of tiles of 64 and 128


def inputs(T=150, H=2, G=1, D=BULK, B=1, window=None, scale=None, dtype=BF16, seed=0, **more):
    make = randn(seed, dtype)
    found = {"q": make(B, T, H, D), "k": make(B, T, G, D), "v": make(B, T, G, D), "window": window, "scale": scale}
    return found | {"lse": True} | more


def documents(*lengths, T=None, max_seqlen=None):
    """Of rows of T tokens, all in one row by default."""
    begins = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    total = int(begins[-1])
    found = documents_of(begins, max_seqlen or max(lengths), T or total, total)
    return type(found)(*(t.to(DEVICE) if isinstance(t, Tensor) else t for t in found))


def formula(q, k, v, window=None, scale=None, lengths=None, **_):
    """Query by query: y, and the logarithms (B, H, T)."""
    B, T, H, D = q.shape
    groups, scale = H // k.size(2), D**-0.5 if scale is None else scale
    begins = [0] if lengths is None else [sum(lengths[:i]) for i in range(len(lengths))]
    y, lse = torch.zeros_like(q), q.new_zeros(B, H, T)
    for b in range(B):
        for t in range(T):
            first = max(begin for begin in begins if begin <= t)
            first = first if window is None else max(first, t - window)
            for h in range(H):
                keys, values = (x[b, first : t + 1, h // groups] for x in (k, v))
                scores = scale * keys @ q[b, t, h]
                y[b, t, h], lse[b, h, t] = torch.softmax(scores, dim=-1) @ values, scores.logsumexp(0)
    return y, lse


# reference ------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 0, 1, 5, 11, 12, 40])
@pytest.mark.parametrize("lengths", [None, (1, 4, 8), (13,)])
def test_the_reference_is_the_formula(window, lengths):
    args = inputs(T=13, H=4, G=2, dtype=torch.float64, window=window, scale=0.3 if window == 5 else None)
    given = args | {"documents": documents(*lengths) if lengths else None}
    for got, want in zip(attention_ref(**given), formula(**args, lengths=lengths)):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_documents_of_several_rows_are_those_of_each():
    args = inputs(T=10, B=2, dtype=torch.float64, window=4)
    both = attention_ref(**args, documents=documents(3, 7, 0, 6, 4, T=10))
    for i, lengths in enumerate([(3, 7), (6, 4)]):
        row = {name: t[i : i + 1] if isinstance(t, Tensor) else t for name, t in args.items()}
        for got, want in zip(both, attention_ref(**row, documents=documents(*lengths))):
            torch.testing.assert_close(got[i : i + 1], want)


def rows_of_documents(seed, B=3, T=70):
    """Where documents begin in rows (B, T), the first token of a row or not, and their lengths."""
    begins = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < (0.02, 0.1, 0.6, 0.0)[seed % 4]
    edges = sorted({*range(0, B * T, T), *begins.flatten().nonzero().flatten().tolist(), B * T})
    return begins, [end - begin for begin, end in zip(edges, edges[1:])]


@pytest.mark.parametrize("seed", range(8))
def test_documents_are_found_where_they_begin(seed):
    begins, lengths = rows_of_documents(seed)
    found, want = documents_at(begins.to(DEVICE)), documents(*lengths, T=70)
    assert found.cu_seqlens is None and found.max_seqlen == 70 and found.first.dtype == found.last.dtype == torch.int32
    assert torch.equal(found.first, want.first) and torch.equal(found.last, want.last)


# kernels --------------------------------------------------------------------


@pytest.mark.parametrize("D", [BULK, POINTERS])
@pytest.mark.parametrize("window", [None, *EDGES, 192, 1000])
def test_windows_to_the_key_against_float64(window, D):
    # a single key's probability is 1, whatever q and k are: their gradients are rounding alone
    check_op(attention, inputs(T=193, window=window, D=D), no_grad=("q", "k") if window == 0 else ())


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 127, 128, 129, 256, 257])
def test_lengths_beside_those_of_tiles_against_float64(T):
    # a lone key's probability is 1: the gradients of its score are rounding alone
    for args in (inputs(T=T, window=70), inputs(T=T, B=2, H=1)):  # two rows that end within a tile
        check_op(attention, args, no_grad=("q", "k") if T == 1 else ())


@pytest.mark.parametrize(
    "lengths",
    [(150,), (1, 1, 148), (64, 64, 22), (63, 65, 22), (128, 22), (0, 0, 127, 0, 23, 0), (1,) * 20 + (130,)],
    ids=str,
)
@pytest.mark.parametrize("window", [None, 20])
def test_documents_to_the_token_against_float64(lengths, window):
    check_op(attention, inputs(window=window, documents=documents(*lengths)))


def test_documents_of_rows_are_read_through_all_of_them_against_float64():
    for D in (BULK, POINTERS):
        found = documents(100, 50, 0, 1, 2, 147, T=150, max_seqlen=150)
        args = inputs(B=2, H=4, G=2, D=D, window=90, documents=found)
        check_op(attention, args, compiled=D == BULK, opcheck=D == BULK)


def test_documents_of_unknown_number_against_float64():
    begins, _ = rows_of_documents(5)
    check_op(attention, inputs(70, 2, 1, B=3, window=50, documents=documents_at(begins.to(DEVICE))))
    with pytest.raises(ValueError, match="fa2 has to be told where documents begin"):
        attention.backends["fa2"](**inputs(70, B=3, documents=documents_at(begins.to(DEVICE))))


def test_whole_rows_are_one_document_each():
    """And give the same bits, since tiles are then the same."""
    plain = inputs(T=128, B=2, window=30)
    packed = plain | {"documents": documents(128, 128, T=128)}
    results = [evaluate(attention.backends["triton"], needing(args), upstream(args)) for args in (plain, packed)]
    assert len(results[0]) == 5 and all(torch.equal(results[1][name], t) for name, t in results[0].items())


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("layout", ADJACENT)
def test_groups_and_layouts_against_float64(heads, layout):
    check_op(attention, inputs(100, *heads, window=9, scale=0.2), layout=layout)


@pytest.mark.parametrize("D", [64, 96, 128, 40])
def test_sizes_of_heads_against_float64(D):
    check_op(attention, inputs(140, 2, 1, D, window=80), compiled=D == 96, opcheck=D == 96)


def test_full_precision_against_float64():
    check_op(attention, inputs(100, 4, 2, window=40, dtype=FP32, documents=documents(70, 30)), compiled=True)


def test_tiles_of_a_smaller_gpu(monkeypatch):
    monkeypatch.setattr(kernels.op, "COMPILED_FOR", (8, 0))
    kernels.op.capability.cache_clear()
    try:
        for D in (64, 128):
            check_op(attention, inputs(140, D=D, window=80, documents=documents(30, 110)))
    finally:
        kernels.op.capability.cache_clear()


def test_a_certain_winner_and_large_scores_against_float64():
    """Probabilities beyond 0.999, scores of thousands of either sign, keys that all weigh the same."""
    args = inputs(140, window=100)
    for scale in (3.0, 200.0, 1e-6, 2.0**-40):
        check_op(attention, args | {"scale": scale})
    # each query is the key of a token before it: what is left of its gradient is a difference of nearly equal numbers
    unit = torch.nn.functional.normalize(randn(7, FP32)(1, 140, 1, 128), dim=-1) * 1.2 * 128**0.5
    peaked = inputs(140, 1, 1, 128, window=100)
    check_op(attention, peaked | {"q": unit.roll(20, 1).to(BF16), "k": unit.to(BF16)})
    check_op(attention, args | {"q": -args["q"].abs(), "k": args["k"].abs(), "scale": 50.0})


def test_a_single_key_is_its_value():
    """The probability is 1 exactly, and its score has no gradient but rounding."""
    args = inputs(140, window=0, lse=False)
    assert torch.equal(attention.backends["triton"](**args), args["v"].expand(-1, -1, 2, -1))
    grads = evaluate(attention.backends["triton"], needing(args), upstream(args))
    assert all(grads[name].abs().max() < 1e-5 for name in ("dq", "dk")) and grads["dv"].abs().max() > 1


def test_what_is_beyond_a_row_does_not_matter():
    """NaN in the next row, which a tile's end would read."""
    args = inputs(140, B=2, window=50)
    for name in "qkv":
        args[name][1] = torch.nan
    args = needing(args)
    y = attention.backends["triton"](**args).y
    y[0].sum().backward()
    assert y[0].isfinite().all() and all(args[name].grad[0].isfinite().all() for name in "qkv")


def test_logarithms_have_no_gradient():
    found = attention.backends["triton"](**needing(inputs(48)))
    assert found.y.requires_grad and not found.lse.requires_grad


def test_bulk_copies_are_for_gpus_and_tensors_that_they_suit():
    q = torch.empty(2, 128, 3, 64, dtype=BF16)
    assert module._bulk((9, 0), q, q) and module._bulk((12, 0), q) and not module._bulk((8, 9), q)
    assert not module._bulk((9, 0), q.float()) and not module._bulk((9, 0), q[..., :48].contiguous())
    assert not module._bulk((9, 0), q[:, :127]) and module._bulk((9, 0), q[:1, :127])
    moved = torch.empty(q.numel() + 1, dtype=BF16)[1:].view(q.shape)  # begins beside a multiple of 16 bytes
    assert not module._bulk((9, 0), moved) and not module._bulk((9, 0), q, moved)


def test_operands_that_no_bulk_copy_takes_give_the_same_bits():
    """Upstream gradients beside a multiple of 16 bytes, forward by bulk copies, backward by pointers; then none."""
    args = needing(inputs(128, window=70))
    dy, copies = upstream(args)["y"], {}
    for name, t in [("dy", dy), *((n, args[n].detach()) for n in "qkv")]:
        copies[name] = torch.empty(t.numel() + 1, dtype=BF16, device=DEVICE)[1:].view(t.shape).copy_(t)
    want = evaluate(attention.backends["triton"], args, {"y": dy})
    got = evaluate(attention.backends["triton"], args, {"y": copies.pop("dy")})
    assert all(torch.equal(got[name], t) for name, t in want.items())
    moved = args | {n: t.requires_grad_() for n, t in copies.items()}
    got = evaluate(attention.backends["triton"], moved, {"y": dy})
    torch.testing.assert_close(got, want, atol=0.02, rtol=0.02)


def test_only_operands_and_two_results_are_kept():
    saved = []
    args = needing(inputs(48, H=4, G=2, B=2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        attention.backends["triton"](**args)
    assert sorted(saved) == sorted([(2, 48, 4, 16), (2, 48, 2, 16), (2, 48, 2, 16), (2, 48, 4, 16), (2, 4, 48)])


def needing(args):
    return {n: t.detach().clone().requires_grad_() if isinstance(t, Tensor) else t for n, t in args.items()}


def upstream(args):
    return {"y": randn(1, BF16)(*args["q"].shape)}


# work -----------------------------------------------------------------------


def steps_of(T, window=None, lengths=None):
    """Tiles that programs go through, of one head: forward, and for both gradients."""
    products = []
    honest = InterpreterBuilder.create_dot
    args = needing(inputs(T=T, H=1, window=window, documents=documents(*lengths) if lengths else None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", lambda *a, **k: products.append(0) or honest(*a, **k))
        y = attention.backends["triton"](**args).y
        forward = len(products)
        y.sum().backward()
    assert forward % 2 == 0
    return forward // 2, len(products) - forward


@pytest.mark.skipif(DEVICE != "cpu", reason="looks into the interpreter")
def test_only_tiles_with_visible_pairs_are_visited():
    n = 1024 // 128

    def both(tiles):
        """dq goes through the tiles of forward in three products, dk and dv through as many in four."""
        return tiles, 7 * tiles

    assert steps_of(1024) == both(sum(2 * (i + 1) for i in range(n)))
    # a window of 192 keys reaches into three tiles before the two of the diagonal, if there are any
    assert steps_of(1024, window=192) == both(2 + 4 + 5 * (n - 2))
    assert steps_of(1024, window=0) == both(2 * n)
    # documents as long as tiles cost what their own tiles cost, and no more for what lies before
    assert steps_of(1024, lengths=(128,) * 8) == both(2 * n)
    assert steps_of(1024, lengths=(512, 512)) == both(2 * (2 + 4 + 6 + 8))


# arguments, and what is chosen ----------------------------------------------


@pytest.mark.parametrize(
    "change, says",
    [
        ({"q": torch.ones(2, 48, 4)}, "q is .*expected"),
        ({"q": torch.ones(2, 48, 4, 16, dtype=torch.float16)}, "bfloat16 or float32"),
        ({"q": torch.ones(2, 0, 4, 16)}, "none of them 0"),
        ({"k": torch.ones(2, 48, 3, 16), "v": torch.ones(2, 48, 3, 16)}, "G divides 4 query heads"),
        ({"k": torch.ones(2, 47, 2, 16)}, "k is"),
        ({"v": torch.ones(2, 48, 4, 16)}, "v is"),
        ({"v": torch.ones(2, 48, 2, 16, dtype=BF16)}, "v is"),
        ({"k": torch.ones(2, 48, 16, 2).mT}, "k is .*adjacent channels"),
        ({"window": -1}, "window is -1"),
        ({"scale": 0.0}, "scale is 0.0; expected a number from 9e-13 to 1048576"),
        ({"scale": 1e-30}, "scale is 1e-30"),
        ({"scale": 2e6}, "scale is 2000000.0"),
        ({"scale": math.nan}, "scale is nan"),
        ({"documents": documents(48, 47, T=None)}, r"documents.first is \(95,\).*expected contiguous \(96,\) int32"),
        ({"documents": documents(48, 48)._replace(max_seqlen=0)}, "max_seqlen is 0"),
        ({"documents": documents(48, 48)._replace(cu_seqlens=torch.tensor([0, 96]))}, "cu_seqlens is .*int64"),
    ],
)
def test_arguments_that_do_not_fit(change, says):
    good = inputs(48, 4, 2, B=2, dtype=FP32)
    for call in (attention, attention.checked("ref")):
        with pytest.raises(ValueError, match=says):
            call(**{**good, **{n: t.to(DEVICE) if isinstance(t, Tensor) else t for n, t in change.items()}})


@pytest.mark.parametrize(
    "cu_seqlens, max_seqlen, says",
    [
        ([0, 5, 10, 20], 10, None),
        ([0, 5, 10, 20], 9, "a document has 10 tokens; expected at most max_seqlen, 9"),
        ([1, 10, 20], 10, "from 1 to 20; expected 0 to 20, rising"),
        ([0, 10, 19], 10, "from 0 to 19"),
        ([0, 12, 10, 20], 12, "rising"),
        ([0, 8, 20], 12, "no document begins .* token 10"),
        ([0], 10, "expected .documents . 1,. torch.int32"),
        ([0, 10, 20], 0, "max_seqlen is 0"),
    ],
)
def test_documents_that_are_none(cu_seqlens, max_seqlen, says):
    made = torch.tensor(cu_seqlens, dtype=torch.int32)
    if says is None:
        found = documents_of(made, max_seqlen, 10, 20)
        assert found.first.tolist() == [0] * 5 + [5] * 5 + [10] * 10
        assert found.last.tolist() == [4] * 5 + [9] * 5 + [19] * 10
        return
    with pytest.raises(ValueError, match=says):
        documents_of(made, max_seqlen, 10, 20)


def test_what_our_kernels_take():
    shape = (2, 100, 4, 2, 64, 100, 0)
    why = attention.backends["triton"].limits
    assert why(shape, BF16) is None and why((*shape[:6], 50), BF16) is None
    assert why(shape, FP32) is None and "not float64" in why(shape, torch.float64)
    assert "fewer than 2^31 heads of queries, not 2147483648" in why((2**20, 2**9, 4, 2, 64, 100, 0), BF16)
    for D in (8, 20, 136):
        assert f"multiple of 8 channels from 16 to 128, not {D}" in why((*shape[:4], D, 100, 0), BF16)


def test_tiles_end_with_a_row_where_they_are_copied_in_bulk():
    arches = ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
    for config in (module._forward_config, module._dq_config, module._dkv_config):
        for d, bulk, arch in ((d, bulk, arch) for d in (64, 128) for bulk in (True, False) for arch in arches):
            tile = config(d, bulk, BF16, arch) if config is module._dkv_config else config(BF16, arch)
            assert max(tile["BLOCK_M"], tile["BLOCK_N"]) <= MAX_TILE
    with pytest.raises(ValueError, match="a tile of 256 tokens"):
        module._tiles_of(torch.ones(1, 256, 1, 16), 256, True)


# cost -----------------------------------------------------------------------


@pytest.mark.parametrize("seen", [1, 5, 12, 13])
@pytest.mark.parametrize("longest", [0, 4, 13])
def test_visible_pairs_are_what_costs(seen, longest):
    shape = (2, 13, 4, 2, 16, min(seen, longest or 13), longest)
    lengths = [4, 4, 4, 1] if longest == 4 else [13]
    found = documents(*lengths, *lengths, T=13) if longest else None
    mask = windows.dense_mask(torch.empty(2, 13, 4, 16, device=DEVICE), seen - 1, found)
    pairs = 13 * 14 // 2 if mask is None else int(mask.sum()) // (mask.size(0) if longest else 1)
    assert attention_cost(shape, BF16)[0] == 4 * 16 * 2 * 4 * pairs
    assert attention_cost(shape, BF16, "plain", True)[0] == 10 * 16 * 2 * 4 * pairs
    args, tokens = inputs(T=13, H=4, G=2, B=2), 2 * 13
    touched = sum(t.nbytes for t in args.values() if isinstance(t, Tensor)) + args["q"].nbytes + 4 * tokens * 4
    assert attention_cost(shape, BF16)[1] == touched


def test_inputs_of_a_case_have_its_shape():
    for label, shape in attention.cases.items():
        B, T, *rest = shape
        small = (1, T // 8, *(min(n, 8) for n in rest[:3]), max(rest[3] // 8, 1), rest[4] // 8)
        made = attention.forms["plain"](randn(0, BF16), *small)
        assert attention.check(**made).shape == small, label


# bugs, planted --------------------------------------------------------------

KEY = "offs_n <= offs_m[:, None]"
MUTATIONS = {
    "a query does not see itself": {f"({KEY})": "(offs_n < offs_m[:, None])"},
    "a query sees the next key": {f"({KEY})": "(offs_n <= offs_m[:, None] + 1)"},
    "a window of one key less": {"(offs_n >= lowest[:, None])": "(offs_n > lowest[:, None])"},
    "a window of one key more": {"lowest = tl.maximum(offs_m - window, 0)": "lowest = offs_m - window - 1"},
    "the first tile left out": {"begin // BLOCK_N * BLOCK_N, full": "(begin // BLOCK_N + 1) * BLOCK_N, full"},
    "an edge taken for a whole tile, before": {"if (n < full) | (n + BLOCK_N - 1 > m)": "if n + BLOCK_N - 1 > m"},
    "an edge taken for a whole tile, after": {"if (n < full) | (n + BLOCK_N - 1 > m)": "if n < full"},
    "an edge one key too late": {"(n < full) |": "(n + 1 < full) |"},
    "documents see those before": {
        "lowest = tl.maximum(lowest, tl.load(first_ptr + offs_m, mask=offs_m < T, other=0))": "lowest = lowest + 0",
        "full = tl.maximum(full, tl.load(first_ptr + last))": "full = full + 0",
    },
    "a tile's first document is all of it": {"full = tl.maximum(full, tl.load(first_ptr + last))": "full = full + 0"},
    "the largest score forgotten": {"acc * shrink[:, None]": "acc"},
    "the sum not shrunk": {"total * shrink,": "total,"},
    "the scale left out of the largest score": {"scale * tl.max(s, axis=1)": "tl.max(s, axis=1)"},
    "logarithms to base 2": {"(top + tl.log2(total)) / LOG2_E": "(top + tl.log2(total))"},
    "a head's neighbours' keys": {"h // (H // G)": "h % G"},
    "delta left out of dq": {"ds = p * (dp - delta[:, None])": "ds = p * dp"},
    "delta left out of dk": {"ds = p * (dp - delta[None, :])": "ds = p * dp"},
    "dq not scaled": {"_store(dq_out, scale * acc,": "_store(dq_out, acc,"},
    "dk not scaled": {"_store(dk_out, scale * dk,": "_store(dk_out, dk,"},
    "dv scaled": {"_store(dv_out, dv,": "_store(dv_out, scale * dv,"},
    "gradients of one head of a group": {"tl.range(0, H // G * steps)": "tl.range(0, steps)"},
    "gradients of the first heads": {"h = g * (H // G) + i // steps": "h = i // steps"},
    "gradients end a tile early": {
        "steps = tl.cdiv(end - begin, BLOCK_M)": "steps = tl.cdiv(end - begin, BLOCK_M) - 1"
    },
    "gradients from beyond the window": {"highest = offs_n + window\n": "highest = offs_n + window + 1\n"},
    "gradients from within the window left out": {"highest = offs_n + window\n": "highest = offs_n + window - 1\n"},
    "gradients of the query itself left out": {
        "(offs_m[None, :] >= offs_n[:, None])": "(offs_m[None, :] > offs_n[:, None])"
    },
    "gradients of an edge as of a whole tile": {"if (m < last) | (m + BLOCK_M - 1 > full)": "if m < last"},
    "gradients of the diagonal as of a whole tile": {
        "if (m < last) | (m + BLOCK_M - 1 > full)": "if m + BLOCK_M - 1 > full"
    },
    "gradients from the next document": {
        "highest = tl.minimum(highest, tl.load(last_ptr + offs_n, mask=offs_n < T, other=0))": "highest = highest + 0",
        "full = tl.minimum(full, tl.load(last_ptr + n))": "full = full + 0",
    },
    "gradients of a tile's last document alone": {"end = tl.minimum(end, tl.load(last_ptr + last) + 1)": "end = n + 1"},
    "queries beyond the end": {"(t + row < T) & (offs_d < D)": "(t + row < T + 1) & (offs_d < D)"},
    "channels beyond the head": {"(t + row < T) & (offs_d < D)": "(t + row < T) & (offs_d < BLOCK_D)"},
    "bulk copies of ragged rows": {"(B == 1 or T % MAX_TILE == 0)": "True"},
    "first and last changed places": {"lse, delta, last, *(": "lse, delta, first, *("},
    "dk and dv changed places": {"for t in (k, v, dk, dv))": "for t in (k, v, dv, dk))"},
    "an upstream gradient as it lies": {"t = t.contiguous()": "t = t"},
    "another scale in backward": {"ctx.window, ctx.scale = inputs": "ctx.window, _ = inputs; ctx.scale = 0.1"},
}


CONTRACTED = {
    "p = tl.exp2(s * scale - top[:, None])": "p = tl.exp2((s.to(tl.float64) * tl.full((BLOCK_M, 1), scale, tl.float32)"
    ".to(tl.float64) - top[:, None].to(tl.float64)).to(tl.float32))"
}


@pytest.mark.parametrize("D", [16, 64, 128])
@pytest.mark.parametrize("packed", [False, True])
def test_a_tile_without_visible_keys_in_fused_arithmetic(D, packed, tmp_path):
    """GPUs round s * scale - top once, where the interpreter rounds the product too: in one operation what hides a key
    must still cancel to 0. With -1e30 it leaves up to 1e21, whose exponential is infinite."""
    args = inputs(300, 1, 1, D, **({"documents": documents(200, 100)} if packed else {"window": 70}))
    check_op(fused(CONTRACTED, tmp_path), args)
    if D != 128:  # where the rounding is upward
        with pytest.raises(Failed):
            check_op(fused(CONTRACTED | {"tl.constexpr(-(2.0**100))": "tl.constexpr(-1.0e30)"}, tmp_path), args)


def fused(edits, folder):
    op = mutant(module, edits, folder).attention
    return dataclasses.replace(op, backends=op.backends | {"ref": attention.backends["ref"]})


@pytest.mark.mutations
@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_bugs_are_found(name, tmp_path):
    broken = fused(MUTATIONS[name], tmp_path)
    with pytest.raises((Failed, AssertionError, ValueError, RuntimeError)):
        packed = inputs(200, 4, 2, window=70, scale=0.4, documents=documents(20, 100, 80))
        check_op(broken, packed, layout="rows apart")
        check_op(broken, inputs(200, documents=documents(150, 50)))
        check_op(broken, inputs(100, 3, 1, POINTERS, B=2, scale=0.4))
        check_op(broken, inputs(100, B=2))
        check_op(broken, inputs(193, window=127, scale=0.4))


@pytest.mark.mutations
@pytest.mark.parametrize(
    "edit",
    [
        {"q_idx - kv_idx <= window": "q_idx - kv_idx < window"},
        {"min(window + 1, seq_len)": "min(window + 2, seq_len)"},
        {"kv_idx <= q_idx": "kv_idx < q_idx"},
        {"(i >= first[..., None])": "(i > first[..., None])"},
        {"- T * torch.arange(B, device=q.device)[:, None]": ""},
        {"right=True": "right=False"},
        {"cu_seqlens[mine + 1] - 1": "cu_seqlens[mine + 1]"},
    ],
    ids=str,
)
def test_bugs_of_windows_are_found(edit, monkeypatch, tmp_path):
    mutated = mutant(windows, edit, tmp_path)
    monkeypatch.setattr("kernels.attention.dense_mask", mutated.dense_mask)
    monkeypatch.setattr("tests.test_attention.documents_of", mutated.documents_of)
    with pytest.raises((AssertionError, RuntimeError, Failed)):
        for window in (5, 11):
            test_the_reference_is_the_formula(window, (1, 4, 8))
        test_documents_of_several_rows_are_those_of_each()
        test_documents_to_the_token_against_float64((64, 0, 64, 22), 20)
