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

from core.data import files, sources
from core.data.corpus import Corpus, open_corpus, open_validation
from core.data.files import hash_key
from core.evals.bits_per_byte import documents_within
from eval import main as eval_main
from train import main as train_main

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
    assert len(documents) + sum(train.skipped.values()) == sum(
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
    assert train.skipped == val.skipped == {"empty files": 1, "hidden files or folders": 2}
    assert train.notes == ["skipped in the data: empty files (1), hidden files or folders (2)"]
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
    monkeypatch.setattr(sources, "_RECENT_BYTES", 1)
    path = write_parquet(tmp_path / "a.parquet", TEXTS, 4)
    train, val = open_(path, tmp_path)
    assert by_key(train, val) == {f"a.parquet:{i}": text for i, text in enumerate(TEXTS)}
    recent = train._sources[0]._recent
    assert len(recent._values) == 2
    assert recent._num_bytes == sum(column.nbytes for column in recent._values.values())


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
    monkeypatch.setattr(sources, "CHUNK_BYTES", 37)
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert by_key(*open_(path, tmp_path)) == {f"a.jsonl:{i}": text for i, text in enumerate(TEXTS)}


@pytest.mark.parametrize("chunk", range(1, 14))
def test_blank_lines_and_characters_across_read_chunks(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(sources, "CHUNK_BYTES", chunk)
    text = "é\U0001f600" * 5
    record = json.dumps({"text": text}, ensure_ascii=False).encode()
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl").write_bytes(record + b"\r\n\r\n" + record + b"\n\n\r\n" + b"\r\n" + record)
    (data / "b.txt").write_text(text, encoding="utf-8")
    documents = by_key(*open_(data, tmp_path, val_every=2))
    assert documents == {"a.jsonl:0": text, "a.jsonl:2": text, "a.jsonl:6": text, "b.txt": text}
    (data / "b.txt").write_bytes(text.encode() + b"a\xffa")
    with pytest.raises(ValueError, match=f"b.txt: not UTF-8 .byte 0xff at offset {len(text.encode()) + 1}:"):
        open_(data, tmp_path, val_every=2)


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
    other = open_(folder, tmp_path, seed=1)  # nor does the seed have a say
    assert [by_key(corpus).keys() for corpus in other] == [by_key(corpus).keys() for corpus in (train, val)]


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


def test_orders_in_use_are_kept(tmp_path):
    train, _ = open_(write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path)
    for epoch in range(1, 6):
        orders = [train.order(epoch - 1), train.order(epoch)]
        assert train.order(epoch - 1) is orders[0] and train.order(epoch) is orders[1]


def test_what_was_read_last_is_kept(monkeypatch):
    monkeypatch.setattr(sources, "_RECENT_BYTES", 30)
    recent, decoded = sources.Recent(), []

    def get(number):
        return recent.get("file", number, lambda: decoded.append(number) or bytes(10))

    for number in (1, 2, 3, 1, 4, 1, 3, 2):  # 4 takes the place of 2, which was used longest ago
        get(number)
    assert decoded == [1, 2, 3, 4, 2]


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


# -- one document, and long ones ---------------------------------------------------------------------------------------

LINES = "".join(f"line {i} of a book, with wörds in it\n" for i in range(500))


def as_text(path: Path, texts: list[str]) -> Path:
    path.mkdir()
    for i, text in enumerate(texts):
        (path / f"{i}.txt").write_text(text, encoding="utf-8")
    return path


WRITERS = {
    "text": as_text,
    "jsonl": lambda path, texts: write_jsonl(path.with_suffix(".jsonl"), texts),
    "gzip": lambda path, texts: write_jsonl(path.with_suffix(".json.gz"), texts, "gzip"),
    "parquet": lambda path, texts: write_parquet(path.with_suffix(".parquet"), texts),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("long", [False, True])
def test_one_document_is_split_by_position(tmp_path, monkeypatch, write, long):
    """Its end is validation, the same bytes in every format, whether it is read in parts or not."""
    text = LINES
    if long:
        monkeypatch.setattr(sources, "LONG_BYTES", 1000)
        text *= 40
    path = write(tmp_path / "book", [text])
    train, val = open_(path, tmp_path, row_tokens=16, val_every=3)
    assert "".join(train[i] for i in range(len(train))) + "".join(val) == text
    assert (len(train) > 3 and len(val) > 2) == long
    size = sum(val.num_bytes(i) for i in range(len(val)))
    assert size == len("".join(val).encode())
    total = len(text.encode())
    assert total / 3 <= size < total / 3 + 50  # to the line before
    assert val[0].startswith("line ")
    assert train.notes[0] == val.notes[0]
    assert f"its last {size:,} of {total:,} bytes are validation" in train.notes[0]
    assert train.fingerprint != val.fingerprint
    # other parts are other documents to the tokenizer and to the state of a loader
    assert (open_(path, tmp_path, row_tokens=160, val_every=3)[0].fingerprint != train.fingerprint) == long


def test_split_by_position_leaves_a_row_for_validation(tmp_path):
    path = as_text(tmp_path / "a", [LINES])
    _, val = open_(path, tmp_path, row_tokens=1000, val_every=10**9)
    assert 4000 <= val.num_bytes(0) < 4050
    with pytest.raises(ValueError) as error:
        open_(path, tmp_path, row_tokens=10_000)
    one_sentence(error, "a single document", "too few to split by position", "80,000", "--seq-len")


@pytest.mark.parametrize("text", ["x" * 5000, "wörds and " * 1000, "\U0001f600" * 2000])
def test_a_cut_is_before_a_word_or_at_least_a_character(tmp_path, text):
    train, val = open_(as_text(tmp_path / "a", [text]), tmp_path, row_tokens=16, val_every=7)
    assert train[0] + val[0] == text
    if " " in text:
        assert train[0].endswith(" ")


def test_a_few_books_are_split_by_position_too(tmp_path):
    """Where the hash of their paths leaves none for validation."""
    books = [LINES, LINES.upper(), "a small last one\n"]
    train, val = open_(as_text(tmp_path / "a", books), tmp_path, row_tokens=16, val_every=1000)
    assert "".join([*train, *val]) == "".join(books)
    assert [val.key(i).split("[")[0] for i in range(len(val))] == ["1.txt", "2.txt"]
    assert "all 3 documents" in train.notes[0]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_long_documents_are_read_in_parts(tmp_path, monkeypatch, write):
    texts = [LINES, "short", LINES * 20, *TEXTS]
    path = write(tmp_path / "a", texts)
    whole = open_(path, tmp_path)
    monkeypatch.setattr(sources, "LONG_BYTES", 100_000)
    cut = open_(path, tmp_path, row_tokens=16)
    parts = [c for c in cut if any("[" in c.key(i) for i in range(len(c)))]
    assert len(parts) == 1  # a document stays on one side of the split
    for a, b in zip(whole, cut):
        assert "".join(a) == "".join(b)
    lengths = [parts[0].num_bytes(i) for i in range(len(parts[0])) if "[" in parts[0].key(i)]
    assert len(lengths) > 5
    assert max(lengths) < 80_000
    np.testing.assert_array_equal(np.sort(parts[0].order(0)), np.arange(len(parts[0])))


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_document_is_long_from_one_byte_on(tmp_path, monkeypatch, write):
    monkeypatch.setattr(sources, "LONG_BYTES", 1000)
    texts = ["x" * (1000 + i % 2) for i in range(40)]
    for corpus in open_(write(tmp_path / "a", texts), tmp_path):
        for i in range(len(corpus)):
            assert corpus.key(i).endswith("[0:1001]") == (len(corpus[i]) == 1001)


def test_parts_of_a_row_stay_together_in_the_order_and_those_of_a_file_do_not(tmp_path, monkeypatch):
    """A row is decoded as a whole for each of its parts; a part of a file is read by itself, and mixes better so."""
    monkeypatch.setattr(sources, "LONG_BYTES", 100_000)

    def runs(path: Path) -> int:
        train, _ = open_(path, tmp_path, row_tokens=16, val_every=1000)
        rows = [train.key(i).split("[")[0] for i in train.order(0)]
        return len(list(groupby(rows)))

    texts = [LINES * 20, LINES * 21, LINES * 22]
    assert runs(write_jsonl(tmp_path / "a.jsonl", texts)) == 3
    assert runs(write_parquet(tmp_path / "a.parquet", texts, 1)) == 3
    assert runs(as_text(tmp_path / "texts", texts)) > 3


def test_what_was_not_trained_on_is_scored_whole_if_it_is_one_document(tmp_path, folder):
    options = {"seed": 0, "val_every": 5, "cache_dir": tmp_path, "row_tokens": 16}
    book = as_text(tmp_path / "book", ["tiny"])
    assert list(open_validation(str(book / "0.txt"), **options)) == ["tiny"]
    _, val = open_(folder, tmp_path)
    assert list(open_validation(str(folder), **options)) == list(val)


def test_train_and_score_one_file(tiny, tmp_path, capsys):
    path = tmp_path / "input.txt"
    path.write_text(LINES, encoding="utf-8")
    train_main([*tiny, "--steps", "2", "--data", str(path), "--out", str(tmp_path / "run")])
    assert "the data is one document: its last" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    scores = {}
    for data in ([], ["--data", str(path)], ["--data", str(as_text(tmp_path / "other", [LINES]))]):
        eval_main([str(tmp_path / "run"), "--metrics", "bpb", "--json", *data])
        scores[len(data) and data[1]] = json.loads(capsys.readouterr().out)
    assert scores[0]["val_bpb"] == scores[str(path)]["val_bpb"] == summary["val_bpb"]
    assert scores[str(tmp_path / "other")]["val_bytes"] == len(LINES.encode())


# -- folders written by others -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, codec",
    [
        ("A.JSONL", None),
        ("a.ndjson", None),
        ("a.Json", None),
        ("a.json.gz", "gzip"),
        ("A.NDJSON.GZ", "gzip"),
        ("a.json.zst", "zstd"),
        ("a.jsonl.bz2", "bz2"),
    ],
)
def test_an_object_a_line_by_any_name(tmp_path, name, codec):
    path = write_jsonl(tmp_path / name, TEXTS, codec)
    assert by_key(*open_(path, tmp_path)) == {f"{name}:{i}": text for i, text in enumerate(TEXTS)}


def test_names_of_a_runs_files_are_ordinary_where_there_is_no_run(folder, tmp_path):
    (folder / "report.md").write_text("a report")
    assert by_key(*open_(folder, tmp_path))["report.md"] == "a report"


def test_case_of_the_parquet_suffix_does_not_matter(tmp_path):
    assert len(by_key(*open_(write_parquet(tmp_path / "A.Parquet", TEXTS), tmp_path))) == len(TEXTS)


def test_what_holds_no_documents_is_skipped_counted_and_said(folder, tmp_path):
    expected = by_key(*open_(folder, tmp_path))
    fingerprint = open_(folder, tmp_path)[0].fingerprint
    for name in ("_SUCCESS", "_common_metadata", "_metadata", "_committed_12", "sub/_SUCCESS"):
        (folder / name).write_bytes(b"PAR1")
    (folder / ".part-0.parquet.crc").write_bytes(b"crc")
    for name in ("a.csv", "b.TSV", "x.safetensors", "pytorch_model.bin", "p.png", "z.ZIP", "plain.txt.gz", "n.ipynb"):
        (folder / name).write_bytes(b"\x00\xff")
    (folder / "array.json").write_text('[{"text": "a"}]')
    (folder / "package.json").write_text('{\n  "name": "x"\n}\n')
    (folder / "one_line.json").write_text('{"name": "x"}')
    (folder / "unknown").write_bytes(b"\x7fELF\x02\x01")
    (folder / "dump.dat").write_bytes(np.arange(100, dtype=np.int32).tobytes())
    (folder / "empty.jsonl").write_text("\n")
    train, _ = documents = open_(folder, tmp_path)
    assert by_key(*documents) == expected
    assert train.skipped == {
        "markers of Spark jobs": 5,
        "hidden files or folders": 1,
        "tables": 2,
        "weights and arrays": 2,
        "images, sound and video": 1,
        "archives": 2,
        "notebooks": 1,
        "JSON files without an object a line": 3,
        "binary files": 2,
        "empty files": 1,
    }
    assert "tables (2)" in train.notes[0]
    assert train.fingerprint == fingerprint  # what is not read does not count


def test_a_run_and_the_cache_inside_the_data_are_no_data(folder, tmp_path, tiny):
    expected = by_key(*open_(folder, tmp_path))
    options = [*tiny, "--steps", "2", "--data", str(folder), "--cache-dir", str(folder / "cache")]
    train_main([*options, "--out", str(folder / "runs" / "x")])
    train_main([*options, "--out", str(folder)])
    train_main(["--resume", str(folder / "runs" / "x"), "--steps", "3"])
    documents = open_(folder, tmp_path, cache_dir=folder / "cache")
    assert by_key(*documents) == expected
    assert documents[0].skipped["files or folders of a run"] == 16  # "owner" of both runs among them


@pytest.mark.parametrize(
    "name, content, parts",
    [
        ("a.csv", b"a,b\n1,2\n", ["tables are not read", ".jsonl"]),
        ("a.json", b' [\n{"text": "a"}]', ["JSON files without an object a line"]),
        ("a.json", b'{\n"text": "a"}', ["JSON files without an object a line"]),
        ("a.json", b'{"text": "a",\n"id": 1}', ["JSON files without an object a line"]),
        ("a.txt.gz", gzip.compress(b"text", mtime=0), ["archives", "unpack it"]),
        ("a.pdf", b"%PDF-", ["office documents", "convert it"]),
        ("a.txt", b"PK\x03\x04", ["binary files"]),
        ("a.txt", "text".encode("utf-16-be"), ["binary files"]),
        ("a.txt", b"", ["empty files"]),
        ("a.jsonl", b"\n\r\n", ["empty files"]),
    ],
)
def test_named_alone_it_is_refused(tmp_path, name, content, parts):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        open_(tmp_path / name, tmp_path)
    one_sentence(error, str(tmp_path / name), "nothing to train on", *parts)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.json.gz"])
def test_git_lfs_pointers_are_refused(folder, tmp_path, name):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(ValueError) as error:
        open_(folder, tmp_path)
    one_sentence(error, name, "Git LFS pointer", "git lfs pull")


def test_a_folder_of_nothing_but_other_files_says_so(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.csv").write_text("a,b")
    with pytest.raises(ValueError) as error:
        open_(tmp_path / "data", tmp_path)
    one_sentence(error, "no documents found", "tables (1)")


def test_parquet_oddities(folder, tmp_path):
    twice = pa.Table.from_arrays([pa.array(TEXTS), pa.array(TEXTS)], names=["text", "text"])
    pq.write_table(twice, folder / "twice.parquet")
    with pytest.raises(ValueError) as error:
        open_(folder, tmp_path)
    one_sentence(error, "twice.parquet", '2 columns "text"')


@pytest.mark.parametrize("side", ["to train on", "of the validation split"])
def test_a_side_without_a_byte_is_refused(tmp_path, side):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    _, val = open_(path, tmp_path)
    in_val = {int(val.key(i).split(":")[1]) for i in range(len(val))}
    empty = in_val if "validation" in side else set(range(len(TEXTS))) - in_val
    write_jsonl(path, ["" if i in empty else text for i, text in enumerate(TEXTS)])
    with pytest.raises(ValueError) as error:
        open_(path, tmp_path)
    one_sentence(error, str(path), side, f"are all empty ({len(empty)} of them)")


def test_documents_within_skips_no_text_after_an_empty_document(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["", *TEXTS])
    corpus = open_validation(str(path), seed=0, val_every=1, cache_dir=tmp_path, row_tokens=16)
    assert sum(len(text) for _, text in documents_within(corpus, 1)) > 0


# -- size and trust ----------------------------------------------------------------------------------------------------


def test_many_files_are_one_source_and_read_once(tmp_path, monkeypatch):
    texts = [f"text {i}" for i in range(500)]
    path = as_text(tmp_path / "a", texts)
    hashed = []
    monkeypatch.setattr(sources, "hash_key", lambda key: hashed.append(key) or hash_key(key))
    train, val = open_(path, tmp_path)
    assert len(train._sources) == 1
    assert len(hashed) == 500
    assert sorted([*train, *val]) == sorted(texts)


def test_progress_is_said_when_reading_takes_long(folder, tmp_path, monkeypatch):
    said = []
    open_(folder, tmp_path, progress=said.append)
    assert said == []
    monkeypatch.setattr(files, "_SAYS_EVERY_S", 0.0)
    open_(folder, tmp_path, progress=said.append)
    assert said[-1].startswith("reading data: ") and "of 14 files" in said[-1]


@pytest.mark.parametrize("damage", ["flip", "shorten", "empty"])
def test_a_damaged_unpacked_file_is_unpacked_again(tmp_path, damage):
    path = write_jsonl(tmp_path / "a.jsonl.gz", TEXTS, "gzip")
    expected = by_key(*open_(path, tmp_path))
    (plain,) = (tmp_path / "cache" / "unpacked").iterdir()
    sound = plain.read_bytes()
    spoilt = {"flip": sound.replace(b"document", b"d0cument", 1), "shorten": sound[: len(sound) // 2], "empty": b""}
    plain.write_bytes(spoilt[damage])
    said = []
    assert by_key(*open_(path, tmp_path, progress=said.append)) == expected
    assert "damaged" in said[0] and str(path) in said[0]
    assert plain.read_bytes() == sound


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_change_in_the_middle_of_a_large_file_is_noticed(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    text = LINES * 200
    if suffix == ".txt":
        path.write_text(text, encoding="utf-8")
    elif suffix == ".jsonl":
        write_jsonl(path, [text])
    else:
        pq.write_table(pa.table({"text": [text]}), path, compression="none", use_dictionary=False)
    before = open_(path, tmp_path)[0].fingerprint
    assert open_(path, tmp_path)[0].fingerprint == before
    data = path.read_bytes()
    middle = data.index(b"book", len(data) // 2)
    stat = path.stat()
    path.write_bytes(data[:middle] + b"b00k" + data[middle + 4 :])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert open_(path, tmp_path)[0].fingerprint != before


def test_a_digest_is_remembered_only_of_the_file_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_REMEMBERED_BYTES", 10)
    path = tmp_path / "a.parquet"

    def digest() -> str:
        return files.digest_of(str(path), tmp_path, files.Progress(None))

    path.write_bytes(b"a" * 100)
    assert digest() == hashlib.sha256(b"a" * 100).hexdigest()
    assert not (tmp_path / "digests").exists()  # the file is so new that a change might not show in its times
    monkeypatch.setattr(files, "_SETTLED_S", -1000.0)
    digest()
    (note,) = (tmp_path / "digests").iterdir()
    note.write_text(json.dumps({**json.loads(note.read_text()), "sha256": "0" * 64}))
    assert digest() == "0" * 64
    stat = path.stat()
    path.write_bytes(b"b" * 100)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert digest() == hashlib.sha256(b"b" * 100).hexdigest()
    for damaged in ('{"file": [', json.dumps({"sha256": "0" * 64}), json.dumps({"file": [], "sha256": "0"}), "[]"):
        note.write_text(damaged)
        assert digest() == hashlib.sha256(b"b" * 100).hexdigest()


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


def test_a_pipe_is_no_data(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError) as error:
        open_(tmp_path / "pipe", tmp_path)
    one_sentence(error, "pipe", "is a pipe or a device, expected a file or a folder")


def test_broken_link(folder, tmp_path):
    (folder / "x.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError) as error:
        open_(folder, tmp_path)
    one_sentence(error, "x.txt", "cannot be read")


def test_text_that_is_not_utf8(folder, tmp_path):
    (folder / "x.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError) as error:
        open_(folder, tmp_path)
    one_sentence(error, "x.txt", "not UTF-8", "0xff at offset 3", "remove it")


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


def test_a_text_that_grows_or_breaks_while_in_use_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONG_BYTES", 1000)
    path = tmp_path / "book.txt"
    book = b"a word and another\n" * 20_000
    path.write_bytes(book)
    train, val = open_(path, tmp_path, row_tokens=16)
    part = next(i for i in range(len(train)) if not train.key(i).startswith("book.txt[0:"))
    at = int(train.key(part).split("[")[1].split(":")[0]) + 5
    path.write_bytes(book[:at] + b"\xff" + book[at + 1 :])
    with pytest.raises(ValueError, match=f"book.txt: not UTF-8 .byte 0xff at offset {at}:"):
        train[part]
    path.write_bytes(book + b"more\n")
    for corpus in (train, val):
        with pytest.raises(ValueError, match=f"changed while in use, from {len(book):,} to {len(book) + 5:,} bytes"):
            corpus[0]


def test_the_cache_inside_the_data_is_not_read(folder, tmp_path):
    write_jsonl(folder / "c.jsonl.gz", TEXTS[:9], "gzip")
    (folder / "cache" / "tokenizers").mkdir(parents=True)
    (folder / "cache" / "tokenizers" / "note.txt").write_text("no document")
    first = open_(folder, tmp_path, cache_dir=folder / "cache")
    assert list((folder / "cache" / "unpacked").iterdir())
    again = open_(folder, tmp_path, cache_dir=folder / "cache")
    assert by_key(*again) == by_key(*first) and not any("cache" in key for key in by_key(*again))
    assert again[0].fingerprint == first[0].fingerprint


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
    with pytest.raises(ValueError) as error:
        by_key(*open_(path, tmp_path))
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
