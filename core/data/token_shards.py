"""Shards of token ids: the files of the fineweb track, read from a folder or fetched from the Hugging Face hub.

File      256 little-endian int32: magic, version, number of tokens, zeros; then the tokens as little-endian uint16
          [modded-nanogpt f411b3d; llm.c writes the same]. Each document begins with the id `bos`. One may go on in the
          next shard.
Names     <prefix>_train_<six digits>.bin, in the order of training, and <prefix>_val_<six digits>.bin.
Errors    a UserError of one sentence that names the file.
"""

import math
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.config import TOKEN_DATASETS
from core.data.download import Say, Shards
from core.data.files import refuse_pointer
from core.data.shards import fetches
from core.stopping import UserError, expanded, never

MAGIC = 20240520
VERSION = 1
WORD, HEADER_WORDS = np.dtype("<i4"), 256
HEADER_BYTES = WORD.itemsize * HEADER_WORDS
TOKEN = np.dtype("<u2")
VOCAB_SIZE = 50257  # of GPT-2
BOS = 50256  # its <|endoftext|>, in front of every document

# of documents of FineWeb in GPT-2's tokens [modded-nanogpt f411b3d, over 1.45 M of them]
MEDIAN_TOKENS, MEAN_TOKENS, MIN_TOKENS = 403, 690, 32
LOG_STD = math.sqrt(2 * math.log(MEAN_TOKENS / MEDIAN_TOKENS))  # of log-normal lengths with that median and mean

_CHUNK_TOKENS = 1 << 20  # read and indexed at a time, while they are in the cache
_FETCH_AGAIN = "fetch it again"


