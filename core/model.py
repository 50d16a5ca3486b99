"""The transformer: nanochat's GPT (92d63d4, gpt.py), one switch per departure from a plain one.

Dimensions   B batch, T sequence, C model, H query heads, G key/value heads, D head, F = 4C MLP, V vocabulary, L layers
Features     RMSNorm without gain, rotary positions, QK-norm with a fixed scale, sliding windows (SSSL), squared ReLU,
             gated value embeddings on every other layer, learned residual and x0 scales, smear, backout,
             untied head, logits softcapped in fp32
Storage      same-shaped matrices of up to BANK_LAYERS consecutive layers share one parameter, a bank (n, rows, cols).
             A bank is unbound once per forward: indexing it per layer would build its gradient n times. Several banks
             over depth let the gradient of the last layers be reduced while backward reaches the first.
             q, k and v of a layer are one matrix ((H+2G)D, C); both MLP matrices are stored (4C, C).
Precision    explicit, no autocast: matrices and embeddings are kept in the compute type, scalars in fp32;
             norms and softmax accumulate in fp32; logits, softcap and loss are fp32.
"""

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from core.config import ModelConfig
from kernels.dispatch import Backends
from kernels.fp8 import Fp8Weight, empty_fp8
from kernels.lm_head_loss import lm_head_loss, softcapped_logits, tanh_cap
from kernels.quantise_weight import quantise_weight
from kernels.relu2_mlp import relu2_mlp
from kernels.rms_norm import rms_norm
from kernels.rope_qk_norm import rope_qk_norm

if TYPE_CHECKING:
    from core.generate import KVCache

BANK_LAYERS = 4
VOCAB_MULTIPLE = 64  # padded vocabulary: rows divide over ranks and fill tensor-core tiles
WINDOW_MULTIPLE = 128  # short windows are whole attention tiles
ROPE_BASE = 100_000.0
QK_SCALE = 1.2
VE_GATE_CHANNELS = 12
VE_GATE_RANGE = 3.0
SMEAR_CHANNELS = 24


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class Dims:
    """Every size of the model, derived from its config."""

    n_layer: int
    d_model: int
    d_head: int
    n_head: int
    n_kv_head: int
    d_kv: int
    d_ff: int
    seq_len: int
    vocab_size: int
    padded_vocab: int
    windows: tuple[int, ...]  # of each layer: a query sees itself and this many keys before it
    ve_layers: tuple[int, ...]  # layers with value embeddings


