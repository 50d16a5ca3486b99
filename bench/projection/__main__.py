"""`python -m bench.projection [--plot F.png] [--rows] [--json]`, `python -m bench.projection --gpus 1,8,16,64`,
`python -m bench.projection fineweb [--rows] [--json]`."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from bench.projection.machine import CLASSES, GPUS, TOLERANCE
from bench.projection.peers import checks
from bench.projection.race import race_dict, race_lines
from bench.projection.redline import read_models, read_results, redline, with_measurements
from bench.projection.report import NOTE, as_dict, levers, plot, progress, report
from bench.projection.scale import scale_report
from core.stopping import UserError, one_sentence


def gpu_counts(text: str) -> list[int]:
    """ "1,8,16" as numbers; UserError where they fill no nodes."""
    counts = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if bad := [n for n in counts if not (0 < n <= GPUS or n % GPUS == 0 and n)]:
        raise UserError(f"--gpus {text}: expected numbers of up to {GPUS} or multiples of it, not {bad[0]}")
    return counts


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.projection", description=NOTE)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write a bar chart")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--rows", action="store_true", help="print the check op by op, too")
    parser.add_argument("--depth", type=int, default=24, help="of Redline's budget")
    parser.add_argument("--gpus", metavar="N,N,...", help="what a token costs on 1 GPU, 8 or nodes of 8, instead")
    parser.add_argument("--grow", action="store_true", help="with --gpus: the batch grows with the nodes")
    parser.add_argument("--fa3", action="store_true", help="with --gpus: attention by FlashAttention 3")
    parser.add_argument(
        "track", nargs="?", choices=("gpt2", "fineweb"), default="gpt2", help="fineweb: that race's run"
    )
    options = parser.parse_args(args)
    if options.track == "fineweb":
        if other := [
            n for n in ("plot", "depth", "gpus", "grow", "fa3") if getattr(options, n) != parser.get_default(n)
        ]:
            raise UserError(f"--{other[0]} is of the track gpt2: leave it out, or fineweb")
        if options.json:
            print(json.dumps({"note": NOTE} | race_dict()))
        else:
            print("\n".join(["# The race to 3.28 on 8 H100s", "", f"**{NOTE}**", "", *race_lines(rows=options.rows)]))
        return
    if options.gpus:
        text, found = scale_report(gpu_counts(options.gpus), options.depth, options.fa3, options.grow)
        print(json.dumps({"note": NOTE} | found) if options.json else text)
        return
    checked, results, models = checks(), read_results(), read_models()
    alone = [{"gpus": 1, "fa3": fa3, "fp8": fp8} for fp8 in (False, True) for fa3 in (False, True)]
    together = [{"fp8": False}, {"fp8": True}, {"target": True}]
    budgets = [with_measurements(redline(options.depth, **kind), results, models) for kind in (*alone, *together)]
    so_far, gains = progress(*budgets[-3:]), levers(*budgets[-2:])
    if options.plot:
        plot([*checked, *budgets], options.plot)
    if options.json:
        classes = {name: dataclasses.asdict(c) for name, c in CLASSES.items()}
        parts = {"checks": [as_dict(w) for w in checked], "budgets": [as_dict(w) for w in budgets]}
        parts |= {"step_ms": so_far.as_dict(), "levers_ms": {group: 1e3 * gain for group, gain in gains}}
        print(json.dumps({"note": NOTE, "tolerance": TOLERANCE, "classes": classes} | parts))
    else:
        print(report(checked, budgets, so_far, gains, options.rows))


if __name__ == "__main__":
    with one_sentence():
        main()
