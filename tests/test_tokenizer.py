"""Tokenizer: encode and decode are inverse on every text, vocabularies are deterministic, and no damaged one is
used."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config import PRESETS, preset
from core.data import tokenizer as tokenizer_module
from core.data.corpus import open_corpus
from core.data.tokenizer import MIN_VOCAB_SIZE, SPECIAL_TOKENS, Tokenizer, get_tokenizer, train_tokenizer
from core.stopping import TrainingError
from tests.test_run import running

TEXTS = [
    f"def f{i}(self, value={i * 37}):\n    return value ** {i}  # the héllo \U0001f600\r\n" * 5 for i in range(300)
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 400)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return open_corpus(str(path), seed=0, cache_dir=tmp_path)[0]


text = st.text(st.characters(exclude_categories=["Cs"]))


@settings(max_examples=300, deadline=None)
@given(text | st.lists(st.sampled_from(["def f1(self", "  \n", "\r\n", "'ll", "1234", *SPECIAL_TOKENS])).map("".join))
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert all(0 <= i < tokenizer.bos_id for i in ids)
    assert tokenizer.encode_document(text).tolist() == [tokenizer.bos_id, *ids]
    assert tokenizer.encode_batch([text, "x", text], num_threads=1) == [ids, tokenizer.encode("x"), ids]


def test_vocabulary(tokenizer):
    assert tokenizer.vocab_size == 400
    assert tokenizer.bos_id == 400 - 9
    assert tokenizer.token_bytes.shape == (400,)
    assert tokenizer.token_bytes.dtype == np.int32
    assert tokenizer.token_bytes[:256].tolist() == [1] * 256
    assert tokenizer.token_bytes[-9:].tolist() == [0] * 9
    assert [tokenizer.decode([400 - 9 + i]) for i in range(9)] == list(SPECIAL_TOKENS)
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 3
    assert tokenizer.encode_document("a").dtype == np.uint16


def test_numbers_are_split_into_pairs_of_digits(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234567") if tokenizer.token_bytes[i] > 2] == []


def test_decode_of_half_a_character_and_of_no_token(tokenizer):
    assert tokenizer.decode(tokenizer.encode("é")[:1]) in ("é", "\ufffd")
    assert tokenizer.decode([0xC3]) == "\ufffd"
    assert tokenizer.decode(np.array([65, tokenizer.bos_id])) == "A<|bos|>"
    for bad in (400, -1):
        with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of 400"):
            tokenizer.decode([65, bad])


def test_endless_white_space_does_not_panic(tokenizer):
    text = "a" + " " * 2_500_000 + "b" + "\n" * 10
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_document(text)[1:].tolist() == ids
    assert tokenizer.encode_batch([text], num_threads=1) == [ids]


def test_training_is_deterministic_and_stops_where_told(tokenizer):
    again = train_tokenizer(iter(TEXTS), 400)
    assert again.digest == tokenizer.digest
    assert again._tokens == tokenizer._tokens
    assert tokenizer.trained_on["num_chars"] == sum(map(len, TEXTS))
    assert train_tokenizer(TEXTS, 400, max_chars=1000).trained_on["num_chars"] == 1000
    assert train_tokenizer(TEXTS, 400, doc_cap=7).trained_on["num_chars"] == 7 * len(TEXTS)
    assert train_tokenizer(TEXTS, 401).digest != tokenizer.digest
    cut = train_tokenizer(["abcabc" + "x" * 10] * 3, 300, doc_cap=6)
    assert cut._tokens == train_tokenizer(["abcabc"] * 3, 300)._tokens


def test_a_book_is_learned_from_to_its_end():
    book = "abc " * 5_000 + "zq9 " * 5_000  # the second half lies beyond any cap
    assert b" zq" in train_tokenizer([book], 300)._tokens
    assert b" zq" not in train_tokenizer([book], 300, doc_cap=10_000)._tokens


def test_only_the_protocols_cap_documents():
    """The gpt2 track's protocol does, and the committed score on the standard library was made so."""
    for name in PRESETS:
        assert preset(name, "cpu").data.doc_cap == 10_000
    own_text = dataclasses.replace(preset("quickstart", "cpu").data, path="book.txt")
    assert own_text.doc_cap is None
    assert dataclasses.replace(own_text, tokenizer_doc_chars=7).doc_cap == 7


