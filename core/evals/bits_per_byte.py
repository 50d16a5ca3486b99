"""Bits per byte: how well the model compresses text, comparable across tokenizers and with file compressors.

bpb = sum of nats over scored tokens / (ln 2 * sum of their bytes); special tokens have no bytes and do not count
[nanochat 92d63d4, core/loss_eval]. Each document is scored on its own: BOS opens it, windows of at most T tokens slide
over it by `stride`, and each token is scored in the first window that holds it, so that every byte counts exactly once
and, with stride < T, all but the document's first tokens see at least T - stride tokens before them.
"""

import bz2
import gzip
import lzma
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from core.communication import World, all_sum, gather_objects, together
from core.data.corpus import Corpus
from core.data.packing import BestFitPacker
from core.data.tokenizer import Tokenizer
from core.models.gpt2 import GPT
from core.stopping import ScoringStopped, UserError, never


@dataclass(frozen=True)
class BitsPerByte:
    bpb: float
    nats: float
    num_bytes: int
    num_tokens: int


@dataclass(frozen=True)
class Window:
    """tokens[:-1] are inputs, tokens[1:] targets; the first `skip` targets were scored in an earlier window."""

    tokens: np.ndarray  # (1 < n <= T + 1,) int
    skip: int


def windows(tokens: Sequence[int], seq_len: int, stride: int) -> Iterator[Window]:
    """Cuts one document, BOS first, into windows that together score each of its other tokens once."""
    if not 1 <= stride <= seq_len:
        raise ValueError(f"stride is {stride}: expected 1 to the context length {seq_len}")
    array = np.asarray(tokens)
    n = len(array) - 1  # targets
    scored = 0
    while scored < n:
        stop = min(n, scored + (seq_len if scored == 0 else stride))
        start = max(0, stop - seq_len)  # the last window reaches back as far as it may
        yield Window(array[start : stop + 1], skip=scored - start)
        scored = stop


@torch.no_grad()
def bits_per_byte(
    model: GPT,
    items: Iterable[Window],
    token_bytes: np.ndarray,
    *,
    batch_size: int,
    world: World,
    stopped: Callable[[], bool] = never,
) -> BitsPerByte:
    """Scores windows, the same list on every rank; ranks share the batches and add up their sums.

    stopped: asked between batches; ScoringStopped on all ranks where it was true on one."""
    # equal lengths side by side: little padding
    items = sorted(items, key=lambda w: len(w.tokens), reverse=True)
    batches = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
    nbytes = torch.from_numpy(token_bytes.astype(np.int64)).to(world.device)
    nats = torch.zeros((), dtype=torch.float64, device=world.device)
    counts = torch.zeros(2, dtype=torch.int64, device=world.device)

    def score_mine() -> None:
        nonlocal nats, counts
        for batch in batches[world.rank :: world.world_size]:
            if stopped():
                return
            length = len(batch[0].tokens) - 1
            idx = np.zeros((len(batch), length), dtype=np.int64)
            targets = np.full((len(batch), length), -1, dtype=np.int64)
            for i, w in enumerate(batch):
                n = len(w.tokens) - 1
                idx[i, :n] = w.tokens[:-1]
                targets[i, w.skip : n] = w.tokens[w.skip + 1 :]
            idx_t, targets_t = (torch.from_numpy(a).to(world.device) for a in (idx, targets))
            counted = targets_t >= 0
            hidden, wanted = model.hidden(idx_t)[counted], targets_t[counted]
            size = nbytes[wanted]
            nats += torch.where(size > 0, model.loss(hidden, wanted, "none"), 0.0).sum(dtype=torch.float64)
            counts += torch.stack((size.sum(), (size > 0).sum()))

    together(score_mine, "the evaluation")
    if any(gather_objects(stopped(), "the evaluation")):
        raise ScoringStopped
    total_nats = all_sum(nats).item()
    num_bytes, num_tokens = all_sum(counts).tolist()
    bpb = total_nats / (math.log(2) * num_bytes) if num_bytes else math.inf
    return BitsPerByte(bpb, total_nats, num_bytes, num_tokens)