# -- one file ----------------------------------------------------------------------------------------------------------


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Makes `path` a shard of `tokens` (n,), integers that fit uint16; whole under its name, or not there."""
    if (
        tokens.ndim != 1
        or tokens.dtype.kind not in "iu"
        or (tokens.size and not 0 <= tokens.min() <= tokens.max() < 2**16)
    ):
        raise ValueError(
            f"tokens are {tokens.dtype} {tokens.shape}, expected one row of integers from 0 to {2**16 - 1}"
        )
    header = np.zeros(HEADER_WORDS, WORD)
    header[:3] = MAGIC, VERSION, tokens.size
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as file:
            file.write(header.tobytes())
            file.write(tokens.astype(TOKEN).tobytes())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def num_tokens(path: Path) -> int:
    """Of a shard, by its header. Raises UserError for a file that is none, or not as long as it says."""
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
    refuse_pointer(str(path), head)
    if head.lstrip()[:1] == b"<":
        raise UserError(f"{path}: holds a web page, not the data; {_FETCH_AGAIN}")
    if len(head) < HEADER_BYTES:
        raise UserError(f"{path}: has {size:,} bytes, a shard's header alone {HEADER_BYTES:,}; {_FETCH_AGAIN}")
    magic, version, count = np.frombuffer(head, WORD)[:3].tolist()
    if magic != MAGIC:
        raise UserError(f"{path}: is no shard of tokens, it begins with {magic} instead of {MAGIC}")
    if version != VERSION:
        raise UserError(f"{path}: has version {version} of the layout, expected {VERSION}")
    if size != (expected := HEADER_BYTES + count * TOKEN.itemsize):
        wrong = "truncated" if size < expected else "too long"
        raise UserError(
            f"{path}: {wrong}, it has {size:,} bytes and its header says {count:,} tokens, which are {expected:,} "
            f"bytes; {_FETCH_AGAIN}"
        )
    return count


@dataclass(frozen=True)
class Indexed:
    """A shard in memory. tokens (n,) uint16; starts: places of `bos`, in increasing order, one at least."""

    tokens: np.ndarray
    starts: list[int]


def read_shard(
    path: Path,
    *,
    bos: int = BOS,
    vocab_size: int = VOCAB_SIZE,
    first: int | None = None,
    stopped: Callable[[], bool] = never,
) -> Indexed:
    """Reads a shard, or its `first` tokens. Read and not mapped: a file that shrinks under a map kills the process.

    Raises UserError where the file is no whole shard, has fewer tokens than that, an id outside of the vocabulary or no
    document; InterruptedError once stopped().
    """
    count = num_tokens(path)
    if first is not None and first > count:
        raise UserError(f"{path}: has {count:,} tokens, {first:,} are needed; give a longer shard")
    tokens = np.empty(count if first is None else first, TOKEN)
    starts: list[int] = []
    with open(path, "rb", buffering=0) as file:
        file.seek(HEADER_BYTES)
        for begin in range(0, tokens.size, _CHUNK_TOKENS):
            if stopped():
                raise InterruptedError(f"no longer reading {path}")
            chunk = tokens[begin : begin + _CHUNK_TOKENS]
            view, have = chunk.view(np.uint8).data, 0
            while have < len(view):
                if not (got := file.readinto(view[have:])):
                    raise UserError(f"{path}: became shorter while it was read; {_FETCH_AGAIN}")
                have += got
            if (largest := int(chunk.max())) >= vocab_size:
                place = begin + int(chunk.argmax())
                raise UserError(
                    f"{path}: token {place:,} is {largest}, outside of the vocabulary of {vocab_size:,}; give tokens "
                    "of GPT-2's vocabulary, or fetch the file again"
                )
            starts += (np.flatnonzero(chunk == bos) + begin).tolist()
    if not starts:
        raise UserError(
            f"{path}: no document begins in its {tokens.size:,} tokens (with id {bos}); give a shard made like "
            "kjj0/fineweb10B-gpt2"
        )
    return Indexed(tokens, starts)


# -- many --------------------------------------------------------------------------------------------------------------


class TokenShards:
    """The shards of a data set: `train` in the order of training, one for validation.

    train    (name, bytes) of each; what a later run continues with must begin the same
    path     of a file, once it is there; waits while it is fetched
    """

    def __init__(
        self,
        name: str,
        train: Sequence[tuple[str, int]],
        validation: str,
        path: Callable[[str, Callable[[], bool]], Path],
    ) -> None:
        self.name, self.train, self.validation = name, tuple(train), validation
        self._path = path

    def path(self, name: str, stopped: Callable[[], bool] = never) -> Path:
        """Raises UserError where the file will not come, InterruptedError once stopped()."""
        return self._path(name, stopped)

    @property
    def tokens_per_shard(self) -> list[int]:
        """Of each training shard."""
        return [(num_bytes - HEADER_BYTES) // TOKEN.itemsize for _, num_bytes in self.train]


def open_token_shards(source: str, *, tokens: int, cache_dir: Path, say: Say) -> TokenShards:
    """A data set by its name, of which shards enough for `tokens` are fetched in the background (the first process of a
    node fetches, the others wait), or the shards in a folder."""
    if source in TOKEN_DATASETS:
        return _of_hub(source, tokens, cache_dir, say)
    folder = expanded(source)
    if not folder.is_dir():
        raise UserError(f"{source} is no folder: give one with *_train_*.bin, or one of {', '.join(TOKEN_DATASETS)}")
    kinds: dict[str, list[str]] = {"train": [], "val": []}
    for path in sorted(folder.glob("*.bin")):
        for kind, names in kinds.items():
            if f"_{kind}_" in path.name:
                names.append(path.name)
    for kind, names in kinds.items():
        if not names:
            raise UserError(
                f"{source} has no *_{kind}_*.bin: put the files of kjj0/fineweb10B-gpt2 there, or others so"
            )
        if len(prefixes := sorted({name.split(f"_{kind}_")[0] for name in names})) > 1:
            raise UserError(f"{source} mixes data sets ({', '.join(prefixes)}): give each a folder of its own")
    for name in (*kinds["train"], kinds["val"][0]):
        num_tokens(folder / name)  # before a run that would come upon it hours later
    train = [(name, (folder / name).stat().st_size) for name in kinds["train"]]
    return TokenShards(source, train, kinds["val"][0], lambda name, stopped: folder / name)


def _of_hub(name: str, tokens: int, cache_dir: Path, say: Say) -> TokenShards:
    dataset = TOKEN_DATASETS[name]
    shards = Shards(name, max(1, math.ceil(tokens / dataset.shard_tokens)), cache_dir)
    say(shards.announcement(tokens))
    if fetches():
        shards.fetch(say)
    by_name = {shard.name: shard for shard in shards.wanted}
    # what was put there by hand is there
    train = [(s.name, shards.path(s).stat().st_size if s.num_bytes is None else s.num_bytes) for s in shards.train]
    return TokenShards(name, train, shards.validation.name, lambda name, stopped: shards.wait(by_name[name], stopped))


# -- made up -----------------------------------------------------------------------------------------------------------


def synthetic(
    folder: Path,
    *,
    train_shards: int,
    tokens_per_shard: int,
    val_tokens: int,
    vocab_size: int,
    seed: int,
    bos: int = BOS,
    mean_tokens: float | None = None,
) -> None:
    """Writes shards that a small model learns from: a Markov chain in which each id has four successors, of
    probability 1/2, 1/4, 1/8, 1/8 (1.21 nats a token once they are learnt, log of the vocabulary before).

    vocab_size   ids of the chain are below it and not bos
    mean_tokens  of a document; lengths are log-normal, with FineWeb's ratios of median and least to the mean. Unset: as
                 FineWeb's, but a 64th of the smaller kind of shard at most
    Documents go on from one shard to the next.
    """
    smallest = min(tokens_per_shard, val_tokens)
    mean = min(MEAN_TOKENS, smallest / 64) if mean_tokens is None else mean_tokens
    if train_shards < 1 or smallest < 8 or not 2 <= mean <= smallest / 4:
        raise UserError(
            f"{train_shards} shards of {tokens_per_shard:,} tokens and one of {val_tokens:,}, documents of {mean:.1f}: "
            "expected a shard or more, of at least 4 documents of at least 2 tokens"
        )
    rng = np.random.default_rng(seed)
    ids = np.delete(np.arange(vocab_size), [bos] if bos < vocab_size else [])
    # four permutations, so that each id comes as often as the others: alone they tell nothing
    after = rng.permuted(np.tile(np.arange(ids.size), (4, 1)), axis=1)[[0, 0, 0, 0, 1, 1, 2, 3]].T

    def chain(size: int) -> np.ndarray:
        width = max(1, min(1024, size // 4096))  # chains side by side, put one behind the other
        drawn = rng.integers(8, size=(-(-size // width), width), dtype=np.uint8)
        steps, now = np.empty(drawn.shape, TOKEN), rng.integers(ids.size, size=width)
        for step, choice in zip(steps, drawn):
            now = after[now, choice]
            step[:] = ids[now]
        return steps.T.reshape(-1)[:size]

    folder.mkdir(parents=True, exist_ok=True)
    for kind, first, sizes in (("val", 0, [val_tokens]), ("train", 1, [tokens_per_shard] * train_shards)):
        begin = 0  # of the next document, counted from the beginning of the shard
        for number, size in enumerate(sizes, first):
            tokens = chain(size)
            while begin < size:
                tokens[begin] = bos
                length = rng.lognormal(math.log(mean * MEDIAN_TOKENS / MEAN_TOKENS), LOG_STD)
                # half a shard at most: one begins in each
                begin += round(min(max(length, mean * MIN_TOKENS / MEAN_TOKENS, 2), smallest / 2))
            begin -= size
            write_shard(folder / f"synthetic_{kind}_{number:06d}.bin", tokens)
