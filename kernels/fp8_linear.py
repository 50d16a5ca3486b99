"""A linear layer whose three products are made in fp8, from one fp8 copy of its weight for all micro-steps.

    q_x = e4m3(x / s_x),  q_w = e4m3(w / s_w),  q_dy = e5m2(dy / s_dy)
    y = s_x s_w q_x q_w^T,   dx = s_dy s_w q_dy q_w,   dw = s_dy s_x q_dy^T q_x

The scheme is that of nanochat [92d63d4, fp8.py] and of torchao's float8 with tensorwise scales. Both quantise the
weight in every micro-step, and copy three operands once more to transpose them; here the pass that quantises writes
the transposed copy as well.

Shapes    x (..., K); w (N, K); y (..., N). M is the product of the leading sizes of x
Dtypes    x, w, y bf16 or fp32, all the same; fp8 is the e4m3 copy of w that `quantise_weight` makes, once per optimizer
          step
Scales    one fp32 number a tensor. s_x = max |x| / 448, or the given x_scale (delayed scaling): what exceeds it then
          saturates. s_dy = max |dy| / 57344. A tensor of zeros has TINY_SCALE
NaN, inf  a NaN of x or dy makes its scale NaN, and so all of its products; an infinity makes NaN where it was.
          Under x_scale a NaN stays in its row of y, and an infinity saturates
dw_sum    (N, K), contiguous, fp32 (float64 for an oracle): dw is added to it in backward, and w has no gradient
Rounding  x, w and dy to nearest even
          y: sums stay in the tensor core, whose fp8 accumulator on Hopper is narrower than fp32; rounded once
          dx: sums are promoted to fp32 every 128 products; rounded once
          dw: promoted alike, since micro-steps are summed; added to dw_sum as it is (the reference rounds it first),
          or rounded once to the dtype of w. It is the gradient of the unrounded w: roundings are passed through
Reference the same roundings; it multiplies fp8 numbers in fp32. In float64 it is the oracle: exact products of the same
          rounded operands
Saves     x in e4m3, transposed, K M bytes, and its scale; of the copy of w q_t and scale, which have to stay until
          backward (autograd refuses where they changed). Neither x nor w
Backends  triton multiplies by `gemm`. scaled_mm takes y and dx from torch._scaled_mm (cuBLAS), of which y accumulates
          fast, in the tensor core as well; in bf16. cuda quantises by csrc/quantise_weight.cu and multiplies as
          scaled_mm where that takes the dtype, else as triton. dw is `gemm`'s in all, which adds in bulk
Limits    in kernels K and N are multiples of 16, whose rows in fp8 begin at multiples of 16 bytes; M is any
Bound     arithmetic. Bytes, beside those of the products: `fp8_linear_cost`
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import extension, sizes
from kernels.fp8 import (
    E4M3,
    E5M2,
    ROW_MULTIPLE,
    Fp8Weight,
    amax_scale,
    check_capability,
    check_fp8_weight,
    fp8_copy,
    needs_fp8,
    quantised,
    transpose,
)
from kernels.gemm import check_sum, gemm, summed
from kernels.op import (
    DTYPES,
    Backend,
    Device,
    Op,
    Problem,
    Shape,
    check_number,
    describe,
    dtype_name,
    takes_dtypes,
    wide,
)
from kernels.sizes import round_up
from kernels.tile import as_rows

# reference


class _Reference(torch.autograd.Function):
    """Numbers of fp8 are multiplied in fp32, or in float64, unscaled, and the products scaled."""

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]  # torch declares (ctx, *args, **kwargs)
        ctx: Any, x: Tensor, w: Tensor, q: Tensor, w_scale: Tensor, x_scale: Tensor | None
    ) -> Tensor:
        scale = amax_scale(x, torch.finfo(E4M3).max) if x_scale is None else x_scale.float()
        q_x, acc = quantised(x, scale, E4M3), wide(x.dtype)
        ctx.save_for_backward(q_x, scale, q, w_scale)
        ctx.dtypes = x.dtype, w.dtype
        return ((q_x.to(acc) @ q.to(acc).T) * (scale * w_scale)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        q_x, x_scale, q, w_scale = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        acc = wide(x_dtype)
        scale = amax_scale(dy, torch.finfo(E5M2).max)
        q_dy = quantised(dy, scale, E5M2).to(acc)
        dx = ((q_dy @ q.to(acc)) * (scale * w_scale)).to(x_dtype)
        dw = q_dy.reshape(-1, q.size(0)).T @ q_x.to(acc).reshape(-1, q.size(1))
        return dx, (dw * (scale * x_scale)).to(w_dtype), None, None, None


def fp8_linear_ref(
    x: Tensor, w: Tensor, fp8: Fp8Weight, *, x_scale: Tensor | None = None, dw_sum: Tensor | None = None
) -> Tensor:
    y: Tensor = _Reference.apply(x, summed(w, dw_sum), fp8.q, fp8.scale, x_scale)
    return y


# torch ops


@torch.library.custom_op("redline::fp8_quantise", mutates_args=())
def _quantise(t: Tensor, given: Tensor | None, gradient: bool, cuda: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q (M, C) of t (..., C), in e5m2 if t is a gradient, q_t (C, M') and the scale, which may be given.

    M' is M rounded up to ROW_MULTIPLE: columns beyond M are zeros, which add nothing to a sum over rows.
    """
    check_capability("fp8_linear", t.device)
    t, dtype = as_rows(t), E5M2 if gradient else E4M3
    M, C = t.shape
    # an op's results share no memory with its arguments
    scale = amax_scale(t, torch.finfo(dtype).max) if given is None else given.reshape(()).clone()
    q, q_t = t.new_empty(M, C, dtype=dtype), t.new_empty(C, round_up(M, ROW_MULTIPLE), dtype=dtype)
    if M:
        transpose(t, q, q_t, scale, cuda)
    return q, q_t, scale


