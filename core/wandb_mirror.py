"""A run's metrics on Weights & Biases, as log.jsonl has them: `--wandb PROJECT`. wandb is an optional dependency."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from core.stopping import UserError

MODES = ("online", "offline", "disabled", "shared")
ANSWER_SECONDS = 60  # for the server to take a run, and its last metrics
MISSING = "--wandb needs the package wandb, which is not installed: pip install -e '.[wandb]'"


def load_wandb() -> ModuleType:
    """The package; UserError when it is not installed, or WANDB_MODE is none of its modes."""
    if (mode := os.environ.get("WANDB_MODE", "online")) not in MODES:
        raise UserError(f"WANDB_MODE is {mode!r}: expected one of {', '.join(MODES)}")
    try:
        import wandb  # pyrefly: ignore[missing-import]  # optional
    except ModuleNotFoundError as error:
        raise UserError(MISSING) from error
    if not hasattr(wandb, "init"):  # a folder `wandb` that an earlier run left where this one starts
        raise UserError(MISSING)
    return wandb


class WandbMirror:
    """One wandb run. The x axis is `step`, the optimizer steps made; a run resumed at an earlier step draws over
    itself."""

    def __init__(self, project: str, out: Path, config: dict[str, Any], run_id: str | None) -> None:
        """run_id: of the wandb run to continue; None starts one. wandb's own files go to `out`/wandb."""
        wandb = load_wandb()
        out.mkdir(parents=True, exist_ok=True)
        again = {"id": run_id, "resume": "allow", "allow_val_change": True} if run_id else {}
        advice = "Or set WANDB_MODE=offline, or omit --wandb"
        try:
            self._run = within(
                ANSWER_SECONDS,
                lambda: wandb.init(project=project, name=out.resolve().name, dir=str(out), config=config, **again),
            )
        except wandb.Error as error:
            raise UserError(f"--wandb {project}: {error} {advice}") from error
        except TimeoutError as error:
            raise UserError(f"--wandb {project}: no answer in {ANSWER_SECONDS} s. {advice}") from error
        self.id: str = self._run.id
        self._run.define_metric("*", step_metric="step")
        self._complete = False
        self._lost = False

    def event(self, event: dict[str, Any]) -> None:
        """Mirrors one event of log.jsonl, if it has metrics."""
        if event["event"] == "step":
            values = {name: v for name, v in event.items() if name not in ("event", "step", "time")}
            row = {"step": event["step"] + 1, **values}
        elif event["event"] == "eval":
            data = {f"data/{name}": v for name, v in event["data"].items()}
            row = {"step": event["step"], "val_bpb": event["val_bpb"], **data}
        elif event["event"] == "core":
            centered = {f"core/{label}": t["centered"] for label, t in event["core_tasks"].items()}
            row = {"step": event["step"], "core": event["core"], **centered}
        else:
            return
        if not self._lost:
            with self._unless_lost():
                self._run.log(row)

    def summary(self, values: dict[str, Any]) -> None:
        with self._unless_lost():
            self._run.summary.update(values)
            self._complete = True

    @contextmanager
    def _unless_lost(self) -> Iterator[None]:
        """The first error of wandb is said and ends the mirror, not the run."""
        try:
            yield
        except (load_wandb().Error, OSError) as error:  # OSError: its own process, or the disk under its files, is gone
            if not self._lost:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                print(f"note: Weights & Biases takes no metrics any more ({reason}); log.jsonl has them all")
            self._lost = True

    def close(self) -> None:
        """Sends what is left; a run without a summary counts as failed there."""
        with self._unless_lost():
            try:
                within(ANSWER_SECONDS, lambda: self._run.finish(exit_code=0 if self._complete else 1))
            except TimeoutError:
                print(f"note: Weights & Biases did not take the last metrics in {ANSWER_SECONDS} s; log.jsonl has them")


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """What `work()` gives or raises; TimeoutError after so many seconds, and its thread is left to itself."""
    outcome: list[Any] = []

    def keep() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:  # raised below, in the caller's thread
            outcome.append((None, error))

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError
    value, error = outcome[0]
    if error is not None:
        raise error
    return value
