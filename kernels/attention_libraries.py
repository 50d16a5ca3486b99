"""Attention out of libraries: FlexAttention, PyTorch's SDPA, and four FlashAttentions.

The FlashAttentions share the torch ops redline::attention_library and ::attention_library_bwd, of which one argument
names the library. All of them see a query's own key and `window` keys before it where they are causal and their left
window is `window`; their logarithms are natural ones, (B, H, T), or (H, B T) with documents. What else is assumed of
each stands below as the names of arguments. `needs_*` compares these with the schema or signature that is installed,
and every other argument has to have a default: another interface is refused with a sentence.

fa3         FlashAttention 3 is no project on PyPI: it is built from the folder hopper/ of Dao-AILab/flash-attention,
            and installs `flash_attn_interface`, whose import registers the operators flash_attn_3::fwd and ::bwd.
            These are called, as PyTorch's own `torch.nn.attention._fa3` does: the package's Python functions differ
            between versions (window_size became window_size_left and _right), and the older ones are no operators
fa4         FlashAttention 4, the package flash-attn-4 (read at 4.0.0b36): `_flash_attn_fwd` and `_flash_attn_bwd` of
            flash_attn.cute.interface, which compile themselves for each kind of problem. Its public functions are
            autograd functions that torch.compile cannot keep whole; these two are what PyTorch's own
            `torch.nn.attention._fa4` calls, and their arguments below are the same since the first beta. The forward's
            first two results are y and the logarithms; a left window of None is all
flash_attn  FlashAttention 2, the package flash-attn (read at 2.8.3): the operators that importing it registers, with
            and without documents; their arguments below are the same since 2.7.4. Backward writes into dq, dk and dv
fa2         FlashAttention 2 within PyTorch, without a package: aten::_flash_attention_forward and _backward, which
            `torch.nn.attention.varlen.varlen_attn` calls (read in 2.11, 2.12 and 2.13, whose arguments below are the
            same). That function itself would need offsets of documents where there are none, clears a tensor for
            dropout at each call, keeps both for backward, and passes its logarithms off as differentiable

Facts say what can run: capability, package, interface. What they cannot say, whether the kernels run on this very
device and count as we do, one probe says, once per library, device and process: `_probe`.
"""

import functools
import importlib
import importlib.util
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from kernels.op import Device, Shape, dtype_name, needs_gpu, takes_dtypes
from kernels.windows import Attention, Documents, documents_of, in_window, visible

