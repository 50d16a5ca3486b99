"""The transformer of the `gpt2` track: nanochat's GPT (92d63d4, gpt.py), one switch per departure from a plain one.

Dimensions   B batch, T sequence, C model, H query heads, G key/value heads, D head, F = 4C MLP, V vocabulary, L layers
Features     RMSNorm without gain, rotary positions, QK-norm with a fixed scale, sliding windows (SSSL), squared ReLU,
             gated value embeddings on every other layer, learned residual and x0 scales, smear, backout,
             untied head, logits softcapped in fp32
Parameters   `parameter_table`, in banks. q, k and v of a layer are one matrix ((H+2G)D, C); both MLP matrices are
             stored (4C, C)
Precision    explicit, no autocast: matrices and embeddings are kept in the compute type, scalars in fp32;
             norms and softmax accumulate in fp32; logits, softcap and loss are fp32
A new feature is a row of `parameter_table`, a line of `GPT.hidden` and a test of its formula.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core import fp8, params
from core.config import ModelConfig
from core.data.tokenizer import SPECIAL_TOKENS
from core.fp8 import IN_BF16, Fp8Layers, LayerInFp8, Recipe
from core.kv_cache import KVCache
from core.layers import Branches, masked_attention, rope_tables, unbind_banks
from core.params import MuonView, Param, alias, bank, constant, normal, ramp, uniform
from core.stopping import UserError
from kernels.attention import attention, attention_in_batches
from kernels.decode_attention import decode_attention
from kernels.dispatch import Backends
from kernels.embedding import embedding
from kernels.fp8 import Fp8Tensor, empty_fp8
from kernels.fp8_linear import fp8_linear
from kernels.fp8_mlp import fp8_mlp
from kernels.gemm import summed
from kernels.linear import linear
from kernels.lm_head_loss import lm_head_loss, softcapped_logits, tanh_cap
from kernels.op import Op, Shape
from kernels.quantise_weight import quantise_weight
from kernels.relu2_mlp import relu2_mlp
from kernels.rms_norm import RMSNorm, rms_norm
from kernels.rope_qk_norm import rope_qk_norm
from kernels.sizes import VE_GATE_CHANNELS, round_up
from kernels.windows import Documents, documents_at, visible

VOCAB_MULTIPLE = 64  # padded vocabulary: rows divide over ranks and fill tensor-core tiles
WINDOW_MULTIPLE = 128  # short windows are whole attention tiles
QK_SCALE = 1.2
VE_GATE_RANGE = 3.0
SMEAR_CHANNELS = 24

COUNTED = ("wte", "value_embeds", "lm_head", "transformer_matrices", "scalars")  # what parameters count as
SCALING = ("transformer_matrices", "lm_head")  # of these, what the scaling laws count [nanochat 92d63d4, base_train.py]


# sizes


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
    """Sizes for `cfg`; UserError on values that do not fit together."""
    if cfg.d_head % 2:
        raise UserError(f"d_head is {cfg.d_head}: rotary embedding pairs channels, give an even number")
    # the dial: width follows depth, in whole heads
    d_model = cfg.d_model if cfg.d_model is not None else round_up(cfg.depth * cfg.aspect_ratio, cfg.d_head)
    if d_model % cfg.d_head:
        raise UserError(f"d_model is {d_model}: expected a positive multiple of d_head ({cfg.d_head})")
    n_head = d_model // cfg.d_head
    n_kv_head = n_head if cfg.n_kv_head is None else cfg.n_kv_head
    if n_head % n_kv_head:
        raise UserError(f"n_kv_head is {n_kv_head}: expected a divisor of the {n_head} query heads")
    if cfg.smear and d_model < SMEAR_CHANNELS:
        raise UserError(
            f"d_model is {d_model}: smear reads {SMEAR_CHANNELS} channels, widen the model or use --no-smear"
        )
    if cfg.value_embeds and d_model < VE_GATE_CHANNELS:
        raise UserError(
            f"d_model is {d_model}: value embeddings read {VE_GATE_CHANNELS} channels, widen it or use "
            "--no-value-embeds"
        )
    pattern = cfg.window_pattern.upper()
    if not pattern or set(pattern) - set("SL"):
        raise UserError(f"window_pattern is {cfg.window_pattern!r}: expected letters S (short) and L (whole context)")
    # short windows are a quarter of the context; the last layer always sees all of it
    short = min(round_up(-(-cfg.seq_len // 4), WINDOW_MULTIPLE), cfg.seq_len)
    windows = [short if pattern[i % len(pattern)] == "S" else cfg.seq_len for i in range(cfg.depth)]
    windows[-1] = cfg.seq_len
    # every other layer, the last one among them
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


# parameters


def parameter_table(cfg: ModelConfig) -> params.Table:
    """The rows of a model's parameters; UserError as `dims`. Initial values: nanochat 92d63d4, gpt.py,
    init_weights."""
    d = dims(cfg)
    L, C, F_, V = d.n_layer, d.d_model, d.d_ff, d.padded_vocab
    width = (3 / C) ** 0.5  # a uniform distribution of this width has standard deviation 1/sqrt(C)
    lookup: dict[str, Any] = {"computes": True}
    head: dict[str, Any] = {
        "group": "lm_head",
        "counts_as": "lm_head",
        "multiplies": True,
        "computes": True,
        "mastered": True,
    }

    # Muon sees q, k and v apart: as equal matrices of one batch, or as three where k and v are narrower
    q_end, k_end, v_end = C, C + d.d_kv, C + 2 * d.d_kv
    qkv_views = (
        [MuonView(split=3)]
        if d.d_kv == C
        else [MuonView((0, q_end)), MuonView((q_end, k_end)), MuonView((k_end, v_end))]
    )

    rows = [
        *bank("attn_qkv", L, C + 2 * d.d_kv, C, uniform(-width, width), *qkv_views),
        *bank("attn_out", L, C, C, constant(0.0)),
        *bank("mlp_up", L, F_, C, uniform(-0.4 * width, 0.4 * width)),
        *bank("mlp_down", L, F_, C, constant(0.0), MuonView(transposed=True)),  # x W, not x W^T: Muon sees (C, 4C)
    ]
    if cfg.untied_head:
        rows.append(Param("wte", (V, C), normal(0.8), "wte", "wte", **lookup))
        rows.append(Param("lm_head", (V, C), normal(0.001), **head))
    else:
        rows.append(Param("wte", (V, C), normal(0.001), **head))
    if cfg.value_embeds:
        # one row per token with the values of all its layers: one gather per forward
        values = (V, len(d.ve_layers) * d.d_kv)
        rows.append(Param("value_embeds", values, uniform(-width, width), "value_embeds", "value_embeds", **lookup))
        rows += bank("ve_gate", len(d.ve_layers), d.n_kv_head, VE_GATE_CHANNELS, uniform(0, 0.02))
    if cfg.resid_lambdas:
        rows.append(Param("resid_lambdas", (L,), ramp(1.15, -0.10), "resid_lambdas", "scalars"))
    if cfg.x0_lambdas:
        rows.append(Param("x0_lambdas", (L,), ramp(0.20, -0.15), "x0_lambdas", "scalars"))
    if cfg.smear:
        rows.append(Param("smear_gate", (1, SMEAR_CHANNELS), uniform(0, 0.02), "gates", "scalars", multiplies=True))
        rows.append(Param("smear_lambda", (1,), constant(0.0), "gates", "scalars"))
    if cfg.backout:
        rows.append(Param("backout_lambda", (1,), constant(0.2), "gates", "scalars"))
    return tuple(rows)


def flops_per_token(cfg: ModelConfig) -> int:
    """Training FLOPs per token: 6 per parameter that multiplies, 12 H D w per layer for attention (w the window)."""
    d = dims(cfg)
    return 6 * params.matmul_params(parameter_table(cfg)) + sum(12 * d.n_head * d.d_head * w for w in d.windows)


# the model


def run_layer(layer: Callable[..., Any], *state: Any) -> Any:
    """A layer from the residual stream to the next."""
    return layer(*state)


def recomputed_layer(layer: Callable[..., Any], *state: Any) -> Any:
    """The same, of which only `state` is kept for backward."""
    return checkpoint(layer, *state, use_reentrant=False, preserve_rng_state=False)  # no layer draws numbers


class Chooser(Protocol):
    """Gives the function to call for an op on a shape: `Backends`, or what stands for it in a plan."""

    def choose(self, op: Op, *shape: int) -> Callable[..., Any]: ...

    def choose_fitting(self, op: Op, *shape: int) -> Callable[..., Any]: ...

    def choose_many(
        self, op: Op, problems: Sequence[tuple[Shape, torch.dtype | None]]
    ) -> Callable[[Sequence[dict[str, Any]]], None]: ...


def attention_of(window: int) -> str:
    """The attribute of the attention of layers with that window."""
    return f"attention_{window}"


def fp8_choices(cfg: ModelConfig, recipe: Recipe) -> list[fp8.Choice]:
    """Which matrices of the layers multiply in fp8."""
    kinds: dict[str, tuple[tuple[int, int], int]] = {}
    for row in parameter_table(cfg):
        if row.group == params.MUON:
            n, rows, cols = row.shape
            kind = row.name.partition(".")[0]
            kinds[kind] = (rows, cols), kinds.get(kind, (0, 0))[1] + n
    matrices = [(kind, shape, n) for kind, (shape, n) in kinds.items()]
    return fp8.choices(recipe, matrices, cfg.depth, cfg.relu2)


def choose_ops(
    cfg: ModelConfig, backends: Chooser, batch_size: int, recipe: Recipe | None = None
) -> dict[str, Callable[..., Any]]:
    """The functions of the model's ops by attribute name, for batches of that many rows; ValueError as
    `Backends.choose`."""
    d = dims(cfg)
    tokens = batch_size * d.seq_len
    heads = batch_size, d.seq_len, d.n_head, d.n_kv_head, d.d_head
    chosen = {
        "norm": backends.choose(rms_norm, tokens, d.d_model),
        "rope_qk_norm": backends.choose(rope_qk_norm, *heads),
        "qkv": backends.choose(linear, tokens, d.d_model, d.d_model + 2 * d.d_kv),
        "out": backends.choose(linear, tokens, d.d_model, d.d_model),
        "lm_head_loss": backends.choose(lm_head_loss, tokens, d.d_model, d.padded_vocab),
    }
    op, longest = (attention_in_batches, d.seq_len) if cfg.within_documents else (attention, 0)
    for window in dict.fromkeys(d.windows):  # sequences of other lengths come too: prompts, scores
        chosen[attention_of(window)] = backends.choose_fitting(op, *heads, visible(d.seq_len, window), longest)
    # of a token of each row; what can run does not depend on the slots of a cache, nor on its rows
    chosen["decode_attention"] = backends.choose(
        decode_attention, batch_size, d.seq_len, d.n_head, d.n_kv_head, d.d_head, d.seq_len
    )
    if cfg.relu2:
        chosen["mlp"] = backends.choose(relu2_mlp, tokens, d.d_model, d.d_ff)
        chosen["mlp_of_few"] = backends.choose(relu2_mlp, batch_size, d.d_model, d.d_ff)  # a token of each row
    else:
        chosen["up"] = backends.choose(linear, tokens, d.d_model, d.d_ff)
    chosen["embed"] = backends.choose(embedding, tokens, d.padded_vocab, d.d_model)
    if cfg.value_embeds:
        chosen["embed_values"] = backends.choose(embedding, tokens, d.padded_vocab, len(d.ve_layers) * d.d_kv)
    if recipe is None:
        return chosen
    converts = {choice.kind for choice in fp8_choices(cfg, recipe) if choice.converts}
    if "attn_qkv" in converts:
        chosen["fp8_qkv"] = backends.choose(fp8_linear, tokens, d.d_model, d.d_model + 2 * d.d_kv)
    if "attn_out" in converts:
        chosen["fp8_out"] = backends.choose(fp8_linear, tokens, d.d_model, d.d_model)
    if "mlp_up" in converts and recipe.scales == "delayed":
        chosen["fp8_mlp"] = backends.choose(fp8_mlp, tokens, d.d_model, d.d_ff)
    elif "mlp_up" in converts:
        chosen["fp8_up"] = backends.choose(fp8_linear, tokens, d.d_model, d.d_ff)
        chosen["fp8_down"] = backends.choose(fp8_linear, tokens, d.d_ff, d.d_model)
    return chosen


class GPT(nn.Module):
    """The language model. Build it on a device and call `init_weights`, or on the meta device to look at."""

    # parameters, as `parameter_table` lists them
    wte: nn.Parameter
    lm_head: nn.Parameter
    value_embeds: nn.Parameter
    attn_qkv: nn.ParameterList
    attn_out: nn.ParameterList
    mlp_up: nn.ParameterList
    mlp_down: nn.ParameterList
    ve_gate: nn.ParameterList
    resid_lambdas: nn.Parameter
    x0_lambdas: nn.Parameter
    smear_gate: nn.Parameter
    smear_lambda: nn.Parameter
    backout_lambda: nn.Parameter
    # buffers
    rope_cos: Tensor
    rope_sin: Tensor
    head_q: Tensor
    head_q_t: Tensor
    head_scale: Tensor
    # ops, on the backends that were chosen
    norm: Callable[..., Any]
    rope_qk_norm: Callable[..., Any]
    qkv: Callable[..., Tensor]
    out: Callable[..., Tensor]
    attention: Sequence[Callable[..., Tensor]]  # of each layer
    decode_attention: Callable[..., Tensor]
    mlp: Callable[..., Tensor]
    mlp_of_few: Callable[..., Tensor]
    up: Callable[..., Tensor]
    fp8_qkv: Callable[..., Tensor]
    fp8_out: Callable[..., Tensor]
    fp8_mlp: Callable[..., Tensor]
    fp8_up: Callable[..., Tensor]
    fp8_down: Callable[..., Tensor]
    embed: Callable[..., tuple[Tensor, ...]]
    embed_values: Callable[..., tuple[Tensor, ...]]
    lm_head_loss: Callable[..., Tensor]

    def __init__(
        self,
        cfg: ModelConfig,
        backends: Chooser | None = None,
        batch_size: int = 1,
        *,
        fp8_head: bool = False,
        recipe: Recipe | None = None,
        recompute: bool = False,
    ):
        """backends: of the ops, chosen here for batches of batch_size rows (None: the references). fp8_head: the head's
        products are in fp8 where its loss is trained; recipe: so are those of the layers, wherever gradients are
        recorded. recompute: of a layer, backward finds its inputs and makes the rest again."""
        super().__init__()
        # storage: every parameter is a row of the table
        self.cfg, self.dims, self.table = cfg, dims(cfg), parameter_table(cfg)
        d = self.dims
        params.register(self, self.table)
        if not cfg.untied_head:
            self.lm_head = self.wte
        device = self.wte.device
        # ops: one function each, chosen once for the shapes of training; the forward calls them without a branch
        backends = backends or Backends("ref", device=device, dtype=self.wte.dtype)
        for name, function in choose_ops(cfg, backends, batch_size, recipe).items():
            setattr(self, name, function)
        self.attention = [getattr(self, attention_of(window)) for window in d.windows]
        # head: softcapped in fp32, its weight beside it in fp8 if asked for
        self.softcap = tanh_cap(cfg.logit_softcap)
        self.fp8_head = fp8_head
        if fp8_head:
            self._quantise = backends.choose(quantise_weight, 1, d.padded_vocab, d.d_model)
            for name, t in empty_fp8(self.lm_head)._asdict().items():
                self.register_buffer(f"head_{name}", t, persistent=False)
        # layers: copies of their weights in fp8, and the scales of what they multiply
        self.in_fp8: Fp8Layers | None = None
        if recipe is not None:
            banks = {kind: getattr(self, kind) for kind in ("attn_qkv", "attn_out", "mlp_up", "mlp_down")}
            self.in_fp8 = Fp8Layers(recipe, fp8_choices(cfg, recipe), banks, d.n_layer, backends)
        # positions: made once, no part of a checkpoint
        if cfg.rope:
            cos, sin = rope_tables(d.seq_len, d.d_head, device)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        self._sums: dict[str, list[Tensor]] = {}  # of a bank, by layer
        self.run_layer = recomputed_layer if recompute else run_layer
        # several ranks: see core/exchange.py
        self.copies: list[Callable[[], None]] = []
        self.at_stage: Callable[[Tensor, int, Sequence[Tensor]], Tensor] | None = None

    # weights --------------------------------------------------------------

    def init_weights(self, seed: int) -> None:
        params.init_weights(self, self.table, seed)
        self.refresh_copies()

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        """Large parameters in the order in which forward needs them: tables, whose gradients are complete last, then
        the banks of the same layers together, with the last the head."""
        tables = ("wte", "value_embeds") if self.cfg.value_embeds else ("wte",)
        kinds = ("attn_qkv", "attn_out", "mlp_up", "mlp_down")
        layers = [tuple(f"{kind}.{i}" for kind in kinds) for i in range(len(self.attn_qkv))]
        if self.cfg.untied_head:
            layers[-1] += ("lm_head",)
        return (tables, *layers)

    @torch.no_grad()
    def refresh_copies(self, names: Sequence[str] | None = None) -> None:
        """Makes copies of weights anew: all of them, or those in fp8 of a stage's parameters. Whoever writes weights
        calls it when done: `init_weights`, the optimizer, the exchange between ranks, the checkpoint's loader. (They
        write past autograd's version counts, so nothing else could tell that a copy is stale: the first version relied
        on them and trained on a copy of the initial head, bench/LOG.md 2026-11-21.)"""
        if self.fp8_head and (names is None or ("lm_head" if self.cfg.untied_head else "wte") in names):
            self._quantise(self.lm_head.detach(), self.head_q, self.head_q_t, self.head_scale)
        if self.in_fp8 is not None:
            self.in_fp8.refresh(names)
        if names is None:
            for copy in self.copies:
                copy()

    def accumulate(self, sums: Mapping[str, Tensor]) -> None:
        """From now on backward adds the gradients of weights that are multiplied or looked up to these fp32 tensors, by
        parameter name, and autograd gives them none."""
        # the matrix of each layer by itself: compiled code shall write to no view
        self._sums = {
            name: [alias(t) for t in (total.unbind() if name.partition(".")[2] else (total,))]
            for name, total in sums.items()
        }

    def _sum_of(self, name: str) -> Tensor | None:
        """Where the gradient of a parameter is added; None: it is left to autograd."""
        return self._sums[name][0] if self._sums else None

    def _sums_of(self, kind: str) -> Sequence[Tensor | None]:
        """The same of each layer's matrix."""
        if not self._sums:
            return [None] * self.dims.n_layer
        return [t for i in range(len(getattr(self, kind))) for t in self._sums[f"{kind}.{i}"]]

    # forward --------------------------------------------------------------

    def rope(self, seq_len: int) -> tuple[Tensor, Tensor] | None:
        """cos and sin (T, D/2) fp32 of the first T positions, any T; None without rotary positions."""
        if not self.cfg.rope:
            return None
        if seq_len > self.dims.seq_len:
            return rope_tables(seq_len, self.dims.d_head, self.wte.device)
        return self.rope_cos[:seq_len], self.rope_sin[:seq_len]

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """An empty KV cache for `hidden`."""
        d = self.dims
        return KVCache(
            rows, capacity, windows=d.windows, n_kv_head=d.n_kv_head, d_head=d.d_head, d_model=d.d_model,
            rope=self.rope(capacity), like=self.wte,
        )  # fmt: skip

    def _documents(self, idx: Tensor) -> Documents | None:
        """Of rows (B, T) of ids; None where attention does not end with them."""
        if not self.cfg.within_documents:
            return None
        return documents_at(idx == self.dims.vocab_size - len(SPECIAL_TOKENS))  # bos is the first of these

    def _smear(self, x: Tensor, before: Tensor | None, branches: Branches | None = None) -> Tensor:
        """x (B, T, C) with a share of each token's predecessor; `before` (B, 1, C) is that of the first, None: it has
        none."""
        later, earlier = (x[:, 1:], x[:, :-1]) if before is None else (x, torch.cat((before, x[:, :-1]), dim=1))
        if branches is not None:
            earlier = x.gather(1, branches.before[:, 1:, None].expand_as(later))
        gate = torch.sigmoid(later[..., :SMEAR_CHANNELS] @ self.smear_gate.to(x.dtype).T)  # (B, T-1 or T, 1)
        gate = self.smear_lambda.to(x.dtype) * gate
        smeared = later + gate * earlier
        return torch.cat((x[:, :1], smeared), dim=1) if before is None else smeared

    def _norm_scale(self, layer: LayerInFp8, kind: str) -> Tensor | None:
        """With what a norm quantises its result for matrices of that kind; None: it does not."""
        return self.in_fp8.norm_scale if self.in_fp8 and layer.has(kind) else None

    def _project_in(self, layer: LayerInFp8, normed: RMSNorm, w: Tensor, dw_sum: Tensor | None) -> Tensor:
        if not layer.has("attn_qkv"):
            return self.qkv(normed.y, w, dw_sum=dw_sum)
        options = layer.linear("attn_qkv", "d_qkv")
        return self.fp8_qkv(normed.y, w, x_fp8=normed.fp8, dw_sum=dw_sum, **options)

    def _project_out(self, layer: LayerInFp8, y: Tensor, w: Tensor, dw_sum: Tensor | None) -> Tensor:
        if not layer.has("attn_out"):
            return self.out(y, w, dw_sum=dw_sum)
        return self.fp8_out(y, w, dw_sum=dw_sum, **layer.linear("attn_out", "d_out", "out"))

    def _mlp(
        self,
        layer: LayerInFp8,
        normed: RMSNorm,
        weights: tuple[Tensor, Tensor],
        sums: tuple[Tensor | None, Tensor | None],
    ) -> Tensor:
        x, (up, down), (dup_sum, ddown_sum) = normed.y, weights, sums
        if not self.cfg.relu2:
            return F.gelu(self.up(x, up, dw_sum=dup_sum)) @ summed(down, ddown_sum)
        if not layer.has("mlp_up"):
            mlp = self.mlp if x.size(1) > 1 else self.mlp_of_few
            return mlp(x, up, down, dup_sum=dup_sum, ddown_sum=ddown_sum)
        if layer.sites:  # scales are known before: post and its gradient exist in fp8 alone
            return self.fp8_mlp(
                x, up, down, x_fp8=normed.fp8, dup_sum=dup_sum, ddown_sum=ddown_sum, **layer.mlp()
            )  # fmt: skip
        pre = self.fp8_up(x, up, x_fp8=normed.fp8, dw_sum=dup_sum, **layer.linear("mlp_up", "d_pre"))
        options = layer.linear("mlp_down", "d_mlp", "post")
        return self.fp8_down(F.relu(pre).square(), down, dw_sum=ddown_sum, transposed=True, **options)

    def hidden(self, idx: Tensor, cache: KVCache | None = None, *, branches: Branches | None = None) -> Tensor:
        """Token ids (B, T) -> normalised hidden states (B, T, C) in the compute type.

        With a cache, idx continues its rows: by one token each, or by the beginning of rows that are empty. With
        branches, a row holds several continuations of one beginning. Where cfg.within_documents, attention sees nothing
        before the last bos; that a row with a cache holds one document is up to the caller.
        """
        d, cfg = self.dims, self.cfg
        B, T = idx.shape
        if cache is not None:
            cache.begin(B, T)
        masks, seen = None, None
        if cache is not None and T == 1:  # each row at a position of its own
            (cos, sin), seen = cache.rope_tables(), cache.seen()
        elif branches is not None:
            tables = self.rope(branches.max_position + 1) or ()
            (cos, sin), masks = [t[branches.positions] for t in tables] or (None, None), branches.masks(d.windows)
        else:
            cos, sin = self.rope(T) or (None, None)
        documents = self._documents(idx) if cache is None and branches is None else None
        # each bank is unbound once: see core/layers.py
        qkv_w, out_w, up_w, down_w = map(unbind_banks, (self.attn_qkv, self.attn_out, self.mlp_up, self.mlp_down))
        # products in fp8 are for training: scores and samples are those of the weights as they are
        eight = self.in_fp8.layers() if self.in_fp8 and torch.is_grad_enabled() else [IN_BF16] * d.n_layer
        qkv_sum, out_sum, up_sum, down_sum = map(self._sums_of, ("attn_qkv", "attn_out", "mlp_up", "mlp_down"))
        resid = list(self.resid_lambdas.unbind()) if cfg.resid_lambdas else None
        share = self.x0_lambdas.unbind() if cfg.x0_lambdas else None
        ve: Sequence[Tensor] = ()
        gate_w: Sequence[Tensor] = ()
        if cfg.value_embeds:
            parts = {"parts": len(d.ve_layers), "dw_sum": self._sum_of("value_embeds")}
            ve = [
                part.unflatten(-1, (d.n_kv_head, d.d_head))
                for part in self.embed_values(idx, self.value_embeds, **parts)
            ]
            gate_w = unbind_banks(self.ve_gate)
        heads = {"heads": d.n_head, "kv_heads": d.n_kv_head, "scale": QK_SCALE, "norm": cfg.qk_norm}
        heads |= {"gate_range": VE_GATE_RANGE}

        (x,) = self.embed(idx, self.wte, dw_sum=self._sum_of("wte"))
        x = self.norm(x).y  # (B, T, C)
        if cfg.smear:
            x = self._smear(x, None if cache is None else cache.swap_embedding(x), branches)
        # x is the residual stream; x0, the embedding, enters every layer again [modded-nanogpt]. What an MLP adds waits
        # in `added` for the next norm, which reads it anyway: the sum is never a pass of its own
        x0, x_mid = x, None
        added: Tensor | None = None

        def layer(i: int, x: Tensor, x0: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            # entry: x <- resid (x + added) + share x0, in one pass with the norm where there is a share
            scale = None if resid is None else resid[i]
            first = VE_GATE_CHANNELS if i in d.ve_layers else 0
            to_fp8 = self._norm_scale(eight[i], "attn_qkv")
            if share is not None:
                normed = self.norm(x, x0, scale, share[i], x1=added, first=first, scale=to_fp8)
                x, x0 = normed.h, normed.x0
            else:
                x = x if added is None else x + added
                x = x if scale is None else scale * x
                normed = self.norm(x, first=first, scale=to_fp8)
            # attention
            # values get a share of a per-token embedding, gated per head from the first channels of the normed input
            gated: tuple[Tensor, ...] = ()
            if i in d.ve_layers:
                j = d.ve_layers.index(i)
                gated = normed.first, gate_w[j], ve[j]
            # q, k: rotated, normalised per head, scaled; with unit-norm q and k the scale sharpens the softmax
            qkv = self._project_in(eight[i], normed, qkv_w[i], qkv_sum[i])
            q, k, v = self.rope_qk_norm(qkv, cos, sin, *gated, **heads)
            if cache is not None:
                k, v = cache.extend(i, k, v)
            if seen is not None:
                y = self.decode_attention(q, k, v, seen[i])
            elif masks is not None:
                y = masked_attention(q, k, v, masks[i])
            else:
                y = self.attention[i](q, k, v, window=d.windows[i], documents=documents)
            y = self._project_out(eight[i], y.reshape(B, T, d.d_model), out_w[i], out_sum[i])
            # residual sum and second norm in one pass
            normed = self.norm(x, y, scale=self._norm_scale(eight[i], "mlp_up"))
            x = normed.h
            return x, x0, self._mlp(eight[i], normed, (up_w[i], down_w[i]), (up_sum[i], down_sum[i]))

        for i in range(d.n_layer):
            if self.at_stage is not None and i % params.BANK_LAYERS == 0 and torch.is_grad_enabled():
                stage = i // params.BANK_LAYERS + 1
                sums = [t for name in self.stages[stage] for t in self._sums[name]]
                # a scale of the layer's entry, on which all of the stage depends, costs less to mark than the stream
                if resid is not None:
                    resid[i] = self.at_stage(resid[i], stage, sums)
                else:
                    x = self.at_stage(x, stage, sums)
            x, x0, added = self.run_layer(layer, i, x, x0, added)
            # backout: what the middle layer knew is subtracted before the head, in the last norm's pass
            if cfg.backout and i == d.n_layer // 2:
                x = x_mid = x + added
                added = None
        if cache is not None:
            cache.advance(T)
        if cfg.backout:
            return self.norm(x, x_mid, None, -self.backout_lambda, x1=added).y
        return self.norm(x, added).y

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V) fp32 softcapped logits of the true vocabulary."""
        return softcapped_logits(hidden, self.lm_head, self.softcap, self.dims.vocab_size)

    def loss(self, hidden: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """Cross-entropy in nats, fp32, of hidden states (N, C) and targets (N,), of which -1 is ignored.

        reduction: "mean" over the targets that count, "sum", or "none" (N,), which has no gradient. The padded rows of
        the head are no part of the softmax, and their gradient is 0.
        """
        options: dict[str, Any] = {
            "softcap": self.softcap, "reduction": reduction, "vocab_size": self.dims.vocab_size,
            "dw_sum": self._sum_of("lm_head" if self.cfg.untied_head else "wte"),
        }  # fmt: skip
        if self.fp8_head and reduction != "none":
            options["fp8"] = Fp8Tensor(self.head_q, self.head_q_t, self.head_scale)
        return self.lm_head_loss(hidden, self.lm_head, targets, **options)

    def forward(self, idx: Tensor, targets: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """Logits (B, T, V), or with targets (B, T) the loss of all of them."""
        hidden = self.hidden(idx)
        return self.logits(hidden) if targets is None else self.loss(hidden.flatten(0, 1), targets.flatten(), reduction)