@_quantise.register_fake
def _(t, given, gradient, cuda):
    M, C = t.reshape(-1, t.size(-1)).shape
    q = t.new_empty(M, C, dtype=E5M2 if gradient else E4M3)
    # what round_up does, of sizes that may be symbols
    columns = (M + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
    return q, q.new_empty(C, columns), t.new_empty((), dtype=torch.float32)


@torch.library.custom_op("redline::fp8_product", mutates_args=())
def _product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, cublas: bool) -> Tensor:
    """(M, N) of a (M, K) and b (N, K), scaled. cuBLAS accumulates fast, which is in the tensor core, where `gemm`
    does: in products without a gradient."""
    if 0 in a.shape:  # nothing to launch
        return a.new_zeros(a.size(0), b.size(0), dtype=dtype)
    if cublas:
        fast = a.dtype != E5M2
        return torch._scaled_mm(a, b.T, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast)
    out = a.new_empty(a.size(0), b.size(0), dtype=dtype)
    gemm(a, b, out, (a_scale, b_scale))
    return out


@_product.register_fake
def _(a, b, a_scale, b_scale, dtype, cublas):
    return a.new_empty(a.size(0), b.size(0), dtype=dtype)


@torch.library.custom_op("redline::fp8_add_product", mutates_args=("total",))
def _add_product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, total: Tensor) -> None:
    """total (M, N) += the same."""
    if a.size(1):
        gemm(a, b, total, (a_scale, b_scale), accumulate=True)


@_add_product.register_fake
def _(a, b, a_scale, b_scale, total):
    return None


# kernel


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, x: Tensor, w: Tensor, fp8: Fp8Weight, x_scale: Tensor | None, dw_sum: Tensor | None, how: str
    ) -> Tensor:
        q, q_t, scale = _quantise(x, x_scale, False, how == "cuda")
        ctx.save_for_backward(q_t, scale, fp8.q_t, fp8.scale)
        # dw_sum is not saved: autograd would refuse it, because other layers have added to the same storage since
        ctx.dw_sum, ctx.w_dtype, ctx.how = dw_sum, w.dtype, how
        y = _product(q, fp8.q, scale, fp8.scale, x.dtype, _by_cublas(how, x.dtype))
        return y.view(*x.shape[:-1], w.size(0))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x_t, x_scale, w_t, w_scale = ctx.saved_tensors
        dx = dw = None
        q, q_t, scale = _quantise(dy, None, True, ctx.how == "cuda")
        if ctx.needs_input_grad[0]:
            dx = _product(q, w_t, scale, w_scale, dy.dtype, _by_cublas(ctx.how, dy.dtype))
            dx = dx.view(*dy.shape[:-1], w_t.size(0))
        if ctx.needs_input_grad[1] and ctx.dw_sum is None:
            dw = _product(q_t, x_t, scale, x_scale, ctx.w_dtype, False)
        elif ctx.needs_input_grad[1]:
            _add_product(q_t, x_t, scale, x_scale, ctx.dw_sum)
        return dx, dw, None, None, None, None


