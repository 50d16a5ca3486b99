"""The projection as tables, JSON and bars."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.projection.machine import CLASSES, GAP_S, LATENCY_S, TOLERANCE, WAIT_S, Row, Workload

NOTE = "A prediction from op costs and published efficiencies, not a measurement."
GROUPS = (
    "products", "head", "attention", "passes", "fp8 casts", "weights", "tables", "optimizer", "communication", "host",
)  # fmt: skip


def by_group(w: Workload) -> dict[str, float]:
    return {group: sum(row.seconds() for row in w.rows if row.group == group) for group in GROUPS}


def levers(today: Workload, target: Workload, count: int = 5) -> list[tuple[str, float]]:
    """What would take the most seconds off a step of today: groups of rows against the target's."""
    now, then = by_group(today), by_group(target)
    return sorted(((group, now[group] - then[group]) for group in GROUPS), key=lambda item: -item[1])[:count]


@dataclass(frozen=True)
class Progress:
    """Milliseconds of a step on 8 GPUs."""

    bf16: float
    fp8: float
    target: float

    @property
    def share(self) -> float:
        """Of what lies between bf16 and the target, how much fp8 brings."""
        return (self.bf16 - self.fp8) / (self.bf16 - self.target)

    def as_dict(self) -> dict[str, float]:
        return asdict(self) | {"share_of_fp8": self.share}


def progress(bf16: Workload, fp8: Workload, target: Workload) -> Progress:
    return Progress(*(1e3 * w.seconds() for w in (bf16, fp8, target)))


def progress_lines(p: Progress) -> list[str]:
    return [
        f"- today in bf16: {p.bf16:.0f} ms a step",
        f"- today in fp8: {p.fp8:.0f} ms, {p.bf16 / p.fp8:.2f} times the tokens/s",
        f"- target: {p.target:.0f} ms",
        f"- fp8 brings {p.bf16 - p.fp8:.0f} of the {p.bf16 - p.target:.0f} ms from bf16 to the target, "
        f"{100 * p.share:.0f} %; {p.fp8 - p.target:.0f} ms remain",
    ]


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def entry(row: Row) -> dict:
    """A row as it is printed: efficiency is the share of the nominal peak that bounds it."""
    seconds = row.seconds()
    efficiency = row.exposed * row.roofline() / seconds if row.kind else None
    basis = row.measured.source if row.measured else "assumed"
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


def report(
    checked: Sequence[Workload],
    budgets: Sequence[Workload],
    so_far: Progress | None,
    gains: Sequence[tuple[str, float]],
    rows: bool,
) -> str:
    """gains: seconds that groups of rows can save; rows: those of the check as well."""
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
        rate = f"{w.tokens / step:,.0f} tokens/s"
        lines += [f"Predicted: {1e3 * step:.0f} ms a step, {rate}, {duration(w.steps * step)} for {w.steps} steps."]
        lines += [f"The optimizer is {1e3 * updates:.1f} ms of a step, {100 * updates / step:.1f} %."]
    if so_far:
        lines += ["", "## From bf16 to the target, on 8 GPUs", "", *progress_lines(so_far)]
    if gains:
        lines += ["", "## The next levers, by what the target saves of today in fp8 on 8 GPUs", ""]
        lines += [f"- {group}: {1e3 * gain:.0f} ms a step" for group, gain in gains]
    return "\n".join(lines)


def plot(workloads: Sequence[Workload], path: Path) -> None:
    """A bar a workload, its step in groups of ops; lines are published times.

    Steps under 200 ms have an axis of their own.
    """
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
