"""The program end to end on a tiny run: what it leaves, how it stops, and that it continues exactly."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader

import eval as evaluation
import train
from core import checkpoint, schedule
from core.config import from_dict
from core.data.corpus import open_corpus
from core.data.tokenizer import Tokenizer
from core.models.gpt2 import GPT
from core.optim import Optimizer
from core.run import FORMAT, State
from core.stopping import TrainingError, UserError, one_sentence
from kernels.fp8 import empty_fp8
from kernels.ops import BY_NAME
from kernels.quantise_weight import quantise_weight

ROOT = Path(train.__file__).resolve().parent


def plan_of(out):
    """What --dry-run --json prints for the run in `out`."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        train.main(["--resume", str(out), "--dry-run", "--json"])
    return text.getvalue()


def events(out, kind=None):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [e for e in lines if kind in (None, e["event"])]


def losses(out):
    return {e["step"]: e["loss"] for e in events(out, "step")}


def steps_logged(out):
    """Of a run that is writing its log: the last line may be half there."""
    path = out / "log.jsonl"
    return path.read_text().count('"event": "step"') if path.exists() else 0


def final_tensors(out):
    return tensors_of(checkpoint.find(out))


def tensors_of(folder):
    """Every tensor of a checkpoint, put together from the files of all its processes."""
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(meta.size, dtype=meta.properties.dtype) for name, meta in metadata.items()}
    checkpoint.load_tensors(folder, tensors)
    return tensors


def run(tiny, out, *options):
    train.main([*tiny, "--out", str(out), *options])
    return out


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus_dir, cache_dir, request):
    out = tmp_path_factory.mktemp("finished") / "run"
    sizes = "--depth 2 --d-model 32 --d-head 16 --seq-len 32 --vocab-size 300 --total-batch-size 512 --steps 14"
    pace = "--eval-every 5 --eval-tokens 500 --sample-every 6 --sample-tokens 4 --save-every 4 --profile 1"
    data = ["--val-every", "10", "--data", str(corpus_dir), "--cache-dir", str(cache_dir), "--device", "cpu"]
    train.main([*sizes.split(), *pace.split(), *data, "--out", str(out)])
    return out


def test_a_run_leaves_everything_behind(finished, corpus_dir):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["steps"] == 14 and summary["tokens"] == 14 * 512
    assert summary["flops"] == summary["tokens"] * json.loads(plan_of(finished))["flops_per_token"]
    assert set(summary) >= {
        "val_bpb", "total_training_time_s", "tok_per_s", "mfu", "peak_memory_bytes", "params", "kernels", "git",
        "compressors", "non_matmul_share", "wall_time_s", "seed",
    }  # fmt: skip
    assert summary["energy_j"] is None and summary["cost_dollars"] is None  # of GPUs alone
    assert summary["command"].startswith("python train.py --depth 2 --d-model 32 ")
    assert summary["counted_steps"] == 2  # of 14, without the first 11 and the profiled one
    assert 0 < summary["total_training_time_s"] < summary["wall_time_s"]
    assert summary["tok_per_s"] == pytest.approx(2 * 512 / summary["total_training_time_s"])
    assert 0 < summary["non_matmul_share"] < 1
    assert summary["profile_files"] == ["profile/memory.json", "profile/trace.json.gz"]
    assert json.loads((finished / "config.json").read_text())["model"]["depth"] == 2
    report = (finished / "report.md").read_text()
    assert summary["command"] in report and "FLOP |" in report and "kWh" not in report and "$" not in report
    assert f"{summary['val_bpb']:.4f}" in report and "xz -9e" in report and "## Samples" in report
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in checkpoint.checkpoints(finished)] == ["step_000012", "step_000014"]
    assert not list(finished.rglob("*.pt")) and not list(finished.rglob("*.pkl")) and not list(finished.rglob(".*"))


