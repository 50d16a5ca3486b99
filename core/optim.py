"""Muon for the matrices, AdamW for everything else, on one device.

Source: nanochat 92d63d4, optim.py. The rules are those of the ops adam_update, muon_update and polar_express in `kernels`.

Shape of the code   each parameter has one `Group`. A step calls, for each parameter, one op of AdamW or Muon's three on each
                    of its views; so a rank that owns a slice of a bank would call the same on it.
Hyperparameters     go to the device as one tensor a step: nothing compiles again or waits for it.
Muon's matrices     banks are views to Muon: q, k, v and o are orthogonalised apart although q, k, v share storage, and the
                    MLP's second matrix, stored (4C, C), is seen as the (C, 4C) projection it is (`MuonView.transposed`).
Masters             fp32 parameters are their own master. A bf16 matrix or head keeps the low 16 bits of its fp32 master
                    beside it (`kernels/master.py`); embeddings in bf16 have no master, their moments are bf16 too.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core import schedule
from core.config import OptimConfig
from core.model import GPT, Dims
from kernels.adam_update import adam_hyper, adam_update
from kernels.dispatch import Backends
from kernels.master import split_master
from kernels.muon_update import MuonMomentum, muon_apply, muon_momentum
from kernels.polar_express import COEFFICIENTS, polar_express

# betas and decay of each AdamW group
ADAM_GROUPS = {
    "lm_head": ((0.8, 0.96), 0.01),
    "wte": ((0.8, 0.995), 0.001),
    "value_embeds": ((0.8, 0.995), 0.01),
    "resid_lambdas": ((0.8, 0.95), 0.05),
    "x0_lambdas": ((0.96, 0.95), 0.0),
    "gates": ((0.8, 0.95), 0.0),
}
MASTERED = ("lm_head", "matrices")  # groups that keep an exact fp32 master when they compute in bf16


def learning_rates(cfg: OptimConfig, d_model: int, batch: int) -> dict[str, float]:
    """Peak learning rate of every group for a batch of `batch` tokens."""
    by_batch = schedule.batch_lr_scale(batch) if cfg.scaling_laws else 1.0
    by_width = schedule.width_lr_scale(d_model) if cfg.scaling_laws else 1.0
    return {
        "lm_head": cfg.unembedding_lr * by_batch * by_width,
        "wte": cfg.embedding_lr * by_batch * by_width,
        "value_embeds": 0.5 * cfg.embedding_lr * by_batch * by_width,
        "resid_lambdas": 0.01 * cfg.scalar_lr * by_batch,
        "x0_lambdas": cfg.scalar_lr * by_batch,
        "gates": cfg.gate_lr,
        "matrices": cfg.matrix_lr * by_batch,
    }


# Muon's views -------------------------------------------------------------


@dataclass(frozen=True)
class MuonView:
    """Matrices of a bank as Muon sees them: `take` gives them out of the bank, or out of a state shaped like it, (K, R, C) as
    stored; transposed: what is stored is the transpose of Muon's matrices."""

    take: Callable[[Tensor], Tensor]
    transposed: bool = False

    def second_shape(self, stored: torch.Size) -> tuple[int, int, int]:
        """Of NorMuon's variances: a number for each row, or for each column of a wide matrix."""
        K, R, C = stored
        rows, cols = (C, R) if self.transposed else (R, C)
        return (K, rows, 1) if rows >= cols else (K, 1, cols)


def muon_views(name: str, d: Dims) -> list[MuonView]:
    """The views of the bank called `name`."""
    kind = name.split(".")[0]
    if kind == "attn_qkv" and d.d_kv == d.d_model:
        return [MuonView(lambda bank: bank.view(-1, d.d_model, d.d_model))]
    if kind == "attn_qkv":
        ends = list(itertools.accumulate((d.d_model, d.d_kv, d.d_kv), initial=0))
        return [MuonView(lambda bank, a=a, b=b: bank[:, a:b]) for a, b in itertools.pairwise(ends)]
    return [MuonView(lambda bank: bank, transposed=kind == "mlp_down")]


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
        x, scale = self.momentum(g, buf, hyper, transposed=transposed, out_dtype=dtype)
        x = self.orthogonalise(x, scale, coefficients=COEFFICIENTS[:ns_steps])
        self.apply(p, x, second, hyper, transposed=transposed, low=low)


def choose_muon(backends: Backends, stored: torch.Size) -> MuonOps:
    """For matrices stored (K, R, C)."""
    return MuonOps(*(backends.choose(op, *stored) for op in (muon_momentum, polar_express, muon_apply)))


# the optimizer ------------------------------------------------------------


@dataclass
class Group:
    """Parameters that share a rule and its hyperparameters."""

    name: str
    lr: float
    params: dict[str, Tensor] = field(default_factory=dict)


def group_of(name: str) -> str:
    """Group of the parameter called `name`."""
    kind = name.split(".")[0]
    if kind in ("smear_gate", "smear_lambda", "backout_lambda"):
        return "gates"
    return kind if kind in ADAM_GROUPS else "matrices"


