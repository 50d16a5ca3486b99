"""Checkpoints: a folder `step_000123` that is whole or not there.

    model-00001-of-00001.safetensors   every tensor: model.<parameter>, optim.<parameter>.<state>, fp8.*, rng.*
    model.safetensors.index.json       by torch.distributed.checkpoint's Hugging Face writer
    shard-00002-model-*.safetensors    instead of these two, of several processes: what the second of them wrote. Where
                                       pieces begin in the whole is in the file, as that writer puts it there
    state.json                         everything that is not a tensor: `core.run.State`; the SHA-256 of every file
    tokenizer.*                        so that a checkpoint can be evaluated on its own

Written beside its final place under a dotted name, flushed to disk, then renamed: a process killed at any instant
leaves the previous checkpoints as they were. One that is replaced, .step_000123.old.tmp for a moment, counts until its
successor is there. What is read is compared with its checksum first. No pickle is read or written. Any number of
processes reads what any number wrote: each takes what it keeps of every tensor.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import (
    ChunkStorageMetadata,
    DefaultLoadPlanner,
    DefaultSavePlanner,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    LoadPlan,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from core import communication
from core.data.tokenizer import Tokenizer
from core.models.gpt2 import GPT
from core.sharding import Shard
from core.stopping import UserError, expanded, is_out_of_memory, naming

STATE_FILE = "state.json"
_NAME = re.compile(r"step_(\d{6,})|\.step_(\d{6,})\.old\.tmp")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes under a temporary name, then renames."""
    tmp = path.with_name(f".{path.name}.tmp")
    with naming(path):
        tmp.write_text(text, encoding="utf-8")
        os.replace(tmp, path)


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:06d}"


def save(
    folder: Path,
    tensors: Mapping[str, Tensor | Shard],
    state: dict[str, Any],
    tokenizer: Tokenizer,
    *,
    commit: AbstractContextManager[Any] | None = None,
) -> None:
    """Writes one checkpoint; an older folder of the same name is replaced. An OSError names `folder` and leaves the
    older one.

    All ranks call it, each with the pieces that it keeps: an OSError of one is raised on all. A whole tensor that
    several give is written by one of them. Rank 0 gives the state. commit: entered around the renames.
    """
    tmp, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old.tmp")
    is_main, what = not dist.is_initialized() or dist.get_rank() == 0, f"the checkpoint {folder.name}"

    def begin() -> None:
        if is_main:
            folder.parent.mkdir(parents=True, exist_ok=True)
            recover(folder.parent)
            tmp.mkdir()

    def end(digests: dict[str, str]) -> None:
        tokenizer.save(tmp)
        digests |= _settled(path for path in tmp.iterdir() if path.name not in digests)
        values = state | {"files": dict(sorted(digests.items()))}
        write_json(tmp / STATE_FILE, values | {"sha256": _json_digest(values)})
        for path in (tmp / STATE_FILE, tmp):
            _fsync(path)
        with commit or nullcontext():
            if folder.exists():  # out of the way under a dotted name: a half-deleted folder must not look whole
                os.replace(folder, old)
            os.replace(tmp, folder)
        _fsync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)

    with naming(folder):
        try:
            communication.agreed(begin, what)
            written = _write(tmp, tensors)
            shares = communication.agreed(lambda: _settled(written), what)
            files = {name: digest for share in shares for name, digest in share.items()}
            communication.agreed(lambda: end(files) if is_main else None, what)
        except OSError:
            if is_main:  # this also makes room on a full disk for what else has to be written
                recover(folder.parent)
            raise


def _settled(paths: Iterable[Path]) -> dict[str, str]:
    """Flushes files to the disk; returns their checksums by name."""
    paths = list(paths)
    for path in paths:
        _fsync(path)
    return {path.name: _file_digest(path) for path in paths}


def _write(folder: Path, tensors: Mapping[str, Tensor | Shard]) -> list[Path]:
    """Writes this rank's part of all tensors; returns its files."""
    whole, shards = _whole(tensors), _shards(tensors)
    alone = not dist.is_initialized()
    writer = _Writer(folder, rank=0 if alone else dist.get_rank(), sharded=bool(shards) or not alone)
    with _dcp(), communication.saving_group("the other processes to write the checkpoint") as group:
        planner = _SavePlanner(shards)
        dcp.save(whole, storage_writer=writer, planner=planner, process_group=group, no_dist=alone)
    return writer.written


@contextmanager
def _dcp() -> Iterator[None]:
    """Inside, torch.distributed.checkpoint raises what was raised in it, and says nothing of working for one process.

    It wraps every exception: a full disk or Ctrl-C would not be recognised as such."""
    # for good: `catch_warnings` would undo what other threads set meanwhile
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    try:
        yield
    except CheckpointException as error:
        (cause, _), *_ = error.failures.values()
        raise cause from error


