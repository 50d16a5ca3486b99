"""Checkpoints of the quickstart's size and of 120 MB: `pytest bench/bench_checkpoint.py`.

save, load   written whole or not at all, and flushed to the disk, against torch.save and torch.load of the same
             tensors, flushed as well
stop         what the loop stops for while a thread writes, against a save that it waits for
"""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.suite import HostPrograms, host_item
from core import checkpoint
from core.config import ModelConfig, preset
from core.data.tokenizer import Tokenizer
from core.models.gpt2 import GPT
from core.saving import HostCopy

Tensors = dict[str, Tensor]
QUICKSTART = preset("quickstart", "cpu").model
LARGER = dataclasses.replace(QUICKSTART, depth=6, d_model=256)  # 120 MB with two moments


def run_tensors(cfg: ModelConfig) -> Tensors:
    torch.manual_seed(0)
    model = GPT(cfg)
    model.init_weights(0)
    moments = ("exp_avg", "exp_avg_sq")
    states = {f"{name}.{m}": torch.randn(p.shape) for name, p in model.named_parameters() for m in moments}
    tensors = checkpoint.training_tensors(model, states)
    return {name: t for name, t in tensors.items() if isinstance(t, Tensor)}


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_files(a: Callable[[], Tensors], b: Callable[[], Tensors]) -> bool:
    return same(a(), b())


class Files:
    """The same tensors in both forms, in a folder of their own."""

    def __init__(self, folder: Path, cfg: ModelConfig = QUICKSTART) -> None:
        self.tensors = run_tensors(cfg)
        self._copy = HostCopy()
        self._whole, self._plain = folder / "step_000001", folder / "plain.pt"
        self._tokenizer = Tokenizer([bytes([i]) for i in range(256)])

    def save(self) -> Callable[[], Tensors]:
        checkpoint.save(self._whole, self.tensors, {}, self._tokenizer)
        return self.load

    def stop(self) -> Callable[[], Tensors]:
        assert checkpoint.not_finite(self.tensors) is None
        copies = self._copy.of(self.tensors)
        return lambda: {name: t for name, t in copies.items() if isinstance(t, Tensor)}

    def load(self) -> Tensors:
        filled = {name: torch.empty_like(t) for name, t in self.tensors.items()}
        checkpoint.load_tensors(self._whole, filled)
        return filled

    def torch_save(self) -> Callable[[], Tensors]:
        with open(self._plain, "wb") as file:
            torch.save(self.tensors, file)
            file.flush()
            os.fsync(file.fileno())
        return self.torch_load

    def torch_load(self) -> Tensors:
        stored = torch.load(self._plain, weights_only=True)
        return {name: torch.empty_like(t).copy_(stored[name]) for name, t in self.tensors.items()}


@contextmanager
def saving(cfg: ModelConfig) -> Iterator[HostPrograms]:
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder), cfg)
        yield HostPrograms({"redline": files.save, "torch.save": files.torch_save}, "torch.save", same_files)


@contextmanager
def stopping() -> Iterator[HostPrograms]:
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder), LARGER)
        yield HostPrograms({"redline": files.stop, "synchronous": files.save}, "synchronous", same_files)


@contextmanager
def loading() -> Iterator[HostPrograms]:
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder))
        files.save(), files.torch_save()
        yield HostPrograms({"redline": files.load, "torch.load": files.torch_load}, "torch.load", same)


ITEMS = [
    host_item("checkpoint save", "quickstart", "torch.save", (), partial(saving, QUICKSTART)),
    host_item("checkpoint save", "120 MB", "torch.save", (), partial(saving, LARGER)),
    host_item("checkpoint stop", "120 MB", "synchronous", (), stopping),
    host_item("checkpoint load", "quickstart", "torch.load", (), loading),
]


def test_checkpoint(record):
    record()
