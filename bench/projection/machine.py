"""The machine model: classes of work with their efficiencies, how these depend on shape, and the rows of a step.

A row takes the longer of its arithmetic and its memory traffic, each at the nominal peak times the efficiency of its
class. Units are seconds, FLOP and bytes of one GPU and one optimizer step.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from kernels.polar_express import COEFFICIENTS, polar_express_cost

TOLERANCE = 0.15  # of published times that predicted ones are checked against
GPUS = 8
SMS = 132
BF16 = torch.bfloat16
FLOPS = {"bf16": 989e12, "fp8": 1979e12}  # dense tensor-core peaks of an H100 or H200 SXM
FP32_FLOPS = 67e12  # in CUDA cores
HBM = {"H100": 3.35e12, "H200": 4.8e12}
NVLINK = 450e9  # one direction of one GPU
INFINIBAND = 50e9  # 400 Gb/s: one direction of one GPU's adapter


@dataclass(frozen=True)
class Class:
    """One kind of work: its nominal peak (FLOP/s or bytes/s), the share that is reached, and that share's source."""

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
    "own attention forward": Class(BF16_PEAK, 0.40, "Triton 395 TFLOP/s (FA3's paper); `attention_fit`"),
    "own attention backward": Class(BF16_PEAK, 0.37, "FA3's value by 74 / 142 ms, FA3 to FA2 (anemoi): assumption"),
    # inductor's: norms 58-69 % (QuACK's figure), transposing copies 64-68 % (modded-nanogpt#240), sum and norm 95 %
    # (quack#55)
    "compiled pass": Class(H100_BYTES, 0.77, "inductor 58-95 % (QuACK, modded-nanogpt#240, quack#55)"),
    # norms 77-90 % (QuACK), casts 84-91 % (torchao), transposes 83 % (modded-nanogpt#240)
    "kernel pass": Class(H100_BYTES, 0.85, "hand-written 77-91 % (QuACK, torchao, modded-nanogpt#240)"),
    "collective": Class(NVLINK, 0.78, "bus bandwidth 350 GB/s: assumption, NCCL's usual figure for large messages"),
    "between nodes": Class(INFINIBAND, 0.90, "45 GB/s of 400 Gb/s InfiniBand: assumption, NCCL's usual figure"),
}  # fmt: skip
LATENCY_S = 25e-6  # a collective of nothing: NCCL's floor for an all-to-all (Dion3 app. D)
INSIDE_S = 10e-6  # the same of a small reduce-scatter or all-gather within a node; assumption
COLLECTIVE_SMS = 16  # that NCCL's kernels hold while they move data; assumption, of its default channels
# between a kernel's end and the next one's full speed; assumption, below the 3.5 us it takes to launch one (quack)
GAP_S = 1.5e-6
WAIT_S = 1e-3  # a host that waits for the GPU each step and then has to fill its queue again; assumption

TILE = (128, 256)
# of K; nanochat's MLP microbenchmark against large products says 100 to 230, DeepGEMM at K 1.5k against 16k 400 to 500
TILE_START_BYTES = 256
ATTENTION_START = {"forward": 400, "backward": 1260}  # keys; they give FA3's published figures for S 2k-8k to 5 %


Shape = tuple[int, int, int, int]  # batch, M, N, K of a product (M, K) x (K, N)


def product_fit(batch: int, M: int, N: int, K: int, itemsize: int) -> float:
    """Share of a class's efficiency that a product keeps.

    Tiles come in whole waves, and each costs a start and a store besides K. K may be split to fill the multiprocessors,
    in at most 8.
    """

    def share(split: int) -> float:
        tiles = split * batch * math.ceil(M / TILE[0]) * math.ceil(N / TILE[1])
        length = K / split * itemsize
        return tiles / (SMS * math.ceil(tiles / SMS)) * length / (length + TILE_START_BYTES)

    return max(share(split) for split in (1, 2, 4, 8))


def attention_fit(keys: float, direction: str) -> float:
    """Share that a mean of `keys` visible keys per query leaves; the rest is work per query and half-masked tiles."""
    return keys / (keys + ATTENTION_START[direction])


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


def attention(tokens: int, width: int, keys: Sequence[float], calls: int) -> list[Row]:
    """FlashAttention 3, both directions, over layers with these mean numbers of visible keys; masked pairs count
    nothing. Backward is 2.5 forwards."""
    rows = []
    for direction, factor, kernels in (("forward", 4, 1), ("backward", 10, 3)):
        each = [factor * width * k * tokens for k in keys]
        fit = sum(each) / sum(f / attention_fit(k, direction) for f, k in zip(each, keys))
        nbytes = len(keys) * tokens * width * 2 * (4 if direction == "forward" else 8)
        name, kind, calls_made = f"attention, {direction}", f"attention {direction}", calls * len(keys)
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
    """Dense gradients of lookup tables as inductor makes them.

    fp32 zeros, rows added, cast to bf16, and added to those of `added` earlier micro-steps.
    """
    nbytes = micro * (10 * elements + 10 * width * tokens) + added * 6 * elements
    return one_pass("gradients of lookup tables", "tables", nbytes, 4 * micro + added)


class Links:
    """The links of one GPU: reduce-scatters and all-gathers, one after the other on each."""

    def __init__(self, gpus: int) -> None:
        self.local, self.nodes = min(gpus, GPUS), max(1, gpus // GPUS)
        self._free = {"inside": 0.0, "between": 0.0}
        self.busy = 0.0  # seconds in which a kernel of a collective runs

    def _send(self, link: str, ready: float, nbytes: float, ranks: int) -> float:
        if ranks == 1:
            return ready
        c, latency = (CLASSES["collective"], INSIDE_S) if link == "inside" else (CLASSES["between nodes"], LATENCY_S)
        took = latency + nbytes * (ranks - 1) / ranks / (c.peak * c.efficiency)
        self._free[link] = max(ready, self._free[link]) + took
        self.busy += took
        return self._free[link]

    def reduce(self, ready: float, nbytes: float) -> float:
        """When the sum of `nbytes` is with its owners."""
        at = self._send("inside", ready, nbytes, self.local)
        return self._send("between", at, nbytes / self.local, self.nodes)

    def gather(self, ready: float, nbytes: float) -> float:
        """When every rank has what the owners have."""
        at = self._send("between", ready, nbytes / self.local, self.nodes)
        return self._send("inside", at, nbytes, self.local)
