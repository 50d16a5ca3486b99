"""A weight in fp8 for the GEMMs of forward and backward, or a bank of them: once per optimizer step, in place.

    scale = max |w| / 448,  q = e4m3(w / scale),  q_t = q transposed, of each matrix by itself

Shapes    w (V, C), q (V, C), q_t (C, V) and scale (); or, of K matrices, w (K, V, C), q (K, V, C), q_t (K, C, V) and
          scale (K,). q, q_t and scale, as `empty_fp8` makes them, are overwritten
Dtypes    w bf16 or fp32; q and q_t e4m3; scale fp32
Rounding  to nearest even, saturating at 448; a matrix of zeros has the scale TINY_SCALE. Where a matrix has a NaN, all
          of it is NaN
Backward  none
Bound     memory: `quantise_weight_cost`. Two passes whatever K is, one for the scales
"""

import math
from typing import Any

import torch
from torch import Tensor

from kernels import extension, sizes
from kernels.fp8 import (
    TINY_SCALE,
    Fp8Tensor,
    check_capability,
    check_fp8_weight,
    empty_fp8,
    fill_fp8,
    lacks_fp8,
    matrix_scales,
    needs_fp8,
    padded_columns,
    strides,
    transpose,
)
from kernels.op import DTYPES, Backend, Device, Op, Problem, Shape, describe, takes_dtypes

MOST_MATRICES = 65535  # CUDA's limit of a grid's third dimension

# reference


def quantise_weight_ref(w: Tensor, q: Tensor, q_t: Tensor, scale: Tensor) -> None:
    fill_fp8(w, Fp8Tensor(q, q_t, scale))


# torch op


@torch.library.custom_op("redline::quantise_weight", mutates_args=("q", "q_t", "scale"))
def _quantise_weight(w: Tensor, q: Tensor, q_t: Tensor, scale: Tensor, cuda: bool) -> None:
    """The scales by PyTorch and the rest by Triton, or all of it by csrc/quantise_weight.cu."""
    check_capability("quantise_weight", w.device)
    if not cuda:
        scale.copy_(matrix_scales(w))
        transpose(w, q, q_t, scale)
        return
    (R, C), n = w.shape[-2:], scale.numel()
    (matrix_w, stride_w), (matrix_q, stride_q), (matrix_t, stride_t) = strides(w), strides(q), strides(q_t)
    largest = w.new_empty(extension.module(w.device).quantise_weight_parts(n), dtype=torch.float32)
    extension.call(
        "quantise_weight", w, dtype=w.dtype, w=w, q=q, q_t=q_t, scale=scale, largest=largest, n=n, R=R, C=C,
        columns_t=padded_columns(q_t), matrix_w=matrix_w, stride_w=stride_w, matrix_q=matrix_q, stride_q=stride_q,
        matrix_t=matrix_t, stride_t=stride_t, tiny=TINY_SCALE,
    )  # fmt: skip


def _quantise_weight_triton(w: Tensor, q: Tensor, q_t: Tensor, scale: Tensor) -> None:
    _quantise_weight(w, q, q_t, scale, False)


def _quantise_weight_cuda(w: Tensor, q: Tensor, q_t: Tensor, scale: Tensor) -> None:
    _quantise_weight(w, q, q_t, scale, True)


def _limits(shape: Shape, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run this; None if they can."""
    if shape[0] > MOST_MATRICES:
        return f"takes at most {MOST_MATRICES} matrices, not {shape[0]}"
    return takes_dtypes(shape, dtype)


def _needs_cuda(device: Device) -> str | None:
    return lacks_fp8(device) or extension.needs_extension(device)


# cost


def quantise_weight_cost(
    shape: tuple[int, int, int], dtype: torch.dtype, form: str = "plain", backward: bool = False
) -> tuple[int, int]:
    """The least FLOPs and bytes: w is read once for its amax and once to be rounded; both copies are written."""
    n = math.prod(shape)
    return 3 * n, (2 * dtype.itemsize + 2) * n


# interface


def _check_quantise(w: Tensor, q: Tensor, q_t: Tensor, scale: Tensor) -> Problem:
    taken = w.dim() in (2, 3) and w.numel() > 0 and (w.stride(-1) == 1 or w.size(-1) == 1)
    if not taken or w.dtype not in (*DTYPES, torch.float64):
        raise ValueError(
            f"quantise_weight: w is {describe(w)}; expected (V, C) or (K, V, C), not empty, bfloat16 or float32, the "
            "last stride 1"
        )
    check_fp8_weight("quantise_weight", w, Fp8Tensor(q, q_t, scale))
    K, V, C = w.shape if w.dim() == 3 else (1, *w.shape)
    return Problem((K, V, C), w.dtype, w.device)


def _quantise_inputs(make: Any, K: int, V: int, C: int) -> dict[str, Any]:
    w = make(V, C) if K == 1 else make(K, V, C)
    return {"w": w.detach(), **empty_fp8(w.detach())._asdict()}


def _bank_cases() -> dict[str, tuple[int, int, int]]:
    """Four layers of depth 24 at a time: their MLPs' weights, and those of q, k and v."""
    size = sizes.SIZES["depth 24"]
    qkv = (size.H + 2 * size.G) * size.D
    return {"depth 24, MLP bank": (4, size.F, size.C), "depth 24, qkv bank": (4, qkv, size.C)}


quantise_weight = Op(
    "quantise_weight",
    dims=("K", "V", "C"),
    cases=sizes.cases(lambda size: (1, size.V, size.C)) | _bank_cases(),
    forms={"plain": _quantise_inputs},
    cost=quantise_weight_cost,
    check=_check_quantise,
    backends={
        "ref": Backend(quantise_weight_ref),
        "triton": Backend(_quantise_weight_triton, needs_fp8, _limits),
        "cuda": Backend(_quantise_weight_cuda, _needs_cuda, _limits),
    },
)
