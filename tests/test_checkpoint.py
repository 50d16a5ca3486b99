"""Checkpoints are whole or not there, whenever a save ends, and what is read is what was written."""

import errno
import json
import os
import shutil

import pytest
import torch

import eval as evaluation
import train
from core import checkpoint
from core.data.tokenizer import Tokenizer
from core.report import mend_log, read_log
from core.stopping import UserError
from tests.test_train import events, final_tensors, losses, run


class Killed(BaseException):
    """As SIGKILL: nothing handles it."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_options):
    return run(tiny_options, tmp_path_factory.mktemp("checkpoint") / "run")


@pytest.fixture
def copy(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    return out


def save_again(out, step=12):
    """Replaces a checkpoint by another one of the same step."""
    folder = checkpoint.checkpoint_dir(out, step)
    checkpoint.save(folder, {"a": torch.ones(3)}, {"step": step}, Tokenizer.load(folder))


def fail_at_rename_to(monkeypatch, name, error):
    """os.replace raises where its target is called `name`."""
    honest = os.replace

    def replace(source, target):
        if os.path.basename(target) == name:
            raise error
        return honest(source, target)

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("name", [".step_000012.old.tmp", "step_000012"])
def test_a_kill_at_either_rename_leaves_the_replaced_checkpoint(copy, monkeypatch, name):
    before = final_tensors(copy)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        fail_at_rename_to(patch, name, Killed())
        save_again(copy)
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(copy)] == [8, 12]
    evaluation.main([str(copy), "--metrics", "bpb", "--max-bytes", "100"])  # reads it where it is
    train.main(["--resume", str(copy)])
    assert [path.name for path in sorted((copy / "checkpoints").iterdir())] == ["step_000008", "step_000012"]
    assert all(torch.equal(t, before[name]) for name, t in final_tensors(copy).items())


def test_the_only_checkpoint_survives_a_save_killed_between_its_renames(copy, monkeypatch):
    shutil.rmtree(copy / "checkpoints" / "step_000008")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        fail_at_rename_to(patch, "step_000012", Killed())
        save_again(copy)
    checkpoint.prune(copy, 1)
    assert [path.name for path in (copy / "checkpoints").iterdir()] == ["step_000012"]


def test_a_save_that_fails_gives_the_name_back_and_leaves_no_rest(copy, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(OSError) as failed:
        honest, calls = os.replace, []

        def replace(source, target):
            calls.append(target)
            if os.path.basename(target) == "step_000012" and calls.count(target) == 1:
                raise OSError(errno.EIO, "Input/output error")
            return honest(source, target)

        patch.setattr(os, "replace", replace)
        save_again(copy)
    assert failed.value.filename == str(checkpoint.checkpoint_dir(copy, 12))
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["step_000008", "step_000012"]
    checkpoint.verify(checkpoint.find(copy))


def test_json_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    checkpoint.write_json(path, {"old": 1})
    with monkeypatch.context() as patch, pytest.raises(OSError, match=f"full.*{path}"):
        fail_at_rename_to(patch, path.name, OSError(errno.ENOSPC, "full"))
        checkpoint.write_json(path, {"new": "x" * 10**5})
    assert json.loads(path.read_text()) == {"old": 1}
    with pytest.raises(ValueError):
        checkpoint.write_json(path, {"score": float("nan")})
    assert json.loads(path.read_text()) == {"old": 1}
    checkpoint.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"new": 2}


@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "state.json",
        "tokenizer.json",
        "tokenizer.tiktoken",
    ],
)
@pytest.mark.parametrize("where", [0.03, 0.5, 0.97])
def test_a_flipped_byte_is_named_with_the_next_older_checkpoint(copy, name, where):
    path = checkpoint.find(copy) / name
    data = bytearray(path.read_bytes())
    at = next(i for i in range(int(where * len(data)), len(data)) if name != "state.json" or chr(data[i]) in "12345678")
    data[at] ^= 1
    path.write_bytes(data)
    for program in (train.main, evaluation.main):
        with pytest.raises(UserError, match=f"{path}.*use another checkpoint: .*step_000008 is whole"):
            program(["--resume", str(copy)] if program is train.main else [str(copy)])
    train.main(["--resume", str(copy / "checkpoints" / "step_000008")])
    assert max(losses(copy)) == 11


def test_no_older_checkpoint_is_recommended_that_is_damaged_too(copy):
    for path in checkpoint.checkpoints(copy):
        os.truncate(path / "model.safetensors.index.json", 10)
    with pytest.raises(UserError, match="step_000012.*is damaged.*no older one here is whole"):
        train.main(["--resume", str(copy)])


def test_files_that_are_missing_or_foreign_are_named(copy):
    folder = checkpoint.find(copy)
    shutil.copy(next(folder.glob("*.safetensors")), folder / "more.safetensors")
    with pytest.raises(UserError, match="has a file that is not its own, more.safetensors"):
        checkpoint.verify(folder)
    (folder / "more.safetensors").unlink()
    checkpoint.verify(folder)
    (folder / "tokenizer.tiktoken").unlink()
    with pytest.raises(UserError, match="has lost its .tiktoken file tokenizer.tiktoken"):
        checkpoint.verify(folder)


def test_a_checkpoint_of_another_run_is_refused(copy, tiny, tmp_path):
    other = run(tiny, tmp_path / "other", "--depth", "3", "--steps", "20")
    shutil.copytree(checkpoint.find(other), checkpoint.checkpoint_dir(copy, 20))
    with pytest.raises(UserError, match="step_000020 is a checkpoint of another run than .*config.json.*depth"):
        train.main(["--resume", str(copy)])


def test_tensors_that_a_model_does_not_have_are_named(copy):
    folder = checkpoint.find(copy)
    tensors = {name: torch.empty_like(t) for name, t in final_tensors(copy).items() if not name.startswith("rng.")}
    checkpoint.load_tensors(folder, tensors)
    name = min(name for name in tensors if name.startswith("optim."))
    del tensors[name]
    with pytest.raises(UserError, match=f"has '{name}' besides: it belongs to another model"):
        checkpoint.load_tensors(folder, tensors)


# the log


LINES = [json.dumps({"event": "step", "step": i, "loss": 1.0}).encode() + b"\n" for i in range(5)]
WHOLE = b"".join(LINES)


@pytest.mark.parametrize(
    "found, kept",
    [
        (WHOLE + b"more", WHOLE),
        (WHOLE[:-1] + b"\n" + LINES[0], WHOLE),
        (b"".join(LINES[:3]), b"".join(LINES[:3])),
        (b"".join(LINES[:3]) + LINES[3][:-4], b"".join(LINES[:3])),
        (LINES[0] + bytes(len(LINES[1])) + b"".join(LINES[2:]), LINES[0] + b"".join(LINES[3:])),
        (LINES[0][1:] + b"".join(LINES[1:]), b"".join(LINES[1:])),
        (b"[1]\n" + WHOLE, None),
        (b"", b""),
        (None, b""),
    ],
)
def test_a_log_is_mended_to_whole_lines(tmp_path, found, kept):
    path = tmp_path / "log.jsonl"
    if found is not None:
        path.write_bytes(found)
    note = mend_log(path, len(WHOLE))
    assert (note is None) == (kept == WHOLE)
    if kept is not None:
        assert path.read_bytes() == kept
    assert not note or f"of {len(WHOLE)} bytes are missing" in note
    assert all(event["event"] == "step" for event in read_log(path))


@pytest.mark.parametrize("damage", ["short", "torn", "gone", "zeros"])
def test_a_run_with_a_damaged_log_says_so_and_ends(copy, damage, capsys):
    path = copy / "log.jsonl"
    shutil.rmtree(checkpoint.find(copy))
    data = path.read_bytes()
    cut = data.index(b'"event": "step", "step": 5') - 1
    match damage:
        case "short":
            path.write_bytes(data[:cut])
        case "torn":
            path.write_bytes(data[: cut + 20])
        case "gone":
            path.unlink()
        case "zeros":
            path.write_bytes(data[:cut] + bytes(40) + data[cut + 40 :])
    train.main(["--resume", str(copy)])
    assert "log.jsonl was damaged" in capsys.readouterr().out
    assert (copy / "report.md").exists() and max(losses(copy)) == 11
    assert [e["step"] for e in events(copy, "checkpoint")][-1] == 12


def test_the_log_is_on_the_disk_before_the_checkpoint_that_counts_on_it(tiny, tmp_path, monkeypatch):
    order, honest_sync, honest_replace = [], os.fsync, os.replace

    def fsync(fd):
        order.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        honest_sync(fd)

    def replace(source, target):
        order.append(os.path.basename(target))
        honest_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    run(tiny, tmp_path / "run", "--steps", "4")
    named = order.index("step_000004")
    assert order.index("sync log.jsonl") < order.index("sync model-00001-of-00001.safetensors") < named
    files = {path.name for path in checkpoint.find(tmp_path / "run").iterdir()}
    assert {f"sync {name}" for name in (*files, ".step_000004.tmp")} <= set(order[:named])
    assert "sync checkpoints" in order[named:]