FLEX_TILE = 128
CUDNN_CAPABILITY = (9, 0)  # whose tensor cores cuDNN's kernels are written for, and FlashAttention 2's are not
SDPA_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
ALIGNMENT = 16  # bytes: of every row of channels, which TMA and 16-byte copies read
MAX_HEAD = 256  # channels
_DOCUMENTS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_WINDOW = ("window_size_left", "window_size_right")
_GRADIENTS = ("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv")
FA3 = "flash_attn_interface"
FA3_CAPABILITY = (9, 0)
FA3_ARGUMENTS = {
    "fwd": ("q", "k", "v", *_DOCUMENTS, "softmax_scale", "is_causal", *_WINDOW, "num_splits"),
    "bwd": (*_GRADIENTS, *_DOCUMENTS, "softmax_scale", "is_causal", *_WINDOW, "deterministic"),
}
FA4 = "flash_attn.cute.interface"
FA4_MAJORS = (9, 10)  # of the compute capabilities: others lack a backward, or a deterministic one
FA4_MAX_HEAD = 128  # on all of those
_FA4 = (*_DOCUMENTS, "softmax_scale", "causal", *_WINDOW)
FA4_ARGUMENTS = {
    "_flash_attn_fwd": ("q", "k", "v", *_FA4, "num_splits", "return_lse"),
    "_flash_attn_bwd": ("q", "k", "v", "out", "dout", "lse", *_FA4, "deterministic"),
}
FLASH_ATTN = "flash_attn.flash_attn_interface"
_FLASH_ATTN = ("dropout_p", "softmax_scale", "causal", *_WINDOW, "softcap", "alibi_slopes")
FLASH_ATTN_ARGUMENTS = {
    "_flash_attn_forward": ("q", "k", "v", *_FLASH_ATTN, "return_softmax"),
    "_flash_attn_varlen_forward": ("q", "k", "v", *_DOCUMENTS, *_FLASH_ATTN, "return_softmax"),
    "_flash_attn_backward": (*_GRADIENTS, *_FLASH_ATTN, "deterministic"),
    "_flash_attn_varlen_backward": (*_GRADIENTS, *_DOCUMENTS, *_FLASH_ATTN, "deterministic"),
}
_FA2 = ("cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "scale", *_WINDOW)
FA2_ARGUMENTS = {
    "_flash_attention_forward": ("query", "key", "value", *_FA2, "return_debug_mask"),
    "_flash_attention_backward": (
        "grad_out", "query", "key", "value", "out", "logsumexp", *_FA2, "rng_state", "unused",
    ),
}  # fmt: skip


# SDPA


@torch.compiler.assume_constant_result
def _prefers_cudnn(device: torch.device) -> bool:
    if device.type != "cuda" or not torch.backends.cuda.cudnn_sdp_enabled():
        return False
    return torch.cuda.get_device_capability(device) >= CUDNN_CAPABILITY


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    documents: Documents | None = None,
    lse: bool = False,
) -> Tensor:
    """By cuDNN on Hopper and newer, unless the user has switched that off, by FlashAttention 2 before; what one of them
    does not take PyTorch passes on to the next."""
    if lse:
        raise ValueError("attention: sdpa returns no lse; call attention.backends['triton'], or another")
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, D)
    gqa = q.size(1) != k.size(1)
    if _prefers_cudnn(q.device):
        with sdpa_kernel(SDPA_ORDER, set_priority=True):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    else:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    return y.transpose(1, 2)


def needs_sdpa(device: Device) -> str | None:
    return needs_gpu(device) or _fails("sdpa", device)


def sdpa_limits(shape: Shape, dtype: torch.dtype) -> str | None:
    _, T, *_, W, M = shape
    if M:
        return "takes no documents"
    return takes_dtypes(shape, dtype) or (None if W >= T else f"takes no window, not {W} of {T} keys: ref masks them")


# FlexAttention


_block_masks = types.SimpleNamespace()  # by `_named_block_mask`, one attribute each, which compiled code guards on


@torch.compiler.assume_constant_result  # made outside of the graph, where it would cost every step
def _named_block_mask(seq_len: int, seen: int, device: torch.device) -> str:
    """The attribute of `_block_masks` with FlexAttention's mask, which is made if it is not there."""
    name = f"{seq_len}, {seen}, {device}"

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return in_window(q_idx, kv_idx, seen - 1)

    if not hasattr(_block_masks, name):
        made = create_block_mask(mask_mod, None, None, seq_len, seq_len, device=device, BLOCK_SIZE=FLEX_TILE)
        setattr(_block_masks, name, made)
    return name


def block_mask(seq_len: int, seen: int, device: torch.device) -> BlockMask:
    """(T, T) for FlexAttention, which skips tiles that are wholly hidden."""
    made: BlockMask = getattr(_block_masks, _named_block_mask(seq_len, seen, device))
    return made


@functools.cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    documents: Documents | None = None,
    lse: bool = False,
) -> Any:
    """Its kernels are compiled for the device at hand, as ours are: it has no probe."""
    T, heads, kv_heads = q.size(1), q.size(2), k.size(2)
    mask = block_mask(T, visible(T, window), q.device)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    # uncompiled, FlexAttention makes all scores; within compiled code it is compiled already
    flex: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
    options = {"block_mask": mask, "scale": scale, "enable_gqa": heads != kv_heads}
    if not lse:
        return flex(q, k, v, **options).transpose(1, 2)
    y, auxiliary = flex(q, k, v, **options, return_aux=AuxRequest(lse=True))
    return Attention(y.transpose(1, 2), auxiliary.lse.detach())


