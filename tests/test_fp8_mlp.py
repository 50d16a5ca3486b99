"""fp8_mlp against float64 of the same rounded operands, with ragged tiles; both fp8 results of each epilogue bit by
bit; sites, saturation and what is not finite; what is saved, launched and added to sums; refusals; mutations."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

import kernels.fp8_mlp as module
from bench.law import error, fill_dynamo_tables, poisoned_allocations
from kernels import fp8_products, gemm
from kernels.fp8 import E4M3, E5M2, FP8_CAPABILITY, Fp8Tensor, Site, fp8_copy, fp8_rows
from kernels.fp8_mlp import fp8_mlp, fp8_mlp_cost
from kernels.op import Device
from tests.harness import CUDA, DEVICE, LAYOUTS, Failed, check_op, mutant, randn
from tests.mutations import mutations

# on a GPU sums of y are those of its tensor cores: no law of fp32 holds for them
DTYPES = (torch.bfloat16, torch.float32) if DEVICE == "cpu" else (torch.bfloat16,)
SHAPES = ((5, 16, 32), (130, 48, 272), (257, 80, 128), (300, 16, 400))  # M, C, F: within a tile, ragged, more tiles
FORMS = pytest.mark.parametrize("form", fp8_mlp.forms)
KERNELS = pytest.mark.parametrize("backend", ["triton", "scaled_mm", CUDA])

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < FP8_CAPABILITY, reason="no fp8"
)


def inputs(shape, form="sum", dtype=torch.bfloat16, seed=0):
    return fp8_mlp.forms[form](randn(seed, dtype), *shape)


def leaf(t):
    return t.detach().clone().requires_grad_()


def bits(t):
    return t.contiguous().view(torch.uint8)


# the law ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@FORMS
def test_agrees_with_float64(form, shape, dtype, backend, monkeypatch):
    monkeypatch.setattr(gemm, "PROGRAMS_WITHOUT_GPU", 2)  # few programs, many tiles
    result = check_op(fp8_mlp, inputs(shape, form, dtype), backend=backend)
    assert ("dup" in result) == (form == "plain") and ("ddown_sum" in result) == (form == "sum")


@FORMS
def test_scaled_mm_agrees_with_float64(form):
    check_op(fp8_mlp, inputs((37, 32, 48), form), backend="scaled_mm")


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@KERNELS
def test_layouts(backend, layout):
    check_op(fp8_mlp, inputs((21, 32, 48)), backend=backend, layout=layout)


@FORMS
@KERNELS
def test_torch_compile_and_opcheck(backend, form):
    check_op(fp8_mlp, inputs((9, 16, 32), form), backend=backend, compiled=True, opcheck=True)


@KERNELS
def test_leading_sizes_and_no_rows(backend):
    args = inputs((24, 16, 32))
    result = check_op(fp8_mlp, args | {"x": args["x"].view(2, 3, 4, 16)}, backend=backend)
    assert result["y"].shape == result["dx"].shape == (2, 3, 4, 16)
    none = {"x": args["x"][:0], "x_fp8": fp8_rows(args["x"][:0], args["x_fp8"].scale)}
    result = check_op(fp8_mlp, args | none, backend=backend)
    assert all(torch.equal(result[name], args[name]) for name in ("dup_sum", "ddown_sum"))
    result = check_op(fp8_mlp, inputs((24, 16, 32), "plain") | none, backend=backend)
    assert result["y"].shape == (0, 16) and not result["dup"].any() and not result["ddown"].any()


@pytest.mark.parametrize("fixed", [("x",), ("up",), ("down",), ("up", "down")], ids=str)
def test_some_inputs_have_no_gradient(fixed):
    check_fixed(fp8_mlp, fixed)


def check_fixed(op, fixed):
    args = inputs((9, 16, 32))
    result = check_op(op, args, no_grad=fixed)
    for name in ("up", "down"):
        total = f"d{name}_sum"
        assert torch.equal(result.get(total, args[total]), args[total]) == (name in fixed)
        assert f"d{name}" not in result
    assert ("dx" in result) == ("x" not in fixed)


# the formula, written once more -------------------------------------------


def e4m3(t, scale):
    return (t / scale).clamp(-448, 448).to(E4M3).double() * scale


def e5m2(t, scale):
    return (t / scale).clamp(-57344, 57344).to(E5M2).double() * scale


def formula(args, dy):
    """All results in float64, from what the call is given."""
    x, up, down = (args[f"{name}_fp8"].q.double() * args[f"{name}_fp8"].scale.double() for name in ("x", "up", "down"))
    scales = {name: args[name].scale.double() for name in ("post", "dpre", "dy")}
    exact_post = (x @ up.T).relu().square()
    post, dy = e4m3(exact_post, scales["post"]), e5m2(dy.double(), scales["dy"])
    exact_dpre = 2 * post.sqrt() * (dy @ down.T)
    dpre = e5m2(exact_dpre, scales["dpre"])
    return {
        "y": post @ down, "dx": dpre @ up, "dup": dpre.T @ x, "ddown": post.T @ dy,
        "post": exact_post.amax(), "dpre": exact_dpre.abs().amax(),
    }  # fmt: skip


def run(op, backend, args, dy):
    """y and gradients: as the weights' own, or what was added to sums."""
    args = args | {name: leaf(args[name]) for name in ("x", "up", "down")}
    totals = {name: torch.zeros_like(args[name]) for name in ("dup_sum", "ddown_sum") if name in args}
    with poisoned_allocations():
        y = op.backends[backend](**args | totals)
        y.backward(dy)
    grads = {f"d{name}": totals.get(f"d{name}_sum", args[name].grad) for name in ("up", "down")}
    return {"y": y.detach(), "dx": args["x"].grad} | grads


