"""What is measured, and the one way to measure it.

An `Item` is a task with several variants: backends of an op on one shape, or our code and a plain implementation.
`measure` checks each variant against the item's oracle first: one that is wrong gets a sentence and no number. The
others are timed in turn. Every command of bench goes through here, so that its numbers mean the same everywhere.
"""

import dataclasses
import importlib
import operator
import pkgutil
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import bench
from bench.roofline import Roofline
from bench.timing import HostSampler, Sampler, Spread, interleave
from core.stopping import Stopped


class Programs(Protocol):
    """The variants of an item on inputs that exist, for as long as its context is open."""

    def check(self, variant: str) -> str | None:
        """Why what the variant computes is wrong; None if it is right."""

    def sampler(self, variant: str) -> Sampler: ...


@dataclass(frozen=True)
class Item:
    """op, case, form, direction and dtype name it; shape and the least work (FLOPs, bytes) of one call describe it.

    variants   name -> why it cannot run here, None if it can; `baseline` is the one that others are compared with,
               `ours` the one that Redline runs here
    open       makes the inputs
    """

    op: str
    case: str
    form: str
    direction: str
    dtype: str
    shape: tuple[int, ...]
    work: tuple[int, int] | None
    baseline: str
    ours: str
    variants: Mapping[str, str | None]
    open: Callable[[], AbstractContextManager[Programs]]

    def __str__(self) -> str:
        return "-".join(part for part in (self.op, self.case, self.form, self.direction, self.dtype) if part)

    def __hash__(self) -> int:
        return hash(str(self))


@dataclass(frozen=True)
class Result:
    """Seconds per call of one variant, or why there are none."""

    seconds: Spread | None = None
    error: str | None = None
    absent: str | None = None
    over_baseline: Spread | None = None  # time of the baseline over time of this, in the same rounds


def measure(item: Item, variants: list[str] | None = None, *, seconds: float) -> dict[str, Result]:
    """Results of the variants (None: of all), each timed for about that many seconds."""
    results: dict[str, Result] = {}
    wanted = [name for name in item.variants if variants is None or name in variants]
    here = []
    for name in wanted:
        if why := item.variants[name]:
            results[name] = Result(absent=why)
        else:
            here.append(name)
    if not here:
        return results
    with item.open() as programs:
        samplers = {}
        for name in here:  # before any is timed: some change their inputs
            if error := _or_raised(programs.check, name):
                results[name] = Result(error=error)
        for name in here:
            if name not in results:
                outcome = _or_raised(programs.sampler, name)
                if isinstance(outcome, str):
                    results[name] = Result(error=outcome)
                else:
                    samplers[name] = outcome
        spreads = interleave(samplers, seconds=seconds) if samplers else {}
    base = spreads.get(item.baseline)
    for name, spread in spreads.items():
        results[name] = Result(seconds=spread, over_baseline=base and base.over(spread))
    return {name: results[name] for name in wanted}


def _or_raised(step: Callable[[str], Any], variant: str) -> Any:
    """What the step returns, or what it raised in a sentence: a library that breaks takes no number from the others."""
    try:
        return step(variant)
    except (Stopped, MemoryError):
        raise
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]


class HostPrograms:
    """Programs on a CPU that return the same thing; the baseline's is the right one."""

    def __init__(
        self, calls: Mapping[str, Callable[[], Any]], baseline: str, same: Callable[[Any, Any], bool] = operator.eq
    ) -> None:
        self._calls, self._baseline, self._same = calls, baseline, same
        self._want = calls[baseline]()

    def check(self, variant: str) -> str | None:
        same = variant == self._baseline or self._same(self._calls[variant](), self._want)
        return None if same else f"{variant} does not return what {self._baseline} returns"

    def sampler(self, variant: str) -> Sampler:
        return HostSampler(self._calls[variant])


OURS = "redline"


def host_item(op: str, case: str, baseline: str, others: Sequence[str], open_: Callable[[], Any]) -> Item:
    """An item of programs on a CPU: ours, the baseline and others. No shape, no count of work."""
    return Item(op, case, "", "", "", (), None, baseline, OURS, dict.fromkeys((OURS, *others, baseline)), open_)


def items() -> Iterator[Item]:
    """Every item of every bench file."""
    for module in pkgutil.iter_modules(bench.__path__):
        if module.name.startswith("bench_"):
            yield from importlib.import_module(f"bench.{module.name}").ITEMS


def row(
    item: Item, variant: str, result: Result, roofline: Roofline | None, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """A result as it is stored: one flat JSON object.

    us: microseconds per call, with bounds; roofline_fraction: the time that the least work takes at the measured
    roofline, over the time it took; speedup: time of `baseline` over this one.
    """
    named = {f.name: getattr(item, f.name) for f in dataclasses.fields(item)[:6]} | {"backend": variant}
    flops, nbytes = item.work or (None, None)
    entry = named | {"shape": list(item.shape), "flops": flops, "bytes": nbytes, "error": result.error}
    if result.seconds is not None:
        low, high = result.seconds.bounds
        us = result.seconds.median * 1e6
        entry |= {"us": us, "us_low": low * 1e6, "us_high": high * 1e6, "samples": len(result.seconds.samples)}
        if item.work:
            entry |= {"tflops": flops / us * 1e-6, "gb_per_s": nbytes / us * 1e-3}
        if item.work and roofline:
            entry |= {"roofline_fraction": roofline.seconds(*item.work) / result.seconds.median}
            entry |= {"copy_gb_per_s": roofline.copy * 1e-9, "gemm_tflops": roofline.gemm * 1e-12}
        if result.over_baseline is not None and variant != item.baseline:
            entry |= {"speedup": result.over_baseline.median, "baseline": item.baseline}
    return entry | dict(facts)
