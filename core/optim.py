"""Muon for the matrices, AdamW for everything else, on one device.

Source: nanochat 92d63d4, optim.py. The rules are those of the ops adam_update, muon_update and polar_express in
`kernels`.

Shape of the code   parameters lie side by side in arenas (core/params.py), and so do their states and gradients. A step
                    calls one op of AdamW for each arena, and Muon's three for all matrices of one shape: about 50
                    launches whatever the depth. A rank that owns a slice of an arena would call the same on it.
Hyperparameters     go to the device as one tensor a step: nothing compiles again or waits for it.
State               as `Param.states` lists it; each is a part of its arena's. Fp32 parameters are their own master; a
                    bf16 matrix or head keeps the low 16 bits of its fp32 master beside it (`kernels/master.py`);
                    embeddings in bf16 have no master.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from core import schedule
from core.config import OptimConfig
from core.params import MUON, Arena, MuonView, Table, arenas
from kernels.adam_update import adam_hyper, adam_update
from kernels.dispatch import Backends
from kernels.master import split_master
from kernels.muon_update import muon_apply, muon_momentum
from kernels.polar_express import COEFFICIENTS, polar_express

# betas and decay of each AdamW group [nanochat 92d63d4, gpt.py]
# a row of an embedding has a gradient only in steps whose batch has its token: beta2 is near 1 there
ADAM_GROUPS = {
    "lm_head": ((0.8, 0.96), 0.01),
    "wte": ((0.8, 0.995), 0.001),
    "value_embeds": ((0.8, 0.995), 0.01),
    "resid_lambdas": ((0.8, 0.95), 0.05),
    "x0_lambdas": ((0.96, 0.95), 0.0),
    "gates": ((0.8, 0.95), 0.0),
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


@dataclass
class MuonShape:
    """All matrices of one shape (R, C), and the functions of their step."""

    parts: list[MuonPart]
    momentum: Callable[..., None]
    orthogonalise: Callable[..., Tensor]
    apply: Callable[..., None]

    def step(self, gradients: Sequence[Tensor], hyper: Tensor, *, dtype: torch.dtype, ns_steps: int) -> None:
        """Updates them in place from the gradients of all arenas; orthogonalises in dtype."""
        counts = [part.p.size(0) for part in self.parts]
        first = self.parts[0]
        x = first.p.new_empty((sum(counts), *first.p.shape[1:]), dtype=dtype)
        scale = first.momentum.new_empty(sum(counts))
        # Nesterov momentum, rows equilibrated; scale makes the Frobenius norm 1 / safety, Polar Express's range
        for part, x_part, scale_part in zip(self.parts, x.split(counts), scale.split(counts)):
            g = part.view.take(gradients[part.arena])
            for run, turn in part.runs:
                given = g[run], part.momentum[run], x_part[run], scale_part[run]
                self.momentum(*given, hyper, transposed=turn.transposed)
        x = self.orthogonalise(x, scale, coefficients=COEFFICIENTS[:ns_steps])
        # NorMuon's variance, cautious decay, and the step
        for part, x_part in zip(self.parts, x.split(counts)):
            self.apply(part.p, x_part, part.second, part.lr_scale, hyper, low=part.low)


def muon_shape(backends: Backends, parts: list[MuonPart]) -> MuonShape:
    """For parts of one shape, with the backends chosen for all of their matrices."""
    K, (_, R, C) = sum(part.p.size(0) for part in parts), parts[0].p.shape
    return MuonShape(parts, *(backends.choose(op, K, R, C) for op in (muon_momentum, polar_express, muon_apply)))


@dataclass
class AdamArena:
    """A parameter, or the small ones, with their states and function. row: of each element's hyperparameters."""

    arena: int
    groups: list[str]
    update: Callable[..., None]
    p: Tensor
    low: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    row: Tensor | None


class Model(Protocol):
    """What the optimizer needs of a model: its parameters with their table, and its ear for what happens to them."""

    table: Table

    def get_parameter(self, target: str) -> nn.Parameter: ...

    def refresh_copies(self) -> None: ...

    def accumulate(self, sums: Mapping[str, Tensor]) -> None: ...