def fresh(args):
    """With sites that have seen nothing."""
    return args | {name: args[name]._replace(amax=torch.zeros((), device=DEVICE)) for name in ("post", "dpre", "dy")}


def check_formula(op, backend="triton"):
    """Each product by itself, within its last rounding; gradients in sums are not rounded at all. A number that is a
    hair from a tie may be rounded the other way."""
    for form in op.forms:
        for dtype in DTYPES:
            if op.obstacle(backend, (147, 48, 96), dtype, Device.of(torch.device(DEVICE))):
                continue
            args, dy = fresh(inputs((147, 48, 96), form, dtype)), 3 * randn(1, dtype)(147, 48)
            want, got = formula(args, dy), run(op, backend, args, dy)
            for name in ("y", "dx", "dup", "ddown"):
                fine = dtype == torch.float32 or (name in ("dup", "ddown") and form == "sum")
                off = error(got[name], want[name])
                if not off < (1e-4 if fine and DEVICE == "cpu" else 3e-3):
                    raise Failed(f"{name} of {form} in {dtype} is off by {off:.1e}")
            sizes = {name: args[name].amax.double() for name in ("post", "dpre")} | {"dy": args["dy"].amax}
            if sizes["dy"] != dy.abs().max() or not all(
                abs(sizes[name] / want[name] - 1) < 1e-5 for name in ("post", "dpre")
            ):
                raise Failed(f"sites have seen {sizes}, not {want}")


@pytest.mark.parametrize("backend", ["ref", "triton", CUDA])
def test_products_of_rounded_operands(backend):
    if backend == "ref":  # it rounds gradients before it adds
        args, dy = fresh(inputs((147, 48, 96), "plain")), 3 * randn(1, torch.bfloat16)(147, 48)
        want, got = formula(args, dy), run(fp8_mlp, "ref", args, dy)
        assert all(error(got[name], want[name]) < 3e-3 for name in ("y", "dx", "dup", "ddown"))
        return
    check_formula(fp8_mlp, backend)


@KERNELS
def test_rounded_it_is_and_not_beyond_recognition(backend):
    """Two roundings with three bits of mantissa forward; backward others with two."""
    args, dy = inputs((147, 48, 96), "plain"), randn(1, torch.bfloat16)(147, 48)
    args |= {name: args[name]._replace(scale=16 * args[name].scale) for name in ("post", "dpre")}  # nothing saturates
    x, up, down = (leaf(args[name].double()) for name in ("x", "up", "down"))
    y = (x @ up.T).relu().square() @ down
    y.backward(dy.double())
    got = run(fp8_mlp, backend, args, dy)
    want = {"y": y.detach(), "dx": x.grad, "dup": up.grad, "ddown": down.grad}
    assert all(0.003 < error(got[name], t) < 0.08 for name, t in want.items()), {
        name: error(got[name], t) for name, t in want.items()
    }


