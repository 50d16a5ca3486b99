"""Signals stop a run after a step, with a checkpoint, and lose nothing; elsewhere Ctrl-C is one sentence."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from core import checkpoint, stopping
from core.data.loader import Loader
from core.stopping import SIGNALS, StopFlag, Stopped, one_sentence
from tests.test_train import ROOT, events, final_tensors, losses, run, steps_logged

SLOW = ["--steps", "120", "--sample-every", "200", "--save-every", "100"]


def start(*argv):
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(child, out, step):
    deadline = time.monotonic() + 120
    while steps_logged(out) < step:
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus_dir, cache_dir, tiny_options):
    return run(tiny_options, tmp_path_factory.mktemp("whole") / "run", *SLOW)


def assert_same(a, b):
    assert losses(a) == losses(b)
    assert [e["step"] for e in events(a, "eval")] == [e["step"] for e in events(b, "eval")]
    x, y = final_tensors(a), final_tensors(b)
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def test_interrupted_runs_resume_to_the_same_bits(tiny, tmp_path, whole):
    out = tmp_path / "run"
    argv = [*tiny, *SLOW, "--out", str(out)]
    for sig, step in ((signal.SIGINT, 15), (signal.SIGTERM, 45)):
        child = start(sys.executable, str(ROOT / "train.py"), *argv)
        wait_for_step(child, out, step)
        child.send_signal(sig)
        _, error = child.communicate(timeout=60)
        made = int(checkpoint.find(out).name[5:])
        assert child.returncode == 128 + sig and step <= made < 100
        assert f"stopped by {sig.name} after {made} of 120 steps" in error and f"train.py --resume {out}" in error
        assert "a second signal stops at once" in error and "Traceback" not in error
        assert [e["event"] for e in events(out)][-3:] == ["checkpoint", "saved", "stopped"]
        assert max(losses(out)) == made - 1
        argv = ["--resume", str(out)]
    train.main(argv)
    assert [e["reason"] for e in events(out, "stop")] == ["SIGINT", "SIGTERM"]
    assert_same(out, whole)


def test_a_signal_to_one_process_stops_all_after_the_same_step(tiny, tmp_path, whole):
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    child = start(*torchrun, str(ROOT / "train.py"), *tiny, *SLOW, "--out", str(out))
    wait_for_step(child, out, 12)
    workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    (second,) = [p for p in workers if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{p}/environ").read_bytes()]
    os.kill(int(second), signal.SIGTERM)
    _, error = child.communicate(timeout=60)
    made = int(checkpoint.find(out).name[5:])
    assert child.returncode != 0 and 12 <= made < 100 and max(losses(out)) == made - 1
    assert f"stopped by SIGTERM after {made} of 120 steps" in error and "on rank 1" not in error
    assert "exitcode  : 143" in error
    train.main(["--resume", str(out)])
    for step, loss in losses(whole).items():
        assert losses(out)[step] == pytest.approx(loss, rel=1e-3), step


def test_the_first_signal_is_noted_and_the_second_is_as_before(capfd):
    before = [signal.getsignal(s) for s in SIGNALS]
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM and [signal.getsignal(s) for s in SIGNALS] == before
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    with StopFlag():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(s) for s in SIGNALS] == before
    assert capfd.readouterr().err.count("\n") == 2


def test_echoes_of_a_dying_torchrun_are_one_signal_and_a_later_one_ends_the_process(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(stopping, "ECHO_S", 0.5)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with StopFlag() as stop:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signum == signal.SIGTERM
            time.sleep(0.6)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_that_the_parent_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopFlag() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signum == 0 and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signum == signal.SIGTERM
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_during_a_step_stops_after_that_step(tiny, tmp_path, monkeypatch):
    honest, calls = Loader.next_step, []

    def next_step(self):
        calls.append(self)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(self)

    monkeypatch.setattr(Loader, "next_step", next_step)
    with pytest.raises(Stopped, match="SIGTERM after 4 of 12 steps"):
        run(tiny, tmp_path / "run")


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize(
    "where, says", [("build", "start again"), ("finish", "continue with: python train.py --resume")]
)
def test_outside_the_loop_a_signal_is_one_sentence(tiny, tmp_path, where, says, signum, monkeypatch, capsys):
    def interrupted(*args):
        os.kill(os.getpid(), signum)
        time.sleep(10)

    monkeypatch.setattr(train, where, interrupted)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped, one_sentence():
        run(tiny, tmp_path / "run", "--steps", "2")
    error = capsys.readouterr().err
    assert stopped.value.code == 128 + signum and says in error and error.count("\n") == 1
    assert error.startswith(f"stopped by {signum.name}; ")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_during_the_last_visit_keeps_the_finished_training(tiny, tmp_path, monkeypatch):
    honest = train.sample

    def slow(run, text, trainer, step, stopped):
        honest(run, text, trainer, step, stopped)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "sample", slow)
    out = tmp_path / "run"
    with pytest.raises(Stopped, match="SIGTERM after 4 of 4 steps"):
        run(tiny, out, "--steps", "4")
    monkeypatch.undo()
    train.main(["--resume", str(out)])
    assert len(events(out, "sample")) == 1 and (out / "report.md").exists()


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_a_signal_during_imports_is_one_sentence(program, signum, tmp_path):
    """A torch that takes its time stands in for the real one."""
    (tmp_path / "torch.py").write_text("import time\nopen('here', 'w').close()\ntime.sleep(60)\n")
    child = subprocess.Popen(
        [sys.executable, str(ROOT / program)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTHONSAFEPATH": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "here").exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signum)
    _, error = child.communicate(timeout=10)
    assert child.returncode == 128 + signum and error == f"stopped by {signum.name}\n"
