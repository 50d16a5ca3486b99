"""What a run shows and leaves behind: console, log.jsonl, summary.json, report.md with its loss curve.

Only rank 0 writes. log.jsonl has one object per line with `event` (start, compile, step, eval, sample, checkpoint,
saved, unsaved, resume, stop, stopped, end), `step` and the event's own fields. A line is in the file when `event`
returns, whole or not at all, and on the disk before a checkpoint that counts on it. Times are seconds, rates per
second.

checkpoint   what is saved was taken; the log of a run that resumes from it ends here
saved        it is on the disk: seconds that the loop stopped for it, write_seconds that the thread took
unsaved      it is not, and why
stop         what ended the run early; stopped: when its last checkpoint was on the disk
"""

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from core import machine
from core.communication import World
from core.evals.core_metric import GPT2_CORE, CoreScore, TaskScore
from core.machine import UNCOUNTED_STEPS
from core.plan import Plan
from core.stopping import UserError, naming
from core.wandb_mirror import WandbMirror
from kernels import dispatch

HIGH_NON_MATMUL_SHARE = 0.4  # above this the report says why
PLAIN_WIDTH = 140  # of lines that go to a file
WAITS = {
    "data": "waiting for data",
    "compute": "forward and backward",
    "communication": "communication, exposed",
    "optimizer": "optimizer",
}  # spans of a step in words
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


def _new(path: str, flags: int) -> int:
    """Opens a file that must not be there; it is appended to, so that what was cut off leaves no hole."""
    return os.open(path, flags | os.O_EXCL, 0o666)


class Planned(Protocol):
    """What the log reads of a plan: how many steps, and the tokens and FLOPs of those that are made now."""

    @property
    def steps(self) -> int: ...

    @property
    def total_batch_size(self) -> int: ...

    @property
    def flops_per_token(self) -> int: ...

    def tokens_after(self, step: int) -> int:
        """Of all steps that follow it."""
        ...


