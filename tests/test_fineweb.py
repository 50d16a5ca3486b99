"""The model of track fineweb: each formula in float64, the whole against a transcription, gradients, sums, sizes."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.config import FinewebConfig
from core.layers import yarn
from core.models import fineweb as module
from core.models.fineweb import (
    ADAM,
    COUNTED,
    GATES,
    LAST_MIX,
    MIX,
    SOFTCAP,
    YARN_TURNS,
    AtStage,
    Fineweb,
    at_stage,
    away_from_values,
    bigram_ids,
    bigram_rows,
    local_composition,
    offset_keys,
    padded_vocab,
    parameter_table,
    rope_frequencies,
    shifted_targets,
    sign_ids,
)
from core.params import MUON, arenas, num_params
from core.stages import (
    FLOOR,
    STAGES,
    VALIDATION,
    last_tied_step,
    lr_multiplier,
    muon_momentum,
    scaled,
    scheduled_steps,
    softmax_scale,
    stage_of,
    target_weights,
    total_steps,
    updates_tables,
)
from kernels.dispatch import Backends
from kernels.rms_norm import EPS
from tests.harness import DEVICE

CFG = FinewebConfig(d_head=8, vocab_size=90, local_keys=5)
STAGE = dataclasses.replace(STAGES[0], row_tokens=24, doc_cap=16, short=4, long=9)
AT = AtStage(short=4, long=9, scale=0.3)
BEGINS = [0, 7, 8, 20, 24, 24]
CU = torch.tensor(BEGINS, dtype=torch.int32, device=DEVICE)


def awake(cfg=CFG, dtype=torch.float64, seed=0, size=0.3):
    """A model in which every path carries something: what begins at 0 does not. size: of what is added."""
    with torch.device(DEVICE):
        model = Fineweb(cfg, stages=[STAGE])
    model.init_weights(seed)
    model.tied = False
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator).to(DEVICE)
        p.data = (p.data + (size if p.dim() < 3 and "embed" not in name else size / 3) * noise).to(dtype)
    model.prefixes[: cfg.vocab_size : 2] = torch.arange(0, cfg.vocab_size, 2, device=DEVICE) // 2
    quarter = cfg.d_head // 4
    turned = 1024.0 ** (-torch.arange(quarter, dtype=torch.float64) / (quarter - 1))
    model.frequencies = torch.cat((turned, torch.zeros(quarter))).to(DEVICE, dtype)
    return model


def tokens(seed=0, cfg=CFG, T=STAGE.row_tokens):
    return torch.randint(cfg.vocab_size, (T,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


# the whole model ------------------------------------------------------------


def normed(x, eps=EPS):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rotated(z: Tensor, positions: Tensor, d_head: int) -> Tensor:
    """z (n, D): half of the channel pairs (j, j + D/2) turned by minus the angle."""
    out = z.clone()
    quarter, half = d_head // 4, d_head // 2
    for j in range(quarter):
        w = 1024.0 ** (-j / max(quarter - 1, 1))
        c, s = (positions * w).cos(), (positions * w).sin()
        out[:, j] = c * z[:, j] + s * z[:, j + half]
        out[:, j + half] = c * z[:, j + half] - s * z[:, j]
    return out


def attended(q, k, v, window, documents, scale):
    """One head over n rows; documents: number of each row's."""
    i = torch.arange(len(q))
    seen = (i[None] <= i[:, None]) & (i[:, None] - i[None] <= window) & (documents[:, None] == documents[None])
    p = (scale * q @ k.T).masked_fill(~seen, -torch.inf).softmax(-1)
    return p @ v


