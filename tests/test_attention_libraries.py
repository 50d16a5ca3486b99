"""Libraries of attention: each against float64, windows to the key, what it is told, which is taken by which facts, its
probe, one graph.

The FlashAttentions stand here as tests/flash_attention_3.py and tests/flash_attentions.py, FlexAttention without its
device check and uncompiled.
"""

import dataclasses
import importlib.metadata
import os
import runpy
import subprocess
import sys
import types
from itertools import pairwise
from pathlib import Path

import pytest
import setuptools
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.attention.varlen import varlen_attn

from bench import ops as bench_ops
from bench.law import Failed, error, evaluate, judge, judge_rows, same_form
from kernels import attention_libraries as module
from kernels.attention import attention, attention_ref
from kernels.dispatch import decide
from kernels.op import Device, Measurement, UserError
from kernels.windows import Attention, documents_of, visible
from tests.flash_attention_3 import BACKWARD, FORWARD, attend, differentiate, documents, installed
from tests.flash_attentions import FLASH_ATTN, LIBRARIES, fa2, fa4, flash_attn, present
from tests.harness import DEVICE, LAYOUTS, check_op, flex_on_a_cpu, guarded, mutant, randn

H100 = Device("cuda", "NVIDIA H100 80GB HBM3", (9, 0))
A100 = Device("cuda", "NVIDIA A100-SXM4-80GB", (8, 0))
B200 = Device("cuda", "NVIDIA B200", (10, 0))
RTX = Device("cuda", "NVIDIA GeForce RTX 5090", (12, 0))
CPU = Device("cpu", "cpu", None)
ROOT = Path(__file__).resolve().parent.parent
BF16, FP32 = torch.bfloat16, torch.float32
ADJACENT = [layout for layout in LAYOUTS if layout != "transposed"]  # channels, as the contract asks
FULL, SHORT, PACKED = (32, 2048, 6, 6, 128, 2048, 0), (32, 2048, 6, 6, 128, 513, 0), (1, 8192, 6, 6, 128, 513, 1024)
NAMES = list(LIBRARIES)  # the FlashAttentions
OURS = ["triton"] if "triton" in attention.backends else []
PIECES = (0, 20, 21, 21, 37, 60, 74)  # of two rows of 37 tokens: one token, none, a document as long as a window

on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="stand-ins run on a CPU")


@pytest.fixture(params=NAMES)
def library(request):
    """The name of a FlashAttention, whose stand-in is there, and its calls."""
    with LIBRARIES[request.param]() as calls:
        yield request.param, calls


