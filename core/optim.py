"""Muon for the matrices, AdamW for everything else, on one device.

Source: nanochat 92d63d4, optim.py. The rules are those of the ops adam_update, muon_update and polar_express in
`kernels`.

Shape of the code   each row of the parameter table belongs to one group. A step calls, for each row, one op of AdamW or
                    Muon's three on each of its views; so a rank that owns a slice of a bank would call the same on it.
Hyperparameters     go to the device as one tensor a step: nothing compiles again or waits for it.
State               as `Param.states` lists it. Fp32 parameters are their own master; a bf16 matrix or head keeps the
                    low 16 bits of its fp32 master beside it (`kernels/master.py`); embeddings in bf16 have no master.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from core import schedule
from core.config import OptimConfig
from core.params import MUON, MuonView, Param, Table
from kernels.adam_update import adam_hyper, adam_update
from kernels.dispatch import Backends
from kernels.master import split_master
from kernels.muon_update import MuonMomentum, muon_apply, muon_momentum
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


@dataclass(frozen=True)
class MuonOps:
    """The functions of one view's step."""

    momentum: Callable[..., MuonMomentum]
    orthogonalise: Callable[..., Tensor]
    apply: Callable[..., None]

    def step(
        self, p: Tensor, low: Tensor | None, g: Tensor, buf: Tensor, second: Tensor, hyper: Tensor, *,
        transposed: bool, dtype: torch.dtype, ns_steps: int,
    ) -> None:  # fmt: skip
        """One step of matrices p (K, R, C) and their states in place; orthogonalises in dtype."""
        # Nesterov momentum, rows equilibrated; scale makes the Frobenius norm 1 / safety, Polar Express's range
        x, scale = self.momentum(g, buf, hyper, transposed=transposed, out_dtype=dtype)
        x = self.orthogonalise(x, scale, coefficients=COEFFICIENTS[:ns_steps])
        # NorMuon's variance, cautious decay, and the step
        self.apply(p, x, second, hyper, transposed=transposed, low=low)


def choose_muon(backends: Backends, stored: torch.Size) -> MuonOps:
    """For matrices stored (K, R, C)."""
    return MuonOps(*(backends.choose(op, *stored) for op in (muon_momentum, polar_express, muon_apply)))


class Model(Protocol):
    """What the optimizer needs of a model: its parameters with their table, and word that they were written."""

    table: Table

    def get_parameter(self, target: str) -> nn.Parameter: ...

    def refresh_copies(self) -> None: ...


