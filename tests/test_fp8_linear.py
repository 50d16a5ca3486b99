"""fp8_linear against float64 of the same rounded operands, with ragged rows and layouts; scales, saturation and what is
not finite; weight gradients added to a sum; what is saved and multiplied; refusals; a small model; mutations."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

import kernels.fp8_linear as module
from bench.law import FACTOR, error, fill_dynamo_tables, poisoned_allocations
from kernels import fp8, fp8_products, gemm
from kernels.fp8 import E4M3, E4M3_MAX, E5M2, E5M2_MAX, TINY_SCALE, Site, amax_scale, fp8_copy, fp8_rows
from kernels.fp8_linear import fp8_linear, fp8_linear_cost
from kernels.op import Device, UserError
from kernels.sizes import round_up
from tests.harness import CUDA, DEVICE, LAYOUTS, Failed, check_op, mutant, randn
from tests.mutations import mutations

# on a GPU sums of y are those of its tensor cores: no law of fp32 holds for them
DTYPES = (torch.bfloat16, torch.float32) if DEVICE == "cpu" else (torch.bfloat16,)
ONCE = 1.25 if DEVICE == "cpu" else FACTOR  # where sums are fp32, results are as exact as one rounding leaves them
SHAPES = ((5, 16, 32), (130, 32, 272), (257, 80, 128), (700, 16, 48))  # M, K, N: within a tile, ragged, long sums
FORMS = pytest.mark.parametrize("form", fp8_linear.forms)
KERNELS = pytest.mark.parametrize("backend", ["triton", "scaled_mm", CUDA])

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < fp8.FP8_CAPABILITY, reason="no fp8"
)


def inputs(shape, form="sum", dtype=torch.bfloat16, seed=0):
    return fp8_linear.forms[form](randn(seed, dtype), *shape)


def leaf(t):
    return t.detach().clone().requires_grad_()


def leaves(args):
    return args | {"x": leaf(args["x"]), "w": leaf(args["w"])}


# the law ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@FORMS
def test_agrees_with_float64(form, shape, dtype, backend):
    result = check_op(fp8_linear, inputs(shape, form, dtype), backend=backend, factor=ONCE)
    assert ("dw" in result) == (form == "plain") and ("dw_sum" in result) == (form != "plain")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@FORMS
def test_scaled_mm_agrees_with_float64(form, shape):
    check_op(fp8_linear, inputs(shape, form), backend="scaled_mm", factor=ONCE)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@KERNELS
def test_layouts(backend, layout):
    check_op(fp8_linear, inputs((21, 32, 48)), backend=backend, layout=layout, factor=ONCE)


@FORMS
@KERNELS
def test_torch_compile_and_opcheck(backend, form):
    check_op(fp8_linear, inputs((9, 16, 32), form), backend=backend, compiled=True, opcheck=True, factor=ONCE)


@KERNELS
def test_leading_sizes_and_no_rows(backend):
    args = inputs((24, 16, 32))
    result = check_op(fp8_linear, args | {"x": args["x"].view(2, 3, 4, 16)}, backend=backend, factor=ONCE)
    assert result["y"].shape == (2, 3, 4, 32) and result["dx"].shape == (2, 3, 4, 16)
    result = check_op(fp8_linear, args | {"x": args["x"][0]}, backend=backend, factor=ONCE)
    assert result["y"].shape == (32,)
    result = check_op(fp8_linear, args | {"x": args["x"][:0]}, backend=backend)
    assert torch.equal(result["dw_sum"], args["dw_sum"])
    result = check_op(fp8_linear, inputs((24, 16, 32), "plain") | {"x": args["x"][:0]}, backend=backend)
    assert result["y"].shape == (0, 32) and not result["dw"].any()


@KERNELS
def test_an_upstream_gradient_that_is_one_number(backend):
    """That of a sum has strides of 0."""
    args = inputs((21, 32, 48), "plain")
    results = []
    for b in ("ref", backend):
        x, w = leaf(args["x"]), leaf(args["w"])
        fp8_linear.backends[b](x, w, args["fp8"]).sum().backward()
        results.append((x.grad.double(), w.grad.double()))
    assert all(error(got, want) < 0.005 for want, got in zip(*results))


@pytest.mark.parametrize("fixed", [("x",), ("w",), ("x", "w")], ids=str)
def test_some_inputs_have_no_gradient(fixed):
    check_fixed(fp8_linear, fixed)


def check_fixed(op, fixed):
    """A weight that is fixed leaves its sum alone."""
    args = inputs((9, 16, 32))
    result = check_op(op, args, no_grad=fixed, factor=ONCE)
    assert torch.equal(result.get("dw_sum", args["dw_sum"]), args["dw_sum"]) == ("w" in fixed)
    assert ("dx" in result) == ("x" not in fixed) and "dw" not in result


# the formula, written once more -------------------------------------------


def rounded(t, limit, dtype, scale=None):
    """t through an fp8 type, in float64, and its scale."""
    scale = (t.float().abs().max() / limit).clamp_min(TINY_SCALE) if scale is None else scale
    return (t.float() / scale).clamp(-limit, limit).to(dtype).double() * scale.double(), scale


def products(x, w, dy, x_scale=None, dy_scale=None, transposed=False):
    q_x, q_w = rounded(x, E4M3_MAX, E4M3, x_scale)[0], rounded(w, E4M3_MAX, E4M3)[0]
    q_dy = rounded(dy, E5M2_MAX, E5M2, dy_scale)[0]
    if transposed:
        return {"y": q_x @ q_w, "dx": q_dy @ q_w.T, "dw": q_x.T @ q_dy}
    return {"y": q_x @ q_w.T, "dx": q_dy @ q_w, "dw": q_dy.T @ q_x}


def site(scale=None):
    return Site(torch.zeros((), device=DEVICE), scale)


def scale_of(args, name):
    """The delayed scale among an op's arguments."""
    return args[name].scale if args.get(name) is not None else None


