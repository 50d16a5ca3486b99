"""What a run shows and leaves behind: console, log.jsonl, summary.json, report.md with its loss curve.

Only rank 0 writes. log.jsonl has one object per line with `event` (start, compile, step, eval, sample, checkpoint, resume,
stop, end), `step` and the event's own fields; each line is flushed as it is written. Times are seconds, rates per second.
"""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor

from core.distributed import World
from core.plan import Plan
from core.wandb_mirror import WandbMirror
from kernels import dispatch

UNCOUNTED_STEPS = 11  # steps 0..10 warm caches and compilers; the training clock leaves them out, as nanochat's does
HIGH_NON_MATMUL_SHARE = 0.4  # above this the report says why
PLAIN_WIDTH = 140  # of lines that go to a file
RATE_STEPS = 20  # the shown rate is over this many steps

# dense bf16 tensor-core peak in FLOP/s by a part of the device's name, first match counts [nanochat 92d63d4 core/common.py]
PEAK_BF16_FLOPS = (
    ("GB200", 2.5e15), ("B200", 2.25e15), ("B100", 1.8e15),
    ("H200 NVL", 836e12), ("H200", 989e12), ("H100 NVL", 835e12), ("H100 PCIe", 756e12), ("H100", 989e12),
    ("A100", 312e12), ("L40S", 362e12), ("L4", 121e12), ("RTX 5090", 209.5e12), ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12), ("MI355", 2.5e15), ("MI300X", 1.3074e15),
)  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """bf16 peak of a device in FLOP/s; None when unknown, and always for CPUs."""
    return next((peak for part, peak in PEAK_BF16_FLOPS if part in device_name), None)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16 or AMX)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def git_state() -> dict[str, Any] | None:
    """Commit of the code that runs and whether it was changed since; None outside a git checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        run = [
            subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True).stdout.strip()
            for args in (("rev-parse", "--show-toplevel"), ("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": run[1], "dirty": bool(run[2])} if Path(run[0]) == root else None


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: allocated on the GPU, resident for a CPU process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def human(n: float, unit: str = "") -> str:
    """Three digits and a prefix: 1384122122 -> 1.38 G."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= factor:
            return f"{n / factor:.3g} {prefix}{unit}"
    return f"{n:.3g} {unit}".rstrip()


def clock(seconds: float) -> str:
    m, s = divmod(round(seconds), 60)
    h, m = divmod(m, 60)
    return f"{h}:{m:02d}:{s:02d}" if h else f"{m}:{s:02d}"


class TrainingClock:
    """Training time as the races count it: optimizer steps from data to update, without evaluation, samples and saves.

    The device is synchronised where the clock starts and stops, not at every step. Steps 0 to UNCOUNTED_STEPS - 1 are
    left out.
    """

    def __init__(self, device: torch.device, counted_s: float = 0.0, counted_steps: int = 0) -> None:
        self.device = device
        self.counted_s, self.counted_steps = counted_s, counted_steps
        self._start: float | None = None
        self._counts = False
        self._steps = 0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def before_step(self, step: int) -> None:
        counts = step >= UNCOUNTED_STEPS
        if self._start is not None and counts != self._counts:
            self.stop()
        if self._start is None:
            self._start, self._counts, self._steps = self._now(), counts, 0

    def after_step(self) -> None:
        self._steps += 1

    def stop(self) -> None:
        if self._start is None:
            return
        if self._counts:
            self.counted_s += self._now() - self._start
            self.counted_steps += self._steps
        self._start = None


