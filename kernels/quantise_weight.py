"""A weight in fp8 for the GEMMs of forward and backward: once per optimizer step, in place.

    scale = max |w| / 448,  q = e4m3(w / scale),  q_t = q transposed

Shapes    w (V, C); q (V, C), q_t (C, V) and scale (), as `empty_fp8` makes them, are overwritten
Dtypes    w bf16 or fp32; q and q_t e4m3; scale fp32
Rounding  to nearest even, saturating at 448; a w of zeros has the scale TINY_SCALE. Where w has a NaN, all is NaN
Backward  none
Bound     memory: `quantise_weight_cost`
"""

from typing import Any

import torch
from torch import Tensor

from kernels import extension, sizes
from kernels.fp8 import (
    E4M3_MAX,
    TINY_SCALE,
    Fp8Weight,
    amax_scale,
    check_capability,
    check_fp8_weight,
    empty_fp8,
    fill_fp8,
    lacks_fp8,
    needs_fp8,
    padded_columns,
    transpose,
)
from kernels.op import DTYPES, Backend, Device, Op, Problem, describe, takes_dtypes

# reference


def quantise_weight_ref(w: Tensor, q: Tensor, q_t: Tensor, scale: Tensor) -> None:
    fill_fp8(w, Fp8Weight(q, q_t, scale))


# torch op


@torch.library.custom_op("redline::quantise_weight", mutates_args=("q", "q_t", "scale"))
def _quantise_weight(w: Tensor, q: Tensor, q_t: Tensor, scale: Tensor, cuda: bool) -> None:
    """The amax by PyTorch and the rest by Triton, or all of it by csrc/quantise_weight.cu."""
    check_capability("quantise_weight", w.device)
    if not cuda:
        scale.copy_(amax_scale(w, E4M3_MAX))
        transpose(w, q, q_t, scale)
        return
    largest = w.new_empty(extension.module(w.device).quantise_weight_parts(), dtype=torch.float32)
    extension.call(
        "quantise_weight", w, dtype=w.dtype, w=w, q=q, q_t=q_t, scale=scale, largest=largest, R=w.size(0), C=w.size(1),
        columns_t=padded_columns(q_t), stride_w=w.stride(0), stride_q=q.stride(0), stride_t=q_t.stride(0),
        tiny=TINY_SCALE,
    )  # fmt: skip


def _quantise_weight_triton(w: Tensor, q: Tensor, q_t: Tensor, scale: Tensor) -> None:
    _quantise_weight(w, q, q_t, scale, False)


def _quantise_weight_cuda(w: Tensor, q: Tensor, q_t: Tensor, scale: Tensor) -> None:
    _quantise_weight(w, q, q_t, scale, True)


def _needs_cuda(device: Device) -> str | None:
    return lacks_fp8(device) or extension.needs_extension(device)


# cost


def quantise_weight_cost(
    shape: tuple[int, int], dtype: torch.dtype, form: str = "plain", backward: bool = False
) -> tuple[int, int]:
    """The least FLOPs and bytes: w is read once for its amax and once to be rounded; both copies are written."""
    V, C = shape
    return 3 * V * C, (2 * dtype.itemsize + 2) * V * C


# interface


def _check_quantise(w: Tensor, q: Tensor, q_t: Tensor, scale: Tensor) -> Problem:
    if w.dim() != 2 or (w.stride(1) != 1 and w.size(1) > 1) or w.dtype not in (*DTYPES, torch.float64):
        raise ValueError(f"quantise_weight: w is {describe(w)}; expected (V, C) bfloat16 or float32, the last stride 1")
    check_fp8_weight("quantise_weight", w, Fp8Weight(q, q_t, scale))
    return Problem(tuple(w.shape), w.dtype, w.device)


def _quantise_inputs(make: Any, V: int, C: int) -> dict[str, Any]:
    w = make(V, C).detach()
    return {"w": w, **empty_fp8(w)._asdict()}


quantise_weight = Op(
    "quantise_weight",
    dims=("V", "C"),
    cases=sizes.cases(lambda size: (size.V, size.C)),
    forms={"plain": _quantise_inputs},
    cost=quantise_weight_cost,
    check=_check_quantise,
    backends={
        "ref": Backend(quantise_weight_ref),
        "triton": Backend(_quantise_weight_triton, needs_fp8, takes_dtypes),
        "cuda": Backend(_quantise_weight_cuda, _needs_cuda, takes_dtypes),
    },
)
