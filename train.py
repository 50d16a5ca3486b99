"""Trains, evaluates and reports one language model: `python train.py [preset or run folder] [options]`, or under
torchrun.

Iteration k of the loop first evaluates, samples and saves the model after k steps, then trains step k; the last one
trains nothing. A resumed run enters the loop where the checkpoint was saved. SIGINT, SIGTERM and SIGHUP end the loop
between steps, with a checkpoint, and so do errors outside a step.
"""

# ruff: noqa: E402
from core.starting import hear_signals

if __name__ == "__main__":
    hear_signals()  # before the imports, which take seconds

import dataclasses
import functools
import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import checkpoint, communication, machine, report, schedule
from core.command_line import parse_args
from core.communication import LaggingLoss, World, joined_world
from core.config import DATASETS, Config, RaceConfig, flat
from core.data.corpus import Corpus, open_corpus
from core.data.download import silent
from core.data.loader import Loader
from core.data.shards import ShardCorpus, open_dataset
from core.data.tokenizer import Tokenizer, get_tokenizer
from core.evals.bits_per_byte import (
    ValidationSet,
    check_readable,
    compressor_bits_per_byte,
    score,
    validation_packed,
    validation_subset,
    validation_whole,
)
from core.evals.core_metric import CoreScore, GPTScorer, Task, core_score, fetch_tasks, read_examples
from core.exchange import Exchange
from core.fp8 import Recipe
from core.generate import sample_texts
from core.machine import choose_dtype
from core.models.gpt2 import GPT, choose_ops
from core.optim import Gradients, Optimizer
from core.plan import Plan, is_compiled, make_plan, smaller_device_batch
from core.profiling import SETTLING_STEPS, longest_quiet_steps
from core.pulse import Pulse
from core.race import describe, race
from core.race import make_plan as race_plan
from core.run import AUTO, Run, State
from core.sharding import deal
from core.stopping import (
    ScoringStopped,
    StopFlag,
    Stopped,
    TrainingError,
    UnreadableData,
    UserError,
    expanded,
    never,
    one_sentence,
    out_of_memory,
)
from core.timing import StepTimes
from core.wandb_mirror import load_wandb
from kernels import dispatch
from kernels.dispatch import Backends

SAVE_GRACE_S = 10  # for the save under way, where a rank stands still
PREFETCH_STEPS = 2  # beyond those that are looked at before their time
LESS_MEMORY = "--precision bf16, a smaller --depth, or fewer other programs on this machine (--dry-run predicts memory)"


def main(argv: list[str]) -> None:
    started = time.time()  # the report's wall clock covers imports' end to the last line
    cfg = parse_args(argv)
    # before any process waits for another: a mistyped backend is a sentence, not a timeout of the other ranks
    dispatch.parse(cfg.kernels)
    if isinstance(cfg, RaceConfig):
        run_race(cfg, started, argv)
        return
    if cfg.dry_run:
        show_plan(cfg)
        return
    if cfg.wandb:
        load_wandb()  # fail early where it is not installed
    with joined_world(
        cfg.device, deterministic=cfg.deterministic, step_seconds=cfg.step_timeout, same=lambda: identity(cfg)
    ) as world:
        train(cfg, world, started, command_line(argv, world.world_size))


def run_race(cfg: RaceConfig, started: float, argv: list[str]) -> None:
    """Track fineweb: stages, a clock and an end of its own (core/race.py)."""
    if cfg.dry_run:
        rank, world_size = communication.rank_and_size()
        plan = race_plan(cfg, world_size)
        if rank == 0:
            print("\n".join(describe(plan)))
        return
    with joined_world(
        cfg.device, deterministic=cfg.deterministic, step_seconds=cfg.step_timeout, same=lambda: identity(cfg)
    ) as world:
        race(cfg, world, started, command_line(argv, world.world_size))


def identity(cfg: Config | RaceConfig) -> dict[str, Any]:
    """What must be the same on every process of a run, its text apart: weights that differ by rank drift apart."""
    return {"the code (a hash of its sources)": machine.sources_digest()} | machine.versions() | flat(cfg)


def command_line(argv: list[str], world_size: int) -> str:
    """As a shell takes it."""
    launcher = f"torchrun --nproc-per-node={world_size}" if world_size > 1 else "python"
    return f"{launcher} {shlex.join(['train.py', *argv])}"


