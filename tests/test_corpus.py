"""Documents: exact bytes, a split and an order that depend on nothing they should not, and one clear sentence per
fault."""

import gzip
import hashlib
import json
import os
import sysconfig
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.data import corpus as corpus_module
from core.data.corpus import Corpus, open_corpus

TEXTS = [f"document {i} " + "héllo wörld \U0001f600 " * (i % 7) for i in range(60)]


def write_jsonl(path: Path, texts: list[str], codec: str | None = None) -> Path:
    data = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()
    with pa.OSFile(str(path), "wb") as raw:
        if codec is None:
            raw.write(data)
        else:
            with pa.CompressedOutputStream(raw, codec) as out:
                out.write(data)
    return path


def write_parquet(path: Path, texts, row_group_size: int = 8, kind=None) -> Path:
    pq.write_table(pa.table({"text": pa.array(texts, kind)}), path, row_group_size=row_group_size)
    return path


def open_(data, tmp_path: Path, **options) -> tuple[Corpus, Corpus]:
    return open_corpus(str(data), **{"seed": 0, "val_every": 5, "cache_dir": tmp_path / "cache", **options})


def by_key(*corpora: Corpus) -> dict[str, str]:
    return {c.key(i): c[i] for c in corpora for i in range(len(c))}


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", TEXTS[:20])
    write_parquet(folder / "sub" / "b.parquet", TEXTS)
    for i in range(12):
        (folder / "sub" / f"{i}.txt").write_text(TEXTS[i], encoding="utf-8")
    return folder


# -- what is read -----------------------------------------------------------------------------------------------------


def test_stdlib_is_the_source_of_the_base_interpreter(tmp_path):
    train, val = open_("stdlib", tmp_path, val_every=50)
    documents = by_key(train, val)
    root = Path(sysconfig.get_paths()["stdlib"])
    assert documents["json/decoder.py"].encode() == (root / "json/decoder.py").read_bytes()
    assert len(documents) > 500
    assert not any("site-packages" in key or "__pycache__" in key for key in documents)
    assert all(key.endswith(".py") for key in documents)
    for corpus in (train, val):
        keys = [corpus.key(i) for i in range(len(corpus))]
        assert keys == sorted(keys)
        assert all(len(document) > 0 for document in corpus)
    assert len(documents) + train.skipped == sum(
        not {"site-packages", "dist-packages"} & set(path.relative_to(root).parts) for path in root.rglob("*.py")
    )


def test_folder_mixes_formats_and_skips_what_is_hidden(folder, tmp_path):
    (folder / ".hidden.txt").write_text("no")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("no")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.py").write_text("no")
    (folder / "empty.txt").write_text("")
    train, val = open_(folder, tmp_path)
    expected = {f"a.jsonl:{i}": TEXTS[i] for i in range(20)}
    expected |= {f"sub/b.parquet:{i}": text for i, text in enumerate(TEXTS)}
    expected |= {f"sub/{i}.txt": TEXTS[i] for i in range(12)}
    assert by_key(train, val) == expected
    assert train.skipped == val.skipped == 1
    assert train.name == "data"


def test_links_are_followed_and_cycles_end(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "linked.txt").write_text("linked")
    (folder / "link").symlink_to(outside)
    (outside / "back").symlink_to(folder)
    assert "link/linked.txt" in by_key(*open_(folder, tmp_path))


@pytest.mark.parametrize("codec, suffix", [(None, ".jsonl"), ("gzip", ".jsonl.gz"), ("zstd", ".jsonl.zst")])
def test_jsonl_round_trip(tmp_path, codec, suffix):
    path = write_jsonl(tmp_path / f"a{suffix}", TEXTS, codec)
    for _ in range(2):  # the second time from the cache of unpacked files
        documents = by_key(*open_(path, tmp_path))
        assert documents == {f"a{suffix}:{i}": text for i, text in enumerate(TEXTS)}
    if codec is not None:
        unpacked = list((tmp_path / "cache" / "unpacked").iterdir())
        assert [p.suffix for p in unpacked] == [".jsonl"]


def test_gzip_of_several_members(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b"".join(gzip.compress(json.dumps({"text": text}).encode() + b"\n") for text in TEXTS))
    assert len(by_key(*open_(path, tmp_path))) == len(TEXTS)


