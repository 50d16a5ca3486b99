"""The stages of track `fineweb`, one row each, and its laws: pure functions of the step.

Source: modded-nanogpt f411b3d3, record 89. Steps count from 0. `steps` of all stages but the last are scheduled; the
last one extends the run at the lowest rate.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW_BLOCK = 128  # tokens; windows are whole blocks
COOLDOWN = 0.6  # share of the scheduled steps over which the rate falls
FLOOR = 0.15  # learning rate at the end of it, as a share of the first stage's
MOMENTUM, MOMENTUM_WARMUP, MOMENTUM_COOLDOWN = (0.85, 0.95), 300, 50  # Muon's: range, steps to rise, steps to fall
SOFTMAX_SCALE, SOFTMAX_GROWTH = 0.1, 0.2  # of attention at the first window, and with the logarithm of the window
UNTIED_AFTER = 2 / 3  # of the scheduled steps the head parts from the embedding


@dataclass(frozen=True)
class Stage:
    """What is the same in all steps of a part of the run."""

    steps: int
    row_tokens: int  # T
    doc_cap: int  # most tokens that are taken of a document
    max_docs: int  # entries of cu_seqlens beside the last
    short: int  # windows: tokens that a query sees before itself
    long: int
    lr: float  # factor on all rates; of (batch / first batch)^0.6 and ^0.5
    targets: tuple[tuple[float, float], ...]  # weight of each of the next tokens, in the first step and after the last
    prefix: tuple[float, float] = (0.0, 0.0)  # the same of the next token's longest prefix


STAGES = (
    Stage(423, 16_384, 896, 64, 128, 384, 1.0, ((1, 1), (0.5, 0.5), (0.25, 0)), (0.25, 0.25)),
    Stage(424, 32_768, 2048, 96, 384, 896, 1.52, ((1, 1), (0.5, 0)), (0.25, 0)),
    Stage(423, 49_152, 2048, 128, 640, 1408, 1.73, ((1, 1),)),
    Stage(15, 49_152, 2048, 128, 768, 1664, 1.73, ((1, 1),)),
)
VALIDATION = (768, 2560)  # its windows; rows are contiguous tokens, documents have no cap


def scaled(stages: Sequence[Stage], scale: int) -> tuple[Stage, ...]:
    """The same run with fewer steps (1/scale of each stage's), shorter windows and documents (1/scale) and rows
    (1/scale^2). ValueError where a window would have no tokens."""
    if scale < 1 or WINDOW_BLOCK % scale:
        raise ValueError(f"scale is {scale}: expected a divisor of {WINDOW_BLOCK}, the tokens of a block of a window")
    return tuple(
        dataclasses.replace(
            s,
            steps=max(2, s.steps // scale),
            row_tokens=s.row_tokens // scale**2,
            doc_cap=s.doc_cap // scale,
            short=s.short // scale,
            long=s.long // scale,
        )
        for s in stages
    )


# where a step is


def total_steps(stages: Sequence[Stage]) -> int:
    return sum(s.steps for s in stages)


def scheduled_steps(stages: Sequence[Stage]) -> int:
    return total_steps(stages[:-1])


def stage_of(step: int, stages: Sequence[Stage]) -> tuple[int, float]:
    """Number of the step's stage, and the share of that stage that lies before it. The validation after the last step
    has the last stage's."""
    for i, s in enumerate(stages):
        if step < s.steps:
            return i, step / s.steps
        step -= s.steps
    return len(stages) - 1, 1.0


# laws


def lr_multiplier(step: int, stages: Sequence[Stage]) -> float:
    """No warm-up: the stage's factor, and from the cooldown's first step on its way to FLOOR."""
    n = scheduled_steps(stages)
    i, _ = stage_of(step, stages)
    begin = n - int(COOLDOWN * n)
    t = min(max((step - begin) / (n - begin), 0.0), 1.0)
    return stages[i].lr * (1 - t) + FLOOR * t


def muon_momentum(step: int, stages: Sequence[Stage]) -> float:
    """Rises linearly at the start and falls back before the end."""
    n, (low, high) = total_steps(stages), MOMENTUM
    warmup = min(MOMENTUM_WARMUP, n // 4)  # of runs that are scaled down
    cooldown = min(MOMENTUM_COOLDOWN, n // 8)
    share = min(step / warmup, 1.0) if warmup else 1.0
    if step > n - cooldown:
        share = min(share, (n - step) / cooldown)
    return low + share * (high - low)


def target_weights(step: int, stages: Sequence[Stage]) -> list[float]:
    """Weights of the next tokens of the step's stage, then that of the prefix; a stage has as many in all its steps."""
    i, share = stage_of(step, stages)
    return [a + share * (b - a) for a, b in (*stages[i].targets, stages[i].prefix)]


def updates_tables(step: int) -> bool:
    """Whether AdamW steps: on odd steps, by the gradients of two batches."""
    return step % 2 == 1


def last_tied_step(stages: Sequence[Stage]) -> int:
    """After whose update the head and the embedding are two: the first of AdamW's at or after two thirds."""
    step = round(UNTIED_AFTER * scheduled_steps(stages))
    return step + 1 - step % 2


def softmax_scale(longs: Sequence[int]) -> float:
    """Scale of attention's scores after long windows of these lengths: a wider window sharpens the softmax."""
    scale = SOFTMAX_SCALE
    for a, b in zip(longs, longs[1:]):
        scale *= 1 + SOFTMAX_GROWTH * math.log(b / a)
    return scale