class Optimizer:
    """All state of one training run's updates. Casts the model's parameters to `compute_dtype` when it is built.

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
        device = next(iter(self.params.values())).device
        backends = backends or Backends("ref", device=device, dtype=compute_dtype)
        self.backends = backends
        self.weight_decay, self.ns_steps, self.compute_dtype = weight_decay, ns_steps, compute_dtype
        self.lrs = lrs
        self.groups: dict[str, list[Param]] = {}
        self.state: dict[str, Tensor] = {}  # "<parameter>.<state>"
        self._adam: dict[str, Callable[..., None]] = {}  # by parameter
        self._muon: dict[str, list[tuple[MuonView, MuonOps]]] = {}
        # one choice of backends a view, for the shape that it has as a batch of matrices: the step has no branches left
        for row in model.table:
            p = self.params[row.name]
            self.groups.setdefault(row.group, []).append(row)
            self._init_state(row, p)
            if row.group == MUON:
                self._muon[row.name] = [(view, choose_muon(backends, view.take(p).shape)) for view in row.views]
            else:
                self._adam[row.name] = backends.choose(adam_update, p.numel(), dtype=p.dtype)
        model.refresh_copies()

    @torch.no_grad()
    def _init_state(self, row: Param, p: nn.Parameter) -> None:
        """Allocates the states of one row and casts its parameter: a master to its bf16 half and the low bits."""
        for state, (shape, dtype) in row.states(self.compute_dtype).items():
            self.state[f"{row.name}.{state}"] = torch.zeros(shape, dtype=dtype, device=p.device)
        # .data: the Parameter stays the object that the model and autograd know
        if f"{row.name}.low" in self.state:
            p.data, self.state[f"{row.name}.low"] = split_master(p.data)
        else:
            p.data = p.data.to(row.dtype(self.compute_dtype))

    @torch.no_grad()
    def step(
        self, grads: Callable[[Tensor], Tensor], *, step: int, lr_mult: float, momentum: float, decay_mult: float
    ) -> None:
        """Updates every parameter. `grads` gives the fp32 gradient of one; step counts from 0."""
        # one row of hyperparameters a group, in the order in which the ops read them. Tensors, not numbers: a kernel
        # that takes a number would be specialised or compiled anew whenever a schedule moves. AdamW's bias correction
        # counts steps from 1
        values = [
            [self.lrs[group] * lr_mult, self.weight_decay * decay_mult, momentum]
            if group == MUON
            else adam_hyper(self.lrs[group] * lr_mult, *ADAM_GROUPS[group], step + 1)
            for group in self.groups
        ]
        for rows, hyper in zip(self.groups.values(), self._to_device(values)):
            for row in rows:
                # .data: autograd must not see the update, nor count it as a version
                p, low = self.params[row.name], self.state.get(f"{row.name}.low")
                if row.group == MUON:
                    self._muon_step(row.name, p.data, low, grads(p), hyper)
                else:
                    moments = self.state[f"{row.name}.exp_avg"], self.state[f"{row.name}.exp_avg_sq"]
                    self._adam[row.name](p.data, grads(p), *moments, hyper, low)
        # the head's fp8 copy, where there is one, is of the weights before this step
        self._model.refresh_copies()

    def _to_device(self, values: list[list[float]]) -> tuple[Tensor, ...]:
        """Lists of numbers as fp32 tensors, by one copy that does not wait."""
        device = next(iter(self.state.values())).device
        # pinned: a copy from pageable memory would wait for the device
        flat = torch.tensor(sum(values, []), dtype=torch.float32, pin_memory=device.type == "cuda")
        return flat.to(device, non_blocking=True).split([len(v) for v in values])

    def _muon_step(self, name: str, p: Tensor, low: Tensor | None, g: Tensor, hyper: Tensor) -> None:
        for i, (view, ops) in enumerate(self._muon[name]):
            ops.step(
                view.take(p),
                None if low is None else view.take(low),
                view.take(g),
                view.take(self.state[f"{name}.momentum"]),
                self.state[f"{name}.second.{i}"],
                hyper,
                transposed=view.transposed,
                dtype=self.compute_dtype,
                ns_steps=self.ns_steps,
            )


class Gradients:
    """Sums gradients over micro-steps in fp32 and averages them over ranks.

    An fp32 parameter accumulates in its own `.grad`. The `.grad` of a bf16 parameter is moved into an fp32 sum as soon
    as backward has written it, so that several micro-steps lose nothing. For communication the sum is rounded to bf16
    once on GPUs; CPUs reduce fp32.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.params = list(params)
        self._sums: dict[Tensor, Tensor] = {}
        for p in self.params:
            # autograd would add micro-steps in bf16, where a sum stops growing after 256 equal terms
            if p.dtype != torch.float32:
                p.register_post_accumulate_grad_hook(self._take)

    def _take(self, p: Tensor) -> None:
        assert p.grad is not None
        if p in self._sums:  # bf16 added to fp32: exact but for the sum's own rounding
            self._sums[p].add_(p.grad)
        else:
            self._sums[p] = p.grad.float()
        p.grad = None

    def __call__(self, p: Tensor) -> Tensor:
        """fp32 gradient of p; zero when nothing reached it."""
        g = self._sums.get(p, p.grad)
        return torch.zeros_like(p, dtype=torch.float32) if g is None else g

    def average(self, average_: Callable[[list[Tensor]], None]) -> None:
        """Applies `average_` (in place, over ranks) to all gradients; for several processes."""
        # a rank whose rows gave a parameter no gradient must bring zeros: all ranks reduce the same list
        for p in self.params:
            if p.dtype == torch.float32:
                p.grad = self(p)
            else:
                self._sums[p] = self(p)
        grads = [self(p) for p in self.params]
        # half the bytes on the wire; the sums over micro-steps were fp32, so this is the one rounding
        comm = [g.bfloat16() if g.is_cuda and p.dtype != torch.float32 else g for g, p in zip(grads, self.params)]
        average_(comm)
        for g, c in zip(grads, comm):
            if g is not c:
                g.copy_(c)

    def zero(self) -> None:
        self._sums.clear()
        for p in self.params:
            p.grad = None
