"""Bits per byte: every token once, right sums, right context, and the same on several ranks."""

import bz2
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.communication import World
from core.config import ModelConfig
from core.data.corpus import open_corpus
from core.data.packing import BestFitPacker
from core.data.tokenizer import train_tokenizer
from core.evals.bits_per_byte import (
    bits_per_byte,
    compressor_bits_per_byte,
    validation_packed,
    validation_subset,
    validation_whole,
    windows,
)
from core.models.gpt2 import GPT

CPU = torch.device("cpu")


@given(n=st.integers(1, 200), seq_len=st.integers(1, 40), data=st.data())
def test_windows_score_each_token_once_with_enough_context(n, seq_len, data):
    stride = data.draw(st.integers(1, seq_len))
    tokens = list(range(1000, 1000 + n))  # the first is BOS, no target
    scored = []
    for w in windows(tokens, seq_len, stride):
        assert 1 < len(w.tokens) <= seq_len + 1
        assert list(w.tokens) == list(range(w.tokens[0], w.tokens[-1] + 1))
        new = list(w.tokens[w.skip + 1 :])
        assert new
        if scored:
            assert w.skip >= seq_len - stride
        scored += new
    assert scored == tokens[1:]


@pytest.fixture(scope="module")
def text(corpus_dir, tmp_path_factory):
    train, val = open_corpus(str(corpus_dir), seed=0, val_every=10, cache_dir=tmp_path_factory.mktemp("cache"))
    return val, train_tokenizer(train, 300)


def test_the_final_score_sees_half_a_context_before_every_token(text):
    val, tokenizer = text
    valset, data = validation_whole(val, tokenizer, 32, None)
    assert data == "".join(val).encode() and valset.num_bytes == len(data)
    ids = []
    for w in valset.windows:
        assert w.skip == 0 and w.tokens[0] == tokenizer.bos_id or w.skip >= 16
        ids += w.tokens[w.skip + 1 :].tolist()
    assert ids == [i for document in val for i in tokenizer.encode(document)]
    part, some = validation_whole(val, tokenizer, 32, 3000)
    assert data.startswith(some) and 0 < part.num_bytes == len(some) <= 3000 < len(some) + val.num_bytes(2 + 1) * 9
    assert "the first" in part.scope and "every byte" in valset.scope


