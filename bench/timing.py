"""Timing that holds: samples of several variants taken in turn, as medians with their bounds.

GPU       a CUDA graph calls each of several input sets once, which together are larger than the L2 cache, so that a
          call finds its inputs cold and no launch waits for Python. A sample is one replay between two events; memory
          written before them empties the cache and keeps the GPU busy until the replay has been launched
CPU       calls repeated for MIN_SAMPLE_S, caches as they come
Warm-up   by time: clocks rise, compilers and allocators settle
Turns     a round takes one sample of each variant, each round begins with another one, and ratios are taken within a
          round: what drifts (clocks, temperature, other programs) meets all variants alike
Bounds    of the median at 95 % by order statistics, which assume nothing about the distribution
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

WARMUP_S = 0.2
MIN_SAMPLE_S = 0.02  # of a CPU's sample
MIN_REPLAY_S = 0.002  # of a GPU's: a replay is launched within microseconds
MIN_ROUNDS, MAX_ROUNDS = 9, 200
CONFIDENCE = 0.95
MAX_NODES = 1000  # calls in a graph: a larger one takes longer to launch than the flush before it
FLUSH_BYTES = 2**28  # more than any L2 cache, and about 100 us of writing

Sampler = Callable[[], float]  # takes one sample: seconds per call


@dataclass(frozen=True)
class Spread:
    """Samples of one quantity, by their median and its bounds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def bounds(self) -> tuple[float, float]:
        """Lower and upper bound of the true median.

        These are the k-th smallest and k-th largest sample, with the largest k that leaves it between them with
        probability CONFIDENCE (fewer than six samples: the extremes, with less).
        """
        ordered, n = sorted(self.samples), len(self.samples)
        k, below = 0, 0.5**n  # P(at most k samples lie below the median)
        while below + math.comb(n, k + 1) * 0.5**n <= (1 - CONFIDENCE) / 2:
            k += 1
            below += math.comb(n, k) * 0.5**n
        return ordered[k], ordered[n - 1 - k]

    def over(self, other: "Spread") -> "Spread":
        """Ratios of samples taken in the same rounds."""
        return Spread(tuple(a / b for a, b in zip(self.samples, other.samples, strict=True)))


class HostSampler:
    """Samples of a call on a CPU, several calls a sample if they are short."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call, self._calls = call, 1
        call()  # compiles
        end, best = time.perf_counter() + WARMUP_S, math.inf
        while best == math.inf or time.perf_counter() < end:
            best = min(best, self())
        self._calls = max(1, math.ceil(MIN_SAMPLE_S / best))

    def __call__(self) -> float:
        start = time.perf_counter()
        for _ in range(self._calls):
            self._call()
        return (time.perf_counter() - start) / self._calls


class GraphSampler:
    """Samples of calls on a GPU, one call for each set of inputs, captured in a CUDA graph on `stream`."""

    def __init__(self, calls: Sequence[Callable[[], object]], stream: torch.cuda.Stream) -> None:
        self._keep = list(calls)  # a replay reads what they own by its address
        self._stream = stream
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
            end = None
            while end is None or time.perf_counter() < end:
                for call in calls:
                    call()
                stream.synchronize()
                end = end or time.perf_counter() + WARMUP_S  # the first pass compiles
        self._capture(1)
        self()
        repeats = math.ceil(MIN_REPLAY_S / max(self() * len(calls), 1e-7))
        if repeats > 1:
            self._capture(min(repeats, -(-MAX_NODES // len(calls))))
            self()

    def _capture(self, repeats: int) -> None:
        self._calls = repeats * len(self._keep)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream):
            for _ in range(repeats):
                for call in self._keep:
                    call()

    def __call__(self) -> float:
        with torch.cuda.stream(self._stream):
            self._flush.zero_()
            self._start.record()
            self._graph.replay()
            self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e-3 / self._calls


def interleave(samplers: Mapping[str, Sampler], *, seconds: float) -> dict[str, Spread]:
    """Samples of every variant in turn, for about that many seconds each and at least MIN_ROUNDS rounds."""
    names = list(samplers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds * len(names)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(MAX_ROUNDS):
            if turn >= MIN_ROUNDS and time.perf_counter() > end:
                break
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(samplers[name]())
    finally:
        if collecting:
            gc.enable()
    return {name: Spread(tuple(taken)) for name, taken in samples.items()}
