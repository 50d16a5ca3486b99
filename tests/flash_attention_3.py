"""A package with the interface of FlashAttention 3, in PyTorch and on a CPU: `installed`.

Its operators have the names, arguments and defaults that the public package registers, and they
compute what this repository relies on by themselves, in float64.
"""

import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new = None, Tensor(v_new!)? v_new = None, Tensor? q_v = None,"
    " Tensor(out!)? out = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None,"
    " Tensor? cu_seqlens_k_new = None, Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None,"
    " int? max_seqlen_k = None, Tensor? page_table = None, float? softmax_scale = None, bool is_causal = False,"
    " int window_size_left = -1, int window_size_right = -1, int attention_chunk = 0, float softcap = 0.0,"
    " int num_splits = 0, bool? pack_gqa = None, int sm_margin = 0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
)
BACKWARD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq = None,"
    " Tensor(dk!)? dk = None, Tensor(dv!)? dv = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None,"
    " int? max_seqlen_q = None, int? max_seqlen_k = None, float? softmax_scale = None, bool is_causal = False,"
    " int window_size_left = -1, int window_size_right = -1, float softcap = 0.0, bool deterministic = False,"
    " int sm_margin = 0) -> Tensor[]"
)
CALLS: list[dict] = []  # the options of each call, for tests to read


def _scores(q: Tensor, k: Tensor, scale: float, options: dict) -> tuple[Tensor, Tensor]:
    """(B, H, T, T) float64 scores, -inf where hidden, and k with a head for each of q's."""
    assert options["is_causal"]
    k = k.double().repeat_interleave(q.size(2) // k.size(2), dim=2)
    scores = scale * torch.einsum("bthd,bshd->bhts", q.double(), k)
    before = torch.arange(q.size(1))[:, None] - torch.arange(q.size(1))[None]
    left, hidden = options["window_size_left"], before < 0  # window_size_right is 0 wherever is_causal
    if left >= 0:
        hidden |= before > left
    return scores.masked_fill(hidden, -torch.inf), k


def _numbers(options: dict) -> dict:
    return {name: value for name, value in options.items() if isinstance(value, (int, float))}


def _aligned(*tensors: Tensor) -> None:
    for t in tensors:  # what TMA demands
        assert t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(s * t.itemsize % 16 == 0 for s in t.stride()[:-1])


def _fwd(q, k, v, **options):
    _aligned(q, k, v)
    CALLS.append({"op": "fwd", **_numbers(options)})
    scores, _ = _scores(q, k, options["softmax_scale"], options)
    lse = scores.logsumexp(-1)
    p = (scores - lse[..., None]).exp().to(q.dtype).double()
    values = v.double().repeat_interleave(q.size(2) // v.size(2), dim=2)
    y = torch.einsum("bhts,bshd->bthd", p, values).to(q.dtype)
    assert options["num_splits"] == 1
    return y.contiguous(), lse.float(), q.new_empty(0), q.new_empty(0)


def _bwd(dout, q, k, v, out, softmax_lse, dq, dk, dv, **options):
    _aligned(dout, q, k, v, out)
    CALLS.append({"op": "bwd", **_numbers(options)})
    scale, (B, T, G, D), groups = options["softmax_scale"], k.shape, q.size(2) // k.size(2)
    scores, keys = _scores(q, k, scale, options)
    p = (scores - softmax_lse[..., None]).exp()
    values = v.double().repeat_interleave(groups, dim=2)
    dp = torch.einsum("bthd,bshd->bhts", dout.double(), values)
    delta = (dout.double() * out.double()).sum(-1).transpose(1, 2)[..., None]
    ds = scale * p * (dp - delta)

    def summed(t: Tensor) -> Tensor:
        return t.view(B, T, G, groups, D).sum(3)

    dq.copy_(torch.einsum("bhts,bshd->bthd", ds, keys))
    dk.copy_(summed(torch.einsum("bhts,bthd->bshd", ds, q.double())))
    dv.copy_(summed(torch.einsum("bhts,bthd->bshd", p, dout.double())))
    return []


def _named(operator: str, function: Callable) -> Callable:
    """The function of all arguments by name: the dispatcher gives the first ones by place, and no defaults."""

    def call(*args, **kwargs):
        arguments = getattr(torch.ops.flash_attn_3, operator).default._schema.arguments
        given = {a.name: a.default_value for a in arguments} | {a.name: value for a, value in zip(arguments, args)}
        return function(**(given | kwargs))

    return call


@contextmanager
def installed(forward: str = FORWARD, backward: str | None = BACKWARD) -> Iterator[list[dict]]:
    """Inside, `import flash_attn_interface` finds it, with operators of these schemas; gives CALLS, empty."""
    name = "flash_attn_interface"
    library = torch.library.Library("flash_attn_3", "FRAGMENT")
    for schema, function in ((forward, _fwd), (backward, _bwd)):
        if schema is not None:
            library.define(schema)
            operator = schema.partition("(")[0]
            library.impl(operator, _named(operator, function), "CPU")
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    before = sys.modules.get(name)
    sys.modules[name] = module
    CALLS.clear()
    try:
        yield CALLS
    finally:
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before
        library._destroy()
        for operator in ("fwd", "bwd"):
            torch.ops.flash_attn_3.__dict__.pop(operator, None)
