"""Byte-level BPE: trained by rustbpe (in a process of its own), applied by tiktoken.

Vocabulary   256 bytes, then merges in the order they were learnt, then the special tokens; vocab_size counts all of
             them.
Documents    open with the first special token (bos) and have no closing one.
Text         encode() is total and decode() its inverse on every str without lone surrogates. Special tokens have no
             spelling: their names in a text are text.
On disk      tokenizer.tiktoken (base64 of a token's bytes, space, rank; a line each) and tokenizer.json (pattern,
             special tokens, sizes, digest, what it was trained on). Nothing is executed on loading.
Cache        get_tokenizer() trains once per (training text, settings). Training is deterministic.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from core.config import LEARNED_CHARS
from core.data.corpus import Corpus
from core.data.shards import ShardCorpus
from core.stopping import TrainingError, UserError

# nanochat's split (92d63d4, nanochat/tokenizer.py): that of GPT-4, except that digits come in groups of at most two:
# fewer tokens are spent on numbers in a small vocabulary
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
# nanochat's names (92d63d4, nanochat/tokenizer.py): chat and tool use come after pretraining
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

_FORMAT = 1
_SAYS_EVERY_S = 5.0
_RANKS_FILE = "tokenizer.tiktoken"
_SETTINGS_FILE = "tokenizer.json"
_TEXTS_HELD = 256  # by the trainer at a time: parts of a book have up to a megabyte each
# tiktoken's regex engine backtracks over `\s+(?!\S)` and panics at a million white-space characters in a row
_WHITESPACE_CUT = 500_000
_LONG_WHITESPACE = re.compile(rf"\s{{{_WHITESPACE_CUT}}}")


class Tokenizer:
    """vocab_size and bos_id as above; token_bytes (V,) int32: length of each token in raw bytes, 0 for special tokens;
    digest: 16 hex characters that identify vocabulary and settings; trained_on: what is known about the training
    text."""

    def __init__(self, tokens: list[bytes], *, pattern: str = SPLIT_PATTERN, trained_on: dict[str, Any] | None = None):
        """tokens: the bytes of every token that is not special, in order of rank."""
        self.vocab_size = len(tokens) + len(SPECIAL_TOKENS)
        self.bos_id = len(tokens)
        self.token_bytes = np.array([len(token) for token in tokens] + [0] * len(SPECIAL_TOKENS), dtype=np.int32)
        self.trained_on = dict(trained_on or {})
        self._tokens = tokens
        self._pattern = pattern
        self.digest = _digest(tokens, pattern)
        self._encoding = tiktoken.Encoding(
            f"redline-{self.digest}",
            pat_str=pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens={name: self.bos_id + i for i, name in enumerate(SPECIAL_TOKENS)},
            explicit_n_vocab=self.vocab_size,
        )

    @property
    def tokens(self) -> list[bytes]:
        """The bytes of every token that is not special, in order of rank."""
        return self._tokens

    @property
    def pattern(self) -> str:
        """The regular expression that splits a text before it is merged."""
        return self._pattern

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without bos."""
        return [token for part in _parts(text) for token in self._encoding.encode_ordinary(part)]

    def encode_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
        """encode() of every text, on `num_threads` threads."""
        if any(len(text) >= _WHITESPACE_CUT for text in texts):
            return [self.encode(text) for text in texts]
        return self._encoding.encode_ordinary_batch(texts, num_threads=num_threads)

    def encode_document(self, text: str) -> np.ndarray:
        """(1 + len(encode(text)),) uint16, or uint32 if the vocabulary needs it: bos, then the ids of `text`."""
        parts = [self._encoding.encode_to_numpy(part, disallowed_special=()) for part in _parts(text)]
        document = np.empty(1 + sum(part.size for part in parts), dtype=self.dtype)
        document[0] = self.bos_id
        np.concatenate(parts, out=document[1:], casting="same_kind")
        return document

    @property
    def dtype(self) -> np.dtype:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD, special tokens their names. ValueError: no such
        id."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of the ids. ValueError: no such id."""
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            bad = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(f"token id {bad} is outside the vocabulary of {self.vocab_size} tokens")
        return self._encoding.decode_bytes(ids)

    def save(self, folder: Path) -> None:
        """Write both files into `folder`, which is made if need be; each appears under its name only when complete."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = (base64.b64encode(token).decode() + f" {rank}\n" for rank, token in enumerate(self._tokens))
        settings = {
            "format": _FORMAT,
            "pattern": self._pattern,
            "special_tokens": list(SPECIAL_TOKENS),
            "vocab_size": self.vocab_size,
            "digest": self.digest,
            "trained_on": self.trained_on,
        }
        _write(folder / _RANKS_FILE, "".join(lines))
        _write(folder / _SETTINGS_FILE, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")

    @staticmethod
    def load(folder: Path) -> "Tokenizer":
        """Read what save() wrote. UserError naming the file if one is missing or damaged."""
        ranks_path, settings_path = Path(folder) / _RANKS_FILE, Path(folder) / _SETTINGS_FILE
        advice = "restore it, or delete the folder and train the tokenizer again"
        try:
            settings = json.loads(settings_path.read_bytes())
            pattern, special_tokens = settings["pattern"], tuple(settings["special_tokens"])
            digest, trained_on = settings["digest"], settings["trained_on"]
        except OSError as error:
            raise UserError(f"{settings_path}: cannot be read ({error.strerror}); {advice}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{settings_path}: damaged tokenizer settings ({error}); {advice}") from error
        if special_tokens != SPECIAL_TOKENS:
            raise UserError(f"{settings_path}: special tokens are {special_tokens}, expected {SPECIAL_TOKENS}")
        tokens: list[bytes] = []
        try:
            for line in ranks_path.read_text(encoding="ascii").splitlines():
                token, rank = line.split()
                if int(rank) != len(tokens):
                    raise ValueError(f"rank {rank} in line {len(tokens) + 1}")
                tokens.append(base64.b64decode(token, validate=True))
        except OSError as error:
            raise UserError(f"{ranks_path}: cannot be read ({error.strerror}); {advice}") from error
        except ValueError as error:
            raise UserError(f"{ranks_path}: damaged vocabulary ({error}); {advice}") from error
        found = _digest(tokens, pattern)
        if found != digest:
            raise UserError(f"{ranks_path}: damaged vocabulary, its digest is {found} instead of {digest}; {advice}")
        return Tokenizer(tokens, pattern=pattern, trained_on=trained_on)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    max_chars: int = LEARNED_CHARS,
    doc_cap: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Tokenizer:
    """Learn a vocabulary of at most `vocab_size` tokens, specials included; fewer if the texts run out of pairs.

    Of each text the first `doc_cap` characters are used (None: all), in total `max_chars`; say is told how many, every
    few seconds.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"vocab_size is {vocab_size}, expected at least {MIN_VOCAB_SIZE}: 256 bytes and {len(SPECIAL_TOKENS)} "
            "special tokens"
        )
    num_chars = 0
    next_word = time.monotonic() + _SAYS_EVERY_S

    def excerpts() -> Iterator[str]:
        nonlocal num_chars, next_word
        for text in texts:
            excerpt = text[:doc_cap][: max_chars - num_chars]
            num_chars += len(excerpt)
            yield from _parts(excerpt)
            if say and time.monotonic() > next_word:
                next_word = time.monotonic() + _SAYS_EVERY_S
                say(f"the tokenizer has read {num_chars / 1e6:,.0f} of at most {max_chars / 1e6:,.0f} M characters")
            if num_chars >= max_chars:
                return

    tokens = _train(excerpts(), vocab_size - len(SPECIAL_TOKENS))
    return Tokenizer(tokens, pattern=SPLIT_PATTERN, trained_on={"num_chars": num_chars})


