"""Text from the model, one token at a time, by running it on the whole context again for each.

The slow and certain way: no cache. Contexts longer than the model's T keep their last T tokens.
"""

from collections.abc import Iterator

import torch

from core.data.tokenizer import Tokenizer
from core.model import GPT


@torch.no_grad()
def generate(
    model: GPT,
    tokens: list[int],
    max_tokens: int,
    *,
    temperature: float,
    top_k: int,
    seed: int,
    stop: int | None = None,
) -> Iterator[int]:
    """Yields up to max_tokens ids that continue `tokens` (not empty); ends before yielding `stop`.

    temperature 0 takes the likeliest token; top_k 0 samples among all.
    """
    if not tokens:
        raise ValueError("nothing to continue: give at least the BOS token")
    if temperature < 0 or top_k < 0:
        raise ValueError(f"temperature is {temperature}, top_k is {top_k}: neither may be negative")
    device = model.wte.device
    generator = torch.Generator(device=device).manual_seed(seed)
    ids = torch.tensor([tokens], dtype=torch.int64, device=device)
    for _ in range(max_tokens):
        ids = ids[:, -model.dims.seq_len :]
        logits = model.logits(model.hidden(ids)[0, -1])  # (V,)
        if temperature == 0:
            token = logits.argmax()
        else:
            if 0 < top_k < logits.numel():
                logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
            token = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator)[0]
        if (t := int(token)) == stop:
            return
        yield t
        ids = torch.cat((ids, token.view(1, 1)), dim=1)


def sample_text(
    model: GPT, tokenizer: Tokenizer, prompt: str, max_tokens: int, *, temperature: float, top_k: int, seed: int
) -> str:
    """What the model writes after `prompt` as the beginning of a document; the prompt is not repeated."""
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    stop = tokenizer.bos_id
    ids = generate(model, tokens, max_tokens, temperature=temperature, top_k=top_k, seed=seed, stop=stop)
    return tokenizer.decode(list(ids))
