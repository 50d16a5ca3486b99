"""Builds csrc/ twice over: by nvcc into a Python module for GPUs, by g++ alone into one that emulates it on a CPU.

Each .cu is compiled by itself and bindings.cpp by the host compiler, which sees no CUDA header, and one link makes a
module that needs neither PyTorch nor a CUDA runtime library. The runtime is linked in and not exported, or the loader
would bind our calls to PyTorch's copy of it, of another version. So one build serves every torch.

Everything that a compiler writes has a name made of the hash of what it was made from: source, headers, flags and the
compiler's version. A file that is there is right, whoever made it, so that a changed .cu recompiles itself alone, a
changed header everything, and pip's isolated builds share their objects. Beside the module for GPUs stands what it was
made from, so that a stale one is recognised.

Needs the standard library, and pybind11 where something is compiled. `python -m csrc.build` makes the module for GPUs
anew in a checkout, as `pip install -e .` would.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

CSRC = Path(__file__).resolve().parent
MODULE = "_cuda" + sysconfig.get_config_var("EXT_SUFFIX")
BINDINGS = "bindings.cpp"
OBJECTS = CSRC.parent / "build" / "csrc"  # of a checkout, kept between builds
CUDA_FOLDER = Path("/usr/local/cuda")  # where NVIDIA's packages install
LEAST_NVCC = (12, 0)  # the first with C++20 and sm_90a; sm_100 and sm_120 came with 12.8 [CUDA release notes]
ARCHITECTURES = ("80", "90a", "100", "120")  # oldest first; code for x.0 runs on x.1 too, that for 90a on 9.0 alone
KEPT_DAYS = 30  # that an object which no build asked for is kept

INSTALL_NVCC = (
    "install the CUDA toolkit, 12.8 or newer for every GPU that csrc/ is written for, put its nvcc on PATH and repeat "
    "`pip install -e .`"
)
INSTALL_COMPILER = (
    "there is no C++ compiler: install g++ (on Debian apt-get install g++), or name another's program alone in CXX"
)
# options that compilers find in the environment
FROM_ENVIRONMENT = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "CPATH", "CPLUS_INCLUDE_PATH", "C_INCLUDE_PATH")

# C++20 for both compilers; -lineinfo names source lines to profilers and changes no code
CUDA_FLAGS = ("-std=c++20", "-O3", "-lineinfo")
HOST_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden")
# vector loads alias scalars, as they may on a GPU; the unique symbols of std:: would be shared by modules that tests
# load side by side; -g1 gives sanitizers the lines
EMULATED_FLAGS = (*HOST_FLAGS, "-g1", "-fno-strict-aliasing", "-fno-gnu-unique", "-DREDLINE_EMULATION")


class BuildError(RuntimeError):
    """What keeps csrc/ from being built; where a compiler failed, its own message."""


# compilers


@dataclass(frozen=True)
class Nvcc:
    """An nvcc and what it knows."""

    path: Path
    release: str  # such as "12.8"
    version: str  # all that --version prints
    architectures: tuple[str, ...]  # those of ARCHITECTURES that it compiles for

    @staticmethod
    def of(path: Path) -> "Nvcc":
        """BuildError where it is too old."""
        version = _output(path, "--version")
        found = re.search(r"release (\d+)\.(\d+)", version)
        if not found:
            raise BuildError(f"{path} --version says no release: {version!r}")
        release = int(found[1]), int(found[2])
        if release < LEAST_NVCC:
            least, has = (".".join(map(str, n)) for n in (LEAST_NVCC, release))
            raise BuildError(
                f"nvcc {has} at {path} is too old, csrc/ needs {least} or newer: put a newer one on PATH, or set "
                "REDLINE_CUDA=0 to install without"
            )
        codes = _output(path, "--list-gpu-code").split()
        known = tuple(a for a in ARCHITECTURES if f"sm_{a.rstrip('a')}" in codes)  # sm_90a is not in every list
        return Nvcc(path, f"{found[1]}.{found[2]}", version, known)

    @property
    def ptx(self) -> str:
        """The virtual architecture whose PTX is kept, for GPUs newer than this nvcc. That of 90a runs on 9.0 alone."""
        return self.architectures[-1].rstrip("a")

    @property
    def targets(self) -> list[str]:
        """The options that name the architectures."""
        codes = {a: f"sm_{a}" for a in self.architectures}
        own = codes.get(self.ptx)  # together, or nvcc compiles for it twice
        codes[self.ptx] = f"[{own},compute_{self.ptx}]" if own else f"compute_{self.ptx}"
        return [f"-gencode=arch=compute_{a},code={code}" for a, code in codes.items()]


def find_nvcc(environ: Mapping[str, str] = os.environ) -> Path | None:
    """nvcc in $CUDA_HOME, on PATH or in /usr/local/cuda, the first of them."""
    home, path = environ.get("CUDA_HOME"), environ.get("PATH")
    folders = [f"{home}/bin" if home else None, path, f"{CUDA_FOLDER}/bin"]
    found = shutil.which("nvcc", path=os.pathsep.join(filter(None, folders)))
    return Path(found) if found else None


def wanted_nvcc(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The nvcc to compile with, as REDLINE_CUDA asks for; None: compile nothing."""
    choice = environ.get("REDLINE_CUDA", "")
    if choice not in ("", "0", "1"):
        raise BuildError(
            f"REDLINE_CUDA={choice}: expected 0 (csrc/ is not compiled), 1 (a missing nvcc is an error) or nothing "
            "(compiled if there is an nvcc)"
        )
    found = None if choice == "0" else find_nvcc(environ)
    if choice == "1" and not found:
        raise BuildError(
            f"REDLINE_CUDA=1, and there is no nvcc in $CUDA_HOME, on PATH or in {CUDA_FOLDER}: {INSTALL_NVCC}"
        )
    return found


