"""Where the time of a step goes, in spans of it, and where a process is now.

    times.begin(step)
    with times.span("data"):           waiting for the next batch and its copy
    with times.span("compute"):        forward and backward
    with times.span("communication"):  waiting for other ranks: only what nothing hides. May lie inside "compute"
    with times.span("optimizer"):      the update
    times.end()

A span that lies inside another is not counted in that one, so that the spans of a step add up to no more than it. On a
CPU the clock is the host's. On a GPU a span's borders are events on the stream that was current when the step began:
the spans are what the GPU spent in them, a wait for the host included, and are read when the step is over. Nothing
here waits for the GPU.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from core.machine import UNCOUNTED_STEPS

SPANS = ("data", "compute", "communication", "optimizer")
OTHER = "other"  # between spans


class Place(NamedTuple):
    """Where a process is in its steps. Ranks make the same spans in the same order, so places compare by their first
    two fields."""

    step: int
    entered: int  # borders of spans since the step began
    phase: str  # the innermost span
    since: float  # time.monotonic() of the last border


class StepTimes:
    """Times of the steps of one process. Spans may be entered from autograd's threads, one at a time."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._stream: Any = None
        self._spare: list[Any] = []  # events to use again
        self._open: list[str] = []  # spans that are entered, the innermost last
        self._borders: list[tuple[str, Any]] = []  # of the step under way: what follows it, and its mark
        self._ended: deque[tuple[int, list[tuple[str, Any]]]] = deque(maxlen=8)  # where nobody takes them
        self._sums: dict[str, float] = {}
        self._counted = 0
        self.place: Place | None = None  # None: not in a step. Other threads read it

    def begin(self, step: int) -> None:
        """A step that was begun before and has not ended is forgotten."""
        self._reuse(self._borders)
        if self._cuda:
            self._stream = torch.cuda.current_stream()
        self._open.clear()
        self._borders = list[tuple[str, Any]]()
        self.place = Place(step, -1, OTHER, 0.0)
        self._border(OTHER)

    def end(self) -> None:
        if self.place is None:
            raise RuntimeError("no step was begun")
        self._border("end")
        self._ended.append((self.place.step, self._borders))
        self._borders = list[tuple[str, Any]]()

    def pause(self) -> None:
        """What follows is no step."""
        self.place = None

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Outside of a step it measures nothing: evaluations run the same code."""
        if self.place is None:
            yield
            return
        self._open.append(name)
        self._border(name)
        try:
            yield
        finally:
            self._open.pop()
            self._border(self._open[-1] if self._open else OTHER)

    def _border(self, following: str) -> None:
        if self._cuda:
            mark = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
            mark.record(self._stream)
        else:
            mark = time.perf_counter()
        self._borders.append((following, mark))
        if self.place is not None:
            self.place = Place(self.place.step, self.place.entered + 1, following, time.monotonic())

    def take(self, step: int, *, counts: bool = True) -> dict[str, float]:
        """Seconds of each span that `step` entered, and "step", the whole; {} of a step that was not timed. On a GPU
        the step must be over there: its loss was read. counts: the training clock does not leave it out."""
        while self._ended and self._ended[0][0] < step:
            self._reuse(self._ended.popleft()[1])
        if not self._ended or self._ended[0][0] != step:
            return {}
        _, borders = self._ended.popleft()
        seconds: dict[str, float] = {}
        for (name, start), (_, stop) in zip(borders, borders[1:]):
            seconds[name] = seconds.get(name, 0.0) + self._between(start, stop)
        whole = self._between(borders[0][1], borders[-1][1])
        self._reuse(borders)
        found = {name: seconds[name] for name in SPANS if name in seconds} | {"step": whole}
        if counts and step >= UNCOUNTED_STEPS:
            self._counted += 1
            for name, value in found.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
        return found

    def means(self) -> dict[str, float]:
        """Seconds of each span in a step, over those that were taken and that the training clock counts."""
        return {name: total / self._counted for name, total in self._sums.items()}

    def _reuse(self, borders: list[tuple[str, Any]]) -> None:
        if self._cuda:
            self._spare += [mark for _, mark in borders]

    def _between(self, start: Any, stop: Any) -> float:
        return start.elapsed_time(stop) / 1000 if self._cuda else stop - start