class RunLog:
    """The run folder and the console of one run."""

    def __init__(
        self,
        out: Path,
        world: World,
        plan: Planned,
        *,
        log_every: int,
        start_step: int = 0,
        log_bytes: int | None = None,
        mirror: WandbMirror | None = None,
        drops_lines: bool = False,
    ):
        """log_bytes: of the log that a resumed run continues; None starts one. drops_lines: a line that cannot be
        written is left out, instead of an OSError."""
        self.out, self.plan, self.log_every, self.mirror = out, plan, log_every, mirror
        self.drops_lines = drops_lines
        self.meter = machine.Meter(None)
        self.notes: list[str] = []  # what was wrong with the log of a resumed run
        self.is_main = world.is_main
        self.console = Console(highlight=False, soft_wrap=True, quiet=not self.is_main)
        if not self.console.is_terminal:
            self.console.width = PLAIN_WIDTH
        name = machine.device_name(world.device)
        peak = machine.peak_flops(name) if world.device.type == "cuda" else None
        self.peak = peak and peak * world.world_size
        self._times: deque[tuple[int, float]] = deque(maxlen=RATE_STEPS + 1)
        self._file: BinaryIO | None = None
        self._path = out / "log.jsonl"
        self.log_bytes = 0  # of log.jsonl so far; a checkpoint stores it, a resumed run cuts the file back to it
        self._progress: Progress | None = None
        if not self.is_main:
            return
        out.mkdir(parents=True, exist_ok=True)
        if log_bytes is not None and (note := mend_log(self._path, log_bytes)):
            self.notes.append(note)
        # unbuffered: a line that did not fit on a full disk is not kept to be written half later
        self._file = open(self._path, "ab", buffering=0, opener=_new if log_bytes is None else None)
        self.log_bytes = os.fstat(self._file.fileno()).st_size
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[status]}"),
                console=self.console,
            )
            self._progress.add_task("", total=plan.steps, completed=start_step, status="")
            self._progress.start()

    def event(self, event: str, step: int, **fields: Any) -> None:
        if not self._file:
            return
        line = {"event": event, "step": step, "time": round(time.time(), 3), **fields}
        try:
            with naming(self._path):
                self._write((json.dumps(line, allow_nan=False) + "\n").encode())
        except OSError as error:
            self.cut(self.log_bytes)  # part of a line would spoil the next one
            if not self.drops_lines:
                raise
            self.print(f"note: the log lacks the {event} of step {step} ({error.strerror})")
        if self.mirror:
            self.mirror.event(line)

    def _write(self, data: bytes) -> None:
        """All of `data`: a write to a disk that fills up takes a part of it first."""
        assert self._file
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        self.log_bytes += len(data)

    def cut(self, size: int) -> None:
        """Takes back what was logged beyond `size` bytes."""
        if self._file:
            self._file.truncate(size)
            self.log_bytes = size

    def sync(self) -> None:
        """Waits until the log is on the disk."""
        if self._file:
            with naming(self._path):
                os.fsync(self._file.fileno())

    def print(self, text: Any = "") -> None:
        self.console.print(text, markup=False) if isinstance(text, str) else self.console.print(text)

    def preamble(self, setup: dict[str, Any]) -> None:
        """Who runs what where."""
        git = setup["git"]
        commit = f"{git['commit'][:12]}{' with changes' if git['dirty'] else ''}" if git else "not a git checkout"
        self.print(f"Redline {setup['preset']}  commit {commit}")
        self.print(f"device    {setup['device']}, {setup['precision']}")
        self.print("versions  " + ", ".join(f"{name} {version}" for name, version in setup["versions"].items()))
        for line in dispatch.summary([dispatch.Choice(**row) for row in setup["kernels"]["choices"]]):
            self.print(f"kernels   {line}")
        self.print(f"data      {setup['data']}")
        self.print(f"run       {self.out}")

    def header(self, setup: dict[str, Any], plan: Plan, notes: list[str]) -> None:
        """Who runs what where, the plan, and advice."""
        self.preamble(setup)
        self.print(plan_table(plan))
        for note in notes:
            self.print(f"note: {note}")

    def eval(self, step: int, bpb: float, scope: str, data: dict[str, float], wait_s: float) -> None:
        """data: what the loaders have counted so far; wait_s: seconds that training waited for them."""
        self.event("eval", step, val_bpb=bpb, scope=scope, data=data, data_wait_s=round(wait_s, 3))
        self.print(
            f"step {step}/{self.plan.steps}  validation {bpb:.4f} bits per byte (fixed subset)  "
            f"{human(data['tokens'], 'tokens')} of {data['documents']:,} documents, {data['epochs']:.2f} epochs, "
            f"{100 * data['crop_waste']:.1f} % cropped"
        )

    def task(self, score: TaskScore) -> None:
        """A task of CORE, as it is known."""
        if self._file:  # on the main process alone
            self.print(score.line())

    def core(self, step: int, score: CoreScore) -> None:
        self.event("core", step, **score.summary())
        if self._file:
            self.print(f"step {step}/{self.plan.steps}  {score.line()}")

    def sample(self, step: int, texts: list[tuple[str, str]], **options: Any) -> None:
        """texts: (prompt, continuation) pairs."""
        self.event("sample", step, samples=[{"prompt": p, "text": t} for p, t in texts], **options)
        for prompt, text in texts:
            self.print(f"--- sample at step {step}\n{prompt}{text}\n---")

    def pause_rate(self) -> None:
        """Forgets step times: what follows is not training."""
        self._times.clear()

    def last(self, field: str) -> float:
        """The field's newest value in the log; 0 where it has none."""
        if not self.is_main:
            return 0.0
        values = (e[field] for e in reversed(read_log(self._path)) if field in e)
        return next(values, 0.0)

    def step(
        self, step: int, loss: float, saturated: int | None = None, seconds: Mapping[str, float] | None = None
    ) -> None:
        """Logs one finished step (its loss as the mean over its tokens, nats); saturated: sites in fp8; seconds: of its
        spans."""
        self._times.append((step, time.perf_counter()))
        rates = self._rates()
        fp8 = {} if saturated is None else {"fp8_saturated": saturated}
        spans = {f"{name}_s": round(value, 6) for name, value in (seconds or {}).items()}
        more = rates | fp8 | spans | self.meter.read()
        self.event("step", step, loss=loss if math.isfinite(loss) else str(loss), **more)
        status = f"loss {loss:.4f}" + (f"  {saturated} saturated" if saturated else "")
        if rates:
            speed = f"MFU {100 * rates['mfu']:.1f} %" if "mfu" in rates else f"{rates['gflop_per_s']:.0f} GFLOP/s"
            left = self.plan.tokens_after(step) / rates["tok_per_s"]
            status += f"  {human(rates['tok_per_s'], 'tok/s')}  {speed}  {hours(left)} left"
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=step + 1, status=status)
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
    for i, line in enumerate(plan.fp8):
        table.add_row("" if i else "products of the layers", line)
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
    core = f"CORE {s['core']:.4f} ({s['core_scope']})\n" if "core" in s else ""
    return (
        f"validation {s['val_bpb']:.4f} bits per byte{others}\n  ({s['val_scope']})\n{core}"
        f"training {s['total_training_time_s']:.1f} s on the clock, {s['wall_time_s']:.1f} s in all\n"
        f"report: {out / 'report.md'}"
    )


