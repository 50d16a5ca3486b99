"""A csrc/ that compiles in half a second, and compilers that note what they are called for.

Two .cu files, a header and bindings.cpp, which uses Python's own headers alone: pybind11's take seconds.
"""

import os
import shutil
from pathlib import Path

FILES = {
    "tiny.h": """
        #pragma once
        #define FACTOR 10
        int one();
        int two();
        inline int& calls() { static int n = 0; return n; }
    """,
    "one.cu": """
        #include "tiny.h"
        #ifdef __CUDACC__
        template <class T> requires(sizeof(T) == 4) __global__ void set(T* x) { *x = FACTOR; }
        void launch(float* x) { set<<<1, 1>>>(x); }
        #endif
        int one() { return ++calls(), 1 * FACTOR; }
    """,
    "two.cu": """
        #include "tiny.h"
        int two() { return ++calls(), 2 * FACTOR; }
    """,
    "bindings.cpp": """
        #include <Python.h>
        #include "tiny.h"
        #define JOIN(a, b) a##b
        #define INIT(name) JOIN(PyInit_, name)
        static PyObject* sum(PyObject*, PyObject*) { return PyLong_FromLong(one() + two()); }
        static PyObject* count(PyObject*, PyObject*) { return PyLong_FromLong(calls()); }
        static PyMethodDef functions[] = {{"sum", sum, METH_NOARGS, ""}, {"count", count, METH_NOARGS, ""}, {}};
        static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "tiny", "", -1, functions};
        PyMODINIT_FUNC INIT(REDLINE_MODULE)() { return PyModule_Create(&definition); }
    """,
}
SUM = 30

# what nvcc 12.4 and 12.8 list; sm_90a is in neither
CODES = {
    "11.8": "80 86 89 90",
    "12.4": "50 52 70 80 86 89 90",
    "12.8": "75 80 86 89 90 100 101 120",
    "13.0": "75 80 90 100 120",
}


def write(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


class Compiler:
    """A script that stands for a compiler and runs g++. `compiled` names the sources of calls since the last look."""

    def __init__(self, file: Path, before: str = "", options: str = '"$@"') -> None:
        """before: shell code that runs first. options: those that g++ gets."""
        self.file, self.log = file, file.with_suffix(".log")
        file.parent.mkdir(parents=True, exist_ok=True)
        home = os.environ["PATH"]  # for g++'s own tools; a test's PATH may be bare
        file.write_text(
            f'#!/bin/bash\nexport PATH={home!r}\nfor last; do :; done\n{before}\n[ "$1" != --version ] && '
            f'echo "$*" >> {self.log}\nexec {shutil.which("g++")} {options}\n'
        )
        file.chmod(0o755)

    def compiled(self) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        words = [word for line in lines if " -c " in line for word in line.split()]
        return sorted(Path(word).name for word in words if word.endswith((".cu", ".cpp")))


def fake_nvcc(file: Path, release: str = "12.8") -> Compiler:
    """Says what that release says, and compiles host code alone."""
    codes = "\\n".join(f"sm_{code}" for code in CODES[release].split())
    before = f"""
case "$1" in
    --version) echo "Cuda compilation tools, release {release}, V{release}.1"; exit ;;
    --list-gpu-code) printf '{codes}\\n'; exit ;;
esac
options=()
for o; do
    case "$o" in
        -gencode=*|-ccbin=*|--threads=*|-lineinfo|-cudart=*|-Xcompiler=*|-Xlinker=*) ;;
        *) options+=("$o") ;;
    esac
done
case " $* " in *" -c "*) options=(-fPIC -fvisibility=hidden -x c++ "${{options[@]}}") ;; esac
"""
    return Compiler(file, before, '"${options[@]}"')
