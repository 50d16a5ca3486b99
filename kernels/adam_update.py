"""One AdamW step on one tensor, or on many small ones that lie side by side, in place: each state is read and written
once.

    m = m + (1 - beta1) (g - m),   v = beta2 v + (1 - beta2) g^2              [Kingma & Ba 2015, algorithm 1]
    p = p (1 - lr weight_decay) - lr c1 m / (sqrt(c2 v) + eps)                [Loshchilov & Hutter 2019, algorithm 2]

with c1 = 1/(1 - beta1^t) and c2 = 1/(1 - beta2^t) in step t, counted from 1. eps is 1e-10, as in nanochat 92d63d4.
Where weight_decay is negative, it is cautious: its size counts where m p > 0, so that the step shrinks p too, and 0
elsewhere [Chen et al. 2025, arXiv 2510.12402; modded-nanogpt f411b3d].

Shapes    p, g, exp_avg (m), exp_avg_sq (v) and low have one shape, any; contiguous. hyper (6,): lr, beta1, beta2,
          weight_decay, c1, c2, as `adam_hyper` makes them; on the device, so that no step recompiles or waits. With
          row (n,) hyper is (H, 6), p and its states are (n,), and element i takes row[i] of hyper: parameters of
          several groups in one launch
Dtypes    p fp32; or bf16; or bf16 with low (int16), which together hold an fp32 master. g fp32 or bf16; m and v both
          fp32, or both of p's dtype; hyper fp32; row int32
Rounding  arithmetic in fp32; each state is rounded once, at its store; p is computed from the unrounded m and v. A
          master is not rounded: kernels/master.py
Backward  none
Limits    a row that is not one of hyper's is an error: the reference raises, the kernel leaves the element as it is
Bound     memory: `adam_update_cost`. 28 B an element for p, m, v, g in fp32, and for a master with fp32 moments; 16 B
          for p, m, v in bf16
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import extension, sizes
from kernels.master import join_master, join_tile, split_master, split_tile
from kernels.op import (
    DTYPES,
    Backend,
    Op,
    Problem,
    capability,
    check_tensor,
    describe,
    dtype_name,
    needs_triton,
    takes_dtypes,
    wide,
)
from kernels.tile import launch

ADAM_EPS = 1e-10  # nanochat 92d63d4, optim.py


def adam_hyper(lr: float, betas: tuple[float, float], weight_decay: float, t: int) -> list[float]:
    """What `hyper` holds in step t, counted from 1.

    The betas are rounded to fp32 first, as the kernel does, or the bias corrections do not cancel: 1 - 0.995 loses two
    digits.
    """
    beta1, beta2 = (ctypes.c_float(beta).value for beta in betas)
    return [lr, beta1, beta2, weight_decay, 1 / (1 - beta1**t), 1 / (1 - beta2**t)]


# reference


def adam_update_ref(
    p: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    hyper: Tensor,
    low: Tensor | None = None,
    *,
    row: Tensor | None = None,
    eps: float = ADAM_EPS,
) -> None:
    acc_dtype = wide(p.dtype)
    hyper = hyper if row is None else hyper[row]
    lr, beta1, beta2, weight_decay, c1, c2 = hyper.to(acc_dtype).unbind(-1)
    g, m, v = (t.to(acc_dtype) for t in (g, exp_avg, exp_avg_sq))  # states that are fp32 already change in place
    m.lerp_(g, 1 - beta1)
    v.lerp_(g.square(), 1 - beta2)
    master = p.to(acc_dtype)
    if low is not None:
        master = join_master(p, low)
    change = m / v.sqrt().mul_(c2.sqrt()).add_(eps)
    cautious = torch.where(change * master > 0, -weight_decay, 0.0)
    weight_decay = torch.where(weight_decay < 0, cautious, weight_decay)
    master.mul_(1 - lr * weight_decay).sub_(change.mul_(lr * c1))
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    if low is None:
        p.copy_(master)
    else:
        high, rest = split_master(master)
        p.copy_(high)
        low.copy_(rest)


# Triton


def _config(n: int, dtype: torch.dtype, arch: tuple[int, int]) -> dict[str, int]:
    """Elements and warps of a program. Not measured on a GPU yet.

    Each thread takes 8 elements: one 16-byte load of bf16, two of fp32.
    """
    return {"BLOCK": 1024, "num_warps": 4}


@triton.jit
def _adam_update_kernel(
    p_ptr, low_ptr, g_ptr, m_ptr, v_ptr, hyper_ptr, row_ptr, n, rows, eps,
    MASTER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    if ROWS:
        row = tl.load(row_ptr + offs, mask=mask, other=0)
        mask &= (row >= 0) & (row < rows)  # others are not addressed
        h = hyper_ptr + 6 * tl.where(mask, row, 0)
    else:
        h = hyper_ptr
    lr, beta1, beta2 = tl.load(h), tl.load(h + 1), tl.load(h + 2)
    weight_decay, c1, c2 = tl.load(h + 3), tl.load(h + 4), tl.load(h + 5)
    g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    # every fma is explicit: a master's bits must not depend on where the compiler fuses
    m = tl.fma(g - m, 1.0 - beta1, m)
    v = tl.fma((1.0 - beta2) * g, g, beta2 * v)
    step = tl.div_rn(m, tl.fma(tl.sqrt_rn(v), tl.sqrt_rn(c2), eps))
    if MASTER:
        p = join_tile(tl.load(p_ptr + offs, mask=mask), tl.load(low_ptr + offs, mask=mask))
    else:
        p = tl.load(p_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    cautious = tl.where(step * p > 0.0, -weight_decay, 0.0)
    weight_decay = tl.where(weight_decay < 0.0, cautious, weight_decay)
    p = tl.fma(step, -lr * c1, p * tl.fma(-lr, weight_decay, 1.0))
    if MASTER:
        high, low = split_tile(p)
        tl.store(p_ptr + offs, high, mask=mask)
        tl.store(low_ptr + offs, low, mask=mask)
    else:
        tl.store(p_ptr + offs, p.to(p_ptr.dtype.element_ty), mask=mask)
    tl.store(m_ptr + offs, m.to(m_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr + offs, v.to(v_ptr.dtype.element_ty), mask=mask)


# torch ops


@torch.library.custom_op("redline::adam_update", mutates_args=("p", "exp_avg", "exp_avg_sq", "low"))
def _adam_update(
    p: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    hyper: Tensor,
    low: Tensor | None,
    row: Tensor | None,
    eps: float,
    cuda: bool,
) -> None:
    n = p.numel()
    config = _config(n, p.dtype, capability(p.device))
    if cuda:
        states = {"p": p, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "low": low}
        _launch_all([{**states, "g": g, "hyper": hyper, "row": row, "eps": eps}])
    elif n:
        launch(
            _adam_update_kernel, (triton.cdiv(n, config["BLOCK"]),),
            p, low, g, exp_avg, exp_avg_sq, hyper, row, n, hyper.size(0), eps,
            MASTER=low is not None, ROWS=row is not None, **config,
        )  # fmt: skip


@_adam_update.register_fake
def _(p, g, exp_avg, exp_avg_sq, hyper, low, row, eps, cuda):
    return None


def _adam_update_triton(
    p: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    hyper: Tensor,
    low: Tensor | None = None,
    *,
    row: Tensor | None = None,
    eps: float = ADAM_EPS,
    cuda: bool = False,
) -> None:
    _adam_update(p, g, exp_avg, exp_avg_sq, hyper, low, row, eps, cuda)


# CUDA


def _adam_update_cuda(*args: Any, **options: Any) -> None:
    """The same by csrc/adam_update.cu."""
    _adam_update_triton(*args, **options, cuda=True)


def _adam_update_many(calls: Sequence[dict[str, Any]]) -> None:
    """Several by csrc/adam_update.cu, in one launch for all that have one eps."""
    _launch_all(calls)
    extension.written(calls, "p", "exp_avg", "exp_avg_sq", "low")


def _launch_all(calls: Sequence[dict[str, Any]]) -> None:
    for eps, group in extension.grouped(calls, "eps", ADAM_EPS).items():
        first = group[0]["p"]
        tensors = [_adam_tensors(extension.module(first.device), arguments) for arguments in group]
        extension.call("adam_update", first, tensors=tensors, eps=eps)


def _adam_tensors(module: Any, arguments: dict[str, Any]) -> Any:
    """The arguments of one call as csrc's AdamTensors."""
    tensors = ("p", "low", "g", "exp_avg", "exp_avg_sq", "hyper", "row")
    dtypes = {"p_dtype": "p", "g_dtype": "g", "moment_dtype": "exp_avg"}
    return module.AdamTensors(
        **{name: extension.pointer(arguments.get(name)) for name in tensors},
        **{name: dtype_name(arguments[of].dtype) for name, of in dtypes.items()},
        n=arguments["p"].numel(),
        rows=arguments["hyper"].numel() // 6,
    )


