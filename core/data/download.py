"""Files from the network: whole under their own names, or not there.

fetch        one file of a URL, continued where an earlier try ended
fetch_zip    an archive, unpacked
Errors       a UserError of one sentence that names the address and the place in the cache where a copy from elsewhere
             may be put.
"""

import hashlib
import os
import shutil
import time
import urllib.error
import urllib.request
import uuid
import zipfile
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from filelock import FileLock

from core.stopping import UserError

ATTEMPTS = 5
PATIENCE_S = 30  # for a connection, and for each piece of a file
CHUNK_BYTES = 1 << 20
_SAYS_EVERY_S = 5.0

Say = Callable[[str], None]


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
            except (OSError, HTTPException) as error:  # refused, dropped, timed out; no space left
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
        name = path.resolve()
    else:
        name = source
        path = cache_dir / f"{hashlib.sha256(source.encode()).hexdigest()[:16]}-{source.rsplit('/', 1)[-1]}"
    folder = cache_dir / f"{hashlib.sha256(str(name).encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    if name == source:
        fetch(source, path, say)
    temporary = cache_dir / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(temporary)
        os.replace(temporary, folder)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        if name == source:
            path.unlink()
            raise UserError(f"{source} came damaged ({error}) and was removed: try again") from error
        raise UserError(f"{source} is no .zip archive, or a damaged one ({error})") from error
    except OSError as error:
        if not folder.is_dir():  # another process may have been first
            raise UserError(f"{path} cannot be unpacked into {cache_dir} ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
