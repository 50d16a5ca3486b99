"""Ops as items of the suite: backends, torch.compile of the reference, and installed peers on the tracks' shapes.

On a GPU: bf16 on every track's shape, fp32 on the first of them, cold inputs, CUDA graphs. On a CPU: the quickstart's
shape. Inputs are normal numbers. Before it is timed, each variant has to keep the law (bench/law.py). A peer that
computes in another precision has a bound of its own.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from bench.law import (
    DRAWS,
    Failed,
    Tensors,
    double,
    draw_upstream,
    error,
    evaluate,
    few,
    judge,
    judge_rows,
    leaves,
    named,
    poisoned_allocations,
    same_form,
    sums,
)  # fmt: skip
from bench.peers import PEERS, Peer
from bench.suite import Item
from bench.timing import GraphSampler, HostSampler, Sampler
from kernels.op import Device, Op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICKSTART = "quickstart"
COMPILED = "torch.compile"
COLD_BYTES = 2**28  # of the input sets together: several times an L2 cache
MAX_SETS = 256
KERNELS = ("triton", "cuda", "scaled_mm", "fa3", "flash_attn")  # which allocate their results, or gradients, themselves
FUSED = ("cublas",)  # plain PyTorch, measured as a compiled model runs it
CHECK_SEEDS = (2**20, 2**20 + 1)  # with gradients; forward alone
UPSTREAM_SEED = 2**21


def op_items(op: Op) -> list[Item]:
    """What can be measured of an op on this device."""
    cases = [case for case in op.cases if (case == QUICKSTART) != (DEVICE == "cuda")]
    found = []
    for i, case in enumerate(cases):
        for dtype in (torch.float32,) if DEVICE == "cpu" else (torch.bfloat16, torch.float32)[: 1 if i else 2]:
            for form in op.forms:
                for backward in (False, True)[: 2 if has_gradients(op, form) else 1]:
                    found.append(op_item(op, case, form, dtype, backward))
    return found


def op_item(
    op: Op, case: str, form: str, dtype: torch.dtype, backward: bool, shape: tuple[int, ...] | None = None
) -> Item:
    """One direction of one form. shape: another than the case's."""
    shape = shape or op.cases[case]
    here = Device.of(torch.device(DEVICE))
    variants = {name: op.obstacle(name, shape, dtype, here) for name in op.backends}
    variants[COMPILED] = None
    peers = {name: peer for name, peer in PEERS.get(op.name, {}).items() if form in peer.forms}
    variants |= {name: peer.absent(DEVICE) for name, peer in peers.items()}
    return Item(
        op=op.name,
        case=case,
        form=form,
        direction="backward" if backward else "forward",
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        work=op.cost(shape, dtype, form, backward),
        baseline="ref",
        ours=op.pick(shape, dtype, here)[0],
        variants=variants,
        open=functools.partial(_open, op, shape, form, dtype, backward, peers),
    )


def has_gradients(op: Op, form: str) -> bool:
    """Whether some input of the form can have a gradient; the optimizer's have none."""
    return bool(leaves(op.forms[form](_maker(torch.float32, "meta"), *next(iter(op.cases.values())))))


