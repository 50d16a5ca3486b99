"""A run's metrics on Weights & Biases, as log.jsonl has them: `--wandb PROJECT`. wandb is an optional dependency."""

from pathlib import Path
from types import ModuleType
from typing import Any

from core.stopping import UserError

MISSING = "--wandb needs the package wandb, which is not installed: pip install -e '.[wandb]'"


def load_wandb() -> ModuleType:
    """The package; UserError when it is not installed."""
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
        try:
            self._run = wandb.init(project=project, name=out.name, dir=str(out), config=config, **again)
        except wandb.Error as error:
            raise UserError(f"--wandb {project}: {error} Or set WANDB_MODE=offline, or omit --wandb") from error
        self.id: str = self._run.id
        self._run.define_metric("*", step_metric="step")
        self._complete = False

    def event(self, event: dict[str, Any]) -> None:
        """Mirrors one event of log.jsonl, if it has metrics."""
        if event["event"] == "step":
            values = {name: v for name, v in event.items() if name not in ("event", "step", "time")}
            self._run.log({"step": event["step"] + 1, **values})
        elif event["event"] == "eval":
            data = {f"data/{name}": v for name, v in event["data"].items()}
            self._run.log({"step": event["step"], "val_bpb": event["val_bpb"], **data})

    def summary(self, values: dict[str, Any]) -> None:
        self._run.summary.update(values)
        self._complete = True

    def close(self) -> None:
        """Sends what is left; a run without a summary counts as failed there."""
        self._run.finish(exit_code=0 if self._complete else 1)
