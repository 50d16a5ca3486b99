"""The run of track `fineweb`, from options to a validation loss: what `train.py fineweb` does.

Its rules are not those of other runs [modded-nanogpt f411b3d]: stages instead of one batch, a clock that begins when
everything is compiled and stands still during validations alone, no checkpoints. Kernels, optimizer, exchange between
ranks, log and faults are those of the other tracks.
"""

import dataclasses
import hashlib
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core import checkpoint, communication, machine, report
from core.communication import LaggingLoss, World
from core.config import SYNTHETIC, TOKEN_DATASETS, FinewebConfig, RaceConfig
from core.data.download import silent
from core.data.prefixes import gpt2_bytes, prefix_table
from core.data.row_loader import RowLoader
from core.data.token_rows import (
    ROWS_PER_STEP,
    VAL_ROW_TOKENS,
    VAL_TOKENS,
    RowShape,
    ValidationRows,
    share_of,
    tokens_read,
)
from core.data.token_shards import MEAN_TOKENS, TokenShards, open_token_shards, synthetic
from core.exchange import Exchange
from core.machine import choose_dtype
from core.models.fineweb import (
    ADAM,
    ADAM_DECAY,
    ADAM_LR,
    COUNTED,
    MUON_DECAY,
    MUON_LR,
    AtStage,
    Fineweb,
    at_stage,
    flops_per_token,
    parameter_table,
)
from core.optim import AdamGroup, Gradients, Optimizer
from core.params import MUON, num_params
from core.plan import is_compiled
from core.pulse import Pulse
from core.sharding import deal
from core.stages import (
    STAGES,
    VALIDATION,
    Stage,
    last_tied_step,
    lr_multiplier,
    muon_momentum,
    scaled,
    stage_of,
    target_weights,
    total_steps,
    updates_tables,
)
from core.stopping import StopFlag, Stopped, TrainingError, UserError, expanded, out_of_memory
from core.timing import StepTimes
from kernels.dispatch import Backends

PREFETCH_STEPS = 3
SYNTHETIC_VOCAB = 512
NS_STEPS = 5
LESS_MEMORY = "more processes, or a larger --scale"


@dataclass
class Plan:
    """What the log reads of a run. The batch and its FLOPs are those of the stage that the run is in."""

    cfg: FinewebConfig
    stages: tuple[Stage, ...]
    steps: int
    params: dict[str, int]
    val_tokens: int
    val_row_tokens: int
    total_batch_size: int = 0
    flops_per_token: int = 0

    @property
    def tokens(self) -> int:
        return sum(s.steps * ROWS_PER_STEP * s.row_tokens for s in self.stages)

    @property
    def flops(self) -> int:
        return sum(s.steps * ROWS_PER_STEP * s.row_tokens * flops_per_token(self.cfg, s) for s in self.stages)

    def tokens_after(self, step: int) -> int:
        """Of all steps that follow it."""
        left = 0
        for s in self.stages:
            left += max(s.steps - max(step + 1, 0), 0) * ROWS_PER_STEP * s.row_tokens
            step -= s.steps
        return left

    def enter(self, stage: Stage) -> None:
        self.total_batch_size = ROWS_PER_STEP * stage.row_tokens
        self.flops_per_token = flops_per_token(self.cfg, stage)


