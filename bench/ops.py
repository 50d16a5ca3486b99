"""Ops as items of the suite: their backends, torch.compile of the reference and installed peers on the shapes of the tracks.

On a GPU: bf16 on every track's shape, fp32 on the first of them, cold inputs, CUDA graphs. On a CPU: the quickstart's shape.
Inputs are random-normal numbers. The check is the law of the tests, without its harder conditions: the reference in float64 is
the oracle, and a variant may be off by FACTOR times what the reference is in its own dtype. A peer that computes in another
precision has a bound of its own, which its row states.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from bench.peers import PEERS, Peer
from bench.suite import Item
from bench.timing import GraphSampler, HostSampler, Sampler
from kernels.master import join_master
from kernels.op import Device, Op
from tests.harness import FACTOR, TINY, error, named, poisoned_allocations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICKSTART = "quickstart"
COMPILED = "torch.compile"
COLD_BYTES = 2**28  # of the input sets together: several times an L2 cache
MAX_SETS = 256
KERNELS = ("triton", "cuda")
OTHER_SEED = 2**20  # of the numbers of the second check
ROW_FACTOR = 4.0  # by which the worst row may be worse than the reference's worst
FEW = 64  # numbers of an output: their mean error says little, so they may be off by one rounding


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


def op_item(op: Op, case: str, form: str, dtype: torch.dtype, backward: bool) -> Item:
    shape = op.cases[case]
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
    inputs = op.forms[form](_maker(torch.float32, "meta"), *next(iter(op.cases.values())))
    return bool(_leaves(inputs))


def _maker(dtype: torch.dtype, device: str, seed: int = 0) -> Callable[..., Tensor]:
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def make(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        if not dtype.is_floating_point:  # the low halves of masters
            return torch.zeros(size, dtype=dtype, device=device)
        return torch.randn(size, generator=generator, device=device).to(dtype).requires_grad_()

    return make


def _leaves(inputs: dict[str, Any]) -> list[Tensor]:
    return [t for t in inputs.values() if isinstance(t, Tensor) and t.requires_grad]


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


class OpPrograms:
    def __init__(
        self, op: Op, shape: tuple[int, ...], form: str, dtype: torch.dtype, backward: bool, peers: dict[str, Peer]
    ) -> None:
        self._op, self._form, self._backward, self._peers = op, form, backward, peers

        def inputs(seed: int) -> dict[str, Any]:
            return op.forms[form](_maker(dtype, DEVICE, seed), *shape)

        self._sets = [inputs(0)]
        if DEVICE == "cuda":
            size = sum(t.nbytes for t in self._sets[0].values() if isinstance(t, Tensor))
            sets = min(MAX_SETS, max(2, -(-COLD_BYTES // size)))
            self._sets += [inputs(seed) for seed in range(1, sets)]
        self._checked = (self._sets[0], inputs(OTHER_SEED))
        self._known: dict[int, tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]] = {}
        self._functions: dict[str, Callable[..., Any]] = {}

    def _function(self, variant: str) -> Callable[..., Any]:
        if variant not in self._functions:
            if variant == COMPILED:
                function = torch.compile(self._op.backends["ref"], fullgraph=True, dynamic=False)
            elif variant in self._peers:
                function = self._peers[variant].make(self._form, self._sets[0])
            else:
                function = self._op.backends[variant]
            self._functions[variant] = function
        return self._functions[variant]

    # check

    def check(self, variant: str) -> str | None:
        """Twice, on different numbers in different memory: with gradients, then forward alone as it is timed."""
        for i, with_gradients in enumerate((True, False)):
            if error := self._check(variant, i, with_gradients):
                return error
        return None

    def _check(self, variant: str, i: int, with_gradients: bool) -> str | None:
        bound = self._peers[variant].bound if variant in self._peers else None
        want, like, row_errors = self._oracles(i, with_gradients)
        inputs = copied(self._checked[i])
        before = copied(inputs, shift=0.0)
        # what a kernel leaves unwritten is NaN; compiled code has no such allocations
        with poisoned_allocations() if variant in KERNELS else nullcontext():
            got = results(self._function(variant), inputs, with_gradients)
        if missing := want.keys() ^ got.keys():
            return f"{sorted(missing)} of {sorted(want)} differ from what the reference returns"
        for name, t in want.items():
            like_t, off = like[name], None
            if got[name].shape != like_t.shape or got[name].dtype != like_t.dtype:
                return f"{name} is {tuple(got[name].shape)} {got[name].dtype}, not {tuple(like_t.shape)} {like_t.dtype}"
            n = max(1, t.numel())
            floor = torch.finfo(like_t.dtype).eps if n < FEW else TINY
            theirs = error(like_t, t)
            limit = bound or (FACTOR * theirs + floor) * (1 + 3 / n**0.5)
            if not (off := error(got[name], t)) <= limit:
                return f"{name} is off by {off:.2e}; allowed {limit:.2e}, PyTorch in the same dtype {theirs:.2e}"
            limit = ROW_FACTOR * (bound or row_errors[name] + floor)
            if not (off := worst_row(got[name], t)) <= limit:
                return f"a row of {name} is off by {off:.2e} of the mean; allowed {limit:.2e}"
        if has_gradients(self._op, self._form):
            changed = [k for k, t in inputs.items() if isinstance(t, Tensor) and not torch.equal(t.detach(), before[k])]
            if changed:
                return f"changes its inputs: {', '.join(changed)}"
        return None

    def _oracles(self, i: int, with_gradients: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
        """Results in float64, those of the reference in its own dtype, and the errors of its worst rows."""
        if i not in self._known:
            reference = self._op.backends["ref"]
            want = results(reference, copied(self._checked[i], wide=True), with_gradients)
            like = results(reference, copied(self._checked[i]), with_gradients)
            self._known[i] = want, like, {name: worst_row(t, want[name]) for name, t in like.items()}
        return self._known[i]

    # time

    def sampler(self, variant: str) -> Sampler:
        self._known.clear()  # all are checked by now, and float64 is large
        function = self._function(variant)
        calls = [self._call(function, inputs) for inputs in self._sets]
        return HostSampler(calls[0]) if DEVICE == "cpu" else GraphSampler(calls, torch.cuda.current_stream())

    def _call(self, function: Callable[..., Any], inputs: dict[str, Any]) -> Callable[[], object]:
        if self._backward and self._op.gradients_in_forward:
            return lambda: torch.autograd.grad(list(_heads(function(**inputs))), _leaves(inputs))
        if self._backward:
            heads, leaves = _heads(function(**inputs)), _leaves(inputs)
            grads = [torch.randn_like(t) for t in heads]
            return lambda: torch.autograd.grad(heads, leaves, grads, retain_graph=True)

        def forward() -> None:
            with torch.no_grad():
                function(**inputs)

        return forward


def copied(inputs: dict[str, Any], *, wide: bool = False, shift: float = 0.5) -> dict[str, Any]:
    """Inputs of the check in memory of their own: those that get gradients with a mean of a half, so that a sum over all of them
    is not what rounding left of a cancellation. wide: in float64, a weight of two halves as one number."""

    def copy(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        copy = t.detach() + shift if t.requires_grad and shift else t.detach().clone()
        if wide and t.is_floating_point():
            copy = copy.double()
        return copy.requires_grad_(t.requires_grad)

    own = {name: copy(t) for name, t in inputs.items()}
    if wide and own.get("low") is not None:
        own |= {"p": join_master(inputs["p"], inputs["low"]).double(), "low": None}
    return own


def worst_row(got: Tensor, want: Tensor) -> float:
    """Largest root mean square of a row's difference, over that of all that is wanted."""
    if not want.numel() or want.dim() == 0:
        return 0.0
    difference = (got.to(want.dtype) - want).square().mean(-1).sqrt()
    worst = difference.nan_to_num(nan=torch.inf).max().item()
    return worst / (want.square().mean().sqrt().item() or 1.0)


