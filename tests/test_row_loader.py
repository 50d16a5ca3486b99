"""Rows of tokens: those of a plain walk over all documents, on any number of processes and after any stop; what is too
little, too much or another data set; threads. Then the rows to validate on."""

import json
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data import row_loader
from core.data.row_loader import RowLoader, merge_states
from core.data.token_rows import Row, RowShape, ValidationRows, tokens_read
from core.data.token_shards import TokenShards, open_token_shards, synthetic, write_shard
from core.stopping import UserError

BOS = 50256
SHAPES = [RowShape(3, 64, 24, 16), RowShape(2, 128, 40, 20), RowShape(4, 96, 1000, 12)]


def shards_of(folder: Path, pieces) -> TokenShards:
    folder.mkdir(parents=True, exist_ok=True)
    for i, piece in enumerate(pieces):
        write_shard(folder / f"x_{'train' if i else 'val'}_{i:06d}.bin", np.asarray(piece))
    return open_token_shards(str(folder), tokens=1, cache_dir=folder, say=print)


def stream_of(shards: TokenShards) -> np.ndarray:
    files = [shards.path(name) for name, _ in shards.train]
    return np.concatenate([np.fromfile(file, "<u2", offset=1024) for file in files]).astype(np.int64)


def plain_rows(stream: np.ndarray, shapes: list[RowShape], rows_per_step: int = 8):
    """(tokens (T + 1,), begins) of each row, from a list of all documents; None where they are used up."""
    documents = np.split(stream, np.flatnonzero(stream == BOS))[1:]
    rows = []
    for shape in (s for s in shapes for _ in range(s.steps * rows_per_step)):
        tokens, begins = [], []
        while len(tokens) <= shape.row_tokens:
            if not documents:
                return [*rows, None]
            begins += [len(tokens)]
            tokens += documents.pop(0)[: shape.doc_cap].tolist()
        rows.append((tokens[: shape.row_tokens + 1], [b for b in begins if b < shape.row_tokens]))
    return rows


def as_plain(row: Row) -> tuple[list[int], list[int]]:
    """The row as plain_rows has it, after checking that its parts agree."""
    T = row.inputs.numel()
    assert (row.inputs.dtype, row.targets.dtype, row.cu_seqlens.dtype) == (torch.int32, torch.int64, torch.int32)
    assert row.inputs.shape == row.targets.shape and torch.equal(row.inputs[1:].long(), row.targets[:-1])
    begins, padding = row.cu_seqlens[: row.num_docs], row.cu_seqlens[row.num_docs :]
    assert padding.numel() >= 1 and (padding == T).all()
    assert (row.inputs[begins.long()] == BOS).all()
    return [*row.inputs.tolist(), row.targets[-1].item()], begins.tolist()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> TokenShards:
    """Three shards, which the steps of SHAPES use up nearly."""
    folder = tmp_path_factory.mktemp("shards")
    sizes = {"train_shards": 3, "tokens_per_shard": 4500, "val_tokens": 2000, "mean_tokens": 40}
    synthetic(folder, **sizes, vocab_size=500, seed=3)
    return open_token_shards(str(folder), tokens=1, cache_dir=folder, say=print)


@pytest.fixture
def load(shards):
    """Opens loaders and closes them after the test."""
    opened = []

    def open_loader(shards=shards, shapes=SHAPES, **options) -> RowLoader:
        opened.append(RowLoader(shards, shapes, **options))
        return opened[-1]

    yield open_loader
    for loader in opened:
        loader.close()


def steps_of(loaders: list[RowLoader], num_steps: int) -> list[list]:
    """The rows of each step, of all processes in order."""
    return [[as_plain(row) for loader in loaders for row in loader.next_step()] for _ in range(num_steps)]


def world(load, world_size: int, **options) -> list[RowLoader]:
    return [load(rank=rank, world_size=world_size, **options) for rank in range(world_size)]


def in_steps(rows: list, rows_per_step: int = 8) -> list[list]:
    return [rows[i : i + rows_per_step] for i in range(0, len(rows), rows_per_step)]


def test_stages_in_shards_of_made_up_text(load, shards):
    expected = in_steps(plain_rows(stream_of(shards), SHAPES))
    loader = load()
    assert steps_of([loader], 9) == expected
    assert loader.state()["shard"] == 2  # all shards were read
    for row, shape in zip((r for r in load().next_step()), [SHAPES[0]] * 8):
        assert row.inputs.shape == (shape.row_tokens,) and row.cu_seqlens.shape == (shape.max_docs + 1,)
    with pytest.raises(RuntimeError, match="all 9 steps were handed out"):
        loader.next_step()