@pytest.mark.parametrize("max_tokens", [1, 33, 700, 10**9])
def test_the_subset_is_cut_at_its_size_and_its_windows_do_not_overlap(text, max_tokens):
    val, tokenizer = text
    valset = validation_subset(val, tokenizer, 32, max_tokens)
    documents = [tokenizer.encode(val[int(i)]) for i in val.order(0)]
    ids = [i for document in documents for i in document][:max_tokens]
    assert [i for w in valset.windows for i in w.tokens[w.skip + 1 :].tolist()] == ids
    assert valset.num_bytes == tokenizer.token_bytes[ids].sum()
    fresh = sum(len(w.tokens) - 1 - w.skip for w in valset.windows if w.skip == 0)
    assert all(len(w.tokens) == 33 for w in valset.windows if w.skip)  # only the last of a document reaches back
    lengths = [len(document) for document in documents]
    used, left = [], max_tokens
    for n in lengths:
        used.append(min(n, left))
        left -= used[-1]
    assert len(valset.windows) == sum(-(-n // 32) for n in used) and fresh <= len(ids)


def test_stride_must_fit():
    with pytest.raises(ValueError, match="stride"):
        list(windows([1, 2, 3], 4, 5))


def model(vocab=70):
    m = GPT(ModelConfig(depth=2, d_model=32, d_head=16, seq_len=16, vocab_size=vocab))
    m.init_weights(0)
    with torch.no_grad():
        for p in m.parameters():
            if not p.any():
                p.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(0))
        m.lm_head.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    return m


def test_equals_the_definition():
    m, rng = model(), np.random.default_rng(0)
    token_bytes = rng.integers(1, 6, 70).astype(np.int32)
    token_bytes[69] = 0  # a special token
    docs = [[69, *rng.integers(0, 69, n)] for n in (1, 5, 16, 40)] + [[69, 3, 69, 4]]
    items = [w for doc in docs for w in windows(doc, 16, 8)]
    got = bits_per_byte(m, items, token_bytes, batch_size=3, world=World(0, 1, CPU))
    nats = total = 0.0
    for doc in docs:
        for i in range(1, len(doc)):
            window = next(w for w in windows(doc, 16, 8) if doc[: i + 1][-1] is not None and _holds(w, doc, i))
            position = i - _start(window, doc) - 1
            logits = m(torch.tensor(window.tokens[None, :-1]))[0, position].double()
            if token_bytes[doc[i]]:
                nats -= logits.log_softmax(-1)[doc[i]].item()
                total += int(token_bytes[doc[i]])
    assert got.num_bytes == total
    assert got.nats == pytest.approx(nats, rel=1e-5)
    assert got.bpb == pytest.approx(nats / math.log(2) / total, rel=1e-5)


def _start(window, doc):
    n = len(window.tokens)
    return next(s for s in range(len(doc) - n + 1) if list(doc[s : s + n]) == list(window.tokens))


def _holds(window, doc, i):
    start = _start(window, doc)
    return start + window.skip < i < start + len(window.tokens)


def test_batching_and_padding_do_not_matter():
    m, rng = model(), np.random.default_rng(1)
    token_bytes = np.ones(70, dtype=np.int32)
    items = [w for n in (3, 9, 30) for w in windows(list(rng.integers(0, 70, n)), 16, 16)]
    results = [bits_per_byte(m, items, token_bytes, batch_size=b, world=World(0, 1, CPU)).nats for b in (1, 2, 100)]
    assert results == pytest.approx([results[0]] * 3, rel=1e-6)


def test_uniform_model_needs_log_v():
    m = model()
    with torch.no_grad():
        m.lm_head.zero_()
    items = list(windows(list(range(20)), 16, 8))
    got = bits_per_byte(m, items, np.full(70, 2, dtype=np.int32), batch_size=4, world=World(0, 1, CPU))
    assert got.bpb == pytest.approx(math.log2(70) / 2, rel=1e-6)


def test_compressors():
    data = b"for i in range(10):\n    print(i)\n" * 100
    got = compressor_bits_per_byte(data)
    assert got["bzip2 -9"] == 8 * len(bz2.compress(data, 9)) / len(data)
    assert set(got) == {"gzip -9", "bzip2 -9", "xz -9e"} and all(0 < b < 1 for b in got.values())
    with pytest.raises(ValueError, match="empty"):
        compressor_bits_per_byte(b"")


def test_the_board_scores_packed_rows(text):
    val, tokenizer = text
    options = {"mode": "crop", "buffer_docs": len(val) // 4}
    documents = [tokenizer.encode_document(document) for document in val]
    rows = validation_packed(val, tokenizer, 64, 10**9, buffer_docs=1000)
    packer, source = BestFitPacker(65, **options), iter(enumerate(documents))
    want = np.empty(65, dtype=np.int64)
    for w in rows.windows:
        packer.fill(want, source.__next__)
        assert w.skip == 0 and np.array_equal(w.tokens, want)
    assert len(rows.windows) > 10 and packer.num_documents > len(val) - 2
    # the bytes are those of the targets alone; special tokens have none
    targets = [i for w in rows.windows for i in w.tokens[1:] if i != tokenizer.bos_id]
    assert rows.num_bytes == len(tokenizer.decode_bytes(targets))
    few = validation_packed(val, tokenizer, 64, 200, buffer_docs=1000)
    assert [w.tokens.tolist() for w in few.windows] == [w.tokens.tolist() for w in rows.windows[:3]]
    assert not validation_packed(val, tokenizer, 10**6, 10**9, buffer_docs=1000).windows
