"""The model of compiled kernels: each of its bounds where that binds, and what it says of known kernels."""

import math

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from bench import kernel_model as model
from bench.kernel_model import LIBRARY, predict, tiles, traffic
from bench.projection.machine import HBM, SMS
from kernels.gemm import Tiling, modelled_reads


def product(M=8192, N=8192, K=8192, tile=(128, 256), step=64, itemsize=2, **changes):
    """A persistent product, as bench/aot.py finds it."""
    count = math.ceil(M / tile[0]) * math.ceil(N / tile[1])
    per_sm = changes.pop("per_sm", 1)
    arguments = {"M": M, "N": N, "K": K, "BLOCK_M": tile[0], "BLOCK_N": tile[1], "BLOCK_K": step}
    return {
        "kernel": "_gemm_kernel", "arguments": arguments | changes.pop("arguments", {}), "itemsize": itemsize,
        "num_warps": 8, "loop": 80, "epilogue": 0, "flat": True, "length": 500, "programs": min(per_sm * SMS, count),
        "bytes": itemsize * (M + N) * K + 2 * M * N,
    } | changes  # fmt: skip


def tflops(launch):
    a = launch["arguments"]
    return 2e-6 * a["M"] * a["N"] * a["K"] / predict(launch).us


def passes(nbytes, **changes):
    return {
        "kernel": "_k", "arguments": {}, "itemsize": 2, "num_warps": 4, "loop": 0, "length": 100, "programs": 10_000,
        "bytes": nbytes,
    } | changes  # fmt: skip


def test_large_products_are_bound_by_the_l2_cache():
    """Triton's matrix product reaches about 600 TFLOP/s with 128 x 256 tiles on an H100; square tiles ask for a third
    more bytes each."""
    wide, square = product(), product(tile=(128, 128))
    assert predict(wide).bound == predict(square).bound == "L2"
    assert 550 < tflops(wide) < 620 and tflops(square) == pytest.approx(tflops(wide) * 0.75, rel=0.03)


def test_tensor_cores_and_issue_bind_where_they_are_slower(monkeypatch):
    monkeypatch.setattr(model, "L2", 1e9)
    assert predict(product()).bound == "tensor cores"
    peak = 4096 * SMS * model.CLOCK / 1e12
    waves = 2048 / (SMS * math.ceil(2048 / SMS))
    assert tflops(product()) == pytest.approx(peak * waves, rel=1e-6)
    assert tflops(product(itemsize=1)) == pytest.approx(2 * peak * waves, rel=1e-6)
    slow = product(loop=1000)
    assert predict(slow).bound == "issue" and predict(slow).us == pytest.approx(predict(product()).us * 2000 / 1024)


def test_waves_are_whole():
    one, more = product(M=128 * SMS, N=256), product(M=128 * (SMS + 1), N=256)
    assert (tiles(one).waves, tiles(more).waves, tiles(more).tiles) == (1, 2, SMS + 1)
    assert predict(more).us == pytest.approx(2 * predict(one).us)


def test_an_epilogue_costs_its_instructions_and_a_pipeline_that_empties_its_filling():
    plain = product(K=1536)
    longer = product(K=1536, epilogue=500)
    emptied = product(K=1536, epilogue=500, flat=False)
    waves = tiles(plain).waves
    cycles = [1e-6 * predict(p).us * model.CLOCK / waves for p in (plain, longer, emptied)]
    # flat: what an epilogue has is not in the steps
    assert cycles[1] - cycles[0] == pytest.approx(500 * 8 / 4)
    assert cycles[2] - cycles[1] == pytest.approx(model.FILL)


def test_two_programs_hide_each_others_epilogue():
    alone = product(tile=(128, 128), K=1536, epilogue=600, flat=False)
    two = product(tile=(128, 128), K=1536, epilogue=600, flat=False, per_sm=2)
    assert predict(two).us < predict(alone).us
    no_epilogue = product(tile=(128, 128), K=1536, per_sm=2)
    assert predict(two).us == pytest.approx(predict(no_epilogue).us)
    huge = product(tile=(128, 128), K=1536, epilogue=100_000, flat=False, per_sm=2)
    assert predict(huge).us > 2 * predict(two).us


def test_symmetric_products_have_half_of_the_tiles():
    polar = {"M": 1536, "N": 1536, "K": 96, "L": 1536, "SYMMETRIC": True}
    launch = product(1536, 1536, 1536, (128, 128), arguments=polar, programs=2 * SMS)
    assert tiles(launch).tiles == 96 * 78 and tiles(launch).waves == math.ceil(96 * 78 / (2 * SMS))
    whole = product(1536, 1536, 1536, (128, 128), arguments=polar | {"SYMMETRIC": False}, programs=2 * SMS)
    assert predict(whole).us / predict(launch).us == pytest.approx(144 / 78, rel=0.02)