def test_log_has_every_step_and_the_intervals(finished):
    assert sorted(losses(finished)) == list(range(14))
    assert [e["step"] for e in events(finished, "eval")] == [0, 5, 10]
    assert [e["step"] for e in events(finished, "sample")] == [6, 12, 14]
    assert [e["step"] for e in events(finished, "checkpoint")] == [4, 8, 12, 14]
    assert losses(finished)[13] < losses(finished)[0]


def test_final_score_covers_every_byte(finished, corpus_dir, tmp_path, capsys):
    _, val = open_corpus(str(corpus_dir), seed=42, val_every=10, cache_dir=tmp_path)
    size = sum((corpus_dir / val.key(i)).stat().st_size for i in range(len(val)))
    assert f"all {len(val)} validation documents" in events(finished, "end")[0]["scope"]
    assert f"({size:,} bytes)" in events(finished, "end")[0]["scope"]
    evaluation.main([str(finished), "--metrics", "bpb", "--json"])
    scored = json.loads(capsys.readouterr().out)  # what was counted, not what was meant
    tokenizer = Tokenizer.load(checkpoint.find(finished))
    assert scored["val_bytes"] == size and scored["val_tokens"] == sum(len(tokenizer.encode(text)) for text in val)
    assert scored["val_bpb"] == events(finished, "end")[0]["val_bpb"]


def test_samples_are_made_as_the_config_says(finished, capsys):
    cfg = from_dict(json.loads((finished / "config.json").read_text()))
    last = events(finished, "sample")[-1]
    assert (last["temperature"], last["top_k"], last["seed"]) == (cfg.temperature, cfg.top_k, cfg.seed)
    sampling = ["--temperature", str(cfg.temperature), "--top-k", str(cfg.top_k), "--seed", str(cfg.seed)]

    def samples(*options):
        evaluation.main([str(finished), "--metrics", "sample", "--sample-tokens", "4", "--json", *options])
        return json.loads(capsys.readouterr().out)["samples"]

    assert samples(*sampling) == last["samples"]
    assert samples(*sampling, "--seed", "7") != last["samples"]
    assert samples("--temperature", "2", "--top-k", "1") == samples("--temperature", "0")


def test_evaluation_repeats_the_score(finished, capsys):
    evaluation.main(
        [str(finished), "--metrics", "bpb,sample", "--prompt", "the model", "--sample-tokens", "3", "--json"]
    )
    result = json.loads(capsys.readouterr().out)
    assert result["val_bpb"] == json.loads((finished / "summary.json").read_text())["val_bpb"]
    assert [s["prompt"] for s in result["samples"]] == ["the model"]
    evaluation.main([str(finished / "checkpoints" / "step_000012"), "--metrics", "bpb", "--max-bytes", "2000"])
    text = capsys.readouterr().out
    assert "step_000012" in text and "the first" in text