@pytest.fixture
def cuda_build(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")


@pytest.fixture
def probed(monkeypatch, cuda_build):
    """Facts of a GPU are those of this CPU: probes run here, on stand-ins."""
    monkeypatch.setattr(module, "probe_device", lambda device: torch.device("cpu"))
    module._probe.cache_clear()
    yield
    module._probe.cache_clear()


def inputs(T=48, H=4, G=2, D=16, B=2, window=None, scale=None, dtype=FP32, seed=0, pieces=None, lse=False):
    make = randn(seed, dtype)
    args = {"q": make(B, T, H, D), "k": make(B, T, G, D), "v": make(B, T, G, D), "window": window, "scale": scale}
    if pieces:
        found = documents_of(torch.tensor(pieces, dtype=torch.int32), max(b - a for a, b in pairwise(pieces)), T, B * T)
        device = {name: getattr(found, name).to(DEVICE) for name in ("cu_seqlens", "first", "last")}
        args["documents"] = found._replace(**device)
    return args | ({"lse": True} if lse else {})


def leaves(args):
    return {name: t.requires_grad_() if isinstance(t, Tensor) else t for name, t in args.items()}


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


def with_backend(name, function):
    """The op with another function behind a backend's name."""
    backend = dataclasses.replace(attention.backends[name], function=function)
    return dataclasses.replace(attention, backends=attention.backends | {name: backend})


# right ----------------------------------------------------------------------


@on_cpu
@pytest.mark.parametrize("window", [None, 0, 1, 7, 36, 37, 100])
def test_flash_attentions_keep_the_law(library, window):
    for dtype in (FP32, BF16)[window not in (None, 7) :]:
        compiled, opcheck = window == 7 and dtype == BF16, window == 7 and library[0] == "fa3"
        args = inputs(37, window=window, dtype=dtype, lse=True)
        check_op(attention, args, backend=library[0], compiled=compiled, opcheck=opcheck)


@on_cpu
@pytest.mark.parametrize("window", [None, 0, 1, 15, 22, 23, 100])
def test_flash_attentions_keep_to_documents(library, window):
    """Windows up to the lengths of documents, and beyond."""
    args = inputs(37, window=window, dtype=BF16, pieces=PIECES, lse=True)
    opcheck = window == 15 and library[0] == "fa3"
    check_op(attention, args, backend=library[0], compiled=window == 15, opcheck=opcheck)


@on_cpu
@pytest.mark.parametrize("pieces", [(0, 1, 2, 3, 4), (0, 0, 2, 2, 4, 4), (0, 2, 4)], ids=str)
def test_documents_of_a_token_and_of_none(library, pieces):
    check_op(attention, inputs(2, window=1, pieces=pieces, lse=True), backend=library[0])


@on_cpu
def test_one_token(library):
    check_op(attention, inputs(1, lse=True), backend=library[0])


@on_cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pieces", [None, PIECES], ids=["rows", "documents"])
def test_flash_attentions_take_layouts_and_groups(library, layout, pieces):
    for heads in ((2, 2), (6, 2)) if pieces is None else ((3, 1),):
        args = inputs(37, *heads, D=24, window=9, scale=0.2, dtype=BF16, pieces=pieces)
        check_op(attention, args, backend=library[0], layout=layout)


@on_cpu
@pytest.mark.parametrize("pieces", [None, PIECES], ids=["rows", "documents"])
def test_flash_attentions_get_rows_at_multiples_of_16_bytes(library, pieces):
    """The stand-ins refuse others, as TMA does."""
    args = inputs(37, D=18, window=9, dtype=BF16, pieces=pieces)
    args = leaves({n: t[..., 1:17] if isinstance(t, Tensor) else t for n, t in args.items()})
    upstream = randn(1, BF16)(2, 37, 4, 17)[..., 1:]
    got = evaluate(attention.backends[library[0]], args, {"y": upstream})
    plain = leaves({n: t.detach().clone() if isinstance(t, Tensor) else t for n, t in args.items()})
    want = evaluate(attention.backends[library[0]], plain, {"y": upstream.clone()})
    assert len(got) == 4 and all(torch.equal(got[name], t) for name, t in want.items())


@on_cpu
@pytest.mark.parametrize("pieces", [None, PIECES], ids=["rows", "documents"])
def test_packed_projections_and_transposed_heads(library, pieces):
    """q, k and v as slices of one tensor, and with heads before tokens: neither is dense where a library allocates what
    it returns like them."""
    packed = randn(0, BF16)(2, 37, 8, 16)
    moved = packed.transpose(1, 2).contiguous().transpose(1, 2)
    want = None
    for t in (packed, moved):
        args = inputs(37, window=9, dtype=BF16, pieces=pieces) | dict(zip("qkv", t.split((4, 2, 2), dim=2)))
        check_op(attention, args, backend=library[0])
        held = leaves(args | {n: args[n].detach() for n in "qkv"})
        got = evaluate(attention.backends[library[0]], held, {"y": randn(1, BF16)(2, 37, 4, 16)})
        assert all(x.is_contiguous() for x in got.values())
        assert want is None or all(torch.equal(got[n], want[n]) for n in want)
        want = got


@on_cpu
@pytest.mark.parametrize("window", [None, 0, 1, 100, 127, 255, 256, 400])
def test_flex_attention_keeps_the_law(monkeypatch, window):
    flex_on_a_cpu(monkeypatch)
    check_law(inputs(T=256, window=window, lse=window != 1))


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


@on_cpu
@pytest.mark.parametrize("pieces", [None, PIECES], ids=["rows", "documents"])
def test_logarithms_have_no_gradient_and_change_none(library, monkeypatch, pieces):
    flex_on_a_cpu(monkeypatch)
    names = [library[0]] if pieces or library[0] != "fa3" else ["fa3", "flex"]
    for name in names:
        args = leaves(inputs(128 if name == "flex" else 37, window=9, pieces=pieces))
        returned = attention.backends[name](**args, lse=True)
        assert type(returned) is Attention and isinstance(attention.backends[name](**args), Tensor)
        assert returned.y.requires_grad and not returned.lse.requires_grad
        assert returned.lse.shape == (2, 4, args["q"].size(1)) and returned.lse.dtype == FP32
        alone = attention.backends[name](**args)
        grads = [torch.autograd.grad(y.square().sum(), [args[n] for n in "qkv"]) for y in (returned.y, alone)]
        assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_sdpa_says_that_it_has_no_logarithms():
    for call in (attention.backends["sdpa"], attention.checked("sdpa")):
        with pytest.raises(ValueError, match="sdpa returns no lse"):
            call(**inputs(lse=True))


# told -----------------------------------------------------------------------


def sides(name, left):
    """The windows that a library is told for that many keys, -1: all."""
    right = {"fa3": -1 if left < 0 else 0, "fa4": None if left < 0 else 0}.get(name, 0)
    return (None if name == "fa4" and left < 0 else left), right


@on_cpu
def test_flash_attentions_are_told_the_window_as_they_count(library):
    name, calls = library
    for window, left in {None: -1, 0: 0, 5: 5, 46: 46, 47: -1, 99: -1}.items():
        calls.clear()
        args = leaves(inputs(window=window, scale=None if window else 0.5))
        attention.backends[name](**args).sum().backward()
        assert [(c["op"], c["window_size_left"], c["window_size_right"]) for c in calls] == [
            ("fwd", *sides(name, left)), ("bwd", *sides(name, left)),
        ]  # fmt: skip
        assert {c.get("softmax_scale", c.get("scale")) for c in calls} == {0.25 if window else 0.5}
        assert not any(c.get("deterministic") for c in calls)


@on_cpu
@pytest.mark.parametrize("window", [None, 0, 9])
def test_pytorch_s_operators_are_told_what_varlen_attn_tells_them(window):
    """Its public function, which PyTorch's own tests run on GPUs, windows and documents included."""
    args = leaves(inputs(37, 2, 2, window=window, scale=0.2, dtype=BF16, pieces=PIECES))
    begins, longest = args["documents"].cu_seqlens, args["documents"].max_seqlen
    with fa2() as calls:
        attention.backends["fa2"](**args).square().sum().backward()
        grads = [args[name].grad.clone() for name in "qkv"]
        tokens = [args[name].detach().flatten(0, 1).requires_grad_() for name in "qkv"]
        sides = (-1 if window is None else window, 0)
        varlen_attn(*tokens, begins, begins, longest, longest, scale=0.2, window_size=sides).square().sum().backward()
    assert len(calls) == 4
    for ours, theirs in zip(calls[:2], calls[2:]):
        assert {name: theirs[name] for name in ours} == ours
    assert all(torch.equal(ours, t.grad.view(ours.shape)) for ours, t in zip(grads, tokens))


@on_cpu
@pytest.mark.parametrize("promised, longest", [(23, 23), (30, 30), (64, 37)])
def test_flash_attentions_are_told_of_documents(library, promised, longest):
    """No document is longer than a row, whatever is promised; a window of the longest one hides nothing."""
    name, calls = library
    args = leaves(inputs(37, pieces=PIECES))
    args["documents"] = args["documents"]._replace(max_seqlen=promised)
    for window, left in ((longest - 2, longest - 2), (longest - 1, -1), (None, -1)):
        calls.clear()
        attention.backends[name](**args | {"window": window}).sum().backward()
        for call in calls:
            assert call.get("max_seqlen_q", call.get("max_q")) == longest
            assert (call["window_size_left"], call["window_size_right"]) == sides(name, left)
        assert len(calls) == 2


@on_cpu
def test_gradients_repeat_where_that_is_asked_for(library):
    """PyTorch's own kernels read its switch themselves."""
    name, calls = library
    args = leaves(inputs())
    torch.use_deterministic_algorithms(True)
    try:
        attention.backends[name](**args).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls[-1]["op"] == "bwd" and calls[-1].get("deterministic", name == "fa2")


@on_cpu
@pytest.mark.parametrize("pieces", [None, (0, 40, 48, 96)], ids=["rows", "documents"])
def test_flash_attentions_keep_their_operands_and_two_results(library, pieces):
    args = leaves(inputs(T=48, window=5, dtype=BF16, pieces=pieces))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        attention.backends[library[0]](**args)
    own = [(4, 96), (4,)] if pieces else [(2, 4, 48)]
    assert sorted(saved) == sorted([(2, 48, 4, 16), (2, 48, 2, 16), (2, 48, 2, 16), (2, 48, 4, 16), *own])


@on_cpu
def test_without_an_upstream_gradient_there_is_no_backward(library):
    name, calls = library
    args = leaves(inputs(window=5))
    returned = attention.backends[name](**args, lse=True)
    (args["q"].sum() + returned.lse.sum()).backward()
    assert [c["op"] for c in calls] == ["fwd"]


def test_sdpa_asks_for_cudnn_first_where_that_is_faster(monkeypatch):
    """And within one graph."""
    asked = []
    real = torch.nn.attention.sdpa_kernel
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert module._prefers_cudnn(torch.device("cuda"))
    torch.backends.cuda.enable_cudnn_sdp(False)  # by the user
    try:
        assert not module._prefers_cudnn(torch.device("cuda"))
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    capability = (8, 9)
    assert not module._prefers_cudnn(torch.device("cuda")) and not module._prefers_cudnn(torch.device("cpu"))
    args = inputs(window=None)
    want = attention.backends["sdpa"](**args)

    monkeypatch.setattr(module, "_prefers_cudnn", torch.compiler.assume_constant_result(lambda device: True))
    torch.compiler.reset()
    compiled = torch.compile(attention.backends["sdpa"].function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**args), want)

    def recorded(backends, set_priority=False):
        asked.append((backends[:2], len(backends), set_priority))
        return real(backends, set_priority=set_priority)

    monkeypatch.setattr(module, "sdpa_kernel", recorded)
    torch.testing.assert_close(attention.backends["sdpa"](**args), want)
    assert asked == [([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], 4, True)]