def _event(line: bytes) -> dict[str, Any] | None:
    """The event of a whole line of a log."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = line.endswith(b"\n") and isinstance(event, dict)
    return event if whole and isinstance(event.get("event"), str) and isinstance(event.get("step"), int) else None


def mend_log(path: Path, size: int) -> str | None:
    """Cuts a log back to the `size` bytes that a checkpoint counts on, and leaves out damaged lines. Returns a sentence
    on what is missing."""
    data = path.read_bytes() if path.exists() else b""
    lines = [line + b"\n" for line in data[:size].split(b"\n")]
    lines[-1] = lines[-1][:-1]
    kept = b"".join(line for line in lines if _event(line))
    if len(kept) == size:
        if len(data) > size:
            os.truncate(path, size)
        return None
    mended = path.with_name(f".{path.name}.tmp")
    with naming(path):
        mended.write_bytes(kept)
        os.replace(mended, path)
    return f"{path} was damaged: {size - len(kept)} of {size} bytes are missing, and so are their steps in the report"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The events of a log; UserError naming the line that is none."""
    events = []
    for i, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if (event := _event(line)) is None:
            raise UserError(f"{path}, line {i} is no event: it was changed while the run went on")
        events.append(event)
    return events


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving averages over about 20 values, without bias at the beginning."""
    result: list[float] = []
    ema = weight = 0.0
    for value in values:
        ema, weight = 0.95 * ema + 0.05 * value, 0.95 * weight + 0.05
        result.append(ema / weight)
    return result


def step_seconds(events: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Seconds of training that had passed when each step was logged: the time between a step and the next, where
    nothing lies between them."""
    passed: dict[int, float] = {}
    before, seconds = None, 0.0
    for e in events:
        if e["event"] == "step":
            seconds += e["time"] - before if before is not None else 0.0
            passed[e["step"]] = seconds
        before = e["time"] if e["event"] == "step" else None
    return passed


def _figure(path: Path, size: tuple[float, float]) -> tuple[Any, Callable[[], None]]:
    """An empty figure, and what writes it to `path`."""
    # here, since importing matplotlib takes half a second that no start should wait for; it reads this variable then,
    # and fails on a backend that a notebook has set or nobody has heard of
    os.environ["MPLBACKEND"] = "agg"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # an Agg canvas of its own: the figure needs no display, whatever MPLBACKEND says
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)

    def save() -> None:
        tmp = path.with_name(f".{path.stem}.tmp.png")
        with naming(path):
            figure.savefig(tmp, dpi=100)
            os.replace(tmp, path)

    return figure, save