def test_changed_compressed_file_is_unpacked_again(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl.gz", TEXTS, "gzip")
    open_(path, tmp_path)
    write_jsonl(path, TEXTS[::-1], "gzip")
    assert by_key(*open_(path, tmp_path))["a.jsonl.gz:0"] == TEXTS[-1]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_round_trip(tmp_path, kind):
    path = write_parquet(tmp_path / "a.parquet", TEXTS, 7, kind)
    assert by_key(*open_(path, tmp_path)) == {f"a.parquet:{i}": text for i, text in enumerate(TEXTS)}


def test_parquet_cache_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "_ROW_GROUP_CACHE_BYTES", 1)
    path = write_parquet(tmp_path / "a.parquet", TEXTS, 4)
    train, val = open_(path, tmp_path)
    assert by_key(train, val) == {f"a.parquet:{i}": text for i, text in enumerate(TEXTS)}
    row_groups = train._sources[0]._row_groups
    assert len(row_groups._columns) == 2
    assert row_groups._num_bytes == sum(column.nbytes for column in row_groups._columns.values())


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbfbom", b"a\r\nb\rc\n\n", "ä\u2028\x00\U0001f600".encode(), b"\n", b" "]
)
def test_text_bytes_are_preserved(tmp_path, content):
    (tmp_path / "data").mkdir()
    for i in range(20):
        (tmp_path / "data" / f"{i}.txt").write_bytes(content)
    train, val = open_(tmp_path / "data", tmp_path)
    assert {text.encode() for text in [*train, *val]} == {content}
    assert train.num_bytes(0) == len(content)


def test_jsonl_lines_as_editors_leave_them(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}).encode() for text in TEXTS]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines[:30]) + b"\r\n\r\n\n" + b"\n".join(lines[30:]))
    documents = by_key(*open_(path, tmp_path))
    assert list(documents.values()).count(TEXTS[0]) == 1
    # two blank lines have numbers but are no documents
    assert documents == {f"a.jsonl:{i if i < 30 else i + 2}": text for i, text in enumerate(TEXTS)}


def test_lines_across_read_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "_CHUNK_BYTES", 37)
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert by_key(*open_(path, tmp_path)) == {f"a.jsonl:{i}": text for i, text in enumerate(TEXTS)}


def test_num_bytes_is_that_of_the_text(folder, tmp_path):
    for corpus in open_(folder, tmp_path):
        assert [corpus.num_bytes(i) for i in range(len(corpus))] == [len(text.encode()) for text in corpus]


# -- split, order, fingerprint ----------------------------------------------------------------------------------------


def test_split_is_the_hash_of_the_key(folder, tmp_path):
    train, val = open_(folder, tmp_path)
    for corpus, in_validation in ((train, False), (val, True)):
        for i in range(len(corpus)):
            value = int(hashlib.sha256(corpus.key(i).encode()).hexdigest(), 16)
            assert (value % 5 == 0) is in_validation


def test_order_is_a_permutation_of_seed_and_epoch(folder, tmp_path):
    train, _ = open_(folder, tmp_path)
    orders = [train.order(epoch).copy() for epoch in range(6)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(len(train)))
    assert len({order.tobytes() for order in orders}) == 6
    again, _ = open_(folder, tmp_path)
    for epoch in reversed(range(6)):
        np.testing.assert_array_equal(again.order(epoch), orders[epoch])
    other, _ = open_(folder, tmp_path, seed=1)
    assert not np.array_equal(other.order(0), orders[0])


def test_order_is_the_same_everywhere(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:12])
    assert open_(path, tmp_path)[0].order(3).tolist() == [8, 9, 4, 3, 6, 2, 5, 7, 1, 0]


