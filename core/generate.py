"""Text from the model, token by token, each computed once: keys and values of earlier tokens are kept.

Prompts are run one by one, then their rows grow together, each at its own position, so that lengths need no padding.
A text may become longer than the model's T: the windows limit what each layer sees, and how much of it is kept.
"""

import codecs
import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from core.data.tokenizer import Tokenizer
from core.model import GPT


class KVCache:
    """What the tokens so far leave behind, for up to `capacity` tokens in each of B rows.

    keys, values   per layer (B, S, G, D) in the compute type, as attention takes them. S is the layer's window and the token
                   itself, or the capacity if that is less. Position p lies in slot p mod S: keys are rotated already, and
                   softmax does not mind the order
    embedding      (B, 1, C) of the last token, normalised, before smear; zero before the first token, which smears nothing
    positions      (B,) int64, of the next token; `lengths` is the same on the host
    """

    def __init__(self, model: GPT, rows: int, capacity: int):
        d, like = model.dims, model.wte
        shapes = [(rows, min(capacity, window + 1), d.n_kv_head, d.d_head) for window in d.windows]
        self.capacity = capacity
        # zeros: a slot not yet filled has weight 0, and 0 times garbage may be NaN
        self.keys = [like.new_zeros(shape) for shape in shapes]
        self.values = [like.new_zeros(shape) for shape in shapes]
        self.embedding = like.new_zeros(rows, 1, d.d_model)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=like.device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device="cpu")
        self._rope = model.rope_tables(capacity) if model.cfg.rope else ()

    def row(self, i: int) -> "KVCache":
        """Row i as a cache of one row; what is written there is written here."""
        view = copy.copy(self)
        view.keys, view.values = [t[i : i + 1] for t in self.keys], [t[i : i + 1] for t in self.values]
        for name in ("embedding", "positions", "lengths"):
            setattr(view, name, getattr(self, name)[i : i + 1])
        return view

    def begin(self, rows: int, num_tokens: int) -> None:
        """ValueError unless every row can take that many tokens."""
        if rows != len(self.lengths):
            raise ValueError(f"{rows} rows for a cache of {len(self.lengths)}")
        if num_tokens > 1 and self.lengths.any():
            raise ValueError(f"{num_tokens} tokens for rows that have begun: they go on with one token at a time")
        if (length := int(self.lengths.max()) + num_tokens) > self.capacity:
            raise ValueError(f"{length} tokens do not fit into a cache for {self.capacity}")

    def rope_tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin of the next token of each row, each (B, 1, D/2) fp32."""
        cos, sin = self._rope
        return cos[self.positions, None], sin[self.positions, None]

    def masks(self) -> list[Tensor]:
        """(B, 1, 1, S) bool per layer: the slots filled once the next token of each row is in."""
        last = self.positions[:, None, None, None]
        sizes = [keys.size(1) for keys in self.keys]
        masks = {size: torch.arange(size, device=last.device) <= last for size in dict.fromkeys(sizes)}
        return [masks[size] for size in sizes]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k and v (B, T, G, D); returns all that T queries look at: a prompt at itself, one token at the slots."""
        T, size = k.size(1), self.keys[layer].size(1)
        for new, kept in ((k, self.keys[layer]), (v, self.values[layer])):
            if T == 1:
                kept[torch.arange(len(new), device=new.device), self.positions % size] = new[:, 0]
            else:
                kept[:, torch.arange(max(T - size, 0), T, device=new.device) % size] = new[:, -size:]
        return (self.keys[layer], self.values[layer]) if T == 1 else (k, v)

    def swap_embedding(self, x: Tensor) -> Tensor:
        """Keeps the last of x (B, T, C); returns the one (B, 1, C) kept before."""
        before = self.embedding.clone()
        self.embedding.copy_(x[:, -1:])
        return before

    def advance(self, num_tokens: int) -> None:
        self.positions += num_tokens
        self.lengths += num_tokens


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
    """Yields up to max_tokens times the next id of each prompt (none of them empty); None for a row that has met `stop`.

    temperature 0 takes the likeliest token; top_k 0 samples among all. Row i draws from a generator seeded with seed + i, so
    that its text does not depend on the others.
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
    cache = KVCache(model, len(prompts), max(map(len, prompts)) + max_tokens - 1)  # the last token is not run
    rows = [(torch.tensor([prompt], device=device), cache.row(i)) for i, prompt in enumerate(prompts)]
    hidden = torch.cat([model.hidden(idx, row)[:, -1] for idx, row in rows])  # (B, C)
    ended = [False] * len(prompts)
    for left in reversed(range(max_tokens)):
        tokens = choose(model.logits(hidden), generators, temperature=temperature, top_k=top_k)
        ids = tokens.tolist()  # the one wait for the device
        ended = [was or token == stop for was, token in zip(ended, ids)]
        if all(ended):
            return
        yield [None if over else token for over, token in zip(ended, ids)]
        if left > 0:
            hidden = model.hidden(tokens[:, None], cache)[:, -1]


def choose(logits: Tensor, generators: list[torch.Generator], *, temperature: float, top_k: int) -> Tensor:
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
) -> list[str]:
    """What the model writes after each prompt as the beginning of a document; the prompts are not repeated."""
    starts = [_document(tokenizer, prompt) for prompt in prompts]
    options = {"temperature": temperature, "top_k": top_k, "seed": seed, "stop": tokenizer.bos_id}
    steps = list(generate(model, starts, max_tokens, **options))
    return [tokenizer.decode(step[i] for step in steps if step[i] is not None) for i in range(len(prompts))]


def stream_text(
    model: GPT, tokenizer: Tokenizer, prompt: str, max_tokens: int, *, temperature: float, top_k: int, seed: int
) -> Iterator[str]:
    """The text of `sample_texts` for one prompt in pieces, each as soon as its characters are whole."""
    options = {"temperature": temperature, "top_k": top_k, "seed": seed, "stop": tokenizer.bos_id}
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for ids in generate(model, [_document(tokenizer, prompt)], max_tokens, **options):
        if text := decoder.decode(tokenizer.decode_bytes(ids)):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def _document(tokenizer: Tokenizer, beginning: str) -> list[int]:
    return [tokenizer.bos_id, *tokenizer.encode(beginning)]
