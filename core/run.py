"""The folder of a run: claimed by a new one, continued or extended by `--resume`, left whole when it stops.

config.json     the options          checkpoints/   see core/checkpoint.py, with `State` as state.json
log.jsonl       an event a line      summary.json, report.md, loss.png   when it has ended
owner           locked by rank 0 of the process that trains, which it names; the kernel releases the lock

One process owns a folder: two that train in it would write one log and delete each other's checkpoints.
"""

import dataclasses
import fcntl
import os
import shlex
import socket
import time
import traceback
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core import checkpoint, communication, machine
from core.communication import World
from core.config import Config, changed_fields, from_dict, to_dict
from core.data.corpus import Corpus
from core.data.loader import Loader, merge_states
from core.data.shards import ShardCorpus
from core.data.tokenizer import Tokenizer
from core.machine import TrainingClock
from core.models.gpt2 import GPT
from core.optim import Optimizer
from core.plan import Plan
from core.profiling import StepProfile
from core.report import RunLog
from core.saving import HostCopy, Save
from core.sharding import Shard
from core.stopping import (
    STORAGE_ERRORS,
    Stopped,
    TrainingError,
    UnreadableData,
    UserError,
    expanded,
    is_out_of_memory,
    naming,
    signal_of,
)
from core.wandb_mirror import WandbMirror

FORMAT = 4
AUTO = "auto"  # --resume auto: continue what --out holds, else start
OWNER_FILE = "owner"
RELEASE_S = 60  # that a save under way is waited for where the run has failed


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
            raise checkpoint.damaged(path, "it holds no object")
        if (found := values.get("format")) != FORMAT:
            raise UserError(f"{path} has format {found}, this Redline reads {FORMAT}: use the version that wrote it")
        hints = typing.get_type_hints(State)
        for name, hint in hints.items():
            if name not in values:
                raise checkpoint.damaged(path, f"no {name}")
            if not isinstance(values[name], _json_types(hint)):
                raise checkpoint.damaged(path, f"{name} is {str(values[name])[:40]}")
        checkpoint.verify_state(folder, values)
        return State(**{name: values[name] for name in hints})


def _json_types(hint: Any) -> tuple[type, ...]:
    """What JSON gives for a field of this type."""
    if isinstance(hint, types.UnionType):
        return tuple(t for part in typing.get_args(hint) for t in _json_types(part))
    return (int, float) if hint is float else (typing.get_origin(hint) or hint,)


def saved_config(path: str, out: str | None) -> Config:
    """The options of the run that `--resume path` continues, with its folder; out: where that may be."""
    try:
        folder = checkpoint.find(path)
    except UserError as error:
        if owner := _owner_of(expanded(path)):
            raise UserError(f"{path} is being trained by {owner}: wait for it, or stop it first") from error
        raise
    return dataclasses.replace(from_dict(State.read(folder).config), out=str(checkpoint.run_folder(path, out)))


# the owner


def _claim(out: Path) -> int:
    """Makes this process the owner of the folder until it ends or closes the descriptor that is returned; UserError
    naming the owner where there is one, and nothing is touched then."""
    path = out / OWNER_FILE
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with naming(path):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except BlockingIOError as error:
        os.close(fd)
        owner = path.read_text().strip() or "another process"
        raise UserError(f"{out} is being trained by {owner}: wait for it, or stop it first") from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def _owner_of(out: Path) -> str | None:
    """Who trains in the folder now."""
    path = out / OWNER_FILE
    if not path.exists():
        return None
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip() or "another process"
    return None


# the run


