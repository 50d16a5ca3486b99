"""Attention: each backend against float64, windows to the key, which backend is taken by which facts, one graph.

FlashAttention 3 stands here as tests/flash_attention_3.py, FlexAttention without its device check and uncompiled.
"""

import dataclasses
import sys

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from bench.law import Failed, error, evaluate, judge, judge_rows, same_form
from kernels import attention as module
from kernels.attention import attention, attention_cost, attention_ref, visible
from kernels.dispatch import decide
from kernels.op import Device, UserError
from tests.flash_attention_3 import BACKWARD, FORWARD, installed
from tests.harness import DEVICE, LAYOUTS, check_op, flex_on_a_cpu, guarded, mutant, randn

H100 = Device("cuda", "NVIDIA H100 80GB HBM3", (9, 0))
A100 = Device("cuda", "NVIDIA A100-SXM4-80GB", (8, 0))
B200 = Device("cuda", "NVIDIA B200", (10, 0))
BF16, FP32 = torch.bfloat16, torch.float32
ADJACENT = [layout for layout in LAYOUTS if layout != "transposed"]  # channels, as the contract asks
FULL, SHORT = (32, 2048, 6, 6, 128, 2048), (32, 2048, 6, 6, 128, 513)

on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="stand-ins run on a CPU")


@pytest.fixture
def fa3():
    with installed() as calls:
        yield calls


