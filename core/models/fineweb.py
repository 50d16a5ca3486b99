"""The transformer of track `fineweb`: the model of modded-nanogpt's record 89 (f411b3d3, train_gpt.py).

Dimensions   T tokens of one row, packed documents; C model, H heads of D channels, F = 4C MLP, V vocabulary, R rows of
             the bigram table; 11 layers, of which layer 6 has no attention
Layers       paired heads (0, 2, 5, 9), long windows with a key offset (3, 10); from layer 8 on attention reads what
             layer 7 made; layer 10 and the end mix saved streams by gates of each token (MUDD)
Parameters   `parameter_table`. q and k lie by pairs of heads, as Muon orthogonalises them; both MLP matrices are
             (4C, C)
Precision    as in core/models/gpt2.py
A feature is a row of `parameter_table`, a line of `Fineweb.hidden` and a test of its formula.

Departures from the peer, each where its code misses its intent or stores what nothing reads:
- The bigram hash of token 1 reads token 0 (there: the number that replaces the hash of token 0).
- Heads 2i and 2i + 1, which Muon orthogonalises together, are those that are paired (there: i and i + 3).
- Rotated channels are j and j + D/2 (there: 2j and 2j + 1): the same model with its channels in another order.
- Rows of parameters that no gradient reaches are left out: layer 6's and 10's entries of residual scales, one gate.
- The softmax's gradient is weighted by the targets that count (there, in a row's last tokens, by all).
- Matrices step by the ops of the other tracks: rows are equilibrated before Polar Express, with a safety of 1.01, and
  the result is scaled to norm sqrt(min(rows, cols)) (there: neither, and 1.02); NorMuon, its rates, momentum and
  cautious decay are the peer's. AdamW adds eps after the bias correction (there: before).
- Every table and matrix has an exact fp32 master and fp32 moments, rounded to nearest (there: truncated, tables
  without). Small parameters and angles are fp32 (there: bf16 but for scalars).
- Nothing multiplies in fp8 yet (there: the head, and the MLP forward).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import params
from core.config import FinewebConfig
from core.layers import unbind_banks, yarn
from core.params import MuonView, Param, alias, bank, constant, normal, uniform, values
from core.stages import STAGES, Stage, softmax_scale
from kernels.attention import attention
from kernels.dispatch import Backends
from kernels.embedding import embedding
from kernels.linear import linear
from kernels.lm_head_loss import Softcap, lm_head_loss, softcapped_logits
from kernels.relu2_mlp import relu2_mlp
from kernels.rms_norm import rms_norm
from kernels.rope_qk_norm import rope_qk_norm
from kernels.sizes import round_up
from kernels.windows import documents_of, visible

LAYERS = 11
NO_ATTENTION = 6
ATTENTION = tuple(i for i in range(LAYERS) if i != NO_ATTENTION)
PAIRED = (0, 2, 5, 9)  # two heads see one sequence in which their tokens alternate
LONG = (3, 10)  # long windows; half of a key's channels are those of the token before
GATED_VALUES = (1, 2, 8, 9)  # a table of values each; layer 10's comes through the gates of the mix
XSA = (1, 3, 4, 7)  # less of what points along the token's own value
GENERIC = tuple(i for i in ATTENTION if i != LAYERS - 1)  # of equal residual arithmetic
FROM_SAVED = 8  # attention of this layer and later ones reads the stream after layer 7
SOFTCAP = Softcap(23.0, 5.0, 7.5)
HASH, SIGN_ROWS = (36_313, 27_191), 8192
VE_CHANNELS = 6  # of a normed input, and of a token's values, that a gate reads
SMEAR_CHANNELS = 12
GATE_HIDDEN, GATE_SCALE = 64, 0.1  # of the nets that make gates
ROPE_BASE = 1024.0
YARN_TURNS = (1.0, 32.0)  # in the old window: frequencies of fewer turns are stretched with it, of more left alone
LOCAL_KEYS = 112  # that composed heads see
LOCAL_EPS, XSA_EPS = 1e-6, 1e-8

# what the nets make of each token, in this order: before the layers of the embedding, and at layer 4 of the stream.
# Their first values stand beside them; "x0" and "bigram" are shares of those streams that a layer takes in
GATES: tuple[tuple[tuple[str, int, float], ...], ...] = (
    (
        ("xsa.1", 6, 0.0), ("xsa.3", 6, 0.0), ("out.3", 6, 0.25),
        *((f"{name}.{i}", 1, value) for i in range(4) for name, value in (("x0", 0.0), ("bigram", 0.05))),
    ),
    (
        ("xsa.4", 6, 0.0), ("xsa.7", 6, 0.0), ("out.10", 6, 0.25),
        *((f"{name}.{i}", 1, value) for i in (4, 5, 7, 8, 9) for name, value in (("x0", 0.0), ("bigram", 0.05))),
        ("skip", 1, 0.5), ("local.in", 6, 1.0), ("local.out", 6, 0.0),
    ),
)  # fmt: skip
GATE_LAYER = 4
RESIDUAL = 1.1**0.5  # growth of the stream in each half of a layer, at first
# coefficients of the mixes: of layer 10, and after it
MIX = (
    ("v.c0", 0.0), ("v.c7", 0.0), ("v.x", 0.0), ("x.c0", 0.0), ("x.c7", 0.0), ("x.x", 0.0), ("ve.0", 2.0),
    ("ve.1", 2.0), ("attn.x", RESIDUAL), ("attn.y", 1.0), ("attn.c0", 0.0), ("attn.bigram", 0.05), ("mlp.x", RESIDUAL),
    ("mlp.y", 1.0),
)  # fmt: skip
LAST_MIX = (("c0", 0.0), ("c7", -0.5), ("c9", 0.0), ("ve", 0.0), ("c3", 0.0))

# betas of AdamW, factors on its rate and on its decay
ADAM_LR, ADAM_DECAY = 0.008, 0.005
ADAM = {
    "lm_head": ((0.5, 0.95), 1.0, 150.0),
    "wte": ((0.5, 0.95), 1.0, 150.0),
    "value_embeds": ((0.75, 0.95), 75.0, 5.0),
    "bigram_embed": ((0.75, 0.95), 75.0, 5.0),
    "attn_scales": ((0.9, 0.99), 5.0, 0.0),
    "smear_gate": ((0.9, 0.99), 0.01, 0.0),
    "ve_gate": ((0.9, 0.99), 1.0, 1.0),
    "resid": ((0.9, 0.95), 5.0, 0.0),
    "post": ((0.9, 0.95), 1.0, 0.0),
    "mix": ((0.9, 0.99), 0.25, 1.0),
    "mix_bias": ((0.9, 0.99), 0.25, 0.0),
    "gates": ((0.9, 0.99), 0.1, 1.0),
    "gates_bias": ((0.9, 0.99), 0.1, 0.0),
}
MUON_LR, MUON_DECAY = 0.023, 1.2
DOWN_LR = 2.0  # factor on the rate of the MLP's second matrix, beside that of tall ones

COUNTED = ("wte", "lm_head", "value_embeds", "bigram_embed", "transformer_matrices", "scalars")


# parameters


def padded_vocab(cfg: FinewebConfig) -> int:
    return round_up(cfg.vocab_size, 64)


def bigram_rows(cfg: FinewebConfig) -> int:
    return 15 * padded_vocab(cfg) // 2


def parameter_table(cfg: FinewebConfig) -> params.Table:
    H, C, F_, V = cfg.n_head, cfg.d_model, 4 * cfg.d_model, padded_vocab(cfg)
    width = 0.5 * (3 / C) ** 0.5  # of a uniform distribution with standard deviation 1 / (2 sqrt(C))
    matrix, hidden = uniform(-width, width), uniform(-(C**-0.5), C**-0.5)
    lookup: dict[str, Any] = {"computes": True, "mastered": True}
    head: dict[str, Any] = lookup | {"multiplies": True}
    n = len(ATTENTION)
    tall = 2.0  # sqrt(4C / C), also of the second matrix as it is stored
    rows = [
        *bank("attn_qk", n, 2 * H * cfg.d_head, C, matrix, MuonView(split=H)),
        *bank("attn_v", n, C, C, matrix),
        *bank("attn_out", n, C, C, matrix),
        *bank("mlp_up", LAYERS, F_, C, matrix, MuonView(lr=tall)),
        *bank("mlp_down", LAYERS, F_, C, constant(0.0), MuonView(lr=tall * DOWN_LR)),
        Param("wte", (V, C), normal(0.005), "wte", "wte", **lookup),
        Param("lm_head", (V, C), normal(0.005), "lm_head", "lm_head", **head),
        Param("value_embeds", (V, 5 * C), normal(0.01), "value_embeds", "value_embeds", **lookup),
        Param("bigram_embed", (bigram_rows(cfg), C), constant(0.0), "bigram_embed", "bigram_embed", **lookup),
    ]

    def small(name: str, shape: tuple[int, ...], init: params.Init, group: str) -> None:
        rows.append(Param(name, shape, init, group, "scalars"))

    small("ve_gate", (len(GATED_VALUES), H, 2 * VE_CHANNELS), constant(0.0), "ve_gate")
    small("smear_gate", (1, SMEAR_CHANNELS), constant(0.0), "smear_gate")
    small("smear_lambda", (1,), constant(0.0), "attn_scales")
    small("skip_lambda", (1,), constant(-1.5), "attn_scales")
    small("qkv_scales", (n,), constant(0.5), "attn_scales")
    small("out_scales", (n,), constant(1.0), "attn_scales")
    small("attn_resid", (len(GENERIC),), constant(RESIDUAL), "resid")
    small("mlp_resid", (LAYERS - 1,), constant(RESIDUAL), "resid")
    small("attn_post", (len(GENERIC),), constant(1.0), "post")
    small("mlp_post", (LAYERS - 1,), constant(1.0), "post")
    first_values = [[v for _, n, v in net for _ in range(n)] for net in GATES]
    for kind, nets in (("gates", first_values), ("mix", [[v for _, v in net] for net in (MIX, LAST_MIX)])):
        for i, biases in enumerate(nets):
            small(f"{kind}_w1_{i}", (GATE_HIDDEN, C), hidden, kind)
            small(f"{kind}_w2_{i}", (len(biases), GATE_HIDDEN), constant(0.0), kind)
            small(f"{kind}_bias_{i}", (len(biases),), values([b / GATE_SCALE for b in biases]), f"{kind}_bias")
    small("gates_scale", (1,), constant(GATE_SCALE), "gates_bias")
    return tuple(rows)


# formulas


def bigram_ids(idx: Tensor, rows: int) -> Tensor:
    """Row of the bigram table of each token (T,) and the one before it; the first token's is the last row."""
    ids = (HASH[0] * idx[1:]).bitwise_xor(HASH[1] * idx[:-1]) % (rows - 1)
    return F.pad(ids, (1, 0), value=rows - 1)


