"""A stand-in for the Hugging Face hub on this machine: two datasets of small shards, and faults on request."""

import hashlib
import io
import json
import random
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from core.config import DATASETS, TOKEN_DATASETS
from tests.conftest import LETTERS

COMMIT = "c" * 40
FILES = 4  # shards of a dataset, the last for validation
DOCUMENTS = 60  # of a shard


def shard(number: int) -> bytes:
    """A parquet file of short documents, two row groups."""
    rng = random.Random(number)
    words = ["".join(rng.choices(LETTERS, k=rng.randint(1, 9))) for _ in range(500)]
    texts = [f"{number}:{i} " + " ".join(rng.choices(words, k=rng.randint(20, 80))) for i in range(DOCUMENTS)]
    out = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), out, row_group_size=DOCUMENTS // 2, compression="zstd")
    return out.getvalue()


class Hub(ThreadingHTTPServer):
    """files: name -> content, of every dataset; others: path -> content. faults: name -> what the next requests for a
    file get: a status, "drop" half of the content, "damage" a wrong byte, "wait" for `release`. asked: names of files
    whose content was asked for."""

    def __init__(self, num_files: int = FILES):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {f"shard_{i:05d}.parquet": shard(i) for i in range(num_files)}
        self.others: dict[str, bytes] = {}
        self.faults: dict[str, list] = {}
        self.asked: list[str] = []
        self.refuses = 0  # a status that the listing gets
        self.release = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self._answer(with_content=False)

    def do_GET(self):
        self._answer(with_content=True)

    def _answer(self, with_content):
        path = urlsplit(self.path).path
        if path in self.server.others:
            return self._send(200, self.server.others[path])
        for dataset in (*DATASETS.values(), *TOKEN_DATASETS.values()):
            if path.startswith(f"/api/datasets/{dataset.repo}"):
                return self._listing(dataset.repo)
            if path.startswith(f"/datasets/{dataset.repo}/resolve/{COMMIT}/"):
                return self._file(path.rsplit("/", 1)[1], with_content)
        return self._send(404, b"")

    def _listing(self, repo):
        if self.server.refuses:
            return self._send(self.server.refuses, b"")
        files = [
            {"rfilename": name, "size": len(data), "lfs": {"sha256": digest(data), "size": len(data), "pointerSize": 1}}
            for name, data in self.server.files.items()
        ]
        siblings = [{"rfilename": "README.md", "size": 1}, *files]
        return self._send(
            200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode(), "application/json"
        )

    def _file(self, name, with_content):
        data = self.server.files.get(name)
        if data is None:
            return self._send(404, b"", headers={"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{digest(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if not with_content:
            return self._send(200, data, headers=headers)
        self.server.asked.append(name)
        faults = self.server.faults.get(name)
        fault = faults.pop(0) if faults else None
        if isinstance(fault, int):
            return self._send(fault, b"")
        if fault == "wait":
            self.server.release.wait(60)
        if fault == "damage":
            data = bytes([data[0] ^ 1]) + data[1:]
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self._send(206 if start else 200, data[start:], headers=headers, drops=fault == "drop")

    def _send(self, status, data, kind="application/octet-stream", headers=None, drops=False):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if drops else data)
        if drops:
            self.close_connection = True

    def log_message(self, *args):
        pass


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def serving(hub: Hub):
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.release.set()
        hub.shutdown()
        hub.server_close()
