"""The MLP with squared ReLU whose six products are made in fp8, the squared activation and its gradient in fp8 alone.

    q_x, q_up, q_down, q_dy    x, up and down in e4m3, dy in e5m2, each with one scale s
    post = relu(s_x s_up q_x q_up^T)^2,            q_post = e4m3(post / s_post)
    y    = s_post s_down q_post q_down
    dpre = 2 sqrt(s_post q_post) (s_dy s_down q_dy q_down^T),   q_dpre = e5m2(dpre / s_dpre)
    dx   = s_dpre s_up q_dpre q_up,   dup = s_dpre s_x q_dpre^T q_x,   ddown = s_post s_dy q_post^T q_dy

Fp8 of what the epilogue of a product has in registers costs no pass over memory, if its scale is known before: delayed
scaling, of which modded-nanogpt's second product is an example [record 89]. Here backward is treated alike, and the
transposed copies that weight gradients need come from the same registers.

Shapes    x, y (..., C); up, down (F, C), both stored with the channels last. M is the product of the leading sizes of x
Dtypes    x, up, down, y bf16 or fp32, all the same; up_fp8, down_fp8 the e4m3 copies that `quantise_weight` makes, once
          per optimizer step; x_fp8 is x in e4m3, which a neighbour has made (`rms_norm`): x only carries the gradient
Sites     of post, dpre and dy: scale is the delayed one, amax is raised to the largest size of this call. What exceeds
          the range of a scale saturates. Scales shall be powers of two, whose reciprocals are exact
NaN, inf  a NaN stays in its row of y, and of dx; an infinity saturates; amax keeps both
Rounding  products are summed in fp32 or, forward, in the tensor core, whose fp8 accumulator on Hopper is narrower;
          those with a gradient are promoted to fp32 every 128 products. post and dpre are rounded to nearest even from
          fp32, in which all scales make one factor: within a few of its last bits of the formula. y and dx are rounded
          once. The root of the rounded post has half its relative error, at most 1/32. What post rounds to zero has no
          gradient: units below 2^-10 s_post
Sums      dup_sum, ddown_sum (F, C), contiguous, fp32 (float64 for an oracle): the gradients are added to them,
          unrounded, and the weights have none. Roundings of weights are passed through
Saves     q_x transposed, q_post as it is and transposed: C + 2 F bytes a row, scales, and the copies of the weights,
          which have to stay until backward. No activation in bf16
Backends  triton: all products by kernels of Redline's. scaled_mm: y, dx, dup and ddown by cuBLAS, as auto means where
          nothing is measured (see fp8_linear). cuda quantises dy by csrc/quantise_weight.cu and multiplies as
          scaled_mm where that takes the dtype
Limits    in kernels C and F are multiples of 16; M is any
Bound     arithmetic: `fp8_mlp_cost`
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import sizes
from kernels.fp8 import (
    E4M3,
    E5M2,
    ROW_MULTIPLE,
    Fp8Tensor,
    Site,
    check_capability,
    check_fp8_weight,
    fp8_copy,
    fp8_rows,
)
from kernels.fp8_products import check_rows, check_site, kernels_of, note, product, quantise, weight_gradient
from kernels.gemm import (
    Tiling,
    best_group,
    check_sum,
    halves,
    has_large_shared_memory,
    launch_persistent,
    num_programs,
    summed,
    tile_at,
)
from kernels.gemm import product as tile_product
from kernels.op import DTYPES, Backend, Op, Problem, capability, describe, wide
from kernels.sizes import round_up

# reference


def _delayed(site: Site) -> Tensor:
    assert site.scale is not None
    return site.scale


def _rounded(t: Tensor, site: Site, dtype: torch.dtype) -> Tensor:
    note(t, site.amax)
    limit = torch.finfo(dtype).max
    return (t.float() * (1 / _delayed(site))).clamp(-limit, limit).to(dtype)


class _Reference(torch.autograd.Function):
    """Numbers of fp8 are multiplied in fp32, or in float64, unscaled, and the products scaled."""

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]  # torch declares (ctx, *args, **kwargs)
        ctx: Any,
        x: Tensor,
        up: Tensor,
        down: Tensor,
        x_fp8: Fp8Tensor,
        up_fp8: Fp8Tensor,
        down_fp8: Fp8Tensor,
        post: Site,
        dpre: Site,
        dy: Site,
    ) -> Tensor:
        acc = wide(x.dtype)
        activation = ((x_fp8.q.to(acc) @ up_fp8.q.to(acc).T) * (x_fp8.scale * up_fp8.scale)).relu().square()
        q_post, scale = _rounded(activation, post, E4M3), _delayed(post).clone()
        ctx.save_for_backward(x_fp8.q, x_fp8.scale, up_fp8.q, up_fp8.scale, down_fp8.q, down_fp8.scale, q_post, scale)
        ctx.dtypes, ctx.sites, ctx.shape = (x.dtype, up.dtype), (dpre, dy), x.shape
        return ((q_post.to(acc) @ down_fp8.q.to(acc)) * (scale * down_fp8.scale)).to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_x, x_scale, q_up, up_scale, q_down, down_scale, q_post, post_scale = ctx.saved_tensors
        (x_dtype, w_dtype), (dpre_site, dy_site), acc = ctx.dtypes, ctx.sites, wide(ctx.dtypes[0])
        dy = grads[0].reshape(-1, grads[0].size(-1))
        q_dy = _rounded(dy, dy_site, E5M2).to(acc)
        roots = (q_post.to(acc) * post_scale).sqrt()
        dpre = 2 * roots * ((q_dy @ q_down.to(acc).T) * (_delayed(dy_site) * down_scale))
        q_dpre, scale = _rounded(dpre, dpre_site, E5M2).to(acc), _delayed(dpre_site)
        dx = ((q_dpre @ q_up.to(acc)) * (scale * up_scale)).to(x_dtype).view(ctx.shape)
        dup = ((q_dpre.T @ q_x.to(acc)) * (scale * x_scale)).to(w_dtype)
        ddown = ((q_post.to(acc).T @ q_dy) * (post_scale * _delayed(dy_site))).to(w_dtype)
        return dx, dup, ddown, *[None] * 6


def fp8_mlp_ref(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    x_fp8: Fp8Tensor,
    up_fp8: Fp8Tensor,
    down_fp8: Fp8Tensor,
    post: Site,
    dpre: Site,
    dy: Site,
    dup_sum: Tensor | None = None,
    ddown_sum: Tensor | None = None,
) -> Tensor:
    up, down = summed(up, dup_sum), summed(down, ddown_sum)
    y: Tensor = _Reference.apply(x, up, down, x_fp8, up_fp8, down_fp8, post, dpre, dy)
    return y


# Triton


def _config(backward: bool, arch: tuple[int, int]) -> dict[str, Any]:
    """Tile sizes, warps, stages, and whether the next tile's loads begin before a tile is stored (FLATTEN). Not
    measured on a GPU yet.

    These fit an SM of sm_90 without spills. Backward promotes its sums, which takes registers for them twice.
    """
    if not has_large_shared_memory(arch):
        return {
            "BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 128, "SPLIT": 1, "FLATTEN": False, "num_warps": 4,
            "num_stages": 2,
        }  # fmt: skip
    square = {
        "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "SPLIT": 2, "FLATTEN": False, "num_warps": 8, "num_stages": 3
    }  # fmt: skip
    if backward:  # on sm_100 Triton 3.9 fails on it with 8 warps, in TritonNvidiaGPUOptimizeTMemLayouts
        return square | ({"num_warps": 4} if arch[0] == 10 else {})
    return square | {"BLOCK_N": 256}


@triton.jit
def _epilogue(acc, m, n, largest, factor_desc, q_desc, q_t_desc, gain, BACKWARD: tl.constexpr):
    """Stores one part of a tile at row m, column n, in both layouts; returns the running maximum of each row's sizes,
    as the integers that their bits are: those have the order of the numbers, NaN's behind infinity.

    Conversions to fp8 saturate in hardware (cvt.rn.satfinite), where NaN stays NaN: no clamps."""
    if BACKWARD:
        out = acc * tl.sqrt(factor_desc.load([m, n]).to(tl.float32))
    else:
        out = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
        out = out * out
    size = out.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.maximum(largest, tl.max(size, axis=1))
    q = (out * gain).to(q_desc.dtype)
    q_desc.store([m, n], q)
    q_t_desc.store([n, m], q.T)
    return largest


# M changes from call to call, and scales are elements of larger tensors, at any alignment: one kernel for all
@triton.jit(
    do_not_specialize=["M", "group"],
    do_not_specialize_on_alignment=["a_scale_ptr", "b_scale_ptr", "factor_scale_ptr", "scale_ptr", "amax_ptr"],
)
def _fp8_relu2_kernel(
    a_ptr, b_ptr, factor_ptr, q_ptr, q_t_ptr, a_scale_ptr, b_scale_ptr, factor_scale_ptr, scale_ptr, amax_ptr,
    M, columns_t, group,
    N: tl.constexpr, K: tl.constexpr, BACKWARD: tl.constexpr, IMPRECISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """q (M, N) = f(a (M, K) b (N, K)^T) / scale in fp8, and q_t (N, columns_t) the same transposed, then zeros.

    Zeros come from rows of a beyond M, which a descriptor reads as zeros, and f(0) is 0. Columns of a tile beyond
    columns_t and rows beyond M are not stored.

    Hazard: all programs raise one amax, in any order, which is exact for a maximum. None may read it.
    """
    PART: tl.constexpr = BLOCK_N // SPLIT
    a_desc = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    b_desc = tl.make_tensor_descriptor(b_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    q_desc = tl.make_tensor_descriptor(q_ptr, [M, N], [N, 1], [BLOCK_M, PART])
    q_t_desc = tl.make_tensor_descriptor(q_t_ptr, [N, columns_t], [columns_t, 1], [PART, BLOCK_M])
    # what the epilogue leaves out, in order to multiply once: unit is that of its numbers, gain makes them those of fp8
    factor_desc, unit = q_desc, tl.load(a_scale_ptr) * tl.load(b_scale_ptr)
    if BACKWARD:
        factor_desc = tl.make_tensor_descriptor(factor_ptr, [M, N], [N, 1], [BLOCK_M, PART])
        unit *= 2.0 * tl.sqrt_rn(tl.load(factor_scale_ptr))
    else:
        unit *= unit
    gain = unit * tl.div_rn(1.0, tl.load(scale_ptr))
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    largest = tl.zeros((BLOCK_M,), dtype=tl.int32)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        row, column = tile_at(tile, tiles_m, tiles_n, group)
        m, n = row * BLOCK_M, column * BLOCK_N
        acc = tile_product(a_desc, b_desc, m, n, K, BLOCK_M, BLOCK_N, BLOCK_K, IMPRECISE)
        if SPLIT == 2:
            left, right = halves(acc, BLOCK_M, PART)
            largest = _epilogue(left, m, n, largest, factor_desc, q_desc, q_t_desc, gain, BACKWARD)
            largest = _epilogue(right, m, n + PART, largest, factor_desc, q_desc, q_t_desc, gain, BACKWARD)
        else:
            largest = _epilogue(acc, m, n, largest, factor_desc, q_desc, q_t_desc, gain, BACKWARD)
    size = tl.max(largest, axis=0).to(tl.float32, bitcast=True) * unit
    bits_ptr = amax_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    tl.atomic_max(bits_ptr, size.to(tl.int32, bitcast=True) & 0x7FFFFFFF, sem="relaxed")


def _room(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """For f(a b^T) in fp8, and the same transposed."""
    M, N = a.size(0), b.size(0)
    return a.new_empty(M, N, dtype=dtype), a.new_empty(N, round_up(M, ROW_MULTIPLE), dtype=dtype)


def _fp8_relu2(
    a: Tensor,
    b: Tensor,
    factor: Tensor | None,
    scales: tuple[Tensor, Tensor, Tensor | None, Tensor],
    amax: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """f(a b^T) in fp8, (M, N), and transposed (N, M'). scales: of a, b, factor and the result."""
    check_capability("fp8_mlp", a.device)
    (M, K), N = a.shape, b.size(0)
    q, q_t = _room(a, b, dtype)
    if not M:
        return q, q_t
    config = _config(factor is not None, capability(a.device))
    tile = (config["BLOCK_M"], config["BLOCK_N"])
    programs = num_programs(a.device, triton.cdiv(M, tile[0]) * triton.cdiv(N, tile[1]))
    launch_persistent(
        _fp8_relu2_kernel, programs,
        a, b, factor, q, q_t, *scales, amax, M, q_t.size(1),
        best_group(Tiling(M, N, K, tile, programs, a.itemsize, 2)),
        N=N, K=K, BACKWARD=factor is not None, IMPRECISE=config["BLOCK_K"] if a.dtype == E5M2 else None, **config,
    )  # fmt: skip
    return q, q_t


# torch ops


@torch.library.custom_op("redline::fp8_mlp_post", mutates_args=("amax",))
def _post(
    x: Tensor, up: Tensor, x_scale: Tensor, up_scale: Tensor, scale: Tensor, amax: Tensor
) -> tuple[Tensor, Tensor]:
    """The squared activation (M, F) in e4m3, and transposed."""
    return _fp8_relu2(x, up, None, (x_scale, up_scale, None, scale), amax, E4M3)


@_post.register_fake
def _(x, up, x_scale, up_scale, scale, amax):
    return _room(x, up, E4M3)


@torch.library.custom_op("redline::fp8_mlp_dpre", mutates_args=("amax",))
def _dpre(
    dy: Tensor,
    down: Tensor,
    post: Tensor,
    dy_scale: Tensor,
    down_scale: Tensor,
    post_scale: Tensor,
    scale: Tensor,
    amax: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradient (M, F) of what is squared in e5m2, and transposed."""
    return _fp8_relu2(dy, down, post, (dy_scale, down_scale, post_scale, scale), amax, E5M2)


@_dpre.register_fake
def _(dy, down, post, dy_scale, down_scale, post_scale, scale, amax):
    return _room(dy, down, E5M2)


class _Fp8MLP(torch.autograd.Function):
    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any,
        x: Tensor,
        up: Tensor,
        down: Tensor,
        x_fp8: Fp8Tensor,
        up_fp8: Fp8Tensor,
        down_fp8: Fp8Tensor,
        post: Site,
        dpre: Site,
        dy: Site,
        sums: tuple[Tensor | None, Tensor | None],
        how: str,
    ) -> Tensor:
        scale = _delayed(post)
        q, q_t = _post(x_fp8.q, up_fp8.q, x_fp8.scale, up_fp8.scale, scale, post.amax)
        ctx.save_for_backward(
            x_fp8.q_t, x_fp8.scale, up_fp8.q_t, up_fp8.scale, down_fp8.q, down_fp8.scale, q, q_t, scale
        )
        # not saved: autograd would refuse sums and sites that others have added to or raised since
        ctx.sums, ctx.sites, ctx.w_dtype, ctx.how = sums, (dpre, dy), up.dtype, how
        return product(q, down_fp8.q_t, (scale, down_fp8.scale), x.dtype, how).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x_t, x_scale, up_t, up_scale, down, down_scale, post, post_t, post_scale = ctx.saved_tensors
        dpre_site, dy_site = ctx.sites
        q_dy, dy_t, dy_scale = quantise(dy, dy_site, gradient=True, cuda=ctx.how == "cuda")
        scale = _delayed(dpre_site)
        q, q_t = _dpre(q_dy, down, post, dy_scale, down_scale, post_scale, scale, dpre_site.amax)
        dx = dup = ddown = None
        if ctx.needs_input_grad[0]:
            dx = product(q, up_t, (scale, up_scale), dy.dtype, ctx.how).view(dy.shape)
        # one op a sum: of two that lie in one storage, inductor would clone one, with all of the storage
        if ctx.needs_input_grad[1]:
            dup = weight_gradient(q_t, x_t, (scale, x_scale), ctx.w_dtype, ctx.sums[0], ctx.how)
        if ctx.needs_input_grad[2]:
            ddown = weight_gradient(post_t, dy_t, (post_scale, dy_scale), ctx.w_dtype, ctx.sums[1], ctx.how)
        return dx, dup, ddown, *[None] * 8


def _through(how: str) -> Callable[..., Tensor]:
    def fp8_mlp(
        x: Tensor,
        up: Tensor,
        down: Tensor,
        *,
        x_fp8: Fp8Tensor,
        up_fp8: Fp8Tensor,
        down_fp8: Fp8Tensor,
        post: Site,
        dpre: Site,
        dy: Site,
        dup_sum: Tensor | None = None,
        ddown_sum: Tensor | None = None,
    ) -> Tensor:
        y: Tensor = _Fp8MLP.apply(x, up, down, x_fp8, up_fp8, down_fp8, post, dpre, dy, (dup_sum, ddown_sum), how)
        return y

    return fp8_mlp


# cost


def fp8_mlp_cost(
    shape: tuple[int, int, int], dtype: torch.dtype, form: str = "plain", backward: bool = False
) -> tuple[int, int]:
    """The least FLOPs and bytes: two products forward, four backward; each product reads its operands once, post and
    dpre are written twice, and dy is read once to be quantised."""
    M, C, F = shape
    if not backward:
        return 4 * M * C * F, M * C * (1 + dtype.itemsize) + 3 * M * F + 2 * C * F
    # dy read, written twice, read twice; x; dx written; post read twice; dpre written twice, read twice
    rows = M * C * (dtype.itemsize + 5 + dtype.itemsize) + M * F * 6
    return 8 * M * C * F, rows + C * F * (2 + 2 * (8 if form == "sum" else dtype.itemsize))


# interface


def _check(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    x_fp8: Fp8Tensor,
    up_fp8: Fp8Tensor,
    down_fp8: Fp8Tensor,
    post: Site,
    dpre: Site,
    dy: Site,
    dup_sum: Tensor | None = None,
    ddown_sum: Tensor | None = None,
) -> Problem:
    given = f"x is {describe(x)}, up {describe(up)}, down {describe(down)}"
    if x.dim() == 0 or up.dim() != 2 or up.shape != down.shape or x.size(-1) != up.size(1) or 0 in up.shape:
        raise ValueError(f"fp8_mlp: {given}; expected (..., C), (F, C), (F, C)")
    alike = x.dtype == up.dtype == down.dtype and x.device == up.device == down.device
    if not alike or x.dtype not in (*DTYPES, torch.float64):
        raise ValueError(f"fp8_mlp: {given}; expected one dtype, bfloat16 or float32, and one device")
    check_rows("fp8_mlp", x, x_fp8)
    for w, copy in ((up, up_fp8), (down, down_fp8)):
        check_fp8_weight("fp8_mlp", w, copy)
    for name, site in (("post", post), ("dpre", dpre), ("dy", dy)):
        check_site("fp8_mlp", name, site, x.device)
        if site.scale is None:
            raise ValueError(f"fp8_mlp: {name} has no scale; expected a delayed one, fp8_linear has scales of its own")
    for name, total, w in (("dup_sum", dup_sum, up), ("ddown_sum", ddown_sum, down)):
        if total is not None:
            check_sum("fp8_mlp", name, total, w)
    return Problem((x.numel() // x.size(-1), up.size(1), up.size(0)), x.dtype, x.device)


def _inputs(make: Any, M: int, C: int, F: int) -> dict[str, Any]:
    """Scales that fit numbers of about 1."""

    def number(value: float) -> Tensor:
        return make(dtype=torch.float32).detach().fill_(value)

    x, up, down = make(M, C), make(F, C), make(F, C)
    # sums of C numbers, whose mean is not 0; post and dpre are products of two
    C_bits = C.bit_length()
    exponents = {"post": 2 * C_bits - 9, "dpre": 2 * C_bits - 14, "dy": -10}
    sites = {name: Site(number(0.0), number(2.0**exponent)) for name, exponent in exponents.items()}
    copies = {"x_fp8": fp8_rows(x, number(2.0**-4)), "up_fp8": fp8_copy(up), "down_fp8": fp8_copy(down)}
    return {"x": x, "up": up, "down": down} | copies | sites


def _sum_inputs(make: Any, M: int, C: int, F: int) -> dict[str, Any]:
    args = _inputs(make, M, C, F)
    sums = {name: make(F, C, dtype=wide(args["up"].dtype)).detach() for name in ("dup_sum", "ddown_sum")}
    return args | sums


fp8_mlp = Op(
    "fp8_mlp",
    dims=("M", "C", "F"),
    cases=sizes.cases(lambda size: (size.tokens, size.C, size.F)),
    forms={"plain": _inputs, "sum": _sum_inputs},
    cost=fp8_mlp_cost,
    check=_check,
    unmeasured="scaled_mm",
    backends={"ref": Backend(fp8_mlp_ref)} | kernels_of(_through, "C", "F"),
)