@pytest.mark.parametrize("prompts", [["the model"], ["the model", ""]])
def test_evaluation_prints_scores_then_samples(finished, capsys, prompts):
    """A single sample is streamed, several are made at once: the first has the same text."""
    options = ["--max-bytes", "2000", "--sample-tokens", "5", "--prompt", *prompts]
    evaluation.main([str(finished), *options, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert [s["prompt"] for s in result["samples"]] == prompts
    evaluation.main([str(finished), *options])
    title, score, scope, samples = capsys.readouterr().out.split("\n", 3)
    assert title == f"{result['checkpoint']} on {result['device']}"
    assert f"{result['val_bpb']:.4f} bits per byte" in score and result["val_scope"] in scope
    assert samples == "".join(f"--- {s['prompt']!r}\n{s['prompt']}{s['text']}\n---\n" for s in result["samples"])


@pytest.mark.parametrize(
    "argv, says",
    [
        (["nowhere"], "does not exist"),
        (["."], "holds no checkpoint"),
        (["RUN", "--metrics", "bpb,piqa"], "unknown piqa"),
        (["RUN", "--metrics", ","], "empty"),
        (["RUN", "--temperature", "nan"], "--temperature is nan"),
        (["RUN", "--seed", "99999999999999999999"], "--seed is 9"),
        (["RUN", "--device-batch-size", "0"], "--device-batch-size is 0"),
        (["RUN", "--max-bytes", "0"], "--max-bytes is 0"),
        (["RUN", "--kernels", "fast"], "unknown backend"),
        (["RUN", "--top-k", "-1"], "--top-k is -1"),
        (["RUN", "--temperature", "-0.5"], "--temperature is -0.5"),
    ],
)
def test_evaluation_errors(finished, argv, says):
    with pytest.raises(ValueError, match=says):
        evaluation.main([str(finished) if a == "RUN" else a for a in argv])


def test_a_killed_run_resumes_to_the_same_bits(tiny, tmp_path):
    """SIGKILL at an arbitrary moment after a checkpoint, with steps and prefetched batches beyond it."""
    whole = run(tiny, tmp_path / "whole", "--steps", "60", "--sample-every", "100")
    killed = tmp_path / "killed"
    argv = [*tiny, "--steps", "60", "--sample-every", "100", "--out", str(killed)]
    child = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *argv], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while steps_logged(killed) < 15:
        assert child.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    at = checkpoint.find(killed)
    assert 8 <= int(at.name[5:]) < 60
    (killed / "log.jsonl").open("a").write('{"event": "step", "st')  # the kill may also cut a line
    train.main(["--resume", str(killed)])
    assert losses(killed) == losses(whole)
    assert len(events(killed, "step")) == 60
    assert [e["event"] for e in events(killed)].count("resume") == 1
    a, b = final_tensors(whole), final_tensors(killed)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert State.read(checkpoint.find(whole)).loader == State.read(checkpoint.find(killed)).loader


@pytest.mark.parametrize(
    "options", [["--precision", "bf16"], ["--packing", "crop", "--device-batch-size", "4", "--within-documents"]]
)
def test_resume_is_exact_in_other_modes(tiny, tmp_path, options, capsys):
    whole = run(tiny, tmp_path / "whole", *options, "--keep-checkpoints", "9")
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    for path in checkpoint.checkpoints(other)[1:]:
        shutil.rmtree(path)
    train.main(["--resume", str(other)])
    a, b = final_tensors(whole), final_tensors(other)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert losses(whole) == losses(other)
    capsys.readouterr()
    # in the types that it was trained in, and in its batches: on some CPUs a product's last bits depend on its rows
    rows = json.loads((whole / "config.json").read_text())["device_batch_size"] or 16  # all of a step
    evaluation.main([str(other), "--metrics", "bpb", "--json", "--device-batch-size", str(rows)])
    score = json.loads((whole / "summary.json").read_text())["val_bpb"]
    assert json.loads(capsys.readouterr().out)["val_bpb"] == score


def test_resuming_keeps_generators_memory_and_wall_time(tiny, tmp_path, monkeypatch):
    honest_step, honest_read = train.train_step, State.read

    def draws(*args):
        torch.rand(1)  # nothing in a step does today
        return honest_step(*args)

    monkeypatch.setattr(train, "train_step", draws)
    out = run(tiny, tmp_path / "run")
    whole = final_tensors(out)
    shutil.rmtree(checkpoint.find(out))
    monkeypatch.setattr(
        State,
        "read",
        lambda folder: dataclasses.replace(honest_read(folder), wall_time_s=1e6, peak_memory_bytes=10**15),
    )
    train.main(["--resume", str(out)])
    assert torch.equal(final_tensors(out)["rng.cpu"], whole["rng.cpu"])
    summary = json.loads((out / "summary.json").read_text())
    assert summary["peak_memory_bytes"] == 10**15 and 1e6 < summary["wall_time_s"] < 1e6 + 600
    monkeypatch.undo()
    saved = State.read(checkpoint.find(out))
    assert saved.peak_memory_bytes == 10**15 and saved.wall_time_s > 1e6


def test_resuming_a_finished_run_only_reports_again(finished, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    (out / "report.md").unlink()
    train.main(["--resume", str(out)])
    assert (out / "report.md").exists()
    assert losses(out) == losses(finished)
    before, after = (json.loads((d / "summary.json").read_text()) for d in (finished, out))
    assert after["val_bpb"] == before["val_bpb"] and after["total_training_time_s"] == before["total_training_time_s"]


def test_a_finished_run_can_be_extended(finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    used, honest = {}, Optimizer.step

    def spied(self, grads, *, step, partner, **hyper):
        used[step] = hyper
        honest(self, grads, step=step, partner=partner, **hyper)

    monkeypatch.setattr(Optimizer, "step", spied)
    train.main(["--resume", str(out), "--steps", "20"])
    cfg = from_dict(json.loads((out / "config.json").read_text()))
    assert cfg.steps == 20
    assert used == {step: schedule.at(step, 20, cfg.optim) | {"adam_steps": step} for step in range(14, 20)}
    before = losses(finished)
    assert {step: loss for step, loss in losses(out).items() if step < 14} == before and len(losses(out)) == 20
    was, now = (schedule.at(14, n, cfg.optim)["lr_mult"] for n in (14, 20))
    text = capsys.readouterr().out
    assert "the run now has 20 steps, not 14: from step 14 on" in text and f"is {now:.4g} instead of {was:.4g}" in text
    assert json.loads((out / "summary.json").read_text())["tokens"] == 20 * 512
    assert json.loads((out / "summary-14-steps.json").read_text())["tokens"] == 14 * 512
    assert (out / "report-14-steps.md").exists()
    train.main(["--resume", str(out / "checkpoints" / "step_000016"), "--steps", "18"])  # and be cut short
    assert len(losses(out)) == 18
    with pytest.raises(ValueError, match="--steps is 17, but the checkpoint has made 18 already: expected 19 or more"):
        train.main(["--resume", str(out), "--steps", "17"])
    assert len(losses(out)) == 18


def test_an_extended_run_is_evaluated_where_it_ended_before(tiny, tmp_path):
    out = run(tiny, tmp_path / "run", "--steps", "10")
    assert [e["step"] for e in events(out, "eval")] == [0, 5]
    train.main(["--resume", str(out), "--steps", "16"])
    assert [e["step"] for e in events(out, "eval")] == [0, 5, 10, 15]
    assert [e["step"] for e in events(out, "sample")] == [6, 10, 12, 16]


@pytest.mark.parametrize("device_batch", ["4", "16"])
def test_micro_batches_do_not_change_the_losses(tiny, tmp_path, device_batch, finished):
    out = run(tiny, tmp_path / "run", "--steps", "14", "--device-batch-size", device_batch)
    for step, loss in losses(finished).items():
        assert losses(out)[step] == pytest.approx(loss, rel=1e-4)


def test_kernels_train_like_the_reference(tiny, tmp_path, monkeypatch, capsys, backend):
    """Forward, backward and optimizer, with every op that has a Triton kernel on it (interpreted, on a CPU), or a CUDA
    one (emulated)."""
    monkeypatch.setattr(train, "evaluate", lambda *_: 1.0)  # thousands of tokens: minutes in the interpreter
    options = ["--steps", "3", "--depth", "1", "--seq-len", "4", "--total-batch-size", "32", "--sample-tokens", "0"]
    ref = run(tiny, tmp_path / "ref", *options, "--kernels", "ref")
    capsys.readouterr()
    fast = run(tiny, tmp_path / "fast", *options, "--kernels", backend)
    text = capsys.readouterr().out
    assert re.search(rf"rms_norm +M=32 N=32 +float32 +{backend} +forced", text)
    for step, loss in losses(ref).items():
        assert losses(fast)[step] == pytest.approx(loss, rel=1e-4)
    weights = final_tensors(ref), final_tensors(fast)
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])  # it was another code
    kernels = json.loads((fast / "summary.json").read_text())["kernels"]
    assert {row["op"] for row in kernels["choices"]} == set(BY_NAME) - {
        "quantise_weight",
        "fp8_linear",
        "fp8_mlp",
    }  # of fp8
    have = {row["op"]: row["backend"] for row in kernels["choices"]}
    assert all(chosen == (backend if backend in BY_NAME[op].backends else "ref") for op, chosen in have.items())
    assert events(fast, "start")[0]["kernels"] == kernels


@pytest.fixture
def watched_head(monkeypatch):
    """Every loss that is trained on, in fp8: the copy is that of the head as it is. Counts them."""
    honest, calls = GPT.loss, []

    def loss(self, hidden, targets, reduction):
        if reduction != "none" and self.fp8_head:
            want = empty_fp8(self.lm_head.detach())
            quantise_weight.backends["ref"](self.lm_head.detach(), *want)
            for name, t in want._asdict().items():
                mine = getattr(self, f"head_{name}")
                assert torch.equal(mine.float(), t.float()), f"stale {name}"
            calls.append(self.head_scale.item())
        return honest(self, hidden, targets, reduction)

    monkeypatch.setattr(GPT, "loss", loss)
    return calls


@pytest.mark.parametrize("options", [(), ("--precision", "bf16"), ("--no-untied-head",)], ids=" ".join)
def test_the_fp8_copy_of_the_head_is_never_stale(tiny, tmp_path, watched_head, options):
    """After each step, after loading, and in a run that goes on, which ends with the same bits."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run(tiny, straight, "--fp8-head", *options)
    assert len(set(watched_head)) == 12  # made anew in every step
    run(tiny, resumed, "--fp8-head", *options)
    shutil.rmtree(checkpoint.find(resumed))
    watched_head.clear()
    train.main(["--resume", str(resumed)])
    assert len(watched_head) == 4
    a, b = final_tensors(straight), final_tensors(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a) and not any("head_q" in name for name in a)


def test_an_fp8_head_changes_the_losses_a_little(tiny, tmp_path):
    exact, rounded = (losses(run(tiny, tmp_path / str(i), *options)) for i, options in enumerate(((), ("--fp8-head",))))
    apart = [abs(rounded[step] - exact[step]) for step in exact]
    assert 1e-6 < max(apart) < 0.05, apart


def test_kernels_that_cannot_run_are_told_before_any_work(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="rms_norm=triton cannot run on cpu with M=.*available there: ref"):
        run(tiny, tmp_path / "run", "--kernels", "rms_norm=triton", "--cache-dir", str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run").exists()


def test_two_processes_train_like_one(tiny, tmp_path):
    one = run(tiny, tmp_path / "one", "--steps", "10")
    two = tmp_path / "two"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(ROOT / "train.py"),
    ]
    done = subprocess.run(
        [*command, *tiny, "--steps", "10", "--out", str(two)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "rows over 2 process(es)" in done.stdout
    assert sorted(losses(two)) == list(range(10))
    for step, loss in losses(one).items():
        assert losses(two)[step] == pytest.approx(loss, rel=1e-4), step
    bpb = [json.loads((d / "summary.json").read_text())["val_bpb"] for d in (one, two)]
    assert bpb[0] == pytest.approx(bpb[1], rel=1e-4)
    # and one process takes over from two
    for path in checkpoint.checkpoints(two)[1:]:
        path.rename(path.with_name(path.name + ".away"))
    train.main(["--resume", str(two)])
    for step, loss in losses(one).items():
        assert losses(two)[step] == pytest.approx(loss, rel=1e-4), step


def test_non_finite_loss_stops_and_keeps_the_checkpoint(tiny, tmp_path, monkeypatch):
    honest = train.train_step

    def poisoned(trainer, step, stop):
        outcome = honest(trainer, step, stop)
        return torch.tensor([math.nan, 0]) if step == 6 else outcome

    monkeypatch.setattr(train, "train_step", poisoned)
    out = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"step 6: the loss is nan; the last good checkpoint is .*step_000004"):
        run(tiny, out)
    assert events(out)[-1]["event"] == "stop"
    assert [p.name for p in checkpoint.checkpoints(out)] == ["step_000004"]
    assert not (out / "summary.json").exists()


def test_non_finite_weights_are_not_saved(tiny, tmp_path, monkeypatch):
    honest = train.train_step

    def poisoned(trainer, step, stop):
        outcome = honest(trainer, step, stop)
        if step == 7:
            with torch.no_grad():
                trainer.model.mlp_up[0][0, 0, 0] = math.inf
        return outcome

    monkeypatch.setattr(train, "train_step", poisoned)
    with pytest.raises(TrainingError, match="mlp_up.0 is not finite"):
        run(tiny, tmp_path / "run")
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "run")] == ["step_000004"]


def test_the_first_word_may_be_a_run(tiny, tmp_path):
    out = run(tiny, tmp_path / "run", "--steps", "4")
    train.main([str(out), "--steps", "6", "--eval-every", "3"])
    assert sorted(losses(out)) == list(range(6)) and json.loads((out / "config.json").read_text())["steps"] == 6
    with pytest.raises(
        UserError, match="no-such-preset is neither a preset .quickstart, gpt2, fineweb. nor a run folder"
    ):
        train.main(["no-such-preset"])
    with pytest.raises(UserError, match="give one run to continue"):
        train.main([str(out), "--resume", str(tmp_path)])


def test_resume_refuses_another_run(finished, corpus_dir):
    with pytest.raises(ValueError, match="depth, matrix_lr"):
        train.main(["--resume", str(finished), "--depth", "3", "--matrix-lr", "0.5"])
    with pytest.raises(ValueError, match="preset quickstart, not gpt2"):
        train.main(["gpt2", "--resume", str(finished)])


def test_resume_refuses_a_changed_corpus(tiny, tmp_path, corpus_dir):
    data = tmp_path / "data"
    shutil.copytree(corpus_dir, data)
    out = run(tiny, tmp_path / "run", "--data", str(data))
    (data / "doc000.txt").write_text("something else")
    with pytest.raises(UserError, match="the training data changed since the checkpoint: ") as error:
        train.main(["--resume", str(out)])
    assert not re.search("[0-9a-f]{16}", str(error.value))  # digests say nothing to people
    (data / "doc000.txt").write_text((corpus_dir / "doc000.txt").read_text())


@pytest.mark.parametrize(
    "options, says",
    [
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--device-batch-size", "5"], "one of"),
        (["--kernels", "rms_norm=scaled_mm"], "rms_norm has no scaled_mm backend"),
        (["--kernels", "rms_norm=cublas"], "rms_norm has no cublas backend; rms_norm has ref, triton, cuda"),
        (["--kernels", "fast"], "unknown backend 'fast'"),
        (["--json"], "--dry-run"),
        (["--ns-steps", "6"], "--ns-steps is 6: expected 1 to 5"),
        (["--resume", "no/such/run"], "does not exist"),
        (["--vocab-size", "100"], "265"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(tiny, tmp_path, options, says, capsys):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped, one_sentence():
        run(tiny, out, *options)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "options, says",
    [
        (["--log-every", "0"], "--log-every is 0: expected 1 or more"),
        (["--save-every", "0"], "--save-every is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--matrix-lr", "nan"], "--matrix-lr is nan"),
        (["--temperature", "-1"], "--temperature is -1"),
        (["--warmdown-ratio", "2"], "expected 0 to 1"),
        (["--ratio", "inf"], "--ratio is inf"),
        (["--total-batch-size", "2560000000000"], "--total-batch-size is 2560000000000: expected 1 to 1e.09"),
    ],
)
def test_values_out_of_range_are_named(tiny, tmp_path, options, says):
    with pytest.raises(ValueError, match=says):
        run(tiny, tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_way_is_one_sentence(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped, one_sentence():
        run(tiny, tmp_path / "file" / "run")
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_resume_stays_in_its_folder(finished, tmp_path):
    with pytest.raises(ValueError, match="continues in the folder of the run"):
        train.main(["--resume", str(finished), "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_resuming_an_older_checkpoint_drops_the_later_ones(tiny, tmp_path, capsys):
    """Otherwise pruning would keep the stale later ones and delete the fresh ones."""
    out = run(tiny, tmp_path / "run", "--keep-checkpoints", "9")
    whole, steps = final_tensors(out), losses(out)
    train.main(["--resume", str(out / "checkpoints" / "step_000004"), "--keep-checkpoints", "2"])
    said = capsys.readouterr().out
    assert all(f"dropped step_{step:06d}, which comes after step 4" in said for step in (8, 12))
    assert [p.name for p in checkpoint.checkpoints(out)] == ["step_000008", "step_000012"]
    assert all(torch.equal(t, whole[name]) for name, t in final_tensors(out).items())
    assert losses(out) == steps and len(events(out, "step")) == 12
    assert [e["step"] for e in events(out, "checkpoint")] == [4, 8, 12]


def test_resume_notices_a_change_inside_a_file_of_the_same_size(tiny, tmp_path, corpus_dir):
    data = tmp_path / "data"
    shutil.copytree(corpus_dir, data)
    for path in data.iterdir():  # long enough that both ends stay
        path.write_text(path.read_text() * 200)
    out = run(tiny, tmp_path / "run", "--data", str(data), "--steps", "2", "--final-eval-bytes", "1000")
    path = sorted(data.iterdir())[0]
    text = path.read_text()
    path.write_text(text[: len(text) // 2] + "?" + text[len(text) // 2 + 1 :])
    with pytest.raises(UserError, match="training data changed"):
        train.main(["--resume", str(out)])


def test_moved_data_can_be_resumed(tiny, tmp_path, corpus_dir):
    data, moved = tmp_path / "data", tmp_path / "moved"
    shutil.copytree(corpus_dir, data)
    out = run(tiny, tmp_path / "run", "--data", str(data))
    before, score = losses(out), events(out, "end")[0]["val_bpb"]
    data.rename(moved)
    shutil.rmtree(checkpoint.find(out))
    train.main(["--resume", str(out), "--data", str(moved)])
    assert losses(out) == before and events(out, "end")[0]["val_bpb"] == score
    assert json.loads((out / "config.json").read_text())["data"]["path"] == str(moved)


def test_damaged_validation_rows_are_found_before_training(tiny, tmp_path):
    lines = [json.dumps({"text": f"document {i} " + "with words in it " * 20}) for i in range(300)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(lines))
    _, val = open_corpus(str(data), seed=42, val_every=10, cache_dir=tmp_path)
    row = int(val.key(len(val) - 1).split(":")[1])
    lines[row] = json.dumps({"words": "?"})
    data.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="text"):
        run(tiny, tmp_path / "run", "--data", str(data), "--eval-tokens", "10")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda f: (f / "state.json").write_text(f'{{"format": {FORMAT}}}'), "damaged"),
        (lambda f: (f / "state.json").write_text("[1]"), "damaged"),
        (
            lambda f: (f / "state.json").write_text((f / "state.json").read_text().replace("precision", "p")),
            "precision",
        ),
        (lambda f: (f / "state.json").write_bytes(b"\xff\x00"), "damaged"),
        (lambda f: next(f.glob("*.safetensors")).unlink(), "lost its .safetensors"),
        (lambda f: os.truncate(next(f.glob("*.safetensors")), 1000), "damaged"),
    ],
)
def test_damaged_checkpoints_are_named(finished, tmp_path, damage, says):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    damage(checkpoint.find(out))
    with pytest.raises(ValueError, match=says):
        train.main(["--resume", str(out)])


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(State)])
def test_each_value_of_a_checkpoints_state_is_checked(finished, tmp_path, name):
    folder = checkpoint.find(finished)
    state = json.loads((folder / "state.json").read_text())
    for checksum in ("files", "sha256"):
        del state[checksum]
    assert State.read(folder).to_json() == state
    for damage, says in ((lambda: state.pop(name), f"no {name}"), (lambda: state.update({name: [None]}), f"{name} is")):
        damage()
        (tmp_path / "state.json").write_text(json.dumps(state))
        with pytest.raises(UserError, match=f"{tmp_path}/state.json is damaged .{says}.*: use another checkpoint"):
            State.read(tmp_path)


def test_a_kill_while_saving_leaves_the_old_checkpoint(finished, tmp_path, monkeypatch):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    before = [p.name for p in checkpoint.checkpoints(out)]

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    tokenizer = Tokenizer.load(checkpoint.find(out))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(checkpoint.checkpoint_dir(out, 20), {"a": torch.ones(3)}, {"step": 20}, tokenizer)
    assert [p.name for p in checkpoint.checkpoints(out)] == before


def test_an_error_of_another_rank_is_told(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit), one_sentence():
        checkpoint.find("nowhere")
    assert capsys.readouterr().err.startswith("error on rank 1: nowhere")


def test_a_plan_for_a_gpu_needs_none(capsys):
    train.main("gpt2 --depth 24 --ratio 8 --device cuda --dry-run --json".split())
    plan = json.loads(capsys.readouterr().out)
    assert plan["memory_bytes"]["total"] < 80e9 and plan["device_batch_size"] >= 1


def test_defects_keep_their_traceback():
    def defect():
        raise ValueError("of our own")

    for bug in (lambda: json.loads("{"), defect, lambda: [][0]):
        with pytest.raises((ValueError, IndexError)), one_sentence():
            bug()


def test_a_run_folder_is_not_overwritten(tiny, finished):
    with pytest.raises(ValueError, match="holds a run already"):
        run(tiny, finished)


def test_dry_run_of_the_record(capsys):
    train.main("gpt2 --depth 24 --ratio 8 --dry-run --json".split())
    plan = json.loads(capsys.readouterr().out)
    assert [plan[k] for k in ("params_total", "params_scaling", "total_batch_size", "steps")] == [
        1384122122,
        729810624,
        1048576,
        5568,
    ]
    assert plan["tokens"] == 5568 * 1048576 and f"{plan['flops_per_token']:.4e}" == "4.7752e+09"
    train.main("gpt2 --depth 24 --ratio 8 --dry-run".split())
    text = capsys.readouterr().out
    assert "1,384,122,122" in text and "5,568 steps" in text and "predicted memory" in text


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    options = "--steps --depth --ratio --data --total-batch-size --device-batch-size --out --resume --device --kernels"
    for option in (*options.split(), "--precision", "--seed"):
        assert option + " " in text, option


def test_help_may_be_cut_short(monkeypatch):
    """As by `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout, pytest.raises(SystemExit) as stopped:
        monkeypatch.setattr(sys, "stdout", stdout)
        with one_sentence():
            train.main(["--help"])
    assert stopped.value.code == 0


def test_config_survives_json():
    from core.config import PRESETS, from_dict, preset, to_dict

    for name in PRESETS:
        for device in ("cpu", "cuda"):
            cfg = preset(name, device)
            assert from_dict(json.loads(json.dumps(to_dict(cfg)))) == cfg
    with pytest.raises(ValueError, match="another version"):
        from_dict({**to_dict(cfg), "no_such_field": 1})


def test_wrong_option_exits_with_two():
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--no-such-option"], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 2 and "no-such-option" in done.stderr + done.stdout
