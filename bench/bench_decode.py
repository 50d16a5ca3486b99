"""Greedy text from the quickstart's model: `pytest bench/bench_decode.py`.

With keys and values kept, against the whole text anew for each token; the same tokens, MIN_SPEEDUP times faster.
"""

from contextlib import contextmanager

import torch

from bench.suite import HostPrograms, host_item
from core.config import preset
from core.generate import generate
from core.models.gpt2 import GPT

PROMPT_TOKENS, NEW_TOKENS = 16, 240
MIN_SPEEDUP = 1.5


@torch.no_grad()
def recomputed(model: GPT, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        ids.append(int(model.logits(model.hidden(torch.tensor([ids]))[:, -1]).argmax()))
    return ids[len(prompt) :]


def kept(model: GPT, prompt: list[int]) -> list[int]:
    return [ids[0] for ids in generate(model, [prompt], NEW_TOKENS, temperature=0, top_k=0, seed=0)]


@contextmanager
def programs():
    torch.manual_seed(0)
    model = GPT(preset("quickstart", "cpu").model)
    model.init_weights(0)
    with torch.no_grad():
        for p in model.parameters():  # the output projections start at 0
            p.add_(torch.randn_like(p), alpha=0.05)
    prompt = torch.randint(model.cfg.vocab_size, (PROMPT_TOKENS,)).tolist()
    calls = {"redline": lambda: kept(model, prompt), "recomputed": lambda: recomputed(model, prompt)}
    yield HostPrograms(calls, "recomputed")


ITEMS = [host_item("decode", f"quickstart, {NEW_TOKENS} tokens after {PROMPT_TOKENS}", "recomputed", (), programs)]


def test_decode(record):
    row = record()
    if "speedup" in row and row["backend"] == "redline":
        assert row["speedup"] >= MIN_SPEEDUP, row
