"""What a training step takes on 8 H100s, from the costs of its ops: `python -m bench.projection [--plot F.png] [--rows] [--json]`.

A prediction, not a measurement. A workload lists what one GPU does in one optimizer step, op by op, with FLOPs and bytes. A row
takes the longer of its arithmetic and its memory traffic, each at the nominal peak times the efficiency of its class; rows
follow one another. One set of efficiencies (`CLASSES`, within published ranges, with sources) serves all workloads.

Check     nanochat (runs 1, 3, 6) and modded-nanogpt (three stages): their published step times come out within TOLERANCE. No value
          is set for one run; the choice within the ranges was made knowing the times, so the check shows that one set
          explains six steps, not that it would have foretold them
Budget    the gpt2 preset as core/ runs it today, and as it is meant to become, from the ops' own costs
Measured  `bench/results/<device>/ops.jsonl` of an H100 or H200 replaces the efficiency of the budget rows it has; never the check's
Left out  L2 hits (perhaps why the fp8 runs, with many passes over 100 MB, come out slow), falling clocks, stragglers, the data loader
Units     seconds, FLOP and bytes of one GPU and one optimizer step
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import torch

from core.config import ModelConfig, preset
from core.models.gpt2 import dims, parameter_table
from core.params import MUON, Table
from core.plan import make_plan
from core.stopping import one_sentence
from kernels.adam_update import adam_update_cost
from kernels.lm_head_loss import chunk_rows
from kernels.muon_update import muon_apply_cost, muon_momentum_cost
from kernels.polar_express import COEFFICIENTS, polar_express_cost
from kernels.relu2_mlp import relu2_mlp_cost
from kernels.rms_norm import rms_norm_cost
from kernels.rope_qk_norm import rope_qk_norm_cost

NOTE = "A prediction from op costs and published efficiencies, not a measurement."
TOLERANCE = 0.15
GPUS = 8
SMS = 132
BF16 = torch.bfloat16
FLOPS = {"bf16": 989e12, "fp8": 1979e12}  # dense tensor-core peaks of an H100 or H200 SXM
HBM = {"H100": 3.35e12, "H200": 4.8e12}
NVLINK = 450e9  # one direction of one GPU
RESULTS = Path(__file__).parent / "results"


# efficiencies -------------------------------------------------------------


@dataclass(frozen=True)
class Class:
    """One kind of work: its nominal peak (FLOP/s or bytes/s), the share that is reached, and where the share is from."""

    peak: float
    efficiency: float
    source: str


BF16_PEAK, H100_BYTES = FLOPS["bf16"], HBM["H100"]
# with a fit, the value is its limit for large shapes
CLASSES = {
    "bf16 product": Class(BF16_PEAK, 0.79, "cuBLAS 765 TFLOP/s on large products (cutlass#1662); `product_fit`"),
    "fp8 product": Class(FLOPS["fp8"], 0.68, "cuBLAS tensorwise 1297 TFLOP/s (cutlass#1662); `product_fit`"),
    "Newton-Schulz": Class(BF16_PEAK, 0.60, "cuBLAS 536-634 TFLOP/s at 8192 (Dion3, appendix E); `product_fit`"),
    "attention forward": Class(BF16_PEAK, 0.77, "FA3 364-685 TFLOP/s at S 1k-8k (tritonbench#1267); `attention_fit`"),
    "attention backward": Class(BF16_PEAK, 0.71, "FA3 182-539 TFLOP/s at S 1k-8k (tritonbench#1267); `attention_fit`"),
    "torch attention forward": Class(BF16_PEAK, 0.40, "SDPA, FlexAttention: FA2 and Triton 370-395 TFLOP/s (FA3's paper)"),
    "torch attention backward": Class(BF16_PEAK, 0.37, "SDPA, FlexAttention: FA3's value by 74 / 142 ms, FA3 to FA2 (anemoi)"),
    # inductor's: norms 58-69 % (QuACK's figure), transposing copies 64-68 % (modded-nanogpt#240), sum and norm 95 % (quack#55)
    "compiled pass": Class(H100_BYTES, 0.77, "inductor 58-95 %: norms, transposes (QuACK, modded-nanogpt#240), sums (quack#55)"),
    # norms 77-90 % (QuACK), casts 84-91 % (torchao), transposes 83 % (modded-nanogpt#240)
    "kernel pass": Class(H100_BYTES, 0.85, "hand-written norms, casts, transposes 77-91 % (QuACK, torchao, modded-nanogpt#240)"),
    "collective": Class(NVLINK, 0.78, "bus bandwidth 350 GB/s: assumption, NCCL's usual figure for large messages"),
}  # fmt: skip
LATENCY_S = 25e-6  # a collective of nothing: NCCL's floor for an all-to-all (Dion3 app. D)
GAP_S = 1.5e-6  # between a kernel's end and the next one's full speed; assumption, below the 3.5 us it takes to launch one (quack)
WAIT_S = 1e-3  # a host that waits for the GPU each step and then has to fill its queue again; assumption

TILE = (128, 256)
# of K; nanochat's MLP microbenchmark against large products says 100 to 230, DeepGEMM at K 1.5k against 16k 400 to 500
TILE_START_BYTES = 256
ATTENTION_START = {"forward": 400, "backward": 1260}  # keys; they give FA3's published figures for S 2k-8k to 5 %


Shape = tuple[int, int, int, int]  # batch, M, N, K of a product (M, K) x (K, N)


def product_fit(batch: int, M: int, N: int, K: int, itemsize: int) -> float:
    """Share of a class's efficiency that a product keeps: tiles come in whole waves, and each costs a start and a store besides
    K. K may be split to fill the multiprocessors, in at most 8."""

    def share(split: int) -> float:
        tiles = split * batch * math.ceil(M / TILE[0]) * math.ceil(N / TILE[1])
        length = K / split * itemsize
        return tiles / (SMS * math.ceil(tiles / SMS)) * length / (length + TILE_START_BYTES)

    return max(share(split) for split in (1, 2, 4, 8))


def attention_fit(keys: float, direction: str) -> float:
    """Share that a mean of `keys` visible keys per query leaves; work that is done per query and half-masked tiles are the rest."""
    return keys / (keys + ATTENTION_START[direction])


# rows ---------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """A case of one of Redline's ops, as the bench stores its measurements."""

    op: str
    form: str
    direction: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Measured:
    """Share of its roofline that an op reached, by the nominal peaks of the device it ran on."""

    ratio: float
    source: str


