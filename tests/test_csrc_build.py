"""csrc/ is compiled file by file, once, whole or not at all, and its module says what it was made from."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import triton

from csrc import build
from tests import tiny_csrc
from tests.mutations import Edit, edited, mutations
from tests.tiny_csrc import SUM, Compiler, edit, fake_nvcc

ROOT = Path(__file__).resolve().parent.parent
NVCC = build.find_nvcc()
ALL = ["bindings.cpp", "one.cu", "two.cu"]

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++")


@pytest.fixture
def sources(tmp_path):
    return tiny_csrc.write(tmp_path / "csrc")


@pytest.fixture
def gcc(tmp_path, monkeypatch):
    """g++, whose calls are noted."""
    monkeypatch.delenv("NVCC_CCBIN", raising=False)
    compiler = Compiler(tmp_path / "bin" / "g++")
    monkeypatch.setenv("CXX", str(compiler.file))
    return compiler


class Emulated:
    """How the emulated module is built, for tests that both kinds pass."""

    name = "_emulated"

    def __init__(self, tmp_path, sources, gcc):
        self.folder, self.sources, self.gcc = tmp_path / "objects", sources, gcc

    def build(self):
        return build.build_emulated(self.folder, sources=self.sources)

    def compiled(self):
        return self.gcc.compiled()

    def modules(self):
        return list(self.folder.glob("*.so"))

    def sum(self):
        """What a new build computes. Python loads a file once, so that each is loaded from a name of its own."""
        module = self.build()
        copy = module.with_name(f"{hashlib.sha256(module.read_bytes()).hexdigest()}.copy")
        if not copy.exists():  # one that is loaded must not be written to
            shutil.copy(module, copy)
        return build.load(copy, self.name).sum()


class Cuda(Emulated):
    """The module for GPUs, by an nvcc that knows host code alone."""

    name = "_cuda"

    def __init__(self, tmp_path, sources, gcc):
        super().__init__(tmp_path, sources, gcc)
        self.nvcc = fake_nvcc(tmp_path / "bin" / "nvcc")

    def build(self):
        module = self.sources / build.MODULE
        return build.build_cuda(self.sources, module, nvcc=self.nvcc.file, folder=self.folder)

    def compiled(self):
        return sorted(self.gcc.compiled() + self.nvcc.compiled())

    def modules(self):
        return [*self.folder.glob("*.so"), *self.sources.glob("*.so"), *self.sources.glob("*.json")]


@pytest.fixture(params=[Emulated, Cuda], ids=lambda kind: kind.name)
def kind(request, tmp_path, sources, gcc):
    return request.param(tmp_path, sources, gcc)


# both modules


def test_a_build_compiles_each_file_once(kind):
    first = kind.build()
    assert build.load(first, kind.name).sum() == SUM and kind.compiled() == ALL
    assert kind.build() == first
    assert kind.compiled() == [] and build.load(first, f"anything.{kind.name}").sum() == SUM


def test_a_changed_file_is_compiled_alone_and_a_changed_header_with_all(kind):
    first = kind.build()
    kind.compiled()
    edit(kind.sources / "two.cu", "2 * FACTOR", "3 * FACTOR")
    assert (kind.sum(), kind.compiled()) == (40, ["two.cu"])
    edit(kind.sources / "tiny.h", "FACTOR 10", "FACTOR 100")
    assert (kind.sum(), kind.compiled()) == (400, ALL)
    edit(kind.sources / "tiny.h", "FACTOR 100", "FACTOR 10")
    edit(kind.sources / "two.cu", "3 * FACTOR", "2 * FACTOR")
    assert kind.build() == first and kind.compiled() == []  # both are still there
    (kind.sources / "more.h").write_text("")
    kind.build()
    assert kind.compiled() == ALL


def test_another_version_of_the_compiler_compiles_all(kind, tmp_path, monkeypatch):
    kind.build()
    kind.compiled()
    newer = Compiler(tmp_path / "newer" / "g++", '[ "$1" = --version ] && echo "g++ 99" && exit')
    monkeypatch.setenv("CXX", str(newer.file))
    kind.build()
    assert sorted(kind.compiled() + newer.compiled()) == ALL


def test_a_file_that_does_not_compile_is_named_first_and_leaves_no_module(kind):
    edit(kind.sources / "two.cu", "return", "retrun")
    edit(kind.sources / "one.cu", "int one()", "int one(")
    with pytest.raises(build.BuildError) as error:
        kind.build()
    for name, word in (("one.cu", "one("), ("two.cu", "retrun")):
        assert re.search(
            rf"^csrc/{name}: .* failed with exit status 1\n(.*\n)*.*{name}:\d+.*error", str(error.value), re.M
        )
        assert word in str(error.value)
    assert kind.modules() == [] and not list(kind.folder.glob(".*.o"))
    kind.compiled()
    edit(kind.sources / "two.cu", "retrun", "return")
    edit(kind.sources / "one.cu", "int one(", "int one()")
    assert kind.sum() == SUM
    assert kind.compiled() == ["one.cu", "two.cu"]


def test_a_compiler_that_dies_over_its_output_leaves_nothing(kind):
    Compiler(kind.gcc.file, 'case "$*" in *" -c "*bindings*) echo half > "${@: -1}"; kill -9 $$ ;; esac')
    with pytest.raises(build.BuildError, match="csrc/bindings.cpp: .* exit status -9"):
        kind.build()
    assert not list(kind.folder.glob("*bindings*.o")) and kind.modules() == []


def test_a_build_that_is_killed_is_made_again(kind):
    """Here with half an object written, and while it holds the lock."""
    honest = kind.gcc.file.read_text()
    Compiler(kind.gcc.file, 'case "$*" in *" -c "*bindings*) echo half > "${@: -1}"; kill -9 $PPID $$ ;; esac')
    assert in_a_process(kind, 1).returncode == -9
    kind.gcc.file.unlink()  # it may still be running, and cannot be written then
    kind.gcc.file.write_text(honest)
    kind.gcc.file.chmod(0o755)
    assert kind.sum() == SUM


def test_a_file_edited_while_it_is_compiled_is_not_taken_for_the_old_one(kind):
    honest = kind.gcc.file.read_text()
    edit(kind.gcc.file, "exec", f'case "$*" in *bindings*) sed -i s/10/50/ {kind.sources}/tiny.h ;; esac\nexec')
    with pytest.raises(build.BuildError, match="changed while they were compiled: repeat"):
        kind.build()
    kind.gcc.file.write_text(honest)
    assert kind.sum() == 5 * SUM
    edit(kind.sources / "tiny.h", "FACTOR 50", "FACTOR 10")
    assert kind.sum() == SUM


def in_a_process(kind, threads):
    """That many builds at once in a process of its own, which prints what their modules compute."""
    call = f"build.build_emulated(Path({str(kind.folder)!r}), sources=Path({str(kind.sources)!r}))"
    if kind.name == "_cuda":
        paths = [f"Path({str(p)!r})" for p in (kind.sources, kind.sources / build.MODULE, kind.nvcc.file, kind.folder)]
        call = "build.build_cuda({}, {}, nvcc={}, folder={})".format(*paths)
    code = (
        "from pathlib import Path\nfrom concurrent.futures import ThreadPoolExecutor\nfrom csrc import build\n"
        f"with ThreadPoolExecutor({threads}) as pool:\n    made = list(pool.map(lambda _: {call}, range({threads})))\n"
        f"print(*{{build.load(path, {kind.name!r}).sum() for path in made}})"
    )
    folder = Path(build.__file__).parent.parent
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


def test_builds_at_once_compile_once(kind):
    """Two processes of two threads each."""
    edit(kind.gcc.file, "exec", "sleep 0.1\nexec")
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: in_a_process(kind, 2), range(2)))
    assert [d.stdout.split() for d in done] == [[str(SUM)]] * 2, [d.stderr for d in done]
    assert kind.compiled() == ALL and not list(kind.folder.glob(".*"))


def test_what_is_missing_is_said(kind, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="install g.. .*apt-get install g"):
        kind.build()
    monkeypatch.delenv("CXX")
    monkeypatch.setitem(sys.modules, "pybind11", None)
    with pytest.raises(build.BuildError, match="pip install 'pybind11"):
        kind.build()
    (kind.sources / "bindings.cpp").unlink()
    with pytest.raises(build.BuildError, match="lacks"):
        kind.build()


def test_what_nobody_uses_is_removed(kind):
    kind.build()
    old = kind.folder / "old.cu-0123.o"
    old.write_text("")
    for file in kind.folder.iterdir():
        os.utime(file, (0, 0))
    module = kind.build()
    assert not old.exists() and module.exists()
    kind.compiled()
    kind.build()
    assert kind.compiled() == []


# emulated


def test_modules_of_different_sources_run_side_by_side(sources, gcc, tmp_path):
    """As tests' edited copies do; each has its own state."""
    folder, other = tmp_path / "objects", tmp_path / "copy"
    shutil.copytree(sources, other)
    first = build.build_emulated(folder, sources=sources)
    gcc.compiled()
    assert build.build_emulated(folder, sources=other) == first and gcc.compiled() == []  # wherever it lies
    edit(other / "one.cu", "1 * FACTOR", "7 * FACTOR")
    second = build.build_emulated(folder, sources=other)
    assert gcc.compiled() == ["one.cu"] and second != first
    modules = [build.load(path, "_emulated") for path in (first, second)]
    assert [m.sum() for m in modules] == [SUM, 90] and [m.count() for m in modules] == [2, 2]
    assert modules[0].sum() == SUM and [m.count() for m in modules] == [4, 2]


