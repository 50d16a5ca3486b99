"""rms_norm: every form, layout and odd shape against float64, what is bitwise, what is refused, and that the tests
can fail."""

import functools
import itertools

import pytest
import torch

import kernels.rms_norm as module
from kernels import extension
from kernels.fp8 import E4M3, E4M3_MAX
from kernels.rms_norm import CUDA_MAX_N, EPS, MAX_N, rms_norm, rms_norm_cost
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
    y, h, _, _, x0, first = norm(x0, x0, a, b, first=5)
    y, h, _, _, x0, _ = norm(x, x0, b, a, x1=h * y)
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
    scale = torch.ones((), device=DEVICE)
    out = rms_norm.backends[backend](x, x0=torch.zeros_like(x), scale=scale)
    assert out.y[1].isnan().all() and out.y[2, 5].isnan() and out.y[[0, 3]].isfinite().all()
    assert out.y_fp8.float()[1].isnan().all() and out.amax.isinf()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_y_is_the_norm_of_the_h_that_is_returned(dtype, backend):
    out = rms_norm.backends[backend](**inputs("mix", (33, 70), dtype))
    assert torch.equal(rms_norm.backends[backend](out.h).y, out.y)
    assert torch.equal(out.h, rms_norm.backends["ref"](**inputs("mix", (33, 70), dtype)).h) or dtype == torch.float32


def test_the_fp8_copy_is_y_rounded_to_nearest(backend):
    args = inputs("mix_fp8", (40, 96), torch.bfloat16)
    for scale in (0.37, 3.0, 1e-3):  # the last saturates
        out = rms_norm.backends[backend](**{**args, "scale": torch.tensor(scale, device=DEVICE)})
        want = (out.y.float() * (1 / torch.tensor(scale, device=DEVICE))).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
        assert torch.equal(out.y_fp8.view(torch.uint8), want.view(torch.uint8))
        assert out.amax == out.y.float().abs().max()
        negative = rms_norm.backends[backend](-args["x"], -args["x0"], args["a"], args["b"], scale=args["scale"])
        assert negative.amax == out.amax
    assert not out.y_fp8.requires_grad and not out.amax.requires_grad


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
    tensors = dict.fromkeys(("x", "x0", "x1", "a", "b", "scale", "y", "h", "rstd", "y_fp8", "row_amax", "first"))
    strides = dict.fromkeys(("stride_x", "stride_x0", "stride_x1"), 4)
    x = torch.ones(2, 4, device=DEVICE)
    with pytest.raises(ValueError, match="rms_norm_forward: a tensor that is always needed is not there"):
        extension.call("rms_norm_forward", x, **{**tensors, "x": x, **strides, **sizes})


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
    assert rms_norm_cost((10, 100), torch.float32, "mix_fp8")[1] == 17000
    assert rms_norm_cost((10, 100), torch.bfloat16, "mix", backward=True)[1] == 14000
    for backward, tensors in ((False, 5), (True, 8)):
        assert rms_norm_cost((10, 100), torch.bfloat16, "mix3", backward)[1] == 2000 * tensors
        assert rms_norm_cost((10, 100), torch.bfloat16, "mix3_first", backward)[1] == 2000 * tensors + 10 * 12 * 2


MUTATIONS = {
    "columns beyond N are read": {"mask = mask_m[:, None] & (offs_n < N)[None, :]": "mask = mask_m[:, None]"},
    "rows beyond M are written": {"mask_m = offs_m < M": "mask_m = offs_m < M + 1"},
    "the mean is over the tile": {"tl.sum(h * h, axis=1) / N": "tl.sum(h * h, axis=1) / BLOCK_N"},
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
        "y = (h * rstd[:, None]).to(y_ptr.dtype.element_ty)": "y = ((h * rstd[:, None]).to(tl.int32, "
        "bitcast=True) & -65536).to(tl.float32, bitcast=True).to(y_ptr.dtype.element_ty)"
    },
    "the scale is inverted": {"y * tl.div_rn(1.0, tl.load(scale_ptr))": "y * tl.load(scale_ptr)"},
    "x0 has the stride of x": {"* stride_x0_row": "* stride_x_row"},
    "dh has the stride of dy": {"* stride_dh_row": "* stride_dy_row"},
    "eps is a constant": {"/ N + eps)": "/ N + 1.1920928955078125e-07)"},
    "rows end early": {"mask_m = offs_m < M": "mask_m = (offs_m < M) & (offs_m < 1000)"},
    "columns end early": {"(offs_n < N)[None, :]": "((offs_n < N) & (offs_n < 2048))[None, :]"},
    "b alone is a little off": {"tl.fma(x0, b, x)": "tl.fma(x0, b, x) * 1.0001"},
    "dx is rounded twice": {" dx = g\n": " g = g.to(dx_ptr.dtype.element_ty).to(tl.float32); dx = g\n"},
    "amax has a sign": {"tl.where(y == y, tl.abs(y)": "tl.where(y == y, -y"},
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
    "the fp8 copy is of the unrounded y": {"round_all<T>(h[i]);  // the fp8": "// the fp8"},
    "the scale is inverted": {"p.scale ? __frcp_rn(*p.scale)": "p.scale ? *p.scale"},
    "amax has a sign": {"? fabsf(h[i][j]) : INFINITE": "? h[i][j] : INFINITE"},
    "NaN is not in amax": {"h[i][j] == h[i][j] ? fabsf(h[i][j]) : INFINITE": "fabsf(h[i][j])"},
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
    "the fp8 copy is stored twice as far": {"p.y_fp8 + row * p.N": "p.y_fp8 + row * 2 * p.N"},
}
CUDA_CLASSES = [
    "columns beyond N are read",
    "rows beyond M are written",
    "NaN is not in amax",
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
        test_what_is_not_a_number_stays_one("cuda")
        test_y_is_the_norm_of_the_h_that_is_returned(torch.bfloat16, "cuda")
        test_the_fp8_copy_is_y_rounded_to_nearest("cuda")
        everything("cuda")

    assert noticed(check_all)
