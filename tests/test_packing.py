"""Packing: the rows of the literal rule, nothing lost or counted wrong, and a buffer that can be rebuilt anywhere."""

import json
from itertools import count, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.packing_oracle import literal_rows
from core.data.packing import BestFitPacker

MODES = ["crop", "continue"]


def endless(lengths: list[int]):
    """(position, tokens) with those lengths over and over; every token is another number."""
    first = 0
    for position in count():
        n = lengths[position % len(lengths)]
        yield position, np.arange(first, first + n, dtype=np.uint32)
        first += n


def pack(packer: BestFitPacker, source, num_rows: int) -> np.ndarray:
    rows = np.full((num_rows, packer.row_len), -1, dtype=np.int64)
    for row in rows:
        packer.fill(row, source.__next__)
    return rows


def tokens_of(lengths: list[int], position: int) -> np.ndarray:
    return next(islice(endless(lengths), position, None))[1]


# few distinct short lengths give many ties; a row has 16 tokens at most, so 200 is very long
lengths_strategy = st.lists(st.integers(1, 6) | st.integers(1, 40) | st.sampled_from([1, 200]), min_size=1, max_size=60)
packing = {
    "lengths": lengths_strategy,
    "row_len": st.integers(1, 16),
    "buffer_docs": st.integers(1, 12),
    "mode": st.sampled_from(MODES),
}


@settings(max_examples=300)
@given(**packing)
def test_rows_are_those_of_the_literal_rule(lengths, row_len, buffer_docs, mode):
    packer = BestFitPacker(row_len, mode=mode, buffer_docs=buffer_docs)
    rows = pack(packer, endless(lengths), 40)
    documents = (tokens for _, tokens in endless(lengths))
    np.testing.assert_array_equal(rows, literal_rows(documents, row_len, 40, mode=mode, buffer_docs=buffer_docs))


@pytest.mark.parametrize("mode", MODES)
def test_rows_are_those_of_the_literal_rule_at_full_size(mode):
    lengths = (np.random.default_rng(1).lognormal(6, 1.2, 3000).astype(int) + 1).tolist()
    rows = pack(BestFitPacker(2049, mode=mode, buffer_docs=200), endless(lengths), 300)
    documents = (tokens for _, tokens in endless(lengths))
    np.testing.assert_array_equal(rows, literal_rows(documents, 2049, 300, mode=mode, buffer_docs=200))


def test_largest_fit_then_shortest_cropped():
    packer = BestFitPacker(10, mode="crop", buffer_docs=4)
    row = pack(packer, endless([4, 7, 12, 5, 9, 9, 9]), 1)[0]
    # 9 is not in the buffer yet: 7 fits best; of 4, 12, 5, 9 none fits in 3, so the 4 gives its first three
    assert row.tolist() == [*range(4, 11), 0, 1, 2]
    assert (packer.num_documents, packer.num_placed, packer.num_cropped) == (5, 10, 1)


def test_crop_ties_go_to_the_oldest():
    packer = BestFitPacker(6, mode="crop", buffer_docs=3)
    rows = pack(packer, endless([3]), 3)
    assert rows.reshape(-1).tolist() == list(range(18))
    packer = BestFitPacker(5, mode="crop", buffer_docs=3)
    assert pack(packer, endless([3]), 2).tolist() == [[0, 1, 2, 3, 4], [6, 7, 8, 9, 10]]


def test_continue_mixes_the_documents_in_the_buffer():
    """Eight documents of 50 rows each: in order of arrival, 50 rows in a row would come from one."""
    rows = pack(BestFitPacker(10, mode="continue", buffer_docs=400, seed=3), endless([500]), 400)
    document = rows[:, 0] // 500
    assert len(set(document[:50].tolist())) >= 7
    assert (np.diff(document) == 0).mean() < 0.3
    other = pack(BestFitPacker(10, mode="continue", buffer_docs=400, seed=4), endless([500]), 400)
    assert not np.array_equal(rows, other)


@settings(max_examples=200)
@given(**packing)
def test_every_token_is_placed_or_buffered_or_counted(lengths, row_len, buffer_docs, mode):
    packer = BestFitPacker(row_len, mode=mode, buffer_docs=buffer_docs)
    rows = pack(packer, endless(lengths), 30)
    taken = [tokens for _, tokens in islice(endless(lengths), packer.num_documents)]
    buffered = [np.arange(start, stop) + taken[p][0] for p, start, stop in packer.state()]
    seen = np.concatenate([rows.reshape(-1), *buffered])
    total = sum(tokens.size for tokens in taken)
    assert packer.num_placed == rows.size
    assert np.unique(seen).size == seen.size
    assert seen.size + packer.num_cropped == total
    if mode == "continue":
        assert packer.num_cropped == 0
        np.testing.assert_array_equal(np.sort(seen), np.arange(total))


@settings(max_examples=200)
@given(**packing, before=st.integers(0, 20))
def test_rebuilt_buffer_gives_the_same_rows(lengths, row_len, buffer_docs, mode, before):
    packer, source = BestFitPacker(row_len, mode=mode, buffer_docs=buffer_docs), endless(lengths)
    pack(packer, source, before)
    state = json.loads(json.dumps(packer.state()))
    snapshot = packer.snapshot()
    rebuilt = BestFitPacker(row_len, mode=mode, buffer_docs=buffer_docs)
    rebuilt.restore(state, lambda position: tokens_of(lengths, position), num_takes=packer.num_takes)
    assert rebuilt.state() == state
    rest = islice(endless(lengths), packer.num_documents, None)
    np.testing.assert_array_equal(pack(packer, source, 20), pack(rebuilt, rest, 20))
    assert rebuilt.state() == packer.state()
    assert [list(entry[:3]) for entry in snapshot] == state


def test_long_documents_do_not_pile_up_in_memory():
    packer = BestFitPacker(8, mode="crop", buffer_docs=5)
    pack(packer, endless([10_000]), 3)
    held = [entry[3] for entry in packer.snapshot()]
    assert all(tokens.size == 8 and tokens.base is None for tokens in held)
    assert packer.num_cropped == 3 * (10_000 - 8)


def test_bad_arguments():
    with pytest.raises(ValueError, match="'pad', expected 'continue' or 'crop'"):
        BestFitPacker(8, mode="pad", buffer_docs=5)
    with pytest.raises(ValueError, match="row_len is 0"):
        BestFitPacker(0, mode="crop", buffer_docs=5)
    with pytest.raises(ValueError, match="buffer_docs 0"):
        BestFitPacker(8, mode="crop", buffer_docs=0)
