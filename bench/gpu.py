"""What a GPU has to say about this checkout, in one command: `python -m bench.gpu --minutes 8 --out DIR`.

In this order, as far as the time goes:
  tests      of each op on the GPU; an op whose tests fail or do not finish gets no numbers
  ops        ours and the reference, at one real shape of each op, forward and backward
  training   steps at depth 12 and 24, our kernels and the reference, both under torch.compile: tokens/s, MFU, memory, share by op
  ops        every shape, with torch.compile of the reference and the peers that are installed; ops that have peers first
Training text is the source of the installed Python packages: nothing is downloaded.

DIR: tests.json, ops.jsonl, train.jsonl (rows for `python -m bench.history --add DIR`, written as they are measured), table.txt,
log.txt. It may be stopped at any time: what was measured is there, and the table says what is missing. Exit status 1 when
something was wrong. `--device cpu` rehearses all of it in small.
"""

# ruff: noqa: E402
import argparse
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
        f"bench.gpu: {names} not installed here; without a network, `pip download -d wheels {names}` elsewhere (for this "
        f"Python), and here `pip install --no-index --find-links wheels {names}`"
    )

import torch

from bench import history
from bench.peers import PEERS
from bench.suite import Item, Result, items, measure, row
from core.errors import Stopped, user_errors
from core.runlog import device_name
from kernels import dispatch

