"""Where documents come from.

A corpus is a random-access list of documents (str) over files that are never modified or loaded as a whole:

    "stdlib"                              the *.py sources of the running Python's standard library, a document a file
    *.jsonl, *.jsonl.gz, *.jsonl.zst      a document a line, field "text"
    *.parquet                             a document a row, column "text"
    any other file                        one UTF-8 document

A path names one file or a folder, which is walked recursively; hidden files and __pycache__ are passed over.

Keys      relative posix path of a one-document file, "<relative path>:<row>" for a row (row = line - 1 in a .jsonl).
Split     a document is validation data iff sha256(key) % val_every == 0: it depends on nothing but its own key, so
          adding files moves no document from one side to the other.
Order     order(epoch) permutes blocks, then documents within a block. A parquet row group is a block, since it is
          decoded as a whole; every other document is a block of its own. It is built from raw PCG64 output, which numpy
          promises never to change (its shuffling methods are not covered by that promise).
Bytes     decoding is strict and translates no newline: document.encode() is what the file holds, BOM included.
Errors    whatever is wrong with the data is a UserError of one sentence that names the file and the line or row. Text
          files are checked when the corpus is opened; rows are checked when they are read.
"""

import hashlib
import json
import os
import sysconfig
import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from core.stopping import UserError

_EDGE_BYTES = 1 << 20  # of either end of a file, for fingerprints: a file of twice this is hashed whole
_CHUNK_BYTES = 16 << 20  # of one read when a whole file is passed through
_ROW_GROUP_CACHE_BYTES = 512 << 20
_ORDERS_KEPT = 3  # streams drift apart, so at the turn of an epoch two orders are in use
_COMPRESSION = {".jsonl.gz": "gzip", ".jsonl.zst": "zstd"}


def open_corpus(data: str, *, seed: int, val_every: int = 50, cache_dir: Path) -> tuple["Corpus", "Corpus"]:
    """Open `data` and split it into (training, validation).

    data       "stdlib", or the path of a folder or file (see the module docstring)
    seed       of the order of documents; split and fingerprint do not depend on it
    val_every  on average one document in so many is validation data
    cache_dir  compressed .jsonl files are unpacked here, once
    Raises UserError for a path that does not exist, unreadable or corrupt files, and empty splits.
    """
    if val_every < 1:
        raise UserError(f"val_every is {val_every}, expected 1 or more: one document in val_every is validation data")
    if data == "stdlib":
        root, files = _stdlib_files()
        name = "stdlib"
    else:
        root, files = _files_under(Path(data))
        name = Path(data).resolve().name

    sources: list[_TextFile | _JsonLines | _Parquet] = []
    row_groups = _RowGroups()
    content = hashlib.sha256()
    skipped = 0
    for path in files:
        key = path.relative_to(root).as_posix()
        try:
            with open(path, "rb") as file:
                content.update(_file_fingerprint(key, file))
            source = _open_source(path, key, Path(cache_dir), row_groups, skip_not_utf8=data == "stdlib")
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        if source is None:
            skipped += 1
        else:
            sources.append(source)

    train_rows: list[np.ndarray] = []
    val_rows: list[np.ndarray] = []
    for source in sources:
        hashes = (int.from_bytes(_hash_key(source.key_of(row)), "big") for row in source.rows.tolist())
        in_validation = np.fromiter((value % val_every == 0 for value in hashes), dtype=bool)
        train_rows.append(source.rows[~in_validation])
        val_rows.append(source.rows[in_validation])
    num_validation = sum(rows.size for rows in val_rows)
    num_documents = num_validation + sum(rows.size for rows in train_rows)
    if num_documents == 0:
        raise UserError(f"{data}: no documents found; expected text files, .jsonl(.gz|.zst) or .parquet with content")
    if num_validation == 0:
        raise UserError(
            f"{data}: none of the {num_documents} documents falls into the validation split of one in "
            f"{val_every}; give "
            f"more documents (a .jsonl with a document a line instead of one big file) or a lower --val-every"
        )
    if num_validation == num_documents:
        raise UserError(
            f"{data}: all of the {num_documents} documents fall into the validation split of one in {val_every}, "
            "nothing "
            f"is left to train on; give more documents (a .jsonl with a document a line) or a higher --val-every"
        )

    def split(which: str, rows: list[np.ndarray]) -> Corpus:
        digest = content.copy()
        digest.update(f"{which} {val_every}".encode())
        return Corpus(name, sources, rows, seed=seed, fingerprint=digest.hexdigest(), skipped=skipped)

    return split("train", train_rows), split("val", val_rows)