def recover(folder: Path) -> None:
    """Gives replaced checkpoints in `folder` their names back where a killed or failed save left no successor, and
    deletes the other leftovers. For the owner of the run alone: it would undo half of a save that is under way."""
    for old in folder.glob(".step_*.old.tmp"):
        path = old.with_name(f"step_{step_of(old):06d}")
        if not path.exists() and (old / STATE_FILE).exists():
            os.replace(old, path)
    for rest in folder.glob(".step_*.tmp"):
        shutil.rmtree(rest, ignore_errors=True)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def step_of(folder: Path) -> int:
    """The step of a checkpoint, by its name; -1 for another folder."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1] or match[2]) if match else -1


def checkpoints(run_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    by_step: dict[int, Path] = {}
    for pattern in (".step_*.old.tmp", "step_*"):  # a replaced one counts until its successor is there
        for path in (run_dir / "checkpoints").glob(pattern):
            if step_of(path) >= 0 and (path / STATE_FILE).exists():
                by_step[step_of(path)] = path
    return [by_step[step] for step in sorted(by_step)]


def drop_after(run_dir: Path, step: int) -> list[Path]:
    """Deletes the checkpoints beyond `step`, which a run that continues there will make anew; returns them."""
    later = [path for path in checkpoints(run_dir) if step_of(path) > step]
    for path in later:
        shutil.rmtree(path)
    return later


def prune(run_dir: Path, keep: int) -> None:
    """Deletes all but the `keep` newest checkpoints, and leftovers of killed saves."""
    recover(run_dir / "checkpoints")
    for path in checkpoints(run_dir)[: -max(keep, 1)]:
        shutil.rmtree(path)


def find(path: str | Path) -> Path:
    """The checkpoint at `path`: itself, or the newest of the run folder it names. UserError when there is none."""
    path = expanded(path)
    if (path / STATE_FILE).exists():
        return path
    if not path.exists():
        raise UserError(f"{path} does not exist: give a run folder (runs/...) or one of its checkpoints")
    found = checkpoints(path)
    if not found:
        raise UserError(f"{path} holds no checkpoint: give a run folder with checkpoints/step_*, or one of those")
    return found[-1]


def run_folder(path: str | Path, out: str | None = None) -> Path:
    """The run folder that `path` is or, for a checkpoint, lies in, also where links lead there; out: a folder that it
    may be. UserError when it is not found."""
    path = expanded(path)
    if not (path / STATE_FILE).exists():
        return path
    there = path.resolve()
    # link by link: checkpoints/ may be one to another disk, from which nothing leads back
    hop = _working_folder() / path
    candidates = [Path(os.path.normpath(hop)).parent.parent]
    while hop.is_symlink():
        hop = hop.parent / hop.readlink()
        candidates.append(Path(os.path.normpath(hop)).parent.parent)
    for home in (*candidates, there.parent.parent, *([expanded(out)] if out else [])):
        same = home / "checkpoints" / there.name
        if same.exists() and same.samefile(there):
            return home
    raise UserError(f"{path} lies in no run folder, as RUN/checkpoints/{there.name}: give the run folder")


def _working_folder() -> Path:
    """As the shell calls it, through the links that led there."""
    here, named = Path.cwd(), Path(os.environ.get("PWD", "."))
    return named if named.is_absolute() and named.exists() and named.samefile(here) else here


def load_json(path: Path) -> Any:
    """What a JSON file of a checkpoint holds; UserError when it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise damaged(path, error) from error


# trust: what was read is what was written


def verify(folder: Path) -> None:
    """UserError, naming the file and another checkpoint, where a file of this one is not what was written."""
    if (problem := _problem(folder)) is not None:
        raise UserError(f"{problem}: {_another(folder)}")


def verify_state(folder: Path, state: dict[str, Any]) -> None:
    """The same for state.json alone, of which `state` is what it holds."""
    rest = {name: value for name, value in state.items() if name != "sha256"}
    if state.get("sha256") != _json_digest(rest):
        raise damaged(folder / STATE_FILE, "its values differ from its checksum")


def damaged(path: Path, what: Any) -> UserError:
    """The error to raise for a damaged file or folder of a checkpoint."""
    folder = path if path.is_dir() else path.parent
    return UserError(f"{path} is damaged ({(str(what).splitlines() or [repr(what)])[-1]}): {_another(folder)}")


def _problem(folder: Path) -> str | None:
    """What of a checkpoint is not as it was written, in words that name the file."""
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_bytes())
        files = state["files"]
        if state.pop("sha256") != _json_digest(state):
            return f"{path} is damaged (its values differ from its checksum)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{path} is damaged ({type(error).__name__}: {error})"
    for name, digest in files.items():
        file = folder / name
        if not file.exists():
            return f"{folder} has lost its {file.suffix} file {name}"
        if _file_digest(file) != digest:
            return f"{file} is damaged (its bytes differ from their checksum)"
    foreign = {path.name for path in folder.glob("*.safetensors")} - files.keys()
    return f"{folder} has a file that is not its own, {min(foreign)}" if foreign else None