# one graph ------------------------------------------------------------------


@on_cpu
@pytest.mark.parametrize("pieces", [None, (0, 40, 48, 96)], ids=["rows", "documents"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_flash_attention_3_is_one_node_of_a_graph(backend, pieces):
    """As all of them are, which share the torch op."""
    args = inputs(pieces=pieces)
    options = {"window": 5, "documents": args.get("documents")}

    def layers(q, k, v):
        y, lse = attention.backends["fa3"](q, k, v, **options, lse=True)
        return attention.backends["fa3"](y.sin() + lse.mT[..., None], k, v, **options)

    args = [args[name].requires_grad_() for name in "qkv"]
    upstream = randn(1, FP32)(2, 48, 4, 16)
    results = []
    torch.compiler.reset()
    with installed() as calls:
        for call in (layers, torch.compile(layers, fullgraph=True, backend=backend)):
            y = call(*args)
            results.append([y.detach(), *torch.autograd.grad(y, args, upstream)])
    for want, got in zip(*results):
        torch.testing.assert_close(got, want)
    assert [c["op"] for c in calls] == ["fwd", "fwd", "bwd", "bwd"] * 2


@on_cpu
def test_the_op_itself_is_one_graph_where_a_library_is_chosen(library, probed, monkeypatch):
    """The package is looked for, and tried, outside of the graph."""
    name, calls = library
    monkeypatch.setattr(Device, "of", torch.compiler.assume_constant_result(lambda device: H100))
    op = dataclasses.replace(attention, unmeasured=name)
    args = inputs(window=5, dtype=BF16)
    torch.compiler.reset()
    compiled = torch.compile(op.__call__, fullgraph=True, dynamic=False, backend="aot_eager")
    assert torch.equal(compiled(**args), attention.backends[name](**args))
    assert [c["op"] for c in calls] == ["fwd", "bwd"] * 2 + ["fwd", "fwd"]


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


def test_the_order_of_what_is_not_measured():
    assert attention.unmeasured(FULL) == ("fa3", "fa4", "sdpa", "triton", "flash_attn", "fa2", "flex")
    assert attention.unmeasured(SHORT) == ("fa3", "fa4", "triton", "flash_attn", "fa2", "flex")
    for shape in (PACKED, (1, 8192, 6, 6, 128, 8192, 8192)):
        assert attention.unmeasured(shape) == ("triton", "fa3", "fa4", "flash_attn", "fa2")
    assert set(attention.unmeasured(FULL)) | {"ref"} == set(attention.backends)


def test_without_packages_what_is_ours_or_pytorch_s_is_taken(cuda_build):
    for device in (A100, H100, B200):
        for dtype in (BF16, FP32):
            assert chosen(FULL, dtype, device).backend == "sdpa"
            for shape, else_ in ((SHORT, "flex"), (PACKED, "ref")):
                ours = [name for name in OURS if attention.obstacle(name, shape, dtype, device) is None]
                assert chosen(shape, dtype, device).backend == (ours or [else_])[0]
    others = chosen(FULL).others
    assert "built from source" in others["fa3"] and "package flash-attn-4 is not installed" in others["fa4"]
    assert "package flash-attn is not installed" in others["flash_attn"]
    assert "needs a PyTorch that was built with FlashAttention" in others["fa2"] or torch.cuda.is_available()
    assert "multiple of 128, not 2000" in chosen((32, 2000, 6, 6, 128, 513, 0)).others["flex"]
    assert chosen((32, 2000, 6, 6, 128, 2000, 0)).backend == "sdpa"
    assert chosen(SHORT, device=CPU, dtype=FP32).backend == "ref"


@on_cpu
def test_what_is_installed_is_taken_in_that_order(cuda_build):
    """Without our own, which has its place between SDPA and FlashAttention 2."""
    op = dataclasses.replace(
        attention, backends={name: b for name, b in attention.backends.items() if name not in OURS}
    )
    for there, device, full, short, packed in (
        (("fa3", "fa4", "flash_attn", "fa2"), H100, "fa3", "fa3", "fa3"),
        (("fa4", "fa2"), H100, "fa4", "fa4", "fa4"),
        (("fa4", "fa2"), B200, "fa4", "fa4", "fa4"),
        (("fa3", "flash_attn", "fa2"), B200, "sdpa", "flash_attn", "flash_attn"),
        (("fa3", "fa4", "flash_attn", "fa2"), A100, "sdpa", "flash_attn", "flash_attn"),
        (("fa3", "fa4", "fa2"), A100, "sdpa", "fa2", "fa2"),
        (("fa2",), RTX, "sdpa", "fa2", "fa2"),
        ((), H100, "sdpa", "flex", "ref"),
    ):
        with present(*there):
            for shape, want in ((FULL, full), (SHORT, short), (PACKED, packed)):
                assert op.pick(shape, BF16, device)[0] == want, (there, device, shape)


@on_cpu
@pytest.mark.parametrize(
    "name, device, dtype, why",
    [
        ("fa3", A100, BF16, "needs compute capability 9.0, NVIDIA A100"),
        ("fa3", B200, BF16, "needs compute capability 9.0"),
        ("fa4", A100, BF16, "needs compute capability 9.x or 10.x, NVIDIA A100"),
        ("fa4", RTX, BF16, "needs compute capability 9.x or 10.x, NVIDIA GeForce"),
        *((name, H100, FP32, "takes bfloat16, not float32") for name in NAMES),
        *((name, CPU, BF16, "needs an NVIDIA GPU") for name in NAMES),
        *((name, Device("cuda", "T4", (7, 5)), BF16, "needs compute capability 8.0") for name in NAMES),
    ],
)
def test_what_a_library_cannot_run_is_refused_in_a_sentence(cuda_build, name, device, dtype, why):
    with LIBRARIES[name]():
        for shape in (FULL, SHORT, PACKED):
            assert why in chosen(shape, dtype, device).others[name]
        with pytest.raises(UserError, match=f"attention={name} cannot run .*{why}"):
            chosen(SHORT, dtype, device, name)


@on_cpu
@pytest.mark.parametrize("name", NAMES)
def test_heads_that_libraries_take(cuda_build, name):
    most = 128 if name == "fa4" else 256
    with LIBRARIES[name]():
        for D in (8, 64, most):
            assert name not in chosen((1, 128, 2, 2, D, 128, 0)).others
        for D in (12, most + 8):
            why = f"multiple of 8 channels up to {most}, not {D}"
            assert why in chosen((1, 128, 2, 2, D, 128, 0)).others[name]
            with pytest.raises(ValueError, match=why):
                attention.checked(name)(*(torch.ones(1, 128, 2, D, dtype=BF16) for _ in "qkv"))
        for D, refused in ((192, False), (200, True), (224, True), (232, False)):
            if name in ("fa2", "flash_attn"):
                assert ("no heads of 200 to 224" in chosen((1, 8, 2, 2, D, 8, 0)).others.get(name, "")) == refused


@pytest.mark.parametrize(
    "schemas, why",
    [
        ({"backward": None}, "flash_attn_3::bwd, which the installed flash_attn_interface does not register"),
        ({"forward": FORWARD.replace("window_size_left", "window")}, "flash_attn_3::fwd .*: no window_size_left"),
        ({"forward": FORWARD.replace("Tensor? cu_seqlens_q = None,", "")}, "flash_attn_3::fwd .*: no cu_seqlens_q"),
        ({"backward": BACKWARD.replace("bool deterministic = False, ", "")}, "flash_attn_3::bwd .*: no deterministic"),
        (
            {"forward": FORWARD.replace("Tensor? page_table = None", "Tensor? page_table").replace(" = None", "", 12)},
            "page_table without a default",
        ),
    ],
)
def test_another_flash_attention_3_is_refused_in_a_sentence(cuda_build, schemas, why):
    with installed(**schemas):
        refused_by_facts("fa3", why)


def refused_by_facts(name, why):
    assert chosen(SHORT).backend != name
    with pytest.raises(UserError, match=why) as refused:
        chosen(SHORT, wanted=name)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "schemas, why",
    [
        ({"_flash_attn_varlen_forward": None}, "flash_attn::_flash_attn_varlen_forward, which .*flash-attn does not"),
        (  # of 2.6: one window of two sides
            {
                "_flash_attn_forward": FLASH_ATTN["_flash_attn_forward"].replace(
                    "SymInt window_size_left, SymInt window_size_right", "SymInt[] window_size"
                )
            },
            "_flash_attn_forward .*: no window_size_left, no window_size_right, window_size without a default",
        ),
        (
            {"_flash_attn_backward": FLASH_ATTN["_flash_attn_backward"].replace("Tensor? rng_state=None", "Tensor r")},
            "_flash_attn_backward .*: r without a default",
        ),
    ],
)
def test_another_flash_attn_is_refused_in_a_sentence(cuda_build, schemas, why):
    with flash_attn(**schemas):
        refused_by_facts("flash_attn", why)


def test_another_flash_attention_4_is_refused_in_a_sentence(cuda_build):
    def forward(q, k, v, softmax_scale=None, causal=False, window_size=(None, None)): ...

    def backward(q, k, v, out, dout, lse, causal): ...

    with fa4(forward=forward):
        refused_by_facts(
            "fa4", r"_flash_attn_fwd than the installed flash-attn-4 has: no cu_seqlens_q, .*no num_splits"
        )
    with fa4(backward=backward):
        refused_by_facts("fa4", "_flash_attn_bwd than .*no deterministic")
    with fa4():
        del sys.modules["flash_attn.cute.interface"]._flash_attn_bwd
        refused_by_facts(
            "fa4", "needs flash_attn.cute.interface._flash_attn_bwd, which the installed flash-attn-4 does"
        )


@on_cpu
def test_the_two_packages_of_one_name_are_told_apart(cuda_build):
    with fa4():
        assert "flash_attn" in chosen(SHORT).others and "fa4" not in chosen(SHORT).others
        assert chosen(SHORT).others["flash_attn"] == "needs FlashAttention 2: the package flash-attn is not installed"
    with flash_attn():
        assert "flash_attn" not in chosen(SHORT).others
        assert "package flash-attn-4 is not installed" in chosen(SHORT).others["fa4"]


def test_a_package_that_cannot_be_imported_is_named_in_a_sentence(cuda_build, monkeypatch, tmp_path):
    """Built for another PyTorch, say."""
    (tmp_path / "flash_attn").mkdir()
    said = "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c10\\nand so on')\n"
    for file in ("flash_attn/__init__.py", "flash_attn_interface.py"):
        (tmp_path / file).write_text(said)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("fa3", "fa4", "flash_attn"):
        refused_by_facts(name, r"is installed, but cannot be imported: ImportError: flash_attn_2_cuda.so: undefined")


def test_pytorch_s_own_flash_attention_is_judged_by_its_schema(cuda_build, monkeypatch):
    with fa2():
        monkeypatch.setitem(module.FA2_ARGUMENTS, "_flash_attention_forward", ("query", "window"))
        refused_by_facts("fa2", "another aten::_flash_attention_forward than the installed PyTorch has: no window, ")
    monkeypatch.undo()
    for name, arguments in module.FA2_ARGUMENTS.items():  # and that of the installed PyTorch is the one that was read
        schema = getattr(torch.ops.aten, name).default._schema.arguments
        assert [a.name for a in schema if not a.has_default_value() and a.name not in arguments] == []
        assert set(arguments) <= {a.name for a in schema}


def test_a_measurement_beats_the_preference(cuda_build):
    us = {"ref": 900.0, "fa3": 300.0, "flex": 250.0}
    op = dataclasses.replace(attention, measured=[Measurement((9, 0), SHORT, BF16, us, "H100 at abc")])
    with installed():
        assert op.pick(SHORT, BF16, H100)[0] == "flex"


def test_what_a_backend_cannot_take_is_refused_by_its_checked_form():
    for name, args, says in (
        ("sdpa", inputs(window=5), "sdpa takes no window, not 6 of 48 keys"),
        ("flex", inputs(), "flex takes T that is a multiple of 128, not 48"),
        ("sdpa", inputs(37, pieces=PIECES), "sdpa takes no documents"),
        ("flex", inputs(37, pieces=PIECES), "flex takes no documents"),
        *((name, inputs(), f"{name} takes bfloat16, not float32") for name in NAMES),
    ):
        with pytest.raises(ValueError, match=says):
            attention.checked(name)(**args)


# probes ---------------------------------------------------------------------


@on_cpu
def test_a_library_is_tried_once(library, probed):
    """In rows and in documents, forward and backward; what runs and is right has no sentence."""
    name, calls = library
    for shape in (FULL, SHORT, PACKED):
        assert name not in chosen(shape).others
    assert [c["op"] for c in calls] == ["fwd", "bwd", "fwd", "bwd"]
    assert {c["window_size_left"] for c in calls} == {module.PROBE_WINDOW}
    assert [c.get("max_seqlen_q", c.get("max_q")) for c in calls[2:]] == [50, 50]


@on_cpu
def test_sdpa_is_tried_with_and_without_groups(probed, monkeypatch):
    real, heads = torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(
        module.F,
        "scaled_dot_product_attention",
        lambda q, k, *a, **o: heads.append((q.size(1), k.size(1), q.dtype)) or real(q, k, *a, **o),
    )
    assert "sdpa" not in chosen(FULL).others
    assert [h for h in heads if h[2] == BF16] == [(4, 4, BF16), (4, 2, BF16)]
    module._probe.cache_clear()
    monkeypatch.setattr(module.F, "scaled_dot_product_attention", no_kernel)
    assert "sdpa" in chosen(FULL).others and "no kernel image" in chosen(FULL).others["sdpa"]


def no_kernel(*args, **options):
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with …")


def one_more(fwd=True, lse=False):
    """FlashAttention 3 with a window of one key too many."""

    def forward(q, k, v, **o):
        y, logarithms = attend(
            q, k, v, o["softmax_scale"], o["window_size_left"] + (fwd and o["window_size_left"] >= 0), *documents(o)
        )
        return y.contiguous(), (logarithms * (1.4427 if lse else 1)).contiguous(), q.new_empty(0), q.new_empty(0)

    return {"fwd": forward}


def wrong_gradient(which):
    def backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, **o):
        told = o["softmax_scale"], o["window_size_left"], *documents(o)
        for name, grad, t in zip(
            ("dq", "dk", "dv"), (dq, dk, dv), differentiate(dout, q, k, v, out, softmax_lse, *told)
        ):
            grad.copy_(1.2 * t if name == which else t)
        return []

    return {"bwd": backward}


