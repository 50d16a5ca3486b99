"""Causal attention within a window, for whole sequences.

    y_t = sum_s p_ts v_s,   p_ts = softmax_s(scale q_t . k_s)  over the keys s with  t - window <= s <= t

Shapes    q (B, T, H, D); k and v (B, T, G, D), H a multiple of G: H / G query heads share a head of k and v
          -> y (B, T, H, D). No size is 0; channels of a head are adjacent, other strides are free
Dtypes    q, k, v and y bf16 or fp32, all the same
window    keys before itself that a query sees, 0 or more; None: all of them. As a size W it counts the query's own key,
          and is T where nothing but the future is hidden
scale     default 1/sqrt(D)
Rounding  softmax and sums are in fp32; probabilities are rounded before they multiply v, y once
Saves     q, k, v, y, and a logarithm for each head and query; the reference its mask as well, in the dtype
Backends  ref    scaled_dot_product_attention (SDPA), with a dense mask where the window hides something
          fa3    FlashAttention 3, on compute capability 9.0, in bf16
          flex   FlexAttention in tiles of 128 x 128, of which hidden ones are skipped; masks are made once for each T,
                 W and device
          sdpa   SDPA's own choice of a kernel (cuDNN, FlashAttention 2), where the window hides nothing
          auto means, where nothing is measured, fa3; where that cannot run, flex if the window hides something, else
          sdpa, and the other of the two where one cannot
Limits    fa3: D a multiple of 8, up to 256. flex: T a multiple of 128. sdpa: no window
Repeats   on a GPU, sums of dq are added in any order unless torch.use_deterministic_algorithms asks for one
Bound     arithmetic: `attention_cost`

FlashAttention 3 is no project on PyPI: it is built from the folder hopper/ of Dao-AILab/flash-attention, and installs
`flash_attn_interface`, whose import registers the operators flash_attn_3::fwd and ::bwd. These are called, as PyTorch's
own `torch.nn.attention._fa3` does: the package's Python functions differ between versions (window_size became
window_size_left and _right), and the older ones are no operators that torch.compile could keep whole. What is assumed:
  - the names in `FA3_ARGUMENTS`; every other argument has a default. `needs` compares the operators' schemas with them,
    and an older build, which registers none, or has no defaults, is refused with a sentence
  - with is_causal, a query sees itself and window_size_left keys before it, -1: all
  - fwd returns y, contiguous, and the logarithms (B, H, T) fp32 first; bwd writes into dq, dk and dv
"""

import functools
import importlib
import importlib.util
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from kernels import sizes
from kernels.op import (
    DTYPES,
    Backend,
    Device,
    Op,
    Problem,
    Shape,
    check_tensor,
    describe,
    dtype_name,
    needs_gpu,
    takes_dtypes,
)
from kernels.sizes import Size, round_up

FLEX_TILE = 128
FA3 = "flash_attn_interface"
FA3_CAPABILITY = (9, 0)
FA3_MAX_HEAD = 256
FA3_ALIGNMENT = 16  # bytes: of every row of channels, which TMA copies
FA3_ARGUMENTS = {
    "fwd": ("q", "k", "v", "softmax_scale", "is_causal", "window_size_left", "window_size_right", "num_splits"),
    "bwd": (
        "dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv",
        "softmax_scale", "is_causal", "window_size_left", "window_size_right", "deterministic",
    ),
}  # fmt: skip


# windows


def visible(seq_len: int, window: int | None) -> int:
    """W: the most keys that a query sees, itself among them."""
    return seq_len if window is None else min(window + 1, seq_len)


def in_window(q_idx: Tensor, kv_idx: Tensor, window: int) -> Tensor:
    """True where a query sees a key: itself and `window` keys before it."""
    return (kv_idx <= q_idx) & (q_idx - kv_idx <= window)


def dense_mask(seq_len: int, window: int | None, device: torch.device) -> Tensor | None:
    """(T, T) bool, True where a query sees a key; None where the window hides nothing that causality shows."""
    if window is None or visible(seq_len, window) == seq_len:
        return None
    i = torch.arange(seq_len, device=device)
    return in_window(i[:, None], i[None, :], window)


# reference, and SDPA


def attention_ref(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, scale: float | None = None) -> Tensor:
    mask = dense_mask(q.size(1), window, q.device)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, D)
    gqa = q.size(1) != k.size(1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa)
    return y.transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, scale: float | None = None) -> Tensor:
    return attention_ref(q, k, v, scale=scale)


# FlexAttention


_block_masks = types.SimpleNamespace()  # by `_named_block_mask`, one attribute each, which compiled code guards on