class Run:
    """A run's folder on one process. Nothing is written before `open_log`, so that bad input leaves nothing behind."""

    log: RunLog
    clock: TrainingClock
    profile: StepProfile

    def __init__(self, cfg: Config, world: World, started: float) -> None:
        """Finds the checkpoint to continue, as the owner of its folder, or sees that a new run's folder is free;
        UserError where neither can be. started: the wall clock's time at the start of the program."""
        self.cfg, self.world = cfg, world
        self.step = 0  # that the loop is at
        self.unsaved: str | None = None  # why the newest checkpoint is missing
        self._owned: int | None = None
        self._under_way: Save | None = None  # that is under way, or of which nobody has asked yet what became
        self._stopped_s = 0.0  # that the loop stopped for it
        self._host_copy = HostCopy()
        self.checkpoint: Path | None = None
        self.saved: State | None = None
        stamp = f"runs/{cfg.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.out = expanded(communication.broadcast_object(cfg.out or stamp))
        try:
            self._find()
        except BaseException:
            self.release()
            raise
        self.started = started - (self.saved.wall_time_s if self.saved else 0.0)

    def _find(self) -> None:
        cfg = self.cfg
        resume = cfg.resume if cfg.resume != AUTO else None
        if resume:
            home = checkpoint.run_folder(resume, cfg.out)
            if self.out.resolve() != home.resolve():
                raise UserError(f"--resume continues in the folder of the run, {home}: omit --out {self.out}")
        if resume or (self.out / "log.jsonl").exists() or (self.out / OWNER_FILE).exists():
            communication.main_first(self._own, "the run's folder")
        if resume:
            self.checkpoint = found = checkpoint.find(resume)
            self.saved = State.read(found)
            saved = from_dict(self.saved.config)
            changed = [name for name in changed_fields(saved, cfg) if name != "steps"]
            if changed:
                raise UserError(
                    f"--resume continues a run as it was, but these differ: {', '.join(changed)}; start a new run "
                    "instead"
                )
            if (config := self.out / "config.json").exists():
                other = [name for name in changed_fields(_read_config(config), saved) if name != "steps"]
                if other:
                    raise UserError(
                        f"{found} is a checkpoint of another run than {config}: they differ in {', '.join(other)}"
                    )
            communication.main_first(
                lambda: checkpoint.verify(found) if self.world.is_main else None, "the checkpoint's checksums"
            )
        elif checkpoint.checkpoints(self.out):
            raise UserError(
                f"{self.out} holds a run already: continue it with --resume {self._quoted}, or choose another --out"
            )
        elif (self.out / "log.jsonl").exists() and cfg.resume != AUTO:
            raise UserError(
                f"{self.out} holds a run already: it saved nothing: remove the folder, start over in it with "
                "--resume auto, or choose another --out"
            )

    def _own(self) -> None:
        """Rank 0 becomes the owner of the run's folder."""
        if self.world.is_main and self._owned is None:
            self.out.mkdir(parents=True, exist_ok=True)
            self._owned = _claim(self.out)
            checkpoint.recover(self.out / "checkpoints")

    def release(self) -> None:
        """The folder has no owner any more; done by the kernel where the process just ends."""
        if self._under_way is not None:  # it writes into the folder, unless another process stands still
            self._under_way.join(RELEASE_S)
        if self._owned is not None:
            os.close(self._owned)
            self._owned = None

    @property
    def _quoted(self) -> str:
        """The folder as a shell takes it."""
        return shlex.quote(str(self.out))

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

    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's, where the text was mended since: another text would teach another one."""
        return Tokenizer.load(self.checkpoint) if self.checkpoint and self.cfg.mended_data else None

    def loader_state(self, corpus: Corpus | ShardCorpus) -> dict[str, Any] | None:
        """Where the checkpoint's rows ended; a mended text counts as that of the checkpoint."""
        if self.saved is None:
            return None
        return self.saved.loader | ({"corpus": corpus.fingerprint} if self.cfg.mended_data else {})

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
        config = to_dict(dataclasses.replace(cfg, out=str(self.out), resume=None, mended_data=False))
        communication.main_first(self._own, "the run's folder")
        notes = []
        if self.world.is_main and cfg.resume == AUTO and (log := self.out / "log.jsonl").exists():
            notes.append("the run that was here had saved nothing and starts over; its log is log-unsaved.jsonl")
            log.replace(log.with_name("log-unsaved.jsonl"))

        def open_mirror() -> WandbMirror | None:
            if cfg.wandb is None or not self.world.is_main:
                return None
            run_id = saved.wandb if saved and cfg.wandb == saved.config["wandb"] else None
            return WandbMirror(cfg.wandb, self.out, config | {"plan": dataclasses.asdict(plan)}, run_id)

        num_gpus = self.world.world_size if self.world.device.type == "cuda" else 0
        metered = machine.node_energy_counter(self.world.device, self.world.world_size) if self.world.is_main else None
        if metered and metered[0] < num_gpus:
            notes.append(f"watts and kWh are those of {metered[0]} of {num_gpus} GPUs, the ones of this node")
        self.log = RunLog(
            self.out,
            self.world,
            plan,
            log_every=cfg.log_every,
            start_step=self.start_step,
            log_bytes=saved.log_bytes if saved else None,
            mirror=communication.main_first(open_mirror, "Weights & Biases"),
            drops_lines=cfg.on_save_error == "continue",
        )
        self.log.meter = machine.Meter(
            metered[1] if metered else None,
            lambda: machine.cost_dollars(time.time() - self.started, num_gpus, cfg.dollars_per_gpu_hour),
            self.log.last("kwh") if saved else 0.0,
            metered[0] if metered else 0,
        )
        self.clock = TrainingClock(
            self.world.device,
            saved.counted_s if saved else 0.0,
            saved.counted_steps if saved else 0,
            machine.energy_counter(self.world.device) if saved is None else None,
        )
        self.profile = StepProfile(self.world, self.out, saved.profile if saved else {})
        notes += self.log.notes
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
        values = checkpoint.load_json(summary)
        if not isinstance(values, dict) or not isinstance(steps := values.get("steps"), int):
            raise UserError(f"{summary} is damaged (it has no number of steps): remove it")
        moved = []
        for path in (summary, self.out / "report.md"):
            if path.exists():
                moved.append((path.name, path.rename(path.with_stem(f"{path.stem}-{steps}-steps")).name))
        return moved

    # saving ---------------------------------------------------------------

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
        wait: bool,
    ) -> None:
        """Saves a checkpoint of the model that `step` steps made; all ranks call it. Without `wait`, and unless the
        options say otherwise, it returns when the tensors are copied. evaluated: see `State`."""
        self.settle()  # one save is under way at a time
        started = time.perf_counter()
        wait |= not self.cfg.async_save
        everything = checkpoint.training_tensors(model, optimizer.state)
        tensors = checkpoint.dealt(everything, self.world.rank, self.world.world_size)
        if self.world.is_main:
            tensors |= checkpoint.rng_tensors(self.world.device)
        found = communication.gather_objects((loader.state(), checkpoint.not_finite(tensors)))
        if name := next((name for _, name in found if name), None):  # it would replace a good checkpoint
            raise self.failed(step, f"{name} is not finite") if self.world.is_main else SystemExit(1)
        memory = self.peak_memory()
        if not wait:
            what = "the copy of what is saved"
            tensors = communication.together(lambda tensors=tensors: self._host_copy.of(tensors), what)

        folder = checkpoint.checkpoint_dir(self.out, step)
        loader_state = merge_states([state for state, _ in found])

        def described() -> dict[str, Any]:
            if not self.world.is_main:
                return {}
            # first: a run that resumes here keeps the log up to this line
            self.log.event("checkpoint", step, path=folder.name)
            return State(
                step=step,
                evaluated=evaluated,
                plan_steps=plan.steps,
                config=to_dict(dataclasses.replace(self.cfg, out=None, resume=None, mended_data=False)),
                model=dataclasses.asdict(model.cfg),
                precision=str(optimizer.compute_dtype).removeprefix("torch."),
                loader=loader_state,
                log_bytes=self.log.log_bytes,
                counted_s=self.clock.counted_s,
                counted_steps=self.clock.counted_steps,
                wall_time_s=time.time() - self.started,
                peak_memory_bytes=memory,
                profile=dict(self.profile.seconds),
                wandb=self.log.mirror.id if self.log.mirror else None,
            ).to_json()

        state = communication.main_first(described, f"the checkpoint of step {step}")
        self._under_way = Save(step, lambda commit: self._write(folder, tensors, state, tokenizer, commit))
        self._stopped_s = time.perf_counter() - started
        if wait:
            self.settle()

    def _write(
        self,
        folder: Path,
        tensors: Mapping[str, Tensor | Shard],
        state: dict[str, Any],
        tokenizer: Tokenizer,
        commit: AbstractContextManager[None],
    ) -> None:
        """What the thread of a save does, on every rank."""
        communication.agreed(self.log.sync, "the log")  # first: a checkpoint counts on the log up to its own line
        checkpoint.save(folder, tensors, state, tokenizer, commit=commit)
        keep = self.cfg.keep_checkpoints
        communication.agreed(
            lambda: checkpoint.prune(self.out, keep) if self.world.is_main else None, "old checkpoints"
        )

    def settle(self, *, wait: bool = True) -> None:
        """Logs what became of the last save, after waiting for it. TrainingError where it failed and the run shall not
        go on; all ranks raise it together. wait: otherwise only if it has ended, and nothing is raised."""
        save = self._under_way
        if save is None or not (wait or save.ended and not self.must_stop()):
            return
        started = time.perf_counter()
        save.join()
        self._under_way = None
        seconds = {"seconds": round(self._stopped_s + time.perf_counter() - started, 4)}
        if save.error is None:
            self.unsaved = None
            name = checkpoint.checkpoint_dir(self.out, save.step).name
            self.log.event("saved", save.step, path=name, **seconds, write_seconds=round(save.seconds, 4))
            return
        if not isinstance(save.error, OSError):
            raise save.error
        why = f"the checkpoint of step {save.step} cannot be saved ({save.error.filename}: {save.error.strerror})"
        stops = self.cfg.on_save_error == "stop"
        with suppress(OSError):  # the disk may be full under the log as well
            self.log.event("unsaved", save.step, reason=why)
        if not self.world.is_main:
            if stops:
                raise SystemExit(1)
            return
        self.unsaved = why
        if stops:
            raise TrainingError(f"{why}; {self.how_to_go_on()}") from save.error
        self.log.print(f"note: {why}; the run goes on (--on-save-error continue)")

    def must_stop(self) -> bool:
        """Whether the last save has failed so that the run shall not go on: `settle` says why."""
        if self._under_way is None or not self._under_way.ended or self._under_way.error is None:
            return False
        return self.cfg.on_save_error == "stop" or not isinstance(self._under_way.error, OSError)

    def checkpoints(self, wait_s: float | None = None) -> list[Path]:
        """The run's whole checkpoints, oldest first, after the save under way, or after wait_s at most: where another
        process stands still, it may never end."""
        if self._under_way is not None:
            self._under_way.join(wait_s)
        return checkpoint.checkpoints(self.out)

    def peak_memory(self) -> int:
        """Most bytes that one process of the run has held, before it was resumed or since."""
        before = self.saved.peak_memory_bytes if self.saved else 0
        return max(before, *communication.gather_objects(machine.peak_memory_bytes(self.world.device)))

    # stopping -------------------------------------------------------------

    def failed(self, step: int, why: str, wait_s: float | None = None) -> TrainingError:
        """The error to raise when training cannot go on; the log has it too. wait_s: see `checkpoints`."""
        saved = self.checkpoints(wait_s)
        last = (
            f"the last good checkpoint is {saved[-1]}"
            if saved
            else "no checkpoint had been saved yet (see --save-every)"
        )
        with suppress(OSError):  # a full disk must not hide why
            self.log.event("stop", step, reason=why)
        return TrainingError(f"training stopped at step {step}: {why}; {last}")

    def went_wrong(self, step: int, error: Exception) -> Exception:
        """The error to raise after the checkpoint of `step` was saved because of `error`."""
        if isinstance(error, UnreadableData):
            return UserError(f"{error}; {self.how_to_go_on()} --mended-data, once the text is mended")
        if isinstance(error, TrainingError | UserError):
            with suppress(OSError):
                self.log.event("stop", step, reason=str(error))
            return TrainingError(f"{error}; {self.how_to_go_on()}")
        return error

    def check_saved(self) -> None:
        """TrainingError at the end of a run whose last checkpoint could not be saved."""
        if self.unsaved:
            raise TrainingError(f"the report is written, but {self.unsaved}; {self.how_to_go_on()}")

    def log_of_loss(self, why: str) -> None:
        """The log's last line of a run that another process has left, if there is a log yet."""
        if "log" in vars(self):
            self.log.event("stop", self.step, reason=why)

    def how_to_go_on(self, wait_s: float | None = None) -> str:
        """What a run that ended early left, and the command that continues it. wait_s: see `checkpoints`."""
        saved = self.checkpoints(wait_s)
        if not saved:
            return "no checkpoint had been saved yet (see --save-every): start again"
        return f"{saved[-1]} is saved, continue with: python train.py --resume {self._quoted}"

    @contextmanager
    def ending(self, step: int) -> Iterator[None]:
        """Inside, where all steps are made and saved, an error is one sentence that says how the end is made again;
        its traceback goes to the log."""
        try:
            yield
        except TrainingError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            with suppress(OSError):
                self.log.event("stop", step, reason=repr(error), traceback=traceback.format_exc())
            what = (str(error).splitlines() or [""])[0]
            raise TrainingError(
                f"all {step} steps are trained, but the end of the run failed ({type(error).__name__}: {what}; "
                f"traceback in {self.out / 'log.jsonl'}); {self.how_to_go_on()}"
            ) from error

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, Ctrl-C and SIGTERM end the run with a sentence that says how it goes on, and so does a disk that is
        full; then the folder has no owner any more."""
        try:
            yield
        except Stopped:
            communication.barrier()  # torchrun kills the others when one has ended: rank 0 closes its files first
            raise
        except communication.Lost as error:
            with suppress(OSError):
                self.log_of_loss(str(error))
            raise TrainingError(f"{error}; {self.how_to_go_on(RELEASE_S)}") from error
        except KeyboardInterrupt as error:
            if self._under_way is not None:
                self._under_way.abandon()
                self._under_way = None
            signum = signal_of(error)
            raise Stopped(f"stopped by {signum.name}; {self.how_to_go_on()}", signum) from None
        except OSError as error:
            if error.errno not in STORAGE_ERRORS:
                raise
            where = error.filename or "a file"
            raise TrainingError(f"{where} cannot be written: {error.strerror}; {self.how_to_go_on()}") from error
        finally:
            self.release()


def _read_config(path: Path) -> Config:
    values = checkpoint.load_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged (it holds no object): remove it, a checkpoint has the same options")
    return from_dict(values)
