"""What a GPU has to say about this checkout, in one command: `python -m bench.gpu --minutes 15 --out DIR`.

In this order, each part within its share of the time, training with at least half of it:
  csrc       compiled, if it is not
  tests      of each op against float64, at odd shapes; an op whose tests fail or do not finish gets no numbers
  tune       configs of the ops that take most of a step (bench.tune); what wins is printed, the rest runs as committed
  ops        against the reference, torch.compile and the installed peers: the largest shape of each op first
  training   steps at depth 12 and 24: our kernels in bf16, then in fp8, then the reference under torch.compile
  ops        that were left, if there is time
Training text is the source of the installed Python packages: nothing is downloaded.

DIR: tests.json, tune.jsonl, ops.jsonl, train.jsonl (rows for `python -m bench.history --add DIR`), all written as they
are found, table.txt, log.txt. It may be stopped at any time: what was measured is there, and the table says what is
missing. The last lines answer: is it right, faster than whom, how fast does it train, what to tune next. Exit status 1
when something was wrong. `--device cpu` rehearses all of it in small.
"""

# ruff: noqa: E402
import argparse
import functools
import gc
import importlib.util
import json
import os
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NEEDED = (
    "torch", "triton", "numpy", "tiktoken", "rustbpe", "pyarrow", "tyro", "rich", "matplotlib", "safetensors", "pytest",
    "pytest_benchmark", "hypothesis",
)  # fmt: skip
if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    names = " ".join(lacking).replace("_", "-")
    sys.exit(
        f"bench.gpu: {names} not installed here; without a network, `pip download -d wheels {names}` elsewhere (for "
        f"this Python), and here `pip install --no-index --find-links wheels {names}`"
    )

import torch

from bench import history
from bench.answers import PASSED, answers, training_line
from bench.layers import needed
from bench.projection.redline import redline
from bench.suite import Item, Result, items, measure, row
from core.machine import device_name
from core.stopping import Stopped, UserError, one_sentence
from kernels import extension
from kernels.op import Op
from kernels.ops import BY_NAME

ROOT = Path(__file__).resolve().parent.parent
RESERVE_S = 10  # to end in
TESTS_END, TUNE_END, OPS_END = 0.12, 0.27, 0.45  # of the time: training has the rest
TESTS = "float64"  # of the tests of an op, those that compare with the oracle: no torch.compile
TUNED_OPS = 4
SECONDS = 0.2  # for each variant of an item
ITEM_S = 8  # that must be left for another item
SHARES_SHOWN = 6
TEXT_BYTES = 48 << 20
LOG_BYTES = 8 << 20  # of log.txt that are kept, from its end
POLL_S = 0.2
FP8 = ("--precision", "fp8", "--fp8-head")
# the depth that has a target first, where time is short
RUNS = ("auto", 12), ("auto", 24), ("auto", 24, *FP8), ("auto", 12, *FP8), ("ref", 12), ("ref", 24)
MIN_TRAINING_S = 60  # compiling takes most of it
BATCH_TOKENS = 131072
REHEARSAL = (  # as wide as matrices have to be in fp8
    "--device cpu --depth 2 --d-model 128 --d-head 32 --seq-len 64 --vocab-size 512 --total-batch-size 1024 --compile"
)


