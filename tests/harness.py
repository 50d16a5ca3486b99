"""The law that every op's kernels are held to: `check_op`.

Oracle      the reference in float64, on the very numbers that the kernel gets
Law         err(kernel) <= factor * err(PyTorch in the same dtype) + TINY, for each output and each gradient by name;
            err is the root mean square of the difference over that of the oracle. A mean over n numbers is known to about
            one part in sqrt(n), so the right side counts 1 + 3/sqrt(n) times; with few numbers, as the gradient of a scalar
            has, the mean goes over several random upstream gradients as well
Conditions  random upstream gradients that are not one; inputs and upstream gradients contiguous, rows apart, or transposed,
            each between guards of NaN; whatever the kernel allocates is NaN before it writes, and the guards around it must
            survive; two runs agree in every bit
And         `torch.library.opcheck` of each torch op that was called; `torch.compile(fullgraph=True)` with the same results
"""

import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.op import Op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FACTOR = 2.0
ONCE = 1.02  # of results rounded once
DRAWS = 8
TINY = torch.finfo(torch.float32).eps  # a kernel may differ by the rounding of one fp32 operation
GUARD = 4096  # bytes, or elements of an input, on either side of a tensor
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
LAYOUTS = ("contiguous", "rows apart", "transposed", "every other")


class Failed(AssertionError):
    """The kernel breaks the law."""


