"""Stored results: `python -m bench.history` draws them again, `--add DIR` stores those of bench.gpu.

bench/results/<device>/ops.jsonl     one row a line, oldest first: (commit, item, backend) and what was measured
                       train.jsonl   training runs, by bench.gpu
                       README.md     the newest row of each as a roofline table
                       <op>.png      time by commit of each backend and shape
Only a clean checkout may store, so that a row's commit is the code that was measured.
"""

import argparse
import datetime
import functools
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import roofline
from bench.suite import Item
from core.machine import device_name, git_state, versions
from core.stopping import UserError, one_sentence
from kernels.ops import BY_NAME

ROOT = Path(__file__).parent / "results"
KEY = ("op", "case", "form", "direction", "dtype", "backend")
COMMIT_VARIABLE = "REDLINE_COMMIT"
FILES = ("ops", "train")
Row = dict[str, Any]


@functools.cache
def facts() -> dict[str, Any]:
    """What every row of this process says about where it comes from."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    git = git_state() or {"commit": os.environ.get(COMMIT_VARIABLE), "dirty": False}
    commit = git["commit"] and git["commit"][:12] + ("+changes" if git["dirty"] else "")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"commit": commit, "date": now, "device": device_name(device), **versions()}


def set_commit(commit: str) -> None:
    """Names the code of this process, which lies outside of its git checkout. ValueError inside of one."""
    if git_state():
        raise UserError(f"--commit {commit}: git says which commit this is; omit it")
    os.environ[COMMIT_VARIABLE] = commit  # for processes that this one starts, too
    facts.cache_clear()


def refuse_changed_checkout(commit: str | None) -> None:
    """ValueError unless a row's commit says what was measured."""
    if commit is None or "+" in commit:
        raise UserError(f"results are stored of a clean commit only, not of {commit}: commit first, then measure again")


def roofline_of(item: Item) -> roofline.Roofline | None:
    """Of a GPU: what a CPU works on lies in its caches, whose speed a large copy does not measure."""
    if item.work is None or not torch.cuda.is_available():
        return None
    return roofline.measured(roofline.multiplies_in(BY_NAME[item.op], item.form, getattr(torch, item.dtype)))


def folder(device: str) -> Path:
    return ROOT / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def store(rows: Sequence[Row], name: str = "ops") -> Path:
    """Appends those rows of one device that are not there, and draws its table and plots again."""
    for row in rows:
        refuse_changed_checkout(row["commit"])
    where = folder(rows[0]["device"])
    where.mkdir(parents=True, exist_ok=True)
    path = where / f"{name}.jsonl"
    old = path.read_text() if path.exists() else ""
    there = load(path)
    rows = [row for row in rows if row not in there]
    tmp = path.with_name(f".{path.name}.tmp")
    tmp.write_text(old + "".join(json.dumps(row) + "\n" for row in rows))
    os.replace(tmp, path)
    draw(where)
    return path


