"""Attention of one query per row to the keys and values kept of its text: a step of generation.

    y_b = sum_s p_bs v_bs,   p_bs = softmax_s(scale q_b . k_bs)  over the slots s with
    lengths[b] - 1 - window <= s < lengths[b]                    its own token is in slot lengths[b] - 1

Shapes    q (B, 1, H, D); k and v (B, S, G, D), H a multiple of G: H / G query heads share a head of k and v;
          lengths (B,) -> y (B, 1, H, D), contiguous in the kernel. No size is 0; channels of a head are adjacent, other
          strides are free
Dtypes    q, k, v and y bf16 or fp32, all the same; lengths int32 or int64
lengths   from 1 to S, the caller's promise: numbers on a device are not looked at. More than S counts as S; a row of
          less than 1 sees nothing, and the kernel makes its y 0
window    slots before its own that a query sees, 0 or more; None: all of them. As a size W it counts the query's own
          slot, and is S where nothing is hidden
rings     where position p lies in slot p mod S, lengths min(p + 1, S) without a window see the last S positions: the
          softmax does not mind their order
scale     above 0, default 1/sqrt(D)
Rounding  scores, softmax and sums are in fp32, y is rounded once. Where heads share keys, bf16 probabilities multiply v
          as the sum of two bf16 numbers, which have 16 bits between them
Unseen    slots may hold anything, NaN too: the kernel does not read them. The reference multiplies them by 0, and wants
          finite numbers there
Backward  none: the kernel's torch op raises an error there
Limits    in the kernel D is a multiple of 8, 8 to 256, and H / G at most 16
Splits    the W slots of a row are cut into parts of equal size, one program each, so that few rows keep a GPU busy; how
          many depends on sizes alone, never on lengths. Each part leaves its largest score, its sum and its unscaled
          result in fp32; a second launch merges them, in order. A program whose part lies beyond its row's length ends
          at once. With one part there is no second launch
Bound     memory: `decode_attention_cost`
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import sizes
from kernels.gemm import num_programs
from kernels.op import (
    DTYPES,
    Backend,
    Op,
    Problem,
    Shape,
    capability,
    check_tensor,
    describe,
    needs_triton,
    takes_dtypes,
)
from kernels.tile import launch
from kernels.windows import in_window, visible

MIN_HEAD, MAX_HEAD, HEAD_MULTIPLE = 8, 256, 8
MIN_DOT = 16  # rows, columns and depth of the smallest product in tensor cores
MAX_GROUP = MIN_DOT  # query heads to a head of k are the rows of one
MAX_SPLITS = 64  # parts of a row, which one program merges
PROGRAMS_PER_SM = 4  # that the splits aim at. A guess: enough loads in flight, few parts to merge

LOG2E = tl.constexpr(1.4426950408889634)
# below every score. -inf would make NaN of its differences, and half of fp32's range leaves room to multiply by LOG2E
LOWEST = tl.constexpr(torch.finfo(torch.float32).min / 2)


# reference


def decode_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, window: int | None = None, scale: float | None = None
) -> Tensor:
    S = k.size(1)
    last, slots = lengths[:, None].clamp(max=S) - 1, torch.arange(S, device=k.device)
    mask = slots <= last if window is None else in_window(last, slots, window)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, 1 or S, D)
    gqa = q.size(1) != k.size(1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None], scale=scale, enable_gqa=gqa)
    return y.transpose(1, 2)


# Triton


def _config(d_head: int, group: int, dtype: torch.dtype, arch: tuple[int, int]) -> dict[str, int]:
    """Slots of a step, warps and steps on their way. Not measured on a GPU yet.

    One head to a head of k: 32 numbers of k, and as many of v, a thread and step. Asked for in stages they are copied
    to shared memory before they are needed; left alone, the compiler loads v after it has used k, to save registers.
    Four programs share an SM of 90. Several heads: three programs, one in the 99 KiB of sm_89's shared memory.
    """
    block_d = triton.next_power_of_2(d_head)
    if group == 1:
        block_n = min(64, max(8, (4096 if dtype.itemsize == 2 else 2048) // block_d))
    else:
        block_n = min(64, max(MIN_DOT, (8192 if dtype.itemsize == 2 else 2048) // block_d))
    return {"BLOCK_N": block_n, "num_warps": 4, "num_stages": 3}


def _merge_config(splits: int, d_head: int) -> dict[str, int]:
    """All parts of a head at a time, up to 64 numbers a thread; one warp, which needs no barrier, for a few parts."""
    block_s, block_d = triton.next_power_of_2(splits), triton.next_power_of_2(d_head)
    return {"BLOCK_S": block_s, "BLOCK_D": block_d, "num_warps": min(8, max(1, block_s * block_d // 1024))}


def _split(B: int, G: int, W: int, block_n: int, device: torch.device) -> tuple[int, int]:
    """Slots of a part, a multiple of block_n, and parts of a row, at most MAX_SPLITS."""
    blocks = triton.cdiv(W, block_n)
    programs = num_programs(device, B * G * blocks, PROGRAMS_PER_SM)
    chunk = block_n * triton.cdiv(blocks, min(triton.cdiv(programs, B * G), blocks, MAX_SPLITS))
    return chunk, triton.cdiv(W, chunk)


@triton.jit
def _seen(lengths_ptr, b, stride_lengths, S, W):
    """First slot that row b sees, and the end."""
    length = tl.load(lengths_ptr + b * stride_lengths)
    length = tl.minimum(tl.maximum(length, 0), S).to(tl.int32)
    return tl.maximum(length - W, 0), length


@triton.jit
def _weight(m, largest):
    return tl.exp2((m - largest) * LOG2E)


@triton.jit
def _decode_one_kernel(
    q_ptr, keys_ptr, values_ptr, lengths_ptr, y_ptr, acc_ptr, largest_ptr, sum_ptr, S, W, chunk, splits, scale,
    stride_q_b, stride_q_h, stride_k_b, stride_k_s, stride_k_g, stride_v_b, stride_v_s, stride_v_g, stride_lengths,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One query head to a head of k and v: no product of matrices, a thread multiplies the numbers that it loads.

    Each of the BLOCK_N places of a step has a softmax of its own, over every BLOCK_N-th slot; they are merged at the
    end, so that steps exchange nothing between warps."""
    pid = tl.program_id(0)
    b, part, g = (pid // (G * splits)).to(tl.int64), pid // G % splits, (pid % G).to(tl.int64)
    first, end = _seen(lengths_ptr, b, stride_lengths, S, W)
    begin = first + part * chunk
    end = tl.minimum(begin + chunk, end)
    if PARTS:
        if begin >= end:
            return
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    q = tl.load(q_ptr + b * stride_q_b + g * stride_q_h + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    k_row_ptr = keys_ptr + b * stride_k_b + g * stride_k_g + offs_d[None, :]
    v_row_ptr = values_ptr + b * stride_v_b + g * stride_v_g + offs_d[None, :]
    m = tl.full((BLOCK_N,), LOWEST, tl.float32)
    l = tl.zeros((BLOCK_N,), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for n in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        slots = n + offs_n
        seen = slots < end
        mask = seen[:, None] & mask_d[None, :]
        wide = slots.to(tl.int64)[:, None]  # slots may lie far apart
        k = tl.load(k_row_ptr + wide * stride_k_s, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_row_ptr + wide * stride_v_s, mask=mask, other=0.0).to(tl.float32)
        s = tl.where(seen, scale * tl.sum(q[None, :] * k, axis=1), -float("inf"))
        largest = tl.maximum(m, s)
        alpha, p = _weight(m, largest), _weight(s, largest)
        l = l * alpha + p
        acc = acc * alpha[:, None] + p[:, None] * v
        m = largest
    largest = tl.max(m, axis=0)
    alpha = _weight(m, largest)
    total = tl.sum(alpha * l, axis=0)
    result = tl.sum(alpha[:, None] * acc, axis=0)  # (BLOCK_D,)
    h = pid.to(tl.int64)
    if PARTS:
        tl.store(acc_ptr + h * D + offs_d, result, mask=mask_d)
        tl.store(largest_ptr + h, largest)
        tl.store(sum_ptr + h, total)
    else:
        y = result / tl.where(total == 0, 1.0, total)
        tl.store(y_ptr + h * D + offs_d, y.to(y_ptr.dtype.element_ty), mask=mask_d)


@triton.jit
def _decode_group_kernel(
    q_ptr, keys_ptr, values_ptr, lengths_ptr, y_ptr, acc_ptr, largest_ptr, sum_ptr, S, W, chunk, splits, scale,
    stride_q_b, stride_q_h, stride_k_b, stride_k_s, stride_k_g, stride_v_b, stride_v_s, stride_v_g, stride_lengths,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_R: tl.constexpr = MIN_DOT,
):  # fmt: skip
    """R query heads to a head of k and v, padded to the rows of a tensor core's product."""
    pid = tl.program_id(0)
    b, part, g = (pid // (G * splits)).to(tl.int64), pid // G % splits, (pid % G).to(tl.int64)
    first, end = _seen(lengths_ptr, b, stride_lengths, S, W)
    begin = first + part * chunk
    end = tl.minimum(begin + chunk, end)
    if PARTS:
        if begin >= end:
            return
    offs_n, offs_d, offs_r = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    mask_d, mask_r = offs_d < D, offs_r < R
    mask_q = mask_r[:, None] & mask_d[None, :]
    offs_q = (g * R + offs_r)[:, None] * stride_q_h + offs_d[None, :]
    q = tl.load(q_ptr + b * stride_q_b + offs_q, mask=mask_q, other=0.0)
    k_row_ptr = keys_ptr + b * stride_k_b + g * stride_k_g + offs_d[None, :]
    v_row_ptr = values_ptr + b * stride_v_b + g * stride_v_g + offs_d[None, :]
    m = tl.full((BLOCK_R,), LOWEST, tl.float32)
    l = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for n in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        slots = n + offs_n
        seen = slots < end
        mask = seen[:, None] & mask_d[None, :]
        wide = slots.to(tl.int64)[:, None]  # slots may lie far apart
        k = tl.load(k_row_ptr + wide * stride_k_s, mask=mask, other=0.0)
        v = tl.load(v_row_ptr + wide * stride_v_s, mask=mask, other=0.0)
        s = scale * tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_R, BLOCK_N)
        s = tl.where(seen[None, :], s, -float("inf"))
        largest = tl.maximum(m, tl.max(s, axis=1))
        alpha, p = _weight(m, largest), _weight(s, largest[:, None])
        l = l * alpha + tl.sum(p, axis=1)
        acc = acc * alpha[:, None]
        high = p.to(v.dtype)
        acc = tl.dot(high, v, acc, input_precision="ieee")
        if v.dtype != tl.float32:
            low = (p - high.to(tl.float32)).to(v.dtype)
            acc = tl.dot(low, v, acc)
        m = largest
    h = pid.to(tl.int64) * R + offs_r
    if PARTS:
        tl.store(acc_ptr + h[:, None] * D + offs_d[None, :], acc, mask=mask_q)
        tl.store(largest_ptr + h, m, mask=mask_r)
        tl.store(sum_ptr + h, l, mask=mask_r)
    else:
        y = acc / tl.where(l == 0, 1.0, l)[:, None]
        tl.store(y_ptr + h[:, None] * D + offs_d[None, :], y.to(y_ptr.dtype.element_ty), mask=mask_q)


@triton.jit
def _decode_merge_kernel(
    lengths_ptr, acc_ptr, largest_ptr, sum_ptr, y_ptr, S, W, chunk, splits, stride_lengths,
    H: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One head of one row: the parts that its length reaches."""
    pid = tl.program_id(0)
    b, h = (pid // H).to(tl.int64), pid % H
    first, end = _seen(lengths_ptr, b, stride_lengths, S, W)
    offs_s, offs_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    used = (offs_s < splits) & (first + offs_s * chunk < end)
    mask_d = offs_d < D
    offs = (b * splits + offs_s) * H + h
    m = tl.load(largest_ptr + offs, mask=used, other=LOWEST)
    l = tl.load(sum_ptr + offs, mask=used, other=0.0)
    acc = tl.load(acc_ptr + offs[:, None] * D + offs_d[None, :], mask=used[:, None] & mask_d[None, :], other=0.0)
    alpha = _weight(m, tl.max(m, axis=0))
    total = tl.sum(alpha * l, axis=0)
    y = tl.sum(alpha[:, None] * acc, axis=0) / tl.where(total == 0, 1.0, total)
    tl.store(y_ptr + pid.to(tl.int64) * D + offs_d, y.to(y_ptr.dtype.element_ty), mask=mask_d)


# torch ops


@torch.library.custom_op("redline::decode_attention", mutates_args=())
def _decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, W: int, scale: float) -> Tensor:
    (B, _, H, D), (S, G) = q.shape, k.shape[1:3]
    R = H // G
    block_d = max(triton.next_power_of_2(D), 1 if R == 1 else MIN_DOT)
    config = _config(D, R, q.dtype, capability(q.device))
    chunk, splits = _split(B, G, W, config["BLOCK_N"], q.device)
    y = q.new_empty(B, 1, H, D)
    acc, m, l = y, y, y  # nothing but y is written where one program sees all of a row
    if splits > 1:
        acc = q.new_empty((B, splits, H, D), dtype=torch.float32)
        m, l = (q.new_empty((B, splits, H), dtype=torch.float32) for _ in range(2))
    launch(
        _decode_one_kernel if R == 1 else _decode_group_kernel, (B * splits * G,),
        q, k, v, lengths, y, acc, m, l, S, W, chunk, splits, scale,
        q.stride(0), q.stride(2), k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2),
        lengths.stride(0), G=G, R=R, D=D, PARTS=splits > 1, BLOCK_D=block_d,
        STAGES=config["num_stages"], **config,
    )  # fmt: skip
    if splits > 1:
        launch(
            _decode_merge_kernel, (B * H,), lengths, acc, m, l, y, S, W, chunk, splits, lengths.stride(0), H=H, D=D,
            **_merge_config(splits, D),
        )  # fmt: skip
    return y


@_decode_attention.register_fake
def _(q, k, v, lengths, W, scale):
    return q.new_empty(q.shape)


def _decode_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, window: int | None = None, scale: float | None = None
) -> Tensor:
    scale = q.size(-1) ** -0.5 if scale is None else scale
    return _decode_attention(q, k, v, lengths, visible(k.size(1), window), scale)


# cost


def decode_attention_cost(
    shape: tuple[int, int, int, int, int, int], dtype: torch.dtype, form: str = "plain", backward: bool = False
) -> tuple[int, int]:
    """The least FLOPs and bytes, of rows at their full lengths: two products for each visible slot; k and v of these, q
    and lengths are read, y is written."""
    B, S, H, G, D, W = shape
    seen = min(S, W)
    return 4 * B * H * seen * D, B * ((2 * G * seen + 2 * H) * D * dtype.itemsize + 8)


# interface


def _check(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, window: int | None = None, scale: float | None = None
) -> Problem:
    if q.dim() != 4 or 0 in q.shape or q.size(1) != 1 or q.dtype not in (*DTYPES, torch.float64):
        raise ValueError(
            f"decode_attention: q is {describe(q)}; expected (B, 1, H, D) bfloat16 or float32, none of them 0"
        )
    B, _, H, D = q.shape
    S, G = k.shape[1:3] if k.dim() == 4 else (0, 0)
    if S == 0 or G == 0 or H % G:
        raise ValueError(
            f"decode_attention: k is {describe(k)}; expected ({B}, S, G, {D}), where G divides {H} query heads"
        )
    for name, t in (("k", k), ("v", v)):
        check_tensor("decode_attention", name, t, (B, S, G, D), (q.dtype,), q.device)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if D > 1 and t.stride(-1) != 1:
            raise ValueError(f"decode_attention: {name} is {describe(t)}; expected adjacent channels")
    check_tensor("decode_attention", "lengths", lengths, (B,), (torch.int64, torch.int32), q.device)
    if window is not None and window < 0:
        raise ValueError(f"decode_attention: window is {window}; expected the number of slots before a query, or None")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"decode_attention: scale is {scale}; expected a number above 0, or None")
    return Problem((B, S, H, G, D, visible(S, window)), q.dtype, q.device)


def _limits(shape: Shape, dtype: torch.dtype) -> str | None:
    _, _, H, G, D, _ = shape
    if why := takes_dtypes(shape, dtype):
        return why
    if D % HEAD_MULTIPLE or not MIN_HEAD <= D <= MAX_HEAD:
        return f"takes heads of a multiple of {HEAD_MULTIPLE} channels from {MIN_HEAD} to {MAX_HEAD}, not {D}"
    return None if H // G <= MAX_GROUP else f"takes up to {MAX_GROUP} query heads to a head of k, not {H // G}"


def _inputs(make: Callable[..., Tensor], B: int, S: int, H: int, G: int, D: int, W: int) -> dict[str, Any]:
    q, k, v = (make(*size).detach() for size in ((B, 1, H, D), (B, S, G, D), (B, S, G, D)))
    lengths = torch.full((B,), S, device=q.device)
    return {"q": q, "k": k, "v": v, "lengths": lengths, "window": None if W >= S else W - 1}


def _cases() -> dict[str, Shape]:
    """Rings of the tracks' models, of a whole context and of a short window, which is a quarter of it. Beside them a
    third of the heads of k."""
    first, deep = sizes.SIZES["quickstart"], sizes.SIZES["depth 24"]
    short = deep.T // 4 + 1
    found: dict[str, Shape] = {"quickstart": (1, first.T, first.H, first.G, first.D, first.T)}
    found["depth 24, groups of 3"] = (8, deep.T, deep.H, deep.H // 3, deep.D, deep.T)
    for rows in (64, 8, 1):
        for label, slots in (("depth 12", deep.T), ("depth 24", deep.T), ("depth 24, short", short)):
            size = sizes.SIZES[label.partition(",")[0]]
            found[f"{label}, rows {rows}"] = (rows, slots, size.H, size.G, size.D, slots)
    return found


decode_attention = Op(
    "decode_attention",
    dims=("B", "S", "H", "G", "D", "W"),
    cases=_cases(),
    forms={"plain": _inputs},
    cost=decode_attention_cost,
    check=_check,
    backends={
        "ref": Backend(decode_attention_ref),
        "triton": Backend(_decode_attention_triton, needs_triton, _limits),
    },
)