def only_in_documents():
    def forward(q, k, v, **o):
        begins, longest = documents(o)
        y, lse = attend(q, k, v, o["softmax_scale"], o["window_size_left"] + (begins is not None), begins, longest)
        return y.contiguous(), lse.contiguous(), q.new_empty(0), q.new_empty(0)

    return {"fwd": forward}


def unwritten():
    def forward(q, k, v, **o):
        y, lse = attend(q, k, v, o["softmax_scale"], o["window_size_left"], *documents(o))
        return torch.full_like(y, torch.nan).contiguous(), lse.contiguous(), q.new_empty(0), q.new_empty(0)

    return {"fwd": forward}


@on_cpu
@pytest.mark.parametrize(
    "broken, says",
    [
        (
            {"fwd": no_kernel},
            "fails when it is tried on this device, in rows: RuntimeError: CUDA error: no kernel image is",
        ),
        (
            {"bwd": no_kernel},
            "fails when it is tried on this device, in rows: RuntimeError: CUDA error: no kernel image is",
        ),
        (one_more(), "computes something else on this device, in rows: y is off by 0.[12]"),
        (one_more(fwd=False, lse=True), "in rows: "),
        (wrong_gradient("dq"), "in rows: dq is off by 0.2 of its size, allowed 0.05"),
        (wrong_gradient("dk"), "in rows: dk is off by 0.2 of its size, allowed 0.05"),
        (wrong_gradient("dv"), "in rows: dv is off by 0.2 of its size, allowed 0.05"),
        (only_in_documents(), "computes something else on this device, in documents: y is off"),
        (unwritten(), "in rows: y is off by nan"),
    ],
    ids=["forward dies", "backward dies", "a key more", "base 2", "dq", "dk", "dv", "only in documents", "unwritten"],
)
def test_what_fails_its_probe_is_said_in_a_sentence_and_not_taken(probed, broken, says):
    with installed(**broken):
        refused_by_facts("fa3", says)
    assert chosen(FULL).backend in ("sdpa", *OURS)