# any documents, however they are cut into files

documents = st.lists(st.integers(1, 12), min_size=20, max_size=60)
stages = st.builds(RowShape, st.integers(1, 3), st.integers(1, 16), st.integers(1, 14), st.just(30))
cut_places = st.lists(st.integers(0, 10**6), min_size=1, max_size=4)


@settings(max_examples=200)
@given(documents, st.lists(stages, min_size=1, max_size=3), st.integers(0, 3), cut_places, st.integers(1, 2), st.data())
def test_rows_are_those_of_a_plain_walk(tmp_path_factory, lengths, shapes, lead, cuts, rows_per_step, data):
    rng = np.random.default_rng(len(lengths))
    stream = np.concatenate([rng.integers(0, 99, lead), *([BOS, *rng.integers(0, 99, n - 1)] for n in lengths)])
    starts = np.flatnonzero(stream == BOS).tolist()
    # behind a begin and up to the next one, one cut between two, so that each file has a begin
    cuts = {cut % len(starts): cut for cut in cuts if cut % len(starts) + 1 < len(starts)}
    places = sorted(starts[k] + 1 + cut // 61 % (starts[k + 1] - starts[k]) for k, cut in cuts.items())
    shards = shards_of(tmp_path_factory.mktemp("any"), [[BOS], *np.split(stream, places)])
    assert len(shards.train) == 1 + len(places)
    expected = plain_rows(stream, shapes, rows_per_step)
    sizes = [s.row_tokens + 1 for s in shapes for _ in range(s.steps)]
    steps = len(sizes)

    def refused(state, left, needed):
        """What can be known not to be enough is not begun, nor gone on with."""
        if needed > left:
            with pytest.raises(UserError, match=f" {left:,} tokens are left .* take {needed:,}"):
                RowLoader(shards, shapes, rows_per_step=rows_per_step, state=state)
        return needed > left

    if refused(None, stream.size, sum(sizes) * rows_per_step):
        return
    whole = steps if expected[-1] is not None else (len(expected) - 1) // rows_per_step
    stop = data.draw(st.integers(0, whole))
    with RowLoader(shards, shapes, rows_per_step=rows_per_step) as loader:
        found = steps_of([loader], stop)
        state = loader.state()
    left = stream.size - [0, *places, stream.size][state["shard"]] - state["offset"]
    if refused(state, left, sum(sizes[stop:]) * rows_per_step):
        assert whole < steps
        return
    with RowLoader(shards, shapes, rows_per_step=rows_per_step, state=state) as loader:
        found += steps_of([loader], whole - stop)
        assert found == in_steps(expected, rows_per_step)[:whole]
        if whole < steps:
            with pytest.raises(UserError, match=f"{stream.size:,} tokens to train on end within step {whole + 1} of"):
                loader.next_step()


# processes and states


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_steps_do_not_depend_on_the_number_of_processes(load, world_size):
    ranks = world(load, world_size)
    assert steps_of(ranks, 9) == steps_of([load()], 9)
    states = [rank.state() for rank in ranks]
    assert merge_states(states) == states[0] == states[-1]
    stats = [rank.stats() for rank in ranks]
    total = load()
    steps_of([total], 9)
    assert {key: sum(s[key] for s in stats) for key in ("tokens", "documents")} == {
        key: total.stats()[key] for key in ("tokens", "documents")
    }
    with pytest.raises(ValueError, match="different runs or steps"):
        merge_states([states[0], load().state()])


@pytest.mark.parametrize("worlds", [(1, 1), (1, 4), (8, 2)])
@pytest.mark.parametrize("stop", [0, 1, 3, 4, 8, 9])
def test_a_continued_run_is_the_uninterrupted_one(load, worlds, stop):
    before, after = worlds
    straight = load()
    expected = steps_of([straight], 9)
    ranks = world(load, before, prefetch_steps=4)
    steps_of(ranks, stop)
    for future in ranks[0]._pending:
        future.result()  # what was read ahead must not show
    state = json.loads(json.dumps(merge_states([rank.state() for rank in ranks])))
    assert state["step"] == stop and len(json.dumps(state)) < 400
    resumed = world(load, after, state=state)
    assert steps_of(resumed, 9 - stop) == expected[stop:]
    assert resumed[0].state() == straight.state()
    assert sum(r.stats()["documents"] for r in resumed) == straight.stats()["documents"]


def test_a_longer_run_goes_on_with_more_shards(load, shards, tmp_path):
    short = shards_of(tmp_path, [[BOS], *np.split(stream_of(shards), [4500, 9000])[:2]])
    loader = load(short, SHAPES[:2])
    steps_of([loader], 5)
    longer = shards_of(tmp_path, [[BOS], *np.split(stream_of(shards), [4500, 9000])])
    assert steps_of([load(longer, state=loader.state())], 4) == steps_of([load()], 9)[5:]
    # and one that ends at once needs none
    ended = {**loader.state(), "shard": 2, "offset": 0}
    assert load(short, SHAPES[:2], state=ended).state() == ended


def other_shards(tmp_path, shards, change) -> TokenShards:
    pieces = np.split(stream_of(shards), [4500, 9000])
    other = shards_of(tmp_path, [[BOS], *change(pieces)])
    if change is renamed:
        other.train = tuple((name.replace("x_", "y_"), size) for name, size in other.train)
    return other


def renamed(pieces):
    return pieces


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda p: [p[0], p[1][:-1], p[2]], "trained on x_train_000002.bin of 10,024 bytes, here is .* of 10,022"),
        (renamed, "trained on x_train_000001.bin of 10,024 bytes, here is y_train_000001.bin"),
        (lambda p: [p[0], np.roll(p[1], 1), p[2]], "x_train_000002.bin: no document begins at token [0-9,]+, where"),
        (lambda p: p[:1] + [p[1][:1]], "x_train_000002.bin of 10,024"),
        (lambda p: p[:1], "goes on in shard 2, here are 1"),
    ],
    ids=["size", "name", "content", "shorter", "fewer"],
)
def test_a_state_of_other_shards_is_refused(load, shards, tmp_path, change, said):
    loader = load(other_shards(tmp_path / "a", shards, lambda pieces: pieces))
    while loader.state()["shard"] < 1 or not loader.state()["offset"]:
        loader.next_step()
    threads = threading.active_count()
    with pytest.raises(UserError, match=said):
        load(other_shards(tmp_path / "b", shards, change), state=loader.state())
    assert threading.active_count() == threads


