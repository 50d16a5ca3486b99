"""Horizon, batch, learning-rate and decay laws, and the schedules: pure functions of sizes and step.

Source: nanochat 92d63d4, scripts/base_train.py. The laws transfer settings tuned at depth 12 with a batch of
BATCH_REF tokens; D is the number of training tokens of the run, D_ref that of the reference at the same ratio.
Steps count from 0; n is the number of steps.
"""

import math

from core.config import OptimConfig

BATCH_REF = 2**19  # tokens a step that depth 12 was tuned with
BATCH_EXPONENT = 0.383  # of the optimal batch in the run's tokens ["Power Lines", arXiv 2505.13738]
WIDTH_REF = 768  # d_model that AdamW learning rates are given for
DEPTH_REF = 12
MUON_MOMENTUM = (0.85, 0.97, 0.90)  # at the start, on the plateau, at the end


def horizon(
    *,
    steps: int | None,
    target_flops: float | None,
    ratio: float,
    params_scaling: int,
    flops_per_token: int,
    batch: int,
) -> int:
    """Optimizer steps: given, else to spend `target_flops`, else `ratio` tokens per scaling parameter."""
    # the most explicit request wins
    if steps is not None:
        return steps
    if target_flops is not None:
        return round(target_flops / (flops_per_token * batch))
    return int(ratio * params_scaling) // batch


def batch_tokens(params_scaling: int, params_scaling_ref: int) -> int:
    """Tokens per step, a power of two: B_ref (D / D_ref)^0.383; the ratio of tokens to parameters cancels."""
    batch = BATCH_REF * (params_scaling / params_scaling_ref) ** BATCH_EXPONENT
    return 2 ** round(math.log2(batch))  # so that every world size divides it


def batch_lr_scale(batch: int) -> float:
    """Factor on learning rates for a batch of `batch` tokens: sqrt(B / B_ref).

    The rule is AdamW's; for Muon it is assumed."""
    return (batch / BATCH_REF) ** 0.5


def width_lr_scale(d_model: int) -> float:
    """Factor on AdamW learning rates of embeddings and head for this width, 1/sqrt(C). Muon's has none."""
    return (d_model / WIDTH_REF) ** -0.5


def muon_weight_decay(weight_decay: float, batch: int, tokens: int, tokens_ref: int) -> float:
    """Peak decay of the matrices, so that the averaging time in epochs stays constant [arXiv 2405.13698]."""
    # that time is B / (lr decay D); with lr ~ sqrt(B) it stays put if decay ~ sqrt(B) / D. The paper is about AdamW
    return weight_decay * (batch / BATCH_REF) ** 0.5 * (tokens_ref / tokens)


def lr_multiplier(step: int, n: int, *, warmup_steps: int, warmdown_ratio: float, final_lr_frac: float) -> float:
    """Linear warm-up, plateau, linear warm-down to final_lr_frac over the last round(warmdown_ratio n) steps."""
    warmdown = round(warmdown_ratio * n)
    if step < warmup_steps:
        return (step + 1) / warmup_steps  # never 0: the first step learns too
    if step <= n - warmdown:
        return 1.0
    left = (n - step) / warmdown  # share of the warm-down that is to come
    return left + (1 - left) * final_lr_frac


def muon_momentum(step: int, n: int, *, warmup_steps: int, warmdown_ratio: float) -> float:
    """Rises over warmup_steps (this takes priority), falls over the learning rate's warm-down."""
    start, plateau, end = MUON_MOMENTUM
    warmdown = round(warmdown_ratio * n)
    if step < warmup_steps:
        return start + (plateau - start) * step / warmup_steps
    if warmdown and step >= n - warmdown:
        return plateau + (end - plateau) * (step - (n - warmdown)) / warmdown
    return plateau


def weight_decay_multiplier(step: int, n: int) -> float:
    """Half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / n))


def at(step: int, n: int, cfg: OptimConfig) -> dict[str, float]:
    """The scheduled hyperparameters of `Optimizer.step` at one step."""
    warmdown = {"warmdown_ratio": cfg.warmdown_ratio}
    return {
        "lr_mult": lr_multiplier(step, n, warmup_steps=cfg.warmup_steps, final_lr_frac=cfg.final_lr_frac, **warmdown),
        "momentum": muon_momentum(step, n, warmup_steps=cfg.momentum_warmup_steps, **warmdown),
        "decay_mult": weight_decay_multiplier(step, n),
    }