@pytest.fixture
def cuda_build(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def inputs(T=48, H=4, G=2, D=16, B=2, window=None, scale=None, dtype=FP32, seed=0):
    make = randn(seed, dtype)
    return {"q": make(B, T, H, D), "k": make(B, T, G, D), "v": make(B, T, G, D), "window": window, "scale": scale}


def check_law(args, op=attention, layout="contiguous", backend="flex"):
    """The law for FlexAttention. Not `check_op`: it compiles itself, which what that watches would forbid, and runs on
    a GPU need not repeat."""
    upstream = {"y": guarded(randn(1, args["q"].dtype)(*args["q"].shape), layout, 4)}

    def fresh(convert):
        tensors = {name: t for name, t in args.items() if isinstance(t, Tensor)}
        return args | {name: convert(t, i).requires_grad_() for i, (name, t) in enumerate(tensors.items())}

    want = evaluate(attention_ref, fresh(lambda t, i: t.double()), {"y": upstream["y"].double()})
    like = evaluate(attention_ref, fresh(lambda t, i: t.clone()), upstream)
    got = evaluate(op.backends[backend], fresh(lambda t, i: guarded(t, layout, i)), upstream)
    same_form(like, got)
    for name, t in want.items():
        judge(f"{backend}: {name}", [error(got[name], t)], [error(like[name], t)], t.numel())
        judge_rows(f"{backend}: {name}", got[name], like[name], t)


def formula(q, k, v, window=None, scale=None):
    """Query by query."""
    groups, scale = q.size(2) // k.size(2), q.size(3) ** -0.5 if scale is None else scale
    y = torch.zeros_like(q)
    for t in range(q.size(1)):
        first = 0 if window is None else max(0, t - window)
        for h in range(q.size(2)):
            keys, values = (x[:, first : t + 1, h // groups] for x in (k, v))
            p = torch.softmax(scale * torch.einsum("bd,bsd->bs", q[:, t, h], keys), dim=-1)
            y[:, t, h] = torch.einsum("bs,bsd->bd", p, values)
    return y


# right ----------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 0, 1, 5, 11, 12, 40])
def test_the_reference_is_the_formula(window):
    args = inputs(T=13, dtype=torch.float64, window=window, scale=0.3 if window == 5 else None)
    torch.testing.assert_close(attention_ref(**args), formula(**args), atol=1e-12, rtol=1e-12)


@on_cpu
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("T", [1, 37, 48])
@pytest.mark.parametrize("window", [None, 0, 1, 7, "T-1", 100])
def test_flash_attention_3_keeps_the_law(fa3, dtype, T, window):
    args = inputs(T=T, window=T - 1 if window == "T-1" else window, dtype=dtype)
    check_op(attention, args, backend="fa3", compiled=window == 7, opcheck=window == 7)


@on_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (3, 1)], ids=str)
def test_flash_attention_3_takes_layouts_and_groups(fa3, layout, heads):
    args = inputs(37, *heads, D=24, window=9, scale=0.2, dtype=BF16)
    check_op(attention, args, backend="fa3", layout=layout)


@on_cpu
def test_flash_attention_3_gets_rows_at_multiples_of_16_bytes(fa3):
    """The stand-in refuses others, as TMA does."""
    args = {n: t[..., 1:17] if isinstance(t, Tensor) else t for n, t in inputs(D=18, window=9, dtype=BF16).items()}
    args = {n: t.requires_grad_() if isinstance(t, Tensor) else t for n, t in args.items()}
    upstream = randn(1, BF16)(2, 48, 4, 17)[..., 1:]
    got = evaluate(attention.backends["fa3"], args, {"y": upstream})
    plain = {n: t.detach().clone().requires_grad_() if isinstance(t, Tensor) else t for n, t in args.items()}
    want = evaluate(attention.backends["fa3"], plain, {"y": upstream.clone()})
    assert len(got) == 4 and all(torch.equal(got[name], t) for name, t in want.items())


@on_cpu
@pytest.mark.parametrize("window", [None, 0, 1, 100, 127, 255, 256, 400])
def test_flex_attention_keeps_the_law(monkeypatch, window):
    flex_on_a_cpu(monkeypatch)
    check_law(inputs(T=256, window=window))


@on_cpu
@pytest.mark.parametrize("layout", ADJACENT)
def test_flex_attention_takes_layouts_and_groups(monkeypatch, layout):
    flex_on_a_cpu(monkeypatch)
    for dtype in (FP32, BF16):
        check_law(inputs(128, 3, 1, window=30, scale=0.2, dtype=dtype), layout=layout)


@pytest.mark.parametrize("layout", ADJACENT)
@pytest.mark.parametrize("T, window", [(48, None), (37, 36), (37, 100)])
def test_sdpa_keeps_the_law(layout, T, window):
    check_op(attention, inputs(T, window=window, scale=0.2), backend="sdpa", layout=layout, compiled=window is None)


@pytest.mark.skipif(DEVICE != "cuda", reason="kernels of a GPU")
@pytest.mark.parametrize("backend", ["fa3", "flex", "sdpa"])
@pytest.mark.parametrize("window", [None, 0, 100, 128, 600])
def test_kernels_keep_the_law(backend, window):
    """On a GPU: each that can run there, at two head sizes and with groups."""
    for H, G, D in ((4, 4, 64), (6, 2, 128)):
        shape = (2, 640, H, G, D, visible(640, window))
        if attention.obstacle(backend, shape, BF16, Device.of(torch.device(DEVICE))) is None:
            check_law(inputs(640, H, G, D, window=window, dtype=BF16), backend=backend)


@on_cpu
def test_flash_attention_3_is_told_the_window_as_it_counts(fa3):
    expected = {None: (-1, -1), 0: (0, 0), 5: (5, 0), 46: (46, 0), 47: (-1, -1), 99: (-1, -1)}
    for window, sides in expected.items():
        fa3.clear()
        args = inputs(window=window, scale=None if window else 0.5)
        args["q"].requires_grad_()
        attention.backends["fa3"](**args).sum().backward()
        assert [(c["op"], c["window_size_left"], c["window_size_right"]) for c in fa3] == [
            ("fwd", *sides), ("bwd", *sides),
        ]  # fmt: skip
        assert {c["softmax_scale"] for c in fa3} == {0.25 if window else 0.5}
        assert not any(c.get("deterministic") for c in fa3)


@on_cpu
def test_gradients_of_flash_attention_3_repeat_where_that_is_asked_for(fa3):
    args = inputs()
    args["q"].requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        attention.backends["fa3"](**args).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert fa3[-1]["op"] == "bwd" and fa3[-1]["deterministic"]


@on_cpu
def test_flash_attention_3_keeps_its_operands_and_two_results(fa3):
    args = inputs(T=48, window=5, dtype=BF16)
    args = {name: t.requires_grad_() if isinstance(t, Tensor) else t for name, t in args.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        attention.backends["fa3"](**args)
    assert sorted(saved) == sorted([(2, 48, 4, 16), (2, 48, 2, 16), (2, 48, 2, 16), (2, 48, 4, 16), (2, 4, 48)])


# one graph ------------------------------------------------------------------


@on_cpu
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_flash_attention_3_is_one_node_of_a_graph(fa3, backend):
    def layers(q, k, v):
        y = attention.backends["fa3"](q, k, v, window=5)
        return attention.backends["fa3"](y.sin(), k, v)

    args = [t.requires_grad_() for t in inputs(dtype=BF16).values() if isinstance(t, Tensor)]
    upstream = randn(1, BF16)(2, 48, 4, 16)
    results = []
    torch.compiler.reset()
    for call in (layers, torch.compile(layers, fullgraph=True, backend=backend)):
        y = call(*args)
        results.append([y.detach(), *torch.autograd.grad(y, args, upstream)])
    for want, got in zip(*results):
        torch.testing.assert_close(got, want, atol=0.02, rtol=0.02)
    assert [c["op"] for c in fa3] == ["fwd", "fwd", "bwd", "bwd"] * 2


@on_cpu
def test_the_op_itself_is_one_graph_where_flash_attention_3_is_chosen(fa3, cuda_build, monkeypatch):
    """The package is looked for outside of the graph."""
    monkeypatch.setattr(Device, "of", torch.compiler.assume_constant_result(lambda device: H100))
    args = inputs(window=5, dtype=BF16)
    torch.compiler.reset()
    compiled = torch.compile(attention, fullgraph=True, dynamic=False, backend="aot_eager")
    assert torch.equal(compiled(**args), attention.backends["fa3"](**args))
    assert [c["op"] for c in fa3] == ["fwd", "fwd"]


@on_cpu
def test_masks_of_flex_attention_are_made_once(monkeypatch):
    flex_on_a_cpu(monkeypatch)
    made = []
    monkeypatch.setattr(module, "create_block_mask", lambda *a, **k: made.append(a[3:]) or create_block_mask(*a, **k))
    monkeypatch.setattr(module, "_block_masks", type(module._block_masks)())

    def layers(q, k, v):
        for window in (40, None, 40, 30):
            q = attention.backends["flex"](q, k, v, window=window)
        return q

    q, k, v, *_ = inputs(T=128).values()
    want = q
    for window in (40, None, 40, 30):
        want = attention_ref(want, k, v, window=window)
    ops = []

    def graph(gm, args):
        ops.extend(str(node.target) for node in gm.graph.nodes)
        return gm

    torch.compiler.reset()
    compiled = torch.compile(layers, fullgraph=True, backend=graph)
    for call in (compiled, layers, compiled):
        torch.testing.assert_close(call(q, k, v), want)
    assert made == [(128, 128)] * 3
    assert ops.count("flex_attention") == 4 and not any("arange" in name for name in ops)


# chosen by facts ------------------------------------------------------------


def chosen(shape, dtype=BF16, device=H100, wanted="auto"):
    return decide(attention, shape, dtype, device, wanted)


def test_without_the_package_windows_go_to_flex_and_the_rest_to_sdpa(cuda_build):
    for device in (A100, H100, B200):
        for dtype in (BF16, FP32):
            assert chosen(SHORT, dtype, device).backend == "flex"
            assert chosen(FULL, dtype, device).backend == "sdpa"
    assert "built from source" in chosen(FULL).others["fa3"]
    ragged = (32, 2000, 6, 6, 128, 513)
    assert chosen(ragged).backend == "ref" and "multiple of 128, not 2000" in chosen(ragged).reason
    assert chosen((32, 2000, 6, 6, 128, 2000)).backend == "sdpa"
    assert chosen(SHORT, device=Device("cpu", "cpu", None), dtype=FP32).backend == "ref"


def test_with_the_package_flash_attention_3_is_taken_where_it_can_run(cuda_build, fa3):
    for shape in (FULL, SHORT, (32, 2000, 6, 6, 128, 513)):
        assert (chosen(shape).backend, chosen(shape).reason) == ("fa3", "unmeasured here")
    for device, dtype, why in (
        (A100, BF16, "needs compute capability 9.0"),
        (B200, BF16, "needs compute capability 9.0"),
        (H100, FP32, "takes bfloat16, not float32"),
        (Device("cpu", "cpu", None), BF16, "needs an NVIDIA GPU"),
    ):
        choice = chosen(SHORT, dtype, device)
        assert choice.backend == ("ref" if device.type == "cpu" else "flex") and why in choice.others["fa3"]
        with pytest.raises(UserError, match=f"attention=fa3 cannot run .*{why}"):
            chosen(SHORT, dtype, device, "fa3")
    for D in (12, 264):
        why = f"multiple of 8 channels up to 256, not {D}"
        assert why in chosen((1, 128, 2, 2, D, 128)).others["fa3"]
        with pytest.raises(ValueError, match=why):
            attention.checked("fa3")(*(torch.ones(1, 128, 2, D, dtype=BF16) for _ in "qkv"))


@pytest.mark.parametrize(
    "schemas, why",
    [
        ({"backward": None}, "flash_attn_3::bwd, which the installed flash_attn_interface does not register"),
        ({"forward": FORWARD.replace("window_size_left", "window")}, "flash_attn_3::fwd .*: no window_size_left"),
        ({"backward": BACKWARD.replace("bool deterministic = False, ", "")}, "flash_attn_3::bwd .*: no deterministic"),
        (
            {"forward": FORWARD.replace("Tensor? page_table = None", "Tensor? page_table").replace(" = None", "", 12)},
            "page_table without a default",
        ),
    ],
)
def test_another_interface_is_refused_in_a_sentence(cuda_build, schemas, why):
    with installed(**schemas):
        assert chosen(SHORT).backend == "flex"
        with pytest.raises(UserError, match=why) as refused:
            chosen(SHORT, wanted="fa3")
    assert "\n" not in str(refused.value)


def test_a_measurement_beats_the_preference(cuda_build, fa3):
    from kernels.op import Measurement

    us = {"ref": 900.0, "fa3": 300.0, "flex": 250.0}
    op = dataclasses.replace(attention, measured=[Measurement((9, 0), SHORT, BF16, us, "H100 at abc")])
    assert op.pick(SHORT, BF16, H100)[0] == "flex"


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
    ],
)
def test_arguments_that_do_not_fit(change, says):
    good = inputs()
    for call in (attention, attention.checked("sdpa")):
        with pytest.raises(ValueError, match=says):
            call(**{**good, **{n: t.to(DEVICE) if isinstance(t, Tensor) else t for n, t in change.items()}})


