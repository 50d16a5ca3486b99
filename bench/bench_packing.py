"""Best-fit packing against the same rule read literally: `pytest bench/bench_packing.py`.

Both must return the same rows, and ours MIN_SPEEDUP times faster. Documents are pre-tokenised, with the lengths of web
text: log-normal, median 400, mean 690 tokens. Rows of 2049, a buffer of 1000 documents.
"""

from contextlib import contextmanager

import numpy as np

from bench.packing_oracle import literal_rows
from bench.suite import HostPrograms, host_item
from core.data.packing import BestFitPacker

ROW_LEN = 2049
BUFFER_DOCS = 1000
MEDIAN, MEAN = 400, 690
NUM_DOCUMENTS = 6_000
NUM_ROWS = 1_000
MIN_SPEEDUP = 5.0


def web_documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(MEDIAN), np.sqrt(2 * np.log(MEAN / MEDIAN)), NUM_DOCUMENTS).astype(int) + 1
    return [rng.integers(0, 32_768, n, dtype=np.uint16) for n in lengths]


def packed(documents: list[np.ndarray]) -> np.ndarray:
    packer = BestFitPacker(ROW_LEN, mode="crop", buffer_docs=BUFFER_DOCS)
    source = enumerate(documents)
    rows = np.empty((NUM_ROWS, ROW_LEN), dtype=np.int64)
    for row in rows:
        packer.fill(row, source.__next__)
    return rows


@contextmanager
def programs():
    documents = web_documents()
    calls = {
        "redline": lambda: packed(documents),
        "literal": lambda: literal_rows(iter(documents), ROW_LEN, NUM_ROWS, mode="crop", buffer_docs=BUFFER_DOCS),
    }
    yield HostPrograms(calls, "literal", np.array_equal)


ITEMS = [host_item("packing", f"{NUM_ROWS} rows of {ROW_LEN}", "literal", (), programs)]


def test_packing(record):
    row = record()
    if "speedup" in row:
        assert row["speedup"] >= MIN_SPEEDUP, row
