"""The conditions under which the tests hold every op's kernels to the law of bench/law.py: `check_op`.

Layouts     inputs and upstream gradients contiguous, with gaps between rows, or transposed, each between guards of NaN
Memory      whatever the kernel allocates is NaN before it writes, and the guards around it must survive
Repeats     two runs agree in every bit, though the programs of one run in reverse (in Triton's interpreter), or the
            threads of its blocks in every order of ORDERS (emulated CUDA)
Launches    those in the interpreter have no races, missing barriers or stray accesses: tests/races.py
PyTorch     `torch.library.opcheck` of each torch op that was called; `torch.compile(fullgraph=True)` with the same bits
"""

import contextlib
import faulthandler
import importlib.util
import math
import multiprocessing
import os
import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from bench.law import (
    DRAWS,
    FACTOR,
    GUARD,
    Failed,
    double,
    draw_upstream,
    error,
    evaluate,
    few,
    fill_dynamo_tables,
    judge,
    judge_rows,
    named,
    poisoned_allocations,
    same_form,
    unread,
)  # fmt: skip
from csrc import build
from kernels import attention_libraries, extension
from kernels.op import Device, Op
from tests.mutations import Edit, NoSuchMutation, edited
from tests.races import programs_in

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_CUDA = extension.needs_extension(Device.of(torch.device(DEVICE)))  # why csrc/ does not run here, not even emulated
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(NO_CUDA is not None, reason=f"csrc/ {NO_CUDA}"))  # a backend
ONCE = 1.02  # factor of results that are rounded once
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
ORDERS = ("highest first", "in turn", "random")  # of the threads of an emulated block, beside the usual lowest first
LAYOUTS = ("contiguous", "rows apart", "transposed", "every other")


