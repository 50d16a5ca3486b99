"""Which backend each op of a model runs on, and why.

Whoever builds a model chooses a backend for each op and shape that it will use, once, through `Backends`; the model
keeps the functions and calls them without asking again.

auto      on a CPU the reference; on a GPU the fastest backend by the committed measurements for its architecture, and
          without measurements ("unmeasured here") the Triton kernel, or what the op prefers to it, if it takes this
          GPU, shape and dtype
forced    `triton`, or `rms_norm=triton` for one op; a request that cannot be honoured is a UserError that says what can

The choice follows from facts about the device, the shape and the dtype, never from trying and catching.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from kernels.op import Device, Op, Shape, UserError, dtype_name
from kernels.ops import BY_NAME, OPS


@dataclass(frozen=True)
class Choice:
    """One row of the table: what runs, and why."""

    op: str
    shape: dict[str, int]
    dtype: str
    backend: str
    reason: str
    others: dict[str, str]  # why each of the other backends cannot run here

    def __str__(self) -> str:
        return self.line(" ".join(f"{dim}={n}" for dim, n in self.shape.items()))

    def line(self, sizes: str) -> str:
        return f"{self.op:<16} {sizes:<42} {self.dtype:<8}  {self.backend:<6}  {self.reason}"


def summary(choices: Sequence[Choice]) -> list[str]:
    """The table with one line for all shapes of an op that share dtype, backend and reason."""
    groups: dict[tuple[str, ...], list[Choice]] = {}
    for c in choices:
        groups.setdefault((c.op, c.dtype, c.backend, c.reason), []).append(c)
    return [str(same[0]) if len(same) == 1 else same[0].line(f"{len(same)} shapes") for same in groups.values()]


def decide(op: Op, shape: Shape, dtype: torch.dtype, device: Device, wanted: str = "auto") -> Choice:
    """The backend of an op for one shape; UserError where the one that is wanted cannot run."""
    obstacles = {name: op.obstacle(name, shape, dtype, device) for name in op.backends}
    others = {name: why for name, why in obstacles.items() if why is not None}
    if wanted == "auto":
        backend, reason = op.pick(shape, dtype, device)
    elif wanted in others:
        free = ", ".join(name for name in op.backends if name not in others)
        raise UserError(
            f"--kernels {op.name}={wanted} cannot run on {device.name} with {op.sizes(shape)} {dtype_name(dtype)}: "
            f"{others[wanted]}; available there: {free} (--kernels auto chooses, python -m kernels shows all)"
        )
    else:
        backend, reason = wanted, "forced"
        if backend == "triton" and device.type != "cuda":
            reason += ", in Triton's interpreter, which truncates bf16: for tests"
    return Choice(op.name, dict(zip(op.dims, shape)), dtype_name(dtype), backend, reason, others)


def parse(request: str) -> dict[str, str]:
    """`--kernels` as {op: backend}, where "*" stands for the ops that are not named.

    The request is auto, a backend, op=backend pairs, or several of these separated by commas. UserError on an unknown
    op, and on a backend that the op, or every op, lacks.
    """
    names = list(dict.fromkeys(name for op in OPS for name in op.backends))
    wanted = {"*": "auto"}
    for part in request.split(","):
        name, _, backend = part.strip().rpartition("=")
        if name and name not in BY_NAME:
            raise UserError(f"--kernels {request}: unknown op {name!r}; expected one of {', '.join(BY_NAME)}")
        having = ["auto", *(BY_NAME[name].backends if name else names)]
        if backend not in having:
            unknown = "" if backend in names else f"unknown backend {backend!r}: "
            there = f"{name} has no {backend} backend; {name} has {', '.join(having[1:])}"
            nowhere = f"no op has a {backend} backend; expected {', '.join(having)}"
            raise UserError(f"--kernels {request}: {unknown}{there if name else nowhere}")
        wanted[name or "*"] = backend
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
        """The function to call for `op` on this shape (in the order of op.dims) in the model's dtype, or another.

        It checks its arguments, as the op itself does, and then runs the chosen backend.
        """
        return op.checked(self._choice(op, shape, dtype or self.dtype).backend)

    def choose_fitting(self, op: Op, *shape: int) -> Callable[..., Any]:
        """As `choose`, for an op that is called with other shapes than this one too: those that the chosen backend does
        not take run on the reference. UserError where the op lacks a backend that was asked of it by name."""
        wanted = self._wanted.get(op.name, "auto")
        if wanted not in ("auto", *op.backends):
            raise UserError(
                f"--kernels {op.name}={wanted}: not within documents whose number is not known; take auto, "
                f"{' or '.join(op.backends)}, or --no-within-documents"
            )
        return op.fitting(self._choice(op, shape, self.dtype).backend)

    def choose_many(
        self, op: Op, problems: Sequence[tuple[Shape, torch.dtype | None]]
    ) -> Callable[[Sequence[dict[str, Any]]], None]:
        """One function for several calls, each on its shape in its dtype (None: the model's), of an op that works in
        place. It takes the keyword arguments of each; those of one backend that can run in common launches."""
        backends = [self._choice(op, shape, dtype or self.dtype).backend for shape, dtype in problems]
        functions = {name: op.checked_many(name) for name in dict.fromkeys(backends)}

        def call(calls: Sequence[dict[str, Any]]) -> None:
            if len(calls) != len(backends):
                raise ValueError(f"{op.name}: {len(calls)} calls; expected {len(backends)}, as were chosen for")
            for name, function in functions.items():
                function([arguments for arguments, backend in zip(calls, backends) if backend == name])

        return call

    def _choice(self, op: Op, shape: Shape, dtype: torch.dtype) -> Choice:
        wanted = self._wanted.get(op.name, self._wanted["*"])
        # requested for all ops: parse() refuses it for one that lacks it
        lacking = wanted not in ("auto", *op.backends)
        choice = decide(op, shape, dtype, self.device, "auto" if lacking else wanted)
        if lacking:
            choice = replace(choice, reason=f"{choice.reason}; there is no {wanted} backend")
        if choice not in self.choices:
            self.choices.append(choice)
        return choice

    def facts(self) -> dict[str, Any]:
        """The request and the table, for the run's log and summary."""
        return {"requested": self.request, "choices": [asdict(choice) for choice in self.choices]}
