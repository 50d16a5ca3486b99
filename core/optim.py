"""Muon for the matrices, AdamW for everything else.

Source: nanochat 92d63d4, optim.py. The rules are those of the ops adam_update, muon_update and polar_express in
`kernels`.

Shape of the code   parameters lie side by side in arenas (core/params.py), and so do their states and gradients. A step
                    calls one op of AdamW for each arena, and Muon's three for all matrices of one shape: about 50
                    launches whatever the depth.
Ranks               Of several, each updates what it owns of the arenas, in copies that lie side by side, and exchanges
                    gradients and weights with the others (core/sharding.py, core/exchange.py).
Hyperparameters     go to the device as one tensor a step: nothing compiles again or waits for it.
State               as `Param.states` lists it; each is a part of its arena's. Fp32 parameters are their own master; a
                    bf16 matrix or head keeps the low 16 bits of its fp32 master beside it (`kernels/master.py`);
                    embeddings in bf16 have no master.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from core import schedule
from core.config import OptimConfig
from core.params import MUON, Arena, MuonView, Table, arenas
from core.sharding import Shard
from kernels.adam_update import adam_hyper, adam_update
from kernels.dispatch import Backends
from kernels.master import split_master
from kernels.muon_update import muon_apply, muon_momentum
from kernels.op import Shape
from kernels.polar_express import COEFFICIENTS, polar_express


class AdamGroup(NamedTuple):
    """cautious: decays what the step shrinks alone, and at a rate that is scheduled as the learning rate."""

    betas: tuple[float, float]
    decay: float  # per unit of learning rate
    cautious: bool = False


# of gpt2's model [nanochat 92d63d4, gpt.py]
# a row of an embedding has a gradient only in steps whose batch has its token: beta2 is near 1 there
ADAM_GROUPS = {
    "lm_head": AdamGroup((0.8, 0.96), 0.01),
    "wte": AdamGroup((0.8, 0.995), 0.001),
    "value_embeds": AdamGroup((0.8, 0.995), 0.01),
    "resid_lambdas": AdamGroup((0.8, 0.95), 0.05),
    "x0_lambdas": AdamGroup((0.96, 0.95), 0.0),
    "gates": AdamGroup((0.8, 0.95), 0.0),
}


def learning_rates(cfg: OptimConfig, d_model: int, batch: int) -> dict[str, float]:
    """Peak learning rate of every group for a batch of `batch` tokens. The config gives them at WIDTH_REF and
    BATCH_REF."""
    # two transfers from the tuned depth: by batch for all, by width for AdamW's matrices (schedule.py)
    by_batch = schedule.batch_lr_scale(batch) if cfg.scaling_laws else 1.0
    by_width = schedule.width_lr_scale(d_model) if cfg.scaling_laws else 1.0
    return {
        "lm_head": cfg.unembedding_lr * by_batch * by_width,
        "wte": cfg.embedding_lr * by_batch * by_width,
        "value_embeds": 0.5 * cfg.embedding_lr * by_batch * by_width,
        "resid_lambdas": 0.01 * cfg.scalar_lr * by_batch,
        "x0_lambdas": cfg.scalar_lr * by_batch,
        "gates": cfg.gate_lr,  # never scaled: tuned once, a few numbers
        "matrices": cfg.matrix_lr * by_batch,
    }


# the optimizer ------------------------------------------------------------


@dataclass
class MuonPart:
    """Matrices of one arena that Muon updates together, and their states."""

    arena: int
    view: MuonView
    runs: list[tuple[slice, MuonView]]  # stored as they are, or transposed
    p: Tensor  # (K, R, C), as the states
    low: Tensor | None
    momentum: Tensor
    second: Tensor  # (K, R, 1) or (K, 1, C)
    lr_scale: Tensor  # (K,)


class Muon:
    """All matrices that Muon updates, those of one shape (R, C) together, and the functions of their step."""

    def __init__(
        self, backends: Backends, parts: Sequence[MuonPart], *, compute_dtype: torch.dtype, ns_steps: int
    ) -> None:
        self.parts, self._dtype, self._coefficients = parts, compute_dtype, COEFFICIENTS[:ns_steps]
        shapes: dict[torch.Size, list[MuonPart]] = {}
        for part in parts:
            shapes.setdefault(part.p.shape[1:], []).append(part)
        self._shapes = [(sum(part.p.size(0) for part in same), R, C) for (R, C), same in shapes.items()]
        self._same = list(shapes.values())
        # one choice of backends a shape, for all its matrices: the step has no branches left
        runs = [(shape, compute_dtype) for shape, same in self._banks() for part in same for _ in part.runs]
        banks = [(shape, compute_dtype) for shape, same in self._banks() for _ in same]
        self._momentum = backends.choose_many(muon_momentum, runs)
        self._orthogonalise = [backends.choose(polar_express, *shape) for shape in self._shapes]
        self._apply = backends.choose_many(muon_apply, banks)
        self._calls: list[dict[str, Any]] = []  # of muon_apply, between the two parts of a step

    def _banks(self) -> Iterable[tuple[Shape, list[MuonPart]]]:
        """Each shape (K, R, C) of all its matrices, and their parts."""
        return zip(self._shapes, self._same)

    def step(self, gradients: Sequence[Tensor], hyper: Tensor) -> None:
        """Updates them in place from the gradients of all arenas."""
        self.orthogonalise(gradients, hyper)
        self.apply()

    def orthogonalise(self, gradients: Sequence[Tensor], hyper: Tensor) -> None:
        """The first part of a step, which does not touch the matrices. Momentum works on every shape at once."""
        starts: list[tuple[Tensor, Tensor]] = []  # x and scale of each shape
        calls: list[dict[str, Any]] = []
        for shape, same in self._banks():
            counts = [part.p.size(0) for part in same]
            start = same[0].p.new_empty(shape, dtype=self._dtype), same[0].momentum.new_empty(shape[0])
            starts.append(start)
            # Nesterov momentum, rows equilibrated; scale makes the Frobenius norm 1 / safety, Polar Express's range
            for part, x, scale in zip(same, *(t.split(counts) for t in start)):
                g = part.view.take(gradients[part.arena])
                for run, turn in part.runs:
                    states = {"buf": part.momentum[run], "x": x[run], "scale": scale[run]}
                    calls.append({"g": g[run], **states, "hyper": hyper, "transposed": turn.transposed})
        self._momentum(calls)
        calls.clear()
        for (_, same), orthogonalise in zip(self._banks(), self._orthogonalise):
            x = orthogonalise(*starts.pop(0), coefficients=self._coefficients)
            # NorMuon's variance, cautious decay, and the step
            for part, x_part in zip(same, x.split([part.p.size(0) for part in same])):
                states = {"second": part.second, "lr_scale": part.lr_scale, "low": part.low}
                calls.append({"p": part.p, "x": x_part, **states, "hyper": hyper})
        self._calls = calls

    def apply(self) -> None:
        """The second: writes all matrices."""
        self._apply(self._calls)
        self._calls = []


@dataclass
class AdamArena:
    """A parameter, or the small ones, with their states. row: of each element's hyperparameters."""

    arena: int
    groups: list[str]
    p: Tensor
    low: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    row: Tensor | None


