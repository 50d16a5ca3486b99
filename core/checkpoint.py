"""Checkpoints: a folder `step_000123` that is whole or not there.

    model-00001-of-00001.safetensors   every tensor: model.<parameter>, optim.<parameter>.<state>, rng.*
    model.safetensors.index.json       written by torch.distributed.checkpoint's Hugging Face writer
    state.json                         everything that is not a tensor: `core.run.State`
    tokenizer.*                        so that a checkpoint can be evaluated on its own

Written beside its final place under a dotted name, flushed to disk, then renamed: a process killed at any instant
leaves the previous checkpoints as they were. No pickle is read or written.
"""

import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from core.data.tokenizer import Tokenizer
from core.models.gpt2 import GPT
from core.stopping import UserError

STATE_FILE = "state.json"
_NAME = re.compile(r"step_(\d{6,})")


def write_json(path: Path, value: Any) -> None:
    """Writes under a temporary name, then renames."""
    tmp = path.with_name(f".{path.name}.tmp")
    tmp.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    os.replace(tmp, path)


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:06d}"


def save(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Writes one checkpoint from one process; an older folder of the same name is replaced."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    tmp = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what we mean
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(tmp)), no_dist=True)
    tokenizer.save(tmp)
    write_json(tmp / STATE_FILE, state)
    for path in (*tmp.iterdir(), tmp):
        _fsync(path)
    old = folder.with_name(f".{folder.name}.old.tmp")
    if folder.exists():  # out of the way under a dotted name first: a half-deleted folder must not look whole
        os.replace(folder, old)
    os.replace(tmp, folder)
    _fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def checkpoints(run_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    folders = [p for p in (run_dir / "checkpoints").glob("step_*") if _NAME.fullmatch(p.name)]
    return sorted((p for p in folders if (p / STATE_FILE).exists()), key=lambda p: int(p.name[5:]))


def drop_after(run_dir: Path, step: int) -> list[Path]:
    """Deletes the checkpoints beyond `step`, which a run that continues there will make anew; returns them."""
    later = [p for p in checkpoints(run_dir) if int(p.name[5:]) > step]
    for path in later:
        shutil.rmtree(path)
    return later


def prune(run_dir: Path, keep: int) -> None:
    """Deletes all but the `keep` newest checkpoints, and leftovers of killed saves."""
    for path in checkpoints(run_dir)[: -max(keep, 1)]:
        shutil.rmtree(path)
    for path in (run_dir / "checkpoints").glob(".step_*.tmp"):
        shutil.rmtree(path)


def find(path: str | Path) -> Path:
    """The checkpoint at `path`: itself, or the newest of the run folder it names. UserError when there is none."""
    path = Path(path).expanduser()
    if (path / STATE_FILE).exists():
        return path
    if not path.exists():
        raise UserError(f"{path} does not exist: give a run folder (runs/...) or one of its checkpoints")
    found = checkpoints(path)
    if not found:
        raise UserError(f"{path} holds no checkpoint: give a run folder with checkpoints/step_*, or one of those")
    return found[-1]


def load_json(path: Path) -> Any:
    """What a JSON file of a checkpoint holds; UserError when it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(f"{path} is damaged ({error}): use another checkpoint") from error


def _stored(folder: Path) -> dict[str, Any]:
    """Metadata of every tensor of a checkpoint by name."""
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} has lost its .safetensors file: use another checkpoint")
    try:
        return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: BaseException) -> UserError:
    return UserError(f"{folder} is damaged ({str(error).splitlines()[-1]}): use another checkpoint")


def load_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fills `tensors` in place from a checkpoint; UserError when a name, shape or type differs."""
    stored = _stored(folder)
    for name, t in tensors.items():
        meta = stored.get(name)
        if meta is None:
            raise UserError(f"{folder} has no tensor {name!r}: it belongs to another model or configuration")
        if meta.size != t.shape or meta.properties.dtype != t.dtype:
            there = f"{meta.properties.dtype} {tuple(meta.size)}"
            raise UserError(f"{folder}: {name} is {there}, this run has {t.dtype} {tuple(t.shape)}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
        except CheckpointException as error:
            raise _damaged(folder, error) from error


def load_model(folder: Path, model: GPT) -> None:
    """Fills a model from a checkpoint, casting each parameter to the type it is stored in."""
    stored = _stored(folder)
    for name, p in model.named_parameters():
        if (meta := stored.get(f"model.{name}")) is not None:
            p.data = p.data.to(meta.properties.dtype)
    load_training(folder, model, {})


def load_training(folder: Path, model: GPT, optimizer_state: dict[str, Tensor]) -> None:
    """Fills a model and the optimizer's state in place; copies of weights follow."""
    load_tensors(folder, training_tensors(model, optimizer_state))
    model.refresh_copies()


def training_tensors(model: torch.nn.Module, optimizer_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a run by checkpoint name; they share storage with the run's."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    return tensors | {f"optim.{name}": t for name, t in optimizer_state.items()}


def rng_tensors(device: torch.device) -> dict[str, Tensor]:
    """State of torch's generators: the CPU's, and the GPU's of a run there."""
    state = {"rng.cpu": torch.get_rng_state()}
    return state | ({"rng.cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_rng(folder: Path, device: torch.device) -> None:
    """Sets the generators to a checkpoint's state; a GPU's stays as it is when the run was on a CPU before."""
    stored = _stored(folder)
    state = {name: t for name, t in rng_tensors(device).items() if name in stored}
    load_tensors(folder, state)
    torch.set_rng_state(state["rng.cpu"])
    if "rng.cuda" in state:
        torch.cuda.set_rng_state(state["rng.cuda"], device)
