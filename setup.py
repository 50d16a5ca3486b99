"""Package metadata, and the compilation of csrc/. `pip install -e .` installs Redline editable: it runs from its
checkout.

csrc/ is compiled if there is an nvcc. REDLINE_CUDA=0 never compiles it, and removes what is
there; REDLINE_CUDA=1 makes a missing nvcc an error.
"""

import os
import sys
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.build import build
from setuptools.errors import CompileError

if not sys.platform.startswith("linux"):
    raise SystemExit(f"Redline runs on Linux only; this is {sys.platform}")

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # a build backend does not have it there

from csrc.build import CSRC, MODULE, OBJECTS, BuildError, build_cuda, record_file, wanted_nvcc  # noqa: E402

try:
    NVCC = wanted_nvcc()
except BuildError as error:
    raise SystemExit(f"error: {error}") from None


class WithModule(Distribution):
    """A wheel with a compiled module is one for this Python and platform."""

    def has_ext_modules(self) -> bool:
        return NVCC is not None


class BuildCuda(Command):
    """Puts csrc's module beside its sources where the install is editable, else into the wheel."""

    description = "compile csrc/*.cu"
    user_options = []
    editable_mode = False  # set by setuptools

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def module(self) -> Path:
        return (CSRC if self.editable_mode else Path(self.build_lib, "csrc")) / MODULE

    def run(self) -> None:
        if NVCC is None:
            if os.environ.get("REDLINE_CUDA") == "0":  # an earlier install may have left one
                for file in (self.module(), record_file(self.module())):
                    file.unlink(missing_ok=True)
            return
        try:
            build_cuda(CSRC, self.module(), nvcc=NVCC, folder=OBJECTS)
        except BuildError as error:
            raise CompileError(f"{error}\n(REDLINE_CUDA=0 installs without compiling csrc/)") from None

    def get_outputs(self) -> list[str]:
        return [str(self.module()), str(record_file(self.module()))] if NVCC else []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []  # package data


class Build(build):
    sub_commands = [*build.sub_commands, ("build_cuda", None)]


setup(
    name="redline-lm",
    version="0.1.0",
    description="Trains GPT-2-grade language models at the limit of the hardware.",
    license="MIT",
    python_requires=">=3.11,<3.14",
    packages=["core", "core.data", "core.evals", "core.models", "core.share", "csrc", "kernels"],
    package_data={"csrc": ["*.cu", "*.h", "*.cpp"]},
    py_modules=["train", "eval"],
    cmdclass={"build": Build, "build_cuda": BuildCuda},
    distclass=WithModule,
    install_requires=[
        "torch>=2.11,<2.14",
        "triton>=3.6",
        "numpy>=1.26",
        "tiktoken",
        "rustbpe",
        "pyarrow",
        "tyro",
        "rich",
        "matplotlib",
        "safetensors",
        "huggingface_hub",
        "pyyaml",
        "filelock",
    ],
    extras_require={
        "test": [
            "pytest",
            "pytest-benchmark",
            "pytest-timeout",
            "pytest-xdist",
            "pybind11>=2.13",
            "hypothesis",
            "ruff",
            "pyrefly<1.6",  # each release checks more
            "transformers",
        ],
        "wandb": ["wandb"],
        "energy": ["nvidia-ml-py"],
        "hf": ["transformers", "huggingface_hub"],
        # attention's fa4, of which there are betas alone: named, or pip would not take one. flash-attn is there only as
        # source, which takes CUDA and long to compile (pip install --no-build-isolation flash-attn), FlashAttention 3
        # not at all: kernels/attention_libraries.py. FlashAttention 2 comes with PyTorch
        "flash": ["flash-attn-4>=4.0.0b36"],
    },
)
