"""Splits the packed projection into q, k and v: rotary positions, norm per head, scale, value embeddings, in one pass.

Each head of q and k, with z1 and z2 the two halves of its D channels:
    r1 = z1 cos + z2 sin,  r2 = z2 cos - z1 sin         rotation by minus the angle [Su et al. 2021, eq. 34]
    out = scale * r rstd,  rstd = (mean_D(r^2) + eps)^-1/2      QK-norm after it [nanochat 92d63d4, gpt.py]
Each head of v:  out = v + gate ve,  gate = gate_range sigmoid(gate_x gate_w^T)      [nanochat 92d63d4, gpt.py]

Shapes    qkv (B, T, (H + 2G) D): H heads of q, then G of k, then G of v; cos, sin (T, D/2), or (B, T, D/2) where each
          row has its own positions; gate_x (B, T, J), gate_w (G, J), ve (B, T, G, D)
          -> q (B, T, H, D), k and v (B, T, G, D), contiguous
Dtypes    qkv, gate_x, gate_w, ve and the results bf16 or fp32, all the same; cos, sin fp32
Switches  without cos and sin no rotation; norm=False neither norm nor scale; without gate_x, gate_w and ve v is copied
Rounding  arithmetic in fp32, each result rounded once; the gate is not rounded (the reference rounds it to qkv's dtype)
Backward  with x = q / scale (the normalised r) and g = scale dq:  dr = rstd (g - x mean_D(g x)), rotated back; k alike.
          dve = gate dv;  with s the sigmoid, dpre = gate_range s (1 - s) sum_D(dv ve) and dgate_x = dpre gate_w in
          fp32;  dgate_w = dpre^T gate_x, with dpre rounded, is a product of its own in PyTorch.  dv goes to its place
          in dqkv, which is written once, whole; cos and sin have no gradient
Saves     q and k, which attention keeps anyway, rstd (4 B per head and token), gate_x, gate_w and ve; neither the
          projection nor the gate, which is computed again. Backward recovers x from rounded q; against saving the
          projection this adds 20 % gradient error at D = 8, 9 % at 16, 1 % at 128 (bf16), because the gradient is
          orthogonal to x
Limits    1 <= J <= 32; in the kernel D is even, 8 to 256, and H + G at most 128. The channels of a head and those of
          the gate are adjacent, or are copied; other strides are free
Bound     memory: `rope_qk_norm_cost`
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import sizes
from kernels.fp8 import ROW_MULTIPLE
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
    wide,
)
from kernels.sizes import round_up
from kernels.tile import launch

EPS = torch.finfo(torch.float32).eps
MIN_HEAD, MAX_HEAD = 8, 256
MAX_HEADS = 128
MAX_GATE = 32


class QKV(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor


# reference


def rope_qk_norm_ref(
    qkv: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    gate_x: Tensor | None = None,
    gate_w: Tensor | None = None,
    ve: Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    scale: float = 1.0,
    norm: bool = True,
    gate_range: float = 1.0,
    eps: float = EPS,
) -> QKV:
    acc_dtype = wide(qkv.dtype)
    B, T, width = qkv.shape
    packed = heads + 2 * kv_heads
    q, k, v = qkv.view(B, T, packed, width // packed).split((heads, kv_heads, kv_heads), dim=2)

    def turned(z: Tensor) -> Tensor:
        z = z.to(acc_dtype)
        if cos is not None and sin is not None:
            z1, z2 = z.chunk(2, dim=-1)
            c, s = cos.to(acc_dtype).unsqueeze(-2), sin.to(acc_dtype).unsqueeze(-2)  # (…, T, 1, D/2)
            z = torch.cat((z1 * c + z2 * s, z2 * c - z1 * s), dim=-1)
        return scale * F.rms_norm(z, (z.size(-1),), eps=eps) if norm else z

    if gate_x is not None and gate_w is not None and ve is not None:
        gate = gate_range * torch.sigmoid(gate_x @ gate_w.T)
        v = v.to(acc_dtype) + gate.to(acc_dtype).unsqueeze(-1) * ve.to(acc_dtype)
    return QKV(*(t.to(qkv.dtype) for t in (turned(q), turned(k), v)))


# Triton


def _config(heads: int, d_head: int, arch: tuple[int, int]) -> dict[str, int]:
    """Tile and warps of a program, which takes one token with all its heads, so that the angles are read once.

    Not measured on a GPU yet: as many warps as give a thread 8 numbers of each half, one 16-byte load in bf16.
    """
    block_h, block_d = triton.next_power_of_2(heads), triton.next_power_of_2(d_head // 2)
    return {"BLOCK_H": block_h, "BLOCK_D": block_d, "num_warps": min(8, max(1, block_h * block_d // 256))}


@triton.jit
def _angles(cos_ptr, sin_ptr, b, t, stride_cos_b, stride_cos_t, stride_sin_b, stride_sin_t, offs_d, mask_d):
    cos = tl.load(cos_ptr + b * stride_cos_b + t * stride_cos_t + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + b * stride_sin_b + t * stride_sin_t + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    return cos[None, :], sin[None, :]


@triton.jit
def _two_halves(ptr, offs, HALF: tl.constexpr, mask):
    return (
        tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32),
        tl.load(ptr + offs + HALF, mask=mask, other=0.0).to(tl.float32),
    )


@triton.jit
def _gate(x_ptr, w_ptr, stride_w, offs_h, G: tl.constexpr, J: tl.constexpr, BLOCK_J: tl.constexpr):
    """Of one token: its weights (BLOCK_H, BLOCK_J), and the sigmoid (BLOCK_H,)."""
    offs_j = tl.arange(0, BLOCK_J)
    x = tl.load(x_ptr + offs_j, mask=offs_j < J, other=0.0).to(tl.float32)
    mask = (offs_h < G)[:, None] & (offs_j < J)[None, :]
    w = tl.load(w_ptr + offs_h[:, None] * stride_w + offs_j[None, :], mask=mask, other=0.0).to(tl.float32)
    return w, tl.sigmoid(tl.sum(w * x[None, :], axis=1))


@triton.jit
def _rope_qk_norm_fwd_kernel(
    qkv_ptr, cos_ptr, sin_ptr, gate_x_ptr, gate_w_ptr, ve_ptr, q_ptr, k_ptr, v_ptr, rstd_ptr,
    T, stride_qkv_b, stride_qkv_t, stride_cos_b, stride_cos_t, stride_sin_b, stride_sin_t,
    stride_gate_x_b, stride_gate_x_t, stride_gate_w, stride_ve_b, stride_ve_t, stride_ve_h, scale, gate_range, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROPE: tl.constexpr, NORM: tl.constexpr, VE: tl.constexpr,
    J: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    b, t = token // T, token % T
    offs_h, offs_d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    mask_d = offs_d < HALF
    mask = (offs_h < H + G)[:, None] & mask_d[None, :]
    row_ptr = qkv_ptr + b * stride_qkv_b + t * stride_qkv_t
    offs = offs_h[:, None] * D + offs_d[None, :]
    r1, r2 = _two_halves(row_ptr, offs, HALF, mask)  # (BLOCK_H, BLOCK_D) each
    # whatever is read is read before anything is written: loads would wait behind stores
    is_v = (offs_h < G)[:, None] & mask_d[None, :]
    v1, v2 = _two_halves(row_ptr + (H + G) * D, offs, HALF, is_v)
    if VE:
        offs_ve = b * stride_ve_b + t * stride_ve_t + offs_h.to(tl.int64)[:, None] * stride_ve_h + offs_d[None, :]
        ve1, ve2 = _two_halves(ve_ptr, offs_ve, HALF, is_v)
        gate_row_ptr = gate_x_ptr + b * stride_gate_x_b + t * stride_gate_x_t
        _, sigmoid = _gate(gate_row_ptr, gate_w_ptr, stride_gate_w, offs_h, G, J, BLOCK_J)
        gate = (gate_range * sigmoid)[:, None]
        v1, v2 = v1 + gate * ve1, v2 + gate * ve2
    if ROPE:
        cos, sin = _angles(
            cos_ptr, sin_ptr, b, t, stride_cos_b, stride_cos_t, stride_sin_b, stride_sin_t, offs_d, mask_d
        )
        z1, z2 = r1, r2
        r1, r2 = z1 * cos + z2 * sin, z2 * cos - z1 * sin
    if NORM:
        rstd = 1.0 / tl.sqrt_rn(tl.sum(r1 * r1 + r2 * r2, axis=1) / D + eps)  # (BLOCK_H,)
        tl.store(rstd_ptr + token * (H + G) + offs_h, rstd, mask=offs_h < H + G)
        r1, r2 = scale * (r1 * rstd[:, None]), scale * (r2 * rstd[:, None])
    y1, y2 = r1.to(q_ptr.dtype.element_ty), r2.to(q_ptr.dtype.element_ty)
    is_q = mask & (offs_h < H)[:, None]
    is_k = mask & (offs_h >= H)[:, None]
    tl.store(q_ptr + token * (H * D) + offs, y1, mask=is_q)
    tl.store(q_ptr + token * (H * D) + offs + HALF, y2, mask=is_q)
    tl.store(k_ptr + token * (G * D) + offs - H * D, y1, mask=is_k)
    tl.store(k_ptr + token * (G * D) + offs - H * D + HALF, y2, mask=is_k)
    tl.store(v_ptr + token * (G * D) + offs, v1.to(v_ptr.dtype.element_ty), mask=is_v)
    tl.store(v_ptr + token * (G * D) + offs + HALF, v2.to(v_ptr.dtype.element_ty), mask=is_v)


@triton.jit
def _rope_qk_norm_bwd_kernel(
    dq_ptr, dk_ptr, dv_ptr, q_ptr, k_ptr, rstd_ptr, cos_ptr, sin_ptr, gate_x_ptr, gate_w_ptr, ve_ptr,
    dqkv_ptr, dgate_x_ptr, dpre_ptr, dve_ptr,
    T, stride_dq_b, stride_dq_t, stride_dq_h, stride_dk_b, stride_dk_t, stride_dk_h,
    stride_dv_b, stride_dv_t, stride_dv_h, stride_cos_b, stride_cos_t, stride_sin_b, stride_sin_t,
    stride_gate_x_b, stride_gate_x_t, stride_gate_w, stride_ve_b, stride_ve_t, stride_ve_h, stride_dgate_x,
    scale, gate_range,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROPE: tl.constexpr, NORM: tl.constexpr, VE: tl.constexpr,
    J: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    b, t = token // T, token % T
    offs_h, offs_d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    mask_d = offs_d < HALF
    mask = (offs_h < H + G)[:, None] & mask_d[None, :]
    is_q = mask & (offs_h < H)[:, None]
    is_k = mask & (offs_h >= H)[:, None]
    offs = offs_h[:, None] * D + offs_d[None, :]
    wide_h = offs_h.to(tl.int64)[:, None]  # heads may lie far apart
    offs_dq = b * stride_dq_b + t * stride_dq_t + wide_h * stride_dq_h + offs_d[None, :]
    offs_dk = b * stride_dk_b + t * stride_dk_t + (wide_h - H) * stride_dk_h + offs_d[None, :]
    dq1, dq2 = _two_halves(dq_ptr, offs_dq, HALF, is_q)
    dk1, dk2 = _two_halves(dk_ptr, offs_dk, HALF, is_k)
    is_v = (offs_h < G)[:, None] & mask_d[None, :]
    offs_dv = b * stride_dv_b + t * stride_dv_t + wide_h * stride_dv_h + offs_d[None, :]
    dv1, dv2 = _two_halves(dv_ptr, offs_dv, HALF, is_v)
    if VE:  # read before anything is written
        offs_ve = b * stride_ve_b + t * stride_ve_t + wide_h * stride_ve_h + offs_d[None, :]
        ve1, ve2 = _two_halves(ve_ptr, offs_ve, HALF, is_v)
        gate_row_ptr = gate_x_ptr + b * stride_gate_x_b + t * stride_gate_x_t
        gate_w, sigmoid = _gate(gate_row_ptr, gate_w_ptr, stride_gate_w, offs_h, G, J, BLOCK_J)
        gate = (gate_range * sigmoid)[:, None]
        dpre = tl.sum(dv1 * ve1 + dv2 * ve2, axis=1) * (gate_range * sigmoid * (1.0 - sigmoid))  # (BLOCK_H,)
        dgate_x = tl.sum(dpre[:, None] * gate_w, axis=0)  # (BLOCK_J,)
    g1, g2 = dq1 + dk1, dq2 + dk2  # a head is of q or of k: the masked load of the other gave 0
    if NORM:
        q1, q2 = _two_halves(q_ptr, token * (H * D) + offs, HALF, is_q)
        k1, k2 = _two_halves(k_ptr, token * (G * D) + offs - H * D, HALF, is_k)
        x1, x2 = (q1 + k1) / scale, (q2 + k2) / scale
        g1, g2 = scale * g1, scale * g2
        rstd = tl.load(rstd_ptr + token * (H + G) + offs_h, mask=offs_h < H + G, other=0.0)[:, None]
        mean = (tl.sum(g1 * x1 + g2 * x2, axis=1) / D)[:, None]
        g1, g2 = rstd * (g1 - x1 * mean), rstd * (g2 - x2 * mean)
    if ROPE:
        cos, sin = _angles(
            cos_ptr, sin_ptr, b, t, stride_cos_b, stride_cos_t, stride_sin_b, stride_sin_t, offs_d, mask_d
        )
        r1, r2 = g1, g2
        g1, g2 = r1 * cos - r2 * sin, r1 * sin + r2 * cos
    row_ptr = dqkv_ptr + token * ((H + 2 * G) * D)
    tl.store(row_ptr + offs, g1.to(dqkv_ptr.dtype.element_ty), mask=mask)
    tl.store(row_ptr + offs + HALF, g2.to(dqkv_ptr.dtype.element_ty), mask=mask)
    tl.store(row_ptr + (H + G) * D + offs, dv1.to(dqkv_ptr.dtype.element_ty), mask=is_v)
    tl.store(row_ptr + (H + G) * D + offs + HALF, dv2.to(dqkv_ptr.dtype.element_ty), mask=is_v)
    if VE:
        offs_j = tl.arange(0, BLOCK_J)
        dgate_row_ptr = dgate_x_ptr + token * stride_dgate_x
        tl.store(dgate_row_ptr + offs_j, dgate_x.to(dgate_x_ptr.dtype.element_ty), mask=offs_j < J)
        tl.store(dpre_ptr + token * G + offs_h, dpre.to(dpre_ptr.dtype.element_ty), mask=offs_h < G)
        tl.store(dve_ptr + token * (G * D) + offs, (gate * dv1).to(dve_ptr.dtype.element_ty), mask=is_v)
        tl.store(dve_ptr + token * (G * D) + offs + HALF, (gate * dv2).to(dve_ptr.dtype.element_ty), mask=is_v)


# torch ops


def _dense_last(t: Tensor) -> Tensor:
    """t with the elements of a head adjacent; a copy only where they are not."""
    return t if t.stride(-1) == 1 or t.size(-1) == 1 else t.contiguous()


def _strides(t: Tensor | None, count: int) -> tuple[int, ...]:
    """Strides of the first `count` sizes; zeros for a missing tensor."""
    return t.stride()[:count] if t is not None else (0,) * count


def _gate_sizes(gate_x: Tensor | None) -> dict[str, int]:
    J = 0 if gate_x is None else gate_x.size(-1)
    return {"J": J, "BLOCK_J": triton.next_power_of_2(max(1, J))}


def _gate_gradients(like: Tensor, gate_x: Tensor | None, ve: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Room for dgate_x, in rows of 16-byte multiples, dpre and dve; empty without them."""
    if gate_x is None or ve is None:
        return like.new_empty(0), like.new_empty(0), like.new_empty(0)
    B, T, J = gate_x.shape
    dgate_x = like.new_empty(B, T, round_up(J, ROW_MULTIPLE))[..., :J]
    return dgate_x, like.new_empty(B, T, ve.size(2)), like.new_empty(ve.shape)


