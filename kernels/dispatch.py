"""Which backend each op runs on, and why.

An op (`Op`) has a PyTorch reference and up to two kernels: Triton and CUDA. Whoever builds a model chooses a backend for each
op and shape it will use, once, through `Backends`; the model keeps the chosen functions and calls them without a branch.

auto      on a CPU the reference; on a GPU the fastest backend by the committed measurements for its architecture, and where
          there are none the Triton kernel ("unmeasured here"), if the kernel takes this GPU, shape and dtype
forced    `triton`, or `rms_norm=triton` for one op; what cannot be honoured is a ValueError that says what can

A choice is made from facts about the device, the shape and the dtype, never by trying and catching.
"""

import functools
import importlib
import math
import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

import kernels

BACKENDS = ("ref", "triton", "cuda")
MIN_CAPABILITY = (8, 0)  # bf16 arithmetic and asynchronous copies
COMPILED_FOR = (9, 0)  # what configs are for where there is no GPU: interpreted and compiled ahead of time


@dataclass(frozen=True)
class Device:
    """What a choice may depend on."""

    type: str  # "cpu" or "cuda"
    name: str
    capability: tuple[int, int] | None  # of a GPU

    @staticmethod
    def of(device: torch.device) -> "Device":
        if device.type == "cuda":
            return Device("cuda", torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
        return Device(device.type, device.type, None)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability to configure a kernel for."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else COMPILED_FOR


def interpreted() -> bool:
    """Whether Triton kernels run on the CPU, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Measurement:
    """Median times of an op's backends on one shape, forward and backward, as the bench found them."""

    capability: tuple[int, int]
    shape: tuple[int, ...]
    dtype: torch.dtype
    us: Mapping[str, float]  # backend: microseconds
    source: str  # device and commit


@dataclass(frozen=True)
class Choice:
    """One row of the table: what runs, and why."""

    op: str
    shape: dict[str, int]
    dtype: str
    backend: str
    reason: str
    others: dict[str, str]  # the backends that cannot run here, and why

    def __str__(self) -> str:
        return self.line(self.sizes())

    def line(self, sizes: str) -> str:
        return f"{self.op:<14} {sizes:<30} {self.dtype:<8}  {self.backend:<6}  {self.reason}"

    def sizes(self) -> str:
        return " ".join(f"{dim}={n}" for dim, n in self.shape.items())


def summary(choices: Sequence[Choice]) -> list[str]:
    """The table with a line for each op, dtype, backend and reason, however many shapes it has."""
    groups: dict[tuple[str, ...], list[Choice]] = {}
    for c in choices:
        groups.setdefault((c.op, c.dtype, c.backend, c.reason), []).append(c)
    return [str(same[0]) if len(same) == 1 else same[0].line(f"{len(same)} shapes") for same in groups.values()]


class Op:
    """One operation: its backends, all with the same signature and results, and what tests and benches need of it.

    dims      names of the numbers that make a shape, such as ("M", "N")
    cases     label -> shape: what the tracks use
    forms     label -> function of (make, *shape) that returns keyword arguments; make(*size, dtype=None) returns a tensor
    limits    function of (backend, shape, dtype) that says why a kernel cannot run that, or returns None
    gradients_in_forward   whether forward makes the gradients and backward but scales them
    """

    def __init__(
        self,
        name: str,
        *,
        dims: Sequence[str],
        cases: Mapping[str, tuple[int, ...]],
        forms: Mapping[str, Callable[..., dict[str, Any]]],
        cost: Callable[..., tuple[int, int]],
        limits: Callable[[str, tuple[int, ...], torch.dtype], str | None],
        ref: Callable[..., Any],
        triton: Callable[..., Any] | None = None,
        cuda: Callable[..., Any] | None = None,
        measured: Sequence[Measurement] = (),
        gradients_in_forward: bool = False,
    ) -> None:
        self.gradients_in_forward = gradients_in_forward
        self.name, self.dims, self.cases, self.forms, self.cost = name, tuple(dims), cases, forms, cost
        self.limits, self.measured = limits, tuple(measured)
        self.backends = {k: f for k, f in zip(BACKENDS, (ref, triton, cuda)) if f is not None}

    def obstacle(self, backend: str, shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> str | None:
        """Why a backend cannot run this; None if it can."""
        if backend not in self.backends:
            return f"{self.name} has no {backend} backend"
        if backend == "ref":
            return None
        least = ".".join(map(str, MIN_CAPABILITY))
        if device.type != "cuda":
            if backend == "triton" and interpreted():
                return self.limits(backend, shape, dtype)
            hint = " (TRITON_INTERPRET=1 runs Triton on a CPU, for tests)" if backend == "triton" else ""
            return f"needs an NVIDIA GPU of compute capability {least} or newer and --device cuda{hint}"
        if torch.version.cuda is None:
            return "needs a CUDA build of PyTorch"
        if device.capability is None or device.capability < MIN_CAPABILITY:
            return f"needs compute capability {least} or newer, {device.name} has {device.capability}"
        return self.limits(backend, shape, dtype)

    def choose(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: Device, wanted: str = "auto"
    ) -> tuple[Choice, Callable[..., Any]]:
        """The backend for one shape, with the function to call; ValueError when `wanted` cannot be honoured."""
        obstacles = {name: self.obstacle(name, shape, dtype, device) for name in BACKENDS}
        others = {name: why for name, why in obstacles.items() if why is not None}
        if wanted == "auto":
            backend, reason = self._auto(shape, dtype, device, [name for name in BACKENDS if name not in others])
            if backend == "ref" and device.type == "cuda":
                reason += "; " + "; ".join(f"{name}: {why}" for name, why in others.items())
        elif wanted in others:
            free = ", ".join(name for name in BACKENDS if name not in others)
            sizes = " ".join(f"{dim}={n}" for dim, n in zip(self.dims, shape))
            raise ValueError(
                f"--kernels {self.name}={wanted} cannot run on {device.name} with {sizes} {_name(dtype)}: {others[wanted]}; "
                f"available there: {free} (--kernels auto chooses, python -m kernels shows all)"
            )
        else:
            backend, reason = wanted, "forced"
            if backend == "triton" and device.type != "cuda":
                reason += ", in Triton's interpreter, which truncates bf16: for tests"
        row = Choice(self.name, dict(zip(self.dims, shape)), _name(dtype), backend, reason, others)
        return row, self.backends[backend]

    def _auto(self, shape: tuple[int, ...], dtype: torch.dtype, device: Device, free: list[str]) -> tuple[str, str]:
        if device.type != "cuda":
            return "ref", "PyTorch, on a CPU"
        if free == ["ref"]:
            return "ref", "PyTorch, no kernel can run this"

        def distance(m: Measurement) -> float:
            return sum(abs(math.log(have / want)) for have, want in zip(m.shape, shape))

        known = [m for m in self.measured if m.capability == device.capability and m.dtype == dtype]
        known = [m for m in known if any(name in m.us for name in free)]
        if known:
            m = min(known, key=distance)
            best = min((name for name in free if name in m.us), key=lambda name: m.us[name])
            times = ", ".join(f"{name} {us:g} us" for name, us in m.us.items())
            sizes = " ".join(f"{dim}={n}" for dim, n in zip(self.dims, m.shape))
            return best, f"fastest at {sizes}: {times} ({m.source})"
        return ("triton" if "triton" in free else free[-1]), "unmeasured here"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def ops() -> dict[str, Op]:
    """Every op of this package by name."""
    found = {}
    for module in pkgutil.iter_modules(kernels.__path__):
        if module.name not in ("dispatch", "tile", "__main__"):
            members = vars(importlib.import_module(f"kernels.{module.name}")).values()
            found |= {op.name: op for op in members if isinstance(op, Op)}
    return found


def parse(request: str) -> dict[str, str]:
    """`--kernels` as {op: backend}, where "*" stands for the ops that are not named: auto, a backend, op=backend pairs, or
    several of these separated by commas. ValueError on an unknown op or backend, or one that no op has."""
    wanted = {"*": "auto"}
    for part in request.split(","):
        op, _, backend = part.strip().rpartition("=")
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"--kernels {request}: unknown backend {backend!r}; expected auto, {', '.join(BACKENDS)}")
        if op and op not in ops():
            raise ValueError(f"--kernels {request}: unknown op {op!r}; expected one of {', '.join(ops())}")
        having = [name for name, known in ops().items() if backend in known.backends or backend == "auto"]
        if not having or (op and op not in having):
            there = f"{op} has {', '.join(ops()[op].backends)}" if op else "use auto or ref"
            raise ValueError(
                f"--kernels {request}: {op or 'no op'} has {'no' if op else 'a'} {backend} backend; {there}"
            )
        wanted[op or "*"] = backend
    return wanted


class Backends:
    """Chooses the backends of one model's ops and remembers each choice.

    A backend forced on all ops binds those that have it; the others are chosen as by auto, and the table says so.
    """

    def __init__(self, request: str = "auto", *, device: torch.device, dtype: torch.dtype) -> None:
        self.request, self.dtype = request, dtype
        self.device = Device.of(device)
        self._wanted = parse(request)
        self.choices: list[Choice] = []

    def choose(self, op: Op, *shape: int, dtype: torch.dtype | None = None) -> Callable[..., Any]:
        """The function to call for `op` on this shape (in the order of op.dims) in this model's dtype, or another."""
        wanted = self._wanted.get(op.name, self._wanted["*"])
        lacking = wanted not in ("auto", *op.backends)  # then it was asked of all ops: parse() refuses it for this one
        choice, function = op.choose(shape, dtype or self.dtype, self.device, "auto" if lacking else wanted)
        if lacking:
            choice = replace(choice, reason=f"{choice.reason}; there is no {wanted} backend")
        if choice not in self.choices:
            self.choices.append(choice)
        return function

    def facts(self) -> dict[str, Any]:
        """For the run's log and summary."""
        return {"requested": self.request, "choices": [asdict(choice) for choice in self.choices]}