def test_order_reads_each_row_group_once(tmp_path):
    train, _ = open_(write_parquet(tmp_path / "a.parquet", TEXTS, 8), tmp_path)
    rows = [int(train.key(i).split(":")[1]) for i in train.order(0)]
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row // 8)]
    numbers = [group[0] // 8 for group in groups]
    assert len(numbers) == len(set(numbers))
    assert numbers != sorted(numbers)
    assert any(group != sorted(group) for group in groups)


def test_fingerprint(folder, tmp_path):
    train, val = open_(folder, tmp_path)
    assert train.fingerprint != val.fingerprint
    os.utime(folder / "a.jsonl", (1, 1))
    assert open_(folder, tmp_path, seed=9)[0].fingerprint == train.fingerprint

    seen = {train.fingerprint, open_(folder, tmp_path, val_every=4)[0].fingerprint}
    (folder / "sub" / "0.txt").rename(folder / "sub" / "zero.txt")
    seen.add(open_(folder, tmp_path)[0].fingerprint)
    (folder / "sub" / "1.txt").write_text(TEXTS[1].replace("d", "D"), encoding="utf-8")
    seen.add(open_(folder, tmp_path)[0].fingerprint)
    (folder / "sub" / "2.txt").unlink()
    seen.add(open_(folder, tmp_path)[0].fingerprint)
    assert len(seen) == 5


# -- faults: one sentence that names the file -------------------------------------------------------------------------


def one_sentence(error: pytest.ExceptionInfo, *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_missing_path(tmp_path):
    with pytest.raises(ValueError) as error:
        open_(tmp_path / "nowhere", tmp_path)
    one_sentence(error, str(tmp_path / "nowhere"), "no such file or folder")


def test_broken_link(folder, tmp_path):
    (folder / "x.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError) as error:
        open_(folder, tmp_path)
    one_sentence(error, "x.txt", "cannot be read")


def test_text_that_is_not_utf8(folder, tmp_path):
    (folder / "x.bin").write_bytes(b"abc\xff")
    with pytest.raises(ValueError) as error:
        open_(folder, tmp_path)
    one_sentence(error, "x.bin", "not UTF-8", "0xff at offset 3", "remove it")


def test_text_that_changes_while_in_use(folder, tmp_path):
    train, _ = open_(folder, tmp_path)
    index = next(i for i in range(len(train)) if train.key(i).endswith(".txt"))
    path = folder / train.key(index)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=path.name):
        train[index]
    path.unlink()
    with pytest.raises(ValueError, match=path.name):
        train[index]


@pytest.mark.parametrize(
    "line, parts",
    [
        (b'{"text": "a"', ["not valid JSON"]),
        (b"[" * 100_000, ["not valid JSON"]),
        (b"  ", ["not valid JSON"]),
        (b'["text"]', ["a JSON list", "expected an object"]),
        (b'{"body": "a", "id": 1}', ['no "text" field', "'body', 'id'"]),
        (b'{"text": null}', ["null", "expected a string"]),
        (b'{"text": 3}', ["int", "expected a string"]),
        (b'{"text": "a\xff"}', ["not UTF-8", "0xff"]),
        (b'{"text": "a\\ud800b"}', ["lone surrogate \\ud800 at character 1"]),
    ],
)
def test_bad_jsonl_line(tmp_path, line, parts):
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"text": text}).encode() for text in TEXTS]
    path.write_bytes(b"\n".join([*good[:30], line, *good[30:]]) + b"\n")
    train, val = open_(path, tmp_path)
    with pytest.raises(ValueError) as error:
        by_key(train, val)
    one_sentence(error, f"{path}, line 31", *parts)


@pytest.mark.parametrize("codec, suffix", [("gzip", ".jsonl.gz"), ("zstd", ".jsonl.zst")])
@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_truncated_compressed_file(tmp_path, codec, suffix, keep):
    path = write_jsonl(tmp_path / f"a{suffix}", TEXTS, codec)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError) as error:
        open_(path, tmp_path)
    one_sentence(error, str(path), "truncated", "fetch it again")
    assert not list(tmp_path.glob("cache/unpacked/*"))


def test_truncated_parquet(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError) as error:
        open_(path, tmp_path)
    one_sentence(error, str(path), "fetch it again")


def test_damaged_parquet_pages(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", TEXTS, len(TEXTS))
    data = bytearray(path.read_bytes())
    data[4:200] = b"\xff" * 196
    path.write_bytes(data)
    train, val = open_(path, tmp_path)
    with pytest.raises(ValueError) as error:
        by_key(train, val)
    one_sentence(error, str(path), "rows 0 to 59", "fetch it again")


def test_parquet_without_text_column(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": TEXTS, "id": list(range(60))}), path)
    with pytest.raises(ValueError) as error:
        open_(path, tmp_path)
    one_sentence(error, str(path), 'no column "text"', "'body', 'id'")


def test_parquet_column_of_another_type(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", list(range(60)))
    with pytest.raises(ValueError) as error:
        open_(path, tmp_path)
    one_sentence(error, str(path), "int64", "expected string")


def test_parquet_null_and_bad_utf8_rows(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [*TEXTS[:13], None, *TEXTS[13:]])
    with pytest.raises(ValueError) as error:
        by_key(*open_(path, tmp_path))
    one_sentence(error, f"{path}, row 13", "null")

    bad = pa.array([text.encode() for text in TEXTS[:9]] + [b"\xed\xa0\x80"] + [b"x"] * 20, pa.binary())
    pq.write_table(pa.table({"text": bad.view(pa.string())}), path)
    with pytest.raises(ValueError) as error:
        by_key(*open_(path, tmp_path))
    one_sentence(error, f"{path}, row 9", "not UTF-8")


def test_empty_corpus_and_empty_splits(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError) as error:
        open_(tmp_path / "data", tmp_path)
    one_sentence(error, str(tmp_path / "data"), "no documents")
    (tmp_path / "data" / "a.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="no documents"):
        open_(tmp_path / "data", tmp_path)

    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:3])
    with pytest.raises(ValueError) as error:
        open_(path, tmp_path, val_every=10**9)
    one_sentence(error, str(path), "none of the 3 documents", "--val-every")
    with pytest.raises(ValueError) as error:
        open_(path, tmp_path, val_every=1)
    one_sentence(error, str(path), "all of the 3 documents", "--val-every")
    with pytest.raises(ValueError, match="val_every is 0"):
        open_(path, tmp_path, val_every=0)