# cost


def adam_update_cost(
    shape: tuple[int], dtype: torch.dtype, form: str = "plain", backward: bool = False
) -> tuple[int, int]:
    """The least FLOPs and bytes of one step: p, low, m and v read and written once, g (fp32) read once."""
    (n,) = shape
    states = 3 * dtype.itemsize if form == "plain" else 2 + 2 + 4 + 4
    return 13 * n, (2 * states + 4) * n


# interface


def _check(
    p: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    hyper: Tensor,
    low: Tensor | None = None,
    *,
    row: Tensor | None = None,
    eps: float = ADAM_EPS,
) -> Problem:
    if p.dtype not in (*DTYPES, torch.float64) or (low is not None and p.dtype != torch.bfloat16):
        expected = "bfloat16 or float32" if low is None else "bfloat16, with low"
        raise ValueError(f"adam_update: p is {describe(p)}; expected {expected}")
    moments = exp_avg.dtype if exp_avg.dtype in (p.dtype, wide(p.dtype)) else p.dtype
    for name, t, dtypes in (
        ("p", p, (p.dtype,)),
        ("g", g, (*DTYPES, wide(p.dtype))),
        ("exp_avg", exp_avg, (moments,)),
        ("exp_avg_sq", exp_avg_sq, (moments,)),
        ("low", low, (torch.int16,)),
    ):
        if t is not None:
            check_tensor("adam_update", name, t, p.shape, dtypes, p.device, contiguous=True)
    shape: tuple[int, ...] = (6,)
    if row is not None:
        if p.dim() != 1:
            raise ValueError(f"adam_update: p is {describe(p)}; expected one dimension, as row is given")
        check_tensor("adam_update", "row", row, p.shape, (torch.int32,), p.device, contiguous=True)
        if hyper.dim() != 2 or hyper.size(1) != 6:
            raise ValueError(f"adam_update: hyper is {describe(hyper)}; expected (H, 6), as row is given")
        shape = (hyper.size(0), 6)
    check_tensor("adam_update", "hyper", hyper, shape, (torch.float32,), p.device, contiguous=True)
    return Problem((p.numel(),), p.dtype, p.device)