def dims(cfg: ModelConfig) -> Dims:
    """Sizes for `cfg`; ValueError on values that do not fit together."""
    for name, least in (("depth", 1), ("d_head", 2), ("seq_len", 2), ("vocab_size", 1), ("aspect_ratio", 1)):
        if getattr(cfg, name) < least:
            raise ValueError(f"{name} is {getattr(cfg, name)}: expected at least {least}")
    if cfg.d_head % 2:
        raise ValueError(f"d_head is {cfg.d_head}: rotary embedding pairs channels, give an even number")
    d_model = cfg.d_model if cfg.d_model is not None else round_up(cfg.depth * cfg.aspect_ratio, cfg.d_head)
    if d_model < 1 or d_model % cfg.d_head:
        raise ValueError(f"d_model is {d_model}: expected a positive multiple of d_head ({cfg.d_head})")
    n_head = d_model // cfg.d_head
    n_kv_head = n_head if cfg.n_kv_head is None else cfg.n_kv_head
    if n_kv_head < 1 or n_head % n_kv_head:
        raise ValueError(f"n_kv_head is {n_kv_head}: expected a divisor of the {n_head} query heads")
    if cfg.smear and d_model < SMEAR_CHANNELS:
        raise ValueError(
            f"d_model is {d_model}: smear reads {SMEAR_CHANNELS} channels, widen the model or use --no-smear"
        )
    if cfg.value_embeds and d_model < VE_GATE_CHANNELS:
        raise ValueError(
            f"d_model is {d_model}: value embeddings read {VE_GATE_CHANNELS} channels, widen it or use --no-value-embeds"
        )
    pattern = cfg.window_pattern.upper()
    if not pattern or set(pattern) - set("SL"):
        raise ValueError(f"window_pattern is {cfg.window_pattern!r}: expected letters S (short) and L (whole context)")
    short = min(round_up(-(-cfg.seq_len // 4), WINDOW_MULTIPLE), cfg.seq_len)
    windows = [short if pattern[i % len(pattern)] == "S" else cfg.seq_len for i in range(cfg.depth)]
    windows[-1] = cfg.seq_len
    ve_layers = [i for i in range(cfg.depth) if i % 2 == (cfg.depth - 1) % 2] if cfg.value_embeds else []
    return Dims(
        n_layer=cfg.depth,
        d_model=d_model,
        d_head=cfg.d_head,
        n_head=n_head,
        n_kv_head=n_kv_head,
        d_kv=n_kv_head * cfg.d_head,
        d_ff=4 * d_model,
        seq_len=cfg.seq_len,
        vocab_size=cfg.vocab_size,
        padded_vocab=round_up(cfg.vocab_size, VOCAB_MULTIPLE),
        windows=tuple(windows),
        ve_layers=tuple(ve_layers),
    )


def choose_ops(cfg: ModelConfig, backends: Backends, batch_size: int) -> dict[str, Callable[..., Any]]:
    """The functions of the model's ops by attribute name, for batches of that many rows; ValueError as `Backends.choose`."""
    d = dims(cfg)
    tokens = batch_size * d.seq_len
    chosen = {
        "norm": backends.choose(rms_norm, tokens, d.d_model),
        "rope_qk_norm": backends.choose(rope_qk_norm, batch_size, d.seq_len, d.n_head, d.n_kv_head, d.d_head),
        "lm_head_loss": backends.choose(lm_head_loss, tokens, d.d_model, d.padded_vocab),
    }
    if cfg.relu2:
        chosen["mlp"] = backends.choose(relu2_mlp, tokens, d.d_model, d.d_ff)
    return chosen


def rope_tables(seq_len: int, d_head: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, each (T, D/2) fp32."""
    j = torch.arange(d_head // 2, dtype=torch.float32, device=device)
    inv_freq = ROPE_BASE ** (-2 * j / d_head)
    angle = torch.arange(seq_len, dtype=torch.float32, device=device)[:, None] * inv_freq
    return angle.cos(), angle.sin()


def window_mask(q_idx: Tensor, kv_idx: Tensor, window: int) -> Tensor:
    """True where a query may look: itself and `window` keys before it."""
    return (kv_idx <= q_idx) & (q_idx - kv_idx <= window)


def dense_mask(seq_len: int, window: int, device: torch.device) -> Tensor | None:
    """(T, T) bool, True where a query may look; None where the window hides nothing that causality shows."""
    if window >= seq_len - 1:
        return None
    i = torch.arange(seq_len, device=device)
    return window_mask(i[:, None], i[None, :], window)


def block_mask(seq_len: int, window: int, device: torch.device) -> BlockMask | None:
    """The same for FlexAttention, which skips the tiles that are hidden whole."""
    if window >= seq_len - 1:
        return None

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return window_mask(q_idx, kv_idx, window)

    return create_block_mask(mask_mod, None, None, seq_len, seq_len, device=device)


@functools.cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
    """q (B, T, H, D), k and v (B, S, G, D) -> (B, T, H, D), softmax scale 1/sqrt(D).

    mask: bool that broadcasts to (B, H, T, S), True where a query may look; a BlockMask takes FlexAttention; None is causal.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, D)
    gqa = q.size(1) != k.size(1)
    if isinstance(mask, BlockMask):
        # uncompiled, FlexAttention makes all scores; within a compiled model it is compiled already
        flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
        y = flex(q, k, v, block_mask=mask, enable_gqa=gqa)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
    return y.transpose(1, 2)


def _bank(n_layer: int, rows: int, cols: int) -> nn.ParameterList:
    sizes = [min(BANK_LAYERS, n_layer - i) for i in range(0, n_layer, BANK_LAYERS)]
    return nn.ParameterList(torch.empty(n, rows, cols) for n in sizes)


def _unbind(banks: nn.ParameterList) -> list[Tensor]:
    return [matrix for bank in banks for matrix in bank.unbind(0)]


class GPT(nn.Module):
    """The language model. Build it on the meta device to count, or on a device and call `init_weights`."""

    def __init__(
        self, cfg: ModelConfig, backends: Backends | None = None, batch_size: int = 1, *, fp8_head: bool = False
    ):
        """backends: of the ops, chosen here for batches of batch_size rows (None: the references). fp8_head: the head's products in
        fp8 where its loss is trained; call `refresh` after each change of the head."""
        super().__init__()
        self.cfg = cfg
        d = self.dims = dims(cfg)
        self.softcap = tanh_cap(cfg.logit_softcap)
        self.wte = nn.Parameter(torch.empty(d.padded_vocab, d.d_model))
        self.lm_head = nn.Parameter(torch.empty(d.padded_vocab, d.d_model)) if cfg.untied_head else self.wte
        self.attn_qkv = _bank(d.n_layer, d.d_model + 2 * d.d_kv, d.d_model)
        self.attn_out = _bank(d.n_layer, d.d_model, d.d_model)
        self.mlp_up = _bank(d.n_layer, d.d_ff, d.d_model)
        self.mlp_down = _bank(d.n_layer, d.d_ff, d.d_model)  # x W, not x W^T
        if cfg.value_embeds:
            # one row per token with the values of all its layers: one gather per forward
            self.value_embeds = nn.Parameter(torch.empty(d.padded_vocab, len(d.ve_layers) * d.d_kv))
            self.ve_gate = _bank(len(d.ve_layers), d.n_kv_head, VE_GATE_CHANNELS)
        if cfg.resid_lambdas:
            self.resid_lambdas = nn.Parameter(torch.empty(d.n_layer))
        if cfg.x0_lambdas:
            self.x0_lambdas = nn.Parameter(torch.empty(d.n_layer))
        if cfg.smear:
            self.smear_gate = nn.Parameter(torch.empty(1, SMEAR_CHANNELS))
            self.smear_lambda = nn.Parameter(torch.empty(1))
        if cfg.backout:
            self.backout_lambda = nn.Parameter(torch.empty(1))
        backends = backends or Backends("ref", device=self.wte.device, dtype=self.wte.dtype)
        for name, function in choose_ops(cfg, backends, batch_size).items():
            setattr(self, name, function)
        if fp8_head:
            self._quantise = backends.choose(quantise_weight, d.padded_vocab, d.d_model)
            for name, t in empty_fp8(self.lm_head)._asdict().items():
                self.register_buffer(f"head_{name}", t, persistent=False)
        self.fp8_head = fp8_head
        if cfg.rope:
            cos, sin = rope_tables(d.seq_len, d.d_head, self.wte.device)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        # windows of sequences of the training length; others, not worth a compilation each, take dense masks
        self.flex_attention = self.wte.is_cuda
        self._block_masks: dict[int, BlockMask | None] = {}  # by window

    # parameters -----------------------------------------------------------

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Initialises every parameter, each from a generator of its own: a switch leaves the others' values alone."""
        bound = (3 / self.dims.d_model) ** 0.5  # uniform with standard deviation 1/sqrt(C)
        depth_frac = torch.arange(self.dims.n_layer) / max(self.dims.n_layer - 1, 1)
        for name, p in self.named_parameters():
            # 32 bits: the CPU's generator ignores the others
            g = torch.Generator(device=p.device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            kind = name.split(".")[0]
            if kind == "lm_head" or (kind == "wte" and not self.cfg.untied_head):
                p.normal_(0, 0.001, generator=g)
            elif kind == "wte":
                p.normal_(0, 0.8, generator=g)
            elif kind in ("attn_qkv", "value_embeds"):
                p.uniform_(-bound, bound, generator=g)
            elif kind == "mlp_up":
                p.uniform_(-0.4 * bound, 0.4 * bound, generator=g)
            elif kind in ("attn_out", "mlp_down", "smear_lambda"):
                p.zero_()
            elif kind in ("ve_gate", "smear_gate"):
                p.uniform_(0, 0.02, generator=g)
            elif kind == "resid_lambdas":
                p.copy_(1.15 - 0.10 * depth_frac)
            elif kind == "x0_lambdas":
                p.copy_(0.20 - 0.15 * depth_frac)
            elif kind == "backout_lambda":
                p.fill_(0.2)
            else:
                raise AssertionError(f"no initialisation for parameter {name}")

    def num_params(self) -> dict[str, int]:
        """Parameters by group; the scaling laws count transformer_matrices + lm_head."""
        counts = dict.fromkeys(("wte", "value_embeds", "lm_head", "transformer_matrices", "scalars"), 0)
        for name, p in self.named_parameters():
            kind = name.split(".")[0]
            if kind in ("attn_qkv", "attn_out", "mlp_up", "mlp_down", "ve_gate"):
                kind = "transformer_matrices"
            counts[kind if kind in counts else "scalars"] += p.numel()
        if not self.cfg.untied_head:
            counts["lm_head"], counts["wte"] = counts["wte"], 0
        return counts

    def flops_per_token(self) -> int:
        """Training FLOPs per token: 6 per matmul parameter, 12 H D w per layer for attention (w the window)."""
        counts, d = self.num_params(), self.dims
        matmul = counts["transformer_matrices"] + counts["lm_head"] + (SMEAR_CHANNELS if self.cfg.smear else 0)
        return 6 * matmul + sum(12 * d.n_head * d.d_head * w for w in d.windows)

    # forward --------------------------------------------------------------

    def prepare_attention(self) -> None:
        """Makes FlexAttention's masks on the model's device. Call it before torch.compile: in the graph, they cost each step."""
        T, device = self.dims.seq_len, self.wte.device
        if self.flex_attention and T % WINDOW_MULTIPLE == 0:
            self._block_masks = {w: block_mask(T, w, device) for w in set(self.dims.windows)}

    def _masks(self, seq_len: int) -> list[Tensor | BlockMask | None]:
        """What `attention` takes for each layer, for whole sequences."""
        windows = self.dims.windows
        masks: dict[int, Any]
        if self.flex_attention and seq_len == self.dims.seq_len and seq_len % WINDOW_MULTIPLE == 0:
            if not self._block_masks:
                self.prepare_attention()
            masks = self._block_masks
        else:
            masks = {w: dense_mask(seq_len, w, self.wte.device) for w in dict.fromkeys(windows)}
        return [masks[w] for w in windows]

    def rope_tables(self, seq_len: int) -> tuple[Tensor, Tensor]:
        """cos and sin (T, D/2) fp32; any length."""
        if seq_len > self.dims.seq_len:
            return rope_tables(seq_len, self.dims.d_head, self.wte.device)
        return self.rope_cos[:seq_len], self.rope_sin[:seq_len]

    def _smear(self, x: Tensor, before: Tensor | None) -> Tensor:
        """x (B, T, C) with a share of each token's predecessor; `before` (B, 1, C) is that of the first, None: it has none."""
        later, earlier = (x[:, 1:], x[:, :-1]) if before is None else (x, torch.cat((before, x[:, :-1]), dim=1))
        gate = torch.sigmoid(later[..., :SMEAR_CHANNELS] @ self.smear_gate.to(x.dtype).T)  # (B, T-1 or T, 1)
        gate = self.smear_lambda.to(x.dtype) * gate
        smeared = later + gate * earlier
        return torch.cat((x[:, :1], smeared), dim=1) if before is None else smeared

    def hidden(self, idx: Tensor, cache: "KVCache | None" = None) -> Tensor:
        """Token ids (B, T) -> normalised hidden states (B, T, C) in the compute type.

        With a cache, idx continues its rows: by one token each, or by the beginning of rows that are empty.
        """
        d, cfg = self.dims, self.cfg
        B, T = idx.shape
        if cache is not None:
            cache.begin(B, T)
        x = self.norm(F.embedding(idx, self.wte)).y
        if cfg.smear:
            x = self._smear(x, None if cache is None else cache.swap_embedding(x))
        x0 = x
        ve = gates = ()
        if cfg.value_embeds:
            ve = F.embedding(idx, self.value_embeds).view(B, T, len(d.ve_layers), d.n_kv_head, d.d_head).unbind(2)
            gates = _unbind(self.ve_gate)
        qkv_w, out_w, up_w, down_w = (_unbind(b) for b in (self.attn_qkv, self.attn_out, self.mlp_up, self.mlp_down))
        resid = self.resid_lambdas.unbind() if cfg.resid_lambdas else None
        share = self.x0_lambdas.unbind() if cfg.x0_lambdas else None
        if cache is not None and T == 1:  # each row at a position of its own
            cos, sin = cache.rope_tables() if cfg.rope else (None, None)
            masks = cache.masks()
        else:
            cos, sin = self.rope_tables(T) if cfg.rope else (None, None)
            masks = self._masks(T)
        heads = {"heads": d.n_head, "kv_heads": d.n_kv_head, "scale": QK_SCALE, "norm": cfg.qk_norm}
        x_mid = None
        for i in range(d.n_layer):
            scale = None if resid is None else resid[i]
            if share is not None:
                y, x, *_ = self.norm(x, x0, scale, share[i])
            else:
                x = x if scale is None else scale * x
                y = self.norm(x).y
            gate = values = None
            if i in d.ve_layers:
                j = d.ve_layers.index(i)
                gate = VE_GATE_RANGE * torch.sigmoid(y[..., :VE_GATE_CHANNELS] @ gates[j].T)  # (B, T, G)
                values = ve[j]
            q, k, v = self.rope_qk_norm(y @ qkv_w[i].T, cos, sin, gate, values, **heads)
            if cache is not None:
                k, v = cache.extend(i, k, v)
            y = attention(q, k, v, masks[i]).reshape(B, T, d.d_model)
            y, x, *_ = self.norm(x, y @ out_w[i].T)
            x = x + (self.mlp(y, up_w[i], down_w[i]) if cfg.relu2 else F.gelu(y @ up_w[i].T) @ down_w[i])
            if i == d.n_layer // 2:
                x_mid = x
        if cache is not None:
            cache.advance(T)
        if cfg.backout:
            return self.norm(x, x_mid, None, -self.backout_lambda).y
        return self.norm(x).y

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V) fp32 softcapped logits of the true vocabulary."""
        return softcapped_logits(hidden, self.lm_head, self.softcap, self.dims.vocab_size)

    def loss(self, hidden: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """Cross-entropy in nats, fp32, of hidden states (N, C) and targets (N,), of which -1 is ignored.

        reduction: "mean" over the targets that count, "sum", or "none" (N,), which has no gradient. The padded rows of the head are
        no part of the softmax, and their gradient is 0.
        """
        options = {"softcap": self.softcap, "reduction": reduction, "vocab_size": self.dims.vocab_size}
        if self.fp8_head and reduction != "none":
            options["fp8"] = Fp8Weight(self.head_q, self.head_q_t, self.head_scale)
        return self.lm_head_loss(hidden, self.lm_head, targets, **options)

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes the head's copy in fp8 anew; once a step, before its forwards. (The optimizer writes past autograd's version counts,
        so nothing else would tell that the head has changed.)"""
        if self.fp8_head:
            self._quantise(self.lm_head.detach(), self.head_q, self.head_q_t, self.head_scale)

    def forward(self, idx: Tensor, targets: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """Logits (B, T, V), or with targets (B, T) the loss of all of them."""
        hidden = self.hidden(idx)
        return self.logits(hidden) if targets is None else self.loss(hidden.flatten(0, 1), targets.flatten(), reduction)
