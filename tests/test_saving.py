"""Checkpoints are written by all processes, each its pieces, and while training goes on; any number reads them."""

import dataclasses
import itertools
import json
import math
import os
import random
import shutil
import signal
import threading
import time

import pytest
import torch
from safetensors import SafetensorError

import eval as evaluation
import train
from core import checkpoint, communication
from core.communication import joined_world
from core.data.tokenizer import Tokenizer
from core.run import State
from core.saving import HostCopy
from core.sharding import Shard
from core.stopping import Stopped, TrainingError, UserError
from tests.test_processes import together, trained
from tests.test_train import events, final_tensors, losses, run, tensors_of

BYTES = Tokenizer([bytes([i]) for i in range(256)])
RANKS = 4


# pieces


def everything():
    """Tensors of a made-up run; those of its optimizer are shared out."""
    make = torch.Generator().manual_seed(0)
    return {
        "model.w": torch.randn(6, 10, generator=make).bfloat16(),
        "model.bank": torch.randn(3, 4, 5, generator=make),
        "model.scale": torch.randn((), generator=make),
        "optim.w.low": torch.randint(-(2**15), 2**15, (6, 10), generator=make, dtype=torch.int16),
        "optim.bank.momentum": torch.randn(3, 4, 5, generator=make),
        "optim.lambdas.exp_avg": torch.randn(7, generator=make),
        "optim.scale.exp_avg": torch.randn((), generator=make),
    }


def boxes(shape, rng):
    """Hyper-rectangles (begin, size) that cover a tensor of that shape once."""
    parts = [((0,) * len(shape), tuple(shape))]
    for _ in range(12 if shape else 0):
        begin, size = parts.pop(rng.randrange(len(parts)))
        dim = rng.randrange(len(shape))
        if size[dim] == 1:
            parts.append((begin, size))
            continue
        at = rng.randrange(1, size[dim])
        for start, length in ((0, at), (at, size[dim] - at)):
            parts.append(
                tuple(
                    tuple(value if d != dim else new for d, value in enumerate(old))
                    for old, new in ((begin, begin[dim] + start), (size, length))
                )
            )
    rng.shuffle(parts)
    return parts


def shared_out(tensors, rank, ranks):
    """What a rank keeps: pieces in no order, of a tensor that one rank has no part of; another dealing for each number
    of ranks."""
    kept = {}
    for name, t in tensors.items():
        if not name.startswith("optim."):
            kept[name] = t.clone()
            continue
        rng = random.Random(f"{name} {ranks}")
        owners = rng.sample(range(ranks), max(1, ranks - 1))
        pieces = []
        for begin, size in boxes(t.shape, rng):
            if rng.choice(owners) == rank:
                pieces.append((begin, t[tuple(slice(b, b + n) for b, n in zip(begin, size))].clone()))
        kept[name] = Shard(tuple(t.shape), t.dtype, pieces)
    return kept


def test_the_dealings_are_as_uneven_as_they_should_be():
    kept = [shared_out(everything(), rank, RANKS) for rank in range(RANKS)]
    pieces = {name: [len(k[name].pieces) for k in kept] for name in everything() if name.startswith("optim.")}
    assert all(0 in counts for counts in pieces.values())
    assert max(map(max, pieces.values())) > 1
    bank = [begin for k in kept for begin, _ in k["optim.bank.momentum"].pieces]
    assert bank != sorted(bank) and any(begin[1] and begin[2] for begin in bank)


def saved(folder, tensors, holes=False):
    with joined_world("cpu") as world:
        kept = shared_out(tensors, world.rank, world.world_size)
        if holes and world.rank == 1:
            kept["optim.w.low"] = kept["optim.w.low"]._replace(pieces=[])
        try:
            checkpoint.save(folder, kept, {"step": checkpoint.step_of(folder)}, BYTES)
        except ValueError as error:
            return str(error)


