"""Records of a track: `python -m bench.records gpt2 RUN RUN …` checks the runs, adds a JSON to bench/records/ and
prints it as a table.

A record is of two or more whole runs that differ by their seed alone, of one clean commit on one kind of machine, with
CORE over all examples. Its significance is that of a one-sided t-test of their mean CORE against the track's threshold,
GPT-2's score: p is the probability of such a mean, or a higher one, if the true mean were the threshold.
"""

import argparse
import datetime
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from core import checkpoint, report
from core.config import Config, changed_fields, from_dict
from core.evals.core_metric import GPT2_CORE
from core.stopping import UserError, expanded, one_sentence

ROOT = Path(__file__).parent / "records"
TRACKS = {"gpt2": GPT2_CORE}
SIGNIFICANT = 0.01  # as in the rules of modded-nanogpt's records
# must be the same in all runs: the code, the machine, the text and the horizon
SAME = ("git", "device", "precision", "versions", "data", "steps", "tokens")
KEPT = (
    "seed", "command", "core", "val_bpb", "total_training_time_s", "wall_time_s", "tok_per_s", "mfu",
    "peak_memory_bytes", "energy_j", "cost_dollars",
)  # fmt: skip


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench.records", description=__doc__.partition("\n\n")[0])
    parser.add_argument("track", choices=TRACKS)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run that has ended")
    args = parser.parse_args(argv)
    record = record_of(args.track, [expanded(run) for run in args.runs])
    path = ROOT / f"{args.track}-{record['date']}-{record['git']['commit'][:12]}.json"
    if path.exists():
        raise UserError(f"{path} is there already: a commit has one record a day; remove it to make it again")
    ROOT.mkdir(exist_ok=True)
    checkpoint.write_json(path, record)
    print(report.render(table(record)))
    print(verdict(record))
    print(f"added {path}: commit it")


def record_of(track: str, folders: Sequence[Path]) -> dict[str, Any]:
    """What is stored of these runs; UserError naming what cannot be a record and why."""
    if len(folders) < 2:
        raise UserError(f"a record needs two runs or more, got {len(folders)}: one says nothing about the spread")
    found = [read_run(track, folder) for folder in folders]
    (first, first_config), *others = found
    for folder, (summary, config) in zip(folders[1:], others):
        for name in SAME:
            if summary[name] != first[name]:
                raise UserError(
                    f"{folder} differs from {folders[0]} in {name}: {shown(summary[name])} instead of "
                    f"{shown(first[name])}; a record's runs differ by their seed alone"
                )
        if changed := [name for name in changed_fields(first_config, config) if name != "seed"]:
            raise UserError(
                f"{folder} differs from {folders[0]} in {', '.join(changed)}; a record's runs differ by their seed "
                "alone"
            )
    seeds = [summary["seed"] for summary, _ in found]
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise UserError(f"{seeds.count(twice[0])} of the runs have seed {twice[0]}: give each another --seed")
    scores = [summary["core"] for summary, _ in found]
    threshold = TRACKS[track]
    p = p_above(scores, threshold)
    return {
        "track": track,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **{name: first[name] for name in SAME},
        "flops": first["flops"],
        "params": first["params"],
        "core": spread(scores) | {"threshold": threshold, "p": p},
        "beaten": p < SIGNIFICANT,  # which no mean at the threshold or below has
        "total_training_time_s": spread([summary["total_training_time_s"] for summary, _ in found]),
        "core_tasks": {
            task: spread([summary["core_tasks"][task]["accuracy"] for summary, _ in found])
            for task in first["core_tasks"]
        },
        "runs": [{name: summary[name] for name in KEPT} for summary, _ in found],
    }


def read_run(track: str, folder: Path) -> tuple[dict[str, Any], Config]:
    """Summary and options of a run; UserError where it cannot be part of a record by itself."""
    for name in ("summary.json", "config.json"):
        if not (folder / name).exists():
            raise UserError(f"{folder} has no {name}: give the folder of a run that has ended")
    summary = checkpoint.load_json(folder / "summary.json")
    missing = {"preset", *SAME, *KEPT} - {"core"} - summary.keys()
    if missing:
        raise UserError(f"{folder} was made by an older Redline, its summary has no {min(missing)}: train it again")
    if summary["preset"] != track:
        raise UserError(f"{folder} is a run of {summary['preset']}, not of {track}")
    if summary["git"] is None or summary["git"]["dirty"]:
        raise UserError(f"{folder} was trained by code that no commit names: commit first, then train again")
    if "core" not in summary:
        raise UserError(f"{folder} has no CORE: train with --core --core-max-per-task None")
    if not summary["core_whole"]:
        raise UserError(f"{folder} has CORE {summary['core_scope']}: train with --core-max-per-task None")
    return summary, from_dict(checkpoint.load_json(folder / "config.json"))


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# statistics


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def p_above(values: Sequence[float], threshold: float) -> float:
    """One-sided p-value of a t-test that the mean is above the threshold."""
    distance, sd = statistics.fmean(values) - threshold, statistics.stdev(values)
    if sd == 0:
        return 0.0 if distance > 0 else 1.0
    return t_survival(distance / (sd / math.sqrt(len(values))), len(values) - 1)


def t_survival(t: float, df: int) -> float:
    """P(T > t) of Student's t with so many degrees of freedom [Abramowitz and Stegun, 26.7.3 and 26.7.4]."""
    angle = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(odd + 2, df + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total  # P(|T| < |t|), with the sign of t
    return (1 - inside) / 2


# words


def table(record: dict[str, Any]) -> Table:
    grid = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("seed", "CORE", "validation bpb", "training time (s)", "in all (s)", "energy (kWh)", "cost ($)"):
        grid.add_column(name, justify="right")
    for run in record["runs"]:
        energy, cost = run["energy_j"], run["cost_dollars"]
        grid.add_row(
            str(run["seed"]), f"{run['core']:.5f}", f"{run['val_bpb']:.4f}", f"{run['total_training_time_s']:.1f}",
            f"{run['wall_time_s']:.1f}", "" if energy is None else f"{energy / 3.6e6:.3f}",
            "" if cost is None else f"{cost:.2f}",
        )  # fmt: skip
    for name in ("mean", "sd"):
        core, seconds = record["core"][name], record["total_training_time_s"][name]
        grid.add_row(name, f"{core:.5f}", "", f"{seconds:.1f}")
    return grid


def verdict(record: dict[str, Any]) -> str:
    core = record["core"]
    above = "above" if core["mean"] > core["threshold"] else "not above"
    said = "beaten" if record["beaten"] else f"not beaten (that needs p < {SIGNIFICANT})"
    return f"mean CORE {core['mean']:.6f} is {above} {core['threshold']}, p = {core['p']:.2g}: {said}"


if __name__ == "__main__":
    with one_sentence():
        main(sys.argv[1:])
