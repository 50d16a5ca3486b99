"""The model: initialisation, each feature against its formula, the switches, and learning at all."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from core.config import ModelConfig
from core.data.tokenizer import SPECIAL_TOKENS
from core.models.gpt2 import COUNTED, GPT, flops_per_token
from core.params import num_params
from kernels.attention import attention
from kernels.dispatch import Backends
from kernels.op import UserError
from kernels.rms_norm import EPS
from tests.flash_attention_3 import installed
from tests.harness import DEVICE, flex_on_a_cpu

CFG = ModelConfig(depth=4, d_model=64, d_head=16, n_kv_head=2, seq_len=256, vocab_size=100, window_pattern="SSSL")


def build(cfg=CFG, seed=0):
    model = GPT(cfg)
    model.init_weights(seed)
    return model


def awake(cfg=CFG):
    """A model in which every feature has an effect: no zero weights."""
    model = build(cfg)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.split(".")[0] in ("attn_out", "mlp_down", "smear_lambda", "lm_head"):
                p.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(1))
    return model


def tokens(cfg=CFG, batch=2, seed=0):
    return torch.randint(0, cfg.vocab_size, (batch, cfg.seq_len), generator=torch.Generator().manual_seed(seed))


def plain_forward(model, idx):
    """The forward of nanochat's fact sheet, transcribed layer by layer in float64 without the model's helpers."""
    d = model.dims
    p = {n: v.detach().double() for n, v in model.named_parameters()}
    kinds = ("attn_qkv", "attn_out", "mlp_up", "mlp_down", "ve_gate")
    bank = {k: torch.cat([p[f"{k}.{i}"] for i in range(len(getattr(model, k)))]) for k in kinds}

    def rms(x):
        return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()

    B, T = idx.shape
    x = rms(p["wte"][idx])
    smeared = x.clone()
    for t in range(1, T):
        gate = p["smear_lambda"] * torch.sigmoid(x[:, t, :24] @ p["smear_gate"].T)
        smeared[:, t] = x[:, t] + gate * x[:, t - 1]
    x = x0 = smeared
    D, H, G = d.d_head, d.n_head, d.n_kv_head
    freq = 100000.0 ** (-torch.arange(0, D, 2).double() / D)
    angle = torch.arange(T).double()[:, None] * freq
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    middle = None
    for i in range(d.n_layer):
        x = p["resid_lambdas"][i] * x + p["x0_lambdas"][i] * x0
        y = rms(x)
        w_q, w_k, w_v = bank["attn_qkv"][i].split((H * D, G * D, G * D))
        q, k, v = ((y @ w.T).view(B, T, -1, D) for w in (w_q, w_k, w_v))
        if i % 2 == (d.n_layer - 1) % 2:
            j = i // 2
            ve = p["value_embeds"][idx][..., j * G * D : (j + 1) * G * D].view(B, T, G, D)
            v = v + 3 * torch.sigmoid(y[..., :12] @ bank["ve_gate"][j].T)[..., None] * ve
        rot = []
        for z in (q, k):
            z1, z2 = z[..., : D // 2], z[..., D // 2 :]
            z = torch.cat((z1 * cos + z2 * sin, -z1 * sin + z2 * cos), -1)
            rot.append(1.2 * rms(z))
        q, (k, v) = rot[0], (z.repeat_interleave(H // G, dim=2) for z in (rot[1], v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(D)
        delta = torch.arange(T)[:, None] - torch.arange(T)[None]
        scores = scores.masked_fill((delta < 0) | (delta > d.windows[i]), -torch.inf)
        y = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(B, T, -1)
        x = x + y @ bank["attn_out"][i].T
        x = x + F.relu(rms(x) @ bank["mlp_up"][i].T) ** 2 @ bank["mlp_down"][i]
        if i == d.n_layer // 2:
            middle = x
    x = rms(x - p["backout_lambda"] * middle)
    z = (x @ p["lm_head"].T)[..., : d.vocab_size]
    return 15 * torch.tanh(z / 15)


def test_forward_matches_the_fact_sheet():
    cfg = dataclasses.replace(CFG, seq_len=160, depth=5)
    model = awake(cfg)
    assert set(model.dims.windows) == {128, 160}
    idx = tokens(cfg)
    want = plain_forward(model, idx)
    got = model(idx).double()
    assert (got - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt() < 1e-5


def test_loss_is_the_cross_entropy_of_the_logits():
    model, idx = awake(), tokens()
    targets = tokens(seed=1).clone()
    targets[0, :5] = -1
    logp = model(idx).log_softmax(-1)
    want = -logp.gather(-1, targets.clamp_min(0)[..., None])[..., 0] * (targets >= 0)
    torch.testing.assert_close(model(idx, targets), want.sum() / (targets >= 0).sum())
    torch.testing.assert_close(model(idx, targets, reduction="sum"), want.sum())


def test_initialisation():
    cfg = dataclasses.replace(CFG, depth=5, d_model=128, d_head=32, vocab_size=4096)
    model = build(cfg)
    std = 128**-0.5
    assert model.wte.std().item() == pytest.approx(0.8, rel=0.02)
    assert model.lm_head.std().item() == pytest.approx(0.001, rel=0.02)
    assert model.attn_qkv[0].std().item() == pytest.approx(std, rel=0.02)
    assert model.attn_qkv[0].abs().max().item() <= math.sqrt(3) * std
    assert model.value_embeds.std().item() == pytest.approx(std, rel=0.02)
    assert model.mlp_up[0].std().item() == pytest.approx(0.4 * std, rel=0.02)
    assert not model.attn_out[0].any() and not model.mlp_down[1].any() and not model.smear_lambda.any()
    for gate in (model.ve_gate[0], model.smear_gate):
        assert 0 <= gate.min() and gate.max() <= 0.02 and gate.std() > 0.003
    torch.testing.assert_close(model.resid_lambdas.detach(), torch.tensor([1.15, 1.125, 1.1, 1.075, 1.05]))
    torch.testing.assert_close(model.x0_lambdas.detach(), torch.tensor([0.2, 0.1625, 0.125, 0.0875, 0.05]))
    assert model.backout_lambda.item() == pytest.approx(0.2)
    again = build(cfg)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert not torch.equal(model.wte, build(cfg, seed=1).wte)


SWITCHES = [
    "rope",
    "qk_norm",
    "relu2",
    "value_embeds",
    "resid_lambdas",
    "x0_lambdas",
    "smear",
    "backout",
    "untied_head",
]


@pytest.mark.parametrize("switch", [*SWITCHES, "logit_softcap", "window_pattern"])
def test_each_switch_changes_the_model_and_nothing_else(switch):
    off = {"logit_softcap": 0.0, "window_pattern": "L"}.get(switch, False)
    cfg = dataclasses.replace(CFG, **{switch: off})
    model, full = awake(cfg), awake()
    idx = tokens()
    assert not torch.allclose(model(idx), full(idx), atol=1e-4)
    # parameters that both have start equal
    ours, theirs = dict(model.named_parameters()), dict(full.named_parameters())
    assert all(torch.equal(p, theirs[n]) for n, p in ours.items() if n != "wte" or switch != "untied_head")
    gone = {
        "value_embeds": 128 * 2 * 32 + 2 * 2 * 12,
        "resid_lambdas": 4,
        "x0_lambdas": 4,
        "smear": 25,
        "backout": 1,
        "untied_head": 128 * 64,
    }.get(switch, 0)
    total = {n: sum(p.numel for p in m.table) for n, m in (("off", model), ("on", full))}
    assert total["on"] - total["off"] == gone
    assert sum(p.numel() for p in model.parameters()) == total["off"]
    model(idx, tokens(seed=1)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_tied_head_still_scales_as_a_head():
    tied = build(dataclasses.replace(CFG, untied_head=False))
    counts = num_params(tied.table, COUNTED)
    assert counts["wte"] == 0 and counts["lm_head"] == 128 * 64
    assert flops_per_token(tied.cfg) == flops_per_token(CFG)


def test_future_tokens_do_not_matter():
    model, idx = awake(), tokens()
    changed = idx.clone()
    changed[:, 100:] = 0
    torch.testing.assert_close(model(idx)[:, :100], model(changed)[:, :100])


def loss_and_gradients(call, model):
    model.zero_grad()
    value = call(tokens(), tokens(seed=1))
    value.backward()
    return {"loss": value.detach(), **{n: p.grad.clone() for n, p in model.named_parameters()}}


@pytest.mark.parametrize("chosen", ["ref", "flex", "fa3"])
def test_compiles_as_one_graph_with_the_loss_and_gradients_of_eager(monkeypatch, chosen):
    """With a GPU's attention too: FlexAttention runs on a CPU, backward included, once its device check is out of the
    way, and FlashAttention 3 has a stand-in."""
    monkeypatch.setattr("kernels.lm_head_loss.CACHED_LOGITS", 200 * CFG.vocab_size)  # ragged last chunk
    model = awake()
    want = loss_and_gradients(model, model)
    if chosen != "ref":
        flex_on_a_cpu(monkeypatch)
        monkeypatch.setattr("kernels.attention.dense_mask", None)  # not to be used
        model.attention = [attention.backends[chosen]] * CFG.depth
    torch._dynamo.reset()
    with installed() as calls:
        got = loss_and_gradients(torch.compile(model, backend="aot_eager", fullgraph=True), model)
    assert len(calls) == (2 * CFG.depth if chosen == "fa3" else 0)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kernels", ["ref", "triton"])
def test_documents_are_found_within_the_graph(kernels):
    cfg = dataclasses.replace(CFG, within_documents=True, seq_len=48, depth=2)
    model = GPT(cfg, Backends(f"attention={kernels}", device=torch.device("cpu"), dtype=torch.float32), 2)
    model.load_state_dict(awake(cfg).state_dict())
    idx, targets = tokens(cfg), tokens(cfg, seed=1)
    idx[0, 7] = idx[0, 30] = idx[1, 47] = CFG.vocab_size - len(SPECIAL_TOKENS)
    torch._dynamo.reset()
    results = []
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        call(idx, targets).backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters()})
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_triton_the_model_is_one_graph_and_agrees_with_the_reference(dtype):
    # three layers: with two, the middle one is the last, and the gradient of its backout all but cancels
    cfg = dataclasses.replace(CFG, depth=3, d_model=32, n_kv_head=1, seq_len=12, window_pattern="L")
    backends = Backends("triton", device=torch.device(DEVICE), dtype=dtype)
    with torch.device(DEVICE):
        fast = GPT(cfg, backends)
    ref = awake(cfg).to(DEVICE)
    fast.load_state_dict(ref.state_dict())
    assert {c.backend for c in backends.choices} == {"triton"}
    # norm, rope, attention of texts and of one token, MLP, loss; qkv and out; tokens and their values
    assert len(backends.choices) == 10
    exact = copy.deepcopy(ref)
    for model in (fast, ref, exact):
        for name, p in model.named_parameters():
            p.data = p.data if "lambda" in name or name == "smear_gate" else p.data.to(dtype)
    exact.double()

    def results(run, model, seed):
        texts = [tokens(cfg, seed=seed + i).to(DEVICE) for i in range(2)]
        model.zero_grad()
        run(*texts).backward()
        with torch.no_grad():
            losses = run(*texts, "none").double()  # of each token: their mean would be one number
        return {"losses": losses, **{n: p.grad.double() for n, p in model.named_parameters()}}

    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    runs = {"fast": results(fast, fast, 0), "compiled": results(compiled, fast, 0)}
    wants, refs = ([results(m, m, 2 * i) for i in range(16)] for m in (exact, ref))
    for name, want in wants[0].items():
        # one number's error is a draw, near 0 by luck: it is held to what it is over many texts
        few = want.numel() < 16
        errors = [(r[name] - w[name]).norm().item() for r, w in zip(refs, wants)]
        allowed = 4 * math.sqrt(sum(e * e for e in errors) / len(errors)) if few else 1.5 * errors[0]
        for how, run in runs.items():
            error = (run[name] - want).norm().item()
            assert error <= allowed + 2e-6 * want.norm().item(), (how, name, error, allowed)


def test_layers_call_the_attention_that_was_chosen_for_their_window():
    """Sequences of all lengths do, a prompt with a cache too; one-token steps run on an op of their own."""
    calls = []

    class Recording:
        def choose(self, op, *shape):
            assert op is not attention
            return op.backends["ref"]

        def choose_fitting(self, op, *shape):
            assert op is attention

            def call(*args, window, **options):
                calls.append((shape, window, args[0].size(1)))
                return op.backends["ref"](*args, window=window, **options)

            return call

    model = GPT(CFG, Recording(), batch_size=2)
    model.load_state_dict(awake().state_dict())
    short, full = ((2, 256, 4, 2, 16, seen, 0) for seen in (129, 256))
    want = awake()(tokens())
    calls.clear()
    assert torch.equal(model(tokens()), want)
    assert calls == [(short, 128, 256)] * 3 + [(full, 256, 256)]
    calls.clear()
    cache = model.new_cache(2, 300)
    model.hidden(tokens()[:, :200], cache), model.hidden(tokens()[:, 200:201], cache)
    for T in (255, 300):
        model(torch.cat((tokens(), tokens(seed=1)), dim=1)[:, :T])
    assert [T for _, _, T in calls] == [200] * 4 + [255] * 4 + [300] * 4


def test_within_documents_attention_is_chosen_for_documents():
    """Of unknown number: libraries are not for these, and a request for one is an error, not another choice."""
    cfg = dataclasses.replace(CFG, within_documents=True)
    backends = Backends("triton", device=torch.device("cpu"), dtype=torch.bfloat16)
    with torch.device("meta"):
        GPT(cfg, backends, 2)
        chosen = [c for c in backends.choices if c.op == "attention"]
        assert [(c.shape["W"], c.shape["M"], c.backend) for c in chosen] == [(129, 256, "triton"), (256, 256, "triton")]
        for name in ("fa2", "sdpa"):
            with pytest.raises(UserError, match=f"attention={name}: not within documents .*--no-within-documents"):
                GPT(cfg, Backends(f"attention={name}", device=torch.device("cpu"), dtype=torch.bfloat16), 2)


def test_rows_of_documents_are_as_good_as_documents_apart():
    """Smear still reads the token before; without it a document's logits do not know what its row holds."""
    cfg = dataclasses.replace(CFG, smear=False, within_documents=True, seq_len=48)
    model, bos = awake(cfg), CFG.vocab_size - len(SPECIAL_TOKENS)
    rows = tokens(cfg).clamp(max=bos - 1)
    begins = ((0, 1, 20), (5, 40))
    for row, places in zip(rows, begins):
        row[list(places)] = bos
    got = model(rows)
    for row, places, logits in zip(rows, begins, got):
        edges = sorted({0, *places, 48})
        for begin, end in zip(edges, edges[1:]):
            want = model(row[None, begin:end])[0]
            torch.testing.assert_close(logits[begin:end], want, atol=2e-5, rtol=2e-5)
    whole = awake(dataclasses.replace(cfg, within_documents=False))(rows)
    assert torch.equal(whole[:, :1], got[:, :1]) and not torch.allclose(whole[0, 21:], got[0, 21:], atol=1e-3)
    # each document's end is in its own hands: gradients too
    x = model.wte
    model(rows)[0, 25].sum().backward()
    assert not x.grad[rows[0, 2:20].unique()[~torch.isin(rows[0, 2:20].unique(), rows[0, 20:26])]].any()