@dataclass(frozen=True)
class Row:
    """One op of one step of one GPU, all its layers and micro-steps together; bytes of a collective are those sent."""

    op: str
    group: str
    kind: str = ""  # class; none: fixed alone
    flops: float = 0.0
    nbytes: float = 0.0
    fit: float = 1.0  # share of the class's efficiency that the shape leaves
    exposed: float = 1.0  # share that nothing else hides
    fixed: float = 0.0  # seconds besides
    kernels: int = 0
    cost: Cost | None = None
    measured: Measured | None = None

    def roofline(self) -> float:
        """Seconds at nominal peaks."""
        peak = FLOPS["fp8" if self.kind == "fp8 product" else "bf16"]
        return max(self.flops / peak, self.nbytes / (NVLINK if self.kind == "collective" else HBM["H100"]))

    def seconds(self, classes: Mapping[str, Class] = CLASSES) -> float:
        if self.measured:
            return self.roofline() / self.measured.ratio
        if not self.kind:
            return self.fixed
        c = classes[self.kind]
        if self.kind.endswith("pass") or self.kind == "collective":
            return self.fixed + self.exposed * self.nbytes / (c.peak * c.efficiency)
        traffic = classes["kernel pass"]
        arithmetic = self.flops / (c.peak * c.efficiency * self.fit)
        return max(arithmetic, self.nbytes / (traffic.peak * traffic.efficiency))


@dataclass(frozen=True)
class Workload:
    name: str
    rows: tuple[Row, ...]
    tokens: int  # of one step, over all GPUs
    steps: int
    published: float | None = None  # seconds of a step

    def seconds(self, classes: Mapping[str, Class] = CLASSES) -> float:
        return sum(row.seconds(classes) for row in self.rows)

    def error(self, classes: Mapping[str, Class] = CLASSES) -> float:
        assert self.published
        return self.seconds(classes) / self.published - 1

    def flops(self, *kinds: str) -> float:
        return sum(row.flops for row in self.rows if row.kind in kinds)


