"""What a GPU has to say about this checkout, in one command: `python -m bench.gpu --minutes 8 --out DIR`.

In this order, as far as the time goes:
  tests      of each op on the GPU; an op whose tests fail or do not finish gets no numbers
  ops        ours and the reference, at one real shape of each op, forward and backward
  training   steps at depth 12 and 24, our kernels and the reference, both under torch.compile: tokens/s, MFU, memory, share by op
  ops        every shape, with torch.compile of the reference and the peers that are installed
Training text is the source of the installed Python packages: nothing is downloaded.

DIR: tests.json, ops.jsonl, train.jsonl (rows as in bench/results/, added as they are measured), table.txt, log.txt. It may be
stopped at any time: what was measured is there, and the table says what is missing. Exit status 1 when something was wrong.
`--device cpu` rehearses all of it in small.
"""

import argparse
import dataclasses
import json
import os
import signal
import site
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import results
from bench.suite import Item, items, measure, row
from core.errors import Stopped, user_errors
from core.runlog import device_name
from kernels import dispatch

ROOT = Path(__file__).resolve().parent.parent
RESERVE_S = 10  # to end in
TESTS_SHARE, TRAINING_SHARE = 0.35, 0.4  # of the time, at most
FIRST_SECONDS, LATER_SECONDS = 0.2, 0.2  # for each variant of an item
TEXT_BYTES = 48 << 20
FIRST_CASES = ("depth 24", "depth 24, MLP")
OURS_AND_REFERENCE = ("ref", "triton", "cuda")
DEPTHS = (12, 24)
TRAINING_KERNELS = ("auto", "ref")
MIN_TRAINING_S = 60  # compiling takes most of it
BATCH_TOKENS = 131072
REHEARSAL = "--device cpu --d-model 64 --d-head 16 --seq-len 64 --vocab-size 512 --total-batch-size 1024 --compile"


