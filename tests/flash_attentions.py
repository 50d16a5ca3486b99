"""Packages with the interfaces of the other FlashAttentions, in PyTorch and on a CPU, by the arithmetic of
tests/flash_attention_3.py: `fa4`, `flash_attn`, `fa2`, each a context that gives the options of its calls, in order.

Names, arguments and defaults are those of flash-attn-4 4.0.0b36, flash-attn 2.8.3 and PyTorch 2.11 to 2.13, of which
the first is shortened by arguments that nobody here uses.
"""

import contextlib
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from tests.flash_attention_3 import (
    attend,
    differentiate,
    documents,
    importable,
    installed,
    named,
    numbers,
    operators,
)  # fmt: skip

# FlashAttention 4


def _fa4_left(causal: bool, left: int | None, right: int | None) -> int:
    assert causal and right in (None, 0)
    assert left is None or left >= 0
    return -1 if left is None else left


def fa4_functions(calls: list[dict]) -> tuple[Callable, Callable]:
    def _flash_attn_fwd(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        seqused_q=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        softmax_scale=None,
        causal=False,
        softcap=None,
        window_size_left=None,
        window_size_right=None,
        num_splits=1,
        pack_gqa=None,
        return_lse=False,
        out=None,
    ):
        options = dict(locals())
        calls.append({"op": "fwd", **numbers(options)})
        assert num_splits == 1 and return_lse
        left = _fa4_left(causal, window_size_left, window_size_right)
        return *attend(q, k, v, softmax_scale, left, *documents(options)), None, None, None

    def _flash_attn_bwd(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        softmax_scale=None,
        causal=False,
        softcap=0.0,
        window_size_left=None,
        window_size_right=None,
        m_block_size=64,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        deterministic=False,
        dlse=None,
    ):
        options = dict(locals())
        calls.append({"op": "bwd", **numbers(options)})
        left = _fa4_left(causal, window_size_left, window_size_right)
        return differentiate(dout, q, k, v, out, lse, softmax_scale, left, *documents(options))

    return _flash_attn_fwd, _flash_attn_bwd


@contextmanager
def fa4(forward: Callable | None = None, backward: Callable | None = None) -> Iterator[list[dict]]:
    """Alone: flash_attn is then a namespace. forward, backward: instead of those that are right."""
    calls: list[dict] = []
    interface = types.ModuleType("flash_attn.cute.interface")
    right = fa4_functions(calls)
    interface._flash_attn_fwd, interface._flash_attn_bwd = forward or right[0], backward or right[1]
    parents = {name: types.ModuleType(name.replace("__", ".")) for name in ("flash_attn", "flash_attn__cute")}
    with importable(**parents, flash_attn__cute__interface=interface):
        yield calls


# FlashAttention 2, the package

_OPTIONS = (
    "float dropout_p, float softmax_scale, bool causal, SymInt window_size_left, SymInt window_size_right,"
    " float softcap, Tensor? alibi_slopes"
)
_DEFAULTED = (
    "float dropout_p, float softmax_scale, bool causal, SymInt window_size_left=-1, SymInt window_size_right=-1,"
    " float softcap=0.0, Tensor? alibi_slopes=None"
)
_DOCUMENTS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
_GRADIENTS = (
    "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a6!)? dq, Tensor(a7!)? dk,"
    " Tensor(a8!)? dv"
)
FLASH_ATTN = {
    "_flash_attn_forward": f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}, bool return_softmax)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "_flash_attn_varlen_forward": f"(Tensor q, Tensor k, Tensor v, {_DOCUMENTS}, {_DEFAULTED}, bool"
    " return_softmax=False, Tensor? block_table=None, Tensor? leftpad_k=None, Tensor? seqused_k=None, bool"
    " zero_tensors=False) -> (Tensor, Tensor, Tensor, Tensor)",
    "_flash_attn_backward": f"({_GRADIENTS}, {_OPTIONS}, bool deterministic, Tensor? rng_state=None) -> Tensor",
    "_flash_attn_varlen_backward": f"({_GRADIENTS}, {_DOCUMENTS}, {_OPTIONS}, bool deterministic, Tensor?"
    " rng_state=None, bool zero_tensors=False) -> Tensor",
}