def workload(name: str, rows: Iterable[Row], waits: int = 0, **facts) -> Workload:
    """With what the host adds: gaps between kernels, and waits."""
    rows = tuple(row for row in rows if row.seconds())
    n = sum(row.kernels for row in rows)
    host = Row(f"gaps of {n} kernels, {waits} waits", "host", fixed=n * GAP_S + waits * WAIT_S)
    return Workload(name, (*rows, host), **facts)


def products(op: str, group: str, shapes: Sequence[Shape], count: int = 1, kind: str = "bf16 product", **more) -> Row:
    """`count` times these products, with bf16 results; `more` replaces fields of the row."""
    itemsize = 1 if kind == "fp8 product" else 2
    each = [2 * b * m * n * k for b, m, n, k in shapes]
    fit = sum(each) / sum(f / product_fit(*shape, itemsize) for f, shape in zip(each, shapes))
    nbytes = sum(b * ((m + n) * k * itemsize + 2 * m * n) for b, m, n, k in shapes)
    row = Row(op, group, kind, count * sum(each), count * nbytes, fit, kernels=count * len(shapes))
    return dataclasses.replace(row, **more)


def linears(op: str, group: str, M: int, sizes: Sequence[tuple[int, int]], count: int, fp8: bool) -> list[Row]:
    """Forward and both gradients of `count` layers with matrices of (inputs, outputs), on M rows."""
    kind = "fp8 product" if fp8 else "bf16 product"
    inward = [shape for i, o in sizes for shape in ((1, M, o, i), (1, M, i, o))]
    return [
        products(f"{op}: forward, dgrad", group, inward, count, kind),
        products(f"{op}: wgrad", group, [(1, o, i, M) for i, o in sizes], count, kind),
    ]


def attention(tokens: int, width: int, keys: Sequence[float], calls: int, provider: str = "") -> list[Row]:
    """Both directions over layers with these mean numbers of visible keys; masked pairs count nothing. Backward is 2.5 forwards."""
    rows = []
    for direction, factor, kernels in (("forward", 4, 1), ("backward", 10, 3)):
        each = [factor * width * k * tokens for k in keys]
        fit = sum(each) / sum(f / attention_fit(k, direction) for f, k in zip(each, keys))
        nbytes = len(keys) * tokens * width * 2 * (4 if direction == "forward" else 8)
        name, kind, calls_made = f"attention, {direction}", f"{provider}attention {direction}", calls * len(keys)
        rows.append(Row(name, "attention", kind, sum(each), nbytes, fit, kernels=calls_made * kernels))
    return rows


def mean_keys(window: int, lengths: Sequence[float]) -> float:
    """Keys that a query sees, itself and up to `window` before it, over the tokens of sequences of these lengths."""
    inside = [min(window + 1, n) for n in lengths]
    return sum(w * (w + 1) / 2 + (n - w) * w for w, n in zip(inside, lengths)) / sum(lengths)


def one_pass(op: str, group: str, nbytes: float, kernels: float, kind: str = "compiled pass") -> Row:
    return Row(op, group, kind, nbytes=nbytes, kernels=round(kernels))


def newton_schulz(K: int, rows: int, cols: int, symmetric: bool) -> Row:
    """Polar Express of K matrices, symmetric products half computed or whole."""
    n, m = min(rows, cols), max(rows, cols)
    shapes = [(K, n, n, m), (K, n, n, n), (K, n, m, n)]
    row = products("Polar Express", "optimizer", shapes, len(COEFFICIENTS), "Newton-Schulz", nbytes=0)
    return dataclasses.replace(row, flops=polar_express_cost((K, rows, cols), BF16)[0]) if symmetric else row


def collectives(op: str, nbytes: float, messages: float, exposed: float = 1.0) -> Row:
    """Reduce-scatters and all-gathers of `nbytes` in all; an all-reduce counts twice."""
    sent = nbytes * (GPUS - 1) / GPUS
    return Row(op, "communication", "collective", nbytes=sent, exposed=exposed, fixed=messages * LATENCY_S)


