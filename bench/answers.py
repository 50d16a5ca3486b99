"""What a GPU run found, in LINES lines: right? faster than whom? a layer in fp8? how fast does it train? what to tune
next?"""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.history import KEY, microseconds
from bench.layers import OURS, layer_lines

LINES = 40
PASSED = "passed"
SHOWN = {"right": 7, "faster": 9, "layers": 4, "trains": 8, "next": 6}  # lines of each answer
FP8_GAINS = {24: 1.3}  # depth: what fp8 shall make of the tokens/s of bf16

Row = Mapping[str, Any]


def answers(
    tests: Mapping[str, str],
    rows: Sequence[Row],
    trained: Sequence[Row],
    tuned: Sequence[Row],
    missing: Sequence[str],
    value: Mapping[str, float],
) -> list[str]:
    """At most LINES lines. value: projected seconds of a step that each op takes; ops with more are named earlier."""
    parts = {
        "right": right(tests, rows, trained),
        "faster": [faster(item) for item in by_item(rows, value) if compared(item)] or ["nothing was compared"],
        "layers": layer_lines(rows) or ["nothing was measured in fp8"],
        "trains": [*map(training_line, trained), *fp8_gains(trained)] or ["nothing was trained"],
        "next": next_to_tune(rows, tuned, value) or ["nothing is known"],
    }
    titles = {
        "right": "Right?",
        "faster": "Faster than whom?",
        "layers": "A layer in fp8?",
        "trains": "tokens/s and MFU?",
        "next": "Tune what next?",
    }
    lines = []
    for name, found in parts.items():
        hidden = len(found) - SHOWN[name]
        shown = found if hidden <= 0 else [*found[: SHOWN[name] - 1], f"and {hidden + 1} more in table.txt"]
        lines += [titles[name], *(f"  {text}"[:160] for text in shown)]
    return lines + ([f"not measured: {len(missing)} items, named in table.txt"] if missing else [])


def right(tests: Mapping[str, str], rows: Sequence[Row], trained: Sequence[Row]) -> list[str]:
    """Counts, then whatever is wrong."""
    passed = sum(outcome == PASSED for outcome in tests.values())
    wrong = [row for row in rows if row.get("error")]
    lawful = len(rows) - len(wrong)
    lines = [f"tests of {passed} of {len(tests)} files passed; {lawful} of {len(rows)} variants keep the law"]
    lines += [f"WRONG  tests of {stem}: {outcome}" for stem, outcome in tests.items() if outcome != PASSED]
    lines += [f"WRONG  {' '.join(str(row[key]) for key in KEY)}: {row['error']}" for row in wrong]
    return lines + [f"WRONG  {training_line(entry)}" for entry in trained if entry.get("error")]


def by_item(rows: Sequence[Row], value: Mapping[str, float]) -> list[dict[str, Row]]:
    """Backend -> row of each item that was timed, the most valuable op first."""
    items: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if "us" in row:
            items.setdefault(tuple(row[key] for key in KEY[:5]), {})[row["backend"]] = row
    return sorted(items.values(), key=lambda item: -value.get(next(iter(item.values()))["op"], 0.0))


def ours(item: Mapping[str, Row]) -> Row | None:
    return min((row for name, row in item.items() if name in OURS), key=lambda row: row["us"], default=None)


def compared(item: Mapping[str, Row]) -> bool:
    return ours(item) is not None and len(item.keys() - set(OURS)) > 0


def faster(item: Mapping[str, Row]) -> str:
    mine = ours(item)
    assert mine is not None
    others = {name: row["us"] / mine["us"] for name, row in item.items() if name not in OURS}
    ratios = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in sorted(others.items(), key=lambda pair: pair[1]))
    slower = "  SLOWER" if min(others.values()) < 1 else ""
    return f"{named(mine)}: {mine['backend']} {microseconds(mine['us'])}; {ratios}{slower}"


def named(row: Row) -> str:
    return " ".join(str(row[key]) for key in KEY[:4])


def training_line(entry: Row) -> str:
    in_fp8 = [", fp8"] * (entry.get("precision") == "fp8") + [", fp8 head"] * bool(entry.get("fp8_head"))
    title = f"depth {entry['depth']}, --kernels {entry['kernels']}{''.join(in_fp8)}"
    if entry.get("error"):
        return f"{title}: {entry['error']}"
    mfu = f", MFU {entry['mfu']:.1%}" if entry["mfu"] else ""
    times = f"{entry['step_ms']:.1f} ms [{entry['step_ms_low']:.1f}, {entry['step_ms_high']:.1f}]"
    return f"{title}: {entry['tok_per_s']:,.0f} tokens/s{mfu}, {times} a step, {entry['peak_memory_gb']:.1f} GB"


def fp8_gains(trained: Sequence[Row]) -> list[str]:
    """Of each depth that was trained in both."""
    runs = [entry for entry in trained if not entry.get("error") and entry["kernels"] == "auto"]
    bf16 = {run["depth"]: run for run in runs if run.get("precision") == "bfloat16" and not run.get("fp8_head")}
    fp8 = {run["depth"]: run for run in runs if run.get("precision") == "fp8"}
    lines = []
    for depth in sorted(bf16.keys() & fp8.keys()):
        gain = fp8[depth]["tok_per_s"] / bf16[depth]["tok_per_s"]
        target = f" (target {FP8_GAINS[depth]}x)" if depth in FP8_GAINS else ""
        lines.append(f"depth {depth}: fp8 {gain:.2f}x the tokens/s of bf16{target}")
    return lines


def next_to_tune(rows: Sequence[Row], tuned: Sequence[Row], value: Mapping[str, float]) -> list[str]:
    """Configs to commit, then the ops by the milliseconds of a step that lie between them and the roofline."""
    lines = []
    for entry in tuned:
        for key, config in entry["changed"].items():
            lines.append(f"commit {key} -> {config}")
    lost = []
    for item in by_item(rows, value):
        mine = ours(item)
        if mine is not None and "roofline_fraction" in mine:
            fraction, op = mine["roofline_fraction"], mine["op"]
            lost.append(
                (value.get(op, 0.0) * max(0.0, 1 - fraction), f"{named(mine)} at {fraction:.0%} of the roofline")
            )
    lost.sort(key=lambda pair: -pair[0])
    return lines + [f"{text}: up to {1e3 * seconds:.1f} ms of a step" for seconds, text in lost if seconds > 0]
