"""kernels/gemm.py: products against float64, what they add to, the order of tiles and its model, the choice of tiles,
mutations."""

import itertools
import math
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from bench.law import TINY, Failed, error, poisoned_allocations
from kernels import gemm as module
from kernels.fp8 import E4M3, E5M2
from kernels.gemm import Tiling, best_group, gemm, modelled_reads, useful_share
from kernels.lm_head_loss import chunk_rows
from kernels.sizes import SIZES
from tests.harness import DEVICE, mutant, randn
from tests.mutations import mutations
from tests.races import programs_in

BF16, FP32 = torch.bfloat16, torch.float32


# products -----------------------------------------------------------------


def check(M, N, K, dtype=BF16, out_dtype=FP32, transposed=False, accumulate=False, scaled=False, gap=0, of=module):
    """out = or += alpha a b^T, rounded once; what lies between and behind the rows of out stays."""
    a, b, before = randn(0, FP32)(M, K), randn(1, FP32)(N, K), randn(2, out_dtype)(M, N)
    a, b = a.to(dtype), b.to(dtype)
    alphas = (torch.tensor(0.37, device=DEVICE), torch.tensor(1.9, device=DEVICE)) if scaled else None
    want = a.double() @ b.double().T * (0.37 * 1.9 if scaled else 1.0) + (before.double() if accumulate else 0.0)
    given = [t.T.contiguous() if transposed else t for t in (a, b)]
    results = []
    for order in ("forward", "reversed"):
        room = torch.full((M + 1, N + 16 + gap), 77.0, dtype=out_dtype, device=DEVICE)
        out = room[:M, :N]
        out.copy_(before if accumulate else torch.full_like(before, torch.nan))
        with poisoned_allocations(), programs_in(order):
            of.gemm(*given, out, alphas, transposed=transposed, accumulate=accumulate)
        if not (room[M] == 77).all() or not (room[:, N:] == 77).all():
            raise Failed("wrote beside out")
        results.append(out.clone())
    if not torch.equal(*results):
        raise Failed("two runs differ")
    allowed = 1.02 * error(want.to(out_dtype), want) + 8 * TINY  # sums of products in fp32
    if not (off := error(results[0], want)) <= allowed:
        raise Failed(f"off by {off:.2e}; allowed {allowed:.2e}")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("M, N, K", [(5, 16, 16), (130, 272, 72), (300, 520, 40), (257, 16, 200)])