class Model(Protocol):
    """What the optimizer needs of a model: its parameters with their table, and its ear for what happens to them."""

    table: Table
    copies: list[Callable[[], None]]  # that `refresh_copies` calls

    def get_parameter(self, target: str) -> nn.Parameter: ...

    def refresh_copies(self) -> None: ...

    def accumulate(self, sums: Mapping[str, Tensor]) -> None: ...


class Partner(Protocol):
    """The other ranks, as a step meets them: `core.exchange.Exchange`."""

    def receive(self, arena: int) -> None:
        """Waits until the gradient of what this rank owns of the arena is there."""

    def send(self, arenas: Sequence[int]) -> None:
        """Begins to give out what this rank has updated of them."""


class Optimizer:
    """All state of one training run's updates. Casts the model's parameters to `compute_dtype` when it is built, and
    lays them side by side.

    Args: model with fp32 parameters; lrs by group and peak weight decay of the matrices from `core/plan.py`; backends
    of the ops, which are chosen here (None: the references); own: what this rank owns of an arena (None: all); groups:
    AdamW's, by the names that the table's rows have.

    layout: all arenas; arenas: what this rank owns of each, in the same order; state: by "<parameter>.<state>", a
    tensor like the parameter or this rank's shard of it.
    """

    def __init__(
        self,
        model: Model,
        *,
        lrs: dict[str, float],
        weight_decay: float,
        ns_steps: int,
        compute_dtype: torch.dtype,
        backends: Backends | None = None,
        own: Callable[[Arena], Arena] | None = None,
        groups: Mapping[str, AdamGroup] = ADAM_GROUPS,
    ) -> None:
        if not 1 <= ns_steps <= len(COEFFICIENTS):
            raise ValueError(f"ns_steps is {ns_steps}: expected 1 to {len(COEFFICIENTS)}")
        self._model = model
        self.params = {row.name: model.get_parameter(row.name) for row in model.table}
        self._device = next(iter(self.params.values())).device
        backends = backends or Backends("ref", device=self._device, dtype=compute_dtype)
        self.backends = backends
        self.weight_decay, self.ns_steps, self.compute_dtype = weight_decay, ns_steps, compute_dtype
        self.lrs, self.groups = lrs, groups
        self.layout = arenas(model.table)
        self.arenas = [own(arena) if own else arena for arena in self.layout]
        self.state: dict[str, Tensor | Shard] = {}
        self._alone = own is None
        self._matrices = [i for i, arena in enumerate(self.layout) if arena.views]
        self._others = [i for i, arena in enumerate(self.layout) if not arena.views]
        self.owned: dict[str, Tensor] = {}  # copies of what this rank owns of a parameter, by units
        muon: list[MuonPart] = []
        self._adam: list[AdamArena] = []
        for i, (whole, arena) in enumerate(zip(self.layout, self.arenas)):
            if arena.views:
                muon += self._muon_parts(i, whole, arena)
            else:
                self._adam += self._adam_arena(i, whole, arena)
        if own is not None:
            model.copies.append(self._copy_owned)
        self._muon = Muon(backends, muon, compute_dtype=compute_dtype, ns_steps=ns_steps)
        self._adam_update = backends.choose_many(adam_update, [((a.p.numel(),), a.p.dtype) for a in self._adam])
        self._hyper = torch.zeros(3 + 6 * sum(len(part.groups) for part in self._adam), device=self._device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recorded: list[Tensor] = []  # the gradients that the graph reads
        model.refresh_copies()

    @torch.no_grad()
    def _lay(self, whole: Arena, arena: Arena) -> tuple[Tensor, Tensor | None]:
        """Lays the arena's parameters side by side in the type that they are stored in. Returns those that this rank
        owns, and the low bits where they are masters' bf16 halves."""
        first = whole.params[0]
        dtype = first.dtype(self.compute_dtype)
        storage = torch.empty(whole.shape, dtype=dtype, device=self._device)
        low = self._new_state(arena, "low") if "low" in first.states(self.compute_dtype) else None
        owned_low = {} if low is None else arena.cut(low)
        for (name, part), (begin, end) in zip(whole.cut(storage).items(), arena.held):
            p = self.params[name]
            if low is None:
                part.copy_(p.data)
            else:  # the high half is not what a cast gives where a number lies between two of bf16
                high, rest = split_master(p.data)
                part.copy_(high)
                owned_low[name].copy_(rest.view(-1, *whole.shape[1:])[begin:end].view(owned_low[name].shape))
            p.data = part  # .data: the Parameter stays the object that the model and autograd know
        if arena.ranges is None:
            return storage, low
        owned = torch.empty(arena.shape, dtype=dtype, device=self._device)
        self.owned |= arena.cut(owned)
        return owned, low

    @torch.no_grad()
    def _copy_owned(self) -> None:
        """Of what this rank owns, after all weights were written by others."""
        for whole, arena in zip(self.layout, self.arenas):
            for p, (begin, end) in zip(whole.params, arena.held):
                if p.name in self.owned:
                    self.owned[p.name].copy_(self.params[p.name].data.view(-1, *whole.shape[1:])[begin:end])

    def _new_state(self, arena: Arena, state: str) -> Tensor:
        """Zeros for one state of all that this rank owns of an arena."""
        _, dtype = arena.params[0].states(self.compute_dtype)[state]
        storage = torch.zeros(arena.shape, dtype=dtype, device=self._device)
        for p, (name, part), (begin, _) in zip(arena.params, arena.cut(storage).items(), arena.held):
            if arena.ranges is None:
                self.state[f"{name}.{state}"] = part
            elif p.group == MUON:  # a matrix is a part of a layer's
                splits, rows = p.views[0].split, arena.shape[1]
                places = [divmod(begin + i, splits) for i in range(part.size(0))]
                pieces = [((n, rows * j, 0), t[None]) for (n, j), t in zip(places, part)]
                self.state[f"{name}.{state}"] = Shard(p.shape, dtype, pieces)
            else:
                self.state[f"{name}.{state}"] = Shard(p.shape, dtype, [((begin, 0), part)] if len(part) else [])
        return storage

    def _muon_parts(self, i: int, whole: Arena, arena: Arena) -> list[MuonPart]:
        p, low = self._lay(whole, arena)
        momentum, runs = self._new_state(arena, "momentum"), arena.turned()
        turn = MuonView(transposed=arena.params[0].views[0].transposed)
        parts: list[MuonPart] = []
        for number, view in enumerate(arena.views):
            taken = view.take(p)
            stored = taken.shape
            # all runs have their moments along the same side: `arenas` sees to it
            second = momentum.new_zeros(turn.second_stored(stored))
            name = f"second.{number}"
            ends = second.split([end - begin for begin, end in arena.held])
            for row, part, (begin, _) in zip(arena.params, ends, arena.held):  # in checkpoints as Muon sees the matrix
                shape, dtype = row.states(self.compute_dtype)[name]
                part = part.view(len(part), *shape[1:])
                pieces = [((begin, 0, 0), part)] if len(part) else []
                self.state[f"{row.name}.{name}"] = part if arena.ranges is None else Shard(shape, dtype, pieces)
            if not len(p):
                continue
            factors = [
                row.views[number].lr_scale(stored)
                for row, (begin, end) in zip(arena.params, arena.held)
                for _ in range(begin, end)
            ]
            lr_scale = torch.tensor(factors, dtype=torch.float32, device=self._device)
            low_taken = None if low is None else view.take(low)
            parts.append(MuonPart(i, view, runs, taken, low_taken, view.take(momentum), second, lr_scale))
        return parts

    def _adam_arena(self, i: int, whole: Arena, arena: Arena) -> list[AdamArena]:
        p, low = self._lay(whole, arena)
        moments = self._new_state(arena, "exp_avg"), self._new_state(arena, "exp_avg_sq")
        groups = list(dict.fromkeys(row.group for row in arena.params))
        row = None
        if not arena.params[0].computes:
            numbers = [torch.full((p.numel,), groups.index(p.group)) for p in arena.params]
            row = torch.cat(numbers).to(self._device, torch.int32)
        return [AdamArena(i, groups, p, low, *moments, row)] if len(p) else []

    @torch.no_grad()
    def step(
        self,
        gradients: Sequence[Tensor],
        *,
        step: int,
        lr_mult: float,
        momentum: float,
        decay_mult: float,
        partner: Partner | None = None,
        adam_steps: int | None = None,
    ) -> None:
        """Updates every parameter from the fp32 gradients of all arenas; step counts from 0. partner: the other ranks,
        where there are some. adam_steps: that AdamW has made (None: as many as all); negative: it makes none now, and
        the matrices alone are updated."""
        # hyperparameters in the order in which the ops read them. Tensors, not numbers: a kernel that takes a number
        # would be specialised or compiled anew whenever a schedule moves. AdamW's bias correction counts steps from 1
        values = [self.lrs[MUON] * lr_mult, self.weight_decay * decay_mult, momentum]
        t = 1 + (step if adam_steps is None else adam_steps)
        for part in self._adam:
            for group in part.groups:
                betas, decay, cautious = self.groups[group]
                values += adam_hyper(
                    self.lrs[group] * lr_mult, betas, -decay * lr_mult if cautious else decay, max(t, 1)
                )
        self._set_hyper(values)
        if self._graph is None:
            self._update(gradients, partner, others=t > 0)
        elif t <= 0:
            raise ValueError("the recorded step updates everything: record none where AdamW skips steps")
        else:
            if any(g is not recorded for g, recorded in zip(gradients, self._recorded, strict=True)):
                raise ValueError("the recorded step reads other gradients: give those that warm_up was given")
            if partner is not None:
                for i in range(len(self.arenas)):
                    partner.receive(i)
            self._graph.replay()
            if partner is not None:
                partner.send(range(len(self.arenas)))

    @torch.no_grad()
    def warm_up(self, gradients: Sequence[Tensor], *, record: bool = False) -> None:
        """Compiles the kernels of a step by making one that changes nothing: no rate, and averages that keep all of
        what they have. record: also records the step as a CUDA graph, which every later one replays: the host then
        launches once, and these gradients must stay where they are."""
        seconds = [part.second for part in self._muon.parts]
        before = [second.clone() for second in seconds]  # their rate is no hyperparameter
        self._set_hyper([0.0, 0.0, 1.0] + [0.0, 1.0, 1.0, 0.0, 1.0, 1.0] * (len(self._hyper) // 6))
        self._update(gradients)
        torch._foreach_copy_(seconds, before)
        if record:
            self._recorded = list(gradients)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):  # records, and runs nothing
                self._update(gradients)

    def _update(self, gradients: Sequence[Tensor], partner: Partner | None = None, *, others: bool = True) -> None:
        """A step by the hyperparameters that are on the device; others: of AdamW's parameters, too."""
        # while matrices are orthogonalised, gradients of tables arrive, which backward completes last; while matrices
        # are written, tables leave, which the next forward needs first
        if partner is not None:
            for i in self._matrices:
                partner.receive(i)
        self._muon.orthogonalise(gradients, self._hyper[:3])
        if others:
            self._update_others(gradients, partner)
        self._muon.apply()
        if partner is not None:
            partner.send(self._matrices)
        if self._alone:  # weights of other ranks are copied when they have come
            self._model.refresh_copies()  # copies in fp8, where there are some, are of the weights before this step

    def _update_others(self, gradients: Sequence[Tensor], partner: Partner | None) -> None:
        if partner is not None:
            for i in self._others:
                partner.receive(i)
        begin = 3
        calls: list[dict[str, Any]] = []
        for part in self._adam:
            h = self._hyper[begin : begin + 6 * len(part.groups)].view(-1, 6)
            begin += h.numel()
            states = {"exp_avg": part.exp_avg, "exp_avg_sq": part.exp_avg_sq, "low": part.low, "row": part.row}
            calls.append({"p": part.p, "g": gradients[part.arena], "hyper": h[0] if part.row is None else h, **states})
        self._adam_update(calls)
        if partner is not None:
            partner.send(self._others)

    @torch.no_grad()
    def copy_states(self, source: str, target: str) -> None:
        """Gives a parameter the weights, masters and moments of another one that is owned alike."""
        self.params[target].data.copy_(self.params[source].data)
        if source in self.owned:
            self.owned[target].copy_(self.owned[source])
        for name, state in self.state.items():
            parameter, _, kind = name.rpartition(".")
            if parameter == source:
                mine, its = (
                    [piece for _, piece in t.pieces] if isinstance(t, Shard) else [t]
                    for t in (self.state[f"{target}.{kind}"], state)
                )
                for a, b in zip(mine, its, strict=True):
                    a.copy_(b)

    def _set_hyper(self, values: list[float]) -> None:
        """Brings the numbers to the device, by one copy that does not wait."""
        # pinned: a copy from pageable memory would wait for the device
        flat = torch.tensor(values, dtype=torch.float32, pin_memory=self._device.type == "cuda")
        self._hyper.copy_(flat, non_blocking=True)


class Gradients:
    """fp32 sums of gradients over micro-steps, one tensor an arena.

    Ops that make weight gradients add them to the sums themselves; the model is told where. Of other parameters,
    autograd adds to an fp32 `.grad` that is a part of the sums, and a bf16 one is added as soon as backward has made
    it, so that several micro-steps lose nothing.
    """

    def __init__(self, model: Model, optimizer: Optimizer) -> None:
        wide = torch.promote_types(optimizer.compute_dtype, torch.float32)
        device = next(iter(optimizer.params.values())).device
        self.sums = [torch.zeros(arena.shape, dtype=wide, device=device) for arena in optimizer.layout]
        self._layout = optimizer.layout
        self._of: dict[Tensor, Tensor] = {}  # each parameter's part
        self.by_name: dict[str, Tensor] = {}
        for arena, total in zip(optimizer.layout, self.sums):
            self.by_name |= arena.cut(total)
        for name, p in optimizer.params.items():
            self._of[p] = self.by_name[name]
            if p.dtype == wide:
                p.grad = self.by_name[name]
            else:  # autograd would add micro-steps in bf16, where a sum stops growing after 256 equal terms
                p.register_post_accumulate_grad_hook(self._take)
        model.accumulate(self.by_name)

    def _take(self, p: Tensor) -> None:
        if p.grad is not None:  # None where the op that uses p has added its gradient
            self._of[p].add_(p.grad)
            p.grad = None

    def __call__(self, p: Tensor) -> Tensor:
        """fp32 gradient of p; zero where nothing reached it."""
        return self._of[p]

    def zero(self, others: bool = True) -> None:
        """others: of AdamW's parameters, too."""
        for arena, g in zip(self._layout, self.sums):
            if others or arena.views:
                g.zero_()
