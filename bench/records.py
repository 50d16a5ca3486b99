"""Records of a track: `python -m bench.records gpt2 RUN RUN …` checks the runs, prints them as a table and, if they are
a record, adds a JSON to bench/records/. If not, it says why in one sentence and ends with status 2.

A record is of two or more whole runs that differ by their seed alone, of one clean commit on one kind of machine. Its
significance is that of a one-sided t-test of their mean score against the track's threshold: p is the probability of
such a mean, or a better one, if the true mean were the threshold.

gpt2      CORE over all examples above GPT-2's
fineweb   validation loss below 3.28 nats a token, over the first 10,485,760 tokens of FineWeb's validation split, on 8
          H100s [modded-nanogpt's track 1]
"""

import argparse
import datetime
import hashlib
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from core import checkpoint, report
from core.config import changed_fields, from_dict
from core.evals.core_metric import GPT2_CORE
from core.stopping import UserError, expanded, one_sentence

ROOT = Path(__file__).parent / "records"
SIGNIFICANT = 0.01  # as in the rules of modded-nanogpt's records
FINEWEB_LOSS = 3.28  # nats a token
FINEWEB_VAL_TOKENS = 10_485_760
PLACES = ("out", "data", "path", "cache_dir")  # options that say where files lie
FINEWEB_DEVICE = "8 x NVIDIA H100"  # as it begins in a summary

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Track:
    """What is scored, which side of the threshold wins, and what a run must show to count. Names are those of
    summary.json."""

    score: str
    words: str
    digits: int
    threshold: float
    below: bool  # a lower score is better
    same: tuple[str, ...]  # must be the same in all runs: the code, the machine, the data and the horizon
    shared: tuple[str, ...]  # besides, kept of the first run
    kept: tuple[str, ...]  # of each run
    columns: Mapping[str, Callable[[Summary], str]]  # of the table, besides the score
    objection: Callable[[Summary], str | None]  # why a run cannot count
    changed: Callable[[dict[str, Any], dict[str, Any]], list[str]]  # options of config.json that differ, the seed too

    def gain(self, score: float) -> float:
        """How far a score is on the winning side."""
        return self.threshold - score if self.below else score - self.threshold

    @property
    def side(self) -> str:
        return "below" if self.below else "above"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench.records", description=__doc__.partition("\n\n")[0])
    parser.add_argument("track", choices=TRACKS)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run that has ended")
    args = parser.parse_args(argv)
    record = record_of(args.track, [expanded(run) for run in args.runs])
    path = ROOT / f"{args.track}-{record['date']}-{record['git']['commit'][:12]}.json"
    if path.exists():
        raise UserError(f"{path} is there already: a commit has one record a day; remove it to make it again")
    print(report.render(table(record)))
    if why := why_not(record):
        raise UserError(f"not a record: {why}")
    print(verdict(record))
    ROOT.mkdir(exist_ok=True)
    checkpoint.write_json(path, record)
    print(f"added {path}: commit it")


