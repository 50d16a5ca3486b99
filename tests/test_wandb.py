"""--wandb, against a stand-in for the package that keeps what it gets."""

import json
import sys
import threading
from types import SimpleNamespace

import pytest

import train
from core import checkpoint, wandb_mirror
from core.run import State
from core.stopping import TrainingError, UserError
from tests.test_train import losses, run


class Fake:
    """The part of the package that is used; `runs` has every wandb run of the test."""

    class Error(Exception):
        pass

    def __init__(self, login=True):
        self.runs, self.login = [], login

    def init(self, **options):
        if not self.login:
            raise self.Error("No API key configured. Use `wandb login` to log in.")
        r = SimpleNamespace(id=options.get("id") or f"id{len(self.runs)}", options=options, rows=[], summary={})
        r.log, r.define_metric, r.finish = r.rows.append, lambda *a, **k: None, lambda **k: setattr(r, "end", k)
        self.runs.append(r)
        return r


@pytest.fixture
def fake(monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_metrics_are_mirrored_and_a_resumed_run_goes_on(tiny, tmp_path, fake, monkeypatch):
    out, honest = tmp_path / "run", train.train_step

    def dies(trainer, step, stop):
        if step == 9:
            raise TrainingError("enough")
        return honest(trainer, step, stop)

    monkeypatch.setattr(train, "train_step", dies)
    with pytest.raises(TrainingError):
        run(tiny, out, "--wandb", "mine")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train.main(["--resume", str(out)])
    first, second = fake.runs
    assert first.options["project"] == "mine" and first.options["config"]["model"]["depth"] == 2
    assert first.options["config"]["plan"]["steps"] == 12 and "id" not in first.options
    assert first.end == {"exit_code": 1} and second.end == {"exit_code": 0}
    assert second.id == first.id and second.options["resume"] == "allow"
    rows = {r["step"]: r["loss"] for r in first.rows + second.rows if "loss" in r}
    assert rows == {step + 1: loss for step, loss in losses(out).items()}
    assert [r["step"] for r in first.rows + second.rows if "val_bpb" in r] == [0, 5, 10]
    assert json.loads(json.dumps(second.summary)) == json.loads((out / "summary.json").read_text())
    train.main(["--resume", str(out), "--wandb", "another"])
    assert fake.runs[2].options["project"] == "another" and "id" not in fake.runs[2].options
    train.main(["--resume", str(out), "--wandb", "None"])
    assert len(fake.runs) == 3 and State.read(checkpoint.find(out)).wandb == first.id


@pytest.mark.parametrize("error", [Fake.Error("the run was deleted\nmore"), BrokenPipeError()])
def test_losing_the_mirror_does_not_lose_the_run(tiny, tmp_path, fake, monkeypatch, capsys, error):
    honest = fake.init

    def init(**options):
        r = honest(**options)

        def log(row):
            if len(r.rows) == 4:
                r.rows.append("lost")
                raise error
            r.rows.append(row)

        def finish(**_):
            raise error

        r.log, r.finish = log, finish
        return r

    monkeypatch.setattr(fake, "init", init)
    out = run(tiny, tmp_path / "run", "--wandb", "mine", "--steps", "6")
    assert (out / "report.md").exists() and len(losses(out)) == 6
    said = [line for line in capsys.readouterr().out.splitlines() if "Weights & Biases" in line]
    reason = (str(error).splitlines() or ["BrokenPipeError"])[0]
    assert said == [f"note: Weights & Biases takes no metrics any more ({reason}); log.jsonl has them all"]
    assert fake.runs[0].rows[4:] == ["lost"]  # and nothing is tried again


@pytest.mark.parametrize("missing", [None, SimpleNamespace()])
def test_a_missing_package_is_told_before_any_work(tiny, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, "wandb", missing)
    with pytest.raises(ValueError, match=r"pip install -e '.\[wandb\]'"):
        run(tiny, tmp_path / "run", "--wandb", "mine")
    assert not (tmp_path / "run").exists()


def test_a_missing_login_is_one_sentence(tiny, tmp_path, fake):
    fake.login = False
    with pytest.raises(ValueError, match="--wandb mine: No API key configured.*WANDB_MODE=offline"):
        run(tiny, tmp_path / "run", "--wandb", "mine")
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_a_mistyped_mode_is_told_before_any_work(tiny, tmp_path, fake, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(UserError, match="WANDB_MODE is 'ofline': expected one of online, offline, disabled, shared"):
        run(tiny, tmp_path / "run", "--wandb", "mine")
    assert not (tmp_path / "run").exists() and not fake.runs


def test_a_server_that_does_not_answer_is_waited_for_no_longer_than_said(tiny, tmp_path, fake, monkeypatch, capsys):
    answers, honest = threading.Event(), fake.init
    monkeypatch.setattr(wandb_mirror, "ANSWER_SECONDS", 0.2)

    def finishes_late(**options):
        r = honest(**options)
        r.finish = lambda **_: answers.wait(60)
        return r

    try:
        monkeypatch.setattr(fake, "init", lambda **_: answers.wait(60))
        with pytest.raises(UserError, match=r"--wandb mine: no answer in 0.2 s. Or set WANDB_MODE=offline"):
            run(tiny, tmp_path / "run", "--wandb", "mine")
        assert not (tmp_path / "run" / "log.jsonl").exists()
        monkeypatch.setattr(fake, "init", finishes_late)
        out = run(tiny, tmp_path / "late", "--wandb", "mine")
        assert (out / "report.md").exists() and "did not take the last metrics in 0.2 s" in capsys.readouterr().out
    finally:
        answers.set()
