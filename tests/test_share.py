"""Exported models: the same logits and texts by transformers and by ours, the same ids, whole folders, uploads."""

import dataclasses
import json
import random
import sys
import types

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForCausalLM, AutoTokenizer

from core import checkpoint
from core.config import preset
from core.data.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer
from core.generate import sample_texts
from core.share import export as export_module
from core.share.export import export, load_exported
from core.stopping import UserError
from eval import main as eval_main
from tests.test_compare_tokenizers import state_of
from tests.test_generate import CFG as SMALL
from tests.test_model import SWITCHES, awake, tokens

CFG = dataclasses.replace(SMALL, seq_len=24)
VARIANTS = [
    {},
    *({switch: False} for switch in SWITCHES),
    dict.fromkeys(("resid_lambdas", "x0_lambdas"), False),
    {"logit_softcap": 0.0},
    {"n_kv_head": None},
    {"depth": 10},  # several banks
    {"within_documents": True},
]
BYTES = Tokenizer([bytes([i]) for i in range(256)])


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path_factory):
    """Short windows of 8 tokens, and the code that comes with a model in a folder of its own."""
    monkeypatch.setattr("core.models.gpt2.WINDOW_MULTIPLE", 8)
    modules = tmp_path_factory.mktemp("modules")
    for module in ("transformers.dynamic_module_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HF_MODULES_CACHE", str(modules))


def in_bf16(model):
    for row in model.table:
        p = model.get_parameter(row.name)
        p.data = p.data.to(row.dtype(torch.bfloat16))
    return model


def by_transformers(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def exported(folder, changes=None, dtype=torch.float32, summary=None):
    model = awake(dataclasses.replace(CFG, **(changes or {})))
    model = in_bf16(model) if dtype == torch.bfloat16 else model
    assert set(model.dims.windows) == {8, 24}
    export(folder, model, BYTES, dtype, summary)
    return model


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@torch.no_grad()
def test_transformers_gives_the_same_logits(tmp_path, changes):
    model = exported(tmp_path / "x", changes)
    theirs = by_transformers(tmp_path / "x")
    ids = tokens(CFG)
    ids[0, 3] = ids[0, 10] = ids[1, 0] = BYTES.bos_id
    want = model(ids)
    got = theirs(ids).logits
    assert got.shape == want.shape and got.dtype == torch.float32
    assert (got - want).abs().max() < 1e-4 * want.abs().max()  # a tied head has tiny logits, sums that cancel
    ours, _ = load_exported(tmp_path / "x")
    assert torch.equal(ours(ids), want)


@torch.no_grad()
def test_bf16_stays_bf16_and_scalars_stay_fp32(tmp_path):
    exact = awake(CFG)(tokens(CFG))
    model = exported(tmp_path / "x", dtype=torch.bfloat16)
    theirs, (ours, _) = by_transformers(tmp_path / "x"), load_exported(tmp_path / "x")
    for name, p in theirs.named_parameters():
        kind = name.split(".")[0]
        assert p.dtype == (torch.float32 if kind.endswith("lambdas") or "smear" in kind or "backout" in kind
                           else torch.bfloat16), name  # fmt: skip
    assert torch.equal(theirs.resid_lambdas, model.resid_lambdas)
    cast = by_transformers(tmp_path / "x", dtype=torch.bfloat16)
    assert torch.equal(cast.resid_lambdas, model.resid_lambdas)
    want, got = model(tokens(CFG)), theirs(tokens(CFG)).logits
    assert torch.equal(ours(tokens(CFG)), want)
    assert (got - want).pow(2).mean() <= 1.1 * (want - exact).pow(2).mean() < 0.01 * exact.pow(2).mean()


def test_generate_writes_our_greedy_text(tmp_path):
    model = exported(tmp_path / "x")
    tokenizer, theirs = AutoTokenizer.from_pretrained(tmp_path / "x"), by_transformers(tmp_path / "x")
    assert theirs.config.bos_token_id == theirs.generation_config.eos_token_id == BYTES.bos_id
    for prompt in ("a", "def main("):  # the text becomes longer than the windows and the context
        want = sample_texts(model, BYTES, [prompt], 24, temperature=0.0, top_k=0, seed=0)[0]
        ids = tokenizer(prompt, return_tensors="pt")
        out = theirs.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids.input_ids.size(1) :]
        assert tokenizer.decode(out, skip_special_tokens=True) == want != ""


