"""A step of the race to 3.28: one description for the peers' designs and ours, and what each of its parts takes.

A `Design` is the whole configuration that costs time: layers, stages, tables, what is fp8, what is exchanged when. Its
step is that of `machine`: classes of work with the efficiencies that the check of nanochat's steps has. Only what that
check never meets has constants of its own, below, each with a source.

Widths    C 768, 6 heads, V 50,304; T: tokens of one rank in one step
Left out  targets of a token: one more costs less than 0.1 % [modded-nanogpt#337]; documents but for their lengths
Streams   a pass over the residual stream's tensors is counted in tensors of T x C in bf16
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from bench.projection.machine import (
    COLLECTIVE_SMS,
    GPUS,
    LATENCY_S,
    SMS,
    Links,
    Row,
    Workload,
    attention,
    linears,
    mean_keys,
    newton_schulz,
    one_pass,
    products,
    table_gradients,
    workload,
)  # fmt: skip
from kernels.lm_head_loss import chunk_rows
from kernels.polar_express import COEFFICIENTS

C, HEADS, V = 768, 6, 50304
PARTS = (
    "attention", "MLP", "projections", "head and loss", "lookup tables", "gates and elementwise", "optimizer",
    "communication", "host",
)  # fmt: skip
# what the host adds to a kernel that it launches itself, where a graph's replay does not: without its graphs of
# forward and backward record 92 takes 2.99 s more, without those of the optimizer 0.84 s [its ablation], over 1194
# steps of some 560 kernels as counted here
EAGER_S = 5.7e-6
DISTINCT = 11_000  # tokens among 49,152 [record 92's sampled softmax: "about 11 k distinct targets"]
# n-grams among 98,304 tokens: 80 % of 251,520 rows stay untouched [modded-nanogpt#221], by R (1 - exp(-n / R))
DISTINCT_BIGRAMS = 56_000
TRIGRAMS = 1.4  # distinct ones for each distinct bigram; assumption
# exponents with which distinct ones grow with the text: tokens by the least and most candidates that 92's draws leave,
# 10,240 / 1.61 among 16,384 against DISTINCT; bigrams by an assumption
GROWTH, BIGRAM_GROWTH = 0.5, 0.8


# description


@dataclass(frozen=True)
class Layer:
    """One with attention. paired: two heads' rows make one sequence, the window in rows."""

    paired: bool = False
    long: bool = False  # the stage's long window; keys are offset
    d_qk: int = 128
    d_v: int = 128
    value: bool = False  # adds value embeddings
    xsa: bool = False
    gate: bool = False  # of its output
    local: int = 0  # keys of a second, local softmax (DC-MHA)


@dataclass(frozen=True)
class Stage:
    name: str
    steps: float  # fewer by a share of a run are no whole number
    tokens: int  # T
    cap: int  # of a document for attention
    short: int  # windows in keys
    long: int
    tied: bool = True  # the embedding is the head's
    candidates: int = V  # of the softmax
    every: int = 2  # steps from one update of lookup tables to the next
    published: float | None = None  # seconds of a step


@dataclass(frozen=True)
class Bank:
    """Muon's matrices of one shape, padding included."""

    name: str
    count: int
    rows: int
    cols: int

    @property
    def elements(self) -> int:
        return self.count * self.rows * self.cols


@dataclass(frozen=True)
class Table:
    """A lookup table besides the embedding. sparse: gradients of touched rows alone are sent. pulled: so are weights,
    of the rows that the next cycle reads; rows_adam: and only touched rows are updated."""

    name: str
    rows: int
    lookups: int = 1  # of a token
    ngram: bool = False  # rows are hashes of n-grams; otherwise tokens, in each of `lookups` planes
    sparse: bool = False
    pulled: bool = False
    rows_adam: bool = False

    @property
    def elements(self) -> int:
        return self.rows * C


