"""relu2_mlp against float64: ragged tiles, layouts, what is saved, refusals, and mutations."""

import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import run_and_get_code

import kernels.relu2_mlp as module
from bench.law import TINY, error, fill_dynamo_tables
from kernels import gemm
from kernels.op import Device
from kernels.relu2_mlp import relu2_mlp, relu2_mlp_cost
from tests.harness import DEVICE, LAYOUTS, Failed, check_op, mutant, randn
from tests.mutations import mutations

DTYPES = (torch.bfloat16, torch.float32)
SHAPES = (
    (5, 16, 32),
    (130, 24, 264),
    (64, 80, 40),
    (257, 72, 128),
    (20, 520, 32),
)  # M, C, F: within a tile, across tiles, ragged, long sums
triton_mlp = relu2_mlp.backends["triton"]


def inputs(shape, dtype=torch.float32, seed=0):
    return relu2_mlp.forms["plain"](randn(seed, dtype), *shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(shape, dtype):
    check_op(relu2_mlp, inputs(shape, dtype), factor=1.25)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(layout):
    check_op(relu2_mlp, inputs((20, 16, 24), torch.bfloat16), layout=layout, factor=1.25)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_compile_and_opcheck(dtype):
    check_op(relu2_mlp, inputs((9, 16, 32), dtype), compiled=True, opcheck=True)


def test_leading_sizes_and_no_rows():
    args = inputs((24, 16, 32))
    result = check_op(relu2_mlp, args | {"x": args["x"].view(2, 3, 4, 16)})
    assert result["y"].shape == (2, 3, 4, 16) == result["dx"].shape
    result = check_op(relu2_mlp, args | {"x": args["x"][:0]})
    assert result["y"].shape == (0, 16) and not result["dup"].any()


def test_more_tiles_than_programs(monkeypatch):
    """Programs go on to further tiles, each from a clean sum."""
    monkeypatch.setattr(gemm, "PROGRAMS_WITHOUT_GPU", 3)
    check_op(relu2_mlp, inputs((300, 16, 264)), factor=1.25)
    check_op(relu2_mlp, inputs((300, 16, 520), torch.bfloat16), factor=1.25)


def test_saves_the_input_and_the_squared_activation_only():
    args = {name: t.requires_grad_() for name, t in inputs((10, 16, 32)).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        triton_mlp(**args)
    fresh = [t for t in saved if not any(t.data_ptr() == given.data_ptr() for given in args.values())]
    assert len(saved) == 4 and [tuple(t.shape) for t in fresh] == [(10, 32)]
    assert (fresh[0] >= 0).all()


def test_post_is_rounded_once():
    """The exact square of the exact sum, but for fp32 sums and one rounding to bf16."""
    x, up = randn(0, torch.bfloat16)(64, 520), randn(1, torch.bfloat16)(48, 520)
    post = module._relu2_gemm(x, up, None)
    exact = torch.relu(x.double() @ up.double().T).square()
    assert error(post, exact) <= 1.02 * error(exact.bfloat16(), exact) + TINY


@pytest.mark.parametrize("fixed", [("x",), ("up",), ("x", "down"), ("up", "down")], ids=str)
def test_some_inputs_have_no_gradient(fixed):
    result = check_op(relu2_mlp, inputs((9, 16, 32)), no_grad=fixed, factor=1.25)
    assert set(result) == {"y", "dx", "dup", "ddown"} - {f"d{name}" for name in fixed}


@pytest.mark.parametrize("backend", ["ref", "triton", "cublas"])
def test_a_frozen_weight_adds_nothing(backend):
    args = {name: t.requires_grad_(name != "down") for name, t in inputs((9, 16, 32)).items()}
    sums = {name: torch.ones(32, 16, device=DEVICE) for name in ("dup_sum", "ddown_sum")}
    relu2_mlp.backends[backend](**args, **sums).sum().backward()
    assert (sums["ddown_sum"] == 1).all() and not (sums["dup_sum"] == 1).all() and args["up"].grad is None


@pytest.mark.skipif(DEVICE == "cuda", reason="reads what inductor writes for a CPU")
def test_the_compiler_copies_no_sum():
    """Both sums are parts of one storage, as the optimizer lays them: a clone would be as large as all of it."""
    torch.compiler.reset()
    total, args = torch.zeros(2, 32, 16), {name: t.requires_grad_() for name, t in inputs((9, 16, 32)).items()}

    def step(total, **args):
        dup_sum, ddown_sum = total.unbind()
        return triton_mlp(**args, dup_sum=dup_sum, ddown_sum=ddown_sum).sum()

    compiled = torch.compile(step, fullgraph=True)
    _, codes = run_and_get_code(lambda: compiled(total, **args).backward())
    lines = [line for code in codes for line in code.splitlines()]
    assert total.any() and sum("torch.ops.redline.add_product.default(" in line for line in lines) >= 2
    assert not [line for line in lines if "= empty_strided" in line and "(2, 32, 16)" in line]


def test_addresses_that_are_no_multiple_of_16_bytes():
    args = inputs((8, 16, 32), torch.bfloat16)
    shifted = {
        n: torch.empty(t.numel() + 1, dtype=t.dtype, device=DEVICE)[1:].view(t.shape).copy_(t) for n, t in args.items()
    }
    assert shifted["x"].data_ptr() % 16
    assert torch.equal(triton_mlp(**shifted), triton_mlp(**args))


def test_nothing_is_kept_alive_by_a_launch():
    args = inputs((8, 16, 32))
    kept = weakref.ref(args["x"])
    triton_mlp(**args)
    del args
    gc.collect()
    assert kept() is None


def test_what_is_not_a_number_stays_one():
    args = inputs((6, 16, 32))
    args["x"][2, 3] = torch.nan
    y = triton_mlp(**args)
    assert y[2].isnan().all() and y[[0, 1, 3, 4, 5]].isfinite().all()
    args = {name: t.requires_grad_() for name, t in inputs((6, 16, 32)).items()}
    dy = torch.ones(6, 16, device=DEVICE)
    dy[4, 0] = torch.nan
    triton_mlp(**args).backward(dy)
    assert args["x"].grad[4].isnan().all() and args["x"].grad[:4].isfinite().all()


def test_dead_units_have_no_gradient():
    """Where pre is negative or 0, sqrt(post) is 0: no NaN, no gradient."""
    args = {name: t.requires_grad_() for name, t in inputs((8, 16, 32)).items()}
    with torch.no_grad():
        args["x"].copy_(args["x"].abs())
        args["up"][:16] = -args["up"][:16].abs()
    triton_mlp(**args).sum().backward()
    assert not args["up"].grad[:16].any() and args["up"].grad[16:].any()
    assert not args["down"].grad[:16].any() and args["x"].grad.isfinite().all()


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(up=torch.ones(8, 4)), "expected .*(F, C)"),
        (dict(down=torch.ones(16, 8)), "expected .*(F, C)"),
        (dict(x=torch.ones(2, 12)), "expected .*(F, C)"),
        (dict(x=torch.ones(2, 8).bfloat16()), "one dtype"),
        (dict(x=torch.ones(2, 8).half(), up=torch.ones(8, 8).half(), down=torch.ones(8, 8).half()), "float16"),
    ],
)
@pytest.mark.parametrize("backend", relu2_mlp.backends)
def test_bad_calls_are_refused(backend, change, says):
    with pytest.raises(ValueError, match=says):
        relu2_mlp.checked(backend)(
            **{"x": torch.ones(2, 8), "up": torch.ones(8, 8), "down": torch.ones(8, 8), **change}
        )


