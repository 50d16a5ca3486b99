"""Races, missing barriers and stray accesses of kernels that run in Triton's interpreter, which alone cannot show them.

The interpreter runs programs one after another, and a program as one thread. Here every access to global memory is
logged, and a launch fails (`Failed`) where

Storage   an access leaves the storage of the tensor argument that it begins in
Values    one store gives an element two values
Programs  a program writes an element that another one touches, unless all these accesses are atomic
Barriers  two accesses of a program touch an element at different places of a tile, one of them writes, and no
          tl.debug_barrier() stands between them. The same place of a tile of the same shape is the same thread, unless
          the tile has fewer elements than the program has threads, in several warps: then each warp may hold it

`programs_in(order)` runs the programs of each launch inside in another order: what a kernel computes must not change.
On a GPU nothing of this is installed.
"""

import sys
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from triton.runtime import interpreter

from bench.law import Failed

LOAD, STORE, ATOMIC = 1, 2, 4
NAMES = {LOAD: "load", STORE: "store", ATOMIC: "atomic"}
HARMLESS = np.isin(np.arange(8), (0, LOAD, ATOMIC))  # kinds, added up, that may meet without order
SEVERAL = -1  # places
SPARSE = 2**22  # units from the first to the last touch of a storage, from where on only touched ones are kept

_order = "forward"  # or "reversed", "random"
_launch: "Launch | None" = None
_threads = 0  # of a program of this launch, where they are in several warps


class Access(NamedTuple):
    kind: int
    address: np.ndarray  # of each element, in bytes
    mask: np.ndarray  # which places of a tile these are
    size: int  # bytes of an element
    program: int  # the first interval of its program
    interval: int  # intervals end with a barrier or a program; they are numbered through a launch
    grid_idx: tuple[int, ...]
    line: str
    shared: bool = False  # by several warps: the tile is smaller than the program

    def __str__(self) -> str:
        return f"{NAMES[self.kind]} by program {self.grid_idx} at {self.line}"

    def units(self, start: int, unit: int) -> np.ndarray:
        """Which units of so many bytes this touches, counted from the address start."""
        first = (self.address.astype(np.int64) - start) // unit
        n = self.size // unit
        return first if n == 1 else (first[:, None] + np.arange(n)).reshape(-1)


@dataclass
class Launch:
    """The accesses of one launch, by the storage they touch."""

    begins: list[int]  # of the storages of its tensor arguments, ascending
    ends: list[int]
    accesses: dict[int, list[Access]] = field(default_factory=dict)
    program: int = 0
    interval: int = 0
    grid_idx: tuple[int, ...] = (0, 0, 0)
    failure: Failed | None = None

    @staticmethod
    def of(arguments: list[Any]) -> "Launch":
        tensors = (getattr(t, "base", t) for t in arguments)  # a descriptor's or a wrapper's tensor
        storages = [t.untyped_storage() for t in tensors if hasattr(t, "untyped_storage")]
        spans = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages if s.nbytes()})
        return Launch([begin for begin, _ in spans], [end for _, end in spans])

    def next_program(self, grid_idx: tuple[int, ...]) -> None:
        self.interval += 1
        self.program, self.grid_idx = self.interval, grid_idx

    def note(self, kind: int, pointers: Any, mask: Any, value: Any = None) -> None:
        """Log an access that is about to happen, or refuse it."""
        inside = np.broadcast_to(np.asarray(mask.data, dtype=bool), pointers.data.shape)
        address = pointers.data[inside]
        if not address.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        where = self.program, self.interval, self.grid_idx, kernel_line()
        access = Access(kind, address, inside, size, *where, shared=inside.size < _threads)
        begin, end = int(address.min()), int(address.max()) + size
        slot = bisect_right(self.begins, begin) - 1
        if slot < 0 or end > self.ends[slot]:
            self.fail(f"outside of the storage of a tensor: {access}")
        if value is not None and not (address[1:] > address[:-1]).all():
            order = np.argsort(address, kind="stable")
            bits = np.broadcast_to(value.data, pointers.data.shape)[inside][order]
            bits, address = bits.view(f"u{bits.itemsize}"), address[order]
            if ((address[1:] == address[:-1]) & (bits[1:] != bits[:-1])).any():
                self.fail(f"two values for one element: {access}")
        self.accesses.setdefault(slot, []).append(access)

    def fail(self, what: str) -> None:
        self.failure = Failed(what)
        raise self.failure  # which the interpreter wraps

    def judge(self) -> None:
        for accesses in self.accesses.values():
            if any(a.kind != LOAD for a in accesses):
                judge_storage(accesses)


