"""The peers' steps, whose published times check the model: nanochat's runs 1, 3 and 6, three stages of modded-nanogpt.

No value is set for one run. The choice within the ranges of `CLASSES` was made knowing the times, so the check shows
that one set of efficiencies explains six steps, not that it would have foretold them.
"""

import math
from statistics import NormalDist

from bench.projection.machine import (
    GPUS,
    Workload,
    attention,
    collectives,
    linears,
    mean_keys,
    newton_schulz,
    one_pass,
    products,
    table_gradients,
    workload,
)  # fmt: skip
from core.config import ModelConfig
from core.models.gpt2 import dims

TOLERANCE = 0.15


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


def documents(cap: int) -> list[float]:
    """Lengths of FineWeb's documents in tokens, cut at `cap`: quantiles of the lognormal with their median and mean."""
    median, mean = 403, 690
    normal = NormalDist(math.log(median), math.sqrt(2 * math.log(mean / median)))
    return [min(cap, math.exp(normal.inv_cdf((i + 0.5) / 512))) for i in range(512)]


def modded(name: str, tokens: int, cap: int, short: int, long: int, tied: bool, **facts) -> Workload:
    """modded-nanogpt as in the log "#85 v3" (closest to its HEAD: gate nets, DC, 768-wide bigram table).

    fp8 head and MLP up-projection, bf16 otherwise; AdamW's parameters move every second step, so all that belongs to
    them counts half.
    """
    C, F, V, T = 768, 3072, 50304, tokens // GPUS
    attn, mlp, half = 10, 11, 0.5
    lengths = documents(cap)
    twice = [2 * n for n in lengths]  # paired heads: two rows a token, the window in rows
    keys = 4 * [mean_keys(short, lengths)] + 2 * [mean_keys(long, lengths)] + 4 * [mean_keys(short, twice)]
    stream = 2 * C * T
    embed, ve, bigram = V * C, 5 * V * C, 377280 * C
    tables = embed + ve + bigram
    banks = [(64, 256, C), (24, C, C), (24, F, C)]  # with padding, dealt to 8 ranks
    matrices = sum(math.prod(shape) for shape in banks)
    rows = [
        *linears("qkv, o", "products", T, [(C, 3 * C), (C, C)], attn, False),
        # before #87 the squared activation and the one before it are both stored
        products("MLP up, forward", "products", [(1, T, F, C)], mlp, "fp8 product", nbytes=mlp * T * (C + 4 * F)),
        products("MLP down, forward; dgrad", "products", [(1, T, C, F), (1, T, F, C), (1, T, C, F)], mlp),
        products("MLP: wgrad", "products", 2 * [(1, F, C, T)], mlp),
        *linears("lm_head", "head", T, [(C, V)], 1, True),
        *attention(T, C, [*keys, 112], 1),  # the last is DC-MHA's local softmax over 112 keys
        # tensors of a layer, forward and backward: mix and norm before the MLP 6 + 12, after it 4 + 6 (x, y, x0, bigram
        # in, gates and lambdas have gradients); layer 6 without attention 9 + 14
        one_pass("norms and mixes", "passes", (28 * attn + 23) * stream, 6 * mlp),
        one_pass("rope, QK-norm, value embeddings", "passes", (10 * attn + 2 * 4 + 5 * 7) * stream, 4 * attn),
        one_pass("XSA, output gates", "passes", (4 * 8 + 2 * 6) * stream, 3 * 6),
        # mixing nets of layer 10 and after it 24 + 48, gate nets 4; embedding, smear, bigram 13 + 20, value embeddings
        # 10
        one_pass("MUDD, gates, input", "passes", (24 + 48 + 4 + 13 + 20 + 10) * stream, 90),
        one_pass("fp8 casts of MLP inputs", "fp8 casts", 2.5 * mlp * stream, 3 * mlp),
        # attention's banks joined and their gradients split; MLP up quantised
        one_pass("weights", "weights", 8 * attn * 4 * C * C + 5 * mlp * F * C, 30),
        one_pass("fp8 casts of lm_head", "fp8 casts", 1.5 * stream + 3 * C * V, 4),
        one_pass("softcap and cross-entropy, one kernel", "head", 3 * V * T, 1, "kernel pass"),
        one_pass("fp8 transposes for wgrad", "fp8 casts", 2 * (V + C) * T, 2, "kernel pass"),
        table_gradients(tables, 7 * C, T, 1, half),
        *(newton_schulz(K // GPUS, r, c, symmetric=True) for K, r, c in banks),
        # fp32 momentum, bf16 and 16 low bits of the weight, products' operands cast, variance; X = aX + BX apart from B
        one_pass("NorMuon besides", "optimizer", (50 + 5 * 6) * matrices / GPUS, 3 * 20),
        one_pass("AdamW", "optimizer", half * 22 * (tables + (not tied) * C * V) / GPUS, half * 60),
        # tied: the embedding's gradient is added to the head's, the head copied to the embedding, both transposed
        one_pass("tied head", "optimizer", tied * half * (6 + 4) * C * V, 1, "kernel pass"),
        collectives("matrices", 2 * 2 * matrices, 6),
        # value tables, head and untied embedding both ways; the bigram table a fifth of its rows in and all out
        collectives("tables", half * 2 * (2 * (ve + embed * (1 + (not tied))) + 1.2 * bigram), half * 24),
    ]
    return workload(name, rows, tokens=tokens, **facts)


def checks() -> list[Workload]:
    """The published step times: nanochat's leaderboard (time over steps, or tokens over tokens/s), modded's log #85."""
    return [
        nanochat("nanochat run 1: d24 bf16", 24, 1024, 2**19, False, False, steps=16704, published=10949 / 16704),
        nanochat("nanochat run 3: d26 fp8", 26, 1024, 2**20, True, False, steps=7226, published=9922 / 7226),
        nanochat("nanochat run 6: d24 fp8", 24, 512, 2**20, True, True, steps=5568, published=1.067),
        modded("modded #85: stage 1", 131072, 896, 128, 384, True, steps=423, published=32.3e-3),
        modded("modded #85: stage 2", 262144, 2048, 384, 896, True, steps=424, published=58.1e-3),
        modded("modded #85: stage 3", 393216, 2048, 640, 1408, False, steps=423, published=84.0e-3),
    ]