@torch.compiler.assume_constant_result  # made outside of the graph, where it would cost every step
def _named_block_mask(seq_len: int, seen: int, device: torch.device) -> str:
    """The attribute of `_block_masks` with FlexAttention's mask, which is made if it is not there."""
    name = f"{seq_len}, {seen}, {device}"

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return in_window(q_idx, kv_idx, seen - 1)

    if not hasattr(_block_masks, name):
        made = create_block_mask(mask_mod, None, None, seq_len, seq_len, device=device, BLOCK_SIZE=FLEX_TILE)
        setattr(_block_masks, name, made)
    return name


def block_mask(seq_len: int, seen: int, device: torch.device) -> BlockMask:
    """(T, T) for FlexAttention, which skips tiles that are wholly hidden."""
    made: BlockMask = getattr(_block_masks, _named_block_mask(seq_len, seen, device))
    return made


@functools.cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, scale: float | None = None) -> Tensor:
    T, heads, kv_heads = q.size(1), q.size(2), k.size(2)
    mask = block_mask(T, visible(T, window), q.device)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    # uncompiled, FlexAttention makes all scores; within compiled code it is compiled already
    flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
    y: Tensor = flex(q, k, v, block_mask=mask, scale=scale, enable_gqa=heads != kv_heads)
    return y.transpose(1, 2)


def _flex_limits(shape: Shape, dtype: torch.dtype) -> str | None:
    T = shape[1]
    if why := takes_dtypes(shape, dtype):
        return why
    return f"takes T that is a multiple of {FLEX_TILE}, not {T}" if T % FLEX_TILE else None


def _sdpa_limits(shape: Shape, dtype: torch.dtype) -> str | None:
    _, T, *_, W = shape
    return takes_dtypes(shape, dtype) or (None if W >= T else f"takes no window, not {W} of {T} keys: ref masks them")


# FlashAttention 3


def _fa3_kernels() -> Any:
    importlib.import_module(FA3)  # registers them
    return torch.ops.flash_attn_3


@torch.compiler.assume_constant_result  # the import system is none of the graph's business
def _fa3_is_missing() -> str:
    """Why the package cannot serve, "" if it can."""
    if importlib.util.find_spec(FA3) is None:
        return f"needs FlashAttention 3, which is built from source: no package {FA3} is installed"
    kernels = _fa3_kernels()
    for name, given in FA3_ARGUMENTS.items():
        operator = getattr(kernels, name, None)
        if operator is None:
            return f"needs the operator flash_attn_3::{name}, which the installed {FA3} does not register"
        arguments = operator.default._schema.arguments
        lacking = [n for n in given if n not in {a.name for a in arguments}]
        besides = [a.name for a in arguments if a.name not in given and not a.has_default_value()]
        if lacking or besides:
            differ = ", ".join([*(f"no {n}" for n in lacking), *(f"{n} without a default" for n in besides)])
            return f"needs another flash_attn_3::{name} than the installed {FA3} registers: {differ}"
    return ""


def _needs_fa3(device: Device) -> str | None:
    if why := needs_gpu(device):
        return why
    if device.capability != FA3_CAPABILITY:
        want = ".".join(map(str, FA3_CAPABILITY))
        return f"needs compute capability {want}, {device.name} has {device.capability}"
    return _fa3_is_missing() or None


def _fa3_limits(shape: Shape, dtype: torch.dtype) -> str | None:
    D = shape[4]
    if dtype != torch.bfloat16:
        return f"takes bfloat16, not {dtype_name(dtype)}"
    if D % 8 or D > FA3_MAX_HEAD:
        return f"takes heads of a multiple of 8 channels up to {FA3_MAX_HEAD}, not {D}"
    return None


def _aligned(t: Tensor) -> Tensor:
    """t, or a copy, so that every row of channels begins at a multiple of 16 bytes."""
    offsets = (t.data_ptr(), *(stride * t.itemsize for stride in t.stride()[:-1]))
    if t.stride(-1) != 1 or any(offset % FA3_ALIGNMENT for offset in offsets):
        return t.clone(memory_format=torch.contiguous_format)
    return t


def _fa3_window(window: int) -> dict[str, Any]:
    """window: keys before a query, -1: all."""
    return {"is_causal": True, "window_size_left": window, "window_size_right": -1 if window < 0 else 0}