def _by_cublas(how: str, dtype: torch.dtype) -> bool:
    return how == "scaled_mm" or (how == "cuda" and dtype == torch.bfloat16)


def _through(how: str) -> Callable[..., Tensor]:
    def fp8_linear(
        x: Tensor, w: Tensor, fp8: Fp8Weight, *, x_scale: Tensor | None = None, dw_sum: Tensor | None = None
    ) -> Tensor:
        y: Tensor = _Fp8Linear.apply(x, w, fp8, x_scale, dw_sum, how)
        return y

    return fp8_linear


def _needs_cuda(device: Device) -> str | None:
    return needs_fp8(device) or extension.needs_extension(device)


# cost


def fp8_linear_cost(
    shape: tuple[int, int, int], dtype: torch.dtype, form: str = "plain", backward: bool = False
) -> tuple[int, int]:
    """The least FLOPs and bytes: one product forward, two backward. x and dy are read twice, once for their scales,
    their fp8 copies written twice, and each product reads its operands once. A sum is read and written."""
    M, K, N = shape
    if not backward:
        return 2 * M * K * N, M * K * (2 * dtype.itemsize + 3) + K * N + M * N * dtype.itemsize
    weight = K * N * (1 + (8 if form == "sum" else dtype.itemsize))
    return 4 * M * K * N, M * N * (2 * dtype.itemsize + 4) + M * K * (1 + dtype.itemsize) + weight


# interface


def _check(
    x: Tensor, w: Tensor, fp8: Fp8Weight, *, x_scale: Tensor | None = None, dw_sum: Tensor | None = None
) -> Problem:
    alike = x.dtype == w.dtype and x.device == w.device and x.dtype in (*DTYPES, torch.float64)
    if x.dim() == 0 or w.dim() != 2 or x.size(-1) != w.size(1) or 0 in w.shape or not alike:
        raise ValueError(
            f"fp8_linear: x is {describe(x)}, w {describe(w)}; expected (..., K) and (N, K) of one dtype, bfloat16 or "
            "float32, and one device"
        )
    check_fp8_weight("fp8_linear", w, fp8)
    if x_scale is not None:
        check_number("fp8_linear", "x_scale", x_scale, (torch.float32,), x.device)
    if dw_sum is not None:
        check_sum("fp8_linear", "dw_sum", dw_sum, w)
    return Problem((x.numel() // x.size(-1), w.size(1), w.size(0)), x.dtype, x.device)


def _limits(shape: Shape, dtype: torch.dtype) -> str | None:
    if why := takes_dtypes(shape, dtype):
        return why
    _, K, N = shape
    if K % ROW_MULTIPLE or N % ROW_MULTIPLE:
        return f"takes K and N that are multiples of {ROW_MULTIPLE}, not {K} and {N}"
    return None


def _scaled_mm_limits(shape: Shape, dtype: torch.dtype) -> str | None:
    if why := _limits(shape, dtype):
        return why
    return None if dtype == torch.bfloat16 else f"takes bfloat16, not {dtype_name(dtype)}"


def _inputs(make: Any, M: int, K: int, N: int) -> dict[str, Any]:
    x, w = make(M, K), make(N, K)
    return {"x": x, "w": w, "fp8": fp8_copy(w)}


def _sum_inputs(make: Any, M: int, K: int, N: int) -> dict[str, Any]:
    args = _inputs(make, M, K, N)
    return args | {"dw_sum": make(N, K, dtype=wide(args["w"].dtype)).detach()}


def _cases() -> dict[str, Shape]:
    """Projections of attention: to queries, keys and values; and, in the model that the speedrun trains, out of it."""
    found = sizes.cases(lambda size: (size.tokens, size.C, (size.H + 2 * size.G) * size.D))
    size = sizes.SIZES["depth 24"]
    return found | {"depth 24, out": (size.tokens, size.H * size.D, size.C)}


fp8_linear = Op(
    "fp8_linear",
    dims=("M", "K", "N"),
    cases=_cases(),
    forms={"plain": _inputs, "sum": _sum_inputs},
    cost=fp8_linear_cost,
    check=_check,
    backends={
        "ref": Backend(fp8_linear_ref),
        "triton": Backend(_through("triton"), needs_fp8, _limits),
        "scaled_mm": Backend(_through("scaled_mm"), needs_fp8, _scaled_mm_limits),
        "cuda": Backend(_through("cuda"), _needs_cuda, _limits),
    },
)