class LaggingLoss:
    """Reads each step's loss one step late on a GPU, so that reading it never waits for the step just launched.

    The wish of any process to stop rides with the loss: both are averaged over ranks in one tensor, and how many entries
    are read when is the same on every rank, so that all learn of it at the same step.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[int, Tensor, Any]] = deque()

    def put(self, step: int, outcome: Tensor) -> None:
        """outcome: (2,) loss, and more than 0 when a process shall stop; means over ranks."""
        event = None
        if outcome.is_cuda:
            pinned = torch.empty_like(outcome, device="cpu", pin_memory=True)  # a copy to pageable memory would wait
            outcome = pinned.copy_(outcome, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((step, outcome, event))

    def take(self, *, flush: bool = False) -> list[tuple[int, float, bool]]:
        """(step, loss, stop) of the steps that may be read now; all of them with `flush`, and when one says stop."""
        done = []
        while self._pending and (flush or self._pending[0][2] is None or len(self._pending) > 1):
            step, outcome, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            loss, wish = outcome.tolist()
            done.append((step, loss, wish > 0))
            flush |= wish > 0
        return done


class RunLog:
    """The run folder and the console of one run."""

    def __init__(
        self,
        out: Path,
        world: World,
        plan: Plan,
        *,
        log_every: int,
        start_step: int = 0,
        log_bytes: int | None = None,
        mirror: WandbMirror | None = None,
    ):
        self.out, self.plan, self.log_every, self.mirror = out, plan, log_every, mirror
        self.is_main = world.is_main
        self.console = Console(highlight=False, soft_wrap=True, quiet=not self.is_main)
        if not self.console.is_terminal:
            self.console.width = PLAIN_WIDTH
        name = device_name(world.device)
        peak = peak_flops(name) if world.device.type == "cuda" else None
        self.peak = peak and peak * world.world_size
        self._times: deque[tuple[int, float]] = deque(maxlen=RATE_STEPS + 1)
        self._file = None
        self._progress: Progress | None = None
        if not self.is_main:
            return
        out.mkdir(parents=True, exist_ok=True)
        path = out / "log.jsonl"
        if log_bytes is None:
            self._file = path.open("x")
        else:
            if path.exists():
                os.truncate(path, min(log_bytes, path.stat().st_size))
            self._file = path.open("a")
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[status]}"),
                console=self.console,
            )
            self._task = self._progress.add_task("", total=plan.steps, completed=start_step, status="")
            self._progress.start()

    @property
    def log_bytes(self) -> int:
        """Size of log.jsonl so far; a checkpoint stores it, a resumed run cuts the file back to it."""
        return self._file.tell() if self._file else 0

    def event(self, event: str, step: int, **fields: Any) -> None:
        if not self._file:
            return
        line = {"event": event, "step": step, "time": round(time.time(), 3), **fields}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self.mirror:
            self.mirror.event(line)

    def print(self, text: Any = "") -> None:
        self.console.print(text, markup=False) if isinstance(text, str) else self.console.print(text)

    def header(self, facts: dict[str, Any], plan: Plan, notes: list[str]) -> None:
        """Who runs what where, the plan, and advice."""
        git = facts["git"]
        commit = f"{git['commit'][:12]}{' with changes' if git['dirty'] else ''}" if git else "not a git checkout"
        self.print(f"Redline {facts['preset']}  commit {commit}")
        self.print(f"device    {facts['device']}, {facts['precision']}")
        self.print("versions  " + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
        for line in dispatch.summary([dispatch.Choice(**row) for row in facts["kernels"]["choices"]]):
            self.print(f"kernels   {line}")
        self.print(f"data      {facts['data']}")
        self.print(f"run       {self.out}")
        self.print(plan_table(plan))
        for note in notes:
            self.print(f"note: {note}")

    def eval(self, step: int, bpb: float, scope: str, data: dict[str, float]) -> None:
        """data: what the loader has counted so far."""
        self.event("eval", step, val_bpb=bpb, scope=scope, data=data)
        self.print(
            f"step {step}/{self.plan.steps}  validation {bpb:.4f} bits per byte (fixed subset)  "
            f"{human(data['tokens'], 'tokens')} of {data['documents']:,} documents, {data['epochs']:.2f} epochs, "
            f"{100 * data['crop_waste']:.1f} % cropped"
        )

    def sample(self, step: int, texts: list[tuple[str, str]], **options: Any) -> None:
        """texts: (prompt, continuation) pairs."""
        self.event("sample", step, samples=[{"prompt": p, "text": t} for p, t in texts], **options)
        for prompt, text in texts:
            self.print(f"--- sample at step {step}\n{prompt}{text}\n---")

    def pause_rate(self) -> None:
        """Forgets step times: what follows is not training."""
        self._times.clear()

    def step(self, step: int, loss: float) -> None:
        """Logs one finished step (its loss as the mean over its tokens, nats)."""
        self._times.append((step, time.perf_counter()))
        rates = self._rates()
        self.event("step", step, loss=loss if math.isfinite(loss) else str(loss), **rates)
        status = f"loss {loss:.4f}"
        if rates:
            speed = f"MFU {100 * rates['mfu']:.1f} %" if "mfu" in rates else f"{rates['gflop_per_s']:.0f} GFLOP/s"
            left = (self.plan.steps - step - 1) * self.plan.total_batch_size / rates["tok_per_s"]
            status += f"  {human(rates['tok_per_s'], 'tok/s')}  {speed}  {clock(left)} left"
        if self._progress:
            self._progress.update(self._task, completed=step + 1, status=status)
        elif step % self.log_every == 0 or step + 1 == self.plan.steps:
            self.print(f"step {step + 1}/{self.plan.steps}  {status}")

    def _rates(self) -> dict[str, float]:
        if len(self._times) < 2:
            return {}
        (first, t0), (last, t1) = self._times[0], self._times[-1]
        tok_per_s = (last - first) * self.plan.total_batch_size / (t1 - t0)
        flop_per_s = tok_per_s * self.plan.flops_per_token
        rates = {"tok_per_s": round(tok_per_s, 1), "gflop_per_s": round(flop_per_s / 1e9, 2)}
        return rates | ({"mfu": round(flop_per_s / self.peak, 5)} if self.peak else {})

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None
        if self._file:
            self._file.close()
            self._file = None
        if self.mirror:
            self.mirror.close()
            self.mirror = None


def plan_table(plan: Plan) -> Table:
    """The plan as a table for people."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, n in plan.params.items():
        table.add_row(f"parameters: {name}", f"{n:,}")
    table.add_row("parameters: total", f"{plan.params_total:,}")
    table.add_row("scaling parameters (layers + head)", f"{plan.params_scaling:,}")
    table.add_row("training FLOPs per token", human(plan.flops_per_token, "FLOP"))
    table.add_row(
        "batch", f"{plan.total_batch_size:,} tokens = {plan.rows_per_step} rows over {plan.world_size} process(es)"
    )
    table.add_row("device batch", f"{plan.device_batch_size} rows x {plan.grad_accum_steps} micro-steps")
    table.add_row("horizon", f"{plan.steps:,} steps, {human(plan.tokens, 'tokens')}, {human(plan.flops, 'FLOP')}")
    table.add_row("learning rates", ", ".join(f"{name} {lr:.4g}" for name, lr in plan.lr.items()))
    table.add_row("weight decay of matrices", f"{plan.weight_decay:.4g}")
    parts = ", ".join(f"{k} {human(v, 'B')}" for k, v in plan.memory_bytes.items() if k != "total")
    table.add_row("predicted memory of tensors, per process", f"{human(plan.memory_bytes['total'], 'B')} ({parts})")
    return table