def test_stats(load, shards):
    loader = load()
    assert loader.stats() == {"tokens": 0, "documents": 0, "epochs": 0.0, "crop_waste": 0.0}
    rows = [row for step in steps_of([loader], 9) for row in step]
    stats, state, stream = loader.stats(), loader.state(), stream_of(shards)
    passed = state["shard"] * 4500 + state["offset"]
    assert stats["tokens"] == sum(len(tokens) - 1 for tokens, _ in rows) == 8 * (3 * 64 + 2 * 128 + 4 * 96)
    assert stats["documents"] == state["documents"] == (stream[:passed] == BOS).sum()
    assert stats["epochs"] == passed / 13_500
    assert stats["crop_waste"] == pytest.approx(1 - sum(len(tokens) for tokens, _ in rows) / passed)


# refusals


@pytest.mark.parametrize(
    "options, said",
    [
        ({"world_size": 3}, r"8 rows a step do not divide over 3 processes: start one of \[1, 2, 4, 8\]"),
        ({"world_size": 16}, "over 16 processes"),
        ({"rows_per_step": 6, "world_size": 4}, r"6 rows .* one of \[1, 2, 3, 6\]"),
        ({"rank": 2, "world_size": 2}, "rank is 2, expected 0 to 1"),
        ({"shapes": [*SHAPES, RowShape(20, 96, 10, 12)]}, "13,500 tokens are left .* the 29 steps to come take 22,248"),
    ],
)
def test_sizes_that_do_not_fit(load, options, said):
    with pytest.raises(ValueError, match=said):
        load(**options)


@pytest.mark.parametrize("field", range(4))
def test_a_stage_of_nothing(field):
    sizes = [1, 1, 1, 1]
    sizes[field] = 0
    with pytest.raises(UserError, match="expected 1 or more of each"):
        RowShape(*sizes)


def test_exactly_as_many_tokens_as_a_run_takes(load, tmp_path):
    stream, shape = [BOS, *range(9)], RowShape(1, 9, 10, 1)
    row = load(shards_of(tmp_path / "a", [[BOS], stream]), [shape], rows_per_step=1).next_step()[0]
    assert as_plain(row) == (stream, [0])
    with pytest.raises(UserError, match="9 tokens are left .* take 10"):
        load(shards_of(tmp_path / "b", [[BOS], stream[1:4] + stream[:6]]), [shape], rows_per_step=1)


def test_more_documents_than_fit_a_row(load):
    most = max(len(begins) for step in steps_of([load()], 3) for _, begins in step)
    exact = [RowShape(3, 64, 24, most)]
    assert steps_of([load(shapes=exact)], 3) == steps_of([load()], 3)
    said = f"a row of 64 tokens has {most} documents, the stage takes {most - 1}"
    with pytest.raises(UserError, match=said):
        steps_of([load(shapes=[RowShape(3, 64, 24, most - 1)])], 3)


