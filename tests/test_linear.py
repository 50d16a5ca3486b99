"""linear against float64: ragged tiles, layouts, weight gradients added to a sum, refusals, and mutations."""

import dataclasses

import pytest
import torch

import kernels.linear as module
from kernels import gemm
from kernels.linear import linear, linear_cost
from kernels.op import Device
from tests.harness import DEVICE, LAYOUTS, Failed, check_op, mutant, randn
from tests.mutations import mutations

DTYPES = (torch.bfloat16, torch.float32)
SHAPES = ((5, 16, 32), (130, 24, 264), (257, 72, 128), (700, 16, 24))  # M, K, N: within a tile, ragged, long sums
FORMS = pytest.mark.parametrize("form", linear.forms)


def inputs(shape, form="sum", dtype=torch.float32, seed=0):
    return linear.forms[form](randn(seed, dtype), *shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@FORMS
def test_agrees_with_float64(form, shape, dtype):
    result = check_op(linear, inputs(shape, form, dtype), factor=1.25)
    assert ("dw" in result) == (form == "plain") and ("dw_sum" in result) == (form == "sum")


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(layout):
    check_op(linear, inputs((20, 16, 24), dtype=torch.bfloat16), layout=layout, factor=1.25)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_compile_and_opcheck(dtype):
    check_op(linear, inputs((9, 16, 32), dtype=dtype), compiled=True, opcheck=True)


def test_leading_sizes_and_no_rows():
    args = inputs((24, 16, 32))
    result = check_op(linear, args | {"x": args["x"].view(2, 3, 4, 16)})
    assert result["y"].shape == (2, 3, 4, 32)
    result = check_op(linear, args | {"x": args["x"][:0]})
    assert torch.equal(result["dw_sum"], args["dw_sum"])


def test_cublas_adds_as_well():
    """On a CPU with the kernel in cuBLAS's place."""
    check_op(linear, inputs((20, 16, 24), dtype=torch.bfloat16), backend="cublas", compiled=True, factor=1.25)
    check_op(linear, inputs((20, 16, 24)), backend="cublas", factor=1.25)


def test_where_nothing_is_measured_a_gpu_takes_cublas():
    gpu = Device("cuda", "a GPU", (9, 0))
    assert "needs an NVIDIA GPU" in linear.backends["cublas"].needs(Device("cpu", "cpu", None))
    assert linear.pick((64, 16, 16), torch.bfloat16, gpu) == ("cublas", "unmeasured here")


@pytest.mark.parametrize("fixed", [("x",), ("w",)], ids=str)
def test_some_inputs_have_no_gradient(fixed):
    """A weight that is fixed leaves its sum alone."""
    args = inputs((9, 16, 32))
    result = check_op(linear, args, no_grad=fixed, factor=1.25)
    assert torch.equal(result["dw_sum"], args["dw_sum"]) == (fixed == ("w",))


@pytest.mark.parametrize("mode", ["eager", "aot_eager", "inductor"])
def test_layers_of_a_bank_add_to_one_storage(mode):
    """Micro-steps and layers add to slices of one tensor, in place; autograd gives the bank no gradient."""
    make = randn(0, torch.float32)
    bank, x = torch.nn.Parameter(make(3, 16, 16)), make(2, 5, 16)
    triton = linear.backends["triton"]

    def model(x, bank, total):
        for w, dw_sum in zip(bank.unbind(), total.unbind()):
            x = torch.tanh(triton(x, w, dw_sum=dw_sum))
        return x.square().sum()

    def micro_steps(function):
        total = torch.zeros(3, 16, 16, device=DEVICE)
        at = total.data_ptr()
        for part in (x, x + 1):
            function(part, bank, total).backward()
        assert total.data_ptr() == at and bank.grad is None
        return total

    torch.compiler.reset()
    want = micro_steps(model)
    exact = torch.zeros(3, 16, 16, device=DEVICE).double()
    for part in (x, x + 1):
        wide = bank.detach().double().requires_grad_()
        y = part.double()
        for w in wide.unbind():
            y = torch.tanh(y @ w.T)
        y.square().sum().backward()
        exact += wide.grad
    assert (want.double() - exact).norm() / exact.norm() < 1e-5
    if mode != "eager":
        got = micro_steps(torch.compile(model, backend=mode, fullgraph=True))
        assert (got - want).norm() / want.norm() < 1e-5


@pytest.mark.parametrize(
    "change, says",
    [
        ({"x": torch.ones(2, 8)}, r"x is \(2, 8\)"),
        ({"w": torch.ones(32, 16).bfloat16()}, "one dtype"),
        ({"w": torch.ones(0, 16)}, r"w \(0, 16\)"),
        ({"x": torch.ones(2, 16).half(), "w": torch.ones(32, 16).half()}, "float16"),
        ({"dw_sum": torch.zeros(16, 32)}, r"dw_sum is \(16, 32\)"),
        ({"dw_sum": torch.zeros(32, 16).bfloat16()}, "dw_sum is .*expected contiguous .*float32"),
        ({"dw_sum": torch.zeros(16, 32).T}, "dw_sum is .*strides"),
    ],
)
@pytest.mark.parametrize("backend", ["ref", "triton"])
def test_bad_calls_are_refused(backend, change, says):
    args = {"x": torch.ones(2, 16), "w": torch.ones(32, 16)} | change
    with pytest.raises(ValueError, match=says):
        linear.checked(backend)(**{name: t.to(DEVICE) for name, t in args.items()})


def test_the_kernel_refuses_ragged_rows():
    x, w = torch.ones(2, 12, device=DEVICE).bfloat16(), torch.ones(16, 12, device=DEVICE).bfloat16()
    linear.checked("ref")(x, w)
    with pytest.raises(ValueError, match="multiples of 8 in bfloat16, not 12 and 16"):
        linear.checked("triton")(x, w)


def test_cost():
    assert linear_cost((10, 4, 6), torch.bfloat16) == (480, 2 * (100 + 24))
    assert linear_cost((10, 4, 6), torch.bfloat16, "plain", True) == (960, 400 + 96)
    assert linear_cost((10, 4, 6), torch.bfloat16, "sum", True) == (960, 400 + 240)


MUTATIONS = {
    "the sum is overwritten": {"transposed=True, accumulate=True": "transposed=True"},
    "operands are swapped": {
        "gemm(for_descriptor(_rows(dy)), for_descriptor(_rows(x))":
        "gemm(for_descriptor(_rows(x)), for_descriptor(_rows(dy))"
    },
    "dx is a little wrong": {"dx = dy @ w if": "dx = dy @ w * 1.01 if"},
    "a fixed weight has a sum": {"if ctx.needs_input_grad[1]:": "if True:"},
    "w has a gradient besides": {"return dx, None, None, None": "return dx, ctx.dw_sum.to(w.dtype), None, None"},
}  # fmt: skip


@pytest.mark.skipif(DEVICE == "cuda", reason="a broken kernel may end the CUDA context of the other tests")
@pytest.mark.parametrize("name", mutations(MUTATIONS, always=MUTATIONS))
def test_a_broken_layer_is_noticed(name, tmp_path, monkeypatch):
    monkeypatch.setattr(gemm, "PROGRAMS_WITHOUT_GPU", 2)
    triton = mutant(module, MUTATIONS[name], tmp_path).linear.backends["triton"]
    broken = dataclasses.replace(linear, backends={"ref": linear.backends["ref"], "triton": triton})
    with pytest.raises((Failed, AssertionError, RuntimeError)):
        result = check_op(broken, inputs((130, 24, 24)), factor=1.25)
        assert "dw" not in result
        check_op(broken, inputs((9, 16, 32)), no_grad=("w",))
        monkeypatch.setattr(f"{__name__}.linear", broken)
        test_some_inputs_have_no_gradient(("w",))
