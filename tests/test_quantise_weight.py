"""quantise_weight: both layouts bit for bit, banks, strides, weights of zeros, what is refused, mutations. And
`transpose` of kernels/fp8.py, the pass that it shares with others."""

from pathlib import Path

import pytest
import torch

import kernels.quantise_weight as module
from bench.law import error, fill_dynamo_tables, poisoned_allocations
from kernels import fp8
from kernels.fp8 import E4M3_MAX, ROW_MULTIPLE, empty_fp8
from kernels.quantise_weight import quantise_weight, quantise_weight_cost
from kernels.sizes import round_up
from tests.harness import DEVICE, OPCHECKS, ORDERS, Failed, guarded, in_order, mutant, mutant_cuda, noticed
from tests.mutations import Edit, mutations

DTYPES = (torch.bfloat16, torch.float32)
TOPS = (7.0, 6.5625, 5.90625)  # the largest weight: scales that are a power of two, where division is exact, or not


def weight(shape, dtype, top):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    w[-1, -1] = top
    ties = torch.arange(17, 32, 2) / 16  # halfway between two numbers of e4m3
    w[0, :16] = torch.cat((ties, 8 * ties)) * (top / E4M3_MAX)
    return w.to(DEVICE, dtype)


def bits(t):
    return t.reshape(t.shape or 1).contiguous().view(torch.uint8)


def check(w, op=quantise_weight, backend="triton"):
    """Fail unless the kernel's copy is the reference's, bit for bit, in several orders; returns the kernel's."""
    fill_dynamo_tables()
    want, before = empty_fp8(w), w.clone()
    quantise_weight.backends["ref"](w, *want)
    for order in ("lowest first", *ORDERS) if backend == "cuda" else ("forward", "reversed"):
        with poisoned_allocations(), in_order(backend, order):
            got = empty_fp8(w)
            op.backends[backend](w, *got)
        for name in ("q", "q_t", "scale"):
            if not torch.equal(bits(getattr(got, name)), bits(getattr(want, name))):
                raise Failed(f"{name} differs from the reference")
        if not torch.equal(w, before):
            raise Failed("w was written")
        V = w.size(-2)
        beyond = got.q_t.as_strided((*got.q_t.shape[:-1], round_up(V, ROW_MULTIPLE)), got.q_t.stride())[..., V:]
        if bits(beyond).any():
            raise Failed("rows of q_t do not end in zeros")
    return got


@pytest.mark.parametrize("shape", [(112, 32), (101, 16), (70, 80), (300, 144)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("top", TOPS)
def test_both_layouts_are_bit_for_bit_what_float64_rounds_to(shape, dtype, top, backend):
    w = weight(shape, dtype, top)
    copy = check(w, backend=backend)
    assert torch.equal(bits(copy.q).T, bits(copy.q_t))
    assert copy.scale == torch.tensor(top, device=DEVICE) / E4M3_MAX
    assert error(copy.q.float() * copy.scale, w.double()) < 0.03


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_with_gaps(dtype, backend):
    w = guarded(weight((301, 80), dtype, 6.5625), "rows apart", 1)
    assert w.stride() == (112, 1)
    assert torch.equal(bits(check(w, backend=backend).q), bits(check(w.contiguous(), backend=backend).q))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (129, 17), (20, 131)])
def test_sizes_that_no_vector_divides(shape, dtype, backend):
    check(weight(shape, dtype, 6.5625), backend=backend)
    check(guarded(weight(shape, dtype, 6.5625), "rows apart", 0)[:, 1:], backend=backend)