def flex_limits(shape: Shape, dtype: torch.dtype) -> str | None:
    if shape[6]:
        return "takes no documents"
    T = shape[1]
    if why := takes_dtypes(shape, dtype):
        return why
    return f"takes T that is a multiple of {FLEX_TILE}, not {T}" if T % FLEX_TILE else None


# libraries, as a torch op calls them


@dataclass(frozen=True)
class Seen:
    """What a query sees, as libraries are told it.

    window      keys before a query, -1: all
    cu_seqlens  (N + 1,), where documents begin among the tokens of operands (B T, heads, D); None: operands are rows,
                (B, T, heads, D)
    longest     the most tokens of a document, or of a row
    """

    window: int
    scale: float
    cu_seqlens: Tensor | None
    longest: int

    def documents(self) -> dict[str, Any]:
        """As all FlashAttentions but PyTorch's call them."""
        if self.cu_seqlens is None:
            return {}
        return dict(zip(_DOCUMENTS, (self.cu_seqlens, self.cu_seqlens, self.longest, self.longest)))


@dataclass(frozen=True)
class Library:
    """forward   (q, k, v, seen) -> y and the logarithms
    backward  (dy, q, k, v, y, logarithms, seen) -> dq, dk, dv
    missing   why the package that is there, or is not, cannot serve; None if it can
    """

    forward: Callable[[Tensor, Tensor, Tensor, Seen], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Seen], tuple[Tensor, Tensor, Tensor]]
    missing: Callable[[], str | None]


def _aligned(t: Tensor) -> Tensor:
    """t, or a copy, so that every row of channels begins at a multiple of 16 bytes."""
    offsets = (t.data_ptr(), *(stride * t.itemsize for stride in t.stride()[:-1]))
    if t.stride(-1) != 1 or any(offset % ALIGNMENT for offset in offsets):
        return t.clone(memory_format=torch.contiguous_format)
    return t


def _operand(t: Tensor, seen: Seen) -> Tensor:
    """(B, T, heads, D), or (B T, heads, D) where there are documents."""
    return _aligned(t if seen.cu_seqlens is None else t.flatten(0, 1))


@torch.library.custom_op("redline::attention_library", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, longest: int, window: int, scale: float, library: str
) -> tuple[Tensor, Tensor]:
    """y, and the logarithms of the sums of exponentials: fp32 (B, H, T), or (H, B T) where there are documents."""
    seen = Seen(window, scale, cu_seqlens, longest)
    with torch.cuda.device_of(q):
        y, lse = LIBRARIES[library].forward(_operand(q, seen), _operand(k, seen), _operand(v, seen), seen)
    return y.reshape(q.shape).contiguous(), lse.contiguous()


@_forward.register_fake
def _(q, k, v, cu_seqlens, longest, window, scale, library):
    B, T, H, _ = q.shape
    size = (B, H, T) if cu_seqlens is None else (H, B * T)
    return q.new_empty(q.shape), q.new_empty(size, dtype=torch.float32)


@torch.library.custom_op("redline::attention_library_bwd", mutates_args=())
def _backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    longest: int,
    window: int,
    scale: float,
    library: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    seen = Seen(window, scale, cu_seqlens, longest)
    dy, y = _operand(dy, seen), _operand(y, seen)
    with torch.cuda.device_of(q):
        dq, dk, dv = LIBRARIES[library].backward(
            dy, _operand(q, seen), _operand(k, seen), _operand(v, seen), y, lse, seen
        )
    return dq.reshape(q.shape).contiguous(), dk.reshape(k.shape).contiguous(), dv.reshape(v.shape).contiguous()


@_backward.register_fake
def _(dy, q, k, v, y, lse, cu_seqlens, longest, window, scale, library):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, k, v, cu_seqlens, *ctx.told = inputs
    y, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, y, lse, cu_seqlens)


