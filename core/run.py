"""The folder of a run: claimed by a new one, continued or extended by `--resume`, left whole when it stops.

config.json     the options          checkpoints/   see core/checkpoint.py, with `State` as state.json
log.jsonl       an event a line      summary.json, report.md, loss.png   when it has ended
"""

import dataclasses
import json
import shlex
import time
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core import checkpoint, communication, machine
from core.communication import World
from core.config import Config, changed_fields, from_dict, to_dict
from core.data.loader import Loader, merge_states
from core.data.tokenizer import Tokenizer
from core.machine import TrainingClock
from core.models.gpt2 import GPT
from core.optim import Optimizer
from core.plan import Plan
from core.profiling import StepProfile
from core.report import RunLog
from core.stopping import Stopped, TrainingError, UserError, signal_of
from core.wandb_mirror import WandbMirror

FORMAT = 3


# the state of a checkpoint


@dataclass(frozen=True)
class State:
    """Everything of a checkpoint that is no tensor. This is the schema of state.json: written and read by these
    names."""

    step: int  # optimizer steps made
    evaluated: bool  # what is due at this step besides, the evaluation and the samples, was made before it was saved
    plan_steps: int  # of the run, as it was planned then
    config: dict[str, Any]
    model: dict[str, Any]  # the model's part of it, with the vocabulary that the text gave
    precision: str  # compute type by its name in torch
    loader: dict[str, Any]  # merged over ranks
    log_bytes: int  # of log.jsonl, which a resumed run cuts back to this
    counted_s: float  # on the training clock
    counted_steps: int
    wall_time_s: float
    peak_memory_bytes: int
    profile: dict[str, float]  # seconds by op
    wandb: str | None  # id of the run there

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.precision)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @staticmethod
    def read(folder: Path) -> "State":
        """Of the checkpoint in `folder`; UserError naming the file and what is wrong in it."""
        path = folder / checkpoint.STATE_FILE
        values = checkpoint.load_json(path)
        if not isinstance(values, dict):
            raise UserError(f"{path} is damaged (it holds no object): use another checkpoint")
        if (found := values.pop("format", None)) != FORMAT:
            raise UserError(f"{path} has format {found}, this Redline reads {FORMAT}: use the version that wrote it")
        hints = typing.get_type_hints(State)
        for name, hint in hints.items():
            if name not in values:
                raise UserError(f"{path} is damaged (no {name}): use another checkpoint")
            if not isinstance(values[name], _json_types(hint)):
                raise UserError(f"{path} is damaged ({name} is {str(values[name])[:40]}): use another checkpoint")
        return State(**{name: values[name] for name in hints})


def _json_types(hint: Any) -> tuple[type, ...]:
    """What JSON gives for a field of this type."""
    if isinstance(hint, types.UnionType):
        return tuple(t for part in typing.get_args(hint) for t in _json_types(part))
    return (int, float) if hint is float else (typing.get_origin(hint) or hint,)


def saved_config(path: str) -> Config:
    """The options of the run that `--resume path` continues, with its folder."""
    folder = checkpoint.find(path)
    return dataclasses.replace(from_dict(State.read(folder).config), out=str(folder.parent.parent))


# the run


