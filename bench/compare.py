"""Whether a commit made something slower: `python -m bench.compare BASE [NEW]`.

Both commits are checked out beside each other (git worktrees) and measured by the bench code of this checkout, in two
processes that take turns: a sample of one, a sample of the other, the order changing. The ratio of an item is the
median of the ratios within a turn, with its 95 % bounds.

slower    the ratio is above 1 + threshold. Where memory lies differs from process to process, and with it the time of
          identical code (by up to 1.6x on 2 cores): so PAIRS pairs of processes are measured, the first and new ones;
          all ratios have to be above 1, and their median, which is reported, above 1 + threshold
faster    the same downwards
unclear   the bounds reach beyond the threshold after MAX_TURNS turns, or the pairs of processes disagree
same      the rest

Exit status 1 when something is slower, wrong in NEW, or runs in BASE and not in NEW; 0 otherwise; 2 for bad input.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.history import microseconds
from bench.timing import Spread
from core.stopping import UserError, one_sentence

ROOT = Path(__file__).resolve().parent.parent
WORKING_TREE = "."
THRESHOLD = 0.05
MIN_TURNS, MAX_TURNS = 12, 60
PAIRS = 6  # identical code is on the same side of 1 in all of them once in 32


@dataclass(frozen=True)
class Outcome:
    """What was found of one item.

    verdict   slower, faster, unclear, same, wrong, broken, gone, new or unmeasured; note: what there is to say about it
    base, new seconds per call of the first pair of processes, taken in the same turns
    pairs     ratios of several pairs of processes, where these decided
    """

    item: str
    verdict: str
    note: str = ""
    base: Spread | None = None
    new: Spread | None = None
    pairs: Spread | None = None

    @property
    def ratio(self) -> Spread | None:
        """Time of new over time of base, as it was judged."""
        return self.pairs or (self.new.over(self.base) if self.new and self.base else None)

    @property
    def failed(self) -> bool:
        return self.verdict in ("slower", "wrong", "broken", "gone")


def verdict(ratio: Spread, threshold: float) -> str:
    """Of a ratio of times, new over base."""
    low, high = ratio.bounds
    found = verdict_of(ratio.median, threshold)
    if (found == "slower" and low > 1) or (found == "faster" and high < 1):
        return found
    return "unclear" if high > 1 + threshold else "same"


def verdict_of(median: float, threshold: float) -> str:
    return "slower" if median > 1 + threshold else "faster" if median < 1 / (1 + threshold) else "same"


def settled(ratio: Spread, threshold: float) -> bool:
    """Whether more turns could hardly change the verdict."""
    low, high = ratio.bounds
    return low > 1 + threshold or high < 1 + threshold


# processes ----------------------------------------------------------------


class Side:
    """A process that measures one checkout."""

    def __init__(self, checkout: Path) -> None:
        env = os.environ | {"PYTHONPATH": str(checkout), "TMPDIR": str(checkout.parent)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker"],
            cwd=checkout,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(checkout.with_suffix(".log"), "ab"),
            text=True,
        )
        self.log = checkout.with_suffix(".log")

    def ask(self, command: str, argument: Any = None) -> tuple[Any, str | None]:
        """(reply, None) or (None, what was raised)."""
        try:
            self._process.send_signal(signal.SIGCONT)
            print(json.dumps({command: argument}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
            self._process.send_signal(signal.SIGSTOP)  # its idle threads would spin in the other's turn
        except BrokenPipeError:
            line = ""
        if not line:
            raise UserError(f"the measuring process ended: {self.log.read_text()[-2000:].strip() or 'no message'}")
        reply = json.loads(line)
        return reply.get("ok"), reply.get("raised")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def git(*args: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"git {' '.join(args)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


@contextmanager
def checkouts(base: str, new: str) -> Iterator[tuple[Path, Path]]:
    """Both commits in folders of their own, with the bench code of this checkout."""
    with tempfile.TemporaryDirectory(prefix="redline-compare-") as folder:
        paths = []
        try:
            for name, commit in (("base", base), ("next", new)):  # of equal length: so are the environments
                path = Path(folder) / name
                paths.append(path)
                git("worktree", "add", "--quiet", "--detach", str(path), "HEAD" if commit == WORKING_TREE else commit)
                if commit == WORKING_TREE:
                    listed = git("ls-files", "-z") + "\0" + git("ls-files", "-oz", "--exclude-standard")
                    for part in filter(None, listed.split("\0")):
                        copy(ROOT / part, path / part)
                shutil.rmtree(path / "bench", ignore_errors=True)
                unwanted = shutil.ignore_patterns("__pycache__", "results")
                shutil.copytree(ROOT / "bench", path / "bench", ignore=unwanted)
            yield paths[0], paths[1]
        finally:
            for path in paths:
                subprocess.run(
                    ["git", "-C", str(ROOT), "worktree", "remove", "--force", str(path)], capture_output=True
                )
            git("worktree", "prune")


def copy(source: Path, target: Path) -> None:
    if source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    else:
        target.unlink(missing_ok=True)


# measuring ----------------------------------------------------------------


def compare(item: str, sides: tuple[Side, Side], threshold: float) -> Outcome:
    """One item, which both sides have."""
    try:
        return _compare(item, sides, threshold)
    finally:
        for side in sides:
            side.ask("close")


def _compare(item: str, sides: tuple[Side, Side], threshold: float) -> Outcome:
    variants = []
    for side, name in zip(sides, ("base", "new")):
        opened, raised = side.ask("open", item)
        if wrong := raised or opened.get("error"):
            if name == "base":
                return Outcome(item, "unmeasured", f"in base: {wrong}")
            return Outcome(item, "broken" if raised else "wrong", wrong)
        variants.append(opened["variant"])
    samples: tuple[list[float], list[float]] = ([], [])
    for turn in range(MAX_TURNS):
        for i in (0, 1) if turn % 2 else (1, 0):
            seconds, raised = sides[i].ask("sample")
            if raised:
                return Outcome(item, "broken" if i else "unmeasured", raised)
            samples[i].append(seconds)
        base, new = (Spread(tuple(taken)) for taken in samples)
        if turn + 1 >= MIN_TURNS and settled(new.over(base), threshold):
            break
    note = "" if variants[0] == variants[1] else f"{variants[0]} -> {variants[1]}"
    return Outcome(item, verdict(new.over(base), threshold), note, base, new)


def agreed(outcomes: Sequence[Outcome], threshold: float, pairs: int) -> Outcome:
    """One outcome of several pairs of processes, the first beyond the threshold; unclear until there are `pairs`.

    Judged and reported is the same ratio: the median over the pairs of each pair's own ratio, which is taken in turns.
    Medians of new over medians of base would mix processes that fell differently.
    """
    first = outcomes[0]
    ratios = Spread(tuple(o.ratio.median for o in outcomes))
    said = verdict_of(first.ratio.median, threshold)
    one_side = all((ratio > 1) == (said == "slower") for ratio in ratios.samples)
    agree = one_side and verdict_of(ratios.median, threshold) == said
    if agree and len(outcomes) == pairs:
        return replace(first, verdict=said, pairs=ratios)
    shown = ", ".join(f"{ratio:.3f}" for ratio in ratios.samples)
    return replace(outcomes[-1], verdict="unclear", note=f"pairs of processes disagree: {shown}")


def run(
    paths: tuple[Path, Path], only: str, threshold: float, pairs: int, progress: Callable[[str], None]
) -> list[Outcome]:
    with ExitStack() as open_sides:

        def fresh() -> tuple[tuple[Side, Side], list[list[str]]]:
            sides = tuple(Side(path) for path in paths)
            names = []
            for side in sides:
                open_sides.callback(side.close)
                known, raised = side.ask("items")
                if raised:
                    raise UserError(f"a checkout cannot be measured by this bench: {raised}")
                names.append([name for name in known if re.search(only, name)])
            return sides, names

        sides, (in_base, in_new) = fresh()
        outcomes = {name: Outcome(name, "gone", "not in new") for name in in_base if name not in in_new}
        for name in in_new:
            outcomes[name] = compare(name, sides, threshold) if name in in_base else Outcome(name, "new", "not in base")
            progress(line(outcomes[name]))
        beyond = [o for o in outcomes.values() if o.ratio and verdict_of(o.ratio.median, threshold) != "same"]
        found = {o.item: [o] for o in beyond}
        for turn in range(1, pairs):
            suspects = [name for name, several in found.items() if len(several) == turn]
            if suspects:
                open_sides.close()
                progress(f"{len(suspects)} once more, in new processes ({turn + 1} of {pairs})")
                sides, _ = fresh()
            for name in suspects:
                again = compare(name, sides, threshold)
                if again.ratio is None:
                    outcomes[name] = again
                    continue
                found[name].append(again)
                outcomes[name] = agreed(found[name], threshold, pairs)
                if (again.ratio.median > 1) != (found[name][0].ratio.median > 1):
                    found[name] = []  # settled: they disagree
                progress(line(again))
    return list(outcomes.values())


# report -------------------------------------------------------------------


def line(o: Outcome) -> str:
    if o.ratio is None:
        return f"{o.verdict:<11} {o.item}: {o.note}"
    low, high = o.ratio.bounds
    times = f"{microseconds(o.base.median * 1e6)} -> {microseconds(o.new.median * 1e6)}"
    note = f"  ({o.note})" if o.note else ""
    return f"{o.verdict:<11} {o.ratio.median:6.3f}x  [{low:.3f}, {high:.3f}]  {times:<24} {o.item}{note}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("base", metavar="BASE", help="a commit")
    parser.add_argument(
        "new", metavar="NEW", nargs="?", default="HEAD", help=f"a commit (HEAD), or {WORKING_TREE}: as it is now"
    )
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="items whose name matches, such as rms_norm or decode"
    )
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="slowdown that counts (%(default)s: 5 %%)")
    parser.add_argument(
        "--pairs", type=int, default=PAIRS, help="of processes that must agree on a change (%(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all outcomes, for programs")
    args = parser.parse_args(argv)
    try:
        re.compile(args.only)
    except re.error as error:
        raise UserError(f"--only {args.only}: no regular expression ({error})") from None
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: there is no folder {args.json.parent}")
    if args.pairs < 1:
        raise UserError(f"--pairs is {args.pairs}: expected 1 or more")
    if not 0 < args.threshold < 10:
        raise UserError(f"--threshold is {args.threshold}: expected a share between 0 and 10, such as 0.05")
    commits = [
        c if c == WORKING_TREE else git("rev-parse", "--verify", f"{c}^{{commit}}") for c in (args.base, args.new)
    ]
    print(f"base {commits[0][:12]}, new {commits[1][:12]}: time of new over time of base, [95 % bounds]", flush=True)
    if args.new == "HEAD" and git("status", "--porcelain", "-uno"):
        print(f"changes that are not committed are left out (NEW {WORKING_TREE} takes them)", flush=True)
    with checkouts(*commits) as paths:
        outcomes = run(paths, args.only, args.threshold, args.pairs, lambda text: print(text, flush=True))
    if not outcomes:
        raise UserError(f"--only {args.only} matches no item")
    if args.json:
        entries = [
            {"item": o.item, "verdict": o.verdict, "note": o.note}
            | ({"ratio": o.ratio.median, "bounds": o.ratio.bounds} if o.ratio else {})
            | ({"base_s": o.base.median, "new_s": o.new.median} if o.base and o.new else {})
            for o in outcomes
        ]
        args.json.write_text(json.dumps({"base": commits[0], "new": commits[1], "outcomes": entries}, indent=1) + "\n")
    counts = {v: sum(o.verdict == v for o in outcomes) for v in dict.fromkeys(o.verdict for o in outcomes)}
    print("\n" + ", ".join(f"{n} {v}" for v, n in counts.items()))
    failed = [o for o in outcomes if o.failed]
    for o in sorted(failed, key=lambda o: -(o.ratio.median if o.ratio else 0)):
        print(line(o))
    return 1 if failed else 0


if __name__ == "__main__":
    with one_sentence():
        sys.exit(main(sys.argv[1:]))