def test_the_kernel_refuses_what_it_cannot_take():
    for C, dtype, says in ((6, torch.float32, "multiples of 4 .*not 6 and 8"), (8, torch.float64, "float64")):
        args = [torch.ones(n, C, dtype=dtype) for n in (2, 8, 8)]
        relu2_mlp.checked("ref")(*args)
        with pytest.raises(ValueError, match=says):
            relu2_mlp.checked("triton")(*args)


# cuBLAS ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 16, 32), (130, 24, 264), (20, 7, 33)], ids=str)
def test_cublas_agrees_with_float64(shape, dtype):
    """Any C and F."""
    check_op(relu2_mlp, inputs(shape, dtype), backend="cublas", factor=1.25)


def test_cublas_layouts_leading_sizes_and_no_rows():
    args = inputs((24, 16, 32))
    for layout in LAYOUTS[1:]:
        check_op(relu2_mlp, args, backend="cublas", layout=layout, factor=1.25)
    result = check_op(relu2_mlp, args | {"x": args["x"].view(2, 3, 4, 16)}, backend="cublas")
    assert result["y"].shape == (2, 3, 4, 16) == result["dx"].shape
    assert check_op(relu2_mlp, args | {"x": args["x"][:0]}, backend="cublas")["y"].shape == (0, 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cublas_is_open_to_the_compiler(dtype):
    """Of one graph forward, two products, and four backward, nothing opaque to it; and the same bits."""
    graphs = []

    def count(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    fill_dynamo_tables()
    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=count, bw_compiler=count)
    compiled = torch.compile(relu2_mlp.checked("cublas"), fullgraph=True, dynamic=False, backend=backend)
    results = []
    for function in (compiled, relu2_mlp.checked("cublas")):
        args = {name: t.requires_grad_() for name, t in inputs((9, 16, 32), dtype).items()}
        function(**args).square().sum().backward()
        results.append([t.grad for t in args.values()])
    assert all(map(torch.equal, *results))
    assert [sum(name.startswith("aten.mm") for name in graph) for graph in graphs] == [2, 4]
    assert not any("redline" in name for graph in graphs for name in graph)


def test_cublas_saves_the_input_and_the_squared_activation_only():
    args, saved = {name: t.requires_grad_() for name, t in inputs((10, 16, 32)).items()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        relu2_mlp.backends["cublas"](**args)
    fresh = [t for t in saved if not any(t.data_ptr() == given.data_ptr() for given in args.values())]
    assert len(saved) == 4 and [tuple(t.shape) for t in fresh] == [(10, 32)]


def test_cublas_needs_a_gpu():
    assert "GPU" in relu2_mlp.obstacle("cublas", (8, 16, 32), torch.bfloat16, Device("cpu", "cpu", None))
    old = Device("cuda", "V100", (7, 0))
    assert relu2_mlp.obstacle("cublas", (8, 16, 32), torch.bfloat16, old) is None
    assert relu2_mlp.pick((8, 7, 33), torch.bfloat16, Device("cuda", "H100", (9, 0)))[0] == "cublas"
    assert "float64" in relu2_mlp.obstacle("cublas", (8, 16, 32), torch.float64, old)


# sums of gradients ---------------------------------------------------------


def micro_steps(function, dtype, steps=2, given=("dup_sum", "ddown_sum"), wide=False):
    """Results of a few micro-steps by name: sums where given, else what autograd summed; and the last dx."""
    first = inputs((37, 24, 40), dtype)
    up, down = ((t.double() if wide else t).requires_grad_() for t in (first["up"], first["down"]))
    totals = {name: 0.5 * torch.ones_like(up, dtype=torch.float64 if wide else torch.float32) for name in given}
    for step in range(steps):
        x = inputs((37, 24, 40), dtype, seed=step)["x"]
        dy = randn(7 + step, dtype)(37, 24)
        x, dy = (t.double() if wide else t for t in (x, dy))
        y = function(x.requires_grad_(), up, down, **totals)
        y.backward(dy)
    found = {"dx": x.grad, "dup": totals.get("dup_sum", up.grad), "ddown": totals.get("ddown_sum", down.grad)}
    for w, name in ((up, "dup_sum"), (down, "ddown_sum")):
        if (w.grad is None) != (name in given):
            raise Failed(f"the weight of {name} has a gradient, or none")
    return found


@pytest.mark.parametrize("given", [("dup_sum", "ddown_sum"), ("dup_sum",), ("ddown_sum",)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", relu2_mlp.backends)
def test_sums_of_two_micro_steps(backend, dtype, given):
    """The law of what one step's product is: the kernel does not round a product before it adds it."""
    want = micro_steps(relu2_mlp.checked("ref"), dtype, given=given, wide=True)
    like = micro_steps(relu2_mlp.checked("ref"), dtype, given=given)
    got = micro_steps(relu2_mlp.checked(backend), dtype, given=given)
    for name, t in got.items():
        assert error(t, want[name]) <= 1.25 * error(like[name], want[name]) + TINY, name
        assert t.dtype == like[name].dtype


@pytest.mark.parametrize("through", ["aot_eager", "inductor"])
@pytest.mark.parametrize("backend", relu2_mlp.backends)
def test_sums_compile_as_one_graph(backend, through):
    function = relu2_mlp.checked(backend)
    fill_dynamo_tables()
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=through)
    want, got = micro_steps(function, torch.float32), micro_steps(compiled, torch.float32)
    for name, t in got.items():
        assert torch.equal(t, want[name]) if through == "aot_eager" else error(t, want[name].double()) < 1e-6, name


def test_sums_that_are_slices_of_a_bank():
    """As the model keeps them."""
    bank, args = torch.zeros(3, 2, 32, 16, device=DEVICE), inputs((8, 16, 32))
    x, up, down = (t.requires_grad_() for t in args.values())
    triton_mlp(x, up, down, dup_sum=bank[1, 0], ddown_sum=bank[1, 1]).sum().backward()
    want = torch.autograd.grad(triton_mlp(x, up, down).sum(), (up, down))
    assert torch.equal(bank[1, 0], want[0]) and torch.equal(bank[1, 1], want[1])
    assert not bank[[0, 2]].any()


def test_sums_without_rows_or_gradients():
    args = {name: t.requires_grad_() for name, t in inputs((8, 16, 32), torch.bfloat16).items()}
    totals = {name: torch.ones(32, 16, device=DEVICE) for name in ("dup_sum", "ddown_sum")}
    empty = args["x"].detach()[:0].requires_grad_()
    triton_mlp(empty, args["up"], args["down"], **totals).sum().backward()
    with torch.no_grad():
        assert torch.equal(triton_mlp(**args, **totals), triton_mlp(**args))
    assert all((t == 1).all() for t in totals.values()) and empty.grad.shape == (0, 16)


@pytest.mark.parametrize("backend", relu2_mlp.backends)
@pytest.mark.parametrize("name", ["dup_sum", "ddown_sum"])
@pytest.mark.parametrize(
    "total, says",
    [
        (torch.zeros(32, 16).bfloat16(), "is .32, 16. bfloat16 .*; expected contiguous .32, 16. float32"),
        (torch.zeros(16, 32), "is .16, 32. float32"),
        (torch.zeros(16, 32).T, "strides .1, 32."),
        (torch.zeros(32, 16, device="meta"), "on meta; expected"),
        (torch.zeros(32, 16, requires_grad=True), "give it detached"),
        (None, ""),
    ],
    ids=["dtype", "shape", "strides", "device", "gradient", "none"],
)
def test_sums_that_do_not_fit_are_refused(backend, name, total, says):
    args = inputs((8, 16, 32))
    if total is None:
        relu2_mlp.checked(backend)(**args, **{name: None})
        return
    total = total if total.is_meta else total.to(DEVICE)
    with pytest.raises(ValueError, match=f"relu2_mlp: {name} .*{says}"):
        relu2_mlp.checked(backend)(**args, **{name: total})


def test_cost():
    assert relu2_mlp_cost((10, 4, 16), torch.bfloat16)[0] == 2 * 2 * 10 * 4 * 16
    assert relu2_mlp_cost((10, 4, 16), torch.bfloat16, backward=True)[0] == 4 * 2 * 10 * 4 * 16
    assert relu2_mlp_cost((10, 4, 16), torch.bfloat16)[1] == 2 * (10 * (8 + 32) + 128)


MUTATIONS = {
    "no ReLU": {"acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)\n": "pass\n"},
    "no square": {"        acc = acc * acc\n": ""},
    "the factor is not doubled": {"acc * (2.0 * tl.sqrt(": "acc * (1.0 * tl.sqrt("},
    "the factor is post": {
        "tl.sqrt(factor_desc.load([m, n]).to(tl.float32))": "factor_desc.load([m, n]).to(tl.float32)"
    },
    "the halves are swapped": {"left, right = halves": "right, left = halves"},
    "ragged tiles are dropped": {"tl.cdiv(M, BLOCK_M) * tiles_n": "M // BLOCK_M * tiles_n"},
    "the upstream gradient is one": {"dpre = ctx.dpre(dy,": "dpre = ctx.dpre(torch.ones_like(dy),"},
    "ddown has the wrong activation": {"weight_gradient(post, dy,": "weight_gradient(dpre, dy,"},
    "a frozen weight has a sum": {
        " if ctx.needs_input_grad[1] else None": "",
        " if ctx.needs_input_grad[2] else None": "",
    },
    "sums are swapped": {"ctx.dpre = dup_sum, ddown_sum, functions": "ctx.dpre = ddown_sum, dup_sum, functions"},
    "pre is rounded": {
        "        acc = acc * acc\n": "        acc = acc.to(tl.bfloat16).to(tl.float32)\n        acc = acc * acc\n"
    },
    "post is truncated": {
        "acc.to(out_desc.dtype)": "(acc.to(tl.int32, bitcast=True) & -65536).to(tl.float32, "
        "bitcast=True).to(out_desc.dtype)"
    },
}
CUBLAS_MUTATIONS = {
    "no ReLU": {
        "return F.relu(x.reshape(-1, x.size(-1)) @ up.T).square()": "return (x.reshape(-1, x.size(-1)) @ up.T).square()"
    },
    "the factor is not doubled": {"(2 * post.to(wide(": "(1 * post.to(wide("},
    "the factor is post": {"post.to(wide(post.dtype)).sqrt()": "post.to(wide(post.dtype))"},
    "gradients of weights are swapped": {
        "return (dpre @ up).view(x.shape), dup, ddown,": "return (dpre @ up).view(x.shape), ddown, dup,"
    },
    "dx has the wrong weight": {
        "(dpre @ up).view(x.shape), dup, ddown, None": "(dpre @ down).view(x.shape), dup, ddown, None"
    },
}
# one for each class of failure; the others run by `pytest -m mutations`
CLASSES = [
    "no ReLU",
    "the factor is not doubled",
    "ragged tiles are dropped",
    "the upstream gradient is one",
    "post is truncated",
]


@pytest.mark.skipif(DEVICE == "cuda", reason="a broken kernel may end the CUDA context of the other tests")
@pytest.mark.parametrize("name", mutations(MUTATIONS, always=CLASSES))
def test_a_broken_kernel_is_noticed(name, tmp_path, monkeypatch):
    fails(mutant(module, MUTATIONS[name], tmp_path).relu2_mlp, monkeypatch)


@pytest.mark.parametrize("name", CUBLAS_MUTATIONS)
def test_a_broken_cublas_is_noticed(name, tmp_path):
    with pytest.raises(Failed):
        check_op(mutant(module, CUBLAS_MUTATIONS[name], tmp_path).relu2_mlp, inputs((20, 24, 40)), backend="cublas")


GEMM_MUTATIONS = {
    "the sum starts at one": {"acc = tl.zeros(": "acc = 1.0 + tl.zeros("},
    "the last columns of K are left out": {"range(0, K, BLOCK_K)": "range(0, K - BLOCK_K + 1, BLOCK_K)"},
    "all tiles are those of the first rows": {"a_desc.load([m, k])": "a_desc.load([0, k])"},
    "all tiles are those of the first columns": {"b_desc.load([n, k])": "b_desc.load([0, k])"},
    "the halves are swapped": {"(0, 2, 1)))": "(0, 2, 1)))[::-1]"},
    "there is one program too few": {"min(per_sm * sms, tiles)": "min(per_sm * sms, tiles - 1)"},
}


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
@pytest.mark.parametrize("name", GEMM_MUTATIONS)
def test_a_broken_gemm_is_noticed(name, tmp_path, monkeypatch):
    """What relu2_mlp takes from kernels/gemm.py, which lm_head_loss takes as well."""
    path = Path(mutant(gemm, GEMM_MUTATIONS[name], tmp_path).__file__)
    monkeypatch.syspath_prepend(tmp_path)
    broken = mutant(module, {"from kernels.gemm import": f"from {path.stem} import"}, tmp_path).relu2_mlp
    fails(broken, monkeypatch, sys.modules[path.stem])


def fails(broken, monkeypatch, its_gemm=gemm):
    monkeypatch.setattr(its_gemm, "PROGRAMS_WITHOUT_GPU", 2)  # of more tiles
    with pytest.raises(Failed):
        check_op(broken, inputs((140, 24, 40), torch.bfloat16), factor=1.25)
        check_op(broken, inputs((200, 24, 264), torch.bfloat16), factor=1.25)
        check_op(broken, inputs((20, 24, 40)), factor=1.25)
        for dtype in DTYPES:
            want = micro_steps(relu2_mlp.checked("ref"), dtype, wide=True)
            for name, t in micro_steps(broken.checked("triton"), dtype).items():
                if not error(t, want[name]) < 0.01:
                    raise Failed(name)


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
def test_a_copy_that_is_not_broken_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(gemm, "PROGRAMS_WITHOUT_GPU", 2)
    same = mutant(module, {}, tmp_path).relu2_mlp
    check_op(same, inputs((140, 24, 40), torch.bfloat16), factor=1.25)
    check_op(same, inputs((200, 24, 264), torch.bfloat16), factor=1.25)
