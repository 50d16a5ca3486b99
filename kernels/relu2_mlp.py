"""The MLP with squared ReLU, as one operation.

    pre = x up^T,   post = relu(pre)^2,   y = post down                       [So et al. 2021, Primer, section 4]

Shapes    x, y (..., C); up, down (F, C), both stored with the channels last. M is the product of the leading sizes of x
Dtypes    bf16 or fp32, all the same; in fp8 it is `fp8_mlp`
Rounding  products are summed in fp32; ReLU and square in fp32; post is rounded once, y once (by torch.mm)
Backward  dpre = 2 sqrt(post) (dy down^T), since relu(pre) = sqrt(post);
          dx = dpre up,  dup = dpre^T x,  ddown = post^T dy.  dpre is rounded once; the root of the rounded post has
          half its relative error. With dup_sum or ddown_sum, fp32 like the weight, backward adds that weight's
          gradient to it, unrounded (the reference in bf16: rounded), and the weight has no gradient
Saves     x and post: pre reaches memory in neither direction
Kernels   one persistent GEMM a b^T whose epilogue squares (forward) or scales by 2 sqrt(post) (backward); gradients
          that are added to sums are `kernels.gemm.add_product`; the other products are torch.mm
cublas    the backend of that name makes all products by torch.mm, with plain PyTorch between them, which torch.compile
          fuses: pre is rounded, dpre once, and the same is saved
Limits    in the kernel rows of C and of F elements are multiples of 16 bytes: 8 in bf16, 4 in fp32. Where post
          overflows to inf, so does dx; an infinite dy gives NaN for units that are off
Bound     arithmetic: `relu2_mlp_cost`
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import sizes
from kernels.gemm import (
    check_sum,
    for_descriptor,
    halves,
    has_large_shared_memory,
    launch_persistent,
    num_programs,
    product,
    summed,
    weight_gradient,
)
from kernels.op import (
    DTYPES,
    Backend,
    Op,
    Problem,
    Shape,
    capability,
    describe,
    dtype_name,
    needs_cuda,
    needs_triton,
    takes_dtypes,
    wide,
)

LEAST_ROWS = 1024  # from where on `auto` takes the kernel unmeasured: eight rows of tiles

# reference


def relu2_mlp_ref(
    x: Tensor, up: Tensor, down: Tensor, *, dup_sum: Tensor | None = None, ddown_sum: Tensor | None = None
) -> Tensor:
    return F.relu(x @ summed(up, dup_sum).T).square() @ summed(down, ddown_sum)


# Triton


def _config(dtype: torch.dtype, arch: tuple[int, int], backward: bool) -> dict[str, int]:
    """Tile sizes, warps, stages, and whether the next tile's loads begin before a tile is stored (FLATTEN). Not
    measured on a GPU yet.

    These fit an SM of sm_90 without spills. Flattened, forward has room for a fourth stage (229,408 of 232,448 bytes);
    backward has not, because a part of the factor lies beside the stages. Other GPUs have less shared memory.
    """
    plain = {"FLATTEN": False, "SPLIT": 1, "num_warps": 8}
    if dtype == torch.float32:
        return plain | {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_stages": 2}
    if not has_large_shared_memory(arch):
        return plain | {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    if arch == (8, 0):
        return plain | {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_stages": 3}
    wide = plain | {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "SPLIT": 2, "num_stages": 3}
    return wide | {"FLATTEN": True, "num_stages": 3 if backward else 4} if arch == (9, 0) else wide


@triton.jit
def _epilogue(acc, m, n, factor_desc, out_desc, BACKWARD: tl.constexpr):
    """Stores one part of a tile at row m, column n."""
    if BACKWARD:
        acc = acc * (2.0 * tl.sqrt(factor_desc.load([m, n]).to(tl.float32)))
    else:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
        acc = acc * acc
    out_desc.store([m, n], acc.to(out_desc.dtype))


# M changes from call to call and enters no address: one kernel for all values of it
@triton.jit(do_not_specialize=["M"])
def _relu2_gemm_kernel(
    a_ptr, b_ptr, factor_ptr, out_ptr, M, N: tl.constexpr, K: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """out (M, N) = f(a (M, K) b (N, K)^T).

    Programs take consecutive tiles of a row of tiles: they share a's rows, and b stays in the L2 cache. A tile is
    stored in SPLIT parts, which keeps registers free.
    """
    PART: tl.constexpr = BLOCK_N // SPLIT
    a_desc = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    b_desc = tl.make_tensor_descriptor(b_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    out_desc = tl.make_tensor_descriptor(out_ptr, [M, N], [N, 1], [BLOCK_M, PART])
    factor_desc = out_desc
    if BACKWARD:
        factor_desc = tl.make_tensor_descriptor(factor_ptr, [M, N], [N, 1], [BLOCK_M, PART])
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        m, n = (tile // tiles_n) * BLOCK_M, (tile % tiles_n) * BLOCK_N
        acc = product(a_desc, b_desc, m, n, K, BLOCK_M, BLOCK_N, BLOCK_K)
        if SPLIT == 2:
            left, right = halves(acc, BLOCK_M, PART)
            _epilogue(left, m, n, factor_desc, out_desc, BACKWARD)
            _epilogue(right, m, n + PART, factor_desc, out_desc, BACKWARD)
        else:
            _epilogue(acc, m, n, factor_desc, out_desc, BACKWARD)


def _relu2_gemm(a: Tensor, b: Tensor, factor: Tensor | None) -> Tensor:
    """relu(a b^T)^2, or with a factor 2 sqrt(factor) (a b^T), as (M, N)."""
    (M, K), N = a.shape, b.size(0)
    config = _config(a.dtype, capability(a.device), backward=factor is not None)
    tiles = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])
    programs = num_programs(a.device, tiles)
    out = a.new_empty(M, N)
    if tiles:
        launch_persistent(
            _relu2_gemm_kernel, programs, a, b, factor, out, M, N=N, K=K, BACKWARD=factor is not None, **config
        )
    return out


# torch ops


def _rows(t: Tensor) -> Tensor:
    """(M, last) of t as tensor descriptors want it."""
    return for_descriptor(t.reshape(-1, t.size(-1)))


@torch.library.custom_op("redline::relu2_mlp_post", mutates_args=())
def _post(x: Tensor, up: Tensor) -> Tensor:
    """The squared activation (M, F)."""
    return _relu2_gemm(_rows(x), _rows(up), None)


@_post.register_fake
def _(x, up):
    return x.new_empty(x.numel() // x.size(-1), up.size(0))


@torch.library.custom_op("redline::relu2_mlp_dpre", mutates_args=())
def _dpre(dy: Tensor, down: Tensor, post: Tensor) -> Tensor:
    """Gradient (M, F) of what is squared."""
    return _relu2_gemm(_rows(dy), _rows(down), post)


@_dpre.register_fake
def _(dy, down, post):
    return torch.empty_like(post)


def _post_cublas(x: Tensor, up: Tensor) -> Tensor:
    return F.relu(x.reshape(-1, x.size(-1)) @ up.T).square()


def _dpre_cublas(dy: Tensor, down: Tensor, post: Tensor) -> Tensor:
    return ((dy @ down.T) * (2 * post.to(wide(post.dtype)).sqrt())).to(post.dtype)


class _MLP(torch.autograd.Function):
    """The MLP by two functions: squared activation, and its gradient. torch.compile sees the other products."""

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]  # torch declares (ctx, *args, **kwargs)
        ctx: Any,
        x: Tensor,
        up: Tensor,
        down: Tensor,
        dup_sum: Tensor | None,
        ddown_sum: Tensor | None,
        functions: tuple[Callable[..., Tensor], Callable[..., Tensor]],
    ) -> Tensor:
        post = functions[0](x, up)
        ctx.save_for_backward(x, up, down, post)
        # not saved: autograd would refuse sums that other layers have added to since
        ctx.dup_sum, ctx.ddown_sum, ctx.dpre = dup_sum, ddown_sum, functions[1]
        return (post @ down).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, post = ctx.saved_tensors
        rows, dy = x.reshape(-1, x.size(-1)), grads[0].reshape(-1, x.size(-1))
        dpre = ctx.dpre(dy, down, post)
        # one op a sum: of two that lie in one storage, inductor would clone one, with all of the storage
        dup = weight_gradient(dpre, rows, ctx.dup_sum) if ctx.needs_input_grad[1] else None
        ddown = weight_gradient(post, dy, ctx.ddown_sum) if ctx.needs_input_grad[2] else None
        return (dpre @ up).view(x.shape), dup, ddown, None, None, None


def _relu2_mlp_triton(
    x: Tensor, up: Tensor, down: Tensor, *, dup_sum: Tensor | None = None, ddown_sum: Tensor | None = None
) -> Tensor:
    y: Tensor = _MLP.apply(x, up, down, dup_sum, ddown_sum, (_post, _dpre))
    return y


def _relu2_mlp_cublas(
    x: Tensor, up: Tensor, down: Tensor, *, dup_sum: Tensor | None = None, ddown_sum: Tensor | None = None
) -> Tensor:
    y: Tensor = _MLP.apply(x, up, down, dup_sum, ddown_sum, (_post_cublas, _dpre_cublas))
    return y


# cost


def relu2_mlp_cost(
    shape: tuple[int, int, int], dtype: torch.dtype, form: str = "plain", backward: bool = False
) -> tuple[int, int]:
    """The least FLOPs and bytes: two products forward, four backward; each product reads its operands once."""
    M, C, F_ = shape
    products = 4 if backward else 2
    # forward: x, y, post written and read; backward: dy, x, dx, post read twice, dpre written and read twice
    rows = M * (3 * C + 5 * F_) if backward else M * (2 * C + 2 * F_)
    weights = C * F_ * (4 if backward else 2)
    return products * 2 * M * C * F_, (rows + weights) * dtype.itemsize


# interface


def _given(x: Tensor, up: Tensor, down: Tensor) -> str:
    return f"x is {describe(x)}, up {describe(up)}, down {describe(down)}"


def _check(
    x: Tensor, up: Tensor, down: Tensor, *, dup_sum: Tensor | None = None, ddown_sum: Tensor | None = None
) -> Problem:
    if x.dim() == 0 or up.dim() != 2 or up.shape != down.shape or x.size(-1) != up.size(1) or 0 in up.shape:
        raise ValueError(f"relu2_mlp: {_given(x, up, down)}; expected (..., C), (F, C), (F, C)")
    alike = x.dtype == up.dtype == down.dtype and x.device == up.device == down.device
    if not alike or x.dtype not in (*DTYPES, torch.float64):
        raise ValueError(f"relu2_mlp: {_given(x, up, down)}; expected one dtype, bfloat16 or float32, and one device")
    for name, total, w in (("dup_sum", dup_sum, up), ("ddown_sum", ddown_sum, down)):
        if total is not None:
            check_sum("relu2_mlp", name, total, w)
    return Problem((x.numel() // x.size(-1), up.size(1), up.size(0)), x.dtype, x.device)


def _limits(shape: Shape, dtype: torch.dtype) -> str | None:
    if why := takes_dtypes(shape, dtype):
        return why
    _, C, F_ = shape
    unit = 16 // dtype.itemsize
    if C % unit or F_ % unit or min(C, F_) < unit:
        return f"takes C and F that are multiples of {unit} in {dtype_name(dtype)}, not {C} and {F_}"
    return None


relu2_mlp = Op(
    "relu2_mlp",
    dims=("M", "C", "F"),
    cases=sizes.cases(lambda size: (size.tokens, size.C, size.F)),
    forms={"plain": lambda make, M, C, F_: {"x": make(M, C), "up": make(F_, C), "down": make(F_, C)}},
    cost=relu2_mlp_cost,
    check=_check,
    # a few rows would not fill a tile in each column of tiles
    unmeasured=lambda shape: ("triton",) if shape[0] >= LEAST_ROWS else ("cublas", "triton"),
    backends={
        "ref": Backend(relu2_mlp_ref),
        "triton": Backend(_relu2_mlp_triton, needs_triton, _limits),
        "cublas": Backend(_relu2_mlp_cublas, needs_cuda, takes_dtypes),
    },
)
