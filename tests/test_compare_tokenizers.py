"""Bytes per token by domain: the table, and what is said without a network or the text."""

import dataclasses
import shutil
import types

import pytest
import requests
import tiktoken
import torch

from core import checkpoint
from core.config import DataConfig, preset, to_dict
from core.data.compare_tokenizers import LATEX, bytes_per_token, domains, first_chars, main
from core.data.tokenizer import train_tokenizer
from core.run import State

TOKENIZER = train_tokenizer([LATEX] * 3, 400)


def state_of(cfg, step):
    """Of a checkpoint of a run with these options."""
    return State(
        step=step, evaluated=True, plan_steps=step, config=to_dict(cfg), model=dataclasses.asdict(cfg.model),
        precision="float32", loader={"corpus": "a fingerprint"}, log_bytes=0, counted_s=0.0, counted_steps=0,
        wall_time_s=1.0, peak_memory_bytes=1, profile={}, wandb=None,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A checkpoint of a run on two short texts."""
    data = tmp_path / "texts"
    data.mkdir()
    (data / "one.txt").write_text("ab" * 100 + "\n")
    (data / "two.txt").write_text("한국어 " * 20)
    cfg = preset("quickstart", "cpu")
    cfg = dataclasses.replace(cfg, data=DataConfig(str(data), val_every=2, cache_dir=str(tmp_path / "cache")))
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, seq_len=8))
    folder = checkpoint.checkpoint_dir(tmp_path / "run", 1)
    checkpoint.save(folder, {"model.x": torch.zeros(1)}, state_of(cfg, 1).to_json(), TOKENIZER)
    return tmp_path / "run"


def cells(out):
    """Numbers of the table by domain."""
    rows = [line.split() for line in out.splitlines()]
    return {row[0]: [float(x) for x in row[1:]] for row in rows if len(row) > 1 and row[1].replace(".", "").isdigit()}


def offline(name):
    raise requests.exceptions.ConnectionError("Max retries exceeded")


def test_our_tokenizer_beside_its_peers(run, monkeypatch, capsys):
    peer = types.SimpleNamespace(n_vocab=256, encode_ordinary=lambda text: list(text.encode()))
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: peer if name == "gpt2" else offline(name))
    main(["--compare", str(run)])
    out = capsys.readouterr().out
    assert "cl100k_base is left out: tiktoken cannot fetch it (ConnectionError)" in out
    assert "this run (400)" in out and "gpt2 (256)" in out
    found = cells(out)
    assert set(found) == {"news", "Korean", "code", "LaTeX", "science", "training", "validation"}
    for domain, texts in domains().items():
        (text,) = texts
        assert found[domain] == [round(len(text.encode()) / len(TOKENIZER.encode(text)), 3), 1.0]
    assert found["LaTeX"][0] > 1.5 * found["Korean"][0]  # what it was trained on


def test_without_network_and_text_ours_is_printed(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    shutil.rmtree(tmp_path / "texts")
    main(["--compare", str(run)])
    out = capsys.readouterr().out
    assert "the run's own text is left out" in out and "gpt2 is left out" in out
    assert set(cells(out)) == {"news", "Korean", "code", "LaTeX", "science"}


def test_the_beginning_of_texts():
    assert list(first_chars(iter(["abc", "def", "ghi"]), 5)) == ["abc", "de"]
    assert list(first_chars(["abc", "def"], 3)) == ["abc"] and list(first_chars(["ab"], 9)) == ["ab"]
    assert bytes_per_token(lambda text: [0] * len(text), ["é", "abc"]) == 5 / 4