def test_a_sanitizer_compiles_kernels_again(sources, gcc, tmp_path):
    folder = tmp_path / "objects"
    plain = build.build_emulated(folder, sources=sources)
    gcc.compiled()
    checked = build.build_emulated(folder, sources=sources, sanitize="address")
    assert checked != plain and gcc.compiled() == ["one.cu", "two.cu"]
    assert [b"__asan" in path.read_bytes() for path in (plain, checked)] == [False, True]


def test_pybind11_is_found(sources, gcc, tmp_path):
    (sources / "bindings.cpp").write_text(
        '#include <pybind11/pybind11.h>\n#include "tiny.h"\n'
        'PYBIND11_MODULE(REDLINE_MODULE, m) { m.def("one", &one); m.attr("emulated") = EMULATED; }\n'
    )
    with (sources / "tiny.h").open("a") as file:
        file.write("#ifdef REDLINE_EMULATION\n#define EMULATED true\n#endif\n")
    module = build.load(build.build_emulated(tmp_path / "objects", sources=sources), "_emulated")
    assert module.one() == 10 and module.emulated is True


# for GPUs


def test_a_stale_module_is_recognised(sources, gcc, tmp_path):
    kind = Cuda(tmp_path, sources, gcc)
    assert build.load_record(sources / build.MODULE) is None
    record = build.load_record(kind.build())
    assert (record["nvcc"], record["ptx"]) == ("12.8", "compute_120")
    assert record["architectures"] == ["sm_80", "sm_90a", "sm_100", "sm_120"]
    assert build.stale(record, sources) is None
    for name in tiny_csrc.FILES:
        text = (sources / name).read_text()
        (sources / name).write_text(text + "\n")
        assert build.stale(record, sources) == f"csrc/{name} has changed since csrc/ was compiled"
        (sources / name).unlink()
        assert build.stale(record, sources) == f"csrc/{name} is gone since csrc/ was compiled"
        (sources / name).write_text(text)
    (sources / "three.cu").write_text("")
    assert build.stale(record, sources) == "csrc/three.cu is new since csrc/ was compiled"
    assert build.stale(build.load_record(kind.build()), sources) is None
    (sources / build.MODULE).unlink()
    assert build.load_record(sources / build.MODULE) is None
    kind.build()
    assert (sources / build.MODULE).exists()


