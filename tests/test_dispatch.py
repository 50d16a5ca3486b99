"""Backends are chosen by facts, with a reason; what was forced is honoured or refused in a sentence that helps."""

import dataclasses
import json
import re
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from bench.law import named
from kernels import dispatch, sizes, tile
from kernels.dispatch import Backends, decide
from kernels.op import Backend, Device, Measurement, Op, Problem, UserError, needs_gpu, needs_nothing, needs_triton
from kernels.ops import BY_NAME, OPS
from kernels.rms_norm import rms_norm
from tests.flash_attentions import LIBRARIES, present
from tests.harness import DEVICE, evaluate, flex_on_a_cpu, randn

H100 = Device("cuda", "NVIDIA H100 80GB HBM3", (9, 0))
V100 = Device("cuda", "Tesla V100", (7, 0))
CPU = Device("cpu", "cpu", None)
BF16 = torch.bfloat16
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def cuda_build(monkeypatch):
    """What a machine with a GPU has: a CUDA build of PyTorch, and no interpreter."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def made_up(*names, **options):
    """An op whose backends (default: a reference and two kernels) return their names."""

    def limits(shape, dtype):
        return None if shape[1] % 8 == 0 else f"takes multiples of 8, not {shape[1]}"

    def check(x):
        if x.dim() != 2:
            raise ValueError(f"made_up: x has {x.dim()} dimensions")
        return Problem(tuple(x.shape), x.dtype, x.device)

    needs = {"triton": needs_triton, "ref": needs_nothing}
    backends = {
        name: Backend(lambda x, name=name: name, needs.get(name, needs_gpu), *([] if name == "ref" else [limits]))
        for name in names or ("ref", "triton", "cuda")
    }
    return Op("made_up", ("M", "N"), {}, {}, lambda *a: (0, 0), check, backends, **options)


def test_a_cpu_runs_the_reference():
    choice = decide(made_up(), (8, 8), BF16, CPU)
    assert choice.backend == "ref" and "CPU" in choice.reason
    assert set(choice.others) == {"triton", "cuda"}


def test_a_gpu_without_measurements_runs_triton_and_says_so():
    choice = decide(made_up(), (8, 8), BF16, H100)
    assert choice.backend == "triton"
    assert choice.reason == "unmeasured here; cuda is taken once it was measured faster"
    assert decide(made_up("ref", "triton"), (8, 8), BF16, H100).reason == "unmeasured here"
    assert decide(made_up("fa3", "ref", "varlen", "triton"), (8, 8), BF16, H100).backend == "triton"
    assert decide(made_up("varlen", "ref", "fa3"), (8, 8), BF16, H100).backend == "varlen"  # the first that is declared


def test_an_op_may_prefer_backends_by_shape():
    """The first in its order that can run, whatever the order of declaration."""

    def preferred(shape):
        return ("elsewhere", "cuda", "triton") if shape[0] > 8 else ("triton", "cuda")

    op = made_up(unmeasured=preferred)
    assert decide(op, (16, 8), BF16, H100).backend == "cuda" and decide(op, (8, 8), BF16, H100).backend == "triton"
    assert decide(op, (16, 9), BF16, H100).backend == "ref" and decide(op, (16, 8), BF16, CPU).backend == "ref"
    op.backends["cuda"] = dataclasses.replace(op.backends["cuda"], needs=lambda device: "needs what is not there")
    assert decide(op, (16, 8), BF16, H100).backend == "triton"
    one = made_up(unmeasured="cuda")
    assert decide(one, (8, 8), BF16, H100).backend == "cuda"


@pytest.mark.parametrize(
    "device, shape, why", [(V100, (8, 8), "compute capability 8.0"), (H100, (8, 9), "multiples of 8")]
)
def test_what_a_kernel_cannot_run_goes_to_the_reference_with_the_reason(device, shape, why):
    choice = decide(made_up(), shape, BF16, device)
    assert choice.backend == "ref" and why in choice.reason
    with pytest.raises(UserError, match=f"{why}.*available there: ref"):
        decide(made_up(), shape, BF16, device, "triton")


def test_a_cpu_build_of_pytorch_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    choice = decide(made_up(), (8, 8), BF16, H100)
    assert choice.backend == "ref" and "CUDA build" in choice.reason


def test_measurements_decide_by_the_nearest_shape():
    def m(shape, capability=(9, 0), dtype=BF16, **us):
        return Measurement(capability, shape, dtype, us, "H100 at abc")

    op = made_up(
        measured=[
            m((1024, 128), ref=5.0, triton=9.0),
            m((65536, 1024), ref=9.0, triton=5.0, cuda=4.5),
            m((65536, 2048), capability=(8, 0), ref=1.0, triton=5.0),
            m((65536, 2048), dtype=torch.float32, ref=1.0, triton=5.0),
        ]
    )
    assert decide(op, (2048, 128), BF16, H100).backend == "ref"
    choice = decide(op, (65536, 2048), BF16, H100)
    assert choice.backend == "cuda" and "M=65536 N=1024" in choice.reason and "H100 at abc" in choice.reason
    assert decide(op, (65536, 2048), BF16, Device("cuda", "L4", (8, 9))).reason.startswith("unmeasured here")
    # the fastest of those that can run it
    assert decide(op, (65536, 2049), BF16, H100).backend == "ref"


def test_a_forced_backend_is_taken():
    op = made_up("ref", "triton", "cublas")
    for name in op.backends:
        choice = decide(op, (8, 8), BF16, H100, name)
        assert (choice.backend, choice.reason) == (name, "forced")
        assert op.checked(name)(torch.ones(8, 8)) == name


def test_the_interpreter_counts_as_triton_on_a_cpu(monkeypatch):
    with pytest.raises(UserError, match="rms_norm=triton cannot run on cpu.*TRITON_INTERPRET.*available there: ref"):
        decide(rms_norm, (8, 8), BF16, CPU, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert decide(rms_norm, (8, 8), BF16, CPU, "triton").backend == "triton"
    assert decide(rms_norm, (8, 8), BF16, CPU).backend == "ref"
    with pytest.raises(UserError, match="float64"):
        decide(rms_norm, (8, 8), torch.float64, CPU, "triton")


@pytest.mark.parametrize(
    "request_, says",
    [
        ("fast", "unknown backend 'fast'"),
        ("rms_norm=fast", "unknown backend 'fast'"),
        ("softmax=triton", "unknown op 'softmax'; expected one of .*rms_norm"),
        ("rms_norm=cublas", "rms_norm has no cublas backend; rms_norm has ref, triton, cuda"),
        ("tpu", "no op has a tpu backend; expected auto, ref, triton"),
        ("", "unknown backend ''"),
    ],
)
def test_requests_that_mean_nothing(request_, says):
    with pytest.raises(UserError, match=says):
        dispatch.parse(request_)


def test_a_backend_that_one_op_has_can_be_requested(monkeypatch):
    """Of all ops, where it binds that one, or of that op; not of another."""
    op = made_up("ref", "triton", "cublas")
    monkeypatch.setattr(dispatch, "OPS", (rms_norm, op))
    monkeypatch.setattr(dispatch, "BY_NAME", {"rms_norm": rms_norm, "made_up": op})
    monkeypatch.setattr(Device, "of", lambda device: H100)
    for request in ("cublas", "made_up=cublas"):
        backends = Backends(request, device=torch.device("cpu"), dtype=BF16)
        assert backends.choose(op, 8, 8)(torch.ones(8, 8)) == "cublas"
        backends.choose(rms_norm, 8, 8)
        assert [c.backend for c in backends.choices] == ["cublas", "triton"]
    with pytest.raises(UserError, match="rms_norm has no cublas backend; rms_norm has ref, triton, cuda"):
        dispatch.parse("rms_norm=cublas")


def test_requests_combine():
    assert dispatch.parse("auto") == {"*": "auto"}
    assert dispatch.parse("triton, rms_norm=ref") == {"*": "triton", "rms_norm": "ref"}


def test_several_calls_are_those_that_were_chosen_for():
    """One function for calls of several backends, each with its own; another number of calls is refused."""
    ran = []
    op = made_up("ref", "triton")
    for name in op.backends:
        op.backends[name] = dataclasses.replace(
            op.backends[name], function=lambda x, name=name: ran.append((name, x.size(0)))
        )
    op.backends["triton"] = dataclasses.replace(op.backends["triton"], many=lambda calls: ran.append(len(calls)))
    backends = Backends("auto", device=torch.device("cpu"), dtype=BF16)
    backends.device = H100
    several = backends.choose_many(op, [((8, 8), BF16), ((4, 9), BF16), ((16, 8), BF16)])
    calls = [{"x": torch.ones(shape, dtype=BF16)} for shape in ((8, 8), (4, 9), (16, 8))]
    several(calls)
    assert ran == [2, ("ref", 4)]
    with pytest.raises(ValueError, match="2 calls; expected 3"):
        several(calls[:2])
    with pytest.raises(ValueError, match="x has 1 dimensions"):
        several([*calls[:2], {"x": torch.ones(8)}])


def test_a_model_s_backends_are_remembered_once(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backends = Backends("triton", device=torch.device("cpu"), dtype=torch.float32)
    for _ in range(2):
        assert backends.choose(rms_norm, 64, 32)(torch.ones(64, 32)).y.shape == (64, 32)
    assert len(backends.choices) == 1 and backends.choices[0].backend == "triton"
    facts = json.loads(json.dumps(backends.facts()))
    assert facts["requested"] == "triton" and facts["choices"][0]["shape"] == {"M": 64, "N": 32}
    # an fp32 parameter of a bf16 model
    mixed = Backends("triton", device=torch.device("cpu"), dtype=torch.bfloat16)
    for dtype in (None, torch.float32):
        mixed.choose(rms_norm, 64, 32, dtype=dtype)
    assert [choice.dtype for choice in mixed.choices] == ["bfloat16", "float32"]
    # forced on all, but this one has no such kernel
    assert backends.choose(made_up("ref", "cuda"), 8, 8)(torch.ones(8, 8)) == "ref"
    assert backends.choices[-1].reason == "PyTorch, on a CPU; there is no triton backend"


def test_the_summary_has_a_line_for_shapes_of_the_same_fate():
    backends = Backends("ref", device=torch.device("cpu"), dtype=torch.float32)
    for shape in ((8, 8), (8, 16), (16, 8)):
        backends.choose(made_up(), *shape)
    backends.choose(rms_norm, 64, 32)
    lines = dispatch.summary(backends.choices)
    assert len(lines) == 2 and "3 shapes" in lines[0] and "M=64 N=32" in lines[1] and "forced" in lines[0]


def test_every_op_is_listed_and_complete():
    files = {op.cost.__module__ for op in OPS}
    assert len(BY_NAME) == len(OPS)
    for file in (ROOT / "kernels").glob("*.py"):
        has_op = "= Op(" in file.read_text()
        assert has_op == (f"kernels.{file.stem}" in files), f"{file.name}: add its ops to OPS in kernels/ops.py"
    for op in OPS:
        assert op.cases and op.forms and "ref" in op.backends
        for shape in op.cases.values():
            assert len(shape) == len(op.dims)
            for form in op.forms:
                flops, nbytes = op.cost(shape, BF16, form)
                assert flops > 0 or op.name == "embedding"  # which only copies
                assert nbytes > 0


def test_the_sizes_are_those_of_the_models():
    from core.config import preset
    from core.models.gpt2 import dims

    for label, size in sizes.SIZES.items():
        if label == "fineweb":
            continue  # no model of core/ yet
        cfg = preset("quickstart" if label == "quickstart" else "gpt2", "cpu").model
        if label != "quickstart":
            cfg = dataclasses.replace(cfg, depth=int(label.removeprefix("depth ")))
        d = dims(cfg)
        mine = (size.T, size.C, size.H, size.G, size.D, size.F, size.V, size.L)
        assert mine == (
            d.seq_len, d.d_model, d.n_head, d.n_kv_head, d.d_head, d.d_ff, d.padded_vocab, d.n_layer
        ), label  # fmt: skip


def test_every_launch_is_on_the_device_of_its_first_argument(monkeypatch):
    for file in (ROOT / "kernels").glob("*.py"):
        assert not re.search(r"_kernel\[", file.read_text()), f"{file.name} launches past kernels/tile.py"
    log = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: log.append((grid, args, options))

    @contextmanager
    def device_of(t):
        log.append(t)
        yield
        log.append("restored")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    x, y = torch.ones(2), torch.ones(3)
    tile.launch(Kernel(), (4,), x, y, BLOCK=16)
    assert log[0] is x and log[1] == ((4,), (x, y), {"BLOCK": 16}) and log[2] == "restored"


# calls ----------------------------------------------------------------------

SMALL = {
    "rms_norm": (12, 64),
    "rope_qk_norm": (1, 6, 2, 2, 16),
    "attention": (1, 128, 2, 1, 16, 128, 0),
    "decode_attention": (2, 40, 4, 2, 16, 33),
    "embedding": (40, 12, 32),
    "linear": (12, 32, 48),
    "fp8_linear": (12, 32, 48),
    "fp8_mlp": (5, 16, 32),
    "relu2_mlp": (12, 32, 64),
    "lm_head_loss": (12, 32, 48),
    "quantise_weight": (2, 48, 32),
    "polar_express": (2, 16, 16),
    "muon_momentum": (2, 16, 24),
    "muon_apply": (2, 16, 24),
    "adam_update": (300,),
}


def inputs(op, form, seed=0):
    def make(*size, dtype=BF16):
        floats = randn(seed, dtype if dtype.is_floating_point else torch.float32)(*size)
        return floats.requires_grad_() if dtype.is_floating_point else floats.to(dtype)

    return op.forms[form](make, *SMALL[op.name])


def after(call, args):
    """What a call returns and what is in its arguments afterwards."""
    own = {k: t.detach().clone() if isinstance(t, torch.Tensor) else t for k, t in args.items()}
    with torch.no_grad():
        result = call(**own)
    return [*named(result).values(), *(t for t in own.values() if isinstance(t, torch.Tensor))]


def same(some, others):
    bits = [[t.contiguous().reshape(-1).view(torch.uint8) for t in tensors] for tensors in (some, others)]
    return len(bits[0]) == len(bits[1]) and all(map(torch.equal, *bits))


@pytest.mark.parametrize(
    "op, form", [(op, form) for op in OPS for form in op.forms], ids=lambda x: getattr(x, "name", x)
)
def test_calls_and_checked_backends_are_one_graph_with_the_same_results(op, form, monkeypatch):
    """The op itself, and each backend behind its check, in eager and compiled, twice with other numbers."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        flex_on_a_cpu(monkeypatch)
    here = Device.of(torch.device(DEVICE))
    auto = op.pick(SMALL[op.name], BF16, here)[0]
    there = [name for name in op.backends if DEVICE == "cpu" or op.backends[name].needs(here) is None]
    calls = {name: op.checked(name) for name in there} | {"auto": op}
    with present(*LIBRARIES) if DEVICE == "cpu" else nullcontext():
        for name, call in calls.items():
            picked = op.backends[auto if name == "auto" else name]
            torch.compiler.reset()
            compiled = torch.compile(call, fullgraph=True, dynamic=False, backend="aot_eager")
            for seed in (0, 1):
                args = inputs(op, form, seed)
                want = after(picked, args)
                assert same(after(call, args), want), name
                assert same(after(compiled, args), want), name