class Bench:
    def __init__(self, minutes: float, out: Path, device: str) -> None:
        self.out, self.device = out, device
        self.start = time.monotonic()
        self.end = self.start + 60 * minutes - RESERVE_S
        self.minutes = minutes
        self.scratch = Path(tempfile.mkdtemp(prefix="redline-gpu-"))
        self.log = open(out / "log.txt", "wb")
        self.tests: dict[str, str] = {}  # file of an op: passed, or why it has no numbers
        self.rows: list[dict[str, Any]] = []
        self.trained: list[dict[str, Any]] = []
        self.tuned: list[dict[str, Any]] = []
        self.missing: list[str] = []
        self.measured: set[Item] = set()
        self.children: list[subprocess.Popen] = []

    def until(self, share: float) -> float:
        """When a part has to end that may take up to this share of the time."""
        return min(self.start + share * 60 * self.minutes, self.end)

    def child(self, *args: str, stdout: int | None = None) -> subprocess.Popen:
        """Starts python with these arguments."""
        env = os.environ | {"TMPDIR": str(self.scratch)}
        process = subprocess.Popen(
            [sys.executable, *args], cwd=ROOT, env=env, stdout=stdout or self.log, stderr=self.log
        )
        self.children.append(process)
        return process

    def add(self, name: str, rows: list[dict[str, Any]]) -> None:
        with open(self.out / name, "a") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in rows)

    # parts

    def build(self) -> None:
        """Compile csrc/ where it is not, so that its kernels are tested and measured too."""
        if self.device != "cuda" or extension.missing() is None:
            return
        try:
            status = self.child("-m", "csrc.build").wait(timeout=self.until(TESTS_END) - time.monotonic())
        except subprocess.TimeoutExpired:
            self.kill()
            status = None
        extension.missing.cache_clear()
        if why := extension.missing():
            tried = "did not finish" if status is None else f"ended with status {status}, see log.txt"
            self.missing.append(f"kernels of csrc/, which {why} (python -m csrc.build {tried})")
        self.say("csrc/ compiled" if not why else f"csrc/ {why}")

    def test(self) -> None:
        """Test all ops against float64, several files at a time."""
        end = self.until(TESTS_END)
        waiting = list(dict.fromkeys(stem_of(op) for op in BY_NAME.values()))
        running: dict[str, subprocess.Popen] = {}
        while (waiting or running) and time.monotonic() < end:
            while waiting and len(running) < max(1, os.cpu_count() // 2):
                stem = waiting.pop(0)
                report = ("-p", "no:cacheprovider", f"--junitxml={self.scratch / stem}.xml")
                # pyproject's options need pytest-xdist, which a bare machine lacks and one process a file does not need
                report += ("-o", "addopts=", "-m", "not mutations")
                # of attention also those of its libraries
                files = [str(file.relative_to(ROOT)) for file in sorted((ROOT / "tests").glob(f"test_{stem}*.py"))]
                running[stem] = self.child("-m", "pytest", *files, "-k", TESTS, "-q", *report)
            for stem, process in list(running.items()):
                if process.poll() is not None:
                    del running[stem]
                    self.judge(stem, self.outcome(stem, process.returncode))
            time.sleep(POLL_S)
        for stem in (*running, *waiting):
            self.judge(stem, "its tests did not finish")
        self.kill()

    def outcome(self, stem: str, status: int) -> str:
        if status == 0:
            return PASSED
        report = self.scratch / f"{stem}.xml"
        failed = failures(report) if report.exists() else []
        return f"{len(failed)} tests failed: {failed[0]}" if failed else f"pytest ended with status {status}"

    def judge(self, stem: str, outcome: str) -> None:
        self.tests[stem] = outcome
        self.say(f"tests of {stem}: {outcome}")
        (self.out / "tests.json").write_text(json.dumps(self.tests, indent=1) + "\n")

    def tune(self) -> None:
        """Tune the most valuable ops with a Triton kernel in a process of its own, which may break or hang."""
        chosen = [name for name in by_value() if "triton" in BY_NAME[name].backends]
        chosen = [name for name in chosen if self.tests.get(stem_of(BY_NAME[name])) == PASSED][:TUNED_OPS]
        seconds = self.until(TUNE_END) - time.monotonic()
        if not chosen or seconds < ITEM_S:
            self.missing.append(f"tuning {', '.join(chosen) or 'ops: no tests passed'}")
            return
        options = ("--minutes", f"{seconds / 60:.3f}", "--out", str(self.out), "--device", self.device)
        process = self.child("-u", "-m", "bench.tune", *chosen, *options)
        try:
            status = process.wait(timeout=1.5 * seconds)  # the last step may begin at the end
        except subprocess.TimeoutExpired:
            self.kill()
            status = None
        self.tuned = history.load(self.out / "tune.jsonl")
        done = {entry["task"]["op"] for entry in self.tuned}
        why = "not done in time" if status is None else f"ended with status {status}, see log.txt"
        self.missing += [f"tuning {name}: {why}" for name in chosen if name not in done]
        self.say(f"tuned {', '.join(done) or 'nothing'}")

    def ops(self, chosen: list[Item], variants: list[str] | None, end: float) -> None:
        """Measure items that were not yet, as long as another one fits in before the end."""
        longest = 0.0
        for item in chosen:
            if item in self.measured or self.tests.get(stem_of(BY_NAME[item.op])) != PASSED:
                continue
            if end - time.monotonic() < max(ITEM_S, longest):
                continue
            self.measured.add(item)
            start = time.monotonic()
            try:
                measured = measure(item, variants, seconds=SECONDS)
            except Stopped:
                raise
            except Exception as error:  # out of memory, say: it is told, and the others are measured
                self.log.write(traceback.format_exc().encode())
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                measured = {name: Result(error=reason) for name, absent in item.variants.items() if not absent}
            entries = [
                row(item, name, result, history.roofline_of(item), history.facts())
                for name, result in measured.items()
                if not result.absent
            ]
            longest = max(longest, time.monotonic() - start)
            self.rows += entries
            self.add("ops.jsonl", entries)
        self.say(f"{len(self.rows)} rows of ops")

    def train(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()  # the processes that train have the GPU to themselves
        text = self.scratch / "packages.jsonl"
        written = write_text(text)
        self.say(f"training text: {written >> 20} MiB of installed packages")
        small = self.device == "cpu"
        for request, depth, *more in RUNS:
            name = " ".join([f"training at depth {depth}, --kernels {request}", *more])
            seconds = self.end - time.monotonic()
            if seconds < (1 if small else MIN_TRAINING_S):
                self.missing.append(name)
                continue
            size = REHEARSAL if small else f"--depth {depth} --total-batch-size {BATCH_TOKENS}"
            where = ("--data", str(text), "--cache-dir", str(self.scratch / "cache"))
            options = ("gpt2", "--no-core", "--kernels", request, "--steps", "1000", *size.split(), *more, *where)
            process = self.child("-m", "bench.train_step", *options, stdout=subprocess.PIPE)
            try:
                output, _ = process.communicate(timeout=seconds)
                why = process.returncode and f"ended with status {process.returncode}, see log.txt"
            except subprocess.TimeoutExpired:
                self.kill()
                self.missing.append(f"{name}: not done within {seconds:.0f} s")
                continue
            failed = {"depth": depth, "kernels": request, "error": why, **history.facts()}
            failed |= {"precision": "fp8"} if "fp8" in more else {}
            self.trained.append((failed if why else json.loads(output)) | {"fp8_head": "--fp8-head" in more})
            self.add("train.jsonl", self.trained[-1:])
            self.say(training_line(self.trained[-1]))

    # report

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:5.0f} s] {text}", flush=True)

    def table(self) -> str:
        lines = [f"{history.facts()['device']}, commit {history.facts()['commit']}", ""]
        lines += [f"tests of {stem}: {outcome}" for stem, outcome in self.tests.items()]
        rows = sorted(history.newest(self.rows), key=lambda row: [row[key] for key in history.KEY[:5]])
        lines += ["", *history.console(rows), ""]
        for entry in self.trained:
            lines += [training_line(entry), *training_details(entry)]
        lines += [f"not measured: {name}" for name in self.missing]
        found = answers(self.tests, self.rows, self.trained, self.tuned, self.missing, values())
        return "\n".join([*lines, "", *found])

    def wrong(self) -> bool:
        red = any(outcome != PASSED for outcome in self.tests.values())
        return red or any(entry.get("error") for entry in (*self.rows, *self.trained))

    def kill(self) -> None:
        for process in self.children:
            if process.poll() is None:
                process.kill()
            process.wait()
        self.children.clear()

    def close(self) -> None:
        self.kill()
        self.log.close()
        log = self.out / "log.txt"
        log.write_bytes(log.read_bytes()[-LOG_BYTES:])
        shutil.rmtree(self.scratch)
        text = self.table()
        (self.out / "table.txt").write_text(text + "\n")
        print("\n" + text, flush=True)