class Optimizer:
    """All state of one training run's updates. Casts the model's parameters to `compute_dtype` when it is built, and
    lays them side by side.

    Args: model with fp32 parameters; lrs by group and peak weight decay of the matrices from `core/plan.py`; backends
    of the ops, which are chosen here (None: the references).
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
    ) -> None:
        if not 1 <= ns_steps <= len(COEFFICIENTS):
            raise ValueError(f"ns_steps is {ns_steps}: expected 1 to {len(COEFFICIENTS)}")
        self._model = model
        self.params = {row.name: model.get_parameter(row.name) for row in model.table}
        self._device = next(iter(self.params.values())).device
        backends = backends or Backends("ref", device=self._device, dtype=compute_dtype)
        self.backends = backends
        self.weight_decay, self.ns_steps, self.compute_dtype = weight_decay, ns_steps, compute_dtype
        self.lrs = lrs
        self.arenas = arenas(model.table)
        self.state: dict[str, Tensor] = {}  # "<parameter>.<state>"
        # one choice of backends a shape, for all its matrices: the step has no branches left
        muon: dict[torch.Size, list[MuonPart]] = {}
        self._adam: list[AdamArena] = []
        for i, arena in enumerate(self.arenas):
            if arena.views:
                for part in self._muon_parts(i, arena):
                    muon.setdefault(part.p.shape[1:], []).append(part)
            else:
                self._adam.append(self._adam_arena(i, arena))
        self._muon = [muon_shape(backends, parts) for parts in muon.values()]
        self._hyper = torch.zeros(3 + 6 * sum(len(part.groups) for part in self._adam), device=self._device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recorded: list[Tensor] = []  # the gradients that the graph reads
        model.refresh_copies()

    @torch.no_grad()
    def _lay(self, arena: Arena) -> tuple[Tensor, Tensor | None]:
        """Lays the arena's parameters side by side in the type that they are stored in: a master as its bf16 half and
        the low bits."""
        first = arena.params[0]
        dtype = first.dtype(self.compute_dtype)
        storage = torch.empty(arena.shape, dtype=dtype, device=self._device)
        low = self._new_state(arena, "low") if "low" in first.states(self.compute_dtype) else None
        for name, part in arena.cut(storage).items():
            p = self.params[name]
            if low is None:
                part.copy_(p.data)
            else:
                high, rest = split_master(p.data)
                part.copy_(high)
                self.state[f"{name}.low"].copy_(rest)
            p.data = part  # .data: the Parameter stays the object that the model and autograd know
        return storage, low

    def _new_state(self, arena: Arena, state: str) -> Tensor:
        """Zeros for one state of all the arena's parameters."""
        _, dtype = arena.params[0].states(self.compute_dtype)[state]
        storage = torch.zeros(arena.shape, dtype=dtype, device=self._device)
        self.state |= {f"{name}.{state}": part for name, part in arena.cut(storage).items()}
        return storage

    def _muon_parts(self, i: int, arena: Arena) -> list[MuonPart]:
        p, low = self._lay(arena)
        momentum, runs = self._new_state(arena, "momentum"), arena.turned()
        parts: list[MuonPart] = []
        for number, view in enumerate(arena.views):
            taken = view.take(p)
            stored = taken.shape
            # all runs have their moments along the same side: `arenas` sees to it
            second = momentum.new_zeros(runs[0][1].second_stored(stored))
            counts = [row.shape[0] * row.views[0].split for row in arena.params]
            for row, part in zip(arena.params, second.split(counts)):  # in checkpoints as Muon sees the matrix
                name = f"second.{number}"
                self.state[f"{row.name}.{name}"] = part.view(row.states(self.compute_dtype)[name][0])
            factors = [turn.lr_scale(stored) for run, turn in runs for _ in range(run.start, run.stop)]
            lr_scale = torch.tensor(factors, dtype=torch.float32, device=self._device)
            low_taken = None if low is None else view.take(low)
            parts.append(MuonPart(i, view, runs, taken, low_taken, view.take(momentum), second, lr_scale))
        return parts

    def _adam_arena(self, i: int, arena: Arena) -> AdamArena:
        p, low = self._lay(arena)
        moments = self._new_state(arena, "exp_avg"), self._new_state(arena, "exp_avg_sq")
        groups = list(dict.fromkeys(row.group for row in arena.params))
        update = self.backends.choose(adam_update, p.numel(), dtype=p.dtype)
        row = None
        if not arena.params[0].computes:
            numbers = [torch.full((p.numel,), groups.index(p.group)) for p in arena.params]
            row = torch.cat(numbers).to(self._device, torch.int32)
        return AdamArena(i, groups, update, p, low, *moments, row)

    @torch.no_grad()
    def step(
        self, gradients: Sequence[Tensor], *, step: int, lr_mult: float, momentum: float, decay_mult: float
    ) -> None:
        """Updates every parameter from the fp32 gradients of all arenas; step counts from 0."""
        # hyperparameters in the order in which the ops read them. Tensors, not numbers: a kernel that takes a number
        # would be specialised or compiled anew whenever a schedule moves. AdamW's bias correction counts steps from 1
        values = [self.lrs[MUON] * lr_mult, self.weight_decay * decay_mult, momentum]
        for part in self._adam:
            for group in part.groups:
                values += adam_hyper(self.lrs[group] * lr_mult, *ADAM_GROUPS[group], step + 1)
        self._set_hyper(values)
        if self._graph is None:
            self._update(gradients)
            return
        if any(g is not recorded for g, recorded in zip(gradients, self._recorded, strict=True)):
            raise ValueError("the recorded step reads other gradients: give those that warm_up was given")
        self._graph.replay()

    @torch.no_grad()
    def warm_up(self, gradients: Sequence[Tensor], *, record: bool = False) -> None:
        """Compiles the kernels of a step by making one that changes nothing: no rate, and averages that keep all of
        what they have. record: also records the step as a CUDA graph, which every later one replays: the host then
        launches once, and these gradients must stay where they are."""
        seconds = [part.second for shape in self._muon for part in shape.parts]
        before = [second.clone() for second in seconds]  # their rate is no hyperparameter
        self._set_hyper([0.0, 0.0, 1.0] + [0.0, 1.0, 1.0, 0.0, 1.0, 1.0] * (len(self._hyper) // 6))
        self._update(gradients)
        torch._foreach_copy_(seconds, before)
        if record:
            self._recorded = list(gradients)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):  # records, and runs nothing
                self._update(gradients)

    def _update(self, gradients: Sequence[Tensor]) -> None:
        """A step by the hyperparameters that are on the device."""
        for shape in self._muon:
            shape.step(gradients, self._hyper[:3], dtype=self.compute_dtype, ns_steps=self.ns_steps)
        begin = 3
        for part in self._adam:
            h = self._hyper[begin : begin + 6 * len(part.groups)].view(-1, 6)
            begin += h.numel()
            args = part.p, gradients[part.arena], part.exp_avg, part.exp_avg_sq
            if part.row is None:
                part.update(*args, h[0], part.low)
            else:
                part.update(*args, h, part.low, row=part.row)
        # the head's fp8 copy, where there is one, is of the weights before this step
        self._model.refresh_copies()

    def _set_hyper(self, values: list[float]) -> None:
        """Brings the numbers to the device, by one copy that does not wait."""
        # pinned: a copy from pageable memory would wait for the device
        flat = torch.tensor(values, dtype=torch.float32, pin_memory=self._device.type == "cuda")
        self._hyper.copy_(flat, non_blocking=True)


class Gradients:
    """fp32 sums of gradients over micro-steps, one tensor an arena, and their averages over ranks.

    Ops that make weight gradients add them to the sums themselves; the model is told where. Of other parameters,
    autograd adds to an fp32 `.grad` that is a part of the sums, and a bf16 one is added as soon as backward has made
    it, so that several micro-steps lose nothing. For communication the sums are rounded to bf16 once on GPUs; CPUs
    reduce fp32.
    """

    def __init__(self, model: Model, optimizer: Optimizer) -> None:
        self._half = [arena.params[0].dtype(optimizer.compute_dtype) == torch.bfloat16 for arena in optimizer.arenas]
        wide = torch.promote_types(optimizer.compute_dtype, torch.float32)
        device = next(iter(optimizer.params.values())).device
        self.sums = [torch.zeros(arena.shape, dtype=wide, device=device) for arena in optimizer.arenas]
        self._of: dict[Tensor, Tensor] = {}  # each parameter's part
        by_name: dict[str, Tensor] = {}
        for arena, total in zip(optimizer.arenas, self.sums):
            by_name |= arena.cut(total)
        for name, p in optimizer.params.items():
            self._of[p] = by_name[name]
            if p.dtype == wide:
                p.grad = by_name[name]
            else:  # autograd would add micro-steps in bf16, where a sum stops growing after 256 equal terms
                p.register_post_accumulate_grad_hook(self._take)
        model.accumulate(by_name)

    def _take(self, p: Tensor) -> None:
        if p.grad is not None:  # None where the op that uses p has added its gradient
            self._of[p].add_(p.grad)
            p.grad = None

    def __call__(self, p: Tensor) -> Tensor:
        """fp32 gradient of p; zero where nothing reached it."""
        return self._of[p]

    def average(self, average_: Callable[[list[Tensor]], None]) -> None:
        """Applies `average_` (in place, over ranks) to all gradients; for several processes."""
        # half the bytes on the wire; the sums over micro-steps were fp32, so this is the one rounding
        comm = [g.bfloat16() if g.is_cuda and half else g for g, half in zip(self.sums, self._half)]
        average_(comm)
        for g, c in zip(self.sums, comm):
            if g is not c:
                g.copy_(c)

    def zero(self) -> None:
        for g in self.sums:
            g.zero_()
