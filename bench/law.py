"""The accuracy law that every kernel is held to, by the tests and before it is timed.

Oracle      the reference in float64, on the very numbers that the kernel gets
Law         err(kernel) <= factor * err(PyTorch in the same dtype) + TINY for each output and each gradient, by name;
            err is the root mean square of the difference over that of the oracle
Rows        the worst row of a result may be ROW_FACTOR times as wrong as the reference's worst
Sampling    a mean over n numbers is known to about one part in sqrt(n), so the bound is widened by 1 + 3/sqrt(n).
            A gradient of a few numbers is averaged over DRAWS random upstream gradients
Upstream    random gradients, neither one nor of mean zero: a backward that ignores or rescales them is far off
Poison      what a kernel allocates is NaN before it writes, and writing beside it is an error
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kernels.master import join_master

FACTOR = 2.0
ROW_FACTOR = 4.0
DRAWS = 8
TINY = torch.finfo(torch.float32).eps  # a kernel may differ by the rounding of one fp32 operation
GUARD = 4096  # bytes, or elements of an input, on either side of a tensor

Tensors = dict[str, Tensor]


class Failed(AssertionError):
    """The kernel breaks the law."""


# errors and bounds


def unread(want: Tensor) -> bool:
    """Whether the oracle's output is a placeholder, NaN throughout: it carries a gradient, and nobody may read it."""
    return want.dim() > 0 and want.numel() > 0 and bool(want.isnan().all())


def error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference over that of the oracle (over 1 where that is 0); 0 for empty tensors. A
    placeholder has to be one: all or nothing."""
    if not want.numel():
        return 0.0
    if unread(want):
        return 0.0 if unread(got) else math.inf
    difference = (got.to(want.dtype) - want).square().mean().sqrt().item()
    return difference / (want.square().mean().sqrt().item() or 1.0)


def worst_row(got: Tensor, want: Tensor) -> float:
    """Largest root mean square of one row's difference, over that of the whole oracle."""
    if not want.numel() or want.dim() == 0 or unread(want):
        return 0.0
    difference = (got.to(want.dtype) - want).square().mean(-1).sqrt()
    worst = difference.nan_to_num(nan=torch.inf).max().item()
    return worst / (want.square().mean().sqrt().item() or 1.0)


def limit(torch_error: float, n: int, factor: float = FACTOR) -> float:
    """Largest error that the law allows a result of n numbers."""
    return (factor * torch_error + TINY) * (1 + 3 / max(1, n) ** 0.5)


def judge(
    name: str,
    kernel_errors: list[float],
    torch_errors: list[float],
    n: int,
    factor: float = FACTOR,
    bound: float | None = None,
) -> None:
    """Fail unless the errors of one result, pooled over its draws, keep the law.

    n: numbers in one draw. bound: the allowed error of something that computes in another precision.
    """
    draws = len(kernel_errors)
    ours, theirs = (math.sqrt(sum(e * e for e in errors) / draws) for errors in (kernel_errors, torch_errors))
    allowed = bound or limit(theirs, n * draws, factor)
    if not ours <= allowed:  # a NaN fails, too
        raise Failed(f"{name} is off by {ours:.2e}; allowed {allowed:.2e}, PyTorch in the same dtype {theirs:.2e}")


def judge_rows(name: str, got: Tensor, like: Tensor, want: Tensor, bound: float | None = None) -> None:
    """Fail if the worst row is ROW_FACTOR times worse than the reference's worst: the mean hides a few bad elements."""
    ours, allowed = worst_row(got, want), ROW_FACTOR * (bound or worst_row(like, want) + TINY)
    if not ours <= allowed:
        raise Failed(f"a row of {name} is off by {ours:.2e} of the mean; allowed {allowed:.2e}")