@dataclass(frozen=True)
class Design:
    """fp8: of "head", "logits" (which leave the product in e4m3), "qkv", "o", "MLP up", "MLP down", "MLP backward".
    fused: fp8 leaves the kernel that makes a number, in both layouts; otherwise a pass casts it."""

    name: str
    source: str
    stages: tuple[Stage, ...]
    layers: tuple[Layer, ...]
    mlps: int
    mixes: int  # tensors added to the residual stream besides x and y, over all layers: x0, n-gram, skip
    mixed: int  # sources of the mix after the last layer (MUDD)
    banks: tuple[Bank, ...]
    tables: tuple[Table, ...]
    fp8: frozenset[str]
    d_ff: int = 3072
    fused: bool = False
    chunks: bool = False  # of the head: logits of a part of the rows at a time, its gradient summed in fp32
    iterations: int = 5
    update_bytes: float = 80  # of an element of Muon's state and weight in one update, besides its products
    graphs: bool = False
    early: int = 0  # parts in which matrices' gradients leave under backward; 0: after it
    late: bool = False  # weights are awaited where the next forward reads them, otherwise at the end of the step
    sums: bool = False  # gradients are made in fp32 sums and rounded for the wire
    kernels: str = ""  # "own ": attention by our kernels
    passes: str = "compiled pass"  # class of those over the residual stream
    besides_s: float = 0.0  # of a run, outside of its steps
    published: float | None = None  # seconds of a run


# text


@functools.cache
def documents(cap: int) -> tuple[float, ...]:
    """Lengths of FineWeb's documents in tokens, cut at `cap`: quantiles of the lognormal with their median and mean."""
    median, mean = 403, 690
    normal = NormalDist(math.log(median), math.sqrt(2 * math.log(mean / median)))
    return tuple(min(cap, math.exp(normal.inv_cdf((i + 0.5) / 512))) for i in range(512))


def distinct_tokens(tokens: float) -> float:
    return min(V, tokens, DISTINCT * (tokens / 49152) ** GROWTH)


def distinct_rows(table: Table, tokens: float) -> float:
    """Rows that one rank's `tokens` touch."""
    if not table.ngram:
        return table.lookups * distinct_tokens(tokens)
    bigrams = min(tokens, DISTINCT_BIGRAMS * (tokens / 98304) ** BIGRAM_GROWTH)
    ngrams = bigrams * (1 + TRIGRAMS * (table.lookups - 1))
    return table.rows * -math.expm1(-ngrams / table.rows)


# forward and backward


def compute(d: Design, s: Stage) -> list[Row]:
    T, stream = s.tokens, 2 * C * s.tokens
    rows = [*projections(d, T), *mlp(d, T), *head(d, s), *attentions(d, s)]
    wide = sum(layer.d_qk for layer in d.layers) / 128
    long, value = (sum(getattr(layer, field) for layer in d.layers) for field in ("long", "value"))
    gated = sum((8 * layer.xsa + 6 * layer.gate) * layer.d_v / 128 for layer in d.layers)
    n = len(d.layers)
    # tensors forward and backward: a mix with its norm 4 + 6, twice in a layer; each source 1 + 3
    mixes = 10 * (n + d.mlps) + 4 * d.mixes
    # q, k 4 + 6, a key offset 4 unless fused; value embeddings 7
    rope = 10 * wide + 4 * long * (not d.fused) + 7 * value
    # the nets of the last layer 24, after it 28 and each source 4; gates 4; embedding, smear, n-grams 13 + 20, value
    # embeddings 10
    rest = 24 + 28 + 4 * d.mixed + 4 + 13 + 20 + 10
    counted = (
        ("norms and mixes", mixes, 3 * (n + d.mlps)),
        ("rope, QK-norm, value embeddings", rope, 4 * n),
        ("XSA, output gates", gated, 3 * sum(x.xsa + x.gate for x in d.layers)),
        ("MUDD, gate nets, input", rest, 90),
    )
    rows += [one_pass(op, "gates and elementwise", tensors * stream, k, d.passes) for op, tensors, k in counted]
    return [*rows, *lookups(d, s)]


def projections(d: Design, T: int) -> list[Row]:
    part, rows = "projections", []
    for (qkv, out), n in Counter((HEADS * (2 * x.d_qk + x.d_v), HEADS * x.d_v) for x in d.layers).items():
        rows += linears(f"qkv of {qkv}", part, T, [(C, qkv)], n, "qkv" in d.fp8)
        rows += linears(f"o of {out}", part, T, [(out, C)], n, "o" in d.fp8)
    n, weights = len(d.layers), sum(C * HEADS * 2 * (x.d_qk + x.d_v) for x in d.layers)
    if "qkv" not in d.fp8:  # banks joined, gradients split
        return [*rows, one_pass("banks of weights", part, 8 * weights, 15)]
    # the norm writes fp8, copied transposed; its gradient comes so out of rope's. Weights once a step: read for their
    # largest sizes, then for both copies
    inputs = (0.5 + 1) * 2 * C * T * n
    rows.append(one_pass("fp8 of inputs of qkv", part, inputs, n, "kernel pass"))
    return [*rows, one_pass("fp8 of weights of qkv", part, 6 * weights, 4, "kernel pass")]


