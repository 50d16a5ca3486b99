"""Package metadata. `pip install -e .` installs Redline editable: it runs from its checkout."""

import sys

from setuptools import setup

if not sys.platform.startswith("linux"):
    raise SystemExit(f"Redline runs on Linux only; this is {sys.platform}")

setup(
    name="redline-lm",
    version="0.1.0",
    description="Trains GPT-2-grade language models at the limit of the hardware.",
    license="MIT",
    python_requires=">=3.11,<3.14",
    packages=["core", "core.data", "core.evals", "core.models", "core.share", "kernels"],
    py_modules=["train", "eval"],
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
            "hypothesis",
            "ruff",
            "pyrefly",
            "transformers",
        ],
        "wandb": ["wandb"],
        "energy": ["nvidia-ml-py"],
        "hf": ["transformers", "huggingface_hub"],
    },
)
