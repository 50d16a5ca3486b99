"""A training step as train.py makes it: `python -m bench.train_step [train.py's arguments]` prints one JSON object.

The run is built, compiled and warmed up by train.py's own functions; then BLOCKS blocks of STEPS_PER_BLOCK steps are timed, the
device synchronised between blocks alone, and PROFILED steps are profiled. Nothing is evaluated and no checkpoint is written.

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
from core import distributed
from core.config import parse_args
from core.errors import user_errors
from core.profiling import StepProfile
from core.runlog import peak_flops, peak_memory_bytes
from kernels import dispatch

WARM_STEPS = 4
BLOCKS, STEPS_PER_BLOCK = 6, 2
PROFILED = 2


def measure(argv: list[str], folder: Path) -> dict[str, Any]:
    cfg = parse_args([*argv, "--out", str(folder)], distributed.choose_device_type, train.saved_config)
    device_type = distributed.choose_device_type(cfg.device)
    dtype = distributed.choose_dtype(cfg.precision, device_type)
    dispatch.parse(cfg.kernels)
    distributed.prepare_process(device_type, deterministic=cfg.deterministic)
    world = distributed.init_world(device_type)
    run = train.build(cfg, world, dtype, folder, time.time())
    try:
        train.warm_up(run)
        return _measure(run)
    finally:
        run.loader.close()
        run.log.close()
        distributed.shutdown()


def _measure(run: train.Run) -> dict[str, Any]:
    plan, cuda = run.plan, run.world.device.type == "cuda"
    losses: list[float] = []
    step = 0

    def steps(n: int) -> float:
        """Seconds a step of n more."""
        nonlocal step
        start = time.perf_counter()
        for _ in range(n):
            train.train_step(run, step)
            losses.extend(loss for _, loss, _ in run.losses.take())
            step += 1
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / n

    steps(WARM_STEPS)
    seconds = Spread(tuple(steps(STEPS_PER_BLOCK) for _ in range(BLOCKS)))
    memory = peak_memory_bytes(run.world.device)
    profile = StepProfile(run.world, run.out, {})
    with profile:
        steps(PROFILED)
    losses.extend(loss for _, loss, _ in run.losses.take(flush=True))
    low, high = seconds.bounds
    tok_per_s = plan.total_batch_size / seconds.median
    peak = peak_flops(facts()["device"])
    return {
        "depth": run.cfg.model.depth,
        "width": run.model.dims.d_model,
        "precision": run.facts["precision"],
        "kernels": run.cfg.kernels,
        "compiled": run.facts["compiled"],
        "compile_s": run.facts.get("compile_s"),
        "batch_tokens": plan.total_batch_size,
        "device_batch_size": plan.device_batch_size,
        "step_ms": seconds.median * 1e3,
        "step_ms_low": low * 1e3,
        "step_ms_high": high * 1e3,
        "tok_per_s": tok_per_s,
        "mfu": peak and tok_per_s * plan.flops_per_token / peak,
        "peak_memory_gb": memory * 1e-9,
        "predicted_memory_gb": plan.memory_bytes["total"] * 1e-9,
        "losses": losses,
        **{k: v for k, v in profile.shares().items() if k != "profile_files"},
        "backends": run.facts["kernels"]["choices"],
        **facts(),
    }


def main(argv: list[str]) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a run prints is no result
    with tempfile.TemporaryDirectory(prefix="redline-step-") as folder:
        entry = measure(argv, Path(folder) / "run")
    print(json.dumps(entry), file=replies, flush=True)


if __name__ == "__main__":
    with user_errors():
        main(sys.argv[1:])
