"""Batches from disk to tensors, on the loader's one thread: `pytest bench/bench_loader.py`.

gpt2      An H100 trains depth 12 at about 520,000 tokens a second and depth 24 at 100,000 [bench/projection]: a rank
          must be fed at MIN_TOKENS_PER_S, reading, tokenising and packing included. Text is the standard library's
          source, vocabulary 32,768.
fineweb   A step of the race takes 32, 58 and 84 ms by stage on 8 H100s [modded-nanogpt, log of record 85]; its 8 rows,
          all of them in one process, must be there in a quarter of that. Shards are made up, and opened again and
          again.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bench.suite import OURS, HostPrograms, host_item
from core.config import DOC_CHARS, STDLIB
from core.data.corpus import open_corpus
from core.data.loader import Loader
from core.data.row_loader import RowLoader
from core.data.token_rows import ROWS_PER_STEP, Row, RowShape
from core.data.token_shards import TokenShards, open_token_shards, synthetic
from core.data.tokenizer import get_tokenizer

SEQ_LEN, ROWS = 2048, 64  # of a step
MIN_TOKENS_PER_S = 450_000  # 300,000 and half as much again
# of the race, with the microseconds of a step; SHARD_TOKENS are enough for the steps of any of them
STAGES = {RowShape(60, 16384, 896, 64): 32e3, RowShape(30, 32768, 2048, 96): 58e3, RowShape(20, 49152, 2048, 128): 84e3}
SHARD_TOKENS = 16_000_000


@contextmanager
def programs():
    with tempfile.TemporaryDirectory() as folder:
        train, _ = open_corpus(STDLIB, seed=0, cache_dir=Path(folder))
        tokenizer = get_tokenizer(train, 32_768, cache_dir=Path(folder), doc_cap=DOC_CHARS)
        options = {"seq_len": SEQ_LEN, "rows_per_step": ROWS, "device_batch_size": ROWS, "num_streams": 8}
        with Loader(train, tokenizer, **options, buffer_docs=1000, mode="crop", prefetch_steps=1) as loader:
            loader.next_step()  # fills the buffers
            yield HostPrograms({OURS: lambda: loader.next_step()}, OURS)


def steps_again(shards: TokenShards, stage: RowShape) -> Iterator[list[Row]]:
    while True:
        with RowLoader(shards, [stage], prefetch_steps=1) as loader:
            for _ in range(stage.steps):
                yield loader.next_step()


@contextmanager
def row_programs(stage: RowShape):
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"train_shards": 1, "tokens_per_shard": SHARD_TOKENS, "val_tokens": 100_000, "mean_tokens": 690}
        synthetic(Path(folder), **sizes, vocab_size=50256, seed=0)
        shards = open_token_shards(folder, tokens=SHARD_TOKENS, cache_dir=Path(folder), say=print)
        steps = steps_again(shards, stage)
        yield HostPrograms({OURS: lambda: next(steps)}, OURS)
        steps.close()


def row_item(stage: RowShape):
    case = f"{ROWS_PER_STEP} rows of {stage.row_tokens}, documents cut at {stage.doc_cap}"
    return host_item("rows", case, OURS, (), partial(row_programs, stage))


LIMITS_US = {row_item(stage): us / 4 for stage, us in STAGES.items()}
ITEMS = [host_item("loader", f"{ROWS} rows of {SEQ_LEN}, crop", OURS, (), programs), *LIMITS_US]


def test_loader(record, item):
    row = record()
    if "us" in row and item in LIMITS_US:
        assert row["us"] <= LIMITS_US[item], row
    elif "us" in row:
        assert ROWS * SEQ_LEN / row["us"] * 1e6 >= MIN_TOKENS_PER_S, row
