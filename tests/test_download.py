"""Downloads from a server of this process that misbehaves on request."""

import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from core.data import download
from core.data.download import fetch, fetch_zip
from core.stopping import UserError

CONTENT = bytes(range(256)) * 1000


class Server(ThreadingHTTPServer):
    """Answers the next request as the next of `faults` says, and rightly where there is none: a status, "drop" half of
    the answer, or "whole" whatever part is asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.files, self.asked = [], {"/file": CONTENT}, []
        self.url = f"http://127.0.0.1:{self.server_port}/file"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.server.asked.append(start)
        fault = self.server.faults.pop(0) if self.server.faults else None
        data = self.server.files.get(self.path)
        if isinstance(fault, int) or data is None:
            return self.send_error(fault or 404)
        if start > len(data):
            return self.send_error(416)
        if fault == "whole":
            start = 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : start + (len(data) - start) // 2] if fault == "drop" else data[start:])
        return None

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "faults, asked",
    [
        ([], [0]),
        (["drop"], [0, 128_000]),
        (["drop", "drop"], [0, 128_000, 192_000]),
        (["drop", "whole"], [0, 128_000]),
        ([503, 429], [0, 0, 0]),
        (["drop", 500], [0, 128_000, 128_000]),
    ],
    ids=str,
)
def test_a_file_arrives_whole(server, tmp_path, faults, asked):
    server.faults = list(faults)
    fetch(server.url, tmp_path / "folder" / "file", print)
    assert (tmp_path / "folder" / "file").read_bytes() == CONTENT and server.asked == asked
    fetch(server.url, tmp_path / "folder" / "file", print)
    assert server.asked == asked  # what is there is not fetched again
    assert not list((tmp_path / "folder").glob("*.part"))


def test_an_earlier_download_is_continued_and_a_wrong_one_begun_again(server, tmp_path):
    (tmp_path / ".file.part").write_bytes(CONTENT[:1000])
    fetch(server.url, tmp_path / "file", print)
    assert server.asked == [1000] and (tmp_path / "file").read_bytes() == CONTENT
    (tmp_path / ".other.part").write_bytes(CONTENT + b"more")
    fetch(server.url, tmp_path / "other", print)
    assert server.asked[1:] == [len(CONTENT) + 4, 0] and (tmp_path / "other").read_bytes() == CONTENT


@pytest.mark.parametrize("faults, tries", [([404], 1), ([403], 1), ([429] * 9, 5), (["drop"] * 9, 5)], ids=str)
def test_what_does_not_come_is_a_sentence(server, tmp_path, faults, tries):
    server.faults = list(faults)
    with pytest.raises(UserError, match=f"{server.url} cannot be fetched .*put it at {tmp_path / 'file'}"):
        fetch(server.url, tmp_path / "file", print)
    assert len(server.asked) == tries and not (tmp_path / "file").exists()


def test_no_server_is_a_sentence(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="cannot be fetched .*refused"):
        fetch(server.url, tmp_path / "file", print)


def archive():
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr("inner/a.txt", "hello")
    return data.getvalue()


def test_an_archive_is_unpacked_once(server, tmp_path):
    server.files["/file"] = archive()
    folder = fetch_zip(server.url, tmp_path, print)
    assert (folder / "inner" / "a.txt").read_text() == "hello" and fetch_zip(server.url, tmp_path, print) == folder
    assert len(server.asked) == 1
    assert fetch_zip(str(folder), tmp_path, print) == folder
    (tmp_path / "own.zip").write_bytes(archive())
    assert (fetch_zip(str(tmp_path / "own.zip"), tmp_path, print) / "inner" / "a.txt").exists()
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name.startswith(".")]


def test_a_damaged_archive_is_removed_and_fetched_again(server, tmp_path):
    server.files["/file"] = archive()[:-10]
    with pytest.raises(UserError, match="came damaged .* removed: try again"):
        fetch_zip(server.url, tmp_path, print)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    server.files["/file"] = archive()
    assert (fetch_zip(server.url, tmp_path, print) / "inner" / "a.txt").exists()


@pytest.mark.parametrize("place", [40, 45, 50])
def test_damage_anywhere_in_an_archive_is_a_sentence(tmp_path, place):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.txt", "hello " * 50)
    damaged = bytearray(data.getvalue())
    damaged[place] ^= 0xFF
    (tmp_path / "own.zip").write_bytes(damaged)
    with pytest.raises(UserError, match="no .zip archive, or a damaged one"):
        fetch_zip(str(tmp_path / "own.zip"), tmp_path / "cache", print)


def test_an_archive_that_was_replaced_is_unpacked_again(tmp_path):
    path = tmp_path / "own.zip"
    for text in ("one", "another"):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a.txt", text)
        assert (fetch_zip(str(path), tmp_path / "cache", print) / "a.txt").read_text() == text


@pytest.mark.parametrize("name, said", [("none.zip", "does not exist"), ("text.zip", "no .zip archive")])
def test_no_archive_is_a_sentence(tmp_path, name, said):
    (tmp_path / "text.zip").write_text("text")
    with pytest.raises(UserError, match=said):
        fetch_zip(str(tmp_path / name), tmp_path / "cache", print)
