"""Readers of the three kinds of file that hold documents: text, JSON lines and parquet.

Each source reads documents by row number; `rows` (int64) are the rows that hold one. Files are opened for each read,
since a corpus may have more of them than a process may hold open.

Parts     a document of more than LONG_BYTES is read in parts of about part_bytes, cut at a line, a word or a character:
          `parts` maps its row to the byte offsets of the cuts, 0 and its size included. Without parts, every stream of
          a loader would hold all tokens of a book, and a checkpoint the positions of all its pieces.
Blocks    blocks(rows) maps rows to the units of shuffling; parts of a row stay in its block unless `scattered`.
"""

import codecs
import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from core.data.files import (
    CHUNK_BYTES,
    NoDocuments,
    Progress,
    check_object_a_line,
    digest_in_name,
    digest_of,
    first_line,
    format_of,
    hash_key,
    is_binary,
    refuse_pointer,
    unpacked,
)
from core.stopping import UserError

LONG_BYTES = 2 << 20
_CUT_REACH = 4 << 10  # bytes before the wanted place of a cut in which a line or a word is looked for
_RECENT_BYTES = 512 << 20


class NotUtf8(UserError):
    """Text in another encoding, or no text."""


class Recent:
    """What was decoded last: text columns of parquet row groups and long documents, least recently used first.

    Bounded by bytes rather than by count: streams drift apart by thousands of documents, so many small row groups are
    in use at once; of large ones it is at most two.
    """

    def __init__(self):
        self._values: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.RLock()  # decoding a long row reads its row group

    def get(self, path: str, number: int, decode: Callable[[], Any]) -> Any:
        """decode(), or what it gave the last time for this group or row of the file."""
        with self._lock:
            value = self._values.get((path, number))
            if value is None:
                value = self._values[path, number] = decode()
                self._num_bytes += _size_of(value)
                while self._num_bytes > _RECENT_BYTES and len(self._values) > 2:
                    self._num_bytes -= _size_of(self._values.popitem(last=False)[1])
            else:
                self._values.move_to_end((path, number))
            return value


def _size_of(value: bytes | pa.ChunkedArray) -> int:
    return len(value) if isinstance(value, bytes) else value.nbytes


def open_source(
    path: str, key: str, cache_dir: Path, recent: Recent, progress: Progress, part_bytes: int
) -> "JsonLines | Parquet":
    """The reader of a file of rows. Raises NoDocuments where it holds none, UserError where it is damaged."""
    kind, codec = format_of(path)
    with open(path, "rb") as file:
        refuse_pointer(path, file.read(100))
    if kind == "parquet":
        return Parquet(path, key, recent, digest_of(path, cache_dir, progress), part_bytes)
    if kind == "json":
        check_object_a_line(path, codec)
    if codec is None:
        return JsonLines(path, key, path, recent, _Lines(path, progress), part_bytes)
    plain = unpacked(path, codec, cache_dir, progress)
    lines = _Lines(plain, progress)
    if lines.digest != digest_in_name(plain):
        progress.say(f"{plain} is damaged: unpacking {path} again")
        os.unlink(plain)
        plain = unpacked(path, codec, cache_dir, progress)
        lines = _Lines(plain, progress)
        if lines.digest != digest_in_name(plain):
            raise UserError(f"{plain}: reads back other than it was written; check the disk, or set --cache-dir")
    return JsonLines(path, key, plain, recent, lines, part_bytes)


def names(found: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in found) or "nothing"


def is_validation(key_hash: bytes, val_every: int) -> bool:
    return int.from_bytes(key_hash, "big") % val_every == 0


# -- plain text -------------------------------------------------------------------------------------------------------


