"""Files from the network: whole under their own names, or not there.

fetch        one file of a URL, continued where an earlier try ended
fetch_zip    an archive, unpacked
Shards       the files of a dataset of the Hugging Face hub, in the background: `python -m core.data.download climbmix
             --shards 170` does it beforehand
Errors       a UserError of one sentence that names what is missing and the place in the cache where a copy from
             elsewhere may be put.
"""

import argparse
import errno
import hashlib
import json
import math
import os
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
import zipfile
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from filelock import FileLock
from rich.progress import Progress as Bar

from core.config import DATASETS, TOKEN_DATASETS, DataConfig
from core.data.files import Progress, digest_of
from core.stopping import STORAGE_ERRORS, UserError, expanded, one_sentence

ATTEMPTS = 5
PATIENCE_S = 30  # for a connection, and for each piece of a file
CHUNK_BYTES = 1 << 20
POLL_S = 0.2
_SAYS_EVERY_S = 5.0

Say = Callable[[str], None]


def silent(sentence: str) -> None:
    """Where another process says it."""


def fetch(url: str, path: Path, say: Say) -> None:
    """Makes `path` the content of `url`. Waits 1, 2, 4 ... s between attempts; what the server refuses (4xx, but for
    408 and 429) is not tried again."""
    part = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    reason = ""
    with FileLock(path.with_name(f".{path.name}.lock")):  # who waits finds what the other fetched
        for attempt in range(ATTEMPTS):
            if path.exists():
                return
            if attempt:
                say(f"{url}: {reason}; attempt {attempt + 1} of {ATTEMPTS}")
                time.sleep(2 ** (attempt - 1))
            try:
                _continue(url, part, say)
                os.replace(part, path)
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}"
                if error.code == 416:  # what is there is longer than the file
                    part.unlink(missing_ok=True)
                elif 400 <= error.code < 500 and error.code not in (408, 429):
                    break
            except (OSError, HTTPException) as error:  # refused, dropped, timed out
                if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
                    raise UserError(f"{path}: {error.strerror}; make room, or set --cache-dir") from error
                reason = str(getattr(error, "reason", None) or error) or type(error).__name__
            else:
                return
    raise UserError(f"{url} cannot be fetched ({reason}): get it another way and put it at {path}")


def _continue(url: str, part: Path, say: Say) -> None:
    """Appends to `part` what of `url` it lacks."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
        if response.status != 206:  # the whole file, whatever was asked for
            have = 0
        size = int(response.headers.get("Content-Length") or -1)
        total = have + size
        said = time.monotonic()
        with open(part, "r+b" if have else "wb") as file:
            file.seek(have)
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                have += len(chunk)
                if time.monotonic() - said > _SAYS_EVERY_S:
                    said = time.monotonic()
                    say(f"fetching {url}: {have / 1e6:.0f} of {total / 1e6:.0f} MB")
            file.truncate()
            os.fsync(file.fileno())
    if size >= 0 and have != total:
        raise OSError(f"the connection ended after {have} of {total} bytes")


def fetch_zip(source: str, cache_dir: Path, say: Say) -> Path:
    """The folder that an archive unpacks to, by its URL or path; a folder is itself."""
    if not source.startswith(("http://", "https://")):
        path = Path(source).expanduser()
        if path.is_dir():
            return path
        if not path.exists():
            raise UserError(f"{source} does not exist: expected a folder, a .zip file or a URL")
        stat = path.stat()  # another archive of that name is unpacked anew
        name = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    else:
        name = source
        path = cache_dir / f"{hashlib.sha256(source.encode()).hexdigest()[:16]}-{source.rsplit('/', 1)[-1]}"
    folder = cache_dir / hashlib.sha256(name.encode()).hexdigest()[:16]
    if folder.is_dir():
        return folder
    if name == source:
        fetch(source, path, say)
    temporary = cache_dir / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(temporary)
        os.replace(temporary, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        if name == source:
            path.unlink(missing_ok=True)
            raise UserError(f"{source} came damaged ({error}) and was removed: try again") from error
        raise UserError(f"{source} is no .zip archive, or a damaged one ({error})") from error
    except OSError as error:
        if not folder.is_dir():  # another process may have been first
            raise UserError(f"{path} cannot be unpacked into {cache_dir} ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


# -- datasets of the Hugging Face hub ----------------------------------------------------------------------------------


CHARS_PER_TOKEN = 4.6  # of a vocabulary of 32,768 on this text, on the low side
CROPPED = 0.36  # of all tokens, by best-fit packing in rows of 2048 [measured on this text: 34.6 %]
WORKERS = 4

_ALL = {**DATASETS, **TOKEN_DATASETS}


def shards_for(name: str, tokens: int, *, crops: bool) -> int:
    """Training shards whose text is enough for that many tokens; all, where even these are too few."""
    dataset = DATASETS[name]
    used = tokens / (1 - CROPPED if crops else 1) * CHARS_PER_TOKEN
    return min(max(1, math.ceil(used / dataset.shard_chars)), dataset.num_shards - 1)


@dataclass(frozen=True)
class Shard:
    name: str
    num_bytes: int | None = None  # as the hub says
    sha256: str | None = None


def _status(error: Exception) -> int:
    """Of the hub's answer; 0 where there was none."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__


