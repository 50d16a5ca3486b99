"""Output projection, softcap and cross-entropy without the logits, gradients included.

    z = x w^T,  y = A sigma((z + B) / C)  (or z),  L_i = sum_k weights_ik (logsumexp_j y_ij - y_i[targets_ik])
    dz_ij = (S_i p_ij - sum_k weights_ik [targets_ik = j]) y'(z_ij),  p = softmax(y),  S_i = sum_k weights_ik,
    y' = A / C s (1 - s) with s = y / A;  dx = dz w,  dw = dz^T x

The softcap c tanh(z / c) is A = 2c, B = 0, C = c / 2 up to a constant, which the softmax cancels (`tanh_cap`). Several
weighted targets per row serve multi-token prediction. The loss is one number, so forward computes its gradients up to
the upstream factor, and backward multiplies by that factor [modded-nanogpt f411b3d fuses both too, but ignores the
factor].

Shapes    x (M, C); w (V', C), whose first V = vocab_size rows are the vocabulary; targets (M,) or (M, K), weights
          alike. The loss is a number, or (M,) with reduction "none"
Reduction "sum", "mean" (over the weights of targets that count), or "none", which has no gradient. A target equal to
          ignore_index does not count
Dtypes    x, w, dx, dw bf16 or fp32, all the same; targets int64; weights and loss fp32
Rounding  z and dz are rounded to the dtype of x, everything between them is fp32. dw is summed over chunks in fp32 and
          rounded once (the reference in bf16 rounds each chunk's share first)
fp8       with `fp8`, the copy of w that `quantise_weight` makes, x and w are multiplied in e4m3 and dz in e5m2, each
          with one scale: that of x is max |x| / 448, or x_scale; that of dz is the largest dz there can be, sum
          |weights| max y'. dx and dw are summed in fp32; the sums of z stay in the tensor core, whose fp8 accumulator
          is narrower on Hopper. dw is the gradient of the unrounded w. The backend scaled_mm takes logits and dx from
          torch._scaled_mm (cuBLAS) and is the kernel otherwise, in bf16 and for V that is a multiple of 16
cuda      rows by csrc/lm_head_loss.cu, which in bf16 under a low cap makes dz of sigmas that are off by 2^-17; in fp8
          transposes by csrc/quantise_weight.cu, and products as scaled_mm where it takes the shape, else as triton
Memory    one chunk of rows has logits at a time; their gradient takes their place, in fp8 it lies beside them, twice.
          These take at most LOGIT_BYTES, 1 GiB, if that is enough for 128 rows. Forward keeps dx, and dw in fp32;
          backward takes a second dx and, while it is scaled, one in fp32
Backward  two scalings; no second-order gradient. With dw_sum, fp32 like w, backward adds dw to it, unrounded (the
          reference in bf16: rounded), and w has no gradient
Targets   outside the vocabulary, other than ignore_index, are an error: the reference raises, the kernel's loss is NaN
Limits    1 <= K <= 16; in the kernel C is a multiple of 16
Bound     arithmetic: `lm_head_loss_cost`
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import extension, sizes
from kernels.fp8 import (
    E4M3,
    E4M3_MAX,
    E5M2,
    E5M2_MAX,
    ROW_MULTIPLE,
    TINY_SCALE,
    Fp8Tensor,
    aligned_empty,
    amax_scale,
    check_capability,
    check_fp8_weight,
    clamped,
    fp8_copy,
    needs_fp8,
    quantised,
    transpose,
)
from kernels.gemm import add_product, check_sum, for_descriptor, gemm, summed
from kernels.op import (
    DTYPES,
    Backend,
    Device,
    Op,
    Problem,
    Shape,
    check_number,
    check_tensor,
    describe,
    dtype_name,
    interpreted,
    needs_triton,
    takes_dtypes,
    wide,
)
from kernels.sizes import round_up
from kernels.tile import launch

LOGIT_BYTES = 2**30  # memory for the logits of a chunk and, in fp8, their gradients
CHUNK_MULTIPLE = 128  # rows: a chunk is made of whole tiles
LEAST_ROWS = 1024  # of a chunk, where the memory is enough: fewer leave multiprocessors idle and add to dw too often
# an H100 as `chunk_rows` models it
TILE, MULTIPROCESSORS = (128, 256), 132
FLOPS_PER_BYTE = 200  # of products at a usual speed, in the time that memory takes for a byte
REFERENCE_COPIES = 5  # fp32 copies of a chunk's logits that the reference holds at a time
CACHED_LOGITS = 2**20  # logits of a chunk on a CPU: 4 MiB stay in its caches
FIXED_HEIGHT = 60.0  # of a softcap: terms relative to it are at least exp(-60), 40 powers of two above underflow
MAX_TARGETS = 16
MOST_SHARED = 2**20  # bytes of a row that a block of the CUDA kernel may keep; no GPU has so many
REDUCTIONS = ("mean", "sum", "none")


class Softcap(NamedTuple):
    """y = height * sigma((z + shift) / width)."""

    height: float
    shift: float
    width: float

    @property
    def steepest(self) -> float:
        return self.height / (4 * self.width)


def tanh_cap(cap: float) -> Softcap | None:
    """c * tanh(z / c) up to a constant; None, which is no softcap, for 0."""
    return Softcap(2 * cap, 0.0, cap / 2) if cap else None


def most_rows(V: int, bytes_per_logit: int) -> int:
    """Rows whose logits fill LOGIT_BYTES, in whole tiles; at least one tile."""
    rows = LOGIT_BYTES // (bytes_per_logit * round_up(V, ROW_MULTIPLE))
    return max(CHUNK_MULTIPLE, rows // CHUNK_MULTIPLE * CHUNK_MULTIPLE)


@functools.cache
def chunk_rows(M: int, V: int, C: int, bytes_per_logit: int) -> int:
    """Rows of a chunk of M: whole tiles, of which the modelled time is least.

    The time is that of the products' waves of tiles, all multiprocessors in each whether they have a tile or not, and
    of dw, which every chunk but the first reads and writes. No chunk has fewer than LEAST_ROWS, and the last not less
    than half of the others', unless M or the memory leaves no choice.
    """
    most = min(most_rows(V, bytes_per_logit), round_up(max(M, 1), CHUNK_MULTIPLE))
    candidates = range(min(LEAST_ROWS, most), most + 1, CHUNK_MULTIPLE)

    def seconds(rows: int) -> float:
        """In units of a byte's time."""
        waves = (_waves(rows, V) * C + _waves(rows, C) * V + _waves(V, C) * rows) * 2 * TILE[0] * TILE[1]
        return waves * MULTIPROCESSORS / FLOPS_PER_BYTE + 8 * V * C

    def cost(rows: int) -> tuple[bool, float]:
        full, last = divmod(M, rows)
        small = full > 0 and 0 < last < max(rows / 2, LEAST_ROWS)
        return small, full * seconds(rows) + (seconds(last) if last else 0)

    return min(candidates, key=cost)