# both epilogues bit by bit ------------------------------------------------


@pytest.mark.parametrize("M", [1, 15, 16, 130, 259])
def test_epilogues(M, monkeypatch):
    monkeypatch.setattr(gemm, "PROGRAMS_WITHOUT_GPU", 2)
    check_epilogues(module, M)


def check_epilogues(of, M):
    """Both layouts of post and of dpre hold what a pass over products of whole numbers would make, and zeros behind;
    with the smaller scales the largest saturate. Sums of whole numbers are exact in any order."""
    C, F = 48, 272
    x, up, dy = whole((M, C), 0, E4M3), whole((F, C), 1, E4M3), whole((M, C), 2, E5M2)
    one = torch.ones((), device=DEVICE)
    for scale in (torch.tensor(2.0, device=DEVICE), torch.tensor(2.0**-3, device=DEVICE)):
        amax = torch.zeros((), device=DEVICE)
        with poisoned_allocations():
            q, q_t = of._fp8_relu2(x, up, None, (one, 2 * one, None, scale), amax, E4M3)
        exact = (2 * (x.float() @ up.float().T)).relu().square()
        same(q, q_t, (exact / scale).clamp(max=448).to(E4M3), M)
        if amax != exact.max():
            raise Failed(f"amax of post is {amax}, not {exact.max()}")
        for factor_scale in (one, 4 * one):
            amax.fill_(3.0)
            with poisoned_allocations():
                d, d_t = of._fp8_relu2(dy, up, q, (one, one / 2, factor_scale, scale * 2.0**-6), amax, E5M2)
            roots = (q.float() * factor_scale).sqrt()
            exact = (dy.float() @ up.float().T) / 2 * (2 * roots)
            want = (exact * (1 / (scale * 2.0**-6))).clamp(-57344, 57344).to(E5M2)
            same(d, d_t, want, M)
            if not torch.isclose(amax, exact.abs().max().clamp_min(3.0), rtol=1e-6):
                raise Failed(f"amax of dpre is {amax}, not {exact.abs().max()}")


def whole(size, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, size, generator=generator).to(DEVICE, torch.float32).to(dtype)


def same(q, q_t, want, M):
    # the root of a GPU is approximate: a number that is a hair from a tie may be rounded the other way
    if not torch.equal(bits(q), bits(want)) and (DEVICE == "cpu" or (bits(q) != bits(want)).float().mean() > 1e-3):
        raise Failed(f"{(bits(q) != bits(want)).sum()} numbers differ")
    if not torch.equal(bits(q_t[:, :M]), bits(q.T)) or bits(q_t[:, M:]).any():
        raise Failed("the transposed copy differs")


# sites, saturation, what is not finite ------------------------------------


@KERNELS
def test_a_spike_of_100_saturates_and_is_seen(backend):
    """Other rows keep their bits, and what follows is finite."""
    args, dy = fresh(inputs((37, 32, 48), "plain")), randn(1, torch.bfloat16)(37, 32)
    calm = run(fp8_mlp, backend, args, dy)
    before = args["post"].amax.item()
    x = args["x"].detach().clone()
    x[3] *= 100
    spiked = fresh(args) | {"x": x, "x_fp8": fp8_rows(x, torch.full((), 2.0, device=DEVICE))}
    got = run(fp8_mlp, backend, spiked, dy)
    assert spiked["post"].amax > 100 * before and all(t.isfinite().all() for t in got.values())
    assert spiked["post"].amax > 448 * spiked["post"].scale
    again = run(fp8_mlp, backend, spiked | {"x_fp8": fp8_rows(args["x"], torch.full((), 2.0, device=DEVICE))}, dy)
    others = torch.arange(37, device=DEVICE) != 3
    assert torch.equal(got["y"][others], again["y"][others]) and calm["y"].isfinite().all()