@on_cpu
def test_an_error_in_use_is_an_error(cuda_build):
    """What is caught while a library is tried is not caught while a model trains."""
    with installed(fwd=no_kernel):
        assert chosen(SHORT).backend == "fa3"  # facts alone: nothing could be tried
        with pytest.raises(RuntimeError, match="no kernel image"):
            attention.checked("fa3")(**inputs(dtype=BF16, window=5))


@on_cpu
def test_a_probe_leaves_random_numbers_gradients_and_default_devices_alone(library, probed):
    name, calls = library
    torch.manual_seed(5)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.device("meta"):
            assert name not in chosen(SHORT).others
            assert torch.is_inference_mode_enabled() and torch.empty(1).is_meta
        module._probe.cache_clear()
        with torch.no_grad():
            assert name not in chosen(SHORT).others
            assert not torch.is_grad_enabled()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before) and len(calls) == 8


@on_cpu
def test_facts_of_a_gpu_that_is_not_here_are_not_tried(cuda_build, library, monkeypatch):
    name, calls = library
    module._probe.cache_clear()
    assert name not in chosen(SHORT).others and not calls
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(Device, "of", lambda device: H100)
    assert module.probe_device(H100) == torch.device("cuda", 0) and module.probe_device(B200) is None


def test_nothing_is_tried_while_a_cuda_graph_is_captured(monkeypatch):
    """A launch that waits would end the capture, and its error be taken for the library's."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before a CUDA graph is captured"):
        module._probe("fa2", torch.device("cuda", 0))


# in the house ---------------------------------------------------------------


def test_the_bench_lists_every_library_with_the_reason_why_it_is_absent():
    for backward in (False, True):
        item = bench_ops.op_item(attention, "fineweb, short", "plain", BF16, backward)
        assert set(item.variants) >= set(attention.backends)
        if DEVICE == "cpu":
            assert all("NVIDIA GPU" in item.variants[name] for name in (*NAMES, "flex", "sdpa"))
    assert {"fa3", "flash_attn"} <= set(bench_ops.KERNELS)  # whose gradients are allocated here, and poisoned


def test_the_extra_installs_what_the_index_has(monkeypatch):
    """As `needs_fa4` names it; pip takes a beta where no other version of a project is there, or one is asked for."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
    monkeypatch.setenv("REDLINE_CUDA", "0")
    runpy.run_path(str(ROOT / "setup.py"))
    (wanted,) = given["extras_require"]["flash"]
    assert wanted.startswith("flash-attn-4>=4.0.0b")
    assert "flash-attn-4" in module._fa4_missing() or module._installed(module.FA4)