ROOT = Path(__file__).resolve().parent.parent
RESERVE_S = 10  # to end in
TESTS_SHARE, TRAINING_SHARE = 0.35, 0.4  # of the time, at most
PASSED = "passed"
SECONDS = 0.2  # for each variant of an item
ITEM_S = 8  # that must be left for another item
SHARES_SHOWN = 6
TEXT_BYTES = 48 << 20
LOG_BYTES = 8 << 20  # of log.txt that are kept, from its end
POLL_S = 0.2
FIRST_CASES = ("depth 24", "depth 24, MLP")
OURS_AND_REFERENCE = ("ref", "triton", "cuda")
DEPTHS = (12, 24)
TRAINING_KERNELS = ("auto", "ref")
MIN_TRAINING_S = 60  # compiling takes most of it
BATCH_TOKENS = 131072
REHEARSAL = (
    "--device cpu --depth 2 --d-model 64 --d-head 16 --seq-len 64 --vocab-size 512 --total-batch-size 1024 --compile"
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
        self.missing: list[str] = []
        self.children: list[subprocess.Popen] = []

    def left(self) -> float:
        return self.end - time.monotonic()

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

    def test(self) -> None:
        """Tests of all ops, several files at a time."""
        end = min(time.monotonic() + TESTS_SHARE * 60 * self.minutes, self.end)
        waiting = [stem_of(op) for op in dispatch.ops().values()]
        waiting = list(dict.fromkeys(waiting))
        running: dict[str, subprocess.Popen] = {}
        while (waiting or running) and time.monotonic() < end:
            while waiting and len(running) < max(1, os.cpu_count() // 2):
                stem = waiting.pop(0)
                report = ("-p", "no:cacheprovider", f"--junitxml={self.scratch / stem}.xml")
                running[stem] = self.child("-m", "pytest", f"tests/test_{stem}.py", "-q", *report)
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

    def ops(self, chosen: list[Item], variants: list[str] | None) -> None:
        longest = 0.0
        for item in chosen:
            if self.tests.get(stem_of(dispatch.ops()[item.op])) != PASSED:
                continue
            if self.left() < max(ITEM_S, longest):
                self.missing.append(f"{item} ({', '.join(variants or item.variants)})")
                continue
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

    def train(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()  # the processes that train have the GPU to themselves
        text = self.scratch / "packages.jsonl"
        written = write_text(text)
        self.say(f"training text: {written >> 20} MiB of installed packages")
        end = min(time.monotonic() + TRAINING_SHARE * 60 * self.minutes, self.end)
        small = self.device == "cpu"
        for depth in DEPTHS:
            for kernels in TRAINING_KERNELS:
                seconds = end - time.monotonic()
                if seconds < (1 if small else MIN_TRAINING_S):
                    self.missing.append(f"training at depth {depth}, --kernels {kernels}")
                    continue
                size = REHEARSAL if small else f"--depth {depth} --total-batch-size {BATCH_TOKENS}"
                where = ("--data", str(text), "--cache-dir", str(self.scratch / "cache"))
                options = ("gpt2", "--kernels", kernels, "--steps", "1000", *size.split(), *where)
                process = self.child("-m", "bench.train_step", *options, stdout=subprocess.PIPE)
                try:
                    output, _ = process.communicate(timeout=seconds)
                    why = process.returncode and f"ended with status {process.returncode}, see log.txt"
                except subprocess.TimeoutExpired:
                    self.kill()
                    self.missing.append(
                        f"training at depth {depth}, --kernels {kernels}: not done within {seconds:.0f} s"
                    )
                    continue
                failed = {"depth": depth, "kernels": kernels, "error": why, **history.facts()}
                self.trained.append(failed if why else json.loads(output))
                self.add("train.jsonl", self.trained[-1:])
                self.say(training_lines(self.trained[-1])[0])

    # report

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:5.0f} s] {text}", flush=True)

    def table(self) -> str:
        lines = [f"{history.facts()['device']}, commit {history.facts()['commit']}", ""]
        lines += [f"tests of {stem}: {outcome}" for stem, outcome in self.tests.items()]
        rows = sorted(history.newest(self.rows), key=lambda row: [row[key] for key in history.KEY[:5]])
        lines += ["", *history.console(rows), ""]
        for entry in self.trained:
            lines += training_lines(entry)
        lines += [f"not measured: {name}" for name in self.missing]
        return "\n".join(lines)

    def wrong(self) -> bool:
        red = any(outcome != "passed" for outcome in self.tests.values())
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


def stem_of(op: dispatch.Op) -> str:
    """The file of an op."""
    return op.backends["ref"].__module__.split(".")[-1]


def training_lines(entry: dict[str, Any]) -> list[str]:
    title = f"training at depth {entry['depth']}, --kernels {entry['kernels']}"
    if entry.get("error"):
        return [f"{title}: {entry['error']}"]
    mfu = f", MFU {entry['mfu']:.1%}" if entry["mfu"] else ""
    times = f"{entry['step_ms']:.1f} ms [{entry['step_ms_low']:.1f}, {entry['step_ms_high']:.1f}]"
    losses, shares = entry["losses"], list(entry["time_by_op"].items())[:SHARES_SHOWN]
    return [
        f"{title}, {entry['precision']}: {entry['tok_per_s']:,.0f} tokens/s{mfu}, {times} a step",
        f"    {entry['peak_memory_gb']:.1f} GB at most, loss {losses[0]:.3f} -> {losses[-1]:.3f}",
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
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="made if need be, and must be empty")
    parser.add_argument("--commit", help="of this code, where it lies outside of its git checkout")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal in small")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no GPU here that torch can use: --device cpu rehearses")
    if not args.minutes * 60 > 2 * RESERVE_S:
        raise ValueError(f"--minutes is {args.minutes}: expected more than {2 * RESERVE_S / 60:.2g}")
    if args.commit:
        history.set_commit(args.commit)
    args.out.mkdir(parents=True, exist_ok=True)
    if any(args.out.iterdir()):
        raise ValueError(f"--out {args.out} is not empty: give a new folder, so that results do not mix")

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
        everything = [item for item in items() if item.op in dispatch.ops()]
        first = [item for item in everything if item.case in FIRST_CASES or args.device == "cpu"]
        bench.test()
        bench.ops(first, list(OURS_AND_REFERENCE))
        bench.say(f"{len(bench.rows)} rows of ops")
        bench.train()
        bench.ops(sorted(everything, key=lambda item: (item.op not in PEERS, item not in first)), None)
    finally:
        on_signals(signal.SIG_IGN)  # a second one must not cost the table
        bench.close()
    return int(bench.wrong())


if __name__ == "__main__":
    with user_errors():
        sys.exit(main(sys.argv[1:]))
