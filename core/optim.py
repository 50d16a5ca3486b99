"""Muon for the matrices, AdamW for everything else, on one device.

Source: nanochat 92d63d4, optim.py; Polar Express is arXiv 2505.16932, NorMuon arXiv 2510.05491.

Shape of the code   each parameter has one `Group`; the update of a group is a function of (parameter, gradient, state)
                    and hyperparameters, so that a rank that owns a slice of a bank calls the same function on it.
Muon's matrices     banks are views to Muon: q, k, v and o are orthogonalised apart although q, k, v share storage, and the
                    MLP's second matrix, stored (4C, C), is seen as the (C, 4C) projection it is.
Masters             fp32 parameters are their own master. A bf16 matrix or head keeps the low 16 bits of its fp32 master
                    beside it (`split_master`); embeddings in bf16 have no master, their moments are bf16 too.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from core import schedule
from core.config import OptimConfig
from core.model import GPT, Dims
from kernels.dispatch import Backends
from kernels.polar_express import COEFFICIENTS, polar_express

ADAM_EPS = 1e-10
MUON_BETA2 = 0.9

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


# masters ------------------------------------------------------------------


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> (bf16 nearest, ties away from zero; int16 difference of the bit patterns). Exact with `join_master`.

    Rounding to nearest keeps the bf16 half unbiased: truncation would shrink every weight. Ties go away from zero
    because the tie towards zero would need +2^15, which 16 signed bits do not hold.
    """
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join_master(high: Tensor, low: Tensor) -> Tensor:
    """Inverse of `split_master`: bf16 and int16 -> fp32."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)).view(torch.float32)


# updates ------------------------------------------------------------------


def adamw_update(
    p: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    t: int,
) -> None:
    """One AdamW step (the t-th, from 1) in fp32, states rounded back to their types; p, exp_avg, exp_avg_sq in place."""
    beta1, beta2 = betas
    m = exp_avg if exp_avg.dtype == torch.float32 else exp_avg.float()
    v = exp_avg_sq if exp_avg_sq.dtype == torch.float32 else exp_avg_sq.float()
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denom = v.sqrt().mul_((1 - beta2**t) ** -0.5).add_(ADAM_EPS)
    p32 = p if p.dtype == torch.float32 else p.float()
    p32.mul_(1 - lr * weight_decay).addcdiv_(m, denom, value=-lr / (1 - beta1**t))
    for state, value in ((exp_avg, m), (exp_avg_sq, v), (p, p32)):
        if state is not value:
            state.copy_(value)


def muon_update(
    p: Tensor,
    g: Tensor,
    momentum_buf: Tensor,
    second_buf: Tensor,
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    compute_dtype: torch.dtype,
    orthogonalise: Callable[[Tensor], Tensor],
) -> None:
    """One Muon step on fp32 matrices (K, rows, cols); p, momentum_buf, second_buf in place.

    Nesterov momentum, row equilibration (MuonEq; in fp32 here, after the cast in nanochat), `orthogonalise` in
    `compute_dtype`, Frobenius norm set to sqrt(min(rows, cols)) (Muon+), variance normalised per row of a tall and per column of a wide matrix with the norm
    preserved (NorMuon), decay only where it agrees with the update (cautious). lr grows by sqrt(rows / cols) if tall.
    """
    rows, cols = p.shape[-2:]
    lr = lr * max(1.0, rows / cols) ** 0.5
    momentum_buf.lerp_(g, 1 - momentum)
    x = g.lerp(momentum_buf, momentum)

    row_norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    mean_norm = torch.linalg.vector_norm(row_norm, dim=-2, keepdim=True) / rows**0.5
    x = (x * (mean_norm / row_norm.clamp_min(1e-6))).to(compute_dtype)
    x = orthogonalise(x).float()
    x *= min(rows, cols) ** 0.5 / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-6)

    dim = -1 if rows >= cols else -2
    n = x.size(dim)
    variance = x.square().mean(dim=dim, keepdim=True)
    old_norm = (n * variance.sum(dim=(-2, -1), keepdim=True)).sqrt()
    second_buf.lerp_(variance, 1 - MUON_BETA2)
    scale = second_buf.clamp_min(1e-10).rsqrt()
    new_norm = (n * (variance * scale.square()).sum(dim=(-2, -1), keepdim=True)).sqrt()
    x *= scale * (old_norm / new_norm.clamp_min(1e-10))

    decay = torch.where(x * p >= 0, lr * weight_decay, 0.0)
    p.sub_(p * decay).sub_(x, alpha=lr)


def muon_views(name: str, bank: Tensor, d: Dims) -> list[Tensor]:
    """The matrices of a bank (or of a state shaped like it) as Muon sees them, each (K, rows, cols)."""
    kind = name.split(".")[0]
    if kind == "attn_qkv":
        if d.d_kv == d.d_model:
            return [bank.view(-1, d.d_model, d.d_model)]
        return list(bank.split((d.d_model, d.d_kv, d.d_kv), dim=-2))
    return [bank.mT if kind == "mlp_down" else bank]


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
        self._backends = backends or Backends("ref", device=model.wte.device, dtype=compute_dtype)
        self._orthogonalise: dict[str, Callable[[Tensor], Tensor]] = {}  # by "<parameter>.<view>"
        self.dims = model.dims
        self.weight_decay, self.ns_steps, self.compute_dtype = weight_decay, ns_steps, compute_dtype
        self.groups: dict[str, Group] = {}
        self.state: dict[str, Tensor] = {}  # "<parameter>.<state>"
        for name, p in model.named_parameters():
            kind = "lm_head" if name == "wte" and not model.cfg.untied_head else group_of(name)
            self.groups.setdefault(kind, Group(kind, lrs[kind])).params[name] = p
            self._init_state(kind, name, p)

    @torch.no_grad()
    def _init_state(self, kind: str, name: str, p: Tensor) -> None:
        if p.dim() > 1 and kind != "gates" and self.compute_dtype != torch.float32:
            if kind in MASTERED:
                p.data, self.state[f"{name}.low"] = split_master(p.data)
            else:
                p.data = p.data.to(self.compute_dtype)
        if kind == "matrices":
            self.state[f"{name}.momentum"] = torch.zeros_like(p, dtype=torch.float32)
            for i, view in enumerate(muon_views(name, p, self.dims)):
                K, rows, cols = view.shape
                shape = (K, rows, 1) if rows >= cols else (K, 1, cols)
                self.state[f"{name}.second.{i}"] = torch.zeros(shape, dtype=torch.float32, device=p.device)
                function = self._backends.choose(polar_express, K, rows, cols)
                self._orthogonalise[f"{name}.{i}"] = partial(function, coefficients=COEFFICIENTS[: self.ns_steps])
        else:
            dtype = torch.float32 if kind in MASTERED else p.dtype
            self.state[f"{name}.exp_avg"] = torch.zeros_like(p, dtype=dtype)
            self.state[f"{name}.exp_avg_sq"] = torch.zeros_like(p, dtype=dtype)

    @torch.no_grad()
    def step(
        self, grads: Callable[[Tensor], Tensor], *, step: int, lr_mult: float, momentum: float, decay_mult: float
    ) -> None:
        """Updates every parameter. `grads` gives the fp32 gradient of one; step counts from 0."""
        for group in self.groups.values():
            lr = group.lr * lr_mult
            for name, p in group.params.items():
                low = self.state.get(f"{name}.low")
                master = p.data if low is None else join_master(p.data, low)
                if group.name == "matrices":
                    self._muon(name, master, grads(p), lr, momentum, decay_mult)
                else:
                    betas, decay = ADAM_GROUPS[group.name]
                    moments = self.state[f"{name}.exp_avg"], self.state[f"{name}.exp_avg_sq"]
                    adamw_update(master, grads(p), *moments, lr=lr, betas=betas, weight_decay=decay, t=step + 1)
                if low is not None:
                    high, new_low = split_master(master)
                    p.data.copy_(high)
                    low.copy_(new_low)

    def _muon(self, name: str, master: Tensor, grad: Tensor, lr: float, momentum: float, decay_mult: float) -> None:
        views = (muon_views(name, t, self.dims) for t in (master, grad, self.state[f"{name}.momentum"]))
        for i, (p, g, buf) in enumerate(zip(*views)):
            muon_update(
                p,
                g,
                buf,
                self.state[f"{name}.second.{i}"],
                lr=lr,
                weight_decay=self.weight_decay * decay_mult,
                momentum=momentum,
                compute_dtype=self.compute_dtype,
                orthogonalise=self._orthogonalise[f"{name}.{i}"],
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