def _inputs(make: Callable[..., Tensor], n: int, master: bool) -> dict[str, Tensor]:
    """plain: p and its moments in one dtype, as for embeddings. master: with low and fp32 moments, as for the head."""
    p = make(n, dtype=torch.bfloat16) if master else make(n)
    moment = torch.float32 if master else p.dtype
    hyper = p.new_tensor(adam_hyper(0.01, (0.8, 0.96), 0.01, 3), dtype=torch.float32)
    args = {"p": p, "g": make(n, dtype=torch.float32), "exp_avg": make(n, dtype=moment)}
    args |= {"exp_avg_sq": make(n, dtype=moment).detach().square_(), "hyper": hyper}
    args |= {"low": make(n, dtype=torch.int16)} if master else {}
    return {name: t.detach() for name, t in args.items()}


adam_update = Op(
    "adam_update",
    dims=("n",),
    cases=sizes.cases(lambda size: (size.V * size.C,)),  # head and embeddings
    forms={
        "plain": lambda make, n: _inputs(make, n, master=False),
        "master": lambda make, n: _inputs(make, n, master=True),
    },
    cost=adam_update_cost,
    check=_check,
    backends={
        "ref": Backend(adam_update_ref),
        "triton": Backend(_adam_update_triton, needs_triton, takes_dtypes),
        "cuda": Backend(_adam_update_cuda, extension.needs_extension, takes_dtypes, _adam_update_many),
    },
)
