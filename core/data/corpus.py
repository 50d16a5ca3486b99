"""Where documents come from.

A corpus is a random-access list of documents (str) over files that are never modified or loaded as a whole:

    "stdlib"                                  the *.py sources of the running Python's standard library, one a file
    *.jsonl, *.ndjson, *.json (.gz|.zst|.bz2) a document a line, field "text"
    *.parquet, *.pq                           a document a row, column "text"
    any other text                            one UTF-8 document; see Parts in core/data/sources.py

A path names one file or a folder, which is walked recursively. The case of a suffix does not matter.

Skipped   what a folder holds besides documents is passed over and counted: hidden files, empty ones, markers of Spark
          jobs, the files of a run, Redline's cache, and formats that are no text (tables, archives, images, weights).
          Named alone, such a file is refused. Text that is not UTF-8 is refused in either case.
Keys      relative posix path of a one-document file, "<relative path>:<row>" for a row (row = line - 1 in a .jsonl).
Split     a document is validation data iff sha256(key) % val_every == 0: it depends on nothing but its own key, so
          adding files moves no document from one side to the other. Where that leaves a side without a document, as it
          does with one book, the split is by position: the last 1/val_every of the text, in the order of keys, is
          validation.
Order     order(epoch) permutes blocks, then documents within a block. A parquet row group is a block, since it is
          decoded as a whole; every other document is a block of its own. It is built from raw PCG64 output, which numpy
          promises never to change (its shuffling methods are not covered by that promise).
Bytes     decoding is strict and translates no newline: document.encode() is what the file holds, BOM included.
Errors    whatever is wrong with the data is a UserError of one sentence that names the file and the line or row. Text
          files are checked when the corpus is opened; rows are checked when they are read.
"""

import hashlib
import os
import sysconfig
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.data.files import CACHE_FOLDERS, NoDocuments, Progress, format_of, hash_key, walk
from core.data.sources import JsonLines, NotUtf8, Parquet, Recent, TextFiles, cut_before, open_source
from core.stopping import UserError

_ORDERS_KEPT = 3  # streams drift apart, so at the turn of an epoch two orders are in use
_BYTES_PER_TOKEN = 4  # of ordinary text
_PART_ROWS = 256  # rows of tokens in a part of a long document, about

Source = TextFiles | JsonLines | Parquet


def open_corpus(
    data: str,
    *,
    seed: int,
    val_every: int = 50,
    cache_dir: Path,
    row_tokens: int = 2048,
    progress: Callable[[str], None] | None = None,
) -> tuple["Corpus", "Corpus"]:
    """Open `data` and split it into (training, validation).

    data        "stdlib", or the path of a folder or file (see the module docstring)
    seed        of the order of documents; split and fingerprint do not depend on it
    val_every   on average one document in so many is validation data
    cache_dir   compressed files are unpacked here, once, and digests of large files remembered
    row_tokens  tokens in a row: a split by position gives each side text enough for one, and long documents are read in
                parts of a few hundred
    progress    called with a sentence every few seconds, if opening takes longer
    Raises UserError for a path that does not exist, unreadable or corrupt files, and empty splits.
    """
    if val_every < 1:
        raise UserError(f"val_every is {val_every}, expected 1 or more: one document in val_every is validation data")
    documents = _read(data, cache_dir, row_tokens, progress)
    masks = [source.in_validation(val_every) for source in documents.sources]
    num_documents, num_validation = _count(masks)
    if num_validation == num_documents and val_every == 1:
        raise UserError(
            f"{data}: all of the {num_documents} documents fall into the validation split of one in {val_every}, "
            "nothing is left to train on; give a higher --val-every"
        )
    if num_documents == 1 or num_validation in (0, num_documents):
        return _split_by_position(documents, data, seed, val_every, row_tokens)
    train = _select(documents, [~mask for mask in masks], seed, f"train {val_every}")
    val = _select(documents, masks, seed, f"val {val_every}")
    _check_text(train, f"{data}: the documents to train on")
    _check_text(val, f"{data}: the documents of the validation split")
    return train, val


