"""Gradients and weights between ranks, while the step goes on.

Gradients   of a parameter with owners (core/sharding.py) go to these alone. Backward gives them out stage by stage, in
            the last micro-step: the weights of a few layers are a stage, and their gradients are complete when backward
            reaches its beginning. Tables follow after backward, and all small parameters as one flat sum of all ranks
Weights     come back after the update, and are awaited stage by stage where the next forward begins to use them
On the wire bf16 for what is stored in bf16 on a GPU, else as it is. Owners add in fp32 what they receive, in the order
            of the ranks, so that sums repeat to the bit, and a number is rounded once; once more between nodes
Nodes       gradients are summed inside each node first, then between the ranks of one local rank; weights take the same
            way back. So a network card carries one share in `local_size` of everything

All of it is `all_to_all_single` with pieces of unequal size: neither padding nor a permutation. A ring moves as much.
"""

import itertools
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from core.communication import Peers, World
from core.optim import Gradients, Optimizer
from core.sharding import Dealing

Transfer = Generator[Any, None, None]  # yields what has to be waited for
BF16 = torch.bfloat16


class Staged(Protocol):
    """What an exchange needs of a model."""

    at_stage: Callable[[Tensor, int, Sequence[Tensor]], Tensor] | None

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """Parameters in the order of forward; gradients of the first are complete last."""
        ...

    def refresh_copies(self, names: Sequence[str] | None = None) -> None: ...


