"""Processes: who am I among them, and what passes between them.

One process per device, started by torchrun or alone. Averaging is plain for now: every rank holds every parameter,
gradients are summed over ranks in a few flat buckets after backward.

Waiting   tensors go through NCCL (gloo between CPUs), where a rank that is STEP_SECONDS late is taken for dead: nothing
          but a step's own work may lie between two of them. Objects and barriers go through a gloo group of their own,
          also between GPUs: there the others wait for what rank 0 does alone (reading the text, training a tokenizer,
          saving), PATIENCE_SECONDS at most. The threads that write checkpoints have another gloo group, since they
          are anywhere in a save while the loop is anywhere in a step. A process that dies is noticed at once in each.
"""

import ctypes
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from core import machine
from core.stopping import TrainingError, UserError

BUCKET_BYTES = 64 * 2**20
RENDEZVOUS_SECONDS = 300  # for the slowest process to import what it needs
STEP_SECONDS = 600  # that ranks may be apart in training
PATIENCE_SECONDS = 6 * 3600  # for what rank 0 does alone: the tokenizer of a terabyte, a checkpoint on a slow disk
PR_SET_PDEATHSIG = 1  # linux/prctl.h
HOW_TO_START = "start all processes with torchrun --nproc-per-node=N train.py ..., or unset WORLD_SIZE"
T = TypeVar("T")

_objects: Any = None  # for objects and barriers, while the world is joined
_saves: Any = None  # for the threads that write checkpoints


@dataclass(frozen=True)
class World:
    """This process among all: rank, world_size, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun describes them in the environment; alone without
    it. UserError when that description makes no sense."""
    rank, world_size = _from_environment("RANK", "0"), _from_environment("WORLD_SIZE", "1")
    if not 0 <= rank < world_size:
        raise UserError(f"RANK is {rank} and WORLD_SIZE is {world_size}: {HOW_TO_START}")
    return rank, world_size


def _from_environment(name: str, default: str) -> int:
    text = os.environ.get(name, default)
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{name} is {text!r} in the environment, expected a number: {HOW_TO_START}") from error


@contextmanager
def joined_world(device: str | None, *, deterministic: bool = False) -> Iterator[World]:
    """How every program starts: prepares the process for the device (unset: a GPU if there is one) and joins all
    processes."""
    device_type = machine.choose_device_type(device)
    machine.prepare_process(device_type, deterministic=deterministic)
    global _objects, _saves
    try:
        yield _join(device_type)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        _objects = _saves = None


def _join(device_type: str) -> World:
    rank, world_size = rank_and_size()
    device = torch.device("cpu")
    if device_type == "cuda":
        local_rank = _from_environment("LOCAL_RANK", "0")
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this node has no GPU: {torch.cuda.device_count()} found; lower "
                "--nproc-per-node"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world_size > 1:
        _end_with_launcher()
        _meet(rank, world_size, device)
    return World(rank, world_size, device)


def _end_with_launcher() -> None:
    """The kernel sends this process SIGTERM when torchrun is gone: nobody stops or restarts its workers any more, and
    they would train on beside the run that is started in their place."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _meet(rank: int, world_size: int, device: torch.device) -> None:
    """Joins the process groups; UserError where the other processes are not found, after RENDEZVOUS_SECONDS at most."""
    global _objects, _saves
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"WORLD_SIZE is {world_size}, but {', '.join(missing)} is not set: {HOW_TO_START}")
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=RENDEZVOUS_SECONDS)))
        # torchrun keeps one store over its restarts on one node: a process must not find addresses of the dead ones
        one_node = os.environ.get("LOCAL_WORLD_SIZE") == str(world_size)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "0"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"attempt_{attempt}", store),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=STEP_SECONDS),
            device_id=device if device.type == "cuda" else None,
        )
        _objects = dist.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE_SECONDS))
        _saves = dist.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE_SECONDS))
    except (dist.DistError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{world_size} processes did not meet at {address} ({reason}): {HOW_TO_START}") from error


# tensors


@torch.no_grad()
def average_(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor by its mean over ranks, in place; same tensors in the same order on every rank."""
    if not dist.is_initialized():
        return
    bucket: list[Tensor] = []
    size = 0
    for t in tensors:
        nbytes = t.numel() * t.element_size()
        if bucket and (size + nbytes > BUCKET_BYTES or t.dtype != bucket[0].dtype):
            _average_bucket_(bucket)
            bucket, size = list[Tensor](), 0
        bucket.append(t)
        size += nbytes
    if bucket:
        _average_bucket_(bucket)


def _average_bucket_(tensors: list[Tensor]) -> None:
    # contiguous: gloo reduces the memory from the first element on, whatever the strides
    flat = torch.cat([t.reshape(-1) for t in tensors]) if len(tensors) > 1 else tensors[0].reshape(-1).contiguous()
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    torch._foreach_copy_(
        tensors, [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors)]
    )


