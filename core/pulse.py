"""What ranks tell each other of where they are, so that a step that stands still ends with a sentence that says why.

A thread of each process writes its place (step, phase, how long) into the store where the processes met, once a period.
The step itself only assigns its place, and nothing of it waits for the thread. The thread also ends the process that
has been at one place for longer than the limit: a collective's own timeout would name no rank, and NCCL's would abort
the process with a dump. A rank whose place does not come any more has died, or is stopped altogether.
"""

import faulthandler
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple, Self

import torch.distributed as dist

from core import communication
from core.communication import ranks_in_words
from core.timing import Place, StepTimes

PERIOD_S = 1.0  # between two words of a rank
ANSWER_S = 10.0  # within which the store answers
NO_STORE = "the process or node where all ranks met does not answer"
GLOO = ("gloo", "pair closure", "losed by peer")  # what its errors say
WORDS = {
    "data": "data",
    "compute": "forward and backward",
    "communication": "communication",
    "optimizer": "optimizer",
    "other": "work between two phases",
    "end": "end",
}


class Heard(NamedTuple):
    """The last word of a rank."""

    beat: int
    place: tuple[int, int] | None  # step, borders of spans; None: in no step
    phase: str


class Pulse:
    """`with Pulse(...) as pulse` around the steps; does nothing for a process that is alone."""

    def __init__(self, times: StepTimes, limit_s: float, told: Callable[[int, str], Exception]) -> None:
        """limit_s: that a step may stand still. told: gets the step and the reason before the process ends, returns
        what to print."""
        self._times, self._limit, self._told = times, limit_s, told
        self._period = min(PERIOD_S, limit_s / 4)
        self._beat = 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: Any = None

    def __enter__(self) -> Self:
        if communication.store is not None:
            self._rank, self._size = dist.get_rank(), dist.get_world_size()
            # a connection of its own: a call that waits on another one would hold this one up
            self._store = dist.PrefixStore("pulse", communication.store.clone())
            # two: what is told goes through the store, whose host may stand still, and then a call never returns
            self._thread = threading.Thread(target=self._tells, name="pulse", daemon=True)
            self._thread.start()
            threading.Thread(target=self._watches, name="watch", daemon=True).start()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._over.set()
        if self._thread:
            self._thread.join(2 * PERIOD_S)

    def _tells(self) -> None:
        while not self._over.wait(self._period):
            self._tell(self._times.place)

    def _watches(self) -> None:
        while not self._over.wait(self._period):
            place = self._times.place
            if place and time.monotonic() - place.since > self._limit:
                self._end(place)

    def _tell(self, place: Place | None) -> None:
        self._beat += 1
        word = [self._beat, place and place[:2], place.phase if place else ""]
        self._say(str(self._rank), json.dumps(word))

    def _say(self, key: str, value: str) -> None:
        with suppress(dist.DistError):  # whoever kept the store has ended: nobody is left to tell, the limit holds
            self._store.set(key, value)

    def _end(self, place: Place) -> None:
        heard = self._answer()
        if self._times.place != place:  # it went on meanwhile
            return
        says = standing(*heard) if heard else f"{NO_STORE}; this rank waits {at(Heard(0, place[:2], place.phase))}"
        stands = f"nothing moves for {self._limit:g} s (--step-timeout): {says}"
        sentence = self._told(place.step, stands)
        name = "error" if self._rank == 0 else f"error on rank {self._rank}"
        os.write(2, f"{name}: {sentence}\n".encode())  # the main thread may hold the lock of print
        if heard:
            self._say(f"last {self._rank}", stands)
            if self._rank == 0:  # the store may end with this process: the others are still listening
                lasts = [f"last {rank}" for rank in range(self._size) if rank not in heard[0]]
                with suppress(dist.DistError):
                    self._store.wait(lasts, timedelta(seconds=ANSWER_S))
        if heard and self._rank in behind(heard[1]):
            faulthandler.dump_traceback(file=2, all_threads=True)
        os._exit(1)  # the main thread is not to be interrupted where it is

    def lost(self, error: RuntimeError) -> str | None:
        """Why a collective failed, for people; None where the error is another one."""
        if self._thread is None or not (isinstance(error, dist.DistError) or any(word in str(error) for word in GLOO)):
            return None
        reason = communication.reason(error)
        if (heard := self._answer()) is None:
            return f"{NO_STORE} ({reason})"
        silent, _ = heard
        with suppress(dist.DistError):
            if last := [key for key in (f"last {rank}" for rank in silent) if self._store.check([key])]:
                reason = self._store.get(last[0]).decode()
        who = f"{ranks_in_words(silent)} of {self._size}" if silent else "another process"
        return f"{who} {'have' if len(silent) > 1 else 'has'} ended ({reason})"

    @contextmanager
    def naming(self, step: int) -> Iterator[None]:
        """Inside, where a collective fails because a rank is gone, the error says which."""
        try:
            yield
        except RuntimeError as error:
            if why := self.lost(error):
                raise self._told(step, why) from error
            raise

    def _answer(self) -> tuple[list[int], list[Heard | None]] | None:
        """`_hear_twice`, or None where the store does not answer."""
        found: list[tuple[list[int], list[Heard | None]]] = []
        asking = threading.Thread(target=lambda: found.append(self._hear_twice()), name="hearing", daemon=True)
        asking.start()
        asking.join(ANSWER_S + 4 * self._period)
        return found[0] if found else None

    def _hear_twice(self) -> tuple[list[int], list[Heard | None]]:
        """Ranks that say nothing any more, and the last word of each rank."""
        before = self._hear()
        for _ in range(3):
            time.sleep(self._period)
            self._tell(self._times.place)  # the others may be listening too
        after = self._hear()
        silent = [r for r, (a, b) in enumerate(zip(before, after)) if r != self._rank and (b is None or a == b)]
        return silent, after

    def _hear(self) -> list[Heard | None]:
        def word(rank: int) -> Heard | None:
            if rank == self._rank and (place := self._times.place):
                return Heard(self._beat, place[:2], place.phase)
            try:
                if not self._store.check([str(rank)]):
                    return None
                beat, at, phase = json.loads(self._store.get(str(rank)))
            except dist.DistError:
                return None
            return Heard(beat, at and tuple(at), phase)

        return [word(rank) for rank in range(self._size)]


def behind(heard: Sequence[Heard | None]) -> list[int]:
    """Ranks that are not as far as the first; those between steps are at none."""
    places = [(h.place or (-1, -1)) if h else (-1, -1) for h in heard]
    return [rank for rank, place in enumerate(places) if place < max(places)]


def standing(silent: Sequence[int], heard: Sequence[Heard | None]) -> str:
    """Who does not come, for people."""
    size, late = len(heard), behind(heard)
    first = next(h for rank, h in enumerate(heard) if rank not in late and h and h.place)
    if not late:
        if silent:
            return f"{ranks_in_words(silent)} of {size} says nothing any more, all are {at(first)}"
        return f"all {size} ranks are {at(first)}: their GPUs or the network stand still"
    found: dict[str, list[int]] = {}
    for rank in late:
        h = heard[rank]
        words = at(h) if h and h.place else "in no step"
        found.setdefault(words + (" and says nothing any more" if rank in silent else ""), []).append(rank)
    parts = [
        f"{ranks_in_words(who)} of {size} {'are' if len(who) > 1 else 'is'} {words}" for words, who in found.items()
    ]
    return f"{', '.join(parts[:3])}; the others wait {at(first)}"


def at(h: Heard) -> str:
    assert h.place
    return f"in the {WORDS.get(h.phase, h.phase)} of step {h.place[0]}"