def record_of(name: str, folders: Sequence[Path]) -> dict[str, Any]:
    """What is stored of these runs; UserError naming what cannot be a record and why."""
    track = TRACKS[name]
    if len(folders) < 2:
        raise UserError(f"a record needs two runs or more, got {len(folders)}: one says nothing about the spread")
    found = [read_run(name, folder) for folder in folders]
    (first, first_config), *others = found
    for folder, (summary, config) in zip(folders[1:], others):
        for field in track.same:
            if summary[field] != first[field]:
                raise UserError(
                    f"{folder} differs from {folders[0]} in {field}: {shown(summary[field])} instead of "
                    f"{shown(first[field])}; a record's runs differ by their seed alone"
                )
        if changed := [option for option in track.changed(first_config, config) if option != "seed"]:
            raise UserError(
                f"{folder} differs from {folders[0]} in {', '.join(changed)}; a record's runs differ by their seed "
                "alone"
            )
    seeds = [summary["seed"] for summary, _ in found]
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise UserError(f"{seeds.count(twice[0])} of the runs have seed {twice[0]}: give each another --seed")
    scores = [summary[track.score] for summary, _ in found]
    if len(set(scores)) == 1:
        raise UserError(
            f"all {len(scores)} runs have {track.words} {scores[0]} to the last digit: their seeds change nothing, so "
            "that they say nothing about the spread"
        )
    gains = [track.gain(score) for score in scores]
    record = {
        "track": name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **{field: first[field] for field in (*track.same, *track.shared)},
        # t and p of the mean's distance on the winning side
        track.score: spread(scores) | {"threshold": track.threshold, "t": t_statistic(gains), "p": p_above(gains, 0.0)},
        "total_training_time_s": spread([summary["total_training_time_s"] for summary, _ in found]),
        "runs": [
            {field: summary[field] for field in track.kept} | {"log_sha256": sha256(folder / "log.jsonl")}
            for folder, (summary, _) in zip(folders, found)
        ],
    }
    if "core_tasks" in first:
        record["core_tasks"] = {
            task: spread([summary["core_tasks"][task]["accuracy"] for summary, _ in found])
            for task in first["core_tasks"]
        }
    return record


