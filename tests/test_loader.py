"""Loader: the same global batches on any number of ranks and after any interruption, and errors where they can be
seen."""

import hashlib
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from core.data.corpus import Corpus, open_corpus
from core.data.loader import Loader, merge_states
from core.data.packing import BestFitPacker
from core.data.tokenizer import Tokenizer, train_tokenizer

SIZES = {"seq_len": 24, "rows_per_step": 16, "device_batch_size": 2, "num_streams": 8, "buffer_docs": 5}
MODES = ["continue", "crop"]


def write(path: Path, num_documents: int = 70) -> Path:
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "\n", "epsilon", "42"]
    texts = [f"{i}: " + " ".join(rng.choice(words, rng.integers(1, 60))) for i in range(num_documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def open_(path: Path, **options) -> Corpus:
    return open_corpus(str(path), **{"seed": 3, "val_every": 10, "cache_dir": path.parent, **options})[0]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return open_(write(tmp_path_factory.mktemp("loader") / "a.jsonl"))


@pytest.fixture(scope="module")
def tokenizer(corpus) -> Tokenizer:
    return train_tokenizer(corpus, 300)


@pytest.fixture
def load(corpus, tokenizer):
    """Opens loaders and closes them after the test."""
    opened = []

    def open_loader(*, corpus=corpus, tokenizer=tokenizer, **options) -> Loader:
        loader = Loader(corpus, tokenizer, **{**SIZES, **options})
        opened.append(loader)
        return loader

    yield open_loader
    for loader in opened:
        loader.close()


def rows_of(step: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
    """(rows, T + 1), after checking that inputs and targets are one row."""
    inputs, targets = (x.flatten(0, 1) for x in step)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    return torch.cat([inputs, targets[:, -1:]], dim=1).numpy()


def global_rows(ranks: list[Loader], num_steps: int, num_streams: int = 8) -> list[np.ndarray]:
    """(rows_per_step, T + 1) of each step, in global order."""
    steps = []
    for _ in range(num_steps):
        local = [iter(rows_of(rank.next_step())) for rank in ranks]
        num_rows = SIZES["rows_per_step"]
        steps.append(np.stack([next(local[r % num_streams % len(ranks)]) for r in range(num_rows)]))
    return steps


def count_rows(monkeypatch) -> list[BestFitPacker]:
    """An entry for every row that any loader has filled from now on."""
    filled, honest = [], BestFitPacker.fill

    def fill(self, *args):
        honest(self, *args)
        filled.append(self)

    monkeypatch.setattr(BestFitPacker, "fill", fill)
    return filled


def world(load, world_size: int, **options) -> list[Loader]:
    return [load(rank=rank, world_size=world_size, **options) for rank in range(world_size)]


def test_batch_shape_dtype_and_device(load, tokenizer):
    inputs, targets = load().next_step()
    for x in (inputs, targets):
        assert x.shape == (8, 2, 24)
        assert x.dtype == torch.int64
        assert x.device.type == "cpu"
        assert x.is_contiguous()
    assert (inputs == tokenizer.bos_id).any()
    assert inputs.max() < tokenizer.vocab_size


def test_streams_read_every_eighth_document_of_each_epoch(load, corpus, tokenizer):
    # with no document longer than a row and a buffer of one, packing preserves the text
    loader = load(seq_len=1000, buffer_docs=1, mode="continue")
    steps = [rows_of(loader.next_step()) for _ in range(3)]
    n = len(corpus)
    for stream in range(8):
        tokens = np.concatenate([rows[stream::8] for rows in steps]).reshape(-1)
        expected, p = [], stream
        while len(expected) < tokens.size:
            expected += [tokenizer.bos_id, *tokenizer.encode(corpus[corpus.order(p // n)[p % n]])]
            p += 8
        assert tokens.tolist() == expected[: tokens.size]
        assert p > n


@pytest.mark.parametrize("mode", MODES)
def test_global_rows_do_not_depend_on_the_number_of_ranks(load, mode):
    expected = global_rows(world(load, 1, mode=mode), 12)
    for world_size in (2, 4, 8):
        for got, want in zip(global_rows(world(load, world_size, mode=mode), 12), expected, strict=True):
            np.testing.assert_array_equal(got, want)


def test_rows_are_those_of_before(load, tmp_path):
    """A checkpoint continues with them: the order, each stream's random choices, the packing."""
    texts = [f"{i}: " + "".join(chr(97 + i * k * k % 23) for k in range(1 + i * 7 % 90)) for i in range(70)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    bytes_alone = {"corpus": open_(tmp_path / "a.jsonl"), "tokenizer": Tokenizer([bytes([i]) for i in range(256)])}
    digests = []
    for mode in MODES:
        rows = np.concatenate(global_rows([load(mode=mode, **bytes_alone)], 6))
        digests.append(hashlib.sha256(rows.astype(np.int64).tobytes()).hexdigest()[:16])
    assert digests == ["abbbbde909e22e50", "6ccc77e528fc58ba"]


def test_micro_batch_size_only_regroups_rows(load):
    small, large = load(), load(device_batch_size=16)
    for _ in range(3):
        np.testing.assert_array_equal(rows_of(small.next_step()), rows_of(large.next_step()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("worlds", [(1, 1), (1, 4), (4, 1), (2, 8)])
def test_resumed_run_is_the_uninterrupted_one(load, mode, worlds, monkeypatch):
    before, after = worlds
    expected = global_rows(world(load, 1, mode=mode), 20)
    filled = count_rows(monkeypatch)
    ranks = world(load, before, mode=mode, prefetch_steps=3)
    global_rows(ranks, 9)
    while len(filled) < (9 + 3) * 16:
        time.sleep(0.001)  # what was prepared ahead must not show in the state
    states = [json.loads(json.dumps(rank.state())) for rank in ranks]
    state = merge_states(states[::-1])
    assert state["step"] == 9
    resumed = world(load, after, mode=mode, state=state)
    for got, want in zip(global_rows(resumed, 11), expected[9:], strict=True):
        np.testing.assert_array_equal(got, want)
    straight = world(load, after, mode=mode)
    global_rows(straight, 20)
    assert [rank.stats() for rank in resumed] == [rank.stats() for rank in straight]
    assert [rank.state() for rank in resumed] == [rank.state() for rank in straight]


def test_state_before_the_first_step(load):
    fresh = load()
    state = fresh.state()
    assert state["step"] == 0
    assert state["streams"]["3"] == {
        "next_position": 3,
        "rows": 0,
        "documents": 0,
        "cropped": 0,
        "takes": 0,
        "buffer": [],
    }
    resumed = load(state=state)
    assert resumed.state() == state
    np.testing.assert_array_equal(rows_of(resumed.next_step()), rows_of(fresh.next_step()))
    assert load(state=fresh.state()).stats() == fresh.stats()


def test_more_rows_after_resuming(load):
    loader = load()
    loader.next_step()
    resumed = load(rows_per_step=32, device_batch_size=4, state=loader.state())
    rows = rows_of(resumed.next_step())
    np.testing.assert_array_equal(rows[:16], rows_of(loader.next_step()))
    np.testing.assert_array_equal(rows[16:], rows_of(loader.next_step()))


def test_continue_mode_loses_nothing(load, corpus, tokenizer):
    loader = load(mode="continue")
    steps = 60
    tokens = np.concatenate([rows_of(loader.next_step()).reshape(-1) for _ in range(steps)])
    streams = loader.state()["streams"].values()
    n = len(corpus)

    def document(p: int) -> np.ndarray:
        return tokenizer.encode_document(corpus[corpus.order(p // n)[p % n]])

    taken = [p for s, stream in enumerate(streams) for p in range(s, stream["next_position"], 8)]
    assert max(taken) > 2 * n
    buffered = [document(p)[start:stop] for stream in streams for p, start, stop in stream["buffer"]]
    seen = np.bincount(np.concatenate([tokens, *buffered]), minlength=tokenizer.vocab_size)
    expected = np.bincount(np.concatenate([document(p) for p in taken]), minlength=tokenizer.vocab_size)
    np.testing.assert_array_equal(seen, expected)
    assert loader.stats()["crop_waste"] == 0


def test_stats(load, corpus):
    loader = load(mode="crop")
    assert loader.stats() == {"tokens": 0, "documents": 0, "epochs": 0.0, "crop_waste": 0.0}
    for _ in range(10):
        loader.next_step()
    stats, state = loader.stats(), loader.state()
    assert stats["tokens"] == 10 * 16 * 24
    assert stats["documents"] == sum((s["next_position"] - int(i)) // 8 for i, s in state["streams"].items())
    assert stats["epochs"] == pytest.approx(stats["documents"] / len(corpus))
    cropped = sum(s["cropped"] for s in state["streams"].values())
    assert stats["crop_waste"] == cropped / (cropped + 10 * 16 * 25) > 0
    parts = [rank for rank in world(load, 2, mode="crop")]
    for rank in parts:
        for _ in range(10):
            rank.next_step()
    assert sum(rank.stats()["tokens"] for rank in parts) == stats["tokens"]
    assert sum(rank.stats()["epochs"] for rank in parts) / 2 == pytest.approx(stats["epochs"])


def test_fewer_documents_than_streams(tmp_path, tokenizer, load):
    corpus = open_(write(tmp_path / "a.jsonl", 6), val_every=2)
    assert len(corpus) < 8
    expected = global_rows(world(load, 1, corpus=corpus), 5)
    for got, want in zip(global_rows(world(load, 4, corpus=corpus), 5), expected, strict=True):
        np.testing.assert_array_equal(got, want)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rows_per_step": 20}, "480 tokens: expected a multiple of 192 .seq_len 24 x 8 streams., such as 384 or 576"),
        ({"rows_per_step": 4}, "such as 192"),
        ({"world_size": 3}, r"8 data streams do not divide over 3 processes: start one of \[1, 2, 4, 8\]"),
        ({"device_batch_size": 3}, r"each process has 16 rows per step, so one of \[1, 2, 4, 8, 16\]"),
        ({"device_batch_size": 16, "world_size": 2}, "each process has 8 rows"),
        ({"rank": 2, "world_size": 2}, "rank is 2, expected 0 to 1"),
        ({"device_batch_size": 0}, "device_batch_size is 0 rows"),
        ({"mode": "pad"}, "expected 'continue' or 'crop'"),
    ],
)
def test_sizes_that_do_not_fit(load, options, message):
    with pytest.raises(ValueError, match=message):
        load(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seq_len": 32}, "data state has seq_len 24, this run has 32"),
        ({"num_streams": 4}, "data state has num_streams 8, this run has 4"),
        ({"mode": "crop"}, "data state has mode 'continue', this run has 'crop'"),
        ({"buffer_docs": 6}, "data state has buffer_docs 5, this run has 6"),
    ],
)
def test_state_of_other_settings(load, options, message):
    with pytest.raises(ValueError, match=message):
        load(**options, state=load().state())


def test_state_of_another_corpus_seed_or_tokenizer(load, corpus, tokenizer, tmp_path):
    state = load().state()
    with pytest.raises(ValueError, match="the training data changed since the checkpoint"):
        load(corpus=open_(write(tmp_path / "a.jsonl", 71)), state=state)
    with pytest.raises(ValueError, match="data state has seed 3, this run has 4"):
        load(corpus=open_(write(tmp_path / "a.jsonl"), seed=4), state=state)
    with pytest.raises(ValueError, match="the tokenizer is not that of the checkpoint"):
        load(tokenizer=train_tokenizer(corpus, 299), state=state)


def test_merge_refuses_what_is_no_whole(load):
    a, b = world(load, 2)
    with pytest.raises(ValueError, match="hold 4 of 8 streams"):
        merge_states([a.state()])
    with pytest.raises(ValueError, match=r"streams \['0', '2', '4', '6'\] are in two"):
        merge_states([a.state(), a.state()])
    with pytest.raises(ValueError, match="no data states"):
        merge_states([])
    with pytest.raises(ValueError, match=r"lacks streams \[1, 3, 5, 7\]"):
        load(rank=1, world_size=2, state=a.state())
    merged = merge_states([b.state(), a.state()])
    assert list(merged["streams"]) == [str(s) for s in range(8)]
    b.next_step()
    with pytest.raises(ValueError, match="step is 1 and 0"):
        merge_states([a.state(), b.state()])


# -- the thread -------------------------------------------------------------------------------------------------------


def test_fault_in_the_data_is_raised_by_next_step(tmp_path, tokenizer, load):
    path = write(tmp_path / "a.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    lines[40] = '{"text": null}\n'
    path.write_text("".join(lines))
    loader = load(corpus=open_(path))
    messages = []
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a\.jsonl, line 41: .*null") as error:
            for _ in range(100):
                loader.next_step()
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    state = loader.state()
    assert loader.stats()["tokens"] == state["step"] * 16 * 24
    loader.close()


def test_steps_before_the_fault_are_handed_out(tmp_path, tokenizer, load):
    path = write(tmp_path / "a.jsonl")
    corpus = open_(path)
    sound = load(corpus=corpus)
    # long after the first steps
    bad_document = corpus.order(0)[len(corpus) - 1]
    original = Corpus.__getitem__

    class Broken(Corpus):
        def __getitem__(self, i):
            if i == bad_document:
                raise ValueError("bad row")
            return original(self, i)

    broken = open_(path)
    broken.__class__ = Broken
    loader = load(corpus=broken)
    np.testing.assert_array_equal(rows_of(loader.next_step()), rows_of(sound.next_step()))
    with pytest.raises(ValueError, match="bad row"):
        for _ in range(100):
            loader.next_step()
    assert loader.state()["step"] >= 1


def test_prefetch_is_bounded_and_close_is_prompt(load, corpus, monkeypatch):
    filled = count_rows(monkeypatch)
    loader = load(prefetch_steps=3)
    loader.next_step()
    while len(filled) < (1 + 3) * 16:
        time.sleep(0.001)
    time.sleep(0.05)
    assert len(filled) == (1 + 3) * 16

    original = Corpus.__getitem__
    monkeypatch.setattr(Corpus, "__getitem__", lambda self, i: time.sleep(0.002) or original(self, i))
    slow = load(rows_per_step=8000, device_batch_size=1000)  # half a minute of preparation
    start = time.perf_counter()
    slow.close()
    slow.close()
    assert time.perf_counter() - start < 2
    assert not any(thread.is_alive() for thread in slow._thread._threads)
    with pytest.raises(RuntimeError, match="closed"):
        slow.next_step()


def test_context_manager_closes(corpus, tokenizer):
    with Loader(corpus, tokenizer, **SIZES) as loader:
        loader.next_step()
    assert not any(thread.is_alive() for thread in loader._thread._threads)


def test_batches_are_not_overwritten_by_later_ones(load):
    loader = load()
    steps = [loader.next_step() for _ in range(6)]
    again = load()
    for inputs, targets in steps:
        want_inputs, want_targets = again.next_step()
        assert torch.equal(inputs, want_inputs)
        assert torch.equal(targets, want_targets)


def test_waiting_for_data_is_counted(load, monkeypatch):
    """A slow tokenizer is waited for; a step that is ready is not."""
    read = Corpus.at
    monkeypatch.setattr(Corpus, "at", lambda self, position: (time.sleep(0.005), read(self, position))[1])
    loader = load()
    loader.next_step()
    waited = loader.waited_s
    assert waited > 0.02
    loader._pending[0].result()
    loader.next_step()
    assert loader.waited_s - waited < 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_are_those_on_the_cpu(load):
    host, gpu = load(), load(device="cuda")
    for _ in range(6):
        for want, got in zip(host.next_step(), gpu.next_step(), strict=True):
            assert got.device.type == "cuda"
            assert torch.equal(got.cpu(), want)