def test_training_on_endless_white_space_does_not_panic():
    text = "abab" + " " * 2_500_000 + "abab"
    assert b"ab" in train_tokenizer([text], 300)._tokens


def test_small_corpus_gives_a_small_vocabulary():
    tokenizer = train_tokenizer(["aa"], 1000)
    assert tokenizer.vocab_size == MIN_VOCAB_SIZE + 1
    assert tokenizer.decode(tokenizer.encode("aab")) == "aab"


def test_smallest_vocabulary():
    assert train_tokenizer(TEXTS, MIN_VOCAB_SIZE).vocab_size == MIN_VOCAB_SIZE
    with pytest.raises(ValueError, match="vocab_size is 264, expected at least 265"):
        train_tokenizer(TEXTS, MIN_VOCAB_SIZE - 1)


def test_large_vocabulary_has_wider_ids():
    tokens = [bytes([i]) for i in range(256)] + [b"%05d" % i for i in range(66_000)]
    tokenizer = Tokenizer(tokens)
    document = tokenizer.encode_document("ab")
    assert document.dtype == np.uint32
    assert document.tolist() == [66_256, 97, 98]


def test_errors_of_the_texts_pass_through():
    def texts():
        yield "abc"
        raise ValueError("file x, line 3: bad")

    with pytest.raises(ValueError, match="file x, line 3: bad"):
        train_tokenizer(texts(), 300)


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    loaded = Tokenizer.load(tmp_path / "t")
    assert loaded.digest == tokenizer.digest
    assert loaded.trained_on == tokenizer.trained_on
    assert loaded.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["tokenizer.json", "tokenizer.tiktoken"]


def damage_rank(folder):
    path = folder / "tokenizer.tiktoken"
    path.write_text(path.read_text().replace(" 300\n", " 301\n"))


def damage_token(folder):
    path = folder / "tokenizer.tiktoken"
    path.write_text(path.read_text().replace("YQ== ", "Yg== "))


def truncate_ranks(folder):
    path = folder / "tokenizer.tiktoken"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-5]))


def garbage_ranks(folder):
    (folder / "tokenizer.tiktoken").write_bytes(b"\xff\x00")


def truncate_settings(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:40])


def settings_of_something_else(folder):
    (folder / "tokenizer.json").write_text("[]")


@pytest.mark.parametrize(
    "damage, file",
    [
        (damage_rank, "tokenizer.tiktoken"),
        (damage_token, "tokenizer.tiktoken"),
        (truncate_ranks, "tokenizer.tiktoken"),
        (garbage_ranks, "tokenizer.tiktoken"),
        (truncate_settings, "tokenizer.json"),
        (settings_of_something_else, "tokenizer.json"),
        (lambda folder: (folder / "tokenizer.tiktoken").unlink(), "tokenizer.tiktoken"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    ],
)
def test_damaged_files_are_refused(tokenizer, tmp_path, damage, file):
    tokenizer.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError) as error:
        Tokenizer.load(tmp_path)
    assert str(tmp_path / file) in str(error.value)
    assert "\n" not in str(error.value)


def test_cache(corpus, tmp_path):
    messages = []
    options = {"cache_dir": tmp_path, "on_train": messages.append}
    first = get_tokenizer(corpus, 300, **options)
    assert len(messages) == 1
    assert first.trained_on["fingerprint"] == corpus.fingerprint
    second = get_tokenizer(corpus, 300, **options)
    assert len(messages) == 1
    assert second.digest == first.digest
    get_tokenizer(corpus, 301, **options)
    get_tokenizer(corpus, 300, max_chars=5000, **options)
    get_tokenizer(corpus, 300, doc_cap=50, **options)
    assert len(messages) == 4
    assert len(list((tmp_path / "tokenizers").iterdir())) == 4


def test_half_written_cache_is_never_used(corpus, tmp_path, monkeypatch):
    def interrupted(path, content):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokenizer_module, "_write", interrupted)
        get_tokenizer(corpus, 300, cache_dir=tmp_path)
    assert list((tmp_path / "tokenizers").iterdir()) == []
    assert get_tokenizer(corpus, 300, cache_dir=tmp_path).vocab_size == 300


