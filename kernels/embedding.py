"""Rows of an embedding table, in equal parts, and a backward that adds them up without atomics.

    part_p[i] = w[idx[i], p N/parts : (p + 1) N/parts]
    dw[v] = sum of the gradients of the rows i with idx[i] = v

Shapes    idx (...) of M elements in all, w (V, N) -> a tuple of `parts` tensors (..., N/parts), views of one gather;
          dw_sum (V, N), contiguous
Dtypes    idx int64; w and the parts bf16 or fp32, all the same; dw_sum fp32
dw_sum    if given, backward adds the gradient to it, in place, and w has none of its own: so gradients accumulate over
          micro-steps in fp32, and a step touches the rows of its own tokens alone. Otherwise they are summed in a
          buffer of zeros, which is then rounded to w's dtype
Rounding  sums in fp32. Without dw_sum one rounding at the end
Backward  tokens are sorted, stably. A program walks BLOCK_M sorted rows and adds up each run of equal tokens, in order;
          a run that begins among these rows is added to its row of dw, and the rest of one that began before goes to a
          buffer, from which a second kernel adds it to the same row, in order. Every row of dw has one writer: bitwise
          repeatable, no atomics. The gradient of a part goes straight to its columns; None, of a part that nothing
          used, costs nothing (compiled code makes zeros of it)
Saves     idx
Limits    parts divides N, V < 2^31. An idx outside of the table is an error of the forward pass, as in PyTorch; the
          kernels drop its gradient. The elements of a row of a gradient are adjacent, or it is copied
Bound     memory: `embedding_cost`. Backward reads each gradient once, and reads and writes 8 B for each element of a
          row of dw_sum that a token has; without dw_sum 4 B are written for each element of the table, read, and 2 B or
          4 B written again. The sort moves some 100 B a token, 3 % of one row of 1536 in bf16
"""

from collections.abc import Callable, Sequence
from typing import Any

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
    capability,
    check_tensor,
    describe,
    needs_triton,
    takes_dtypes,
    wide,
)
from kernels.tile import as_rows, launch

MAX_V = 2**31 - 1
PARTS = 4  # of the form that is measured


# reference


