"""Generation with kept keys and values against running the model on the whole text again, and text out of tokens."""

import dataclasses
import itertools

import pytest
import torch

from core import generate as generate_module
from core.config import ModelConfig
from core.data.tokenizer import Tokenizer
from core.generate import draw, generate, sample_texts, stream_text
from tests.test_model import SWITCHES, awake

CFG = ModelConfig(depth=5, d_model=64, d_head=16, n_kv_head=2, seq_len=16, vocab_size=265, window_pattern="SSL")
GREEDY = {"temperature": 0.0, "top_k": 0, "seed": 0}
SAMPLED = {"temperature": 1.0, "top_k": 0, "seed": 7}
VARIANTS = [
    {},
    *({switch: False} for switch in SWITCHES),
    {"logit_softcap": 0.0},
    {"window_pattern": "L"},
    {"n_kv_head": 1},
    {"n_kv_head": None},
]
BYTES = Tokenizer([bytes([i]) for i in range(256)])


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """Short windows of 4 tokens: a few tokens wrap them."""
    monkeypatch.setattr("core.models.gpt2.WINDOW_MULTIPLE", 4)


def model_of(changes):
    model = awake(dataclasses.replace(CFG, **changes))
    assert set(model.dims.windows) == ({16} if "window_pattern" in changes else {4, 16})
    return model