def test_bytes_of_both_levels():
    launch = product(M=4608, N=32768, K=1536, itemsize=1, arguments={"group": 36})
    cut = tiles(launch)
    assert cut.l2_bytes == cut.tiles * (128 + 256) * 1536
    assert cut.hbm_bytes == modelled_reads(Tiling(4608, 32768, 1536, (128, 256), SMS, 1, 2), 36)
    assert tiles(product()).hbm_bytes is None and tiles(passes(1)) is None


def test_memory_binds_a_product_of_short_sums():
    launch = product(K=64)
    assert predict(launch).bound == "memory"
    assert predict(launch).us == pytest.approx(1e6 * launch["bytes"] / (model.MEMORY * HBM["H100"]))


def test_passes_take_the_longer_of_memory_and_issue():
    assert predict(passes(10**9)) == (pytest.approx(1e6 * 1e9 / (0.92 * 3.35e12)), "memory")
    busy = predict(passes(10**6, length=10_000))
    assert busy == (pytest.approx(1e6 * 10_000 * 4 * 10_000 / (4 * 0.8 * SMS * model.CLOCK)), "issue")
    # the loop over a row of 32,768 columns, 4096 at a time, is run eight times, of which its code stands for one
    row = passes(10**6, length=1000, loop=100, arguments={"columns": 32768, "BLOCK": 4096})
    assert predict(row).us == pytest.approx(predict(passes(10**6, length=1700)).us)
    steps = passes(10**6, length=1000, loop=100, arguments={"STEPS": 8})
    assert predict(steps).us == predict(row).us
    part = passes(10**6, length=1000, loop=100, arguments={"chunk": 250, "BLOCK_N": 32})
    assert predict(part).us == predict(row).us


def test_products_of_a_library_take_the_projections_efficiency():
    assert predict({"kernel": LIBRARY, "product": (1, 32768, 1536, 6144, 2)}).us == pytest.approx(833, rel=0.01)
    half = predict({"kernel": LIBRARY, "product": (1, 32768, 1536, 6144, 1)}).us
    assert 400 < half < 600


def test_a_pass_of_a_library_is_one_over_memory():
    """Such as the largest size of a weight, which torch finds."""
    nbytes = 10**9
    found = predict({"kernel": LIBRARY, "bytes": nbytes})
    assert found == (pytest.approx(1e6 * nbytes / (0.77 * HBM["H100"])), "library")


def relu2(**changes):
    """The first product of fp8_mlp at depth 24, forward, as Triton 3.9 compiles it."""
    arguments = {"M": 32768, "columns_t": 32768, "group": 1, "N": 6144, "K": 1536, "BACKWARD": 0}
    arguments |= {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128, "SPLIT": 2, "FLATTEN": 0}
    launch = product(32768, 6144, 1536, (128, 256), 128, 1, flat=False, loop=85, epilogue=1304, bytes=462_422_032)
    return launch | {"kernel": "_fp8_relu2_kernel", "arguments": arguments} | changes


def test_a_product_in_fp8_whose_epilogue_quantises():
    """By hand: 6144 tiles in 47 waves, of 12 steps of (128 + 256) x 128 bytes out of L2, which take longer than tensor
    cores with twice the rate of bf16; then the epilogue alone, and the pipeline's filling."""
    cut = tiles(relu2())
    assert (cut.tiles, cut.waves, cut.l2_bytes) == (6144, 47, 6144 * 384 * 1536)
    step = max(2 * 128 * 256 * 128 / 8192, 384 * 128 / model.L2)
    cycles = 47 * (12 * step + 1304 * 8 / 4 + model.FILL)
    assert predict(relu2()) == (pytest.approx(1e6 * cycles / model.CLOCK), "L2")
    # without transposed copies the epilogue would be that of gemm; less than 10 % of the whole
    assert 0.9 < predict(relu2(epilogue=544)).us / predict(relu2()).us < 1


def test_sums_that_are_promoted_cost_their_instructions():
    """128 x 128 tiles of e5m2 and e4m3, whose step has 64 additions a thread more: they hide behind the L2 cache, and
    not behind more of them."""
    square = {"tile": (128, 128), "step": 128, "itemsize": 1, "flat": False, "epilogue": 379}
    promoted = predict(product(32768, 1536, 6144, **square, loop=146))
    assert promoted == predict(product(32768, 1536, 6144, **square, loop=82)) and promoted.bound == "L2"
    assert predict(product(32768, 1536, 6144, **square, loop=1000)).bound == "issue"
    # a third more of the L2 cache than 128 x 256
    wide = predict(product(32768, 1536, 6144, (128, 256), 128, 1, flat=False, loop=83, epilogue=544))
    assert promoted.us / wide.us == pytest.approx(4 / 3, rel=0.03)


def test_traffic_counts_what_changes_in_place_twice():
    a, b = torch.empty(10, dtype=torch.bfloat16), torch.empty(4)
    assert traffic({"x_ptr": a, "y_ptr": b, "n": 3}) == 36
    assert traffic({"x_ptr": a, "buf_ptr": b}) == 52