def make_plan(cfg: RaceConfig, world_size: int) -> Plan:
    """Sizes of a run; UserError on a scale that does not divide them, processes that do not divide a step's rows, and
    data that nobody knows."""
    share_of(ROWS_PER_STEP, 0, world_size, "a step")
    if cfg.data not in (SYNTHETIC, *TOKEN_DATASETS) and not Path(cfg.data).is_dir():
        names = ", ".join((SYNTHETIC, *TOKEN_DATASETS))
        raise UserError(f"--data is {cfg.data}: expected {names}, or a folder of shards")
    try:
        stages = scaled(STAGES, cfg.scale)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    whole = FinewebConfig()
    model = FinewebConfig(
        d_head=whole.d_head // cfg.scale,
        local_keys=whole.local_keys // cfg.scale,
        vocab_size=SYNTHETIC_VOCAB if cfg.data == SYNTHETIC else whole.vocab_size,
    )
    if model.d_head < 8:
        raise UserError(f"--scale is {cfg.scale}: expected 16 at most, with which heads have 8 channels")
    val_tokens, val_row_tokens = (
        given or tokens // cfg.scale**2
        for given, tokens in ((cfg.val_tokens, VAL_TOKENS), (cfg.val_row_tokens, VAL_ROW_TOKENS))
    )
    if val_tokens % val_row_tokens:
        raise UserError(f"--val-tokens is {val_tokens}: expected a multiple of --val-row-tokens {val_row_tokens}")
    counts = num_params(parameter_table(model), COUNTED)
    plan = Plan(model, stages, total_steps(stages), counts, val_tokens, val_row_tokens)
    plan.enter(stages[0])
    return plan


def describe(plan: Plan) -> Iterator[str]:
    """The plan in lines for people."""
    human = report.human
    counts = ", ".join(f"{name} {human(n)}" for name, n in plan.params.items())
    yield f"parameters {human(sum(plan.params.values()))}: {counts}"
    yield f"steps {plan.steps}, tokens {human(plan.tokens)}, FLOPs {human(plan.flops)}"
    yield f"validation on {plan.val_tokens:,} tokens in rows of {plan.val_row_tokens:,}"
    first = 0
    for i, s in enumerate(plan.stages):
        rates = [lr_multiplier(step, plan.stages) for step in (first, first + s.steps - 1)]
        first += s.steps
        yield (
            f"stage {i + 1}   {s.steps} steps of {ROWS_PER_STEP * s.row_tokens:,} tokens, documents of {s.doc_cap} at "
            f"most, windows {s.short} and {s.long}, rates x {rates[0]:.3g} to {rates[1]:.3g}, {len(s.targets)} "
            f"target(s){', prefix' if any(s.prefix) else ''}"
        )


# the run --------------------------------------------------------------------