def text_of(length, seed=0):
    return torch.randint(0, CFG.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [text_of(n, seed=n) for n in (1, 7, 3, 20)]  # one token; beyond the short windows; less; beyond T


@torch.no_grad()
def recomputed(model, prompt, num_tokens):
    """The likeliest continuation by the model on the whole text for each token."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def cached_logits(model, text, prompt_len):
    """Logits (T - prompt_len + 1, V) after the prompt and after each later token of one text."""
    cache = model.new_cache(1, len(text))
    chunks = [text[:prompt_len], *([token] for token in text[prompt_len:])]
    return torch.cat([model.logits(model.hidden(torch.tensor([chunk]), cache)[:, -1]) for chunk in chunks])


def columns(steps):
    return [[token for token in row if token is not None] for row in zip(*steps)]


def rms(x):
    return x.double().pow(2).mean().sqrt().item()


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_greedy_text_is_that_of_recomputation(changes):
    model = model_of(changes)
    got = columns(generate(model, PROMPTS, 40, **GREEDY))
    assert got == [recomputed(model, prompt, 40) for prompt in PROMPTS]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("prompt_len", [1, 5, 6, 20])
@torch.no_grad()
def test_logits_are_those_of_recomputation(changes, prompt_len):
    model, text = model_of(changes), text_of(50)
    want = model(torch.tensor([text]))[0, prompt_len - 1 :]
    torch.testing.assert_close(cached_logits(model, text, prompt_len), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prompt_len", [1, 6, 20])
@torch.no_grad()
def test_logits_in_bf16_are_as_exact_as_recomputation(prompt_len):
    model, text = model_of({}), text_of(50)
    exact = model(torch.tensor([text]))[0, prompt_len - 1 :]
    for p in model.parameters():
        p.data = p.data.bfloat16() if p.dim() > 1 else p.data
    whole = model(torch.tensor([text]))[0, prompt_len - 1 :]
    cached = cached_logits(model, text, prompt_len)
    assert model.new_cache(1, 1).keys[0].dtype == torch.bfloat16
    assert rms(cached - exact) < 1.5 * rms(whole - exact) < 0.1 * rms(exact)


def test_a_row_does_not_depend_on_the_others():
    model = model_of({})
    together = columns(generate(model, PROMPTS, 30, **SAMPLED))
    for i, prompt in enumerate(PROMPTS):
        alone = columns(generate(model, [prompt], 30, **{**SAMPLED, "seed": SAMPLED["seed"] + i}))
        assert alone == [together[i]]
    assert len({tuple(row) for row in together}) == len(PROMPTS)


def test_rows_stop_one_by_one():
    """With few tokens, one of them surely comes up in every row, at different times."""
    model = model_of({"vocab_size": 20})
    prompts = [[token % 20 for token in prompt] for prompt in PROMPTS]
    free = columns(generate(model, prompts, 60, **SAMPLED))
    ends = {stop: [row.index(stop) for row in free] for stop in range(20) if all(stop in row for row in free)}
    stop = next(stop for stop, at in ends.items() if 0 < min(at) < sorted(at)[1])
    steps = list(generate(model, prompts, 60, **SAMPLED, stop=stop))
    assert len(steps) == max(ends[stop])
    for t, step in enumerate(steps):
        assert step == [None if t >= end else row[t] for row, end in zip(free, ends[stop])]


def test_one_likeliest_token_is_the_greedy_one():
    model = model_of({})
    greedy = list(generate(model, PROMPTS, 10, **GREEDY))
    assert list(generate(model, PROMPTS, 10, temperature=2.0, top_k=1, seed=3)) == greedy
    assert list(generate(model, PROMPTS, 10, temperature=1e-40, top_k=0, seed=3)) == greedy


def test_sampling_repeats_with_its_seed():
    model = model_of({})
    first = list(generate(model, PROMPTS, 10, **SAMPLED))
    assert list(generate(model, PROMPTS, 10, **SAMPLED)) == first
    assert list(generate(model, PROMPTS, 10, **{**SAMPLED, "seed": 8})) != first


@pytest.mark.parametrize("top_k", [0, 3])
def test_samples_follow_the_softmax(top_k):
    logits, n = torch.tensor([[2.0, -1.0, 1.0, 0.5, 0.0]]), 20_000
    kept = [0, 2, 3] if top_k else [0, 1, 2, 3, 4]
    want = torch.zeros(5)
    want[kept] = torch.softmax(logits[0, kept] / 0.7, dim=0)
    generator = torch.Generator().manual_seed(0)
    ids = draw(logits.expand(n, 5), [generator] * n, temperature=0.7, top_k=top_k)
    share = ids.bincount(minlength=5) / n
    assert (share - want).abs().max() < 4 * (0.25 / n) ** 0.5
    assert not share[want == 0].any()


def test_the_windows_bound_the_memory():
    model = model_of({})
    for capacity in (3, 10, 17, 1000):
        cache = model.new_cache(2, capacity)
        slots = [min(capacity, window + 1) for window in model.dims.windows]
        assert [t.shape for t in cache.keys] == [t.shape for t in cache.values] == [(2, n, 2, 16) for n in slots]


@torch.no_grad()
def test_what_a_cache_refuses():
    model, ids = model_of({}), torch.zeros(2, 3, dtype=torch.int64)
    cache = model.new_cache(2, 4)
    model.hidden(ids, cache)
    with pytest.raises(ValueError, match="one token at a time"):
        model.hidden(ids, cache)
    with pytest.raises(ValueError, match="3 rows for a cache of 2"):
        model.hidden(torch.zeros(3, 1, dtype=torch.int64), cache)
    model.hidden(ids[:, :1], cache)
    with pytest.raises(ValueError, match="5 tokens do not fit into a cache for 4"):
        model.hidden(ids[:, :1], cache)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"prompts": [[1], []]}, "nothing to continue"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_tokens": -1}, "max_tokens is -1"),
    ],
)
def test_generation_errors(changes, says):
    with pytest.raises(ValueError, match=says):
        list(generate(model_of({}), **{"prompts": [[1]], "max_tokens": 2, **GREEDY, **changes}))


def test_nothing_to_do():
    assert list(generate(model_of({}), [], 5, **GREEDY)) == []
    assert list(generate(model_of({}), [[1]], 0, **GREEDY)) == []


def test_texts_are_streamed_as_they_are_sampled():
    model, prompts = model_of({}), ["a", "", "naïve"]
    texts = sample_texts(model, BYTES, prompts, 40, **SAMPLED)
    assert "\N{REPLACEMENT CHARACTER}" in "".join(texts)  # random bytes are seldom UTF-8
    for i, prompt in enumerate(prompts):
        options = {**SAMPLED, "seed": SAMPLED["seed"] + i}
        assert "".join(stream_text(model, BYTES, prompt, 40, **options)) == texts[i]


@pytest.mark.parametrize("cut", [None, -1, -3])
def test_a_character_appears_when_it_is_whole(monkeypatch, cut):
    ids = list("aé€😀".encode()[:cut])
    monkeypatch.setattr(generate_module, "generate", lambda *args, **kwargs: iter([token] for token in ids))
    pieces = list(stream_text(None, BYTES, "", len(ids), **GREEDY))
    assert pieces == ["a", "é", "€", "😀" if cut is None else "\N{REPLACEMENT CHARACTER}"]
    assert "".join(pieces) == BYTES.decode(ids)


def test_streaming_does_not_wait_for_the_end():
    pieces = stream_text(model_of({}), BYTES, "a", 10**5, **SAMPLED)
    assert len(list(itertools.islice(pieces, 3))) == 3
