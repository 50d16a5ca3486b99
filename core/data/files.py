"""Which files of a folder hold documents, how compressed ones are unpacked, and how any is known again.

Digests   every file is hashed whole. Text and JSON lines are read to the end anyway when they are opened; the digest of
          a file that is not is remembered in the cache folder, for as long as its size, times and inode stay.
Trust     an unpacked file bears its digest in its name, to be compared with it whenever it is opened.
"""

import codecs
import hashlib
import json
import os
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from core.stopping import UserError

CHUNK_BYTES = 16 << 20  # of one read when a whole file is passed through
_REMEMBERED_BYTES = 16 << 20  # hashing a smaller file takes less time than it takes to look its digest up safely
_SETTLED_S = 2.0  # a file written to more recently may change once more without a change of its times
_SAYS_EVERY_S = 5.0

_SPARK = re.compile(
    "_SUCCESS|_metadata|_common_metadata|_committed_.*|_started_.*|_temporary|_delta_log|_spark_metadata"
)
_RUN_FILE = re.compile(
    r"config\.json|log(-unsaved)?\.jsonl|owner|summary.*\.json|report.*\.md|loss\.png|checkpoints|profile|wandb"
)
CACHE_FOLDERS = ("unpacked", "tokenizers", "digests")

_JSON_LINES = (".jsonl", ".ndjson")
_PARQUET = (".parquet", ".pq")
_CODECS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2"}
# what a file holds by its suffix where that is no text, and what to do to train on it all the same
_ADVICE = 'write its documents to a .jsonl file, one {"text": "..."} a line'
_NO_TEXT = {
    suffix: (kind, advice)
    for kind, advice, suffixes in (
        ("tables", _ADVICE, ".csv .tsv .xls .xlsx .ods .arrow .feather .orc .avro .h5 .hdf5 .sqlite .sqlite3 .db"),
        ("archives", "unpack it first", ".gz .bz2 .xz .zst .zstd .lz4 .zip .tar .tgz .7z .rar .jar .whl"),
        (
            "weights and arrays",
            "give the text that it was made from",
            ".safetensors .bin .pt .pth .ckpt .npy .npz .pkl .pickle .onnx .gguf .idx .tiktoken .model",
        ),
        (
            "images, sound and video",
            "there is no text in it",
            ".png .jpg .jpeg .gif .webp .bmp .tif .tiff .svg .ico .mp3 .wav .flac .ogg .mp4 .mkv .avi .mov .webm",
        ),
        ("office documents", "convert it to plain text", ".pdf .doc .docx .odt .ppt .pptx .epub .mobi .ps"),
        ("notebooks", _ADVICE, ".ipynb"),
        ("programs", "there is no text in it", ".exe .dll .so .dylib .o .a .pyc .class .wasm"),
    )
    for suffix in suffixes.split()
}
_MAGIC = tuple(
    bytes.fromhex(magic)
    for magic in (  # gzip, zstd, bzip2, xz, zip; PDF, PNG, JPEG, GIF; parquet, arrow, ELF, SQLite, Ogg, HDF, NumPy
        "1f8b 28b52ffd 425a6839 fd377a585a00 504b0304 255044462d 89504e470d0a ffd8ff 47494638 50415231 4152524f5731 "
        "7f454c46 53514c69746520666f726d6174 4f676753 89484446 934e554d5059"
    ).split()
)


class NoDocuments(Exception):
    """The file holds no documents. kind: of such files, in the plural; advice: for someone who wants to train on it."""

    def __init__(self, kind: str, advice: str):
        super().__init__(kind)
        self.kind = kind
        self.advice = advice


class Progress:
    """Says how much was read, once reading has taken some seconds and then every few."""

    def __init__(self, say: Callable[[str], None] | None):
        self.say = say or (lambda sentence: None)
        self.num_files = 0
        self.files_read = 0
        self._bytes_read = 0
        self._next = time.monotonic() + _SAYS_EVERY_S

    def read(self, num_bytes: int) -> None:
        self._bytes_read += num_bytes
        if (now := time.monotonic()) >= self._next:
            self._next = now + _SAYS_EVERY_S
            self.say(f"reading data: {self.files_read:,} of {self.num_files:,} files, {self._bytes_read / 1e9:.2f} GB")


# -- what is in a folder -----------------------------------------------------------------------------------------------


def walk(root: str, left_out: set[str], skipped: Counter[str], own: Collection[str] = ()) -> list[str]:
    """Keys of the files below `root`, without the folders named in left_out and those at the real paths in `own`."""

    def unreadable(error: OSError):
        raise UserError(f"{error.filename}: folder cannot be read ({error.strerror})") from error

    keys: list[str] = []
    visited = set(own)
    for folder, subfolders, files in os.walk(root, onerror=unreadable, followlinks=True):
        # links to folders are followed (datasets are often shared that way), so there may be cycles
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        of_run = "log.jsonl" in files and ("config.json" in files or "checkpoints" in subfolders)
        prefix = "" if folder == root else os.path.relpath(folder, root) + "/"

        def belongs(name: str, of_run: bool = of_run) -> bool:
            kind = (
                "hidden files or folders"
                if name[0] == "."
                else "markers of Spark jobs"
                if _SPARK.fullmatch(name)
                else "files or folders of a run"
                if of_run and _RUN_FILE.fullmatch(name)
                else None
            )
            if kind:
                skipped[kind] += 1
            return kind is None

        subfolders[:] = sorted(name for name in subfolders if name not in left_out and belongs(name))
        for name in filter(belongs, files):
            path = os.path.join(folder, name)
            # a broken link stays in, to be reported when it is opened; pipes and devices are passed over
            if os.path.isfile(path) or not os.path.exists(path):
                keys.append(prefix + name)
    return keys


