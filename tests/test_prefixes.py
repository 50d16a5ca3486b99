"""Prefixes of tokens, against comparing all with all."""

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from core.data.prefixes import gpt2_bytes, prefix_table
from core.stopping import UserError


def by_comparing(tokens):
    def prefix(token):
        shorter = [i for i, t in enumerate(tokens) if t and len(t) < len(token) and token[: len(t)] == t]
        return max(shorter, key=lambda i: (len(tokens[i]), -i), default=-1)

    return [prefix(token) for token in tokens]


@given(st.lists(st.text("ab\xff", max_size=6).map(lambda s: s.encode("latin-1")), max_size=40))
def test_the_longest_of_all(tokens):
    table = prefix_table(tokens)
    assert table.dtype == np.int64 and table.tolist() == by_comparing(tokens)


def test_an_example():
    tokens = [b"there", b"the", b"", b" ", b"t", b" the", b"then", b"th", b"x"]
    assert prefix_table(tokens).tolist() == [1, 7, -1, -1, -1, 3, 1, 4, -1]


@pytest.fixture
def vocabulary():
    """As many tokens as GPT-2 has, of bytes of our own."""
    rng = np.random.default_rng(0)
    tokens = dict.fromkeys(bytes([i]) for i in range(256))
    while len(tokens) < 50256:
        tokens[rng.bytes(3)] = None
    return list(tokens)


def test_the_vocabulary_of_gpt2(monkeypatch, vocabulary):
    asked, ranks = [], {token: i for i, token in enumerate(vocabulary)}
    encoding = tiktoken.Encoding("gpt2", pat_str=".", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: (asked.append(name), encoding)[1])
    tokens = gpt2_bytes()
    assert tokens == [*vocabulary, b""] and asked == ["gpt2"]
    table = prefix_table(tokens)
    assert table[50256] == -1 and (table[:256] == -1).all() and (table != 50256).all()
    # the others have three bytes: the first of them is a token, and they are the prefix of none
    assert table[256:50256].tolist() == [token[0] for token in vocabulary[256:]]


@pytest.mark.parametrize("error", [ConnectionError("no\nroute"), ValueError("no\nhash")])
def test_a_vocabulary_that_cannot_be_had_is_a_sentence(monkeypatch, error):
    def fails(name):
        raise error

    monkeypatch.setattr(tiktoken, "get_encoding", fails)
    with pytest.raises(UserError, match=r"^tiktoken cannot get the vocabulary of GPT-2 \(no\): .*TIKTOKEN_CACHE_DIR"):
        gpt2_bytes()