def sign_ids(idx: Tensor) -> Tensor:
    """Row of the table of signs of each token (T,) and the one before it."""
    return F.pad(idx[1:].bitwise_xor(idx[:-1]) % SIGN_ROWS, (1, 0))


def smeared(x: Tensor, gate: Tensor, share: Tensor) -> Tensor:
    """x (T, C) with a gated share of each token's predecessor."""
    later = x[1:]
    return torch.cat((x[:1], later + share * torch.sigmoid(later[:, :SMEAR_CHANNELS] @ gate.T) * x[:-1]))


def net(x: Tensor, w1: Tensor, w2: Tensor, bias: Tensor, scale: Tensor | float) -> Tensor:
    """Gates (T, n) of x (T, C)."""
    return scale * (F.linear(F.gelu(F.linear(x, w1)), w2, bias))


def rope_frequencies(d_head: int) -> Tensor:
    """Angle a position of each pair of channels (D/2,) fp32: half of the pairs are not rotated."""
    n = d_head // 4
    turned = ROPE_BASE ** -(torch.arange(n, dtype=torch.float32) / max(n - 1, 1))
    return torch.cat((turned, torch.zeros(d_head // 2 - n)))


def offset_keys(k: Tensor) -> Tensor:
    """k (T, H, D), of which the channels that are not rotated are those of the token before: a key tells what follows
    it."""
    n = k.size(-1) // 4
    before = torch.cat((k[:1], k[:-1]))
    turned, before = (t.unflatten(-1, (2, 2, n)) for t in (k, before))  # (…, half, rotated or not, n)
    return torch.stack((turned[..., 0, :], before[..., 1, :]), dim=-2).flatten(-3)


def away_from_values(y: Tensor, v: Tensor, alpha: Tensor) -> Tensor:
    """y (T, H, D) less tanh(alpha) times its part along the token's own value. alpha: (T, H)."""
    along = (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp_min(XSA_EPS)
    return y - torch.tanh(alpha)[..., None] * along * v


def local_composition(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, into: Tensor, out: Tensor, *, scale: float, keys: int = LOCAL_KEYS
) -> Tensor:
    """What composed heads add: out_h (sum_g into_g P_g) V_h, with P_g the softmax of head g over the last `keys` keys
    of the document [DCMHA, arXiv 2405.08553, its post-composition].

    q, k, v (T, H, D); into, out (T, H); first (T,): first token of each token's document. In blocks of `keys` queries,
    which see their own block and the one before."""
    T, H, D = q.shape
    blocks = -(-T // keys)
    pad = blocks * keys - T
    q, k, v = (F.pad(t, (0, 0, 0, 0, 0, pad)).view(blocks, keys, H, D) for t in (q, k, v))
    k, v = (torch.cat((F.pad(t, (0, 0, 0, 0, 0, 0, 1, 0))[:-1], t), dim=1) for t in (k, v))  # (blocks, 2 keys, H, D)
    i = torch.arange(blocks * keys, device=q.device).view(blocks, keys, 1)
    j = i[:, :1] - keys + torch.arange(2 * keys, device=q.device)
    start = F.pad(first, (0, pad)).view(blocks, keys, 1)
    seen = (j <= i) & (j > i - keys) & (j >= start)
    scores = torch.einsum("bihd,bjhd->bhij", q, k).to(torch.promote_types(q.dtype, torch.float32)) * scale
    p = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).to(v.dtype)
    p = torch.einsum("bhij,bih->bij", p, F.pad(into, (0, 0, 0, pad)).view(blocks, keys, H))
    y = torch.einsum("bij,bjhd->bihd", p, v).reshape(blocks * keys, H, D)[:T]
    return out[..., None] * y


def shifted_targets(targets: Tensor, prefixes: Tensor, n: int) -> Tensor:
    """(T, n + 1): the n tokens that follow each position, of which `targets` (T,) has the first, and the longest prefix
    of that one; -1 where there is none."""
    T = len(targets)
    ahead = F.pad(targets, (0, n - 1), value=-1)
    return torch.stack((*(ahead[k : k + T] for k in range(n)), prefixes[targets]), dim=1)


# the model


class AtStage(NamedTuple):
    """What forward needs to know of a part of the run. scale: of attention's scores."""

    short: int
    long: int
    scale: float


def at_stage(stages: Sequence[Stage], number: int) -> AtStage:
    """Of a stage of a run."""
    s = stages[number]
    return AtStage(s.short, s.long, softmax_scale([s.long for s in stages[: number + 1]]))


class Fineweb(nn.Module):
    """The language model. Build it on a device and call `init_weights`."""

    attn_qk: nn.ParameterList
    attn_v: nn.ParameterList
    attn_out: nn.ParameterList
    mlp_up: nn.ParameterList
    mlp_down: nn.ParameterList
    wte: nn.Parameter
    lm_head: nn.Parameter
    value_embeds: nn.Parameter
    bigram_embed: nn.Parameter
    ve_gate: nn.Parameter
    smear_gate: nn.Parameter
    smear_lambda: nn.Parameter
    skip_lambda: nn.Parameter
    qkv_scales: nn.Parameter
    out_scales: nn.Parameter
    attn_resid: nn.Parameter
    mlp_resid: nn.Parameter
    attn_post: nn.Parameter
    mlp_post: nn.Parameter
    gates_scale: nn.Parameter
    signs: Tensor
    prefixes: Tensor
    frequencies: Tensor

    def __init__(
        self, cfg: FinewebConfig, backends: Backends | None = None, *, stages: Sequence[Stage] = STAGES
    ) -> None:
        """backends: of the ops (None: references); stages: of the run, for rows of whose lengths ops are chosen."""
        super().__init__()
        self.cfg, self.table, self.stages_of_run = cfg, parameter_table(cfg), tuple(stages)
        params.register(self, self.table)
        device = self.lm_head.device
        backends = backends or Backends("ref", device=device, dtype=torch.float32)
        C, D, H, V, T = cfg.d_model, cfg.d_head, cfg.n_head, padded_vocab(cfg), max(s.row_tokens for s in stages)
        self.norm = backends.choose(rms_norm, T, C)
        self.rope_qk_norm = backends.choose(rope_qk_norm, 1, T, H, H, D)
        self.rope_of_pairs = backends.choose(rope_qk_norm, 1, 2 * T, H // 2, H // 2, D)
        self.qkv = backends.choose(linear, T, C, 3 * C)
        self.out = backends.choose(linear, T, C, C)
        self.mlp = backends.choose(relu2_mlp, T, C, 4 * C)
        self.embed = backends.choose(embedding, T, V, C)
        self.embed_values = backends.choose(embedding, T, V, 5 * C)
        self.embed_bigrams = backends.choose(embedding, T, bigram_rows(cfg), C)
        self.lm_head_loss = backends.choose(lm_head_loss, T, C, V)
        windows = {(2 * T, H // 2, s.short, 2 * s.doc_cap) for s in stages}
        windows |= {(T, H, w, s.doc_cap) for s in stages for w in (s.short, s.long)}
        # by sequence (T, or 2T of paired heads), heads and window: what can run does not depend on more
        self.attention = {
            (heads, w): backends.choose_fitting(attention, 1, t, heads, heads, D, visible(t, w), longest)
            for t, heads, w, longest in sorted(windows)
        }
        self._any_attention = {heads: f for (heads, _), f in self.attention.items()}
        self.register_buffer("signs", torch.ones(SIGN_ROWS, C, device=device), persistent=False)
        self.register_buffer("prefixes", torch.full((V,), -1, dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("frequencies", rope_frequencies(D).to(device), persistent=False)
        self.tied = True  # the head is the embedding, too; then both go on from it
        self._sums: dict[str, Tensor] = {}
        self.at_stage: Callable[[Tensor, int, Sequence[Tensor]], Tensor] | None = (
            None  # see core/exchange.py: all parameters are one stage, and leave after backward
        )
        self.copies: list[Callable[[], None]] = []

    # weights --------------------------------------------------------------

    def init_weights(self, seed: int) -> None:
        params.init_weights(self, self.table, seed)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            self.signs.copy_(torch.randint(2, self.signs.shape, generator=generator) * 2 - 1)
            self.frequencies.copy_(rope_frequencies(self.cfg.d_head))
            self.wte.copy_(self.lm_head)
        self.refresh_copies()

    def refresh_copies(self, names: Sequence[str] | None = None) -> None:
        """Whoever writes weights calls it when done."""
        if names is None:
            for copy in self.copies:
                copy()

    def accumulate(self, sums: Mapping[str, Tensor]) -> None:
        """From now on backward adds the gradients of the MLP, the tables and the head to these fp32 tensors, by
        parameter name, and autograd gives them none."""
        self._sums = {name: t for name, t in sums.items() if name.partition(".")[0] in ADDED}
        self._of_layers = {
            kind: [alias(t) for name, total in sums.items() if name.startswith(f"{kind}.") for t in total.unbind()]
            for kind in ("mlp_up", "mlp_down")
        }

    def _sum_of(self, name: str) -> Tensor | None:
        return self._sums.get(name)

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        return (tuple(p.name for p in self.table),)

    @torch.no_grad()
    def widen(self, before: int, after: int) -> None:
        """Stretches rotary frequencies where long windows grow from `before` tokens to `after`."""
        self.frequencies.copy_(yarn(self.frequencies, before, after, YARN_TURNS))

    # forward --------------------------------------------------------------

    def _qkv_weights(self, i: int, qk: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        """(3C, C): of paired heads the first of each pair, q, k and v, then the second of each. Those of q and k lie
        pair by pair, because Muon takes pairs; the order of v, as that of the output's columns, is free."""
        if i in PAIRED:
            pairs, C = self.cfg.n_head // 2, self.cfg.d_model
            qk = qk.view(2 * pairs, 2, -1, C).transpose(0, 1).reshape(2, -1, C)
            w = torch.cat((qk, v.view(2, -1, C)), dim=1).view(-1, C)
        else:
            w = torch.cat((qk, v))
        return scale.to(w.dtype) * w

    def hidden(self, idx: Tensor, cu_seqlens: Tensor, longest: int, at: AtStage) -> Tensor:
        """Token ids (T,) of packed documents, which begin at cu_seqlens and have at most `longest` tokens -> normalised
        hidden states (T, C) in the compute type."""
        cfg, idx = self.cfg, idx.long()
        H, C, dtype, T = cfg.n_head, cfg.d_model, self.lm_head.dtype, len(idx)
        documents = documents_of(cu_seqlens, longest, T, T)
        pairs = documents_of(2 * cu_seqlens, 2 * longest, 2 * T, 2 * T)
        angle = torch.arange(2 * T, dtype=torch.float32, device=idx.device)[:, None] * self.frequencies
        cos, sin = angle.cos(), angle.sin()
        # each bank is unbound once: see core/layers.py
        banks = (self.attn_qk, self.attn_v, self.attn_out, self.mlp_up, self.mlp_down)
        qk_w, v_w, out_w, up_w, down_w = map(unbind_banks, banks)
        up_sum, down_sum = (self._of_layers[k] if self._sums else [None] * LAYERS for k in ("mlp_up", "mlp_down"))
        qkv_scales, out_scales, ve_gate = self.qkv_scales.unbind(), self.out_scales.to(dtype).unbind(), self.ve_gate
        resid = [t.to(dtype).unbind() for t in (self.attn_resid, self.attn_post, self.mlp_resid, self.mlp_post)]
        attn_resid, attn_post, mlp_resid, mlp_post = resid

        def norm(x: Tensor) -> Tensor:
            return self.norm(x).y

        def gates(kind: str, i: int, x: Tensor, names: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
            w1, w2, bias = (getattr(self, f"{kind}_{part}_{i}").to(dtype) for part in ("w1", "w2", "bias"))
            scale = self.gates_scale.to(dtype) if kind == "gates" else GATE_SCALE
            parts = net(x, w1, w2, bias, scale).split([n for _, n in names], dim=-1)
            return dict(zip([name for name, _ in names], parts))

        def attend(i: int, a: Tensor, mix: dict[str, Tensor] | None = None) -> Tensor:
            """Attention of layer i on a normed input (T, C); mix: layer 10's coefficients."""
            j, window = ATTENTION.index(i), at.long if i in LONG else at.short
            w = self._qkv_weights(i, qk_w[j], v_w[j], qkv_scales[j])
            of_values: tuple[Tensor, ...] = ()
            if i in PAIRED:
                P = H // 2
                qkv = self.qkv(a, w).view(1, 2 * T, -1)  # token by token the first heads of pairs, then the second
                if i in GATED_VALUES:
                    # the gates of first and second heads have weights of their own: each reads its half of 24 numbers
                    read, g = self._gate_inputs(i, a, ve), ve_gate[GATED_VALUES.index(i)].to(dtype)
                    zeros = torch.zeros_like(read)
                    read = torch.stack((torch.cat((read, zeros), -1), torch.cat((zeros, read), -1)), dim=1)
                    g = torch.cat((g[:P], g[P:]), dim=1)
                    of_values = read.view(1, 2 * T, -1), g, ve[i].reshape(1, 2 * T, P, -1)
                q, k, v = self.rope_of_pairs(qkv, cos, sin, *of_values, heads=P, kv_heads=P, gate_range=2.0)
                y = self._attention(P, at.short)(q, k, v, window=at.short, scale=at.scale, documents=pairs)
                return self.out(y.view(T, C), out_scales[j] * out_w[j])
            if i in GATED_VALUES:
                read, g = self._gate_inputs(i, a, ve), ve_gate[GATED_VALUES.index(i)].to(dtype)
                of_values = read[None], g, ve[i].unflatten(-1, (H, -1))[None]
            qkv = self.qkv(a, w)[None]
            q, k, v = self.rope_qk_norm(qkv, cos[:T], sin[:T], *of_values, heads=H, kv_heads=H, gate_range=2.0)
            if mix is not None:
                own = mix["v.c0"] * c0 + mix["v.c7"] * c7 + mix["v.x"] * x
                halves = torch.cat((mix["ve.0"].expand(-1, H // 2), mix["ve.1"].expand(-1, H - H // 2)), dim=1)
                v = v + (own.view(T, H, -1) + halves[..., None] * ve[i].unflatten(-1, (H, -1)))[None]
            if i in LONG:
                k = offset_keys(k[0])[None]
            y = self._attention(H, window)(q, k, v, window=window, scale=at.scale, documents=documents)[0]
            if mix is not None:
                into = F.rms_norm(gate["local.in"], (H,), eps=LOCAL_EPS)
                y = y + local_composition(
                    q[0], k[0], v[0], documents.first, into, gate["local.out"], scale=at.scale, keys=cfg.local_keys
                )
            if i in XSA:
                y = away_from_values(y, v[0], gate[f"xsa.{i}"])
            if i in LONG:
                y = y * gate[f"out.{i}"][..., None]
            return self.out(y.reshape(T, C), out_scales[j] * out_w[j])

        def mlp(i: int, x: Tensor) -> Tensor:
            return self.mlp(norm(x), up_w[i], down_w[i], dup_sum=up_sum[i], ddown_sum=down_sum[i])

        # input: embedding with a share of the one before, bigrams by their hash
        table = "lm_head" if self.tied else "wte"
        (e,) = self.embed(idx, getattr(self, table), dw_sum=self._sum_of(table))
        x0 = norm(smeared(e, self.smear_gate.to(dtype), self.smear_lambda.to(dtype)))
        (b,) = self.embed_bigrams(
            bigram_ids(idx, len(self.bigram_embed)), self.bigram_embed, dw_sum=self._sum_of("bigram_embed")
        )
        b = b * self.signs[sign_ids(idx)].to(dtype)
        parts = self.embed_values(idx, self.value_embeds, parts=5, dw_sum=self._sum_of("value_embeds"))
        ve = dict(zip((*GATED_VALUES, LAYERS - 1), parts))
        before, later = ([(name, n) for name, n, _ in g] for g in GATES)
        gate = gates("gates", 0, x0, before)
        x = c0 = x0 + gate["bigram.0"] * b
        c3 = c7 = x0
        # layers
        for i in range(LAYERS - 1):
            if i == GATE_LAYER:
                gate |= gates("gates", 1, x, later)
            if i == NO_ATTENTION:
                x = x + torch.sigmoid(self.skip_lambda).to(dtype) * gate["skip"] * c3
            else:
                g = GENERIC.index(i)
                y = attend(i, norm(c7 if i >= FROM_SAVED else x))
                x = attn_resid[g] * x + attn_post[g] * y + gate[f"x0.{i}"] * x0
                if i > 0:  # layer 0 begins with its share
                    x = x + gate[f"bigram.{i}"] * b
            x = mlp_resid[i] * x + mlp_post[i] * mlp(i, x)
            c3, c7 = (x if i == 3 else c3), (x if i == 7 else c7)
        # layer 10 mixes the streams that were kept, by coefficients of each token, and so does the end
        c9 = x
        m = gates("mix", 0, x, [(name, 1) for name, _ in MIX])
        y = attend(LAYERS - 1, norm(c7), m)
        x = (1 + m["x.x"]) * x + m["x.c0"] * c0 + m["x.c7"] * c7
        x = m["attn.x"] * x + m["attn.y"] * y + m["attn.c0"] * c0 + m["attn.bigram"] * b
        x = m["mlp.x"] * x + m["mlp.y"] * mlp(LAYERS - 1, x)
        last = gates("mix", 1, x, [(name, 1) for name, _ in LAST_MIX])
        x = x + last["c0"] * c0 + last["c7"] * c7 + last["c9"] * c9 + last["ve"] * ve[1] + last["c3"] * c3
        return norm(x)

    def _gate_inputs(self, i: int, a: Tensor, ve: Mapping[int, Tensor]) -> Tensor:
        """(T, 12): what the gate of a token's values reads."""
        return torch.cat((a[:, :VE_CHANNELS], ve[i][:, :VE_CHANNELS]), dim=-1)

    def _attention(self, heads: int, window: int) -> Callable[..., Tensor]:
        return self.attention.get((heads, window)) or self._any_attention[heads]

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, C) -> (T, V) fp32 softcapped logits of the true vocabulary."""
        return softcapped_logits(hidden, self.lm_head, SOFTCAP, self.cfg.vocab_size)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor,
        cu_seqlens: Tensor,
        longest: int,
        at: AtStage,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Loss in nats of row (T,), fp32, summed over its tokens.

        targets: (T,), the next tokens. weights: (K + 1,) fp32, of the next K tokens and of the next one's longest
        prefix; None: the next one alone."""
        hidden = self.hidden(idx, cu_seqlens, longest, at)
        options: dict[str, Any] = {
            "softcap": SOFTCAP, "reduction": "sum", "vocab_size": self.cfg.vocab_size,
            "dw_sum": self._sum_of("lm_head"),
        }  # fmt: skip
        if weights is not None:
            targets = shifted_targets(targets, self.prefixes, len(weights) - 1)
            options["weights"] = weights.expand(len(targets), -1).contiguous()
        return self.lm_head_loss(hidden, self.lm_head, targets, **options)


ADDED = ("mlp_up", "mlp_down", "wte", "lm_head", "value_embeds", "bigram_embed")  # whose ops add gradients to sums


def flops_per_token(cfg: FinewebConfig, stage: Stage) -> int:
    """Training FLOPs a token: 6 per parameter that multiplies, 12 C w per layer for attention (w the window). Nets of
    gates are left out."""
    windows = sum(stage.long if i in LONG else stage.short for i in ATTENTION)
    return 6 * params.matmul_params(parameter_table(cfg)) + 12 * cfg.d_model * windows