def test_a_module_in_use_is_replaced_not_overwritten(sources, gcc, tmp_path):
    kind = Cuda(tmp_path, sources, gcc)
    module = kind.build()
    inode, loaded = module.stat().st_ino, build.load(module, "_cuda")
    assert kind.build().stat().st_ino == inode  # nothing to do
    edit(sources / "two.cu", "2 * FACTOR", "3 * FACTOR")
    assert kind.build().stat().st_ino != inode and loaded.sum() == SUM
    edit(sources / "two.cu", "return", "retrun")
    with pytest.raises(build.BuildError):
        kind.build()
    edit(sources / "two.cu", "retrun", "return")
    assert kind.sum() == 40
    edit(sources / "two.cu", "return", "retrun")
    assert build.stale(build.load_record(module), sources)


@pytest.mark.parametrize(
    "release, architectures, last",
    [
        ("12.4", ("80", "90a"), ["arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90"]),
        ("12.8", ("80", "90a", "100", "120"), ["arch=compute_120,code=[sm_120,compute_120]"]),
        ("13.0", ("80", "90a", "100", "120"), ["arch=compute_120,code=[sm_120,compute_120]"]),
    ],
)
def test_an_nvcc_compiles_for_what_it_knows(tmp_path, release, architectures, last):
    """And keeps PTX for what it does not, never that of sm_90a, which runs on 9.0 alone."""
    nvcc = build.Nvcc.of(fake_nvcc(tmp_path / "nvcc", release).file)
    assert (nvcc.release, nvcc.architectures) == (release, architectures)
    assert nvcc.targets[-len(last) :] == [f"-gencode={target}" for target in last]