def mlp(d: Design, T: int) -> list[Row]:
    part, F, n, stream = "MLP", d.d_ff, d.mlps, 2 * C * T
    up, down, wgrad = (1, T, F, C), (1, T, C, F), (1, F, C, T)

    def kind(site: str) -> str:
        return "fp8 product" if site in d.fp8 else "bf16 product"

    rows = [
        products("MLP up, forward", part, [up], n, kind("MLP up")),
        products("MLP down, forward", part, [down], n, kind("MLP down")),
        products("MLP, dgrad", part, [up, down], n, kind("MLP backward")),
        products("MLP, wgrad", part, [wgrad, wgrad], n, kind("MLP backward")),
    ]
    weights = n * 2 * F * C
    # inputs: largest sizes and casts in passes of their own, 2.5 tensors; or by the norm, and copied transposed, 1.5.
    # Of gradients, where they are fp8, the like
    if "MLP up" in d.fp8:
        rows.append(one_pass("fp8 of inputs", part, (1.5 if d.fused else 2.5) * n * stream, 3 * n))
    if "MLP backward" in d.fp8:
        rows.append(one_pass("fp8 of gradients", part, (1.5 if d.fused else 2) * n * stream, n, "kernel pass"))
    # weights once a step: read, written in both layouts; without backward, one each
    layouts = 4 if "MLP backward" in d.fp8 else 2.5 + 1.5 * ("MLP down" in d.fp8)
    return [*rows, one_pass("fp8 of weights", part, layouts * weights, 15)]


def head(d: Design, s: Stage) -> list[Row]:
    part, T, P = "head and loss", s.tokens, s.candidates
    fp8 = "head" in d.fp8
    rows = linears("lm_head", part, T, [(C, P)], 1, fp8)
    chunks = math.ceil(T / chunk_rows(T, P, C, 4)) if d.chunks else 1
    rows = [dataclasses.replace(row, kernels=chunks * row.kernels) for row in rows]
    read = 1 if "logits" in d.fp8 else 2
    # logits read; e5m2 gradients written, copied transposed with the input
    rows.append(one_pass("softcap and cross-entropy, one kernel", part, (read + 1) * P * T, chunks, "kernel pass"))
    if fp8:
        rows.append(one_pass("fp8 transposes", part, 2 * (P + C) * T, 2 * chunks, "kernel pass"))
        # the input; the weight in each step, or where it is kept only after its update
        weight = 4 / 2 if d.fused else 3
        rows.append(one_pass("fp8 of lm_head", part, 3 * C * T + weight * C * V, 4))
    if d.chunks:  # the sum of the weight's gradient
        rows.append(one_pass("gradient over chunks", part, 8 * C * V * (chunks - 1) + 6 * C * V, chunks, "kernel pass"))
    if P < V:  # both layouts of candidates out of the kept copy; their gradients among zeros; three small copies
        rows.append(one_pass("candidates", part, 4 * P * C + 2 * (P + V) * C, 6, "kernel pass"))
    return rows