def _maker(dtype: torch.dtype, device: str, seed: int = 0, mean: float = 0.0) -> Callable[..., Tensor]:
    """make(*size, dtype=None): normal numbers that require gradients, and integers that are 0."""
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def make(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        if not dtype.is_floating_point:  # the low halves of masters
            return torch.zeros(size, dtype=dtype, device=device)
        return (mean + torch.randn(size, generator=generator, device=device)).to(dtype).requires_grad_()

    return make


@contextmanager
def _open(
    op: Op, shape: tuple[int, ...], form: str, dtype: torch.dtype, backward: bool, peers: dict[str, Peer]
) -> Iterator["OpPrograms"]:
    # what torch.compile saves for backward must outlive the first of several
    with functorch_config.patch(donated_buffer=False):
        try:
            if DEVICE == "cpu":
                yield OpPrograms(op, shape, form, dtype, backward, peers)
            else:
                stream = torch.cuda.Stream()
                with torch.cuda.stream(stream):  # a graph's backward is captured on the stream that forward ran on
                    yield OpPrograms(op, shape, form, dtype, backward, peers)
                    stream.synchronize()
        finally:
            torch.compiler.reset()


@dataclass(frozen=True)
class Draw:
    """What is right for one set of upstream gradients: the oracle's results, and the reference's in its own dtype."""

    upstream: Tensors | None
    want: Tensors
    like: Tensors


class OpPrograms:
    def __init__(
        self, op: Op, shape: tuple[int, ...], form: str, dtype: torch.dtype, backward: bool, peers: dict[str, Peer]
    ) -> None:
        self._op, self._form, self._backward, self._peers = op, form, backward, peers

        def inputs(seed: int, mean: float = 0.0) -> dict[str, Any]:
            return op.forms[form](_maker(dtype, DEVICE, seed, mean), *shape)

        self._sets = [inputs(0)]
        if DEVICE == "cuda":
            size = sum(t.nbytes for t in self._sets[0].values() if isinstance(t, Tensor))
            sets = min(MAX_SETS, max(2, -(-COLD_BYTES // size)))
            self._sets += [inputs(seed) for seed in range(1, sets)]
        # the mean is not 0, or a sum over all numbers would be what rounding left of a cancellation
        self._checked = [inputs(seed, mean=0.5) for seed in CHECK_SEEDS]
        self._draws: dict[int, list[Draw]] = {}
        self._functions: dict[str, Callable[..., Any]] = {}

    def _function(self, variant: str) -> Callable[..., Any]:
        if variant not in self._functions:
            if variant == COMPILED:
                function = torch.compile(self._op.backends["ref"], fullgraph=True, dynamic=False)
            elif variant in self._peers:
                function = self._peers[variant].make(self._form, self._sets[0])
            elif variant in FUSED:
                function = torch.compile(self._op.backends[variant], fullgraph=True, dynamic=False)
            else:
                function = self._op.backends[variant]
            self._functions[variant] = function
        return self._functions[variant]

    # check

    def check(self, variant: str) -> str | None:
        """Twice, on different numbers in different memory: with gradients, then forward alone as it is timed."""
        for i, with_gradients in enumerate((True, False)):
            try:
                self._check(variant, i, with_gradients)
            except Failed as failure:
                return str(failure)
        return None

    def _check(self, variant: str, i: int, with_gradients: bool) -> None:
        bound = self._peers[variant].bound if variant in self._peers else None
        errors: dict[str, list[tuple[float, float]]] = {}
        sizes: dict[str, int] = {}
        for number, draw in enumerate(self._oracles(i, with_gradients)):
            inputs = copied(self._checked[i])
            # compiled code and peers allocate where Python does not see it
            with poisoned_allocations() if variant in KERNELS else nullcontext():
                with torch.set_grad_enabled(with_gradients):
                    got = evaluate(self._function(variant), inputs, draw.upstream)
            if number == 0:
                same_form(draw.like, got)
                for name, want in draw.want.items():
                    sizes[name] = want.numel()
                    judge_rows(name, got[name], draw.like[name], want, bound)
                if leaves(self._checked[i]):
                    unchanged(self._checked[i], inputs)
            for name, want in draw.want.items():
                errors.setdefault(name, []).append((error(got[name], want), error(draw.like[name], want)))
        for name, draws in errors.items():
            ours, theirs = (list(column) for column in zip(*draws))
            judge(name, ours, theirs, sizes[name], bound=bound)

    def _oracles(self, i: int, with_gradients: bool) -> list[Draw]:
        """The draws of a check, made once for all variants. All but the first keep results of a few numbers alone."""
        if i in self._draws:
            return self._draws[i]
        reference, inputs, draws = self._op.backends["ref"], self._checked[i], []
        for number in range(DRAWS if with_gradients and few(inputs) else 1):
            with torch.set_grad_enabled(with_gradients):
                outputs = named(reference(**copied(inputs))) if with_gradients else {}
                outputs = {name: t for name, t in outputs.items() if t.requires_grad}
                make = _maker(torch.float32, DEVICE, UPSTREAM_SEED + number, mean=0.5)
                upstream = draw_upstream(outputs, make)
                wide = {name: t.double() for name, t in upstream.items()}
                want = evaluate(reference, double(inputs), wide)
                like = evaluate(reference, copied(inputs), upstream)
            if number:
                want = {name: t for name, t in want.items() if t.numel() < DRAWS}
                like = {name: like[name] for name in want}
            draws.append(Draw(upstream, want, like))
        self._draws[i] = draws
        return draws

    # time

    def sampler(self, variant: str) -> Sampler:
        self._draws.clear()  # all are checked by now, and float64 is large
        self._checked.clear()
        function = self._function(variant)
        calls = [self._call(function, inputs) for inputs in self._sets]
        return HostSampler(calls[0]) if DEVICE == "cpu" else GraphSampler(calls, torch.cuda.current_stream())

    def _call(self, function: Callable[..., Any], inputs: dict[str, Any]) -> Callable[[], object]:
        if self._backward and self._op.gradients_in_forward:
            return lambda: torch.autograd.grad(
                list(_heads(function(**inputs))), list(leaves(inputs).values()), allow_unused=True
            )
        if self._backward:
            heads, wanted = _heads(function(**inputs)), list(leaves(inputs).values())
            grads = [torch.randn_like(t) for t in heads]
            return lambda: torch.autograd.grad(heads, wanted, grads, retain_graph=True, allow_unused=True)

        def forward() -> None:
            with torch.no_grad():
                function(**inputs)

        return forward


def copied(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs in memory of their own."""
    own = {name: t for name, t in inputs.items() if isinstance(t, Tensor)}
    return inputs | {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in own.items()}


def unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Fails if an op that returns its results has written into its inputs."""
    tensors = {name: t for name, t in before.items() if isinstance(t, Tensor) and name not in sums(before)}
    if changed := [name for name, t in tensors.items() if not torch.equal(t.detach(), after[name].detach())]:
        raise Failed(f"changes its inputs: {', '.join(changed)}")


def _heads(returned: Any) -> list[Tensor]:
    return [t for t in named(returned).values() if t.requires_grad]
