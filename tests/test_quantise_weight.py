"""quantise_weight: both layouts bit for bit, strides, weights of zeros, what is refused, mutations."""

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
        V, C = w.shape
        beyond = got.q_t.as_strided((C, round_up(V, ROW_MULTIPLE)), got.q_t.stride())[:, V:]
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


def check_given_scales(dtype, to, backend):
    w = weight((37, 48), dtype, 6.5625)
    w[3, :5] = torch.tensor((0.0, -5.0, torch.nan, torch.inf, -torch.inf))
    for scale in (1e-5, 1e-3, 0.3, 6.5625 / torch.finfo(to).max):
        scale, q = torch.tensor(scale, device=DEVICE), w.new_empty(w.shape, dtype=to)
        q_t = w.new_full((48, 48), torch.nan, dtype=to)
        fp8.transpose(w, q, q_t, scale, backend == "cuda")
        want = fp8.quantised(w, scale, to)
        nan = want.float().isnan()
        for got in (q, q_t[:, :37].T):
            if not torch.equal(bits(got)[~nan], bits(want)[~nan]) or not got.float()[nan].isnan().all():
                raise Failed(f"{to} with {scale} differs from the reference")
        if bits(q_t[:, 37:]).any():
            raise Failed("rows of q_t do not end in zeros")
        assert want.float().nan_to_num().abs().max() <= torch.finfo(to).max


def test_the_cuda_kernel_refuses_other_types(cuda):
    w = weight((37, 48), torch.bfloat16, 6.5625)
    q, q_t = torch.empty_like(w), w.new_empty(48, 48)
    with pytest.raises(ValueError, match="q is bfloat16; expected float8_e4m3fn or float8_e5m2"):
        fp8.transpose(w, q, q_t, torch.ones((), device=DEVICE), True)
    with pytest.raises(ValueError, match="expected that of q_t, float8_e5m2"):
        fp8.transpose(w, None, w.new_empty((48, 48), dtype=fp8.E5M2), None, True)


def test_is_a_torch_op_and_compiles(backend):
    w = weight((37, 32), torch.bfloat16, 5.90625)
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
    ):
        with pytest.raises(ValueError, match=says):
            quantise_weight.checked(backend)(*args)


def test_cost():
    assert quantise_weight_cost((10, 20), torch.bfloat16) == (600, 1200)


KERNEL = "_transpose_kernel"
MUTATIONS = {
    "rows beyond the last are written": [Edit(r"offs_r < R\b", "offs_r < R + 1", within=KERNEL)],
    "columns end early": [Edit(r"\(offs_c < C\)\[None", "(offs_c < C - 1)[None", within=KERNEL)],
    "the copy is not transposed": [Edit(r"tl\.trans\(q\)", "q", within=KERNEL)],
    "the reciprocal is rounded first": [
        Edit(
            r"tl\.div_rn\((q\.to\(tl\.float32\)), (tl\.load\(scale_ptr\))\)", r"\1 * tl.div_rn(1.0, \2)", within=KERNEL
        )
    ],
    "w has the stride of q": [Edit(r"\* stride_x\b", "* stride_q", within=KERNEL)],
    "rows of q_t have no gaps": [Edit(r"\* stride_t\b", "* R", within=KERNEL)],
    "rows of q_t do not end in zeros": [Edit(r"offs_r < columns_t", "offs_r < R", within=KERNEL)],
    "programs overlap": [Edit(r"(program_id\(1\)\S+) \* BLOCK", r"\1 * (BLOCK - 16)", within=KERNEL)],
    "the scale is that of the first rows": [Edit(r"norm\(t,", "norm(t[:16],", within="amax_scale")],
}
# one for each class of failure; the others run by `pytest -m mutations`
CLASSES = ["columns end early", "the reciprocal is rounded first", "w has the stride of q", "programs overlap"]


def broken_op(edits, folder, monkeypatch):
    path = Path(mutant(fp8, edits, folder).__file__)
    monkeypatch.syspath_prepend(folder)
    return mutant(module, {"from kernels.fp8 import": f"from {path.stem} import"}, folder).quantise_weight


def stress(op, backend="triton"):
    for dtype in DTYPES:
        for top in TOPS:
            check(guarded(weight((101, 80), dtype, top), "rows apart", 1), op, backend)


@pytest.mark.skipif(DEVICE == "cuda", reason="a broken kernel may end the CUDA context of the other tests")
@pytest.mark.parametrize("name", mutations(MUTATIONS, always=CLASSES))
def test_a_broken_kernel_is_noticed(name, tmp_path, monkeypatch):
    broken = broken_op(MUTATIONS[name], tmp_path, monkeypatch)
    with pytest.raises(Failed):
        stress(broken)


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
def test_a_copy_that_is_not_broken_passes(tmp_path, monkeypatch):
    stress(broken_op([], tmp_path, monkeypatch))


# csrc/quantise_weight.cu

CUDA_MUTATIONS = {
    "no barrier before the transpose": {"__syncthreads();  // without it": "//"},
    "the swizzle is that of reads alone": {"(chunk ^ tile_row / UNIT)": "chunk"},
    "rows beyond the last are written": {"if (row < p.R) store_bytes": "if (row <= p.R) store_bytes"},
    "columns beyond the last are written": {"bytes, p.C - column": "bytes, UNIT"},
    "rows of q_t beyond the last are written": {"if (row >= p.C) continue;": "if (row > p.C) continue;"},
    "rows of q_t do not end in zeros": {"bytes, p.columns_t - column": "bytes, p.R - column"},
    "the copy is not transposed": {"columns[j][i] = out[j]": "columns[j][i] = in[j]"},
    "two columns are exchanged": {"column[2] = __byte_perm(c, d, 0x5410)": "column[2] = __byte_perm(c, d, 0x7632)"},
    "the reciprocal is rounded first": {"__fdiv_rn(to_float(x.at[j]), scale)": "to_float(x.at[j]) * __frcp_rn(scale)"},
    "w has the stride of q": {"row * p.stride_x": "row * p.stride_q"},
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
    "gradients are rounded as weights": {"run(number, e5m2{})": "run(number, e4m3{})"},
}
CUDA_CLASSES = [
    "no barrier before the transpose",
    "the swizzle is that of reads alone",
    "columns beyond the last are written",
    "the reciprocal is rounded first",
    "NaN is not the largest",
]


def stress_cuda():
    stress(quantise_weight, "cuda")
    check(guarded(-weight((301, 129), torch.float32, 6.5625), "rows apart", 1), backend="cuda")
    check(weight((301, 129), torch.bfloat16, 6.5625), backend="cuda")
    check(torch.zeros(16, 16), backend="cuda")
    check_given_scales(torch.bfloat16, fp8.E5M2, "cuda")
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