def test_what_a_backend_cannot_take_is_refused_by_its_checked_form():
    for name, args, says in (
        ("sdpa", inputs(window=5), "sdpa takes no window, not 6 of 48 keys"),
        ("flex", inputs(), "flex takes T that is a multiple of 128, not 48"),
        ("fa3", inputs(), "fa3 takes bfloat16, not float32"),
    ):
        with pytest.raises(ValueError, match=says):
            attention.checked(name)(**args)


# cost -----------------------------------------------------------------------


@pytest.mark.parametrize("seen", [1, 5, 12, 13])
def test_visible_pairs_are_what_costs(seen):
    shape = (2, 13, 4, 2, 16, seen)
    mask = module.dense_mask(13, seen - 1, torch.device("cpu"))
    pairs = 13 * 14 // 2 if mask is None else int(mask.sum())
    assert attention_cost(shape, BF16)[0] == 4 * 16 * 2 * 4 * pairs
    assert attention_cost(shape, BF16, "plain", True)[0] == 10 * 16 * 2 * 4 * pairs
    args, tokens = inputs(T=13, D=16, dtype=BF16), 2 * 13
    touched = sum(t.nbytes for t in args.values() if isinstance(t, Tensor)) + args["q"].nbytes + 4 * tokens * 4
    assert attention_cost(shape, BF16)[1] == touched