def stem_of(op: Op) -> str:
    """The file of an op."""
    return op.cost.__module__.split(".")[-1]


@functools.cache
def values() -> dict[str, float]:
    """Projected seconds of a step at depth 24 that each op takes, in bf16 or in fp8, whichever takes more."""
    found: dict[str, float] = {}
    for workload in (redline(), redline(fp8=True)):
        here: dict[str, float] = {}
        for projected in workload.rows:
            if projected.cost:
                op = projected.cost.op
                here[op] = here.get(op, 0.0) + projected.seconds()
        found = {op: max(found.get(op, 0.0), here.get(op, 0.0)) for op in found | here}
    return found


def by_value() -> list[str]:
    """Ops, the most valuable first."""
    return sorted(BY_NAME, key=lambda name: -values().get(name, 0.0))


def by_importance(chosen: list[Item]) -> list[Item]:
    """The largest item of each op first, most valuable ops before others; then what a layer in fp8 is compared by, and
    the rest, in the same order."""
    largest = {name: max((item.work for item in chosen if item.op == name), default=None) for name in by_value()}
    order = by_value()
    rank = {item: 0 if item.work == largest[item.op] else 1 if needed(item) else 2 for item in chosen}
    return sorted(chosen, key=lambda item: (rank[item], order.index(item.op)))


