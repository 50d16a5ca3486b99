"""muon_update: both ops against float64 on square, tall, wide and transposed banks, masters, mutations. The whole
rule is in test_optim.py."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import kernels.muon_update as module
from kernels import extension
from kernels.master import join_master, split_master
from kernels.muon_update import (
    BETA2,
    MAX_SIDE,
    SAFETY,
    is_small,
    muon_apply,
    muon_apply_cost,
    muon_momentum,
    muon_momentum_cost,
)
from kernels.op import Backend
from tests.harness import DEVICE, Failed, backends_of, check_op, kept, mutant, mutant_cuda, noticed, randn, unharmed
from tests.mutations import mutations

DTYPES = (torch.bfloat16, torch.float32)
HYPER = (0.05, 0.4, 0.9)  # lr, weight_decay, momentum
LR_SCALES = (1.0, 2.0, 0.5)  # of the matrices of a bank, in turn
# small, which a program holds: square, tall, wide, ragged, a gate, one row, one column. Others: of several programs
# down, across and both ways, short and wide
SHAPES = (
    (3, 16, 16),
    (2, 40, 16),
    (2, 16, 40),
    (2, 13, 20),
    (2, 3, 12),
    (2, 1, 7),
    (3, 5, 1),
    (1, 140, 130),
    (1, 35, 132),
    (2, 300, 20),
    (2, 2, 2050),
)
BOTH = pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
PER_ROW = pytest.mark.parametrize("per_row", [True, False], ids=["second of rows", "second of columns"])
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


class Momentum(NamedTuple):
    buf: Tensor
    x: Tensor
    scale: Tensor


class Applied(NamedTuple):
    p: Tensor
    second: Tensor


def numbers(hyper, dtype):
    """The fp32 numbers that the kernel gets. Not an input to check_op, which would take three numbers for a noisy
    result."""
    return torch.tensor(hyper, device=DEVICE).to(dtype)


def like(op, backends):
    return dataclasses.replace(op, backends={name: Backend(function) for name, function in backends.items()})


def functional_momentum(op=muon_momentum, gap=0):
    """The op as a function of its state."""

    def wrap(update):
        def call(buf, hyper, out_dtype, **others):
            buf = kept(buf, gap)
            # in float64 it is the oracle
            x = torch.full_like(buf, torch.nan, dtype=buf.dtype if buf.dtype == torch.float64 else out_dtype)
            x = kept(x.contiguous())
            scale = kept(buf.new_full((buf.size(0),), torch.nan))
            assert update(buf=buf, x=x, scale=scale, hyper=numbers(hyper, buf.dtype), **others) is None
            unharmed(buf, x, scale)
            return Momentum(buf, x, scale)

        return call

    return like(op, {name: wrap(update) for name, update in op.backends.items()})


def functional_apply(op=muon_apply, gap=0, master=False):
    """The same. master: p is an fp32 number, kept in two halves (but in float64)."""

    def wrap(update):
        def call(p, second, hyper, **others):
            second, others["hyper"] = kept(second), numbers(hyper, second.dtype)
            others["lr_scale"] = lr_scales(p)
            if master and p.dtype != torch.float64:
                high, low = (kept(t, gap + 16 * i) for i, t in enumerate(split_master(p)))
                assert update(high, second=second, low=low, **others) is None
                unharmed(high, low, second)
                return Applied(join_master(high, low), second)
            p = kept(p, gap)
            assert update(p, second=second, **others) is None
            unharmed(p, second)
            return Applied(p, second)

        return call

    return like(op, {name: wrap(update) for name, update in op.backends.items()})


def lr_scales(p):
    return torch.tensor([LR_SCALES[k % 3] for k in range(p.size(0))], device=p.device)


def second_of(shape, per_row, make=torch.zeros):
    K, R, C = shape
    return make(K, R, 1) if per_row else make(K, 1, C)


def momentum_inputs(shape, transposed, out_dtype=torch.float32, g=torch.float32, seed=0, hyper=HYPER):
    make = randn(seed, torch.float32)
    # rows and columns of different sizes: equilibration has something to do
    grad = make(*shape) * make(shape[0], shape[1], 1) * make(shape[0], 1, shape[2])
    return {"g": grad.to(g), "buf": make(*shape), "hyper": hyper, "transposed": transposed, "out_dtype": out_dtype}


def apply_inputs(shape, per_row, dtype=torch.float32, seed=0, hyper=HYPER):
    make = randn(seed, torch.float32)
    x = make(*shape) * make(shape[0], shape[1], 1) * make(shape[0], 1, shape[2])
    second = second_of(shape, per_row, make).square() * 0.01
    return {"p": make(*shape) - 0.5, "x": x.to(dtype), "second": second, "hyper": hyper}


NAMES = ("g", "buf", "p", "x", "second")


def direct(args):
    """The inputs as the op itself takes them."""
    args = args | {"hyper": numbers(args["hyper"], torch.float32)}
    if "p" in args:
        return args | {"lr_scale": lr_scales(args["p"])}
    buf = args["buf"]
    return args | {
        "x": torch.empty(buf.shape, dtype=args.pop("out_dtype"), device=DEVICE),
        "scale": buf.new_empty(buf.size(0)),
    }


def check_momentum(args, op=muon_momentum, gap=0, **options):
    # transposed, x of a larger matrix is rounded twice: sqrt(2) times the error of one rounding
    factor = 1.6 if args["transposed"] else 1.25
    return check_op(functional_momentum(op, gap), args, no_grad=NAMES, factor=factor, **options)


def check_apply(args, op=muon_apply, gap=0, master=False, **options):
    return check_op(functional_apply(op, gap, master), args, no_grad=NAMES, factor=1.5, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@BOTH
@EVERY_SHAPE
def test_momentum_agrees_with_float64(shape, transposed, dtype, backend):
    whole = is_small(*shape[1:]) if backend == "triton" else shape[1] <= 256  # a program's, or a block's
    if transposed and min(shape[1:]) == 1 and not whole and dtype == torch.bfloat16:
        pytest.skip("rows of one number are exactly 1 in PyTorch; u is rounded before its norm is known")
    result = check_momentum(momentum_inputs(shape, transposed, dtype), backend=backend)
    assert result["x"].dtype == dtype and result["scale"].shape == (shape[0],)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@PER_ROW
@EVERY_SHAPE
def test_apply_agrees_with_float64(shape, per_row, dtype, backend):
    check_apply(apply_inputs(shape, per_row, dtype), backend=backend)
    check_apply(apply_inputs(shape, per_row, dtype), master=True, backend=backend)


@pytest.mark.parametrize("layout", ["rows apart", "every other"])
@BOTH
def test_rows_apart(transposed, layout, backend):
    for shape in ((2, 20, 24), (2, 36, 140)):
        check_momentum(momentum_inputs(shape, transposed), gap=32, layout=layout, backend=backend)
        check_momentum(momentum_inputs(shape, transposed, torch.bfloat16, torch.bfloat16), gap=16, backend=backend)
        for master in (False, True):
            check_apply(
                apply_inputs(shape, not transposed, torch.bfloat16),
                gap=32,
                layout=layout,
                master=master,
                backend=backend,
            )


@BOTH
def test_rows_that_begin_anywhere(transposed, backend):
    """Sides of whole vectors, rows at no multiple of 16 bytes."""
    check_momentum(momentum_inputs((2, 20, 24), transposed, torch.bfloat16), gap=3, backend=backend)
    check_apply(apply_inputs((2, 20, 24), transposed), gap=3, master=True, backend=backend)


def test_a_slice_of_a_bank(backend):
    """k of a packed bank with grouped heads: gaps between the matrices of every state, which are worked on where
    they are."""
    bank = {name: torch.randn(3, 40, 24, device=DEVICE) for name in ("g", "buf", "p", "x")}
    before = {name: t.clone() for name, t in bank.items()}
    low = torch.zeros(3, 40, 24, dtype=torch.int16, device=DEVICE)
    high, low[:] = split_master(bank["p"])
    hyper, results = torch.tensor(HYPER, device=DEVICE), []
    for each in ("ref", backend):
        state = {name: t.clone() for name, t in {**bank, "high": high, "low": low}.items()}
        cut = {name: t.split((24, 8, 8), dim=1)[1] for name, t in state.items()}
        second = torch.zeros(3, 1, 24, device=DEVICE)
        # x and scale are parts of larger ones as well
        xs, scales = torch.zeros(5, 8, 24, dtype=torch.bfloat16, device=DEVICE), torch.zeros(5, device=DEVICE)
        x, scale = xs[1:4], scales[1:4]
        muon_momentum.backends[each](cut["g"], cut["buf"], x, scale, hyper, transposed=False)
        assert not xs[0].any() and not xs[4].any() and not scales[0] and not scales[4] and scale.all()
        ones, second2 = torch.ones(3, device=DEVICE), torch.zeros(3, 1, 24, device=DEVICE)
        muon_apply.backends[each](cut["p"], cut["x"], second, ones, hyper)
        muon_apply.backends[each](cut["high"], cut["x"], second2, ones, hyper, low=cut["low"])
        assert torch.equal(join_master(state["high"], state["low"]), state["p"]) and torch.equal(second, second2)
        results.append([state["buf"], state["p"], x.float(), scale, second])
        for name in ("buf", "p"):  # q and v are not touched
            assert torch.equal(state[name][:, :24], before[name][:, :24])
            assert torch.equal(state[name][:, 32:], before[name][:, 32:])
            assert not torch.equal(state[name][:, 24:32], before[name][:, 24:32])
    for got, want in zip(results[1], results[0]):
        assert rel_rms(got, want) < (3e-3 if got is results[1][2] else 1e-6)


def test_many_blocks(backend):
    """Columns over several programs, the last of which has less to do."""
    check_momentum(momentum_inputs((1, 1060, 66), True), backend=backend)
    check_apply(apply_inputs((1, 1060, 66), False), backend=backend)


def test_longest_sides(backend):
    check_momentum(momentum_inputs((1, 2, MAX_SIDE), False), backend=backend)
    check_apply(apply_inputs((1, 2, MAX_SIDE), True), backend=backend)


def test_no_matrices(backend):
    for transposed in (False, True):
        result = check_momentum(momentum_inputs((0, 4, 6), transposed), backend=backend)
        assert result["scale"].shape == (0,) and result["x"].shape == (0, 4, 6)
        check_apply(apply_inputs((0, 4, 6), transposed), backend=backend)


@BOTH
def test_matrices_more_than_two_billion_elements_apart(transposed, backend):
    """Memory that is only asked for, and touched in two matrices."""
    stride = 2**31 + 64
    shape = (2, 3, 16)

    def far(t):
        return torch.empty(stride + 64, dtype=t.dtype, device=DEVICE).as_strided(shape, (stride, 16, 1)).copy_(t)

    args, near = (direct(momentum_inputs(shape, transposed)) for _ in range(2))
    args |= {"g": far(args["g"]), "buf": far(args["buf"])}
    for a in (args, near):
        muon_momentum.backends[backend](**a)
    assert all(torch.equal(args[name], near[name]) for name in ("x", "scale", "buf"))
    args, near = (direct(apply_inputs(shape, transposed)) for _ in range(2))
    args |= {"p": far(args["p"]), "x": far(args["x"])}
    for a in (args, near):
        muon_apply.backends[backend](**a)
    assert torch.equal(args["p"], near["p"]) and torch.equal(args["second"], near["second"])


def rel_rms(a, b):
    a, b = a.double(), b.double()
    return ((a - b).pow(2).mean().sqrt() / b.pow(2).mean().sqrt()).item()


def test_the_start_is_what_polar_express_makes_of_the_same_matrix(backend):
    """scale x has rows of one length, and the Frobenius norm that Polar Express starts from."""
    for transposed in (False, True):
        args = direct(momentum_inputs((2, 24, 16), transposed))
        muon_momentum.backends[backend](**args)
        start = args["x"] * args["scale"][:, None, None]
        rows = start.norm(dim=1 if transposed else 2)
        assert (rows / rows[:, :1] - 1).abs().max() < 1e-6
        assert (start.norm(dim=(1, 2)) - 1 / SAFETY).abs().max() < 1e-5


@pytest.mark.parametrize("backend", backends_of(muon_apply))
@PER_ROW
def test_a_master_is_the_fp32_run_bit_for_bit(per_row, backend):
    """Forty steps on weights of all sizes: the two halves stay the fp32 weight, and its nearest bf16 number."""
    update, shape = muon_apply.backends[backend], (2, 12, 20)
    p = torch.randn(shape, device=DEVICE) * 2.0 ** torch.arange(-10, 10, device=DEVICE)
    high, low = split_master(p)
    second = second_of(shape, per_row, lambda *size: torch.zeros(size, device=DEVICE))
    again, scales = second.clone(), lr_scales(p)
    for step in range(40):
        x = torch.randn(shape, device=DEVICE)
        hyper = torch.tensor([0.01, 0.1, 0.95], device=DEVICE)
        update(p, x, second, scales, hyper)
        update(high, x, again, scales, hyper, low=low)
        want_high, want_low = split_master(p)
        assert torch.equal(high, want_high) and torch.equal(low, want_low), step
    assert torch.equal(join_master(high, low), p) and torch.equal(second, again) and (low != 0).any()


@BOTH
@pytest.mark.parametrize("backend", backends_of(muon_momentum))
def test_zero_gradient(transposed, backend):
    zero = torch.zeros(2, 6, 8, device=DEVICE)
    hyper = torch.tensor([0.1, 0.0, 0.9], device=DEVICE)
    x, scale = torch.ones_like(zero), torch.ones(2, device=DEVICE)
    muon_momentum.backends[backend](zero, zero.clone(), x, scale, hyper, transposed=transposed)
    assert not x.any() and scale.isfinite().all()
    p, second = torch.randn_like(zero), second_of(zero.shape, transposed, torch.zeros).to(DEVICE)
    before = p.clone()
    muon_apply.backends[backend](p, x, second, lr_scales(p), hyper)
    assert torch.equal(p, before) and not second.any()


@BOTH
def test_rows_of_zeros_and_tiny_gradients(transposed, backend):
    args = momentum_inputs((2, 6, 8), transposed)
    args["g"][0, 2], args["buf"][0, 2], args["g"][1, :, 3], args["buf"][1, :, 3] = 0, 0, 0, 0
    assert check_momentum(args, backend=backend)["x"].isfinite().all()
    for size in (1e-5, 1e-7, 1e-9):  # rows of about 1e-6, and well below
        tiny = args | {"g": args["g"] * size, "buf": args["buf"] * size}
        check_momentum(tiny, backend=backend)
    zeros = apply_inputs((2, 6, 8), transposed)
    zeros["x"][0], zeros["x"][1, 2], zeros["x"][1, :, 3] = 0, 0, 0
    check_apply(zeros, backend=backend)


@PER_ROW
def test_decay_is_cautious(per_row, backend):
    """A weight shrinks only where the step makes it smaller too, or does not move it."""
    args = apply_inputs((1, 5, 8), per_row, hyper=(0.0625, 0.5, 0.9))
    args["x"][0, 0] = 0
    with_decay, without = args["p"].clone(), args["p"].clone()
    for p, decay in ((with_decay, 0.5), (without, 0.0)):
        hyper = torch.tensor([0.0625, decay, 0.9], device=DEVICE)
        second = args["second"].clone()
        muon_apply.backends[backend](p, args["x"], second, torch.full((1,), 2.0, device=DEVICE), hyper)
    decays = args["x"] * args["p"] >= 0
    assert torch.equal(with_decay[~decays], without[~decays]) and decays.any() and not decays.all()
    lost = 0.0625 * 0.5 * 2.0
    torch.testing.assert_close((without - with_decay)[decays], lost * args["p"][decays], rtol=1e-4, atol=1e-6)


@BOTH
def test_opcheck(transposed, backend):
    for dtype in DTYPES:
        m = direct(momentum_inputs((2, 5, 8), transposed, dtype))
        given = tuple(m[name] for name in ("g", "buf", "x", "scale", "hyper"))
        torch.library.opcheck(module._muon_momentum, (*given, transposed, SAFETY, backend == "cuda"))
    for low in (None, torch.zeros(2, 5, 8, dtype=torch.int16, device=DEVICE)):
        a = direct(apply_inputs((2, 5, 8), transposed))
        p = a["p"] if low is None else a["p"].bfloat16()
        given = tuple(a[name] for name in ("x", "second", "lr_scale", "hyper"))
        torch.library.opcheck(module._muon_apply, (p, *given, low, BETA2, backend == "cuda"))


@BOTH
def test_torch_compile(transposed, backend):
    """Both ops in one graph that works on the same memory."""

    def step(g, buf, p, low, second, lr_scale, hyper):
        x, scale = torch.empty_like(buf), buf.new_empty(buf.size(0))
        muon_momentum.backends[backend](g, buf, x, scale, hyper, transposed=transposed)
        muon_apply.backends[backend](p, x, second, lr_scale, hyper, low=low)
        return scale

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        m, a = direct(momentum_inputs((2, 5, 8), transposed)), apply_inputs((2, 5, 8), transposed)
        high, low = split_master(a["p"])
        state = [m["g"], m["buf"], high, low, a["second"], lr_scales(high)]
        before = high.clone()
        results.append([function(*state, m["hyper"]), *state])
        assert not torch.equal(before, high)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def bad_momentum(**changes):
    return direct(momentum_inputs((2, 4, 6), False)) | changes


def bad_apply(**changes):
    return direct(apply_inputs((2, 4, 6), False)) | changes


ONES = torch.ones(2, 4, 6, device=DEVICE)
LOW = ONES.to(torch.int16)


@pytest.mark.parametrize(
    "op, args, says",
    [
        (muon_momentum, bad_momentum(g=ONES[0]), "g is"),
        (muon_momentum, bad_momentum(g=ONES.double()), "g is .*float64"),
        (muon_momentum, bad_momentum(buf=ONES.bfloat16()), "buf is .*expected .*float32"),
        (muon_momentum, bad_momentum(buf=ONES[:, :3]), r"buf is \(2, 3, 6\)"),
        (muon_momentum, bad_momentum(g=ONES.mT.contiguous().mT), "g is .*last stride 1"),
        (muon_momentum, bad_momentum(hyper=torch.ones(2, device=DEVICE)), "hyper is"),
        (muon_momentum, bad_momentum(x=ONES.half()), "x is .*float16"),
        (muon_momentum, bad_momentum(x=ONES.mT.contiguous().mT), "x is .*expected contiguous"),
        (muon_momentum, bad_momentum(scale=ONES[0, 0, :2].bfloat16()), "scale is .*expected contiguous .*float32"),
        (muon_momentum, bad_momentum(g=ONES[:, :0], buf=ONES[:, :0]), "1 <= R, C"),
        (muon_apply, bad_apply(p=ONES.bfloat16()), "p is .*expected .*float32"),
        (muon_apply, bad_apply(low=LOW), "p is .*expected .*bfloat16"),
        (muon_apply, bad_apply(p=ONES.bfloat16(), low=LOW.int()), "low is .*expected .*int16"),
        (muon_apply, bad_apply(x=ONES.half()), "x is .*float16"),
        (muon_apply, bad_apply(x=ONES.mT.contiguous().mT), "x is .*last stride 1"),
        (muon_apply, bad_apply(second=torch.ones(2, 6, 1, device=DEVICE)), r"second is .*expected contiguous \(2, "
        r"1, 6\)"),
        (muon_apply, bad_apply(second=torch.ones(1, 4, 1, device=DEVICE)), r"second is .*expected contiguous \(2, "
        r"4, 1\)"),
        (muon_apply, bad_apply(lr_scale=torch.ones(3, device=DEVICE)), r"lr_scale is .*expected contiguous \(2,\)"),
        (muon_apply, bad_apply(hyper=torch.ones(3, device=DEVICE).double()), "hyper is"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", backends_of(muon_apply))
def test_bad_calls_are_refused(backend, op, args, says):
    with pytest.raises(ValueError, match=says):
        op.checked(backend)(**args)


def test_the_kernels_refuse_longer_sides():
    wide = torch.ones(1, 1, MAX_SIDE + 1, device=DEVICE)
    args = direct(momentum_inputs((1, 1, 4), False)) | {"g": wide, "buf": wide.clone(), "x": wide.clone()}
    muon_momentum.checked("ref")(**args)
    for kernel in ("triton", "cuda"):
        with pytest.raises(ValueError, match=f"takes sides of 1 to {MAX_SIDE}"):
            muon_momentum.checked(kernel)(**args)


def test_cost():
    assert muon_momentum_cost((2, 5, 10), torch.bfloat16) == (900, 1400)
    assert muon_apply_cost((2, 5, 10), torch.bfloat16) == (800, 1000)
    assert muon_apply_cost((2, 5, 10), torch.float32)[1] == 1200


MASK = "mask = mask_r[:, None] & mask_c[None, :]"
TO_EVEN = """from kernels.master import join_master, join_tile, split_master

