"""The module of csrc/ is found and loaded, or a sentence says what is missing and how to get it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core.config import DataConfig
from csrc import build
from kernels import extension
from kernels.op import Device, UserError
from tests import tiny_csrc
from tests.tiny_csrc import SUM, edit, fake_nvcc

ROOT = Path(__file__).resolve().parent.parent
H100, CPU = Device("cuda", "NVIDIA H100 80GB HBM3", (9, 0)), Device("cpu", "cpu", None)
CPU_DEVICE = torch.device("cpu")


def forget():
    """What a process remembers of the module."""
    for function in (extension._module, extension.missing, extension.old_driver):
        function.cache_clear()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A small csrc/ in place of the real one, what its install compiled, a driver of CUDA 12; no nvcc is left."""
    if not shutil.which("g++"):
        pytest.skip("there is no g++")
    for name in ("NVCC_CCBIN", "CXX", "REDLINE_EMULATE"):
        monkeypatch.delenv(name, raising=False)
    sources = tiny_csrc.write(tmp_path / "csrc")
    nvcc = fake_nvcc(tmp_path / "nvcc")
    module = build.build_cuda(sources, sources / build.MODULE, nvcc=nvcc.file, folder=tmp_path / "objects")
    honest = build.stale
    monkeypatch.setattr(extension, "COMPILED", module)
    monkeypatch.setattr(extension, "CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(extension, "driver_version", lambda: 12)
    monkeypatch.setattr(build, "stale", lambda record: honest(record, sources))
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    forget()
    yield module
    forget()


def test_a_compiled_module_runs_on_gpus(installed):
    assert extension.needs_extension(H100) is None
    assert extension.module(torch.device("cuda", 1)).sum() == SUM
    assert extension.module(torch.device("cuda", 1)) is extension.module(torch.device("cuda", 0))
    assert extension.facts() == {
        "nvcc": "12.8", "architectures": ["sm_80", "sm_90a", "sm_100", "sm_120"], "ptx": "compute_120"
    }  # fmt: skip
    says = "csrc/ compiled by nvcc 12.8 for sm_80, sm_90a, sm_100, sm_120, compute_120 for later GPUs"
    assert extension.summary() == says
    assert "capability 8.0" in extension.needs_extension(Device("cuda", "Tesla V100", (7, 0)))


def refused():
    forget()
    why = extension.needs_extension(H100)
    assert extension.facts() == {"why": why} and extension.summary() == f"csrc/ {why}"
    with pytest.raises(UserError) as error:
        extension.module(torch.device("cuda"))
    assert str(error.value) == f"csrc/ {why}"
    return why


def test_a_missing_module_is_explained(installed, monkeypatch, tmp_path):
    edit(installed.parent / "two.cu", "2 * FACTOR", "3 * FACTOR")
    assert refused() == "is out of date, csrc/two.cu has changed since csrc/ was compiled: repeat `pip install -e .`"
    installed.unlink()
    why = refused()
    assert (
        "nvcc, the compiler of CUDA C++" in why and "CUDA toolkit, 12.8 or newer" in why and "pip install -e ." in why
    )
    nvcc = fake_nvcc(tmp_path / "cuda" / "nvcc").file
    monkeypatch.setattr(build, "find_nvcc", lambda: nvcc)
    why = refused()
    assert "REDLINE_CUDA=0" in why and f"{nvcc} is there now: repeat `pip install -e .`" in why
    old = fake_nvcc(tmp_path / "old" / "nvcc", "11.8").file
    monkeypatch.setattr(build, "find_nvcc", lambda: old)
    assert f"is not compiled: nvcc 11.8 at {old} is too old" in refused()


def test_a_driver_older_than_the_module_is_named(installed, monkeypatch):
    for driver, says in ((13, None), (12, None), (11, "knows CUDA 11 at most: update the driver")):
        forget()
        monkeypatch.setattr(extension, "driver_version", lambda driver=driver: driver)
        why = extension.needs_extension(H100)
        assert why is None if says is None else says in why and "nvcc 12.8" in why


@pytest.mark.parametrize(
    "capability, runs",
    [((8, 0), True), ((8, 6), True), ((9, 0), True), ((9, 1), False), ((10, 0), True), ((10, 3), True),
     ((11, 0), False), ((12, 1), True), ((13, 0), True)],
)  # fmt: skip
def test_a_gpu_that_the_module_has_no_code_for_is_named(capability, runs, installed):
    """It has sm_80, sm_90a, sm_100, sm_120 and PTX of the last."""
    forget()
    why = extension.needs_extension(Device("cuda", "made up", capability))
    says = f"nothing for compute capability {'.'.join(map(str, capability))}: put a newer nvcc first on PATH"
    assert why is None if runs else says in why


def test_a_driver_that_is_not_there_is_named(installed, monkeypatch):
    def missing():
        raise OSError("libcuda.so.1: cannot open shared object file")

    forget()
    monkeypatch.setattr(extension, "driver_version", missing)
    assert extension.needs_extension(H100) == "needs NVIDIA's driver: libcuda.so.1: cannot open shared object file"


def test_compiled_code_asks_outside_of_its_graph(installed):
    @torch.compile(fullgraph=True, backend="eager")
    def f(x):
        return x + 1 if extension.needs_extension(H100) is None else x

    assert f(torch.ones(2)).tolist() == [2, 2]


def test_a_cpu_emulates_only_where_it_is_told_to(installed, monkeypatch):
    why = extension.needs_extension(CPU)
    assert "needs an NVIDIA GPU" in why and "REDLINE_EMULATE=1" in why
    with pytest.raises(UserError, match="REDLINE_EMULATE=1"):
        extension.module(CPU_DEVICE)
    honest = build.build_emulated
    monkeypatch.setattr(build, "build_emulated", lambda folder: honest(folder, sources=installed.parent))
    monkeypatch.setenv("REDLINE_EMULATE", "1")
    assert extension.needs_extension(CPU) is None
    module = extension.module(CPU_DEVICE)
    assert module.sum() == SUM and Path(module.__file__).is_relative_to(installed.parent.parent / "cache")
    monkeypatch.setattr(build, "build_emulated", None)
    assert extension.module(CPU_DEVICE) is module  # built once
    for value in ("0", "", "true"):
        monkeypatch.setenv("REDLINE_EMULATE", value)
        assert extension.needs_extension(CPU)


def test_an_emulation_that_cannot_be_built_is_refused(installed, monkeypatch):
    monkeypatch.setenv("REDLINE_EMULATE", "1")
    with monkeypatch.context() as no_pybind11:
        no_pybind11.setitem(sys.modules, "pybind11", None)
        assert "pip install 'redline-lm[test]'" in extension.needs_extension(CPU)
    monkeypatch.setenv("PATH", os.devnull)
    assert "apt-get install g++" in extension.needs_extension(CPU)
    with pytest.raises(UserError, match="apt-get install"):
        extension.module(CPU_DEVICE)


def test_a_cache_that_cannot_be_written_is_named(installed, monkeypatch, tmp_path):
    monkeypatch.setenv("REDLINE_EMULATE", "1")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(extension, "CACHE", str(tmp_path / "file" / "csrc"))
    with pytest.raises(UserError, match=f"csrc/ cannot be emulated: cannot write below {tmp_path}/file/csrc: "):
        extension.module(CPU_DEVICE)


def test_tensors_are_passed_by_address():
    x = torch.arange(6.0)
    assert extension.pointer(x) == x.data_ptr() and extension.pointer(x[2:]) == x.data_ptr() + 8
    assert extension.pointer(None) == 0 and extension.where(x) == (0, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_launch_goes_to_the_current_stream():
    x, stream = torch.ones(1, device="cuda"), torch.cuda.Stream()
    assert extension.where(x) == (x.device.index, torch.cuda.current_stream().cuda_stream)
    with torch.cuda.stream(stream):
        assert extension.where(x) == (x.device.index, stream.cuda_stream)
    assert extension.driver_version() >= int(torch.version.cuda.split(".")[0])


def test_there_is_one_cache_folder():
    assert Path(extension.CACHE).parent == Path(DataConfig.cache_dir)


def test_the_program_tells_of_csrc():
    command = [sys.executable, "-m", "kernels", "--device", "cpu"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert text.splitlines()[1] == extension.summary()
    found = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert json.loads(found)["csrc"] == extension.facts()