def test_another_split_pattern_is_another_tokenizer(corpus, tmp_path, monkeypatch):
    first = get_tokenizer(corpus, 400, cache_dir=tmp_path)
    monkeypatch.setattr(tokenizer_module, "SPLIT_PATTERN", r"\s?\S+|\s")
    second = get_tokenizer(corpus, 400, cache_dir=tmp_path)
    assert second.digest != first.digest and len(list((tmp_path / "tokenizers").iterdir())) == 2
    second.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").encode(TEXTS[0]) == second.encode(TEXTS[0]) != first.encode(TEXTS[0])


def test_the_vocabulary_is_the_one_of_before():
    """Digests made before training had a process of its own."""
    assert train_tokenizer(TEXTS, 400).digest == "a7f3e10415fbaf06"
    assert train_tokenizer(TEXTS, 1000, doc_cap=60).digest == "80a19de010a9d2b4"


ENDLESS = """
import base64, itertools, os, sys
from core.stopping import one_sentence
from core.starting import hear_signals
from core.data.tokenizer import train_tokenizer
hear_signals()
with one_sentence():
    def texts():
        for i in itertools.count() if sys.argv[1] == "reading" else range(1000):
            yield base64.b32encode(os.urandom(5000)).decode()
            if i == 20 and sys.argv[1] == "reading":
                print("here", flush=True)
        print("here", flush=True)
    train_tokenizer(texts(), 60000)
"""


@pytest.mark.parametrize(
    "where, signum", [("reading", signal.SIGINT), ("merging", signal.SIGTERM), ("merging", signal.SIGKILL)]
)
def test_a_signal_ends_training_at_once_and_its_process_with_it(where, signum):
    root = Path(tokenizer_module.__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, where],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        start_new_session=True,
    )
    assert parent.stdout.readline() == "here\n"
    (child,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert os.getsid(int(child)) == int(child)
    time.sleep(0.3)
    start = time.monotonic()
    os.killpg(parent.pid, signum)  # as a terminal does
    _, error = parent.communicate(timeout=60)
    while running(child):
        assert time.monotonic() < start + 3, "the process that trains outlives its parent"
        time.sleep(0.01)
    assert time.monotonic() < start + 3
    if signum == signal.SIGKILL:
        assert parent.returncode == -signum
    else:
        assert parent.returncode == 128 + signum and error == f"stopped by {signum.name}\n"


def test_a_training_process_that_dies_is_one_sentence(monkeypatch, tmp_path):
    def texts():
        yield "abc"
        children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        while True:
            yield "abc" * 10_000

    with pytest.raises(TrainingError, match="the process that trains the tokenizer ended by SIGKILL .was memory short"):
        train_tokenizer(texts(), 300)


def test_whoever_writes_the_cache_first_wins(corpus, tmp_path, monkeypatch):
    winner = get_tokenizer(corpus, 300, cache_dir=tmp_path)
    (folder,) = (tmp_path / "tokenizers").iterdir()
    hidden = folder.rename(tmp_path / "hidden")
    # the other process finishes while this one is training
    loser = get_tokenizer(corpus, 300, cache_dir=tmp_path, on_train=lambda message: hidden.rename(folder))
    assert loser is not winner
    assert loser.digest == winner.digest
    assert list((tmp_path / "tokenizers").iterdir()) == [folder]


def test_concurrent_callers_agree(corpus, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(get_tokenizer, corpus, 300, cache_dir=tmp_path) for _ in range(4)]
        digests = {future.result().digest for future in futures}
    assert len(digests) == 1
    assert len(os.listdir(tmp_path / "tokenizers")) == 1


def test_a_long_training_says_how_far_it_is(monkeypatch):
    monkeypatch.setattr("core.data.tokenizer._SAYS_EVERY_S", 0.0)
    said = []
    train_tokenizer(["some words " * 100_000] * 3, 300, max_chars=3_000_000, say=said.append)
    assert said == [f"the tokenizer has read {n} of at most 3 M characters" for n in (1, 2, 3)]
