"""A linear layer whose three products are made in fp8, from one fp8 copy of its weight for all micro-steps.

    q_x = e4m3(x / s_x),  q_w = e4m3(w / s_w),  q_dy = e5m2(dy / s_dy)
    y = s_x s_w q_x q_w^T,   dx = s_dy s_w q_dy q_w,   dw = s_dy s_x q_dy^T q_x

The scheme is that of nanochat [92d63d4, fp8.py] and of torchao's float8 with tensorwise scales. Both quantise the
weight in every micro-step, and copy three operands once more to transpose them; here the pass that quantises writes
the transposed copy as well.

Shapes    x (..., K); w (N, K), or transposed (K, N), then y = x w; y (..., N). M is the product of the leading sizes of
          x
Dtypes    x, w, y bf16 or fp32, all the same; fp8 is the e4m3 copy of w, as it is stored, that `quantise_weight` makes,
          once per optimizer step
Scales    one fp32 number a tensor. Dynamic: s_x = max |x| / 448, s_dy = max |dy| / 57344, and TINY_SCALE of zeros.
          Delayed: those of x_site and dy_site; what exceeds their range then saturates. A site's amax is raised to
          max |x|, max |dy| by the pass that quantises
x_fp8     q_x, transposed too, and s_x, where a neighbour has made them (`rms_norm`). x then only carries the gradient
NaN, inf  a NaN of x or dy makes its scale NaN, and so all of its products; an infinity makes NaN where it was. Under a
          delayed scale a NaN stays in its row of y or dx, and an infinity saturates; amax keeps both
dw_sum    like w, contiguous, fp32 (float64 for an oracle): dw is added to it in backward, and w has no gradient
Rounding  x, w and dy to nearest even
          y: sums stay in the tensor core, whose fp8 accumulator on Hopper is narrower than fp32; rounded once
          dx: sums are promoted to fp32 every 128 products; rounded once
          dw: promoted alike, since micro-steps are summed; added to dw_sum as it is (the reference rounds it first),
          or rounded once to the dtype of w. It is the gradient of the unrounded w: roundings are passed through
Reference the same roundings; it multiplies fp8 numbers in fp32. In float64 it is the oracle: exact products of the same
          rounded operands
Saves     x in e4m3, transposed, K M bytes, and its scale; of the copy of w q_t (transposed: q) and scale, which have to
          stay until backward (autograd refuses where they changed). Neither x nor w
Backends  triton multiplies by `gemm`. scaled_mm by torch._scaled_mm (cuBLAS), where y accumulates fast, in the tensor
          core as well; in bf16. It is what auto means where nothing is measured: by bench/kernel_model.py the L2 cache
          gives `gemm` operands for less than half of the peak in tiles whose sums are promoted. cuda quantises by
          csrc/quantise_weight.cu and multiplies as scaled_mm where that takes the dtype, else as triton
Limits    in kernels K and N are multiples of 16, whose rows in fp8 begin at multiples of 16 bytes; M is any
Bound     arithmetic. Bytes, beside those of the products: `fp8_linear_cost`
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import sizes
from kernels.fp8 import (
    E4M3,
    E5M2,
    Fp8Tensor,
    Site,
    amax_scale,
    check_fp8_weight,
    fp8_copy,
    fp8_rows,
    quantised,
)
from kernels.fp8_products import check_rows, check_site, kernels_of, note, product, quantise, weight_gradient
from kernels.gemm import check_sum, summed
from kernels.op import (
    DTYPES,
    Backend,
    Op,
    Problem,
    Shape,
    describe,
    wide,
)

# reference


class _Reference(torch.autograd.Function):
    """Numbers of fp8 are multiplied in fp32, or in float64, unscaled, and the products scaled. w is (N, K)."""

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]  # torch declares (ctx, *args, **kwargs)
        ctx: Any, x: Tensor, w: Tensor, q_x: Tensor, scale: Tensor, q: Tensor, w_scale: Tensor, dy_site: Site | None
    ) -> Tensor:
        acc = wide(x.dtype)
        ctx.save_for_backward(q_x, scale, q, w_scale)
        ctx.dtypes, ctx.dy_site = (x.dtype, w.dtype), dy_site
        return ((q_x.to(acc) @ q.to(acc).T) * (scale * w_scale)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        q_x, x_scale, q, w_scale = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        acc = wide(x_dtype)
        q_dy, scale = _rounded(dy, ctx.dy_site, E5M2)
        q_dy = q_dy.to(acc)
        dx = ((q_dy @ q.to(acc)) * (scale * w_scale)).to(x_dtype)
        dw = q_dy.reshape(-1, q.size(0)).T @ q_x.to(acc).reshape(-1, q.size(1))
        return dx, (dw * (scale * x_scale)).to(w_dtype), None, None, None, None, None


def _rounded(t: Tensor, site: Site | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale = None if site is None else site.scale
    if site is not None:
        note(t.detach(), site.amax)
    scale = amax_scale(t.detach(), torch.finfo(dtype).max) if scale is None else scale.float().clone()
    return quantised(t.detach(), scale, dtype), scale


def fp8_linear_ref(
    x: Tensor,
    w: Tensor,
    fp8: Fp8Tensor,
    *,
    x_fp8: Fp8Tensor | None = None,
    x_site: Site | None = None,
    dy_site: Site | None = None,
    dw_sum: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    q_x, scale = _rounded(x, x_site, E4M3) if x_fp8 is None else (x_fp8.q.view(x.shape), x_fp8.scale)
    w = summed(w, dw_sum)
    w, q = (w.T, fp8.q.T) if transposed else (w, fp8.q)
    y: Tensor = _Reference.apply(x, w, q_x, scale, q, fp8.scale, dy_site)
    return y


# kernel


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any,
        x: Tensor,
        w: Tensor,
        fp8: Fp8Tensor,
        x_fp8: Fp8Tensor | None,
        x_site: Site | None,
        dy_site: Site | None,
        dw_sum: Tensor | None,
        transposed: bool,
        how: str,
    ) -> Tensor:
        q, q_t, scale = x_fp8 or quantise(x, x_site, cuda=how == "cuda")
        forward, backward = (fp8.q_t, fp8.q) if transposed else (fp8.q, fp8.q_t)
        ctx.save_for_backward(q_t, scale, backward, fp8.scale)
        # dw_sum is not saved: autograd would refuse it, because other layers have added to the same storage since. Nor
        # is the site, whose amax changes all the time
        ctx.dw_sum, ctx.dy_site = dw_sum, dy_site
        ctx.w_dtype, ctx.transposed, ctx.how = w.dtype, transposed, how
        y = product(q, forward, (scale, fp8.scale), x.dtype, how)
        return y.view(*x.shape[:-1], forward.size(0))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x_t, x_scale, w_t, w_scale = ctx.saved_tensors
        dx = dw = None
        q, q_t, scale = quantise(dy, ctx.dy_site, gradient=True, cuda=ctx.how == "cuda")
        if ctx.needs_input_grad[0]:
            dx = product(q, w_t, (scale, w_scale), dy.dtype, ctx.how)
            dx = dx.view(*dy.shape[:-1], w_t.size(0))
        if ctx.needs_input_grad[1]:
            a, b = (x_t, q_t) if ctx.transposed else (q_t, x_t)
            dw = weight_gradient(a, b, (scale, x_scale), ctx.w_dtype, ctx.dw_sum, ctx.how)
        return dx, dw, *[None] * 7


def _through(how: str) -> Callable[..., Tensor]:
    def fp8_linear(
        x: Tensor,
        w: Tensor,
        fp8: Fp8Tensor,
        *,
        x_fp8: Fp8Tensor | None = None,
        x_site: Site | None = None,
        dy_site: Site | None = None,
        dw_sum: Tensor | None = None,
        transposed: bool = False,
    ) -> Tensor:
        y: Tensor = _Fp8Linear.apply(x, w, fp8, x_fp8, x_site, dy_site, dw_sum, transposed, how)
        return y

    return fp8_linear


# cost


def fp8_linear_cost(
    shape: tuple[int, int, int], dtype: torch.dtype, form: str = "plain", backward: bool = False
) -> tuple[int, int]:
    """The least FLOPs and bytes: one product forward, two backward. x and dy are read once (twice where their scales
    are looked for), their fp8 copies written twice, and each product reads its operands once. A sum is read and
    written."""
    M, K, N = shape
    reads = 2 if form in ("plain", "sum") else 1
    if not backward:
        quantised = 1 if form == "given" else reads * dtype.itemsize + 3
        return 2 * M * K * N, M * K * quantised + K * N + M * N * dtype.itemsize
    weight = K * N * (1 + (dtype.itemsize if form == "plain" else 8))
    return 4 * M * K * N, M * N * (reads * dtype.itemsize + 4) + M * K * (1 + dtype.itemsize) + weight


# interface


def _check(
    x: Tensor,
    w: Tensor,
    fp8: Fp8Tensor,
    *,
    x_fp8: Fp8Tensor | None = None,
    x_site: Site | None = None,
    dy_site: Site | None = None,
    dw_sum: Tensor | None = None,
    transposed: bool = False,
) -> Problem:
    alike = x.dtype == w.dtype and x.device == w.device and x.dtype in (*DTYPES, torch.float64)
    side, form = (0, "(K, N)") if transposed else (1, "(N, K)")
    if x.dim() == 0 or w.dim() != 2 or x.size(-1) != w.size(side) or 0 in w.shape or not alike:
        raise ValueError(
            f"fp8_linear: x is {describe(x)}, w {describe(w)}; expected (..., K) and {form} of one dtype, bfloat16 or "
            "float32, and one device"
        )
    check_fp8_weight("fp8_linear", w, fp8)
    for name, site in (("x", x_site), ("dy", dy_site)):
        if site is not None:
            check_site("fp8_linear", name, site, x.device)
    if x_fp8 is not None and x_site is not None:
        raise ValueError("fp8_linear: x_fp8 and x_site are given; x is quantised already, give one of them")
    if x_fp8 is not None:
        check_rows("fp8_linear", x, x_fp8)
    if dw_sum is not None:
        check_sum("fp8_linear", "dw_sum", dw_sum, w)
    return Problem((x.numel() // x.size(-1), w.size(side), w.size(1 - side)), x.dtype, x.device)


def _inputs(make: Any, M: int, K: int, N: int) -> dict[str, Any]:
    x, w = make(M, K), make(N, K)
    return {"x": x, "w": w, "fp8": fp8_copy(w)}


def _sum_inputs(make: Any, M: int, K: int, N: int) -> dict[str, Any]:
    args = _inputs(make, M, K, N)
    return args | {"dw_sum": make(N, K, dtype=wide(args["w"].dtype)).detach()}


def _site(make: Any) -> Site:
    """A delayed scale that fits normal numbers."""
    return Site(make(dtype=torch.float32).detach().zero_(), make(dtype=torch.float32).detach().fill_(2.0**-4))


def _delayed_inputs(make: Any, M: int, K: int, N: int) -> dict[str, Any]:
    return _sum_inputs(make, M, K, N) | {"x_site": _site(make), "dy_site": _site(make)}


def _given_inputs(make: Any, M: int, K: int, N: int) -> dict[str, Any]:
    args = _delayed_inputs(make, M, K, N)
    return args | {"x_fp8": fp8_rows(args["x"], args.pop("x_site").scale)}


def _transposed_inputs(make: Any, M: int, K: int, N: int) -> dict[str, Any]:
    w = make(K, N)
    return _delayed_inputs(make, M, K, N) | {
        "w": w, "fp8": fp8_copy(w), "dw_sum": make(K, N, dtype=wide(w.dtype)).detach(), "transposed": True
    }  # fmt: skip


def _cases() -> dict[str, Shape]:
    """Projections of attention: to queries, keys and values; and, in the model that the speedrun trains, out of it."""
    found = sizes.cases(lambda size: (size.tokens, size.C, (size.H + 2 * size.G) * size.D))
    size = sizes.SIZES["depth 24"]
    return found | {"depth 24, out": (size.tokens, size.H * size.D, size.C)}


fp8_linear = Op(
    "fp8_linear",
    dims=("M", "K", "N"),
    cases=_cases(),
    forms={
        "plain": _inputs,
        "sum": _sum_inputs,
        "delayed": _delayed_inputs,
        "given": _given_inputs,
        "transposed": _transposed_inputs,
    },
    cost=fp8_linear_cost,
    check=_check,
    unmeasured="scaled_mm",
    backends={"ref": Backend(fp8_linear_ref)} | kernels_of(_through, "K", "N"),
)