def _differentiate(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    return *_backward(dy, *ctx.saved_tensors, *ctx.told), None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _backend(library: str) -> Callable[..., Any]:
    """The library as a backend of attention."""

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        window: int | None = None,
        scale: float | None = None,
        documents: Documents | None = None,
        lse: bool = False,
    ) -> Any:
        B, T, H, D = q.shape
        longest = T if documents is None else min(T, documents.max_seqlen)
        seen = visible(longest, window)
        left = -1 if seen == longest else seen - 1
        scale = D**-0.5 if scale is None else scale
        cu_seqlens = None if documents is None else documents.cu_seqlens
        if documents is not None and documents.cu_seqlens is None:
            raise ValueError(f"attention: {library} has to be told where documents begin: make them by documents_of")
        y, logarithms = _forward(q, k, v, cu_seqlens, longest, left, scale, library)
        if not lse:
            return y
        return Attention(y, logarithms if documents is None else logarithms.view(H, B, T).transpose(0, 1))

    call.__name__ = call.__qualname__ = library
    return call


def _flash_limits(dtype: torch.dtype, D: int, most: int) -> str | None:
    if dtype != torch.bfloat16:
        return f"takes bfloat16, not {dtype_name(dtype)}"
    return f"takes heads of a multiple of 8 channels up to {most}, not {D}" if D % 8 or D > most else None


# interfaces


def _installed(module: str) -> bool:
    """Whether the module is there to be imported; its packages are imported for that."""
    parent = module.rpartition(".")[0]
    if parent and not _installed(parent):
        return False
    return importlib.util.find_spec(module) is not None


def _differs(name: str, package: str, wanted: Iterable[str], has_default: Mapping[str, bool]) -> str | None:
    """Why what is called `name` cannot be called with the wanted arguments. has_default: of each that it has."""
    wanted = list(wanted)
    lacking = [f"no {argument}" for argument in wanted if argument not in has_default]
    besides = [f"{n} without a default" for n, default in has_default.items() if n not in wanted and not default]
    if not lacking and not besides:
        return None
    return f"needs another {name} than the installed {package} has: {', '.join(lacking + besides)}"


def _operators_differ(namespace: str, package: str, wanted: Mapping[str, Iterable[str]]) -> str | None:
    for name, arguments in wanted.items():
        operator = getattr(getattr(torch.ops, namespace), name, None)
        if operator is None:
            return f"needs the operator {namespace}::{name}, which the installed {package} does not register"
        has_default = {a.name: a.has_default_value() for a in operator.default._schema.arguments}
        if why := _differs(f"{namespace}::{name}", package, arguments, has_default):
            return why
    return None


def _not_imported(module: str, absent: str) -> str | None:
    """`absent` where the module is not installed, a sentence where it is and cannot be imported: it may have been built
    for another PyTorch. Importing registers what it has of operators."""
    try:
        if not _installed(module):
            return absent
        importlib.import_module(module)
    except Exception as error:
        return f"is installed, but cannot be imported: {_first_line(error)}"
    return None


@torch.compiler.assume_constant_result  # the import system is none of the graph's business
def _missing(library: str) -> str:
    """Why the library's package cannot serve, "" if it can."""
    return LIBRARIES[library].missing() or ""


def _first_line(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0].strip()}" if said else type(error).__name__


# FlashAttention 3


def _fa3_missing() -> str | None:
    absent = f"needs FlashAttention 3, which is built from source: no package {FA3} is installed"
    return _not_imported(FA3, absent) or _operators_differ("flash_attn_3", FA3, FA3_ARGUMENTS)


def _fa3_options(seen: Seen) -> dict[str, Any]:
    window = {"window_size_left": seen.window, "window_size_right": -1 if seen.window < 0 else 0}
    return {"softmax_scale": seen.scale, "is_causal": True, **window, **seen.documents()}


