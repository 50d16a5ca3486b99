"""The dial swept: `python -m bench.miniseries --depths 10,12,14 --ratio 8 --out DIR [-- options of train.py]`.

Runs `train.py gpt2` at each depth, one after the other, each in a folder of its own below DIR; a run that is there is
not made again, one that was interrupted goes on. Then DIR holds miniseries.csv, miniseries.md and miniseries.png: size,
tokens, FLOPs, time, validation bits per byte and, where it was scored, CORE; and the power laws through them.

With --flops 1e18,3e18 every depth is trained at each of these budgets instead. At each budget the best size is the
bottom of a parabola through the scores over the logarithm of the size [Hoffmann 2022, arXiv 2203.15556, approach 2],
and the laws are those of the best sizes and tokens in the budget.
"""

import argparse
import csv
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.checkpoint import write_text
from core.stopping import TrainingError, UserError, one_sentence

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("depth", "budget", "params_scaling", "tokens", "flops", "total_training_time_s", "val_bpb", "core")
Row = dict[str, Any]  # of COLUMNS


class Law(NamedTuple):
    """y = factor * x^exponent, by least squares of the logarithms."""

    factor: float
    exponent: float

    def __str__(self) -> str:
        return f"{self.factor:.4g} x^{self.exponent:.4f}"


def fit_law(x: Sequence[float], y: Sequence[float]) -> Law:
    """Of two points or more, all positive."""
    exponent, logarithm = np.polyfit(np.log(x), np.log(y), 1)
    return Law(math.exp(logarithm), float(exponent))


class Best(NamedTuple):
    """Of one budget: the size with the lowest score, its tokens, and that score."""

    flops: float
    params: float
    tokens: float
    bpb: float


def fit_best(rows: Sequence[Row]) -> Best | None:
    """The bottom of the parabola through a budget's scores; None where they have none between the smallest and the
    largest size."""
    if len(rows) < 3:
        return None
    x, y = np.log([row["params_scaling"] for row in rows]), [row["val_bpb"] for row in rows]
    a, b, c = np.polyfit(x, y, 2)
    bottom = -b / (2 * a) if a > 0 else math.inf
    if not min(x) < bottom < max(x):
        return None
    # FLOPs per token are nearly those per parameter: between runs of a budget, tokens follow the size
    tokens = fit_law([row["params_scaling"] for row in rows], [row["tokens"] for row in rows])
    size = math.exp(bottom)
    flops = float(np.mean([row["flops"] for row in rows]))
    return Best(flops, size, tokens.factor * size**tokens.exponent, float(np.polyval((a, b, c), bottom)))


def read_row(folder: Path, depth: int, budget: float | None) -> Row:
    summary = json.loads((folder / "summary.json").read_text())
    values = {name: summary.get(name) for name in COLUMNS} | {"depth": depth, "budget": budget}
    return values | {"params_scaling": summary["params"]["scaling"]}


def run(folder: Path, depth: int, horizon: Sequence[str], options: Sequence[str], launcher: Sequence[str]) -> None:
    """One run to its end. TrainingError naming it where it does not get there."""
    if (folder / "summary.json").exists():
        print(f"{folder}: done before")
        return
    argv = ["gpt2", "--depth", str(depth), *horizon, *options, "--out", str(folder), "--resume", "auto"]
    command = [*launcher, str(ROOT / "train.py"), *argv]
    print(f"{folder}: depth {depth}, {' '.join(horizon)}", flush=True)
    if status := subprocess.run(command).returncode:
        raise TrainingError(f"{folder}: train.py ended with {status}; the same command goes on where it stopped")


def laws(rows: Sequence[Row], budgets: Sequence[float]) -> list[tuple[str, Law]]:
    """What the runs say, each with its name."""
    if not budgets:
        if len(rows) < 2:
            return []
        flops = [row["flops"] for row in rows]
        found = [("bits per byte by FLOPs", fit_law(flops, [row["val_bpb"] for row in rows]))]
        return [*found, ("scaling parameters by FLOPs", fit_law(flops, [row["params_scaling"] for row in rows]))]
    best = [b for budget in budgets if (b := fit_best([row for row in rows if row["budget"] == budget]))]
    if len(best) < 2:
        return []
    flops = [b.flops for b in best]
    return [
        ("best scaling parameters by FLOPs", fit_law(flops, [b.params for b in best])),
        ("best tokens by FLOPs", fit_law(flops, [b.tokens for b in best])),
        ("lowest bits per byte by FLOPs", fit_law(flops, [b.bpb for b in best])),
    ]


def table(rows: Sequence[Row], budgets: Sequence[float]) -> str:
    """miniseries.md."""

    def shown(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) and value >= 10 else f"{value:.5g}"

    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "--:|" * len(COLUMNS)]
    lines += ["| " + " | ".join(shown(row[name]) for name in COLUMNS) + " |" for row in rows]
    for budget in budgets:
        best = fit_best([row for row in rows if row["budget"] == budget])
        lines += ["", f"{budget:.3g} FLOPs: "]
        lines[-1] += (
            f"best at {best.params:.4g} scaling parameters and {best.tokens:.4g} tokens, {best.bpb:.4f} bits per byte"
            if best
            else "no best size between the smallest and the largest (more depths, or others)"
        )
    lines += ["", *(f"{name}: {law}" for name, law in laws(rows, budgets))]
    return "\n".join(lines).rstrip() + "\n"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Bits per byte over FLOPs, and over scaling parameters, a line for each budget."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for ax, name in zip(figure.subplots(1, 2), ("flops", "params_scaling")):
        for budget in dict.fromkeys(row["budget"] for row in rows):
            some = [row for row in rows if row["budget"] == budget]
            label = None if budget is None else f"{budget:.3g} FLOPs"
            ax.plot([row[name] for row in some], [row["val_bpb"] for row in some], "o-", label=label)
        ax.set(xscale="log", xlabel=name.replace("_", " "), ylabel="validation, bits per byte")
        if rows[0]["budget"] is not None:
            ax.legend()
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def numbers(text: str, kind: type, option: str) -> list[Any]:
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} is {text!r}: expected numbers separated by commas") from error
    if any(number <= 0 for number in found) or len(set(found)) < len(found):
        raise UserError(f"{option} is {text!r}: expected different numbers above 0")
    return sorted(found)


def main(argv: list[str]) -> None:
    argv, options = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(prog="python -m bench.miniseries", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--depths", required=True, help="separated by commas")
    parser.add_argument("--ratio", default="12", help="training tokens per scaling parameter (default 12)")
    parser.add_argument("--flops", help="budgets separated by commas, in place of --ratio")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--nproc-per-node", type=int, help="processes of each run, by torchrun; unset: one, without it")
    args = parser.parse_args(argv)
    depths = numbers(args.depths, int, "--depths")
    budgets = numbers(args.flops, float, "--flops") if args.flops else []
    launcher = [sys.executable]
    if args.nproc_per_node:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.nproc_per_node}"]
    rows = []
    for budget in budgets or [None]:
        for depth in depths:
            folder = args.out / (f"d{depth}" if budget is None else f"d{depth}-{budget:.3g}")
            horizon = ["--ratio", args.ratio] if budget is None else ["--target-flops", str(budget)]
            run(folder, depth, horizon, options, launcher)
            rows.append(read_row(folder, depth, budget))
            # after each run: what there is so far, however the next one ends
            with open(args.out / "miniseries.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
    write_text(args.out / "miniseries.md", table(rows, budgets))
    plot(rows, args.out / "miniseries.png")
    print(table(rows, budgets))


if __name__ == "__main__":
    with one_sentence():
        main(sys.argv[1:])