def format_of(path: str) -> tuple[str, str | None]:
    """("text" | "json lines" | "json" | "parquet", codec of its compression) by the suffix. Raises NoDocuments for
    others."""
    stem, last = os.path.splitext(os.path.basename(path).lower())
    codec = _CODECS.get(last)
    inner = last if codec is None else os.path.splitext(stem)[1]
    if inner in _JSON_LINES:
        return "json lines", codec
    if inner == ".json":  # as C4 and others call an object a line; it may be anything
        return "json", codec
    if last in _PARQUET:
        return "parquet", None
    if last in _NO_TEXT:
        raise NoDocuments(*_NO_TEXT[last])
    return "text", None


def is_binary(head: bytes) -> bool:
    """Whether a file begins so as a known format, or with more NUL bytes than any text in UTF-8."""
    return head.startswith(_MAGIC) or head.count(0) > len(head) // 4


def refuse_pointer(path: str, head: bytes) -> None:
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise UserError(f"{path}: holds a Git LFS pointer, not the data; fetch it with git lfs pull")


def check_object_a_line(path: str, codec: str | None) -> None:
    """NoDocuments for a .json file that is one JSON value: an array, or settings such as a config.json."""
    if codec is None:
        with open(path, "rb") as file:
            head = file.read(CHUNK_BYTES)
    else:
        with _decompressed(path, codec) as stream:
            head = _read_stream(stream, path, codec)
    cut = len(head) == CHUNK_BYTES
    head = head.removeprefix(codecs.BOM_UTF8).strip()
    line = head.split(b"\n", 1)[0].rstrip()
    one_value = head[:1] not in (b"{", b"") or line == b"{"
    if not one_value and head and not cut:
        try:
            one_value = "text" not in json.loads(head) or line != head
        except (ValueError, RecursionError):
            pass  # several lines, or damage that reading will name
    if one_value:
        raise NoDocuments("JSON files without an object a line", _ADVICE)


# -- unpacked files and digests ----------------------------------------------------------------------------------------


@contextmanager
def _decompressed(path: str, codec: str) -> Iterator[pa.CompressedInputStream]:
    if os.path.getsize(path) == 0:
        raise UserError(f"{path}: truncated, an empty file is no {codec} stream; fetch it again")
    with pa.CompressedInputStream(path, codec) as stream:
        yield stream


def _read_stream(stream: Any, path: str, codec: str | None) -> bytes:
    try:
        return stream.read(CHUNK_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: damaged or truncated {codec} stream ({first_line(error)}); fetch it again") from error


def unpacked(path: str, codec: str, cache_dir: Path, progress: Progress) -> str:
    """The decompressed twin of `path` in cache_dir, made if it is not there yet."""
    name = digest_of(path, cache_dir, progress)[:32]
    folder = Path(cache_dir) / "unpacked"
    for twin in sorted(folder.glob(f"{name}-*.jsonl")):
        return str(twin)
    temporary = folder / f".{name}.{uuid.uuid4().hex}"
    digest = hashlib.sha256()
    with _decompressed(path, codec) as stream:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as out:
                while chunk := _read_stream(stream, path, codec):
                    digest.update(chunk)
                    out.write(chunk)
                    progress.read(len(chunk))
            twin = folder / f"{name}-{digest.hexdigest()}.jsonl"
            os.replace(temporary, twin)
        except OSError as error:
            raise UserError(f"{path}: cannot be unpacked into {folder} ({error.strerror or error})") from error
        finally:
            temporary.unlink(missing_ok=True)
    return str(twin)


def digest_in_name(plain: str) -> str:
    return Path(plain).stem.split("-")[1]


def digest_of(path: str, cache_dir: Path, progress: Progress) -> str:
    """sha256 of the file in hex; of a large one that has not been touched since, as it was found before."""
    with open(path, "rb", buffering=0) as file:
        stat = os.fstat(file.fileno())
        now = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
        note = Path(cache_dir) / "digests" / f"{hash_key(os.path.realpath(path)).hex()[:32]}.json"
        remembers = stat.st_size > _REMEMBERED_BYTES
        if remembers and (known := _read_note(note)) and known["file"] == now:
            return known["sha256"]
        started = time.time()
        digest = hashlib.sha256()
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            progress.read(len(chunk))
    if remembers and started - max(stat.st_mtime, stat.st_ctime) > _SETTLED_S:
        temporary = note.with_name(f".{note.name}.{uuid.uuid4().hex}")
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"file": now, "sha256": digest.hexdigest()}))
            os.replace(temporary, note)
        except OSError as error:
            raise UserError(f"{note.parent}: cannot be written ({error.strerror}); give another --cache-dir") from error
    return digest.hexdigest()


def _read_note(note: Path) -> dict[str, Any] | None:
    try:
        known = json.loads(note.read_bytes())
    except (OSError, ValueError):  # it will be written, again if it is damaged
        return None
    valid = isinstance(known, dict) and re.fullmatch("[0-9a-f]{64}", str(known.get("sha256"))) and "file" in known
    return known if valid else None


def hash_key(key: str) -> bytes:
    # file names need not be UTF-8; those that are hash as their plain encoding
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(". ")