def _store(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_text(text)
    os.replace(temporary, path)


class Shards:
    """The files of a dataset in a folder of the cache; `fetch` brings what is missing, in the background.

    train, validation   the shards that are read, in order
    commit              of the dataset: the one that the folder was begun with
    shards.json         what the hub says of all of them. Without it, because there never was a network, files that
                        were put into the folder by hand are taken as they are
    Under its own name a file is whole: it comes in below .incoming, size and sha256 are compared, then it is renamed.
    """

    def __init__(self, name: str, num_train: int, cache_dir: Path) -> None:
        """num_train: shards to train on. Raises UserError where the dataset is unknown here and the hub does not
        answer."""
        self.name, self.dataset = name, _ALL[name]
        self.folder = Path(cache_dir) / "data" / name
        self.commit, found = self._known(num_train)
        num_train = min(num_train, len(found) - 1)
        self.train, self.validation = found[:num_train], found[-1]
        self._here: set[str] = set()  # checked
        self._said = time.monotonic()
        self._failed: UserError | None = None
        self._done = threading.Condition()
        self._fetches = False

    @property
    def wanted(self) -> list[Shard]:
        """In the order of need: a run begins with its validation shard."""
        return [self.validation, *self.train]

    def _known(self, num_train: int) -> tuple[str, list[Shard]]:
        """Commit and shards, of the folder or else of the hub."""
        index, kind = self.folder / "shards.json", Path(self.dataset.shard_name(0)).suffix
        if not index.exists():
            from huggingface_hub import HfApi  # here, since importing it takes a third of a second

            try:
                api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
                info = api.dataset_info(self.dataset.repo, files_metadata=True, timeout=PATIENCE_S)
            except Exception as error:  # of the HTTP library, whichever the hub's client uses
                if (status := _status(error)) and status != 429 and status < 500:
                    raise UserError(f"{self.dataset.repo}: the hub refuses it ({status}: {_reason(error)})") from error
                return self._by_hand(num_train, error)
            siblings = sorted(info.siblings or [], key=lambda s: s.rfilename)
            files = [
                {"name": s.rfilename, "num_bytes": s.size, "sha256": s.lfs.sha256 if s.lfs else None}
                for s in siblings
                if s.rfilename.endswith(kind)
            ]
            if len(files) < 2:
                raise UserError(f"{self.dataset.repo} has {len(files)} {kind} files, expected two or more")
            _store(index, json.dumps({"repo": self.dataset.repo, "commit": info.sha, "files": files}))
        try:
            known = json.loads(index.read_bytes())
            return known["commit"], [Shard(**file) for file in known["files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index} is damaged ({error}): remove it, and it is fetched again") from error

    def _by_hand(self, num_train: int, error: Exception) -> tuple[str, list[Shard]]:
        last = self.dataset.num_shards - 1
        names = [self.dataset.shard_name(i) for i in (*range(min(num_train, last)), last)]
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            shown = ", ".join(missing) if len(missing) < 5 else f"{missing[0]} to {missing[-2]}, {missing[-1]}"
            raise UserError(
                f"{self.name}: the Hugging Face hub does not answer ({_reason(error)}); put {shown} of the dataset "
                f"{self.dataset.repo} into {self.folder}, or train on other data with --data"
            ) from error
        return "by hand", [Shard(name) for name in names]

    # space and size

    def missing(self) -> list[Shard]:
        return [shard for shard in self.wanted if not self.path(shard).is_file()]

    def path(self, shard: Shard) -> Path:
        return self.folder / shard.name

    def _failure(self, shard: Shard) -> Path:
        """Where a process that fetches tells those that only read why a shard will not come."""
        return self.folder / f".{shard.name}.failed"

    def announcement(self, tokens: int | None = None) -> str:
        """How much there is to fetch, where to. UserError where the disk has no room for it."""
        missing, total = self.missing(), sum(shard.num_bytes or 0 for shard in self.wanted)
        lacking = sum(shard.num_bytes or 0 for shard in missing)
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        need = f"{len(self.train):,} of {self.dataset.num_shards - 1:,} shards to train on and one to validate"
        need += f" for {tokens / 1e9:.3g} B tokens" if tokens else ""
        sizes = f"{total / 1e9:.2f} GB, of which {lacking / 1e9:.2f} GB are to be fetched"
        sizes += f" into {self.folder} ({free / 1e9:.1f} GB free)"
        if lacking > free:
            raise UserError(f"{self.name}: {need}: {sizes}; make room, or set --cache-dir")
        return f"{self.name}: {need}: {sizes}"

    # fetching

    def fetch(self, say: Say) -> None:
        """Begins to check what is there and to fetch what is missing, in threads that end with the process."""
        self._fetches = True
        for shard in self.wanted:
            self._failure(shard).unlink(missing_ok=True)
        waiting: deque[Shard] = deque(self.wanted)
        for _ in range(WORKERS):
            threading.Thread(target=self._work, args=(waiting, say), name="download", daemon=True).start()

    def _work(self, waiting: deque[Shard], say: Say) -> None:
        while not self._failed:
            try:
                shard = waiting.popleft()
            except IndexError:
                return
            try:
                # a lock: another run that shares the cache fetches into the same place
                (self.folder / ".incoming").mkdir(parents=True, exist_ok=True)
                with FileLock(self.folder / ".incoming" / f"{shard.name}.lock"):
                    self._make_whole(shard, say)
                self._failure(shard).unlink(missing_ok=True)
            except Exception as error:  # nobody waits for a thread: whoever waits for a shard is told
                why = str(error) if isinstance(error, UserError) else f"{shard.name}: {type(error).__name__} {error}"
                failed = UserError(why)
                # processes that only read wait for the file, and look for this one
                _store(self._failure(shard), why)
                with self._done:
                    self._failed = failed
                    self._done.notify_all()
                return
            with self._done:
                self._here.add(shard.name)
                self._done.notify_all()
                if (now := time.monotonic()) - self._said > _SAYS_EVERY_S and len(self._here) < len(self.wanted):
                    self._said = now
                    say(f"{self.name}: {len(self._here)} of {len(self.wanted)} shards are here")

    def _make_whole(self, shard: Shard, say: Say) -> None:
        path = self.path(shard)
        if path.is_file():
            if self._is_right(shard, path):
                return
            say(f"{path} is not what the hub has under this name: fetching it again")
            path.unlink()
        from huggingface_hub import hf_hub_download

        incoming, reason = self.folder / ".incoming", ""
        endpoint = os.environ.get("HF_ENDPOINT")
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(2 ** (attempt - 1))
            try:
                options = {"repo_type": "dataset", "revision": self.commit, "local_dir": incoming, "endpoint": endpoint}
                came = Path(hf_hub_download(self.dataset.repo, shard.name, **options))
            except Exception as error:  # of the HTTP library, whichever the hub's client uses
                status, reason = _status(error), _reason(error)
                if isinstance(error, OSError) and error.errno in STORAGE_ERRORS | {errno.EACCES}:
                    raise UserError(f"{self.folder}: {error.strerror}; make room, or set --cache-dir") from error
                if 400 <= status < 500 and status not in (408, 429):
                    break
            else:
                if self._is_right(shard, came):
                    os.replace(came, path)
                    return
                came.unlink()
                reason = "its size or sha256 is not what the hub says"
                say(f"{shard.name} came damaged: {reason}; fetching it again")
        raise UserError(
            f"{shard.name} of {self.dataset.repo} cannot be fetched ({reason}): start again to go on, or put the file "
            f"into {self.folder}"
        )

    def _is_right(self, shard: Shard, path: Path) -> bool:
        if shard.num_bytes is not None and path.stat().st_size != shard.num_bytes:
            return False
        return shard.sha256 is None or digest_of(str(path), self.folder, Progress(None)) == shard.sha256

    def wait(self, shard: Shard, stopped: Callable[[], bool] = lambda: False) -> Path:
        """The path of a shard once it is there and checked. Raises UserError where it will not come.

        stopped: whether to give up waiting, which raises InterruptedError.
        """
        path, failed = self.path(shard), self._failure(shard)
        while True:
            if self._fetches:
                with self._done:
                    if shard.name in self._here:
                        return path
                    if self._failed:
                        raise self._failed
                    self._done.wait(POLL_S)
            elif path.is_file():
                return path
            elif failed.exists():
                raise UserError(failed.read_text())
            else:
                time.sleep(POLL_S)
            if stopped():
                raise InterruptedError(f"no longer waiting for {path}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m core.data.download", description="Fetches shards of a dataset.")
    parser.add_argument("dataset", choices=_ALL)
    parser.add_argument("--shards", type=int, default=8, help="shards to train on; validation comes too (default 8)")
    parser.add_argument("--cache-dir", default=DataConfig.cache_dir, help="default %(default)s")
    args = parser.parse_args(argv)
    if args.shards < 1:
        raise UserError(f"--shards is {args.shards}: expected 1 or more")
    shards = Shards(args.dataset, args.shards, expanded(args.cache_dir))
    print(shards.announcement())
    shards.fetch(print)
    with Bar() as bar:
        task = bar.add_task("fetching", total=len(shards.wanted))
        for shard in shards.wanted:
            shards.wait(shard)
            bar.advance(task)
    print(f"all {len(shards.wanted)} shards are in {shards.folder}")


if __name__ == "__main__":
    with one_sentence():
        main(sys.argv[1:])