def test_an_nvcc_that_is_too_old_is_refused(tmp_path):
    with pytest.raises(
        build.BuildError, match="nvcc 11.8 at .* is too old, csrc/ needs 12.0 or newer: .*REDLINE_CUDA=0"
    ):
        build.Nvcc.of(fake_nvcc(tmp_path / "nvcc", "11.8").file)


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
def test_nvcc_s_module_has_code_for_all_gpus_and_exports_itself_alone(sources, tmp_path):
    """Exported functions of the CUDA runtime would be bound to PyTorch's copy of it, of another version."""
    module = build.build_cuda(sources, sources / build.MODULE, nvcc=NVCC, folder=tmp_path)
    assert build.load(module, "_cuda").sum() == SUM
    exported = subprocess.run(["nm", "-D", "--defined-only", module], capture_output=True, text=True, check=True).stdout
    assert [line.split()[-1] for line in exported.splitlines()] == ["PyInit__cuda"]
    needed = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"NEEDED.*(cuda|torch)", needed)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = subprocess.run([cuobjdump, "-lelf", "-lptx", module], capture_output=True, text=True, check=True).stdout
    record = build.load_record(module)
    assert set(re.findall(r"(sm_\w+)\.(?:cubin)", found)) >= set(record["architectures"])
    assert set(re.findall(r"(sm_\w+)\.ptx", found)) == {record["ptx"].replace("compute", "sm")}


# the install


def test_nvcc_is_sought_in_its_places(tmp_path, monkeypatch):
    for name in ("home", "path", "default"):
        fake_nvcc(tmp_path / name / "bin" / "nvcc")
    places = {"CUDA_HOME": str(tmp_path / "home"), "PATH": str(tmp_path / "path" / "bin")}
    monkeypatch.setattr(build, "CUDA_FOLDER", tmp_path / "default")
    assert build.find_nvcc(places) == tmp_path / "home/bin/nvcc"
    assert build.find_nvcc(places | {"CUDA_HOME": str(tmp_path)}) == tmp_path / "path/bin/nvcc"
    assert build.find_nvcc({"PATH": str(tmp_path)}) == tmp_path / "default/bin/nvcc"
    assert build.find_nvcc({}) == tmp_path / "default/bin/nvcc"
    (tmp_path / "default/bin/nvcc").chmod(0o644)
    monkeypatch.chdir(tmp_path / "path" / "bin")
    assert build.find_nvcc({}) is None  # not in the folder where one stands


@pytest.fixture
def checkout(tmp_path, gcc, monkeypatch):
    """(environment) -> what `setup.py build` says in a checkout with the small csrc/, where there is no nvcc.

    pip calls setup.py's commands in the same way.
    """
    pytest.importorskip("setuptools")
    root = tmp_path / "checkout"
    tiny_csrc.write(root / "csrc")
    for name in ("setup.py", "csrc/__init__.py", "csrc/build.py"):
        shutil.copy(ROOT / name, root / name)
    edit(root / "csrc" / "build.py", str(build.CUDA_FOLDER), str(tmp_path / "nowhere"))
    # packages and py_modules of the real one are not there
    edit(
        root / "setup.py",
        '["core", "core.data", "core.evals", "core.models", "core.share", "csrc", "kernels"]',
        '["csrc"]',
    )
    edit(root / "setup.py", '["train", "eval"]', "[]")

    def run(**environ):
        env = {"PATH": str(gcc.file.parent), "CXX": os.environ["CXX"], "PYTHONDONTWRITEBYTECODE": "1"} | environ
        command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(root / "out")]
        return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)

    run.root, run.module = root, root / "out" / "csrc" / build.MODULE
    return run


def test_without_nvcc_the_install_succeeds(checkout):
    assert checkout().returncode == 0 and not checkout.module.exists()
    assert {file.name for file in checkout.module.parent.iterdir()} == {*tiny_csrc.FILES, "__init__.py", "build.py"}
    forced = checkout(REDLINE_CUDA="1")
    assert forced.returncode == 1 and "REDLINE_CUDA=1, and there is no nvcc" in forced.stderr
    assert "12.8 or newer" in forced.stderr and "Traceback" not in forced.stderr