def compressor_bits_per_byte(data: bytes) -> dict[str, float]:
    """What gzip -9, bzip2 -9 and xz -9e make of the same bytes, in bits per byte."""
    if not data:
        raise UserError("nothing to compress: the validation text is empty")
    sizes = {
        "gzip -9": len(gzip.compress(data, compresslevel=9, mtime=0)),
        "bzip2 -9": len(bz2.compress(data, compresslevel=9)),
        "xz -9e": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {name: 8 * size / len(data) for name, size in sizes.items()}


def documents_within(corpus: Corpus, max_bytes: int | None) -> Iterator[tuple[int, str]]:
    """(i, text) of the documents in path order that max_bytes holds whole, one with text at least; None: all."""
    total = 0
    for i in range(len(corpus)):
        before = total
        total += corpus.num_bytes(i)
        if max_bytes is not None and total > max_bytes and before > 0:
            return
        yield i, corpus[i]


def check_readable(corpus: Corpus, max_bytes: int | None) -> None:
    """Reads what the final evaluation will read: a damaged row must not be found after the training."""
    for _ in documents_within(corpus, max_bytes):
        pass


@dataclass(frozen=True)
class ValidationSet:
    """Windows to score and what they cover."""

    windows: list[Window]
    num_bytes: int
    scope: str  # in words, for people


def score(model: GPT, valset: ValidationSet, tokenizer: Tokenizer, **options: Any) -> BitsPerByte:
    """Bits per byte of a validation set; every byte of it must have been counted. options: of `bits_per_byte`."""
    result = bits_per_byte(model, valset.windows, tokenizer.token_bytes, **options)
    if result.num_bytes != valset.num_bytes:
        raise AssertionError(f"scored {result.num_bytes} bytes of a text of {valset.num_bytes}")
    return result


def validation_subset(corpus: Corpus, tokenizer: Tokenizer, seq_len: int, max_tokens: int) -> ValidationSet:
    """A fixed part of the validation split for evaluations during training: documents in a seeded order up to
    max_tokens, the last one cut; windows do not overlap."""
    items: list[Window] = []
    num_bytes, num_docs, left = 0, 0, max_tokens
    for i in corpus.order(0):
        if left <= 0:
            break
        ids = tokenizer.encode(corpus[int(i)])[:left]
        items += windows([tokenizer.bos_id, *ids], seq_len, seq_len)
        num_bytes += int(tokenizer.token_bytes[ids].sum())
        num_docs += 1
        left -= len(ids)
    scope = (
        f"a fixed subset: {num_bytes:,} bytes of {num_docs} of {len(corpus)} validation documents, context "
        f"restarts every {seq_len} tokens"
    )
    return ValidationSet(items, num_bytes, scope)


def validation_packed(
    corpus: Corpus, tokenizer: Tokenizer, seq_len: int, max_tokens: int, *, buffer_docs: int
) -> ValidationSet:
    """Rows packed as in training, documents in order, until max_tokens or the end of the split: what nanochat scores
    [92d63d4, core/dataloader.py], so that its bits per byte and these compare. A token sees what is before it in its
    row, be it of its document or of another, and the ends of cut documents do not count. Its rows are those of eight
    processes; here they are one stream."""
    # a split of fewer documents than the buffer would fill no row at all
    packer = BestFitPacker(seq_len + 1, mode="crop", buffer_docs=min(buffer_docs, max(1, len(corpus) // 4)))
    documents = ((i, tokenizer.encode_document(corpus[i])) for i in range(len(corpus)))
    items: list[Window] = []
    while len(items) < max_tokens // seq_len:
        row = np.empty(seq_len + 1, dtype=tokenizer.dtype)
        try:
            packer.fill(row, documents.__next__)
        except StopIteration:
            break
        items.append(Window(row, skip=0))
    num_bytes = sum(int(tokenizer.token_bytes[w.tokens[1:]].sum()) for w in items)
    scope = f"{len(items):,} packed rows of {seq_len} tokens ({num_bytes:,} bytes), best fit and cropped as nanochat's"
    return ValidationSet(items, num_bytes, scope)


def validation_whole(
    corpus: Corpus, tokenizer: Tokenizer, seq_len: int, max_bytes: int | None
) -> tuple[ValidationSet, bytes]:
    """The validation split in path order, and its bytes; documents beyond max_bytes are left out, and the scope says
    so.

    Windows overlap by half, so that a token sees at least T/2 tokens of its document before it.
    """
    stride = max(1, seq_len // 2)
    items: list[Window] = []
    data = bytearray()
    num_docs = 0
    for i, text in documents_within(corpus, max_bytes):
        if len(text.encode()) != corpus.num_bytes(i):
            raise UserError(f"{corpus.key(i)} changed while the run was reading it: {corpus.num_bytes(i)} bytes before")
        items += windows([tokenizer.bos_id, *tokenizer.encode(text)], seq_len, stride)
        data += text.encode()
        num_docs += 1
    whole = num_docs == len(corpus)
    part = f"every byte of all {num_docs}" if whole else f"the first {num_docs} of {len(corpus)}"
    scope = (
        f"{part} validation documents once ({len(data):,} bytes), context at most {seq_len} tokens, windows "
        f"overlap by half"
    )
    return ValidationSet(items, len(data), scope), bytes(data)
