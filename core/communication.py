"""Processes: who am I among them, and what passes between them besides gradients and weights (core/exchange.py).

One process per device, started by torchrun or alone.

Waiting   tensors go through NCCL (gloo between CPUs), where a rank that is STEP_SECONDS late is taken for dead: nothing
          but a step's own work may lie between two of them. core/pulse.py says which rank it is; the collective's own
          timeout comes later. Objects and barriers go through a gloo group of their own, also between GPUs: there the
          others wait for what rank 0 does alone (reading the text, training a tokenizer), PATIENCE_SECONDS at most. The
          threads that write checkpoints have another gloo group, since they are anywhere in a save while the loop is
          anywhere in a step. A process that dies is noticed at once in each.
"""

import ctypes
import json
import os
import re
import signal
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from core import machine
from core.sharding import Grid
from core.stopping import TrainingError, UserError

RENDEZVOUS_SECONDS = 300  # for the slowest process to import what it needs
REPLACED_SECONDS = 30  # after which what a dead process left where all meet is replaced by its successor
STEP_SECONDS = 600  # that ranks may be apart in training
PULSE_SECONDS = 60  # after which a collective ends by itself, where core/pulse.py did not end the process
PATIENCE_SECONDS = 6 * 3600  # for what rank 0 does alone: the tokenizer of a terabyte, a checkpoint on a slow disk
PR_SET_PDEATHSIG = 1  # linux/prctl.h
HOW_TO_START = "start all processes with torchrun --nproc-per-node=N train.py ..., or unset WORLD_SIZE"
T = TypeVar("T")

_objects: Any = None  # for objects and barriers, while the world is joined
_saves: Any = None  # for the threads that write checkpoints
store: Any = None  # where several processes met, while the world is joined


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
def joined_world(
    device: str | None,
    *,
    deterministic: bool = False,
    step_seconds: float | None = None,
    same: Callable[[], dict[str, Any]] = dict,
) -> Iterator[World]:
    """How every program starts: prepares the process for the device (unset: a GPU if there is one) and joins all
    processes.

    step_seconds: that ranks may be apart, unset: STEP_SECONDS. same: facts that must be the same on every rank, asked
    where there are several; UserError on rank 0 where one differs, the others end quietly."""
    device_type = machine.choose_device_type(device)
    machine.prepare_process(device_type, deterministic=deterministic)
    global _objects, _saves, store
    try:
        yield _join(device_type, step_seconds or STEP_SECONDS, same)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        _objects = _saves = store = None


def _join(device_type: str, step_seconds: float, same: Callable[[], dict[str, Any]]) -> World:
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
        _meet(rank, world_size, device, step_seconds, {"--device": device_type} | same())
    return World(rank, world_size, device)


def _end_with_launcher() -> None:
    """The kernel sends this process SIGTERM when torchrun is gone: nobody stops or restarts its workers any more, and
    they would train on beside the run that is started in their place."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _meet(rank: int, world_size: int, device: torch.device, step_seconds: float, facts: dict[str, Any]) -> None:
    """Joins the process groups; UserError where the other processes are not found, after RENDEZVOUS_SECONDS at most, or
    are not what this one is."""
    global _objects, _saves, store
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"WORLD_SIZE is {world_size}, but {', '.join(missing)} is not set: {HOW_TO_START}")
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        found, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=RENDEZVOUS_SECONDS)))
        store = dist.PrefixStore(_attempt(found, rank, world_size), found)
        _compare_first(rank, world_size, facts)  # a GPU here and a CPU there would never meet
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=step_seconds + PULSE_SECONDS),
            device_id=device if device.type == "cuda" else None,
        )
        _objects = dist.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE_SECONDS))
        _saves = dist.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE_SECONDS))
    except Differ:
        raise
    except (dist.DistError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{world_size} processes did not meet at {address} ({reason}): {HOW_TO_START}") from error


# nodes


class Peers(NamedTuple):
    """Ranks by node and local rank, with this rank's two groups."""

    grid: Grid
    local: Any  # of its node; None: all ranks
    node: Any  # of its local rank on all nodes; None: itself alone


def peers(world: World, step_seconds: float = STEP_SECONDS) -> Peers:
    """Every rank calls it. Nodes are told apart where torchrun started equally many processes on each of them, and
    ranks follow each other node by node; all ranks count as one node otherwise."""
    local_size, local = _from_environment("LOCAL_WORLD_SIZE", "1"), _from_environment("LOCAL_RANK", "0")
    sizes = gather_objects((local_size, local == world.rank % max(local_size, 1)))
    equal = set(sizes) == {(local_size, True)} and world.world_size % max(local_size, 1) == 0
    if not equal or local_size in (0, 1, world.world_size):
        return Peers(Grid(1, world.world_size), None, None)
    grid = Grid(world.world_size // local_size, local_size)
    timeout = timedelta(seconds=step_seconds + PULSE_SECONDS)
    nodes = [list(range(first, first + local_size)) for first in range(0, grid.size, local_size)]
    inside, _ = dist.new_subgroups_by_enumeration(nodes, timeout=timeout)
    across, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in zip(*nodes)], timeout=timeout)
    return Peers(grid, inside, across)