def run(op, backend, args, dy, **options):
    """y, dx and dw: as w's gradient, or what was added to dw_sum."""
    args = leaves(args)
    total = args.get("dw_sum")
    if total is not None:
        args["dw_sum"] = torch.zeros_like(total)
    with poisoned_allocations():
        y = op.backends[backend](**args, **options)
        y.backward(dy)
    dw = args["w"].grad if total is None else args["dw_sum"]
    return {"y": y.detach(), "dx": args["x"].grad, "dw": dw}


def check_products(op, backend="triton"):
    """Each product by itself, within its last rounding; dw in a sum is not rounded at all."""
    for form in op.forms:
        for dtype in DTYPES:
            args, dy = inputs((147, 48, 96), form, dtype), 3e-4 * randn(1, dtype)(147, 96)
            if op.obstacle(backend, (147, 48, 96), dtype, Device.of(torch.device(DEVICE))):
                continue
            x_scale = args["x_fp8"].scale if form == "given" else scale_of(args, "x_site")
            options = (x_scale, scale_of(args, "dy_site"), form == "transposed")
            want, got = products(args["x"], args["w"], dy, *options), run(op, backend, args, dy)
            for name, exact in want.items():
                fine = dtype == torch.float32 or (name == "dw" and form != "plain")
                off = error(got[name], exact)
                if not off < (1e-6 if fine and DEVICE == "cpu" else 2e-3):
                    raise Failed(f"{name} of {form} in {dtype} is off by {off:.1e}")


@pytest.mark.parametrize("backend", ["ref", "triton", "scaled_mm", CUDA])
def test_products_of_rounded_operands(backend):
    if backend == "ref":  # it rounds dw before it adds
        args, dy = inputs((147, 48, 96), "plain"), 3e-4 * randn(1, torch.bfloat16)(147, 96)
        want, got = products(args["x"], args["w"], dy), run(fp8_linear, "ref", args, dy)
        assert all(error(got[name], exact) < 2e-3 for name, exact in want.items())
        return
    check_products(fp8_linear, backend)


@KERNELS
def test_rounded_it_is_and_not_beyond_recognition(backend):
    """Three bits of mantissa forward, two of a gradient."""
    args, dy = inputs((147, 48, 96), "plain"), randn(1, torch.bfloat16)(147, 96)
    x, w = leaf(args["x"].double()), leaf(args["w"].double())
    y = x @ w.T
    y.backward(dy.double())
    got = run(fp8_linear, backend, args, dy)
    assert 0.005 < error(got["y"], y.detach()) < 0.03
    assert 0.01 < error(got["dx"], x.grad) < 0.06 and 0.01 < error(got["dw"], w.grad) < 0.06


# scales -------------------------------------------------------------------


@KERNELS
def test_a_delayed_scale(backend):
    check_delayed(fp8_linear, backend)