def training_details(entry: dict[str, Any]) -> list[str]:
    if entry.get("error"):
        return []
    losses, shares = entry["losses"], list(entry["time_by_op"].items())[:SHARES_SHOWN]
    return [
        f"    {entry['precision']}, loss {losses[0]:.3f} -> {losses[-1]:.3f}",
        "    " + ", ".join(f"{op[:48]} {share:.0%}" for op, share in shares),
    ]


def failures(report: Path) -> list[str]:
    cases = ElementTree.parse(report).iter("testcase")
    return [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]


def package_files() -> Iterator[Path]:
    """Python sources of the installed packages, then of the standard library."""
    for folder in dict.fromkeys([*site.getsitepackages(), sysconfig.get_path("stdlib")]):
        yield from sorted(Path(folder).rglob("*.py"))


def write_text(path: Path) -> int:
    """Writes a document a line; returns bytes of text."""
    total = 0
    with open(path, "w") as file:
        for source in package_files():
            try:
                text = source.read_text()
            except (UnicodeDecodeError, OSError):
                continue
            if text:
                file.write(json.dumps({"text": text}) + "\n")
                total += len(text)
            if total > TEXT_BYTES:
                break
    return total


def on_signals(handler: Any) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, handler)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="made if need be, and must be empty")
    parser.add_argument("--commit", help="of this code, where it lies outside of its git checkout")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal in small")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU here that torch can use: --device cpu rehearses")
    if not args.minutes * 60 > 2 * RESERVE_S:
        raise UserError(f"--minutes is {args.minutes}: expected more than {2 * RESERVE_S / 60:.2g}")
    if args.commit:
        history.set_commit(args.commit)
    args.out.mkdir(parents=True, exist_ok=True)
    if any(args.out.iterdir()):
        raise UserError(f"--out {args.out} is not empty: give a new folder, so that results do not mix")

    def stop(signum: int, _: Any) -> None:
        raise Stopped(f"stopped by {signal.Signals(signum).name}: what was measured is in {args.out}", signum)

    bench = Bench(args.minutes, args.out, args.device)
    try:
        on_signals(stop)
        commit = history.facts()["commit"]
        clean = commit is not None and "+" not in commit
        note = (
            ""
            if clean
            else f"; code at {commit}, whose results cannot be stored (commit first; outside of git, --commit)"
        )
        bench.say(f"{device_name(torch.device(args.device))}, {args.minutes:g} minutes{note}")
        bench.build()
        everything = by_importance([item for item in items() if item.op in BY_NAME])
        bench.test()
        bench.tune()
        bench.ops(everything, None, bench.until(OPS_END))
        bench.train()
        bench.ops(everything, None, bench.end)
        bench.missing += [str(item) for item in everything if item not in bench.measured]
    finally:
        on_signals(signal.SIG_IGN)  # a second one must not cost the table
        bench.close()
    return int(bench.wrong())


if __name__ == "__main__":
    with one_sentence():
        sys.exit(main(sys.argv[1:]))
