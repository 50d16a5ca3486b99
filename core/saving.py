"""Saving while training goes on: the loop pays for a copy of the tensors in the host's memory, a thread writes it."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from core.sharding import Shard
from core.stopping import out_of_memory


class HostCopy:
    """Memory of the host for a copy of the run's tensors, used again by each save; pinned where they are on a GPU."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    @torch.no_grad()
    def of(self, tensors: Mapping[str, Tensor | Shard]) -> dict[str, Tensor | Shard]:
        """`tensors` as they are now; the copy of before is overwritten."""
        copies: dict[str, Tensor | Shard] = {}
        devices: set[torch.device] = set()
        with out_of_memory("a copy of what is saved", lambda: "try --no-async-save, which makes none"):
            for name, value in tensors.items():
                if isinstance(value, Tensor):
                    copies[name] = self._copied(name, (), value)
                    devices.add(value.device)
                else:
                    pieces = [(begin, self._copied(name, begin, piece)) for begin, piece in value.pieces]
                    copies[name] = value._replace(pieces=pieces)
                    devices |= {piece.device for _, piece in value.pieces}
        for device in devices:  # once for all copies, which a GPU has queued
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        return copies

    def _copied(self, name: str, begin: tuple[int, ...], t: Tensor) -> Tensor:
        copy = self._kept.get((name, begin))
        if copy is None or copy.shape != t.shape or copy.dtype != t.dtype:
            copy = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
            self._kept[name, begin] = copy
        return copy.copy_(t, non_blocking=True)


class Abandoned(Exception):
    """The program ends at once: the save under way shall leave no checkpoint any more."""


class Save:
    """One save in a thread of its own, which begins with it."""

    def __init__(self, step: int, write: Callable[[AbstractContextManager[None]], None]) -> None:
        """write: gets what it has to enter where it renames."""
        self.step = step
        self.error: BaseException | None = None  # once it has ended
        self.seconds = 0.0  # that it took
        self._write, self._abandoned, self._renaming = write, False, threading.Lock()
        # daemon: a program that is told to end at once does not wait for it
        self._thread = threading.Thread(target=self._run, name=f"checkpoint of step {step}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            self._write(self._commit())
        except BaseException as error:  # for whoever asks what became of it
            self.error = error
        self.seconds = time.perf_counter() - started

    @contextmanager
    def _commit(self) -> Iterator[None]:
        with self._renaming:
            if self._abandoned:
                raise Abandoned
            yield

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def join(self, at_most_s: float | None = None) -> None:
        """Waits until it has ended."""
        self._thread.join(at_most_s)

    def abandon(self) -> None:
        """From now on it renames nothing."""
        with self._renaming:
            self._abandoned = True
