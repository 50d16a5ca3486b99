"""Shards of tokens: their layout, what is no shard, folders, a stand-in for the hub, and made-up text."""

import json
import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from core.config import TOKEN_DATASETS
from core.data import download, token_shards
from core.data.download import main
from core.data.token_shards import num_tokens, open_token_shards, read_shard, synthetic, write_shard
from core.stopping import UserError
from tests.hub import Hub, serving

BOS = 50256
TOKENS = np.array([7, BOS, 0, 50255, BOS, BOS, 3])
FIRST, SECOND, VAL = "fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin"


def shard(tokens=TOKENS, magic=20240520, version=1, count=None) -> bytes:
    """A file put together without the code under test."""
    header = struct.pack("<256i", magic, version, len(tokens) if count is None else count, *[0] * 253)
    return header + struct.pack(f"<{len(tokens)}H", *tokens)


# a file


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_a_shard_has_the_layout_of_the_race(tmp_path, dtype):
    write_shard(tmp_path / "a.bin", TOKENS.astype(dtype))
    assert (tmp_path / "a.bin").read_bytes() == shard() and os.listdir(tmp_path) == ["a.bin"]
    assert num_tokens(tmp_path / "a.bin") == 7


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("first", [2, 5, 7, None])
def test_a_shard_is_read_and_indexed(tmp_path, monkeypatch, chunk, first):
    monkeypatch.setattr(token_shards, "_CHUNK_TOKENS", chunk)
    (tmp_path / "a.bin").write_bytes(shard())
    indexed = read_shard(tmp_path / "a.bin", first=first)
    assert indexed.tokens.tolist() == TOKENS[:first].tolist()
    assert indexed.starts == [i for i in (1, 4, 5) if i < (first or 7)]


@pytest.mark.parametrize("tokens", [[1.5], [-1], [2**16], [[1, 2]]], ids=str)
def test_what_is_no_row_of_ids_is_not_written(tmp_path, tokens):
    with pytest.raises(ValueError, match="integers from 0 to 65535"):
        write_shard(tmp_path / "a.bin", np.array(tokens))
    assert not os.listdir(tmp_path)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "a.bin").write_bytes(b"before")

    def full(*args):
        raise OSError(28, "no space")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_shard(tmp_path / "a.bin", TOKENS)
    assert os.listdir(tmp_path) == ["a.bin"] and (tmp_path / "a.bin").read_bytes() == b"before"


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 200001024\n"
WRONG = {
    "pointer": (POINTER, "Git LFS pointer.*git lfs pull"),
    "page": (b"\n<!DOCTYPE html><html>" + b"x" * 2000, "holds a web page"),
    "empty": (b"", "has 0 bytes, a shard's header alone 1,024"),
    "short header": (shard()[:1000], "has 1,000 bytes"),
    "magic": (shard(magic=20240801), "no shard of tokens, it begins with 20240801 instead of 20240520"),
    "version": (shard(version=2), "has version 2 of the layout, expected 1"),
    "truncated": (shard()[:-2], "truncated, it has 1,036 bytes and its header says 7 tokens, which are 1,038"),
    "odd": (shard()[:-1], "truncated, it has 1,037"),
    "long": (shard() + b"xx", "too long, it has 1,040"),
    "negative": (shard(count=-1), "too long"),
    "id": (shard([BOS, 3, 50257, 2, 60000]), "token 4 is 60000, outside of the vocabulary of 50,257"),
    "no document": (shard([1, 2, 3]), "no document begins in its 3 tokens .with id 50256"),
    "no token": (shard([]), "no document begins in its 0 tokens"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_shard_is_a_sentence_with_its_name(tmp_path, name):
    content, said = WRONG[name]
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path / 'a.bin'}: .*{said}") as error:
        read_shard(tmp_path / "a.bin")
    assert "\n" not in str(error.value)


def test_a_shard_shorter_than_what_is_needed_of_it(tmp_path):
    write_shard(tmp_path / "a.bin", TOKENS)
    with pytest.raises(UserError, match="has 7 tokens, 8 are needed"):
        read_shard(tmp_path / "a.bin", first=8)


def test_a_shard_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "a.bin").write_bytes(shard()[:-4])
    monkeypatch.setattr(token_shards, "num_tokens", lambda path: 7)
    with pytest.raises(UserError, match="became shorter"):
        read_shard(tmp_path / "a.bin")


def test_reading_ends_when_told_to(tmp_path, monkeypatch):
    monkeypatch.setattr(token_shards, "_CHUNK_TOKENS", 2)
    write_shard(tmp_path / "a.bin", TOKENS)
    asked = []
    with pytest.raises(InterruptedError, match="no longer reading .*a.bin"):
        read_shard(tmp_path / "a.bin", stopped=lambda: asked.append(0) or len(asked) == 3)
    assert len(asked) == 3