# attention --------------------------------------------------------------------


def attends(part="fwd", T=2048, window=2047, H=4, G=4, B=2, longest=0, tile=(128, 64), **changes):
    """A launch of an attention kernel, as bench/aot.py finds it."""
    of_keys = part == "dkv"
    blocks = math.ceil(T / tile[of_keys])
    arguments = {
        "T": T, "H": H, "G": G, "window": window, "D": 128, "BLOCK_D": 128, "BLOCK_M": tile[0], "BLOCK_N": tile[1],
        "DOCUMENTS": bool(longest),
    }  # fmt: skip
    return {
        "kernel": f"_attention_{part}_kernel", "arguments": arguments, "itemsize": 2, "num_warps": 8, "loop": 240,
        "epilogue": 140, "flat": True, "length": 600, "programs": blocks * B * (G if of_keys else H), "ctas": 1,
        "bytes": 4 * B * T * H * 128 * 2, "shape": (B, T, H, G, 128, window + 1, longest),
    } | changes  # fmt: skip


@pytest.mark.parametrize("window", [0, 5, 63, 64, 200, 399])
@pytest.mark.parametrize("longest", [100, 130, 400])
@pytest.mark.parametrize("of_keys", [False, True])
def test_visited_tiles_are_those_with_visible_pairs(window, longest, of_keys):
    """All between the first and the last one that hold a pair."""
    T, (queries, keys) = 400, (128, 64)
    q, k = torch.arange(T)[:, None], torch.arange(T)[None]
    seen = (k <= q) & (q - k <= window) & (k // longest == q // longest)
    steps = 0
    for begin in range(0, T, keys if of_keys else queries):
        part = seen[:, begin : begin + keys].any(1) if of_keys else seen[begin : begin + queries].any(0)
        width = queries if of_keys else keys
        first = begin // width if of_keys else int(part.nonzero().min()) // width
        # forward ends with the diagonal's last key, which a query of the block sees
        steps += int(part.nonzero().max()) // width - first + 1
    programs = math.ceil(T / (keys if of_keys else queries))
    assert model.visited(T, window, longest, (queries, keys), of_keys) == (programs, steps)


def test_attention_is_bound_by_products_and_by_what_lies_between_them():
    plain, window = predict(attends()), predict(attends(window=511))
    assert plain.bound == "tensor cores" and 0.2 < window.us / plain.us < 0.6
    # exponentials of a tile take 512 cycles whatever the issue; a second program an SM hides them
    slow, shared = predict(attends(loop=1100, epilogue=0)), predict(attends(ctas=2))
    assert slow.us > 1.5 * plain.us and slow.bound == "issue" and shared.us < 0.85 * plain.us
    # dq has three products of a tile's two forward, dk and dv four; groups share keys, not work
    assert predict(attends("dq")).us > plain.us
    grouped, alone = predict(attends("dkv", tile=(64, 128), G=1)), predict(attends("dkv", tile=(64, 128)))
    assert grouped.us == pytest.approx(alone.us, rel=0.1)
    # documents of an eighth cost about an eighth
    assert predict(attends(longest=256, bytes=0)).us < 0.3 * plain.us
    assert predict(attends(bytes=10**12)).bound == "memory"
    assert predict(attends(tile=(16, 64), ctas=4)).bound == "L2"  # few queries ask for all keys


@pytest.mark.parametrize("part, products, step", [("fwd", 2, 1024), ("dq", 3, 1536), ("dkv", 4, 2048)])
def test_each_attention_kernel_to_the_cycle(part, products, step):
    """One row, one head, one tile of queries and its tiles of keys (dkv: one tile of keys, and of queries)."""
    tile = (64, 128) if part == "dkv" else (128, 64)
    launch = attends(part, T=128, window=127, H=1, G=1, B=1, tile=tile, bytes=0)
    issue, steps = (240 - 140) * 8 / 4, 2
    softmax = max(issue, 128 * 64 / 16)
    assert 2 * 128 * 64 * 128 * products / 4096 == step
    besides = model.FILL + (600 - 240) * 8 / 4
    cycles = steps * (step + softmax) + besides
    assert predict(launch).us == pytest.approx(1e6 * cycles / SMS / model.CLOCK / 0.71)
    # two programs an SM: the longer of the two, and half of what is besides
    cycles = steps * max(step, softmax, (step + softmax) / 2, 2 * 64 * 128 * 2 / model.L2) + besides / 2
    assert predict(launch | {"ctas": 2}).us == pytest.approx(1e6 * cycles / SMS / model.CLOCK / 0.71)


def test_traffic_counts_what_descriptors_describe():
    t = torch.empty(64, 128, dtype=torch.bfloat16)
    described = TensorDescriptor.from_tensor(t, [64, 64])
    assert traffic({"x": t, "y_in": described, "n": 3}) == 2 * t.nbytes