def plain_hidden(model: Fineweb, idx: Tensor) -> Tensor:
    """The forward of the fact sheet layer by layer and head by head, without the model's helpers."""
    cfg, at = model.cfg, AT
    H, D, C, T = cfg.n_head, cfg.d_head, cfg.d_model, len(idx)
    p = {n: v.detach().cpu() for n, v in model.named_parameters()}
    banks = {k: torch.cat([v for n, v in p.items() if n.startswith(f"{k}.")]) for k in
             ("attn_qk", "attn_v", "attn_out", "mlp_up", "mlp_down")}  # fmt: skip
    idx, signs = idx.cpu(), model.signs.cpu().double()
    document = torch.tensor([sum(t >= b for b in BEGINS[1:]) for t in range(T)])

    def net(x, kind, i, scale):
        h = F.gelu(x @ p[f"{kind}_w1_{i}"].T)
        return scale * (h @ p[f"{kind}_w2_{i}"].T + p[f"{kind}_bias_{i}"])

    e = p["wte"][idx]
    smear = e.clone()
    for t in range(1, T):
        gate = torch.sigmoid(e[t, :12] @ p["smear_gate"][0])
        smear[t] = e[t] + p["smear_lambda"] * gate * e[t - 1]
    x0 = normed(smear)
    R = len(p["bigram_embed"])
    b = torch.empty(T, C, dtype=torch.float64)
    for t in range(T):
        now, before = int(idx[t]), int(idx[t - 1])
        row = R - 1 if t == 0 else ((36313 * now) ^ (27191 * before)) % (R - 1)
        b[t] = p["bigram_embed"][row] * signs[0 if t == 0 else (before ^ now) % 8192]
    ve = p["value_embeds"][idx].view(T, 5, C)
    pre = net(x0, "gates", 0, p["gates_scale"])
    gate = {"xsa1": pre[:, 0:6], "xsa3": pre[:, 6:12], "out3": pre[:, 12:18]}
    for i in range(4):
        gate[f"x0{i}"], gate[f"b{i}"] = pre[:, 18 + 2 * i, None], pre[:, 19 + 2 * i, None]

    def value_gate(j, a, h):  # of head h
        return 2 * torch.sigmoid(torch.cat((a[:, :6], ve[:, j, :6]), 1) @ p["ve_gate"][j, h])

    def project(i, a, m=None, streams=None):
        l = i if i < 6 else i - 1
        qk, v_w = p["qkv_scales"][l] * banks["attn_qk"][l], p["qkv_scales"][l] * banks["attn_v"][l]
        j = {1: 0, 2: 1, 8: 2, 9: 3}.get(i)
        y = torch.empty(T, C, dtype=torch.float64)
        if i in (0, 2, 5, 9):
            for pair in range(H // 2):
                q, k, v = (torch.empty(2 * T, D, dtype=torch.float64) for _ in range(3))
                for parity in range(2):
                    at_row = slice((2 * pair + parity) * D, (2 * pair + parity + 1) * D)
                    q[parity::2], k[parity::2] = a @ qk[at_row].T, a @ qk[H * D :][at_row].T
                    h = parity * (H // 2) + pair  # values and outputs: first heads, then second ones
                    v[parity::2] = a @ v_w[h * D : (h + 1) * D].T
                    if j is not None:
                        v[parity::2] += value_gate(j, a, h)[:, None] * ve[:, j, h * D : (h + 1) * D]
                at_rows = torch.arange(2 * T, dtype=torch.float64)
                q, k = (normed(rotated(t, at_rows, D)) for t in (q, k))
                o = attended(q, k, v, at.short, document.repeat_interleave(2), at.scale)
                for parity in range(2):
                    h = parity * (H // 2) + pair
                    y[:, h * D : (h + 1) * D] = o[parity::2]
            return y @ (p["out_scales"][l] * banks["attn_out"][l]).T
        window = at.long if i in (3, 10) else at.short
        heads = []
        for h in range(H):
            rows = slice(h * D, (h + 1) * D)
            q, k, v = a @ qk[rows].T, a @ qk[H * D :][rows].T, a @ v_w[rows].T
            if j is not None:
                v = v + value_gate(j, a, h)[:, None] * ve[:, j, rows]
            at_rows = torch.arange(T, dtype=torch.float64)
            q, k = (normed(rotated(t, at_rows, D)) for t in (q, k))
            if m is not None:
                c0, c7, x = streams
                own = m[:, 0, None] * c0 + m[:, 1, None] * c7 + m[:, 2, None] * x
                v = v + own[:, rows] + m[:, 6 if h < H // 2 else 7, None] * ve[:, 4, rows]
            if i in (3, 10):
                still = [c for c in range(D) if (c % (D // 2)) >= D // 4]
                k[1:, still] = k[:-1, still].clone()
            heads.append((q, k, v, attended(q, k, v, window, document, at.scale)))
        if m is not None:
            w1 = normed(gate["local.in"], 1e-6)
            local = sum(
                w1[:, h, None]
                * attended(q, k, torch.eye(T, dtype=torch.float64), cfg.local_keys - 1, document, at.scale)
                for h, (q, k, _, _) in enumerate(heads)
            )
            heads = [(q, k, v, o + gate["local.out"][:, h, None] * (local @ v)) for h, (q, k, v, o) in enumerate(heads)]
        for h, (_, _, v, o) in enumerate(heads):
            if i in (1, 3, 4, 7):
                along = (o * v).sum(-1) / v.square().sum(-1).clamp_min(1e-8)
                o = o - torch.tanh(gate[f"xsa{i}"][:, h, None]) * along[:, None] * v
            if i in (3, 10):
                o = o * gate[f"out{i}"][:, h, None]
            y[:, h * D : (h + 1) * D] = o
        return y @ (p["out_scales"][l] * banks["attn_out"][l]).T

    def mlp(i, x):
        return torch.relu(normed(x) @ banks["mlp_up"][i].T).square() @ banks["mlp_down"][i]

    x = c0 = x0 + gate["b0"] * b
    c3 = c7 = None
    n = 0
    for i in range(10):
        if i == 4:
            later = net(x, "gates", 1, p["gates_scale"])
            gate |= {"xsa4": later[:, 0:6], "xsa7": later[:, 6:12], "out10": later[:, 12:18]}
            for place, layer in enumerate((4, 5, 7, 8, 9)):
                gate[f"x0{layer}"], gate[f"b{layer}"] = later[:, 18 + 2 * place, None], later[:, 19 + 2 * place, None]
            gate |= {"skip": later[:, 28:29], "local.in": later[:, 29:35], "local.out": later[:, 35:41]}
        if i == 6:
            x = x + torch.sigmoid(p["skip_lambda"]) * gate["skip"] * c3
        else:
            y = project(i, normed(c7 if i >= 8 else x))
            x = p["attn_resid"][n] * x + p["attn_post"][n] * y + gate[f"x0{i}"] * x0 + (i > 0) * gate[f"b{i}"] * b
            n += 1
        x = p["mlp_resid"][i] * x + p["mlp_post"][i] * mlp(i, x)
        c3, c7 = x if i == 3 else c3, x if i == 7 else c7
    c9 = x
    m = net(x, "mix", 0, 0.1)
    y = project(10, normed(c7), m, (c0, c7, x))
    x = (1 + m[:, 5:6]) * x + m[:, 3:4] * c0 + m[:, 4:5] * c7
    x = m[:, 8:9] * x + m[:, 9:10] * y + m[:, 10:11] * c0 + m[:, 11:12] * b
    x = m[:, 12:13] * x + m[:, 13:14] * mlp(10, x)
    k = net(x, "mix", 1, 0.1)
    x = x + k[:, 0:1] * c0 + k[:, 1:2] * c7 + k[:, 2:3] * c9 + k[:, 3:4] * ve[:, 0] + k[:, 4:5] * c3
    return normed(x)


def test_the_forward_is_the_sheets():
    """Every path awake; and each of the parameters moves the result, so that none is compared where it does nothing."""
    model = awake()
    hidden = model.hidden(tokens(), CU, 16, AT)
    torch.testing.assert_close(hidden.cpu(), plain_hidden(model, tokens()), atol=1e-9, rtol=1e-9)
    hidden.square().mul(torch.linspace(0, 1, hidden.numel(), device=DEVICE).view_as(hidden)).sum().backward()
    still = [n for n, p in model.named_parameters() if n != "lm_head" and (p.grad is None or not p.grad.any())]
    assert not still


def test_while_tied_the_head_is_looked_up():
    model = awake()
    apart = model.hidden(tokens(), CU, 16, AT)
    model.wte.data.copy_(model.lm_head.data)
    want = model.hidden(tokens(), CU, 16, AT)
    model.tied = True
    model.wte.data.zero_()
    assert torch.equal(model.hidden(tokens(), CU, 16, AT), want) and not torch.equal(want, apart)


def test_the_loss_of_weighted_targets():
    model, idx, targets = awake(), tokens(), tokens(1)
    weights = torch.tensor([1.0, 0.5, 0.25, 0.3], device=DEVICE)
    loss = model(idx, targets, CU, 16, AT, weights)
    z = plain_hidden(model, idx) @ model.lm_head.detach().cpu()[: CFG.vocab_size].T
    logp = (23 * torch.sigmoid((z + 5) / 7.5)).log_softmax(-1)
    want, T, prefixes = 0.0, len(idx), model.prefixes.cpu()
    for t in range(T):
        for k in range(3):
            if t + k < T:
                want -= weights[k].item() * logp[t, targets[t + k]]
        if prefixes[targets[t]] >= 0:
            want -= weights[3].item() * logp[t, prefixes[targets[t]]]
    torch.testing.assert_close(loss.double().cpu(), want, rtol=1e-6, atol=0)
    plain = model(idx, targets, CU, 16, AT)
    torch.testing.assert_close(plain.double().cpu(), -logp[range(T), targets.cpu()].sum(), rtol=1e-6, atol=0)


def test_documents_do_not_see_each_other(monkeypatch):
    """But for the token before a document, which smears, is hashed and lends its key, as the sheet has it."""
    model = awake()
    model.smear_lambda.data.zero_()
    monkeypatch.setattr(module, "offset_keys", lambda k: k)
    one, other = tokens(), tokens()
    other[8:19] = tokens(2)[8:19]  # the last of this document stays: the next one reads it
    with torch.no_grad():
        a, b = (model.hidden(t, CU, 16, AT) for t in (one, other))
    assert torch.equal(a[:8], b[:8]) and torch.equal(a[20:], b[20:])
    assert not torch.equal(a[8:20], b[8:20])


def test_gradients_go_to_the_sums_where_there_are_some():
    model = awake(dtype=torch.float32)
    weights = torch.tensor([1.0, 0.5, 0.25], device=DEVICE)
    call = lambda: model(tokens(), tokens(1), CU, 16, AT, weights)  # noqa: E731
    call().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    model.accumulate(sums)
    for _ in range(2):
        call().backward()
    for name, p in model.named_parameters():
        added = name.partition(".")[0] in module.ADDED
        assert (p.grad is None) == added, name
        torch.testing.assert_close(sums[name] if added else p.grad, 2 * want[name], msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_computes_in_other_types(dtype):
    """Near what float64 gives, in the compute type of the tables."""
    exact, model = awake(), awake(dtype=torch.float32)
    for row in model.table:
        p = model.get_parameter(row.name)
        p.data = p.data.to(row.dtype(dtype))
    losses = [m(tokens(), tokens(1), CU, 16, AT).item() / STAGE.row_tokens for m in (exact, model)]
    assert math.isclose(*losses, rel_tol=1e-5 if dtype == torch.float32 else 0.03)


def test_compiles_as_one_graph_a_stage():
    model = awake(dtype=torch.float32)
    weights = torch.tensor([1.0, 0.5, 0.25], device=DEVICE)
    want = model(tokens(), tokens(1), CU, 16, AT, weights)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(tokens(), tokens(1), CU, 16, AT, weights), want)
    with torch._dynamo.config.patch(error_on_recompile=True):  # other texts, documents and weights
        compiled(tokens(3), tokens(4), torch.tensor([0, 9, 10, 20, 24, 24], dtype=torch.int32, device=DEVICE), 16, AT,
                 weights / 2)  # fmt: skip


# formulas -------------------------------------------------------------------


def test_hashes():
    idx = torch.tensor([5, 50256, 50255, 0])
    R = bigram_rows(FinewebConfig())
    assert R == 377_280
    pairs = [(50256, 5), (50255, 50256), (0, 50255)]
    assert bigram_ids(idx, R).tolist() == [R - 1] + [((36313 * a) ^ (27191 * b)) % (R - 1) for a, b in pairs]
    assert sign_ids(idx).tolist() == [0] + [(a ^ b) % 8192 for a, b in pairs]


def test_frequencies_and_their_growth():
    f = rope_frequencies(128)
    assert f[:32].tolist() == pytest.approx([1024 ** (-j / 31) for j in range(32)], rel=1e-6) and not f[32:].any()
    grown = yarn(f, 384, 896, YARN_TURNS)
    for j in range(32):
        turns = 384 * f[j].item() / (2 * math.pi)
        kept = min(max((turns - 1) / 31, 0), 1)
        assert grown[j].item() == pytest.approx(f[j].item() * (384 / 896 + kept * (1 - 384 / 896)), rel=1e-5)
    assert not grown[32:].any()
    assert grown[0] == f[0] and grown[31].item() == pytest.approx(f[31].item() * 384 / 896, rel=1e-6)
    model = awake()
    before = model.frequencies.clone()
    model.widen(10, 20)
    assert not torch.equal(model.frequencies, before)


def test_offset_keys():
    k = torch.arange(3 * 2 * 8.0).view(3, 2, 8)
    got = offset_keys(k)
    still = [2, 3, 6, 7]
    assert torch.equal(got[0], k[0]) and torch.equal(got[1:, :, still], k[:-1, :, still])
    assert torch.equal(got[..., [0, 1, 4, 5]], k[..., [0, 1, 4, 5]])


def test_away_from_values():
    make = torch.Generator().manual_seed(0)
    y, v = torch.randn(2, 5, 3, 8, dtype=torch.float64, generator=make)
    v[1, 1] = 0.0  # no direction: nothing is taken
    gone = away_from_values(y, v, torch.full((5, 3), 40.0, dtype=torch.float64))
    torch.testing.assert_close((gone * v).sum(-1), torch.zeros(5, 3, dtype=torch.float64))
    assert torch.equal(gone[1, 1], y[1, 1])
    assert torch.equal(away_from_values(y, v, torch.zeros(5, 3, dtype=torch.float64)), y)


@pytest.mark.parametrize("T, keys", [(20, 5), (23, 5), (3, 5), (10, 10), (7, 1)])
def test_local_composition(T, keys):
    make = torch.Generator().manual_seed(T)
    q, k, v = torch.randn(3, T, 2, 4, dtype=torch.float64, generator=make)
    into, out = torch.randn(2, T, 2, dtype=torch.float64, generator=make)
    first = torch.tensor([0 if t < 4 else 4 for t in range(T)], dtype=torch.int32)
    got = local_composition(q, k, v, first, into, out, scale=0.7, keys=keys)
    for t in range(T):
        seen = [s for s in range(t - keys + 1, t + 1) if s >= first[t]]
        p = sum(into[t, h] * (0.7 * k[seen, h] @ q[t, h]).softmax(0) for h in range(2))
        want = torch.stack([out[t, h] * (p @ v[seen, h]) for h in range(2)])
        torch.testing.assert_close(got[t], want)


def test_shifted_targets():
    prefixes = torch.tensor([-1, 0, -1, 2])
    assert shifted_targets(torch.tensor([3, 1, 2]), prefixes, 3).tolist() == [
        [3, 1, 2, 2],
        [1, 2, -1, 0],
        [2, -1, -1, -1],
    ]
    assert shifted_targets(torch.tensor([3, 1]), prefixes, 1).tolist() == [[3, 2], [1, 0]]


# sizes and schedules --------------------------------------------------------


def test_counts_are_the_sheets():
    table = parameter_table(FinewebConfig())
    counts = num_params(table, COUNTED)
    assert counts["transformer_matrices"] == 10 * 4 * 768**2 + 11 * 2 * 3072 * 768  # 75.5 M
    assert counts["lm_head"] == counts["wte"] == 50304 * 768
    assert counts["value_embeds"] == 251_520 * 768 and counts["bigram_embed"] == 377_280 * 768
    assert round(sum(counts.values()) / 1e6) == 636
    assert {p.group for p in table} - {MUON} == ADAM.keys()
    assert [len(MIX), len(LAST_MIX)] == [14, 5]
    assert [sum(n for _, n, _ in net) for net in GATES] == [26, 41]
    assert padded_vocab(FinewebConfig()) == 50304 and SOFTCAP == (23.0, 5.0, 7.5)


def test_rates_and_decays_are_the_sheets():
    """Section 3.1 and 3.2: betas, factor on the rate, factor on the decay."""
    assert (module.ADAM_LR, module.ADAM_DECAY, module.MUON_LR, module.MUON_DECAY) == (0.008, 0.005, 0.023, 1.2)
    tables = dict.fromkeys(("lm_head", "wte"), ((0.5, 0.95), 1, 150))
    tables |= dict.fromkeys(("value_embeds", "bigram_embed"), ((0.75, 0.95), 75, 5))
    small = {"attn_scales": (5, 0), "smear_gate": (0.01, 0), "ve_gate": (1, 1), "mix": (0.25, 1), "mix_bias": (0.25, 0)}
    small |= {"gates": (0.1, 1), "gates_bias": (0.1, 0)}
    resid = {"resid": ((0.9, 0.95), 5, 0), "post": ((0.9, 0.95), 1, 0)}
    assert ADAM == tables | resid | {name: ((0.9, 0.99), *factors) for name, factors in small.items()}
    groups = {"smear_lambda": "attn_scales", "skip_lambda": "attn_scales", "gates_scale": "gates_bias"}
    assert {p.name: p.group for p in parameter_table(CFG) if p.name in groups} == groups
    assert VALIDATION == (6 * 128, 20 * 128)


def test_muon_sees_pairs_of_heads_and_steps_by_the_sheet():
    shapes = {}
    for arena in arenas(parameter_table(FinewebConfig())):
        for p in arena.params:
            if p.group == MUON:
                (view,) = p.views
                shapes[p.name.partition(".")[0]] = arena.shape[1:], view.lr_scale(view.stored(p.shape))
    assert shapes == {
        "attn_qk": ((256, 768), 1.0),
        "attn_v": ((768, 768), 1.0),
        "attn_out": ((768, 768), 1.0),
        "mlp_up": ((3072, 768), 2.0),
        "mlp_down": ((3072, 768), 4.0),
    }


def test_first_values():
    model = Fineweb(CFG, stages=[STAGE])
    model.init_weights(0)
    x = torch.randn(4, CFG.d_model)
    for i, names in enumerate(GATES):
        got = module.net(x, *(getattr(model, f"gates_{part}_{i}") for part in ("w1", "w2", "bias")), model.gates_scale)
        want = torch.tensor([value for _, n, value in names for _ in range(n)])
        torch.testing.assert_close(got, want.expand(4, -1))
    assert torch.equal(model.wte, model.lm_head) and set(model.signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(model.attn_v[0].std().item() * math.sqrt(CFG.d_model) - 0.5) < 0.02
    assert not model.bigram_embed.any() and not model.mlp_down[0].any() and model.attn_out[0].any()
    again = Fineweb(CFG, stages=[STAGE])
    again.init_weights(0)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))


def test_stages_are_the_sheets():
    assert total_steps(STAGES) == 1285 and scheduled_steps(STAGES) == 1270 and last_tied_step(STAGES) == 847
    assert [round(8 * s.steps * s.row_tokens / 1e6, 1) for s in STAGES] == [55.4, 111.1, 166.3, 5.9]
    assert [8 * s.row_tokens for s in STAGES[:3]] == [131_072, 262_144, 393_216]
    assert [(s.short // 128, s.long // 128) for s in STAGES] == [(1, 3), (3, 7), (5, 11), (6, 13)]
    assert [lr_multiplier(s, STAGES) for s in (0, 422, 423, 508)] == [1.0, 1.0, 1.52, 1.52]
    t = (847 - 508) / (1270 - 508)
    assert lr_multiplier(847, STAGES) == pytest.approx(1.73 * (1 - t) + 0.15 * t)
    assert lr_multiplier(1270, STAGES) == lr_multiplier(1284, STAGES) == FLOOR
    assert [muon_momentum(s, STAGES) for s in (0, 150, 300, 1235)] == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert muon_momentum(1260, STAGES) == pytest.approx(0.90)
    assert target_weights(0, STAGES) == [1, 0.5, 0.25, 0.25]
    assert target_weights(422, STAGES) == pytest.approx([1, 0.5, 0.25 / 423, 0.25])
    assert target_weights(423 + 212, STAGES) == pytest.approx([1, 0.25, 0.125]) and target_weights(900, STAGES) == [
        1,
        0,
    ]
    assert stage_of(846, STAGES)[0] == 1 and stage_of(847, STAGES) == (2, 0.0) and stage_of(1285, STAGES) == (3, 1.0)
    scales = [at_stage(STAGES, i).scale for i in range(4)]
    assert scales == pytest.approx([0.1, 0.11695, 0.12752, 0.13178], abs=6e-6)
    assert softmax_scale([384]) == 0.1
    assert [updates_tables(s) for s in range(4)] == [False, True, False, True]


def test_scaled_stages():
    for scale in (1, 8, 16):
        small = scaled(STAGES, scale)
        assert len(small) == len(STAGES) and all(s.short >= 128 // scale for s in small)
        assert lr_multiplier(total_steps(small) - 1, small) == FLOOR and updates_tables(last_tied_step(small))
        assert all(0.84 < muon_momentum(s, small) < 0.96 for s in range(total_steps(small) + 1))
    assert scaled(STAGES, 1) == STAGES
    with pytest.raises(ValueError, match="divisor of 128"):
        scaled(STAGES, 3)


def test_with_triton_it_agrees_with_the_reference():
    """The ops of this model's shapes in the interpreter: pairs of heads, windows within documents, an added sum."""
    cfg = dataclasses.replace(CFG, d_head=16)
    exact, ref = awake(cfg, size=0.05), awake(cfg, torch.float32, size=0.05)
    with torch.device(DEVICE):
        fast = Fineweb(cfg, Backends("triton", device=torch.device(DEVICE), dtype=torch.float32), stages=[STAGE])
    fast.load_state_dict(ref.state_dict())
    fast.signs, fast.prefixes, fast.tied = ref.signs, ref.prefixes, False
    weights, cu = torch.tensor([1.0, 0.5, 0.25], device=DEVICE), torch.tensor([0, 5, 12], dtype=torch.int32)
    for model in (exact, ref, fast):
        model(tokens(T=12), tokens(1, T=12), cu.to(DEVICE), 8, AT, weights).backward()
    for row in exact.table:
        want, *grads = (m.get_parameter(row.name).grad.double() for m in (exact, ref, fast))
        theirs, ours = (((g - want).norm() / want.norm()).item() for g in grads)
        few = want.numel() < 16  # draws, near 0 by luck
        assert ours <= (20 if few else 2) * theirs + 1e-6, (row.name, ours, theirs)