def read_run(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Summary and options of a run; UserError where it cannot be part of a record by itself."""
    track = TRACKS[name]
    for file in ("summary.json", "config.json", "log.jsonl"):
        if not (folder / file).exists():
            raise UserError(f"{folder} has no {file}: give the folder of a run that has ended")
    summary = checkpoint.load_json(folder / "summary.json")
    if summary.get("preset", name) != name:
        raise UserError(f"{folder} is a run of {summary['preset']}, not of {name}")
    if missing := {"preset", *track.same, *track.shared, *track.kept} - {track.score} - summary.keys():
        raise UserError(f"{folder} was made by an older Redline, its summary has no {min(missing)}: train it again")
    if summary["git"] is None or summary["git"]["dirty"]:
        raise UserError(f"{folder} was trained by code that no commit names: commit first, then train again")
    if why := track.objection(summary):
        raise UserError(f"{folder} {why}")
    for field in (track.score, "total_training_time_s"):
        value = summary[field]
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"{folder} has {field} {shown(value)}: expected a finite number; train it again")
    return summary, checkpoint.load_json(folder / "config.json")


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# tracks


def without_core(summary: Summary) -> str | None:
    if "core" not in summary:
        return "has no CORE: train with --core --core-max-per-task None"
    if not summary["core_whole"]:
        return f"has CORE {summary['core_scope']}: train with --core-max-per-task None"
    return None


def outside_the_race(summary: Summary) -> str | None:
    if "val_loss" not in summary:
        return "has no val_loss: give the folder of a run that was validated when it ended"
    if summary["val_tokens"] != FINEWEB_VAL_TOKENS:
        return (
            f"was validated on {summary['val_tokens']} tokens: the race is over the first {FINEWEB_VAL_TOKENS:,} of "
            "the validation split"
        )
    if summary["scale"] != 1:
        return f"is a run at scale {summary['scale']}: the race is at scale 1"
    if not summary["device"].startswith(FINEWEB_DEVICE):
        return f"ran on {summary['device']}: the race is on {FINEWEB_DEVICE}"
    return None


def changed_options(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Names of options that change a run's result and differ."""
    return changed_fields(from_dict(old), from_dict(new))


def changed_leaves(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Names of options that differ, but for PLACES; for a track whose options have a schema of their own."""
    names = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            names += changed_leaves(a, b)
        elif a != b and name not in PLACES:
            names.append(name)
    return names


def number(field: str, digits: int, unit: float = 1.0) -> Callable[[Summary], str]:
    return lambda run: "" if run[field] is None else f"{run[field] / unit:.{digits}f}"


TRACKS = {
    "gpt2": Track(
        score="core",
        words="CORE",
        digits=5,
        threshold=GPT2_CORE,
        below=False,
        same=("git", "device", "precision", "versions", "data", "steps", "tokens"),
        shared=("flops", "params"),
        kept=(
            "seed", "command", "core", "val_bpb", "total_training_time_s", "wall_time_s", "tok_per_s", "mfu",
            "peak_memory_bytes", "energy_j", "cost_dollars",
        ),
        columns={
            "validation bpb": number("val_bpb", 4),
            "training time (s)": number("total_training_time_s", 1),
            "in all (s)": number("wall_time_s", 1),
            "energy (kWh)": number("energy_j", 3, 3.6e6),
            "cost ($)": number("cost_dollars", 2),
        },
        objection=without_core,
        changed=changed_options,
    ),
    "fineweb": Track(
        score="val_loss",
        words="validation loss",
        digits=5,
        threshold=FINEWEB_LOSS,
        below=True,
        same=("git", "sources_digest", "device", "versions", "data", "val_tokens", "scale", "steps"),
        shared=(),
        kept=("seed", "command", "val_loss", "total_training_time_s"),
        columns={
            "training time (s)": number("total_training_time_s", 3),
            "log (SHA-256)": lambda run: run["log_sha256"][:12],
        },
        objection=outside_the_race,
        changed=changed_leaves,
    ),
}  # fmt: skip


# statistics


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def t_statistic(gains: Sequence[float]) -> float:
    """Of the mean's distance from zero; the values differ."""
    return statistics.fmean(gains) / (statistics.stdev(gains) / math.sqrt(len(gains)))


def p_above(values: Sequence[float], threshold: float) -> float:
    """One-sided p-value of a t-test that the mean is above the threshold."""
    gains = [value - threshold for value in values]
    if statistics.stdev(gains) == 0:
        return 0.0 if gains[0] > 0 else 1.0
    return t_survival(t_statistic(gains), len(gains) - 1)


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
    track = TRACKS[record["track"]]
    grid = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("seed", track.words, *track.columns):
        grid.add_column(name, justify="right")
    for run in record["runs"]:
        score = f"{run[track.score]:.{track.digits}f}"
        grid.add_row(str(run["seed"]), score, *(column(run) for column in track.columns.values()))
    for name in ("mean", "sd", "min", "max"):
        score = f"{record[track.score][name]:.{track.digits}f}"
        seconds = track.columns["training time (s)"]({"total_training_time_s": record["total_training_time_s"][name]})
        rest = [seconds if column == "training time (s)" else "" for column in track.columns]
        grid.add_row(name, score, *rest)
    return grid


def why_not(record: dict[str, Any]) -> str | None:
    """Why these runs do not beat the threshold; None if they do."""
    track, said = TRACKS[record["track"]], tested(record)
    if track.gain(record[track.score]["mean"]) <= 0:
        return f"{said}, where a record is {track.side}"
    if not record[track.score]["p"] < SIGNIFICANT:
        return f"{said}, where a record has p < {SIGNIFICANT}: more runs, or better ones, may show it"
    return None


def tested(record: dict[str, Any]) -> str:
    track, score = TRACKS[record["track"]], record[TRACKS[record["track"]].score]
    side = track.side if track.gain(score["mean"]) > 0 else f"not {track.side}"
    return (
        f"mean {track.words} {score['mean']:.6f} of {score['n']} runs is {side} {track.threshold}, t = "
        f"{score['t']:.2f}, p = {score['p']:.2g}"
    )


def verdict(record: dict[str, Any]) -> str:
    seconds = record["total_training_time_s"]
    return f"{tested(record)}: a record, of {seconds['mean']:.2f} ± {seconds['sd']:.2f} s on {record['device']}"


if __name__ == "__main__":
    with one_sentence():
        main(sys.argv[1:])