def open_validation(
    data: str,
    *,
    seed: int,
    val_every: int,
    cache_dir: Path,
    row_tokens: int,
    progress: Callable[[str], None] | None = None,
) -> "Corpus":
    """What to score of a text that was not trained on: its validation split, all of it where that is by position."""
    documents = _read(data, cache_dir, row_tokens, progress)
    masks = [source.in_validation(val_every) for source in documents.sources]
    num_documents, num_validation = _count(masks)
    if num_documents == 1 or num_validation == 0:
        masks = [np.ones_like(mask) for mask in masks]
    val = _select(documents, masks, seed, f"val {val_every}")
    _check_text(val, f"{data}: the documents to score")
    return val


def _count(masks: list[np.ndarray]) -> tuple[int, int]:
    return sum(mask.size for mask in masks), sum(int(mask.sum()) for mask in masks)


def _select(documents: "Documents", masks: list[np.ndarray], seed: int, split: str) -> "Corpus":
    rows = [Rows.of(source, source.rows[mask]) for source, mask in zip(documents.sources, masks)]
    return Corpus(documents, rows, seed=seed, split=split)


def _check_text(corpus: "Corpus", what: str) -> None:
    if not any(corpus.num_bytes(i) for i in range(len(corpus))):
        raise UserError(f"{what} are all empty ({len(corpus):,} of them); give some with text, or another --val-every")


class Documents(NamedTuple):
    """What `data` holds, before it is split."""

    name: str
    sources: list[Source]
    content: bytes  # sha256 over every file's relative path, size and content
    skipped: dict[str, int]


class Rows(NamedTuple):
    """The rows of a source that belong to a split, ascending, and the cuts of those that are read in parts."""

    rows: np.ndarray  # int64
    cuts: dict[int, list[int]]

    @staticmethod
    def of(source: Source, rows: np.ndarray) -> "Rows":
        chosen = set(rows.tolist()) if source.parts else set()
        return Rows(rows, {row: cuts for row, cuts in source.parts.items() if row in chosen})


