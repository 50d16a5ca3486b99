"""adam_update: the law in every mix of dtypes, against torch.optim.AdamW, masters bit for bit, what is refused, and
mutations."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kernels.adam_update as module
from kernels import extension
from kernels.adam_update import ADAM_EPS, adam_hyper, adam_update, adam_update_cost
from kernels.master import join_master, join_tile, split_master, split_tile
from kernels.op import Backend, Op
from tests.harness import (
    DEVICE,
    Failed,
    backends_of,
    check_op,
    guarded,
    kept,
    mutant,
    mutant_cuda,
    noticed,
    randn,
    unharmed,
)
from tests.mutations import mutations

DTYPES = (torch.bfloat16, torch.float32)
SIZES = (1, 7, 1024, 1025, 5000)
HYPER = adam_hyper(0.05, (0.8, 0.95), 0.3, 3)


class States(NamedTuple):
    p: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def functional(op: Op = adam_update, master: bool = False) -> Op:
    """The op as a function of its states. master: p is an fp32 number, kept in two halves (but in float64)."""

    def wrap(update):
        def call(p, exp_avg, exp_avg_sq, **others):
            p, exp_avg, exp_avg_sq = (kept(t) for t in (p, exp_avg, exp_avg_sq))
            if master and p.dtype != torch.float64:
                high, low = map(kept, split_master(p))
                assert update(high, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, low=low, **others) is None
                unharmed(high, low, exp_avg, exp_avg_sq)
                joined = join_master(high, low)
                assert torch.equal(split_master(joined)[0].view(torch.int16), high.view(torch.int16))
                return States(joined, exp_avg, exp_avg_sq)
            assert update(p, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, **others) is None
            unharmed(p, exp_avg, exp_avg_sq)
            return States(p, exp_avg, exp_avg_sq)

        return call

    return dataclasses.replace(op, backends={name: Backend(wrap(update)) for name, update in op.backends.items()})


NAMES = ("p", "g", "exp_avg", "exp_avg_sq", "hyper")


def inputs(*size, dtype=torch.float32, moments=None, g=torch.float32, seed=0, hyper=HYPER):
    make = randn(seed, torch.float32)
    moments = moments or dtype
    return {
        "p": make(*size).to(dtype),
        "g": make(*size).to(g),
        "exp_avg": make(*size).to(moments),
        "exp_avg_sq": make(*size).square().to(moments),
        "hyper": torch.tensor(hyper, device=DEVICE),
    }


def check(args, op=adam_update, master=False, **options):
    # p is a difference of two terms; nothing is rounded but at its store
    return check_op(functional(op, master), args, no_grad=NAMES, factor=1.5, **options)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype, moments", [(DTYPES[0], DTYPES[0]), DTYPES, (DTYPES[1], DTYPES[1])], ids=str)
def test_agrees_with_float64(n, dtype, moments, backend):
    check(inputs(n, dtype=dtype, moments=moments), backend=backend)


@pytest.mark.parametrize("n", SIZES)
def test_a_master_agrees_with_float64(n, backend):
    check(inputs(n), master=True, backend=backend)


CAUTIOUS = adam_hyper(0.05, (0.8, 0.95), -0.3, 3)


def check_cautious(backend, op=adam_update):
    check(inputs(1025, hyper=CAUTIOUS), op, master=True, backend=backend)
    check(inputs(1025, dtype=torch.bfloat16, moments=torch.float32, hyper=CAUTIOUS), op, backend=backend)
    # a step that grows p, one that shrinks it, one of 0 and a p of 0, from fresh moments: m, v and c are those of g
    p, g = (
        torch.tensor(numbers, device=DEVICE) for numbers in ([2.0, 2.0, -2.0, -2.0, 3.0, 0.0], [-1, 1, -1, 1, 0, 1])
    )
    args = {"p": p, "g": g.float(), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    op.backends[backend](**args, hyper=torch.tensor(adam_hyper(0.5, (0.8, 0.95), -0.25, 1), device=DEVICE))
    torch.testing.assert_close(args["p"], torch.tensor([2.5, 1.25, -1.25, -2.5, 3.0, -0.5], device=DEVICE))


@pytest.mark.parametrize("backend", backends_of(adam_update))
def test_a_cautious_decay_shrinks_what_the_step_shrinks(backend):
    check_cautious(backend)


@pytest.mark.parametrize("master", [False, True])
def test_shapes_gradients_in_bf16_and_steps(master, backend):
    for t in (1, 2, 1000):
        hyper = adam_hyper(0.02, (0.96, 0.995), 0.1, t)
        check(inputs(3, 5, 41, g=torch.bfloat16, hyper=hyper), master=master, backend=backend)
    check(inputs(), master=master, backend=backend)
    check(inputs(0, 4), master=master, backend=backend)


def test_opcheck(backend):
    for low in (None, torch.zeros(40, dtype=torch.int16, device=DEVICE)):
        args = list(inputs(40, dtype=torch.float32 if low is None else torch.bfloat16, moments=torch.float32).values())
        torch.library.opcheck(module._adam_update, (*args, low, None, ADAM_EPS, backend == "cuda"))
    rows = torch.arange(40, dtype=torch.int32, device=DEVICE) % 2
    args = inputs(40) | {"hyper": torch.tensor([HYPER, HYPER], device=DEVICE)}
    torch.library.opcheck(module._adam_update, (*args.values(), None, rows, ADAM_EPS, backend == "cuda"))


@pytest.mark.parametrize("master", [False, True])
def test_torch_compile(master, backend):
    """The whole call in one graph that works on the same memory."""
    results = []
    kernel = adam_update.backends[backend]
    for update in (kernel, torch.compile(kernel, fullgraph=True, backend="aot_eager")):
        args = inputs(70, dtype=torch.bfloat16, moments=torch.float32)
        args |= {"low": torch.arange(70, dtype=torch.int16, device=DEVICE)} if master else {}
        before = args["p"].clone()
        update(**args)
        assert not torch.equal(args["p"], before)
        results.append(args)
    assert all(torch.equal(t, results[1][name]) for name, t in results[0].items())


def test_parameters_side_by_side(backend, op=adam_update):
    """Each element by its own row of hyperparameters, to the bit as if its parameter were updated alone; one that has
    none is left alone."""
    hypers = torch.tensor([adam_hyper(0.02 * (i + 1), (0.5 + 0.1 * i, 0.9 + 0.03 * i), 0.1 * i, 3) for i in range(3)])
    hypers = hypers.to(DEVICE)
    sizes = (5, 1, 1030)
    row = torch.arange(3, dtype=torch.int32, device=DEVICE).repeat_interleave(torch.tensor(sizes, device=DEVICE))
    for update in (op.checked("ref"), op.backends[backend]):
        alone, together = inputs(1036), inputs(1036)
        for i, part in enumerate(zip(*(t.split(sizes) for t in list(alone.values())[:4]))):
            update(*part, hypers[i])
        update(**together | {"hyper": hypers, "row": row})
        assert all(torch.equal(together[name], alone[name]) for name in States._fields)
    before, unknown = inputs(1036)["p"], torch.where(torch.arange(1036, device=DEVICE) % 2 == 0, row, 99)
    args = inputs(1036) | {"hyper": guarded(hypers), "row": unknown.int()}
    op.backends[backend](**args)
    assert torch.equal(args["p"][::2], together["p"][::2]) and torch.equal(args["p"][1::2], before[1::2])


def rel_rms(a, b):
    return ((a - b).double().pow(2).mean().sqrt() / b.double().pow(2).mean().sqrt()).item()


@pytest.mark.parametrize("backend", backends_of(adam_update))
@pytest.mark.parametrize("betas", [(0.8, 0.96), (0.96, 0.995)])
def test_is_the_adamw_of_torch_in_float64(betas, backend):
    """Ten steps from nothing; once eps decides, once not."""
    for size in (1.0, 1e-11):
        p, m, v = torch.randn(999, device=DEVICE), *torch.zeros(2, 999, device=DEVICE)
        theirs = torch.nn.Parameter(p.double())
        optimizer = torch.optim.AdamW([theirs], lr=0.01, betas=betas, eps=ADAM_EPS, weight_decay=0.1)
        for t in range(1, 11):
            g = torch.randn(999, device=DEVICE) * size
            hyper = torch.tensor(adam_hyper(0.01, betas, 0.1, t), device=DEVICE)
            adam_update.backends[backend](p, g, m, v, hyper)
            theirs.grad = g.double()
            optimizer.step()
        state = optimizer.state[theirs]
        errors = [rel_rms(a, b) for a, b in ((p, theirs), (m, state["exp_avg"]), (v, state["exp_avg_sq"]))]
        assert errors[0] < 3e-7 and max(errors[1:]) < 1e-5, errors  # 1 - 0.995 is known to 6e-6 in fp32


@pytest.mark.parametrize("backend", backends_of(adam_update))
def test_a_master_is_the_fp32_run_bit_for_bit(backend):
    """Sixty steps on weights of all sizes and signs: the two halves stay the fp32 weight, and its nearest bf16
    number."""
    update = adam_update.backends[backend]
    p = torch.randn(2000, device=DEVICE) * 2.0 ** torch.arange(-20, 20, device=DEVICE).repeat(50)
    high, low = split_master(p)
    moments, again = (torch.zeros(2, 2000, device=DEVICE) for _ in range(2))
    for t in range(1, 61):
        g = torch.randn(2000, device=DEVICE)
        hyper = torch.tensor(adam_hyper(0.01, (0.8, 0.95), 0.1, t), device=DEVICE)
        update(p, g, *moments, hyper)
        update(high, g, *again, hyper, low)
        want_high, want_low = split_master(p)
        assert torch.equal(high, want_high) and torch.equal(low, want_low), t
    assert torch.equal(join_master(high, low), p) and torch.equal(moments, again)
    assert (low != 0).any()


@triton.jit
def _there_and_back(x_ptr, high_ptr, low_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    high, low = split_tile(tl.load(x_ptr + offs, mask=mask))
    tl.store(high_ptr + offs, high, mask=mask)
    tl.store(low_ptr + offs, low, mask=mask)
    tl.store(y_ptr + offs, join_tile(high, low), mask=mask)


def there_and_back(bits):
    x = bits.to(DEVICE, torch.int32).view(torch.float32)
    high, low = x.new_empty(x.shape, dtype=torch.bfloat16), x.new_empty(x.shape, dtype=torch.int16)
    y = torch.empty_like(x)
    _there_and_back[(triton.cdiv(x.numel(), 2**15),)](x, high, low, y, x.numel(), BLOCK=2**15)
    want_high, want_low = split_master(x)
    assert torch.equal(high.view(torch.int16), want_high.view(torch.int16)) and torch.equal(low, want_low)
    assert torch.equal(y.view(torch.int32), x.view(torch.int32))
    assert torch.equal(join_master(high, low).view(torch.int32), x.view(torch.int32))
    return x, high


def test_halves_of_every_sign_exponent_and_upper_mantissa():
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int64)[:, None] << 16
    lower = torch.tensor([0, 1, 2, 0x5A5A, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xA5A5, 0xFFFE, 0xFFFF])
    x, high = there_and_back((upper + lower).reshape(-1))
    finite = x.isfinite() & high.isfinite()
    assert ((high.float() - x).abs() <= (x.bfloat16().float() - x).abs())[finite & x.bfloat16().isfinite()].all()


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=64))
def test_halves_of_any_bits(bits):
    there_and_back(torch.tensor(bits))


def test_ties_go_away_from_zero_in_the_update(backend, op=adam_update):
    x = torch.tensor([1 + 2**-8, -(1 + 2**-8), 1 + 3 * 2**-8], device=DEVICE)
    high, low = split_master(x)
    zero = torch.zeros_like(x)
    hyper = torch.tensor([0.0, 0.8, 0.9, 0.0, 1, 1], device=DEVICE)
    op.backends[backend](high, zero, zero.clone(), zero.clone(), hyper, low)
    assert high.tolist() == [1 + 2**-7, -(1 + 2**-7), 1 + 2**-6] and low.tolist() == [-(2**15)] * 3


def test_hyper():
    lr, beta1, beta2, decay, c1, c2 = adam_hyper(0.1, (0.8, 0.995), 0.2, 7)
    assert (lr, decay) == (0.1, 0.2) and beta1 == pytest.approx(0.8) and beta2 == pytest.approx(0.995)
    assert c1 == pytest.approx(1 / (1 - 0.8**7), rel=1e-6) and c2 == pytest.approx(1 / (1 - 0.995**7), rel=1e-5)
    assert adam_hyper(0.1, (0.8, 0.995), 0.2, 10**6)[4:] == [1.0, 1.0]
    assert ADAM_EPS == 1e-10


def test_a_weight_without_gradient_stays(backend):
    args = inputs(50) | {"hyper": torch.tensor(adam_hyper(0.1, (0.8, 0.9), 0.0, 1), device=DEVICE)}
    args |= {name: torch.zeros(50, device=DEVICE) for name in ("g", "exp_avg", "exp_avg_sq")}
    before = args["p"].clone()
    adam_update.backends[backend](**args)
    assert torch.equal(args["p"], before) and not args["exp_avg"].any() and not args["exp_avg_sq"].any()


def bad(**changes):
    return inputs(6) | changes


SIX = torch.ones(6, device=DEVICE)


@pytest.mark.parametrize(
    "args, says",
    [
        (bad(p=SIX.double()), "exp_avg is .*expected .*float64"),
        (bad(p=SIX.half()), "p is .*float16"),
        (bad(g=SIX[:5]), r"g is \(5,\)"),
        (bad(g=torch.ones(12, device=DEVICE)[::2]), "g is .*strides"),
        (bad(exp_avg=SIX.bfloat16()), "exp_avg is .*expected .*float32"),
        (inputs(6, dtype=torch.bfloat16) | {"exp_avg_sq": SIX.clone()}, "exp_avg_sq is .*expected .*bfloat16"),
        (bad(low=SIX.to(torch.int16)), "p is .*expected .*bfloat16"),
        (inputs(6, dtype=torch.bfloat16) | {"low": SIX.to(torch.int32)}, "low is .*expected .*int16"),
        (bad(hyper=SIX[:5]), r"hyper is \(5,\)"),
        (bad(hyper=SIX.double()), "hyper is .*float64"),
        (bad(row=SIX.int()), r"hyper is \(6,\) .*expected \(H, 6\), as row"),
        (bad(row=SIX.long(), hyper=torch.ones(2, 6, device=DEVICE)), "row is .*expected contiguous .*int32"),
        (inputs(2, 3) | {"row": SIX.int()}, r"p is \(2, 3\) .*expected one dimension"),
    ],
)
@pytest.mark.parametrize("backend", backends_of(adam_update))
def test_bad_calls_are_refused(backend, args, says):
    with pytest.raises(ValueError, match=says):
        adam_update.checked(backend)(**args)


def test_cost():
    assert adam_update_cost((10,), torch.float32) == (130, 280)
    assert adam_update_cost((10,), torch.bfloat16)[1] == 160
    assert adam_update_cost((10,), torch.bfloat16, "master")[1] == 280


TO_EVEN = """from kernels.master import join_master, join_tile, split_master

