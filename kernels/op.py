"""What an op is: one computation, the backends that can run it, and the check in front of all of them.

`ref` is PyTorch and runs everywhere. Every other backend is a kernel that names what it needs of a device and which
shapes and dtypes it takes. Calling an op checks the arguments and runs the backend that `auto` picks for them:

    from kernels.rms_norm import rms_norm
    y = rms_norm(x).y

A model picks its backends once instead, when it is built, through `kernels.dispatch.Backends`.
"""

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

MIN_CAPABILITY = (8, 0)  # bf16 arithmetic and asynchronous copies
COMPILED_FOR = (9, 0)  # the capability that configs assume without a GPU: in the interpreter and ahead of time
DTYPES = (torch.bfloat16, torch.float32)  # what kernels compute in; references also take float64, as oracles


class UserError(ValueError):
    """An error that the user can act on, told in one sentence."""


# devices


@dataclass(frozen=True)
class Device:
    """The facts about a device that the choice of a backend may depend on."""

    type: str  # "cpu" or "cuda"
    name: str
    capability: tuple[int, int] | None  # None on a CPU

    @staticmethod
    def of(device: torch.device) -> "Device":
        found: Device = _facts_of(device)
        return found


@torch.compiler.assume_constant_result  # asked outside of the graph, where an op is called in compiled code
def _facts_of(device: torch.device) -> Device:
    if device.type == "cuda":
        return Device("cuda", torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    return Device(device.type, device.type, None)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability that a kernel on this device is configured for."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else COMPILED_FOR


def interpreted() -> bool:
    """Whether Triton kernels run on the CPU, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def needs_nothing(device: Device) -> None:
    """No device is refused."""
    return None


def needs_cuda(device: Device) -> str | None:
    """Why PyTorch's own CUDA libraries cannot run on the device; None if they can."""
    return None if device.type == "cuda" else "needs an NVIDIA GPU and --device cuda"


def needs_gpu(device: Device, hint: str = "") -> str | None:
    """Why a GPU kernel cannot run on the device; None if it can."""
    least = ".".join(map(str, MIN_CAPABILITY))
    if device.type != "cuda":
        return f"needs an NVIDIA GPU of compute capability {least} or newer and --device cuda{hint}"
    if torch.version.cuda is None:
        return "needs a CUDA build of PyTorch"
    if device.capability is None or device.capability < MIN_CAPABILITY:
        return f"needs compute capability {least} or newer, {device.name} has {device.capability}"
    return None


def needs_triton(device: Device) -> str | None:
    """Why a Triton kernel cannot run on the device; None if it can, be it in the interpreter."""
    if device.type != "cuda" and interpreted():
        return None
    return needs_gpu(device, " (TRITON_INTERPRET=1 runs Triton on a CPU, for tests)")


# backends

Shape = tuple[int, ...]


def takes_all(shape: Shape, dtype: torch.dtype) -> str | None:
    """No shape or dtype is refused."""
    return None


def takes_dtypes(shape: Shape, dtype: torch.dtype) -> str | None:
    """Why kernels cannot compute in the dtype; None if they can."""
    return None if dtype in DTYPES else f"takes bfloat16 and float32, not {dtype_name(dtype)}"


@dataclass(frozen=True)
class Backend:
    """One way to run an op. Called directly, it checks nothing."""

    function: Callable[..., Any]
    needs: Callable[[Device], str | None] = needs_nothing  # why it cannot run on a device, or None
    limits: Callable[[Shape, torch.dtype], str | None] = takes_all  # why it cannot run a shape in a dtype, or None
    # runs several calls of an op that works in place, by their keyword arguments, in the launches of one
    many: Callable[[Sequence[dict[str, Any]]], None] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


@dataclass(frozen=True)
class Measurement:
    """Median times of an op's backends on one shape, forward and backward, as the bench found them."""

    capability: tuple[int, int]
    shape: Shape
    dtype: torch.dtype
    us: Mapping[str, float]  # microseconds by backend
    source: str  # device and commit


class Problem(NamedTuple):
    """What one call computes on, as its check found it. The shape is in the order of `Op.dims`."""

    shape: Shape
    dtype: torch.dtype
    device: torch.device


@dataclass(eq=False)
class Op:
    """One operation: its backends, which share a signature and results, and what tests and benches need to know of it.

    dims      names of the numbers that make a shape, such as ("M", "N")
    cases     label -> shape, the sizes of the tracks
    forms     label -> function of (make, *shape) that returns keyword arguments; make(*size, dtype=…) returns a tensor
    cost      function of (shape, dtype, form, backward) that returns the least FLOPs and bytes
    check     function of the op's arguments that raises ValueError where they do not fit together
    backends  by name; `ref` is one of them
    measured  the committed measurements that `auto` follows
    gradients_in_forward   whether forward makes the gradients, and backward scales them
    unmeasured             what `auto` means on a GPU where nothing is measured, if it can run: a backend, or a function
                           of a shape that returns several, of which the first that can run it is taken
    """

    name: str
    dims: Sequence[str]
    cases: Mapping[str, Shape]
    forms: Mapping[str, Callable[..., dict[str, Any]]]
    cost: Callable[..., tuple[int, int]]
    check: Callable[..., Problem]
    backends: Mapping[str, Backend]
    measured: Sequence[Measurement] = ()
    gradients_in_forward: bool = False
    unmeasured: str | Callable[[Shape], Sequence[str]] = "triton"
    _auto: dict[Problem, str] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Checks the arguments and runs the backend that `auto` picks for them."""
        problem = self.check(*args, **kwargs)
        if torch.compiler.is_compiling():  # the compiler guards on the same facts
            backend = self.pick(problem.shape, problem.dtype, Device.of(problem.device))[0]
        elif (known := self._auto.get(problem)) is not None:
            backend = known
        else:
            backend = self._auto[problem] = self.pick(problem.shape, problem.dtype, Device.of(problem.device))[0]
        return self.backends[backend].function(*args, **kwargs)

    def checked(self, backend: str) -> Callable[..., Any]:
        """The backend behind the op's check and its own limits."""
        function, limits = self.backends[backend].function, self.backends[backend].limits

        def call(*args: Any, **kwargs: Any) -> Any:
            problem = self.check(*args, **kwargs)
            if why := limits(problem.shape, problem.dtype):
                raise ValueError(f"{self.name}: {backend} {why}")
            return function(*args, **kwargs)

        return call

    def fitting(self, backend: str) -> Callable[..., Any]:
        """The backend behind the op's check, and the reference for shapes that it does not take: for one that is chosen
        by the shapes of training and called with others too."""
        chosen, reference = self.backends[backend], self.backends["ref"]

        def call(*args: Any, **kwargs: Any) -> Any:
            problem = self.check(*args, **kwargs)
            fits = chosen.limits(problem.shape, problem.dtype) is None
            return (chosen if fits else reference).function(*args, **kwargs)

        return call

    def checked_many(self, backend: str) -> Callable[[Sequence[dict[str, Any]]], None]:
        """The same for several calls at a time, each given by its keyword arguments: one after another, unless the
        backend has common launches for them."""
        function, limits = self.backends[backend], self.backends[backend].limits

        def call(calls: Sequence[dict[str, Any]]) -> None:
            for arguments in calls:
                problem = self.check(**arguments)
                if why := limits(problem.shape, problem.dtype):
                    raise ValueError(f"{self.name}: {backend} {why}")
            if function.many is not None:
                function.many(calls)
                return
            for arguments in calls:
                function(**arguments)

        return call

    def obstacle(self, backend: str, shape: Shape, dtype: torch.dtype, device: Device) -> str | None:
        """Why the backend cannot run this; None if it can."""
        return self.backends[backend].needs(device) or self.backends[backend].limits(shape, dtype)

    def pick(self, shape: Shape, dtype: torch.dtype, device: Device) -> tuple[str, str]:
        """The backend that `auto` means, and why: the fastest as measured, else `unmeasured`, else the first that can
        run."""
        if device.type != "cuda":
            return "ref", "PyTorch, on a CPU"
        obstacles = {name: self.obstacle(name, shape, dtype, device) for name in self.backends if name != "ref"}
        kernels = [name for name, why in obstacles.items() if why is None]
        if not kernels:
            return "ref", "; ".join(
                ["PyTorch, no kernel can run this", *(f"{k}: {why}" for k, why in obstacles.items())]
            )
        candidates = ["ref", *kernels]

        known = [m for m in self.measured if m.capability == device.capability and m.dtype == dtype]
        known = [m for m in known if any(name in m.us for name in candidates)]
        if known:
            m = min(known, key=lambda m: distance(m.shape, shape))
            best = min((name for name in candidates if name in m.us), key=lambda name: m.us[name])
            times = ", ".join(f"{name} {us:g} us" for name, us in m.us.items())
            reason = f"fastest at {self.sizes(m.shape)}: {times} ({m.source})"
            if best == "ref":
                reason = "; ".join([reason, *(f"{k}: {why}" for k, why in obstacles.items() if why is not None)])
            return best, reason
        wanted = (self.unmeasured,) if isinstance(self.unmeasured, str) else self.unmeasured(shape)
        chosen, reason = next((name for name in wanted if name in kernels), kernels[0]), "unmeasured here"
        if "cuda" in kernels and chosen != "cuda":
            reason += "; cuda is taken once it was measured faster"
        return chosen, reason

    def sizes(self, shape: Shape) -> str:
        """The shape in words, such as M=64 N=32."""
        return " ".join(f"{dim}={n}" for dim, n in zip(self.dims, shape))


def distance(a: Shape, b: Shape) -> float:
    """How far apart two shapes are, as the factors between their sizes. A size of 0 is an option that is not used."""
    return sum(abs(math.log(max(have, 1) / max(want, 1))) for have, want in zip(a, b))


# checks


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(t: Any) -> str:
    """A tensor in the words of an error message."""
    if not isinstance(t, Tensor):
        return repr(t)
    strides = "" if t.is_contiguous() else f", strides {t.stride()}"
    return f"{tuple(t.shape)} {dtype_name(t.dtype)} on {t.device}{strides}"


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is accumulated in, and what scalars and statistics are: fp32, or float64 in an oracle."""
    return torch.promote_types(dtype, torch.float32)


def check_tensor(
    op: str,
    name: str,
    t: Tensor,
    shape: Shape,
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    *,
    contiguous: bool = False,
) -> None:
    """ValueError, with what is there and what is expected, unless t has the shape, a dtype of those, and the device."""
    fits = isinstance(t, Tensor) and t.shape == shape and t.dtype in dtypes and t.device == device
    if not fits or (contiguous and not t.is_contiguous()):
        kinds = " or ".join(dict.fromkeys(map(dtype_name, dtypes)))
        layout = "contiguous " if contiguous else ""
        raise ValueError(f"{op}: {name} is {describe(t)}; expected {layout}{tuple(shape)} {kinds} on {device}")


def check_number(op: str, name: str, t: Tensor, dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    """ValueError unless t is a tensor of one element, of any shape, of the dtype and on the device."""
    if not isinstance(t, Tensor) or t.numel() != 1 or t.dtype not in dtypes or t.device != device:
        kinds = " or ".join(dict.fromkeys(map(dtype_name, dtypes)))
        raise ValueError(f"{op}: {name} is {describe(t)}; expected one {kinds} number on {device}")