class TextFiles:
    """Any number of files below `root`, a document each; the row is the number of the file."""

    scattered = True

    def __init__(self, root: str, part_bytes: int):
        self._root = root
        self._part_bytes = part_bytes
        self._keys: list[str] = []
        self._hashes: list[bytes] = []
        self._sizes: list[int] = []
        self.parts: dict[int, list[int]] = {}

    def add(self, key: str, progress: Progress) -> bytes:
        """Check the file and take it in. Returns its digest; raises NoDocuments, or NotUtf8 for other encodings."""
        path = os.path.join(self._root, key)
        utf8 = codecs.getincrementaldecoder("utf-8")()
        digest = hashlib.sha256()
        done = 0
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise NoDocuments("empty files", "give one with text in it")
            while done < size and (chunk := file.read(min(size - done, CHUNK_BYTES))):
                if done == 0:
                    refuse_pointer(path, chunk)
                    if is_binary(chunk[:4096]):
                        raise NoDocuments("binary files", "convert it to plain text")
                digest.update(chunk)
                done += len(chunk)
                try:
                    utf8.decode(chunk, final=done == size)
                except UnicodeDecodeError as error:  # its object begins with what the chunk before left over
                    raise not_utf8(path, error, offset=done - len(error.object)) from None
                progress.read(len(chunk))
            if size > LONG_BYTES:
                self.parts[len(self._keys)] = part_cuts(size, self._part_bytes, partial(_pread, file))
        self._keys.append(key)
        self._hashes.append(hash_key(key))
        self._sizes.append(size)
        return digest.digest()

    @property
    def rows(self) -> np.ndarray:
        return np.arange(len(self._keys), dtype=np.int64)

    @property
    def num_blocks(self) -> int:
        return len(self._keys)

    def blocks(self, rows: np.ndarray) -> np.ndarray:
        return rows

    def in_validation(self, val_every: int) -> np.ndarray:
        """(rows.size,) bool: the rows that the hash of their key puts into the validation split."""
        return np.fromiter((is_validation(h, val_every) for h in self._hashes), dtype=bool, count=len(self._hashes))

    def key_of(self, row: int) -> str:
        return self._keys[row]

    def num_bytes(self, row: int) -> int:
        return self._sizes[row]

    def read(self, row: int) -> str:
        return self.read_part(row, 0, self._sizes[row])

    def read_part(self, row: int, start: int, stop: int) -> str:
        try:
            return self.read_bytes(row, start, stop).decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(os.path.join(self._root, self._keys[row]), error, offset=start) from None

    def read_bytes(self, row: int, start: int, stop: int) -> bytes:
        path = os.path.join(self._root, self._keys[row])
        try:
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                content = _pread(file, start, stop)
        except OSError as error:
            raise UserError(f"{path}: cannot be read any more ({error.strerror})") from error
        if size != self._sizes[row]:
            raise UserError(f"{path}: changed while in use, from {self._sizes[row]:,} to {size:,} bytes; restore it")
        return content


def not_utf8(where: str, error: UnicodeDecodeError, offset: int = 0) -> NotUtf8:
    return NotUtf8(
        f"{where}: not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {offset + error.start}: "
        f"{error.reason}); convert it to UTF-8, or remove it if it is no text"
    )


def _pread(file: BinaryIO, start: int, stop: int) -> bytes:
    file.seek(start)
    blocks = []
    while start < stop and (block := file.read(stop - start)):
        blocks.append(block)
        start += len(block)
    return blocks[0] if len(blocks) == 1 else b"".join(blocks)


