"""Training batches: a fixed number of document streams, tokenised and packed ahead by a thread.

Streams   S = num_streams, fixed for a run. Stream s reads the global document positions p = s, s + S, s + 2S, ...;
          position p is document order(p // N)[p % N] of a corpus of N (`at`). Each stream has a packer of its own.
Rows      global row r of a step is the next row of stream r % S. Rank k owns the streams s with s % world_size == k, so
          its rows are those with (r % S) % world_size == k, in increasing r. What a step contains as a whole therefore
          does not depend on the number of processes.
State     is that of the last step handed out, never of what was prepared ahead: for each stream its next position and
          what is in its buffer, as positions. The states of all ranks, merged, continue on any number of ranks; on
          resuming, rows_per_step and device_batch_size may change, all that shapes the streams may not.
Thread    one; it reads, tokenises (outside the GIL) and packs at most prefetch_steps steps ahead. What goes wrong in it
          is raised by next_step().
"""

import math
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from core.data.corpus import Corpus
from core.data.packing import BestFitPacker, as_json
from core.data.shards import ShardCorpus
from core.data.tokenizer import Tokenizer
from core.stopping import UserError

_ADVICE = {
    "corpus": "training data changed since the checkpoint: a file was added, removed, renamed or edited; restore "
    "it, go on with the text as it is now by --mended-data, or start a new run",
    "tokenizer": "tokenizer is not that of the checkpoint: its vocabulary or its split pattern differs; restore the "
    "folder of cached tokenizers or the version of Redline that trained it, or start a new run",
}