def train(cfg: Config, world: World, started: float, command: str) -> None:
    run = Run(cfg, world, started)
    # what was opened is closed on every way out: done, stopped, failed
    with run.interruptible(), ExitStack() as files:
        with out_of_memory("weights and optimizer state", lambda: f"try {LESS_MEMORY}"):
            text, trainer = build(run)
        files.callback(trainer.loader.close)
        if isinstance(text.train, ShardCorpus):
            files.callback(text.train.close)  # before the loader, which may wait for a shard
        rows = trainer.plan.device_batch_size
        with out_of_memory(f"{rows} rows per forward pass", lambda: fewer_rows(run, trainer.plan)):
            setup, subset, profiled = announce(run, text, trainer, command)
            files.callback(run.log.close)
            warm_up(run, trainer, setup)
            loop(run, text, trainer, subset, profiled)
            with run.ending(trainer.plan.steps):
                finish(run, text, trainer, setup)
            run.check_saved()


# plan ---------------------------------------------------------------------


def show_plan(cfg: Config) -> None:
    """The plan of a --dry-run, for a device that need not be there."""
    rank, world_size = communication.rank_and_size()
    device_type = cfg.device or machine.choose_device_type(None)
    dtype = compute_dtype(cfg, device_type)
    if cfg.resume and cfg.resume != AUTO:  # the text may have yielded fewer tokens than were asked for
        vocab_size = State.read(checkpoint.find(cfg.resume)).model["vocab_size"]
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=vocab_size))
    plan = make_plan(cfg, device_type=device_type, world_size=world_size, compute_dtype=dtype)
    if rank == 0:
        print(json.dumps(dataclasses.asdict(plan)) if cfg.json else report.render(report.plan_table(plan)))


def compute_dtype(cfg: Config, device_type: str) -> torch.dtype:
    """What the run computes in; UserError where the GPU has not what is asked for."""
    if cfg.fp8_head:
        machine.check_fp8("--fp8-head", "leave it out", device_type)
    return choose_dtype(cfg.precision, device_type)


# build --------------------------------------------------------------------


class Text(NamedTuple):
    train: Corpus | ShardCorpus
    val: Corpus
    tokenizer: Tokenizer
    tasks: list[Task]  # of CORE, if it is scored


@dataclass
class Trainer:
    """What a step needs, on one process."""

    cfg: Config
    plan: Plan
    world: World
    model: GPT
    forward: Callable[[Tensor, Tensor], Tensor]  # the model as it trains: inputs, targets -> loss
    optimizer: Optimizer
    gradients: Gradients
    loader: Loader
    times: StepTimes
    exchange: Exchange | None = None  # between ranks; None: there are no others

    @property
    def owned_gradients(self) -> list[Tensor]:
        """As the optimizer takes them."""
        return self.exchange.owned if self.exchange else self.gradients.sums

    def weights_arrive(self) -> None:
        """Waits until all weights of the last step are here; the next forward in training waits by itself."""
        if self.exchange:
            self.exchange.arrive()


def build(run: Run) -> tuple[Text, Trainer]:
    """Everything up to the first step, in the order that tells bad input soonest. Writes nothing into the run's
    folder."""
    cfg, world, saved = run.cfg, run.world, run.saved
    dtype = compute_dtype(cfg, world.device.type)

    def plan_for(vocab_size: int) -> tuple[Config, Plan]:
        real = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=vocab_size))
        return real, make_plan(real, device_type=world.device.type, world_size=world.world_size, compute_dtype=dtype)

    if cfg.graph_optimizer and world.device.type != "cuda":
        raise UserError("--graph-optimizer records a CUDA graph: give --device cuda, or --no-graph-optimizer")
    # plan: fail early on bad sizes or kernels. A resumed run has the vocabulary that its text yielded, which may be
    # smaller than the one that was asked for, and every law reads sizes off that
    real, plan = plan_for(saved.model["vocab_size"] if saved else cfg.model.vocab_size)
    recipe = Recipe.of(cfg)
    choose_ops(real.model, Backends(cfg.kernels, device=world.device, dtype=dtype), plan.device_batch_size, recipe)
    run.check_horizon(plan)

    # text and tokens; a text may be too small for as many tokens as were asked for
    text = communication.main_first(
        lambda: read_text(cfg, plan.tokens, is_main=world.is_main, learned=run.tokenizer()),
        "the text and its tokenizer",
    )
    same = {"the text of --data (its fingerprint)": text.train.fingerprint, "the tokenizer": text.tokenizer.digest}
    communication.check_same(same, "the text of the other processes")
    if text.tokenizer.vocab_size != real.model.vocab_size:
        real, plan = plan_for(text.tokenizer.vocab_size)

    # model and optimizer: fp32 weights first, each from a generator of its own, so that a seed gives the same weights
    # at every precision and number of processes; the optimizer then casts them and keeps the masters
    torch.manual_seed(cfg.seed)  # nothing draws from it in training; a resumed run restores it all the same
    backends = Backends(cfg.kernels, device=world.device, dtype=dtype)
    with world.device:
        model = GPT(
            real.model, backends, plan.device_batch_size, fp8_head=cfg.fp8_head, recipe=recipe, recompute=cfg.recompute
        )
    model.init_weights(cfg.seed)
    peers = communication.peers(world, cfg.step_timeout)
    place, dealing = peers.grid.place(world.rank), deal(model.table, world.world_size)
    optimizer = Optimizer(
        model,
        lrs=plan.lr,
        weight_decay=plan.weight_decay,
        ns_steps=cfg.optim.ns_steps,
        compute_dtype=dtype,
        backends=backends,
        own=(lambda arena: dealing.own(arena, place)) if world.world_size > 1 else None,
    )
    gradients, times = Gradients(model, optimizer), StepTimes(world.device)
    exchange = None
    if world.world_size > 1:
        exchange = Exchange(
            model, optimizer, gradients, world=world, peers=peers, dealing=dealing, span=times.span
        )  # fmt: skip
    compiled = is_compiled(cfg, world.device.type)
    # a checkpoint replaces weights, low halves of masters, momenta and variances; schedules need none: they are
    # functions of the step
    if run.checkpoint:
        checkpoint.load_training(run.checkpoint, model, optimizer.state)
        checkpoint.restore_rng(run.checkpoint, world.device)
    # data: a fixed number of streams, whatever the number of processes; continues where the checkpoint's rows ended
    loader = Loader(
        text.train,
        text.tokenizer,
        seq_len=plan.seq_len,
        rows_per_step=plan.rows_per_step,
        device_batch_size=plan.device_batch_size,
        num_streams=cfg.data.num_streams,
        rank=world.rank,
        world_size=world.world_size,
        mode=cfg.data.packing,
        buffer_docs=cfg.data.buffer_docs,
        device=world.device,
        state=run.loader_state(text.train),
        prefetch_steps=PREFETCH_STEPS + lookahead(world),
    )
    return text, Trainer(
        cfg=cfg,
        plan=plan,
        world=world,
        model=model,
        # one graph for one shape: a break would hide host time in every micro-step, a dynamic shape costs fusions
        forward=torch.compile(model, fullgraph=True, dynamic=False) if compiled else model,
        optimizer=optimizer,
        gradients=gradients,
        loader=loader,
        times=times,
        exchange=exchange,
    )


def read_text(cfg: Config, tokens: int, *, is_main: bool, learned: Tokenizer | None) -> Text:
    """Documents for training on so many tokens, and the tokenizer. Rank 0 comes first: it trains and stores the
    tokenizer, unless it was learned before, and the others find it."""
    cache_dir, say = expanded(cfg.data.cache_dir), print if is_main else silent
    tasks = read_tasks(cfg, cache_dir) if cfg.core else []  # first: they need neither text nor tokenizer
    learn: dict[str, Any] = {"cache_dir": cache_dir, "doc_cap": cfg.data.doc_cap, "on_train": print}
    train: Corpus | ShardCorpus
    if cfg.data.path in DATASETS:
        crops = cfg.data.packing == "crop"
        train, val = open_dataset(
            cfg.data.path, tokens=tokens, crops=crops, seed=cfg.seed, cache_dir=cache_dir, say=say
        )
        learn["max_chars"] = train.chars_to_learn
    else:
        train, val = open_corpus(
            cfg.data.path,
            seed=cfg.seed,
            val_every=cfg.data.val_every,
            cache_dir=cache_dir,
            row_tokens=cfg.model.seq_len,
            progress=say,
        )
    if is_main:  # a damaged row must not be found after hours, in the final score
        check_readable(val, cfg.final_eval_bytes)
    tokenizer = learned or get_tokenizer(train, cfg.model.vocab_size, **learn)
    return Text(train, val, tokenizer, tasks)


def read_tasks(cfg: Config, cache_dir: Path) -> list[Task]:
    """Those of CORE, checked before hours of training."""
    try:
        tasks = fetch_tasks(cfg.core_bundle, cache_dir, print)
        for task in tasks:
            read_examples(task, cfg.core_max_per_task)
    except UserError as error:
        raise UserError(f"{error}; --no-core trains without this score") from error
    return tasks


def announce(run: Run, text: Text, trainer: Trainer, command: str = "") -> tuple[dict[str, Any], ValidationSet, range]:
    """Opens the log with who runs what where. Returns that, what evaluations during training score, and the steps to
    profile."""
    cfg, plan, world = run.cfg, trainer.plan, run.world
    subset = validation_subset(text.val, text.tokenizer, plan.seq_len, cfg.eval_tokens)
    # what a reader of the console should know besides the plan
    notes = list(text.train.notes)
    if text.tokenizer.vocab_size < cfg.model.vocab_size:
        notes.append(
            f"the text yields {text.tokenizer.vocab_size} of {cfg.model.vocab_size} tokens; the model has that many"
        )
    precision = "fp8" if trainer.model.in_fp8 else str(trainer.optimizer.compute_dtype).removeprefix("torch.")
    if world.device.type == "cpu" and precision == "float32" and machine.cpu_has_bf16():
        notes.append("this CPU multiplies bf16 in hardware: --precision bf16 is faster")
    notes += run.open_log(plan)
    if run.saved and plan.steps != (planned := run.saved.plan_steps):
        was, now = (schedule.at(run.start_step, n, cfg.optim)["lr_mult"] for n in (planned, plan.steps))
        notes.append(
            f"the run now has {plan.steps} steps, not {planned}: from step {run.start_step} on, schedules are "
            f"those of a run of {plan.steps}, and the learning-rate multiplier is {now:.4g} instead of {was:.4g}"
        )
    # profiled steps lie between interruptions, after those that warm caches and compilers
    intervals = (cfg.eval_every, cfg.core_every if cfg.core else None, cfg.sample_every, cfg.save_every)
    first = max(machine.UNCOUNTED_STEPS, run.start_step + SETTLING_STEPS)
    profiled = longest_quiet_steps(cfg.profile, first, plan.steps, lambda step: any(due(n, step) for n in intervals))
    if len(profiled) < cfg.profile and run.start_step < plan.steps:
        notes.append(
            f"{len(profiled)} of {cfg.profile} steps are profiled: there are no more in a row from step {first} on"
        )
    notes.append(f"evaluations during training score {subset.scope}")
    setup = {
        "preset": cfg.preset,
        "command": command,
        "seed": cfg.seed,
        "device": f"{world.world_size} x {machine.device_name(world.device)}",
        "versions": machine.versions(),
        "git": machine.git_state(),
        "precision": precision,
        "compiled": trainer.forward is not trainer.model,
        "fp8": list(plan.fp8),
        "kernels": trainer.optimizer.backends.facts(),
        "data": f"{text.train.name}: {len(text.train):,} documents to train on, {len(text.val):,} to validate",
    }
    run.log.header(setup, plan, notes)
    run.log.event("resume" if run.saved else "start", run.start_step, **setup)
    return setup, subset, profiled


def warm_up(run: Run, trainer: Trainer, setup: dict[str, Any]) -> None:
    """Compiles the model on a batch of the real shape, and the optimizer's kernels, before the clock starts. Leaves no
    trace in either."""
    plan, device = trainer.plan, run.world.device
    compiled, records = trainer.forward is not trainer.model, run.cfg.graph_optimizer
    if run.start_step == plan.steps:
        return
    if not compiled:
        if records:
            trainer.optimizer.warm_up(trainer.owned_gradients, record=True)
        return
    run.log.print("compiling the model, once: this can take minutes (--no-compile starts at once)")
    started = time.perf_counter()
    # two tensors: Dynamo would guard on inputs and targets being one, and compile again in the first step
    inputs, targets = torch.zeros((2, plan.device_batch_size, plan.seq_len), dtype=torch.int64, device=device)
    try:
        trainer.forward(inputs, targets).backward()
        trainer.gradients.zero()
        if trainer.model.in_fp8 is not None:
            trainer.model.in_fp8.forget()
        trainer.optimizer.warm_up(trainer.owned_gradients, record=records)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        reason = str(error.inner_exception).splitlines()[0]
        raise TrainingError(
            f"torch.compile fails here ({reason}): --no-compile trains without it; {run.how_to_go_on()}"
        ) from error
    communication.barrier("the other processes to compile the model")
    seconds = time.perf_counter() - started
    setup["compile_s"] = seconds
    run.log.event("compile", run.start_step, seconds=seconds)
    run.log.print(f"compiled in {seconds:.1f} s")


# loop ---------------------------------------------------------------------


def loop(run: Run, text: Text, trainer: Trainer, subset: ValidationSet, profiled: range) -> None:
    """The steps of the run. Returns when all are made; raises Stopped after a signal and TrainingError when it cannot
    go on."""
    cfg, plan, log, clock = run.cfg, trainer.plan, run.log, run.clock
    # evaluated: whether the look that is due after these steps was taken, so that a resumed run does not take it twice;
    # saved: whether they are saved already
    losses, stopping, evaluated, saved = LaggingLoss(), False, False, False

    def save(step: int, *, evaluated: bool, wait: bool = True) -> None:
        parts = trainer.model, trainer.optimizer, trainer.loader, text.tokenizer, plan
        run.save(step, *parts, evaluated=evaluated, wait=wait)

    if plan.world_size > 1:
        stopping = any(communication.gather_objects(fault_ahead(trainer, run.start_step) is not None))
    pulse = Pulse(trainer.times, cfg.step_timeout, functools.partial(run.failed, wait_s=SAVE_GRACE_S))
    with StopFlag(run.must_stop) as stop, pulse, ExitStack() as profiling, machine.frozen_objects():
        for step in range(run.start_step, plan.steps + 1):
            run.step, last = step, step == plan.steps
            again = step == run.start_step and run.evaluated  # the checkpoint was saved after what is due here
            evaluates = due(cfg.eval_every, step) and not last and (not again or run.extended(plan))
            answers = cfg.core and step > 0 and not again and due(cfg.core_every, step) and not last
            samples = step > 0 and not again and (due(cfg.sample_every, step) or last)
            saves = step > 0 and not again and (due(cfg.save_every, step) or last)
            looks = evaluates or answers or samples
            pauses = looks or saves or last or (len(profiled) > 0 and step in (profiled.start, profiled.stop))

            # log: losses lag by a step on a GPU, but all are known before anything else happens than training
            for done, loss, stops, saturated in losses.take(flush=pauses):
                log.step(done, loss, saturated, trainer.times.take(done, counts=done not in profiled))
                if not math.isfinite(loss):
                    raise run.failed(done, f"the loss is {loss}")
                stopping |= stops
            run.settle(wait=False)  # what became of the save under way, if it has ended
            evaluated = saved = False
            if pauses or stopping:
                with pulse.naming(step):
                    trainer.weights_arrive()
            if stopping:
                trainer.times.pause()
                break
            if pauses:
                clock.stop()
                log.pause_rate()
                trainer.times.pause()

            # look: the end scores the whole split instead of the subset. An error here is not one of training: what was
            # trained is saved first. All ranks take part, since any may be the one that failed
            if looks:
                error, whole = None, True
                try:
                    look(run, text, trainer, step, subset if evaluates else None, stop, answers, samples)
                except ScoringStopped:
                    whole = False
                except Exception as e:
                    error = e
                failed, done_with = zip(*communication.gather_objects((error is not None, whole)))
                if any(failed):
                    save(step, evaluated=False)
                    raise run.went_wrong(step, error) if error else SystemExit(1)
                if not all(done_with):  # a signal broke it off; a resumed run does it again
                    stopping = True
                    break
            # save: after the look, so that resuming goes on where the next step begins. The steps go on while a thread
            # writes; the end waits
            if saves:
                save(step, evaluated=True, wait=last)
                saved = True
            if looks or saves or last:  # a signal may have come meanwhile: then no step is begun
                stopping = any(communication.gather_objects(stop.wanted))
                if evaluated := stopping or last:
                    break

            # step: on the clock, unless it is profiled, which slows it. The clock leaves the first steps out, as the
            # board's does [nanochat 92d63d4, base_train.py]
            try:
                with pulse.naming(step):
                    if step in profiled:
                        if step == profiled.start:
                            profiling.enter_context(run.profile)
                        losses.put(step, train_step(trainer, step, stop))
                        if step + 1 == profiled.stop:
                            # PyTorch's profiler crashes where it ends while messages are under way
                            trainer.weights_arrive()
                            profiling.close()
                    else:
                        clock.before_step(step)
                        losses.put(step, train_step(trainer, step, stop))
                        clock.after_step()
            except UnreadableData as error:  # before the step: what `step` steps made is whole
                if plan.world_size > 1:  # the others are in the step's reduction and cannot join a save
                    raise
                clock.stop()
                for done, loss, _, saturated in losses.take(flush=True):
                    log.step(done, loss, saturated, trainer.times.take(done, counts=done not in profiled))
                save(step, evaluated=looks or again)
                raise run.went_wrong(step, error) from error

        # after `step` steps, because a process had a signal, or cannot save, or one of several cannot read on
        if stopping:
            clock.stop()
            run.settle()
            fault = fault_ahead(trainer, step)
            heard, since, faults = zip(*communication.gather_objects((stop.signum, stop.since_s, fault and str(fault))))
            if unreadable := next(filter(None, faults), None):
                save(step, evaluated=evaluated)
                raise run.went_wrong(step, UnreadableData(unreadable)) if run.world.is_main else SystemExit(2)
            signum, told = max(heard), time.monotonic()
            name = signal.Signals(signum).name
            log.event("stop", step, reason=name, after_signal_s=round(max(since), 3))
            if not saved:
                save(step, evaluated=evaluated)
            # what the grace of a cluster is to be held against: the step, or the look broken off, and the checkpoint
            seconds = max(since) + time.monotonic() - told
            log.event("stopped", step, after_signal_s=round(seconds, 3))
            raise Stopped(
                f"stopped by {name} after {step} of {plan.steps} steps, {seconds:.1f} s after the signal; "
                f"{run.how_to_go_on()}",
                signum,
            )


def due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def lookahead(world: World) -> int:
    """Steps that several processes look at before their time: as many as begin before all have heard of a fault."""
    if world.world_size == 1:
        return 0
    return 2 if world.device.type == "cuda" else 1  # see LaggingLoss


def fault_ahead(trainer: Trainer, step: int) -> UserError | None:
    """What this process will not be able to read in `step` and those after it that are looked at before their time: all
    stop together while they can still save."""
    return trainer.loader.fault_ahead(min(lookahead(trainer.world), trainer.plan.steps - step))


def train_step(trainer: Trainer, step: int, stop: StopFlag) -> Tensor:
    """One optimizer step. Returns its outcome as LaggingLoss takes it: means over ranks, on the device."""
    cfg, plan, world, times = trainer.cfg, trainer.plan, trainer.world, trainer.times
    times.begin(step)
    # data: prepared ahead by the loader's thread, on its way to the device
    with times.span("data"):
        try:
            inputs, targets = trainer.loader.next_step()  # each (micro-steps, B, T)
        except UserError as error:
            raise UnreadableData(str(error)) from error
    # micro-steps: each loss is a mean over its tokens, so their mean is that of the step
    loss_sum = torch.zeros((), device=world.device)
    exchange = trainer.exchange
    if exchange:
        exchange.arrive(0)  # tables; forward waits for layers where it needs them
    for i, (micro_inputs, micro_targets) in enumerate(zip(inputs, targets)):
        with times.span("compute"):
            if exchange and i + 1 == len(inputs):
                exchange.last_micro_step()
            loss = trainer.forward(micro_inputs, micro_targets) / plan.grad_accum_steps
            loss.backward()
            loss_sum += loss.detach()  # stays on the device: reading it here would wait for backward
    # ranks: the flag rides with the gradients, so that all stop at the same step
    with times.span("data"):
        stops = stop.wanted or fault_ahead(trainer, step + 1) is not None
    outcome = torch.stack((loss_sum, torch.full_like(loss_sum, stops)))
    if trainer.model.in_fp8 is not None:  # the next step's scales follow from what all ranks saw in this one
        saturated = trainer.model.in_fp8.next_step(exchange.largest if exchange else lambda sizes: sizes)
        outcome = outcome if saturated is None else torch.cat((outcome, saturated[None].float()))
    # update, with hyperparameters that are functions of the step alone: a resumed run needs no scheduler state
    with times.span("optimizer"):
        if exchange:
            exchange.backward_is_done(outcome)
        at = schedule.at(step, plan.steps, cfg.optim)
        trainer.optimizer.step(trainer.owned_gradients, step=step, adam_steps=step, **at, partner=exchange)
        if exchange:
            exchange.gradients_are_out()
        trainer.gradients.zero()
    times.end()
    return outcome


def look(
    run: Run,
    text: Text,
    trainer: Trainer,
    step: int,
    subset: ValidationSet | None,
    stop: StopFlag,
    answers: bool,
    samples: bool,
) -> None:
    """What the model is like after `step` steps: its score on the subset, CORE, and samples. ScoringStopped where a
    signal broke it off, on one rank at least."""
    stopped = lambda: stop.signum > 0  # noqa: E731
    if subset is not None:
        bpb = evaluate(trainer, text, subset, stopped)
        if not math.isfinite(bpb):
            raise TrainingError(f"training stopped at step {step}: validation gives {bpb} bits per byte")
        run.log.eval(step, bpb, subset.scope, data_stats(trainer), waited(trainer))
    if answers:
        answer(run, text, trainer, step, stopped)
    if samples:
        sample(run, text, trainer, step, stopped)


def evaluate(trainer: Trainer, text: Text, valset: ValidationSet, stopped: Callable[[], bool] = never) -> float:
    """Bits per byte of the model on a validation set."""
    options: dict[str, Any] = {"batch_size": trainer.plan.device_batch_size, "world": trainer.world, "stopped": stopped}
    return score(trainer.model, valset, text.tokenizer, **options).bpb


def answer(run: Run, text: Text, trainer: Trainer, step: int, stopped: Callable[[], bool] = never) -> CoreScore:
    """CORE of the model as written (not compiled, nothing in fp8)."""
    scorer = GPTScorer(trainer.model, text.tokenizer, max_tokens=trainer.plan.device_batch_size * trainer.plan.seq_len)
    options: dict[str, Any] = {"max_per_task": run.cfg.core_max_per_task, "on_task": run.log.task, "stopped": stopped}
    score = core_score(scorer, text.tasks, run.world, **options)
    run.log.core(step, score)
    return score


def data_stats(trainer: Trainer) -> dict[str, float]:
    """What the loaders of all ranks have counted."""
    return report.sum_stats(communication.gather_objects(trainer.loader.stats()))


def waited(trainer: Trainer) -> float:
    """Seconds that the rank with the slowest loader has waited for data."""
    return max(communication.gather_objects(trainer.loader.waited_s))


def sample(run: Run, text: Text, trainer: Trainer, step: int, stopped: Callable[[], bool] = never) -> None:
    if not run.world.is_main:
        return
    cfg = run.cfg
    options: dict[str, Any] = {"temperature": cfg.temperature, "top_k": cfg.top_k, "seed": cfg.seed}
    prompts = list(cfg.sample_prompts)
    with out_of_memory("samples", lambda: "try fewer --sample-tokens or shorter --sample-prompts"):
        texts = sample_texts(trainer.model, text.tokenizer, prompts, cfg.sample_tokens, **options, stopped=stopped)
    run.log.sample(step, list(zip(cfg.sample_prompts, texts)), **options)


def fewer_rows(run: Run, plan: Plan) -> str:
    """What to try when memory was short."""
    rows = smaller_device_batch(plan)
    if rows is None:
        return f"fewer than one is impossible; try a shorter --seq-len, {LESS_MEMORY}; {run.how_to_go_on()}"
    saved = run.checkpoints()
    again = f"continue {saved[-1].name} with: python train.py --resume {quote(str(run.out))}" if saved else None
    return f"{again or 'start again with'} --device-batch-size {rows}"


# report -------------------------------------------------------------------