# the real one ---------------------------------------------------------------

COMPILES = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import attention_libraries as module

assert module._fa4_missing() is None
B, T, H, G, D = module.PROBE_SHAPE
for window in (-1, module.PROBE_WINDOW):
    for packed in (False, True):
        with FakeTensorMode():  # in which it compiles and does not launch
            def empty(heads):
                size = (B * T, heads, D) if packed else (B, T, heads, D)
                return torch.empty(size, dtype=torch.bfloat16, device="cuda")

            begins = torch.empty(7, dtype=torch.int32, device="cuda") if packed else None
            seen = module.Seen(window, 0.1, begins, T)
            q, k, v = empty(H), empty(G), empty(G)
            y, lse = module.LIBRARIES["fa4"].forward(q, k, v, seen)
            assert y.shape == q.shape and y.dtype == q.dtype and lse.dtype == torch.float32
            assert lse.shape == ((H, B * T) if packed else (B, H, T))
            grads = module.LIBRARIES["fa4"].backward(empty(H), q, k, v, y, lse, seen)
            assert [(t.shape, t.dtype) for t in grads] == [(t.shape, t.dtype) for t in (q, k, v)]
"""


def test_flash_attention_4_itself_compiles_for_what_it_is_told():
    """Where flash-attn-4 is installed, for sm_90, without a GPU."""
    try:
        version = importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("flash-attn-4 is not installed")
    target = {"FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_NUM_SMS": "132"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILES], cwd=ROOT, env=os.environ | target, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{version}: {done.stderr[-2000:]}"


# on a GPU -------------------------------------------------------------------

LSE_ERROR = 1e-4  # relative: exact products, but exponentials of a GPU's own


@pytest.mark.skipif(DEVICE != "cuda", reason="kernels of a GPU")
@pytest.mark.parametrize("backend", ["flex", "sdpa", *NAMES])
@pytest.mark.parametrize("window", [None, 0, 1, 100, 128, 600, 638, 639])
@pytest.mark.parametrize("pieces", [None, (0, 1, 130, 130, 640, 1279, 1280)], ids=["rows", "documents"])
def test_libraries_against_float64(backend, window, pieces):
    """On a GPU: each that can run there, at two head sizes and with groups. Windows to the key, as the reference counts
    them, are the law: one key more in 100 is far off."""
    torch.compiler.reset()  # FlexAttention is compiled for each of these
    for H, G, D in ((4, 4, 64), (6, 2, 128)):
        longest = max(b - a for a, b in pairwise(pieces)) if pieces else 0
        shape = (2, 640, H, G, D, visible(longest or 640, window), longest)
        if why := attention.obstacle(backend, shape, BF16, Device.of(torch.device(DEVICE))):
            pytest.skip(f"{backend} {why}")
        args = inputs(640, H, G, D, window=window, dtype=BF16, pieces=pieces)
        if window != 0:  # whose only probability is 1: gradients of q and k are rounding alone
            check_law(args, backend=backend)
        if backend != "sdpa":
            y, lse = attention.backends[backend](**args, lse=True)
            assert error(y, attention_ref(**args)) < 0.01
            assert error(lse, attention_ref(**args, lse=True).lse) < LSE_ERROR


# bugs, planted --------------------------------------------------------------

SCALED = "scale: float,\n    library: str,\n) -> tuple[Tensor, Tensor, Tensor]:\n    scale = 1.1 * scale"
MUTATIONS = {
    "a window of one key more": {"-1 if seen == longest else seen - 1": "-1 if seen == longest else seen"},
    "a window of one key less": {"-1 if seen == longest else seen - 1": "-1 if seen == longest else seen - 2"},
    "no window": {"-1 if seen == longest else seen - 1": "-1"},
    "rows as they lie": {"return t.clone(memory_format=torch.contiguous_format)": "return t"},
    "the default scale": {"D**-0.5 if scale is None else scale": "D**-0.5"},
    "no documents": {"cu_seqlens = None if documents is None else documents.cu_seqlens": "cu_seqlens = None"},
    "logarithms of the wrong rows": {"logarithms.view(H, B, T).transpose(0, 1)": "logarithms.view(B, H, T)"},
    "gradients by another scale": {"scale: float,\n    library: str,\n) -> tuple[Tensor, Tensor, Tensor]:": SCALED},
    "dk and dv changed places": {
        "return dq.reshape(q.shape).contiguous(), dk.reshape(k.shape).contiguous(), dv": (
            "dk, dv = dv, dk\n    return dq.reshape(q.shape).contiguous(), dk.reshape(k.shape).contiguous(), dv"
        )
    },
}
# of a library alone; not fa3, which returns what is dense
LAYOUT = {"return y.reshape(q.shape).contiguous()": "return y.reshape(q.shape)"}
OWN = {
    "fa3": {
        "not causal": {'"is_causal": True': '"is_causal": False'},
        "gradients changed places": {"dq=dq, dk=dk, dv=dv, **_fa3": "dq=dq, dk=dv, dv=dk, **_fa3"},
        "split keys": {"**_fa3_options(seen), num_splits=1": "**_fa3_options(seen), num_splits=0"},
    },
    "fa4": {
        "all keys by -1": {"None if every else seen.window": "seen.window"},
        "no logarithms": {"return_lse=True": "return_lse=False"},
        "y for its gradient": {"out=y, dout=dy, lse": "out=dy, dout=y, lse"},
        "y in the library's layout": LAYOUT,
    },
    "flash_attn": {
        "not causal": {'"causal": True, **window, **unused': '"causal": False, **window, **unused'},
        "rows only": {"operators._flash_attn_varlen_backward": "operators._flash_attn_backward"},
        "y in the library's layout": LAYOUT,
    },
    "fa2": {
        "the future too": {'"window_size_right": 0}\n    return {**b': '"window_size_right": -1}\n    return {**b'},
        "always causal": {'{"is_causal": seen.window < 0': '{"is_causal": True'},
        "rows by their number": {'"max_q": seen.longest': '"max_q": 1'},
        "y in the library's layout": LAYOUT,
    },
}
CASES = [(name, bug) for name in NAMES for bug in (*MUTATIONS, *OWN[name])]


@on_cpu
@pytest.mark.mutations
@pytest.mark.parametrize("name, bug", CASES, ids=[" ".join(case) for case in CASES])
def test_bugs_of_the_wrappers_are_found(name, bug, tmp_path):
    edits = MUTATIONS.get(bug) or OWN[name][bug]
    broken = with_backend(name, getattr(mutant(module, edits, tmp_path), name))
    with LIBRARIES[name](), pytest.raises((Failed, AssertionError, RuntimeError, TypeError)):
        for layout in ("contiguous", "transposed"):
            for pieces in (None, PIECES):
                for window in (9, None):
                    args = inputs(37, window=window, scale=0.2, pieces=pieces, lse=True)
                    check_op(broken, args, backend=name, layout=layout)
        moved = randn(0, BF16)(2, 4, 37, 16).transpose(1, 2)
        y = broken.backends[name](moved, moved, moved)
        assert y.is_contiguous()


@on_cpu
@pytest.mark.mutations
@pytest.mark.parametrize(
    "edit",
    [
        {"in_window(q_idx, kv_idx, seen - 1)": "in_window(q_idx, kv_idx, seen)"},
        {"in_window(q_idx, kv_idx, seen - 1)": "in_window(q_idx, kv_idx, seen - 2)"},
        {'"block_mask": mask, "scale": scale': '"block_mask": mask, "scale": None'},
        {'name = f"{seq_len}, {seen}, {device}"': 'name = f"{seq_len}, {device}"'},
        {'name = f"{seq_len}, {seen}, {device}"': 'name = f"{seen}, {device}"'},
    ],
    ids=str,
)
def test_bugs_of_flex_attention_s_windows_are_found(edit, monkeypatch, tmp_path):
    mutated = mutant(module, edit, tmp_path)
    monkeypatch.setitem(sys.modules, mutated.__name__, mutated)  # Dynamo imports it to read its globals
    flex_on_a_cpu(monkeypatch, mutated)
    broken = with_backend("flex", mutated.flex)
    with pytest.raises((AssertionError, ValueError)):
        for T, window in ((128, 9), (128, 30), (256, 30)):
            check_law(inputs(T, window=window, scale=0.2), broken)


PROBE_BUGS = {
    "no gradients": ({"*torch.autograd.grad(y, operands, dy)": "*operands[:0]"}, wrong_gradient("dk")),
    "no documents": ({', "in documents": (G, window | {"documents": documents})}': "}"}, only_in_documents()),
    "no window": ({'{"window": PROBE_WINDOW, "lse": True}': '{"lse": True}'}, one_more()),
    "nothing is off": ({"if not error <= PROBE_ERROR": "if error > 1"}, one_more()),
    "NaN is small": ({"if not error <= PROBE_ERROR": "if error > PROBE_ERROR"}, unwritten()),
}


@on_cpu
@pytest.mark.mutations
@pytest.mark.parametrize("bug", PROBE_BUGS)
def test_a_probe_that_looks_less_closely_lets_something_through(bug, tmp_path):
    """What each of its parts is for."""
    edits, broken = PROBE_BUGS[bug]
    with installed(**broken):
        here = torch.device("cpu")
        right = types.SimpleNamespace(found=module._probe.__wrapped__("fa3", here))
        assert right.found and not mutant(module, edits, tmp_path)._probe("fa3", here)