def test_a_loss_and_padding(tmp_path):
    model = exported(tmp_path / "x")
    theirs, ids = by_transformers(tmp_path / "x"), tokens(CFG)
    torch.testing.assert_close(theirs(ids, labels=ids).loss, model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
    mask = torch.ones_like(ids)
    mask[:, -3:] = 0
    theirs(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="padding on the left"):
        theirs(ids, attention_mask=mask.flip(1))


def test_ids_are_equal(tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcde한국어é'ß", k=rng.randint(1, 6))) for _ in range(300)]
    text = " ".join(rng.choices(words, k=4000)) + "\n\n  12345 it's IT'S a\tb"
    tokenizer = train_tokenizer([text], 700)
    export(tmp_path / "x", awake(dataclasses.replace(CFG, vocab_size=700)), tokenizer, torch.float32, None)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "x")
    alphabets = [
        "ab",
        "a \n",
        "éa1 '",
        "aA \n\t-=#_",
        "한국어 텍",
        "e\u0301\u200b\u00a0\u3000𝒳😀\x00\x85",
        "".join(words),
    ]
    texts = ["", *SPECIAL_TOKENS, "see <|bos|> here", text]
    texts += ["".join(rng.choices(rng.choice(alphabets), k=rng.randint(1, 60))) for _ in range(400)]
    texts += ["".join(chr(rng.choice([*range(0xD800), *range(0xE000, 0x20000)])) for _ in range(40)) for _ in range(20)]
    for t in texts:
        ids = tokenizer.encode_document(t).tolist()
        assert theirs(t).input_ids == ids, repr(t)
        assert theirs.decode(ids[1:]) == t
    assert theirs.bos_token_id == theirs.eos_token_id == tokenizer.bos_id and len(theirs) == tokenizer.vocab_size


# eval.py


SUMMARY = {
    "steps": 12, "tokens": 1200, "flops": 1.5e9, "val_bpb": 5.4321, "val_scope": "every byte of all 14 documents once",
    "core": 0.2345, "core_scope": "all 10 examples of 1 tasks", "core_tasks": {"copa": {"accuracy": 0.6789}},
    "data": "texts: 106 documents to train on, 14 to validate", "git": {"commit": "0123abcd", "dirty": True},
    "total_training_time_s": 10.0, "wall_time_s": 20.0, "device": "a CPU", "command": "python train.py --depth 5",
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run that has ended after 12 steps, and saved one checkpoint before."""
    model, cfg = awake(CFG), dataclasses.replace(preset("quickstart", "cpu"), model=CFG)
    for step in (8, 12):
        folder = checkpoint.checkpoint_dir(tmp_path / "run", step)
        checkpoint.save(folder, checkpoint.training_tensors(model, {}), state_of(cfg, step).to_json(), BYTES)
    (tmp_path / "run" / "summary.json").write_text(json.dumps(SUMMARY))
    return tmp_path / "run"


def test_a_run_is_exported(run, tmp_path, capsys):
    eval_main([str(run), "--export", str(tmp_path / "new" / "x")])
    assert "is exported to" in capsys.readouterr().out
    folder = tmp_path / "new" / "x"
    assert {p.name for p in folder.parent.iterdir()} == {"x"}
    card = (folder / "README.md").read_text()
    for part in (
        "license:",
        "5.4321",
        "0.2345",
        "0.6789",
        SUMMARY["data"],
        "0123abcd with changes",
    ):
        assert part in card, part
    assert SUMMARY["command"] not in card  # which holds paths of the machine
    model, tokenizer = load_exported(folder)
    assert tokenizer.digest == BYTES.digest
    with torch.no_grad():
        assert torch.equal(model(tokens(CFG)), awake(CFG)(tokens(CFG)))


def test_an_exported_folder_is_evaluated_as_its_run(run, tmp_path, capsys):
    eval_main([str(run), "--export", str(tmp_path / "x")])
    (tmp_path / "text.txt").write_text("some words of a text\n" * 9)
    options = ["--data", str(tmp_path / "text.txt"), "--prompt", "def", "--device", "cpu", "--json"]
    results = []
    for path in (run, tmp_path / "x"):
        capsys.readouterr()
        eval_main([str(path), *options])
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["val_bpb"] == results[1]["val_bpb"] > 0 and results[0]["samples"] == results[1]["samples"]
    with pytest.raises(UserError, match="give bpb a text with --data"):
        eval_main([str(tmp_path / "x"), "--metrics", "bpb"])


def test_a_card_has_no_scores_of_other_weights(run, tmp_path, capsys):
    eval_main([str(run / "checkpoints" / "step_000008"), "--export", str(tmp_path / "x")])
    assert "no scores" in capsys.readouterr().out
    assert "Not known" in (tmp_path / "x" / "README.md").read_text()


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--export", "{full}"], "something is there already"),
        (["--export", "{full}/note"], "something is there already"),
        (["--export", "{new}", "--metrics", "bpb"], "go without --metrics"),
        (["--push", "me/model"], "no exported folder"),
    ],
)
def test_what_is_refused(run, tmp_path, argv, says):
    full = tmp_path / "full"
    full.mkdir()
    (full / "note").write_text("mine")
    with pytest.raises(UserError, match=says):
        eval_main([str(run), *(a.format(full=full, new=tmp_path / "new") for a in argv)])
    assert {p.name for p in tmp_path.iterdir()} == {"full", "run"} and [p.name for p in full.iterdir()] == ["note"]


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "model_card", full_disk)
    with pytest.raises(OSError, match="No space"):
        exported(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, damage, says",
    [
        ("model.safetensors", lambda path: path.unlink(), "model.safetensors"),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1]), "damaged"),
        ("config.json", lambda path: path.unlink(), "config.json: cannot be read"),
        ("config.json", lambda path: path.write_text('{"dtype": "float32"}'), "no config of a model of Redline"),
        ("config.json", lambda path: path.write_text(path.read_text().replace('"depth": 5', '"depth": 4')), "expected"),
        ("config.json", lambda path: path.write_text(path.read_text().replace("float32", "bfloat16")), "expected"),
    ],
)
def test_damage_is_named(tmp_path, name, damage, says):
    exported(tmp_path / "x")
    damage(tmp_path / "x" / name)
    with pytest.raises(UserError, match=says):
        load_exported(tmp_path / "x")


class Hub:
    """Stands for HfApi: remembers calls, or raises."""

    def __init__(self, error=None):
        self.error, self.calls = error, []

    def __call__(self):
        return self

    def create_repo(self, repo, **options):
        self.calls.append((repo, options))
        if self.error:
            raise self.error
        return types.SimpleNamespace(repo_id=f"me/{repo}")

    def upload_folder(self, *, folder_path, repo_id, commit_message):
        self.calls.append((sorted(p.name for p in folder_path.iterdir()), repo_id))


def test_push(tmp_path, monkeypatch, capsys):
    exported(tmp_path / "x")
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    eval_main([str(tmp_path / "x"), "--push", "model"])
    (repo, options), (names, repo_id) = hub.calls
    assert (repo, repo_id) == ("model", "me/model") and options == {"private": True, "exist_ok": True}
    assert {"README.md", "config.json", "model.safetensors", "modelling_redline.py", "tokenizer.json"} <= set(names)
    assert capsys.readouterr().out.endswith("https://huggingface.co/me/model\n")


def test_a_push_that_fails_is_one_sentence(tmp_path, monkeypatch):
    exported(tmp_path / "x")
    argv = [str(tmp_path / "x"), "--push", "me/model"]
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="no token of the hub"):
        eval_main(argv)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    http_error = HfHubHTTPError.__bases__[0]
    for error in (http_error("Connection refused"), OSError("offline")):
        monkeypatch.setattr(huggingface_hub, "HfApi", Hub(error))
        with pytest.raises(UserError, match=f"the hub did not take it .{error}.; .* is whole"):
            eval_main(argv)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="needs huggingface_hub"):
        eval_main(argv)