def randn(seed: int, dtype: torch.dtype, device: str = DEVICE) -> Callable[..., Tensor]:
    """make(*size, dtype=None): normal numbers, the same for the same seed on every device.

    Their mean is a half, so that a sum over all of them is not what rounding left of a cancellation."""
    generator = torch.Generator().manual_seed(seed)

    def make(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return (0.5 + torch.randn(size, generator=generator)).to(device, dtype)

    return make


def guarded(t: Tensor, layout: str = "contiguous", index: int = 0) -> Tensor:
    """A copy of t in memory where everything around its elements is NaN.

    index: its place among the tensors of a call. Gaps between rows grow with it, so that no two strides agree, and "every
    other" leaves those of even index without gaps.
    """
    if layout == "every other":
        layout = "rows apart" if index % 2 else "contiguous"
    if layout == "contiguous" or t.dim() < 2:
        base = t.new_full((t.numel() + 2 * GUARD,), torch.nan)
        view = base[GUARD : GUARD + t.numel()].view(t.shape)
    elif layout == "rows apart":
        view = t.new_full((*t.shape[:-1], t.size(-1) + 24 + 8 * index), torch.nan)[..., 8 : 8 + t.size(-1)]
    else:
        view = t.new_full((*t.shape[:-2], t.size(-1), t.size(-2)), torch.nan).transpose(-1, -2)
    return view.copy_(t)


def kept(t: Tensor, gap: int = 0) -> Tensor:
    """A copy of t, for an op that works in place: between guards, or with rows that far apart. `unharmed` looks at what is around."""
    shape = (*t.shape[:-1], t.size(-1) + gap) if gap else tuple(t.shape)
    n = math.prod(shape)
    view = t.new_full((n + 2 * GUARD,), 77)[GUARD : GUARD + n].view(shape)
    view = view[..., : t.size(-1)] if gap else view
    return view.copy_(t)


def unharmed(*states: Tensor) -> None:
    """Whether only the elements of what `kept` made were written."""
    for t in states:
        around = t._base.clone()
        around.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(77)
        if not bool((around == 77).all()):
            raise Failed("wrote beside the elements of a state")


@functools.cache
def fill_dynamo_tables() -> None:
    """torch.compile lists torch's functions when it is first used: that must not happen while some of them are replaced."""
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


class RecordOps(TorchDispatchMode):
    """Keeps the calls to this repository's torch ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, bool]] = []  # op, arguments, whether a result is fp8

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func.namespace == "redline" or func.namespace.startswith("mutant"):
            tensors = results if isinstance(results, (tuple, list)) else (results,)
            self.calls.append((func, args, kwargs or {}, any(_is_fp8(t) for t in tensors)))
        return results


def named(outputs: Any) -> dict[str, Tensor]:
    """Outputs by name: a tensor is "y", a named tuple has its own names; None is left out."""
    if isinstance(outputs, Tensor):
        return {"y": outputs}
    return {name: t for name, t in zip(outputs._fields, outputs) if t is not None}


def evaluate(
    function: Callable[..., Any], inputs: dict[str, Any], upstream: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """Outputs and, for upstream gradients by output name, gradients of the inputs that require one (None: outputs only)."""
    outputs = named(function(**inputs))
    result = {name: t.detach() for name, t in outputs.items()}
    wanted = {name: t for name, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad}
    if upstream and wanted:
        heads = [outputs[name] for name in upstream]
        grads = torch.autograd.grad(heads, list(wanted.values()), list(upstream.values()), allow_unused=True)
        result |= {f"d{name}": g for name, g in zip(wanted, grads) if g is not None}
    return result


def error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the difference over that of what is wanted (over 1 where that is 0); 0 for nothing."""
    if not want.numel():
        return 0.0
    difference = (got.to(want.dtype) - want).square().mean().sqrt().item()
    return difference / (want.square().mean().sqrt().item() or 1.0)


def check_op(
    op: Op,
    inputs: dict[str, Any],
    *,
    backend: str = "triton",
    layout: str = "contiguous",
    upstream_of: tuple[str, ...] | None = None,
    no_grad: tuple[str, ...] = (),
    factor: float = FACTOR,
    rounded_once: tuple[str, ...] = (),
    seed: int = 0,
    compiled: bool = False,
    opcheck: bool = False,
) -> dict[str, Tensor]:
    """Holds one call of a backend to the law, and returns its outputs and gradients by name.

    inputs        keyword arguments of the op; floating tensors get gradients but for those in no_grad
    upstream_of   outputs that have an upstream gradient; None: all that can
    factor        of the law. Truncation instead of rounding doubles an error that one final rounding makes: an op that
                  ends in one should use less than 2
    rounded_once  results that are exact but for one final rounding: held to the error that rounding the oracle makes
    """
    fill_dynamo_tables()  # here, where nothing watches dispatch yet
    kernel, reference = op.backends[backend], op.backends["ref"]

    def prepare(convert: Callable[[Tensor, int], Tensor]) -> dict[str, Any]:
        ready = {}
        for i, (name, t) in enumerate(inputs.items()):
            if isinstance(t, Tensor) and t.is_floating_point():
                t = convert(t.detach(), i).requires_grad_(name not in no_grad)
            ready[name] = t
        return ready

    where = f"{op.name} {backend}"
    double = prepare(lambda t, _: t.double())
    outputs = {name: t for name, t in named(reference(**double)).items() if t.requires_grad}
    chosen = [name for name in outputs if upstream_of is None or name in upstream_of]
    same_dtype = {name: t.dtype for name, t in named(reference(**prepare(lambda t, _: t.clone()))).items()}
    errors: dict[str, list[tuple[float, float]]] = {}
    few = any(t.numel() < DRAWS for t in double.values() if isinstance(t, Tensor) and t.requires_grad)
    for draw in range(DRAWS if few else 1):
        make = randn(seed + 1 + draw, torch.float64)
        # neither one nor of mean zero: a kernel that ignores or rescales it is far off
        upstream = {name: (3 * make(*outputs[name].shape)).to(same_dtype[name]) for name in chosen}
        oracle = evaluate(reference, double, {name: t.double() for name, t in upstream.items()})
        theirs = evaluate(reference, prepare(lambda t, _: t.clone()), upstream)
        with RecordOps() as record, poisoned_allocations():
            given = {name: guarded(t, layout, i) for i, (name, t) in enumerate(upstream.items())}
            ours = evaluate(kernel, prepare(lambda t, i: guarded(t, layout, i + 1)), given)
        if missing := set(oracle) ^ set(ours):
            raise Failed(f"{where}: {sorted(missing)} of {sorted(oracle)} differ from what the reference returns")
        for name, want in oracle.items():
            got, like = ours[name], theirs[name]
            if got.shape != like.shape or got.dtype != like.dtype:
                raise Failed(f"{where}: {name} is {tuple(got.shape)} {got.dtype}, not {tuple(like.shape)} {like.dtype}")
            reference_error = error(want.to(like.dtype), want) if name in rounded_once else error(like, want)
            errors.setdefault(name, []).append((error(got, want), reference_error))
    for name, draws in errors.items():
        kernel_error, torch_error = (sum(e * e for e in column) ** 0.5 / len(draws) ** 0.5 for column in zip(*draws))
        known_to = max(1, oracle[name].numel() * len(draws)) ** 0.5
        limit = ((ONCE if name in rounded_once else factor) * torch_error + TINY) * (1 + 3 / known_to)
        if not kernel_error <= limit:
            raise Failed(
                f"{where}: {name} is off by {kernel_error:.2e}; allowed {limit:.2e}, PyTorch {torch_error:.2e}"
            )
    with poisoned_allocations():
        again = evaluate(kernel, prepare(lambda t, _: guarded(t)), {name: guarded(t) for name, t in upstream.items()})
    for name, got in ours.items():
        if not torch.equal(_bits(got), _bits(again[name])):
            raise Failed(f"{where}: {name} differs between two runs")
    if opcheck:
        for func, args, kwargs, has_fp8 in record.calls:
            # opcheck's own comparison cannot add up fp8 numbers; `compiled` covers what is left out
            checks = OPCHECKS[:-1] if has_fp8 else OPCHECKS
            differentiable = bool(upstream) and "bwd" not in func.name()
            fresh = tuple(_fresh(a, differentiable) for a in args)
            torch.library.opcheck(func, fresh, kwargs, test_utils=checks)
    if compiled:
        torch.compiler.reset()
        whole = torch.compile(
            kernel, fullgraph=True, dynamic=False, backend="inductor" if DEVICE == "cuda" else "aot_eager"
        )
        for name, t in evaluate(whole, prepare(lambda t, _: t.clone()), upstream).items():
            if not torch.equal(_bits(t), _bits(again[name])):
                raise Failed(f"{where}: {name} differs under torch.compile")
    return ours


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8) if t.numel() and t.dim() else t.reshape(-1).contiguous().view(torch.uint8)


def _is_fp8(result: Any) -> bool:
    return isinstance(result, Tensor) and result.dtype.itemsize == 1  # an op that works in place returns None


def _fresh(value: Any, requires_grad: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(requires_grad and value.dtype in (torch.float32, torch.bfloat16))


def mutant(module: ModuleType, edits: dict[str, str], folder: Path) -> ModuleType:
    """A copy of an op's file with each text (which occurs in it) replaced by another, imported under a name of its own."""
    text = Path(module.__file__).read_text()
    for old, new in edits.items():
        if old not in text:
            raise ValueError(f"{module.__name__} has no {old!r}: the mutation no longer exists")
        text = text.replace(old, new)
    name = f"mutant_{abs(hash(tuple(edits.items()))):x}"
    path = folder / f"{name}.py"
    path.write_text(text.replace('"redline::', f'"{name}::'))
    spec = importlib.util.spec_from_file_location(name, path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy
