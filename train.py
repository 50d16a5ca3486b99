"""Trains, evaluates and reports one language model: `python train.py [preset] [options]`, or the same under torchrun.

With `--compile` the training forward is compiled before the clock starts; evaluation and sampling run as written.
Visit k of the loop evaluates, samples and saves the model that k optimizer steps made, then takes step k; the last visit
only looks. `--resume` enters the loop at the visit that wrote the checkpoint. SIGINT and SIGTERM end the loop after a step,
with a checkpoint.
"""

import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core import checkpoint, distributed, runlog, schedule
from core.config import Config, changed_fields, from_dict, parse_args, to_dict
from core.data.corpus import Corpus, open_corpus
from core.data.loader import Loader, merge_states
from core.data.tokenizer import Tokenizer, get_tokenizer
from core.distributed import World
from core.errors import Stopped, TrainingError, out_of_memory, signal_of, user_errors
from core.evals.bits_per_byte import (
    ValidationSet,
    check_readable,
    compressor_bits_per_byte,
    score,
    validation_subset,
    validation_whole,
)
from core.generate import sample_texts
from core.model import GPT, choose_ops
from core.optim import Gradients, Optimizer
from core.plan import Plan, make_plan, smaller_device_batch
from core.profiling import SETTLING_STEPS, StepProfile, window
from core.runlog import LaggingLoss, RunLog, TrainingClock
from core.signals import StopRequest
from core.wandb_mirror import WandbMirror, load_wandb
from kernels import dispatch
from kernels.dispatch import Backends

LESS_MEMORY = "--precision bf16, a smaller --depth, or fewer other programs on this machine (--dry-run predicts memory)"


def main(argv: list[str]) -> None:
    started = time.time()
    cfg = parse_args(argv, distributed.choose_device_type, saved_config)
    planned = cfg.dry_run and cfg.device  # a plan needs no device
    device_type = planned or distributed.choose_device_type(cfg.device)
    dtype = distributed.choose_dtype(cfg.precision, device_type)
    dispatch.parse(cfg.kernels)
    if cfg.json and not cfg.dry_run:
        raise ValueError("--json prints the plan of a --dry-run: give both")
    if cfg.dry_run:
        rank, world_size = distributed.rank_and_size()
        plan = make_plan(cfg, device_type=device_type, world_size=world_size, compute_dtype=dtype)
        if rank > 0:
            return
        print(json.dumps(dataclasses.asdict(plan)) if cfg.json else runlog.render(runlog.plan_table(plan)))
        return
    if cfg.wandb:
        load_wandb()  # whether it is there is told before any work
    distributed.prepare_process(device_type, deterministic=cfg.deterministic)
    world = distributed.init_world(device_type)
    stamp = f"runs/{cfg.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = Path(distributed.broadcast_object(cfg.out or stamp)).expanduser()
    try:
        with out_of_memory("weights and optimizer state", lambda: f"try {LESS_MEMORY}"):
            run = build(cfg, world, dtype, out, started)
        try:
            with out_of_memory(f"{run.plan.device_batch_size} rows per forward pass", lambda: fewer_rows(run)):
                warm_up(run)
                loop(run)
                finish(run)
        finally:
            run.loader.close()
            run.log.close()
    except Stopped:
        distributed.barrier()  # torchrun kills the others when one has ended: rank 0 closes its files first
        raise
    except KeyboardInterrupt as error:
        raise Stopped(f"stopped by {signal_of(error).name}; {kept(out)}", signal_of(error)) from None
    finally:
        distributed.shutdown()


def saved_config(path: str) -> Config:
    """The config of the run that `--resume path` continues, pointing at that run's folder."""
    folder = checkpoint.find(path)
    config = from_dict(checkpoint.load_state(folder)["config"])
    return dataclasses.replace(config, out=str(folder.parent.parent))


@dataclass
class Run:
    """One run on one process."""

    cfg: Config
    world: World
    plan: Plan
    out: Path
    train_corpus: Corpus
    val_corpus: Corpus
    tokenizer: Tokenizer
    model: GPT
    forward: Callable[[Tensor, Tensor], Tensor]  # the model as it trains: inputs, targets -> loss
    optimizer: Optimizer
    gradients: Gradients
    tensors: dict[str, Tensor]  # what a checkpoint holds
    loader: Loader
    log: RunLog
    clock: TrainingClock
    subset: ValidationSet  # of the evaluations during training
    facts: dict[str, Any]
    started: float
    start_step: int
    memory_before: int  # peak of the processes that this one continues, bytes
    looked: bool  # the visit of start_step was made before
    extended: bool  # start_step was the last one then
    losses: LaggingLoss
    signals: StopRequest
    profile: StepProfile
    profiled: range  # steps


# build --------------------------------------------------------------------


def build(cfg: Config, world: World, dtype: torch.dtype, out: Path, started: float) -> Run:
    folder = checkpoint.find(cfg.resume) if cfg.resume else None
    saved = checkpoint.load_state(folder) if folder else None
    old_cfg = from_dict(saved["config"]) if saved else cfg
    if changed := [name for name in changed_fields(old_cfg, cfg) if name != "steps"]:
        raise ValueError(
            f"--resume continues a run as it was, but these differ: {', '.join(changed)}; start a new run instead"
        )
    plan_of = {"device_type": world.device.type, "world_size": world.world_size, "compute_dtype": dtype}
    # sizes that do not fit, and kernels that cannot run, are told before any work
    plan = make_plan(cfg, **plan_of)
    backends = Backends(cfg.kernels, device=world.device, dtype=dtype)
    choose_ops(cfg.model, backends, plan.device_batch_size)
    start_step = saved["step"] if saved else 0
    if cfg.steps != old_cfg.steps and plan.steps <= start_step:
        raise ValueError(
            f"--steps is {plan.steps}, but the checkpoint has made {start_step} already: expected {start_step + 1} or more"
        )
    if folder and out.resolve() != folder.resolve().parent.parent:
        raise ValueError(f"--resume continues in the folder of the run, {folder.parent.parent}: leave --out {out} away")
    if not saved and (out / "log.jsonl").exists():
        advice = (
            f"continue it with --resume {out}" if checkpoint.checkpoints(out) else "it saved nothing: remove the folder"
        )
        raise ValueError(f"{out} holds a run already: {advice}, or choose another --out")

    # text and tokens; rank 0 trains and stores the tokenizer, the others find it
    cache_dir = Path(cfg.data.cache_dir).expanduser()

    def read_text() -> tuple[Corpus, Corpus, Tokenizer]:
        split = open_corpus(cfg.data.path, seed=cfg.seed, val_every=cfg.data.val_every, cache_dir=cache_dir)
        if world.is_main:
            check_readable(split[1], cfg.final_eval_bytes)
        return *split, get_tokenizer(split[0], cfg.model.vocab_size, cache_dir=cache_dir, on_train=print)

    train_corpus, val_corpus, tokenizer = distributed.main_first(read_text)
    model_cfg = dataclasses.replace(cfg.model, vocab_size=tokenizer.vocab_size)
    plan = make_plan(dataclasses.replace(cfg, model=model_cfg), **plan_of)

    # model and optimizer
    torch.manual_seed(cfg.seed)
    with world.device:
        model = GPT(model_cfg, backends, plan.device_batch_size, fp8_head=cfg.fp8_head)
    model.init_weights(cfg.seed)
    optimizer = Optimizer(
        model,
        lrs=plan.lr,
        weight_decay=plan.weight_decay,
        ns_steps=cfg.optim.ns_steps,
        compute_dtype=dtype,
        backends=backends,
    )
    tensors = checkpoint.training_tensors(model, optimizer.state)
    if folder:
        checkpoint.load_tensors(folder, tensors)
        checkpoint.restore_rng(folder, world.device)
    loader = Loader(
        train_corpus,
        tokenizer,
        seq_len=model_cfg.seq_len,
        rows_per_step=plan.rows_per_step,
        device_batch_size=plan.device_batch_size,
        num_streams=cfg.data.num_streams,
        rank=world.rank,
        world_size=world.world_size,
        mode=cfg.data.packing,
        buffer_docs=cfg.data.buffer_docs,
        device=world.device,
        state=saved and saved["loader"],
    )

    # the run folder and its header, when nothing can fail any more that the user might have to mend
    subset = validation_subset(val_corpus, tokenizer, model_cfg.seq_len, cfg.eval_tokens)
    config = to_dict(dataclasses.replace(cfg, out=str(out), resume=None))

    def open_mirror() -> WandbMirror | None:
        if cfg.wandb is None or not world.is_main:
            return None
        run_id = saved["wandb"] if saved and cfg.wandb == old_cfg.wandb else None
        return WandbMirror(cfg.wandb, out, config | {"plan": dataclasses.asdict(plan)}, run_id)

    log = RunLog(
        out,
        world,
        plan,
        log_every=cfg.log_every,
        start_step=start_step,
        log_bytes=saved and saved["log_bytes"],
        mirror=distributed.main_first(open_mirror),
    )
    facts = {
        "preset": cfg.preset,
        "device": f"{world.world_size} x {runlog.device_name(world.device)}",
        "versions": runlog.versions(),
        "git": runlog.git_state(),
        "precision": str(dtype).removeprefix("torch."),
        "compiled": world.device.type == "cuda" if cfg.compile is None else cfg.compile,
        "kernels": backends.facts(),
        "data": f"{train_corpus.name}: {len(train_corpus):,} documents to train on, {len(val_corpus):,} to validate",
    }
    if world.is_main:
        checkpoint.write_json(out / "config.json", config)
    notes = []
    if tokenizer.vocab_size < cfg.model.vocab_size:
        notes.append(
            f"the text yields {tokenizer.vocab_size} of {cfg.model.vocab_size} tokens; the model has that many"
        )
    if world.device.type == "cpu" and dtype == torch.float32 and runlog.cpu_has_bf16():
        notes.append("this CPU multiplies bf16 in hardware: --precision bf16 is faster")
    if saved and world.is_main:
        notes += [
            f"dropped {path.name}, which comes after step {start_step}"
            for path in checkpoint.drop_after(out, start_step)
        ]
    if start_step < plan.steps and world.is_main:
        notes += [f"the run goes on: its earlier {old.name} is now {new.name}" for old, new in runlog.set_aside(out)]
    old_steps = make_plan(dataclasses.replace(cfg, model=model_cfg, steps=old_cfg.steps), **plan_of).steps
    if plan.steps != old_steps:
        was, now = (schedule.at(start_step, n, cfg.optim)["lr_mult"] for n in (old_steps, plan.steps))
        notes.append(
            f"the run now has {plan.steps} steps, not {old_steps}: from step {start_step} on, schedules are those of a run of "
            f"{plan.steps}, and the learning-rate multiplier is {now:.4g} instead of {was:.4g}"
        )
    pauses = (cfg.eval_every, cfg.sample_every, cfg.save_every)
    first_profiled = max(runlog.UNCOUNTED_STEPS, start_step + SETTLING_STEPS)
    profiled = window(cfg.profile, first_profiled, plan.steps, lambda step: any(due(n, step) for n in pauses))
    if len(profiled) < cfg.profile and start_step < plan.steps:
        notes.append(
            f"{len(profiled)} of {cfg.profile} steps are profiled: there are no more in a row from step {first_profiled} on"
        )
    notes.append(f"evaluations during training score {subset.scope}")
    log.header(facts, plan, notes)
    log.event("resume" if saved else "start", start_step, **facts)
    return Run(
        cfg=cfg,
        world=world,
        plan=plan,
        out=out,
        train_corpus=train_corpus,
        val_corpus=val_corpus,
        tokenizer=tokenizer,
        model=model,
        forward=torch.compile(model, fullgraph=True, dynamic=False) if facts["compiled"] else model,
        optimizer=optimizer,
        gradients=Gradients(list(model.parameters())),
        tensors=tensors,
        loader=loader,
        log=log,
        clock=TrainingClock(world.device, **(saved["clock"] if saved else {})),
        subset=subset,
        facts=facts,
        started=started - (saved["wall_time_s"] if saved else 0.0),
        start_step=start_step,
        memory_before=saved["peak_memory_bytes"] if saved else 0,
        looked=bool(saved and saved["looked"]),
        extended=start_step == old_steps < plan.steps,
        losses=LaggingLoss(),
        signals=StopRequest(),
        profile=StepProfile(world, out, saved["profile"] if saved else {}),
        profiled=profiled,
    )


# loop ---------------------------------------------------------------------


def warm_up(run: Run) -> None:
    """Compiles the model on a batch of the real shape that leaves no trace in it."""
    if not run.facts["compiled"] or run.start_step == run.plan.steps:
        return
    run.log.print("compiling the model, once: this can take minutes (--no-compile starts at once)")
    started = time.perf_counter()
    tokens = torch.zeros((run.plan.device_batch_size, run.plan.seq_len), dtype=torch.int64, device=run.world.device)
    try:
        run.model.prepare_attention()
        run.model.refresh()
        run.forward(tokens, tokens).backward()
        run.gradients.zero()
    except torch._dynamo.exc.BackendCompilerFailed as error:
        reason = str(error.inner_exception).splitlines()[0]
        raise TrainingError(
            f"torch.compile fails here ({reason}): --no-compile trains without it; {kept(run.out)}"
        ) from error
    distributed.barrier()
    seconds = time.perf_counter() - started
    run.facts["compile_s"] = seconds
    run.log.event("compile", run.start_step, seconds=seconds)
    run.log.print(f"compiled in {seconds:.1f} s")


def loop(run: Run) -> None:
    with run.signals:
        visits(run)


def visits(run: Run) -> None:
    step, steps = run.start_step, run.plan.steps
    while True:
        if not (step == run.start_step and run.looked):
            look(run, step)
        elif run.extended:
            evaluate_if_due(run, step)
        if step == steps:
            if any(distributed.gather_objects(run.signals.signum)):
                halt(run, step, looked=True)
            return
        if step in run.profiled:
            pause(run)
            with run.profile:
                for step in run.profiled:
                    train_step(run, step)
                    read_losses(run)
            pause(run)
        else:
            run.clock.before_step(step)
            train_step(run, step)
            run.clock.after_step()
            read_losses(run)
        step += 1


def look(run: Run, step: int) -> None:
    """What is due before step `step`."""
    cfg, last = run.cfg, step == run.plan.steps
    evaluate_if_due(run, step)
    if step > 0 and (due(cfg.sample_every, step) or last):
        pause(run)
        sample(run, step)
    if step > 0 and (due(cfg.save_every, step) or last):
        pause(run)
        save(run, step)


def evaluate_if_due(run: Run, step: int) -> None:
    if due(run.cfg.eval_every, step) and step < run.plan.steps:  # the end scores the whole split
        pause(run)
        run.log.eval(step, evaluate(run, run.subset), run.subset.scope, data_stats(run))


def due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def train_step(run: Run, step: int) -> None:
    inputs, targets = run.loader.next_step()  # each (micro-steps, B, T)
    run.model.refresh()
    loss_sum = torch.zeros((), device=run.world.device)
    for micro_inputs, micro_targets in zip(inputs, targets):
        loss = run.forward(micro_inputs, micro_targets) / run.plan.grad_accum_steps
        loss.backward()
        loss_sum += loss.detach()
    wish = torch.full_like(loss_sum, run.signals.signum > 0)
    outcome = torch.stack((loss_sum, wish))
    if run.world.world_size > 1:
        run.gradients.average(lambda grads: distributed.average_([*grads, outcome]))
    run.optimizer.step(run.gradients, step=step, **schedule.at(step, run.plan.steps, run.cfg.optim))
    run.gradients.zero()
    run.losses.put(step, outcome)


def read_losses(run: Run, *, flush: bool = False) -> None:
    halted = False
    for step, loss, wish in run.losses.take(flush=flush):
        run.log.step(step, loss)
        if not math.isfinite(loss):
            stop(run, step, f"the loss is {loss}")
        halted |= wish
    if halted:
        halt(run, step + 1, looked=False)


def pause(run: Run) -> None:
    """Takes what follows off the clock, once every loss so far is known to be finite."""
    read_losses(run, flush=True)
    run.clock.stop()
    run.log.pause_rate()


def stop(run: Run, step: int, why: str) -> None:
    saved = checkpoint.checkpoints(run.out)
    kept = (
        f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint had been saved yet (see --save-every)"
    )
    run.log.event("stop", step, reason=why)
    raise TrainingError(f"training stopped at step {step}: {why}; {kept}")


def halt(run: Run, step: int, *, looked: bool) -> None:
    """Ends the run after `step` steps because a process had a signal; looked: the visit that follows them was made."""
    run.clock.stop()
    signum = max(distributed.gather_objects(run.signals.signum))
    name = signal.Signals(signum).name
    run.log.event("stop", step, reason=name)
    save(run, step, looked=looked)
    raise Stopped(f"stopped by {name} after {step} of {run.plan.steps} steps; {kept(run.out)}", signum)


def kept(out: Path) -> str:
    """What a run that ended early left, and how it goes on."""
    saved = checkpoint.checkpoints(out)
    if not saved:
        return "no checkpoint had been saved yet (see --save-every): start again"
    return f"{saved[-1]} is saved, continue with: python train.py --resume {out}"


def fewer_rows(run: Run) -> str:
    """What to try when memory was short."""
    rows = smaller_device_batch(run.plan)
    if rows is None:
        return f"fewer than one is impossible; try a shorter --seq-len, {LESS_MEMORY}; {kept(run.out)}"
    saved = checkpoint.checkpoints(run.out)
    command = f"continue {saved[-1].name} with: python train.py --resume {run.out}" if saved else "start again with"
    return f"{command} --device-batch-size {rows}"


def evaluate(run: Run, valset: ValidationSet) -> float:
    return score(run.model, valset, run.tokenizer, batch_size=run.plan.device_batch_size, world=run.world).bpb


def data_stats(run: Run) -> dict[str, float]:
    """What the loaders of all ranks have counted."""
    return runlog.sum_stats(distributed.gather_objects(run.loader.stats()))


def sample(run: Run, step: int) -> None:
    if run.world.is_main:
        cfg = run.cfg
        options = {"temperature": cfg.temperature, "top_k": cfg.top_k, "seed": cfg.seed}
        with out_of_memory(
            "samples", lambda: f"try fewer --sample-tokens or shorter --sample-prompts; {kept(run.out)}"
        ):
            texts = sample_texts(run.model, run.tokenizer, list(cfg.sample_prompts), cfg.sample_tokens, **options)
        run.log.sample(step, list(zip(cfg.sample_prompts, texts)), **options)


def save(run: Run, step: int, *, looked: bool = True) -> None:
    """looked: the evaluation and the samples of this step were made."""
    loader_states = distributed.gather_objects(run.loader.state())
    memory = peak_memory(run)
    if not run.world.is_main:
        return
    bad = [name for name, t in run.tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        stop(run, step, f"{bad[0]} is not finite")
    folder = checkpoint.checkpoint_dir(run.out, step)
    run.log.event("checkpoint", step, path=folder.name)  # a run that resumes here keeps the log up to this line
    state = {
        "step": step,
        "looked": looked,
        "config": to_dict(dataclasses.replace(run.cfg, out=None, resume=None)),
        "model": dataclasses.asdict(run.model.cfg),
        "precision": run.facts["precision"],
        "loader": merge_states(loader_states),
        "log_bytes": run.log.log_bytes,
        "wall_time_s": time.time() - run.started,
        "peak_memory_bytes": memory,
        "profile": run.profile.seconds,
        "wandb": run.log.mirror and run.log.mirror.id,
        "clock": {"counted_s": run.clock.counted_s, "counted_steps": run.clock.counted_steps},
    }
    tensors = run.tensors | checkpoint.rng_tensors(run.world.device)
    checkpoint.save(folder, tensors, state, run.tokenizer)
    checkpoint.prune(run.out, run.cfg.keep_checkpoints)


def peak_memory(run: Run) -> int:
    """Most bytes that one process of the run has held."""
    return max(run.memory_before, *distributed.gather_objects(runlog.peak_memory_bytes(run.world.device)))


# report -------------------------------------------------------------------


def finish(run: Run) -> None:
    valset, data = validation_whole(run.val_corpus, run.tokenizer, run.plan.seq_len, run.cfg.final_eval_bytes)
    bpb = evaluate(run, valset)
    stats = data_stats(run)
    memory = peak_memory(run)
    if not math.isfinite(bpb):
        stop(run, run.plan.steps, f"validation gives {bpb} bits per byte")
    if not run.world.is_main:
        return
    clock, plan = run.clock, run.plan
    seconds = clock.counted_s
    tok_per_s = clock.counted_steps * plan.total_batch_size / seconds if seconds else None
    flop_per_s = tok_per_s and tok_per_s * plan.flops_per_token
    summary = {
        **run.facts,
        "steps": plan.steps,
        "tokens": plan.tokens,
        "flops": plan.flops,
        "params": {**plan.params, "total": plan.params_total, "scaling": plan.params_scaling},
        "val_bpb": bpb,
        "val_scope": valset.scope,
        "compressors": compressor_bits_per_byte(data),
        "total_training_time_s": seconds,
        "counted_steps": clock.counted_steps,
        "tok_per_s": tok_per_s,
        "flop_per_s": flop_per_s,
        "mfu": run.log.peak and flop_per_s and flop_per_s / run.log.peak,
        "peak_memory_bytes": memory,
        "predicted_memory_bytes": plan.memory_bytes["total"],
        "data_stats": stats,
        **run.profile.shares(),
        "wall_time_s": time.time() - run.started,
    }
    run.log.event("end", plan.steps, val_bpb=bpb, scope=valset.scope, total_training_time_s=seconds)
    if run.log.mirror:
        run.log.mirror.summary(summary)
    run.log.close()
    checkpoint.write_json(run.out / "summary.json", summary)
    runlog.write_report(run.out, summary)
    run.log.print(runlog.verdict(run.out, summary))


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