def table_gradients(elements: float, width: float, tokens: float, micro: float, added: float) -> Row:
    """Dense gradients of lookup tables as inductor makes them: fp32 zeros, rows added, cast to bf16, and added to those of
    `added` earlier micro-steps."""
    nbytes = micro * (10 * elements + 10 * width * tokens) + added * 6 * elements
    return one_pass("gradients of lookup tables", "tables", nbytes, 4 * micro + added)


# the peers ----------------------------------------------------------------


def nanochat(name: str, depth: int, short: int, tokens: int, fp8: bool, smear: bool, **facts) -> Workload:
    """nanochat's base_train on 8 H100s with device batch 16: `short` is the S window of SSSL; smear stands for smear and backout,
    which came in March 2026 (run 6 has them, runs 1 and 3 do not). Value embeddings, x0 scales and FA3 are older than run 1."""
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
        # tensors of a layer: both norms with their sums 5 + 4, backward 9 + 4 (three gradients of the norm's output come from
        # q, k, v; both lambdas and x0 have theirs); q, k 4 and 6; v of every other layer 3 and 3; ReLU² 8 and 12
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
        # channels of a token that are quantised. q, k and v quantise the same input in three calls, of which AOTAutograd's removal of
        # common subexpressions leaves one (seen with torch 2.13 on such a function)
        inputs, outputs = L * 7 * C + C, L * 9 * C + V
        cast = 2 + 3 + 2  # amax; quantise; transposed copy for wgrad
        rows += [
            one_pass("fp8 casts of activations", "fp8 casts", cast * inputs * on_gpu, 4 * 6 * n),
            one_pass("fp8 casts of gradients", "fp8 casts", cast * outputs * on_gpu, 4 * 6 * n),
            one_pass("fp8 casts of weights", "fp8 casts", micro * (4 + 5 + 2) * (matrices + head), 4 * 6 * n),
        ]
    else:
        rows.append(one_pass("bf16 casts of weights", "weights", micro * 6 * (matrices + head), 6 * n))
    # a rank owns the same number of every shape, padding included. Gradients are stacked and results copied back by all ranks;
    # the owner runs Nesterov, norms, variance and update in fp32 and 15 elementwise passes around the products
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
    """Lengths of FineWeb's documents cut at `cap`: quantiles of the lognormal with their median (403) and mean (690) in tokens."""
    median, mean = 403, 690
    normal = NormalDist(math.log(median), math.sqrt(2 * math.log(mean / median)))
    return [min(cap, math.exp(normal.inv_cdf((i + 0.5) / 512))) for i in range(512)]


def modded(name: str, tokens: int, cap: int, short: int, long: int, tied: bool, **facts) -> Workload:
    """modded-nanogpt as in the log "#85 v3" (closest to its HEAD: gate nets, DC, 768-wide bigram table): fp8 head and MLP up-projection,
    bf16 otherwise; AdamW's parameters move every second step, so all that belongs to them counts half."""
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
        # tensors of a layer, forward and backward: mix and norm before the MLP 6 + 12, after it 4 + 6 (x, y, x0, bigram in, gates
        # and lambdas have gradients); layer 6 without attention 9 + 14
        one_pass("norms and mixes", "passes", (28 * attn + 23) * stream, 6 * mlp),
        one_pass("rope, QK-norm, value embeddings", "passes", (10 * attn + 2 * 4 + 5 * 7) * stream, 4 * attn),
        one_pass("XSA, output gates", "passes", (4 * 8 + 2 * 6) * stream, 3 * 6),
        # mixing nets of layer 10 and after it 24 + 48, gate nets 4; embedding, smear, bigram 13 + 20, value embeddings 10
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
    """The published step times: nanochat's leaderboard (time over steps, or tokens over tokens per second), modded's log #85 v3."""
    return [
        nanochat("nanochat run 1: d24 bf16", 24, 1024, 2**19, False, False, steps=16704, published=10949 / 16704),
        nanochat("nanochat run 3: d26 fp8", 26, 1024, 2**20, True, False, steps=7226, published=9922 / 7226),
        nanochat("nanochat run 6: d24 fp8", 24, 512, 2**20, True, True, steps=5568, published=1.067),
        modded("modded #85: stage 1", 131072, 896, 128, 384, True, steps=423, published=32.3e-3),
        modded("modded #85: stage 2", 262144, 2048, 384, 896, True, steps=424, published=58.1e-3),
        modded("modded #85: stage 3", 393216, 2048, 640, 1408, False, steps=423, published=84.0e-3),
    ]