def finish(run: Run, text: Text, trainer: Trainer, setup: dict[str, Any]) -> None:
    """Scores the whole validation split, and CORE where it is asked for, and writes the report."""
    plan, clock = trainer.plan, run.clock
    # the score: every byte of the split once, by the model as written (not compiled), then compressors on the same
    # bytes
    valset, data = validation_whole(text.val, text.tokenizer, plan.seq_len, run.cfg.final_eval_bytes)
    bpb = evaluate(trainer, text, valset)
    packed = board_score(run, text, trainer)
    core = answer(run, text, trainer, plan.steps) if run.cfg.core else None  # all ranks share the examples
    stats, wait_s, memory = data_stats(trainer), waited(trainer), run.peak_memory()
    times = step_times(communication.gather_objects(trainer.times.means()))
    joules = communication.gather_objects(clock.counted_j)
    known_j = [j for j in joules if j is not None]
    if not math.isfinite(bpb):
        raise run.failed(plan.steps, f"validation gives {bpb} bits per byte")
    if not run.world.is_main:
        return
    # speed over the counted steps alone; none where a run was shorter than what is left out
    speed: dict[str, float | None] = dict.fromkeys(machine.Speed._fields)
    if clock.counted_s:
        tokens = clock.counted_steps * plan.total_batch_size
        speed |= machine.speed(tokens, clock.counted_s, plan.flops_per_token, run.log.peak)._asdict()
    wall_time = time.time() - run.started
    num_gpus = run.world.world_size if run.world.device.type == "cuda" else 0
    summary = {
        **setup,
        "steps": plan.steps,
        "tokens": plan.tokens,
        "flops": plan.flops,
        "params": {**plan.params, "total": plan.params_total, "scaling": plan.params_scaling},
        "val_bpb": bpb,
        "val_scope": valset.scope,
        **packed,
        "compressors": compressor_bits_per_byte(data),
        **(core.summary() if core else {}),
        "total_training_time_s": clock.counted_s,
        "counted_steps": clock.counted_steps,
        **speed,
        "peak_memory_bytes": memory,
        "predicted_memory_bytes": plan.memory_bytes["total"],
        "energy_j": sum(known_j) if len(known_j) == len(joules) else None,
        "kwh": run.log.meter.kwh,
        "gpus_metered": run.log.meter.num_gpus,
        "cost_dollars": machine.cost_dollars(wall_time, num_gpus, run.cfg.dollars_per_gpu_hour),
        "data_stats": stats,
        "data_wait_s": wait_s,
        "step_times": times,
        **run.profile.shares(),
        "wall_time_s": wall_time,
    }
    run.log.event("end", plan.steps, val_bpb=bpb, scope=valset.scope, total_training_time_s=clock.counted_s)
    # the numbers before the pictures: whatever meets the report, they are on the disk
    if run.log.mirror:
        run.log.mirror.summary(summary)
    checkpoint.write_json(run.out / "summary.json", summary)
    if core:
        checkpoint.write_text(run.out / "core.csv", core.csv())
    report.write_report(run.out, summary)
    run.log.close()
    run.log.print(report.verdict(run.out, summary))


def step_times(means: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Seconds of each span in a step of rank 0, their share of it, and where there are several ranks, the most that
    one spends in it. means: of all ranks."""
    if not means[0]:
        return {}
    mine, *_ = ranks = [{k: v for k, v in m.items() if k != "step"} for m in means]
    for spans, m in zip(ranks, means):
        spans |= {"other": m["step"] - sum(spans.values()), "step": m["step"]}
    found = {name: {"mean_s": s, "share": s / mine["step"]} for name, s in mine.items()}
    if len(ranks) > 1:
        for name, t in found.items():
            t["slowest_rank_s"] = max(spans[name] for spans in ranks)
    return found


def board_score(run: Run, text: Text, trainer: Trainer) -> dict[str, Any]:
    """Where rows are cropped, as the board's are: bits per byte by its protocol, beside our own."""
    cfg, plan = run.cfg, trainer.plan
    if cfg.data.packing != "crop":
        return {}
    rows = validation_packed(text.val, text.tokenizer, plan.seq_len, cfg.eval_tokens, buffer_docs=cfg.data.buffer_docs)
    if not rows.windows:  # a split shorter than a row
        return {}
    return {"val_bpb_packed": evaluate(trainer, text, rows), "val_packed_scope": rows.scope}


if __name__ == "__main__":
    with one_sentence():
        main(sys.argv[1:])