def _attempt(found: Any, rank: int, world_size: int) -> str:
    """A name that this attempt's processes alone have in common.

    torchrun keeps one store over its restarts, and counts them on each node by itself: without a name, a process finds
    what the dead ones wrote. Each other rank makes up a word, rank 0 answers it with its own, until all have heard it.
    """
    mine, refused = uuid.uuid4().hex, "refused"
    if rank:
        found.set(f"hello {rank}", f"{world_size} {mine}")
        attempt = found.get(f"answer to {mine}").decode()
        if attempt == refused:
            found.set(f"heard {mine}", "")
            raise SystemExit(2)  # rank 0 says why
        found.set(f"{attempt} {rank}", "")
        return attempt
    deadline = time.monotonic() + RENDEZVOUS_SECONDS
    while missing := [r for r in range(1, world_size) if not found.check([f"{mine} {r}"])]:
        if time.monotonic() > deadline:
            raise ValueError(f"{ranks_in_words(missing)} did not come in {RENDEZVOUS_SECONDS} s")
        for r in missing:
            if found.check([f"hello {r}"]):  # perhaps of a dead process, and soon replaced
                size, word = found.get(f"hello {r}").decode().split()
                if int(size) == world_size:
                    found.set(f"answer to {word}", mine)
                elif time.monotonic() > deadline - RENDEZVOUS_SECONDS + REPLACED_SECONDS:
                    found.set(f"answer to {word}", refused)
                    with suppress(dist.DistError):  # it reads the answer before the store may end with this process
                        found.wait([f"heard {word}"], timedelta(seconds=REPLACED_SECONDS))
                    sizes = f"rank {r} was started as one of {size} processes, rank 0 as one of {world_size}"
                    raise Differ(f"{sizes}; {HOW_TO_START}")
        time.sleep(0.02)
    return mine


# what must be the same on every rank


class Differ(UserError):
    """Ranks differ in what must be the same."""


def _compare_first(rank: int, world_size: int, facts: dict[str, Any]) -> None:
    """`check_same` through the store, before there is a process group."""
    store.set(f"facts {rank}", json.dumps(facts))
    everyone = [json.loads(text) for text in store.multi_get([f"facts {r}" for r in range(world_size)])]
    store.set(f"compared {rank}", "")
    try:
        _check_same(rank, everyone)
    except Differ:  # rank 0 may keep the store and its end be that of all: the others read it first
        store.wait([f"compared {r}" for r in range(world_size)], timedelta(seconds=RENDEZVOUS_SECONDS))
        raise


def check_same(facts: dict[str, Any], what: str) -> None:
    """UserError on rank 0 where a value is not the same on every rank, naming it, and the others end quietly. Values
    are of JSON."""
    everyone = gather_objects(facts, what)
    _check_same(dist.get_rank() if dist.is_initialized() else 0, everyone)


def _check_same(rank: int, everyone: list[dict[str, Any]]) -> None:
    for name in everyone[0]:
        values: dict[str, list[int]] = {}
        for r, facts in enumerate(everyone):
            values.setdefault(json.dumps(facts.get(name)), []).append(r)
        if len(values) > 1:
            if rank:
                raise SystemExit(2)
            parts = [f"{json.loads(value)} on {ranks_in_words(where)}" for value, where in values.items()]
            raise Differ(f"processes differ in {name}: {', '.join(parts[:3])}; start all of them alike")


def ranks_in_words(ranks: Iterable[int]) -> str:
    """ "rank 3", "ranks 0, 2-5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank {text}" if len(runs) == 1 and runs[0][0] == runs[0][1] else f"ranks {text}"


# tensors


def all_sum(values: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
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


class Lost(TrainingError):
    """Another process has ended, or does not come."""


@contextmanager
def _waiting(what: str) -> Iterator[None]:
    """Turns gloo's errors into a Lost that says what this process waited for."""
    try:
        yield
    except RuntimeError as error:
        late = "imed out" in str(error)
        why = f"did not come in {PATIENCE_SECONDS:,} s" if late else "will not come: another process has ended"
        raise Lost(f"waiting for {what}, which {why} ({reason(error)})") from error


def reason(error: BaseException) -> str:
    """What a library's error says, without where in its source and what its authors advise."""
    text = (str(error).splitlines() or [""])[0]
    return re.sub(r"^\[[^]]*\] |[.:]? *This (may|likely|can) .*$|[.:]? *Please check .*$", "", text).strip()


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