class Loader:
    """Iterates over the corpus forever. Use as a context manager, or call close()."""

    def __init__(
        self,
        corpus: Corpus | ShardCorpus,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        rows_per_step: int,
        device_batch_size: int,
        num_streams: int,
        buffer_docs: int,
        rank: int = 0,
        world_size: int = 1,
        mode: str = "continue",
        device: str | torch.device = "cpu",
        state: dict[str, Any] | None = None,
        prefetch_steps: int = 2,
    ):
        """
        rows_per_step      rows of seq_len tokens in a step, of all ranks together
        device_batch_size  rows of a micro-batch of one rank
        mode, buffer_docs  see core/data/packing.py; the buffer is per stream; a longer one packs better where tails are
                           discarded, and mixes better where the pieces of a document are many
        state              merge_states() of all ranks' state(), to continue with the step after it
        Raises UserError for sizes that do not fit together and for a state of another corpus or other settings.
        """
        check_batch(rows_per_step * seq_len, seq_len, device_batch_size, num_streams, world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, expected 0 to {world_size - 1} in a world of {world_size}")
        self._corpus = corpus
        self._settings = {
            "corpus": corpus.fingerprint,
            "seed": corpus.seed,
            "tokenizer": tokenizer.digest,
            "seq_len": seq_len,
            "num_streams": num_streams,
            "mode": mode,
            "buffer_docs": buffer_docs,
        }
        self._seq_len = seq_len
        self._num_micro = rows_per_step // world_size // device_batch_size
        self._device_batch_size = device_batch_size
        self._device = torch.device(device)
        packing: dict[str, Any] = {"mode": mode, "buffer_docs": buffer_docs}
        self._streams = [
            _Stream(
                corpus,
                tokenizer,
                s,
                num_streams,
                BestFitPacker(seq_len + 1, seed=corpus.seed * num_streams + s, **packing),
            )
            for s in range(rank, num_streams, world_size)
        ]
        self.waited_s = 0.0  # seconds that next_step() was not ready, of this process since it began
        self._step = 0
        if state is not None:
            self._check_state(state)
            self._step = state["step"]
            for stream in self._streams:
                stream.restore(state["streams"][str(stream.index)])
        self._consumed = [stream.snapshot() for stream in self._streams]
        self._staged: deque[torch.Tensor] = deque(maxlen=2)

        self._stop = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._pending: deque[Future[tuple[np.ndarray, list[_StreamSnapshot]]]] = deque()
        for _ in range(max(1, prefetch_steps)):
            self._pending.append(self._thread.submit(self._prepare))

    def next_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(inputs, targets) of this rank's next step, each (num_micro, device_batch_size, seq_len) int64 on `device`.

        On CUDA the copy is asynchronous, on the current stream. Raises what the thread met: ValueError for corrupt
        data.
        """
        if self._stop.is_set():
            raise RuntimeError("the loader is closed")
        # a failed step stays where it is: every later call raises the same
        started = time.perf_counter()
        batch, streams = self._pending[0].result()
        self.waited_s += time.perf_counter() - started
        self._pending.popleft()
        self._pending.append(self._thread.submit(self._prepare))
        self._step += 1
        self._consumed = streams
        host = torch.from_numpy(batch)
        if self._device.type == "cuda":
            # pinned here and not in the thread, whose current device would be GPU 0 on every rank
            host = host.pin_memory()
            self._staged.append(host)
        inputs, targets = host.to(self._device, non_blocking=True)
        return inputs, targets

    def fault_ahead(self, steps: int) -> UserError | None:
        """What is wrong with the data of the next `steps` steps, as many as are prepared at most; waits for them."""
        for future in list(self._pending)[:steps]:
            if isinstance(error := future.exception(), UserError):
                return error
        return None

    def state(self) -> dict[str, Any]:
        """JSON: settings, number of the last step handed out, and this rank's streams after it."""
        streams = {str(snapshot.index): snapshot.as_json() for snapshot in self._consumed}
        return {**self._settings, "step": self._step, "streams": streams}

    def stats(self) -> dict[str, int | float]:
        """JSON: totals over this rank's streams up to the last step handed out, since the start of the run.

        tokens      target tokens handed out
        documents   documents taken from the corpus, those in the buffers included
        epochs      passes over the corpus that the streams have taken in, a fraction
        crop_waste  share of the tokens used up that was discarded, 0..1
        """
        streams = self._consumed
        rows = sum(stream.num_rows for stream in streams)
        documents = sum(stream.num_documents for stream in streams)
        cropped = sum(stream.num_cropped for stream in streams)
        placed = rows * (self._seq_len + 1)
        return {
            "tokens": rows * self._seq_len,
            "documents": documents,
            "epochs": documents / len(streams) * self._settings["num_streams"] / len(self._corpus),
            "crop_waste": cropped / (cropped + placed) if placed else 0.0,
        }

    def close(self) -> None:
        """Stop the thread; at most the row in preparation is waited for."""
        self._stop.set()
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _prepare(self) -> tuple[np.ndarray, list["_StreamSnapshot"]]:
        """(2, num_micro, device_batch_size, seq_len) int64: inputs and targets of the next step; the streams after
        it."""
        rows = np.empty((self._num_micro * self._device_batch_size, self._seq_len + 1), dtype=np.int64)
        for i, row in enumerate(rows):
            if self._stop.is_set():
                break
            self._streams[i % len(self._streams)].fill(row)
        batch = np.stack([rows[:, :-1], rows[:, 1:]])
        batch = batch.reshape(2, self._num_micro, self._device_batch_size, self._seq_len)
        return batch, [stream.snapshot() for stream in self._streams]

    def _check_state(self, state: dict[str, Any]) -> None:
        for name, expected in self._settings.items():
            if state.get(name) != expected:
                if name in _ADVICE:  # digests say nothing to people
                    raise UserError(f"the {_ADVICE[name]}")
                raise UserError(
                    f"data state has {name} {state.get(name)!r}, this run has {expected!r}: resume with the "
                    "settings of the checkpoint or start a new run"
                )
        missing = [stream.index for stream in self._streams if str(stream.index) not in state["streams"]]
        if missing:
            raise UserError(f"data state lacks streams {missing}: resume from merge_states() of all ranks' states")


def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """One state out of the state() of every rank, in any order; what Loader(state=...) takes.

    ValueError if they are not of one step of one run, or do not hold every stream once.
    """
    if not states:
        raise ValueError("no data states to merge, expected one of each rank")
    common = {name: value for name, value in states[0].items() if name != "streams"}
    streams: dict[str, Any] = {}
    for state in states:
        for name, value in common.items():
            if state.get(name) != value:
                raise ValueError(f"data states of different runs or steps: {name} is {state.get(name)!r} and {value!r}")
        twice = streams.keys() & state["streams"].keys()
        if twice:
            raise UserError(f"streams {sorted(twice, key=int)} are in two data states, expected one state of each rank")
        streams |= state["streams"]
    if len(streams) != common["num_streams"]:
        raise UserError(
            f"data states hold {len(streams)} of {common['num_streams']} streams, expected one state of each rank"
        )
    return {**common, "streams": dict(sorted(streams.items(), key=lambda item: int(item[0])))}


class _Stream:
    """Documents index, index + num_streams, ... of the endless sequence of epochs, packed into rows."""

    def __init__(
        self, corpus: Corpus | ShardCorpus, tokenizer: Tokenizer, index: int, num_streams: int, packer: BestFitPacker
    ):
        self.index = index
        self._corpus = corpus
        self._tokenizer = tokenizer
        self._num_streams = num_streams
        self._packer = packer
        self._next_position = index
        self._num_rows = 0

    def fill(self, row: np.ndarray) -> None:
        self._packer.fill(row, self._next_document)
        self._num_rows += 1

    def snapshot(self) -> "_StreamSnapshot":
        packer = self._packer
        return _StreamSnapshot(
            self.index,
            self._next_position,
            self._num_rows,
            packer.num_documents,
            packer.num_cropped,
            packer.num_takes,
            packer.snapshot(),
        )

    def restore(self, state: dict[str, Any]) -> None:
        self._next_position = state["next_position"]
        self._num_rows = state["rows"]
        self._packer.num_documents = state["documents"]
        self._packer.num_cropped = state["cropped"]
        self._packer.restore(state["buffer"], self._tokens_of, num_takes=state["takes"])

    def _next_document(self) -> tuple[int, np.ndarray]:
        position = self._next_position
        tokens = self._tokens_of(position)
        self._next_position += self._num_streams
        return position, tokens

    def _tokens_of(self, position: int) -> np.ndarray:
        return self._tokenizer.encode_document(self._corpus.at(position))


class _StreamSnapshot(NamedTuple):
    index: int
    next_position: int
    num_rows: int
    num_documents: int
    num_cropped: int
    num_takes: int
    buffer: tuple[Any, ...]  # of packing entries, by reference: written out only when a state is asked for

    def as_json(self) -> dict[str, Any]:
        return {
            "next_position": self.next_position,
            "rows": self.num_rows,
            "documents": self.num_documents,
            "cropped": self.num_cropped,
            "takes": self.num_takes,
            "buffer": as_json(self.buffer),
        }


def check_batch(tokens: int, seq_len: int, device_batch_size: int, num_streams: int, world_size: int) -> None:
    """UserError, naming what would work, where a step of `tokens` does not divide: streams over processes, tokens into
    rows for every stream, the rows of a process into micro-batches. The one place that says so, for the plan and for
    the loader."""
    if num_streams % world_size:
        raise UserError(
            f"{num_streams} data streams do not divide over {world_size} processes: start one of "
            f"{divisors(num_streams)} "
            "processes, or set --num-streams to a multiple"
        )
    unit = seq_len * num_streams
    if tokens < 1 or tokens % unit:
        below = tokens // unit * unit
        good = f"{below} or {below + unit}" if below > 0 else f"{unit}"
        raise UserError(
            f"total_batch_size is {tokens} tokens: expected a multiple of {unit} "
            f"(seq_len {seq_len} x {num_streams} streams), such as {good}"
        )
    rows = tokens // seq_len // world_size
    if device_batch_size < 1 or rows % device_batch_size:
        raise UserError(
            f"device_batch_size is {device_batch_size} rows: each process has {rows} rows per step, "
            f"so one of {divisors(rows)} works"
        )


def divisors(n: int) -> list[int]:
    """In increasing order, in O(sqrt(n))."""
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})