def test_a_call_has_gradients_and_follows_its_shapes():
    """The README's example; a compiled caller takes other numbers of rows."""
    x = torch.randn(4, 32, device=DEVICE, requires_grad=True)
    want = evaluate(rms_norm.backends["ref"], {"x": x}, {"y": torch.ones_like(x)})
    got = evaluate(rms_norm, {"x": x}, {"y": torch.ones_like(x)})
    torch.testing.assert_close(got, want)
    torch.compiler.reset()
    norm = torch.compile(lambda x: rms_norm(x).y, fullgraph=True, backend="aot_eager")
    for rows in (4, 5, 6, 7):
        x = torch.randn(rows, 32, device=DEVICE)
        torch.testing.assert_close(norm(x), rms_norm.backends["ref"](x).y)


def test_auto_is_picked_once_for_each_shape_dtype_and_device(monkeypatch):
    op, asked = made_up(), []
    monkeypatch.setattr(Device, "of", lambda device: asked.append(device) or H100)
    for _ in range(2):
        assert op(torch.ones(8, 8)) == "triton" and op(torch.ones(8, 9)) == "ref"
        assert op(torch.ones(8, 8, dtype=BF16)) == "triton"
    assert len(asked) == 3


def test_every_way_in_is_checked():
    op = made_up()
    ways = [op, *map(op.checked, op.backends), Backends("ref", device=torch.device("cpu"), dtype=BF16).choose(op, 8, 8)]
    for call in ways:
        with pytest.raises(ValueError, match="x has 1 dim"):
            call(torch.ones(8))
    with pytest.raises(ValueError, match="made_up: cuda takes multiples of 8, not 9"):
        op.checked("cuda")(torch.ones(8, 9))
    assert op.checked("ref")(torch.ones(8, 9)) == "ref"


# the program ----------------------------------------------------------------


def module(*argv):
    return subprocess.run([sys.executable, "-m", "kernels", *argv], cwd=ROOT, capture_output=True, text=True)


def test_the_program_shows_what_would_run():
    text = module("--device", "cpu").stdout
    assert "rms_norm" in text and "PyTorch, on a CPU" in text and "TRITON_INTERPRET" in text
    table = json.loads(module("--device", "cpu", "--json").stdout)
    assert {row["op"] for row in table["choices"]} == set(BY_NAME)
    refused = module("--device", "cpu", "--kernels", "rms_norm=triton")
    assert refused.returncode == 2 and refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1