def test_all_documents_are_used_up(load):
    """The rests of cut documents were not known to be so long; every process is told, at the same step, and again."""
    hungry = [RowShape(25, 64, 9, 30)]
    for loader in world(load, 2, shapes=hungry):
        said = []
        while not said:
            try:
                loader.next_step()
            except UserError as error:
                said.append(str(error))
        with pytest.raises(UserError, match=re.escape(said[0])):
            loader.next_step()
        step = loader.state()["step"]
        left = 8 * 65 * (25 - step)
        assert f"its 13,500 tokens to train on end within step {step + 1} of 25" in said[0]
        assert f"the steps still take {left:,} and more" in said[0]


def test_how_many_tokens_stages_use_up(tmp_path):
    """As much as asked for is half as much again as lengths like FineWeb's need."""
    synthetic(tmp_path, train_shards=1, tokens_per_shard=3_000_000, val_tokens=50_000, vocab_size=9, seed=0)
    shards = open_token_shards(str(tmp_path), tokens=1, cache_dir=tmp_path, say=print)
    for shape in (RowShape(8, 16384, 896, 64), RowShape(4, 32768, 2048, 96), RowShape(4, 49152, 2048, 128)):
        with RowLoader(shards, [shape]) as loader:
            for _ in range(shape.steps):
                loader.next_step()
            used = loader.stats()["epochs"] * 3_000_000
        assert tokens_read([shape]) / 1.5 == pytest.approx(used, rel=0.08)
    stages = [RowShape(423, 16384, 896, 64), RowShape(424, 32768, 2048, 96), RowShape(438, 49152, 2048, 128)]
    assert 338.8e6 < tokens_read(stages) / 1.5 < 900e6  # what the race trains on, and has in its nine shards


# threads


def test_a_damaged_shard_is_told_at_the_step_that_needs_it(load, shards, tmp_path):
    other = shards_of(tmp_path, [[BOS], *np.split(stream_of(shards), [4500, 9000])])
    path = tmp_path / other.train[1][0]
    path.write_bytes(path.read_bytes()[:-4] + b"\xff\xff\x00\x00")
    loader, expected = load(other), steps_of([load()], 9)
    found = []
    with pytest.raises(UserError, match="x_train_000002.bin: token 4,498 is 65535, outside of the vocabulary"):
        while True:
            found += steps_of([loader], 1)
    assert found == expected[: len(found)] and 0 < len(found) < 9
    assert loader.state()["step"] == len(found)
    assert isinstance(loader.fault_ahead(1), UserError) and load().fault_ahead(2) is None
    with pytest.raises(UserError, match="token 4,498"):
        loader.next_step()


def test_shards_are_read_one_ahead_and_rows_a_few_steps(load, monkeypatch):
    read, filled = [], []
    original, honest = row_loader.read_shard, row_loader._Documents.fill
    monkeypatch.setattr(
        row_loader, "read_shard", lambda path, **k: (read.append(path.name[-5]), original(path, **k))[1]
    )
    monkeypatch.setattr(row_loader._Documents, "fill", lambda self, *a: (filled.append(a[1]), honest(self, *a))[1])
    loader = load(shapes=[RowShape(9, 32, 1000, 12)], prefetch_steps=3)
    loader.next_step()
    for future in loader._pending:
        future.result()
    time.sleep(0.05)
    assert read == ["1", "2"] and len(filled) == 8 * (1 + 3)
    loader.close()
    read.clear()
    loader = load(state={**loader.state(), "shard": 1, "offset": 0}, shapes=[RowShape(9, 32, 1000, 12)])
    loader.next_step()
    assert read == ["2", "3"]
    loader.close()
    filled.clear()
    load(rank=1, world_size=4).next_step()
    assert filled[:8] == [False, False, True, True, False, False, False, False]  # copies its own rows alone


def test_closing_does_not_wait_for_a_shard(load, shards):
    waits = threading.Event()

    def never_there(name, stopped):
        if name == shards.train[1][0]:
            waits.set()
            while not stopped():
                time.sleep(0.001)
            raise InterruptedError
        return shards.path(name)

    loader = load(TokenShards("x", shards.train, shards.validation, never_there))
    loader.next_step()  # of the first shard
    assert waits.wait(5)
    started = time.perf_counter()
    loader.close()
    loader.close()
    assert time.perf_counter() - started < 2
    assert not any(t.is_alive() for pool in (loader._thread, loader._reader._thread) for t in pool._threads)
    with pytest.raises(RuntimeError, match="closed"):
        loader.next_step()


