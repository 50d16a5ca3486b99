"""What a token costs on 1 to many GPUs in nodes of 8, with the sharded optimizer: `--gpus 1,8,16,64`.

Gradients leave in bf16, a bank of layers at a time, during the backward pass of the last micro-step: reduced inside of
each node, then between nodes among ranks of one local index, so that an adapter carries 1/8 of the bytes. Each rank
updates the matrices and rows dealt to it, and the new weights go back, between nodes first; what the rest
of the update and the next forward pass hide of that costs nothing. A bank is awaited where it is used.

The step is laid out on three lanes: computing, the links inside of a node, the adapter. What the first waits for the
others is "exposed". Not in it: stragglers, contention in the network's switches, restarts.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.projection.machine import (
    BF16,
    CLASSES,
    COLLECTIVE_SMS,
    FLOPS,
    GPUS,
    INSIDE_S,
    LATENCY_S,
    SMS,
    Links,
    Row,
    Workload,
    newton_schulz,
    one_pass,
    workload,
)  # fmt: skip
from bench.projection.redline import compute, planned, read_models, read_results, with_measurements
from bench.projection.report import NOTE, by_group
from core.models.gpt2 import parameter_table
from core.params import MUON, Arena, Table, arenas
from core.plan import Plan
from core.sharding import deal
from kernels.adam_update import adam_update_cost
from kernels.muon_update import muon_apply_cost, muon_momentum_cost

GOAL = 0.10  # more per token than on one node


# who updates what


Matrix = tuple[int, int, str]  # rows, columns, and whether momentum is taken as rows or transposed


def matrices(parts: Iterable[Arena]) -> Counter[Matrix]:
    """Muon's, of arenas or of parts of them."""
    found: Counter[Matrix] = Counter()
    for arena in parts:
        for view in arena.views:
            _, rows, cols = view.stored(arena.shape)
            for run, turn in arena.turned():
                found[rows, cols, "transposed" if turn.transposed else "rows"] += run.stop - run.start
    return found


def update_of(dealt: Counter[Matrix]) -> list[Row]:
    """Muon's update of these matrices, those of one shape together."""
    rows = []
    for (r, c, form), n in dealt.items():
        rows += [
            newton_schulz(n, r, c, symmetric=True),
            one_pass("momentum", "optimizer", muon_momentum_cost((n, r, c), BF16, form)[1], 3, "kernel pass"),
            one_pass("apply", "optimizer", muon_apply_cost((n, r, c), BF16, "rows")[1], 3, "kernel pass"),
        ]
    return rows


def seconds(rows: Sequence[Row]) -> float:
    return sum(row.seconds() for row in rows)


def dealt(table: Table, ranks: int) -> Counter[Matrix]:
    """What the rank with the most work on matrices updates."""
    dealing = deal(table, ranks)
    place = max(range(ranks), key=dealing.flops.__getitem__)
    return matrices(dealing.own(arena, place) for arena in arenas(table))


# what is sent when


@dataclass(frozen=True)
class Sizes:
    """Bytes in bf16 of what is sent as one."""

    banks: tuple[float, ...]  # of layers, the first ones first
    values: tuple[float, ...]  # tables of value embeddings, by bank
    embedding: float
    head: float
    small: float

    @staticmethod
    def of(table: Table) -> "Sizes":
        banks: dict[int, float] = {}
        rest = {"wte": 0.0, "value_embeds": 0.0, "lm_head": 0.0, "small": 0.0}
        for p in table:
            kind, _, number = p.name.partition(".")
            if p.group == MUON and number:
                banks[int(number)] = banks.get(int(number), 0.0) + 2 * p.numel
            else:
                rest[kind if kind in rest else "small"] += 2 * p.numel
        n = len(banks)
        values = tuple(rest["value_embeds"] / n for _ in range(n))
        return Sizes(tuple(banks[i] for i in sorted(banks)), values, rest["wte"], rest["lm_head"], rest["small"])


@dataclass(frozen=True)
class Pace:
    """Seconds of computing."""

    forward: float  # of one micro-step's layers
    backward: float
    tables: float  # of one micro-step's backward through the tables
    muon: float
    adam: float


@dataclass(frozen=True)
class Design:
    """What the sharded optimizer might do besides, each of which takes something off what is exposed."""

    early_tables: bool = False  # gradients of value embeddings leave with the bank of their layers, not at the end
    in_order: bool = False  # tables are updated before matrices, and weights go back in the order of their use
    no_sums: bool = False  # where a step has one micro-step, gradients are made in bf16, without fp32 sums