def _batched(table: Tensor | None, batch: int) -> Tensor | None:
    """cos or sin as (B, T, D/2), without copying a table that all rows share."""
    if table is None:
        return None
    return _dense_last(table).expand(batch, *table.shape[-2:])


@torch.library.custom_op("redline::rope_qk_norm_fwd", mutates_args=())
def _rope_qk_norm_fwd(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    gate_x: Tensor | None,
    gate_w: Tensor | None,
    ve: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    norm: bool,
    gate_range: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, rstd (B T, H + G) fp32 (empty if norm is off)."""
    B, T, width = qkv.shape
    D = width // (heads + 2 * kv_heads)
    qkv, cos, sin = _dense_last(qkv), _batched(cos, B), _batched(sin, B)
    gate_x, gate_w, ve = (None if t is None else _dense_last(t) for t in (gate_x, gate_w, ve))
    q = qkv.new_empty(B, T, heads, D)
    k, v = (qkv.new_empty(B, T, kv_heads, D) for _ in range(2))
    rstd = qkv.new_empty((B * T, heads + kv_heads) if norm else (0,), dtype=torch.float32)
    if B * T:
        launch(
            _rope_qk_norm_fwd_kernel, (B * T,),
            qkv, cos, sin, gate_x, gate_w, ve, q, k, v, rstd,
            T, *_strides(qkv, 2), *_strides(cos, 2), *_strides(sin, 2), *_strides(gate_x, 2), *_strides(gate_w, 1),
            *_strides(ve, 3), scale, gate_range, eps,
            H=heads, G=kv_heads, D=D, ROPE=cos is not None, NORM=norm, VE=ve is not None, **_gate_sizes(gate_x),
            **_config(heads + kv_heads, D, capability(qkv.device)),
        )  # fmt: skip
    return q, k, v, rstd


@_rope_qk_norm_fwd.register_fake
def _(qkv, cos, sin, gate_x, gate_w, ve, heads, kv_heads, scale, norm, gate_range, eps):
    B, T, width = qkv.shape
    D = width // (heads + 2 * kv_heads)
    k, v = (qkv.new_empty(B, T, kv_heads, D) for _ in range(2))
    rstd = qkv.new_empty((B * T, heads + kv_heads) if norm else (0,), dtype=torch.float32)
    return qkv.new_empty(B, T, heads, D), k, v, rstd


@torch.library.custom_op("redline::rope_qk_norm_bwd", mutates_args=())
def _rope_qk_norm_bwd(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q: Tensor,
    k: Tensor,
    rstd: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    gate_x: Tensor | None,
    gate_w: Tensor | None,
    ve: Tensor | None,
    scale: float,
    norm: bool,
    gate_range: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dqkv, dgate_x, dpre, dve (all but the first empty without ve)."""
    B, T, heads, D = q.shape
    kv_heads = k.size(2)
    dq, dk, dv, cos, sin = _dense_last(dq), _dense_last(dk), _dense_last(dv), _batched(cos, B), _batched(sin, B)
    gate_x, gate_w, ve = (None if t is None else _dense_last(t) for t in (gate_x, gate_w, ve))
    dqkv = q.new_empty(B, T, (heads + 2 * kv_heads) * D)
    dgate_x, dpre, dve = _gate_gradients(q, gate_x, ve)
    if B * T:
        launch(
            _rope_qk_norm_bwd_kernel, (B * T,),
            dq, dk, dv, q, k, rstd, cos, sin, gate_x, gate_w, ve,
            dqkv, dgate_x, dpre, dve,
            T, *_strides(dq, 3), *_strides(dk, 3), *_strides(dv, 3), *_strides(cos, 2), *_strides(sin, 2),
            *_strides(gate_x, 2), *_strides(gate_w, 1), *_strides(ve, 3), round_up(dgate_x.size(-1), ROW_MULTIPLE),
            scale, gate_range,
            H=heads, G=kv_heads, D=D, ROPE=cos is not None, NORM=norm, VE=ve is not None, **_gate_sizes(gate_x),
            **_config(heads + kv_heads, D, capability(q.device)),
        )  # fmt: skip
    return dqkv, dgate_x, dpre, dve


@_rope_qk_norm_bwd.register_fake
def _(dq, dk, dv, q, k, rstd, cos, sin, gate_x, gate_w, ve, scale, norm, gate_range):
    B, T, heads, D = q.shape
    return q.new_empty(B, T, (heads + 2 * k.size(2)) * D), *_gate_gradients(q, gate_x, ve)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, cos, sin, gate_x, gate_w, ve, _, _, ctx.scale, ctx.norm, ctx.gate_range, _ = inputs
    q, k, _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, rstd, cos, sin, gate_x, gate_w, ve)


