"""Backends are chosen by facts, with a reason; what was forced is honoured or refused in a sentence that helps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import dispatch
from kernels.dispatch import Backends, Device, Measurement, Op
from kernels.rms_norm import rms_norm

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


def made_up(**options):
    def limits(backend, shape, dtype):
        return None if shape[1] % 8 == 0 else f"{backend} takes multiples of 8, not {shape[1]}"

    kwargs = {"ref": lambda x: "ref", "triton": lambda x: "triton", "cuda": lambda x: "cuda", **options}
    return Op("made_up", dims=("M", "N"), cases={}, forms={}, cost=lambda *a: (0, 0), limits=limits, **kwargs)


def test_a_cpu_runs_the_reference():
    choice, run = made_up().choose((8, 8), BF16, CPU)
    assert (choice.backend, run(0)) == ("ref", "ref") and "CPU" in choice.reason
    assert set(choice.others) == {"triton", "cuda"}


def test_a_gpu_without_measurements_runs_triton_and_says_so():
    choice, run = made_up().choose((8, 8), BF16, H100)
    assert (choice.backend, choice.reason, run(0)) == ("triton", "unmeasured here", "triton")
    assert made_up(triton=None).choose((8, 8), BF16, H100)[0].backend == "cuda"


@pytest.mark.parametrize(
    "device, shape, why", [(V100, (8, 8), "compute capability 8.0"), (H100, (8, 9), "multiples of 8")]
)
def test_what_a_kernel_cannot_run_goes_to_the_reference_with_the_reason(device, shape, why):
    choice, _ = made_up().choose(shape, BF16, device)
    assert choice.backend == "ref" and why in choice.reason
    with pytest.raises(ValueError, match=f"{why}.*available there: ref"):
        made_up().choose(shape, BF16, device, "triton")


def test_a_cpu_build_of_pytorch_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    choice, _ = made_up().choose((8, 8), BF16, H100)
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
    assert op.choose((2048, 128), BF16, H100)[0].backend == "ref"
    choice, _ = op.choose((65536, 2048), BF16, H100)
    assert choice.backend == "cuda" and "M=65536 N=1024" in choice.reason and "H100 at abc" in choice.reason
    assert op.choose((65536, 2048), BF16, Device("cuda", "L4", (8, 9)))[0].reason == "unmeasured here"
    # the fastest of those that can run it
    assert op.choose((65536, 2049), BF16, H100)[0].backend == "ref"


def test_a_forced_backend_is_taken():
    for name in dispatch.BACKENDS:
        choice, run = made_up().choose((8, 8), BF16, H100, name)
        assert (choice.backend, choice.reason, run(0)) == (name, "forced", name)


def test_the_interpreter_counts_as_triton_on_a_cpu(monkeypatch):
    with pytest.raises(ValueError, match="rms_norm=triton cannot run on cpu.*TRITON_INTERPRET.*available there: ref"):
        rms_norm.choose((8, 8), BF16, CPU, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert rms_norm.choose((8, 8), BF16, CPU, "triton")[0].backend == "triton"
    assert rms_norm.choose((8, 8), BF16, CPU)[0].backend == "ref"
    with pytest.raises(ValueError, match="float64"):
        rms_norm.choose((8, 8), torch.float64, CPU, "triton")


@pytest.mark.parametrize(
    "request_, says",
    [
        ("fast", "unknown backend 'fast'"),
        ("rms_norm=fast", "unknown backend 'fast'"),
        ("softmax=triton", "unknown op 'softmax'; expected one of .*rms_norm"),
        ("rms_norm=cuda", "rms_norm has no cuda backend; rms_norm has ref, triton"),
        ("", "unknown backend ''"),
    ],
)
def test_requests_that_mean_nothing(request_, says):
    with pytest.raises(ValueError, match=says):
        dispatch.parse(request_)


def test_requests_combine():
    assert dispatch.parse("auto") == {"*": "auto"}
    assert dispatch.parse("triton, rms_norm=ref") == {"*": "triton", "rms_norm": "ref"}


def test_a_model_s_backends_are_remembered_once(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backends = Backends("triton", device=torch.device("cpu"), dtype=torch.float32)
    for _ in range(2):
        assert backends.choose(rms_norm, 64, 32) is rms_norm.backends["triton"]
    assert len(backends.choices) == 1
    facts = json.loads(json.dumps(backends.facts()))
    assert facts["requested"] == "triton" and facts["choices"][0]["shape"] == {"M": 64, "N": 32}
    # forced on all, but this one has no such kernel
    assert backends.choose(made_up(triton=None), 8, 8)(0) == "ref"
    assert backends.choices[-1].reason == "PyTorch, on a CPU; there is no triton backend"


def test_the_summary_has_a_line_for_shapes_of_the_same_fate():
    backends = Backends("ref", device=torch.device("cpu"), dtype=torch.float32)
    for shape in ((8, 8), (8, 16), (16, 8)):
        backends.choose(made_up(), *shape)
    backends.choose(rms_norm, 64, 32)
    lines = dispatch.summary(backends.choices)
    assert len(lines) == 2 and "3 shapes" in lines[0] and "M=64 N=32" in lines[1] and "forced" in lines[0]


def test_every_op_is_found_and_complete():
    for name, op in dispatch.ops().items():
        assert op.name == name and op.cases and op.forms and "ref" in op.backends
        for shape in op.cases.values():
            assert len(shape) == len(op.dims)
            for form in op.forms:
                flops, nbytes = op.cost(shape, BF16, form)
                assert flops > 0 and nbytes > 0


def module(*argv):
    return subprocess.run([sys.executable, "-m", "kernels", *argv], cwd=ROOT, capture_output=True, text=True)


def test_the_program_shows_what_would_run():
    text = module("--device", "cpu").stdout
    assert "rms_norm" in text and "PyTorch, on a CPU" in text and "TRITON_INTERPRET" in text
    table = json.loads(module("--device", "cpu", "--json").stdout)
    assert {row["op"] for row in table["choices"]} == set(dispatch.ops())
    refused = module("--device", "cpu", "--kernels", "rms_norm=triton")
    assert refused.returncode == 2 and refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1