def exposed(sizes: Sizes, pace: Pace, gpus: int, design: Design = Design()) -> tuple[float, float]:  # noqa: B008
    """Seconds that computing waits for communication, and those that collectives run besides it. Time 0 is the end of
    the head's backward in the last micro-step."""
    if gpus == 1:
        return 0.0, 0.0
    links, n = Links(gpus), len(sizes.banks)
    # gradients
    head = links.reduce(0.0, sizes.head)
    banks = values = 0.0
    for i in reversed(range(n)):  # backward comes to the last layers first
        ready = pace.backward * (n - i) / n
        banks = links.reduce(ready, sizes.banks[i])
        if design.early_tables:
            values = links.reduce(ready, sizes.values[i])
    ends = pace.backward + pace.tables
    tables = max(links.reduce(ends, sizes.small), links.reduce(ends, sizes.embedding), head)
    if not design.early_tables:
        values = max(links.reduce(ends, nbytes) for nbytes in sizes.values)
    # updates, and weights in the order in which they are queued
    if design.in_order:
        adam = max(ends, tables, values) + pace.adam
        muon = max(adam, banks) + pace.muon
        first = links.gather(adam, sizes.small + sizes.embedding)
        pairs = [
            (links.gather(muon, bank), links.gather(muon, table)) for bank, table in zip(sizes.banks, sizes.values)
        ]
    else:
        muon = max(ends, banks) + pace.muon
        weights = [links.gather(muon, nbytes) for nbytes in sizes.banks]
        adam = max(muon, tables, values) + pace.adam
        first = links.gather(adam, sizes.small + sizes.embedding)
        pairs = list(zip(weights, [links.gather(adam, nbytes) for nbytes in sizes.values]))
    last = links.gather(adam, sizes.head)
    # the next step's first forward pass
    now = max(adam, muon, first)
    for arrived in pairs:
        now = max(now, *arrived) + pace.forward / n
    now = max(now, last)
    waits = now - (ends + pace.muon + pace.adam + pace.forward)
    return waits, max(0.0, links.busy - waits)


def backward_share(row: Row) -> float:
    """Of a row's time, what lies in the backward pass."""
    if "forward, dgrad" in row.op:
        return 0.5
    if "forward" in row.op:
        return 0.0
    return 1.0 if "backward" in row.op or "wgrad" in row.op else 2 / 3


# the step


@dataclass(frozen=True)
class Scaled:
    """A predicted step on so many GPUs."""

    gpus: int
    work: Workload
    plan: Plan

    @property
    def gpu_seconds_per_token(self) -> float:
        return self.gpus * self.work.seconds() / self.work.tokens

    @property
    def mfu(self) -> float:
        return self.plan.flops_per_token / self.gpu_seconds_per_token / FLOPS["bf16"]

    def group(self, name: str) -> float:
        return by_group(self.work)[name]


def scaled(
    gpus: int,
    depth: int = 24,
    fp8: bool = False,
    fa3: bool = False,
    batch: int | None = None,
    design: Design = Design(),  # noqa: B008
    results: Sequence[dict] = (),
    models: Sequence[dict] = (),
) -> Scaled:
    """batch: tokens of a step; None: by the law of the preset. The kernels are today's."""
    cfg, plan = planned(depth, gpus, batch)
    table, micro = parameter_table(cfg.model), plan.grad_accum_steps
    rows = compute(cfg.model, plan, False, fa3, fp8)
    if gpus > 1:
        rows.append(one_pass("gradients to bf16", "weights", 6 * plan.params_total, 4 * len(Sizes.of(table).banks),
                             "kernel pass"))  # fmt: skip
    if design.no_sums and micro == 1:
        rows = [row for row in rows if row.op not in ("zeros for gradients", "gradients to bf16")]
    rows = list(with_measurements(workload("", rows, tokens=0, steps=0), results, models).rows[:-1])
    layers = [row for row in rows if row.group in ("products", "attention", "passes", "fp8 casts")]
    layers = [row for row in layers if "quantise_weight" not in row.op]
    backward = sum(row.seconds() * backward_share(row) for row in layers) / micro
    muon = update_of(dealt(table, gpus))
    adam = [
        one_pass("AdamW", "optimizer", adam_update_cost((math.prod(a.shape),), BF16, form)[1] / gpus, 1, "kernel pass")
        for a in arenas(table)
        if not a.views
        for form in ["master" if a.params[0].mastered else "plain"]
    ]
    pace = Pace(
        forward=seconds(layers) / micro - backward,
        backward=backward,
        tables=sum(row.seconds() for row in rows if row.group == "tables" and "backward" in row.op) / micro,
        muon=seconds(muon),
        adam=seconds(adam),
    )
    waits, beside = exposed(Sizes.of(table), pace, gpus, design)
    sent = [
        Row("exposed", "communication", fixed=waits),
        Row("multiprocessors of collectives", "communication", fixed=beside * COLLECTIVE_SMS / SMS),
    ]
    if fp8 and gpus > 1:
        sent.append(Row("largest sizes of fp8 sites", "communication", fixed=2 * LATENCY_S))
    name = f"Redline d{depth}, {'fp8' if fp8 else 'bf16'}, sharded over {gpus}"
    work = workload(name, [*rows, *muon, *adam, *sent], tokens=plan.total_batch_size, steps=plan.steps)
    return Scaled(gpus, work, plan)


def growth(scaled: Scaled, base: Scaled) -> dict[str, float]:
    """By group, what a token costs more than on the base's GPUs, in shares of the base's cost of a token."""
    mine, its = by_group(scaled.work), by_group(base.work)
    per = base.gpu_seconds_per_token
    return {
        group: (scaled.gpus * mine[group] / scaled.work.tokens - base.gpus * its[group] / base.work.tokens) / per
        for group in mine
    }


