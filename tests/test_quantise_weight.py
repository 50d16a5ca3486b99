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
from tests.harness import DEVICE, OPCHECKS, Failed, guarded, mutant
from tests.mutations import Edit, mutations
from tests.races import programs_in

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


def check(w, op=quantise_weight):
    """Fail unless the kernel's copy is the reference's, bit for bit, twice; returns the kernel's."""
    fill_dynamo_tables()
    want, before = empty_fp8(w), w.clone()
    quantise_weight.backends["ref"](w, *want)
    for order in ("forward", "reversed"):
        with poisoned_allocations(), programs_in(order):
            got = empty_fp8(w)
            op.backends["triton"](w, *got)
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


@pytest.mark.parametrize("shape", [(112, 32), (101, 16), (70, 80)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("top", TOPS)
def test_both_layouts_are_bit_for_bit_what_float64_rounds_to(shape, dtype, top):
    w = weight(shape, dtype, top)
    copy = check(w)
    assert torch.equal(bits(copy.q).T, bits(copy.q_t))
    assert copy.scale == torch.tensor(top, device=DEVICE) / E4M3_MAX
    assert error(copy.q.float() * copy.scale, w.double()) < 0.03


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_with_gaps(dtype):
    w = guarded(weight((101, 80), dtype, 6.5625), "rows apart", 1)
    assert w.stride() == (112, 1)
    assert torch.equal(bits(check(w).q), bits(check(w.contiguous()).q))


def test_is_a_torch_op_and_compiles():
    w = weight((37, 32), torch.bfloat16, 5.90625)
    # opcheck's own comparison cannot compute in fp8
    torch.library.opcheck(module._quantise_weight, (w, *empty_fp8(w)), test_utils=OPCHECKS[1:-1])
    fill_dynamo_tables()
    torch.compiler.reset()
    want, got = check(w), empty_fp8(w)
    torch.compile(quantise_weight.backends["triton"], fullgraph=True, dynamic=False, backend="aot_eager")(w, *got)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(got, want))


def test_a_weight_of_zeros_is_quantised():
    copy = check(torch.zeros(16, 16, device=DEVICE))
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


def stress(op):
    for dtype in DTYPES:
        for top in TOPS:
            check(guarded(weight((101, 80), dtype, top), "rows apart", 1), op)


@pytest.mark.skipif(DEVICE == "cuda", reason="a broken kernel may end the CUDA context of the other tests")
@pytest.mark.parametrize("name", mutations(MUTATIONS, always=CLASSES))
def test_a_broken_kernel_is_noticed(name, tmp_path, monkeypatch):
    broken = broken_op(MUTATIONS[name], tmp_path, monkeypatch)
    with pytest.raises(Failed):
        stress(broken)


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
def test_a_copy_that_is_not_broken_passes(tmp_path, monkeypatch):
    stress(broken_op([], tmp_path, monkeypatch))
