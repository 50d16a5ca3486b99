"""A package with the interface of FlashAttention 3, in PyTorch and on a CPU: `installed`.

Its operators have the names, arguments and defaults that the public package registers, and they
compute what this repository relies on by themselves, in float64. tests/flash_attentions.py lends their arithmetic to
the other FlashAttentions.
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


# arithmetic of all FlashAttentions


def _hidden(q: Tensor, left: int, begins: Tensor | None, longest: int | None) -> Tensor:
    """(N, N) of the tokens of all rows, or of all documents: True where a query does not see a key. left: -1 is all."""
    if begins is None:
        B, T = q.shape[:2]
        begins = torch.arange(0, B * T + 1, T)
    else:
        assert begins.dtype == torch.int32 and begins.is_contiguous() and q.dim() == 3
        assert int(begins[-1]) == len(q) and int(begins.diff().max()) <= longest <= len(q)
    lengths = begins.diff().long()
    mine, at = torch.repeat_interleave(torch.arange(len(lengths)), lengths), torch.arange(int(begins[-1]))
    before = at[:, None] - at[None]
    hidden = (mine[:, None] != mine[None]) | (before < 0)
    return hidden | (before > left) if left >= 0 else hidden


def _aligned(*tensors: Tensor) -> None:
    for t in tensors:  # what TMA demands, and 16-byte copies
        assert t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(s * t.itemsize % 16 == 0 for s in t.stride()[:-1])


def _tokens(t: Tensor, heads: int) -> Tensor:
    """(N, heads, D) float64, heads of keys and values repeated."""
    t = t.double().reshape(-1, *t.shape[-2:])
    return t.repeat_interleave(heads // t.size(1), dim=1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, begins=None, longest=None
) -> tuple[Tensor, Tensor]:
    """y in the layout of q, as allocators that keep layouts give it, and the logarithms (B, H, T) or (H, N)."""
    _aligned(q, k, v)
    H = q.size(-2)
    scores = scale * torch.einsum("thd,shd->hts", _tokens(q, H), _tokens(k, H))
    scores = scores.masked_fill(_hidden(q, left, begins, longest), -torch.inf)
    lse = scores.logsumexp(-1)
    p = (scores - lse[..., None]).exp().to(q.dtype).double()
    y = torch.einsum("hts,shd->thd", p, _tokens(v, H)).to(q.dtype).view(q.shape)
    lse = lse.float()
    return torch.empty_like(q).copy_(y), lse if begins is not None else lse.view(H, *q.shape[:2]).transpose(0, 1)


def differentiate(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    scale: float,
    left: int,
    begins=None,
    longest=None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, from the logarithms as `attend` gives them."""
    _aligned(dy, q, k, v, y)
    H, groups = q.size(-2), q.size(-2) // k.size(-2)
    assert lse.is_contiguous() and lse.shape == ((H, len(q)) if begins is not None else (len(q), H, q.size(1)))
    lse = lse if begins is not None else lse.transpose(0, 1).reshape(H, -1)
    scores = scale * torch.einsum("thd,shd->hts", _tokens(q, H), _tokens(k, H))
    p = (scores.masked_fill(_hidden(q, left, begins, longest), -torch.inf) - lse[..., None]).exp()
    dp = torch.einsum("thd,shd->hts", _tokens(dy, H), _tokens(v, H))
    ds = scale * p * (dp - (_tokens(dy, H) * _tokens(y, H)).sum(-1).T[..., None])

    def summed(t: Tensor) -> Tensor:
        return t.view(-1, H // groups, groups, q.size(-1)).sum(2).view(k.shape).to(k.dtype)

    dq = torch.einsum("hts,shd->thd", ds, _tokens(k, H)).view(q.shape).to(q.dtype)
    dk = summed(torch.einsum("hts,thd->shd", ds, _tokens(q, H)))
    return dq, dk, summed(torch.einsum("hts,thd->shd", p, _tokens(dy, H)))


# FlashAttention 3


def numbers(options: dict) -> dict:
    return {name: value for name, value in options.items() if value is None or isinstance(value, (int, float))}


def documents(options: dict) -> tuple[Tensor | None, int | None]:
    """Where they begin, and the most tokens of one, which queries and keys share."""
    assert options["cu_seqlens_q"] is options["cu_seqlens_k"] and options["max_seqlen_q"] == options["max_seqlen_k"]
    return options["cu_seqlens_q"], options["max_seqlen_q"]


def _fwd(q, k, v, **options):
    CALLS.append({"op": "fwd", **numbers(options)})
    assert options["is_causal"] and options["num_splits"] == 1  # and then window_size_right is 0
    y, lse = attend(q, k, v, options["softmax_scale"], options["window_size_left"], *documents(options))
    return y.contiguous(), lse.contiguous(), q.new_empty(0), q.new_empty(0)


def _bwd(dout, q, k, v, out, softmax_lse, dq, dk, dv, **options):
    CALLS.append({"op": "bwd", **numbers(options)})
    assert options["is_causal"]
    told = options["softmax_scale"], options["window_size_left"], *documents(options)
    for grad, t in zip((dq, dk, dv), differentiate(dout, q, k, v, out, softmax_lse, *told)):
        grad.copy_(t)
    return []


def named(namespace: str, operator: str, function: Callable) -> Callable:
    """The function of all arguments by name: the dispatcher gives the first ones by place, and no defaults."""

    def call(*args, **kwargs):
        arguments = getattr(getattr(torch.ops, namespace), operator).default._schema.arguments
        given = {a.name: a.default_value for a in arguments} | {a.name: value for a, value in zip(arguments, args)}
        return function(**(given | kwargs))

    return call


@contextmanager
def importable(**modules: types.ModuleType) -> Iterator[None]:
    """Inside, imports find these, by their names with __ for a dot. Real packages of the same names are gone; those
    that are made here share a parent, as installed ones do."""
    names = {name.replace("__", "."): module for name, module in modules.items()}
    roots = {name.partition(".")[0] for name in names}
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in roots}
    for name, module in before.items():
        if not hasattr(module, "is_made_here"):
            sys.modules.pop(name)
    for name, module in names.items():
        packaged = any(other.startswith(f"{name}.") for other in names)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=packaged)
        module.is_made_here = True
        if packaged:
            module.__path__ = []
        sys.modules.setdefault(name, module)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in roots]:
            sys.modules.pop(name)
        sys.modules.update(before)


@contextmanager
def operators(namespace: str, implementations: list[tuple[str | None, Callable]]) -> Iterator[None]:
    """Inside, the namespace has these operators by their schemas; None: it lacks one."""
    library = torch.library.Library(namespace, "FRAGMENT")
    names = []
    for schema, function in implementations:
        if schema is not None:
            library.define(schema)
            names.append(schema.partition("(")[0])
            library.impl(names[-1], named(namespace, names[-1], function), "CPU")
    try:
        yield
    finally:
        library._destroy()
        for name in names:
            getattr(torch.ops, namespace).__dict__.pop(name, None)


@contextmanager
def installed(
    forward: str = FORWARD, backward: str | None = BACKWARD, fwd: Callable = _fwd, bwd: Callable = _bwd
) -> Iterator[list[dict]]:
    """Inside, `import flash_attn_interface` finds it, with operators of these schemas; gives CALLS, empty."""
    CALLS.clear()
    with operators("flash_attn_3", [(forward, fwd), (backward, bwd)]):
        with importable(flash_attn_interface=types.ModuleType("flash_attn_interface")):
            yield CALLS