def table_of(points: Sequence[Scaled], base: Scaled) -> list[str]:
    lines = [
        f"| GPUs | tokens a step | ms | tokens/s | MFU | exposed ms | optimizer ms | GPU hours per 1e9 tokens | to "
        f"{base.gpus} |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for e in (entry(p, base) for p in points):
        lines.append(
            f"| {e['gpus']} | {e['tokens']:,} | {e['step_ms']:.1f} | {e['tok_per_s']:,.0f} | {100 * e['mfu']:.1f} % | "
            f"{e['exposed_ms']:.2f} | {e['optimizer_ms']:.2f} | {e['gpu_hours_per_1e9_tokens']:.3f} | "
            f"{100 * e['more']:+.1f} % |"
        )
    return lines


def entry(p: Scaled, base: Scaled) -> dict[str, float]:
    """more: per token than on the base's GPUs."""
    step, cost = p.work.seconds(), p.gpu_seconds_per_token
    return {
        "gpus": p.gpus,
        "tokens": p.work.tokens,
        "step_ms": 1e3 * step,
        "tok_per_s": p.work.tokens / step,
        "mfu": p.mfu,
        "exposed_ms": 1e3 * sum(row.fixed for row in p.work.rows if row.op == "exposed"),
        "optimizer_ms": 1e3 * by_group(p.work)["optimizer"],
        "gpu_hours_per_1e9_tokens": cost * 1e9 / 3600,
        "more": cost / base.gpu_seconds_per_token - 1,
    }


LEVERS = (
    ("as it is meant to be", Design()),
    ("and value tables leave with their layers' banks", Design(early_tables=True)),
    ("and tables are updated first, weights return in the order of use", Design(True, True)),
    ("and a single micro-step makes its gradients in bf16", Design(True, True, True)),
)


def scale_report(gpus: Sequence[int], depth: int = 24, fa3: bool = False, grows: bool = False) -> tuple[str, dict]:
    """Text and numbers. The base of costs is one node, or the smallest number of GPUs. grows: the batch is that of 8
    GPUs for each 8."""
    results, models = read_results(), read_models()
    base_gpus = GPUS if GPUS in gpus else min(gpus)
    law = planned(depth, 1)[1].total_batch_size
    lines = ["# Cost of a token on more GPUs", "", f"**{NOTE}** Nodes of {GPUS} H100 SXM.", ""]
    for name, latency in (("collective", INSIDE_S), ("between nodes", LATENCY_S)):
        c = CLASSES[name]
        rate = f"{c.peak * c.efficiency / 1e9:.0f} GB/s of a GPU in one direction, {1e6 * latency:.0f} us a message"
        lines.append(f"- {name}: {rate}; {c.source}")
    lines.append(f"- NCCL holds {COLLECTIVE_SMS} of {SMS} multiprocessors while it moves data (assumption)")
    found: dict[str, dict] = {}
    for fp8 in (False, True):

        def at(n: int, design: Design = LEVERS[0][1], batch: int | None = None, fp8: bool = fp8) -> Scaled:
            batch = batch or (max(law, law * n // GPUS) if grows else None)
            return scaled(n, depth, fp8, fa3, batch, design, results, models)

        points = {n: at(n) for n in sorted(gpus)}
        base, last = points[base_gpus], points[max(gpus)]
        kind = f"{'fp8' if fp8 else 'bf16'}{', FA3' if fa3 else ''}"
        lines += ["", f"## d{depth}, {kind}", "", *table_of(list(points.values()), base), ""]
        lines += judged(last, base)
        found[kind] = {"points": [entry(p, base) for p in points.values()], "growth": growth(last, base)}
        if last.gpus > GPUS:
            steps = [(words, entry(at(last.gpus, design), at(base_gpus, design))) for words, design in LEVERS]
            twice = at(last.gpus, LEVERS[-1][1], 2 * last.work.tokens)
            steps.append(("and a batch of twice as many tokens", entry(twice, at(base_gpus, LEVERS[-1][1]))))
            lines += ["", f"What would change that, one after the other, on {last.gpus} GPUs:", ""]
            lines += [f"- {words}: {e['step_ms']:.1f} ms, {100 * e['more']:+.1f} % per token" for words, e in steps]
            found[kind]["levers"] = {words: e["more"] for words, e in steps}
    return "\n".join(lines), found


def judged(last: Scaled, base: Scaled) -> list[str]:
    """Whether the goal is met, and where the growth lies."""
    more = last.gpu_seconds_per_token / base.gpu_seconds_per_token - 1
    parts = sorted(growth(last, base).items(), key=lambda item: -item[1])
    where = ", ".join(f"{group} {100 * share:+.1f}" for group, share in parts if abs(share) > 0.001)
    verdict = "met" if more <= GOAL else f"missed by {100 * (more - GOAL):.1f} points"
    return [
        f"On {last.gpus} GPUs a token costs {100 * more:+.1f} % against {base.gpus} (goal: at most "
        f"{100 * GOAL:.0f} % more, {verdict}). In points: {where}."
    ]
