"""Splits the packed projection into q, k and v: rotary positions, norm per head, scale, value embeddings, in one pass.

Each head of q and k, with z1 and z2 the two halves of its D channels:
    r1 = z1 cos + z2 sin,  r2 = z2 cos - z1 sin         rotation by minus the angle [Su et al. 2021, eq. 34]
    out = scale * r rstd,  rstd = (mean_D(r^2) + eps)^-1/2      QK-norm after it [nanochat 92d63d4, gpt.py]
Each head of v:  out = v + gate ve

Shapes    qkv (B, T, (H + 2G) D): H heads of q, then G of k, then G of v; cos, sin (T, D/2), or (B, T, D/2) where each
          row has its own positions; gate (B, T, G), ve (B, T, G, D) -> q (B, T, H, D), k and v (B, T, G, D), contiguous
Dtypes    qkv, gate, ve and the results bf16 or fp32, all the same; cos, sin fp32
Switches  without cos and sin no rotation; norm=False neither norm nor scale; without gate and ve v is copied
Rounding  arithmetic in fp32, each result rounded once
Backward  with x = q / scale (the normalised r) and g = scale dq:  dr = rstd (g - x mean_D(g x)), rotated back; k alike.
          dgate = sum_D(dv ve),  dve = gate dv;  dv goes to its place in dqkv, which is written once, whole; cos and sin
          have no gradient
Saves     q and k, which attention keeps anyway, rstd (4 B per head and token), gate and ve; not the projection.
          Backward recovers x from rounded q; against saving the projection this adds 20 % gradient error at D = 8, 9 %
          at 16, 1 % at 128 (bf16), because the gradient is orthogonal to x
Limits    in the kernel D is even, 8 to 256, and H + G at most 128. The channels of a head are adjacent, other strides
          free
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
from kernels.tile import launch

EPS = torch.finfo(torch.float32).eps
MIN_HEAD, MAX_HEAD = 8, 256
MAX_HEADS = 128


class QKV(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor


# reference


def rope_qk_norm_ref(
    qkv: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    gate: Tensor | None = None,
    ve: Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    scale: float = 1.0,
    norm: bool = True,
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

    if gate is not None and ve is not None:
        v = v.to(acc_dtype) + gate.to(acc_dtype).unsqueeze(-1) * ve.to(acc_dtype)
    return QKV(*(t.to(qkv.dtype) for t in (turned(q), turned(k), v)))


# Triton


def _config(heads: int, d_head: int, arch: tuple[int, int]) -> dict[str, int]:
    """Tile and warps of a program, which takes one token with all its heads, so that the angles are read once.

    Not measured on a GPU yet: as many warps as give a thread 16 numbers of each half.
    """
    block_h, block_d = triton.next_power_of_2(heads), triton.next_power_of_2(d_head // 2)
    return {"BLOCK_H": block_h, "BLOCK_D": block_d, "num_warps": min(8, max(1, block_h * block_d // 512))}


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
def _rope_qk_norm_fwd_kernel(
    qkv_ptr, cos_ptr, sin_ptr, gate_ptr, ve_ptr, q_ptr, k_ptr, v_ptr, rstd_ptr,
    T, stride_qkv_b, stride_qkv_t, stride_cos_b, stride_cos_t, stride_sin_b, stride_sin_t,
    stride_gate_b, stride_gate_t, stride_gate_h, stride_ve_b, stride_ve_t, stride_ve_h, scale, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROPE: tl.constexpr, NORM: tl.constexpr, VE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
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

    is_v = (offs_h < G)[:, None] & mask_d[None, :]
    v1, v2 = _two_halves(row_ptr + (H + G) * D, offs, HALF, is_v)
    if VE:
        gate = tl.load(
            gate_ptr + b * stride_gate_b + t * stride_gate_t + offs_h.to(tl.int64) * stride_gate_h,
            mask=offs_h < G,
            other=0.0,
        ).to(tl.float32)[:, None]
        offs_ve = b * stride_ve_b + t * stride_ve_t + offs_h.to(tl.int64)[:, None] * stride_ve_h + offs_d[None, :]
        ve1, ve2 = _two_halves(ve_ptr, offs_ve, HALF, is_v)
        v1, v2 = v1 + gate * ve1, v2 + gate * ve2
    tl.store(v_ptr + token * (G * D) + offs, v1.to(v_ptr.dtype.element_ty), mask=is_v)
    tl.store(v_ptr + token * (G * D) + offs + HALF, v2.to(v_ptr.dtype.element_ty), mask=is_v)


@triton.jit
def _rope_qk_norm_bwd_kernel(
    dq_ptr, dk_ptr, dv_ptr, q_ptr, k_ptr, rstd_ptr, cos_ptr, sin_ptr, gate_ptr, ve_ptr,
    dqkv_ptr, dgate_ptr, dve_ptr,
    T, stride_dq_b, stride_dq_t, stride_dq_h, stride_dk_b, stride_dk_t, stride_dk_h,
    stride_dv_b, stride_dv_t, stride_dv_h, stride_cos_b, stride_cos_t, stride_sin_b, stride_sin_t,
    stride_gate_b, stride_gate_t, stride_gate_h, stride_ve_b, stride_ve_t, stride_ve_h, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROPE: tl.constexpr, NORM: tl.constexpr, VE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
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

    is_v = (offs_h < G)[:, None] & mask_d[None, :]
    offs_dv = b * stride_dv_b + t * stride_dv_t + wide_h * stride_dv_h + offs_d[None, :]
    dv1, dv2 = _two_halves(dv_ptr, offs_dv, HALF, is_v)
    tl.store(row_ptr + (H + G) * D + offs, dv1.to(dqkv_ptr.dtype.element_ty), mask=is_v)
    tl.store(row_ptr + (H + G) * D + offs + HALF, dv2.to(dqkv_ptr.dtype.element_ty), mask=is_v)
    if VE:
        gate = tl.load(
            gate_ptr + b * stride_gate_b + t * stride_gate_t + offs_h.to(tl.int64) * stride_gate_h,
            mask=offs_h < G,
            other=0.0,
        ).to(tl.float32)[:, None]
        offs_ve = b * stride_ve_b + t * stride_ve_t + offs_h.to(tl.int64)[:, None] * stride_ve_h + offs_d[None, :]
        ve1, ve2 = _two_halves(ve_ptr, offs_ve, HALF, is_v)
        dgate = tl.sum(dv1 * ve1 + dv2 * ve2, axis=1)
        tl.store(dgate_ptr + token * G + offs_h, dgate.to(dgate_ptr.dtype.element_ty), mask=offs_h < G)
        tl.store(dve_ptr + token * (G * D) + offs, (gate * dv1).to(dve_ptr.dtype.element_ty), mask=is_v)
        tl.store(dve_ptr + token * (G * D) + offs + HALF, (gate * dv2).to(dve_ptr.dtype.element_ty), mask=is_v)


# torch ops


def _dense_last(t: Tensor) -> Tensor:
    """t with the elements of a head adjacent; a copy only where they are not."""
    return t if t.stride(-1) == 1 or t.size(-1) == 1 else t.contiguous()


def _strides(t: Tensor | None, count: int) -> tuple[int, ...]:
    """Strides of the first `count` sizes; zeros for a missing tensor."""
    return t.stride()[:count] if t is not None else (0,) * count


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
    gate: Tensor | None,
    ve: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    norm: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, rstd (B T, H + G) fp32 (empty if norm is off)."""
    B, T, width = qkv.shape
    D = width // (heads + 2 * kv_heads)
    qkv, cos, sin = _dense_last(qkv), _batched(cos, B), _batched(sin, B)
    ve = None if ve is None else _dense_last(ve)
    q = qkv.new_empty(B, T, heads, D)
    k, v = (qkv.new_empty(B, T, kv_heads, D) for _ in range(2))
    rstd = qkv.new_empty((B * T, heads + kv_heads) if norm else (0,), dtype=torch.float32)
    if B * T:
        launch(
            _rope_qk_norm_fwd_kernel, (B * T,),
            qkv, cos, sin, gate, ve, q, k, v, rstd,
            T, *_strides(qkv, 2), *_strides(cos, 2), *_strides(sin, 2), *_strides(gate, 3), *_strides(ve, 3),
            scale, eps,
            H=heads, G=kv_heads, D=D, ROPE=cos is not None, NORM=norm, VE=ve is not None,
            **_config(heads + kv_heads, D, capability(qkv.device)),
        )  # fmt: skip
    return q, k, v, rstd