class Corpus:
    """One split: documents 0..len-1, in the order of their files and rows. May be read from several threads.

    name         for people: "stdlib" or the last part of the path
    seed         of order()
    fingerprint  hex sha256 over every file's relative path, size and ends, and the split; not over seed or file times
    skipped      files of the folder that are no documents: empty, or (stdlib) not UTF-8
    """

    def __init__(
        self,
        name: str,
        sources: list["_TextFile | _JsonLines | _Parquet"],
        rows: list[np.ndarray],  # per source, int64, ascending: the rows that belong to this split
        *,
        seed: int,
        fingerprint: str,
        skipped: int,
    ):
        self.name = name
        self.seed = seed
        self.fingerprint = fingerprint
        self.skipped = skipped
        self._sources = sources
        self._row = np.concatenate(rows)  # (N,) int64
        self._source = np.repeat(np.arange(len(sources), dtype=np.int32), [r.size for r in rows])  # (N,)
        blocks: list[np.ndarray] = []
        first_block = 0
        for source, r in zip(sources, rows, strict=True):
            blocks.append(source.blocks(r) + first_block)
            first_block += source.num_blocks
        block = np.concatenate(blocks)
        # numbered without gaps: a block that is wholly in the other split has no say in this one's order
        self._block = np.cumsum(np.diff(block, prepend=block[:1]) != 0)  # (N,) int64
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._row.size

    def __getitem__(self, i: int) -> str:
        """Document i. Raises UserError naming file and row if it is not what the format promises."""
        source, row = self._locate(i)
        return source.read(row)

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def key(self, i: int) -> str:
        source, row = self._locate(i)
        return source.key_of(row)

    def num_bytes(self, i: int) -> int:
        """Length of document i in UTF-8 bytes."""
        source, row = self._locate(i)
        return source.num_bytes(row)

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

    def _locate(self, i: int) -> tuple["_TextFile | _JsonLines | _Parquet", int]:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        return self._sources[self._source[i]], int(self._row[i])


# -- files ------------------------------------------------------------------------------------------------------------


def _stdlib_files() -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path for path in _walk(root, {"site-packages", "dist-packages"}) if path.suffix == ".py" and path.is_file()
    ]
    return root, _by_key(root, files)


