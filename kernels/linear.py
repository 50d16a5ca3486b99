"""A linear layer whose weight gradient can be added to an fp32 sum by the product that makes it.

    y = x w^T,   dx = dy w,   dw = dy^T x

Shapes    x (..., K); w (N, K); y (..., N). M is the product of the leading sizes of x
Dtypes    x, w, y bf16 or fp32, both the same
dw_sum    (N, K), contiguous, fp32 (float64 for an oracle): dw is added to it in backward, and w has no gradient. Micro-
          steps add to one sum, so that no bf16 gradient is made, kept, joined with those of other layers and added by
          passes of its own: 18 bytes an element of w less in each
Rounding  products are summed in fp32; y and dx are rounded once. dw is rounded once where it is returned, and not at
          all where the kernel adds it to dw_sum (the reference rounds it first)
Saves     x
Kernels   dw_sum += dy^T x by `gemm`; y and dx by torch.mm, as without dw_sum everything is
Backends  cublas adds by torch.addmm with an fp32 sum, on CUDA; auto means it where nothing is measured (`add_product`)
Limits    in the kernel rows of N and of K elements are multiples of 16 bytes
Bound     arithmetic: `linear_cost`
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import sizes
from kernels.gemm import check_sum, for_descriptor, gemm, summed, weight_gradient
from kernels.op import (
    DTYPES,
    Backend,
    Op,
    Problem,
    Shape,
    describe,
    dtype_name,
    needs_cuda,
    needs_triton,
    takes_dtypes,
    wide,
)

# reference


def linear_ref(x: Tensor, w: Tensor, *, dw_sum: Tensor | None = None) -> Tensor:
    return x @ summed(w, dw_sum).T


# kernel and cuBLAS


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.size(-1))


class _Linear(torch.autograd.Function):
    """y = x w^T, whose backward gives dx, and dw to `add`."""

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]  # torch declares (ctx, *args, **kwargs)
        ctx: Any, x: Tensor, w: Tensor, dw_sum: Tensor, add: Callable[[Tensor, Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        # not saved: autograd would refuse it, because other layers have added to the same storage since
        ctx.dw_sum, ctx.add = dw_sum, add
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, w = ctx.saved_tensors
        dx = dy @ w if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            ctx.add(dy, x, ctx.dw_sum)
        return dx, None, None, None


def _through(add: Callable[[Tensor, Tensor, Tensor], None]) -> Callable[..., Tensor]:
    def linear(x: Tensor, w: Tensor, *, dw_sum: Tensor | None = None) -> Tensor:
        if dw_sum is None:
            return x @ w.T
        y: Tensor = _Linear.apply(x, w, dw_sum, add)
        return y

    return linear


@torch.library.custom_op("redline::linear_add_triton", mutates_args=("dw_sum",))
def _add_triton(dy: Tensor, x: Tensor, dw_sum: Tensor) -> None:
    """dw_sum (N, K) += dy (..., N)^T x (..., K)."""
    gemm(for_descriptor(_rows(dy)), for_descriptor(_rows(x)), dw_sum, transposed=True, accumulate=True)


@_add_triton.register_fake
def _(dy, x, dw_sum):
    return None


def _add_cublas(dy: Tensor, x: Tensor, dw_sum: Tensor) -> None:
    weight_gradient(_rows(dy), _rows(x), dw_sum)


# cost


def linear_cost(
    shape: tuple[int, int, int], dtype: torch.dtype, form: str = "plain", backward: bool = False
) -> tuple[int, int]:
    """The least FLOPs and bytes: one product forward, two backward; each reads its operands once. A sum is read and
    written."""
    M, K, N = shape
    if not backward:
        return 2 * M * K * N, (M * (K + N) + K * N) * dtype.itemsize
    weight = K * N * (dtype.itemsize + 8 if form == "sum" else 2 * dtype.itemsize)
    return 4 * M * K * N, M * (2 * N + 2 * K) * dtype.itemsize + weight


# interface


def _check(x: Tensor, w: Tensor, *, dw_sum: Tensor | None = None) -> Problem:
    alike = x.dtype == w.dtype and x.device == w.device and x.dtype in (*DTYPES, torch.float64)
    if x.dim() == 0 or w.dim() != 2 or x.size(-1) != w.size(1) or 0 in w.shape or not alike:
        raise ValueError(
            f"linear: x is {describe(x)}, w {describe(w)}; expected (..., K) and (N, K) of one dtype, bfloat16 or "
            "float32, and one device"
        )
    if dw_sum is not None:
        check_sum("linear", "dw_sum", dw_sum, w)
    return Problem((x.numel() // x.size(-1), w.size(1), w.size(0)), x.dtype, x.device)


def _limits(shape: Shape, dtype: torch.dtype) -> str | None:
    if why := takes_dtypes(shape, dtype):
        return why
    _, K, N = shape
    unit = 16 // dtype.itemsize
    if K % unit or N % unit:
        return f"takes K and N that are multiples of {unit} in {dtype_name(dtype)}, not {K} and {N}"
    return None


def _sum_inputs(make: Any, M: int, K: int, N: int) -> dict[str, Any]:
    w = make(N, K)
    return {"x": make(M, K), "w": w, "dw_sum": make(N, K, dtype=wide(w.dtype)).detach()}


linear = Op(
    "linear",
    dims=("M", "K", "N"),
    cases=sizes.cases(lambda size: (size.tokens, size.C, (size.H + 2 * size.G) * size.D)),
    forms={"plain": lambda make, M, K, N: {"x": make(M, K), "w": make(N, K)}, "sum": _sum_inputs},
    cost=linear_cost,
    check=_check,
    unmeasured="cublas",
    backends={
        "ref": Backend(linear_ref),
        "triton": Backend(_through(_add_triton), needs_triton, _limits),
        "cublas": Backend(_through(_add_cublas), needs_cuda, takes_dtypes),
    },
)