def check_delayed(op, backend="triton"):
    """The same bits with the scales that would be found; with a smaller one what exceeds it saturates."""
    args, dy = inputs((37, 32, 48)), randn(1, torch.bfloat16)(37, 48)
    x_scale, dy_scale = amax_scale(args["x"].detach(), E4M3_MAX), amax_scale(dy, E5M2_MAX)
    want = run(op, backend, args, dy)
    got = run(op, backend, args, dy, x_site=site(x_scale), dy_site=site(dy_scale))
    if not all(torch.equal(got[name], t) for name, t in want.items()):
        raise Failed("a given scale is not used as one that is found")
    for x_factor, dy_factor in ((2.0**-3, 1), (2.0**5, 1), (1, 2.0**-3), (1, 2.0**9)):
        scales = x_scale * x_factor, dy_scale * dy_factor
        got = run(op, backend, args, dy, x_site=site(scales[0]), dy_site=site(scales[1]))
        want = products(args["x"], args["w"], dy, *scales)
        if not all(error(got[name], want[name]) < 2e-3 for name in want):
            raise Failed(f"scales {x_factor} and {dy_factor} of the largest are not used")


@pytest.mark.parametrize("backend", ["ref", "triton", CUDA])
def test_sites_see_the_largest_sizes(backend):
    check_sites(fp8_linear, backend)


def check_sites(op, backend="triton"):
    """amax of x in forward and of dy in backward, raised and never lowered, with and without delayed scales."""
    args, dy = inputs((37, 32, 48)), -3 * randn(1, torch.bfloat16)(37, 48)
    largest = [t.detach().float().abs().max().item() for t in (args["x"], dy)]
    for scale in (None, torch.tensor(0.01, device=DEVICE)):
        for start, want in ((0.0, largest), (1e6, [1e6, 1e6])):
            sites = [Site(torch.full((5,), -1.0, device=DEVICE)[3:4].fill_(start), scale) for _ in range(2)]
            run(op, backend, args, dy, x_site=sites[0], dy_site=sites[1])
            if [s.amax.item() for s in sites] != want or any((s.amax._base[:3] != -1).any() for s in sites):
                raise Failed(f"amax is {[s.amax.item() for s in sites]}, not {want}")
    bad = dy.clone()
    bad[3, 5] = torch.nan
    gone = site(torch.ones((), device=DEVICE))
    run(op, backend, args, bad, dy_site=gone)
    if not gone.amax.isnan():
        raise Failed("a NaN is not in amax")


@KERNELS
def test_scales_may_have_any_shape_and_are_left_alone(backend):
    args, dy = inputs((9, 16, 32)), randn(1, torch.bfloat16)(9, 32)
    scale = torch.full((1, 1), 0.01, device=DEVICE)
    got = run(fp8_linear, backend, args, dy, x_site=site(scale))
    want = run(fp8_linear, backend, args, dy, x_site=site(scale.reshape(())))
    assert scale == 0.01 and all(torch.equal(got[name], t) for name, t in want.items())


@KERNELS
def test_x_that_is_quantised_already_is_not_read(backend):
    check_given(fp8_linear, backend)


