"""The CUDA C++ twins of ops: the Python module compiled from csrc/, or why there is none.

For CUDA tensors it is what the install compiled by nvcc. For CPU tensors, with REDLINE_EMULATE=1, it is the same
sources compiled by g++, the threads of a block run by one core: slow, for tests. It is built on first use, below the
cache folder.
"""

import ctypes
import functools
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from csrc import build
from kernels.op import Device, UserError, dtype_name, needs_gpu

CACHE = "~/.cache/redline/csrc"  # of emulated modules
COMPILED = build.CSRC / build.MODULE


def emulated() -> bool:
    """Whether CUDA C++ kernels run on the CPU, emulated."""
    return os.environ.get("REDLINE_EMULATE") == "1"


# calls


def module(device: torch.device) -> ModuleType:
    """The module whose functions take pointers into the memory of that device.

    UserError where `needs_extension` refuses the device; on a CPU the first call compiles, in seconds.
    """
    return _module(device.type)


@functools.cache
def _module(kind: str) -> ModuleType:
    if kind == "cuda":
        if why := missing():
            raise UserError(f"csrc/ {why}")
        return build.load(COMPILED, "_cuda")
    if why := needs_emulation():
        raise UserError(f"csrc/ {why}")
    try:
        return build.load(build.build_emulated(cache_folder()), "_emulated")
    except build.BuildError as error:
        raise UserError(f"csrc/ cannot be emulated: {error}") from error


def cache_folder() -> Path:
    """Where emulated modules are kept."""
    return Path(CACHE).expanduser()


def pointer(t: Tensor | None) -> int:
    """The address of a tensor's first element, 0 for none: how kernels receive tensors."""
    return 0 if t is None else t.data_ptr()


def where(t: Tensor) -> tuple[int, int]:
    """The device's index and the handle of its current stream, which each launch takes first; (0, 0) on a CPU."""
    if not t.is_cuda:
        return 0, 0
    return t.get_device(), torch.cuda.current_stream(t.device).cuda_stream


def call(function: str, on: Tensor, /, **arguments: Any) -> None:
    """Calls a function of the module on the device and the current stream of a tensor.

    Tensors go as their addresses, None as 0 and dtypes as their names. The caller keeps the tensors alive: the launch
    does not wait, but frees on the same stream do.
    """

    def given(argument: Any) -> Any:
        if argument is None or isinstance(argument, Tensor):
            return pointer(argument)
        return dtype_name(argument) if isinstance(argument, torch.dtype) else argument

    device, stream = where(on)
    numbers = {name: given(argument) for name, argument in arguments.items()}
    getattr(module(on.device), function)(device=device, stream=stream, **numbers)


def grouped(calls: Sequence[dict[str, Any]], name: str, default: float) -> dict[float, list[dict[str, Any]]]:
    """Calls by the number that one of their arguments is, for what takes it once for all."""
    groups: dict[float, list[dict[str, Any]]] = {}
    for arguments in calls:
        groups.setdefault(arguments.get(name, default), []).append(arguments)
    return groups


def written(calls: Sequence[Mapping[str, Any]], *names: str) -> None:
    """Tells autograd that those arguments of the calls were written, as a torch op does by itself."""
    tensors = [arguments[name] for arguments in calls for name in names if arguments.get(name) is not None]
    torch.autograd.graph.increment_version(tensors)


# availability


def needs_extension(device: Device) -> str | None:
    """Why a CUDA C++ kernel cannot run on the device; None if it can, be it emulated."""
    if device.type != "cuda" and emulated():
        return needs_emulation()
    return needs_gpu(device, " (REDLINE_EMULATE=1 runs CUDA C++ on a CPU, for tests)") or _obstacle(device)


@torch.compiler.assume_constant_result  # files are read outside of the graph
def _obstacle(device: Device) -> str | None:
    """What is wrong with the compiled module on a GPU."""
    return missing() or old_driver() or without_code(device)


def without_code(device: Device) -> str | None:
    """Why the compiled module has nothing that the GPU runs; None if it has.

    Code for x.y runs on x.y and what is newer of the same x, that for 9.0a on 9.0 alone, and PTX on that and all newer
    ones [CUDA C++ programming guide, compute capabilities].
    """
    record = build.load_record(COMPILED)
    if record is None or device.capability is None:
        return None
    for name in record["architectures"]:
        code = divmod(int(name.removeprefix("sm_").rstrip("a")), 10)
        newer = code[0] == device.capability[0] and code <= device.capability and not name.endswith("a")
        if newer or code == device.capability:
            return None
    if divmod(int(record["ptx"].removeprefix("compute_")), 10) <= device.capability:
        return None
    have = ", ".join(record["architectures"])
    return (
        f"has code for {have} and nothing for compute capability {'.'.join(map(str, device.capability))}: "
        "put a newer nvcc first on PATH and repeat `pip install -e .`"
    )


@torch.compiler.assume_constant_result
def needs_emulation() -> str | None:
    """Why kernels cannot be emulated on a CPU; None if they can."""
    if not emulated():
        return "runs on a CPU only for tests, with REDLINE_EMULATE=1"
    if not build.host_compiler():
        return f"cannot be emulated: {build.INSTALL_COMPILER}"
    if importlib.util.find_spec("pybind11") is None:
        return "needs pybind11 to be emulated: pip install 'redline-lm[test]'"
    return None


@functools.cache  # of a process: what it has loaded stays as it is
def missing() -> str | None:
    """Why there is no compiled module of these sources, and how to get it; None if there is one."""
    if record := build.load_record(COMPILED):
        changed = build.stale(record)
        return f"is out of date, {changed}: repeat `pip install -e .`" if changed else None
    if nvcc := build.find_nvcc():
        try:
            build.Nvcc.of(nvcc)
        except build.BuildError as error:
            return f"is not compiled: {error}"
        return (
            f"was not compiled at the install (there was no nvcc, or REDLINE_CUDA=0), though {nvcc} is there now: "
            "repeat `pip install -e .`"
        )
    return f"is not compiled, for want of nvcc, the compiler of CUDA C++: {build.INSTALL_NVCC}"


@functools.cache
def old_driver() -> str | None:
    """Why the GPU's driver cannot run the compiled module; None if it can.

    A driver runs what any toolkit of its major version compiled, and of earlier ones [CUDA compatibility].
    """
    record = build.load_record(COMPILED)
    try:
        driver = driver_version()
    except OSError as error:
        return f"needs NVIDIA's driver: {error}"
    if record is None or driver >= int(record["nvcc"].split(".")[0]):
        return None
    return (
        f"was compiled by nvcc {record['nvcc']}, and the driver here knows CUDA {driver} at most: update the driver, "
        f"or put an nvcc of CUDA {driver} first on PATH and repeat `pip install -e .`"
    )


def driver_version() -> int:
    """The major version of CUDA that the NVIDIA driver knows."""
    version = ctypes.c_int()
    status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    if status:
        raise RuntimeError(f"cuDriverGetVersion returns {status}")
    return version.value // 1000


def facts() -> dict[str, Any]:
    """What `python -m kernels` tells of csrc/: nvcc, architectures and ptx of a module that is up to date, or why."""
    if why := missing():
        return {"why": why}
    record = build.load_record(COMPILED)
    assert record
    return {name: record[name] for name in ("nvcc", "architectures", "ptx")}


def summary() -> str:
    """`facts` in a sentence."""
    found = facts()
    if "why" in found:
        return f"csrc/ {found['why']}"
    return (
        f"csrc/ compiled by nvcc {found['nvcc']} for {', '.join(found['architectures'])}, {found['ptx']} for later GPUs"
    )