def test_sequences_beyond_the_training_length_see_what_the_windows_show():
    """Each of the last positions equals that of a sequence that starts where the widest view of all layers ends."""
    cfg = dataclasses.replace(CFG, depth=2, seq_len=16, smear=False, window_pattern="L")
    model = awake(cfg)
    idx = torch.cat((tokens(cfg), tokens(cfg, seed=1), tokens(cfg, seed=2), tokens(cfg, seed=3)), dim=1)  # (2, 64)
    logits = model(idx)
    assert logits.shape == (2, 64, 100)
    torch.testing.assert_close(model(idx[:, 63 - 32 :])[:, -1], logits[:, -1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model(idx[:, 63 - 31 :])[:, -1], logits[:, -1], atol=1e-5, rtol=1e-4)


def test_buffers_are_no_part_of_a_checkpoint():
    model = build()
    assert [n for n, _ in model.named_buffers()] == ["rope_cos", "rope_sin"]
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()
    assert not list(build(dataclasses.replace(CFG, rope=False)).buffers())


def test_padded_vocabulary_is_never_predicted():
    model = awake(dataclasses.replace(CFG, vocab_size=100))
    assert model.wte.shape[0] == 128
    assert model(tokens()).shape[-1] == 100


def test_a_small_model_learns():
    from core import schedule
    from core.config import OptimConfig
    from core.optim import Gradients, Optimizer, learning_rates

    cfg = dataclasses.replace(CFG, depth=2, seq_len=32, window_pattern="L")
    model = build(cfg)
    laws = OptimConfig(scaling_laws=False, warmup_steps=1, momentum_warmup_steps=10)
    optimizer = Optimizer(
        model, lrs=learning_rates(laws, 64, 1), weight_decay=0.0, ns_steps=5, compute_dtype=torch.float32
    )
    grads = Gradients(model, optimizer)
    idx = tokens(cfg, batch=4)
    first = None
    for step in range(30):
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step(grads.sums, step=step, **schedule.at(step, 30, laws))
        grads.zero()
        first = first or loss.item()
    assert first == pytest.approx(math.log(100), rel=0.01)
    assert loss.item() < 0.5  # it can remember four rows