def check_given(op, backend="triton"):
    """The bits of a delayed scale; x is a number that has the shape of rows, and gets their gradient."""
    args, dy = inputs((37, 32, 48)), randn(1, torch.bfloat16)(37, 48)
    scale = torch.full((), 0.02, device=DEVICE)
    want = run(op, backend, args, dy, x_site=site(scale))
    x_fp8 = fp8_rows(args["x"], scale)
    carrier = torch.full((1,), torch.nan, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    x = carrier.expand(37, 32)
    x.retain_grad()
    total = torch.zeros(48, 32, device=DEVICE)
    y = op.backends[backend](x, leaf(args["w"]), args["fp8"], x_fp8=x_fp8, dw_sum=total)
    y.backward(dy)
    got = {"y": y.detach(), "dx": x.grad, "dw": total}
    if not all(torch.equal(got[name], t) for name, t in want.items()):
        raise Failed("given rows are not used as those that are made")


@KERNELS
def test_a_spike_of_100(backend):
    """Found in the scale, it costs the other rows what one scale must: each number is off by 1/16 of itself or by half
    of the least step. With the scale from before the spike they do not change at all, and the spike saturates, which
    the caller sees by comparing max |x| / 448 with the scale."""
    args, dy = inputs((37, 32, 48), "plain"), randn(1, torch.bfloat16)(37, 48)
    x, copy = args["x"].detach(), args["fp8"]
    before = amax_scale(x, E4M3_MAX)
    spiked = x.clone()
    spiked[3, 5] = 100 * x.abs().max()
    now = amax_scale(spiked, E4M3_MAX)
    w = copy.q.double() * copy.scale.double()
    got = run(fp8_linear, backend, args | {"x": spiked}, dy)
    assert all(t.isfinite().all() for t in got.values())
    step = torch.maximum(spiked.double().abs() / 16, now.double() * 2.0**-10)
    exact = spiked.double() @ w.T
    assert ((got["y"].double() - exact).abs() <= 1.01 * (step @ w.abs().T) + 2.0**-8 * exact.abs()).all()

    assert now > 50 * before
    seen = site(before)
    delayed = run(fp8_linear, backend, args | {"x": spiked}, dy, x_site=seen)
    calm = run(fp8_linear, backend, args, dy, x_site=site(before))
    assert all(t.isfinite().all() for t in delayed.values())
    others = torch.arange(37, device=DEVICE) != 3
    assert torch.equal(delayed["y"][others], calm["y"][others]) and torch.equal(delayed["dx"], calm["dx"])
    saturated = spiked.double().clamp(max=x.abs().max().item())
    assert error(delayed["y"], products(saturated, args["w"], dy, before)["y"]) < 2e-3
    assert seen.amax == spiked.float().abs().max()


@KERNELS
def test_zeros(backend):
    check_zeros(fp8_linear, backend)


def check_zeros(op, backend="triton"):
    args, dy = inputs((21, 16, 32), "plain"), randn(1, torch.bfloat16)(21, 32)
    zeros = [
        ("y", "dw", run(op, backend, args | {"x": torch.zeros_like(args["x"])}, dy)),
        ("dx", "dw", run(op, backend, args, torch.zeros_like(dy))),
        ("y", "dx", run(op, backend, args | {"fp8": fp8_copy(torch.zeros_like(args["w"]))}, dy)),
    ]
    for first, second, got in zeros:
        if any(t.isnan().any() for t in got.values()) or got[first].any() or got[second].any():
            raise Failed("products with zeros are not 0")


@pytest.mark.parametrize("backend", ["ref", "triton", "scaled_mm", CUDA])
def test_what_is_not_finite_is_not_lost(backend):
    check_not_finite(fp8_linear, backend)


def check_not_finite(op, backend="triton"):
    args, dy = inputs((21, 16, 32), "plain"), randn(1, torch.bfloat16)(21, 32)

    def with_one(t, number):
        t = t.detach().clone()
        t[3, 5] = number
        return t

    nan, infinite = (args | {"x": with_one(args["x"], number)} for number in (torch.nan, torch.inf))
    got = run(op, backend, nan, dy)
    seen = [got["y"].isnan().all(), got["dw"].isnan().all(), got["dx"].isfinite().all()]
    got = run(op, backend, nan, dy, x_site=site(torch.ones((), device=DEVICE)))
    seen += [got["y"][3].isnan().all(), got["y"].isnan().sum() == 32]
    got = run(op, backend, infinite, dy)
    seen += [got["y"][3].isnan().all(), got["dw"][:, 5].isnan().all()]
    got = run(op, backend, infinite, dy, x_site=site(torch.ones((), device=DEVICE)))
    seen += [t.isfinite().all() for t in got.values()]
    got = run(op, backend, args, with_one(dy, torch.nan))
    seen += [got["dx"].isnan().all(), got["dw"].isnan().all()]
    got = run(op, backend, args, with_one(dy, torch.inf))
    seen += [got["dx"][3].isnan().all(), got["dw"][5].isnan().all()]
    if not all(seen):
        raise Failed(f"what is not finite is lost: {[bool(s) for s in seen]}")


# one copy and one sum for all micro-steps ---------------------------------


@pytest.mark.parametrize("mode", ["eager", "aot_eager", "inductor"])
def test_layers_of_a_bank_add_to_one_storage(mode):
    check_micro_steps(fp8_linear, mode)


def check_micro_steps(op, mode="eager"):
    """Micro-steps and layers add to slices of one tensor, in place, from one copy of each weight; autograd gives the
    bank no gradient."""
    make = randn(0, torch.float32)
    bank, x = torch.nn.Parameter(make(3, 16, 16)), make(2, 5, 16)
    copies = [fp8_copy(w) for w in bank.unbind()]

    def model(backend, x, bank, total):
        for w, copy, dw_sum in zip(bank.unbind(), copies, total.unbind()):
            x = torch.tanh(op.backends[backend](x, w, copy, dw_sum=dw_sum))
        return x.square().sum()

    def micro_steps(backend, function):
        total = torch.zeros(3, 16, 16, device=DEVICE)
        at = total.data_ptr()
        for part in (x, x.flip(0) / 2, x + 1):
            function(backend, part, bank, total).backward()
        assert total.data_ptr() == at and bank.grad is None
        return total

    fill_dynamo_tables()
    torch.compiler.reset()
    want, got = micro_steps("ref", model), micro_steps("triton", model)
    # a number of a layer that is a hair from a tie may be rounded the other way
    assert error(got, want) < 2e-2
    if mode != "eager":
        compiled = micro_steps("triton", torch.compile(model, backend=mode, fullgraph=True))
        assert error(compiled, got) < 2e-2


def test_saved_are_fp8_copies_and_scales():
    check_saved(fp8_linear)


def check_saved(op, backend="triton"):
    saved = []
    args = leaves(inputs((37, 32, 48)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        op.backends[backend](**args)
    q_t = args["fp8"].q_t
    own = [t for t in saved if t.data_ptr() not in (q_t.data_ptr(), args["fp8"].scale.data_ptr())]
    if [(tuple(t.shape), t.dtype) for t in own] != [((32, 48), E4M3), ((), torch.float32)]:
        raise Failed(f"saves {[(tuple(t.shape), t.dtype) for t in own]}")


@pytest.mark.parametrize("backend", ["ref", "triton"])
def test_a_copy_that_changes_before_backward_is_an_error(backend):
    args = leaves(inputs((9, 16, 32)))
    y = fp8_linear.backends[backend](**args)
    fp8.fill_fp8(2 * args["w"].detach(), args["fp8"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# what is launched ---------------------------------------------------------


def test_each_tensor_is_quantised_once_and_gradients_are_promoted():
    check_launches(fp8_linear, fp8_products, gemm)


def check_launches(op, products, its_gemm):
    """x in forward and dy in backward, each by one launch with its transpose; y alone stays in the tensor core."""
    for form in ("sum", "transposed"):
        passes, launches = watched(op, products, its_gemm, form)
        if passes != [((37, 32), E4M3, E4M3), ((37, 48), E5M2, E5M2)]:
            raise Failed(f"passes of {form}: {passes}")
        dw = E4M3 if form == "transposed" else E5M2  # its first operand
        bf16 = torch.bfloat16
        if launches != [
            (E4M3, bf16, False, False), (E5M2, bf16, True, False), (dw, torch.float32, True, True)
        ]:  # fmt: skip
            raise Failed(f"products of {form}: {launches}")


def watched(op, products, its_gemm, form):
    passes, launches = [], []
    real_transpose, real_launch = products.transpose, its_gemm.launch_persistent

    def transpose(x, q, q_t, *rest):
        passes.append((tuple(x.shape), q.dtype, q_t.dtype))
        real_transpose(x, q, q_t, *rest)

    def launch(kernel, programs, first, second, out, *args, **options):
        launches.append((first.dtype, out.dtype, options["IMPRECISE"] == options["BLOCK_K"], options["ACCUMULATE"]))
        real_launch(kernel, programs, first, second, out, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "transpose", transpose)
        patch.setattr(its_gemm, "launch_persistent", launch)
        op.backends["triton"](**leaves(inputs((37, 32, 48), form))).backward(randn(1, torch.bfloat16)(37, 48))
    return passes, launches


@pytest.mark.parametrize("M", [16, 37])
@pytest.mark.parametrize("backend", ["scaled_mm", CUDA])
def test_scaled_mm_is_given_what_cublas_takes(backend, M, monkeypatch):
    honest, calls = torch._scaled_mm, []

    def watched(a, b, *, scale_a, scale_b, out_dtype, use_fast_accum):
        (rows, K), (_, N) = a.shape, b.shape
        assert K % 16 == 0 == N % 16 and a.stride(1) == 1 == b.stride(0)  # row-major, column-major
        assert a.stride(0) % 16 == 0 == b.stride(1) % 16 and a.data_ptr() % 16 == 0 == b.data_ptr() % 16
        assert all(s.numel() == 1 and s.dtype == torch.float32 for s in (scale_a, scale_b)) and b.dtype == E4M3
        calls.append((rows, K, N, a.dtype, use_fast_accum))
        return honest(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=out_dtype, use_fast_accum=use_fast_accum)

    monkeypatch.setattr(torch, "_scaled_mm", watched)
    args, dy = inputs((M, 32, 48), "plain"), randn(1, torch.bfloat16)(M, 48)
    got = run(fp8_linear, backend, args, dy)
    assert calls == [(M, 32, 48, E4M3, True), (M, 48, 32, E5M2, False), (48, round_up(M, 16), 32, E5M2, False)]
    want = products(args["x"], args["w"], dy)
    assert all(error(got[name], want[name]) < 2e-3 for name in want)


# what is refused ----------------------------------------------------------

ROWS = fp8_rows(torch.ones(2, 16), torch.ones(()))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"x": torch.ones(2, 32)}, r"x is \(2, 32\)"),
        ({"x": torch.ones(2, 16).bfloat16()}, "one dtype"),
        ({"x": torch.ones(2, 16).half(), "w": torch.ones(32, 16).half()}, "float16"),
        ({"w": torch.ones(0, 16)}, r"w \(0, 16\)"),
        ({"fp8": fp8_copy(torch.ones(16, 32))}, r"fp8_linear: q of the copy that quantise_weight makes is \(16, 32\)"),
        ({"x_site": Site(torch.ones(2))}, r"amax of x is \(2,\) float32"),
        ({"dy_site": Site(torch.ones(()), torch.ones(2))}, r"the scale of dy is \(2,\) float32"),
        ({"x_site": Site(torch.ones(()), torch.ones((), dtype=torch.float64))}, "the scale of x is .* float64"),
        ({"x_fp8": ROWS, "x_site": Site(torch.ones(()))}, "x_fp8 and x_site are given"),
        ({"x_fp8": ROWS._replace(q=ROWS.q[:1])}, r"q of x_fp8 is \(1, 16\)"),
        ({"x_fp8": ROWS._replace(q_t=ROWS.q_t[:, :2])}, r"q_t of x_fp8 is \(16, 2\)"),
        ({"x_fp8": ROWS._replace(scale=torch.ones(2))}, r"the scale of x_fp8 is \(2,\)"),
        ({"transposed": True}, r"expected \(..., K\) and \(K, N\)"),
        ({"dw_sum": torch.zeros(16, 32)}, r"dw_sum is \(16, 32\)"),
        ({"dw_sum": torch.zeros(32, 16).bfloat16()}, "dw_sum is .*expected contiguous .*float32"),
        ({"dw_sum": torch.zeros(16, 32).T}, "dw_sum is .*strides"),
    ],
)
@pytest.mark.parametrize("backend", ["ref", "triton"])
def test_bad_calls_are_refused(backend, change, says):
    args = {"x": torch.ones(2, 16), "w": torch.ones(32, 16), "fp8": fp8_copy(torch.ones(32, 16))} | change

    def here(t):
        if isinstance(t, tuple):
            return type(t)(*(part if part is None else part.to(DEVICE) for part in t))
        return t.to(DEVICE) if isinstance(t, torch.Tensor) else t

    with pytest.raises(ValueError, match=says):
        fp8_linear.checked(backend)(**{name: here(t) for name, t in args.items()})


@pytest.mark.parametrize("K, N", [(24, 32), (32, 24)])
@KERNELS
def test_kernels_refuse_rows_that_are_not_whole(backend, K, N):
    args = fp8_linear.forms["plain"](randn(0, torch.bfloat16), 2, K, N)
    assert fp8_linear.checked("ref")(**args).shape == (2, N)
    with pytest.raises(ValueError, match=f"fp8_linear: {backend} takes .* multiples of 16, not {K} and {N}"):
        fp8_linear.checked(backend)(**args)


def test_what_the_backends_can_take(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    h100, a100 = (Device("cuda", name, arch) for name, arch in (("H100", (9, 0)), ("A100", (8, 0))))
    for backend in ("triton", "scaled_mm", "cuda"):
        assert "fp8" in fp8_linear.obstacle(backend, (32, 32, 48), torch.bfloat16, a100)
    assert "float32" in fp8_linear.backends["scaled_mm"].limits((32, 32, 48), torch.float32)
    assert fp8_linear.pick((32, 32, 48), torch.bfloat16, h100)[0] == "scaled_mm"  # unmeasured
    assert fp8_linear.pick((32, 32, 48), torch.float32, h100)[0] == "triton"
    assert fp8_linear.pick((32, 32, 48), torch.bfloat16, a100)[0] == "ref"


@pytest.mark.skipif(DEVICE == "cuda", reason="pretends to compile for another GPU")
def test_an_older_gpu_is_told_that_it_has_no_fp8(monkeypatch):
    from kernels import op

    args = inputs((9, 16, 32))
    monkeypatch.setattr(op, "COMPILED_FOR", (8, 0))
    op.capability.cache_clear()
    try:
        with pytest.raises(UserError, match="fp8_quantise: fp8 needs a GPU of compute capability 8.9 or .*, not 8.0"):
            fp8_linear.backends["triton"](**args)
    finally:
        op.capability.cache_clear()


def test_cost():
    """x is read twice and its copies are written twice; y's product reads both operands."""
    assert fp8_linear_cost((10, 4, 6), torch.bfloat16) == (480, 2 * 80 + 3 * 40 + 24 + 120)
    flops, nbytes = fp8_linear_cost((10, 4, 6), torch.bfloat16, "plain", True)
    assert (flops, nbytes) == (960, 2 * 120 + 4 * 60 + 40 + 80 + 24 + 48)
    assert fp8_linear_cost((10, 4, 6), torch.bfloat16, "sum", True) == (960, nbytes - 48 + 8 * 24)
    # scales that are known, and rows that are there
    assert fp8_linear_cost((10, 4, 6), torch.bfloat16, "delayed") == (480, 80 + 3 * 40 + 24 + 120)
    assert fp8_linear_cost((10, 4, 6), torch.bfloat16, "given") == (480, 40 + 24 + 120)
    assert fp8_linear_cost((10, 4, 6), torch.bfloat16, "given", True)[1] == nbytes - 120 - 48 + 8 * 24


def test_cases_are_projections_of_attention():
    assert fp8_linear.cases["depth 24"] == (32768, 1536, 4608)
    assert fp8_linear.cases["depth 24, out"] == (32768, 1536, 1536)


# a small model ------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_fp8_loss_curve_follows_fp32(seed):
    """200 steps of two layers that learn a third, by rounding through the dtypes: within 5 % of fp32 at every tenth."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(64, 32, generator=generator) / 32**0.5
    first, second = (torch.randn(size, generator=generator) / size[1] ** 0.5 for size in ((128, 32), (64, 128)))
    data = torch.randn(200, 64, 32, generator=generator)

    def curve(through_fp8):
        weights = [torch.nn.Parameter(w.clone()) for w in (first, second)]
        optimizer, losses = torch.optim.Adam(weights, lr=2e-3), []
        for step, x in enumerate(data):
            if through_fp8:
                copies = [fp8_copy(w) for w in weights]
                hidden = fp8_linear.backends["ref"](x, weights[0], copies[0]).relu()
                y = fp8_linear.backends["ref"](hidden, weights[1], copies[1])
            else:
                y = (x @ weights[0].T).relu() @ weights[1].T
            loss = (y - torch.tanh(x @ teacher.T)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 10 == 9:
                losses.append(loss.item())
        return losses

    exact, fp8_losses = curve(False), curve(True)
    assert exact[-1] < 0.4 * exact[0]
    assert all(abs(a / b - 1) < 0.05 for a, b in zip(fp8_losses, exact)), (fp8_losses, exact)


# mutations ----------------------------------------------------------------

HERE, FP8, PRODUCTS, GEMM = module, fp8, fp8_products, gemm
SAVED = "ctx.save_for_backward(q_t, scale, backward, fp8.scale)"
SAVED_NAMES = "x_t, x_scale, w_t, w_scale = "
MUTATIONS = {
    "y lacks the scale of w": {
        HERE: {"product(q, forward, (scale, fp8.scale)": "product(q, forward, (scale, scale)"}
    },
    "dw has the scale of w": {
        HERE: {"weight_gradient(a, b, (scale, x_scale)": "weight_gradient(a, b, (scale, w_scale)"}
    },
    "dx has the scale of x": {HERE: {"product(q, w_t, (scale, w_scale)": "product(q, w_t, (scale, x_scale)"}},
    "x is scaled as a gradient": {PRODUCTS: {"E5M2 if gradient else E4M3).max": "E5M2).max"}},
    "gradients saturate where weights do": {FP8: {"C, torch.finfo(q_t.dtype).max,": "C, E4M3_MAX,"}},
    "padding is left unwritten": {FP8: {"(offs_r < columns_t)[None": "(offs_r < R)[None"}},
    "sums of gradients are not promoted": {GEMM: {"precise = E5M2 in": "precise = None in"}},
    "sums are promoted where the gradient is first": {
        GEMM: {"precise = E5M2 in (a.dtype, b.dtype)": "precise = a.dtype == E5M2"}
    },
    "the sum is overwritten": {PRODUCTS: {"(a_scale, b_scale), accumulate=True": "(a_scale, b_scale)"}},
    "dw is not added": {PRODUCTS: {"    if not a.size(1):\n": "    if a.size(1):\n"}},
    "dw is rounded before it is added": {
        PRODUCTS: {
            "gemm(a, b, total, (a_scale, b_scale), accumulate=True)":
            "total.add_(_product(a, b, a_scale, b_scale, torch.bfloat16, False))"
        }
    },
    "dy is quantised as a weight": {HERE: {"ctx.dy_site, gradient=True,": "ctx.dy_site, gradient=False,"}},
    "dy is quantised twice": {
        HERE: {"dx = dw = None\n": "dx = dw = None\n        quantise(dy, None, gradient=True)\n"}
    },
    "x's copy is that of the first micro-step": {
        HERE: {
            SAVED: "ctx.save_for_backward(*_kept.setdefault(str(x.shape), (q_t, scale)), backward, fp8.scale)",
            "# kernel\n": "_kept = {}\n",
        }
    },
    "x is kept": {HERE: {SAVED: SAVED[:-1] + ", x)", SAVED_NAMES: SAVED_NAMES.replace(" = ", ", _ = ")}},
    "a delayed scale is looked for": {PRODUCTS: {"    if scale is None:": "    if True:"}},
    "a delayed scale serves gradients": {
        HERE: {"ctx.dw_sum, ctx.dy_site = dw_sum, dy_site": "ctx.dw_sum, ctx.dy_site = dw_sum, x_site"}
    },
    "sites see nothing": {
        PRODUCTS: {"amax, scale = site or (None, None)": "amax, scale = None, site and site.scale"}
    },
    "given rows are made again": {HERE: {"= x_fp8 or quantise": "= quantise"}},
    "dw of a transposed weight is transposed": {
        HERE: {"(x_t, q_t) if ctx.transposed else": "(x_t, q_t) if False else"}
    },
    "a fixed weight has a sum": {HERE: {"if ctx.needs_input_grad[1]:": "if True:"}},
    "w has a gradient besides": {
        HERE: {"return dx, dw, *": "return dx, ctx.dw_sum.to(dy.dtype) if dw is None else dw, *"}
    },
    "zeros have no scale": {FP8: {"(amax / limit).clamp_min(TINY_SCALE)": "amax / limit"}},
    "NaN is clamped": {FP8: {"propagate_nan=tl.PropagateNan.ALL": "propagate_nan=tl.PropagateNan.NONE"}},
    "the scale is that of the first rows": {FP8: {"vector_norm(t,": "vector_norm(t[:8],"}},
}  # fmt: skip
# one for each class of failure; the others run by `pytest -m mutations`
CLASSES = [
    "y lacks the scale of w",
    "gradients saturate where weights do",
    "padding is left unwritten",
    "sums of gradients are not promoted",
    "dw is rounded before it is added",
    "x's copy is that of the first micro-step",
    "x is kept",
    "a delayed scale is looked for",
    "w has a gradient besides",
    "sums are promoted where the gradient is first",
    "sites see nothing",
    "given rows are made again",
    "dw of a transposed weight is transposed",
]


def broken_op(edits, folder):
    """The op of edited modules, its reference as it is; its shared products and its gemm."""
    stems = {}
    for part in (FP8, GEMM, PRODUCTS):  # each imports those before it
        imports = {f"from {other.__name__} import": f"from {stem} import" for other, stem in stems.items()}
        changes = edits.get(part, {}) | (imports if part is PRODUCTS else {})
        if changes:
            stems[part] = Path(mutant(part, changes, folder).__file__).stem
    imports = {f"from {part.__name__} import": f"from {stem} import" for part, stem in stems.items()}
    copy = mutant(module, edits.get(HERE, {}) | imports, folder)
    backends = {"ref": fp8_linear.backends["ref"], "triton": copy.fp8_linear.backends["triton"]}
    its = (sys.modules[stems[part]] if part in stems else part for part in (PRODUCTS, GEMM))
    return dataclasses.replace(fp8_linear, backends=backends), *its


def stress(op, its_products, its_gemm):
    check_products(op)
    for form in op.forms:
        result = check_op(op, inputs((37, 32, 48), form), factor=ONCE)
        assert ("dw" in result) == (form == "plain")
    check_fixed(op, ("w",))
    check_delayed(op)
    check_sites(op)
    check_given(op)
    check_zeros(op)
    check_not_finite(op)
    check_micro_steps(op)
    check_saved(op)
    check_launches(op, its_products, its_gemm)


@pytest.mark.skipif(DEVICE == "cuda", reason="a broken kernel may end the CUDA context of the other tests")
@pytest.mark.parametrize("name", mutations(MUTATIONS, always=CLASSES))
def test_a_broken_layer_is_noticed(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    broken = broken_op(MUTATIONS[name], tmp_path)
    with pytest.raises((Failed, AssertionError)):
        stress(*broken)


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
def test_a_layer_that_is_not_broken_passes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    untouched = {FP8: {"TINY_SCALE": "TINY_SCALE"}, GEMM: {"precise": "precise"}}
    stress(*broken_op(untouched, tmp_path))
