"""Rows of row_len tokens out of documents of any length, by best fit from a buffer, without padding.

A row is filled from left to right. Before each placement the buffer is topped up to at least buffer_docs entries; then
the LARGEST entry that fits wholly into the rest of the row is placed. When none fits, the SHORTEST entry is cut and its
head fills the row exactly.

mode "crop"      the tail of a cut document is discarded: a document starts at its bos wherever it is seen, about a
                 third of the tokens are lost (median document 400 tokens, rows of 2049). Ties go to the entry that has
                 been in the buffer longest
mode "continue"  nothing is lost: a document longer than a row is cut into rows on entry (each piece is an entry of the
                 buffer), the tail of a cut entry re-enters the buffer at its end. Continuations have no bos of their
                 own. Ties go to a random entry: most pieces are as long as a row, and in order of arrival a stream
                 would be in one document for many steps (1.63 instead of 1.50 bits per byte, bench/LOG.md)

The rule read literally scans the buffer at every placement. Here entries are held in a queue for each
length, with one bit a length in an integer that tells which queues are occupied, so a placement costs two bit
operations; entries longer than a row, which can only ever be the shortest, are in a heap.

The buffer is described by (document position, start, stop) of its entries in order: a few numbers each, from which it
is rebuilt by tokenising those documents again.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np

from core.stopping import UserError

# (document position, start, stop, tokens): tokens are those of [start, stop) that a row may still use
_Entry = tuple[int, int, int, np.ndarray]


class BestFitPacker:
    """num_documents, num_placed, num_cropped: documents taken in, tokens placed in rows, tokens discarded so far."""

    def __init__(self, row_len: int, *, mode: str, buffer_docs: int, seed: int = 0):
        if mode not in ("continue", "crop"):
            raise UserError(f"packing mode is {mode!r}, expected 'continue' or 'crop'")
        if row_len < 1 or buffer_docs < 1:
            raise ValueError(f"row_len is {row_len} and buffer_docs {buffer_docs}, expected 1 or more of each")
        self.row_len = row_len
        self.buffer_docs = buffer_docs
        self.num_documents = 0
        self.num_placed = 0
        self.num_cropped = 0
        self.num_takes = 0  # entries taken so far: the state of the random choice
        self._seed = seed
        self._crop = mode == "crop"
        self._entries: dict[int, _Entry] = {}  # by number of arrival, hence in buffer order
        self._arrivals = 0
        self._queues: list[deque[int]] = [deque() for _ in range(row_len + 1)]  # arrival numbers, by length
        self._occupied = 0  # bit n: queue n holds something
        self._long: list[tuple[int, int]] = []  # heap of (length, arrival number) of entries longer than row_len

    def fill(self, row: np.ndarray, next_document: Callable[[], tuple[int, np.ndarray]]) -> None:
        """Write the next row into `row`, (row_len,) of any integer dtype.

        next_document() returns (position, tokens): a number that identifies the document, and its (n,) ids, n >= 1,
        which must not change afterwards. It is called as often as the buffer wants documents.
        """
        assert row.shape == (self.row_len,), (row.shape, self.row_len)
        filled = 0
        while filled < self.row_len:
            while len(self._entries) < self.buffer_docs:
                self._add_document(*next_document())
            space = self.row_len - filled
            fitting = self._occupied & ((2 << space) - 1)
            if fitting:
                _, _, _, tokens = self._take(fitting.bit_length() - 1)
                row[filled : filled + tokens.size] = tokens
                filled += tokens.size
                continue
            position, start, stop, tokens = self._take_shortest()
            row[filled:] = tokens[:space]
            filled = self.row_len
            if self._crop:
                self.num_cropped += stop - start - space
            else:
                self._append((position, start + space, stop, tokens[space:]))
        self.num_placed += self.row_len

    def snapshot(self) -> tuple[_Entry, ...]:
        """The buffer, in order, without copying tokens; as_json() turns it into a state. O(buffer), ~10 ns an
        entry."""
        return tuple(self._entries.values())

    def state(self) -> list[list[int]]:
        """[[position, start, stop], ...] of the buffer, in order; JSON."""
        return as_json(self.snapshot())

    def restore(
        self, state: Iterable[Iterable[int]], tokens_of: Callable[[int], np.ndarray], *, num_takes: int
    ) -> None:
        """Fill the empty buffer with what state() described; tokens_of(position) gives a document's tokens again.

        num_takes is the counter of that name at the time. The rows that follow are those that would have followed
        state(). The other counters are left alone.
        """
        self.num_takes = num_takes
        assert not self._entries, len(self._entries)
        known: dict[int, np.ndarray] = {}
        for position, start, stop in state:
            if position not in known:
                known[position] = tokens_of(position)
            tokens = known[position][start:stop]
            assert tokens.size == stop - start > 0, (position, start, stop, known[position].size)
            self._append((position, start, stop, self._usable(tokens)))

    def _add_document(self, position: int, tokens: np.ndarray) -> None:
        assert tokens.size > 0, position
        self.num_documents += 1
        step = tokens.size if self._crop else self.row_len
        for start in range(0, tokens.size, step):
            stop = min(start + step, tokens.size)
            self._append((position, start, stop, self._usable(tokens[start:stop])))

    def _usable(self, tokens: np.ndarray) -> np.ndarray:
        # what lies beyond a row can only be discarded, and the longest documents stay in the buffer longest
        return tokens[: self.row_len].copy() if tokens.size > self.row_len else tokens

    def _append(self, entry: _Entry) -> None:
        arrival = self._arrivals
        self._arrivals += 1
        self._entries[arrival] = entry
        length = entry[2] - entry[1]
        if length > self.row_len:
            heapq.heappush(self._long, (length, arrival))
        else:
            self._queues[length].append(arrival)
            self._occupied |= 1 << length

    def _take(self, length: int) -> _Entry:
        queue = self._queues[length]
        if self._crop or len(queue) == 1:
            arrival = queue.popleft()
        else:
            i = random_bits(self._seed, self.num_takes) % len(queue)
            arrival = queue[i]
            del queue[i]
        self.num_takes += 1
        if not queue:
            self._occupied ^= 1 << length
        return self._entries.pop(arrival)

    def _take_shortest(self) -> _Entry:
        if self._occupied:
            return self._take((self._occupied & -self._occupied).bit_length() - 1)
        return self._entries.pop(heapq.heappop(self._long)[1])


def random_bits(seed: int, n: int) -> int:
    """64 random bits, a function of (seed, n): the n-th output of splitmix64 from a state that the seed scatters."""
    z = (seed * 0xD1342543DE82EF95 + (n + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return z ^ (z >> 31)


def as_json(snapshot: Iterable[_Entry]) -> list[list[int]]:
    """[[position, start, stop], ...] of a snapshot."""
    return [[position, start, stop] for position, start, stop, _ in snapshot]