@pytest.mark.parametrize("value", ["2", "yes", "-1", "01"])
def test_redline_cuda_is_0_or_1(checkout, value):
    done = checkout(REDLINE_CUDA=value)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: REDLINE_CUDA={value}: expected 0 ")


def test_with_nvcc_the_install_compiles(checkout, tmp_path):
    home = fake_nvcc(tmp_path / "toolkit" / "bin" / "nvcc").file.parent.parent
    assert checkout(CUDA_HOME=str(home), REDLINE_CUDA="0").returncode == 0 and not checkout.module.exists()
    for value in ("", "1"):
        done = checkout(CUDA_HOME=str(home), REDLINE_CUDA=value)
        assert done.returncode == 0, done.stderr
        assert build.load(checkout.module, "_cuda").sum() == SUM and build.load_record(checkout.module)
        # and one that is not wanted any more is taken away
        assert checkout(CUDA_HOME=str(home), REDLINE_CUDA="0").returncode == 0
        assert not checkout.module.exists() and not build.record_file(checkout.module).exists()
    assert list((checkout.root / "build" / "csrc").glob("one.cu-*.o"))


def test_a_failing_compile_fails_the_install(checkout, tmp_path):
    home = fake_nvcc(tmp_path / "toolkit" / "bin" / "nvcc").file.parent.parent
    edit(checkout.root / "csrc" / "two.cu", "return", "retrun")
    done = checkout(CUDA_HOME=str(home))
    assert done.returncode == 1 and not checkout.module.exists()
    assert "error: csrc/two.cu: nvcc failed" in done.stderr and "retrun" in done.stderr
    assert "REDLINE_CUDA=0 installs without" in done.stderr
    assert checkout(CUDA_HOME=str(home), REDLINE_CUDA="0").returncode == 0


def test_the_build_needs_no_torch():
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert sorted(re.match(r"\w+", name)[0] for name in required) == ["pybind11", "setuptools"]
    code = "import sys; from csrc import build; print(sorted({'torch', 'pybind11', 'setuptools'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# planted bugs

MUTATIONS = {
    "headers are not hashed": ("changed_header", Edit(r"\(source, \*headers\(source\.parent\)\)", "(source,)")),
    "a header compiles only what includes it": ("changed_header", Edit(r"\*headers\(source\.parent\)", "")),
    "options are not hashed": ("sanitizer", Edit(r"_digest\(content, options, ", "_digest(content, ")),
    "the compiler's version is not hashed": ("another_version", Edit(r", _version\(compiler\)", "")),
    "no lock": ("builds_at_once", Edit(r"fcntl\.flock\(.*\)", "pass")),
    "the target is written in place": ("is_killed", Edit(r'f"\.\{step.target.name\}"', "step.target.name")),
    "half a target stays": ("dies_over", Edit(r"part\.unlink\(missing_ok=True\)", "pass")),
    "a failing compile is passed over": ("does_not_compile", Edit(r"    if errors:\n", "    if False:\n")),
    "the module is overwritten": ("module_in_use", Edit(r"part\.replace\(file\)", "file.write_bytes(content)")),
    "sources are hashed afterwards": ("edited_while", Edit(r"if hashes\(sources\) != before:", "if False:")),
    "PTX of sm_90a": ("compiles_for_what_it_knows", Edit(r'\[-1\]\.rstrip\("a"\)', "[-1]")),
    "all modules have one name": ("side_by_side", Edit(r"f\"_emulated-\{.*\}\.so\"", '"_emulated.so"')),
    "no place means the current folder": ("sought", Edit(r"filter\(None, folders\)", 'x or "" for x in folders')),
}  # fmt: skip


@pytest.mark.parametrize("name", mutations(MUTATIONS, always=["headers are not hashed", "no lock"]))
def test_planted_bugs_are_found(tmp_path, name):
    test, change = MUTATIONS[name]
    for folder in ("csrc", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "_cuda*"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file = tmp_path / "csrc" / "build.py"
    file.write_text(edited(file.read_text(), [change]))
    options = ("-qx", "-n0", "-p", "no:cacheprovider", "tests/test_csrc_build.py", "-k", test)
    command = [sys.executable, "-m", "pytest", *options]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    # a module overwritten while it is mapped is a crash
    assert "1 failed" in done.stdout or done.returncode < 0, done.stdout + done.stderr
