"""Training rows of the fineweb track: documents of shards one behind the other, read ahead by threads.

Rows      Documents are taken in order, each cut at the stage's cap and at the room that is left, until a row has
          exactly T + 1 tokens; the rest of a cut document is dropped, the next row begins with the next document
          [modded-nanogpt f411b3d]. A document goes on in the next shard, so that rows do not depend on where a data set
          was cut into files (modded-nanogpt ends it there, and drops the step that it had begun to fill). No shuffling,
          one pass. Tokens in front of the first document are passed over.
Steps     A step has rows_per_step rows whatever the number of processes; of W, process r takes the rows from
          r * rows_per_step / W on. All walk over all documents, and copy those of their own rows.
State     The place behind the documents of the last step handed out, the same in every process, never of what was read
          ahead. Goes on with any number of processes, and with more shards behind those it was made with.
Threads   One prepares rows, a few steps ahead; one reads shards, one shard ahead. What goes wrong in them is raised by
          next_step().
"""

import bisect
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from core.data.token_rows import ROWS_PER_STEP, Row, RowShape, on_device, row_of, share_of
from core.data.token_shards import BOS, VOCAB_SIZE, Indexed, TokenShards, read_shard
from core.stopping import UserError


class _Place(NamedTuple):
    """What is taken next: the first document that begins in `shard` at `offset` or behind it."""

    shard: int = 0
    offset: int = 0
    documents: int = 0  # taken
    tokens: int = 0  # of inputs


class _Exhausted(Exception):
    """No document is left."""


class _Reader:
    """Indexed shards by number, one read ahead. For one thread; those in front of the last one asked for are
    forgotten."""

    def __init__(self, shards: TokenShards, bos: int, vocab_size: int) -> None:
        self._shards, self._options = shards, {"bos": bos, "vocab_size": vocab_size}
        self._stop = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._pending: dict[int, Future[Indexed]] = {}

    def __getitem__(self, i: int) -> Indexed:
        self._pending = {k: future for k, future in self._pending.items() if k >= i}
        for k in (i, i + 1):
            if k < len(self._shards.train) and k not in self._pending:
                self._pending[k] = self._thread.submit(self._read, k)
        return self._pending[i].result()

    def _read(self, i: int) -> Indexed:
        path = self._shards.path(self._shards.train[i][0], self._stop.is_set)
        return read_shard(path, **self._options, stopped=self._stop.is_set)

    def close(self) -> None:
        self._stop.set()
        self._thread.shutdown(cancel_futures=True)


class _Documents:
    """The documents of all shards, one behind the other."""

    def __init__(self, reader: _Reader, num_shards: int, place: _Place) -> None:
        self._reader, self._num_shards, self.place = reader, num_shards, place

    def fill(self, shape: RowShape, copies: bool) -> tuple[np.ndarray, list[int]]:
        """(T + 1,) uint16 of the next row, empty unless `copies`; where documents begin in its inputs.
        Raises _Exhausted, UserError where they are more than fit."""
        size = shape.row_tokens + 1
        row = np.empty(size if copies else 0, np.uint16)
        begins: list[int] = []
        i, offset, documents, placed = *self.place[:3], 0
        while placed < size:
            if i == self._num_shards:
                raise _Exhausted
            shard = self._reader[i]
            starts, n = shard.starts, shard.tokens.size
            k = bisect.bisect_left(starts, offset)
            while placed < size and k < len(starts):
                want = min(shape.doc_cap, size - placed)
                begin, k = starts[k], k + 1
                end = min(begin + want, starts[k] if k < len(starts) else n)
                pieces = [shard.tokens[begin:end]]
                if k == len(starts) and end - begin < want and i + 1 < self._num_shards:  # goes on in the next shard
                    following = self._reader[i + 1]
                    pieces.append(following.tokens[: min(want - (end - begin), following.starts[0])])
                if placed < shape.row_tokens:
                    begins.append(placed)
                documents += 1
                for piece in pieces:
                    if copies:
                        row[placed : placed + piece.size] = piece
                    placed += piece.size
            i, offset = (i, starts[k]) if k < len(starts) else (i + 1, 0)
        if len(begins) > shape.max_docs:
            raise UserError(
                f"a row of {shape.row_tokens:,} tokens has {len(begins)} documents, the stage takes {shape.max_docs}: "
                "the documents are too short, this is no text like FineWeb's"
            )
        self.place = _Place(i, offset, documents, self.place.tokens + shape.row_tokens)
        return row, begins


