"""rms_norm: every form, layout and odd shape against float64, what is bitwise, what is refused, and that the tests
can fail."""

import functools
import itertools
from fractions import Fraction

import pytest
import torch

import kernels.rms_norm as module
from bench.law import poisoned_allocations
from kernels import extension
from kernels.fp8 import E4M3, E4M3_MAX, ROW_MULTIPLE
from kernels.rms_norm import AT_ONCE_N, CUDA_MAX_N, EPS, MAX_N, norm_scale, rms_norm, rms_norm_cost
from kernels.sizes import round_up
from tests.harness import DEVICE, LAYOUTS, Failed, RecordOps, check_op, mutant, mutant_cuda, noticed, randn
from tests.mutations import Edit, mutations

FACTOR = 1.25  # each result is rounded once, at its store
DTYPES = (torch.bfloat16, torch.float32)
SHAPES = ((5, 128), (3, 768), (37, 33), (2, 1100), (1, 1), (9, 8), (300, 20), (2, 3000))


def inputs(form, shape, dtype=torch.float32, seed=0):
    return rms_norm.forms[form](randn(seed, dtype), *shape)


def check(form, shape, dtype=torch.float32, op=rms_norm, **options):
    return check_op(op, inputs(form, shape, dtype), no_grad=("scale",), factor=FACTOR, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", rms_norm.forms)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(form, shape, dtype, backend):
    check(form, shape, dtype, backend=backend)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("form", rms_norm.forms)
def test_layouts(form, layout, backend):
    check(form, (11, 40), torch.bfloat16, layout=layout, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", ["a", "b"])
def test_one_coefficient_alone(given, dtype, backend):
    both = inputs("mix", (6, 50), dtype)
    one = {name: t for name, t in both.items() if name in ("x", "x0", given)}
    result = check_op(rms_norm, one, factor=FACTOR, backend=backend)
    assert f"d{given}" in result


@pytest.mark.parametrize(
    "form, upstream",
    [*itertools.product(["add", "mix", "mix3"], "yh"), ("mix3", "x0"), ("mix3_first", "first"), ("mix3_first", "y")],
)
def test_gradient_of_one_output_alone(form, upstream, backend):
    check(form, (7, 40), upstream_of=(upstream,), backend=backend)


@pytest.mark.parametrize("scalars", ["", "a", "b"])
def test_three_streams_with_one_coefficient_or_none(scalars, backend):
    wanted = ("x", "x0", "x1", *scalars)
    result = check_op(
        rms_norm,
        {name: inputs("mix3", (6, 50), torch.bfloat16)[name] for name in wanted},
        factor=FACTOR,
        backend=backend,
    )
    assert {f"d{name}" for name in wanted} <= result.keys() and ("x0" in result) == bool(scalars)


def chain(norm, x, x0, x1, a, b):
    """As layers use it: x is x0 first, then x0 is handed on; the last one hands it to nobody."""
    y, h, _, x0, first = norm(x0, x0, a, b, first=5)
    y, h, _, x0, _ = norm(x, x0, b, a, x1=h * y)
    z, h, *_ = norm(h, x0, None, b, x1=y)
    return norm(h, z, x1=x1).h, first


def check_chain(backend, *, compiler=None, **options):
    norm = rms_norm.backends[backend]
    streams = [t.requires_grad_() for t in (randn(seed, torch.float32)(3, 4, 40) for seed in range(3))]
    scalars = [torch.tensor(n, device=DEVICE, requires_grad=True) for n in (0.7, -1.3)]
    up = [randn(9, torch.float32)(3, 4, n) for n in (40, 5)]
    results = []
    for function in (norm, rms_norm.backends["ref"]):
        compiled = torch.compile(functools.partial(chain, function), backend=compiler, **options) if compiler else None
        for each in (function, compiled):
            if each is not None:
                out = each(*streams, *scalars) if each is not function else chain(function, *streams, *scalars)
                results.append([*out, *torch.autograd.grad(out, [*streams, *scalars], up)])
    for got in results[:-1]:
        for mine, want in zip(got, results[-1]):
            torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-4)


def test_a_chain_of_layers(backend):
    check_chain(backend)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_a_compiled_chain_of_layers_begins_with_one_tensor_twice(compiler, backend):
    torch.compiler.reset()
    check_chain(backend, fullgraph=True, dynamic=False, compiler=compiler)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_that_is_not_there_is_not_read(compiled, backend):
    args = inputs("mix3_first", (4, 40))
    leaves = {name: t.requires_grad_() if torch.is_tensor(t) else t for name, t in args.items()}

    def step(*wanted):
        out = rms_norm.backends[backend](**leaves)
        return [2 * getattr(out, name) for name in wanted]

    torch.compiler.reset()
    step = torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager") if compiled else step
    for wanted in (("y",), ("y", "h"), ("y", "h", "x0", "first")):
        outputs = step(*wanted)
        with RecordOps() as record:
            torch.autograd.backward(outputs, outputs)
        ((_, given, *_),) = record.calls
        assert [t is not None for t in given[1:4]] == [name in wanted for name in ("h", "first", "x0")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [1, 8, 16, 33, 64])
def test_the_first_channels_are_those_of_y(first, dtype, backend):
    args = inputs("mix3", (5, 70), dtype)
    out = rms_norm.backends[backend](**args, first=first)
    assert torch.equal(out.first, out.y[..., :first]) and out.first.untyped_storage() != out.y.untyped_storage()
    assert torch.equal(out.y, rms_norm.backends[backend](**args).y) and rms_norm.backends[backend](**args).first is None
    check_op(rms_norm, args | {"first": first}, factor=FACTOR, backend=backend)
    check_op(rms_norm, {"x": args["x"], "first": first}, factor=FACTOR, backend=backend)


def test_the_reference_is_the_sum_and_then_the_mix():
    ref, grads = rms_norm.backends["ref"], []
    args = inputs("mix3", (6, 50))
    for summed in (False, True):
        own = {name: t.detach().clone().requires_grad_() for name, t in args.items()}
        given = own if not summed else {**own, "x": own["x"] + own["x1"], "x1": None}
        out = ref(**given)
        head = (out.y * out.h.cos()).sum() + out.x0.sin().sum()
        grads.append([out.y, out.h, *torch.autograd.grad(head, list(own.values()))])
    assert all(map(torch.equal, *grads))
    plain = ref(args["x"])
    assert plain.x0 is None and plain.first is None and ref(args["x"], args["x0"]).x0 is None


@pytest.mark.parametrize("form", rms_norm.forms)
def test_torch_compile_and_opcheck(form, backend):
    check(form, (4, 32), torch.bfloat16, compiled=True, opcheck=True, backend=backend)


@pytest.mark.parametrize("form", rms_norm.forms)
def test_empty(form, backend):
    result = check(form, (0, 16), backend=backend)
    assert result["y"].shape == (0, 16)
    if form == "mix":
        assert result["da"].item() == 0


def test_leading_sizes_and_zero_rows(backend):
    x = torch.randn(2, 3, 5, 24, device=DEVICE)
    x[1, 2] = 0
    result = check_op(rms_norm, {"x": x}, factor=FACTOR, backend=backend)
    assert result["y"].shape == x.shape and not result["y"][1, 2].any()
    assert result["dx"][1, 2].isfinite().all()
    check_op(rms_norm, {"x": torch.randn(24, device=DEVICE)}, factor=FACTOR, backend=backend)


def test_heads_of_a_packed_projection(backend):
    """Rows that no single stride reaches, as q and k have in a packed projection."""
    packed = torch.randn(2, 6, 96, device=DEVICE)
    q = packed[..., :64].view(2, 6, 4, 16)
    assert not q.is_contiguous()
    want = rms_norm.backends["ref"](q).y
    torch.testing.assert_close(rms_norm.backends[backend](q).y, want)


@pytest.mark.parametrize("size", [1e-18, 1e-6, 1e4, 1e18])
def test_extreme_values(size, backend):
    x = torch.randn(8, 64, device=DEVICE) * size
    check_op(rms_norm, {"x": x}, factor=FACTOR, backend=backend)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_a_number_stays_one(backend):
    x = torch.randn(4, 32, device=DEVICE)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    y = rms_norm.backends[backend](x, x0=torch.zeros_like(x)).y
    q, q_t, _ = rms_norm.backends[backend](x, x0=torch.zeros_like(x), scale=torch.ones((), device=DEVICE)).fp8
    for normed in (y, q.float(), q_t.float().T[:4]):
        assert normed[1].isnan().all() and normed[2, 5].isnan() and normed[[0, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_y_is_the_norm_of_the_h_that_is_returned(dtype, backend):
    out = rms_norm.backends[backend](**inputs("mix", (33, 70), dtype))
    assert torch.equal(rms_norm.backends[backend](out.h).y, out.y)
    assert torch.equal(out.h, rms_norm.backends["ref"](**inputs("mix", (33, 70), dtype)).h) or dtype == torch.float32


# with scale: q, q_t and a placeholder

AT_ONCE = (1, 33, 96, 300, 700, 1600)  # columns of what one pass of the Triton kernel writes
IN_TWO = (AT_ONCE_N + 2, 3000)


def whole(M, N, dtype=torch.bfloat16):
    """Whole numbers whose sum x + x0 and whose squares' sum is exact: y does not depend on the order of that sum."""
    generator = torch.Generator().manual_seed(0)
    x, x0 = (torch.randint(-31, 32, (M, N), generator=generator).to(DEVICE, dtype) for _ in range(2))
    return {"x": x, "x0": x0}


def number(value):
    return torch.tensor(value, dtype=torch.float32, device=DEVICE)


def check_copies(out, y, scale):
    """q is y over scale, rounded to nearest and saturated; q_t is its transpose and then zeros; scale is what was
    given."""
    q, q_t, same = out.fp8
    y = y.flatten(0, -2)
    (M, N), columns = y.shape, round_up(y.size(0), ROW_MULTIPLE)
    want = (y.float() * (1 / scale)).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    assert same is scale and (q.dtype, q_t.dtype) == (E4M3, E4M3) and not q.requires_grad and not q_t.requires_grad
    assert q.shape == (M, N) and q_t.shape == (N, columns) and q.is_contiguous() and q_t.is_contiguous()
    assert torch.equal(q.view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(q_t.view(torch.uint8)[:, :M], q.view(torch.uint8).T) and not q_t.view(torch.uint8)[:, M:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [*AT_ONCE, *IN_TWO])
@pytest.mark.parametrize("M", [1, 15, 17, 33])
def test_the_fp8_copies_are_y_rounded_to_nearest_and_its_transpose(M, N, dtype, backend):
    args, norm = whole(M, N, dtype), rms_norm.backends[backend]
    y = norm(**args).y
    for value in (0.37, norm_scale(N), 1e-3):  # the last saturates
        scale = number(value)
        with poisoned_allocations():
            out = norm(**args, scale=scale)
        check_copies(out, y, scale)


def test_fp8_copies_of_leading_sizes_and_of_nothing(backend):
    norm, scale = rms_norm.backends[backend], number(0.1)
    x = whole(30, 24)["x"].view(2, 3, 5, 24)
    check_copies(norm(x, scale=scale), norm(x).y, scale)
    out = norm(x[:0], scale=scale)
    assert out.y.shape == (0, 3, 5, 24) and out.fp8.q.shape == (0, 24) and out.fp8.q_t.shape == (24, 0)
    assert norm(x).fp8 is None


@pytest.mark.parametrize("broken", [{"a": torch.nan}, {"b": torch.inf}, {"scale": 0.0}])
@pytest.mark.parametrize("N", [40, IN_TWO[0]])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_columns_beyond_the_rows_are_zeros_whatever_the_factors(N, broken, backend):
    factors = {"a": 1.0, "b": 1.0, "scale": 1.0} | broken
    factors = {name: number(value) for name, value in factors.items()}
    with poisoned_allocations():
        q_t = rms_norm.backends[backend](**whole(17, N), **factors).fp8.q_t
    assert not q_t.view(torch.uint8)[:, 17:].any()


@pytest.mark.parametrize("N", [1, 2, 768, 1536, 1664, 2048, 3000, 448**2 // 64])
def test_nothing_saturates_with_the_scale_of_a_norm(N, backend):
    """The largest y there is: a row whose size is all in one channel. At the last N it is the scale times 448."""
    x = torch.zeros(3, N, device=DEVICE, dtype=torch.bfloat16)
    x[0, 0], x[1, N // 2], x[2, -1] = 300, -1e10, 1e-3
    if N == 1:
        x[:] = torch.tensor([[300.0], [-7.0], [2.0]])
    scale, norm = number(norm_scale(N)), rms_norm.backends[backend]
    y = norm(x).y.float()
    largest = y.abs().max().item() / scale.item()
    assert E4M3_MAX / 2 < largest * 1.001 and largest <= E4M3_MAX
    q = norm(x, scale=scale).fp8.q.float()
    torch.testing.assert_close(q * scale, y, rtol=2**-4, atol=0)


def test_the_scale_of_a_norm_is_the_least_power_of_two_that_is_enough():
    assert norm_scale(448**2) == 1 and norm_scale(448**2 + 1) == 2 and norm_scale(1536) == 0.125
    for N in (*range(1, 5000), *(448**2 // 4**k + more for k in range(4) for more in (-1, 0, 1))):
        scale = Fraction(norm_scale(N))
        assert {scale.numerator, scale.denominator} & {1} and (scale.numerator * scale.denominator).bit_count() == 1
        assert (448 * scale) ** 2 >= N > (448 * scale / 2) ** 2


def saved_by(function):
    """What a call returns, and the sizes and dtypes of what it keeps for backward."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.shape, t.dtype)) or t, lambda t: t):
        return function(), kept


@pytest.mark.parametrize("N", [40, IN_TWO[0]])
@pytest.mark.parametrize("form", ["plain", "add", "mix3"])
def test_the_placeholder_has_the_gradient_of_y_and_no_storage(form, N, backend):
    """And nothing else that backward has: what is kept and what comes out are those of y in its dtype, in every bit."""
    norm, factor = rms_norm.backends[backend], number(2.0)
    streams = whole(6, N)
    args = {"plain": {"x": streams["x"]}, "add": streams, "mix3": streams | {"x1": -streams["x0"], "a": factor}}[form]
    results, kept = [], []
    for options in ({}, {"scale": number(0.1)}):
        leaves = {name: t.detach().clone().requires_grad_() for name, t in args.items()}
        out, saved = saved_by(functools.partial(norm, **leaves, first=7, **options))
        wanted = [out.y, out.first, *(() if form == "plain" else (out.h,)), *(() if out.x0 is None else (out.x0,))]
        up = [randn(seed, torch.bfloat16)(*t.shape) for seed, t in enumerate(wanted)]
        results.append([out.first, out.h, *torch.autograd.grad(wanted, list(leaves.values()), up)])
        kept.append(saved)
    for got, want in zip(*results):
        assert (got is None and want is None) or torch.equal(got, want)
    assert kept[0] == kept[1]
    assert out.y.shape == (6, N) and out.y.dtype == torch.bfloat16 and out.y.isnan().all()
    assert out.y.untyped_storage().nbytes() == out.y.itemsize


def test_the_reference_hands_out_no_y_either():
    args = whole(5, 20)
    out, plain = (rms_norm.backends["ref"](**args, first=3, **options) for options in ({"scale": number(0.1)}, {}))
    assert out.y.isnan().all() and torch.equal(out.first, plain.first) and torch.equal(out.h, plain.h)
    check_copies(out, plain.y, out.fp8.scale)


class Product(torch.autograd.Function):
    """As a linear layer in fp8 takes what it multiplies: the numbers from q, the gradient to y."""

    @staticmethod
    def forward(ctx, y, q, q_t, scale):
        ctx.save_for_backward(q_t)
        return (q.float() * scale).to(y.dtype)

    @staticmethod
    def backward(ctx, dy):
        (q_t,) = ctx.saved_tensors
        return dy * q_t.float().T[: dy.size(0)].sign().to(dy.dtype), None, None, None


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_product_takes_the_copies(compiler, dynamic, backend):
    def layer(x, x0, scale):
        out = rms_norm.backends[backend](x, x0, scale=scale, first=4)
        return Product.apply(out.y, *out.fp8), out.first, out.h

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=compiler)
    for M in (5, 17):
        args, results = whole(M, 40), []
        for function in (layer, compiled):
            x, x0 = (t.detach().clone().requires_grad_() for t in args.values())
            out = function(x, x0, number(norm_scale(40)))
            results.append([*out, *torch.autograd.grad(out, [x, x0], [3 * t.detach() + 1 for t in out])])
        assert all(map(torch.equal, *results)) and results[0][-1].isfinite().all()


def test_rows_beyond_a_program(backend):
    """Many programs, whose partial sums of da and db come together."""
    result = check("mix", (200, 40), torch.bfloat16, backend=backend)
    assert result["da"].dtype == torch.float32


def test_the_longest_rows_and_many_short_ones(backend):
    longest = {"triton": MAX_N, "cuda": CUDA_MAX_N}[backend]
    wide, many = randn(0, torch.float32)(1, longest), randn(0, torch.float32)(5000, 8)
    check_op(rms_norm, {"x": wide}, factor=FACTOR, backend=backend)
    check_op(
        rms_norm,
        {"x": many, "x0": many.flip(0), "scale": torch.ones((), device=DEVICE)},
        factor=FACTOR,
        no_grad=("scale",),
        backend=backend,
    )


def test_rows_more_than_two_billion_elements_apart(backend):
    """Memory that is only asked for, and touched in three rows."""
    stride = 2**30
    x = torch.empty(2 * stride + 64, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 64), (stride, 1))
    x.copy_(torch.randn(3, 64))
    assert torch.equal(rms_norm.backends[backend](x).y, rms_norm.backends[backend](x.contiguous()).y)


def test_eps(backend):
    x = torch.randn(4, 32, device=DEVICE)
    check_op(rms_norm, {"x": x, "eps": 0.1}, factor=FACTOR, backend=backend)
    check_op(rms_norm, {"x": x, "x0": x.flip(0), "eps": 0.1}, factor=FACTOR, backend=backend)


def test_gradients_are_rounded_once(backend):
    """h = 3 x is exact for these x: what is left is the rounding of each result."""
    x = torch.randint(-63, 64, (40, 48), generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    three, five = (torch.tensor(n, device=DEVICE) for n in (3.0, 5.0))
    args = {"x": x, "x0": torch.zeros_like(x), "a": three, "b": five}
    check_op(rms_norm, args, rounded_once=("y", "h", "dx", "dx0"), backend=backend)
    check_op(rms_norm, {"x": x}, rounded_once=("y", "dx"), backend=backend)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(x=torch.ones(2, 4, dtype=torch.float16)), "expected .* bfloat16 or float32"),
        (dict(x=torch.ones(2, 0)), "1 <= N"),
        (dict(x=torch.ones(())), "expected"),
        (dict(x=torch.ones(2, 4), a=torch.ones(())), "give x0"),
        (dict(x=torch.ones(2, 4), x1=torch.ones(2, 4)), "x1 is the third stream of a sum; give x0"),
        (dict(x=torch.ones(2, 4), x0=torch.ones(2, 4), x1=torch.ones(2, 5)), r"x1 is \(2, 5\)"),
        (dict(x=torch.ones(2, 4), first=5), "first is 5; expected 0 to 4 of the 4 channels"),
        (dict(x=torch.ones(2, 70), first=65), "first is 65"),
        (dict(x=torch.ones(2, 4), first=-1), "first is -1"),
        (dict(x=torch.ones(2, 4), x0=torch.ones(2, 5)), r"x0 is \(2, 5\)"),
        (dict(x=torch.ones(2, 4), x0=torch.ones(2, 4).bfloat16()), "x0 is"),
        (dict(x=torch.ones(2, 4), x0=torch.ones(2, 4), b=torch.ones(2)), r"b is \(2,\)"),
        (dict(x=torch.ones(2, 4), scale=torch.ones((), dtype=torch.float64)), "scale is"),
    ],
)
@pytest.mark.parametrize("call", [rms_norm, *map(rms_norm.checked, rms_norm.backends)], ids=["op", *rms_norm.backends])
def test_bad_calls_are_refused(call, change, says):
    with pytest.raises(ValueError, match=says):
        call(**change)


def test_csrc_refuses_tensors_that_are_not_there(cuda):
    sizes = {"M": 2, "N": 4, "padded_first": 0, "eps": 0.1, "dtype": torch.float32}
    tensors = dict.fromkeys(("x", "x0", "x1", "a", "b", "scale", "y", "h", "rstd", "q", "first"))
    strides = dict.fromkeys(("stride_x", "stride_x0", "stride_x1"), 4)
    x, one = torch.ones(2, 4, device=DEVICE), number(1.0)
    for there, says in (
        ({"x": x}, "a tensor that is always needed is not there"),
        ({"x": x, "rstd": x, "scale": one, "y": x}, "scale and q come together, else y does"),
        ({"x": x, "rstd": x, "scale": one, "q": x, "y": x}, "scale and q come together, else y does"),
        ({"x": x, "rstd": x}, "scale and q come together, else y does"),
    ):
        with pytest.raises(ValueError, match=f"rms_norm_forward: {says}"):
            extension.call("rms_norm_forward", x, **{**tensors, **there, **strides, **sizes})


@pytest.mark.parametrize("kernel, most", [("triton", MAX_N), ("cuda", CUDA_MAX_N)])
def test_the_kernels_refuse_what_they_cannot_take(kernel, most):
    tall = torch.ones(1, most + 1)
    for x, says in ((torch.ones(2, 4).double(), "takes bfloat16 and float32"), (tall, f"not {most + 1}")):
        with pytest.raises(ValueError, match=says):
            rms_norm.checked(kernel)(x)
        assert rms_norm.checked("ref")(x).y.dtype == x.dtype


@pytest.mark.skipif(DEVICE == "cuda", reason="pretends to compile for another GPU")
def test_an_older_gpu_is_told_that_it_has_no_fp8(monkeypatch):
    from kernels import op

    monkeypatch.setattr(op, "COMPILED_FOR", (8, 0))
    op.capability.cache_clear()
    x = torch.ones(2, 16)
    try:
        with pytest.raises(ValueError, match="needs a GPU of compute capability 8.9 or newer, not 8.0"):
            rms_norm.backends["triton"](x, scale=torch.ones(()))
        rms_norm.backends["triton"](x)
    finally:
        op.capability.cache_clear()


def test_the_gradient_has_no_gradient(backend):
    x = torch.randn(2, 8, device=DEVICE, requires_grad=True)
    (dx,) = torch.autograd.grad(rms_norm.backends[backend](x).y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dx.sum().backward()


def test_cost():
    assert rms_norm_cost((10, 100), torch.bfloat16) == (3000, 4000)
    assert rms_norm_cost((10, 100), torch.bfloat16, "add", backward=True)[1] == 8000
    assert rms_norm_cost((10, 100), torch.float32, "mix_fp8") == (7000, 14000)  # q and q_t instead of y
    assert rms_norm_cost((10, 100), torch.bfloat16, "mix_fp8", backward=True)[1] == 14000
    assert rms_norm_cost((10, 100), torch.bfloat16, "mix", backward=True)[1] == 14000
    for backward, tensors in ((False, 5), (True, 8)):
        assert rms_norm_cost((10, 100), torch.bfloat16, "mix3", backward)[1] == 2000 * tensors
        for form in ("mix3_first", "mix3_fp8"):  # two copies in fp8 are as many bytes as y in bf16
            assert rms_norm_cost((10, 100), torch.bfloat16, form, backward)[1] == 2000 * tensors + 10 * 12 * 2


MUTATIONS = {
    "columns beyond N are read": {"mask = mask_m[:, None] & (offs_n < N)[None, :]": "mask = mask_m[:, None]"},
    "rows beyond M are written": {"mask_m = offs_m < M": "mask_m = offs_m < M + 1"},
    "the mean is over the tile": {"tl.sum(squares, axis=1) / N": "tl.sum(squares, axis=1) / BLOCK_N"},
    "eps is forgotten": {"axis=1) / N + eps)": "axis=1) / N)"},
    "the upstream gradient is one": {"(dy - xhat * (tl.sum(dy * xhat": "(1.0 - xhat * (tl.sum(xhat"},
    "the upstream gradient of h is dropped": {"    if HAS_DH:\n": "    if False:\n"},
    "the mean of the gradient is dropped": {"* (tl.sum(dy * xhat, axis=1) / N)[:, None]": "* 0.0"},
    "da misses the last program": {"else da.sum()": "else da[:-1].sum()"},
    "a is not in dx": {"dx = g * tl.load(a_ptr)": "dx = g"},
    "b is not in dx0": {"dx0 = g * tl.load(b_ptr)": "dx0 = g"},
    "h is not rounded before the norm": {
        "h = stored.to(tl.float32)": "h = _mix(h, x0, a_ptr, b_ptr, HAS_A, HAS_B) * 1.01"
    },
    "y is truncated": {
        "y = (chunks[chunk] * rstd[:, None]).to(": "y = ((chunks[chunk] * rstd[:, None]).to(tl.int32, "
        "bitcast=True) & -65536).to(tl.float32, bitcast=True).to("
    },
    "the scale is inverted": {"inverse = tl.div_rn(1.0, tl.load(scale_ptr))": "inverse = tl.load(scale_ptr)"},
    "q is of the unrounded y": {"clamped(y.to(tl.float32) *": "clamped(chunks[chunk] * rstd[:, None] *"},
    "q loses NaN": {
        "q = clamped(y.to(tl.float32) * inverse, fp8_max)": "q = tl.maximum(tl.minimum(y.to(tl.float32) * "
        "inverse, fp8_max), -fp8_max)"
    },
    "every chunk is the first": {"y = (chunks[chunk] *": "y = (chunks[0] *"},
    "squares of later chunks are left out": {"tl.static_range(CHUNKS - 1)": "tl.static_range(0)"},
    "q_t has what is beyond the rows": {"q = tl.where(mask_m[:, None], q, 0.0)": "pass"},
    "q_t ends with the rows": {"(offs_m < columns_t)[None, :]": "mask_m[None, :]"},
    "rows of q_t follow each other": {"offs_n[:, None].to(tl.int64) * columns_t": "offs_n[:, None].to(tl.int64) * M"},
    "q_t is not made of long rows": {"if M and fp8 and not at_once:": "if False:"},
    "first is not that of the first chunk": {"if PADDED_FIRST > chunk * BLOCK_N:": "if PADDED_FIRST and chunk == 1:"},
    "x0 has the stride of x": {"* stride_x0_row": "* stride_x_row"},
    "dh has the stride of dy": {"* stride_dh_row": "* stride_dy_row"},
    "eps is a constant": {"/ N + eps)": "/ N + 1.1920928955078125e-07)"},
    "rows end early": {"mask_m = offs_m < M": "mask_m = (offs_m < M) & (offs_m < 1000)"},
    "columns end early": {"(offs_n < N)[None, :]": "((offs_n < N) & (offs_n < 2048))[None, :]"},
    "b alone is a little off": {"tl.fma(x0, b, x)": "tl.fma(x0, b, x) * 1.0001"},
    "dx is rounded twice": {" dx = g\n": " g = g.to(dx_ptr.dtype.element_ty).to(tl.float32); dx = g\n"},
    "rstd is not written": {"tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)": "pass"},
    "x1 is left out of da": [
        Edit(
            r"da \+= g \* x\b", "da += g * (x - (tl.load(x1_ptr + offs_x1, mask=mask).to(tl.float32) if HAS_X1 else 0))"
        )
    ],
    "x1 is forgotten backward": [Edit(r"x \+= tl.load\(x1_ptr", "x += 0 * tl.load(x1_ptr")],
    "x1 has the stride of x": {"* stride_x1_row": "* stride_x_row"},
    "x + x1 is rounded": {
        "h += tl.load(x1_ptr + offs_x1, mask=mask, other=0.0).to(tl.float32)": "h = (h + tl.load(x1_ptr + offs_x1, "
        "mask=mask, other=0.0).to(tl.float32)).to(x_ptr.dtype.element_ty).to(tl.float32)"
    },
    "what arrives at x0 is dropped": {"dx0 += tl.load(dx0_in_ptr": "dx0 += 0 * tl.load(dx0_in_ptr"},
    "what arrives at x0 is scaled": {
        "                dx0 += tl.load(dx0_in_ptr": "                dx0 += tl.load(b_ptr) * tl.load(dx0_in_ptr"
    },
    "dx0_in has the stride of dy": {"* stride_dx0_in_row": "* stride_dy_row"},
    "dfirst reaches further than its channels": {"mask & (offs_n < FIRST)[None, :]": "mask"},
    "dfirst comes after the norm": {
        "g += tl.load(dh_ptr": "g += dy - dy1 + tl.load(dh_ptr",
        "        if FIRST:\n": "        dy1 = dy\n        if FIRST:\n",
    },
    "rows of dfirst follow each other": {"* stride_dfirst_row": "* FIRST"},
    "every tile is the first": {"* BLOCK_TILES + tile)": "* BLOCK_TILES)"},
    "da is of the last tile": {"da += g * x": "da = g * x"},
    "a stride is forgotten": {
        "tl.load(dy_ptr + offs_m[:, None] * stride_dy_row": "tl.load(dy_ptr + offs_m[:, None] * N"
    },
}
# one for each class of failure; the others run by `pytest -m mutations`
CLASSES = [
    "columns beyond N are read",
    "rows beyond M are written",
    "the upstream gradient is one",
    "da misses the last program",
    "y is truncated",
    "the scale is inverted",
    "squares of later chunks are left out",
    "q_t has what is beyond the rows",
    "q_t ends with the rows",
    "x0 has the stride of x",
    "eps is a constant",
    "columns end early",
    "x1 is forgotten backward",
    "what arrives at x0 is dropped",
    "dfirst reaches further than its channels",
    "every tile is the first",
]


@pytest.mark.skipif(DEVICE == "cuda", reason="a broken kernel may end the CUDA context of the other tests")
@pytest.mark.parametrize("name", mutations(MUTATIONS, always=CLASSES))
def test_a_broken_kernel_is_noticed(name, tmp_path, monkeypatch):
    broken = mutant(module, MUTATIONS[name], tmp_path).rms_norm
    monkeypatch.setattr(f"{__name__}.rms_norm", broken)
    with pytest.raises((Failed, AssertionError)):
        for layout in LAYOUTS:
            check("mix3_fp8", (21, 300), torch.bfloat16, op=broken, layout=layout)
            check("mix_fp8", (21, 40), torch.bfloat16, op=broken, layout=layout)
            check("mix3_first", (21, 40), torch.bfloat16, op=broken, layout=layout)
        check("mix3_first", (7, 600), op=broken)
        small = inputs("plain", (4, 40))
        check_op(broken, {"x": small["x"] * 1e-4}, factor=FACTOR)
        everything("triton")


def everything(backend):
    """What the mutations go through besides."""
    test_one_coefficient_alone("b", torch.float32, backend)
    test_eps(backend)
    test_gradients_are_rounded_once(backend)
    test_the_longest_rows_and_many_short_ones(backend)
    test_what_is_not_a_number_stays_one(backend)
    test_columns_beyond_the_rows_are_zeros_whatever_the_factors(40, {"a": torch.nan}, backend)
    test_the_placeholder_has_the_gradient_of_y_and_no_storage("mix3", 40, backend)
    for N in (300, IN_TWO[0]):
        test_the_fp8_copies_are_y_rounded_to_nearest_and_its_transpose(17, N, torch.bfloat16, backend)


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
def test_a_copy_that_is_not_broken_passes(tmp_path):
    same = mutant(module, {"EPS = ": "EPS  = "}, tmp_path).rms_norm
    check("mix_fp8", (21, 40), torch.bfloat16, op=same)
    assert same.backends["triton"] is not rms_norm.backends["triton"]
    with pytest.raises(ValueError, match="has no 'no such text'"):
        mutant(module, {"no such text": ""}, tmp_path)


def test_eps_is_torch_s_own():
    assert EPS == torch.finfo(torch.float32).eps


# csrc/rms_norm.cu

CUDA_MUTATIONS = {
    "columns beyond N are read": {"if (column >= p.N) continue;\n        load(": "load("},
    "rows beyond M are written": {"if (row >= p.M) return;": "if (row > p.M) return;"},
    "the mean is over the team": {
        "static_cast<float>(p.N)) + p.eps": "static_cast<float>(team.threads * ELEMENTS)) + p.eps"
    },
    "eps is forgotten": {"static_cast<float>(p.N)) + p.eps": "static_cast<float>(p.N))"},
    "h is not rounded before the norm": {"round_all<T>(h[i]);  // the norm is": "// the norm is"},
    "the fp8 copy is of the unrounded y": {"round_all<T>(h[i]);  // q is": "// q is"},
    "the scale is inverted": {"p.scale ? __frcp_rn(*p.scale)": "p.scale ? *p.scale"},
    "y is stored beside q": {"if (p.y) store(p.y": "store(p.y ? p.y : p.h"},
    "the fp8 copy loses NaN": {"h[i][j] *= inverse;": "h[i][j] = fmaxf(h[i][j] * inverse, -E4M3_MAX);"},
    "x0 has the stride of x": {"p.x0 + row * p.stride_x0": "p.x0 + row * p.stride_x"},
    "x1 has the stride of x": {"p.x1 + row * p.stride_x1": "p.x1 + row * p.stride_x"},
    "dh has the stride of dy": {"p.dh + row * p.stride_dh": "p.dh + row * p.stride_dy"},
    "dx0_in is dropped": {"dx0[j] += more[j]": "dx0[j] += 0.0f * more[j]"},
    "dfirst reaches further than its channels": {"if (column + j < p.first)": "if (p.first)"},
    "rows of dfirst follow each other": {"row * p.stride_dfirst": "row * p.first"},
    "first has the rows of y": {"p.first + row * p.padded_first": "p.first + row * p.N"},
    "the upstream gradient of h is dropped": {"if (p.dh) g += more[j];": ""},
    "the mean of the gradient is dropped": {"(h * rstd) * mean)": "(h * rstd) * 0.0f)"},
    "a is not in dx": {"dx[j] = g * factors.a": "dx[j] = g"},
    "da is of x alone": {"da += g * sum": "da += g * to_float(x[i].at[j])"},
    "a team's last row is left out": {"r < ROWS_OF_TEAM; ++r": "r < ROWS_OF_TEAM - 1; ++r"},
    "the mix is a little off": {"__fmaf_rn(x, a, __fmul_rn(b, x0))": "__fmaf_rn(x, a, __fmul_rn(b, x0)) * 1.0001f"},
    "odd rows are taken for aligned": {"N % WIDE<T> == 0 && by_16_bytes(x, x0": "true || by_16_bytes(x, x0"},
    "odd rows are taken for aligned backward": {"N % WIDE<T> == 0 && by_16_bytes(dy": "true || by_16_bytes(dy"},
    "the fp8 copy is stored twice as far": {"p.q + row * p.N": "p.q + row * 2 * p.N"},
}
CUDA_CLASSES = [
    "columns beyond N are read",
    "rows beyond M are written",
    "the fp8 copy is of the unrounded y",
    "dh has the stride of dy",
    "odd rows are taken for aligned",
    "a team's last row is left out",
]


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
@pytest.mark.parametrize("name", mutations(CUDA_MUTATIONS, always=CUDA_CLASSES))
def test_a_broken_cuda_kernel_is_noticed(name, tmp_path, monkeypatch):
    broken = mutant_cuda("rms_norm.cu", CUDA_MUTATIONS[name], tmp_path)
    monkeypatch.setattr("kernels.extension.module", lambda device: broken)

    def check_all():
        for layout in LAYOUTS:
            check("mix_fp8", (21, 40), torch.bfloat16, layout=layout, backend="cuda")
            check("mix3_first", (21, 40), torch.bfloat16, layout=layout, backend="cuda")
        check("mix3_first", (7, 600), backend="cuda")
        check("mix", (9, 33), backend="cuda")
        check_op(rms_norm, {"x": inputs("plain", (4, 40))["x"] * 1e-4}, factor=FACTOR, backend="cuda")
        test_y_is_the_norm_of_the_h_that_is_returned(torch.bfloat16, "cuda")
        everything("cuda")

    assert noticed(check_all)
