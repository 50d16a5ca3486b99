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
from core.evals.bits_per_byte import bits_per_byte, compressor_bits_per_byte, windows
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