# bugs, planted --------------------------------------------------------------

FA3_MUTATIONS = {
    "a window of one key more": {"else seen - 1, D**-0.5": "else seen, D**-0.5"},
    "a window of one key less": {"else seen - 1, D**-0.5": "else seen - 2, D**-0.5"},
    "no window": {"-1 if seen == T else seen - 1, D": "-1, D"},
    "not causal": {'"is_causal": True': '"is_causal": False'},
    "gradients by another scale": {"**grads, softmax_scale=scale": "**grads, softmax_scale=1.0"},
    "dk and dv changed places": {'grads["dk"], grads["dv"]': 'grads["dv"], grads["dk"]'},
    "rows as they lie": {"return t.clone(memory_format=torch.contiguous_format)": "return t"},
    "split keys": {"num_splits=1)": "num_splits=0)"},
    "the default scale": {"D**-0.5 if scale is None else scale)": "D**-0.5)"},
}


@on_cpu
@pytest.mark.mutations
@pytest.mark.parametrize("name", FA3_MUTATIONS)
def test_bugs_of_flash_attention_3_s_wrapper_are_found(name, fa3, tmp_path):
    op = mutant(module, FA3_MUTATIONS[name], tmp_path).attention
    broken = dataclasses.replace(attention, backends=attention.backends | {"fa3": op.backends["fa3"]})
    with pytest.raises((Failed, AssertionError)):
        for layout in ("contiguous", "transposed"):
            check_op(broken, inputs(37, window=9, scale=0.2), backend="fa3", layout=layout)