def judge_storage(accesses: list[Access]) -> None:
    """Fail for a race or a missing barrier in the storage that these accesses, in their order, touch."""
    unit = min(a.size for a in accesses)
    start = min(int(a.address.min()) for a in accesses)
    touched = [a.units(start, unit) for a in accesses]
    n = max(int(units.max()) for units in touched) + 1
    if n > SPARSE:  # rows far apart
        known = np.unique(np.concatenate(touched))
        touched, n = [np.searchsorted(known, units) for units in touched], known.size
    shared, kinds = np.zeros(n, bool), np.zeros(n, np.uint8)  # of the launch, by unit
    interval, recent, place = np.zeros(n, np.int32), np.zeros(n, np.uint8), np.zeros(n, np.int64)  # of the last touch
    shapes = {shape: i for i, shape in enumerate(dict.fromkeys(a.mask.shape for a in accesses))}
    for a, at in zip(accesses, touched):
        here = np.repeat(np.flatnonzero(a.mask) * len(shapes) + shapes[a.mask.shape], a.size // unit)
        last = interval[at]
        shared[at] |= (last > 0) & (last < a.program)
        kinds[at] |= a.kind
        again = last == a.interval
        apart = again & ((place[at] != here) | a.shared)
        now = np.where(again, recent[at], 0) | a.kind
        wrong = apart & ~HARMLESS[now]
        if wrong.any():
            told = tell(accesses, touched, at[wrong][0], a.interval)
            raise Failed(f"no barrier between accesses at different places of a tile: {told}")
        interval[at], recent[at], place[at] = a.interval, now, np.where(apart, SEVERAL, here)
    racing = shared & ~HARMLESS[kinds]
    if racing.any():
        told = tell(accesses, touched, racing.argmax())
        raise Failed(f"race between programs for {racing.sum() * unit} bytes: {told}")


def tell(accesses: list[Access], touched: list[np.ndarray], which: int, interval: int | None = None) -> str:
    """The first accesses to a unit, in an interval alone or in the launch."""
    found = (str(a) for a, at in zip(accesses, touched) if interval in (None, a.interval) and which in at)
    return "; ".join(list(dict.fromkeys(found))[:4])


def kernel_line() -> str:
    """File and line of the access in the kernel."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename == __file__ or "/triton/" in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"


@contextmanager
def programs_in(order: str) -> Iterator[None]:
    """Inside, launches run their programs "forward", "reversed", or in "random" order, the same for the same grid."""
    global _order
    before, _order = _order, order
    try:
        yield
    finally:
        _order = before


def reordered(idx: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, ...]:
    """The program that runs in the place of program idx."""
    if _order == "forward":
        return idx
    if _order == "reversed":
        return tuple(n - 1 - i for i, n in zip(idx, grid))
    shuffled = np.random.default_rng(0).permutation(np.prod(grid))
    return tuple(int(i) for i in np.unravel_index(shuffled[np.ravel_multi_index(idx, grid)], grid))


def install() -> None:
    """Check every launch from now on. Replaces private functions of Triton 3.6 to 3.9, as bench/interpreter.py does."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor

    def replace(owner: type, name: str):
        def decorate(function):
            original = getattr(owner, name)
            setattr(owner, name, lambda self, *args, **kwargs: function(original, self, *args, **kwargs))

        return decorate

    @replace(builder, "create_masked_load")
    def load(original, self, pointers, mask, *args, **kwargs):
        _launch.note(LOAD, pointers, mask)
        return original(self, pointers, mask, *args, **kwargs)

    @replace(builder, "create_masked_store")
    def store(original, self, pointers, value, mask, *args, **kwargs):
        _launch.note(STORE, pointers, mask, value)
        return original(self, pointers, value, mask, *args, **kwargs)

    @replace(builder, "create_atomic_rmw")
    def atomic_rmw(original, self, op, pointers, value, mask, *args):
        _launch.note(ATOMIC, pointers, mask)
        return original(self, op, pointers, value, mask, *args)

    @replace(builder, "create_atomic_cas")
    def atomic_cas(original, self, pointers, *args):
        _launch.note(ATOMIC, pointers, interpreter.TensorHandle(np.array([True]), interpreter.tl.int1))
        return original(self, pointers, *args)

    @replace(builder, "create_barrier")
    def barrier(original, self):
        _launch.interval += 1
        return original(self)

    @replace(builder, "set_grid_idx")
    def set_grid_idx(original, self, *idx):
        idx = reordered(idx, self.grid_dim)
        _launch.next_program(idx)
        return original(self, *idx)

    @replace(executor, "_init_args_hst")
    def arguments(original, self, args, kwargs):
        global _launch
        found, named = original(self, args, kwargs)
        _launch = Launch.of([*found, *named.values()])
        return found, named

    @replace(executor, "__call__")
    def call(original, self, *args, **kwargs):
        global _launch, _threads
        warps = kwargs.get("num_warps", 4)
        _threads = 32 * warps if warps > 1 else 0
        try:
            original(self, *args, **kwargs)
            _launch.judge()
        except interpreter.InterpreterError:
            if _launch.failure is not None:
                raise _launch.failure from None
            raise
        finally:
            _launch = None
