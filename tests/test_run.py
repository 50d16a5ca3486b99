"""A run's folder has one owner, is found however it is named, and loses nothing to a full disk, an error at the end, a
damaged text or a lost console."""

import errno
import json
import math
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import eval as evaluation
import train
from core import checkpoint, communication, report
from core.communication import rank_and_size
from core.data.loader import Loader
from core.report import RunLog
from core.run import OWNER_FILE
from core.stopping import TrainingError, UserError, one_sentence
from tests.test_signals import wait_for_step
from tests.test_train import ROOT, events, final_tensors, losses, run

LONG = ["--steps", "3000", "--sample-every", "5000", "--eval-every", "5000"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def start(*argv, **options):
    """train.py with these arguments."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *argv], **pipes | options)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != OWNER_FILE}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_options):
    return run(tiny_options, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def copy(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    return out


# the owner


def test_a_second_process_names_the_owner_and_touches_nothing(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    child = start(*tiny, *LONG, "--save-every", "5", "--keep-checkpoints", "900", "--out", str(out))
    wait_for_step(child, out, 12)
    child.send_signal(signal.SIGSTOP)  # so that nothing but the second process could change a file
    time.sleep(0.2)
    before = files(out)
    for argv in (["--resume", str(out)], [str(out)], [*tiny, "--out", str(out)]):
        with pytest.raises(SystemExit) as stopped, one_sentence():
            train.main(argv)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1
        assert f"{out} is being trained by process {child.pid} on {socket.gethostname()}" in error
    assert files(out) == before
    child.kill()
    child.communicate()
    newest = checkpoint.step_of(checkpoint.find(out))
    train.main(["--resume", str(out), "--steps", str(newest + 2)])
    assert sorted(losses(out)) == list(range(newest + 2))


def test_a_run_that_has_not_saved_yet_has_an_owner_too(tiny, tmp_path):
    out = tmp_path / "run"
    child = start(*tiny, *LONG, "--save-every", "2999", "--out", str(out))
    wait_for_step(child, out, 1)
    for argv in (["--resume", str(out)], [*tiny, "--out", str(out)], [*tiny, "--out", str(out), "--resume", "auto"]):
        with pytest.raises(UserError, match=f"is being trained by process {child.pid} on"):
            train.main(argv)
    child.kill()
    child.communicate()
    with pytest.raises(UserError, match="it saved nothing: remove the folder"):
        train.main([*tiny, "--out", str(out)])


def test_an_owner_that_ends_or_fails_leaves_the_folder_free(copy, tiny, monkeypatch):
    for argv, says in (
        (["--resume", str(copy), "--depth", "3"], "depth"),
        ([*tiny, "--out", str(copy)], "holds a run already"),
    ):
        with pytest.raises(UserError, match=says):
            train.main(argv)
    monkeypatch.setattr(train, "announce", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(["--resume", str(copy)])
    monkeypatch.undo()
    (copy / OWNER_FILE).write_text("process 123456789 on a.host.with.a.name.longer.than.ours.example.org\n")
    train.main(["--resume", str(copy)])
    assert (copy / OWNER_FILE).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_workers_end_with_their_launcher(tiny, tmp_path):
    out = tmp_path / "run"
    child = subprocess.Popen(
        [*TORCHRUN, str(ROOT / "train.py"), *tiny, *LONG, "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_step(child, out, 5)
    workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    child.kill()
    child.wait()
    deadline = time.monotonic() + 60
    while any(running(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive torchrun"
        time.sleep(0.1)
    assert events(out, "stop")[-1]["reason"] == "SIGTERM"
    assert max(losses(out)) + 1 == checkpoint.step_of(checkpoint.find(out))


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# how a run is named


def test_resume_auto_starts_and_then_continues(tiny, tmp_path, whole):
    out = tmp_path / "run"
    argv = [*tiny, "--out", str(out), "--resume", "auto"]
    child = start(*argv)
    wait_for_step(child, out, 5)
    child.kill()
    child.communicate()
    train.main(argv)
    assert sorted(losses(out)) == list(range(12)) and json.loads((out / "config.json").read_text())["resume"] is None
    assert (len(events(out, "resume")) == 1) == (not (out / "log-unsaved.jsonl").exists())
    a, b = final_tensors(out), final_tensors(whole)
    assert all(torch.equal(t, b[name]) for name, t in a.items())


def test_resume_auto_starts_over_where_nothing_was_saved(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train, "train_step", lambda *_: 1 / 0)
        run(tiny, out)
    run(tiny, out, "--resume", "auto")
    assert sorted(losses(out)) == list(range(12)) and (out / "log-unsaved.jsonl").exists()
    assert "had saved nothing and starts over" in capsys.readouterr().out
    with pytest.raises(UserError, match="--resume auto continues what is in the run folder.*give it with --out"):
        train.main(["--resume", "auto"])


def test_torchrun_restarts_continue_the_run(tiny, tmp_path):
    out = tmp_path / "run"
    pace = ["--steps", "160", "--save-every", "10", "--sample-every", "500", "--eval-every", "500"]
    argv = [*tiny, *pace, "--out", str(out)]
    child = subprocess.Popen(
        [*TORCHRUN, "--max-restarts=2", str(ROOT / "train.py"), *argv, "--resume", "auto"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_step(child, out, 20)
    workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    os.kill(int(workers[0]), signal.SIGKILL)
    _, error = child.communicate(timeout=300)
    assert child.returncode == 0, error[-2000:]
    assert sorted(losses(out)) == list(range(160)) and len(events(out, "resume")) == 1


@pytest.mark.parametrize(
    "where, name",
    [
        (".", "."),
        ("checkpoints", "step_000008"),
        (".", "checkpoints/step_000008"),
        (".", "latest"),
        ("..", "link"),
        ("..", "link/checkpoints/step_000008"),
        ("../disk", "../run/checkpoints/step_000008"),
        ("../disk", "step_000008 --out ../run"),
    ],
)
def test_a_run_is_found_however_it_is_named(copy, monkeypatch, where, name):
    disk = copy.parent / "disk"  # where its checkpoints really are
    (copy / "checkpoints").rename(disk)
    (copy / "checkpoints").symlink_to(disk)
    (copy / "latest").symlink_to("checkpoints/step_000008")
    (copy.parent / "link").symlink_to(copy)
    (copy / "report.md").unlink()
    monkeypatch.chdir(copy / where)
    monkeypatch.setenv("PWD", os.path.normpath(copy / where))
    train.main(["--resume", *name.split()])
    assert (copy / "report.md").exists() and len(events(copy, "end")) == 1 and max(losses(copy)) == 11
    assert sorted(path.name for path in disk.iterdir()) == ["step_000008", "step_000012"]


def test_a_checkpoint_without_its_run_is_one_sentence(copy):
    away = copy.parent / "step_000012"
    checkpoint.find(copy).rename(away)
    with pytest.raises(UserError, match="step_000012 lies in no run folder.*: give the run folder"):
        train.main(["--resume", str(away)])


def test_printed_commands_can_be_pasted(tiny, tmp_path):
    out = tmp_path / "a run's folder"
    child = start(*tiny, *LONG, "--out", str(out))
    wait_for_step(child, out, 5)
    child.terminate()
    _, error = child.communicate(timeout=60)
    command = error.strip().partition("continue with: ")[2] + " --dry-run"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "3,000 steps" in done.stdout, done.stderr
    with pytest.raises(UserError, match="continue it with --resume '.*a run'\"'\"'s folder', or"):
        run(tiny, out)


# a full disk


def fill_the_disk(monkeypatch, first):
    """Every event of the log fails from number `first` on, after half of its line; those before need several writes."""
    calls, init = iter(range(10**6)), RunLog.__init__

    class Full:
        def __init__(self, file):
            self._file = file

        def __getattr__(self, attribute):
            return getattr(self._file, attribute)

        def write(self, data):
            if bytes(data).startswith(b'{"event"') and next(calls) >= first:
                self._file.write(bytes(data)[: len(data) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")
            return self._file.write(bytes(data)[:100])

    def opened(self, *args, **options):
        init(self, *args, **options)
        self._file = Full(self._file)

    monkeypatch.setattr(RunLog, "__init__", opened)


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_under_the_log_is_one_sentence(tiny, tmp_path, monkeypatch, capsys, whole):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped, one_sentence():
        fill_the_disk(patch, 12)
        run(tiny, out)
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and error.count("\n") == 1
    assert "log.jsonl cannot be written: No space left on device" in error
    assert f"step_000004 is saved, continue with: python train.py --resume {out}" in error
    train.main(["--resume", str(out)])
    assert losses(out) == losses(whole)


def test_with_continue_the_log_lacks_what_did_not_fit(tiny, tmp_path, monkeypatch, capsys, whole):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        fill_the_disk(patch, 12)
        run(tiny, out, "--on-save-error", "continue")
    assert max(losses(out)) < 11 and events(out)  # every line that is there is whole
    assert "note: the log lacks the step of step" in capsys.readouterr().out
    a, b = final_tensors(out), final_tensors(whole)
    assert all(torch.equal(t, b[name]) for name, t in a.items())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_under_a_checkpoint_is_one_sentence(tiny, tmp_path, monkeypatch, capsys, code, whole):
    out = tmp_path / "run"
    honest, calls = checkpoint.dcp.save, []

    def save(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            (out / "checkpoints" / ".step_000008.tmp" / "half.safetensors").write_text("half")
            raise OSError(code, os.strerror(code))
        honest(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped, one_sentence():
        patch.setattr(checkpoint.dcp, "save", save)
        run(tiny, out)
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and error.count("\n") == 1
    assert f"the checkpoint of step 8 cannot be saved ({out}/checkpoints/step_000008: {os.strerror(code)})" in error
    assert f"step_000004 is saved, continue with: python train.py --resume {out}" in error
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_000004"]
    assert [e["step"] for e in events(out, "saved")] == [4]
    assert [(e["step"], os.strerror(code) in e["reason"]) for e in events(out, "unsaved")] == [(8, True)]
    train.main(["--resume", str(out)])
    assert losses(out) == losses(whole) and not events(out, "unsaved")
    assert [e["step"] for e in events(out, "checkpoint")] == [4, 8, 12]


def test_the_files_of_a_checkpoint_meet_a_real_limit(tiny, tmp_path):
    """RLIMIT_FSIZE: the write fails inside torch's writer."""
    out = tmp_path / "run"
    command = ["bash", "-c", 'ulimit -f 100; exec "$@"', "-", sys.executable, str(ROOT / "train.py"), *tiny]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr[-2000:]
    assert "the checkpoint of step 4 cannot be saved" in done.stderr and "File too large" in done.stderr
    assert not list((out / "checkpoints").iterdir())


def test_training_goes_on_without_a_checkpoint_where_it_is_told_to(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    honest, calls = checkpoint.dcp.save, []

    def save(*args, **options):
        calls.append(args)
        no_space() if len(calls) in (1, 3) else honest(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(TrainingError, match="step 12 cannot be saved.*step_000008"):
        patch.setattr(checkpoint.dcp, "save", save)
        run(tiny, out, "--on-save-error", "continue")
    assert [e["step"] for e in events(out, "unsaved")] == [4, 12] and (out / "report.md").exists()
    assert [path.name for path in checkpoint.checkpoints(out)] == ["step_000008"]
    assert "the run goes on (--on-save-error continue)" in capsys.readouterr().out
    train.main(["--resume", str(out)])
    assert checkpoint.step_of(checkpoint.find(out)) == 12


def test_a_checkpoint_that_was_saved_later_makes_up_for_one_that_was_not(tiny, tmp_path, monkeypatch):
    honest, calls = checkpoint.dcp.save, []

    def save(*args, **options):
        calls.append(args)
        no_space() if len(calls) == 1 else honest(*args, **options)

    monkeypatch.setattr(checkpoint.dcp, "save", save)
    run(tiny, tmp_path / "run", "--on-save-error", "continue")  # ends without an error


@pytest.mark.parametrize("name", ["write_report", "plot_loss"])
def test_a_full_disk_under_the_report_is_one_sentence(tiny, tmp_path, monkeypatch, name):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(TrainingError, match=r"No space left.*step_000012 is saved.*"):
        patch.setattr(report, name, no_space)
        run(tiny, out)
    train.main(["--resume", str(out)])
    assert (out / "report.md").exists() and (out / "loss.png").exists()


# the end of the program


@pytest.mark.parametrize("owner, name", [(report, "plot_loss"), (train, "compressor_bits_per_byte")])
def test_an_error_at_the_end_is_one_sentence_and_the_end_is_made_again(tiny, tmp_path, monkeypatch, owner, name):
    out = tmp_path / "run"
    says = f"all 12 steps are trained, but the end.*ZeroDivisionError.*step_000012 is saved.*--resume {out}"
    with monkeypatch.context() as patch, pytest.raises(TrainingError, match=says):
        patch.setattr(owner, name, lambda *_: 1 / 0)
        run(tiny, out)
    assert "ZeroDivisionError" in events(out, "stop")[-1]["traceback"]
    train.main(["--resume", str(out)])
    assert (out / "loss.png").exists() and not events(out, "stop")


@pytest.mark.parametrize("when, saved", [(0, 0), (1, 5), (3, 12)])
def test_a_score_that_is_not_finite_comes_after_a_checkpoint(tiny, tmp_path, monkeypatch, when, saved):
    out, calls, honest = tmp_path / "run", [], train.evaluate

    def evaluate(*args):
        calls.append(args)
        return math.nan if len(calls) == when + 1 else honest(*args)

    with monkeypatch.context() as patch, pytest.raises(TrainingError, match=f"nan bits per byte; .*step_{saved:06d}"):
        patch.setattr(train, "evaluate", evaluate)
        run(tiny, out)
    assert checkpoint.step_of(checkpoint.find(out)) == saved
    train.main(["--resume", str(out)])
    assert sorted(losses(out)) == list(range(12)) and [e["step"] for e in events(out, "eval")] == [0, 5, 10]


def test_a_learning_rate_that_blows_up_is_one_sentence(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped, one_sentence():
        run(tiny, tmp_path / "run", "--matrix-lr", "1e6", "--embedding-lr", "1e6", "--unembedding-lr", "1e6")
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and error.count("\n") == 1 and error.startswith("error: training stopped at step")


def test_a_sample_that_fails_comes_after_a_checkpoint(tiny, tmp_path, monkeypatch, whole):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train, "sample_texts", lambda *_, **__: 1 / 0)
        run(tiny, out)
    assert checkpoint.step_of(checkpoint.find(out)) == 6
    train.main(["--resume", str(out)])
    assert losses(out) == losses(whole) and [e["step"] for e in events(out, "sample")] == [6, 12]


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "no-such-backend"])
def test_the_plot_takes_no_backend_from_the_environment(copy, backend):
    (copy / "loss.png").unlink()
    environment = os.environ | {"MPLBACKEND": backend, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), str(copy), "--sample-prompts", "é"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (copy / "loss.png").read_bytes().startswith(b"\x89PNG")


# the text


def rows(path, bad=None):
    lines = [json.dumps({"text": f"document {i} " + "with some words in it " * 20}) for i in range(300)]
    if bad is not None:
        lines[bad] = json.dumps({"words": "?"})
    path.write_text("\n".join(lines) + "\n")


def test_a_bad_line_stops_after_a_checkpoint_and_a_mended_text_goes_on(tiny, tmp_path, monkeypatch):
    data, out = tmp_path / "rows.jsonl", tmp_path / "run"
    rows(data)
    options = ["--data", str(data), "--buffer-docs", "2", "--save-every", "100", "--eval-tokens", "10"]
    honest, calls = Loader.next_step, []

    def next_step(self):
        calls.append(self)
        if len(calls) == 8:
            raise UserError('rows.jsonl, line 41: no "text" field')
        return honest(self)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="line 41.*step_000007 is saved.*--mended-data"):
        patch.setattr(Loader, "next_step", next_step)
        run(tiny, out, *options)
    assert checkpoint.step_of(checkpoint.find(out)) == 7 and max(losses(out)) == 6
    rows(data)
    data.write_text(data.read_text().replace("document 7 ", "document seven "))
    with pytest.raises(UserError, match="changed since the checkpoint"):
        train.main(["--resume", str(out)])
    with pytest.raises(UserError, match="has changed since it was trained on: .*--data"):
        evaluation.main([str(out), "--metrics", "bpb"])
    evaluation.main([str(out), "--metrics", "bpb", "--data", str(data)])
    train.main(["--resume", str(out), "--mended-data"])
    assert sorted(losses(out)) == list(range(12)) and (out / "report.md").exists()
    train.main(["--resume", str(out)])  # the mended text is now that of the run
    assert not json.loads((out / "config.json").read_text())["mended_data"]
    with pytest.raises(UserError, match="--mended-data .* give the run with --resume"):
        run(tiny, tmp_path / "new", "--mended-data")