class Bench:
    def __init__(self, minutes: float, out: Path, device: str) -> None:
        self.out, self.device = out, device
        self.start = time.monotonic()
        self.end = self.start + 60 * minutes - RESERVE_S
        self.minutes = minutes
        self.log = open(out / "log.txt", "wb")
        self.tests: dict[str, str] = {}  # op: passed, or why it has no numbers
        self.rows: list[dict[str, Any]] = []
        self.trained: list[dict[str, Any]] = []
        self.done: set[tuple[str, str]] = set()
        self.missing: list[str] = []

    def left(self) -> float:
        return self.end - time.monotonic()

    def child(self, *args: str, seconds: float) -> subprocess.CompletedProcess | None:
        """Runs python with these arguments; None if it had to be stopped."""
        process = subprocess.Popen([sys.executable, *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=self.log)
        try:
            output, _ = process.communicate(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()
        self.log.write(output)
        self.log.flush()
        return subprocess.CompletedProcess(args, process.returncode, output.decode())

    def add(self, name: str, rows: list[dict[str, Any]]) -> None:
        with open(self.out / name, "a") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in rows)

    # parts

    def test(self) -> None:
        end = time.monotonic() + TESTS_SHARE * 60 * self.minutes
        for module in dict.fromkeys(op.backends["ref"].__module__ for op in dispatch.ops().values()):
            stem = module.split(".")[-1]
            report = self.out / ".tests.xml"
            arguments = (
                "-m",
                "pytest",
                f"tests/test_{stem}.py",
                "-q",
                f"--junitxml={report}",
                "-p",
                "no:cacheprovider",
            )
            done = self.child(*arguments, seconds=min(end - time.monotonic(), self.left()))
            if done is None:
                self.tests[stem] = "its tests did not finish"
            elif done.returncode:
                failed = failures(report) if report.exists() else [f"pytest ended with status {done.returncode}"]
                self.tests[stem] = f"{len(failed)} tests failed: {failed[0]}"
            else:
                self.tests[stem] = "passed"
            report.unlink(missing_ok=True)
            self.say(f"tests of {stem}: {self.tests[stem]}")
            (self.out / "tests.json").write_text(json.dumps(self.tests, indent=1) + "\n")

    def ops(self, chosen: list[tuple[Item, list[str] | None]], seconds: float) -> None:
        for item, variants in chosen:
            names = [name for name in variants or item.variants if (str(item), name) not in self.done]
            names = [name for name in names if name in item.variants]
            stem = dispatch.ops()[item.op].backends["ref"].__module__.split(".")[-1]
            if self.tests.get(stem) != "passed" or not names:
                continue
            if self.left() < 5:
                self.missing.append(f"{item} ({', '.join(names)})")
                continue
            measured = measure(item, names, seconds=seconds)
            entries = [
                row(item, name, result, results.roofline_of(item), results.facts())
                for name, result in measured.items()
                if not result.absent
            ]
            self.done |= {(str(item), name) for name in names}
            self.rows += entries
            self.add("ops.jsonl", entries)

    def train(self) -> None:
        text = self.out / ".packages.jsonl"
        written = write_text(text)
        self.say(f"training text: {written >> 20} MiB of installed packages")
        end = time.monotonic() + TRAINING_SHARE * 60 * self.minutes
        for depth in DEPTHS:
            for kernels in TRAINING_KERNELS:
                seconds = min(end - time.monotonic(), self.left())
                name = f"training at depth {depth}, --kernels {kernels}"
                if seconds < MIN_TRAINING_S and self.device != "cpu":
                    self.missing.append(name)
                    continue
                size = REHEARSAL.split() if self.device == "cpu" else ["--total-batch-size", str(BATCH_TOKENS)]
                depth_here = 2 if self.device == "cpu" else depth
                cache = ("--data", str(text), "--cache-dir", str(self.out / ".cache"))
                options = ("--depth", str(depth_here), "--kernels", kernels, "--steps", "1000", *cache, *size)
                done = self.child("-m", "bench.train_step", "gpt2", *options, seconds=seconds)
                if done is None or done.returncode:
                    why = (
                        "did not finish in time"
                        if done is None
                        else f"ended with status {done.returncode}, see log.txt"
                    )
                    entry = {"depth": depth, "kernels": kernels, "error": why, **results.facts()}
                else:
                    entry = json.loads(done.stdout)
                self.trained.append(entry)
                self.add("train.jsonl", [entry])
                self.say(name + ": " + (entry.get("error") or f"{entry['tok_per_s']:.4g} tokens/s"))
        text.unlink()

    # report

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:5.0f} s] {text}", flush=True)

    def table(self) -> str:
        lines = [f"{results.facts()['device']}, commit {results.facts()['commit']}", ""]
        lines += [f"tests of {stem}: {outcome}" for stem, outcome in self.tests.items()]
        lines += ["", *results.console(self.rows), ""]
        for entry in self.trained:
            title = f"training at depth {entry['depth']}, --kernels {entry['kernels']}"
            if entry.get("error"):
                lines.append(f"{title}: {entry['error']}")
                continue
            mfu = f", MFU {entry['mfu']:.1%}" if entry["mfu"] else ""
            times = f"{entry['step_ms']:.1f} ms [{entry['step_ms_low']:.1f}, {entry['step_ms_high']:.1f}]"
            lines.append(f"{title}, {entry['precision']}: {entry['tok_per_s']:,.0f} tokens/s{mfu}, {times} a step")
            losses = entry["losses"]
            lines.append(f"    {entry['peak_memory_gb']:.1f} GB, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
            shares = list(entry["time_by_op"].items())[:6]
            lines.append("    " + ", ".join(f"{op[:40]} {share:.0%}" for op, share in shares))
        lines += [f"not measured: {name}" for name in self.missing]
        return "\n".join(lines)

    def wrong(self) -> bool:
        red = any(outcome != "passed" for outcome in self.tests.values())
        return red or any(entry.get("error") for entry in (*self.rows, *self.trained))

    def close(self) -> None:
        text = self.table()
        (self.out / "table.txt").write_text(text + "\n")
        print("\n" + text, flush=True)
        self.log.close()


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


def real(item: Item) -> bool:
    """Whether it is an op's, not a program's on the CPU."""
    return item.work is not None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="made if need be, and must be empty")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal in small")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no GPU here that torch can use: --device cpu rehearses")
    if args.minutes * 60 <= 2 * RESERVE_S:
        raise ValueError(f"--minutes is {args.minutes}: expected more than {2 * RESERVE_S / 60:.2g}")
    args.out.mkdir(parents=True, exist_ok=True)
    if any(args.out.iterdir()):
        raise ValueError(f"--out {args.out} is not empty: give a new folder, so that results do not mix")

    def stop(signum: int, _: Any) -> None:
        raise Stopped(f"stopped by {signal.Signals(signum).name}: what was measured is in {args.out}", signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    bench = Bench(args.minutes, args.out, args.device)
    bench.say(f"{device_name(torch.device(args.device))}, {args.minutes:g} minutes")
    everything = [item for item in items() if real(item)]
    first = [item for item in everything if item.case in FIRST_CASES or args.device == "cpu"]
    try:
        bench.test()
        bench.ops([(item, list(OURS_AND_REFERENCE)) for item in first], FIRST_SECONDS)
        bench.say(f"{len(bench.rows)} rows of ops")
        bench.train()
        bench.ops([(item, None) for item in everything], LATER_SECONDS)
    finally:
        bench.close()
    return int(bench.wrong())


if __name__ == "__main__":
    with user_errors():
        sys.exit(main(sys.argv[1:]))