def loaded(folder):
    """What a rank has read: the whole tensors, and each piece with its place."""
    with joined_world("cpu") as world:
        wanted = shared_out(everything(), world.rank, world.world_size)
        tensors = shared_out(everything(), world.rank, world.world_size)
        for value in tensors.values():
            for t in checkpoint.storages(value):
                t.zero_()
        checkpoint.load_tensors(folder, tensors)
        pairs = [zip(checkpoint.storages(tensors[name]), checkpoint.storages(t)) for name, t in wanted.items()]
        return all(torch.equal(got, want) for pair in pairs for got, want in pair), sum(
            len(t.pieces) for t in tensors.values() if isinstance(t, Shard)
        )


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The checkpoints of steps 1 and 2, by four processes."""
    out = tmp_path_factory.mktemp("sharded") / "run"
    for step in (1, 2):
        assert together(saved, checkpoint.checkpoint_dir(out, step), everything(), ranks=RANKS) == [None] * RANKS
    return out


@pytest.fixture
def copy(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "run")
    return tmp_path / "run"


def test_one_process_reads_what_four_wrote(sharded):
    folder = checkpoint.find(sharded)
    checkpoint.verify(folder)
    tensors = {name: torch.zeros_like(t) for name, t in everything().items()}
    checkpoint.load_tensors(folder, tensors)
    assert all(torch.equal(t, tensors[name]) for name, t in everything().items())
    files = {path.name for path in folder.glob("*.safetensors")}
    assert {name.split("-")[1] for name in files} == {f"{rank + 1:05d}" for rank in range(RANKS)}
    assert {path.stat().st_mode for path in folder.iterdir()} == {(folder / "state.json").stat().st_mode}
    assert len(files) > RANKS  # a rank has several pieces of a tensor, a file one
    size = sum(t.nbytes for t in everything().values())
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) < size + 1000 * len(files)  # nothing twice


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_number_of_processes_reads_what_four_wrote(sharded, ranks):
    whole, counts = zip(*together(loaded, checkpoint.find(sharded), ranks=ranks))
    assert all(whole) and sum(counts) > ranks


def test_two_processes_read_what_one_wrote(tmp_path):
    folder = checkpoint.checkpoint_dir(tmp_path, 1)
    checkpoint.save(folder, everything(), {}, BYTES)
    assert {path.name for path in folder.iterdir()} >= {
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    }
    assert all(whole for whole, _ in together(loaded, folder))


def test_pieces_that_leave_a_hole_are_refused_on_all(tmp_path):
    folder = checkpoint.checkpoint_dir(tmp_path, 1)
    says = together(saved, folder, everything(), True, ranks=RANKS)
    assert all("optim.w.low invalid fill" in text for text in says) and not folder.exists()


@pytest.mark.parametrize("rank", range(1, RANKS + 1))
@pytest.mark.parametrize("damage", ["flipped", "truncated", "lost"])
def test_damage_in_a_file_of_any_process_is_named_with_the_checkpoint_before(copy, rank, damage):
    folder = checkpoint.find(copy)
    path = min(folder.glob(f"shard-{rank:05d}-*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    match damage:
        case "flipped":
            path.write_bytes(data)
        case "truncated":
            os.truncate(path, len(data) - 1)
        case "lost":
            path.unlink()
    with pytest.raises(UserError, match=f"{path.name}.*use another checkpoint: .*step_000001 is whole"):
        checkpoint.verify(folder)
    checkpoint.verify(checkpoint.checkpoints(copy)[0])


def test_reading_alone_notices_numbers_that_no_file_has(tmp_path):
    folder, t = checkpoint.checkpoint_dir(tmp_path, 1), torch.arange(6.0)
    pieces = [((begin,), t[begin : begin + 2]) for begin in (4, 0, 2)]  # three of one tensor: three files
    checkpoint.save(folder, {"optim.a": Shard((6,), t.dtype, pieces)}, {}, BYTES)
    whole, part = torch.zeros(6), Shard((6,), t.dtype, [((1,), torch.zeros(4))])
    for wanted in (whole, part):
        checkpoint.load_tensors(folder, {"optim.a": wanted})
    assert torch.equal(whole, t) and torch.equal(part.pieces[0][1], t[1:5])
    (folder / "shard-00001-model-00002-of-00003.safetensors").unlink()
    for wanted, numbers in ((whole, "6 numbers of optim.a are wanted, its files hold 4"), (part, "4 .* hold 3")):
        with pytest.raises(UserError, match=numbers):
            checkpoint.load_tensors(folder, {"optim.a": wanted})


def test_each_whole_tensor_is_dealt_to_one_process_by_bytes():
    tensors = {f"model.{i}": torch.zeros(1000 - i) for i in range(40)} | {"optim.x": Shard((1,), torch.float32, [])}
    mine = [checkpoint.dealt(tensors, rank, 3) for rank in range(3)]
    names = [name for m in mine for name in m if name != "optim.x"]
    assert sorted(names) == sorted(set(tensors) - {"optim.x"}) and all("optim.x" in m for m in mine)
    sizes = [sum(t.nbytes for t in m.values() if isinstance(t, torch.Tensor)) for m in mine]
    assert max(sizes) - min(sizes) <= 4 * 1000  # the largest tensor


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_number_that_is_not_finite_is_found_wherever_it_lies(value, dtype):
    tensors = {
        "a": torch.full((300,), torch.finfo(dtype).max, dtype=dtype),
        "bits": torch.full((3,), -1, dtype=torch.int16),
        "none": torch.empty(0),
        "b": Shard((9, 9), dtype, [((0, 0), torch.ones(2, 3)), ((4, 4), torch.ones(5, 5, dtype=dtype).t())]),
    }
    assert checkpoint.not_finite(tensors) is None and checkpoint.not_finite({}) is None
    for name, piece in (("a", tensors["a"]), ("b", tensors["b"].pieces[1][1])):
        whole, number = piece.clone(), (1,) * piece.dim()
        piece[number] = value
        assert checkpoint.not_finite(tensors) == name
        piece.copy_(whole)


# failures of one process


def fails_on_rank_1(error):
    def work():
        if os.environ["RANK"] == "1":
            raise error
        return os.environ["RANK"]

    with joined_world("cpu"):
        try:
            return communication.agreed(work, "a test") if error else communication.agreed(os.getpid, "a test")
        except Exception as e:
            return type(e), str(e)


def test_what_processes_agree_on_fails_on_all():
    full = OSError(28, "No space left on device", "a file")
    assert together(fails_on_rank_1, full) == [(OSError, str(full))] * 2
    first, second = together(fails_on_rank_1, ZeroDivisionError("rank 1"))
    assert first == (TrainingError, "another process failed in a test: its message says why")
    assert second == (ZeroDivisionError, "rank 1")
    a, b = together(fails_on_rank_1, None)
    assert a == b and len(set(a)) == 2


NO_SPACE = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def full_on_rank_1(argv, kill=False):
    """Rank 1 cannot write its part of the checkpoint of step 8, and knows it a step before rank 0; the words with which
    each ends."""
    honest = checkpoint.save_file
    recover, train_step = checkpoint.recover, train.train_step

    def slow_recover(folder):
        time.sleep(0.5)
        recover(folder)

    def waiting_train_step(trainer, step, stop):
        if os.environ["RANK"] == "1":
            for thread in threading.enumerate():
                if thread.name == "checkpoint of step 8":
                    thread.join()
        return train_step(trainer, step, stop)

    def save_file(tensors, path, metadata):
        if path.parent.name == ".step_000008.tmp" and os.environ["RANK"] == "1":
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            path.write_bytes(b"half")
            raise NO_SPACE
        honest(tensors, path, metadata)

    checkpoint.save_file, checkpoint.recover, train.train_step = save_file, slow_recover, waiting_train_step
    try:
        trained(argv)
    except TrainingError as error:
        return str(error)


def test_a_disk_that_is_full_under_one_process_stops_all(tiny, tmp_path):
    out = tmp_path / "run"
    error, end = together(full_on_rank_1, [*tiny, "--out", str(out)])
    assert f"the checkpoint of step 8 cannot be saved ({out}/checkpoints/step_000008: No space left on device)" in error
    assert f"step_000004 is saved, continue with: python train.py --resume {out}" in error
    assert isinstance(end, SystemExit) and end.code == 1
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_000004"]
    assert [e["step"] for e in events(out, "unsaved")] == [8] and max(
        losses(out)
    ) == 8  # the step that it is noticed in
    checkpoint.verify(checkpoint.find(out))
    train.main(["--resume", str(out)])  # one process takes over
    assert sorted(losses(out)) == list(range(12))


def test_a_disk_that_is_full_under_one_process_is_passed_where_told_to(tiny, tmp_path):
    out = tmp_path / "run"
    options = ["--on-save-error", "continue", "--out", str(out), "--keep-checkpoints", "9"]
    assert together(full_on_rank_1, [*tiny, *options]) == [None, None]
    assert [path.name for path in checkpoint.checkpoints(out)] == ["step_000004", "step_000012"]
    assert [e["step"] for e in events(out, "unsaved")] == [8] and [e["step"] for e in events(out, "saved")] == [4, 12]
    assert sorted(losses(out)) == list(range(12)) and (out / "report.md").exists()
    checkpoint.verify(checkpoint.find(out))


def test_a_process_that_is_killed_in_a_save_leaves_the_checkpoint_before(tiny, tmp_path):
    out = tmp_path / "run"
    first, second = together(full_on_rank_1, [*tiny, "--out", str(out)], True)
    assert isinstance(second, Exception) and "rank 1 of 2 has ended" in first
    (before,) = checkpoint.checkpoints(out)
    assert before.name == "step_000004"
    checkpoint.verify(before)
    assert together(trained, ["--resume", str(out)]) == [None, None]
    assert sorted(losses(out)) == list(range(12))
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step_000008", "step_000012"]


def test_four_two_and_one_process_go_on_alike(tiny, tmp_path):
    tiny += ["--steps", "6", "--save-every", "3"]
    whole, out = run(tiny, tmp_path / "whole"), tmp_path / "four"
    assert together(trained, [*tiny, "--out", str(out)], ranks=4) == [None] * 4
    for ranks in (4, 2, 1):
        other = tmp_path / str(ranks)
        shutil.copytree(out, other)
        argv = ["--resume", str(other / "checkpoints" / "step_000003")]
        if ranks > 1:
            assert together(trained, argv, ranks=ranks) == [None] * ranks
        else:
            train.main(argv)
        assert losses(other) == pytest.approx(losses(whole), rel=1e-4)
        score = json.loads((other / "summary.json").read_text())["val_bpb"]
        assert score == pytest.approx(json.loads((whole / "summary.json").read_text())["val_bpb"], rel=1e-4)
    a, b = final_tensors(out), final_tensors(tmp_path / "4")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)  # as many: the same bits


def test_a_checkpoint_of_several_processes_is_evaluated_and_exported(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    assert together(trained, [*tiny, "--steps", "2", "--out", str(out)], ranks=4) == [None] * 4
    evaluation.main([str(out), "--metrics", "bpb", "--json"])
    score = json.loads(capsys.readouterr().out)["val_bpb"]
    assert score == pytest.approx(json.loads((out / "summary.json").read_text())["val_bpb"], rel=1e-5)
    evaluation.main([str(out), "--export", str(tmp_path / "x")])
    assert (tmp_path / "x" / "model.safetensors").exists()


# while training goes on


def slowly(monkeypatch, before):
    """`before(number)` is called in the thread of each save, before it writes."""
    honest, calls = checkpoint.save_file, itertools.count(1)

    def save_file(tensors, path, metadata):
        before(next(calls))
        honest(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", save_file)


def seen_at_each_step(monkeypatch, at):
    """`at(step, trainer)` is called before each step is trained."""
    honest = train.train_step

    def train_step(trainer, step, stop):
        at(step, trainer)
        return honest(trainer, step, stop)

    monkeypatch.setattr(train, "train_step", train_step)


def tensors_now(trainer):
    tensors = checkpoint.training_tensors(trainer.model, trainer.optimizer.state)
    return {name: t.clone() for name, t in tensors.items()}


def test_steps_go_on_while_a_checkpoint_is_written_and_are_not_in_it(tiny, tmp_path, monkeypatch):
    out, reached, seen = tmp_path / "run", threading.Event(), {}

    def at(step, trainer):
        seen[step] = tensors_now(trainer)
        if step == 7:
            assert not checkpoint.checkpoints(out)
            reached.set()

    seen_at_each_step(monkeypatch, at)
    slowly(monkeypatch, lambda number: number > 1 or reached.wait(60) or pytest.fail("step 7 waits for the save"))
    run(tiny, out, "--keep-checkpoints", "9")
    for step in (4, 8):
        stored = tensors_of(checkpoint.checkpoint_dir(out, step))
        assert all(torch.equal(stored[name], t) for name, t in seen[step].items())
        changed = [name for name, t in seen[step + 1].items() if not torch.equal(stored[name], t)]
        assert {"model.wte", "optim.wte.exp_avg"} <= set(changed)
    first, last = events(out, "saved")[0], events(out, "saved")[-1]
    assert first["path"] == "step_000004" and first["seconds"] < first["write_seconds"]
    assert last["step"] == 12 and last["seconds"] >= 0.9 * last["write_seconds"]  # the end waits
    order = [(e["event"], e["step"]) for e in events(out)]
    assert order.index(("checkpoint", 4)) < order.index(("step", 6)) < order.index(("saved", 4))


def test_saves_in_a_row_wait_for_one_another_and_hold_what_synchronous_ones_do(tiny, tmp_path, monkeypatch):
    options = ["--steps", "6", "--save-every", "1", "--keep-checkpoints", "9"]
    monkeypatch.setattr(HostCopy, "of", lambda *_: pytest.fail("a copy was made"))
    plain = run(tiny, tmp_path / "plain", *options, "--no-async-save")
    monkeypatch.undo()
    under_way = []

    def before(number):
        under_way.append([t.name for t in threading.enumerate() if t.name.startswith("checkpoint of step")])
        time.sleep(0.1)

    slowly(monkeypatch, before)
    out = run(tiny, tmp_path / "run", *options)
    assert under_way == [[f"checkpoint of step {step}"] for step in range(1, 7)]
    log = (out / "log.jsonl").read_bytes()
    for a, b in zip(checkpoint.checkpoints(plain), checkpoint.checkpoints(out), strict=True):
        checkpoint.verify(b)
        x, y = tensors_of(a), tensors_of(b)
        assert a.name == b.name and x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
        state, other = (dataclasses.asdict(State.read(path)) for path in (a, b))
        timed = {"log_bytes", "counted_s", "wall_time_s", "peak_memory_bytes", "config"}
        assert {k: v for k, v in state.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
        last = json.loads(log[: other["log_bytes"]].splitlines()[-1])
        assert (last["event"], last["step"]) == ("checkpoint", other["step"])
        assert max(
            e["step"] for e in map(json.loads, log[: other["log_bytes"]].splitlines()) if e["event"] == "step"
        ) == (other["step"] - 1)


def test_a_run_resumes_to_the_same_bits_from_what_was_written_while_it_went_on(tiny, tmp_path, monkeypatch):
    out, reached = tmp_path / "run", threading.Event()
    seen_at_each_step(monkeypatch, lambda step, _: reached.set() if step == 7 else None)
    slowly(monkeypatch, lambda number: number > 1 or reached.wait(60))
    run(tiny, out, "--keep-checkpoints", "9")
    monkeypatch.undo()
    whole, steps, log = final_tensors(out), losses(out), [(e["event"], e["step"]) for e in events(out)]
    train.main(["--resume", str(out / "checkpoints" / "step_000004")])
    assert losses(out) == steps and len(events(out, "step")) == 12
    assert all(torch.equal(t, whole[name]) for name, t in final_tensors(out).items())
    again = [(e["event"], e["step"]) for e in events(out)]
    lost = {("saved", 4)}  # it came after the line that a resumed run keeps
    assert set(again) == set(log) - lost | {("resume", 4)}


def test_a_failed_save_stops_the_run_before_the_next_one_is_due(tiny, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def fail(number):
        if number == 2:
            raise NO_SPACE

    def at(step, trainer):
        for thread in threading.enumerate():
            if thread.name == "checkpoint of step 8":
                thread.join()

    slowly(monkeypatch, fail)
    seen_at_each_step(monkeypatch, at)
    with pytest.raises(TrainingError, match="step 8 cannot be saved .*No space left.*step_000004 is saved"):
        run(tiny, out)
    assert max(losses(out)) == 8  # the step in which it was noticed


def test_a_signal_during_a_save_waits_for_it_and_saves_again(tiny, tmp_path, monkeypatch):
    whole, out = run(tiny, tmp_path / "whole"), tmp_path / "run"

    def before(number):
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)

    slowly(monkeypatch, before)
    with pytest.raises(Stopped, match=r"SIGTERM after \d+ of 12 steps, .* is saved"):
        run(tiny, out)
    monkeypatch.undo()
    stopped = max(losses(out)) + 1
    assert 4 < stopped < 12
    assert [path.name for path in checkpoint.checkpoints(out)] == ["step_000004", f"step_{stopped:06d}"]
    assert [e["step"] for e in events(out, "saved")] == [4, stopped]
    train.main(["--resume", str(out)])
    assert losses(out) == losses(whole)
    assert all(torch.equal(t, final_tensors(whole)[name]) for name, t in final_tensors(out).items())


def test_an_error_elsewhere_names_the_checkpoint_that_was_being_written(tiny, tmp_path, monkeypatch):
    out = tmp_path / "run"
    honest = train.train_step

    def poisoned(trainer, step, stop):
        outcome = honest(trainer, step, stop)
        return torch.tensor([math.nan, 0]) if step == 5 else outcome

    monkeypatch.setattr(train, "train_step", poisoned)
    slowly(monkeypatch, lambda number: time.sleep(0.5))
    with pytest.raises(TrainingError, match="step 5: the loss is nan; the last good checkpoint is .*step_000004"):
        run(tiny, out)
    checkpoint.verify(checkpoint.find(out))


def test_a_copy_keeps_its_memory_and_none_of_what_comes_later():
    copy, t, piece = HostCopy(), torch.arange(6.0).view(2, 3).t(), torch.ones(2, dtype=torch.int16)
    tensors = {"a": t, "b": Shard((4,), torch.int16, [((1,), piece)])}
    first = copy.of(tensors)
    t += 1
    piece += 1
    assert first["a"].equal(t - 1) and first["b"].pieces[0][1].equal(piece - 1) and first["b"].pieces[0][0] == (1,)
    second = copy.of(tensors)
    assert second["a"].equal(t) and second["b"].pieces[0][1].equal(piece)
    assert second["a"].data_ptr() == first["a"].data_ptr()
    assert second["b"].pieces[0][1].data_ptr() == first["b"].pieces[0][1].data_ptr()