# the console


def test_a_reader_that_goes_away_does_not_end_the_run(tiny, tmp_path):
    out = tmp_path / "run"
    command = 'python "$@" | head -3; exit ${PIPESTATUS[0]}'
    done = subprocess.run(
        ["bash", "-c", command, "-", str(ROOT / "train.py"), *tiny, "--out", str(out)],
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]
    assert done.stdout.count("\n") == 3 and (out / "report.md").exists() and len(losses(out)) == 12


@pytest.mark.parametrize("redirection", [">/dev/full", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_console_that_is_full_or_closed_does_not_end_the_run(tiny, tmp_path, redirection):
    out = tmp_path / "run"
    done = subprocess.run(
        [
            "bash",
            "-c",
            f'exec "$@" {redirection}',
            "-",
            sys.executable,
            str(ROOT / "train.py"),
            *tiny,
            "--out",
            str(out),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and not done.stderr and (out / "report.md").exists()
    assert sorted(losses(out)) == list(range(12))  # and nothing but events is in the log


def test_a_closed_terminal_saves_and_stops(tiny, tmp_path):
    out = tmp_path / "run"
    terminal, end = os.openpty()
    child = start(*tiny, *LONG, "--out", str(out), stdin=end, stdout=end, stderr=end, start_new_session=True)
    os.close(end)
    wait_for_step(child, out, 5)
    os.close(terminal)
    child.send_signal(signal.SIGHUP)  # the kernel sends it to the terminal's session leader
    assert child.wait(60) == 128 + signal.SIGHUP
    assert events(out, "stop")[-1]["reason"] == "SIGHUP"
    assert max(losses(out)) + 1 == checkpoint.step_of(checkpoint.find(out))


def test_under_nohup_a_hangup_is_not_heard(tiny, tmp_path):
    out = tmp_path / "run"
    child = subprocess.Popen(
        ["nohup", sys.executable, str(ROOT / "train.py"), *tiny, "--steps", "60", "--out", str(out)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_step(child, out, 5)
    child.send_signal(signal.SIGHUP)
    assert child.wait(120) == 0 and len(losses(out)) == 60


def test_a_second_signal_inside_a_save_is_one_sentence(tiny, tmp_path, monkeypatch, capsys):
    """The thread that writes is not waited for, and leaves no checkpoint any more."""
    out = tmp_path / "run"
    calls, written, write_data = [], threading.Event(), checkpoint._Writer.write_data

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            assert written.wait(60)
        return write_data(self, *args)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped, one_sentence():
            patch.setattr(checkpoint._Writer, "write_data", interrupted)
            patch.setattr(train.StopFlag, "__enter__", lambda self: self)  # as after a first signal
            run(tiny, out)
    finally:
        signal.signal(signal.SIGINT, before)
    error = capsys.readouterr().err
    assert stopped.value.code == 130 and error.count("\n") == 1
    assert error.startswith("stopped by SIGINT; ") and "step_000004 is saved" in error
    (writer,) = [thread for thread in threading.enumerate() if thread.name == "checkpoint of step 8"]
    written.set()
    writer.join()
    assert [path.name for path in checkpoint.checkpoints(out)] == ["step_000004"]


# the outside


@pytest.mark.parametrize(
    "environment, says",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT is not set: .*torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR, MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment, expected a number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2 and WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"},
            "2 processes did not meet at 127.0.0.1:9",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"},
            "2 processes did not meet at 127.0.0.1:x",
        ),
    ],
)
def test_processes_that_nobody_started_are_one_sentence(tiny, tmp_path, monkeypatch, environment, says):
    monkeypatch.setattr(communication, "RENDEZVOUS_SECONDS", 2)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        run(tiny, tmp_path / "run")
    assert not (tmp_path / "run").exists() and not torch.distributed.is_initialized()


def test_a_process_without_an_environment_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert rank_and_size() == (0, 1)


def test_without_a_home_folder_the_path_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    with pytest.raises(UserError, match="~/somewhere: no home folder is known for ~ .is HOME set"):
        run(tiny, tmp_path / "run", "--cache-dir", "~/somewhere")
    for argv in (["--resume", "~/run"], ["~/run"], ["--data", "~/texts"], ["--out", "~/run", "--resume", "auto"]):
        with pytest.raises(UserError, match="no home folder is known"):
            train.main(argv)
    with pytest.raises(UserError, match="no home folder is known"):
        evaluation.main(["~/run"])


@pytest.mark.parametrize("program", [train.main, evaluation.main])
def test_an_argument_that_is_not_utf8_is_one_sentence(program):
    with pytest.raises(UserError, match=r"argument 2, b'caf\\xe9', is not UTF-8"):
        program(["run", os.fsdecode(b"caf\xe9")])