def _fa3_forward(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
    importlib.import_module(FA3)
    # in one piece: otherwise it may split keys, as decoding needs, into partial results
    y, lse, *_ = torch.ops.flash_attn_3.fwd(q=q, k=k, v=v, **_fa3_options(seen), num_splits=1)
    return y, lse


def _fa3_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, seen: Seen
) -> tuple[Tensor, Tensor, Tensor]:
    importlib.import_module(FA3)
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    torch.ops.flash_attn_3.bwd(
        dout=dy, q=q, k=k, v=v, out=y, softmax_lse=lse, dq=dq, dk=dk, dv=dv, **_fa3_options(seen),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return dq, dk, dv


def needs_fa3(device: Device) -> str | None:
    if why := needs_gpu(device):
        return why
    if device.capability != FA3_CAPABILITY:
        want = ".".join(map(str, FA3_CAPABILITY))
        return f"needs compute capability {want}, {device.name} has {device.capability}"
    return _missing("fa3") or _fails("fa3", device)


def fa3_limits(shape: Shape, dtype: torch.dtype) -> str | None:
    return _flash_limits(dtype, shape[4], MAX_HEAD)


# FlashAttention 4


def _fa4_missing() -> str | None:
    if why := _not_imported(FA4, "needs FlashAttention 4: the package flash-attn-4 is not installed"):
        return why
    module = importlib.import_module(FA4)
    for name, arguments in FA4_ARGUMENTS.items():
        function = getattr(module, name, None)
        if function is None:
            return f"needs {FA4}.{name}, which the installed flash-attn-4 does not have"
        found = inspect.signature(function).parameters.values()
        has_default = {p.name: p.default is not p.empty for p in found}
        if why := _differs(f"{FA4}.{name}", "flash-attn-4", arguments, has_default):
            return why
    return None


def _fa4_options(seen: Seen) -> dict[str, Any]:
    every = seen.window < 0
    window = {"window_size_left": None if every else seen.window, "window_size_right": None if every else 0}
    return {"softmax_scale": seen.scale, "causal": True, **window, **seen.documents()}


def _fa4_forward(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
    module: Any = importlib.import_module(FA4)
    y, lse, *_ = module._flash_attn_fwd(q=q, k=k, v=v, **_fa4_options(seen), num_splits=1, return_lse=True)
    return y, lse


def _fa4_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, seen: Seen
) -> tuple[Tensor, Tensor, Tensor]:
    module: Any = importlib.import_module(FA4)
    deterministic = torch.are_deterministic_algorithms_enabled()
    dq, dk, dv, *_ = module._flash_attn_bwd(
        q=q, k=k, v=v, out=y, dout=dy, lse=lse, **_fa4_options(seen), deterministic=deterministic
    )
    return dq, dk, dv


def needs_fa4(device: Device) -> str | None:
    if why := needs_gpu(device):
        return why
    if device.capability is None or device.capability[0] not in FA4_MAJORS:
        want = " or ".join(f"{major}.x" for major in FA4_MAJORS)
        return f"needs compute capability {want}, {device.name} has {device.capability}"
    return _missing("fa4") or _fails("fa4", device)


def fa4_limits(shape: Shape, dtype: torch.dtype) -> str | None:
    return _flash_limits(dtype, shape[4], FA4_MAX_HEAD)


# FlashAttention 2, the package


def _flash_attn_missing() -> str | None:
    absent = "needs FlashAttention 2: the package flash-attn is not installed"
    return _not_imported(FLASH_ATTN, absent) or _operators_differ("flash_attn", "flash-attn", FLASH_ATTN_ARGUMENTS)


def _flash_attn_options(seen: Seen) -> dict[str, Any]:
    window = {"window_size_left": seen.window, "window_size_right": 0}
    unused = {"dropout_p": 0.0, "softcap": 0.0, "alibi_slopes": None}
    return {"softmax_scale": seen.scale, "causal": True, **window, **unused, **seen.documents()}


def _flash_attn_forward(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
    importlib.import_module(FLASH_ATTN)
    operators = torch.ops.flash_attn
    forward = operators._flash_attn_forward if seen.cu_seqlens is None else operators._flash_attn_varlen_forward
    y, lse, *_ = forward(q=q, k=k, v=v, **_flash_attn_options(seen), return_softmax=False)
    return y, lse


def _flash_attn_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, seen: Seen
) -> tuple[Tensor, Tensor, Tensor]:
    importlib.import_module(FLASH_ATTN)
    operators = torch.ops.flash_attn
    backward = operators._flash_attn_backward if seen.cu_seqlens is None else operators._flash_attn_varlen_backward
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    backward(
        dout=dy, q=q, k=k, v=v, out=y, softmax_lse=lse, dq=dq, dk=dk, dv=dv, **_flash_attn_options(seen),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return dq, dk, dv


def needs_flash_attn(device: Device) -> str | None:
    return needs_gpu(device) or _missing("flash_attn") or _fails("flash_attn", device)


# FlashAttention 2, PyTorch's own


def _fa2_missing() -> str | None:
    if not torch.backends.cuda.is_flash_attention_available():
        return "needs a PyTorch that was built with FlashAttention"
    return _operators_differ("aten", "PyTorch", FA2_ARGUMENTS)


def _fa2_options(seen: Seen) -> dict[str, Any]:
    begins = {"cum_seq_q": seen.cu_seqlens, "cum_seq_k": seen.cu_seqlens}
    window = {"is_causal": seen.window < 0, "window_size_left": seen.window, "window_size_right": 0}
    return {**begins, "max_q": seen.longest, "max_k": seen.longest, "dropout_p": 0.0, "scale": seen.scale, **window}


def _fa2_forward(q: Tensor, k: Tensor, v: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
    operator = torch.ops.aten._flash_attention_forward
    y, lse, *_ = operator(query=q, key=k, value=v, **_fa2_options(seen), return_debug_mask=False)
    return y, lse


def _fa2_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, seen: Seen
) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout, of which there is none: nobody reads it
    return torch.ops.aten._flash_attention_backward(
        grad_out=dy, query=q, key=k, value=v, out=y, logsumexp=lse, **_fa2_options(seen),
        rng_state=random, unused=q.new_empty(0),
    )  # fmt: skip


def needs_fa2(device: Device) -> str | None:
    return needs_gpu(device) or _missing("fa2") or _fails("fa2", device)


def flash_attention_2_limits(shape: Shape, dtype: torch.dtype) -> str | None:
    """Of the package and of PyTorch's own."""
    D = shape[4]
    if 192 < D <= 224:  # refused in backward
        return f"takes no heads of 200 to 224 channels on GPUs with less shared memory than an A100, here {D}"
    return _flash_limits(dtype, D, MAX_HEAD)


LIBRARIES = {
    "fa3": Library(_fa3_forward, _fa3_backward, _fa3_missing),
    "fa4": Library(_fa4_forward, _fa4_backward, _fa4_missing),
    "flash_attn": Library(_flash_attn_forward, _flash_attn_backward, _flash_attn_missing),
    "fa2": Library(_fa2_forward, _fa2_backward, _fa2_missing),
}
fa3, fa4, flash_attn, fa2 = map(_backend, LIBRARIES)


# probe

PROBE_ERROR = 0.05  # relative root mean square; bf16 makes 0.01, one key more or less of PROBE_WINDOW 0.2
PROBE_SHAPE = (2, 80, 4, 2, 128)  # B, T, H, G, D as in the tracks' models: kernels differ by D
PROBE_WINDOW = 21
PROBE_DOCUMENTS = (0, 50, 51, 51, 80, 130, 160)  # one of a single token, one without


def probe_device(device: Device) -> torch.device | None:
    """Where these facts are those of this process's own GPU; None where they are not, and facts alone decide."""
    if not torch.cuda.is_available():
        return None
    here = torch.device("cuda", torch.cuda.current_device())
    return here if Device.of(here) == device else None


@torch.compiler.assume_constant_result
def _failure(backend: str, kind: str, name: str, capability: tuple[int, int] | None) -> str:
    """What `_probe` found on the device of these facts, outside of any graph; "" where it cannot run."""
    here = probe_device(Device(kind, name, capability))
    if here is None:
        return ""
    with torch.inference_mode(False), torch.enable_grad():
        return _probe(backend, here)


def _fails(backend: str, device: Device) -> str | None:
    """Why the backend's probe fails on the device; None if it does not, or cannot run here."""
    return _failure(backend, device.type, device.name, device.capability) or None


@functools.cache
def _probe(backend: str, device: torch.device) -> str:
    """Runs a backend on tiny bf16 problems, forward and backward, and compares it with the reference in float64: why it
    cannot be trusted, "" if it can. An error ends here, as a sentence of the table of choices, and nowhere else."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("attention: choose its backends before a CUDA graph is captured, not within")
    B, T, H, G, _ = PROBE_SHAPE
    if backend == "sdpa":  # cuDNN may pass groups of heads on
        cases: dict[str, tuple[int, dict[str, Any]]] = {"without groups": (H, {}), "in groups of heads": (G, {})}
    else:
        begins = torch.tensor(PROBE_DOCUMENTS, dtype=torch.int32, device="cpu")
        lengths = [end - begin for begin, end in zip(PROBE_DOCUMENTS, PROBE_DOCUMENTS[1:])]
        window = {"window": PROBE_WINDOW, "lse": True}
        documents = documents_of(begins, max(lengths), T, B * T)
        cases = {"in rows": (G, window), "in documents": (G, window | {"documents": documents})}
    function = _backend(backend) if backend in LIBRARIES else sdpa
    for label, (kv_heads, options) in cases.items():
        try:
            wrong = _compare(function, kv_heads, options, device)
        except Exception as error:
            return f"fails when it is tried on this device, {label}: {_first_line(error)}"
        if wrong:
            return f"computes something else on this device, {label}: {wrong}"
    return ""


def _compare(function: Callable[..., Any], kv_heads: int, options: Mapping[str, Any], device: torch.device) -> str:
    """What differs between the function in bf16 and the reference in float64, "" if nothing does."""
    from kernels.attention import attention_ref  # whose op names this file's functions

    B, T, H, _, D = PROBE_SHAPE
    generator = torch.Generator("cpu").manual_seed(0)  # of its own: the global one stays as it is
    sizes = [(B, T, heads, D) for heads in (H, kv_heads, kv_heads, H)]
    drawn = [torch.randn(size, generator=generator, dtype=torch.float32, device="cpu").bfloat16() for size in sizes]

    def results(call: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        q, k, v, dy = (t.to(device, dtype) for t in drawn)
        operands = [t.requires_grad_() for t in (q, k, v)]
        here = dict(options)
        if documents := options.get("documents"):
            moved = {name: getattr(documents, name).to(device) for name in ("cu_seqlens", "first", "last")}
            here["documents"] = documents._replace(**moved)
        outputs = call(*operands, **here)
        y, *lse = outputs if options.get("lse") else (outputs,)
        found = dict(zip(("y", "dq", "dk", "dv"), (y, *torch.autograd.grad(y, operands, dy))))
        return found | dict(zip(("lse",), lse))

    want = results(attention_ref, torch.device("cpu"), torch.float64)
    got = results(function, device, torch.bfloat16)
    for name, t in want.items():
        off = got[name].detach().to("cpu", torch.float64) - t.detach()
        error = (off.square().mean() / t.detach().square().mean()).sqrt().item()
        if not error <= PROBE_ERROR:  # a NaN fails, too
            return f"{name} is off by {error:.2g} of its size, allowed {PROBE_ERROR}"
    return ""