def _files_under(path: Path) -> tuple[Path, list[Path]]:
    if path.is_file():
        return path.parent, [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; give the path of existing data, or 'stdlib'")
    return path, _by_key(path, _walk(path, set()))


def _walk(root: Path, left_out: set[str]) -> list[Path]:
    """The files below `root` that are not hidden, without the folders named in left_out and __pycache__."""

    def unreadable(error: OSError):
        raise UserError(f"{error.filename}: folder cannot be read ({error.strerror})") from error

    files: list[Path] = []
    visited = set()
    for folder, subfolders, names in os.walk(root, onerror=unreadable, followlinks=True):
        # links to folders are followed (datasets are often shared that way), so there may be cycles
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted({name for name in subfolders if name[0] != "."} - left_out - {"__pycache__"})
        paths = (Path(folder, name) for name in names if name[0] != ".")
        # a broken link stays in, to be reported when it is opened; pipes and devices are passed over
        files += [path for path in paths if path.is_file() or not path.exists()]
    return files


def _by_key(root: Path, files: list[Path]) -> list[Path]:
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _open_source(
    path: Path, key: str, cache_dir: Path, row_groups: "_RowGroups", *, skip_not_utf8: bool
) -> "_TextFile | _JsonLines | _Parquet | None":
    """The reader of one file, or None for one that holds no document."""
    if path.suffix == ".parquet":
        return _Parquet(path, key, row_groups)
    if path.suffix == ".jsonl":
        return _JsonLines(path, key, path)
    for suffix, codec in _COMPRESSION.items():
        if path.name.endswith(suffix):
            return _JsonLines(path, key, _unpacked(path, codec, cache_dir))
    content = path.read_bytes()
    if not content:
        return None
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        if skip_not_utf8:
            return None
        raise _not_utf8(path, error) from None
    return _TextFile(path, key, len(content))


def _not_utf8(where: Path | str, error: UnicodeDecodeError) -> UserError:
    return UserError(
        f"{where}: not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start}: {error.reason}); "
        f"convert it to UTF-8, or remove it if it is no text"
    )


def _ends(file: BinaryIO) -> tuple[int, bytes, bytes]:
    size = os.fstat(file.fileno()).st_size
    first = file.read(_EDGE_BYTES)
    file.seek(max(0, size - _EDGE_BYTES))
    return size, first, file.read(_EDGE_BYTES)


def _file_fingerprint(key: str, file: BinaryIO) -> bytes:
    size, first, last = _ends(file)
    line = f"{_hash_key(key).hex()} {size} {hashlib.sha256(first).hexdigest()} {hashlib.sha256(last).hexdigest()}\n"
    return line.encode()


def _hash_key(key: str) -> bytes:
    # file names need not be UTF-8; those that are hash as their plain encoding
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _unpacked(path: Path, codec: str, cache_dir: Path) -> Path:
    """The decompressed twin of `path` in cache_dir, made if it is not there yet."""
    with open(path, "rb") as file:
        size, first, last = _ends(file)
        file.seek(size // 2)
        sample = first + file.read(_EDGE_BYTES) + last
    if size == 0:
        raise UserError(f"{path}: truncated, an empty file is no {codec} stream; fetch it again")
    digest = hashlib.sha256(f"{path.name} {size} ".encode("utf-8", "surrogateescape") + sample).hexdigest()[:32]
    target = cache_dir / "unpacked" / f"{digest}.jsonl"
    if target.exists():
        return target
    temporary = target.with_name(f".{digest}.{uuid.uuid4().hex}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as out, pa.CompressedInputStream(os.fspath(path), codec) as stream:
            while chunk := _read_stream(stream, path, codec):
                out.write(chunk)
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"{path}: cannot be unpacked into {target.parent} ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _read_stream(stream: pa.CompressedInputStream, path: Path, codec: str) -> bytes:
    try:
        return stream.read(_CHUNK_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: damaged or truncated {codec} stream ({_first_line(error)}); fetch it again"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(". ")


# -- sources ----------------------------------------------------------------------------------------------------------
# Each reads one file by row number. `rows` (int64) are the rows that hold a document, blocks() maps rows to the units
# of shuffling. Files are opened per read, since a corpus may have more of them than a process may hold open.


class _TextFile:
    num_blocks = 1

    def __init__(self, path: Path, key: str, size: int):
        self._path = path
        self._key = key
        self._size = size
        self.rows = np.zeros(1, dtype=np.int64)

    def blocks(self, rows: np.ndarray) -> np.ndarray:
        return rows

    def key_of(self, row: int) -> str:
        return self._key

    def num_bytes(self, row: int) -> int:
        return self._size

    def read(self, row: int) -> str:
        try:
            return self._path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(self._path, error) from None
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read any more ({error.strerror})") from error


class _JsonLines:
    def __init__(self, path: Path, key: str, plain: Path):
        """path is the file as the user knows it, plain the uncompressed one that is read."""
        self._path = path
        self._key = key
        self._plain = plain
        self._starts, self.rows = _index_lines(plain)
        self.num_blocks = self._starts.size - 1

    def blocks(self, rows: np.ndarray) -> np.ndarray:
        return rows

    def key_of(self, row: int) -> str:
        return f"{self._key}:{row}"

    def num_bytes(self, row: int) -> int:
        return len(self.read(row).encode())

    def read(self, row: int) -> str:
        where = f"{self._path}, line {row + 1}"
        start, stop = int(self._starts[row]), int(self._starts[row + 1])
        try:
            with open(self._plain, "rb", buffering=0) as file:
                file.seek(start)
                line = file.read(stop - start).decode("utf-8")
            if row == 0:
                line = line.removeprefix("\ufeff")  # a BOM marks the file, it is not part of the document
            record = json.loads(line)
        except OSError as error:
            raise UserError(f"{where}: cannot be read any more ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise _not_utf8(where, error) from None
        except (ValueError, RecursionError) as error:
            raise UserError(
                f'{where}: not valid JSON ({_first_line(error)}); expected one object a line, like {{"text": "..."}}'
            ) from None
        if type(record) is not dict:
            raise UserError(f'{where}: got a JSON {type(record).__name__}, expected an object with a "text" field')
        if "text" not in record:
            raise UserError(
                f'{where}: no "text" field, the line has {_names(record)}; rename the one with the document'
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
                f"{error.start}, "
                f"which no UTF-8 text can hold; fix or remove the line"
            ) from None
        return text


class _Parquet:
    def __init__(self, path: Path, key: str, row_groups: "_RowGroups"):
        self._path = path
        self._key = key
        self._row_groups = row_groups
        try:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: truncated or no parquet file ({_first_line(error)}); fetch it again") from error
        if "text" not in schema.names:
            raise UserError(
                f'{path}: no column "text", the file has {_names(schema.names)}; rename the one with documents'
            )
        kind = schema.field("text").type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise UserError(f'{path}: column "text" is {kind}, expected string; convert the column')
        self._group_starts = np.cumsum([0, *sizes])  # (num_blocks + 1,) int64, row numbers
        self.rows = np.arange(self._group_starts[-1])
        self.num_blocks = len(sizes)

    def blocks(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._group_starts, rows, side="right") - 1

    def key_of(self, row: int) -> str:
        return f"{self._key}:{row}"

    def num_bytes(self, row: int) -> int:
        return len(self.read(row).encode())

    def read(self, row: int) -> str:
        group = int(self.blocks(np.array([row]))[0])
        start, stop = self._group_starts[group : group + 2].tolist()
        try:
            column = self._row_groups.get(self._path, group)
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{self._path}, rows {start} to {stop - 1}: damaged parquet data ({_first_line(error)}); fetch it again"
            ) from error
        try:
            text = column[row - start].as_py()
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{self._path}, row {row}", error) from None
        if text is None:
            raise UserError(
                f'{self._path}, row {row}: column "text" is null, expected a string; fill or remove the row'
            )
        return text


class _RowGroups:
    """The text columns of the parquet row groups read last, of all files, least recently used first.

    Bounded by bytes rather than by count: streams drift apart by thousands of documents, so many small row groups are
    in use at once; of large ones it is at most two.
    """

    def __init__(self):
        self._columns: OrderedDict[tuple[Path, int], pa.ChunkedArray] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def get(self, path: Path, group: int) -> pa.ChunkedArray:
        with self._lock:
            column = self._columns.get((path, group))
            if column is not None:
                self._columns.move_to_end((path, group))
                return column
            with pq.ParquetFile(path) as file:
                column = file.read_row_group(group, columns=["text"], use_threads=False).column("text")
            self._columns[path, group] = column
            self._num_bytes += column.nbytes
            while self._num_bytes > _ROW_GROUP_CACHE_BYTES and len(self._columns) > 2:
                self._num_bytes -= self._columns.popitem(last=False)[1].nbytes
            return column


def _names(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "nothing"


def _index_lines(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """starts (num_lines + 1,) int64: where each line begins, then the size; rows int64: lines that are not blank."""
    starts = [np.zeros(1, dtype=np.int64)]
    size = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            starts.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + (size + 1))
            size += len(chunk)
        starts = np.concatenate(starts)
        if starts[-1] != size:
            starts = np.append(starts, size)
        lengths = np.diff(starts)
        blank = np.zeros(lengths.size, dtype=bool)
        for row in np.flatnonzero(lengths <= 2).tolist():
            file.seek(int(starts[row]))
            blank[row] = file.read(int(lengths[row])) in (b"\n", b"\r\n")
    return starts, np.flatnonzero(~blank)