def _train(texts: Iterable[str], size: int) -> list[bytes]:
    """core/data/train_bpe.py in a process of its own, which ends with whatever ends this function. In a session of its
    own too: what a terminal sends is for this process to hear."""
    command = [sys.executable, "-P", str(Path(__file__).with_name("train_bpe.py")), str(size), str(_TEXTS_HELD)]
    pipe = subprocess.PIPE
    with subprocess.Popen([*command, SPLIT_PATTERN], stdin=pipe, stdout=pipe, start_new_session=True) as child:
        assert child.stdin and child.stdout
        try:
            with suppress(BrokenPipeError):  # it has failed, and says why below
                for text in texts:
                    data = text.encode()
                    child.stdin.write(len(data).to_bytes(8, "little") + data)
                child.stdin.close()
            tokens = child.stdout.read()
            status = child.wait()
        except BaseException:
            child.kill()
            raise
        finally:
            with suppress(BrokenPipeError):
                child.stdin.close()
    if status:
        ended = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        raise TrainingError(
            f"the process that trains the tokenizer ended {ended} (was memory short?): try a smaller "
            "--tokenizer-doc-chars, or start again"
        )
    return [bytes.fromhex(token) for token in json.loads(tokens)]


def get_tokenizer(
    train_corpus: Corpus | ShardCorpus,
    vocab_size: int,
    *,
    cache_dir: Path,
    max_chars: int = LEARNED_CHARS,
    doc_cap: int | None = None,
    on_train: Callable[[str], None] | None = None,
) -> Tokenizer:
    """The tokenizer trained on `train_corpus`, from cache_dir/tokenizers if it was trained before.

    on_train is called with a sentence for the user before training starts, and as it goes on. Any number of processes
    may call this at once.
    """
    settings = [_FORMAT, train_corpus.fingerprint, vocab_size, max_chars, doc_cap, SPLIT_PATTERN, SPECIAL_TOKENS]
    name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
    folder = Path(cache_dir) / "tokenizers" / name
    if folder.exists():
        return Tokenizer.load(folder)
    if on_train is not None:
        on_train(f"training a tokenizer of {vocab_size} tokens on {train_corpus.name}")
    tokenizer = train_tokenizer(train_corpus, vocab_size, max_chars=max_chars, doc_cap=doc_cap, say=on_train)
    tokenizer.trained_on |= {"corpus": train_corpus.name, "fingerprint": train_corpus.fingerprint}
    temporary = folder.with_name(f".{name}.{uuid.uuid4().hex}")
    try:
        tokenizer.save(temporary)
        try:
            os.rename(temporary, folder)
        except OSError:
            # a folder with content cannot be renamed onto: another process was first, and all must use the same one
            if not folder.exists():
                raise
            return Tokenizer.load(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return tokenizer


def _parts(text: str) -> list[str]:
    """`text` in pieces that tiktoken can encode: itself, unless it has an endless run of white space."""
    if len(text) < _WHITESPACE_CUT:
        return [text]
    cuts = [0, *(match.end() for match in _LONG_WHITESPACE.finditer(text)), len(text)]
    return [text[start:stop] for start, stop in pairwise(cuts)]


def _digest(tokens: list[bytes], pattern: str) -> str:
    digest = hashlib.sha256(json.dumps([pattern, SPECIAL_TOKENS, len(tokens)]).encode())
    for token in tokens:
        digest.update(len(token).to_bytes(4, "little") + token)
    return digest.hexdigest()[:16]


def _write(path: Path, content: str) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    # there, since a module that runs as a program is another one than the others import
    from core.data.compare_tokenizers import main
    from core.stopping import one_sentence

    with one_sentence():
        main(sys.argv[1:])