def attentions(d: Design, s: Stage) -> list[Row]:
    lengths, found = documents(s.cap), []
    for layer, n in Counter(dataclasses.replace(x, value=False, xsa=False, gate=False) for x in d.layers).items():
        window = s.long if layer.long else s.short
        keys = mean_keys(window, [2 * x for x in lengths] if layer.paired else lengths)
        found.append((f"{layer.d_qk}/{layer.d_v}", layer.d_qk, layer.d_v, keys, n))
        if layer.local:
            found.append(("local", layer.d_qk, layer.d_v, float(layer.local), n))
    rows = []
    for name, qk, v, keys, n in found:
        for row in attention(s.tokens, HEADS * (qk + v) // 2, [keys] * n, 1):
            backward = row.op.endswith("backward")  # of its five products, three are as wide as q and k
            flops = row.flops * (2 * (3 * qk + 2 * v) / (5 * (qk + v)) if backward else 1)
            op = f"attention of {name}, {keys:.0f} keys, {'backward' if backward else 'forward'}"
            rows.append(dataclasses.replace(row, op=op, kind=d.kernels + row.kind, flops=flops))
    return rows


def lookups(d: Design, s: Stage) -> list[Row]:
    """Gradients of tables; what is read and added for the stream is among the passes."""
    part, T = "lookup tables", s.tokens
    rows: list[Row] = []
    whole = [t for t in d.tables if not (t.pulled or t.rows_adam)]
    dense = V * C + sum(t.elements for t in whole)
    width = C * (1 + sum(t.lookups for t in whole))
    if d.sums:
        # added to fp32 sums of a cycle, which zeros begin and a rounding ends
        rows.append(one_pass("rows added to sums", part, (2 + 8) * width * T, 4 * (1 + len(whole)), "kernel pass"))
        rows.append(one_pass("zeros, sums rounded", part, (4 + 6) * dense / s.every, 8, "kernel pass"))
    else:
        rows.append(dataclasses.replace(table_gradients(dense, width, T, 1, 0.5), group=part))
    for t in d.tables:
        if t in whole:
            continue
        # rows are added in 16 bits to a buffer of touched rows, or of the table, which zeros begin
        cells = distinct_rows(t, s.every * T) * C if t.rows_adam else t.elements
        rows.append(
            one_pass(f"{t.name}: rows added", part, 6 * t.lookups * C * T + 2 * cells / s.every, 3, "kernel pass")
        )
    return rows


# optimizer and communication


@dataclass(frozen=True)
class Piece:
    """What is reduced, updated and gathered as one: bytes of a rank in and out, its owner's update, and in which share
    of steps."""

    name: str
    down: float
    up: float
    rows: tuple[Row, ...]
    share: float = 1.0
    pulled: bool = False  # ids and counts travel besides


def pieces(d: Design, s: Stage) -> list[Piece]:
    """In the order in which they are updated."""
    found = []
    for t in d.tables:
        touched = distinct_rows(t, s.every * s.tokens)
        adam = one_pass(f"AdamW of {t.name}", "optimizer", 22 * t.elements / GPUS, 30)
        rows = [adam]
        if t.sparse or t.pulled:  # packed, and added where they belong
            rows.append(one_pass(f"rows of {t.name}", "optimizer", (4 + 8) * touched * C, 8, "kernel pass"))
        if t.rows_adam:  # one moment a row; what all ranks touch: of theirs, half are others' as well
            rows[0] = one_pass(f"AdamW of {t.name}", "optimizer", 8 * touched * C, 4, "kernel pass")
        if t.pulled:
            rows.append(one_pass(f"rows of {t.name} served", "optimizer", 8 * touched * C, 4, "kernel pass"))
        down = 2 * C * touched if t.sparse or t.pulled else 2 * t.elements
        up = 2 * C * touched if t.pulled else 2 * t.elements
        found.append(Piece(t.name, down, up, tuple(rows), 1 / s.every, t.sparse or t.pulled))
    tied = one_pass("tied head", "optimizer", (6 + 4) * C * V * s.tied, 1, "kernel pass")
    for name in ("lm_head",) if s.tied else ("lm_head", "embedding"):
        adam = one_pass(f"AdamW of {name}", "optimizer", 22 * C * V / GPUS, 30)
        found.append(Piece(name, 2 * C * V, 2 * C * V, (adam, tied) if s.tied else (adam,), 1 / 2))
    for b in d.banks:
        count = math.ceil(b.count / GPUS)
        product = newton_schulz(count, b.rows, b.cols, symmetric=True)
        times = d.iterations / len(COEFFICIENTS)
        product = dataclasses.replace(
            product,
            op=f"Polar Express of {b.name}",
            flops=times * product.flops,
            kernels=round(times * product.kernels),
        )
        moved = d.update_bytes * count * b.rows * b.cols
        besides = one_pass(f"Muon of {b.name}, besides", "optimizer", moved, 20)
        rows = [product, besides]
        if d.sums:
            rows.append(one_pass(f"sums of {b.name} rounded", "optimizer", (4 + 6) * b.elements, 2, "kernel pass"))
        found.append(Piece(b.name, 2 * b.elements, 2 * b.elements, tuple(rows)))
    small = one_pass("small parameters", "optimizer", 0, 20 if d.fused else 60)
    return [Piece("small", 2e6, 0, (small,)), *found]


def exposed(d: Design, found: Sequence[Piece], backward: float, forward: float) -> tuple[float, float]:
    """Seconds that the step waits for its links, and those in which they are busy besides. Time 0 is backward's start.

    Banks leave first, then tables, the order of the peers' and of ours. Updates go in the order of `found`, or where
    gradients leave early, with the banks first; each waits for its gradient and sends its weight.
    """
    links, arrived = Links(GPUS), {}
    banks = [p for p in found if p.name in {b.name for b in d.banks}]
    others = [p for p in found if p not in banks]
    for part in range(d.early):
        for p in banks:
            arrived[p.name] = links.reduce(backward * (part + 1) / d.early, p.down / d.early)
    for p in (*(() if d.early else banks), *others):
        arrived[p.name] = links.reduce(backward + 2 * LATENCY_S * p.pulled, p.down)
    now = ends = backward
    for p in (*banks, *others) if d.early else found:
        now = max(now, arrived[p.name]) + sum(row.seconds() for row in p.rows)
        ends = max(ends, links.gather(now, p.up)) if p.up else ends
    work = backward + sum(row.seconds() for p in found for row in p.rows)
    # a weight that is awaited late hides under the layers before its own, on average half of them
    waits = max(now, ends - forward / 2 if d.late else ends) - work
    return waits, max(0.0, links.busy - waits)


def step(d: Design, s: Stage) -> Workload:
    """One step of a stage, the mean of those that update tables and those that do not."""
    rows, found = compute(d, s), pieces(d, s)
    work = sum(row.seconds() for row in rows)
    rows += [scaled(row, p.share) for p in found for row in p.rows]
    waits = beside = before = 0.0
    shares = sorted({p.share for p in found})
    for share in shares:  # the rarest step has all pieces
        w, b = exposed(d, [p for p in found if p.share >= share], work * 2 / 3, work / 3)
        waits, beside, before = waits + (share - before) * w, beside + (share - before) * b, share
    rows.append(Row("links that the step waits for", "communication", fixed=waits))
    rows.append(Row("multiprocessors of collectives", "communication", fixed=beside * COLLECTIVE_SMS / SMS))
    launches = sum(row.kernels for row in rows)
    if not d.graphs:
        rows.append(Row(f"{launches} launches by the host", "host", fixed=launches * EAGER_S))
    return workload(f"{d.name}: {s.name}", rows, tokens=s.tokens * GPUS, steps=s.steps, published=s.published)


def scaled(row: Row, share: float) -> Row:
    """What a row takes on the average of steps of which it is in this share."""
    return dataclasses.replace(
        row, flops=share * row.flops, nbytes=share * row.nbytes, kernels=round(share * row.kernels)
    )


def run_seconds(d: Design) -> float:
    return d.besides_s + sum(s.steps * step(d, s).seconds() for s in d.stages)


def parts(d: Design) -> dict[str, float]:
    """Seconds of a run by part, the largest first."""
    found = dict.fromkeys(PARTS, 0.0)
    for s in d.stages:
        for row in step(d, s).rows:
            found[row.group] += s.steps * row.seconds()
    return dict(sorted(found.items(), key=lambda item: -item[1]))


# lookup tables alone


@dataclass(frozen=True)
class Exchange:
    """Seconds a step of what passes between ranks for one table, nothing hidden, passes over its rows included."""

    rows: float  # that one rank touches in a cycle
    dense: float
    gradients: float  # of touched rows alone; weights whole
    both: float  # gradients and weights of touched rows alone

    def in_ms(self) -> dict[str, float]:
        return {name: 1e3 * getattr(self, name) for name in ("dense", "gradients", "both")} | {"rows": self.rows}


def exchange(t: Table, tokens: int, every: int = 2) -> Exchange:
    """A table that is updated every `every` steps, with `tokens` of a rank in each."""
    touched = distinct_rows(t, every * tokens)

    def seconds(sparse: bool, pulled: bool) -> float:
        links, now = Links(GPUS), 0.0
        if sparse:  # counts, then ids, in messages of their own
            now = LATENCY_S + links.reduce(LATENCY_S, 4 * touched)
        now = links.reduce(now, 2 * C * touched if sparse else 2 * t.elements)
        now = links.gather(now, 2 * C * touched if pulled else 2 * t.elements)
        # packed, and added where they belong; weights packed and put in place
        moved = (4 + 8) * touched * C * sparse + 8 * touched * C * pulled
        return now + one_pass("", "", moved, 0, "kernel pass").seconds()

    return Exchange(touched, *(seconds(*how) / every for how in ((False, False), (True, False), (True, True))))