def _waves(rows: int, columns: int) -> int:
    tiles = triton.cdiv(rows, TILE[0]) * triton.cdiv(columns, TILE[1])
    return triton.cdiv(tiles, MULTIPROCESSORS)


def reference_rows(V: int, device_type: str) -> int:
    """Rows of a chunk in the reference: on a CPU, as many as keep its logits in cache."""
    return max(1, CACHED_LOGITS // V) if device_type == "cpu" else most_rows(V, REFERENCE_COPIES * 4)


def reference_bytes(M: int, C: int, V: int, device_type: str) -> int:
    """Memory that the reference needs beyond dx and dw."""
    return 4 * V * (REFERENCE_COPIES * min(M, reference_rows(V, device_type)) + C)


def chunks(M: int, rows: int) -> Iterator[slice]:
    return (slice(begin, min(begin + rows, M)) for begin in range(0, M, rows or 1))


# reference


def _reference(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    weights: Tensor,
    scale: Tensor,
    softcap: Softcap | None,
    vocab_size: int,
    q: Tensor | None,
    w_scale: Tensor | None,
    x_scale: Tensor | None,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses (M,), dx like x and dw like w; losses and dw are in fp32 (float64 of float64)."""
    acc_dtype = wide(x.dtype)
    losses = torch.empty(x.size(0), dtype=acc_dtype, device=x.device)
    dx = torch.empty_like(x) if need_grad else None
    dw = torch.zeros_like(w, dtype=acc_dtype) if need_grad else None
    weights = weights.to(acc_dtype)
    S = weights.sum(1, keepdim=True)
    head, given = w[:vocab_size], x
    factor, steepest = scale.to(acc_dtype), 1.0
    if softcap is not None:
        factor, steepest = factor * (softcap.height / softcap.width), softcap.steepest
    z_scale = dx_scale = dw_scale = g_scale = scale  # of the products in fp8
    if q is not None and w_scale is not None:
        # fp8 numbers are multiplied in fp32, unscaled, and the products scaled
        head = q[:vocab_size].to(acc_dtype)
        x_scale = amax_scale(x, E4M3_MAX) if x_scale is None else x_scale
        x = quantised(x, x_scale, E4M3).to(acc_dtype)
        g_scale = (amax_scale(weights.abs().sum(1), E5M2_MAX) * steepest).clamp_min(TINY_SCALE) * scale
        z_scale, dx_scale, dw_scale = x_scale * w_scale, g_scale * w_scale, g_scale * x_scale
    for chunk in chunks(x.size(0), reference_rows(w.size(0), x.device.type)):
        z = x[chunk] @ head.T
        z = z.to(acc_dtype) if q is None else (z * z_scale).to(given.dtype).to(acc_dtype)
        s = None
        if softcap is not None:
            z = z.add_(softcap.shift) if softcap.shift else z
            s = z.mul_(1 / softcap.width).sigmoid_()
            z = softcap.height * s
        logp = torch.log_softmax(z, dim=-1)
        target, weight = targets[chunk], weights[chunk]
        losses[chunk] = -(weight * torch.where(weight == 0, 0.0, logp.gather(1, target))).sum(1)
        if dx is None or dw is None:
            continue
        dz = logp.exp_().mul_(S[chunk] * factor)
        dz.scatter_add_(1, target, -weight * factor)
        if s is not None:
            dz.mul_(s)
            dz.addcmul_(dz, s, value=-1)
        if q is not None:
            dz = quantised(dz, g_scale, E5M2).to(acc_dtype)
            dx[chunk] = (dz @ head) * dx_scale
            dw[:vocab_size].addmm_(dz.T, x[chunk] * dw_scale)
            continue
        dz = dz.to(x.dtype)
        torch.mm(dz, head, out=dx[chunk])
        if dw.dtype == x.dtype:
            dw[:vocab_size].addmm_(dz.T, x[chunk])
        else:
            dw[:vocab_size] += dz.T @ x[chunk]
    return losses, dx, dw


class _Reference(torch.autograd.Function):
    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]  # torch declares (ctx, *args, **kwargs)
        ctx: Any,
        x: Tensor,
        w: Tensor,
        targets: Tensor,
        weights: Tensor,
        scale: Tensor,
        softcap: Softcap | None,
        reduction: str,
        *options: Any,
    ) -> Tensor:
        losses, dx, dw = _reference(x, w, targets, weights, scale, softcap, *options)
        ctx.save_for_backward(dx, dw)
        ctx.dtype = w.dtype
        return losses if reduction == "none" else losses.sum() * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        return *_scaled(dx, dw, grads[0], ctx.dtype), *(None,) * 10


def _scaled(dx: Tensor, dw: Tensor, dloss: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both gradients times the upstream one, which is not rounded: each product is rounded to its dtype once."""
    return (dx.to(wide(dx.dtype)) * dloss).to(dx.dtype), torch.mul(dw, dloss, out=torch.empty_like(dw, dtype=dtype))


Prepared = tuple[Tensor, Tensor, Tensor, Softcap | None, str, int, Tensor | None, Tensor | None, Tensor | None]


def _prepared(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    softcap: Softcap | None,
    reduction: str,
    vocab_size: int | None,
    ignore_index: int,
    fp8: Fp8Tensor | None,
    x_scale: Tensor | None,
) -> Prepared:
    """The arguments in one form: targets and weights (M, K), where an ignored target is 0 with weight 0, the factor of
    the reduction, and the rest."""
    V = w.size(0) if vocab_size is None else vocab_size
    weights = weights if weights is None or weights.dim() == 2 else weights[:, None]
    targets = targets if targets.dim() == 2 else targets[:, None]
    counts = targets != ignore_index
    weights = counts.to(torch.float32) if weights is None else torch.where(counts, weights, 0.0)
    scale = torch.ones((), dtype=weights.dtype, device=x.device)
    if reduction == "mean":
        total = weights.sum()
        scale = torch.where(total == 0, 0.0, 1 / total)
    q, w_scale = (None, None) if fp8 is None else (fp8.q, fp8.scale)
    return torch.where(counts, targets, 0), weights, scale, softcap, reduction, V, q, w_scale, x_scale


def _needs_gradients(x: Tensor, w: Tensor, reduction: str) -> bool:
    return reduction != "none" and torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)


def lm_head_loss_ref(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    softcap: Softcap | None = None,
    reduction: str = "mean",
    vocab_size: int | None = None,
    ignore_index: int = -1,
    fp8: Fp8Tensor | None = None,
    x_scale: Tensor | None = None,
    dw_sum: Tensor | None = None,
) -> Tensor:
    """By chunks, as the kernel: one expression for autograd would keep all logits. One node of a compiled graph, as the
    kernel: hundreds of chunks would take minutes to compile."""
    given = _prepared(x, w, targets, weights, softcap, reduction, vocab_size, ignore_index, fp8, x_scale)
    need_grad = _needs_gradients(x, w, reduction)
    w = summed(w, dw_sum)
    if torch.compiler.is_compiling():
        return _through_op(_lm_head_loss_ref, x, w, given, need_grad, None)
    loss: Tensor = _Reference.apply(x, w, *given, need_grad)
    return loss


def softcapped_logits(x: Tensor, w: Tensor, softcap: Softcap | None, vocab_size: int) -> Tensor:
    """(..., vocab_size) fp32 softcapped logits of x (..., C), for inference. Without shift they are centred on 0."""
    z = (x @ w.T)[..., :vocab_size].float()
    if softcap is None:
        return z
    return softcap.height * (torch.sigmoid((z + softcap.shift) / softcap.width) - 0.5)


# Triton


def _row_config(V: int, dtype: torch.dtype) -> dict[str, int]:
    """Columns of a tile and warps, for a result of that dtype. Not measured on a GPU yet.

    Two bytes an element: 8 elements a thread, of 32 registers, so that an SM is full of warps. One byte: twice as many,
    so that stores take 16 bytes.
    """
    columns = 4096 // min(dtype.itemsize, 2)
    block = min(columns, max(16, triton.next_power_of_2(V)))
    # no more threads than columns: of a tile that several warps hold, one could read what another has overwritten
    return {"BLOCK": block, "num_warps": 8 if V > 1024 else max(1, min(2, block // 32))}


@triton.jit
def _reciprocal(x, PTX: tl.constexpr):
    """1 / x to one ulp, in one instruction; `/`, which Triton's interpreter knows instead, takes five."""
    if PTX:
        asm: tl.constexpr = "rcp.approx.ftz.f32 $0, $1;"
        r = tl.inline_asm_elementwise(asm, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        r = 1.0 / x
    return r


@triton.jit
def _exponent(z, gain, offset, height2, CAP: tl.constexpr, PTX: tl.constexpr):
    """(y - height) log2(e) and sigma under a softcap, with gain = -log2(e) / width and offset = gain * shift; else z.

    Every term of a softmax comes from here and is the same in its sum as in a loss, to the last bit.
    """
    s = 1.0
    if CAP:
        s = _reciprocal(1.0 + tl.exp2(tl.fma(z, gain, offset)), PTX)
        z = tl.fma(s, height2, -height2)
    return z, s


@triton.jit
def _add_terms(
    totals, tops, z, inside, gain, offset, height2,
    CAP: tl.constexpr, FIXED: tl.constexpr, MASKED: tl.constexpr, UNIT: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Sums of terms and, unless FIXED, largest exponents that these are relative to, with one more tile in them."""
    x, _ = _exponent(z, gain, offset, height2, CAP, PTX)
    if FIXED:
        e = tl.exp2(x)
        if MASKED:
            e = tl.where(inside, e, 0.0)
        totals += e
    else:
        if MASKED:
            x = tl.where(inside, x, -1e30)
        larger = tl.maximum(tops, x, propagate_nan=tl.PropagateNan.ALL)
        totals = totals * tl.exp2((tops - larger) * UNIT) + tl.exp2((x - larger) * UNIT)
        tops = larger
    return totals, tops


@triton.jit
def _gradient(z, top, scale, gain, offset, height2, CAP: tl.constexpr, UNIT: tl.constexpr, PTX: tl.constexpr):
    """Of logits that are no targets: softmax times y', up to the scale of the row."""
    x, s = _exponent(z, gain, offset, height2, CAP, PTX)
    g = tl.exp2((x - top) * UNIT) * scale
    if CAP:
        g *= s - s * s
    return g


@triton.jit
def _row_kernel(
    z_ptr, out_ptr, losses_ptr, targets_ptr, weights_ptr, factor_ptr,
    vocab, columns, gain, offset, height2, steep, limit, stride_z, stride_out,
    K: tl.constexpr, TARGETS: tl.constexpr, CAP: tl.constexpr, FIXED: tl.constexpr, GRAD: tl.constexpr,
    PTX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss of one row, and its gradient times a factor, over the logits or elsewhere in another dtype.

    Logits are read tile by tile, first from memory and then, for the gradient, from the caches.

    Bound by the instructions that a multiprocessor can issue, so terms are powers of two, whose scales are arguments
    (steep = height / width), and columns are compared with the vocabulary only in tiles that reach past it.

    FIXED: terms are relative to the cap, which no y exceeds, so no maximum is looked for. Then log(total) and the
    target's exponent are both far from 0 and their difference would lose a confident row's small loss; the log of total
    / term does not. A term stays far from underflow (FIXED_HEIGHT).

    Loads are masked by columns, a row with its padding: a multiple of 16 where vocab need not be, so they are wide.
    Columns from vocab on are not part of the softmax; their gradient is 0. Only the gradients of targets are clamped to
    the limit: the others cannot exceed it.
    """
    UNIT: tl.constexpr = 1.0 if CAP else 1.4426950408889634  # log2 of a term: its exponent times this
    LN2: tl.constexpr = 0.6931471805599453
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_z
    out_ptr += row * stride_out
    offs = tl.arange(0, BLOCK)
    full = vocab // BLOCK * BLOCK  # columns in tiles that the vocabulary fills
    top = 0.0
    tops = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    totals = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, full, BLOCK):
        z = tl.load(z_ptr + start + offs).to(tl.float32)
        totals, tops = _add_terms(totals, tops, z, True, gain, offset, height2, CAP, FIXED, False, UNIT, PTX)
    if full < vocab:
        z = tl.load(z_ptr + full + offs, mask=full + offs < columns, other=0.0).to(tl.float32)
        inside = full + offs < vocab
        totals, tops = _add_terms(totals, tops, z, inside, gain, offset, height2, CAP, FIXED, True, UNIT, PTX)
    if not FIXED:
        top = tl.max(tops, axis=0)
        totals *= tl.exp2((tops - top) * UNIT)
    total = tl.sum(totals, axis=0)
    ks = tl.arange(0, TARGETS)
    t = tl.load(targets_ptr + row * K + ks, mask=ks < K, other=0)
    w = tl.load(weights_ptr + row * K + ks, mask=ks < K, other=0.0)
    known = (t >= 0) & (t < vocab) & (ks < K)  # others make the loss NaN and are not addressed
    z_t = tl.load(z_ptr + t, mask=known, other=0.0).to(tl.float32)
    x_t, s_t = _exponent(z_t, gain, offset, height2, CAP, PTX)
    x_t = tl.where(known | (ks >= K), (x_t - top) * UNIT, float("nan"))
    e_t = tl.exp2(x_t)
    if FIXED:
        loss = tl.log2(tl.div_rn(total, e_t)) * LN2
    else:
        loss = (tl.log2(total) - x_t) * LN2
    tl.store(losses_ptr + row, tl.sum(tl.where(w == 0.0, 0.0, w * loss), axis=0))
    if GRAD:
        factor = tl.load(factor_ptr) * steep
        S = tl.sum(w, axis=0)
        scale = S * factor / total
        tl.debug_barrier()  # without it a store below overwrites a target's logit before another warp has read it
        for start in range(0, full, BLOCK):
            z = tl.load(z_ptr + start + offs).to(tl.float32)
            g = _gradient(z, top, scale, gain, offset, height2, CAP, UNIT, PTX)
            tl.store(out_ptr + start + offs, g.to(out_ptr.dtype.element_ty))
        for start in range(full, columns, BLOCK):
            z = tl.load(z_ptr + start + offs, mask=start + offs < columns, other=0.0).to(tl.float32)
            g = _gradient(z, top, scale, gain, offset, height2, CAP, UNIT, PTX)
            g = tl.where(start + offs < vocab, g, 0.0)
            tl.store(out_ptr + start + offs, g.to(out_ptr.dtype.element_ty), mask=start + offs < columns)
        tl.debug_barrier()  # without it another warp's store of the same column could land after the target's
        same = tl.where(t[:, None] == t[None, :], w[None, :], 0.0)
        g = (tl.div_rn(e_t, total) * S - tl.sum(same, axis=1)) * factor
        if CAP:
            g *= s_t - s_t * s_t
        g = clamped(g, limit)
        tl.store(out_ptr + t, g.to(out_ptr.dtype.element_ty), mask=known)


def _rows(
    z: Tensor,
    dz: Tensor | None,
    losses: Tensor,
    targets: Tensor,
    weights: Tensor,
    factor: Tensor,
    limit: float,
    softcap: list[float],
    vocab_size: int,
    cuda: bool,
) -> None:
    """Fills losses and, if it is there, dz, which may be z: the row kernel of a chunk, by Triton or by CUDA."""
    (M, V), K, out = z.shape, targets.size(1), z if dz is None else dz
    height, shift, width = softcap or (1.0, 0.0, 1.0)
    cap, fixed = bool(softcap), bool(softcap) and abs(height) <= FIXED_HEIGHT
    gain = -math.log2(math.e) / width
    scales = {  # in powers of two
        "gain": gain, "offset": gain * shift, "height2": height * math.log2(math.e),
        "steep": height / width if softcap else 1.0,
    }  # fmt: skip
    # up to where the next row begins: the products that follow may read that far on a CPU, and find zeros
    layout = {"vocab": vocab_size, "columns": z.stride(0), "stride_z": z.stride(0), "stride_out": out.stride(0)}
    if cuda:
        extension.call(
            "lm_head_loss_rows", z, dtype=z.dtype, out_dtype=out.dtype, z=z, out=dz, losses=losses, targets=targets,
            weights=weights, factor=factor, M=M, K=K, limit=limit, cap=cap, fixed=fixed, most_shared=MOST_SHARED,
            **layout, **scales,
        )  # fmt: skip
        return
    launch(
        _row_kernel, (M,), z, out, losses, targets, weights, factor, **layout, **scales, limit=limit,
        K=K, TARGETS=triton.next_power_of_2(K), CAP=cap, FIXED=fixed, GRAD=dz is not None, PTX=not interpreted(),
        **_row_config(V, out.dtype),
    )  # fmt: skip


class _Products:
    """The three products of a chunk in bf16 or fp32. The gradient of the logits takes their place."""

    def __init__(self, w: Tensor) -> None:
        self.w = w

    def logits(self, x: Tensor, z: Tensor) -> None:
        torch.mm(x, self.w.T, out=z)

    def room_for_gradient(self, z: Tensor) -> Tensor:
        return z

    def gradients(self, dz: Tensor, x: Tensor, dx: Tensor, dw: Tensor, add: bool) -> None:
        """Fills dx, and fills dw or adds to it."""
        torch.mm(dz, self.w, out=dx)
        add_product(dz, x, dw, add)


class _Fp8Products:
    """The three products of a chunk in fp8: scales of x, w and dz, and room for the operands of `rows` rows."""

    def __init__(
        self, x: Tensor, w: Fp8Tensor, scales: tuple[Tensor, Tensor, Tensor], rows: int, need_grad: bool, cuda: bool
    ) -> None:
        (C, V), self.w, self.cuda = w.q_t.shape, w, cuda
        self.x_scale, self.w_scale, self.g_scale = scales
        self.x, self.x_t = x.new_empty(rows, C, dtype=E4M3), aligned_empty(x, C, rows, E4M3)
        room = rows if need_grad else 0
        self.dz, self.dz_t = aligned_empty(x, room, V, E5M2), aligned_empty(x, V, room, E5M2)

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, scales: tuple[Tensor, Tensor]) -> None:
        """out (M, N) of a (M, K), b (N, K)."""
        gemm(a, b, out, scales)

    def logits(self, x: Tensor, z: Tensor) -> None:
        n = x.size(0)
        transpose(x, self.x[:n], self.x_t[:, :n], self.x_scale, self.cuda)
        self.multiply(self.x[:n], self.w.q, z, (self.x_scale, self.w_scale))

    def room_for_gradient(self, z: Tensor) -> Tensor:
        return self.dz[: z.size(0)]

    def gradients(self, dz: Tensor, x: Tensor, dx: Tensor, dw: Tensor, add: bool) -> None:
        """Fills dx, and fills dw or adds to it; x is the chunk that `logits` has quantised."""
        n = x.size(0)
        transpose(dz, None, self.dz_t[:, :n], None, self.cuda)
        self.multiply(dz, self.w.q_t, dx, (self.g_scale, self.w_scale))
        gemm(self.dz_t[:, :n], self.x_t[:, :n], dw, (self.g_scale, self.x_scale), accumulate=add)


class _ScaledMmProducts(_Fp8Products):
    """The same, logits and dx by cuBLAS. Fast accumulation stays in the tensor core, as the kernel's own for logits;
    products with gradients go without it."""

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, scales: tuple[Tensor, Tensor]) -> None:
        fast = a.dtype == E4M3
        torch._scaled_mm(
            a, b.T, scale_a=scales[0], scale_b=scales[1], out_dtype=out.dtype, use_fast_accum=fast, out=out
        )


# torch ops


def _by_chunks(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    weights: Tensor,
    scale: Tensor,
    softcap: list[float],
    vocab_size: int,
    need_grad: bool,
    q: Tensor | None,
    q_t: Tensor | None,
    w_scale: Tensor | None,
    x_scale: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, losses (M,), dx like x and dw like w in fp32, empty without need_grad. softcap: three numbers, or none."""
    (M, C), V = x.shape, w.size(0)
    x, targets, weights = for_descriptor(x), targets.contiguous(), weights.contiguous()
    losses = x.new_empty(M, dtype=torch.float32)
    dx = x.new_empty((M, C) if need_grad else (0,))
    dw = x.new_empty((V, C) if need_grad else (0,), dtype=torch.float32)
    if M == 0:
        dw.zero_()  # no chunk fills it
    factor, limit = scale, torch.finfo(x.dtype).max
    cuda = backend == "cuda"
    rows = min(M, chunk_rows(M, V, C, x.dtype.itemsize + (0 if q is None else 2 * E5M2.itemsize)))
    products: _Products | _Fp8Products = _Products(w)
    if q is not None and q_t is not None and w_scale is not None:
        check_capability("lm_head_loss", x.device)
        x_scale = amax_scale(x, E4M3_MAX) if x_scale is None else x_scale
        # the scale of the largest gradient that there can be: none saturates
        steepest = Softcap(*softcap).steepest if softcap else 1.0
        g_scale = (amax_scale(weights.abs().sum(1), E5M2_MAX) * steepest).clamp_min(TINY_SCALE)
        factor, limit = 1 / g_scale, E5M2_MAX
        scales = x_scale, w_scale, g_scale * scale
        by_cublas = backend != "triton" and _scaled_mm_limits((M, C, V), x.dtype) is None
        fp8_products = _ScaledMmProducts if by_cublas else _Fp8Products
        products = fp8_products(x, Fp8Tensor(q, q_t, w_scale), scales, rows, need_grad, cuda)
    z_all = aligned_empty(x, rows, V, x.dtype)
    for chunk in chunks(M, rows):
        part, z = x[chunk], z_all[: chunk.stop - chunk.start]
        products.logits(part, z)
        dz = products.room_for_gradient(z) if need_grad else None
        _rows(z, dz, losses[chunk], targets[chunk], weights[chunk], factor, limit, softcap, vocab_size, cuda)
        if dz is not None:
            products.gradients(dz, part, dx[chunk], dw, add=chunk.start > 0)
    return losses.sum() * scale, losses, dx, dw


def _reference_by_chunks(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    weights: Tensor,
    scale: Tensor,
    softcap: list[float],
    vocab_size: int,
    need_grad: bool,
    q: Tensor | None,
    q_t: Tensor | None,
    w_scale: Tensor | None,
    x_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same by the reference."""
    cap = Softcap(*softcap) if softcap else None
    losses, dx, dw = _reference(x, w, targets, weights, scale, cap, vocab_size, q, w_scale, x_scale, need_grad)
    if dx is None or dw is None:
        dx, dw = x.new_empty(0), losses.new_empty(0)
    return losses.sum() * scale, losses, dx, dw


_lm_head_loss = torch.library.custom_op("redline::lm_head_loss", _by_chunks, mutates_args=())
_lm_head_loss_ref = torch.library.custom_op("redline::lm_head_loss_ref", _reference_by_chunks, mutates_args=())


@_lm_head_loss.register_fake
@_lm_head_loss_ref.register_fake
def _(x, w, targets, weights, scale, softcap, vocab_size, need_grad, q, q_t, w_scale, x_scale, *_):
    losses = x.new_empty(x.size(0), dtype=wide(x.dtype))
    dx, dw = (t.new_empty(t.shape if need_grad else (0,), dtype=d) for t, d in ((x, x.dtype), (w, wide(w.dtype))))
    return losses.new_empty(()), losses, dx, dw


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, losses, dx, dw = output
    ctx.mark_non_differentiable(losses, dx, dw)
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[1].dtype
    ctx.save_for_backward(dx, dw)


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    inputs = len(ctx.needs_input_grad)
    if dloss is None:
        return (None,) * inputs
    dx, dw = ctx.saved_tensors
    return *_scaled(dx, dw, dloss, ctx.dtype), *(None,) * (inputs - 2)


_lm_head_loss.register_autograd(_backward, setup_context=_setup_context)
_lm_head_loss_ref.register_autograd(_backward, setup_context=_setup_context)


def _through_op(
    op: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    w: Tensor,
    given: Prepared,
    need_grad: bool,
    q_t: Tensor | None,
    *options: str,
) -> Tensor:
    targets, weights, scale, softcap, reduction, vocab_size, q, w_scale, x_scale = given
    cap = [] if softcap is None else list(softcap)
    loss, losses, *_ = op(x, w, targets, weights, scale, cap, vocab_size, need_grad, q, q_t, w_scale, x_scale, *options)
    result: Tensor = losses if reduction == "none" else loss
    return result


@torch.library.custom_op("redline::lm_head_loss_into_sum", mutates_args=("dw_sum",))
def _scaled_into_sum(dx: Tensor, dw: Tensor, dloss: Tensor, dw_sum: Tensor) -> Tensor:
    """dx times the upstream gradient; dw_sum grows by dw times it, in one pass."""
    dw_sum.addcmul_(dw, dloss)
    return (dx.to(wide(dx.dtype)) * dloss).to(dx.dtype)


@_scaled_into_sum.register_fake
def _(dx, dw, dloss, dw_sum):
    return torch.empty_like(dx)


class _IntoSum(torch.autograd.Function):
    """The kernel with a sum that takes dw. The sum is not saved for backward, where every micro-step changes it."""

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]
        ctx: Any, x: Tensor, w: Tensor, given: Prepared, q_t: Tensor | None, dw_sum: Tensor, backend: str
    ) -> Tensor:
        targets, weights, scale, softcap, _, vocab_size, q, w_scale, x_scale = given
        cap = [] if softcap is None else list(softcap)
        fp8 = q, q_t, w_scale, x_scale, backend
        loss, _, dx, dw = _lm_head_loss(x, w, targets, weights, scale, cap, vocab_size, True, *fp8)
        ctx.save_for_backward(dx, dw)
        ctx.dw_sum = dw_sum
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        return _scaled_into_sum(dx, dw, grads[0], ctx.dw_sum), None, None, None, None, None


def _lm_head_loss_triton(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    softcap: Softcap | None = None,
    reduction: str = "mean",
    vocab_size: int | None = None,
    ignore_index: int = -1,
    fp8: Fp8Tensor | None = None,
    x_scale: Tensor | None = None,
    dw_sum: Tensor | None = None,
    backend: str = "triton",
) -> Tensor:
    given = _prepared(x, w, targets, weights, softcap, reduction, vocab_size, ignore_index, fp8, x_scale)
    q_t, need_grad = None if fp8 is None else fp8.q_t, _needs_gradients(x, w, reduction)
    if dw_sum is None or not need_grad or not w.requires_grad:
        return _through_op(_lm_head_loss, x, w, given, need_grad, q_t, backend)
    loss: Tensor = _IntoSum.apply(x, w, given, q_t, dw_sum, backend)
    return loss


def _lm_head_loss_scaled_mm(*args: Any, **options: Any) -> Tensor:
    """The kernel, but for logits and dx in fp8."""
    return _lm_head_loss_triton(*args, **options, backend="scaled_mm")


def _lm_head_loss_cuda(*args: Any, **options: Any) -> Tensor:
    """The same with rows by csrc/lm_head_loss.cu."""
    return _lm_head_loss_triton(*args, **options, backend="cuda")


# cost


def lm_head_loss_cost(
    shape: tuple[int, int, int], dtype: torch.dtype, form: str = "mean", backward: bool = False
) -> tuple[int, int]:
    """The least FLOPs and bytes: one product forward, three with gradients; x, w, targets and weights are read and dx
    and dw written once; the logits need not exist."""
    M, C, V = shape
    tensors = (M + V) * C * dtype.itemsize * (2 if backward else 1)
    return (6 if backward else 2) * M * C * V, tensors + 12 * M


# interface


def _check(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    softcap: Softcap | None = None,
    reduction: str = "mean",
    vocab_size: int | None = None,
    ignore_index: int = -1,
    fp8: Fp8Tensor | None = None,
    x_scale: Tensor | None = None,
    dw_sum: Tensor | None = None,
) -> Problem:
    if reduction not in REDUCTIONS:
        raise ValueError(f"lm_head_loss: reduction is {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
    if (
        x.dim() != 2
        or w.dim() != 2
        or w.size(0) == 0
        or x.size(1) != w.size(1)
        or x.dtype != w.dtype
        or x.device != w.device
    ):
        raise ValueError(
            f"lm_head_loss: x {describe(x)}, w {describe(w)}; expected (M, C) and (V, C) of one dtype and device"
        )
    if x.dtype not in (*DTYPES, torch.float64):
        raise ValueError(f"lm_head_loss: x is {describe(x)}; expected bfloat16 or float32")
    (M, C), V = x.shape, w.size(0)
    if vocab_size is not None and not 1 <= vocab_size <= V:
        raise ValueError(f"lm_head_loss: vocab_size is {vocab_size}; expected 1 to {V}, the rows of w")
    if targets.dim() == 2 and not 1 <= targets.size(1) <= MAX_TARGETS:
        raise ValueError(f"lm_head_loss: {targets.size(1)} targets a row; expected 1 to {MAX_TARGETS}")
    K = targets.shape[1:2]
    check_tensor("lm_head_loss", "targets", targets, (M, *K), (torch.int64,), x.device)
    if weights is not None:
        check_tensor("lm_head_loss", "weights", weights, (M, *K), (torch.float32, wide(x.dtype)), x.device)
        if weights.requires_grad:
            raise ValueError("lm_head_loss: weights have no gradient here; give them detached")
    if x_scale is not None:
        check_number("lm_head_loss", "x_scale", x_scale, (torch.float32,), x.device)
    if fp8 is not None:
        check_fp8_weight("lm_head_loss", w, fp8)
    if dw_sum is not None:
        check_sum("lm_head_loss", "dw_sum", dw_sum, w)
    if _needs_gradients(x, w, "sum") and reduction == "none":
        raise ValueError('lm_head_loss: reduction "none" is forward only; use "sum" with weights, or torch.no_grad()')
    return Problem((M, C, V), x.dtype, x.device)


def _limits(shape: Shape, dtype: torch.dtype) -> str | None:
    return takes_dtypes(shape, dtype) or (
        None if shape[1] % 16 == 0 else f"takes C that is a multiple of 16, not {shape[1]}"
    )


def _needs_cuda(device: Device) -> str | None:
    """What rows need, and products: `gemm` makes some of them."""
    return extension.needs_extension(device) or needs_triton(device)


def _scaled_mm_limits(shape: Shape, dtype: torch.dtype) -> str | None:
    if why := _limits(shape, dtype):
        return why
    if dtype != torch.bfloat16:
        return f"takes bfloat16, not {dtype_name(dtype)}"
    return None if shape[2] % 16 == 0 else f"takes V that is a multiple of 16, not {shape[2]}"


def _inputs(make: Any, M: int, C: int, V: int) -> dict[str, Any]:
    x, w = make(M, C), make(V, C)
    targets = torch.arange(M, device=x.device) * 7919 % V  # spread over the vocabulary
    return {"x": x, "w": w, "targets": targets, "softcap": tanh_cap(15.0)}


def _fp8_inputs(make: Any, M: int, C: int, V: int) -> dict[str, Any]:
    args = _inputs(make, M, C, V)
    return args | {"fp8": fp8_copy(args["w"])}


lm_head_loss = Op(
    "lm_head_loss",
    dims=("M", "C", "V"),
    cases=sizes.cases(lambda size: (size.tokens, size.C, size.V)),
    forms={"mean": _inputs, "fp8": _fp8_inputs},
    cost=lm_head_loss_cost,
    check=_check,
    backends={
        "ref": Backend(lm_head_loss_ref),
        "triton": Backend(_lm_head_loss_triton, needs_triton, _limits),
        "scaled_mm": Backend(_lm_head_loss_scaled_mm, needs_fp8, _scaled_mm_limits),
        "cuda": Backend(_lm_head_loss_cuda, _needs_cuda, _limits),
    },
    gradients_in_forward=True,
)
