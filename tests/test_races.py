"""Launches in Triton's interpreter fail for races, missing barriers, stray accesses and doubtful stores; right ones do
not."""

import pytest
import torch
import triton
import triton.language as tl

from tests import races
from tests.harness import DEVICE, Failed
from tests.races import programs_in

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="kernels run on the GPU here, not in the interpreter")


@triton.jit
def _reverse_kernel(x_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + BLOCK - 1 - offs, x)


@triton.jit
def _neighbours_kernel(x_ptr, y_ptr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Program i writes BLOCK numbers from i * STEP on."""
    offs = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs) + 1.0)


@triton.jit
def _shift_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """y = 2 x, moved by one block."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs + BLOCK) * 2.0)


@triton.jit
def _wide_kernel(x_ptr, bits_ptr):
    """Program 0 writes two bf16 numbers, program 1 reads both as one fp32 number."""
    if tl.program_id(0) == 0:
        tl.store(bits_ptr + tl.arange(0, 2), tl.full((2,), 1, tl.int16))
    else:
        tl.store(x_ptr + 1, tl.load(x_ptr))


@triton.jit
def _count_kernel(x_ptr, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_add(x_ptr, 1.0)
    else:
        tl.store(x_ptr, tl.load(x_ptr) + 1.0)


@triton.jit
def _descriptor_kernel(x_ptr, rows, COPY: tl.constexpr, BLOCK: tl.constexpr):
    """Each program copies BLOCK rows of 16 from `COPY` rows above, through a descriptor that may say too many rows."""
    desc = tl.make_tensor_descriptor(x_ptr, [rows, 16], [16, 1], [BLOCK, 16])
    row = tl.program_id(0) * BLOCK
    desc.store([row, 0], desc.load([row - COPY, 0]))


@triton.jit
def _scatter_kernel(x_ptr, at_ptr, values_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(x_ptr + tl.load(at_ptr + offs), tl.load(values_ptr + offs))


@triton.jit
def _program_ids_kernel(count_ptr, order_ptr):
    """order[i] = how many programs ran before program i."""
    n = tl.atomic_add(count_ptr, 1)
    tl.store(order_ptr + tl.program_id(0) * 3 + tl.program_id(1), n)


def test_what_threads_exchange_through_memory_needs_a_barrier():
    x = torch.arange(16.0)
    _reverse_kernel[(1,)](x, BARRIER=True, BLOCK=16)
    assert x.tolist() == list(range(15, -1, -1))
    with pytest.raises(Failed, match="no barrier .*load by program .* at test_races.py:.*; store by program"):
        _reverse_kernel[(1,)](x, BARRIER=False, BLOCK=16)


@triton.jit
def _double_kernel(x_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """x = 2 x, in place."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + offs, 2.0 * x)


def test_a_tile_that_several_warps_hold_needs_a_barrier_too():
    """One may read what another has written. A tile of as many elements as there are threads has one place for each."""
    x = torch.ones(128)
    for options in ({"BLOCK": 128, "num_warps": 4}, {"BLOCK": 16, "num_warps": 1}):
        _double_kernel[(1,)](x, BARRIER=False, **options)
    _double_kernel[(1,)](x, BARRIER=True, BLOCK=64, num_warps=4)
    assert x[:16].eq(8).all() and x[16:64].eq(4).all() and x[64:].eq(2).all()
    with pytest.raises(Failed, match="no barrier between accesses .*load by program .*; store by program"):
        _double_kernel[(1,)](x, BARRIER=False, BLOCK=64, num_warps=4)


@pytest.mark.parametrize("sparse", [races.SPARSE, 0])
def test_programs_keep_apart(sparse, monkeypatch):
    monkeypatch.setattr(races, "SPARSE", sparse)
    x, y = torch.zeros(64), torch.zeros(64)
    _neighbours_kernel[(4,)](x, y, STEP=16, BLOCK=16)
    assert y.all()
    with pytest.raises(Failed, match=r"race between programs for 12 bytes: store by program \(0,.*program \(1,"):
        _neighbours_kernel[(4,)](x, y, STEP=15, BLOCK=16)  # the same bits for one element
    _shift_kernel[(3,)](x, y, BLOCK=16)
    with pytest.raises(Failed, match="race between programs for 128 bytes"):
        _shift_kernel[(3,)](x, x, BLOCK=16)  # in place: others read what a program overwrites
    memory = torch.zeros(4)
    with pytest.raises(Failed, match="race between programs for 4 bytes"):
        _wide_kernel[(2,)](memory, memory.view(torch.int16))


def test_atomics_may_meet_each_other():
    x = torch.zeros(1)
    _count_kernel[(5,)](x, ATOMIC=True)
    assert x.item() == 5
    with pytest.raises(Failed, match="race between programs for 4 bytes"):
        _count_kernel[(5,)](x, ATOMIC=False, num_warps=1)


def test_accesses_stay_in_the_storages_of_arguments():
    memory = torch.zeros(80)
    x = memory[16:32]
    _neighbours_kernel[(1,)](x, memory, STEP=16, BLOCK=16)
    _shift_kernel[(1,)](x, torch.zeros(16), BLOCK=16)  # reads beyond x, but in its storage
    for wrong in ((memory, torch.zeros(63)), (torch.zeros(63), memory)):
        with pytest.raises(Failed, match="outside of the storage of a tensor: (load|store) by program .3, 0, 0"):
            _neighbours_kernel[(4,)](*wrong, STEP=16, BLOCK=16)


@pytest.mark.parametrize(
    "rows, programs, copy, says",
    [
        (32, 2, 0, None),
        (32, 2, 16, "race between programs for 1024 bytes"),
        (32, 1, -1, "no barrier between accesses"),
        (48, 3, 0, "outside of the storage"),
    ],
)
def test_descriptors_are_watched(rows, programs, copy, says):
    x = torch.zeros(32, 16)
    if says is None:
        return _descriptor_kernel[(programs,)](x, rows, COPY=copy, BLOCK=16)
    with pytest.raises(Failed, match=says):
        _descriptor_kernel[(programs,)](x, rows, COPY=copy, BLOCK=16)


def test_a_store_gives_an_element_one_value():
    at, x = torch.arange(16) % 8, torch.zeros(8)
    _scatter_kernel[(1,)](x, at, torch.ones(16), BLOCK=16)
    assert x.tolist() == [1.0] * 8
    with pytest.raises(Failed, match="two values for one element: store"):
        _scatter_kernel[(1,)](x, at, torch.arange(16.0), BLOCK=16)


def test_orders_of_programs():
    found = {}
    for order in ("forward", "reversed", "random"):
        ran = torch.zeros(6, dtype=torch.int32)
        with programs_in(order):
            _program_ids_kernel[(2, 3)](torch.zeros(1, dtype=torch.int32), ran)
        found[order] = ran.tolist()
    assert found["forward"] == [0, 1, 2, 3, 4, 5] and found["reversed"] == [5, 4, 3, 2, 1, 0]
    assert sorted(found["random"]) == found["forward"] and found["random"] not in (found["forward"], found["reversed"])
