"""The peers' steps, whose published times check the model: nanochat's runs 1, 3 and 6, three stages of modded-nanogpt.

No value is set for one run. The choice within the ranges of `CLASSES` was made knowing the times, so the check shows
that one set of efficiencies explains six steps, not that it would have foretold them.
"""

import math
from dataclasses import replace

from bench.projection.fineweb import step
from bench.projection.machine import (
    GPUS,
    Workload,
    attention,
    collectives,
    linears,
    mean_keys,
    newton_schulz,
    one_pass,
    table_gradients,
    workload,
)  # fmt: skip
from bench.projection.race import R85
from core.config import ModelConfig
from core.models.gpt2 import dims

# of what fineweb.PARTS tell apart
GROUP_OF = {
    "attention": "attention", "MLP": "products", "projections": "products", "head and loss": "head",
    "lookup tables": "tables", "gates and elementwise": "passes", "optimizer": "optimizer",
    "communication": "communication", "host": "host",
}  # fmt: skip


def nanochat(name: str, depth: int, short: int, tokens: int, fp8: bool, smear: bool, **facts) -> Workload:
    """nanochat's base_train on 8 H100s with device batch 16.

    `short` is the S window of SSSL; smear stands for smear and backout, which came in March 2026 (run 6 has them, runs
    1 and 3 do not). Value embeddings, x0 scales and FA3 are older than run 1.
    """
    d = dims(ModelConfig(depth=depth))
    L, C, F, V, T = d.n_layer, d.d_model, d.d_ff, d.padded_vocab, d.seq_len
    M, on_gpu = 16 * T, tokens // GPUS
    micro = on_gpu // M
    n = L * micro
    windows = [w if w == T else short for w in d.windows]
    stream = 2 * C * on_gpu  # bytes of one tensor of the residual stream
    matrices, head, tables = 12 * L * C * C, C * V, V * C * (1 + len(d.ve_layers))
    rows = [
        *linears("q, k, v, o", "products", M, [(C, C)] * 4, n, fp8),
        *linears("MLP", "products", M, [(C, F), (F, C)], n, fp8),
        *linears("lm_head", "head", M, [(C, V)], micro, fp8),
        *attention(on_gpu, C, [mean_keys(w, [T]) for w in windows], micro),
        # tensors of a layer: both norms with their sums 5 + 4, backward 9 + 4 (three gradients of the norm's output
        # come from q, k, v; both lambdas and x0 have theirs); q, k 4 and 6; v of every other layer 3 and 3; ReLU²
        # 8 and 12
        one_pass("norms and sums", "passes", 22 * L * stream, 5 * n),
        one_pass("rope, QK-norm, value embeddings", "passes", (10 * L + 6 * len(d.ve_layers)) * stream, 4 * n),
        one_pass("ReLU²", "passes", 20 * L * stream, 2 * n),
        one_pass("embedding, last norm", "passes", (24 if smear else 12) * stream, 20 * micro),
        # the logits as bf16, fp32 after the softcap, two reads for the softmax; fp32 read and bf16 gradient written
        one_pass("softcap and cross-entropy", "head", (2 + 4 + 4 + 4 + 4 + 2) * V * on_gpu, 5 * micro),
        table_gradients(tables, C * (1 + len(d.ve_layers)), on_gpu / micro, micro, micro - 1),
        # wgrad is bf16; the gradient is fp32 and accumulates there
        one_pass("fp32 gradients", "weights", (6 * micro + 12 * (micro - 1)) * (matrices + head), 12 * n),
    ]
    if fp8:
        # channels of a token that are quantised. q, k and v quantise the same input in three calls, of which
        # AOTAutograd's removal of common subexpressions leaves one (seen with torch 2.13 on such a function)
        inputs, outputs = L * 7 * C + C, L * 9 * C + V
        cast = 2 + 3 + 2  # amax; quantise; transposed copy for wgrad
        rows += [
            one_pass("fp8 casts of activations", "fp8 casts", cast * inputs * on_gpu, 4 * 6 * n),
            one_pass("fp8 casts of gradients", "fp8 casts", cast * outputs * on_gpu, 4 * 6 * n),
            one_pass("fp8 casts of weights", "fp8 casts", micro * (4 + 5 + 2) * (matrices + head), 4 * 6 * n),
        ]
    else:
        rows.append(one_pass("bf16 casts of weights", "weights", micro * 6 * (matrices + head), 6 * n))
    # a rank owns the same number of every shape, padding included. Gradients are stacked and results copied back by all
    # ranks; the owner runs Nesterov, norms, variance and update in fp32 and 15 elementwise passes around the products
    owned = [(math.ceil(4 * L / GPUS), C, C), (math.ceil(L / GPUS), C, F), (math.ceil(L / GPUS), F, C)]
    elements = sum(math.prod(shape) for shape in owned)
    rows += [newton_schulz(*shape, symmetric=False) for shape in owned]
    rows += [
        one_pass("Muon besides", "optimizer", 16 * matrices + (60 + 5 * 12) * elements, 3 * (5 * 4 + 20) + 6 * L),
        one_pass("AdamW", "optimizer", (28 * head + 14 * tables) / GPUS, 20),
        collectives("reduce-scatter, all-gather", 2 * (4 * (matrices + head) + 2 * tables), 2 * (6 + len(d.ve_layers))),
    ]
    return workload(name, rows, waits=1, tokens=tokens, **facts)


def checks() -> list[Workload]:
    """The published step times: nanochat's leaderboard (time over steps, or tokens over tokens/s), modded's log #85."""
    return [
        nanochat("nanochat run 1: d24 bf16", 24, 1024, 2**19, False, False, steps=16704, published=10949 / 16704),
        nanochat("nanochat run 3: d26 fp8", 26, 1024, 2**20, True, False, steps=7226, published=9922 / 7226),
        nanochat("nanochat run 6: d24 fp8", 24, 512, 2**20, True, True, steps=5568, published=1.067),
        *(in_groups(step(R85, stage)) for stage in R85.stages[:3]),
    ]


def in_groups(w: Workload) -> Workload:
    """A step of the race to 3.28 with the groups of the other steps."""
    return replace(w, rows=tuple(replace(row, group=GROUP_OF[row.group]) for row in w.rows))
