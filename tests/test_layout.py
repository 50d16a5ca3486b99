"""The repository's structure, read off the syntax trees: who may import whom, and which files belong together."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# a package may import those before it
LAYERS = ["csrc", "kernels", "core", "top", "bench", "tests"]
SUPPORT = {"__init__", "__main__", "op", "ops", "dispatch", "sizes", "tile", "gemm", "fp8", "fp8_products", "master"}
SUPPORT |= {"extension", "windows", "attention_libraries"}


def python_files():
    skipped = {".venv", "venv", "build", "runs"}
    return [p for p in ROOT.rglob("*.py") if not skipped & set(p.relative_to(ROOT).parts) and ".egg-info" not in str(p)]


def package(path):
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else "top"


def imported_packages(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    here = package(path)
    ours = {"train": "top", "eval": "top", **{name: name for name in LAYERS}}
    for name in imported_packages(ast.parse(path.read_text())):
        target = ours.get(name, here)
        assert target == here or below(target, here), f"{path.name} of {here} imports {name}"


def below(target, here):
    """Whether package `here` may import `target`. setup.py and what else is in no package counts as top."""
    return LAYERS.index(target) < LAYERS.index(here)


@pytest.mark.parametrize("path", [p for p in python_files() if package(p) in ("csrc", "core", "kernels")], ids=str)
def test_importing_does_nothing(path):
    """Module level holds definitions, not work: no calls as statements, no prints, no environment changes.

    Giving a torch op its gradient belongs to the op's definition.
    """
    for node in ast.parse(path.read_text()).body:
        assert not isinstance(node, (ast.For, ast.While, ast.With, ast.Try)), f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Expr):
            if package(path) == "kernels" and isinstance(node.value, ast.Call):
                assert getattr(node.value.func, "attr", None) == "register_autograd", f"{path.name}:{node.lineno}"
                continue
            assert isinstance(node.value, ast.Constant), f"{path.name}:{node.lineno} is a statement at import time"


def test_each_op_has_its_test():
    """One bench file serves all ops."""
    ops = {p.stem for p in (ROOT / "kernels").glob("*.py")} - SUPPORT
    ops |= {p.name for p in (ROOT / "kernels").iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert len(ops) > 5
    for op in ops:
        assert (ROOT / "tests" / f"test_{op}.py").exists(), op


def test_top_level_is_fixed():
    files = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True
    ).stdout.split()
    names = {f.split("/")[0] for f in files}
    allowed = {"core", "kernels", "csrc", "bench", "tests", "docs", "examples", "train.py", "eval.py", "setup.py"}
    allowed |= {"README.md", "CONTRIBUTING.md", "LICENSE", "pyproject.toml"}
    assert names <= allowed | {".ci", ".gitignore", ".pre-commit-config.yaml"}