@KERNELS
def test_what_is_not_finite_is_not_lost(backend):
    check_not_finite(fp8_mlp, backend)


def check_not_finite(op, backend="triton"):
    args, dy = fresh(inputs((21, 16, 32), "plain")), randn(1, torch.bfloat16)(21, 16)
    x = args["x"].detach().clone()
    x[3, 5] = torch.nan
    nan = args | {"x_fp8": fp8_rows(x, args["x_fp8"].scale)}
    got = run(op, backend, nan, dy)
    seen = [got["y"][3].isnan().all(), got["y"].isnan().sum() == 16, args["post"].amax.isnan()]
    seen += [got["dx"][3].isnan().all(), got["dx"].isnan().sum() == 16, args["dpre"].amax.isnan()]
    for number, is_seen in ((torch.nan, torch.isnan), (torch.inf, torch.isinf)):
        args, bad = fresh(args), dy.clone()
        bad[3, 5] = number
        got = run(op, backend, args, bad)
        seen += [is_seen(args["dy"].amax), got["y"].isfinite().all()]
        seen += [got["dx"][3].isnan().any() if number != number else got["dx"].isfinite().all()]
    if not all(seen):
        raise Failed(f"what is not finite is lost: {[bool(s) for s in seen]}")


@KERNELS
def test_zeros(backend):
    args, dy = fresh(inputs((21, 16, 32), "plain")), randn(1, torch.bfloat16)(21, 16)
    zero = args | {"down_fp8": fp8_copy(torch.zeros_like(args["down"]))}  # as a model begins
    got = run(fp8_mlp, backend, zero, dy)
    assert not got["y"].any() and not got["dx"].any() and not got["dup"].any() and got["ddown"].any()
    assert args["dpre"].amax == 0 and args["post"].amax > 0


# one copy and one sum for all micro-steps ---------------------------------


@pytest.mark.parametrize("mode", ["eager", "aot_eager", "inductor"])
def test_layers_of_a_bank_add_to_one_storage(mode):
    check_micro_steps(fp8_mlp, mode)


def check_micro_steps(op, mode="eager"):
    """Micro-steps and layers add to slices of one tensor, in place, and raise sites that are slices of one tensor;
    autograd gives the banks no gradient."""
    make = randn(0, torch.float32)
    ups, downs = (torch.nn.Parameter(0.2 * make(3, 32, 16)) for _ in range(2))
    x = make(2, 5, 16)
    copies = [(fp8_copy(up), fp8_copy(down)) for up, down in zip(ups.unbind(), downs.unbind())]
    number, forgotten = torch.tensor(2.0**-7, device=DEVICE), torch.zeros((), device=DEVICE)

    def model(backend, x, ups, downs, up_sums, down_sums, forward, backward):
        layers = zip(*(t.unbind() for t in (ups, downs, up_sums, down_sums, forward, backward)))
        for i, (up, down, dup_sum, ddown_sum, post, grads) in enumerate(layers):
            dpre, dy = grads.unbind()
            sites = {"post": Site(post, number), "dpre": Site(dpre, number), "dy": Site(dy, number)}
            rows = fp8_products.quantise(x.detach(), Site(forgotten, number))
            y = op.backends[backend](
                x, up, down, x_fp8=rows, up_fp8=copies[i][0], down_fp8=copies[i][1], dup_sum=dup_sum,
                ddown_sum=ddown_sum, **sites,
            )  # fmt: skip
            x = torch.tanh(y)
        return x.square().sum()

    def micro_steps(backend, function):
        totals = [torch.zeros(3, 32, 16, device=DEVICE) for _ in range(2)]
        seen = [torch.zeros(3, device=DEVICE), torch.zeros(3, 2, device=DEVICE)]
        at = [t.data_ptr() for t in totals + seen]
        for part in (x, x.flip(0) / 2, x + 1):
            function(backend, part, ups, downs, *totals, *seen).backward()
        assert [t.data_ptr() for t in totals + seen] == at and ups.grad is None is downs.grad
        return totals + seen

    fill_dynamo_tables()
    torch.compiler.reset()
    want, got = micro_steps("ref", model), micro_steps("triton", model)
    # a number of a layer that is a hair from a tie may be rounded the other way
    assert all(t.any() for t in got) and all(error(a, b) < 2e-2 for a, b in zip(got, want))
    if mode != "eager":
        compiled = micro_steps("triton", torch.compile(model, backend=mode, fullgraph=True))
        assert all(error(a, b) < 2e-2 for a, b in zip(compiled, got))