class Corpus:
    """One split: documents 0..len-1, in the order of their files and rows. May be read from several threads.

    name         for people: "stdlib" or the last part of the path
    seed         of order()
    fingerprint  hex sha256 over every file's relative path, size and content, and the split; not over seed or file
                 times
    skipped      how many files of the folder hold no documents, by what they are
    notes        sentences for people: an unusual split, what was skipped
    """

    def __init__(self, documents: Documents, selection: list[Rows], *, seed: int, split: str, note: str | None = None):
        self.name = documents.name
        self.seed = seed
        self.skipped = documents.skipped
        self.notes = [note] if note else []
        if documents.skipped:
            self.notes.append(_in_words(documents.skipped))
        self.fingerprint = hashlib.sha256(documents.content + split.encode()).hexdigest()
        self._sources = documents.sources
        self._parts: dict[int, tuple[int, int]] = {}  # by document: its bytes, where that is not the whole row
        rows: list[np.ndarray] = []
        new_block: list[np.ndarray] = []  # whether a document begins a block
        total = 0
        for source, (r, cuts) in zip(self._sources, selection, strict=True):
            copies = np.ones(r.size, dtype=np.int64)
            first = np.searchsorted(r, np.array(list(cuts), dtype=np.int64))
            copies[first] = [len(c) - 1 for c in cuts.values()]
            block = source.blocks(r).repeat(copies)
            begins = np.diff(block, prepend=-1) != 0
            starts = total + np.cumsum(copies) - copies
            for start, c in zip(starts[first].tolist(), cuts.values()):
                self._parts |= {start + i: span for i, span in enumerate(zip(c, c[1:]))}
                begins[start - total : start - total + len(c) - 1] |= source.scattered
            rows.append(r.repeat(copies))
            new_block.append(begins)
            total += int(copies.sum())
        self._row = np.concatenate(rows)  # (N,) int64
        self._source = np.repeat(np.arange(len(rows), dtype=np.int32), [r.size for r in rows])  # (N,)
        # numbered without gaps: a block that is wholly in the other split has no say in this one's order
        self._block = np.cumsum(np.concatenate(new_block)) - 1  # (N,) int64
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._row.size

    def __getitem__(self, i: int) -> str:
        """Document i. Raises UserError naming file and row if it is not what the format promises."""
        source, row = self._locate(i)
        part = self._parts.get(i)
        return source.read_part(row, *part) if part else source.read(row)

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def at(self, position: int) -> str:
        """The document at this position of the endless sequence of epochs."""
        epoch, offset = divmod(position, len(self))
        return self[int(self.order(epoch)[offset])]

    def key(self, i: int) -> str:
        """That of the row; of a part of one, with the bytes that it covers: "book.txt[0:1048576]"."""
        source, row = self._locate(i)
        part = self._parts.get(i)
        return f"{source.key_of(row)}[{part[0]}:{part[1]}]" if part else source.key_of(row)

    def num_bytes(self, i: int) -> int:
        """Length of document i in UTF-8 bytes."""
        source, row = self._locate(i)
        part = self._parts.get(i)
        return part[1] - part[0] if part else source.num_bytes(row)

    def order(self, epoch: int) -> np.ndarray:
        """(N,) int64, read-only: the permutation of the documents for `epoch`, a function of (seed, epoch)."""
        with self._lock:
            order = self._orders.get(epoch)
            if order is None:
                order = self._permutation(epoch)
                order.flags.writeable = False
                self._orders[epoch] = order
                if len(self._orders) > _ORDERS_KEPT:
                    self._orders.popitem(last=False)
            else:
                self._orders.move_to_end(epoch)
            return order

    def _permutation(self, epoch: int) -> np.ndarray:
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, epoch]))
        num_blocks = int(self._block.max()) + 1
        block_key = bits.random_raw(num_blocks)
        if num_blocks == len(self):
            return np.argsort(block_key[self._block], kind="stable")
        return np.lexsort((bits.random_raw(len(self)), block_key[self._block]))

    def _locate(self, i: int) -> tuple[Source, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        return self._sources[self._source[i]], int(self._row[i])


def _split_by_position(
    documents: Documents, data: str, seed: int, val_every: int, row_tokens: int
) -> tuple[Corpus, Corpus]:
    """The last 1/val_every of the bytes is validation, at least a row's worth; the rest is left to train on."""
    sizes = [np.array([source.num_bytes(row) for row in source.rows.tolist()]) for source in documents.sources]
    total = sum(int(size.sum()) for size in sizes)
    num_documents = sum(size.size for size in sizes)
    enough = row_tokens * _BYTES_PER_TOKEN
    place = total - max(enough, -(-total // val_every))
    if place < enough:
        what = "a single document" if num_documents == 1 else f"none of the {num_documents} documents falls"
        why = "" if num_documents == 1 else f" into the validation split of one in {val_every}"
        raise UserError(
            f"{data}: {what}{why}, and {total:,} bytes are too few to split by position (from {2 * enough:,} on, a row "
            f"of {row_tokens} tokens for either side); give more text, or other --val-every or --seq-len"
        )

    train_rows: list[Rows] = []
    val_rows: list[Rows] = []
    num_validation = before = 0
    for source, size in zip(documents.sources, sizes):
        begins = before + np.cumsum(size) - size
        train_rows.append(Rows.of(source, source.rows[begins < place]))
        val_rows.append(Rows.of(source, source.rows[begins + size > place]))
        before += int(size.sum())
        for row, begin, length in zip(source.rows.tolist(), begins.tolist(), size.tolist()):
            if begin < place < begin + length:
                at = cut_before(place - begin, partial(source.read_bytes, row))
                cuts = source.parts.get(row, [0, length])
                train_rows[-1].cuts[row] = [cut for cut in cuts if cut < at] + [at]
                val_rows[-1].cuts[row] = [at] + [cut for cut in cuts if cut > at]
                num_validation += length - at
            elif begin >= place:
                num_validation += length
    share = f"its last {num_validation:,} of {total:,} bytes are validation"
    note = (
        f"the data is one document: {share}"
        if num_documents == 1
        else f"the hash of their paths puts all {num_documents} documents on one side, so the text is split by "
        f"position: {share}"
    )
    train, val = (
        Corpus(documents, rows, seed=seed, split=f"{which} {val_every} from byte {total - num_validation}", note=note)
        for which, rows in (("train", train_rows), ("val", val_rows))
    )
    return train, val


# -- files ------------------------------------------------------------------------------------------------------------


def _read(data: str, cache_dir: Path, row_tokens: int, say: Callable[[str], None] | None) -> Documents:
    """Open every file of `data` in the order of keys."""
    cache_dir = Path(cache_dir)
    skipped: Counter[str] = Counter()
    stdlib = data == "stdlib"
    alone = False
    if stdlib:
        root, name = sysconfig.get_paths()["stdlib"], data
        keys = [
            key
            for key in walk(root, {"__pycache__", "site-packages", "dist-packages"}, Counter())
            if key.endswith(".py")
        ]
        keys = [key for key in keys if os.path.isfile(os.path.join(root, key))]
    else:
        name = Path(data).resolve().name
        alone = os.path.isfile(data)
        if alone:
            root, key = os.path.split(data)
            keys = [key]
        elif os.path.isdir(data):
            root = data
            own = {os.path.realpath(cache_dir / folder) for folder in CACHE_FOLDERS}
            keys = walk(root, {"__pycache__"}, skipped, own)
        else:
            if os.path.exists(data):
                raise UserError(f"{data}: is a pipe or a device, expected a file or a folder; save its text in a file")
            raise UserError(f"{data}: no such file or folder; give the path of existing data, or 'stdlib'")

    progress = Progress(say)
    progress.num_files = len(keys)
    sources: list[Source] = []
    texts: TextFiles | None = None
    recent = Recent()
    part_bytes = min(max(64 << 10, row_tokens * _BYTES_PER_TOKEN * _PART_ROWS), 1 << 20)
    content = hashlib.sha256()
    for key in sorted(keys):
        path = os.path.join(root, key)
        try:
            if stdlib or format_of(path)[0] == "text":
                # neighbours share a source: an object a file would cost more memory than a small file has text
                texts = texts or TextFiles(root, part_bytes)
                digest = texts.add(key, progress)
                if texts is not (sources[-1] if sources else None):
                    sources.append(texts)
            else:
                source = open_source(path, key, cache_dir, recent, progress, part_bytes)
                if not source.rows.size:
                    raise NoDocuments("empty files", "give one with documents in it")
                digest = bytes.fromhex(source.digest)
                sources.append(source)
                texts = None
        except NoDocuments as error:
            if alone:
                raise UserError(f"{path}: nothing to train on ({error.kind} are not read); {error.advice}") from None
            skipped[error.kind] += 1
        except NotUtf8:
            if not stdlib:
                raise
            skipped["files that are not UTF-8"] += 1
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        else:
            content.update(hash_key(key) + digest)
        progress.files_read += 1
    if not any(source.rows.size for source in sources):
        raise UserError(
            f"{data}: no documents found; expected text files, .jsonl(.gz|.zst) or .parquet with content"
            + (f"; {_in_words(skipped)}" if skipped else "")
        )
    if any(source.parts for source in sources):
        content.update(b"parts %d" % part_bytes)
    return Documents(name, sources, content.digest(), dict(skipped))


def _in_words(skipped: dict[str, int]) -> str:
    return "skipped in the data: " + ", ".join(f"{kind} ({count:,})" for kind, count in sorted(skipped.items()))
