"""Causal attention within a window and within documents, for whole sequences.

    y_t = sum_s p_ts v_s,   p_ts = softmax_s(scale q_t . k_s)  over the keys s with  t - window <= s <= t
    lse_t = log sum_s exp(scale q_t . k_s)                     that are of the same document

Shapes    q (B, T, H, D); k and v (B, T, G, D), H a multiple of G: H / G query heads share a head of k and v
          -> y (B, T, H, D); with lse=True `Attention`: y, and lse (B, H, T) fp32, which has no gradient. No size is 0;
          channels of a head are adjacent, other strides are free
Dtypes    q, k, v and y bf16 or fp32, all the same
window    keys before itself that a query sees, 0 or more; None: all of them. As a size W it counts the query's own key,
          and is T, or the longest document's length, where nothing but the future is hidden
documents that the rows are made of, as `kernels.windows.documents_of` lists them; None: each row is one. As a size M:
          the most tokens of a document, 0 without documents
scale     from 2^-40 to 2^20, default 1/sqrt(D)
Rounding  softmax and sums are in fp32; probabilities are rounded before they multiply v, y once
Saves     q, k, v, y, and lse; the reference its mask as well, in the dtype
Backends  ref    scaled_dot_product_attention (SDPA), with a dense mask where the window or documents hide something
          triton ours: D a multiple of 8 from 16 to 128, B T H below 2^31. Tiles without visible pairs are not visited,
                 and only tiles with hidden ones are masked. dq is made by one kernel, dk and dv by another, which make
                 the scores again: nobody adds to memory, and results repeat bit by bit
          others: kernels/attention_libraries.py, and there what each of them takes
          auto means, where nothing is measured, the first of these that can run: fa3 and fa4, which are written for
          the GPUs that they take; where nothing but the future is hidden sdpa, that is cuDNN, whose speed on Hopper is
          about fa3's; triton; flash_attn, fa2 and flex, made for Ampere or for any. In documents triton comes first:
          libraries launch programs for every document that there is room for, and cannot do without their number
Bound     arithmetic: `attention_cost`
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import attention_libraries as libraries
from kernels import sizes
from kernels.gemm import has_large_shared_memory
from kernels.op import (
    DTYPES,
    Backend,
    Op,
    Problem,
    Shape,
    capability,
    check_tensor,
    describe,
    needs_gpu,
    needs_triton,
    takes_dtypes,
    wide,
)
from kernels.sizes import Size, round_up
from kernels.tile import launch
from kernels.windows import Attention, Documents, dense_mask, documents_of, visible

MIN_SCALE, MAX_SCALE = 2.0**-40, 2.0**20  # with which a hidden score stays below all others, and is a number
MIN_HEAD, MAX_HEAD = 16, 128
MAX_TILE = 128  # tokens of a tile
SHORT_MULTIPLE = 128  # short windows of the tracks' models are whole tiles


# reference


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    documents: Documents | None = None,
    lse: bool = False,
) -> Tensor | Attention:
    mask = dense_mask(q, window, documents)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, D)
    gqa = q.size(1) != k.size(1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa)
    y = y.transpose(1, 2)
    if not lse:
        return y
    with torch.no_grad():
        q, k = q.to(wide(q.dtype)), k.to(wide(k.dtype)).repeat_interleave(q.size(1) // k.size(1), dim=1)
        scores = (q.size(-1) ** -0.5 if scale is None else scale) * (q @ k.mT)  # (B, H, T, T)
        seen = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril() if mask is None else mask
        return Attention(y, scores.masked_fill(~seen, -torch.inf).logsumexp(-1))


# Triton


# Tiles that fill an SM without spills, not measured on a GPU yet. What is summed over steps stays in registers: y, dq
# (BLOCK_M, D), dk and dv (BLOCK_N, D). On sm_90 128 rows give both warp groups one of wgmma's 64, and bulk copies leave
# every operand in shared memory; a second program an SM (at most 128 registers) makes ptxas serialise the products.
# Elsewhere an SM may have 99 KiB. fp32 is multiplied in CUDA cores
FP32_TILE = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}


def _is_large(arch: tuple[int, int]) -> bool:
    return arch >= (9, 0) and has_large_shared_memory(arch)


def _forward_config(dtype: torch.dtype, arch: tuple[int, int]) -> dict[str, int]:
    if dtype == torch.float32:
        return FP32_TILE
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3 if _is_large(arch) else 2}


def _dq_config(dtype: torch.dtype, arch: tuple[int, int]) -> dict[str, int]:
    if dtype == torch.float32:
        return FP32_TILE
    return {"BLOCK_M": 128, "BLOCK_N": 64 if _is_large(arch) else 32, "num_warps": 8, "num_stages": 2}


def _dkv_config(d_head: int, bulk: bool, dtype: torch.dtype, arch: tuple[int, int]) -> dict[str, int]:
    if dtype == torch.float32:
        return FP32_TILE
    if _is_large(arch):
        # without bulk copies addresses take the registers
        queries, stages = (64, 3) if bulk else (32, 2)
        return {"BLOCK_M": queries, "BLOCK_N": 128, "num_warps": 8, "num_stages": stages}
    queries, warps = (64, 8) if d_head > 64 else (32, 4)
    return {"BLOCK_M": queries, "BLOCK_N": 64, "num_warps": warps, "num_stages": 2}


LOG2_E = tl.constexpr(1.4426950408889634)
# a score without weight. Finite, as a row of a tile may have no other, and a power of two: its product with scale is
# exact, or what s * scale - top leaves, contracted to one fused operation, would be the product's rounding, some 1e21
HIDDEN = tl.constexpr(-(2.0**100))


@triton.jit
def _pointers(ptr, b, t, h, T, heads, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of a tile, whose channels are of one head and whose rows are tokens t, t + 1, ...; and which of it exist."""
    row, offs_d = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    first_ptr = ptr + (((b * T + t).to(tl.int64)) * heads + h) * D
    return first_ptr + row * (heads * D) + offs_d, (t + row < T) & (offs_d < D)