def results(function: Callable[..., Any], inputs: dict[str, Any], with_gradients: bool = True) -> dict[str, Tensor]:
    """Outputs by name, then gradients for upstream gradients that are not one, or what an op without gradients made of its
    inputs."""
    with torch.set_grad_enabled(with_gradients):
        outputs = _outputs(function(**inputs))
    found = {name: t.detach() for name, t in outputs.items()}
    heads = {name: t for name, t in outputs.items() if t.requires_grad and with_gradients}
    if heads:
        generator = torch.Generator(DEVICE).manual_seed(1)
        # the same numbers whatever the dtype of the output
        upstream = [0.5 + torch.randn(t.shape, generator=generator, device=DEVICE).bfloat16() for t in heads.values()]
        upstream = [g.to(t.dtype) for g, t in zip(upstream, heads.values())]
        leaves = {name: t for name, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad}
        given = [g.clone() for g in upstream]
        gradients = torch.autograd.grad(list(heads.values()), list(leaves.values()), upstream)
        if not all(map(torch.equal, given, upstream)):
            raise ValueError("changes the gradients that backward is given")
        return found | {f"d{name}": g for name, g in zip(leaves, gradients)}
    if _leaves(inputs):
        return found
    found |= {name: t for name, t in inputs.items() if isinstance(t, Tensor) and t.is_floating_point()}
    if inputs.get("low") is not None:
        found["p"] = join_master(inputs["p"], inputs["low"])
    return found


def _heads(returned: Any) -> list[Tensor]:
    return [t for t in _outputs(returned).values() if t.requires_grad]


def _outputs(returned: Any) -> dict[str, Tensor]:
    return {} if returned is None else named(returned)