class RaceClock:
    """Seconds of training: from the first batch on, without validations. The device is waited for where it starts and
    stops."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.seconds = device, 0.0
        self._start: float | None = None

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def start(self) -> None:
        self._start = self._now()

    def stop(self) -> None:
        if self._start is not None:
            self.seconds += self._now() - self._start
            self._start = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.stop()
        yield
        self.start()


@dataclass
class Racer:
    """What a step needs, on one process."""

    plan: Plan
    world: World
    model: Fineweb
    forward: Callable[..., Tensor]
    optimizer: Optimizer
    gradients: Gradients
    times: StepTimes
    weights: list[Tensor]  # of targets: of each stage, (steps, K + 1)
    exchange: Exchange | None

    @property
    def owned_gradients(self) -> list[Tensor]:
        return self.exchange.owned if self.exchange else self.gradients.sums


def race(cfg: RaceConfig, world: World, started: float, command: str) -> None:
    """Trains, validates and reports. UserError before anything is written where the options or the data do not fit."""
    plan = make_plan(cfg, world.world_size)
    out = claimed(cfg, world)
    dtype = choose_dtype(cfg.precision, world.device.type)
    backends = Backends(cfg.kernels, device=world.device, dtype=dtype)
    shards = communication.main_first(lambda: open_shards(cfg, plan, print if world.is_main else silent), "the shards")
    facts = {"the tokens of --data (names and sizes of its shards)": [shards.validation, *map(list, shards.train)]}
    communication.check_same(facts, "the tokens of the other processes")
    bos, vocab = plan.cfg.vocab_size - 1, plan.cfg.vocab_size
    where: dict[str, Any] = {"rank": world.rank, "world_size": world.world_size, "device": world.device}
    options: dict[str, Any] = {"bos": bos, "vocab_size": vocab, **where}
    with ExitStack() as closing:
        with out_of_memory("the model and its optimizer", lambda: f"try {LESS_MEMORY}"):
            val = ValidationRows(
                shards.path(shards.validation), tokens=plan.val_tokens, row_tokens=plan.val_row_tokens, **options
            )
            # on the disk and enough, before the clock and before anything is written
            for name, _ in shards.train:
                shards.path(name)
            RowLoader(shards, shapes(plan.stages), prefetch_steps=1, **options).close()
            spelled = communication.main_first(lambda: spellings(cfg), "the vocabulary")
            racer = build(cfg, plan, world, dtype, backends)
        log = report.RunLog(out, world, plan, log_every=cfg.log_every)
        closing.callback(log.close)
        setup = announce(cfg, plan, racer, log, shards, command)
        with out_of_memory("a row of tokens", lambda: f"try {LESS_MEMORY}"):
            setup |= warm_up(cfg, racer, log)
            clock = RaceClock(world.device)
            loss = run_steps(cfg, racer, log, clock, closing, shards, options, spelled, val)
        memory = max(communication.gather_objects(machine.peak_memory_bytes(world.device)))
        if world.is_main:
            finish(plan, out, log, setup, clock, loss, memory, started)


def claimed(cfg: RaceConfig, world: World) -> Path:
    """The folder of the run, which must be free."""
    out = expanded(communication.broadcast_object(cfg.out or f"runs/fineweb-{time.strftime('%Y%m%d-%H%M%S')}"))
    if communication.broadcast_object((out / "log.jsonl").exists()):
        raise UserError(f"{out} holds a run already: choose another --out (runs of this track are not resumed)")
    return out


def open_shards(cfg: RaceConfig, plan: Plan, say: Callable[[str], None]) -> TokenShards:
    """The data; made up where --data says so, once for each size."""
    cache, needed = expanded(cfg.cache_dir), tokens_read(shapes(plan.stages))
    if cfg.data != SYNTHETIC:
        return open_token_shards(cfg.data, tokens=needed, cache_dir=cache, say=say)
    mean = max(MEAN_TOKENS / cfg.scale, 8.0)
    sizes: dict[str, Any] = {
        "train_shards": 2, "tokens_per_shard": needed // 2 + 1, "val_tokens": plan.val_tokens + 1, "seed": 0,
        "vocab_size": SYNTHETIC_VOCAB, "bos": SYNTHETIC_VOCAB - 1, "mean_tokens": mean,
    }  # fmt: skip
    name = hashlib.sha256(repr(sorted(sizes.items())).encode()).hexdigest()[:12]
    folder = cache / f"synthetic-{name}"
    if not folder.exists():
        part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        try:
            synthetic(part, **sizes)
            with suppress(OSError):  # another run has made the same meanwhile
                part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return open_token_shards(str(folder), tokens=needed, cache_dir=cache, say=say)


def shapes(stages: Sequence[Stage]) -> list[RowShape]:
    return [RowShape(s.steps, s.row_tokens, s.doc_cap, s.max_docs) for s in stages]


def spellings(cfg: RaceConfig) -> list[bytes]:
    """The bytes of each token; those that are made up are spelled by their numbers."""
    if cfg.data == SYNTHETIC:
        return [str(i).encode() for i in range(SYNTHETIC_VOCAB - 1)] + [b""]
    return gpt2_bytes()


def build(cfg: RaceConfig, plan: Plan, world: World, dtype: torch.dtype, backends: Backends) -> Racer:
    torch.manual_seed(cfg.seed)
    with world.device:
        model = Fineweb(plan.cfg, backends, stages=plan.stages)
    model.init_weights(cfg.seed)
    peers = communication.peers(world, cfg.step_timeout)
    place, dealing = peers.grid.place(world.rank), deal(model.table, world.world_size)
    optimizer = Optimizer(
        model,
        lrs={MUON: MUON_LR} | {name: ADAM_LR * factor for name, (_, factor, _) in ADAM.items()},
        weight_decay=MUON_DECAY * MUON_LR,
        ns_steps=NS_STEPS,
        compute_dtype=dtype,
        backends=backends,
        own=(lambda arena: dealing.own(arena, place)) if world.world_size > 1 else None,
        # a decay by the square of the rate
        groups={name: AdamGroup(b, ADAM_LR * f * ADAM_DECAY * d, cautious=True) for name, (b, f, d) in ADAM.items()},
    )
    gradients, times = Gradients(model, optimizer), StepTimes(world.device)
    exchange = None
    if world.world_size > 1:
        exchange = Exchange(
            model, optimizer, gradients, world=world, peers=peers, dealing=dealing, span=times.span
        )  # fmt: skip
    firsts = [sum(s.steps for s in plan.stages[:i]) for i in range(len(plan.stages))]
    weights = [
        torch.tensor([target_weights(first + j, plan.stages) for j in range(s.steps)], device=world.device)
        for first, s in zip(firsts, plan.stages)
    ]
    compiled = is_compiled(cfg, world.device.type)
    return Racer(
        plan=plan,
        world=world,
        model=model,
        forward=torch.compile(model, fullgraph=True, dynamic=False) if compiled else model,
        optimizer=optimizer,
        gradients=gradients,
        times=times,
        weights=weights,
        exchange=exchange,
    )


def announce(
    cfg: RaceConfig, plan: Plan, racer: Racer, log: report.RunLog, shards: TokenShards, command: str
) -> dict[str, Any]:
    """Opens the log with who runs what where."""
    world = racer.world
    setup = {
        "preset": cfg.preset,
        "command": command,
        "seed": cfg.seed,
        "scale": cfg.scale,
        "device": f"{world.world_size} x {machine.device_name(world.device)}",
        "versions": machine.versions(),
        "git": machine.git_state(),
        "sources_digest": machine.sources_digest(),
        "precision": str(racer.optimizer.compute_dtype).removeprefix("torch."),
        "compiled": racer.forward is not racer.model,
        "kernels": racer.optimizer.backends.facts(),
        "data": f"{shards.name}: {len(shards.train)} shards of {sum(shards.tokens_per_shard):,} tokens",
    }
    if world.is_main:
        log.preamble(setup)
        for line in describe(plan):
            log.print(line)
        options = dataclasses.asdict(cfg)
        checkpoint.write_json(log.out / "config.json", options)
    log.event("start", 0, **setup)
    return setup


def warm_up(cfg: RaceConfig, racer: Racer, log: report.RunLog) -> dict[str, float]:
    """Compiles forward, backward and the update for all stages, off the clock, and leaves no trace."""
    if racer.forward is racer.model:
        return {}
    log.print("compiling all stages, once: this can take minutes (--no-compile starts at once)")
    started = time.perf_counter()
    plan, model, device = racer.plan, racer.model, racer.world.device
    tied_until = stage_of(last_tied_step(plan.stages), plan.stages)[0]
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(plan.stages))
    for i, s in enumerate(plan.stages):
        for tied in (True, False):
            if (tied and i > tied_until) or (not tied and i < tied_until):
                continue
            model.tied = tied
            T = s.row_tokens
            begins = list(range(0, T, s.doc_cap))
            cu = torch.tensor(begins + [T] * (s.max_docs + 1 - len(begins)), dtype=torch.int32, device=device)
            idx, targets = (torch.zeros(T, dtype=dt, device=device) for dt in (torch.int32, torch.int64))
            micro_step(racer, i, 0, idx, targets, cu)
    model.tied = True
    racer.gradients.zero()
    racer.optimizer.warm_up(racer.owned_gradients)
    communication.barrier("the other processes to compile the model")
    seconds = time.perf_counter() - started
    log.event("compile", 0, seconds=seconds)
    log.print(f"compiled in {seconds:.1f} s")
    return {"compile_s": seconds}


# loop -----------------------------------------------------------------------


def run_steps(
    cfg: RaceConfig,
    racer: Racer,
    log: report.RunLog,
    clock: RaceClock,
    closing: ExitStack,
    shards: TokenShards,
    options: dict[str, Any],
    spelled: Sequence[bytes],
    val: ValidationRows,
) -> float:
    """All steps and validations. Returns the last one's loss."""
    plan, model, times = racer.plan, racer.model, racer.times
    losses, stopping, before = LaggingLoss(), False, 0

    def failed(step: int, why: str) -> TrainingError:
        log.event("stop", step, reason=why)
        return TrainingError(f"training stopped at step {step}: {why}")

    def stopped(step: int) -> Stopped:
        clock.stop()
        signum = max(communication.gather_objects(stop.signum))
        name = signal.Signals(signum).name
        log.event("stop", step, reason=name)
        return Stopped(f"stopped by {name} after {step} of {plan.steps} steps; runs of this track start again", signum)

    pulse = Pulse(times, cfg.step_timeout, failed)
    communication.barrier("the other processes to begin")
    with StopFlag(then="") as stop, pulse, machine.frozen_objects():
        # on the clock: reading the shards, the table of prefixes, and everything until the last update
        clock.start()
        loader = RowLoader(shards, shapes(plan.stages), prefetch_steps=PREFETCH_STEPS, **options)
        closing.callback(loader.close)
        table = torch.from_numpy(prefix_table(spelled))
        model.prefixes[: len(table)].copy_(table)
        for step in range(plan.steps):
            number, _ = stage_of(step, plan.stages)
            if number != before:
                stopping |= log_losses(losses, log, times, failed, flush=True)  # by the batch that was theirs
                log.pause_rate()
                model.widen(plan.stages[before].long, plan.stages[number].long)
                plan.enter(plan.stages[number])
                before = number
            if step and cfg.eval_every and step % cfg.eval_every == 0:
                with clock.paused(), pulse.naming(step):
                    times.pause()
                    stopping |= log_losses(losses, log, times, failed, flush=True)
                    log.pause_rate()
                    at = at_stage(plan.stages, number)
                    stopping = stopping or validate(racer, log, clock, step, val, at, stop, failed) is None
            stopping |= log_losses(losses, log, times, failed)
            if stopping:
                raise stopped(step)
            with pulse.naming(step):
                losses.put(step, train_step(racer, step, number, loader, stop))
        log_losses(losses, log, times, failed, flush=True)
        times.pause()
        if racer.exchange:
            racer.exchange.arrive()
        clock.stop()
        short, long = (w // cfg.scale for w in VALIDATION)
        widest = AtStage(short, long, at_stage(plan.stages, len(plan.stages) - 1).scale)
        loss = validate(racer, log, clock, plan.steps, val, widest, stop, failed)
        if loss is None:
            raise stopped(plan.steps)
        return loss


def log_losses(
    losses: LaggingLoss,
    log: report.RunLog,
    times: StepTimes,
    failed: Callable[[int, str], TrainingError],
    *,
    flush: bool = False,
) -> bool:
    """Logs the steps whose losses are known by now; whether a process has asked to stop."""
    stops = False
    for done, loss, asked, _ in losses.take(flush=flush):
        log.step(done, loss, None, times.take(done))
        if not math.isfinite(loss):
            raise failed(done, f"the loss is {loss}")
        stops |= asked
    return stops


def micro_step(racer: Racer, stage: int, at: int, idx: Tensor, targets: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Forward and backward of one row in step `at` of a stage. Returns its loss summed over tokens."""
    s = racer.plan.stages[stage]
    weights = None if len(s.targets) == 1 and not any(s.prefix) else racer.weights[stage][at]
    loss = racer.forward(idx, targets, cu_seqlens, s.doc_cap, at_stage(racer.plan.stages, stage), weights)
    rows = ROWS_PER_STEP // racer.world.world_size  # of this process; the exchange makes means over processes
    (loss / rows).backward()
    return loss.detach()


def train_step(racer: Racer, step: int, number: int, loader: RowLoader, stop: StopFlag) -> Tensor:
    """One optimizer step. Returns its outcome as LaggingLoss takes it: means over ranks, on the device."""
    plan, world, times, exchange = racer.plan, racer.world, racer.times, racer.exchange
    times.begin(step)
    with times.span("data"):
        rows = loader.next_step()
    total = torch.zeros((), device=world.device)
    if exchange:
        exchange.arrive()
    at = step - sum(s.steps for s in plan.stages[:number])
    for i, row in enumerate(rows):
        with times.span("compute"):
            if exchange and i + 1 == len(rows):
                exchange.last_micro_step()
            total += micro_step(racer, number, at, row.inputs, row.targets, row.cu_seqlens)
    loss = total / (len(rows) * plan.stages[number].row_tokens)
    outcome = torch.stack((loss, torch.full_like(loss, stop.wanted)))
    # tables and small parameters wait for the gradients of two batches
    others = updates_tables(step)
    with times.span("optimizer"):
        if exchange:
            exchange.backward_is_done(outcome, others=others)
        rate = lr_multiplier(step, plan.stages)
        racer.optimizer.step(
            racer.owned_gradients,
            step=step,
            lr_mult=rate,
            momentum=muon_momentum(step, plan.stages),
            decay_mult=rate,
            partner=exchange,
            adam_steps=step // 2 if others else -1,
        )
        if exchange:
            exchange.gradients_are_out()
        racer.gradients.zero(others=others)
        if step == last_tied_step(plan.stages):
            if exchange:
                exchange.arrive()
            racer.optimizer.copy_states("lm_head", "wte")
            racer.model.tied = False
    times.end()
    return outcome


def validate(
    racer: Racer,
    log: report.RunLog,
    clock: RaceClock,
    step: int,
    val: ValidationRows,
    at: AtStage,
    stop: StopFlag,
    failed: Callable[[int, str], TrainingError],
) -> float | None:
    """Mean loss in nats of a token of the validation set, by the model as written (not compiled). None where a signal
    broke it off, on one rank at least."""
    if racer.exchange:
        racer.exchange.arrive()
    total, tokens = torch.zeros((), dtype=torch.float64, device=racer.world.device), 0
    with torch.no_grad():
        for row in val:
            if stop.wanted:
                break
            total += racer.model(row.inputs, row.targets, row.cu_seqlens, len(row.inputs), at)
            tokens += len(row.inputs)
    sums = communication.gather_objects((total.item(), tokens, stop.wanted))
    if any(stops for *_, stops in sums):
        return None
    loss = sum(s for s, *_ in sums) / sum(n for _, n, _ in sums)
    if not math.isfinite(loss):
        raise failed(step, f"validation gives {loss} nats per token")
    log.event("eval", step, val_loss=loss, seconds=round(clock.seconds, 3))
    log.print(
        f"step {step}/{racer.plan.steps}  validation {loss:.4f} nats per token  {clock.seconds:.1f} s on the clock"
    )
    return loss


# report ---------------------------------------------------------------------


def finish(
    plan: Plan,
    out: Path,
    log: report.RunLog,
    setup: dict[str, Any],
    clock: RaceClock,
    loss: float,
    memory: int,
    started: float,
) -> None:
    """summary.json and report.md."""
    speed = machine.speed(plan.tokens, clock.seconds, plan.flops / plan.tokens, log.peak)
    summary = {
        **setup,
        "steps": plan.steps,
        "tokens": plan.tokens,
        "flops": plan.flops,
        "params": plan.params | {"total": sum(plan.params.values())},
        "val_loss": loss,
        "val_tokens": plan.val_tokens,
        "total_training_time_s": clock.seconds,
        **speed._asdict(),
        "peak_memory_bytes": memory,
        "wall_time_s": time.time() - started,
    }
    log.event("end", plan.steps, val_loss=loss, total_training_time_s=clock.seconds)
    checkpoint.write_json(out / "summary.json", summary)
    report.write_race_report(out, summary)
    log.print(
        f"validation {loss:.4f} nats per token, {clock.seconds:.1f} s on the clock, {summary['wall_time_s']:.1f} s in "
        f"all\nreport: {out / 'report.md'}"
    )