def plot_loss(events: list[dict[str, Any]], path: Path, summary: dict[str, Any]) -> None:
    """Training loss (nats per token) over steps, with validation bits per byte, over training time, tokens and FLOPs,
    as a PNG."""
    steps = [(e["step"], e["loss"]) for e in events if e["event"] == "step" and isinstance(e["loss"], float)]
    evals = [(e["step"], e["val_bpb"]) for e in events if e["event"] == "eval"]
    seconds = step_seconds(events)
    figure, save = _figure(path, (12, 7))
    panels = figure.subplots(2, 2, sharey=True)
    scales = {
        "step": [step + 1 for step, _ in steps],
        "training time, evaluations left out (s)": [seconds[step] for step, _ in steps],
        "tokens": [(step + 1) * summary["tokens"] / summary["steps"] for step, _ in steps],
        "training FLOPs": [(step + 1) * summary["flops"] / summary["steps"] for step, _ in steps],
    }
    losses = [loss for _, loss in steps]
    for ax, (label, at) in zip(panels.flat, scales.items()):
        ax.plot(at, losses, color="tab:blue", linewidth=0.8, alpha=0.5)
        ax.plot(at, smoothed(losses), color="tab:blue")
        ax.set_xlabel(label)
        ax.grid(alpha=0.3)
    for ax in panels[:, 0]:
        ax.set_ylabel("training loss (nats per token)", color="tab:blue")
    if evals:
        right = panels[0, 0].twinx()
        right.plot(*zip(*evals), "o-", color="tab:red", markersize=4)
        right.set_ylabel("validation, fixed subset (bits per byte)", color="tab:red")
    save()


def span_shares(events: Sequence[dict[str, Any]]) -> tuple[list[int], dict[str, list[float]]]:
    """Steps, and of each the shares of its spans, in the order of `WAITS`; what is left is "other"."""
    timed = [e for e in events if e["event"] == "step" and e.get("step_s")]
    names = [name for name in WAITS if any(f"{name}_s" in e for e in timed)]
    shares = {name: [e.get(f"{name}_s", 0.0) / e["step_s"] for e in timed] for name in names}
    shares["other"] = [max(0.0, 1 - sum(parts)) for parts in zip(*shares.values())]
    return [e["step"] + 1 for e in timed], shares


def plot_time(events: Sequence[dict[str, Any]], path: Path) -> None:
    """Shares of a step's spans over steps, one above the other, as a PNG."""
    steps, shares = span_shares(events)
    if not steps:  # a log that lacks lines
        return
    figure, save = _figure(path, (12, 3.5))
    ax = figure.subplots()
    ax.stackplot(steps, [smoothed(part) for part in shares.values()], labels=[WAITS.get(n, n) for n in shares])
    ax.set(xlabel="step", ylabel="share of a step", xlim=(steps[0], max(steps[-1], steps[0] + 1)), ylim=(0, 1))
    figure.legend(loc="outside right center", reverse=True)
    save()


def commands(summary: dict[str, Any]) -> str:
    """The command and the code it ran, as Markdown."""
    git = summary["git"]
    code = f"commit {git['commit']}{' with changes' if git['dirty'] else ''}" if git else "not a git checkout"
    fence = "`" * (1 + longest_run(summary["command"], "`"))
    return f"{fence} {summary['command']} {fence} ({code})"


def _write_lines(out: Path, lines: Sequence[str]) -> None:
    tmp = out / ".report.md.tmp"
    with naming(out / "report.md"):
        tmp.write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")
        os.replace(tmp, out / "report.md")