def test_closing_does_not_wait_for_a_whole_step(load, monkeypatch):
    honest, began = row_loader._Documents.fill, threading.Event()

    def slow(self, *args):
        row = honest(self, *args)
        began.set()
        time.sleep(0.05)
        return row

    monkeypatch.setattr(row_loader._Documents, "fill", slow)
    loader = load(shapes=[RowShape(1, 1, 9, 9)], rows_per_step=128)  # six seconds
    assert began.wait(5)
    started = time.perf_counter()
    loader.close()
    assert time.perf_counter() - started < 2


def test_waiting_is_counted(load, monkeypatch):
    honest = row_loader._Documents.fill
    monkeypatch.setattr(row_loader._Documents, "fill", lambda self, *a: (time.sleep(0.005), honest(self, *a))[1])
    loader = load()
    loader.next_step()
    waited = loader.waited_s
    assert waited > 0.02
    loader._pending[0].result()
    loader.next_step()
    assert loader.waited_s - waited < 0.01


def test_rows_are_not_overwritten_by_later_ones(load):
    loader = load()
    steps = [loader.next_step() for _ in range(9)]
    assert [[as_plain(row) for row in step] for step in steps] == steps_of([load()], 9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rows_on_a_gpu_are_those_on_the_cpu(load):
    host, gpu = load(), load(device="cuda")
    for _ in range(9):
        for want, got in zip(host.next_step(), gpu.next_step(), strict=True):
            assert got.num_docs == want.num_docs and got.inputs.device.type == "cuda"
            assert all(torch.equal(g.cpu(), w) for g, w in zip(got[:3], want[:3]))


# validation


def validation(folder: Path, shard, **options) -> ValidationRows:
    write_shard(folder / "val.bin", np.asarray(shard))
    return ValidationRows(folder / "val.bin", **{"tokens": 24, "row_tokens": 6, "max_docs": 7, **options})


VAL = [5, 6, BOS, 1, 2, BOS, BOS, BOS, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, BOS, BOS, 1]


def test_validation_rows_are_the_tokens_as_they_are(tmp_path):
    rows = validation(tmp_path, VAL)
    assert len(rows) == 4
    for _ in range(2):
        found = list(rows)
        assert [row.inputs.tolist() for row in found] == [VAL[i : i + 6] for i in (0, 6, 12, 18)]
        assert [row.targets.tolist() for row in found] == [VAL[i + 1 : i + 7] for i in (0, 6, 12, 18)]
        # of a row that begins within a document, at the beginning of one, within one, and one that ends with a begin
        assert [row.cu_seqlens.tolist() for row in found] == [
            [0, 2, 5, 6, 6, 6, 6, 6],
            [0, 1, 6, 6, 6, 6, 6, 6],
            [0, 6, 6, 6, 6, 6, 6, 6],
            [0, 5, 6, 6, 6, 6, 6, 6],
        ]
        assert [row.num_docs for row in found] == [3, 2, 1, 2]
        dtypes = {(row.inputs.dtype, row.targets.dtype, row.cu_seqlens.dtype) for row in found}
        assert dtypes == {(torch.int32, torch.int64, torch.int32)}


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_validation_rows(tmp_path, world_size):
    parts = [validation(tmp_path, VAL, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [len(part) for part in parts] == [4 // world_size] * world_size
    together = [row.inputs.tolist() for part in parts for row in part]
    assert together == [row.inputs.tolist() for row in validation(tmp_path, VAL)]


@pytest.mark.parametrize(
    "options, said",
    [
        ({"tokens": 26, "row_tokens": 13}, "has 26 tokens, 27 are needed"),
        ({"row_tokens": 7}, "24 tokens to validate on are no whole rows of 7: give a multiple"),
        ({"row_tokens": 0}, "no whole rows of 0"),
        ({"tokens": 0}, "0 tokens to validate on"),
        ({"max_docs": 2}, "row 0 has 3 documents, 2 are taken: give shorter rows"),
        ({"world_size": 3}, r"4 rows to validate on do not divide over 3 processes: start one of \[1, 2, 4\]"),
        ({"vocab_size": 50256, "bos": 1}, "token 2 is 50256, outside"),
    ],
)
def test_validation_rows_that_cannot_be(tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        validation(tmp_path, VAL, **options)


def test_exactly_the_tokens_that_are_needed_are_enough(tmp_path):
    assert len(validation(tmp_path, VAL, tokens=25, row_tokens=5)) == 5


def test_validation_rows_of_the_race(shards):
    options = ValidationRows.__init__.__kwdefaults__
    assert (options["tokens"], options["row_tokens"]) == (10_485_760, 262_144)
