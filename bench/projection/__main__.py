"""`python -m bench.projection [--plot F.png] [--rows] [--json]`."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from bench.projection.machine import CLASSES
from bench.projection.peers import TOLERANCE, checks
from bench.projection.redline import read_results, redline, with_measurements
from bench.projection.report import NOTE, as_dict, plot, report
from core.stopping import one_sentence


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.projection", description=NOTE)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write a bar chart")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--rows", action="store_true", help="print the check op by op, too")
    parser.add_argument("--depth", type=int, default=24, help="of Redline's budget")
    options = parser.parse_args(args)
    checked, results = checks(), read_results()
    budgets = [with_measurements(redline(options.depth, target), results) for target in (False, True)]
    if options.plot:
        plot([*checked, *budgets], options.plot)
    if options.json:
        classes = {name: dataclasses.asdict(c) for name, c in CLASSES.items()}
        parts = {"checks": [as_dict(w) for w in checked], "budgets": [as_dict(w) for w in budgets]}
        print(json.dumps({"note": NOTE, "tolerance": TOLERANCE, "classes": classes} | parts))
    else:
        print(report(checked, budgets, options.rows))


if __name__ == "__main__":
    with one_sentence():
        main()
