"""Rows of tokens for the fineweb track: what a stage's rows are, how many tokens they use up, and those to validate on.

Validation takes the first N tokens of its shard as they are: rows of V tokens each, documents uncut but for a row's
ends. core/data/row_loader.py has the training rows.
"""

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.data.loader import divisors
from core.data.token_shards import BOS, LOG_STD, MEAN_TOKENS, MEDIAN_TOKENS, VOCAB_SIZE, read_shard
from core.stopping import UserError

ROWS_PER_STEP = 8
VAL_TOKENS = 10_485_760  # that the track's loss is the mean over [modded-nanogpt f411b3d]
VAL_ROW_TOKENS = 262_144
VAL_MAX_DOCS = 896


@dataclass(frozen=True)
class RowShape:
    """A stage: so many optimizer steps with rows of T = row_tokens, documents of at most doc_cap tokens, at most
    max_docs of them in a row."""

    steps: int
    row_tokens: int
    doc_cap: int
    max_docs: int

    def __post_init__(self) -> None:
        if min(self.steps, self.row_tokens, self.doc_cap, self.max_docs) < 1:
            raise UserError(f"{self}: expected 1 or more of each")


class Row(NamedTuple):
    """inputs      (T,) int32
    targets     (T,) int64: the token behind each input, also where that begins the next document
    cu_seqlens  (max_docs + 1,) int32: where each document begins in inputs, the first at 0; then T to the end
    num_docs    that begin in inputs
    """

    inputs: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    num_docs: int


def tokens_read(shapes: Sequence[RowShape], rows_per_step: int = ROWS_PER_STEP) -> int:
    """Tokens that these stages use up, dropped ones included: an estimate from log-normal lengths with the median and
    mean of FineWeb's documents, and half as much again, since a shard too many only costs its download."""

    def below(x: float) -> float:  # of a standard normal
        return (1 + math.erf(x / math.sqrt(2))) / 2

    total = 0.0
    for shape in shapes:
        z = math.log(shape.doc_cap / MEDIAN_TOKENS) / LOG_STD
        kept = MEAN_TOKENS * below(z - LOG_STD) + shape.doc_cap * (1 - below(z))  # of a document, on average
        # the document at a row's end is dropped from there on: half of one, longer ones more often
        rest = MEAN_TOKENS * math.exp(LOG_STD**2) / 2
        total += shape.steps * rows_per_step * ((shape.row_tokens + 1) * MEAN_TOKENS / kept + rest)
    return math.ceil(1.5 * total)


def row_of(tokens: np.ndarray, begins: list[int], max_docs: int) -> Row:
    """Of T + 1 tokens. begins: where documents begin in the inputs, ascending."""
    size = tokens.size - 1
    cu_seqlens = np.full(max_docs + 1, size, np.int32)
    cu_seqlens[: len(begins)] = begins
    inputs, targets = tokens[:-1].astype(np.int32), tokens[1:].astype(np.int64)
    return Row(torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(cu_seqlens), len(begins))


def on_device(row: Row, device: torch.device) -> Row:
    """The row on `device`. On CUDA the copies are asynchronous, on the current stream; the allocator of pinned memory
    waits for them before it gives the memory away."""
    if device.type == "cpu":
        return row
    # pinned here and not in the thread, whose current device would be GPU 0 on every rank
    inputs, targets, cu_seqlens = (t.pin_memory().to(device, non_blocking=True) for t in row[:3])
    return Row(inputs, targets, cu_seqlens, row.num_docs)


def share_of(num: int, rank: int, world_size: int, what: str) -> range:
    """The rows of a process."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, expected 0 to {world_size - 1} in a world of {world_size}")
    if num % world_size:
        raise UserError(
            f"{num} rows {what} do not divide over {world_size} processes: start one of {divisors(num)} processes"
        )
    return range(num // world_size * rank, num // world_size * (rank + 1))


class ValidationRows:
    """The rows of this process of a validation shard, every time it is iterated over; `len` of them."""

    def __init__(
        self,
        path: Path,
        *,
        tokens: int = VAL_TOKENS,
        row_tokens: int = VAL_ROW_TOKENS,
        max_docs: int = VAL_MAX_DOCS,
        rank: int = 0,
        world_size: int = 1,
        bos: int = BOS,
        vocab_size: int = VOCAB_SIZE,
        device: str | torch.device = "cpu",
    ) -> None:
        """tokens: N of the track, that are predicted or context. Raises UserError where they are no whole rows for each
        process, the shard has fewer than N + 1, or a row more documents than max_docs (a part of one counts)."""
        if row_tokens < 1 or tokens < 1 or tokens % row_tokens:
            raise UserError(f"{tokens:,} tokens to validate on are no whole rows of {row_tokens:,}: give a multiple")
        self._mine = share_of(tokens // row_tokens, rank, world_size, "to validate on")
        shard = read_shard(path, bos=bos, vocab_size=vocab_size, first=tokens + 1)
        self._tokens, self._starts = shard.tokens, shard.starts
        self._size, self._max_docs, self._device = row_tokens, max_docs, torch.device(device)
        for i in range(tokens // row_tokens):
            if (found := len(self._begins(i))) > max_docs:
                raise UserError(f"{path}: row {i} has {found} documents, {max_docs} are taken: give shorter rows")

    def __len__(self) -> int:
        return len(self._mine)

    def __iter__(self) -> Iterator[Row]:
        for i in self._mine:
            tokens = self._tokens[i * self._size : (i + 1) * self._size + 1]
            yield on_device(row_of(tokens, self._begins(i), self._max_docs), self._device)

    def _begins(self, i: int) -> list[int]:
        """Where documents, or what the row has of one, begin in row i."""
        first = i * self._size
        low, high = (bisect.bisect_left(self._starts, place) for place in (first + 1, first + self._size))
        return [0, *(start - first for start in self._starts[low:high])]
