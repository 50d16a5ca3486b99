"""The accuracy law and its harness see errors at the bound, results that do not repeat, and writes beside tensors."""

import functools
import itertools
import types
from collections import namedtuple

import pytest
import torch

from bench import law
from bench.law import Failed, judge, judge_rows, limit, poisoned_allocations
from tests.harness import check_op

X = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))


def op(kernel, reference=lambda x: 2 * x):
    return types.SimpleNamespace(name="twice", backends={"ref": reference, "triton": kernel})


def test_a_right_kernel_passes():
    assert set(check_op(op(lambda x: x + x), {"x": X})) == {"y", "dx"}


@pytest.mark.parametrize("n, draws", [(1, 1), (1, 8), (10_000, 1)])
def test_the_bound_is_where_it_is_said_to_be(n, draws):
    allowed = (2 * 1e-3 + law.TINY) * (1 + 3 / (n * draws) ** 0.5)
    assert limit(1e-3, n * draws) == pytest.approx(allowed)
    judge("y", [0.999 * allowed] * draws, [1e-3] * draws, n)
    with pytest.raises(Failed, match="y is off by"):
        judge("y", [1.001 * allowed] * draws, [1e-3] * draws, n)
    with pytest.raises(Failed):
        judge("y", [float("nan")] * draws, [1e-3] * draws, n)


def test_one_bad_row_fails_where_the_mean_does_not():
    want = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)).double()
    like = want * (1 + 1e-3)
    got = like.clone()
    got[7] *= 1.01
    assert law.error(got, want) < limit(law.error(like, want), want.numel())
    judge_rows("y", like, like, want)
    with pytest.raises(Failed, match="a row of y"):
        judge_rows("y", got, like, want)


def test_one_bad_row_of_4000_fails():
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    bad = torch.ones(4000, 1)
    bad[1234] = 1.05
    with pytest.raises(Failed, match="a row of twice triton: y"):
        check_op(op(lambda x: (1.1 * bad * x).bfloat16(), lambda x: 1.1 * x), {"x": x}, no_grad=("x",))
    check_op(op(lambda x: (1.1 * x.float()).bfloat16(), lambda x: 1.1 * x), {"x": x}, no_grad=("x",))


def test_a_kernel_that_alternates_its_results_fails():
    calls = itertools.count()
    with pytest.raises(Failed, match="differs between two runs"):
        check_op(op(lambda x: 2 * x + (1e-7 if next(calls) % 2 else 0)), {"x": X}, factor=10)


@pytest.mark.parametrize("place", [-1, 8])
def test_writing_beside_an_allocation_fails(place):
    with pytest.raises(Failed, match="wrote outside"), poisoned_allocations():
        y = torch.empty(8)
        y.as_strided((1,), (1,), y.storage_offset() + place).fill_(0)


def test_reading_beside_an_input_fails():
    def shifted(x):
        return 2 * x.as_strided(x.shape, x.stride(), x.storage_offset() + 1)

    with pytest.raises(Failed, match="y is off by nan"):
        check_op(op(shifted), {"x": X}, no_grad=("x",))


def test_an_element_that_is_not_written_fails():
    def lazy(x):
        y = torch.empty_like(x)
        y[1:] = 2 * x[1:]
        return y

    with pytest.raises(Failed, match="y is off by nan"):
        check_op(op(lazy), {"x": X}, no_grad=("x",))


class Carrier(torch.autograd.Function):
    """One number for all elements, and a gradient."""

    @staticmethod
    def forward(ctx, x, gradient, seen):
        ctx.gradient = gradient
        return x.new_full((), seen).expand(x.shape)

    @staticmethod
    def backward(ctx, dy):
        return ctx.gradient * dy, None, None


def test_a_placeholder_is_nan_throughout_and_carries_a_gradient():
    """It has no storage but for one number: NaN everywhere may be a fault of the reference that a kernel shares."""

    def placeholder(x, *, gradient=2, seen=torch.nan):
        return Carrier.apply(x, gradient, seen)

    assert set(check_op(op(placeholder, placeholder), {"x": X})) == {"y", "dx"}
    for wrong, says in (({"gradient": 3}, "dx is off by"), ({"seen": 0}, "y is off by inf")):
        with pytest.raises(Failed, match=says):
            check_op(op(functools.partial(placeholder, **wrong), placeholder), {"x": X})
    with pytest.raises(Failed, match="y is off by nan"):
        check_op(op(placeholder), {"x": X})
    with pytest.raises(Failed, match="y is off by inf"):
        check_op(op(lambda x: 2 * x + torch.where(x > 0, torch.nan, 0), placeholder), {"x": X})
    with pytest.raises(Failed, match="y is NaN, and no placeholder"):
        check_op(op(lambda x: 2 * x + torch.nan, placeholder), {"x": X})


def test_a_tuple_among_outputs_is_named_behind_it():
    Inner, Outer = namedtuple("Inner", "q scale"), namedtuple("Outer", "y fp8 h")
    one, two = torch.ones(1), torch.ones(2)
    assert law.named(Outer(one, Inner(two, one), None)) == {"y": one, "fp8.q": two, "fp8.scale": one}


def test_what_an_op_leaves_in_its_inputs_is_a_result_unless_it_returns_that_name():
    states = law.evaluate(lambda p, g: p.sub_(g), {"p": torch.ones(3), "g": torch.full((3,), 0.25)}, None)
    assert states["p"].tolist() == [0.75] * 3 and set(states) == {"p", "g", "y"}
    returned = law.evaluate(lambda y: 2 * y, {"y": torch.ones(2)}, None)
    assert returned["y"].tolist() == [2, 2]
