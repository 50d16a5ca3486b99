"""Batches of the gpt2 track from text to tensors, on the loader's one thread: `pytest bench/bench_loader.py`.

An H100 trains depth 12 at about 520,000 tokens a second and depth 24 at 100,000 [bench/projection]: a rank must be fed
at MIN_TOKENS_PER_S, reading, tokenising and packing included. Text is the standard library's source, vocabulary 32,768.
"""

import tempfile
from contextlib import contextmanager
from pathlib import Path

from bench.suite import OURS, HostPrograms, host_item
from core.config import DOC_CHARS, STDLIB
from core.data.corpus import open_corpus
from core.data.loader import Loader
from core.data.tokenizer import get_tokenizer

SEQ_LEN, ROWS = 2048, 64  # of a step
MIN_TOKENS_PER_S = 450_000  # 300,000 and half as much again


@contextmanager
def programs():
    with tempfile.TemporaryDirectory() as folder:
        train, _ = open_corpus(STDLIB, seed=0, cache_dir=Path(folder))
        tokenizer = get_tokenizer(train, 32_768, cache_dir=Path(folder), doc_cap=DOC_CHARS)
        options = {"seq_len": SEQ_LEN, "rows_per_step": ROWS, "device_batch_size": ROWS, "num_streams": 8}
        with Loader(train, tokenizer, **options, buffer_docs=1000, mode="crop", prefetch_steps=1) as loader:
            loader.next_step()  # fills the buffers
            yield HostPrograms({OURS: lambda: loader.next_step()}, OURS)


ITEMS = [host_item("loader", f"{ROWS} rows of {SEQ_LEN}, crop", OURS, (), programs)]


def test_loader(record):
    row = record()
    if "us" in row:
        assert ROWS * SEQ_LEN / row["us"] * 1e6 >= MIN_TOKENS_PER_S, row