def _told(options: dict) -> tuple:
    """Scale, left window and documents, as FlashAttention 2 is told them."""
    assert options["dropout_p"] == options["softcap"] == 0 and options["alibi_slopes"] is None and options["causal"]
    assert options["window_size_right"] == 0
    begins = documents(options) if "cu_seqlens_q" in options else (None, None)
    return options["softmax_scale"], options["window_size_left"], *begins


@contextmanager
def flash_attn(**schemas: str | None) -> Iterator[list[dict]]:
    """schemas: by name, instead of those of the package; None: an operator is not there."""
    calls: list[dict] = []

    def forward(q, k, v, **options):
        calls.append({"op": "fwd", **numbers(options)})
        y, lse = attend(q, k, v, *_told(options))
        return y, lse.contiguous(), q.new_empty(0), q.new_empty(0)

    def backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, **options):
        calls.append({"op": "bwd", **numbers(options)})
        for grad, t in zip((dq, dk, dv), differentiate(dout, q, k, v, out, softmax_lse, *_told(options))):
            grad.copy_(t)
        return softmax_lse.clone()

    wanted = FLASH_ATTN | schemas
    listed = [
        (None if schema is None else name + schema, forward if name.endswith("forward") else backward)
        for name, schema in wanted.items()
    ]
    names = ("flash_attn", "flash_attn__flash_attn_interface")
    with operators("flash_attn", listed):
        with importable(**{name: types.ModuleType(name.replace("__", ".")) for name in names}):
            yield calls


# FlashAttention 2, PyTorch's own


def _aten_told(options: dict, rows: bool) -> tuple:
    assert options["dropout_p"] == 0 and options["max_q"] == options["max_k"]
    left = options["window_size_left"]
    assert options["window_size_right"] == 0 and options["is_causal"] == (left < 0)  # as varlen_attn says it
    assert options["cum_seq_q"] is options["cum_seq_k"] and (options["cum_seq_q"] is None) == rows
    return options["scale"], left, options["cum_seq_q"], options["max_q"]


@contextmanager
def fa2() -> Iterator[list[dict]]:
    """Inside, a CPU has PyTorch's operators, and PyTorch says that it has FlashAttention."""
    calls: list[dict] = []

    def forward(query, key, value, **options):
        calls.append({"op": "fwd", **numbers(options)})
        assert not options["return_debug_mask"]
        y, lse = attend(query, key, value, *_aten_told(options, query.dim() == 4))
        random = torch.zeros(2, dtype=torch.uint64)
        return y, lse.contiguous(), random, query.new_empty(0), query.new_empty(0)

    def backward(grad_out, query, key, value, out, logsumexp, **options):
        calls.append({"op": "bwd", **numbers(options)})
        assert options["rng_state"].dtype == torch.uint64 and options["rng_state"].numel() == 2
        told = _aten_told(options, query.dim() == 4)
        return differentiate(grad_out, query, key, value, out, logsumexp, *told)

    library = torch.library.Library("aten", "IMPL")
    for name, function in (("_flash_attention_forward", forward), ("_flash_attention_backward", backward)):
        library.impl(name, named("aten", name, function), "CPU")
    try:
        with mock.patch("torch.backends.cuda.is_flash_attention_available", lambda: True):
            yield calls
    finally:
        library._destroy()


LIBRARIES: dict[str, Callable] = {"fa3": installed, "fa4": fa4, "flash_attn": flash_attn, "fa2": fa2}


@contextmanager
def present(*names: str) -> Iterator[dict[str, list[dict]]]:
    """Inside, these are all there; gives the calls of each."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(LIBRARIES[name]()) for name in names}