# Redline ------------------------------------------------------------------


def redline(depth: int = 24, target: bool = False) -> Workload:
    """The gpt2 preset on 8 H100s at ratio 8: as core/ does it today in bf16, or the design's target in fp8 with FA3's attention, a
    sharded optimizer and bf16 communication of which backward hides 70 %."""
    cfg = preset("gpt2", "cuda")
    cfg = dataclasses.replace(cfg, ratio=8.0, device_batch_size=16, model=dataclasses.replace(cfg.model, depth=depth))
    plan = make_plan(cfg, device_type="cuda", world_size=GPUS, compute_dtype=BF16)
    d, micro, B = dims(cfg.model), plan.grad_accum_steps, plan.device_batch_size
    L, C, F, V, T, ve = d.n_layer, d.d_model, d.d_ff, d.padded_vocab, d.seq_len, len(d.ve_layers)
    M, on_gpu, n = B * T, micro * B * T, L * micro
    stream, params = 2 * C * on_gpu, plan.params_total
    weights, tables = plan.params_scaling, plan.params["wte"] + plan.params["value_embeds"]

    def op(cost, name: str, shape: tuple[int, ...], form: str, direction: str, count: int) -> Row:
        flops, nbytes = cost(shape, BF16, form, direction == "backward")
        label = f"{name} ({form}), {direction}"
        key = Cost(name, form, direction, shape)
        return Row(label, "passes", "kernel pass", count * flops, count * nbytes, kernels=count, cost=key)

    heads = (B, T, d.n_head, d.n_kv_head, d.d_head)
    rows = linears("qkv, o", "products", M, [(C, C + 2 * d.d_kv), (C, C)], n, target)
    if target:
        rows += linears("MLP", "products", M, [(C, F), (F, C)], n, True)
    else:
        up, down, wgrad = (1, M, F, C), (1, M, C, F), (1, F, C, M)
        for direction, shapes in (("forward", [up, down]), ("backward", [up, down, wgrad, wgrad])):
            row = op(relu2_mlp_cost, "relu2_mlp", (M, C, F), "plain", direction, n)
            kept = {"op": row.op, "flops": row.flops, "nbytes": row.nbytes, "cost": row.cost}
            rows.append(dataclasses.replace(products("", "products", shapes, n), **kept))
    rows += linears("lm_head", "head", M, [(C, V)], micro, target)
    rows += attention(on_gpu, C, [mean_keys(w, [T]) for w in d.windows], micro, "" if target else "torch ")
    for form, calls in {"mix_fp8": 2 * n}.items() if target else {"mix": n, "add": n}.items():
        rows.append(op(rms_norm_cost, "rms_norm", (M, C), form, "forward", calls))
    for form in ("mix", "add"):
        rows.append(op(rms_norm_cost, "rms_norm", (M, C), form, "backward", n))
    for form, layers in (("plain", L - ve), ("value embeddings", ve)):
        for direction in ("forward", "backward"):
            rows.append(op(rope_qk_norm_cost, "rope_qk_norm", heads, form, direction, layers * micro))
    rows += [
        one_pass("gradient of x0 summed", "passes", 3 * L * stream, n),
        one_pass("embedding, smear, last norm", "passes", 24 * stream, 20 * micro),
        # all layers' rows are gathered at once; their gradients are joined again
        one_pass("value embeddings gathered, gradients joined", "tables", 4 * ve * stream, 2 * micro),
        table_gradients(tables, C * (1 + ve), M, micro, 0),
    ]
    if target:
        rows += [
            one_pass("attention output to fp8", "fp8 casts", 3 * L * C * on_gpu, n, "kernel pass"),
            # q, k, v: read, written, written transposed; every other operand comes from an epilogue or a norm
            one_pass("gradients to fp8 and transposed", "fp8 casts", 4 * 3 * L * C * on_gpu, n, "kernel pass"),
            one_pass("weights to fp8, once", "fp8 casts", 4 * weights, 4 * L, "kernel pass"),
            one_pass("softcap and cross-entropy, one kernel", "head", 3 * V * on_gpu, micro, "kernel pass"),
            # wgrad adds to the fp32 sum; tables' gradients are added by a pass; all are rounded once
            one_pass(
                "gradients summed", "weights", (micro - 1) * (8 * weights + 10 * tables), 4 * micro, "kernel pass"
            ),
            one_pass("gradients to bf16", "weights", 6 * params, 6 * L, "kernel pass"),
            collectives("reduce-scatter, all-gather in bf16, 30 % exposed", 2 * 2 * params, 2 * 4 * 7, exposed=0.3),
        ]
    else:
        chunks = micro * math.ceil(on_gpu / micro / chunk_rows(V, C, 2))
        rows += [
            one_pass("sum after the MLP, slices of gates", "passes", (3 * L + 2 * ve) * stream, n + 2 * ve * micro),
            # logits read and overwritten; dw in fp32 read and written by each chunk
            one_pass(
                "softcap, cross-entropy, sums of dw", "head", 4 * V * on_gpu + 8 * V * C * chunks, chunks, "kernel pass"
            ),
            # Gradients: banks joined, then cast or added to the fp32 sum; for communication rounded, joined, divided, copied
            one_pass("gradients summed", "weights", micro * (4 * weights + 10 * params) - 4 * params, 3 * n),
            one_pass("gradients to bf16, buckets, back", "weights", (6 + 4 + 4 + 4 + 6) * params, 6 * L),
            collectives("all-reduce of gradients in bf16", 2 * 2 * params, 2 * 44),
        ]
    ranks = GPUS if target else 1  # that share the optimizer; today each updates everything
    rows += optimizer(parameter_table(cfg.model), ranks)
    name = f"Redline d{depth}, " + ("target: fp8, sharded" if target else "today: bf16, replicated")
    return workload(name, rows, tokens=plan.total_batch_size, steps=plan.steps)