class Exchange:
    """What passes between the ranks of one training run in a step."""

    def __init__(
        self,
        model: Staged,
        optimizer: Optimizer,
        gradients: Gradients,
        *,
        world: World,
        peers: Peers,
        dealing: Dealing,
        half: bool | None = None,
        span: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Connects the model's stages with it. half: gradients of what is stored in bf16 travel in bf16 (None: on a
        GPU); span: measures what is inside by a name, here time spent waiting."""
        self._model, self._optimizer, self._gradients = model, optimizer, gradients
        self._world, self._peers, self._span = world, peers, span
        self._place = peers.grid.place(world.rank)
        self._bounds = dealing.bounds
        cuda = world.device.type == "cuda"
        self._half = cuda if half is None else half
        self._side = torch.cuda.Stream(world.device) if cuda else None
        self._stages = [[name for name in stage if name in self._bounds] for stage in model.stages]
        if missing := self._bounds.keys() - {name for stage in self._stages for name in stage}:
            raise ValueError(f"{min(missing)} has owners and is in no stage of the model")
        # gradients of what this rank owns, side by side as the optimizer takes them; others are the sums themselves
        self.owned = [
            total if whole is arena else total.new_zeros(arena.shape)
            for whole, arena, total in zip(optimizer.layout, optimizer.arenas, gradients.sums)
        ]
        self._parts: dict[str, Tensor] = {}
        for arena, t in zip(optimizer.arenas, self.owned):
            self._parts |= arena.cut(t)
        small = [(t, a) for t, a in zip(self.owned, optimizer.arenas) if a.params[0].name not in self._bounds]
        self._small, self._small_matrices = [t for t, _ in small], [t for t, a in small if a.views]
        self._matrices = {p.name for arena in optimizer.arenas if arena.views for p in arena.params}
        self._hands_out = False  # whether backward is that of the last micro-step
        self._coming: dict[str, Callable[[], None]] = {}  # gradients under way, by parameter
        self._rest: Callable[[], None] | None = None  # the small ones
        self._leaving: list[list[Callable[[], None]]] = [[] for _ in self._stages]  # weights under way, by stage
        self._handle = next(_HANDLES)
        _EXCHANGES[self._handle] = self
        model.at_stage = self._at_stage

    # gradients ------------------------------------------------------------

    def last_micro_step(self) -> None:
        """From now on backward gives out what it completes."""
        self._hands_out = True

    def _at_stage(self, t: Tensor, stage: int, sums: Sequence[Tensor]) -> Tensor:
        """Marks in forward where a stage begins: t, which all that follows depends on, passes unchanged. sums: of the
        gradients of the stage's parameters in their order, of a bank matrix by matrix."""
        marked: Tensor = _Stage.apply(t, self._handle, stage, *sums)
        return marked

    def complete(self, stage: int, sums: Sequence[Tensor]) -> None:
        """The sums of a stage's gradients are those of the step."""
        if not self._hands_out:
            return
        rest = iter(sums)
        for name in self._model.stages[stage]:
            size, parts = self._optimizer.params[name].numel(), list[Tensor]()
            while sum(t.numel() for t in parts) < size:
                parts.append(next(rest))
            if name in self._bounds:
                self._coming[name] = self._start(self._reduce(name, parts))

    def backward_is_done(self, outcome: Tensor, *, others: bool = True) -> None:
        """Gives out what backward has not; outcome becomes its mean over ranks once the small parameters were
        received. others: of AdamW's parameters, too, which else go on adding up."""
        self._hands_out = False
        for stage in reversed(self._stages):
            for name in stage:
                if name not in self._coming and (others or name in self._matrices):
                    self._coming[name] = self._start(self._reduce(name, [self._gradients.by_name[name]]))
        self._rest = self._start(self._average([*(self._small if others else self._small_matrices), outcome]))

    def receive(self, arena: int) -> None:
        """Waits for the gradient of what this rank owns of an arena, which is `owned[arena]` then."""
        with self._span("communication"):
            for p in self._optimizer.layout[arena].params:
                if p.name in self._bounds:
                    self._coming.pop(p.name)()
                else:
                    self._receive_small()

    def largest(self, values: Tensor) -> Tensor:
        """Maxima over ranks, in place."""

        def transfer() -> Transfer:
            yield dist.all_reduce(values, op=dist.ReduceOp.MAX, async_op=True)

        with self._span("communication"):
            self._start(transfer())()  # in line with what is under way: two communicators at once may block each other
        return values

    def gradients_are_out(self) -> None:
        """Waits until all have left and come: the sums may be written again, and the outcome is that of all ranks."""
        self._receive_small()
        if self._coming:
            raise RuntimeError(f"gradients of {sorted(self._coming)} were not received")

    def _receive_small(self) -> None:
        if self._rest is not None:
            self._rest()
            self._rest = None

    # weights --------------------------------------------------------------

    def send(self, arenas: Iterable[int]) -> None:
        """Begins to give out what this rank has updated of these arenas, in the order in which forward needs it."""
        names = {p.name for i in arenas for p in self._optimizer.layout[i].params}
        for stage, leaving in zip(self._stages, self._leaving):
            leaving += [self._start(self._gather(name)) for name in stage if name in names]

    def arrive(self, stage: int | None = None) -> None:
        """Waits until the weights of a stage, or of all, are here; copies of them are made anew."""
        for i in range(len(self._leaving)) if stage is None else (stage,):
            if not self._leaving[i]:
                continue
            with self._span("communication"):
                while self._leaving[i]:
                    self._leaving[i].pop(0)()
            self._model.refresh_copies(self._stages[i])

    # transfers ------------------------------------------------------------

    def _start(self, transfer: Transfer) -> Callable[[], None]:
        """Begins a transfer, and returns what waits for its end.

        On a GPU all of it is queued on a stream of its own, and waiting is a matter of the GPU. On a CPU what follows
        the first message is done by whoever waits."""
        if self._side is not None:
            current = torch.cuda.current_stream()
            self._side.wait_stream(current)
            with torch.cuda.stream(self._side):
                for work in transfer:
                    work.wait()
                done = self._side.record_event()
            return lambda: torch.cuda.current_stream().wait_event(done)
        first = next(transfer, None)

        def finish() -> None:
            work = first
            while work is not None:
                work.wait()
                work = next(transfer, None)

        return finish

    def _sizes(self, name: str) -> tuple[list[int], list[int], int]:
        """Of a parameter's elements: how many the ranks of this rank's local rank own on each node, how many all ranks
        of each local rank, and where those of this local rank begin."""
        nodes, bounds = self._peers.grid.nodes, self._bounds[name]
        unit = self._optimizer.params[name].numel() // bounds[-1]
        ends = [unit * end for end in bounds]
        columns = ends[::nodes]
        first = self._place // nodes * nodes
        across = [b - a for a, b in itertools.pairwise(ends[first : first + nodes + 1])]
        return across, [b - a for a, b in itertools.pairwise(columns)], ends[first]

    def _reduce(self, name: str, total: Sequence[Tensor]) -> Transfer:
        """The mean over ranks of what this rank owns of a gradient. total: its sum over micro-steps, in parts."""
        wide = total[0].dtype
        wire = BF16 if self._half and self._optimizer.params[name].dtype == BF16 else wide
        # a copy, made before the stream that backward runs on goes on: compiled code may use the memory again
        x = total[0].new_empty(sum(t.numel() for t in total), dtype=wire)
        parts = x.split([t.numel() for t in total])
        torch._foreach_copy_([part.view_as(t) for part, t in zip(parts, total)], list(total))
        if self._side is not None:
            x.record_stream(self._side)
        return self._to_owners(name, x, wide)

    def _to_owners(self, name: str, x: Tensor, wide: torch.dtype) -> Transfer:
        nodes, wire = self._peers.grid.nodes, x.dtype
        across, inside, _ = self._sizes(name)
        x = yield from _summed(x, inside, self._place // nodes, self._peers.local, wide)
        if nodes > 1:
            x = yield from _summed(x.to(wire), across, self._place % nodes, self._peers.node, wide)
        torch.div(x, self._world.world_size, out=self._parts[name].view(-1))

    def _gather(self, name: str) -> Transfer:
        """The weights of all owners into the parameter."""
        across, inside, begin = self._sizes(name)
        whole, own = self._optimizer.params[name].data.view(-1), self._optimizer.owned[name].view(-1)
        column = whole[begin : begin + sum(across)]  # of this local rank on all nodes
        yield from _collected(column, own, across, self._peers.node)
        yield from _collected(whole, column, inside, self._peers.local)

    def _average(self, tensors: Sequence[Tensor]) -> Transfer:
        """Means over ranks, in place, as one flat sum."""
        flat = torch.cat([t.reshape(-1) for t in tensors])
        yield dist.all_reduce(flat, async_op=True)
        flat /= self._world.world_size
        parts = flat.split([t.numel() for t in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(t) for part, t in zip(parts, tensors)])


def _summed(x: Tensor, sizes: Sequence[int], me: int, group: Any, wide: torch.dtype) -> Generator[Any, None, Tensor]:
    """x holds a piece for each rank of the group; returns the sum of what all have for this one."""
    if len(sizes) == 1:
        return x
    received = x.new_empty(len(sizes), sizes[me])
    given = [sizes[me]] * len(sizes)
    yield dist.all_to_all_single(received.view(-1), x, given, list(sizes), group=group, async_op=True)
    return received.sum(0, dtype=wide)


def _collected(whole: Tensor, own: Tensor, sizes: Sequence[int], group: Any) -> Iterator[Any]:
    """The pieces of all ranks of the group, one after the other, into `whole`."""
    if len(sizes) == 1:
        if own.data_ptr() != whole.data_ptr():
            whole.copy_(own)
        return
    given = own.repeat(len(sizes))
    yield dist.all_to_all_single(whole, given, list(sizes), [len(own)] * len(sizes), group=group, async_op=True)


# stages, as compiled code sees them: ops that it can neither drop nor move before what they depend on

_HANDLES = itertools.count()
_EXCHANGES: "weakref.WeakValueDictionary[int, Exchange]" = weakref.WeakValueDictionary()


class _Stage(torch.autograd.Function):
    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]  # autograd passes what apply was given
        ctx: Any, t: Tensor, handle: int, stage: int, *sums: Tensor
    ) -> Tensor:
        ctx.where, ctx.sums = (handle, stage), sums  # not saved: micro-steps change the sums in place
        return _begins(t, handle, stage)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _is_complete(grads[0], list(ctx.sums), *ctx.where), None, None, *(None for _ in ctx.sums)


@torch.library.custom_op("redline::stage_begins", mutates_args=())
def _begins(t: Tensor, handle: int, stage: int) -> Tensor:
    """A copy of t, made when the stage's weights are here."""
    _EXCHANGES[handle].arrive(stage)
    return t.clone()


@torch.library.custom_op("redline::stage_is_complete", mutates_args=())
def _is_complete(t: Tensor, sums: list[Tensor], handle: int, stage: int) -> Tensor:
    """A copy of t, made when the stage's gradients have begun to leave."""
    _EXCHANGES[handle].complete(stage, sums)
    return t.clone()


@_begins.register_fake
def _(t: Tensor, handle: int, stage: int) -> Tensor:
    return torch.empty_like(t)


@_is_complete.register_fake
def _(t: Tensor, sums: list[Tensor], handle: int, stage: int) -> Tensor:
    return torch.empty_like(t)