def test_saved_are_fp8_copies_and_scales():
    check_saved(fp8_mlp)


def check_saved(op):
    saved = []
    args = inputs((37, 32, 48))
    args |= {name: leaf(args[name]) for name in ("x", "up", "down")}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        op.backends["triton"](**args)
    given = {t.data_ptr() for name in ("x_fp8", "up_fp8", "down_fp8") for t in args[name]}
    given.add(args["post"].scale.data_ptr())
    own = [(tuple(t.shape), t.dtype) for t in saved if t.data_ptr() not in given]
    if own != [((37, 48), E4M3), ((48, 48), E4M3)]:
        raise Failed(f"saves {own}")


# what is launched ---------------------------------------------------------


def test_only_dy_is_quantised_by_a_pass_and_gradients_are_promoted():
    check_launches(fp8_mlp, module, fp8_products, gemm)


def check_launches(op, of, products, its_gemm):
    passes, launches = [], []
    real_transpose, real_launch = products.transpose, its_gemm.launch_persistent

    def transpose(x, q, q_t, *rest):
        passes.append((tuple(x.shape), q.dtype, q_t.dtype))
        real_transpose(x, q, q_t, *rest)

    def launch(kernel, programs, first, *args, **options):
        launches.append((kernel.__name__, first.dtype, options["IMPRECISE"] == options["BLOCK_K"]))
        real_launch(kernel, programs, first, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "transpose", transpose)
        patch.setattr(its_gemm, "launch_persistent", launch)
        patch.setattr(of, "launch_persistent", launch)
        args = inputs((37, 32, 48))
        args |= {name: leaf(args[name]) for name in ("x", "up", "down")}
        op.backends["triton"](**args).backward(randn(1, torch.bfloat16)(37, 32))
    if passes != [((37, 32), E5M2, E5M2)]:
        raise Failed(f"passes: {passes}")
    fused, plain = "_fp8_relu2_kernel", "_gemm_kernel"
    if launches != [
        (fused, E4M3, False), (plain, E4M3, False),
        (fused, E5M2, True), (plain, E5M2, True), (plain, E5M2, True), (plain, E4M3, True),
    ]:  # fmt: skip
        raise Failed(f"products: {launches}")


# what is refused ----------------------------------------------------------


def small():
    one = torch.ones((), device=DEVICE)
    w = torch.ones(32, 16, device=DEVICE)
    x = torch.ones(2, 16, device=DEVICE)
    copies = {"x_fp8": fp8_rows(x, one), "up_fp8": fp8_copy(w), "down_fp8": fp8_copy(w)}
    return {"x": x, "up": w, "down": w} | copies | {name: Site(one.clone(), one) for name in ("post", "dpre", "dy")}


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda a: {"up": a["up"][:, :8]}, r"expected \(..., C\), \(F, C\)"),
        (lambda a: {"x": a["x"].bfloat16()}, "one dtype"),
        (lambda a: {name: a[name].half() for name in ("x", "up", "down")}, "float16"),
        (lambda a: {"x_fp8": Fp8Tensor(a["x_fp8"].q[:1], *a["x_fp8"][1:])}, r"q of x_fp8 is \(1, 16\)"),
        (lambda a: {"down_fp8": fp8_copy(a["down"].T)}, "fp8_mlp: q of the copy that quantise_weight makes is"),
        (lambda a: {"post": Site(a["post"].amax)}, "post has no scale"),
        (lambda a: {"dy": Site(torch.ones(2, device=DEVICE), a["dy"].scale)}, r"amax of dy is \(2,\)"),
        (lambda a: {"dpre": Site(a["dy"].amax, a["dy"].scale.double())}, "the scale of dpre is .* float64"),
        (lambda a: {"dup_sum": torch.zeros(16, 32, device=DEVICE)}, r"dup_sum is \(16, 32\)"),
        (lambda a: {"ddown_sum": torch.zeros_like(a["down"]).bfloat16()}, "ddown_sum is .*expected contiguous"),
    ],
)
@pytest.mark.parametrize("backend", ["ref", "triton"])
def test_bad_calls_are_refused(backend, change, says):
    args = small()
    with pytest.raises(ValueError, match=says):
        fp8_mlp.checked(backend)(**args | change(args))