def all_sum(values: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_max(values: Tensor) -> Tensor:
    """Maxima over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


class Outcome(NamedTuple):
    """What a step came to."""

    step: int
    loss: float
    stops: bool  # a process has to stop
    saturated: int | None  # sites in fp8 whose largest size exceeded the scale's range; None: no scale is delayed


class LaggingLoss:
    """Reads each step's loss one step late on a GPU, so that reading it never waits for the step just launched.

    Each rank's stop flag is averaged with its loss in one tensor, and how many entries are read when is the same on
    every rank, so that all ranks stop at the same step.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[int, Tensor, Any]] = deque()

    def put(self, step: int, outcome: Tensor) -> None:
        """outcome: (2,) or (3,), loss, more than 0 when a process shall stop, sites saturated in fp8; means over
        ranks."""
        event = None
        if outcome.is_cuda:
            pinned = torch.empty_like(outcome, device="cpu", pin_memory=True)  # a copy to pageable memory would wait
            outcome = pinned.copy_(outcome, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((step, outcome, event))

    def take(self, *, flush: bool = False) -> list[Outcome]:
        """Of the steps that may be read now; all of them with `flush`, and when one says stop."""
        done: list[Outcome] = []
        while self._pending and (flush or self._pending[0][2] is None or len(self._pending) > 1):
            step, outcome, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            loss, stop, *saturated = outcome.tolist()
            done.append(Outcome(step, loss, stop > 0, round(saturated[0]) if saturated else None))
            flush |= stop > 0
        return done


# objects


@contextmanager
def _waiting(what: str) -> Iterator[None]:
    """Turns gloo's errors into a TrainingError that says what this process waited for."""
    try:
        yield
    except RuntimeError as error:
        late = "imed out" in str(error)
        why = f"did not come in {PATIENCE_SECONDS:,} s" if late else "will not come: another process has ended"
        raise TrainingError(f"waiting for {what}, which {why} ({str(error).splitlines()[0]})") from error


def gather_objects(value: T, what: str = "word from the other processes") -> list[T]:
    """`value` of every rank, in rank order, on every rank. what: it is, for an error."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    with _waiting(what):
        dist.all_gather_object(values, value, group=_objects)
    return values


def together(work: Callable[[], T], what: str) -> T:
    """`work()`, which waits for no other rank, on every rank; where it fails on one, it fails on all, and none is left
    waiting in what comes next."""
    value, failed = None, None
    try:
        value = work()
    except Exception as error:
        failed = error
    if any(gather_objects(failed is not None, what)):
        raise failed or TrainingError(f"another process failed in {what}: its message says why")
    return value  # pyrefly: ignore[bad-return]  # None only where work gave it


def barrier(what: str = "the other processes") -> None:
    """Waits until every rank is here."""
    if dist.is_initialized():
        with _waiting(what):
            dist.barrier(group=_objects)


def broadcast_object(value: T, what: str = "word from rank 0") -> T:
    """Rank 0's `value`."""
    box = [value]
    if dist.is_initialized():
        with _waiting(what):
            dist.broadcast_object_list(box, group=_objects)
    return box[0]


def main_first(work: Callable[[], T], what: str) -> T:
    """`work()` on rank 0, then on the others, who wait for `what`; an exception is raised on rank 0 alone, the others
    end quietly."""
    if dist.is_initialized() and dist.get_rank() > 0:
        if status := broadcast_object(0, what):
            raise SystemExit(status)
        return work()
    try:
        value = work()
    except Exception as error:
        broadcast_object(2 if isinstance(error, (UserError, OSError)) else 1)
        raise
    broadcast_object(0)
    return value


# saves: for the threads that write checkpoints, beside whatever the loop does


@contextmanager
def saving_group(what: str) -> Iterator[Any]:
    """The process group of those threads, None in a process that is alone. what: is waited for inside."""
    with _waiting(what):
        yield _saves


def agreed(work: Callable[[], T], what: str) -> list[T]:
    """`work()` of every rank, in rank order, on every rank. Where it fails on one, it fails on all; an OSError is
    raised on each, since all have to know that a disk is full."""
    if not dist.is_initialized():
        return [work()]
    value, failed = None, None
    try:
        value = work()
    except Exception as error:
        failed = error
    told = failed
    if failed is not None and not isinstance(failed, OSError):
        told = TrainingError(f"another process failed in {what}: its message says why")
    outcomes: list[Any] = [None] * dist.get_world_size()
    with _waiting(what):
        dist.all_gather_object(outcomes, (value, told), group=_saves)
    for _, error in outcomes:
        if error is not None:
            raise failed or error
    return [value for value, _ in outcomes]