def render(table: Table) -> str:
    """A table as plain text."""
    console = Console(width=PLAIN_WIDTH, color_system=None, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def sum_stats(stats: list[dict[str, float]]) -> dict[str, float]:
    """Loader statistics of all ranks as one: counts add up, shares and epochs are means."""
    total = {key: sum(s[key] for s in stats) for key in stats[0]}
    return total | {key: total[key] / len(stats) for key in ("epochs", "crop_waste")}


def verdict(out: Path, summary: dict[str, Any]) -> str:
    """The result in three lines."""
    s = summary
    others = "".join(f", {name} {bpb:.4f}" for name, bpb in s["compressors"].items())
    return (
        f"validation {s['val_bpb']:.4f} bits per byte{others}\n  ({s['val_scope']})\n"
        f"training {s['total_training_time_s']:.1f} s on the clock, {s['wall_time_s']:.1f} s in all\n"
        f"report: {out / 'report.md'}"
    )


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def plot_loss(events: list[dict[str, Any]], path: Path) -> None:
    """Training loss (nats per token) and validation bits per byte over steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [(e["step"] + 1, e["loss"]) for e in events if e["event"] == "step" and isinstance(e["loss"], float)]
    evals = [(e["step"], e["val_bpb"]) for e in events if e["event"] == "eval"]
    figure, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    if steps:
        ax.plot(*zip(*steps), color="tab:blue", linewidth=0.8, alpha=0.5)
        smooth, ema, weight = [], 0.0, 0.0
        for step, loss in steps:
            ema, weight = 0.95 * ema + 0.05 * loss, 0.95 * weight + 0.05
            smooth.append((step, ema / weight))
        ax.plot(*zip(*smooth), color="tab:blue")
    ax.set_xlabel("step")
    ax.set_ylabel("training loss (nats per token)", color="tab:blue")
    if evals:
        right = ax.twinx()
        right.plot(*zip(*evals), "o-", color="tab:red", markersize=4)
        right.set_ylabel("validation, fixed subset (bits per byte)", color="tab:red")
    ax.grid(alpha=0.3)
    tmp = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(tmp, dpi=120)
    plt.close(figure)
    os.replace(tmp, path)


def write_report(out: Path, summary: dict[str, Any]) -> None:
    """report.md and loss.png from the summary and log.jsonl."""
    events = read_log(out / "log.jsonl")
    plot_loss(events, out / "loss.png")
    s = summary
    lines = [
        f"# {s['preset']}: {s['val_bpb']:.4f} bits per byte",
        "",
        f"{s['params']['total']:,} parameters, {s['tokens']:,} tokens in {s['steps']:,} steps, on {s['device']}, "
        f"torch {s['versions']['torch']}, {s['precision']}.",
        "",
        "![loss curve](loss.png)",
        "",
        "| | |",
        "|---|--:|",
        f"| training time, first {UNCOUNTED_STEPS} steps not counted | {s['total_training_time_s']:.1f} s |",
        f"| command to report | {s['wall_time_s']:.1f} s |",
    ]
    if s["tok_per_s"]:
        lines.append(f"| throughput | {human(s['tok_per_s'], 'tok/s')}, {human(s['flop_per_s'], 'FLOP/s')} |")
    if s["mfu"]:
        lines.append(f"| MFU (bf16 peak) | {100 * s['mfu']:.1f} % |")
    lines.append(f"| peak memory | {human(s['peak_memory_bytes'], 'B')} |")
    if s.get("non_matmul_share") is not None:
        lines.append(f"| time outside matmul and attention | {100 * s['non_matmul_share']:.0f} % |")
    lines += [
        "",
        "## Compression of the validation text",
        "",
        s["val_scope"] + ".",
        "",
        "| | bits per byte |",
        "|---|--:|",
    ]
    rows = {"this model": s["val_bpb"], **s["compressors"]}
    lines += [f"| {name} | {bpb:.4f} |" for name, bpb in sorted(rows.items(), key=lambda item: item[1])]
    if s["compressors"]:
        lines += [
            "",
            "The compressors saw the same bytes, files concatenated in path order; the model was trained on other files.",
        ]
    if s.get("time_by_op"):
        lines += ["", "## Where a step's time goes", "", "| op | share |", "|---|--:|"]
        lines += [f"| {name} | {100 * share:.1f} % |" for name, share in s["time_by_op"].items()]
        if s["non_matmul_share"] > HIGH_NON_MATMUL_SHARE:
            lines += [
                "",
                f"More than {100 * HIGH_NON_MATMUL_SHARE:.0f} % of the time is outside matmul and attention: the other ops "
                "above pass over activations at the speed of memory, and a narrow model has little arithmetic per byte.",
            ]
    if s.get("profile_files"):
        lines += [
            "",
            f"More in {', '.join(f'`{name}`' for name in s['profile_files'])}: time lines open at ui.perfetto.dev, memory "
            "snapshots of GPUs at pytorch.org/memory_viz.",
        ]
    lines += ["", "## Samples", ""]
    for e in [e for e in events if e["event"] == "sample"][-1:]:
        for sample in e["samples"]:
            fence = "`" * max(3, 1 + longest_run(sample["prompt"] + sample["text"], "`"))
            lines += [fence, sample["prompt"] + sample["text"], fence, ""]
    tmp = out / ".report.md.tmp"
    tmp.write_text("\n".join(lines))
    os.replace(tmp, out / "report.md")


def set_aside(out: Path) -> list[tuple[Path, Path]]:
    """Renames the summary and the report of a run that had ended and goes on, so that nobody takes them for its result."""
    if not (out / "summary.json").exists():
        return []
    steps = json.loads((out / "summary.json").read_text())["steps"]
    moved = [(path, path.with_stem(f"{path.stem}-{steps}-steps")) for path in (out / "summary.json", out / "report.md")]
    moved = [(old, new) for old, new in moved if old.exists()]
    for old, new in moved:
        old.rename(new)
    return moved


def longest_run(text: str, char: str) -> int:
    """Length of the longest run of `char` in `text`."""
    longest = run = 0
    for c in text:
        run = run + 1 if c == char else 0
        longest = max(longest, run)
    return longest