def write_report(out: Path, summary: dict[str, Any]) -> None:
    """report.md and loss.png from the summary and log.jsonl."""
    events = read_log(out / "log.jsonl")
    s = summary
    lines = [
        f"# {s['preset']}: {s['val_bpb']:.4f} bits per byte",
        "",
        f"{s['params']['total']:,} parameters, {s['tokens']:,} tokens in {s['steps']:,} steps, on {s['device']}, "
        f"torch {s['versions']['torch']}, {s['precision']}.",
        "",
        commands(s),
        "",
        "![loss curves](loss.png)",
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
    lines.append(f"| waiting for data | {s['data_wait_s']:.1f} s |")
    lines.append(f"| training FLOPs | {human(s['flops'], 'FLOP')} |")
    lines.append(f"| peak memory | {human(s['peak_memory_bytes'], 'B')} |")
    if clipped := [e["fp8_saturated"] for e in events if "fp8_saturated" in e]:
        lines.append(f"| tensors that exceeded their range in fp8 | {sum(clipped):,} in {len(clipped):,} steps |")
    if s["energy_j"] is not None:
        lines.append(f"| energy of the GPUs over the training time | {s['energy_j'] / 3.6e6:.4g} kWh |")
    if s.get("kwh") is not None:
        lines.append(f"| energy of {s['gpus_metered']} GPUs, command to report | {s['kwh']:.4g} kWh |")
    if s["cost_dollars"] is not None:
        lines.append(f"| cost of the GPUs, command to report | ${s['cost_dollars']:.2f} |")
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
    if "val_bpb_packed" in s:
        lines += ["", f"By the board's protocol: {s['val_bpb_packed']:.4f} ({s['val_packed_scope']})."]
    if s["compressors"]:
        lines += [
            "",
            "The compressors saw the same bytes, files concatenated in path order; the model was trained on "
            "other files.",
        ]
    if times := s.get("step_times"):
        several = any("slowest_rank_s" in t for t in times.values())
        lines += ["", "## A step of rank 0", "", "![shares of a step over steps](time.png)", ""]
        lines += [f"| | ms | share |{' slowest rank, ms |' if several else ''}", f"|---|--:|--:|{'--:|' * several}"]
        for name, t in times.items():
            slowest = f" {1e3 * t['slowest_rank_s']:.1f} |" if several else ""
            label = WAITS.get(name, name)
            lines.append(f"| {label} | {1e3 * t['mean_s']:.1f} | {100 * t['share']:.1f} % |{slowest}")
        lines += ["", f"Means over steps from {UNCOUNTED_STEPS} on, since the run was last resumed."]
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
    if "core" in s:
        lines += [
            "",
            f"## CORE: {s['core']:.4f}",
            "",
            f"{s['core_scope']}. GPT-2 (1.5B) has {GPT2_CORE}; a seed moves the score by about 0.005.",
            "",
            "| task | accuracy | centered | examples |",
            "|---|--:|--:|--:|",
        ]
        lines += [
            f"| {label} | {t['accuracy']:.4f} | {t['centered']:.4f} | {t['num_examples']:,} |"
            for label, t in s["core_tasks"].items()
        ]
    lines += ["", "## Samples", ""]
    for e in [e for e in events if e["event"] == "sample"][-1:]:
        for sample in e["samples"]:
            fence = "`" * max(3, 1 + longest_run(sample["prompt"] + sample["text"], "`"))
            lines += [fence, sample["prompt"] + sample["text"], fence, ""]
    _write_lines(out, lines)
    if s.get("step_times"):
        plot_time(events, out / "time.png")
    plot_loss(events, out / "loss.png", s)  # last: the numbers are safe whatever matplotlib meets


def write_race_report(out: Path, summary: dict[str, Any]) -> None:
    """report.md and loss.png of a run of track fineweb."""
    events = read_log(out / "log.jsonl")
    s = summary
    lines = [
        f"# {s['preset']}: validation loss {s['val_loss']:.4f}",
        "",
        f"{s['params']['total']:,} parameters, {s['tokens']:,} tokens in {s['steps']:,} steps, on {s['device']}, "
        f"torch {s['versions']['torch']}, {s['precision']}, scale 1/{s['scale']}.",
        "",
        commands(s),
        "",
        "![loss curves](loss.png)",
        "",
        "| | |",
        "|---|--:|",
        f"| training time | {s['total_training_time_s']:.1f} s |",
        f"| validation loss over {s['val_tokens']:,} tokens | {s['val_loss']:.4f} nats |",
        f"| throughput | {human(s['tok_per_s'], 'tok/s')}, {human(s['flop_per_s'], 'FLOP/s')} |",
        f"| peak memory | {human(s['peak_memory_bytes'], 'B')} |",
        f"| command to report | {s['wall_time_s']:.1f} s |",
        "",
    ]
    _write_lines(out, lines)
    steps = [(e["step"] + 1, e["loss"]) for e in events if e["event"] == "step" and isinstance(e["loss"], float)]
    evals = [(e["step"], e["val_loss"]) for e in events if e["event"] == "eval"]
    figure, save = _figure(out / "loss.png", (8, 5))
    ax = figure.subplots()
    ax.plot(*zip(*steps), color="tab:blue", linewidth=0.8, label="training, all targets by their weights")
    ax.plot(*zip(*evals), "o-", color="tab:red", markersize=4, label="validation")
    ax.set(xlabel="step", ylabel="loss (nats per token)")
    ax.grid(alpha=0.3)
    ax.legend()
    save()