def _another(folder: Path) -> str:
    """Advice that names the newest older checkpoint that is whole."""
    run_dir = folder.parent.parent
    older = [path for path in checkpoints(run_dir) if path.name != folder.name and step_of(path) < step_of(folder)]
    good = next((path for path in reversed(older) if _problem(path) is None), None)
    return f"use another checkpoint{f': {shlex.quote(str(good))} is whole' if good else ', no older one here is whole'}"


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json_digest(values: dict[str, Any]) -> str:
    """SHA-256 of values as JSON will give them back."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(values)), sort_keys=True).encode()).hexdigest()


# tensors


def _stored(folder: Path) -> dict[str, Any]:
    """Metadata of every tensor of a checkpoint by name."""
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} has lost its .safetensors file: {_another(folder)}")
    try:
        return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise damaged(folder, error) from error


def load_tensors(folder: Path, tensors: Mapping[str, Tensor | Shard]) -> None:
    """Fills `tensors`, or the pieces of them that this rank keeps, in place from a checkpoint; UserError when a name,
    shape or type differs."""
    stored = _stored(folder)
    for name, t in tensors.items():
        meta = stored.get(name)
        if meta is None:
            raise UserError(f"{folder} has no tensor {name!r}: it belongs to another model or configuration")
        if meta.size != t.shape or meta.properties.dtype != t.dtype:
            there = f"{meta.properties.dtype} {tuple(meta.size)}"
            raise UserError(f"{folder}: {name} is {there}, this run has {t.dtype} {tuple(t.shape)}")
    kinds = {name.partition(".")[0] for name in tensors}
    if extra := [name for name in stored if name not in tensors and name.partition(".")[0] in kinds - {"rng"}]:
        raise UserError(f"{folder} has {min(extra)!r} besides: it belongs to another model or configuration")
    reader, planner = HuggingFaceStorageReader(str(folder)), _LoadPlanner(_shards(tensors))
    try:
        with _dcp():  # no_dist: each rank reads by itself
            dcp.load(_whole(tensors), storage_reader=reader, planner=planner, no_dist=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise damaged(folder, error) from error


def load_model(folder: Path, model: GPT) -> None:
    """Fills a model from a checkpoint, casting each parameter to the type it is stored in."""
    stored = _stored(folder)
    for name, p in model.named_parameters():
        if (meta := stored.get(f"model.{name}")) is not None:
            p.data = p.data.to(meta.properties.dtype)
    load_training(folder, model, {})


def load_training(folder: Path, model: GPT, optimizer_state: Mapping[str, Tensor | Shard]) -> None:
    """Fills a model and the optimizer's state in place; copies of weights follow."""
    load_tensors(folder, training_tensors(model, optimizer_state))
    model.refresh_copies()


def training_tensors(model: GPT, optimizer_state: Mapping[str, Tensor | Shard]) -> dict[str, Tensor | Shard]:
    """All tensors of a run by checkpoint name; they share storage with the run's."""
    tensors: dict[str, Tensor | Shard] = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    if model.in_fp8 is not None:
        tensors |= {f"fp8.{name}": t for name, t in model.in_fp8.state().items()}
    return tensors | {f"optim.{name}": t for name, t in optimizer_state.items()}


def dealt(tensors: Mapping[str, Tensor | Shard], rank: int, world_size: int) -> dict[str, Tensor | Shard]:
    """What `rank` writes of the tensors of all ranks: its pieces, and its share of those that every rank has."""
    mine: dict[str, Tensor | Shard] = dict(_shards(tensors))
    load = [0] * world_size
    for name, t in sorted(_whole(tensors).items(), key=lambda item: -item[1].nbytes):  # the same order on every rank
        least = load.index(min(load))
        load[least] += t.nbytes
        if least == rank:
            mine[name] = t
    return mine


def not_finite(tensors: Mapping[str, Tensor | Shard]) -> str | None:
    """The name of a tensor with a number that is not finite; the device is waited for once."""
    parts = [(name, t) for name, value in tensors.items() for t in storages(value)]
    parts = [(name, t) for name, t in parts if t.is_floating_point() and t.numel()]
    if not parts:
        return None
    # one pass over each: its smallest and its largest number, of which a NaN makes NaNs
    ends = torch.stack([torch.stack(torch.aminmax(t)).double() for _, t in parts])
    finite = ends.isfinite().all(dim=1).tolist()
    return next((name for (name, _), fine in zip(parts, finite) if not fine), None)


