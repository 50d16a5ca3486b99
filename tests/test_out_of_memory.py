"""A lack of memory is one sentence that says what to try, and the command that tries it."""

import json
import re

import pytest
import torch

import eval as evaluation
import train
from core.stopping import CPU_OUT_OF_MEMORY, TrainingError, out_of_memory
from tests.test_train import run


def test_the_real_message_of_the_cpu_allocator():
    with pytest.raises(TrainingError, match="out of memory for a test: buy more"):
        with out_of_memory("a test", lambda: "buy more"):
            torch.empty(2**60, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="something else"), out_of_memory("a test", lambda: "buy more"):
        raise RuntimeError("something else")


def short_of_memory(monkeypatch, owner, name, when):
    """owner.name raises torch's error in call number `when` (from 0)."""
    honest, calls = getattr(owner, name), iter(range(10**6))

    def short(*args, **kwargs):
        if next(calls) == when:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return honest(*args, **kwargs)

    monkeypatch.setattr(owner, name, short)


@pytest.mark.parametrize(
    "options, name, when, says",
    [
        ([], "train_step", 2, "out of memory for 16 rows per forward pass: start again with --device-batch-size 8$"),
        (
            ["--device-batch-size", "1"],
            "train_step",
            2,
            "1 rows .*fewer than one is impossible; try a shorter --seq-len.*start again",
        ),
        ([], "build", 0, "out of memory for weights and optimizer state: try --precision bf16"),
    ],
)
def test_before_the_first_checkpoint(tiny, tmp_path, monkeypatch, options, name, when, says):
    short_of_memory(monkeypatch, train, name, when)
    with pytest.raises(TrainingError, match=says):
        run(tiny, tmp_path / "run", *options)


def test_samples_ask_for_shorter_ones(tiny, tmp_path, monkeypatch):
    out = run(tiny, tmp_path / "run")
    for module in (train, evaluation):
        short_of_memory(monkeypatch, module, "sample_texts", 0)
    with pytest.raises(
        TrainingError, match="out of memory for samples: try fewer --sample-tokens.*step_000006 is saved"
    ):
        run(tiny, tmp_path / "other")
    with pytest.raises(TrainingError, match="out of memory for samples: try shorter prompts"):
        evaluation.main([str(out), "--metrics", "sample"])


@pytest.mark.parametrize("name, when, checkpoint", [("train_step", 9, "step_000008"), ("evaluate", 3, "step_000012")])
def test_the_advice_can_be_followed(tiny, tmp_path, monkeypatch, name, when, checkpoint):
    out = tmp_path / "run"
    short_of_memory(monkeypatch, train, name, when)
    with pytest.raises(TrainingError) as told:
        run(tiny, out)
    advice = f"continue {checkpoint} with: python train.py (--resume {re.escape(str(out))} --device-batch-size 8)$"
    train.main(re.search(advice, str(told.value)).group(1).split())
    assert json.loads((out / "config.json").read_text())["device_batch_size"] == 8


def test_evaluation_names_its_own_option(tiny, tmp_path, monkeypatch):
    out = run(tiny, tmp_path / "run", "--steps", "2")

    def short(*args, **kwargs):
        raise RuntimeError(f"[enforce fail] {CPU_OUT_OF_MEMORY}: you tried to allocate 8 bytes")

    monkeypatch.setattr(evaluation, "score", short)
    with pytest.raises(TrainingError, match="6 rows per forward pass: try --device-batch-size 3"):
        evaluation.main([str(out), "--metrics", "bpb", "--device-batch-size", "6"])
    with pytest.raises(TrainingError, match="try --device cpu"):
        evaluation.main([str(out), "--metrics", "bpb", "--device-batch-size", "1"])