@KERNELS
def test_kernels_refuse_rows_that_are_not_whole(backend):
    args = fp8_mlp.forms["plain"](randn(0, torch.bfloat16), 2, 24, 32)
    assert fp8_mlp.checked("ref")(**args).shape == (2, 24)
    with pytest.raises(ValueError, match=f"fp8_mlp: {backend} takes C and F .* multiples of 16, not 24 and 32"):
        fp8_mlp.checked(backend)(**args)


def test_what_the_backends_can_take(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    h100, a100 = (Device("cuda", name, arch) for name, arch in (("H100", (9, 0)), ("A100", (8, 0))))
    for backend in ("triton", "scaled_mm", "cuda"):
        assert "fp8" in fp8_mlp.obstacle(backend, (32, 32, 48), torch.bfloat16, a100)
    assert "float32" in fp8_mlp.backends["scaled_mm"].limits((32, 32, 48), torch.float32)
    assert fp8_mlp.pick((32, 32, 48), torch.bfloat16, h100)[0] == "scaled_mm"  # unmeasured
    assert fp8_mlp.pick((32, 32, 48), torch.bfloat16, a100)[0] == "ref"


def test_cost():
    M, C, F = 10, 4, 6
    assert fp8_mlp_cost((M, C, F), torch.bfloat16) == (4 * M * C * F, M * C * 3 + 3 * M * F + 2 * C * F)
    flops, nbytes = fp8_mlp_cost((M, C, F), torch.bfloat16, "plain", True)
    assert (flops, nbytes) == (8 * M * C * F, 9 * M * C + 6 * M * F + C * F * 6)
    assert fp8_mlp_cost((M, C, F), torch.bfloat16, "sum", True)[1] == nbytes + 12 * C * F


# mutations ----------------------------------------------------------------

HERE, PRODUCTS, GEMM = module, fp8_products, gemm
MUTATIONS = {
    "no ReLU": {HERE: {"tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)": "acc"}},
    "no square": {HERE: {"        out = out * out": "        out = out"}},
    "the factor is not scaled": {HERE: {"unit *= 2.0 * tl.sqrt_rn(tl.load(factor_scale_ptr))": "unit *= 2.0"}},
    "the factor is the square": {
        HERE: {
            "acc * tl.sqrt(factor_desc.load([m, n]).to(tl.float32))":
            "acc * factor_desc.load([m, n]).to(tl.float32)",
        }
    },
    "half of the derivative": {HERE: {"unit *= 2.0 * tl": "unit *= tl"}},
    "products are not scaled": {HERE: {"tl.load(a_scale_ptr) * tl.load(b_scale_ptr)": "tl.load(a_scale_ptr)"}},
    "the unit is not squared": {HERE: {"        unit *= unit": "        unit = unit"}},
    "sizes have signs": {
        HERE: {
            "size = out.to(tl.int32, bitcast=True) & 0x7FFFFFFF": "size = out.to(tl.int32, bitcast=True)",
        }
    },
    "sizes of the last tile": {
        HERE: {
            "largest = tl.maximum(largest, tl.max(size, axis=1))": "largest = tl.max(size, axis=1)",
        }
    },
    "sizes have no unit": {HERE: {"to(tl.float32, bitcast=True) * unit": "to(tl.float32, bitcast=True)"}},
    "amax is overwritten": {HERE: {"tl.atomic_max(": "tl.atomic_xchg("}},
    "the scale multiplies": {
        HERE: {
            "gain = unit * tl.div_rn(1.0, tl.load(scale_ptr))": "gain = unit * tl.load(scale_ptr)",
        }
    },
    "the copy is not transposed": {HERE: {"q_t_desc.store([n, m], q.T)": "q_t_desc.store([m, n], q.T)"}},
    "the right half is the left": {
        HERE: {
            "left, right = halves(acc, BLOCK_M, PART)": "right, left = halves(acc, BLOCK_M, PART)",
        }
    },
    "no padding": {HERE: {"[N, columns_t], [columns_t, 1], [PART": "[N, M], [columns_t, 1], [PART"}},
    "gradients are not promoted": {HERE: {'config["BLOCK_K"] if a.dtype == E5M2 else None': "None"}},
    "dpre in e4m3": {
        HERE: {
            "(dy_scale, down_scale, post_scale, scale), amax, E5M2)":
            "(dy_scale, down_scale, post_scale, scale), amax, E4M3)",
            "_room(dy, down, E5M2)": "_room(dy, down, E4M3)",
        }
    },
    "y has the scale of dy": {HERE: {"(scale, down_fp8.scale), x.dtype": "(dy.scale, down_fp8.scale), x.dtype"}},
    "dup has the scale of post": {HERE: {"(scale, x_scale)": "(post_scale, x_scale)"}},
    "ddown has the scale of dpre": {HERE: {"(post_scale, dy_scale), ctx": "(post_scale, scale), ctx"}},
    "dx by down": {
        HERE: {
            "x_fp8.scale, up_fp8.q_t, up_fp8.scale, down_fp8.q":
            "x_fp8.scale, down_fp8.q_t, up_fp8.scale, down_fp8.q",
        }
    },
    "sums are exchanged": {HERE: {"ctx.sums[0], ctx": "ctx.sums[1], ctx", "ctx.sums[1], ctx": "ctx.sums[0], ctx"}},
    "sites are exchanged": {
        HERE: {
            "ctx.sites, ctx.w_dtype, ctx.how = sums, (dpre, dy)":
            "ctx.sites, ctx.w_dtype, ctx.how = sums, (dy, dpre)",
        }
    },
    "a fixed weight has a sum": {HERE: {"if ctx.needs_input_grad[2]:": "if True:"}},
    "x is kept": {
        HERE: {
            "down_fp8.scale, q, q_t, scale\n": "down_fp8.scale, q, q_t, scale, x\n",
            "post, post_t, post_scale = ctx": "post, post_t, post_scale, _ = ctx",
        }
    },
    "dy is quantised twice": {
        HERE: {
            "dx = dup = ddown = None": "dx = dup = ddown = None; quantise(dy, None, gradient=True)",
        }
    },
    "the sum is overwritten": {PRODUCTS: {"(a_scale, b_scale), accumulate=True": "(a_scale, b_scale)"}},
}  # fmt: skip
# one for each class of failure; the others run by `pytest -m mutations`
CLASSES = [
    "no square",
    "the factor is not scaled",
    "sizes of the last tile",
    "sizes have no unit",
    "no padding",
    "gradients are not promoted",
    "ddown has the scale of dpre",
    "x is kept",
]


def broken_op(edits, folder):
    """The op of edited modules, its reference as it is, its own module, and the products that it shares."""
    its_products, imports = PRODUCTS, {}
    if PRODUCTS in edits:
        stem = Path(mutant(PRODUCTS, edits[PRODUCTS], folder).__file__).stem
        its_products, imports = sys.modules.get(stem), {"from kernels.fp8_products import": f"from {stem} import"}
    copy = mutant(module, edits.get(HERE, {}) | imports, folder)
    its_products = sys.modules[stem] if PRODUCTS in edits else PRODUCTS
    backends = {"ref": fp8_mlp.backends["ref"], "triton": copy.fp8_mlp.backends["triton"]}
    return dataclasses.replace(fp8_mlp, backends=backends), copy, its_products


def stress(op, of, its_products):
    check_formula(op)
    for form in op.forms:
        result = check_op(op, inputs((37, 32, 48), form))
        assert ("dup" in result) == (form == "plain")
    for M in (15, 130):
        check_epilogues(of, M)
    check_fixed(op, ("down",))
    check_not_finite(op)
    check_micro_steps(op)
    check_saved(op)
    check_launches(op, of, its_products, gemm)


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
    stress(*broken_op({PRODUCTS: {"ROW_MULTIPLE": "ROW_MULTIPLE"}}, tmp_path))