@triton.jit
def _load(source, b, t, h, T, heads, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BULK: tl.constexpr):
    """(ROWS, BLOCK_D); beyond the row's end and the head's, zeros."""
    if BULK:
        tile = source.load([b * T + t, h * D])
    else:
        pointers, mask = _pointers(source, b, t, h, T, heads, D, ROWS, BLOCK_D)
        tile = tl.load(pointers, mask=mask, other=0.0)
    return tile


@triton.jit
def _store(
    target, values, b, t, h, T, heads, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BULK: tl.constexpr
):
    if BULK:
        target.store([b * T + t, h * D], values.to(target.dtype))
    else:
        pointers, mask = _pointers(target, b, t, h, T, heads, D, ROWS, BLOCK_D)
        tl.store(pointers, values.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _place(blocks, heads):
    """Of this program: its block, head and row. Blocks come fastest, so that those that run together share keys."""
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    return block, rest % heads, rest // heads


@triton.jit
def _keys_of(m, T, window, first_ptr, DOCUMENTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of queries m, m + 1, ...: the first key that each sees, the tile where the keys of the first one begin, and the
    first key from which on the last one sees all before itself."""
    offs_m = m + tl.arange(0, BLOCK_M)
    last = tl.minimum(m + BLOCK_M, T) - 1
    lowest = tl.maximum(offs_m - window, 0)
    begin, full = tl.maximum(m - window, 0), tl.maximum(last - window, 0)
    if DOCUMENTS:
        lowest = tl.maximum(lowest, tl.load(first_ptr + offs_m, mask=offs_m < T, other=0))
        begin = tl.maximum(begin, tl.load(first_ptr + m))
        full = tl.maximum(full, tl.load(first_ptr + last))
    return lowest, begin // BLOCK_N * BLOCK_N, full


@triton.jit(do_not_specialize=["T", "H", "G", "window"])
def _attention_fwd_kernel(
    lse_ptr, first_ptr, q_in, y_out, k_in, v_in, T, H, G, window, scale,
    DOCUMENTS: tl.constexpr, D: tl.constexpr, BULK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """scale is that of powers of two."""
    blocks = tl.cdiv(T, BLOCK_M)
    block, h, b = _place(blocks, H)
    m, g = (blocks - 1 - block) * BLOCK_M, h // (H // G)  # the last queries see the most keys: they begin first
    offs_m = m + tl.arange(0, BLOCK_M)
    lowest, begin, full = _keys_of(m, T, window, first_ptr, DOCUMENTS, BLOCK_M, BLOCK_N)
    q = _load(q_in, b, m, h, T, H, D, BLOCK_M, BLOCK_D, BULK)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), HIDDEN, tl.float32)
    for n in tl.range(begin, tl.minimum(m + BLOCK_M, T), BLOCK_N):
        k = _load(k_in, b, n, g, T, G, D, BLOCK_N, BLOCK_D, BULK)
        s = tl.dot(q, k.T, input_precision="ieee")
        if (n < full) | (n + BLOCK_N - 1 > m):  # an edge: some query does not see some key
            offs_n = n + tl.arange(0, BLOCK_N)[None, :]
            s = tl.where((offs_n <= offs_m[:, None]) & (offs_n >= lowest[:, None]), s, HIDDEN)
        # a row that has seen nothing yet weighs hidden keys by 1: its first visible key wipes that out
        higher = tl.maximum(top, scale * tl.max(s, axis=1))
        shrink = tl.exp2(top - higher)
        acc, total, top = acc * shrink[:, None], total * shrink, higher
        p = tl.exp2(s * scale - top[:, None])
        total += tl.sum(p, axis=1)
        v = _load(v_in, b, n, g, T, G, D, BLOCK_N, BLOCK_D, BULK)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    _store(y_out, acc / total[:, None], b, m, h, T, H, D, BLOCK_M, BLOCK_D, BULK)
    row = (b * H + h) * T
    tl.store(lse_ptr + row + offs_m, (top + tl.log2(total)) / LOG2_E, mask=offs_m < T)


@triton.jit(do_not_specialize=["T", "H", "G", "window"])
def _attention_dq_kernel(
    lse_ptr, delta_ptr, first_ptr, q_in, y_in, dy_in, dq_out, k_in, v_in, T, H, G, window, scale,
    DOCUMENTS: tl.constexpr, D: tl.constexpr, BULK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Also makes delta, the sum of y dy over a head's channels, which the gradient of k needs."""
    blocks = tl.cdiv(T, BLOCK_M)
    block, h, b = _place(blocks, H)
    m, g = (blocks - 1 - block) * BLOCK_M, h // (H // G)
    offs_m = m + tl.arange(0, BLOCK_M)
    lowest, begin, full = _keys_of(m, T, window, first_ptr, DOCUMENTS, BLOCK_M, BLOCK_N)
    row = (b * H + h) * T
    dy = _load(dy_in, b, m, h, T, H, D, BLOCK_M, BLOCK_D, BULK)
    y = _load(y_in, b, m, h, T, H, D, BLOCK_M, BLOCK_D, BULK)
    delta = tl.sum(y.to(tl.float32) * dy.to(tl.float32), axis=1)
    tl.store(delta_ptr + row + offs_m, delta, mask=offs_m < T)
    lse = LOG2_E * tl.load(lse_ptr + row + offs_m, mask=offs_m < T, other=0.0)
    q = _load(q_in, b, m, h, T, H, D, BLOCK_M, BLOCK_D, BULK)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for n in tl.range(begin, tl.minimum(m + BLOCK_M, T), BLOCK_N):
        k = _load(k_in, b, n, g, T, G, D, BLOCK_N, BLOCK_D, BULK)
        v = _load(v_in, b, n, g, T, G, D, BLOCK_N, BLOCK_D, BULK)
        s = tl.dot(q, k.T, input_precision="ieee")
        dp = tl.dot(dy, v.T, input_precision="ieee")
        if (n < full) | (n + BLOCK_N - 1 > m):
            offs_n = n + tl.arange(0, BLOCK_N)[None, :]
            s = tl.where((offs_n <= offs_m[:, None]) & (offs_n >= lowest[:, None]), s, HIDDEN)
        p = tl.exp2(s * (scale * LOG2_E) - lse[:, None])
        ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    _store(dq_out, scale * acc, b, m, h, T, H, D, BLOCK_M, BLOCK_D, BULK)


@triton.jit(do_not_specialize=["T", "H", "G", "window"])
def _attention_dkv_kernel(
    lse_ptr, delta_ptr, last_ptr, q_in, dy_in, k_in, v_in, dk_out, dv_out, T, H, G, window, scale,
    DOCUMENTS: tl.constexpr, D: tl.constexpr, BULK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Everything is transposed: scores are (keys, queries), so that both products that sum read them out of
    registers. A program goes through all heads that share its keys, so that nobody else adds to its sums."""
    block, g, b = _place(tl.cdiv(T, BLOCK_N), G)
    n = block * BLOCK_N  # the first keys are seen by the most queries
    offs_n = n + tl.arange(0, BLOCK_N)
    last = tl.minimum(n + BLOCK_N, T) - 1
    # of each key the last query that sees it; the end of those of the last key, and the last query that sees all
    highest = offs_n + window
    end, full = tl.minimum(last + window, T - 1) + 1, n + window
    if DOCUMENTS:
        highest = tl.minimum(highest, tl.load(last_ptr + offs_n, mask=offs_n < T, other=0))
        end = tl.minimum(end, tl.load(last_ptr + last) + 1)
        full = tl.minimum(full, tl.load(last_ptr + n))
    begin = n // BLOCK_M * BLOCK_M
    steps = tl.cdiv(end - begin, BLOCK_M)
    k = _load(k_in, b, n, g, T, G, D, BLOCK_N, BLOCK_D, BULK)
    v = _load(v_in, b, n, g, T, G, D, BLOCK_N, BLOCK_D, BULK)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for i in tl.range(0, H // G * steps):
        h = g * (H // G) + i // steps
        m = begin + i % steps * BLOCK_M
        offs_m = m + tl.arange(0, BLOCK_M)
        row = (b * H + h) * T
        q = _load(q_in, b, m, h, T, H, D, BLOCK_M, BLOCK_D, BULK)
        dy = _load(dy_in, b, m, h, T, H, D, BLOCK_M, BLOCK_D, BULK)
        s = tl.dot(k, q.T, input_precision="ieee")  # (BLOCK_N, BLOCK_M)
        dp = tl.dot(v, dy.T, input_precision="ieee")
        if (m < last) | (m + BLOCK_M - 1 > full):
            seen = (offs_m[None, :] >= offs_n[:, None]) & (offs_m[None, :] <= highest[:, None])
            s = tl.where(seen, s, HIDDEN)
        # each is read where it is needed: registers are short. Beyond the end q and dy are zeros, which add nothing
        lse = LOG2_E * tl.load(lse_ptr + row + offs_m, mask=offs_m < T, other=0.0)
        p = tl.exp2(s * (scale * LOG2_E) - lse[None, :])
        dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision="ieee")
        delta = tl.load(delta_ptr + row + offs_m, mask=offs_m < T, other=0.0)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    _store(dv_out, dv, b, n, g, T, G, D, BLOCK_N, BLOCK_D, BULK)
    _store(dk_out, scale * dk, b, n, g, T, G, D, BLOCK_N, BLOCK_D, BULK)


# torch ops


def _rows(t: Tensor, documents: bool) -> Tensor:
    """t as the kernels read it: documents count through all rows, as if these were one."""
    t = t.contiguous()
    return t.view(1, -1, *t.shape[2:]) if documents else t


def _bulk(arch: tuple[int, int], *tensors: Tensor) -> bool:
    """Whether tiles of (B, T, heads, D) can be bulk copies (TMA): the GPU has them, and each is a part of a matrix of
    B T rows which ends with the row of tokens."""
    B, T, _, D = tensors[0].shape
    whole = (B == 1 or T % MAX_TILE == 0) and D == triton.next_power_of_2(D)
    whole &= tensors[0].dtype == torch.bfloat16
    return whole and arch >= (9, 0) and all(t.data_ptr() % 16 == 0 for t in tensors)


def _tiles_of(t: Tensor, rows: int, bulk: bool) -> Tensor | TensorDescriptor:
    """What a kernel reads or writes its tiles of that many rows through."""
    if not bulk:
        return t
    if rows > MAX_TILE:  # it could end in the next row of tokens
        raise ValueError(f"attention: a tile of {rows} tokens; expected at most {MAX_TILE}")
    return TensorDescriptor.from_tensor(t.view(t.size(0) * t.size(1), -1), [rows, t.size(3)])


def _head(D: int) -> dict[str, int]:
    return {"D": D, "BLOCK_D": triton.next_power_of_2(D)}


@torch.library.custom_op("redline::attention_fwd", mutates_args=())
def _attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, last: Tensor | None,
    window: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and lse (B, H, T) fp32, with documents (1, H, B T). first, last: token of each token's document."""
    y, documents = q.new_empty(q.shape), first is not None
    q, k, v = (_rows(t, documents) for t in (q, k, v))
    B, T, H, D = q.shape
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    arch = capability(q.device)
    bulk = _bulk(arch, q, k, v)
    tile = _forward_config(q.dtype, arch)
    M, N = tile["BLOCK_M"], tile["BLOCK_N"]
    queries = (_tiles_of(t, M, bulk) for t in (q, _rows(y, documents)))
    keys = (_tiles_of(t, N, bulk) for t in (k, v))
    launch(
        _attention_fwd_kernel, (triton.cdiv(T, M) * H * B,),
        lse, first, *queries, *keys, T, H, k.size(2), window, LOG2_E.value * scale,
        DOCUMENTS=documents, BULK=bulk, **_head(D), **tile,
    )  # fmt: skip
    return y, lse


@_attention_fwd.register_fake
def _(q, k, v, first, last, window, scale):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((1, H, B * T) if first is not None else (B, H, T), dtype=torch.float32)


@torch.library.custom_op("redline::attention_bwd", mutates_args=())
def _attention_bwd(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, first: Tensor | None, last: Tensor | None,
    window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, contiguous."""
    grads, documents = [t.new_empty(t.shape) for t in (q, k, v)], first is not None
    dy, q, k, v, y = (_rows(t, documents) for t in (dy, q, k, v, y))
    dq, dk, dv = (_rows(t, documents) for t in grads)
    (B, T, H, D), G = q.shape, k.size(2)
    delta = torch.empty_like(lse)
    arch = capability(q.device)
    bulk = _bulk(arch, q, k, v, y, dy)
    common = {"DOCUMENTS": documents, "BULK": bulk, **_head(D)}
    tile = _dq_config(q.dtype, arch)
    M, N = tile["BLOCK_M"], tile["BLOCK_N"]
    launch(
        _attention_dq_kernel, (triton.cdiv(T, M) * H * B,),
        lse, delta, first, *(_tiles_of(t, M, bulk) for t in (q, y, dy, dq)),
        *(_tiles_of(t, N, bulk) for t in (k, v)), T, H, G, window, scale, **common, **tile,
    )  # fmt: skip
    tile = _dkv_config(D, bulk, q.dtype, arch)
    M, N = tile["BLOCK_M"], tile["BLOCK_N"]
    launch(
        _attention_dkv_kernel, (triton.cdiv(T, N) * G * B,),
        lse, delta, last, *(_tiles_of(t, M, bulk) for t in (q, dy)),
        *(_tiles_of(t, N, bulk) for t in (k, v, dk, dv)), T, H, G, window, scale,
        **common, **tile,
    )  # fmt: skip
    return grads[0], grads[1], grads[2]


@_attention_bwd.register_fake
def _(dy, q, k, v, y, lse, first, last, window, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, k, v, first, last, ctx.window, ctx.scale = inputs
    y, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, y, lse, first, last)


def _backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    return *_attention_bwd(dy, *ctx.saved_tensors, ctx.window, ctx.scale), *(None,) * 4


_attention_fwd.register_autograd(_backward, setup_context=_setup_context)


def _attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    documents: Documents | None = None,
    lse: bool = False,
) -> Tensor | Attention:
    (B, T, H, D), first, last = q.shape, None, None
    if documents is not None:
        first, last = documents.first, documents.last
    y, logs = _attention_fwd(q, k, v, first, last, visible(T, window) - 1, D**-0.5 if scale is None else scale)
    if not lse:
        return y
    return Attention(y, logs if documents is None else logs.view(H, B, T).transpose(0, 1))


def _triton_limits(shape: Shape, dtype: torch.dtype) -> str | None:
    if why := takes_dtypes(shape, dtype):
        return why
    B, T, H, _, D, *_ = shape
    if D % 8 or not MIN_HEAD <= D <= MAX_HEAD:
        return f"takes heads of a multiple of 8 channels from {MIN_HEAD} to {MAX_HEAD}, not {D}"
    return f"takes fewer than 2^31 heads of queries, not {B * T * H}" if B * T * H >= 2**31 else None


# cost


def attention_cost(
    shape: tuple[int, int, int, int, int, int, int], dtype: torch.dtype, form: str = "plain", backward: bool = False
) -> tuple[int, int]:
    """The least FLOPs and bytes. Of the pairs of a query and a key only those count that are visible, in documents of M
    tokens if there are any: two products forward; five backward, which makes the scores again. Forward reads q, k and v
    and writes y; backward reads these and dy, and writes the gradients. The logarithms are written and read."""
    B, T, H, G, D, W, M = shape

    def pairs(tokens: int) -> int:
        w = min(W, tokens)
        return w * (w + 1) // 2 + (tokens - w) * w

    each = T // M * pairs(M) + pairs(T % M) if M else pairs(T)
    heads = (4 * H + 4 * G) if backward else (2 * H + 2 * G)
    return B * H * each * D * (10 if backward else 4), B * T * (heads * D * dtype.itemsize + 4 * H)


# interface


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    documents: Documents | None = None,
    lse: bool = False,
) -> Problem:
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
    if scale is not None and not MIN_SCALE <= scale <= MAX_SCALE:
        raise ValueError(f"attention: scale is {scale}; expected a number from {MIN_SCALE:.1g} to {MAX_SCALE:.0f}")
    longest = 0
    if documents is not None:
        begins, longest = documents.cu_seqlens, documents.max_seqlen
        if begins is not None:
            check_tensor("attention", "cu_seqlens", begins, (len(begins),), (torch.int32,), q.device, contiguous=True)
        for name in ("first", "last"):
            check_tensor(
                "attention", f"documents.{name}", getattr(documents, name), (B * T,), (torch.int32,), q.device,
                contiguous=True,
            )  # fmt: skip
        if longest < 1:
            raise ValueError(f"attention: max_seqlen is {longest}; expected the most tokens of a document, 1 or more")
    return Problem((B, T, H, G, D, visible(min(T, longest or T), window), longest), q.dtype, q.device)


def _inputs(make: Callable[..., Tensor], B: int, T: int, H: int, G: int, D: int, W: int, M: int) -> dict[str, Any]:
    window = None if min(T, M or T) <= W else W - 1
    inputs: dict[str, Any] = {"q": make(B, T, H, D), "k": make(B, T, G, D), "v": make(B, T, G, D), "window": window}
    if M:
        begins = [row * T + t for row in range(B) for t in range(0, T, M)]
        cu_seqlens = torch.tensor([*begins, B * T], dtype=torch.int32, device=inputs["q"].device)
        inputs["documents"] = documents_of(cu_seqlens, M, T, B * T)
    return inputs


def _preferred(shape: Shape) -> Sequence[str]:
    _, T, *_, W, M = shape
    ours, others = ("triton",), ("fa3", "fa4")
    if M:
        return (*ours, *others, "flash_attn", "fa2")
    return (*others, *(("sdpa",) if W == T else ()), *ours, "flash_attn", "fa2", "flex")


def _cases() -> dict[str, Shape]:
    """The windows of the tracks' models: a quarter of the context, in whole tiles, and all of it. Of fineweb's one row
    8192 tokens in documents: the reference's mask has the square of that."""

    def shape(size: Size, seen: int) -> Shape:
        return (size.B, size.T, size.H, size.G, size.D, seen, 0)

    first = sizes.SIZES["quickstart"]
    found = {"quickstart": shape(first, round_up(first.T // 4, SHORT_MULTIPLE) + 1)}
    for label, size in sizes.SIZES.items():
        if label.startswith("depth"):
            found[f"{label}, short"] = shape(size, round_up(size.T // 4, SHORT_MULTIPLE) + 1)
            found[f"{label}, full"] = shape(size, size.T)
    size = sizes.SIZES["fineweb"]
    for label, seen in (("short", 385), ("long", 1024)):  # keys; documents of 1024 tokens
        found[f"fineweb, {label}"] = (1, 8192, size.H, size.G, size.D, seen, 1024)
    return found


attention = Op(
    "attention",
    dims=("B", "T", "H", "G", "D", "W", "M"),
    cases=_cases(),
    forms={"plain": _inputs},
    cost=attention_cost,
    check=_check,
    unmeasured=_preferred,
    backends={
        "ref": Backend(attention_ref),
        "triton": Backend(_attention_triton, needs_triton, _triton_limits),
        "fa3": Backend(libraries.fa3, libraries.needs_fa3, libraries.fa3_limits),
        "fa4": Backend(libraries.fa4, libraries.needs_fa4, libraries.fa4_limits),
        "sdpa": Backend(libraries.sdpa, libraries.needs_sdpa, libraries.sdpa_limits),
        "flash_attn": Backend(libraries.flash_attn, libraries.needs_flash_attn, libraries.flash_attention_2_limits),
        "fa2": Backend(libraries.fa2, libraries.needs_fa2, libraries.flash_attention_2_limits),
        "flex": Backend(libraries.flex, needs_gpu, libraries.flex_limits),
    },
)

# for documents whose number is not known (`documents_at`). Libraries would make room and launch programs for as many as
# there are tokens; these backends read where each token's document begins and ends
attention_in_batches = dataclasses.replace(
    attention, backends={name: attention.backends[name] for name in ("ref", "triton")}
)