def load(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def newest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each item and backend, or of each kind of training run."""
    return list({tuple(row.get(key) for key in (*KEY, *TRAIN_COLUMNS[1:6])): row for row in rows}.values())


COLUMNS = (
    "op",
    "case",
    "form",
    "direction",
    "dtype",
    "backend",
    "time",
    "95 % bounds",
    "TFLOP/s",
    "GB/s",
    "of roofline",
    "against",
)


def cells(row: Row) -> list[str]:
    """A row under COLUMNS; a backend that was wrong has no number."""
    named = [str(row[key]) for key in KEY]
    if row.get("error"):
        return [*named, "wrong", "", "", "", "", ""]
    times = [microseconds(row["us"]), f"{microseconds(row['us_low'])} to {microseconds(row['us_high'])}"]
    rates = [f"{row[key]:.4g}" if key in row else "" for key in ("tflops", "gb_per_s")]
    fraction = f"{row['roofline_fraction']:.0%}" if "roofline_fraction" in row else ""
    return [*named, *times, *rates, fraction, f"{row['speedup']:.2f}x {row['baseline']}" if "speedup" in row else ""]


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (columns, ["---"] * len(columns), *rows)]


def console(rows: Iterable[Row]) -> list[str]:
    """The same for a terminal: an item, and below it a line for each backend."""
    lines, before = [], None
    for row in rows:
        *item, backend = (row[key] for key in KEY)
        if item != before:
            sizes = f"({', '.join(map(str, row['shape']))})" if row["shape"] else ""
            lines.append("  ".join(part for part in (item[0], item[1], sizes, *item[2:]) if part))
        before = item
        if row.get("error"):
            lines.append(f"    {backend:<14} wrong, no number: {row['error']}")
            continue
        _, _, _, _, _, _, time, bounds, tflops, gb_per_s, fraction, against = cells(row)
        rates = f"{tflops:>8} TFLOP/s {gb_per_s:>6} GB/s {fraction:>5} of roofline" if tflops else ""
        lines.append(f"    {backend:<14} {time:>9}  [{bounds}]  {rates}  {against}".rstrip())
    return lines


def microseconds(us: float) -> str:
    for factor, unit in ((1e6, "s"), (1e3, "ms")):
        if us >= factor:
            return f"{us / factor:.4g} {unit}"
    return f"{us:.4g} us"


def draw(where: Path) -> None:
    """README.md and a plot per op of the results in a folder."""
    rows = load(where / "ops.jsonl")
    trained = load(where / "train.jsonl")
    text = [
        f"# {(rows + trained)[-1]['device']}",
        "",
        "Made from the .jsonl files here by `python -m bench.history`.",
        "",
    ]
    if trained:
        text += ["## Training steps", "", *markdown(TRAIN_COLUMNS, map(train_cells, newest(trained))), ""]
    if rows:
        text += [
            "## Ops",
            "",
            "The newest row of each. A time is the median of its samples.",
            "",
            *markdown(COLUMNS, map(cells, newest(rows))),
            "",
        ]
        text += [
            "## History",
            "",
            *(f"![{op}]({plot_name(op)})" for op in dict.fromkeys(row["op"] for row in rows)),
            "",
        ]
    (where / "README.md").write_text("\n".join(text))
    for op in dict.fromkeys(row["op"] for row in rows):
        plot([row for row in rows if row["op"] == op and not row.get("error")], where / plot_name(op))


TRAIN_COLUMNS = (
    "commit", "depth", "precision", "kernels", "compiled", "fp8_head", "tok_per_s", "mfu", "peak_memory_gb", "error"
)  # fmt: skip


def train_cells(row: Row) -> list[str]:
    values = [row.get(column) for column in TRAIN_COLUMNS]
    return ["" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in values]


def plot_name(op: str) -> str:
    return f"{op.replace(' ', '_')}.png"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Time by commit, a line per item and backend."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    commits = list(dict.fromkeys(row["commit"] for row in rows))
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault(" ".join(str(row[key]) for key in KEY[1:] if row[key]), []).append(row)
    height = max(3.0, 0.22 * len(lines))
    fig, ax = plt.subplots(figsize=(10, height), layout="constrained")
    for i, (label, points) in enumerate(lines.items()):
        at = [commits.index(row["commit"]) for row in points]
        us = [row["us"] for row in points]
        bounds = [
            [row["us"] - row["us_low"] for row in points],
            [row["us_high"] - row["us"] for row in points],
        ]
        marker = "osv^Dxp*"[i // 10 % 8]
        ax.errorbar(at, us, yerr=bounds, marker=marker, markersize=4, linewidth=1, capsize=2, label=label)
    ax.set_xticks(range(len(commits)), [str(commit)[:7] for commit in commits], rotation=45)
    ax.set_yscale("log")
    ax.set_ylabel("microseconds per call")
    ax.set_title(rows[0]["op"] if rows else path.stem)
    ax.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    fig.savefig(path, dpi=90)
    plt.close(fig)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.history", description=__doc__.splitlines()[0])
    parser.add_argument("--add", type=Path, metavar="DIR", help="what bench.gpu left")
    args = parser.parse_args(argv)
    if args.add:
        found = {name: rows for name in FILES if (rows := load(args.add / f"{name}.jsonl"))}
        if not found:
            raise UserError(
                f"--add {args.add}: no ops.jsonl or train.jsonl with rows; give the DIR of bench.gpu --out DIR"
            )
        for name, rows in found.items():
            print(store(rows, name))
        return
    for where in sorted(path for path in ROOT.iterdir() if path.is_dir()) if ROOT.exists() else ():
        draw(where)
        print(where)


if __name__ == "__main__":
    with one_sentence():
        main(sys.argv[1:])
