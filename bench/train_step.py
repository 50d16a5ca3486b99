"""A training step as train.py makes it: `python -m bench.train_step [train.py's arguments]` prints one JSON object.

The run is built, compiled and warmed up by train.py's own functions; then BLOCKS blocks of STEPS_PER_BLOCK steps are
timed, the device synchronised between blocks alone, and PROFILED steps are profiled. Nothing is evaluated and no
checkpoint is written.

step_ms with 95 % bounds (of blocks), tok_per_s, mfu (FLOPs of the plan over the bf16 peak; null where that is unknown),
peak_memory_gb, loss (first and last), time_by_op and non_matmul_share of the profile, what ran and where.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import train
from bench.history import facts
from bench.timing import Spread
from core import machine
from core.command_line import parse_args
from core.communication import LaggingLoss, joined_world
from core.run import Run
from core.stopping import StopFlag, one_sentence

WARM_STEPS = 4
BLOCKS, STEPS_PER_BLOCK = 6, 2
PROFILED = 2


def measure(argv: list[str], folder: Path) -> dict[str, Any]:
    cfg = parse_args([*argv, "--out", str(folder)])
    with joined_world(cfg.device, deterministic=cfg.deterministic) as world:
        run = Run(cfg, world, time.time())
        text, trainer = train.build(run)
        try:
            setup, _, _ = train.announce(run, text, trainer)
            train.warm_up(run, trainer, setup)
            return _measure(run, trainer, setup)
        finally:
            trainer.loader.close()
            run.log.close()


def _measure(run: Run, trainer: train.Trainer, setup: dict[str, Any]) -> dict[str, Any]:
    plan, device = trainer.plan, run.world.device
    losses, values, stop = LaggingLoss(), [], StopFlag()  # nobody sets it
    step = 0

    def steps(n: int) -> float:
        """Seconds a step of n more."""
        nonlocal step
        start = time.perf_counter()
        for _ in range(n):
            losses.put(step, train.train_step(trainer, step, stop))
            values.extend(outcome.loss for outcome in losses.take())
            step += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / n

    steps(WARM_STEPS)
    seconds = Spread(tuple(steps(STEPS_PER_BLOCK) for _ in range(BLOCKS)))
    memory = machine.peak_memory_bytes(device)
    with run.profile:
        steps(PROFILED)
    values.extend(outcome.loss for outcome in losses.take(flush=True))
    low, high = seconds.bounds
    speed = machine.speed(plan.total_batch_size, seconds.median, plan.flops_per_token, run.log.peak)
    return {
        "depth": run.cfg.model.depth,
        "width": trainer.model.dims.d_model,
        "precision": setup["precision"],
        "kernels": run.cfg.kernels,
        "compiled": setup["compiled"],
        "compile_s": setup.get("compile_s"),
        "batch_tokens": plan.total_batch_size,
        "device_batch_size": plan.device_batch_size,
        "step_ms": seconds.median * 1e3,
        "step_ms_low": low * 1e3,
        "step_ms_high": high * 1e3,
        "tok_per_s": speed.tok_per_s,
        "mfu": speed.mfu,
        "peak_memory_gb": memory * 1e-9,
        "predicted_memory_gb": plan.memory_bytes["total"] * 1e-9,
        "losses": values,
        **{k: v for k, v in run.profile.shares().items() if k != "profile_files"},
        "backends": setup["kernels"]["choices"],
        **facts(),
    }


def main(argv: list[str]) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a run prints is no result
    with tempfile.TemporaryDirectory(prefix="redline-step-") as folder:
        entry = measure(argv, Path(folder) / "run")
    print(json.dumps(entry), file=replies, flush=True)


if __name__ == "__main__":
    with one_sentence():
        main(sys.argv[1:])
