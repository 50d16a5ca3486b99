"""Autoregressive sampling with a KV cache.

Prompts are run one by one, then their rows grow together, each at its own position, so that lengths need no padding.
A text may become longer than the model's T: the windows limit what each layer sees, and how much of it is cached.
"""

import codecs
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from core.data.tokenizer import Tokenizer
from core.models.gpt2 import GPT
from core.stopping import ScoringStopped, never


@torch.no_grad()
def generate(
    model: GPT,
    prompts: list[list[int]],
    max_tokens: int,
    *,
    temperature: float,
    top_k: int,
    seed: int,
    stop: int | None = None,
) -> Iterator[list[int | None]]:
    """Yields up to max_tokens times the next id of each prompt (none of them empty); None for a row that has met
    `stop`.

    temperature 0 takes the likeliest token; top_k 0 samples among all. Row i draws from a generator seeded with seed +
    i, so that its text does not depend on the others.
    """
    if not all(prompts):
        raise ValueError("nothing to continue: give at least the BOS token")
    for name, value in (("temperature", temperature), ("top_k", top_k), ("max_tokens", max_tokens)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}: expected a number of 0 or more")
    if not prompts or max_tokens == 0:
        return
    device = model.wte.device
    generators = [torch.Generator(device=device).manual_seed(seed + i) for i in range(len(prompts))]
    cache = model.new_cache(len(prompts), max(map(len, prompts)) + max_tokens - 1)  # the last token is not run
    rows = [(torch.tensor([prompt], device=device), cache.row(i)) for i, prompt in enumerate(prompts)]
    hidden = torch.cat([model.hidden(idx, row)[:, -1] for idx, row in rows])  # (B, C)
    ended = [False] * len(prompts)
    for left in reversed(range(max_tokens)):
        tokens = draw(model.logits(hidden), generators, temperature=temperature, top_k=top_k)
        ids = tokens.tolist()  # the one wait for the device
        ended = [was or token == stop for was, token in zip(ended, ids)]
        if all(ended):
            return
        yield [None if over else token for over, token in zip(ended, ids)]
        if left > 0:
            hidden = model.hidden(tokens[:, None], cache)[:, -1]


def draw(logits: Tensor, generators: list[torch.Generator], *, temperature: float, top_k: int) -> Tensor:
    """(B,) ids drawn from softmax(logits / temperature), logits (B, V) fp32, among the top_k likeliest (0: all)."""
    if temperature == 0:
        return logits.argmax(-1)
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    noise = torch.empty_like(logits)
    for row, generator in zip(noise, generators):
        row.exponential_(generator=generator)
    # -log of exponential noise is Gumbel noise: the largest sum is a sample, at any temperature without overflow
    return (logits - temperature * noise.log()).argmax(-1)


def sample_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: list[str],
    max_tokens: int,
    *,
    temperature: float,
    top_k: int,
    seed: int,
    stopped: Callable[[], bool] = never,
) -> list[str]:
    """What the model writes after each prompt as the beginning of a document; the prompts are not repeated.

    stopped: asked between tokens; ScoringStopped where it is true."""
    starts = [_document(tokenizer, prompt) for prompt in prompts]
    options = {"temperature": temperature, "top_k": top_k, "seed": seed, "stop": tokenizer.bos_id}
    steps = []
    for ids in generate(model, starts, max_tokens, **options):
        if stopped():
            raise ScoringStopped
        steps.append(ids)
    texts = [[token for step in steps if (token := step[i]) is not None] for i in range(len(prompts))]
    return [tokenizer.decode(ids) for ids in texts]


def stream_text(
    model: GPT, tokenizer: Tokenizer, prompt: str, max_tokens: int, *, temperature: float, top_k: int, seed: int
) -> Iterator[str]:
    """The text of `sample_texts` for one prompt in pieces, each as soon as its characters are whole."""
    options = {"temperature": temperature, "top_k": top_k, "seed": seed, "stop": tokenizer.bos_id}
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for ids in generate(model, [_document(tokenizer, prompt)], max_tokens, **options):
        if text := decoder.decode(tokenizer.decode_bytes(token for token in ids if token is not None)):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def _document(tokenizer: Tokenizer, beginning: str) -> list[int]:
    return [tokenizer.bos_id, *tokenizer.encode(beginning)]
