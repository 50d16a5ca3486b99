"""A dataset of shuffled shards as training text: read in its own order, while later shards are still on their way.

Order     shard by shard, row by row; the documents were shuffled when the dataset was made, so every epoch is the same
          [as nanochat 92d63d4]. Position p is thus known as soon as the shards up to its own are there.
Opening   reads no row and hashes no key: the footer of a shard when it is needed first.
Split     the last shard of the dataset is validation, whatever the seed and `val_every`.
"""

import bisect
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from core.config import DATASETS, LEARNED_CHARS
from core.data.corpus import Corpus, Documents, Rows
from core.data.download import Say, Shard, Shards, shards_for
from core.data.files import Progress, digest_of
from core.data.sources import Parquet, Recent

PART_BYTES = 1 << 20  # of a longer document of the validation shard; training reads documents whole


class ShardCorpus:
    """Training documents in the order of their shards. May be read from several threads; reading waits for a shard that
    is not there yet.

    name, seed, fingerprint, skipped, notes   as of a Corpus; the fingerprint is that of the dataset and its commit, so
                                              that a longer run with more shards goes on
    """

    def __init__(self, shards: Shards, *, seed: int) -> None:
        self.name = shards.name
        self.seed = seed
        self.fingerprint = fingerprint(shards)
        self.skipped: dict[str, int] = {}
        self.notes = ["the documents come in the order of the dataset, which was shuffled when it was made"]
        self._shards = shards
        self._sources: list[Parquet] = []
        self._starts = [0]  # the first document of each opened shard, and the end of the last
        self._recent = Recent()
        self._lock = threading.Lock()
        self._closed = threading.Event()

    @property
    def chars_to_learn(self) -> int:
        """For the tokenizer: LEARNED_CHARS, or all that a short run fetches, about."""
        return min(LEARNED_CHARS, round(len(self._shards.train) * DATASETS[self.name].shard_chars))

    def __len__(self) -> int:
        """Documents; an estimate until the last shard was opened."""
        self._open(1)
        return round(self._starts[-1] / len(self._sources) * len(self._shards.train))

    def __getitem__(self, i: int) -> str:
        """Document i. Raises UserError if its shard will not come or is damaged, IndexError behind the last one."""
        while i >= self._starts[-1]:
            if len(self._sources) == len(self._shards.train):
                raise IndexError(f"document {i} of {self._starts[-1]}")
            self._open(len(self._sources) + 1)
        shard = bisect.bisect(self._starts, i) - 1
        return self._sources[shard].read(i - self._starts[shard])

    def __iter__(self) -> Iterator[str]:
        i = 0
        while True:
            try:
                text = self[i]
            except IndexError:
                return
            yield text
            i += 1

    def at(self, position: int) -> str:
        """The document at this position of the endless sequence of epochs."""
        try:
            return self[position]
        except IndexError:
            return self[position % self._starts[-1]]

    def close(self) -> None:
        """Ends every wait for a shard, with an InterruptedError."""
        self._closed.set()

    def _open(self, count: int) -> None:
        """Opens shards until so many are open."""
        with self._lock:
            while len(self._sources) < count:
                shard = self._shards.train[len(self._sources)]
                source = open_shard(self._shards, shard, self._recent, stopped=self._closed.is_set)
                self._sources.append(source)
                self._starts.append(self._starts[-1] + source.rows.size)


def fingerprint(shards: Shards) -> str:
    """hex sha256 of what the dataset is."""
    return hashlib.sha256(f"{shards.dataset.repo} {shards.commit}".encode()).hexdigest()


def open_shard(
    shards: Shards,
    shard: Shard,
    recent: Recent,
    *,
    stopped: Callable[[], bool] = lambda: False,
    part_bytes: int = PART_BYTES,
) -> Parquet:
    path = shards.wait(shard, stopped)
    digest = shard.sha256 or digest_of(str(path), shards.folder, Progress(None))
    return Parquet(str(path), f"{shards.name}/{shard.name}", recent, digest, part_bytes)


def open_dataset(
    name: str, *, tokens: int, crops: bool, seed: int, cache_dir: Path, say: Say
) -> tuple[ShardCorpus, Corpus]:
    """(training, validation) of a dataset, with shards enough for that many tokens; crops: as `shards_for`.

    The first process of a node fetches what is missing, the others wait for it. Raises UserError as `Shards`.
    """
    shards = Shards(name, shards_for(name, tokens, crops=crops), cache_dir)
    say(shards.announcement(tokens))
    if fetches():
        shards.fetch(say)
    return ShardCorpus(shards, seed=seed), validation(shards, seed)


def open_validation_shard(name: str, *, seed: int, cache_dir: Path, say: Say) -> tuple[str, Corpus]:
    """The fingerprint of a dataset, and its validation documents."""
    shards = Shards(name, 0, cache_dir)
    if fetches():
        shards.fetch(say)
    return fingerprint(shards), validation(shards, seed)


def validation(shards: Shards, seed: int) -> Corpus:
    source = open_shard(shards, shards.validation, Recent())
    documents = Documents(shards.name, [source], bytes.fromhex(source.digest), {})
    return Corpus(documents, [Rows.of(source, source.rows)], seed=seed, split="validation shard")


def fetches() -> bool:
    """Whether this process is the one of its node that fetches."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