def _split(rows: Tensor, parts: int) -> tuple[Tensor, ...]:
    return (rows,) if parts == 1 else rows.unflatten(-1, (parts, rows.size(-1) // parts)).unbind(-2)


@torch.library.custom_op("redline::embedding_add_ref", mutates_args=("dw_sum",))
def _add_ref(idx: Tensor, grads: Sequence[Tensor | None], dw_sum: Tensor) -> None:
    for part, grad in zip(dw_sum.chunk(len(grads), dim=1), grads):
        if grad is not None:
            part.index_add_(0, idx.flatten(), grad.reshape(-1, part.size(1)).to(dw_sum.dtype))


def embedding_ref(idx: Tensor, w: Tensor, *, parts: int = 1, dw_sum: Tensor | None = None) -> tuple[Tensor, ...]:
    if dw_sum is None:
        return _split(F.embedding(idx, w), parts)
    return tuple(_Embedding.apply(idx, w, parts, dw_sum, _add_ref))


# Triton


def _config(N: int, dtype: torch.dtype, arch: tuple[int, int]) -> dict[str, int]:
    """Sorted rows and columns of a program, and warps. Not measured on a GPU yet.

    A thread has 8 columns, a 16-byte load in bf16, and columns are cut so that none are idle. More rows a program are
    fewer to carry over, fewer rows are more programs to hide the latency of one row after another.
    """
    widest = N & -N  # the largest power of two that divides N
    block_n = widest if widest >= 128 else triton.next_power_of_2(N)
    block_n = max(16, min(512, block_n))
    return {"BLOCK_M": 16, "BLOCK_N": block_n, "num_warps": max(1, block_n // 256)}


@triton.jit(do_not_specialize=["M"])
def _runs_kernel(
    dy_ptr, token_ptr, order_ptr, dw_ptr, carry_ptr, M, V, stride_dy, stride_dw,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Runs that begin among a program's sorted rows -> dw; the rest of one that began before -> carry (programs, N)."""
    pid = tl.program_id(0)
    first = pid * BLOCK_M
    end = tl.minimum(first + BLOCK_M, M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < N
    token = tl.load(token_ptr + first)
    before = tl.load(token_ptr + first - 1, mask=first > 0, other=0)
    begins = (first == 0) | (before != token)  # whether the run that is being summed begins among these rows
    total = tl.zeros((BLOCK_N,), tl.float32)
    dy = tl.load(dy_ptr + tl.load(order_ptr + first) * stride_dy + offs_n, mask=mask, other=0.0).to(tl.float32)
    for i in range(first, end):
        # the next row is on its way while this one is added; after the last there is none, and it comes again
        following = tl.minimum(i + 1, end - 1)
        row = tl.load(order_ptr + following)
        next_dy = tl.load(dy_ptr + row * stride_dy + offs_n, mask=mask, other=0.0).to(tl.float32)
        next_token = tl.load(token_ptr + following)
        total += dy
        ends = (i + 1 == end) | (next_token != token)
        if ends:
            if begins:
                if (token >= 0) & (token < V):
                    dw_row_ptr = dw_ptr + token.to(tl.int64) * stride_dw + offs_n
                    tl.store(dw_row_ptr, tl.load(dw_row_ptr, mask=mask, other=0.0) + total, mask=mask)
            else:
                tl.store(carry_ptr + pid.to(tl.int64) * N + offs_n, total, mask=mask)
            total = tl.zeros((BLOCK_N,), tl.float32)
        begins = begins | ends
        token, dy = next_token, next_dy


@triton.jit(do_not_specialize=["M"])
def _carry_kernel(
    token_ptr, dw_ptr, carry_ptr, M, V, stride_dw,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """For a run that begins among a program's rows and goes on after them: the rest, program by program."""
    pid = tl.program_id(0)
    first = pid * BLOCK_M
    end = first + BLOCK_M
    token = tl.load(token_ptr + end - 1, mask=end < M, other=0)
    # tokens are sorted: if the one before these rows is the last of them, all are the same
    begins = (first == 0) | (tl.load(token_ptr + first - 1, mask=first > 0, other=0) != token)
    goes_on = (end < M) & (tl.load(token_ptr + end, mask=end < M, other=0) == token)
    if goes_on & begins & (token >= 0) & (token < V):
        offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = offs_n < N
        dw_row_ptr = dw_ptr + token.to(tl.int64) * stride_dw + offs_n
        total = tl.load(dw_row_ptr, mask=mask, other=0.0)
        program = pid.to(tl.int64) + 1
        while goes_on:
            total += tl.load(carry_ptr + program * N + offs_n, mask=mask, other=0.0)
            program += 1
            start = program * BLOCK_M
            goes_on = (start < M) & (tl.load(token_ptr + start, mask=start < M, other=0) == token)
        tl.store(dw_row_ptr, total, mask=mask)


# torch ops


@torch.library.custom_op("redline::embedding_add", mutates_args=("dw_sum",))
def _add(idx: Tensor, grads: Sequence[Tensor | None], dw_sum: Tensor) -> None:
    """Adds the parts' gradients (..., N / parts) to dw_sum (V, N)."""
    M, (V, N) = idx.numel(), dw_sum.shape
    if M == 0:
        return
    tokens, order = torch.sort(idx.flatten().to(torch.int32), stable=True)
    width, carry = N // len(grads), None
    for part, grad in enumerate(grads):
        if grad is None:
            continue
        rows, dw = as_rows(grad), dw_sum.narrow(1, part * width, width)
        config = _config(width, rows.dtype, capability(dw_sum.device))
        grid = (triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(width, config["BLOCK_N"]))
        if carry is None:
            carry = dw_sum.new_empty(grid[0], width)
        launch(
            _runs_kernel, grid, rows, tokens, order, dw, carry, M, V, rows.stride(0), dw.stride(0), N=width, **config
        )  # fmt: skip
        launch(_carry_kernel, grid, tokens, dw, carry, M, V, dw.stride(0), N=width, **config)


@_add_ref.register_fake
@_add.register_fake
def _(idx, grads, dw_sum):
    return None


class _Embedding(torch.autograd.Function):
    """A gather whose backward adds to a tensor that is no result of it."""

    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]  # torch declares (ctx, *args, **kwargs)
        ctx: Any, idx: Tensor, w: Tensor, parts: int, dw_sum: Tensor | None, add: Callable[..., None]
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(idx)
        ctx.dw_sum, ctx.add = dw_sum, add  # not saved: autograd would object to its change by an earlier micro-step
        ctx.shape, ctx.dtype = w.shape, w.dtype
        return _split(F.embedding(idx, w), parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (idx,) = ctx.saved_tensors
        if ctx.dw_sum is not None:
            ctx.add(idx, grads, ctx.dw_sum)
            return (None,) * 5
        dw = torch.zeros(ctx.shape, dtype=torch.float32, device=idx.device)
        ctx.add(idx, grads, dw)
        return None, dw.to(ctx.dtype), None, None, None


def _embedding_triton(idx: Tensor, w: Tensor, *, parts: int = 1, dw_sum: Tensor | None = None) -> tuple[Tensor, ...]:
    return tuple(_Embedding.apply(idx, w, parts, dw_sum, _add))


# cost


def embedding_cost(
    shape: tuple[int, int, int], dtype: torch.dtype, form: str = "plain", backward: bool = False
) -> tuple[int, int]:
    """The least FLOPs and bytes, if tokens differ as much as they can: rows of the table, the parts, and idx; backward
    their gradients, and the rows of dw_sum read and written, or the table's gradient written."""
    M, V, N = shape
    touched = min(M, V) * N
    if not backward:
        return 0, (M * N + touched) * dtype.itemsize + 8 * M
    dw = V * N * dtype.itemsize if form == "plain" else 8 * touched
    return M * N, M * N * dtype.itemsize + dw + 8 * M


# interface


def _check(idx: Tensor, w: Tensor, *, parts: int = 1, dw_sum: Tensor | None = None) -> Problem:
    if w.dim() != 2 or 0 in w.shape or w.dtype not in (*DTYPES, torch.float64):
        raise ValueError(f"embedding: w is {describe(w)}; expected (V, N) bfloat16 or float32 with 1 <= V and 1 <= N")
    check_tensor("embedding", "idx", idx, tuple(getattr(idx, "shape", ())), (torch.int64,), w.device)
    if not isinstance(parts, int) or parts < 1 or w.size(1) % parts:
        raise ValueError(f"embedding: parts is {parts}; expected a divisor of the {w.size(1)} columns of w")
    if dw_sum is not None:
        check_tensor("embedding", "dw_sum", dw_sum, tuple(w.shape), (wide(w.dtype),), w.device, contiguous=True)
        if dw_sum.requires_grad:
            raise ValueError("embedding: dw_sum requires a gradient; expected a buffer that backward adds to")
    return Problem((idx.numel(), *w.shape), w.dtype, w.device)


def _limits(shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
    return takes_dtypes(shape, dtype) or (None if shape[1] <= MAX_V else f"takes up to {MAX_V} rows, not {shape[1]}")


def _inputs(make: Callable[..., Tensor], M: int, V: int, N: int, **options: Any) -> dict[str, Any]:
    # the logarithm of a token is half-normal: few tokens are frequent, as in text
    x = make(M, dtype=torch.float32).detach().nan_to_num()
    idx = (V ** (x.abs() / 3).clamp(max=1)).to(torch.int64).clamp(1, V) - 1
    return {"idx": idx, "w": make(V, N), **options}


def _summed(make: Callable[..., Tensor], M: int, V: int, N: int, **options: Any) -> dict[str, Any]:
    return _inputs(make, M, V, N, dw_sum=make(V, N, dtype=torch.float32).detach(), **options)


embedding = Op(
    "embedding",
    dims=("M", "V", "N"),
    cases=sizes.cases(lambda size: (size.tokens, size.V, size.C)),
    forms={
        "plain": _inputs,
        "sum": _summed,
        "parts": lambda make, M, V, N: _summed(make, M, V, N, parts=PARTS),
    },
    cost=embedding_cost,
    check=_check,
    backends={"ref": Backend(embedding_ref), "triton": Backend(_embedding_triton, needs_triton, _limits)},
)