@triton.jit
def split_tile(x):
    high = x.to(tl.bfloat16)
    bits = high.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return high, (x.to(tl.int32, bitcast=True) - bits).to(tl.int16)
"""
TRUNCATED = """from kernels.master import join_master, join_tile, split_master

@triton.jit
def split_tile(x):
    bits = x.to(tl.int32, bitcast=True)
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), (bits & 0xFFFF).to(tl.int16)
"""
IMPORT = "from kernels.master import join_master, join_tile, split_master, split_tile"
MUTATIONS = {
    "elements beyond n are written": {"mask = offs < n": "mask = offs < n + 1"},
    "the last element is missed": {"mask = offs < n": "mask = offs < n - 1"},
    "programs overlap": {"tl.int64) * BLOCK + tl": "tl.int64) * (BLOCK - 1) + tl"},
    "the betas are swapped": {"tl.load(h + 1), tl.load(h + 2)": "tl.load(h + 2), tl.load(h + 1)"},
    "the corrections are swapped": {"tl.load(h + 4), tl.load(h + 5)": "tl.load(h + 5), tl.load(h + 4)"},
    "the gradient is not squared": {"tl.fma((1.0 - beta2) * g, g,": "tl.fma((1.0 - beta2), g,"},
    "m is its old self": {"step = tl.div_rn(m,": "step = tl.div_rn(tl.load(m_ptr + offs, mask=mask).to(tl.float32),"},
    "eps is inside the root": {"tl.fma(tl.sqrt_rn(v), tl.sqrt_rn(c2), eps)": "tl.sqrt_rn(v * c2 + eps)"},
    "eps is a constant": {"tl.sqrt_rn(c2), eps)": "tl.sqrt_rn(c2), 1e-10)"},
    "the decay grows": {"tl.fma(-lr, weight_decay, 1.0)": "tl.fma(lr, weight_decay, 1.0)"},
    "the decay is forgotten": {"p * tl.fma(-lr, weight_decay, 1.0)": "p"},
    "a cautious decay is everywhere": {"tl.where(step * p > 0.0, -weight_decay, 0.0)": "-weight_decay"},
    "a cautious decay is elsewhere": {"step * p > 0.0": "step * p < 0.0"},
    "decay is always cautious": {"weight_decay < 0.0, cautious, weight": "weight_decay < 1.0, cautious, weight"},
    "the root is not corrected": {"tl.sqrt_rn(c2), eps": "c2, eps"},
    "every element takes the first row": {"hyper_ptr + 6 * tl.where(mask, row, 0)": "hyper_ptr + 0 * row"},
    "rows are five numbers long": {"hyper_ptr + 6 *": "hyper_ptr + 5 *"},
    "unknown rows are addressed": {"mask &= (row >= 0) & (row < rows)": "row = row % rows"},
    "low is not read": {"tl.load(low_ptr + offs, mask=mask))": "tl.load(low_ptr + offs, mask=mask) * 0)"},
    "low is not written": {"tl.store(low_ptr + offs, low, mask=mask)": "pass"},
    "a tie goes to even": {IMPORT: TO_EVEN},
    "a master is truncated": {IMPORT: TRUNCATED},
    "p is truncated": {
        "tl.store(p_ptr + offs, p.to(p_ptr.dtype.element_ty)": "p = (p.to(tl.int32, bitcast=True) & "
        "-65536).to(tl.float32, bitcast=True)\n"
        "        tl.store(p_ptr + offs, p.to(p_ptr.dtype.element_ty)"
    },
    "v is rounded before it is used": {
        "    step = ": "    v = v.to(v_ptr.dtype.element_ty).to(tl.float32)\n    step = "
    },
}
# one for each class of failure; the others run by `pytest -m mutations`
CLASSES = [
    "elements beyond n are written",
    "the last element is missed",
    "the corrections are swapped",
    "eps is inside the root",
    "every element takes the first row",
    "unknown rows are addressed",
    "low is not written",
    "a tie goes to even",
    "v is rounded before it is used",
]


@pytest.mark.skipif(DEVICE == "cuda", reason="a broken kernel may end the CUDA context of the other tests")
@pytest.mark.parametrize("name", mutations(MUTATIONS, always=CLASSES))
def test_a_broken_kernel_is_noticed(name, tmp_path):
    broken = mutant(module, MUTATIONS[name], tmp_path).adam_update
    with pytest.raises((Failed, AssertionError)):
        everything("triton", broken)


def everything(backend, op=adam_update):
    for dtype in DTYPES:
        check(inputs(2000, dtype=dtype), op, backend=backend)
    check(inputs(2000), op, master=True, backend=backend)
    check(inputs(60) | {"eps": 0.5}, op, backend=backend)
    check_cautious(backend, op)
    test_parameters_side_by_side(backend, op)
    test_bf16_states_are_rounded_once(backend, op)
    test_ties_go_away_from_zero_in_the_update(backend, op)


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
def test_a_copy_that_is_not_broken_passes(tmp_path):
    everything("triton", mutant(module, {"ADAM_EPS = ": "ADAM_EPS  = "}, tmp_path).adam_update)


def test_bf16_states_are_rounded_once(backend, op=adam_update):
    """They are those of an fp32 run on the same numbers, rounded."""
    args = inputs(3000, dtype=torch.bfloat16)
    exact = {name: t.float() for name, t in args.items()}
    op.backends[backend](**args)
    op.backends[backend](**exact)
    for name in States._fields:
        assert torch.equal(args[name], exact[name].bfloat16()), name


def test_inputs_between_guards_are_read_within(backend):
    args = {name: guarded(t) if t.dim() else t for name, t in inputs(33).items()}
    adam_update.backends[backend](**args)
    assert all(t.isfinite().all() for t in args.values())


# csrc/adam_update.cu


def test_many_tensors_at_a_time(backend, monkeypatch):
    """Of every type, more than a launch takes, one empty: the bits of one call each, by far fewer launches in CUDA."""

    def calls():
        made = []
        for i in range(36):
            dtype, moments = [(DTYPES[0], DTYPES[0]), DTYPES, (DTYPES[1], DTYPES[1])][i % 3]
            args = inputs(0 if i == 4 else 100 * i + 1, dtype=dtype, moments=moments, g=DTYPES[i % 2], seed=i)
            made.append(args | ({"low": args["p"].to(torch.int16)} if moments != dtype and i % 2 else {}))
        return made

    singly, together, counted = calls(), calls(), []
    for arguments in singly:
        adam_update.backends[backend](**arguments)
    call = extension.call
    monkeypatch.setattr(extension, "call", lambda *args, **options: counted.append(args) or call(*args, **options))
    adam_update.checked_many(backend)(together)
    assert len(counted) == (backend == "cuda")
    assert all(arguments["p"]._version == 1 for arguments in together)  # which autograd watches
    for one, other in zip(singly, together, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in (*States._fields, "low") if name in one)
    with pytest.raises(ValueError, match="adam_update: g is"):
        adam_update.checked_many(backend)([calls()[0], calls()[1] | {"g": torch.ones(3)}])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_that_begin_anywhere(dtype, backend):
    """At no multiple of 16 bytes: the bits of tensors that do."""
    aligned = inputs(2999, dtype=dtype)
    shifted = {name: torch.cat([t[:1], t])[1:] if name != "hyper" else t for name, t in aligned.items()}
    for args in (aligned, shifted):
        adam_update.backends[backend](**args)
    assert all(torch.equal(t, shifted[name]) for name, t in aligned.items())


def test_each_eps_has_its_launch(backend):
    one, other = inputs(50), inputs(50)
    adam_update.checked_many(backend)([one, other | {"eps": 0.5}])
    assert not torch.equal(one["p"], other["p"]) and torch.equal(one["exp_avg"], other["exp_avg"])


CUDA_MUTATIONS = {
    "the end of a tensor is a whole vector": {"t.wide && i + VEC <= t.n": "t.wide && i < t.n"},
    "the end of a tensor is left out": {
        "for (; i < t.n && i < begin + (threadIdx.x + 1) * VEC; ++i)": "for (; false;)"
    },
    "elements between chunks are left out": {"i < begin + CHUNK; i += THREADS": "i < begin + THREADS; i += THREADS"},
    "misaligned tensors are taken for aligned": {"by_16_bytes(t.p, t.low, t.g, t.exp_avg, t.exp_avg_sq)": "true"},
    "an unknown row is addressed": {"if (row >= 0 && row < t.rows) step": "step"},
    "every row is the first": {"t.hyper + 6 * row": "t.hyper"},
    "weight decay is dropped": {"__fmaf_rn(-h.lr, decay, 1.0f)": "1.0f"},
    "a cautious decay is everywhere": {"> 0.0f ? -h.weight_decay : 0.0f": "> 0.0f ? -h.weight_decay : -h.weight_decay"},
    "a cautious decay is elsewhere": {"__fmul_rn(change, p) > 0.0f": "__fmul_rn(change, p) < 0.0f"},
    "c2 is not under the root": {"__fsqrt_rn(h.c2)": "h.c2"},
    "eps is inside": {"__fmaf_rn(__fsqrt_rn(v), __fsqrt_rn(h.c2), eps)": "__fsqrt_rn(v * h.c2 + eps)"},
    "betas are swapped": {"1.0f - h.beta1, m)": "1.0f - h.beta2, m)"},
    "moments have the type of p": {"numbers(t.exp_avg, t.moment_dtype)": "numbers(t.exp_avg, t.p_dtype)"},
    "g has the type of p": {"numbers(t.g, t.g_dtype)": "numbers(t.g, t.p_dtype)"},
    "a block works on the next tensor": {"blockIdx.x - table.first[item]": "blockIdx.x"},
}
CUDA_CLASSES = [
    "the end of a tensor is a whole vector",
    "misaligned tensors are taken for aligned",
    "an unknown row is addressed",
    "moments have the type of p",
    "a block works on the next tensor",
]


@pytest.mark.skipif(DEVICE == "cuda", reason="emulated kernels only")
@pytest.mark.parametrize("name", mutations(CUDA_MUTATIONS, always=CUDA_CLASSES))
def test_a_broken_cuda_kernel_is_noticed(name, tmp_path, monkeypatch):
    broken = mutant_cuda("adam_update.cu", CUDA_MUTATIONS[name], tmp_path)
    monkeypatch.setattr(extension, "module", lambda device: broken)

    def check_all():
        check_cautious("cuda")
        test_tensors_that_begin_anywhere(torch.bfloat16, "cuda")
        everything("cuda")
        check(inputs(2001, dtype=torch.bfloat16, moments=torch.float32, g=torch.bfloat16), backend="cuda")
        test_many_tensors_at_a_time("cuda", monkeypatch)

    assert noticed(check_all)


MASTER_MUTATIONS = {
    "a tie goes to even": {"(bits + 0x8000u) >> 16": "(bits + 0x7fffu + (bits >> 16 & 1)) >> 16"},
    "a master is truncated": {"(bits + 0x8000u) >> 16": "bits >> 16"},
    "low is unsigned": {"std::int32_t{low}": "static_cast<std::uint16_t>(low)"},
    "fp32 weights have low bits": {"if (!low) return p.write(i, x);": "if (!low && p.half) return p.write(i, x);"},
    "low lies where p does": {"low + j) = rest": "low + i) = rest"},
}


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
@pytest.mark.parametrize("name", mutations(MASTER_MUTATIONS, always=["a tie goes to even"]))
def test_a_broken_master_is_noticed(name, tmp_path, monkeypatch):
    from tests import test_muon_update

    broken = mutant_cuda("redline.h", MASTER_MUTATIONS[name], tmp_path)
    monkeypatch.setattr(extension, "module", lambda device: broken)

    def check_all():
        everything("cuda")
        test_muon_update.test_rows_apart(False, "rows apart", "cuda")

    assert noticed(check_all)