@triton.jit
def split_tile(x):
    high = x.to(tl.bfloat16)
    bits = high.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return high, (x.to(tl.int32, bitcast=True) - bits).to(tl.int16)
"""
MUTATIONS = {
    "columns beyond C are written": {"offs_c, offs_r < R, offs_c < C": "offs_c, offs_r < R, offs_c < C + 1"},
    "rows beyond R are written": {"offs_c, offs_r < R, offs_c < C": "offs_c, offs_r < R + 1, offs_c < C"},
    "columns end early": {"offs_c, offs_r < R, offs_c < C": "offs_c, offs_r < R, offs_c < tl.minimum(C, 128)"},
    "the mask is for rows alone": {MASK: "mask = mask_r[:, None] & (offs_c >= 0)[None, :]"},
    "the momentum is that of the gradient": {"rest = 1.0 - tl.load(hyper_ptr + 2)": "rest = tl.load(hyper_ptr + 2)"},
    "no Nesterov": {"u = tl.fma(g - buf, rest, buf)": "u = buf"},
    "Nesterov's ends are swapped": {"u = tl.fma(g - buf, rest, buf)": "u = tl.fma(buf - g, rest, g)"},
    "the momentum buffer is u": {
        "        u = tl.fma(g - buf, rest, buf)\n": "        u = tl.fma(g - buf, rest, buf)\n"
        "        tl.store(buf_ptr + offs_buf, u, mask=mask)\n"
    },
    "rows are not divided by their length": {"_inverse(squares)[:, None]": "1.0"},
    "rows are divided by the square": {"tl.maximum(tl.sqrt_rn(squares), 1e-6)": "tl.maximum(squares, 1e-6)"},
    "columns are not divided": {"_inverse(squares)[None, :]": "1.0"},
    "small columns are not divided": {"_inverse(totals)[None, :]": "1.0"},
    "short rows are not clamped": {"tl.maximum(tl.sqrt_rn(squares), 1e-6)": "tl.sqrt_rn(squares)"},
    "short rows count whole": {"tl.minimum(squares * 1e12, 1.0)": "tl.where(squares > 0, 1.0, 0.0)"},
    "scale forgets safety": {"safety * target * norm + 1e-6": "target * norm + 1e-6"},
    "scale forgets 1e-6": {"safety * target * norm + 1e-6": "safety * target * norm"},
    "scale takes a mean over columns": {"rows, float(rows), safety": "rows, float(R * C // rows), safety"},
    "a small matrix's scale takes a mean over columns": {
        "        float(rows), safety, TRANSPOSED": "        float(R * C // rows), safety, TRANSPOSED"
    },
    "only the first partial sum counts": {"for part in range(0, n_parts):": "for part in range(0, 1):"},
    "the last partial sum is dropped": {
        "for part in range(0, n_parts):": "for part in range(0, tl.maximum(n_parts - 1, 1)):"
    },
    "parts of one matrix for all": {"(k * n_parts + part) * n": "part * n"},
    "a program's tiles overwrite each other": {
        "            totals += tl.sum(u * u, axis=0)": "            totals = tl.sum(u * u, axis=0)"
    },
    "only the first tile of a program": {"block_r.to(tl.int64) * STEPS + step": "block_r.to(tl.int64) * STEPS"},
    "tiles of programs overlap": {"block_r.to(tl.int64) * STEPS + step": "block_r.to(tl.int64) + step"},
    "summed squares are not stored": {"if n_parts > 1:": "if n_parts > 99:"},
    "second is a mean over the wrong count": {"float(R * C // n), None": "float(n), None"},
    "the root is of the longer side": {"min(R, C) ** 0.5\n    n_other": "max(R, C) ** 0.5\n    n_other"},
    "beta2 is the rate": {"second, 1.0 - beta2, second)": "second, beta2, second)"},
    "second is a sum": {"tl.div_rn(squares, n_other)": "squares"},
    "second is not written": {"tl.store(second_ptr + offs, second, mask=mask)": "pass"},
    "one warp reads what another has written": {"        tl.debug_barrier()  # all": "        # all"},
    "small matrices take more threads than elements": {"max(1, min(4, rows * side // 32))": "4"},
    "a small matrix's second is not written": {"tl.store(second_ptrs, second, mask=inside)": "pass"},
    "second is used before it is updated": {
        "    inverse = tl.div_rn(": "    old = (second - (1.0 - beta2) * tl.div_rn(squares, n_other)) / beta2\n"
        "    inverse = tl.div_rn(",
        "tl.maximum(second, 1e-10)": "tl.maximum(old, 1e-10)",
    },
    "the norm is not preserved": {"* tl.sqrt_rn(inverse) * keep": "* tl.sqrt_rn(inverse)"},
    "x is not rescaled": {"second, rescale * tl": "second, tl"},
    "decay where it disagrees": {"z * p >= 0": "z * p <= 0"},
    "decay everywhere": {"z * p >= 0": "p == p"},
    "no decay at zero": {"z * p >= 0": "z * p > 0"},
    "the decay grows": {"-decay, 0.0)": "decay, 0.0)"},
    "the step goes up": {"tl.fma(-lr, z, p)": "tl.fma(lr, z, p)"},
    "the rate is not scaled": {"tl.load(hyper_ptr) * tl.load(lr_scale_ptr + k)": "tl.load(hyper_ptr)"},
    "one scale of the rate for all matrices": {"tl.load(lr_scale_ptr + k)": "tl.load(lr_scale_ptr)"},
    "low has the strides of p": {"(low.stride(0), low.stride(1))": "(p.stride(0), p.stride(1))"},
    "x has the strides of p": {"*low_strides, x.stride(0), x.stride(1)": "*low_strides, p.stride(0), p.stride(1)"},
    "buf has the strides of g": {"buf.stride(0), buf.stride(1)": "g.stride(0), g.stride(1)"},
    "a tie goes to even": {"from kernels.master import join_master, join_tile, split_master, split_tile": TO_EVEN},
    "x is truncated": {
        "        tl.store(x_ptr + (k * R": "        u = (u.to(tl.int32, bitcast=True) & -65536).to(tl.float32, "
        "bitcast=True)\n        tl.store(x_ptr + (k * R"
    },
}
# one for each class of failure; the others run by `pytest -m mutations`
CLASSES = [
    "columns beyond C are written",
    "rows beyond R are written",
    "columns end early",
    "Nesterov's ends are swapped",
    "short rows are not clamped",
    "the last partial sum is dropped",
    "parts of one matrix for all",
    "a program's tiles overwrite each other",
    "small columns are not divided",
    "one warp reads what another has written",
    "small matrices take more threads than elements",
    "one scale of the rate for all matrices",
    "second is used before it is updated",
    "decay where it disagrees",
    "low has the strides of p",
    "a tie goes to even",
    "x is truncated",
]


def everything(backend, momentum=muon_momentum, apply=muon_apply):
    for shape in ((2, 13, 20), (2, 16, 16), (1, 20, 13), (2, 36, 132)):
        for transposed in (False, True):
            dtype = torch.bfloat16 if shape[1] < 20 else torch.float32
            check_momentum(
                momentum_inputs(shape, transposed, dtype), momentum, gap=32, layout="rows apart", backend=backend
            )
            for master in (False, True):
                check_apply(
                    apply_inputs(shape, transposed), apply, gap=32, layout="rows apart", master=master, backend=backend
                )
            small = momentum_inputs(shape, transposed)
            check_momentum(small | {name: small[name] * 1e-7 for name in ("g", "buf")}, momentum, backend=backend)
    test_many_blocks(backend)
    test_zero_gradient(False, backend)
    test_decay_is_cautious(False, backend)
    test_ties_go_away_from_zero_in_the_update(backend, apply)


@pytest.mark.skipif(DEVICE == "cuda", reason="a broken kernel may end the CUDA context of the other tests")
@pytest.mark.parametrize("name", mutations(MUTATIONS, always=CLASSES))
def test_a_broken_kernel_is_noticed(name, tmp_path, monkeypatch):
    broken = mutant(module, MUTATIONS[name], tmp_path)
    for op in ("muon_momentum", "muon_apply"):
        monkeypatch.setattr(f"{__name__}.{op}", getattr(broken, op))
        monkeypatch.setitem(globals(), f"check_{op[5:]}", bound(globals()[f"check_{op[5:]}"], getattr(broken, op)))
    with pytest.raises((Failed, AssertionError)):
        everything("triton", broken.muon_momentum, broken.muon_apply)


def bound(check, broken):
    return lambda args, op=None, **options: check(args, broken, **options)


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
def test_a_copy_that_is_not_broken_passes(tmp_path):
    same = mutant(module, {"BETA2 = ": "BETA2  = "}, tmp_path)
    everything("triton", same.muon_momentum, same.muon_apply)


def test_ties_go_away_from_zero_in_the_update(backend, apply=muon_apply):
    p = torch.tensor([1 + 2**-8, -(1 + 2**-8), 1 + 3 * 2**-8], device=DEVICE).expand(1, 2, 3).contiguous()
    high, low = split_master(p)
    hyper = torch.tensor([0.0, 0.5, 0.9], device=DEVICE)
    second = torch.zeros(1, 1, 3, device=DEVICE)
    apply.backends[backend](high, torch.ones_like(p), second, torch.ones(1, device=DEVICE), hyper, low=low)
    want, want_low = split_master(p)
    assert torch.equal(high, want) and torch.equal(low, want_low) and (low == -(2**15)).all()


# csrc/muon_update.cu


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_banks_at_a_time(dtype, backend, monkeypatch):
    """Of every shape, more than a launch takes, stored both ways: the bits of one call each, by one call into csrc."""

    def calls():
        shapes = [*SHAPES, (0, 4, 6), *((1, 24, 8 * i) for i in range(1, 12))]
        momentum = [direct(momentum_inputs(s, i % 2 == 0, dtype, seed=i)) for i, s in enumerate(shapes)]
        return momentum, [direct(apply_inputs(s, i % 2 == 0, dtype, seed=i)) for i, s in enumerate(shapes)]

    singly, together, counted = calls(), calls(), []
    for op, each in zip((muon_momentum, muon_apply), singly):
        for arguments in each:
            op.backends[backend](**arguments)
    call = extension.call
    monkeypatch.setattr(extension, "call", lambda *args, **options: counted.append(args) or call(*args, **options))
    for op, every in zip((muon_momentum, muon_apply), together):
        op.checked_many(backend)(every)
    assert len(counted) == (2 if backend == "cuda" else 0)
    for one, other in zip([*singly[0], *singly[1]], [*together[0], *together[1]], strict=True):
        assert all(torch.equal(t, other[name]) for name, t in one.items() if torch.is_tensor(t))


CUDA_MUTATIONS = {
    "a matrix has one row more": {"if (at.k >= b.K) return;  // a whole": "if (at.k > b.K) return;  // a whole"},
    "rows are those of the next matrix": {"r = static_cast<int>(row % b.R)": "r = static_cast<int>(row / b.K % b.R)"},
    "u is that of the old buf": {
        "u[i] = __fmaf_rn(__fsub_rn(grad[i], buf[i]), rest, buf[i]);\n    }": "u[i] = buf[i]; }"
    },
    "a row is not divided": {"u[i] *= inverse;": ""},
    "rows share memory": {"rows + team.index * padded(b.C)": "rows"},
    "columns beyond C": {"if (b.wide && c < b.C) f": "if (b.wide) f"},
    "one column beyond C": {"if (c + i < b.C) f": "if (c + i <= b.C) f"},
    "rows beyond a part": {"min(b.R, (at.part + 1) * COLUMN_ROWS)": "b.R"},
    "no barrier before the squares are added": {
        "squares[i];\n    __syncthreads();  // without it a thread adds": "squares[i];  // without it a thread adds"
    },
    "no barrier before columns are divided": {
        "    __syncthreads();  // without it a thread divides": "    // without it a thread divides"
    },
    "a lane is left out": {"l < LANES; ++l": "l < LANES - 1; ++l"},
    "parts are not added up": {"part < parts; ++part": "part < 1; ++part"},
    "columns of many parts are not divided": {"b.by_columns && parts_of(b) > 1 ?": "false ?"},
    "columns of one part are divided twice": {"b.by_columns && parts_of(b) > 1 ?": "b.by_columns ?"},
    "a row of x has one length": {"fminf(s * 1e12f, 1.0f)": "1.0f"},
    "safety is forgotten": {"safety * target * __fsqrt": "target * __fsqrt"},
    "the mean is over the wrong side": {
        "b.by_columns ? b.R : b.C);\n    float* second": "b.by_columns ? b.C : b.R);\n    float* second"
    },
    "second is not kept": {"1.0f - beta2, second[i]);": "1.0f - beta2, 0.0f * second[i]);"},
    "the norm is not kept": {"* keep;": ";"},
    "factors of rows are those of columns": {"b.by_columns ? c + i : r]": "b.by_columns ? r : c + i]"},
    "decay where it disagrees": {">= 0.0f ? -decay : 0.0f": ">= 0.0f ? -decay : -decay"},
    "decay is forgotten": {">= 0.0f ? -decay : 0.0f": ">= 0.0f ? 0.0f : 0.0f"},
    "lr_scale is of the first matrix": {"b.lr_scale[k]": "b.lr_scale[0]"},
    "low has the strides of p": {"low = k * b.low_k + r * b.low_r + c": "low = at"},
    "x has the strides of p": {"b.x.read(k * b.x_k + r * b.x_r + c, x)": "b.x.read(at, x)"},
    "the end of a matrix is left out": {"min(all, begin + MAP / N)": "min(all, begin + MAP / N) - 1"},
    "elements beyond the first vectors are left out": {
        "i < min(all, begin + MAP / N); i += THREADS": "i < min(all, begin + THREADS); i += THREADS"
    },
    "strides are taken for aligned": {"t.C % VEC == 0 && by_16_bytes(": "t.C % VEC == 0; by_16_bytes("},
    "odd sides are taken for aligned": {"t.C % VEC == 0 && by_16_bytes(": "by_16_bytes("},
    "banks share their sums": {"next += floats(b);": ""},
}
CUDA_CLASSES = [
    "rows share memory",
    "one column beyond C",
    "no barrier before the squares are added",
    "no barrier before columns are divided",
    "parts are not added up",
    "second is not kept",
    "lr_scale is of the first matrix",
    "low has the strides of p",
    "elements beyond the first vectors are left out",
    "odd sides are taken for aligned",
    "banks share their sums",
]


@pytest.mark.skipif(DEVICE == "cuda", reason="emulated kernels only")
@pytest.mark.parametrize("name", mutations(CUDA_MUTATIONS, always=CUDA_CLASSES))
def test_a_broken_cuda_kernel_is_noticed(name, tmp_path, monkeypatch):
    broken = mutant_cuda("muon_update.cu", CUDA_MUTATIONS[name], tmp_path)
    monkeypatch.setattr(extension, "module", lambda device: broken)

    def check_all():
        everything("cuda")
        test_rows_apart(False, "rows apart", "cuda")
        test_rows_that_begin_anywhere(False, "cuda")
        check_momentum(momentum_inputs((1, 600, 24), True), backend="cuda")
        check_momentum(momentum_inputs((2, 3, 1100), False), backend="cuda")
        check_apply(apply_inputs((1, 90, 120), True), backend="cuda")
        test_many_banks_at_a_time(torch.float32, "cuda", monkeypatch)

    assert noticed(check_all)