def test_agrees_with_float64(M, N, K, transposed, accumulate, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS_WITHOUT_GPU", 3)  # of more tiles
    M, K = (16 * math.ceil(n / 16) if transposed else n for n in (M, K))  # rows in memory are multiples of 16 bytes
    check(M, N, K, transposed=transposed, accumulate=accumulate, gap=8)
    check(M, N, K, FP32, transposed=transposed, accumulate=accumulate)
    if not accumulate:
        check(M, N, K, out_dtype=BF16, transposed=transposed)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_scaled_fp8(dtype, accumulate, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS_WITHOUT_GPU", 2)
    check(200, 272, 304, dtype, accumulate=accumulate, scaled=True)
    check(200, 272, 304, dtype, BF16 if not accumulate else FP32, accumulate=accumulate, scaled=True)


@pytest.mark.parametrize("name", ["128 x 256", "128 x 128"])
def test_both_tiles(name, monkeypatch):
    """The wide one where there are few SMs."""
    sms = 1 if name == "128 x 256" else 132
    monkeypatch.setattr(module, "PROGRAMS_WITHOUT_GPU", sms)
    config = module._config(200, 400, BF16, False, (9, 0), sms)
    assert f"{config['BLOCK_M']} x {config['BLOCK_N']}" == name and config["per_sm"] == (2 if sms > 1 else 1)
    for accumulate in (False, True):
        check(200, 400, 136, transposed=True, accumulate=accumulate)


def test_micro_steps_add_up():
    """As weight gradients do: two launches after each other."""
    out = torch.zeros(48, 64, device=DEVICE)
    pairs = [(randn(i, BF16)(80, 48), randn(9 + i, BF16)(80, 64)) for i in range(3)]
    for a, b in pairs:
        gemm(a, b, out, transposed=True, accumulate=True)
    want = sum(a.double().T @ b.double() for a, b in pairs)
    assert error(out, want) < 4 * TINY


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("rows", [0, 40])
def test_a_weights_gradient_is_stored_or_added(rows, add, dtype):
    a, b = randn(0, dtype)(rows, 24), randn(1, dtype)(rows, 16)
    before = randn(2, FP32)(24, 16)
    total = before.clone() if add else torch.full_like(before, torch.nan)
    module.add_product(a, b, total, add)
    want = a.double().T @ b.double() + (before.double() if add else 0.0)
    assert error(total, want) <= 8 * TINY if rows else torch.equal(total.double(), want)


@pytest.mark.skipif(DEVICE == "cuda", reason="of the interpreter")
def test_tritons_own_interpreter_adds_too():
    """Which knows no bulk reductions: as a user runs it, without what the tests mend."""
    code = (
        "import torch\n"
        "from kernels.gemm import gemm\n"
        "a, b, out = torch.ones(3, 16), torch.ones(3, 32), torch.ones(16, 32)\n"
        "gemm(a, b, out, transposed=True, accumulate=True)\n"
        "assert (out == 4).all()"
    )
    root = Path(__file__).resolve().parent.parent
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run([sys.executable, "-c", code], cwd=root, env=env, check=True)


def test_sums_begin_at_multiples_of_16_bytes():
    out = torch.zeros(16 * 16 + 1, device=DEVICE)[1:].view(16, 16)
    with pytest.raises(ValueError, match="begins at a multiple of 16 bytes"):
        gemm(out.clone(), out.clone(), out, transposed=True, accumulate=True)


def test_only_fp32_is_added_to():
    a = torch.ones(16, 16, dtype=BF16, device=DEVICE)
    with pytest.raises(ValueError, match="out is .*bfloat16.*; expected float32"):
        gemm(a, a, torch.ones(16, 16, dtype=BF16, device=DEVICE), accumulate=True)


# the order of tiles -------------------------------------------------------


def positions(tiling, group):
    """Rows and columns of all tiles in their order, as `tile_at` computes them."""
    tiles_m, tiles_n = tiling.tiles
    found = []
    for index in range(tiles_m * tiles_n):
        first = index // (group * tiles_n) * group
        rows, within = min(tiles_m - first, group), index % (group * tiles_n)
        found.append((first + within % rows, within // rows))
    return found


@pytest.mark.parametrize("tiles", [(1, 1), (1, 7), (7, 1), (5, 3), (8, 8)])
def test_each_tile_comes_once_in_its_order(tiles):
    tiling = Tiling(tiles[0] * 16 - 3, tiles[1] * 32 - 5, 64, (16, 32), 4, 2, 2)
    for group in range(1, tiles[0] + 1):
        order = positions(tiling, group)
        assert sorted(order) == list(itertools.product(range(tiles[0]), range(tiles[1])))
        assert order[: min(group, tiles[0])] == [(m, 0) for m in range(min(group, tiles[0]))]
        for begin, end in itertools.combinations(range(len(order) + 1), 2):
            rows, columns = ({tile[i] for tile in order[begin:end]} for i in (0, 1))
            assert tiling.panels(begin, end, group) == (rows, columns), (begin, end, group)
    assert positions(tiling, 1) == list(itertools.product(range(tiles[0]), range(tiles[1])))


def simulated_reads(tiling, group, l2, slices=8):
    """Reads of the operands, slice of K by slice, by programs in step, of an L2 cache that is that of a textbook."""
    cache, reads, order = OrderedDict(), 0, positions(tiling, group)

    def touch(key, size):
        missing = key not in cache
        cache[key] = size
        cache.move_to_end(key)
        while sum(cache.values()) > l2:
            cache.popitem(last=False)
        return size * missing

    width = tiling.K // slices * tiling.itemsize
    for begin in range(0, len(order), tiling.programs):
        wave = order[begin : begin + tiling.programs]
        for k in range(slices):
            for m, n in wave:
                reads += touch(("a", m, k), tiling.tile[0] * width) + touch(("b", n, k), tiling.tile[1] * width)
        for tile in wave:
            touch(("out", tile), tiling.tile[0] * tiling.tile[1] * tiling.out_itemsize)
    return reads


@pytest.mark.parametrize("tiles, programs", [((12, 9), 8), ((20, 4), 6), ((6, 16), 12)])
def test_the_model_agrees_with_a_simulated_cache(tiles, programs):
    """For every group and caches from a few panels to all of both operands. A panel that falls out of the cache while
    its wave runs is there or not in the model, and in part in a cache."""
    tiling = Tiling(tiles[0] * 16, tiles[1] * 32, 256, (16, 32), programs, 2, 2)
    whole = tiling.least_reads + tiles[0] * tiles[1] * 16 * 32 * 2
    ratios, chosen = [], []
    for l2 in (whole // 8, whole // 4, whole // 3, whole // 2, whole):
        found = {group: simulated_reads(tiling, group, l2) for group in range(1, tiles[0] + 1)}
        ratios += [modelled_reads(tiling, group, l2) / reads for group, reads in found.items()]
        tried = [2**i for i in range(10) if 2**i < tiles[0]] + [tiles[0]]
        chosen.append(found[best_group(tiling, l2)] / min(found[group] for group in tried))
    assert found[1] == tiling.least_reads == modelled_reads(tiling, 1, whole)
    close = sum(0.9 < ratio < 1.1 for ratio in ratios) / len(ratios)
    assert close > 0.8 and 0.5 < min(ratios) and max(ratios) < 2, (close, min(ratios), max(ratios))
    assert max(chosen) < 1.1, chosen


def launched():
    """Label -> (M, N, K, dtype, whether promoted, bytes of a result) of the products that these kernels make."""
    found = {}
    for label, s in SIZES.items():
        for name, bytes_per_logit in (("bf16", 2), ("fp8", 4)):
            rows = min(s.tokens, chunk_rows(s.tokens, s.V, s.C, bytes_per_logit))
            found[label, name, "dw"] = (s.V, s.C, rows, BF16 if name == "bf16" else E5M2, name == "fp8", 4)
        found[label, "fp8", "z"] = (rows, s.V, s.C, E4M3, False, 2)
        found[label, "fp8", "dx"] = (rows, s.C, s.V, E5M2, True, 2)
        found[label, "bf16", "relu2"] = (s.tokens, s.F, s.C, BF16, False, 2)  # forward, and dpre
        found[label, "bf16", "dup, ddown"] = (s.F, s.C, s.tokens, BF16, False, 4)
        found[label, "bf16", "attention"] = (s.C, s.C, s.tokens, BF16, False, 4)
    return found


def tiling_of(M, N, K, dtype, promoted, out_itemsize):
    config = module._config(M, N, dtype, promoted, (9, 0), 132)
    tile = config["BLOCK_M"], config["BLOCK_N"]
    programs = min(132 * config["per_sm"], math.ceil(M / tile[0]) * math.ceil(N / tile[1]))
    return Tiling(M, N, K, tile, programs, dtype.itemsize, out_itemsize)


# K is so long that the panels of one wave alone exceed the cache: every wave reads its own anew, in whatever order
LONG = {
    ("depth 24", "bf16", "dw"): 1.49, ("depth 24", "fp8", "dx"): 1.79, ("depth 24", "bf16", "dup, ddown"): 1.40,
    ("depth 26", "bf16", "dw"): 1.67, ("depth 26", "fp8", "dx"): 2.03, ("depth 26", "bf16", "dup, ddown"): 1.43,
}  # fmt: skip


@pytest.mark.parametrize("product", launched(), ids=str)
def test_operands_are_read_about_once(product):
    tiling = tiling_of(*launched()[product])
    ratio = modelled_reads(tiling, best_group(tiling)) / tiling.least_reads
    if product not in LONG:
        assert ratio <= 1.3
        # whose kernel takes one row of tiles after the other
        assert product[2] != "relu2" or best_group(tiling) == 1
        return
    assert ratio == pytest.approx(LONG[product], abs=0.01)
    # of the shapes that a wave may have, the one with the fewest bytes
    (tiles_m, tiles_n), (height, width) = tiling.tiles, tiling.tile
    shapes = [(m, math.ceil(tiling.programs / m)) for m in range(1, tiles_m + 1)]
    wave = min((m * height + n * width) * tiling.K * tiling.itemsize for m, n in shapes if n <= tiles_n)
    assert wave > module.L2_BYTES
    waves = tiles_m * tiles_n / tiling.programs
    assert ratio <= 1.15 * max(1.0, waves * wave / tiling.least_reads), waves * wave / tiling.least_reads


def test_one_row_after_the_other_would_read_the_head_many_times():
    """What the order is for: logits in fp8 at depth 24, whose rows of tiles are as many as the programs."""
    tiling = tiling_of(*launched()["depth 24", "fp8", "z"])
    assert modelled_reads(tiling, 1) > 20 * tiling.least_reads
    assert modelled_reads(tiling, best_group(tiling)) == tiling.least_reads


# the choice of tiles ------------------------------------------------------


def test_useful_share():
    assert useful_share(1536, 1536, (128, 256), 132) == pytest.approx(72 / 132)
    assert useful_share(6144, 1536, (128, 256), 132) == pytest.approx(288 / 396)
    assert useful_share(6144, 1536, (128, 128), 132) == pytest.approx(576 / 660)
    assert useful_share(64, 128, (128, 256), 1) == 0.25  # an edge
    assert useful_share(0, 128, (128, 256), 1) == 1.0


@pytest.mark.parametrize(
    "M, N, columns",
    [
        (1536, 1536, 256),  # 72 or 144 tiles: as much is idle either way
        (6144, 1536, 128),  # 5 rounds of 576 small tiles are shorter than 3 of 288
        (768, 768, 128),
        (768, 2304, 128),
        (32768, 1536, 256),
        (6656, 1664, 256),
    ],
)
def test_tiles_fill_the_multiprocessors(M, N, columns):
    config = module._config(M, N, BF16, False, (9, 0), 132)
    assert (config["BLOCK_M"], config["BLOCK_N"], config["per_sm"]) == (128, columns, 2 if columns == 128 else 1)


# mutations ----------------------------------------------------------------

MUTATIONS = {
    "what was there is lost": {"out_desc.atomic_add([m, n], acc)": "out_desc.store([m, n], acc)"},
    "the sum is added twice": {
        "        out_desc.atomic_add([m, n], acc)": "        out_desc.atomic_add([m, n], acc)\n"
        "        out_desc.atomic_add([m, n], acc)"
    },
    "one scale": {"tl.load(alpha_ptr) * tl.load(other_alpha_ptr)": "tl.load(alpha_ptr)"},
    "quarters are swapped": {"_finish(second, m, n + PART,": "_finish(second, m, n + 2 * PART,"},
    "the last group is as large as the others": {"rows = tl.minimum(tiles_m - first, group)": "rows = group"},
    "groups are not counted": {"first = index // (group * tiles_n) * group": "first = index // (group * tiles_n)"},
    "columns of transposed operands": {"b_desc.load([k, n]), acc": "b_desc.load([k, 0]), acc"},
    "tiles beyond the programs are left out": {"tiles_m * tiles_n, tl.num_programs(0)": "tl.num_programs(0), 1"},
}
CLASSES = ["what was there is lost", "quarters are swapped", "the last group is as large as the others"]


def stress(of, monkeypatch):
    """Five rows of tiles in groups of two, and small and large tiles."""
    monkeypatch.setattr(of, "best_group", lambda tiling: min(2, tiling.tiles[0]))
    for programs in (2, 132):
        monkeypatch.setattr(of, "PROGRAMS_WITHOUT_GPU", programs)
        check(600, 528, 24, accumulate=True, of=of)
        check(600, 528, 24, transposed=True, scaled=True, of=of)


@pytest.mark.skipif(DEVICE == "cuda", reason="a broken kernel may end the CUDA context of the other tests")
@pytest.mark.parametrize("name", mutations(MUTATIONS, always=CLASSES))
def test_a_broken_kernel_is_noticed(name, tmp_path, monkeypatch):
    with pytest.raises(Failed):
        stress(mutant(module, MUTATIONS[name], tmp_path), monkeypatch)


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
def test_a_copy_that_is_not_broken_passes(tmp_path, monkeypatch):
    stress(mutant(module, {}, tmp_path), monkeypatch)