def optimizer(table: Table, ranks: int) -> list[Row]:
    """One update of every parameter, by the ops that core/optim.py calls, divided over ranks."""
    parts: dict[str, list[Row]] = {"polar_express": [], "muon_momentum": [], "muon_apply": [], "adam_update": []}

    def add(name: str, cost: Callable[..., tuple[int, int]], form: str, shape: tuple[int, ...], like: Row) -> None:
        flops, nbytes = cost(shape, BF16, form)
        key = Cost(name, form, "forward", shape)
        parts[name].append(dataclasses.replace(like, op=name, flops=flops, nbytes=nbytes, cost=key))

    for p in table:
        if p.group != MUON:
            form = "master" if p.mastered else "plain"
            add("adam_update", adam_update_cost, form, (p.numel,), one_pass("", "optimizer", 0, 1, "kernel pass"))
            continue
        for view in p.views:
            shape, form = view.stored(p.shape), "transposed" if view.transposed else "rows"
            add("polar_express", polar_express_cost, "plain", shape, newton_schulz(*shape, symmetric=True))
            for op, cost in (("muon_momentum", muon_momentum_cost), ("muon_apply", muon_apply_cost)):
                add(op, cost, form, shape, one_pass("", "optimizer", 0, 2, "kernel pass"))
    rows = []
    for part in parts.values():
        flops, nbytes, kernels = (sum(getattr(r, field) for r in part) for field in ("flops", "nbytes", "kernels"))
        share = {"flops": flops / ranks, "nbytes": nbytes / ranks, "kernels": math.ceil(kernels / ranks)}
        fit = flops / sum(r.flops / r.fit for r in part)
        # the largest stands for all where a measurement is looked up
        rows.append(dataclasses.replace(max(part, key=lambda r: r.nbytes), fit=fit, **share))
    return rows


# measurements -------------------------------------------------------------