@torch.library.custom_op("redline::attention_fa3", mutates_args=())
def _fa3_fwd(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    """y, and the logarithms (B, H, T) fp32 of the sums of exponentials."""
    operands = dict(zip("qkv", map(_aligned, (q, k, v))))
    # in one piece: otherwise it may split keys, as decoding needs, into partial results
    y, lse, *_ = _fa3_kernels().fwd(**operands, softmax_scale=scale, **_fa3_window(window), num_splits=1)
    return y, lse


@_fa3_fwd.register_fake
def _(q, k, v, window, scale):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("redline::attention_fa3_bwd", mutates_args=())
def _fa3_bwd(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    operands = dict(zip(("dout", "q", "k", "v", "out"), map(_aligned, (dy, q, k, v, y))))
    grads = {f"d{name}": operands[name].new_empty(operands[name].shape) for name in "qkv"}
    deterministic = torch.are_deterministic_algorithms_enabled()
    _fa3_kernels().bwd(
        **operands, softmax_lse=lse, **grads, softmax_scale=scale, **_fa3_window(window), deterministic=deterministic
    )
    return grads["dq"], grads["dk"], grads["dv"]


@_fa3_bwd.register_fake
def _(dy, q, k, v, y, lse, window, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, k, v, ctx.window, ctx.scale = inputs
    y, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, y, lse)


def _backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 5
    return *_fa3_bwd(dy, *ctx.saved_tensors, ctx.window, ctx.scale), None, None


_fa3_fwd.register_autograd(_backward, setup_context=_setup_context)


def _fa3(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, scale: float | None = None) -> Tensor:
    T, D = q.size(1), q.size(3)
    seen = visible(T, window)
    y, _ = _fa3_fwd(q, k, v, -1 if seen == T else seen - 1, D**-0.5 if scale is None else scale)
    return y


# cost


def attention_cost(
    shape: tuple[int, int, int, int, int, int], dtype: torch.dtype, form: str = "plain", backward: bool = False
) -> tuple[int, int]:
    """The least FLOPs and bytes. Of the pairs of a query and a key only those count that are visible: two products
    forward; five backward, which makes the scores again. Forward reads q, k and v and writes y; backward reads these
    and dy, and writes the gradients. The logarithms are written and read."""
    B, T, H, G, D, W = shape
    W = min(W, T)
    pairs = B * H * (W * (W + 1) // 2 + (T - W) * W)
    heads = (4 * H + 4 * G) if backward else (2 * H + 2 * G)
    return pairs * D * (10 if backward else 4), B * T * (heads * D * dtype.itemsize + 4 * H)


# interface


def _check(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, scale: float | None = None) -> Problem:
    if q.dim() != 4 or 0 in q.shape or q.dtype not in (*DTYPES, torch.float64):
        raise ValueError(f"attention: q is {describe(q)}; expected (B, T, H, D) bfloat16 or float32, none of them 0")
    B, T, H, D = q.shape
    G = k.size(2) if k.dim() == 4 else 0
    if G == 0 or H % G:
        raise ValueError(f"attention: k is {describe(k)}; expected ({B}, {T}, G, {D}), where G divides {H} query heads")
    for name, t in (("k", k), ("v", v)):
        check_tensor("attention", name, t, (B, T, G, D), (q.dtype,), q.device)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if D > 1 and t.stride(-1) != 1:
            raise ValueError(f"attention: {name} is {describe(t)}; expected adjacent channels")
    if window is not None and window < 0:
        raise ValueError(f"attention: window is {window}; expected the number of keys before a query, or None")
    return Problem((B, T, H, G, D, visible(T, window)), q.dtype, q.device)


def _inputs(make: Callable[..., Tensor], B: int, T: int, H: int, G: int, D: int, W: int) -> dict[str, Any]:
    window = None if W >= T else W - 1
    return {"q": make(B, T, H, D), "k": make(B, T, G, D), "v": make(B, T, G, D), "window": window}


def _preferred(shape: Shape) -> Sequence[str]:
    _, T, *_, W = shape
    return ("fa3", "flex", "sdpa") if W < T else ("fa3", "sdpa", "flex")


def _cases() -> dict[str, Shape]:
    """The windows of the tracks' models: a quarter of the context, in whole tiles, and all of it. Not fineweb's: its
    sequences end with documents, and a dense mask for all of its tokens has 2.4 billion entries."""

    def shape(size: Size, seen: int) -> Shape:
        return (size.B, size.T, size.H, size.G, size.D, seen)

    first = sizes.SIZES["quickstart"]
    found = {"quickstart": shape(first, round_up(first.T // 4, FLEX_TILE) + 1)}
    for label, size in sizes.SIZES.items():
        if label.startswith("depth"):
            found[f"{label}, short"] = shape(size, round_up(size.T // 4, FLEX_TILE) + 1)
            found[f"{label}, full"] = shape(size, size.T)
    return found


attention = Op(
    "attention",
    dims=("B", "T", "H", "G", "D", "W"),
    cases=_cases(),
    forms={"plain": _inputs},
    cost=attention_cost,
    check=_check,
    unmeasured=_preferred,
    backends={
        "ref": Backend(attention_ref),
        "fa3": Backend(_fa3, _needs_fa3, _fa3_limits),
        "flex": Backend(_flex, needs_gpu, _flex_limits),
        "sdpa": Backend(_sdpa, needs_gpu, _sdpa_limits),
    },
)