@_rope_qk_norm_fwd.register_fake
def _(qkv, cos, sin, gate, ve, heads, kv_heads, scale, norm, eps):
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
    gate: Tensor | None,
    ve: Tensor | None,
    scale: float,
    norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dqkv, dgate, dve (the last two empty without ve)."""
    B, T, heads, D = q.shape
    kv_heads = k.size(2)
    dq, dk, dv, cos, sin = _dense_last(dq), _dense_last(dk), _dense_last(dv), _batched(cos, B), _batched(sin, B)
    ve = None if ve is None else _dense_last(ve)
    dqkv = q.new_empty(B, T, (heads + 2 * kv_heads) * D)
    dgate, dve = (q.new_empty(t.shape if t is not None else (0,)) for t in (gate, ve))
    if B * T:
        launch(
            _rope_qk_norm_bwd_kernel, (B * T,),
            dq, dk, dv, q, k, rstd, cos, sin, gate, ve,
            dqkv, dgate, dve,
            T, *_strides(dq, 3), *_strides(dk, 3), *_strides(dv, 3),
            *_strides(cos, 2), *_strides(sin, 2), *_strides(gate, 3), *_strides(ve, 3), scale,
            H=heads, G=kv_heads, D=D, ROPE=cos is not None, NORM=norm, VE=ve is not None,
            **_config(heads + kv_heads, D, capability(q.device)),
        )  # fmt: skip
    return dqkv, dgate, dve


@_rope_qk_norm_bwd.register_fake
def _(dq, dk, dv, q, k, rstd, cos, sin, gate, ve, scale, norm):
    B, T, heads, D = q.shape
    dgate, dve = (q.new_empty(t.shape if t is not None else (0,)) for t in (gate, ve))
    return q.new_empty(B, T, (heads + 2 * k.size(2)) * D), dgate, dve


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, cos, sin, gate, ve, _, _, ctx.scale, ctx.norm, _ = inputs
    q, k, _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, rstd, cos, sin, gate, ve)


def _backward(ctx: Any, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    q, k, rstd, cos, sin, gate, ve = ctx.saved_tensors
    dq, dk, dv = (torch.zeros_like(like) if t is None else t for t, like in ((dq, q), (dk, k), (dv, k)))
    dqkv, dgate, dve = _rope_qk_norm_bwd(dq, dk, dv, q, k, rstd, cos, sin, gate, ve, ctx.scale, ctx.norm)
    mixed = (dgate, dve) if ve is not None else (None, None)
    return dqkv, None, None, *mixed, None, None, None, None, None


_rope_qk_norm_fwd.register_autograd(_backward, setup_context=_setup_context)


def _rope_qk_norm_triton(
    qkv: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    gate: Tensor | None = None,
    ve: Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    scale: float = 1.0,
    norm: bool = True,
    eps: float = EPS,
) -> QKV:
    q, k, v, _ = _rope_qk_norm_fwd(qkv, cos, sin, gate, ve, heads, kv_heads, scale, norm, eps)
    return QKV(q, k, v)


# cost


def rope_qk_norm_cost(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, form: str = "plain", backward: bool = False
) -> tuple[int, int]:
    """The least FLOPs and bytes. Forward reads the projection and writes q, k and v; backward reads their gradients, q
    and k and writes the projection's gradient. ve is read in both, its gradient written; the angles stay in the
    caches."""
    B, T, H, G, D = shape
    packed, values = (H + 2 * G) * D, G * D
    elements = 2 * packed + (H + G) * D * backward
    if form == "value embeddings":
        elements += values * (2 if backward else 1)
    flops = (H + G) * D * (16 if backward else 8) + (
        values * (3 if backward else 2) if form == "value embeddings" else 0
    )
    return B * T * flops, B * T * elements * dtype.itemsize


# interface


def _check(
    qkv: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    gate: Tensor | None = None,
    ve: Tensor | None = None,
    *,
    heads: int,
    kv_heads: int,
    scale: float = 1.0,
    norm: bool = True,
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
    if (cos is None) != (sin is None) or (gate is None) != (ve is None):
        raise ValueError("rope_qk_norm: cos goes with sin, and gate with ve; give both or neither")
    for name, t in (("cos", cos), ("sin", sin)):
        if t is not None:
            rows = (B if t.size(0) == B else 1,) if t.dim() == 3 else ()
            check_tensor("rope_qk_norm", name, t, (*rows, T, D // 2), (wide(qkv.dtype),), qkv.device)
    for name, t, shape in (("gate", gate, (B, T, kv_heads)), ("ve", ve, (B, T, kv_heads, D))):
        if t is not None:
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
    return _inputs(make, B, T, H, G, D) | {"gate": make(B, T, G), "ve": make(B, T, G, D)}


rope_qk_norm = Op(
    "rope_qk_norm",
    dims=("B", "T", "H", "G", "D"),
    cases=sizes.cases(lambda size: (size.B, size.T, size.H, size.G, size.D)),
    forms={"plain": _inputs, "value embeddings": _with_value_embeddings},
    cost=rope_qk_norm_cost,
    check=_check,
    backends={"ref": Backend(rope_qk_norm_ref), "triton": Backend(_rope_qk_norm_triton, needs_triton, _limits)},
)