class Run:
    """A run's folder on one process. Nothing is written before `open_log`, so that bad input leaves nothing behind."""

    log: RunLog
    clock: TrainingClock
    profile: StepProfile

    def __init__(self, cfg: Config, world: World, started: float) -> None:
        """Claims a new folder or finds the checkpoint to continue; UserError where neither can be. started: the wall
        clock's time at the start of the program."""
        self.cfg, self.world = cfg, world
        self.checkpoint = checkpoint.find(cfg.resume) if cfg.resume else None
        self.saved = State.read(self.checkpoint) if self.checkpoint else None
        self.started = started - (self.saved.wall_time_s if self.saved else 0.0)
        stamp = f"runs/{cfg.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.out = Path(communication.broadcast_object(cfg.out or stamp)).expanduser()
        if self.saved and self.checkpoint:
            changed = [name for name in changed_fields(from_dict(self.saved.config), cfg) if name != "steps"]
            if changed:
                raise UserError(
                    f"--resume continues a run as it was, but these differ: {', '.join(changed)}; start a new run "
                    "instead"
                )
            home = self.checkpoint.parent.parent
            if self.out.resolve() != home.resolve():
                raise UserError(f"--resume continues in the folder of the run, {home}: omit --out {self.out}")
        elif (self.out / "log.jsonl").exists():
            has_any = checkpoint.checkpoints(self.out)
            advice = f"continue it with --resume {self.out}" if has_any else "it saved nothing: remove the folder"
            raise UserError(f"{self.out} holds a run already: {advice}, or choose another --out")

    @property
    def start_step(self) -> int:
        return self.saved.step if self.saved else 0

    @property
    def evaluated(self) -> bool:
        """Whether what is due at the start step was made before the run was resumed."""
        return self.saved is not None and self.saved.evaluated

    def extended(self, plan: Plan) -> bool:
        """Whether the run had ended at the start step, and goes on because --steps was raised."""
        return self.saved is not None and self.start_step == self.saved.plan_steps < plan.steps

    def check_horizon(self, plan: Plan) -> None:
        """UserError where a resumed run shall have fewer steps than it has made."""
        if self.saved and plan.steps != self.saved.plan_steps and plan.steps <= self.start_step:
            raise UserError(
                f"--steps is {plan.steps}, but the checkpoint has made {self.start_step} already: "
                f"expected {self.start_step + 1} or more"
            )

    def open_log(self, plan: Plan) -> list[str]:
        """Creates the folder: last, after every user error. Returns sentences on what became of an earlier run's
        files."""
        cfg, saved = self.cfg, self.saved
        config = to_dict(dataclasses.replace(cfg, out=str(self.out), resume=None))

        def open_mirror() -> WandbMirror | None:
            if cfg.wandb is None or not self.world.is_main:
                return None
            run_id = saved.wandb if saved and cfg.wandb == saved.config["wandb"] else None
            return WandbMirror(cfg.wandb, self.out, config | {"plan": dataclasses.asdict(plan)}, run_id)

        self.log = RunLog(
            self.out,
            self.world,
            plan,
            log_every=cfg.log_every,
            start_step=self.start_step,
            log_bytes=saved.log_bytes if saved else None,
            mirror=communication.main_first(open_mirror),
        )
        self.clock = TrainingClock(
            self.world.device, saved.counted_s if saved else 0.0, saved.counted_steps if saved else 0
        )
        self.profile = StepProfile(self.world, self.out, saved.profile if saved else {})
        notes = []
        if self.world.is_main:
            checkpoint.write_json(self.out / "config.json", config)
            if saved:  # otherwise pruning would keep the stale later ones and delete the fresh ones
                dropped = checkpoint.drop_after(self.out, self.start_step)
                notes += [f"dropped {path.name}, which comes after step {self.start_step}" for path in dropped]
            if self.start_step < plan.steps:
                notes += [f"the run goes on: its earlier {old} is now {new}" for old, new in self._set_aside()]
        return notes

    def _set_aside(self) -> list[tuple[str, str]]:
        """Renames the summary and the report of a run that had ended and goes on, so that nobody takes them for its
        result."""
        summary = self.out / "summary.json"
        if not summary.exists():
            return []
        steps = json.loads(summary.read_text())["steps"]
        moved = []
        for path in (summary, self.out / "report.md"):
            if path.exists():
                moved.append((path.name, path.rename(path.with_stem(f"{path.stem}-{steps}-steps")).name))
        return moved

    def save(
        self,
        step: int,
        model: GPT,
        optimizer: Optimizer,
        loader: Loader,
        tokenizer: Tokenizer,
        plan: Plan,
        *,
        evaluated: bool,
    ) -> None:
        """Saves a checkpoint of the model that `step` steps made; all ranks call it, rank 0 writes. evaluated: see
        `State`."""
        loader_states = communication.gather_objects(loader.state())
        memory = self.peak_memory()
        if not self.world.is_main:
            return
        tensors = checkpoint.training_tensors(model, optimizer.state)
        for name, t in tensors.items():
            if t.is_floating_point() and not t.isfinite().all():  # it would replace a good checkpoint
                raise self.failed(step, f"{name} is not finite")
        folder = checkpoint.checkpoint_dir(self.out, step)
        self.log.event("checkpoint", step, path=folder.name)  # a run that resumes here keeps the log up to this line
        state = State(
            step=step,
            evaluated=evaluated,
            plan_steps=plan.steps,
            config=to_dict(dataclasses.replace(self.cfg, out=None, resume=None)),
            model=dataclasses.asdict(model.cfg),
            precision=str(optimizer.compute_dtype).removeprefix("torch."),
            loader=merge_states(loader_states),
            log_bytes=self.log.log_bytes,
            counted_s=self.clock.counted_s,
            counted_steps=self.clock.counted_steps,
            wall_time_s=time.time() - self.started,
            peak_memory_bytes=memory,
            profile=dict(self.profile.seconds),
            wandb=self.log.mirror.id if self.log.mirror else None,
        )
        checkpoint.save(folder, tensors | checkpoint.rng_tensors(self.world.device), state.to_json(), tokenizer)
        checkpoint.prune(self.out, self.cfg.keep_checkpoints)

    def peak_memory(self) -> int:
        """Most bytes that one process of the run has held, before it was resumed or since."""
        before = self.saved.peak_memory_bytes if self.saved else 0
        return max(before, *communication.gather_objects(machine.peak_memory_bytes(self.world.device)))

    # stopping -------------------------------------------------------------

    def failed(self, step: int, why: str) -> TrainingError:
        """The error to raise when training cannot go on; the log has it too."""
        saved = checkpoint.checkpoints(self.out)
        last = (
            f"the last good checkpoint is {saved[-1]}"
            if saved
            else "no checkpoint had been saved yet (see --save-every)"
        )
        self.log.event("stop", step, reason=why)
        return TrainingError(f"training stopped at step {step}: {why}; {last}")

    def how_to_go_on(self) -> str:
        """What a run that ended early left, and the command that continues it."""
        saved = checkpoint.checkpoints(self.out)
        if not saved:
            return "no checkpoint had been saved yet (see --save-every): start again"
        return f"{saved[-1]} is saved, continue with: python train.py --resume {shlex.quote(str(self.out))}"

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, Ctrl-C and SIGTERM end the run with a sentence that says how it goes on."""
        try:
            yield
        except Stopped:
            communication.barrier()  # torchrun kills the others when one has ended: rank 0 closes its files first
            raise
        except KeyboardInterrupt as error:
            signum = signal_of(error)
            raise Stopped(f"stopped by {signum.name}; {self.how_to_go_on()}", signum) from None