def storages(value: Tensor | Shard) -> list[Tensor]:
    """The tensors that hold what this rank keeps."""
    return [value] if isinstance(value, Tensor) else [piece for _, piece in value.pieces]


def _whole(tensors: Mapping[str, Tensor | Shard]) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if isinstance(t, Tensor)}


def _shards(tensors: Mapping[str, Tensor | Shard]) -> dict[str, Shard]:
    return {name: t for name, t in tensors.items() if isinstance(t, Shard)}


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


# pieces: what torch.distributed.checkpoint is told of them


class _SavePlanner(DefaultSavePlanner):
    """Plans whole tensors, and pieces besides. It sees over all ranks that these cover each tensor exactly once."""

    def __init__(self, shards: dict[str, Shard]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shards = shards

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        pieces = [
            WriteItem(
                MetadataIndex(name, begin),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    _chunk(begin, piece), TensorProperties.create_from_tensor(piece), torch.Size(shard.shape)
                ),
            )
            for name, shard in self._shards.items()
            for begin, piece in shard.pieces
            if piece.numel()
        ]
        self.plan = dataclasses.replace(plan, items=[*plan.items, *pieces])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        shard = self._shards.get(index.fqn)
        return _piece(shard, index) if shard else super().lookup_object(index)


class _LoadPlanner(DefaultLoadPlanner):
    """Plans reading into whole tensors, and into pieces besides; ValueError where the files do not hold all of one."""

    def __init__(self, shards: dict[str, Shard]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shards = shards

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata
        items = list(super().create_local_plan().items)
        wanted = Counter({name: t.numel() for name, t in self.state_dict.items()})
        for name, shard in self._shards.items():
            chunks = [_chunk(begin, piece) for begin, piece in shard.pieces if piece.numel()]
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, stored, chunks)
            wanted[name] = sum(math.prod(chunk.sizes) for chunk in chunks)
        found = Counter[str]()
        for item in items:
            found[item.dest_index.fqn] += math.prod(item.lengths)
        if lacking := [name for name, numel in wanted.items() if found[name] != numel]:
            name = min(lacking)
            raise ValueError(f"{wanted[name]} numbers of {name} are wanted, its files hold {found[name]} of them")
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        shard = self._shards.get(index.fqn)
        return _piece(shard, index) if shard else super().lookup_tensor(index)


def _chunk(begin: tuple[int, ...], piece: Tensor) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(begin), piece.size())


def _piece(shard: Shard, index: MetadataIndex) -> Tensor:
    return next(piece for begin, piece in shard.pieces if begin == index.offset and piece.numel())


class _Stored(NamedTuple):
    """Where a tensor went, by the names that torch's writer reads for its index."""

    relative_path: str
    length: int


class _Writer(HuggingFaceStorageWriter):
    """Writes through safetensors' own writer of files, without a second copy in memory.

    torch's makes the whole file in memory first, and holds the interpreter's lock over it: training would stand still.
    It also loses all but one of the pieces that a rank has of a tensor: a file has one entry a name."""

    def __init__(self, folder: Path, *, rank: int, sharded: bool) -> None:
        super().__init__(str(folder), save_distributed=sharded)
        self._folder, self._prefix = folder, f"shard-{rank + 1:05d}-" if sharded else ""
        self.written: list[Path] = []

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        files: list[dict[str, WriteItem]] = []
        for item in plan.items:  # each into the first file that has no piece of the same tensor yet
            name = item.index.fqn
            if all(name in file for file in files):
                files.append({})
            next(file for file in files if name not in file)[name] = item
        results: list[WriteResult] = []
        for i, items in enumerate(files, 1):
            path = self._folder / f"{self._prefix}model-{i:05d}-of-{len(files):05d}.safetensors"
            self.written.append(path)
            results += self._write_file(path, items, planner)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write_file(self, path: Path, items: dict[str, WriteItem], planner: SavePlanner) -> list[WriteResult]:
        tensors: dict[str, Tensor] = {}
        begins: dict[str, dict[str, list[int]]] = {}
        results: list[WriteResult] = []
        for name, item in items.items():
            assert item.tensor_data
            t = planner.resolve_data(item)
            assert isinstance(t, Tensor)
            tensors[name] = t.detach().cpu().contiguous()
            begins[name] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
            results.append(WriteResult(item.index, t.nbytes, _Stored(path.name, t.nbytes)))
        # what torch's reader looks for
        metadata = {"DCP_SHARDING_INFO": json.dumps(begins), "DCP_VERSION": "1.0", "format": "pt"}
        try:
            save_file(tensors, path, metadata)
        except SafetensorError as error:
            if code := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
            raise
        path.chmod(self._folder.stat().st_mode & 0o666)  # safetensors lets nobody else read it
        return results