def read_results(folder: Path = RESULTS) -> list[dict]:
    """The newest right result of each backend, case and direction on an H100 or H200 SXM, of all `<folder>/<device>/ops.jsonl`."""
    newest: dict[tuple, dict] = {}
    for file in sorted(folder.glob("*/ops.jsonl")):
        for line in filter(None, map(str.strip, file.read_text().splitlines())):
            r = json.loads(line)
            sxm = gpu_of(r) and not any(other in r["device"] for other in ("PCIe", "NVL"))
            if not sxm or r.get("error") or r["backend"] not in ("ref", "triton", "cuda") or r["dtype"] != "bfloat16":
                continue
            key = (r["device"], r["op"], r["form"], r["direction"], tuple(r["shape"]), r["backend"])
            if key not in newest or r["date"] >= newest[key]["date"]:
                newest[key] = r
    return list(newest.values())


def gpu_of(result: dict) -> str | None:
    return next((gpu for gpu in HBM if gpu in result["device"]), None)


def with_measurements(w: Workload, results: Sequence[dict]) -> Workload:
    """The workload with the efficiencies of the results at the nearest shape, an H100's before an H200's, of the fastest backend."""

    def measured(row: Row) -> Measured | None:
        c = row.cost
        same = [r for r in results if c and (r["op"], r["form"], r["direction"]) == (c.op, c.form, c.direction)]
        if not same:
            return None
        far = {id(r): sum(abs(math.log(a / b)) for a, b in zip(r["shape"], c.shape)) for r in same}
        best = min(same, key=lambda r: (far[id(r)], gpu_of(r), r["us"]))
        least = max(best["flops"] / FLOPS["bf16"], best["bytes"] / HBM[gpu_of(best)])
        return Measured(least / (1e-6 * best["us"]), f"{best['device']}, {best['commit']}")

    return dataclasses.replace(w, rows=tuple(dataclasses.replace(row, measured=measured(row)) for row in w.rows))


# output -------------------------------------------------------------------

GROUPS = (
    "products", "head", "attention", "passes", "fp8 casts", "weights", "tables", "optimizer", "communication", "host",
)  # fmt: skip


def by_group(w: Workload) -> dict[str, float]:
    return {group: sum(row.seconds() for row in w.rows if row.group == group) for group in GROUPS}


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def entry(row: Row) -> dict:
    """A row as it is printed: efficiency is the share of the nominal peak that bounds it."""
    seconds = row.seconds()
    efficiency = row.exposed * row.roofline() / seconds if row.kind else None
    basis = f"measured ({row.measured.source})" if row.measured else "assumed"
    work = {"op": row.op, "group": row.group, "tflop": row.flops / 1e12, "gb": row.nbytes / 1e9}
    return work | {"efficiency": efficiency, "ms": 1e3 * seconds, "basis": basis}


def as_dict(w: Workload) -> dict:
    checked = {"published_ms": 1e3 * w.published, "error": w.error()} if w.published else {}
    total = {"step_ms": 1e3 * w.seconds(), "steps": w.steps, "total_s": w.steps * w.seconds()}
    shares = {"groups_ms": {g: 1e3 * s for g, s in by_group(w).items()}, "rows": [entry(row) for row in w.rows]}
    return {"name": w.name, "tokens": w.tokens} | total | checked | shares


def table(w: Workload) -> list[str]:
    lines = ["| op | TFLOP | GB | efficiency | ms | basis |", "|---|--:|--:|--:|--:|---|"]
    for e in map(entry, w.rows):
        share = "" if e["efficiency"] is None else f"{100 * e['efficiency']:.0f} %"
        lines.append(f"| {e['op']} | {e['tflop']:.1f} | {e['gb']:.1f} | {share} | {e['ms']:.2f} | {e['basis']} |")
    flops, nbytes = sum(row.flops for row in w.rows), sum(row.nbytes for row in w.rows)
    return [*lines, f"| **sum** | {flops / 1e12:.1f} | {nbytes / 1e9:.1f} | | **{1e3 * w.seconds():.2f}** | |"]


