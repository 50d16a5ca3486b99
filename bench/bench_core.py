"""Choice tasks of CORE: shared beginnings and batches by length against one forward pass an example, each choice whole:
`pytest bench/bench_core.py`.

Questions have the lengths of CORE's own: ten shots before a short question (as ARC, PIQA, BoolQ), and none (as
HellaSwag, COPA). Both ways must give the same answers, and ours MIN_SPEEDUP times faster over all of them.
"""

import random
from contextlib import contextmanager
from pathlib import Path

import torch

from bench.suite import HostPrograms, host_item
from core.communication import World
from core.config import ModelConfig
from core.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from core.evals.core_metric import GPTScorer, Task, answers
from core.models.gpt2 import GPT

SIZES = {"depth": 2, "d_model": 256, "d_head": 64, "seq_len": 1024, "vocab_size": 4096, "window_pattern": "SL"}
TASKS = {  # label: shots, words of a question, words of a choice, choices, questions
    "ten shots": (10, 40, 5, 4, 12),
    "no shots": (0, 30, 20, 4, 12),
}
MIN_SPEEDUP = 2.0


class Words(Tokenizer):
    """Every word is a token, which its number names."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]


def examples(words: int, choice: int, choices: int, count: int) -> list[dict]:
    rng = random.Random(0)

    def text(n: int) -> str:
        return " ".join(str(rng.randrange(4000)) for _ in range(n))

    return [
        {"query": text(words), "choices": [text(choice) for _ in range(choices)], "gold": rng.randrange(choices)}
        for _ in range(count)
    ]


@contextmanager
def programs():
    torch.manual_seed(0)
    model = GPT(ModelConfig(**SIZES))
    model.init_weights(0)
    with torch.no_grad():
        for p in model.parameters():  # the output projections start at 0
            p.add_(torch.randn_like(p), alpha=0.05)
    tokenizer = Words([str(i).encode() for i in range(SIZES["vocab_size"] - len(SPECIAL_TOKENS))])
    asked = []
    for label, (shots, *sizes) in TASKS.items():
        asked.append((Task(label, "multiple_choice", Path(), shots, " ", 0.25), examples(*sizes)))

    @torch.no_grad()
    def run(**options) -> list[bool]:
        scorer, alone = GPTScorer(model, tokenizer, **options), World(0, 1, torch.device("cpu"))
        return [right for task, items in asked for right in answers(scorer, task, items, alone).tolist()]

    calls = {
        "redline": lambda: run(max_tokens=16 * SIZES["seq_len"]),
        "plain": lambda: run(max_tokens=1, share=False),  # nothing fits beside a question: one at a time
    }
    yield HostPrograms(calls, "plain")


ITEMS = [host_item("core", f"{sum(t[-1] for t in TASKS.values())} questions of four choices", "plain", (), programs)]


def test_core(record):
    row = record()
    if "speedup" in row and row["backend"] == "redline":
        assert row["speedup"] >= MIN_SPEEDUP, row
