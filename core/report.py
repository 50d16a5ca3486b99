"""What a run shows and leaves behind: console, log.jsonl, summary.json, report.md with its loss curve.

Only rank 0 writes. log.jsonl has one object per line with `event` (start, compile, step, eval, sample, checkpoint,
resume, stop, end), `step` and the event's own fields; each line is flushed as it is written. Times are seconds, rates
per second.
"""

import json
import math
import os
import time
from collections import deque
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from core import machine
from core.communication import World
from core.machine import UNCOUNTED_STEPS
from core.plan import Plan
from core.wandb_mirror import WandbMirror
from kernels import dispatch

HIGH_NON_MATMUL_SHARE = 0.4  # above this the report says why
PLAIN_WIDTH = 140  # of lines that go to a file
RATE_STEPS = 20  # the shown rate is over this many steps


# words


def human(n: float, unit: str = "") -> str:
    """Three digits and a prefix: 1384122122 -> 1.38 G."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= factor:
            return f"{n / factor:.3g} {prefix}{unit}"
    return f"{n:.3g} {unit}".rstrip()


def hours(seconds: float) -> str:
    m, s = divmod(round(seconds), 60)
    h, m = divmod(m, 60)
    return f"{h}:{m:02d}:{s:02d}" if h else f"{m}:{s:02d}"


def longest_run(text: str, char: str) -> int:
    """Length of the longest run of `char` in `text`."""
    longest = run = 0
    for c in text:
        run = run + 1 if c == char else 0
        longest = max(longest, run)
    return longest


# the run's log and console


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
        name = machine.device_name(world.device)
        peak = machine.peak_flops(name) if world.device.type == "cuda" else None
        self.peak = peak and peak * world.world_size
        self._times: deque[tuple[int, float]] = deque(maxlen=RATE_STEPS + 1)
        self._file: TextIO | None = None
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

    def header(self, setup: dict[str, Any], notes: list[str]) -> None:
        """Who runs what where, the plan, and advice."""
        git = setup["git"]
        commit = f"{git['commit'][:12]}{' with changes' if git['dirty'] else ''}" if git else "not a git checkout"
        self.print(f"Redline {setup['preset']}  commit {commit}")
        self.print(f"device    {setup['device']}, {setup['precision']}")
        self.print("versions  " + ", ".join(f"{name} {version}" for name, version in setup["versions"].items()))
        for line in dispatch.summary([dispatch.Choice(**row) for row in setup["kernels"]["choices"]]):
            self.print(f"kernels   {line}")
        self.print(f"data      {setup['data']}")
        self.print(f"run       {self.out}")
        self.print(plan_table(self.plan))
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
            status += f"  {human(rates['tok_per_s'], 'tok/s')}  {speed}  {hours(left)} left"
        if self._progress:
            self._progress.update(self._task, completed=step + 1, status=status)
        elif step % self.log_every == 0 or step + 1 == self.plan.steps:
            self.print(f"step {step + 1}/{self.plan.steps}  {status}")

    def _rates(self) -> dict[str, float]:
        if len(self._times) < 2:
            return {}
        (first, t0), (last, t1) = self._times[0], self._times[-1]
        tokens = (last - first) * self.plan.total_batch_size
        speed = machine.speed(tokens, t1 - t0, self.plan.flops_per_token, self.peak)
        rates = {"tok_per_s": round(speed.tok_per_s, 1), "gflop_per_s": round(speed.flop_per_s / 1e9, 2)}
        return rates | ({"mfu": round(speed.mfu, 5)} if speed.mfu is not None else {})

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
    steps = [(e["step"] + 1, e["loss"]) for e in events if e["event"] == "step" and isinstance(e["loss"], float)]
    evals = [(e["step"], e["val_bpb"]) for e in events if e["event"] == "eval"]
    # here, since importing matplotlib takes half a second that no start should wait for
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # an Agg canvas of its own: the figure needs no display, whatever MPLBACKEND says
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    if steps:
        ax.plot(*zip(*steps), color="tab:blue", linewidth=0.8, alpha=0.5)
        smooth: list[tuple[int, float]] = []
        ema, weight = 0.0, 0.0
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
    if (share := s.get("non_matmul_share")) is not None:
        lines.append(f"| time outside matmul and attention | {100 * share:.0f} % |")
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
            "The compressors saw the same bytes, files concatenated in path order; the model was trained on "
            "other files.",
        ]
    if s.get("time_by_op"):
        lines += ["", "## Where a step's time goes", "", "| op | share |", "|---|--:|"]
        lines += [f"| {name} | {100 * part:.1f} % |" for name, part in s["time_by_op"].items()]
        if share is not None and share > HIGH_NON_MATMUL_SHARE:
            lines += [
                "",
                f"More than {100 * HIGH_NON_MATMUL_SHARE:.0f} % of the time is outside matmul and attention: the "
                "other ops "
                "above pass over activations at the speed of memory, and a narrow model has little arithmetic "
                "per byte.",
            ]
    if s.get("profile_files"):
        lines += [
            "",
            f"More in {', '.join(f'`{name}`' for name in s['profile_files'])}: time lines open at "
            "ui.perfetto.dev, memory "
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