def report(checked: Sequence[Workload], budgets: Sequence[Workload], rows: bool) -> str:
    """rows: those of the check as well."""
    lines = ["# Projection to 8 H100s", "", f"**{NOTE}** GPU: H100 SXM; one GPU, one optimizer step.", ""]
    lines += ["| class | efficiency | of T/s | source |", "|---|--:|--:|---|"]
    for name, c in CLASSES.items():
        lines.append(f"| {name} | {100 * c.efficiency:.0f} % | {c.peak / 1e12:.4g} | {c.source} |")
    fixed = f"{1e6 * LATENCY_S:.0f} us a collective, {1e6 * GAP_S:.1f} us between kernels, {1e3 * WAIT_S:.0f} ms a wait"
    lines += ["", f"Besides: {fixed} of the host. Laws of size: `product_fit`, `attention_fit`."]
    lines += ["", "## Check", "", "| run | published ms | predicted ms | error | predicted total | |"]
    lines.append("|---|--:|--:|--:|--:|---|")
    details = []
    for w in checked:
        published, predicted, error = (
            f"{1e3 * w.published:.1f}",
            f"{1e3 * w.seconds():.1f}",
            f"{100 * w.error():+.1f} %",
        )
        verdict = "" if abs(w.error()) <= TOLERANCE else f"**not within {100 * TOLERANCE:.0f} %**"
        total = f"{duration(w.steps * w.seconds())} ({w.steps} steps)"
        lines.append(f"| {w.name} | {published} | {predicted} | {error} | {total} | {verdict} |")
        details += [
            "",
            f"### {w.name}: published {published} ms, predicted {predicted} ms, error {error}",
            "",
            *table(w),
        ]
    lines += [*(details if rows else ()), "", "## Budget"]
    for w in budgets:
        step, updates = w.seconds(), by_group(w)["optimizer"]
        lines += ["", f"### {w.name}: {w.tokens} tokens a step", "", *table(w), ""]
        lines += [f"Predicted: {1e3 * step:.0f} ms a step, {duration(w.steps * step)} for {w.steps} steps."]
        lines += [f"The optimizer is {1e3 * updates:.1f} ms of a step, {100 * updates / step:.1f} %."]
    return "\n".join(lines)


def plot(workloads: Sequence[Workload], path: Path) -> None:
    """A bar a workload, its step in groups of ops; lines are published times. Steps under 200 ms have an axis of their own."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sides = [[w for w in workloads if (w.seconds() < 0.2) == small] for small in (True, False)]
    widths = [len(side) for side in sides]
    figure, axes = plt.subplots(1, 2, figsize=(13, 6.5), width_ratios=widths, layout="constrained")
    for axis, side in zip(axes, sides):
        bottom = [0.0] * len(side)
        for i, group in enumerate(GROUPS):
            heights = [1e3 * by_group(w)[group] for w in side]
            axis.bar(range(len(side)), heights, bottom=bottom, width=0.7, color=f"C{i}", label=group)
            bottom = [a + b for a, b in zip(bottom, heights)]
        for x, top in enumerate(bottom):
            axis.text(x, top, f"{top:.0f}", ha="center", va="bottom")
        known = {x: 1e3 * w.published for x, w in enumerate(side) if w.published}
        axis.hlines(
            known.values(), [x - 0.45 for x in known], [x + 0.45 for x in known], "black", "--", label="published"
        )
        axis.set_xticks(range(len(side)), [w.name.replace(": ", "\n").replace(", ", "\n") for w in side], fontsize=9)
        axis.set_ylabel("ms a step")
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper")
    figure.suptitle("Predicted, not measured: a training step on 8 H100s by groups of ops")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.projection", description=NOTE)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write a bar chart")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--rows", action="store_true", help="print the check op by op, too")
    parser.add_argument("--depth", type=int, default=24, help="of Redline's budget")
    options = parser.parse_args(args)
    checked, results = checks(), read_results()
    budgets = [with_measurements(redline(options.depth, target), results) for target in (False, True)]
    if options.plot:
        plot([*checked, *budgets], options.plot)
    if options.json:
        classes = {name: dataclasses.asdict(c) for name, c in CLASSES.items()}
        parts = {"checks": [as_dict(w) for w in checked], "budgets": [as_dict(w) for w in budgets]}
        print(json.dumps({"note": NOTE, "tolerance": TOLERANCE, "classes": classes} | parts))
    else:
        print(report(checked, budgets, options.rows))


if __name__ == "__main__":
    with one_sentence():
        main()