def bank(K, V, C, dtype):
    """Matrices whose largest numbers differ, and stand in different places."""
    w = torch.stack([weight((V, C), dtype, top) for top in (*TOPS, 0.3, 100.0)[:K]])
    for i in range(K):
        w[i] = w[i].roll(7 * i, 1)
    return w


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 48, 32), (2, 101, 16), (5, 37, 48), (3, 300, 131), (2, 1, 16)])
def test_a_bank_is_its_matrices(shape, dtype, backend):
    check_bank(bank(*shape, dtype), backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bank_with_gaps(dtype, backend):
    w = bank(3, 37, 48, dtype)
    check_bank(guarded(w, "rows apart", 1), backend=backend)
    for gap in (4, 37 * 48):
        check_bank(matrices_apart(w, gap), backend=backend)
    check_bank(guarded(w, "rows apart", 0)[:, :, 1:], backend=backend)  # from anywhere
    check_bank(w[:, :36, :47], backend=backend)


def matrices_apart(w, gap):
    """A copy of a bank with NaN between its matrices, which may begin anywhere; rows are gapless."""
    K, V, C = w.shape
    matrices = w.new_full((K, V * C + gap), torch.nan)[:, : V * C].view(K, V, C)
    assert matrices.stride() == (V * C + gap, C, 1)
    return matrices.copy_(w)


def check_bank(w, op=quantise_weight, backend="triton"):
    """The reference of the bank, of each matrix, and the kernel have the same bits."""
    got = check(w, op, backend)
    for i, matrix in enumerate(w):
        alone = empty_fp8(matrix)
        quantise_weight.backends["ref"](matrix, *alone)
        for name in ("q", "q_t", "scale"):
            if not torch.equal(bits(getattr(got, name)[i]), bits(getattr(alone, name))):
                raise Failed(f"{name} of matrix {i} is not that of the matrix alone")


@pytest.mark.parametrize("layout", ["apart", "side by side"])
def test_transposes_of_a_bank_lie_anywhere(layout, backend):
    """Nothing is written between them: padding only where there is room."""
    check_places(layout, backend)


def check_places(layout, backend, op=quantise_weight):
    K, V, C = 3, 37, 48
    w, want = bank(K, V, C, torch.bfloat16), empty_fp8(bank(K, V, C, torch.bfloat16))
    quantise_weight.backends["ref"](w, *want)
    for gap in (0, 64):
        width = 48 + gap
        memory = torch.full((K, C + 2, width) if layout == "apart" else (C, K + 1, width), 77, device=DEVICE)
        memory = memory.to(torch.uint8)
        places = memory[:, :C, :V] if layout == "apart" else memory[:, :K, :V].transpose(0, 1)
        assert op.check(w, want.q, places.view(fp8.E4M3), want.scale).shape == (K, V, C)
        op.backends[backend](w, empty_fp8(w).q, places.view(fp8.E4M3), want.scale.clone())
        if not torch.equal(places, want.q_t.view(torch.uint8)):
            raise Failed("q_t differs from the reference")
        places.fill_(77)
        room = memory[..., V:48]
        if not (room[:, :C] if layout == "apart" else room[:, :K]).eq(0).all():
            raise Failed("rows of q_t do not end in zeros")
        room.fill_(77)
        if not memory.eq(77).all():
            raise Failed("wrote beside q_t")


def test_padding_stops_where_another_matrix_begins():
    check_padding()


def check_padding(of=fp8):
    memory = torch.empty(10000, dtype=torch.uint8)
    for size, stride, columns in (
        ((3, 48, 37), (3072, 64, 1), 48),
        ((3, 48, 64), (3072, 64, 1), 64),
        ((2, 5, 20), (144, 24, 1), 20),  # rows are too near
        ((2, 5, 20), (5 * 32 - 12, 32, 1), 20),  # matrices are
        ((2, 5, 20), (5 * 32, 32, 1), 32),
        ((5, 5, 20), (32, 160, 1), 32),  # side by side
        ((5, 5, 20), (24, 160, 1), 20),  # and too near
        ((1, 20), (32, 1), 32),
    ):
        if of.padded_columns(memory.as_strided(size, stride)) != columns:
            raise Failed(f"{size} with strides {stride} has not {columns} columns")
    if of.padded_columns(memory[-52:].as_strided((2, 20), (32, 1))) != 20:
        raise Failed("beyond the memory's end")


@pytest.mark.parametrize("what", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_matrix(what, backend):
    check_matrices_apart(what, backend)


def check_matrices_apart(what, backend, op=quantise_weight):
    w = bank(3, 37, 48, torch.bfloat16)
    clean, got = empty_fp8(w), empty_fp8(w)
    op.backends[backend](w, *clean)
    w[1, 30, 20] = what
    op.backends[backend](w, *got)
    for i in (0, 2):
        if not all(torch.equal(bits(a[i]), bits(b[i])) for a, b in zip(clean, got)):
            raise Failed(f"{what} is in matrix {i} too")
    if got.scale[1].isfinite():
        raise Failed(f"{what} is lost")
    # infinity alone is NaN, as in a matrix of its own
    assert got.q[1].float().isnan().sum() == (w[1].numel() if what != what else 1)


def test_more_matrices_than_blocks_of_the_first_pass(backend):
    w = torch.randn(300, 2, 17, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    check_bank(w, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_lost(what, dtype, backend):
    check_not_finite(what, dtype, backend)


def check_not_finite(what, dtype, backend):
    """As in PyTorch. NaN is everywhere then, its sign aside; all but what is infinite is 0."""
    w = weight((300, 48), dtype, 6.5625)
    w[130, 20] = what
    got, want = empty_fp8(w), empty_fp8(w)
    quantise_weight.backends["ref"](w, *want)
    quantise_weight.backends[backend](w, *got)
    for a, b in zip(got, want):
        if not torch.equal(a.float().nan_to_num(nan=7.0), b.float().nan_to_num(nan=7.0)):
            raise Failed(f"{what} is lost")


@pytest.mark.parametrize("dtype", [fp8.E4M3, fp8.E5M2], ids=str)
@pytest.mark.parametrize("R, C", [(33, 112), (128, 128), (300, 131)])
def test_fp8_numbers_are_transposed(R, C, dtype, backend):
    """As gradients of logits are; all 256 of them."""
    numbers = torch.arange(R * C, device=DEVICE).remainder(256).to(torch.uint8).view(R, C).view(dtype)
    x = fp8.aligned_empty(numbers, R, C, dtype)
    x.view(torch.uint8).copy_(numbers.view(torch.uint8))
    for order in ("lowest first", *ORDERS):
        x_t = fp8.aligned_empty(x, C, R, dtype)
        with in_order(backend, order):
            fp8.transpose(x, None, x_t, None, backend == "cuda")
        assert torch.equal(x_t.view(torch.uint8), x.view(torch.uint8).T)


@pytest.mark.parametrize("to", [fp8.E4M3, fp8.E5M2], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_given_scale_saturates(dtype, to, backend):
    """Either type at its own limit, as activations and gradients are quantised; ragged columns end in zeros."""
    check_given_scales(dtype, to, backend)


def check_given_scales(dtype, to, backend, of=fp8):
    w = weight((37, 48), dtype, 6.5625)
    w[3, :5] = torch.tensor((0.0, -5.0, torch.nan, torch.inf, -torch.inf))
    for scale in (1e-5, 1e-3, 0.3, 6.5625 / torch.finfo(to).max):
        scale, q = torch.tensor(scale, device=DEVICE), w.new_empty(w.shape, dtype=to)
        q_t = w.new_full((48, 48), torch.nan, dtype=to)
        of.transpose(w, q, q_t, scale, backend == "cuda")
        want = fp8.quantised(w, scale, to)
        nan = want.float().isnan()
        for got in (q, q_t[:, :37].T):
            if not torch.equal(bits(got)[~nan], bits(want)[~nan]) or not got.float()[nan].isnan().all():
                raise Failed(f"{to} with {scale} differs from the reference")
        if bits(q_t[:, 37:]).any():
            raise Failed("rows of q_t do not end in zeros")
        assert want.float().nan_to_num().abs().max() <= torch.finfo(to).max


@pytest.mark.parametrize("to", [fp8.E4M3, fp8.E5M2], ids=str)
def test_scales_far_from_1_divide_alike(to, backend):
    check_far_scales(to, backend)


def check_far_scales(to, backend, of=fp8):
    """Down to a denormal one and up to infinity, numbers around the fp8 ones and those halfway, zeros of both signs."""
    limit = torch.finfo(to).max
    steps = torch.arange(-3, 4, device=DEVICE) * 2.0**-23
    near = torch.arange(32, 64, device=DEVICE)[:, None] / 32 * (1 + steps)
    powers = 2.0 ** torch.arange(-20, 18, 4, device=DEVICE)
    near = torch.cat((near.reshape(1, -1) * powers[:, None], -near.reshape(1, -1) * powers[:, None]))
    for scale in (1e-42, 2.0**-100, 2.0**-81, 1.7e-12, 3.3, 2.0**99, 1.3e31, 3e38, torch.inf):
        scale = torch.tensor(scale, device=DEVICE)
        # NaN, what an infinite scale makes of infinity, has no sign to compare
        x = (near * scale.double()).float() if scale.isfinite() else near.clone()
        x[:, :2] = torch.tensor((0.0, -0.0))
        x[0, 2:4] = torch.tensor((3.4e38, -3.4e38))
        if scale.isfinite():
            x[0, 4:6] = torch.tensor((torch.inf, -torch.inf))
        q, q_t = x.new_empty(x.shape, dtype=to), x.new_empty((x.size(1), 32), dtype=to)[:, : x.size(0)]
        of.transpose(x, q, q_t, scale, backend == "cuda")
        want = fp8.quantised(x, scale, to)
        if not torch.equal(bits(q), bits(want)) or not torch.equal(bits(q_t), bits(want.T)):
            raise Failed(f"{to} with {scale} differs from the reference")
        assert want.float().abs().max() == (limit if scale.isfinite() else 0)


AMAX_CASES = {
    "the last row": (-3.0, (-1, 0)),
    "the last column": (3.0, (0, -1)),
    "the middle": (-1e30, (100, 40)),
    "small": (2.0**-120, None),
    "infinite": (torch.inf, (40, 5)),
    "-infinite": (-torch.inf, (40, 5)),
    "NaN": (torch.nan, (-1, 47)),
    "-NaN": (-torch.nan, (3, 47)),
}


@pytest.mark.parametrize("dtype, to", list(zip(DTYPES, (fp8.E4M3, fp8.E5M2))), ids=str)
@pytest.mark.parametrize("case", AMAX_CASES)
def test_amax_is_raised_on_the_way(case, dtype, to, backend):
    check_amax(case, dtype, to, backend)


def transposed(x, to, backend, amax, of):
    """q and q_t of x with a scale."""
    q, q_t = x.new_empty(x.shape, dtype=to), of.aligned_empty(x, x.size(1), x.size(0), to)
    of.transpose(x, q, q_t, torch.tensor(0.01, device=DEVICE), backend == "cuda", amax)
    return q, q_t


def check_amax(case, dtype, to, backend, of=fp8):
    """To the exact size, unless it is larger already, and no number beside it; what else is written stays as it is."""
    value, at = AMAX_CASES[case]
    for shape, layout in (((300, 48), "contiguous"), ((145, 301), "rows apart")):
        x = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 0.5).to(DEVICE, dtype)
        if at is None:
            x.mul_(value)
        else:
            x[at] = value
        x = guarded(x, layout, 0)
        largest = x.float().abs().max()
        alone = transposed(x, to, backend, None, of)
        for before, order in zip((0.0, 2.0**-126, 1e4, torch.inf), ("lowest first", *ORDERS)):
            numbers, want = torch.full((9,), -1.0, device=DEVICE), torch.full((9,), -1.0, device=DEVICE)
            numbers[5] = before
            want[5] = largest if largest.isnan() else largest.clamp_min(before)
            with in_order(backend, order):
                beside = transposed(x, to, backend, numbers[5], of)
            if not torch.equal(numbers.nan_to_num(nan=-7.0), want.nan_to_num(nan=-7.0)):
                raise Failed(f"amax is {numbers[5]}, not {want[5]}")
            if not all(torch.equal(bits(t), bits(u)) for t, u in zip(alone, beside)):
                raise Failed("amax changes what else is written")


def test_the_cuda_kernel_refuses_other_types(cuda):
    w = weight((37, 48), torch.bfloat16, 6.5625)
    q, q_t = torch.empty_like(w), w.new_empty(48, 48)
    with pytest.raises(ValueError, match="q is bfloat16; expected float8_e4m3fn or float8_e5m2"):
        fp8.transpose(w, q, q_t, torch.ones((), device=DEVICE), True)
    with pytest.raises(ValueError, match="expected that of q_t, float8_e5m2"):
        fp8.transpose(w, None, w.new_empty((48, 48), dtype=fp8.E5M2), None, True)
    with pytest.raises(ValueError, match="amax comes with q and scale"):
        fp8.transpose(w, None, q_t, None, True, amax=torch.zeros((), device=DEVICE))


@pytest.mark.parametrize("K", [None, 3])
def test_is_a_torch_op_and_compiles(K, backend):
    w = weight((37, 32), torch.bfloat16, 5.90625) if K is None else bank(K, 37, 32, torch.bfloat16)
    # opcheck's own comparison cannot compute in fp8
    torch.library.opcheck(module._quantise_weight, (w, *empty_fp8(w), backend == "cuda"), test_utils=OPCHECKS[1:-1])
    fill_dynamo_tables()
    torch.compiler.reset()
    want, got = check(w, backend=backend), empty_fp8(w)
    torch.compile(quantise_weight.backends[backend], fullgraph=True, dynamic=False, backend="aot_eager")(w, *got)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(got, want))


def test_a_weight_of_zeros_is_quantised(backend):
    copy = check(torch.zeros(16, 16, device=DEVICE), backend=backend)
    assert copy.scale > 0 and not copy.q.float().any()


@pytest.mark.parametrize("backend", quantise_weight.backends)
def test_bad_calls_are_refused(backend):
    w = torch.ones(24, 32, device=DEVICE)
    for args, says in (
        ((w, *empty_fp8(w.T)), r"q of the copy .* is \(32, 24\)"),
        ((w.T, *empty_fp8(w.T)), "the last stride 1"),
        ((w.half(), *empty_fp8(w)), "float16"),
        ((w, *empty_fp8(w)[:2], torch.ones((), dtype=torch.float64, device=DEVICE)), "scale of the copy .*float64"),
        (
            (w, empty_fp8(w).q, torch.empty(32, 24, dtype=empty_fp8(w).q.dtype, device=DEVICE), w.new_empty(())),
            "16 bytes",
        ),
        ((w[:0], *empty_fp8(w[:0])), r"w is \(0, 32\) .*not empty"),
        ((w.expand(2, 2, 24, 32), *empty_fp8(w)), r"w is \(2, 2, 24, 32\).*expected \(V, C\) or \(K, V, C\)"),
        ((w[None], *empty_fp8(w)), r"q of the copy .* is \(24, 32\)"),
        ((w[None], *empty_fp8(w[None])[:2], w.new_empty(())), r"scale of the copy .* is \(\).*expected .*\(1,\)"),
        (
            (w[None], empty_fp8(w[None]).q, empty_fp8(w).q.new_empty(769)[:-1].as_strided((1, 32, 24), (8, 24, 1)),
             w.new_empty(1)),
            "16 bytes",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            quantise_weight.checked(backend)(*args)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_grid_has_no_more_matrices(backend):
    w = torch.ones(65536, 1, 1, device=DEVICE)
    with pytest.raises(ValueError, match=f"quantise_weight: {backend} takes at most 65535 matrices, not 65536"):
        quantise_weight.checked(backend)(w, *empty_fp8(w))


def test_cost_and_shapes():
    assert quantise_weight_cost((1, 10, 20), torch.bfloat16) == (600, 1200)
    assert quantise_weight_cost((3, 10, 20), torch.float32) == (1800, 6000)
    w = torch.ones(24, 32, device=DEVICE)
    assert quantise_weight.check(w, *empty_fp8(w)).shape == (1, 24, 32)
    assert quantise_weight.check(w.expand(3, 24, 32), *empty_fp8(w.expand(3, 24, 32))).shape == (3, 24, 32)
    assert quantise_weight.cases["depth 24, MLP bank"] == (4, 6144, 1536)
    assert quantise_weight.cases["depth 24, qkv bank"] == (4, 4608, 1536)


def test_two_launches_whatever_the_number_of_matrices(monkeypatch):
    """One of them PyTorch's."""
    launches, reductions, norm = [], [], torch.linalg.vector_norm
    monkeypatch.setattr(fp8, "launch", lambda kernel, grid, *args, **options: launches.append(grid))
    monkeypatch.setattr(
        torch.linalg, "vector_norm", lambda *args, **options: reductions.append(1) or norm(*args, **options)
    )
    w = bank(5, 100, 130, torch.bfloat16)
    quantise_weight.backends["triton"](w, *empty_fp8(w))
    assert launches == [(2, 3, 5)] and reductions == [1]


@pytest.mark.parametrize("most, steps", [(1, 32), (4, 8), (24, 1)])
def test_programs_of_an_amax_take_several_tiles(most, steps, monkeypatch):
    grids, launch = [], fp8.launch
    monkeypatch.setattr(fp8, "MOST_ATOMICS", most)
    monkeypatch.setattr(
        fp8,
        "launch",
        lambda kernel, grid, *args, **options: grids.append(grid) or launch(kernel, grid, *args, **options),
    )
    x = weight((500, 180), torch.bfloat16, 6.5625)
    amax, scale = torch.zeros((), device=DEVICE), torch.tensor(0.01, device=DEVICE)
    copies = [(x.new_empty(x.shape, dtype=fp8.E4M3), fp8.aligned_empty(x, 180, 500, fp8.E4M3)) for _ in range(2)]
    fp8.transpose(x, *copies[0], scale)
    fp8.transpose(x, *copies[1], scale, amax=amax)
    assert grids == [(8, 3, 1), (-(-8 // steps), 3, 1)] and amax == 6.5625
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*copies))


KERNEL, QUOTIENT = "_transpose_kernel", "_quotient"
MUTATIONS = {
    "rows beyond the last are written": [Edit(r"offs_r < R\b", "offs_r < R + 1", within=KERNEL)],
    "columns end early": [Edit(r"\(offs_c < C\)\[None", "(offs_c < C - 1)[None", within=KERNEL)],
    "the copy is not transposed": [Edit(r"tl\.trans\(q\)", "q", within=KERNEL)],
    "the reciprocal is rounded first": [Edit(r"return tl\.fma.*", "return q", within=QUOTIENT)],
    "the quotient is approximate": [Edit(r"return tl\.fma.*", "return x / scale * (1 + 2.0**-22)", within=QUOTIENT)],
    "a zero has no sign": [
        Edit(r"multiple, x \* -1\.0\), reciprocal \* -1\.0", "multiple * -1.0, x), reciprocal", within=QUOTIENT)
    ],
    "small scales stay": [Edit(r"scale < 2\.0\*\*-80", "scale < 0", within=QUOTIENT)],
    "large scales stay": [Edit(r"scale > 2\.0\*\*100", "scale < 0", within=QUOTIENT)],
    "an infinite scale has a remainder": [Edit(r'scale == float\("inf"\)', "scale < 0", within=QUOTIENT)],
    "large numbers are not cut": [Edit(r"x = clamped\((x \* power), .*", r"x = \1", within=QUOTIENT)],
    "numbers are cut to the limit's multiple": [Edit(r"limit \* scale \*", "0.9 * limit * scale *", within=QUOTIENT)],
    "w has the stride of q": [Edit(r"\* stride_x\b", "* stride_q", within=KERNEL)],
    "all matrices have the first one's scale": [Edit(r"scale_ptr \+ matrix", "scale_ptr", within=KERNEL)],
    "all matrices have one scale": [Edit(r", dim=\(-2, -1\)", "", within="matrix_scales")],
    "the first matrix alone is read": [Edit(r"x_ptr \+ matrix \* matrix_x", "x_ptr", within=KERNEL)],
    "q of the first matrix alone is written": [Edit(r"q_ptr \+ matrix \* matrix_q", "q_ptr", within=KERNEL)],
    "matrices of q_t have no gaps": [Edit(r"matrix \* matrix_t", "matrix * C * stride_t", within=KERNEL)],
    "the second matrix is not written": [
        Edit(r"\(triton\.cdiv\(down, steps\), across, n\)", "(triton.cdiv(down, steps), across, 1)", within="transpose")
    ],
    "padding is written over the next matrix": [Edit(r"if stride < room:", "if stride < 0:", within="padded_columns")],
    "a step's rows are those of the first": [Edit(r"\* STEPS \+ step\)", "* STEPS)", within=KERNEL)],
    "rows of q_t have no gaps": [Edit(r"\* stride_t\b", "* R", within=KERNEL)],
    "rows of q_t do not end in zeros": [Edit(r"offs_r < columns_t", "offs_r < R", within=KERNEL)],
    "programs overlap": [Edit(r"(program_id\(1\)\S+) \* COLUMNS", r"\1 * (COLUMNS - 16)", within=KERNEL)],
    "the scale is that of the first rows": [Edit(r"norm\(t,", "norm(t[:16],", within="amax_scale")],
    "amax has a sign": [Edit(r" & 0x7FFFFFFF", "", within=KERNEL)],
    "amax loses NaN": [
        Edit(
            r"tl\.max\((.*) & 0x7FFFFFFF\)",
            r"tl.max(tl.where(q.to(tl.float32) == q.to(tl.float32), \1 & 0x7FFFFFFF, 0))",
            within=KERNEL,
        )
    ],
    "amax is that of q": [
        Edit(r"( +if HAS_AMAX:\n(?: {12}.*\n)+)( +if QUANTISE:\n(?: {12}.*\n)+)", r"\2\1", within=KERNEL)
    ],
    "amax is that of the last program": [Edit(r"tl\.atomic_max\((.*), sem=.*", r"tl.store(\1)", within=KERNEL)],
    "amax is lowered": [Edit(r"tl\.atomic_max\(", "tl.atomic_xchg(", within=KERNEL)],
    "amax is that of the last step": [Edit(r"tl\.maximum\(largest, (.*)\)\n", r"\1\n", within=KERNEL)],
}
# one for each class of failure; the others run by `pytest -m mutations`
CLASSES = [
    "columns end early",
    "the reciprocal is rounded first",
    "an infinite scale has a remainder",
    "w has the stride of q",
    "programs overlap",
    "all matrices have the first one's scale",
    "the second matrix is not written",
    "amax has a sign",
    "amax is that of the last program",
]


def broken_op(edits, folder, monkeypatch):
    """The op with a broken kernels/fp8.py, and that file."""
    of = mutant(fp8, edits, folder)
    path = Path(of.__file__)
    monkeypatch.syspath_prepend(folder)
    return mutant(module, {"from kernels.fp8 import": f"from {path.stem} import"}, folder).quantise_weight, of


def stress(op, backend="triton", of=fp8):
    for dtype in DTYPES:
        for top in TOPS:
            check(guarded(weight((101, 80), dtype, top), "rows apart", 1), op, backend)
    check_given_scales(torch.bfloat16, fp8.E5M2, backend, of)
    check_far_scales(fp8.E4M3, backend, of)
    most, of.MOST_ATOMICS = of.MOST_ATOMICS, 4
    for case in AMAX_CASES:
        check_amax(case, torch.bfloat16, fp8.E5M2, backend, of)
    of.MOST_ATOMICS = most
    check_bank(bank(3, 37, 48, torch.bfloat16), op, backend)
    for layout in ("apart", "side by side"):
        check_places(layout, backend, op)
    check_matrices_apart(torch.nan, backend, op)
    check_padding(of)


@pytest.mark.skipif(DEVICE == "cuda", reason="a broken kernel may end the CUDA context of the other tests")
@pytest.mark.parametrize("name", mutations(MUTATIONS, always=CLASSES))
def test_a_broken_kernel_is_noticed(name, tmp_path, monkeypatch):
    op, of = broken_op(MUTATIONS[name], tmp_path, monkeypatch)
    with pytest.raises(Failed):
        stress(op, of=of)


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
def test_a_copy_that_is_not_broken_passes(tmp_path, monkeypatch):
    op, of = broken_op([], tmp_path, monkeypatch)
    stress(op, of=of)


# csrc/quantise_weight.cu

CUDA_MUTATIONS = {
    "no barrier before the transpose": {"__syncthreads();  // without it": "//"},
    "the swizzle is that of reads alone": {"(chunk ^ tile_row / UNIT)": "chunk"},
    "rows beyond the last are written": {"if (row < p.R)": "if (row <= p.R)"},
    "columns beyond the last are written": {"bytes, p.C - column": "bytes, UNIT"},
    "rows of q_t beyond the last are written": {"if (row >= p.C) continue;": "if (row > p.C) continue;"},
    "rows of q_t do not end in zeros": {"bytes, p.columns_t - column": "bytes, p.R - column"},
    "the copy is not transposed": {"columns[j][i] = out[j]": "columns[j][i] = in[j]"},
    "two columns are exchanged": {"column[2] = __byte_perm(c, d, 0x5410)": "column[2] = __byte_perm(c, d, 0x7632)"},
    "the reciprocal is rounded first": {"? __fmaf_rn(__fmaf_rn(q, multiple, -x), -reciprocal, q) : q": "? q : q"},
    "a zero has no sign": {"__fmaf_rn(__fmaf_rn(q, multiple, -x), -r": "__fmaf_rn(__fmaf_rn(-q, multiple, x), r"},
    "small scales stay": {"scale < 0x1p-80f": "scale < 0.0f"},
    "an infinite scale has a remainder": {"scale == INFINITE ? 0.0f : scale": "scale"},
    "an infinite quotient has a remainder": {"fabsf(q) < INFINITE ?": "q == q ?"},
    "w has the stride of q": {"row * p.stride_x": "row * p.stride_q"},
    "all matrices have the first one's scale": {"p.largest[matrix * p.parts + part]": "p.largest[part]"},
    "the first matrix alone is measured": {"blockIdx.z * p.matrix": "0"},
    "the first matrix alone is read": {"p.x + matrix * p.matrix_x": "p.x"},
    "q of the first matrix alone is written": {"p.q + matrix * p.matrix_q": "p.q"},
    "matrices of q_t have no gaps": {"matrix * p.matrix_t": "matrix * p.C * p.stride_t"},
    "the second matrix is not written": {"static_cast<unsigned>(p.n));": "1u);"},
    "one scale is written": {"p.scale_out[matrix] = scale": "p.scale_out[0] = scale"},
    "matrices begin at multiples of 16 bytes": {
        "by_16_bytes(at(p.x), p.matrix_x * SIZE,": "by_16_bytes(at(p.x),",
        "by_16_bytes(w, matrix_w * SIZE,": "by_16_bytes(w,",
    },
    "rows of q_t have no gaps": {"row * p.stride_t": "row * (p.R / 16 * 16)"},
    "blocks leave columns between them": {"blockIdx.y} * TILE": "blockIdx.y} * (TILE + 16)"},
    "the next unit is the last one again": {"read(i + 1)": "read(i)"},
    "the scale is that of the first rows": {"row += gridDim.y": "row += p.rows"},
    "the last block's part is left out": {"part < p.parts": "part < p.parts - 1"},
    "a vector's last number is left out": {
        "for (int j = 0; j < VEC; ++j) size": "for (int j = 0; j < VEC - 1; ++j) size"
    },
    "amax has a sign": {"fabsf(to_float(x[i].at[j]))": "to_float(x[i].at[j])"},
    "NaN is not the largest": {"return __float_as_uint(a) < __float_as_uint(b) ? b : a;": "return fmaxf(a, b);"},
    "NaN becomes the least scale": {"if (scale < p.tiny) scale = p.tiny;": "scale = fmaxf(scale, p.tiny);"},
    "zeros have no scale": {"if (scale < p.tiny) scale = p.tiny;": ""},
    "amax is that of the last block": {
        "atomicMax(reinterpret_cast<int*>(p.amax), __float_as_int(seen))": "*p.amax = seen"
    },
    "amax of a tensor has a sign": {"fabsf(to_float(x.at[j])));": "to_float(x.at[j]));"},
    "amax is that of one thread": {"seen = block_reduce<LargestSize>(seen, scratch);": ""},
    "amax is that of the first units": {"            if (p.amax) {": "            if (p.amax && i < UNITS - 1) {"},
    "gradients are rounded as weights": {"run(number, e5m2{})": "run(number, e4m3{})"},
}
CUDA_CLASSES = [
    "no barrier before the transpose",
    "all matrices have the first one's scale",
    "the second matrix is not written",
    "the swizzle is that of reads alone",
    "columns beyond the last are written",
    "the reciprocal is rounded first",
    "NaN is not the largest",
    "amax is that of the last block",
]


def stress_cuda():
    stress(quantise_weight, "cuda")
    check(guarded(-weight((301, 129), torch.float32, 6.5625), "rows apart", 1), backend="cuda")
    check(weight((301, 129), torch.bfloat16, 6.5625), backend="cuda")
    check(torch.zeros(16, 16), backend="cuda")
    check_bank(bank(3, 37, 17, torch.bfloat16), backend="cuda")
    check_bank(matrices_apart(bank(3, 37, 48, torch.bfloat16), 4), backend="cuda")
    for what in (torch.nan, torch.inf):
        check_not_finite(what, torch.bfloat16, "cuda")


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
@pytest.mark.parametrize("name", mutations(CUDA_MUTATIONS, always=CUDA_CLASSES))
def test_a_broken_cuda_kernel_is_noticed(name, tmp_path, monkeypatch, cuda):
    broken = mutant_cuda("quantise_weight.cu", CUDA_MUTATIONS[name], tmp_path)
    monkeypatch.setattr("kernels.extension.module", lambda device: broken)
    assert noticed(stress_cuda)


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
def test_cuda_kernels_that_are_not_broken_pass(cuda):
    stress_cuda()