class RowLoader:
    """Steps of rows, stage after stage. Use as a context manager, or call close().

    waited_s    seconds that next_step() was not ready, of this process since it began
    """

    def __init__(
        self,
        shards: TokenShards,
        shapes: Sequence[RowShape],
        *,
        rows_per_step: int = ROWS_PER_STEP,
        rank: int = 0,
        world_size: int = 1,
        bos: int = BOS,
        vocab_size: int = VOCAB_SIZE,
        device: str | torch.device = "cpu",
        state: dict[str, Any] | None = None,
        prefetch_steps: int = 2,
    ) -> None:
        """
        shapes      of all steps from the first on, also those before `state`
        bos         id that begins a document; vocab_size: ids are below it
        state       of any process, to continue with the step after it
        Raises UserError for sizes that do not fit together, shards that cannot be enough, and a state of others.
        """
        self._mine = share_of(rows_per_step, rank, world_size, "a step")
        self._rank, self._world_size, self._rows_per_step = rank, world_size, rows_per_step
        self._shards, self._shapes, self._device = shards, tuple(shapes), torch.device(device)
        self._ends = list(accumulate(shape.steps for shape in shapes))
        self._before = [0, *accumulate(shards.tokens_per_shard)]  # tokens in front of each shard, and of all
        self._step, self._place = 0, _Place()
        self.waited_s = 0.0
        if state is not None:
            self._step, self._place = self._continued(state)
        self._check_enough()
        self._reader = _Reader(shards, bos, vocab_size)
        try:
            self._check_place()
        except BaseException:
            self._reader.close()
            raise
        self._documents = _Documents(self._reader, len(shards.train), self._place)
        self._stop = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._pending: deque[Future[tuple[list[Row], _Place]]] = deque()
        self._submitted = self._step
        for _ in range(max(1, prefetch_steps)):
            self._submit()

    def next_step(self) -> list[Row]:
        """The rows of this process, in order, on `device`: its micro-steps. Raises what a thread met; the same again at
        every later call."""
        if self._stop.is_set():
            raise RuntimeError("the loader is closed")
        if not self._pending:
            raise RuntimeError(f"all {self._ends[-1]} steps were handed out")
        started = time.perf_counter()
        rows, place = self._pending[0].result()
        self.waited_s += time.perf_counter() - started
        self._pending.popleft()
        self._submit()
        self._step, self._place = self._step + 1, place
        return [on_device(row, self._device) for row in rows]

    def fault_ahead(self, steps: int) -> UserError | None:
        """What is wrong with the data of the next `steps` steps, as many as are prepared at most; waits for them."""
        for future in list(self._pending)[:steps]:
            if isinstance(error := future.exception(), UserError):
                return error
        return None

    def state(self) -> dict[str, Any]:
        """JSON: the last step handed out, the place behind it, and the shards."""
        return {"step": self._step, **self._place._asdict(), "shards": [list(shard) for shard in self._shards.train]}

    def stats(self) -> dict[str, int | float]:
        """JSON, up to the last step handed out, since the start of the run: of all processes, tokens and documents add
        up to those of the run.

        tokens      target tokens handed out
        documents   begun
        epochs      share of all tokens that is passed
        crop_waste  share of the passed tokens that was dropped, 0..1
        """
        passed, placed = self._passed(), self._place.tokens + self._step * self._rows_per_step
        return {
            "tokens": self._place.tokens // self._world_size,
            "documents": (self._place.documents + self._rank) // self._world_size,
            "epochs": passed / self._before[-1],
            "crop_waste": max(0.0, 1 - placed / passed) if passed else 0.0,
        }

    def close(self) -> None:
        """Stop the threads; at most the row in preparation is waited for."""
        self._stop.set()
        self._reader.close()  # first: the other may wait for a shard
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _submit(self) -> None:
        if self._submitted < self._ends[-1]:
            shape = self._shapes[bisect.bisect_right(self._ends, self._submitted)]
            self._submitted += 1
            self._pending.append(self._thread.submit(self._prepare, self._submitted, shape))

    def _prepare(self, step: int, shape: RowShape) -> tuple[list[Row], _Place]:
        """The rows of this process in step `step`, counted from 1, and the place behind those of all."""
        rows = []
        for i in range(self._rows_per_step):
            if self._stop.is_set():
                raise InterruptedError("the loader is closed")
            try:
                tokens, begins = self._documents.fill(shape, i in self._mine)
            except _Exhausted:
                raise UserError(
                    f"{self._shards.name}: its {self._before[-1]:,} tokens to train on end within step {step} of "
                    f"{self._ends[-1]}, of which the steps still take {self._needed(step - 1):,} and more, since the "
                    "rests of cut documents are dropped; give more shards, or fewer steps"
                ) from None
            if i in self._mine:
                rows.append(row_of(tokens, begins, shape.max_docs))
        return rows, self._documents.place

    # what is enough, and what fits a state

    def _passed(self) -> int:
        return self._before[self._place.shard] + self._place.offset

    def _needed(self, step: int) -> int:
        """Tokens in the rows of the steps behind `step`."""
        return sum(
            max(0, min(shape.steps, end - step)) * self._rows_per_step * (shape.row_tokens + 1)
            for shape, end in zip(self._shapes, self._ends)
        )

    def _check_enough(self) -> None:
        left, needed = self._before[-1] - self._passed(), self._needed(self._step)
        if needed > left:
            raise UserError(
                f"{self._shards.name}: {left:,} tokens are left to train on in {len(self._shards.train)} shards, the "
                f"{self._ends[-1] - self._step} steps to come take {needed:,} and more, since the rests of cut "
                "documents are dropped; give more shards, or fewer steps"
            )

    def _continued(self, state: dict[str, Any]) -> tuple[int, _Place]:
        for (was, was_bytes), (now, now_bytes) in zip(state["shards"], self._shards.train):
            if (was, was_bytes) != (now, now_bytes):
                raise UserError(
                    f"{self._shards.name}: the checkpoint was trained on {was} of {was_bytes:,} bytes, here is {now} "
                    f"of {now_bytes:,}; give the same shards, or start a new run"
                )
        place = _Place(*(state[name] for name in _Place._fields))
        here = len(self._shards.train)
        if place.shard > here or (place.shard == here and place.offset):
            raise UserError(
                f"{self._shards.name}: the checkpoint goes on in shard {place.shard + 1}, here are {here}; give more"
            )
        return state["step"], place

    def _check_place(self) -> None:
        """A shard of the same name and size may be another one: then hardly with a document at the same place."""
        shard, offset = self._place[:2]
        if offset and offset not in self._reader[shard].starts:
            raise UserError(
                f"{self._shards.train[shard][0]}: no document begins at token {offset:,}, where the checkpoint goes "
                "on: it is another shard of that name; give the same, or start a new run"
            )


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """That of every process. ValueError where they differ."""
    if any(state != states[0] for state in states):
        raise ValueError(f"data states of different runs or steps: {states}")
    return states[0]