@on_cpu
@pytest.mark.mutations
@pytest.mark.parametrize(
    "edit",
    [
        {"in_window(q_idx, kv_idx, seen - 1)": "in_window(q_idx, kv_idx, seen)"},
        {"in_window(q_idx, kv_idx, seen - 1)": "in_window(q_idx, kv_idx, seen - 2)"},
        {"block_mask=mask, scale=scale": "block_mask=mask, scale=None"},
        {'name = f"{seq_len}, {seen}, {device}"': 'name = f"{seq_len}, {device}"'},
        {'name = f"{seq_len}, {seen}, {device}"': 'name = f"{seen}, {device}"'},
    ],
    ids=str,
)
def test_bugs_of_flex_attention_s_windows_are_found(edit, monkeypatch, tmp_path):
    mutated = mutant(module, edit, tmp_path)
    monkeypatch.setitem(sys.modules, mutated.__name__, mutated)  # Dynamo imports it to read its globals
    flex_on_a_cpu(monkeypatch, mutated)
    broken = dataclasses.replace(attention, backends=attention.backends | {"flex": mutated.attention.backends["flex"]})
    with pytest.raises((AssertionError, ValueError)):
        for T, window in ((128, 9), (128, 30), (256, 30)):
            check_law(inputs(T, window=window, scale=0.2), broken)


@pytest.mark.mutations
@pytest.mark.parametrize(
    "edit",
    [
        {"q_idx - kv_idx <= window": "q_idx - kv_idx < window"},
        {"min(window + 1, seq_len)": "min(window + 2, seq_len)"},
        {"kv_idx <= q_idx": "kv_idx < q_idx"},
    ],
    ids=str,
)
def test_bugs_of_the_reference_s_windows_are_found(edit, tmp_path):
    broken = mutant(module, edit, tmp_path).attention_ref
    with pytest.raises(AssertionError):
        for window in (5, 11):
            args = inputs(T=13, dtype=torch.float64, window=window)
            torch.testing.assert_close(broken(**args), formula(**args))
