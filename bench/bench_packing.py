"""Best-fit packing against the same rule read literally, on one core: `pytest bench/bench_packing.py`.

Documents are pre-tokenised, with the lengths of web text: log-normal, median 400, mean 690 tokens. Rows of 2049, a buffer
of 1000 documents. What comes out must be identical, and at least MIN_SPEEDUP times faster.
"""

import time

import numpy as np
import pytest

from core.data.packing import BestFitPacker
from tests.packing_oracle import literal_rows

ROW_LEN = 2049
BUFFER_DOCS = 1000
MEDIAN, MEAN = 400, 690
NUM_DOCUMENTS = 12_000
NUM_ROWS = 2_000
MIN_SPEEDUP = 5.0


@pytest.fixture(scope="module")
def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(MEDIAN), np.sqrt(2 * np.log(MEAN / MEDIAN)), NUM_DOCUMENTS).astype(int) + 1
    return [rng.integers(0, 32_768, n, dtype=np.uint16) for n in lengths]


def pack(documents: list[np.ndarray], num_rows: int) -> np.ndarray:
    packer = BestFitPacker(ROW_LEN, mode="crop", buffer_docs=BUFFER_DOCS)
    source = enumerate(documents)
    rows = np.empty((num_rows, ROW_LEN), dtype=np.int64)
    for row in rows:
        packer.fill(row, source.__next__)
    return rows


def literal(documents: list[np.ndarray], num_rows: int) -> np.ndarray:
    return literal_rows(iter(documents), ROW_LEN, num_rows, mode="crop", buffer_docs=BUFFER_DOCS)


@pytest.mark.parametrize("packer", [pack, literal], ids=["buckets", "literal"])
def test_rows(benchmark, documents, packer):
    rows = benchmark.pedantic(packer, (documents, NUM_ROWS), rounds=3, warmup_rounds=1)
    benchmark.extra_info["tok_per_s"] = rows.size / benchmark.stats.stats.median
    assert rows.shape == (NUM_ROWS, ROW_LEN)


def test_speedup_over_literal(benchmark, documents):
    def interleaved() -> list[float]:
        ratios = []
        for _ in range(3):
            start = time.thread_time()
            fast = pack(documents, NUM_ROWS)
            middle = time.thread_time()
            slow = literal(documents, NUM_ROWS)
            ratios.append((time.thread_time() - middle) / (middle - start))
            np.testing.assert_array_equal(fast, slow)
        return ratios

    ratios = benchmark.pedantic(interleaved, rounds=1)
    benchmark.extra_info["speedup"] = float(np.median(ratios))
    assert np.median(ratios) >= MIN_SPEEDUP, ratios