def _backward(ctx: Any, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    q, k, rstd, cos, sin, gate_x, gate_w, ve = ctx.saved_tensors
    dq, dk, dv = (torch.zeros_like(like) if t is None else t for t, like in ((dq, q), (dk, k), (dv, k)))
    dqkv, dgate_x, dpre, dve = _rope_qk_norm_bwd(
        dq, dk, dv, q, k, rstd, cos, sin, gate_x, gate_w, ve, ctx.scale, ctx.norm, ctx.gate_range
    )
    if gate_x is None:
        return dqkv, *(None,) * 11
    dgate_w = torch.mm(dpre.flatten(0, 1).T, gate_x.flatten(0, 1))
    return dqkv, None, None, dgate_x, dgate_w, dve, *(None,) * 6


_rope_qk_norm_fwd.register_autograd(_backward, setup_context=_setup_context)


def _rope_qk_norm_triton(
    qkv: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    gate_x: Tensor | None = None,
    gate_w: Tensor | None = None,
    ve: Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    scale: float = 1.0,
    norm: bool = True,
    gate_range: float = 1.0,
    eps: float = EPS,
) -> QKV:
    q, k, v, _ = _rope_qk_norm_fwd(qkv, cos, sin, gate_x, gate_w, ve, heads, kv_heads, scale, norm, gate_range, eps)
    return QKV(q, k, v)


# cost


def rope_qk_norm_cost(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, form: str = "plain", backward: bool = False
) -> tuple[int, int]:
    """The least FLOPs and bytes. Forward reads the projection and writes q, k and v; backward reads their gradients, q
    and k and writes the projection's gradient. ve is read in both, its gradient written; the angles stay in the
    caches. So it is with what the gate reads."""
    B, T, H, G, D = shape
    J, packed, values = sizes.VE_GATE_CHANNELS, (H + 2 * G) * D, G * D
    elements = 2 * packed + (H + G) * D * backward
    flops = (H + G) * D * (16 if backward else 8)
    if form == "value embeddings":
        elements += (values + J) * (2 if backward else 1)
        flops += values * (3 if backward else 2) + G * J * (6 if backward else 2)
    return B * T * flops, B * T * elements * dtype.itemsize


# interface


def _check(
    qkv: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    gate_x: Tensor | None = None,
    gate_w: Tensor | None = None,
    ve: Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    scale: float = 1.0,
    norm: bool = True,
    gate_range: float = 1.0,
    eps: float = EPS,
) -> Problem:
    packed = heads + 2 * kv_heads
    if qkv.dim() != 3 or heads < 1 or kv_heads < 1 or qkv.size(2) % packed or qkv.dtype not in (*DTYPES, torch.float64):
        raise ValueError(
            f"rope_qk_norm: qkv is {describe(qkv)}; expected (B, T, ({heads} + 2 * {kv_heads}) * D) bfloat16 or float32"
        )
    B, T, width = qkv.shape
    D = width // packed
    if D < 2 or D % 2:
        raise ValueError(f"rope_qk_norm: heads have {D} channels; expected an even number, which the rotation pairs")
    if norm and scale == 0:
        raise ValueError("rope_qk_norm: scale is 0, which no gradient passes; leave q and k out instead")
    if (cos is None) != (sin is None) or not (gate_x is None) == (gate_w is None) == (ve is None):
        raise ValueError("rope_qk_norm: cos goes with sin, and gate_x with gate_w and ve; give all or none")
    for name, t in (("cos", cos), ("sin", sin)):
        if t is not None:
            rows = (B if t.size(0) == B else 1,) if t.dim() == 3 else ()
            check_tensor("rope_qk_norm", name, t, (*rows, T, D // 2), (wide(qkv.dtype),), qkv.device)
    if gate_x is not None and gate_w is not None and ve is not None:
        J = gate_x.size(-1) if gate_x.dim() else 0
        if not 1 <= J <= MAX_GATE:
            raise ValueError(
                f"rope_qk_norm: gate_x is {describe(gate_x)}; expected (B, T, J) with 1 <= J <= {MAX_GATE}"
            )
        sizes_of = {"gate_x": (gate_x, (B, T, J)), "gate_w": (gate_w, (kv_heads, J)), "ve": (ve, (B, T, kv_heads, D))}
        for name, (t, shape) in sizes_of.items():
            check_tensor("rope_qk_norm", name, t, shape, (qkv.dtype,), qkv.device)
    return Problem((B, T, heads, kv_heads, D), qkv.dtype, qkv.device)


def _limits(shape: Shape, dtype: torch.dtype) -> str | None:
    *_, H, G, D = shape
    if why := takes_dtypes(shape, dtype):
        return why
    if D % 2 or not MIN_HEAD <= D <= MAX_HEAD:
        return f"takes heads of an even size from {MIN_HEAD} to {MAX_HEAD}, not {D}"
    return None if H + G <= MAX_HEADS else f"takes up to {MAX_HEADS} heads of q and k together, not {H + G}"


def _inputs(make: Callable[..., Tensor], B: int, T: int, H: int, G: int, D: int) -> dict[str, Any]:
    angle = make(T, D // 2, dtype=torch.float32).detach()
    tables = {"cos": angle.cos(), "sin": angle.sin()}
    return {"qkv": make(B, T, (H + 2 * G) * D), **tables, "heads": H, "kv_heads": G, "scale": 1.2}


def _with_value_embeddings(make: Callable[..., Tensor], B: int, T: int, H: int, G: int, D: int) -> dict[str, Any]:
    return _inputs(make, B, T, H, G, D) | {
        "gate_x": make(B, T, sizes.VE_GATE_CHANNELS), "gate_w": make(G, sizes.VE_GATE_CHANNELS),
        "ve": make(B, T, G, D), "gate_range": 3.0,
    }  # fmt: skip


rope_qk_norm = Op(
    "rope_qk_norm",
    dims=("B", "T", "H", "G", "D"),
    cases=sizes.cases(lambda size: (size.B, size.T, size.H, size.G, size.D)),
    forms={"plain": _inputs, "value embeddings": _with_value_embeddings},
    cost=rope_qk_norm_cost,
    check=_check,
    backends={"ref": Backend(rope_qk_norm_ref), "triton": Backend(_rope_qk_norm_triton, needs_triton, _limits)},
)