def host_compiler() -> Path | None:
    """The C++ compiler, which nvcc is told to use too: g++, or what NVCC_CCBIN or CXX name, without options."""
    found = shutil.which(os.environ.get("NVCC_CCBIN") or os.environ.get("CXX") or "g++")
    return Path(found) if found else None


def _output(tool: Path, *arguments: str) -> str:
    done = subprocess.run([tool, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{tool} {' '.join(arguments)} fails: {(done.stderr or done.stdout).strip()}")
    return done.stdout


@functools.cache
def _version(compiler: Path) -> str:
    return _output(compiler, "--version")


def _includes() -> tuple[list[str], str]:
    """The options for Python's and pybind11's headers, and which versions these are: pip's isolated builds keep the
    same headers in a folder that is new each time."""
    try:
        import pybind11
    except ModuleNotFoundError as error:
        raise BuildError("csrc/ needs pybind11 to be compiled: pip install 'pybind11>=2.13'") from error
    folders = (pybind11.get_include(), sysconfig.get_path("include"))
    return [f"-isystem{folder}" for folder in folders], f"pybind11 {pybind11.__version__}, Python {sys.version}"


# sources


def cuda_files(sources: Path = CSRC) -> list[Path]:
    return sorted(sources.glob("*.cu"))


def headers(sources: Path = CSRC) -> list[Path]:
    return sorted(sources.glob("*.h"))


def hashes(sources: Path = CSRC) -> dict[str, str]:
    """SHA-256 of each file that a module is made from."""
    files = [*cuda_files(sources), *headers(sources), sources / BINDINGS]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.exists()}


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


# files named by what they are made from


@dataclass(frozen=True)
class Step:
    """One call of a compiler. Its target's name holds the hash of all that decides about its content."""

    name: str  # what is compiled, for messages
    command: tuple[str | Path, ...]  # without -o TARGET
    target: Path


def make(step: Step) -> None:
    """Runs the compiler unless the target is there. Who comes second, in this process or another, waits and finds it.

    The target appears whole or not at all.
    """
    if step.target.exists():
        with contextlib.suppress(PermissionError):  # of a folder that is only read
            os.utime(step.target)  # it is in use: see `prune`
        return
    step.target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(step.target.with_name(f"{step.target.name}.lock")):
        if step.target.exists():
            return
        part = step.target.with_name(f".{step.target.name}")
        done = subprocess.run([*step.command, "-o", part], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            part.unlink(missing_ok=True)
            tool = Path(step.command[0]).name
            raise BuildError(f"{step.name}: {tool} failed with exit status {done.returncode}\n{done.stdout.strip()}")
        part.replace(step.target)


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Held by one thread of one process; the system frees it when a process dies."""
    with file.open("a") as lock:
        os.utime(file)
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_all(steps: Sequence[Step], sources: Path, before: Mapping[str, str]) -> list[Path]:
    """The targets, a thread for each core. BuildError with the messages of all that fail.

    before: `hashes` of the sources from when the targets were named. An editor may write while compilers run.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = [pool.submit(make, step) for step in steps]
    errors = [error for result in results if (error := result.exception())]
    for error in errors:
        if isinstance(error, OSError):
            raise BuildError(f"cannot write below {steps[0].target.parent}: {error}") from error
        if not isinstance(error, BuildError):
            raise error
    if errors:
        raise BuildError("\n\n".join(map(str, errors)))
    targets = [step.target for step in steps]
    if hashes(sources) != before:  # what was made of the new may be named by the old
        for target in targets:
            target.unlink(missing_ok=True)
        raise BuildError(f"files in {sources} changed while they were compiled: repeat it")
    return targets


def prune(folder: Path) -> None:
    """Removes what no build has used for KEPT_DAYS."""
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError, PermissionError):  # another process prunes too, or nobody may
            if file.stat().st_mtime < time.time() - KEPT_DAYS * 86_400:
                file.unlink()


def _compile_step(
    source: Path,
    folder: Path,
    compiler: Path,
    options: Iterable[str],
    *,
    unhashed: Iterable[str] = (),
    key: object = (),
) -> Step:
    """unhashed: options that do not change the object; key: what decides about it beyond files and options."""
    options = tuple(options)
    content = [(file.name, file.read_bytes()) for file in (source, *headers(source.parent))]
    found = [os.environ.get(name) for name in FROM_ENVIRONMENT]
    name = f"{source.name}-{_digest(content, options, _version(compiler), key, *filter(None, found))}.o"
    return Step(f"csrc/{source.name}", (compiler, *options, *unhashed, "-c", source), folder / name)


def _checked(sources: Path) -> tuple[list[Path], Path]:
    """The .cu files and the C++ compiler. BuildError where either is missing."""
    files, compiler = cuda_files(sources), host_compiler()
    if not files or not (sources / BINDINGS).exists():
        raise BuildError(f"{sources} lacks .cu files or {BINDINGS}: check it out again")
    if not compiler:
        raise BuildError(f"csrc/ cannot be compiled: {INSTALL_COMPILER}")
    return files, compiler


# the module for GPUs


def build_cuda(sources: Path, module: Path, *, nvcc: Path, folder: Path) -> Path:
    """Compiles `sources` by nvcc into `module`, an extension module called _cuda, and writes `record_file(module)`.

    folder: where objects stay between builds. Returns the module. BuildError with the compiler's message if a file
    does not compile; a module that was there stays then, and `stale` tells that it is old.
    """
    (files, compiler), before, info = _checked(sources), hashes(sources), Nvcc.of(nvcc)
    includes, versions = _includes()
    threads = max(1, (os.cpu_count() or 1) // len(files))
    options = (*HOST_FLAGS, "-DREDLINE_MODULE=_cuda")
    steps = [_compile_step(sources / BINDINGS, folder, compiler, options, unhashed=includes, key=versions)]
    options = (*CUDA_FLAGS, *info.targets, "-Xcompiler=-fPIC,-fvisibility=hidden")
    at_once = (f"-ccbin={compiler}", f"--threads={threads}")
    steps += [_compile_step(file, folder, nvcc, options, unhashed=at_once, key=_version(compiler)) for file in files]
    objects = make_all(steps, sources, before)
    options = ("-shared", "-cudart=static", *info.targets)
    built = folder / f"_cuda-{_digest([o.name for o in objects], options)}.so"
    make(Step("csrc/", (nvcc, f"-ccbin={compiler}", *options, *objects), built))
    record = {
        "nvcc": info.release,
        "architectures": [f"sm_{a}" for a in info.architectures],
        "ptx": f"compute_{info.ptx}",
        "built": built.name,
        "sources": before,
    }
    if not module.exists() or load_record(module) != record:
        _replace(module, built.read_bytes())  # first: a new module with an old record counts as stale
        _replace(record_file(module), (json.dumps(record, indent=1) + "\n").encode())
    prune(folder)
    return module


def _replace(file: Path, content: bytes) -> None:
    """By renaming: a process that has the old file mapped keeps it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{threading.get_native_id()}")  # of one thread on this machine
    part.write_bytes(content)
    part.chmod(0o755 if file.suffix == ".so" else 0o644)
    part.replace(file)


def record_file(module: Path) -> Path:
    return module.with_suffix(".json")


def load_record(module: Path) -> dict[str, Any] | None:
    """What the module was made from and with; None if there is no module, or none that `build_cuda` finished."""
    try:
        record: dict[str, Any] = json.loads(record_file(module).read_text())
    except FileNotFoundError:
        return None
    return record if module.exists() else None


def stale(record: Mapping[str, Any], sources: Path = CSRC) -> str | None:
    """What has changed since the module was built; None if it is made from these sources."""
    now, then = hashes(sources), record["sources"]
    for name in sorted(now.keys() | then.keys()):
        if now.get(name) != then.get(name):
            what = "is new" if name not in then else "is gone" if name not in now else "has changed"
            return f"csrc/{name} {what} since csrc/ was compiled"
    return None


# the module for CPUs


def build_emulated(folder: Path, *, sources: Path = CSRC, sanitize: str | None = None) -> Path:
    """Compiles `sources` by g++ into a module called _emulated that runs kernels on the CPU, and returns its path.

    The path differs for different sources, so that several can be loaded. folder: where it and its objects stay.
    sanitize: what -fsanitize takes, such as "address". Any number of processes may build at once.
    """
    (files, compiler), before = _checked(sources), hashes(sources)
    includes, versions = _includes()
    flags = (*EMULATED_FLAGS, "-DREDLINE_MODULE=_emulated")
    sanitizer = (f"-fsanitize={sanitize}", "-fno-omit-frame-pointer") if sanitize else ()
    # equal sources give equal objects wherever they are, as tests' edited copies do
    place = f"-ffile-prefix-map={sources}=csrc"
    # the bindings, slow to compile, have nothing for a sanitizer to find
    steps = [_compile_step(sources / BINDINGS, folder, compiler, flags, unhashed=(place, *includes), key=versions)]
    options = (*flags, *sanitizer, "-x", "c++")
    steps += [_compile_step(file, folder, compiler, options, unhashed=(place,)) for file in files]
    objects = make_all(steps, sources, before)
    options = ("-shared", *sanitizer)
    built = folder / f"_emulated-{_digest([o.name for o in objects], options)}.so"
    make(Step("csrc/", (compiler, *options, *objects), built))
    prune(folder)
    return built


def load(path: Path, name: str) -> ModuleType:
    """The extension module in that file. name: what it was compiled as, behind its last dot if it has one.

    pybind11 keeps modules by their names, and would return the first of that name for every file.
    """
    name = f"csrc.{_digest(str(path))}.{name}"
    spec = spec_from_file_location(name, path, loader=ExtensionFileLoader(name, str(path)))
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    nvcc = find_nvcc()
    if not nvcc:
        raise BuildError(f"there is no nvcc in $CUDA_HOME, on PATH or in {CUDA_FOLDER}: {INSTALL_NVCC}")
    module = build_cuda(CSRC, CSRC / MODULE, nvcc=nvcc, folder=OBJECTS)
    record = load_record(module)
    assert record
    print(
        f"{module.name}: nvcc {record['nvcc']} for {', '.join(record['architectures'])}, {record['ptx']} for later GPUs"
    )


if __name__ == "__main__":
    try:
        main()
    except BuildError as error:
        sys.exit(f"error: {error}")
