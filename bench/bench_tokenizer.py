"""Encoding documents: `pytest bench/bench_tokenizer.py`.

What the loader calls, against tiktoken's lists of numbers and byte-pair encoding written out in Python.

Text: files of this Python's standard library; the vocabulary of 4096 is trained on other files of it.
"""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import regex

from bench.suite import HostPrograms, host_item
from core.config import DOC_CHARS, STDLIB
from core.data.corpus import open_corpus
from core.data.tokenizer import SPLIT_PATTERN, Tokenizer, train_tokenizer

VOCAB_SIZE = 4096
TRAIN_CHARS = 2_000_000
TEXT_CHARS = 60_000


def plain(tokenizer: Tokenizer, ranks: dict[bytes, int], text: str) -> list[int]:
    """Of each piece, the pair of neighbours that was merged first is merged first."""
    ids = []
    for piece in regex.findall(SPLIT_PATTERN, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while len(parts) > 1:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
            i = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[i] == len(ranks):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return [tokenizer.bos_id, *ids]


@contextmanager
def programs():
    train, val = open_corpus(STDLIB, seed=0, cache_dir=Path())  # nothing there is compressed
    tokenizer = train_tokenizer(iter(train), VOCAB_SIZE, max_chars=TRAIN_CHARS, doc_cap=DOC_CHARS)
    text = ""
    for document in val:
        text += document
        if len(text) > TEXT_CHARS:
            break
    text = text[:TEXT_CHARS]
    special = tokenizer.bos_id
    ranks = {tokenizer.decode_bytes([i]): i for i in range(special)}
    calls = {
        "redline": lambda: tokenizer.encode_document(text),
        "tiktoken list": lambda: np.array([special, *tokenizer.encode(text)]),
        "plain Python": lambda: np.array(plain(tokenizer, ranks, text)),
    }
    yield HostPrograms(calls, "plain Python", np.array_equal)


ITEMS = [host_item("tokenizer", f"{TEXT_CHARS} characters", "plain Python", ("tiktoken list",), programs)]


def test_tokenizer(record):
    row = record()
    if "speedup" in row and row["backend"] == "redline":
        assert row["speedup"] > 1, row
