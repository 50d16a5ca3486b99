"""polar_express against float64: shapes, padding, scales, hard spectra, symmetry, and mutations."""

import pytest
import torch

import kernels.polar_express as module
from kernels import gemm
from kernels.polar_express import COEFFICIENTS, SAFETY, polar_express, polar_express_cost, polar_express_ref
from tests.harness import DEVICE, LAYOUTS, Failed, check_op, mutant, randn
from tests.mutations import Edit, mutations

DTYPES = (torch.bfloat16, torch.float32)
# small: one launch; the largest of them; larger ones, some of which are padded
SHAPES = (
    (2, 24, 40),
    (2, 40, 24),
    (3, 13, 29),
    (2, 29, 13),
    (2, 3, 12),
    (1, 1, 1),
    (2, 64, 64),
    (1, 72, 72),
    (1, 136, 200),
    (1, 200, 136),
    (1, 66, 30),
    (2, 13, 68),
)
NO_GRAD = ("x", "scale")
triton_polar = polar_express.backends["triton"]


def check(x, op=polar_express, **options):
    inputs = {"x": x} | {name: options.pop(name) for name in ("scale", "coefficients") if name in options}
    return check_op(op, inputs, no_grad=NO_GRAD, **options)["y"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(shape, dtype):
    check(randn(0, dtype)(*shape))


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(layout):
    check(randn(0, torch.bfloat16)(2, 24, 40), layout=layout)
    check(randn(0, torch.bfloat16)(2, 24, 72), layout=layout)


def test_torch_compile_and_opcheck():
    check(randn(0, torch.bfloat16)(2, 16, 24), compiled=True, opcheck=True)
    check(randn(0, torch.bfloat16)(2, 16, 72), compiled=True, opcheck=True)


@pytest.mark.parametrize("shape", [(3, 16, 40), (3, 40, 16), (3, 16, 72)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scale_stands_for_the_norm(shape, dtype):
    x = randn(0, dtype)(*shape)
    scale = torch.tensor([0.001, 0.01, 0.02], device=DEVICE)
    check(x, scale=scale)
    own = 1 / (SAFETY * torch.linalg.matrix_norm(x.float()) + 1e-6)
    assert torch.equal(triton_polar(x, own), triton_polar(x))
    assert torch.equal(triton_polar(x * 4, own / 4), triton_polar(x))
    gaps = torch.stack((scale, scale * 9), dim=1)[:, 0]
    assert not gaps.is_contiguous() and torch.equal(triton_polar(x, gaps), triton_polar(x, scale))
    assert torch.equal(triton_polar(x, scale[:1].expand(3)), triton_polar(x, scale[0].repeat(3)))


def test_safety():
    x = randn(0, torch.float32)(2, 16, 24)
    torch.testing.assert_close(triton_polar(x, safety=3.0), polar_express_ref(x, safety=3.0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(triton_polar(x, safety=3.0), triton_polar(x), atol=1e-3)


@pytest.mark.parametrize("shape", [(2, 24, 72), (2, 40, 24), (2, 3, 12)], ids=str)
def test_zero_stays_zero(shape):
    x = torch.zeros(shape, device=DEVICE)
    x[1] = 1.0
    y = triton_polar(x)
    assert not y[0].any() and y[1].any() and y.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 24, 40), (2, 40, 24), (2, 21, 21), (2, 40, 72)], ids=str)
def test_zero_padding_changes_nothing(shape, dtype):
    x = randn(0, dtype)(*shape)
    K, rows, cols = shape
    padded = x.new_zeros(K, rows + 16, cols + 16)
    padded[:, :rows, :cols] = x
    y = triton_polar(padded)
    assert not y[:, rows:].any() and not y[:, :, cols:].any()
    torch.testing.assert_close(
        y[:, :rows, :cols], triton_polar(x), rtol=0.05, atol=0.02 if dtype == DTYPES[0] else 1e-5
    )


def test_no_matrices_and_fewer_steps():
    assert triton_polar(torch.zeros(0, 8, 8, device=DEVICE)).shape == (0, 8, 8)
    for steps in (1, 2):
        check(randn(0, torch.float32)(2, 16, 24), coefficients=COEFFICIENTS[:steps])


SPECTRA = {
    "all equal": torch.ones(48),
    "down to 1e-6": torch.logspace(0, -6, 48),
    "rank 12 of 48": torch.cat((torch.ones(12), torch.zeros(36))),
    "two clusters": torch.cat((torch.ones(24), 1e-3 * torch.ones(24))),
    "one large": torch.cat((torch.ones(1), 1e-2 * torch.ones(47))),
}


def largest_value():
    """Of the composed polynomials over what a scaled matrix can have as singular value: [0, 1 / SAFETY]."""
    s = torch.linspace(0, 1 / SAFETY, 200_001, dtype=torch.float64)
    for a, b, c in COEFFICIENTS:
        s = a * s + b * s**3 + c * s**5
    return s.max().item()


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("name", SPECTRA)
def test_hard_spectra_in_bf16(name, tall):
    """Singular values stay within the polynomials' own range, and the error within twice that of PyTorch's bf16."""
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(2, 48, 48, dtype=torch.float64, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(2, 96, 48, dtype=torch.float64, generator=generator))
    x = (u * SPECTRA[name].double()) @ v.mT
    x = (x.mT if tall else x).contiguous().to(DEVICE, torch.bfloat16)
    y = check(x)
    values = torch.linalg.svdvals(y.double())
    assert values.max() <= 1.02 * largest_value()
    exact, torch_s = (torch.linalg.svdvals(polar_express_ref(t).double()) for t in (x.double(), x))
    assert (values - exact).abs().max() <= 2 * (torch_s - exact).abs().max()


def test_the_polynomials_are_the_published_ones():
    """Of singular values from 0.01 to 1, in float64, by exact arithmetic from the published table."""
    x = torch.tensor([[0.01, 0.1, 0.5, 1.0]], dtype=torch.float64).T.reshape(4, 1, 1)
    y = polar_express_ref(x, torch.ones(4, dtype=torch.float64))
    want = [1.027110178427, 1.059161137958, 0.910610875741, 0.859128963113]
    assert y.flatten().tolist() == pytest.approx(want, rel=1e-9)
    assert 1.1 < largest_value() < 1.2


@pytest.mark.parametrize("shape", [(1, 200, 264), (2, 264, 136)], ids=str)
def test_symmetric_products_are_symmetric_and_complete(shape):
    """More tiles than programs, on the diagonal, below it and mirrored."""
    x = randn(0, torch.bfloat16)(*shape)
    tall = shape[1] > shape[2]
    gram = module._gemm(x, x, left_t=tall, right_t=not tall, symmetric=True)
    assert torch.equal(gram, gram.mT)
    want = (x.mT @ x if tall else x @ x.mT).double()
    assert (gram.double() - want).norm() / want.norm() < 0.005


@pytest.mark.parametrize(
    "x, scale, says",
    [
        (torch.ones(4, 4), None, r"x is \(4, 4\)"),
        (torch.ones(1, 4, 4).half(), None, "float16"),
        (torch.ones(1, 0, 4), None, r"\(1, 0, 4\)"),
        (torch.ones(2, 4, 4), torch.ones(3), r"scale is \(3,\)"),
    ],
)
@pytest.mark.parametrize("backend", polar_express.backends)
def test_bad_calls_are_refused(backend, x, scale, says):
    with pytest.raises(ValueError, match=says):
        polar_express.checked(backend)(x, scale)


@pytest.mark.parametrize(
    "coefficients",
    [(), (1.0, 2.0, 3.0), ((1.0, 2.0),), (COEFFICIENTS[0], (1.0, 2.0, 3.0, 4.0)), ((1.0, 2.0, torch.nan),)],
)
@pytest.mark.parametrize("backend", polar_express.backends)
def test_coefficients_are_three_numbers_a_step(backend, coefficients):
    with pytest.raises(ValueError, match="coefficients are .*; expected .a, b, c., three finite numbers, for each"):
        polar_express.checked(backend)(torch.ones(1, 4, 4), coefficients=coefficients)


def test_the_kernel_refuses_float64():
    x = torch.ones(1, 4, 4).double()
    assert polar_express.checked("ref")(x).dtype == torch.float64
    with pytest.raises(ValueError, match="takes bfloat16 and float32, not float64"):
        polar_express.checked("triton")(x)


@pytest.mark.parametrize("shape", [(1, 520, 560), (1, 560, 520)], ids=str)
def test_the_tiles_of_large_matrices(shape):
    """Of two widths: symmetric products, and the last one of a step, which is finished in halves."""
    check(randn(0, torch.bfloat16)(*shape), coefficients=COEFFICIENTS[:1])


@pytest.mark.parametrize("case", [case for case in polar_express.cases if not case.endswith(("gates", "quickstart"))])
def test_the_matrices_of_a_model_fill_waves(case):
    """Of an H100: the share of its places for programs that have a tile, over all waves."""
    K, rows, cols = polar_express.cases[case]
    side = min(rows, cols)
    for M, N, symmetric in ((side, side, True), (rows, cols, False)):
        config = module._config(M, N, symmetric, torch.bfloat16, (9, 0))
        tiles = module.num_tiles(K, M, N, symmetric, config)
        places = config["per_sm"] * gemm.PROGRAMS_WITHOUT_GPU
        assert tiles / (places * -(-tiles // places)) >= 0.9, (M, N, symmetric, tiles, places)


def test_cost():
    assert polar_express_cost((3, 10, 40), torch.bfloat16)[0] == 5 * 3 * (10 * 10 * 40 * 3 + 1000)
    assert polar_express_cost((3, 40, 10), torch.bfloat16) == polar_express_cost((3, 10, 40), torch.bfloat16)


MUTATIONS = {
    "mirrored tiles are not stored": {"                if i != j:\n": "                if False:\n"},
    "mirrored tiles are not transposed": {"out.T.reshape(1": "out.reshape(1"},
    "the last tile of the triangle is left out": {
        "tiles_m * (tiles_m + 1) // 2 if SYM": "tiles_m * (tiles_m + 1) // 2 - 1 if SYM"
    },
    "the row of a triangle is off by one": {
        "i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)": "i = i + 1 * (t == 1)"
    },
    "b is dropped": {"        acc += beta * add_desc": "        acc += 0.0 * add_desc"},
    "c is dropped": {"    acc = acc * alpha": "    acc = acc * 1.0"},
    "the scale enters once": {"scale * scale if SCALE_POWER == 2 else scale": "scale"},
    "the scale is the first matrix's": {"tl.load(scale_ptr + k)": "tl.load(scale_ptr)"},
    "all matrices are the first": {"k = tile // tiles\n": "k = 0\n"},
    "the sum goes on in the next tile": {
        "        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)\n        for l": "        for l",
        "    for tile in tl.range(": "    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)\n"
        "    for tile in tl.range(",
    },
    "a small matrix keeps its scale": {"        scale = 1.0\n": ""},
    "a small tall matrix is multiplied from the left": {"y = tl.dot(x, poly,": "y = tl.dot(poly, x,"},
    "small matrices are the first": {"k = tl.program_id(0).to(tl.int64)\n    offs_r": "k = 0\n    offs_r"},
    "b of a small matrix is dropped": {"+ b * gram.to(tl.float32)": ""},
    "a small gram is not rounded": {"gram = (gram * scale * scale).to(x.dtype)": "gram = gram * scale"},
    "halves of a tile lie upon each other": {"k, m, n + PART, add_desc": "k, m, n, add_desc"},
    "one step too few": {"for i, (a, b, c) in enumerate(steps):": "for i, (a, b, c) in enumerate(steps[:-1]):"},
    "padding is returned": {"[:, :rows, :cols].contiguous()": "[:, -rows:, -cols:].contiguous()"},
    "the last columns of the inner size are left out": {"range(0, L, BLOCK_K)": "range(0, L - BLOCK_K + 1, BLOCK_K)"},
}
# one for each class of failure; the others run by `pytest -m mutations`
CLASSES = [
    "mirrored tiles are not transposed",
    "the row of a triangle is off by one",
    "c is dropped",
    "the scale is the first matrix's",
    "a small matrix keeps its scale",
    "the sum goes on in the next tile",
    "the last columns of the inner size are left out",
]


@pytest.mark.skipif(DEVICE == "cuda", reason="a broken kernel may end the CUDA context of the other tests")
@pytest.mark.parametrize("name", mutations(MUTATIONS, always=CLASSES))
def test_a_broken_kernel_is_noticed(name, tmp_path, monkeypatch):
    monkeypatch.setattr(gemm, "PROGRAMS_WITHOUT_GPU", 2)  # of more tiles
    broken = mutant(module, MUTATIONS[name], tmp_path).polar_express
    with pytest.raises(Failed):
        check(randn(0, torch.bfloat16)(2, 136, 200), op=broken)
        check(randn(0, torch.bfloat16)(1, 520, 560), op=broken, coefficients=COEFFICIENTS[:1])
        check(randn(0, torch.bfloat16)(2, 13, 68), op=broken)
        for shape in ((2, 40, 72), (2, 40, 24), (2, 24, 40)):
            check(randn(0, torch.float32)(*shape), op=broken, scale=torch.tensor([0.01, 0.02], device=DEVICE))


RACES = {  # with the right bits, which no comparison of numbers shows
    "squares are computed whole, and mirrored": [
        Edit(r"tiles_m \* \(tiles_m \+ 1\) // 2 if SYMMETRIC else ", "", within="_gemm_kernel"),
        Edit(r"if SYMMETRIC:(\n +#)", r"if False:\1", within="_gemm_kernel"),
    ],
    "two programs compute every tile": [
        Edit(r"tl\.range\(tl\.program_id\(0\),", "tl.range(0,", within="_gemm_kernel"),
        Edit(r"tl\.num_programs\(0\), flatten", "1, flatten", within="_gemm_kernel"),
    ],
}


@pytest.mark.skipif(DEVICE == "cuda", reason="races show in the interpreter")
@pytest.mark.parametrize("name", RACES)
def test_a_race_is_noticed(name, tmp_path, monkeypatch):
    monkeypatch.setattr(gemm, "PROGRAMS_WITHOUT_GPU", 2)
    racing = mutant(module, RACES[name], tmp_path)
    with pytest.raises(Failed, match="race between programs"):
        racing._gemm(*[randn(0, torch.bfloat16)(1, 136, 72)] * 2, right_t=True, symmetric=True)


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
def test_a_copy_that_is_not_broken_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(gemm, "PROGRAMS_WITHOUT_GPU", 2)
    same = mutant(module, {}, tmp_path).polar_express
    check(randn(0, torch.bfloat16)(2, 136, 200), op=same)