def randn(seed: int, dtype: torch.dtype, device: str = DEVICE) -> Callable[..., Tensor]:
    """make(*size, dtype=None): normal numbers, the same for the same seed on every device.

    Their mean is a half, so that a sum over all of them is not what rounding left of a cancellation."""
    generator = torch.Generator().manual_seed(seed)

    def make(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return (0.5 + torch.randn(size, generator=generator)).to(device, dtype)

    return make


def backends_of(op: Op) -> list[Any]:
    """The backends of an op, as parameters of a test: those of csrc/ where they run."""
    return [CUDA if name == "cuda" else name for name in op.backends]


def guarded(t: Tensor, layout: str = "contiguous", index: int = 0) -> Tensor:
    """A copy of t in memory where everything around its elements is NaN.

    index: its place among the tensors of a call. Gaps between rows grow with it, so that no two strides agree, and
    "every other" leaves those of even index without gaps.
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
    """A copy of t for an op that works in place: between guards, or with that gap between rows, for `unharmed`."""
    shape = (*t.shape[:-1], t.size(-1) + gap) if gap else tuple(t.shape)
    n = math.prod(shape)
    view = t.new_full((n + 2 * GUARD,), 77)[GUARD : GUARD + n].view(shape)
    view = view[..., : t.size(-1)] if gap else view
    return view.copy_(t)


def unharmed(*states: Tensor) -> None:
    """Fail if anything but the elements of what `kept` made was written."""
    for t in states:
        around = t._base.clone()
        around.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(77)
        if not bool((around == 77).all()):
            raise Failed("wrote beside the elements of a state")


def flex_on_a_cpu(monkeypatch: Any, of: ModuleType = attention_libraries) -> None:
    """From now on FlexAttention's own arithmetic, gradients included, serves a CPU. of: the op's file."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda q, k, v: None)
    monkeypatch.setattr(of, "_compiled_flex_attention", lambda: flex_attention)


@contextlib.contextmanager
def in_order(backend: str, order: str) -> Iterator[None]:
    """Inside, what a CPU runs of a kernel runs in another order: threads of emulated CUDA in one of ORDERS, programs of
    Triton in reverse, or at random."""
    if backend != "cuda":
        with programs_in("random" if order == "random" else "reversed"):
            yield
        return
    module = extension.module(torch.device(DEVICE)) if DEVICE == "cpu" else None
    if module:
        module.set_order(order)
    yield
    if module:
        module.set_order("lowest first")


class RecordOps(TorchDispatchMode):
    """Keep the calls to this repository's torch ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, bool]] = []  # op, arguments, whether a result is fp8

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func.namespace == "redline" or func.namespace.startswith("mutant"):
            tensors = results if isinstance(results, (tuple, list)) else (results,)
            self.calls.append((func, args, kwargs or {}, any(_is_fp8(t) for t in tensors)))
        return results


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
    """Hold one call of a backend to the law; return its outputs and gradients by name.

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
                is_sum = name.endswith("_sum")
                t = (kept(t.detach()) if is_sum else convert(t.detach(), i)).requires_grad_(
                    name not in no_grad and not is_sum
                )
            ready[name] = t
        return ready

    def copies() -> dict[str, Any]:
        return prepare(lambda t, _: t.clone())

    where = f"{op.name} {backend}"
    wide = double(copies())
    outputs = {name: t for name, t in named(reference(**copies())).items() if t.requires_grad}
    outputs = {name: t for name, t in outputs.items() if upstream_of is None or name in upstream_of}
    errors: dict[str, list[tuple[float, float]]] = {}
    first: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # results of the first draw
    for draw in range(DRAWS if few(wide) else 1):
        upstream = draw_upstream(outputs, randn(seed + 1 + draw, torch.float64))
        oracle = evaluate(reference, wide, {name: t.double() for name, t in upstream.items()})
        theirs = evaluate(reference, copies(), upstream)
        with RecordOps() as record, poisoned_allocations():
            given = {name: guarded(t, layout, i) for i, (name, t) in enumerate(upstream.items())}
            ours = evaluate(kernel, prepare(lambda t, i: guarded(t, layout, i + 1)), given)
        try:
            same_form(theirs, ours)
        except Failed as failure:
            raise Failed(f"{where}: {failure}") from None
        for name, want in oracle.items():
            stored = ours[name].untyped_storage().nbytes() > ours[name].itemsize
            if unread(want) and unread(ours[name]) and stored and backend != "ref":
                raise Failed(f"{where}: {name} is NaN, and no placeholder")
            like = want.to(theirs[name].dtype) if name in rounded_once else theirs[name]
            errors.setdefault(name, []).append((error(ours[name], want), error(like, want)))
            first.setdefault(name, (ours[name], like, want))
    for name, draws in errors.items():
        kernel_errors, torch_errors = (list(column) for column in zip(*draws))
        once = name in rounded_once
        judge(f"{where}: {name}", kernel_errors, torch_errors, oracle[name].numel(), ONCE if once else factor)
        judge_rows(f"{where}: {name}", *first[name])
    for order in ORDERS if backend == "cuda" else ORDERS[:1]:
        with poisoned_allocations(), in_order(backend, order):
            given = {name: guarded(t) for name, t in upstream.items()}
            again = evaluate(kernel, prepare(lambda t, _: guarded(t)), given)
        for name, got in ours.items():
            if not torch.equal(_bits(got), _bits(again[name])):
                raise Failed(f"{where}: {name} differs between two runs, one with {order}")
    if opcheck:
        for func, args, kwargs, has_fp8 in record.calls:
            # opcheck's own comparisons, of arguments with themselves and of results, cannot compute in fp8; `compiled`
            # and the guards around arguments cover what is left out
            checks = OPCHECKS[any(map(_is_fp8, args)) : -1 if has_fp8 else None]
            differentiable = bool(upstream) and OPDEFS[func._schema.name]._backward_fn is not None
            fresh = tuple(_fresh(a, differentiable) for a in args)
            torch.library.opcheck(func, fresh, kwargs, test_utils=checks)
    if compiled:
        torch.compiler.reset()
        whole = torch.compile(
            kernel, fullgraph=True, dynamic=False, backend="inductor" if DEVICE == "cuda" else "aot_eager"
        )
        with in_order(backend, "random"):
            results = evaluate(whole, prepare(lambda t, _: t.clone()), upstream)
        for name, t in results.items():
            if not torch.equal(_bits(t), _bits(again[name])):
                raise Failed(f"{where}: {name} differs under torch.compile")
    return ours


def _bits(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def _is_fp8(result: Any) -> bool:
    return isinstance(result, Tensor) and result.dtype.itemsize == 1  # an op that works in place returns None


def _fresh(value: Any, requires_grad: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(requires_grad and value.dtype in (torch.float32, torch.bfloat16))


def mutant(module: ModuleType, edits: dict[str, str] | Sequence[Edit], folder: Path) -> ModuleType:
    """A copy of an op's file with edits, imported under a name of its own. A dict replaces each text by another."""
    text = Path(module.__file__).read_text()
    text = replaced(text, edits, module.__name__) if isinstance(edits, dict) else edited(text, edits)
    name = f"mutant_{abs(hash(text)):x}"
    path = folder / f"{name}.py"
    path.write_text(text.replace('"redline::', f'"{name}::'))
    spec = importlib.util.spec_from_file_location(name, path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def replaced(text: str, edits: dict[str, str], name: str) -> str:
    """The text of that name with each text replaced by another. NoSuchMutation where one is not there."""
    for old, new in edits.items():
        if old not in text:
            raise NoSuchMutation(f"{name} has no {old!r}")
        text = text.replace(old, new)
    return text


def edited_csrc(file: str, edits: dict[str, str], folder: Path) -> Path:
    """A copy of csrc/'s sources with edits in one file."""
    sources = folder / "csrc"
    shutil.copytree(build.CSRC, sources, ignore=shutil.ignore_patterns("_cuda*", "__pycache__"))
    (sources / file).write_text(replaced((sources / file).read_text(), edits, f"csrc/{file}"))
    return sources


def mutant_cuda(file: str, edits: dict[str, str], folder: Path) -> ModuleType:
    """The emulated module of csrc/ with edits in one file."""
    path = build.build_emulated(extension.cache_folder(), sources=edited_csrc(file, edits, folder))
    return build.load(path, "_emulated")


def noticed(check: Callable[[], Any]) -> bool:
    """Whether a check of a broken CUDA kernel fails, in a copy of this process: such a kernel may write anywhere.

    A crash counts; an error that no check raises is raised here.
    """
    reader, writer = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        torch.set_num_threads(1)  # OpenMP's threads are not in the copy
        faulthandler.disable()
        try:
            check()
        except (Failed, AssertionError):
            writer.send(None)
        except Exception as error:
            writer.send(None if str(error).startswith("block (") else traceback.format_exc())  # or of the emulation
        else:
            writer.send("")
        os._exit(0)  # and none of this process's own goodbyes

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    writer.close()
    try:
        said = reader.recv()
    except EOFError:  # it crashed
        said = None
    child.join()
    if said:
        raise RuntimeError(said)
    return said is None