def same_form(want: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    """Fail unless both have the same names, shapes and dtypes."""
    if differ := want.keys() ^ got.keys():
        raise Failed(f"{sorted(differ)} of {sorted(want)} differ from what the reference returns")
    for name, t in want.items():
        if got[name].shape != t.shape or got[name].dtype != t.dtype:
            here, there = (f"{tuple(x.shape)} {x.dtype}" for x in (got[name], t))
            raise Failed(f"{name} is {here}, not {there}")


# what is compared


def named(outputs: Any) -> Tensors:
    """Outputs by name: a tensor is "y", a named tuple has its own names, a tuple y0, y1, …; None is left out. A tuple
    among them has its names behind its own: fp8.q."""
    if outputs is None:
        return {}
    if isinstance(outputs, Tensor):
        return {"y": outputs}
    names = getattr(outputs, "_fields", None) or [f"y{i}" for i in range(len(outputs))]
    found: Tensors = {}
    for name, t in zip(names, outputs):
        if isinstance(t, tuple):
            found |= {f"{name}.{part}": inner for part, inner in named(t).items()}
        elif t is not None:
            found[name] = t
    return found


def leaves(inputs: Mapping[str, Any]) -> Tensors:
    """Inputs that require a gradient."""
    return {name: t for name, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad}


def sums(inputs: Mapping[str, Any]) -> Tensors:
    """Inputs to which backward adds a gradient."""
    return {name: t for name, t in inputs.items() if name.endswith("_sum") and t is not None}


def few(inputs: Mapping[str, Any]) -> bool:
    """Whether some gradient has so few numbers that one draw says little about its error."""
    return any(t.numel() < DRAWS for t in leaves(inputs).values())


def draw_upstream(outputs: Mapping[str, Tensor], make: Callable[..., Tensor]) -> Tensors:
    """Upstream gradients for outputs; make(*size) returns normal numbers whose mean is not 0."""
    return {name: (3 * make(*t.shape)).detach().to(t.dtype) for name, t in outputs.items()}


def evaluate(function: Callable[..., Any], inputs: Mapping[str, Any], upstream: Mapping[str, Tensor] | None) -> Tensors:
    """Outputs and, for upstream gradients by output name, the gradients of the inputs that require one.

    An op without gradients may work in place: for one, what it left in its floating-point inputs is a result as well.
    So is what backward left in a `sum`.
    """
    outputs = named(function(**inputs))
    result = {name: t.detach() for name, t in outputs.items()}
    wanted = leaves(inputs)
    if not wanted:
        return states(inputs) | result
    if upstream:
        before = {name: t.clone() for name, t in upstream.items()}
        heads = [outputs[name] for name in upstream]
        grads = torch.autograd.grad(heads, list(wanted.values()), list(upstream.values()), allow_unused=True)
        if not all(torch.equal(t, upstream[name]) for name, t in before.items()):
            raise Failed("backward overwrites its upstream gradients")
        result |= {f"d{name}": g for name, g in zip(wanted, grads) if g is not None} | sums(inputs)
    return result


def states(inputs: Mapping[str, Any]) -> Tensors:
    """Floating-point inputs as an op left them; a weight in two halves as the fp32 master that these are."""
    found = {name: t for name, t in inputs.items() if isinstance(t, Tensor) and t.is_floating_point()}
    if inputs.get("low") is not None:
        found["p"] = join_master(inputs["p"], inputs["low"])
    return found


def double(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Copies in float64 for the oracle, a weight in two halves as one number."""
    floating = {n: t for n, t in inputs.items() if isinstance(t, Tensor) and t.is_floating_point()}
    own = dict(inputs) | {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in floating.items()}
    if inputs.get("low") is not None:
        own |= {"p": join_master(inputs["p"], inputs["low"]).double(), "low": None}
    return own


# poison


@functools.cache
def fill_dynamo_tables() -> None:
    """Make torch.compile list torch's functions now: it must not first do so while some of them are replaced."""
    torch.compile(lambda x: torch.empty_like(x).zero_(), backend="eager", fullgraph=True)(torch.ones(2))


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Inside, an uninitialised tensor is NaN in every element (integers are -1), and writing beside it is an error."""
    fill_dynamo_tables()
    real = {"empty": torch.empty, "empty_like": torch.empty_like, "new_empty": Tensor.new_empty}
    bases: list[Tensor] = []

    def poison(t: Tensor) -> Tensor:
        assert t.is_contiguous(), "kernels allocate contiguous tensors"
        base = real["empty"](t.nbytes + 2 * GUARD, dtype=torch.uint8, device=t.device).fill_(0xFF)
        bases.append(base)
        return base[GUARD : GUARD + t.nbytes].view(t.dtype).view(t.shape)

    def wrapped(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: poison(function(*args, **kwargs))

    torch.empty, torch.empty_like = wrapped(real["empty"]), wrapped(real["empty_like"])
    Tensor.new_empty = wrapped(real["new_empty"])
    try:
        yield
    finally:
        torch.empty, torch.empty_like, Tensor.new_empty = real["empty"], real["empty_like"], real["new_empty"]
    for base in bases:
        if not bool((base[:GUARD] == 0xFF).all()) or not bool((base[-GUARD:] == 0xFF).all()):
            raise Failed("wrote outside of a tensor that it had allocated")