def part_cuts(size: int, part_bytes: int, content: Callable[[int, int], bytes]) -> list[int]:
    """Offsets [0, ..., size] that cut a document into parts of about part_bytes; content(start, stop) gives its
    bytes."""
    n = max(1, round(size / part_bytes))
    return [0, *(cut_before(size * i // n, content) for i in range(1, n)), size]


def cut_before(place: int, content: Callable[[int, int], bytes]) -> int:
    """The last offset up to `place` at which a line begins, else a word, else a character."""
    start = max(0, place - min(_CUT_REACH, place // 2))
    before = content(start, place)
    for end in (b"\n", b" "):
        if (found := before.rfind(end)) >= 0:
            return start + found + 1
    around = content(place - 3, place + 1)  # in UTF-8, a character has at most three continuation bytes
    return place - next((i for i, byte in enumerate(reversed(around)) if byte & 0xC0 != 0x80), 0)


# -- JSON, an object a line -------------------------------------------------------------------------------------------


class JsonLines:
    scattered = False

    def __init__(self, path: str, key: str, plain: str, recent: Recent, lines: "_Lines", part_bytes: int):
        """path is the file as the user knows it, plain the uncompressed one that is read."""
        self._path = path
        self._key = key
        self._plain = plain
        self._recent = recent
        self._starts, self.rows, self.digest = lines.starts, lines.rows, lines.digest
        self.num_blocks = self._starts.size - 1
        self.parts: dict[int, list[int]] = {}
        # a text is no longer than its line
        for row in np.flatnonzero(np.diff(self._starts) > LONG_BYTES).tolist():
            text = self._long(row)
            if len(text) > LONG_BYTES:
                self.parts[row] = part_cuts(len(text), part_bytes, lambda start, stop, text=text: text[start:stop])

    def blocks(self, rows: np.ndarray) -> np.ndarray:
        return rows

    def in_validation(self, val_every: int) -> np.ndarray:
        return rows_in_validation(self._key, self.rows, val_every)

    def key_of(self, row: int) -> str:
        return f"{self._key}:{row}"

    def num_bytes(self, row: int) -> int:
        cuts = self.parts.get(row)
        return cuts[-1] if cuts else len(self.read(row).encode())

    def read_part(self, row: int, start: int, stop: int) -> str:
        return self.read_bytes(row, start, stop).decode()

    def read_bytes(self, row: int, start: int, stop: int) -> bytes:
        return self._long(row)[start:stop]

    def _long(self, row: int) -> bytes:
        return self._recent.get(self._path, row, lambda: self.read(row).encode())

    def read(self, row: int) -> str:
        where = f"{self._path}, line {row + 1}"
        start, stop = int(self._starts[row]), int(self._starts[row + 1])
        try:
            with open(self._plain, "rb", buffering=0) as file:
                line = _pread(file, start, stop).decode("utf-8")
            if row == 0:
                line = line.removeprefix("\ufeff")  # a BOM marks the file, it is not part of the document
            record = json.loads(line)
            del line  # it may be large
        except OSError as error:
            raise UserError(f"{where}: cannot be read any more ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise not_utf8(where, error) from None
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{where}: not valid JSON ({first_line(error)}); expected one object a line, like "
                '{"text": "..."}: fix or remove the line'
            ) from None
        if type(record) is not dict:
            raise UserError(
                f'{where}: got a JSON {type(record).__name__}, expected an object with a "text" field; fix or remove '
                "the line"
            )
        if "text" not in record:
            raise UserError(
                f'{where}: no "text" field, the line has {names(record)}; rename the one with the document, or remove '
                "the line"
            )
        text = record["text"]
        if type(text) is not str:
            got = "null" if text is None else type(text).__name__
            raise UserError(f'{where}: field "text" is {got}, expected a string; fix or remove the line')
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f'{where}: field "text" has a lone surrogate \\u{ord(text[error.start]):04x} at character '
                f"{error.start}, which no UTF-8 text can hold; fix or remove the line"
            ) from None
        return text


def rows_in_validation(key: str, rows: np.ndarray, val_every: int) -> np.ndarray:
    """TextFiles.in_validation for rows named "key:row"."""
    prefix = hashlib.sha256(f"{key}:".encode("utf-8", "surrogateescape"))

    def verdicts() -> Iterator[bool]:
        for row in rows.tolist():
            digest = prefix.copy()
            digest.update(b"%d" % row)
            yield is_validation(digest.digest(), val_every)

    return np.fromiter(verdicts(), dtype=bool, count=rows.size)


class _Lines:
    """starts (num_lines + 1,) int64: where each line begins, then the size; rows int64: lines that are not blank;
    digest: sha256 of the file."""

    def __init__(self, path: str, progress: Progress):
        digest = hashlib.sha256()
        starts = [np.zeros(1, dtype=np.int64)]
        # of the byte before each newline, whether it is a carriage return: a line "\r\n" is blank
        returns: list[np.ndarray] = []
        size, last = 0, 0
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                data = np.frombuffer(chunk, dtype=np.uint8)
                newlines = np.flatnonzero(data == ord("\n"))
                before = data[newlines - 1]
                if newlines.size and newlines[0] == 0:
                    before[0] = last
                returns.append(before == ord("\r"))
                starts.append(newlines + (size + 1))
                size, last = size + len(chunk), chunk[-1]
                progress.read(len(chunk))
        self.starts = np.concatenate(starts)
        after_return = np.concatenate([*returns, np.zeros(0, dtype=bool)])
        lengths = np.diff(self.starts)
        blank = (lengths == 1) | ((lengths == 2) & after_return)
        if self.starts[-1] != size:  # a last line without newline is never blank
            self.starts = np.append(self.starts, size)
            blank = np.append(blank, False)
        self.rows = np.flatnonzero(~blank)
        self.digest = digest.hexdigest()


# -- parquet ----------------------------------------------------------------------------------------------------------


class Parquet:
    scattered = False

    def __init__(self, path: str, key: str, recent: Recent, digest: str, part_bytes: int):
        self._path = path
        self._key = key
        self._recent = recent
        self.digest = digest
        try:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
                sizes = [group.num_rows for group in groups]
                bytes_of = [_column_bytes(group, "text") for group in groups]
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: truncated or no parquet file ({first_line(error)}); fetch it again") from error
        if (found := schema.names.count("text")) != 1:
            raise UserError(
                f'{path}: {"no column" if found == 0 else f"{found} columns"} "text", the file has '
                f"{names(schema.names)}; name the one with documents so"
            )
        kind = schema.field("text").type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise UserError(f'{path}: column "text" is {kind}, expected string; convert the column')
        self._group_starts = np.cumsum([0, *sizes])  # (num_blocks + 1,) int64, row numbers
        self.rows = np.arange(self._group_starts[-1])
        self.num_blocks = len(sizes)
        self.parts: dict[int, list[int]] = {}
        for start, size, num_bytes in zip(self._group_starts.tolist(), sizes, bytes_of):
            # decoding all groups would take as long as reading all data: those of ordinary documents are left out
            may_be_long = num_bytes > max(LONG_BYTES, size * LONG_BYTES // 16)
            for row in range(start, start + size) if may_be_long else ():
                text = self.read(row).encode()
                if len(text) > LONG_BYTES:
                    self.parts[row] = part_cuts(len(text), part_bytes, lambda start, stop, text=text: text[start:stop])

    def blocks(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._group_starts, rows, side="right") - 1

    def in_validation(self, val_every: int) -> np.ndarray:
        return rows_in_validation(self._key, self.rows, val_every)

    def key_of(self, row: int) -> str:
        return f"{self._key}:{row}"

    def num_bytes(self, row: int) -> int:
        cuts = self.parts.get(row)
        return cuts[-1] if cuts else len(self.read(row).encode())

    def read_part(self, row: int, start: int, stop: int) -> str:
        return self.read_bytes(row, start, stop).decode()

    def read_bytes(self, row: int, start: int, stop: int) -> bytes:
        # row groups have the numbers from 0 on in the cache, hence ~row
        return self._recent.get(self._path, ~row, lambda: self.read(row).encode())[start:stop]

    def read(self, row: int) -> str:
        group = int(self.blocks(np.array([row]))[0])
        start, stop = self._group_starts[group : group + 2].tolist()
        try:
            column = self._column(group)
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{self._path}, rows {start} to {stop - 1}: damaged parquet data ({first_line(error)}); fetch it again"
            ) from error
        try:
            text = column[row - start].as_py()
        except UnicodeDecodeError as error:
            raise not_utf8(f"{self._path}, row {row}", error) from None
        if text is None:
            raise UserError(
                f'{self._path}, row {row}: column "text" is null, expected a string; fill or remove the row'
            )
        return text

    def _column(self, group: int) -> pa.ChunkedArray:
        def decode() -> pa.ChunkedArray:
            with pq.ParquetFile(self._path) as file:
                return file.read_row_group(group, columns=["text"], use_threads=False).column("text")

        return self._recent.get(self._path, group, decode)


def _column_bytes(group: Any, name: str) -> int:
    columns = (group.column(i) for i in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == name)