def test_another_vocabulary(tmp_path):
    write_shard(tmp_path / "a.bin", np.array([9, 1, 9]))
    assert read_shard(tmp_path / "a.bin", bos=9, vocab_size=10).starts == [0, 2]
    with pytest.raises(UserError, match="token 0 is 9, outside of the vocabulary of 9"):
        read_shard(tmp_path / "a.bin", bos=8, vocab_size=9)


# a folder


def folder_of(path: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        write_shard(path / name, np.array([BOS, *range(i)]))
    return path


def open_(folder, **options):
    return open_token_shards(str(folder), **{"tokens": 1, "cache_dir": folder, "say": print, **options})


def test_shards_of_a_folder_in_their_order(tmp_path):
    folder_of(tmp_path, "x_train_000010.bin", "x_val_000001.bin", "x_train_000002.bin", "x_val_000000.bin")
    (tmp_path / "notes.txt").write_text("no shard")
    shards = open_(tmp_path)
    assert shards.train == (("x_train_000002.bin", 1024 + 6), ("x_train_000010.bin", 1024 + 2))
    assert shards.tokens_per_shard == [3, 1] and shards.validation == "x_val_000000.bin"
    assert shards.path("x_train_000010.bin") == tmp_path / "x_train_000010.bin"


@pytest.mark.parametrize(
    "names, said",
    [
        ([], r"has no \*_train_\*.bin"),
        (["x_train_000001.bin"], r"has no \*_val_\*.bin"),
        (["x_val_000000.bin"], r"has no \*_train_\*.bin"),
        (["x_val_000000.bin", "x_train_000001.bin", "y_train_000001.bin"], "mixes data sets .x, y."),
    ],
)
def test_a_folder_without_what_is_needed(tmp_path, names, said):
    with pytest.raises(UserError, match=f"{tmp_path} {said}"):
        open_(folder_of(tmp_path, *names))


@pytest.mark.parametrize("name", ["x_train_000002.bin", "x_val_000000.bin"])
def test_a_damaged_file_of_a_folder_is_found_at_once(tmp_path, name):
    folder_of(tmp_path, "x_train_000001.bin", "x_train_000002.bin", "x_val_000000.bin")
    (tmp_path / name).write_bytes(shard()[:-2])
    with pytest.raises(UserError, match=f"{name}: truncated"):
        open_(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="none is no folder: give one with .*fineweb10B"):
        open_token_shards(str(tmp_path / "none"), tokens=1, cache_dir=tmp_path, say=print)


# the hub


@pytest.fixture
def hub(monkeypatch):
    sleep = time.sleep
    monkeypatch.setattr(download.time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    hub = Hub(0)
    hub.files = {name: shard([BOS, *range(100 + i)]) for i, name in enumerate((FIRST, SECOND, VAL))}
    with serving(hub):
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def test_names_of_the_data_set_of_the_race():
    dataset = TOKEN_DATASETS["fineweb10B"]
    names = [dataset.shard_name(i) for i in range(dataset.num_shards)]
    assert (names[0], names[102], names[103]) == (FIRST, "fineweb_train_000103.bin", VAL) and len(names) == 104
    assert names == sorted(names)  # as the hub's listing is


@pytest.mark.parametrize("tokens, num", [(1, 1), (100_000_000, 1), (100_000_001, 2), (10**12, 2)])
def test_as_many_shards_as_the_tokens_need_are_fetched(hub, tmp_path, tokens, num, capsys):
    shards = open_token_shards("fineweb10B", tokens=tokens, cache_dir=tmp_path, say=print)
    names = [FIRST, SECOND][:num]
    assert shards.train == tuple((name, len(hub.files[name])) for name in names)
    for name in (*names, VAL):
        assert shards.path(name).read_bytes() == hub.files[name]
    assert sorted(hub.asked) == sorted((*names, VAL))
    assert f"{num} of 103 shards to train on" in capsys.readouterr().out


def test_a_shard_is_read_while_another_is_on_its_way(hub, tmp_path):
    hub.faults[SECOND] = ["wait"]
    shards = open_token_shards("fineweb10B", tokens=200_000_000, cache_dir=tmp_path, say=print)
    assert read_shard(shards.path(FIRST)).tokens.size == 101
    with pytest.raises(InterruptedError):
        shards.path(SECOND, lambda: True)
    hub.release.set()
    assert read_shard(shards.path(SECOND)).tokens.size == 102


def test_a_shard_that_does_not_come(hub, tmp_path):
    hub.faults[SECOND] = [404] * 99
    shards = open_token_shards("fineweb10B", tokens=200_000_000, cache_dir=tmp_path, say=print)
    with pytest.raises(UserError, match=f"{SECOND} of kjj0/fineweb10B-gpt2 cannot be fetched"):
        shards.path(SECOND)


def test_without_a_network_files_put_there_by_hand_are_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    options = {"tokens": 200_000_000, "cache_dir": tmp_path, "say": print}
    folder = tmp_path / "data" / "fineweb10B"
    with pytest.raises(UserError, match=f"put {FIRST}, {SECOND}, {VAL} of .*kjj0/fineweb10B-gpt2 into {folder}"):
        open_token_shards("fineweb10B", **options)
    folder.mkdir(parents=True)
    shards = open_token_shards(
        "fineweb10B", **{**options, "cache_dir": folder_of(folder, FIRST, SECOND, VAL).parents[1]}
    )
    assert shards.train == ((FIRST, 1026), (SECOND, 1028)) and shards.path(VAL) == folder / VAL


def test_the_files_of_the_hub_and_of_a_folder_are_one_data_set(hub, tmp_path):
    shards = open_token_shards("fineweb10B", tokens=200_000_000, cache_dir=tmp_path, say=print)
    folder = {shards.path(name).parent for name in (FIRST, SECOND, VAL)}.pop()
    again = open_(folder)
    assert (again.train, again.validation) == (shards.train, shards.validation)


def test_the_command_fetches_them_too(hub, tmp_path):
    main(["fineweb10B", "--shards", "2", "--cache-dir", str(tmp_path)])
    folder = tmp_path / "data" / "fineweb10B"
    assert sorted(p.name for p in folder.glob("*.bin")) == [FIRST, SECOND, VAL]
    assert json.loads((folder / "shards.json").read_text())["repo"] == "kjj0/fineweb10B-gpt2"


# made up


def made_up(folder, **options):
    defaults = {"train_shards": 3, "tokens_per_shard": 40_000, "val_tokens": 30_000, "vocab_size": 100, "seed": 1}
    synthetic(folder, **{**defaults, **options})
    return open_(folder)


def test_made_up_shards_are_as_asked_for(tmp_path):
    shards = made_up(tmp_path, bos=99)
    val = read_shard(tmp_path / shards.validation, bos=99, vocab_size=100)
    train = [read_shard(tmp_path / name, bos=99, vocab_size=100) for name, _ in shards.train]
    assert shards.tokens_per_shard == [40_000] * 3 == [t.tokens.size for t in train] and val.tokens.size == 30_000
    assert val.starts[0] == train[0].starts[0] == 0
    assert train[1].starts[0] > 0  # a document goes on
    stream = np.concatenate([t.tokens for t in train])
    lengths = np.diff(np.flatnonzero(stream == 99))
    # 120,000 tokens in documents of 30,000 / 64, as FineWeb's are spread: 256 of them, +- 20 %
    assert 0.8 * 256 < lengths.size + 1 < 1.2 * 256 and lengths.min() >= 469 * 32 // 690
    assert 0.8 * 403 / 690 < np.median(lengths) / lengths.mean() < 1.2 * 403 / 690


def test_made_up_text_is_that_of_its_seed_and_has_something_to_learn(tmp_path):
    names = [name for name, _ in made_up(tmp_path / "a").train]
    made_up(tmp_path / "b")
    made_up(tmp_path / "c", seed=2)
    same, other = ([(tmp_path / x / n).read_bytes() == (tmp_path / "a" / n).read_bytes() for n in names] for x in "bc")
    assert all(same) and not any(other)
    first, second = (read_shard(tmp_path / "a" / name).tokens for name in names[:2])
    assert not np.array_equal(first, second)
    assert (first != BOS).sum() == (first < 100).sum() and np.unique(first).size == 101
    assert np.bincount(first, minlength=100)[:100].min() > 300  # of 400 on average
    # what follows what: 1.21 nats, of 4.6 that a token has without its predecessor
    pairs = np.zeros((101, 101))
    for tokens in (first, second):
        np.add.at(pairs, (np.minimum(tokens[:-1], 100).astype(int), np.minimum(tokens[1:], 100).astype(int)), 1)
    pairs = pairs[:100, :100]
    rows = pairs.sum(1)
    p = pairs / rows[:, None]
    entropy = -(rows / rows.sum()) @ (p * np.log(np.where(p > 0, p, 1))).sum(1)
    assert 1.0 < entropy < 1.22


@pytest.mark.parametrize(
    "options", [{"tokens_per_shard": 4}, {"train_shards": 0}, {"mean_tokens": 1.0}, {"mean_tokens": 9e9}]
)
def test_made_up_text_of_no_size(tmp_path, options):
    with pytest.raises(UserError, match="expected a shard or more, of at least 4 documents"):
        made_up(tmp_path, **options)
    assert not os.listdir(tmp_path)