class Optimizer:
    """All state of one training run's updates. Casts the model's parameters to `compute_dtype` when it is built.

    Args: model with fp32 parameters; lr by group and peak weight decay of the matrices from `core/plan.py`; backends of the
    ops, which are chosen here (None: the references).
    """

    def __init__(
        self,
        model: GPT,
        *,
        lrs: dict[str, float],
        weight_decay: float,
        ns_steps: int,
        compute_dtype: torch.dtype,
        backends: Backends | None = None,
    ) -> None:
        if not 1 <= ns_steps <= len(COEFFICIENTS):
            raise ValueError(f"ns_steps is {ns_steps}: expected 1 to {len(COEFFICIENTS)}")
        backends = backends or Backends("ref", device=model.wte.device, dtype=compute_dtype)
        self.dims = model.dims
        self.weight_decay, self.ns_steps, self.compute_dtype = weight_decay, ns_steps, compute_dtype
        self.groups: dict[str, Group] = {}
        self.state: dict[str, Tensor] = {}  # "<parameter>.<state>"
        self._adam: dict[str, Callable[..., None]] = {}  # by parameter
        self._muon: dict[str, list[tuple[MuonView, MuonOps]]] = {}
        for name, p in model.named_parameters():
            kind = "lm_head" if name == "wte" and not model.cfg.untied_head else group_of(name)
            self.groups.setdefault(kind, Group(kind, lrs[kind])).params[name] = p
            self._init_state(kind, name, p)
            if kind == "matrices":
                views = muon_views(name, self.dims)
                self._muon[name] = [(view, choose_muon(backends, view.take(p).shape)) for view in views]
            else:
                self._adam[name] = backends.choose(adam_update, p.numel(), dtype=p.dtype)

    @torch.no_grad()
    def _init_state(self, kind: str, name: str, p: Tensor) -> None:
        wide = torch.promote_types(p.dtype, torch.float32)
        if p.dim() > 1 and kind != "gates" and self.compute_dtype.itemsize < 4:
            if kind in MASTERED:
                p.data, self.state[f"{name}.low"] = split_master(p.data)
            else:
                p.data = p.data.to(self.compute_dtype)
        if kind == "matrices":
            self.state[f"{name}.momentum"] = torch.zeros_like(p, dtype=wide)
            for i, view in enumerate(muon_views(name, self.dims)):
                shape = view.second_shape(view.take(p).shape)
                self.state[f"{name}.second.{i}"] = torch.zeros(shape, dtype=wide, device=p.device)
        else:
            dtype = wide if kind in MASTERED else p.dtype
            self.state[f"{name}.exp_avg"] = torch.zeros_like(p, dtype=dtype)
            self.state[f"{name}.exp_avg_sq"] = torch.zeros_like(p, dtype=dtype)

    @torch.no_grad()
    def step(
        self, grads: Callable[[Tensor], Tensor], *, step: int, lr_mult: float, momentum: float, decay_mult: float
    ) -> None:
        """Updates every parameter. `grads` gives the fp32 gradient of one; step counts from 0."""
        values = [
            [group.lr * lr_mult, self.weight_decay * decay_mult, momentum]
            if group.name == "matrices"
            else adam_hyper(group.lr * lr_mult, *ADAM_GROUPS[group.name], step + 1)
            for group in self.groups.values()
        ]
        for group, hyper in zip(self.groups.values(), self._to_device(values)):
            for name, p in group.params.items():
                low = self.state.get(f"{name}.low")
                if group.name == "matrices":
                    self._muon_step(name, p.data, low, grads(p), hyper)
                else:
                    moments = self.state[f"{name}.exp_avg"], self.state[f"{name}.exp_avg_sq"]
                    self._adam[name](p.data, grads(p), *moments, hyper, low)

    def _to_device(self, values: list[list[float]]) -> tuple[Tensor, ...]:
        """Lists of numbers as fp32 tensors, by one copy that does not wait."""
        device = next(iter(self.state.values())).device
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

    def __init__(self, params: list[Tensor]) -> None:
        self.params = params
        self._sums: dict[Tensor, Tensor] = {}
        for p in params:
            if p.dtype != torch.float32:
                p.register_post_accumulate_grad_hook(self._take)

    def _take(self, p: Tensor) -> None:
        assert p.grad is not None
        if p in self._sums:
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
        for p in self.params:
            if p.dtype == torch.float32:
                p.grad = self(p)
            else:
                self._sums[p] = self(p)
        grads = [self(p) for p in self.params]
        comm = [g.bfloat16() if g.is_cuda and p.dtype != torch.float32 else g for g, p in zip(grads, self.params)]
        average_(comm)
        for g, c in zip(grads, comm):
            if g is not c:
                g.copy_(c)

    def zero(self) -> None:
        self._sums.clear()
        for p in self.params:
            p.grad = None
