"""Track fineweb from the command line to the report: stages, two processes as one, what compiles, what is refused."""

import dataclasses
import json
import os
import signal
import time

import pytest
import torch

import train
from core import race as module
from core.command_line import parse_args
from core.communication import joined_world
from core.config import SYNTHETIC, RaceConfig
from core.data.row_loader import RowLoader
from core.layers import yarn
from core.machine import sources_digest
from core.models.fineweb import YARN_TURNS, rope_frequencies
from core.optim import Optimizer
from core.params import MUON
from core.race import describe, make_plan, open_shards, race, shapes
from core.report import read_log
from core.stages import (
    STAGES,
    last_tied_step,
    lr_multiplier,
    muon_momentum,
    scaled,
    softmax_scale,
    stage_of,
    total_steps,
)
from core.stopping import Stopped, TrainingError, UserError
from tests.test_processes import together

SCALE = 16
SHORT = tuple(dataclasses.replace(s, steps=n * SCALE) for s, n in zip(STAGES, (3, 2, 4, 2)))  # of each stage so many


def config(tmp_path, **options):
    options = {"eval_every": None, "val_tokens": 1024, "val_row_tokens": 256, "log_every": 1000} | options
    cache = str(tmp_path / "cache")
    return RaceConfig(data=SYNTHETIC, scale=SCALE, out=str(tmp_path / "run"), cache_dir=cache, device="cpu", **options)


def raced(cfg, stages=SHORT, vocab=None):
    """Trains, and returns losses of the log by event, and final weights. vocab: of shards in a folder."""
    found = []
    build, whole, config_of = module.build, module.STAGES, module.FinewebConfig
    module.build = lambda *args: found.append(build(*args)) or found[-1]
    module.STAGES = stages
    if vocab:
        module.FinewebConfig = lambda **sizes: config_of(**sizes | {"vocab_size": vocab})
    try:
        with joined_world("cpu") as world:
            race(cfg, world, 0.0, "a test")
            (racer,) = found
            events = read_log(racer_log(cfg)) if world.is_main else []
    finally:
        module.build, module.STAGES, module.FinewebConfig = build, whole, config_of
    weights = {name: p.detach().clone() for name, p in racer.model.named_parameters()}
    return [(e["event"], e["step"], e.get("loss", e.get("val_loss"))) for e in events], weights


def racer_log(cfg):
    return module.expanded(cfg.out) / "log.jsonl"


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are tiny: several threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_run_through_all_stages(tmp_path, capsys):
    """As a user starts it: 80 steps, in which the loss falls by a third of what can be learnt."""
    out = tmp_path / "run"
    options = ["fineweb", "--data", SYNTHETIC, "--scale", "16", "--val-tokens", "8192", "--val-row-tokens", "512"]
    options += ["--eval-every", "52", "--device", "cpu", "--out", str(out), "--cache-dir", str(tmp_path / "cache")]
    train.main([*options, "--log-every", "20"])
    summary = json.loads((out / "summary.json").read_text())
    events = read_log(out / "log.jsonl")
    steps = [e for e in events if e["event"] == "step"]
    evals = {e["step"]: e["val_loss"] for e in events if e["event"] == "eval"}
    assert [e["step"] for e in steps] == list(range(80)) and list(evals) == [52, 80]
    assert evals[80] == summary["val_loss"] < evals[52] < 4.5 < 6.2  # ln(512) is what an untrained model has
    assert summary["val_loss"] < 3.9
    tokens = sum(8 * s.steps * s.row_tokens for s in scaled(STAGES, 16))
    assert summary["tokens"] == tokens and summary["steps"] == 80 and summary["scale"] == 16
    assert summary["preset"] == "fineweb" and summary["val_tokens"] == 8192
    assert summary["sources_digest"] == sources_digest() and summary["seed"] == 42 and "fineweb" in summary["command"]
    assert 0 < summary["total_training_time_s"] < summary["wall_time_s"]
    spent = sum(e["step_s"] for e in steps)
    assert summary["total_training_time_s"] >= 0.95 * spent
    assert (out / "loss.png").stat().st_size > 1000
    report = (out / "report.md").read_text()
    assert f"validation loss {summary['val_loss']:.4f}" in report and f"{tokens:,} tokens" in report
    assert json.loads((out / "config.json").read_text())["scale"] == 16
    assert "validation" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds a run already"):
        train.main(options)


def test_two_processes_are_one(tmp_path):
    """Losses, validation and weights; among them steps in which tables wait, and the head's parting from the
    embedding."""
    cfg = config(tmp_path, eval_every=5)
    want, weights = raced(cfg)
    assert last_tied_step(scaled(SHORT, SCALE)) == 7 and [s for e, s, _ in want if e == "eval"] == [5, 10, 11]
    ranks = together(raced, dataclasses.replace(cfg, out=str(tmp_path / "two")))
    if errors := [r for r in ranks if isinstance(r, BaseException)]:
        raise errors[0]
    (got, mine), (_, others) = ranks
    assert [event[:2] for event in got] == [event[:2] for event in want]
    for (_, _, a), (_, _, b) in zip(got, want):
        assert a is b is None or a == pytest.approx(b, rel=1e-4)
    for name, p in weights.items():
        assert torch.equal(mine[name], others[name]), name
        assert ((mine[name] - p).norm() / p.norm()).item() < 1e-3, name


def test_the_head_parts_from_the_embedding(tmp_path, monkeypatch):
    """Both are one until the last tied step, and go on from the same numbers, moments and all."""
    seen = []
    step = module.train_step

    def noted(racer, number, *args):
        outcome = step(racer, number, *args)
        model, state = racer.model, racer.optimizer.state
        same = torch.equal(model.wte, model.lm_head)
        same &= all(torch.equal(state[f"wte.{n}"], state[f"lm_head.{n}"]) for n in ("exp_avg", "exp_avg_sq"))
        seen.append((number, model.tied, same))
        return outcome

    monkeypatch.setattr(module, "train_step", noted)
    raced(config(tmp_path))
    assert [tied for _, tied, _ in seen] == [True] * 7 + [False] * 4
    assert [same for *_, same in seen[7:]] == [True, True, False, False]  # AdamW steps again in step 9


def test_matrices_move_in_each_step_and_tables_in_every_second(tmp_path, monkeypatch):
    moved = []
    step = module.train_step

    def noted(racer, number, *args):
        names = ("attn_qk.0", "mlp_up.0", "lm_head", "value_embeds", "bigram_embed", "attn_resid", "mix_bias_0")
        before = {name: racer.optimizer.params[name].detach().clone() for name in names}
        outcome = step(racer, number, *args)
        moved.append({name for name in names if not torch.equal(before[name], racer.optimizer.params[name])})
        return outcome

    monkeypatch.setattr(module, "train_step", noted)
    raced(config(tmp_path))
    matrices = {"attn_qk.0", "mlp_up.0"}
    assert all(names == matrices for names in moved[::2])
    others = {"lm_head", "value_embeds", "bigram_embed", "attn_resid", "mix_bias_0"}
    assert all(names == matrices | others for names in moved[3::2])


def test_tables_step_by_the_gradients_of_two_batches(tmp_path, monkeypatch):
    """The rows of the even step's tokens have a gradient in the odd step, and none after it."""
    read, moved, micro_step, update = [], [], module.micro_step, Optimizer.step
    racers = []

    def reading(racer, stage, at, idx, *args):
        racers[:] = [racer]
        read.append(set(idx.tolist()))
        return micro_step(racer, stage, at, idx, *args)

    def noted(optimizer, gradients, **options):
        rows = racers[0].gradients.by_name["value_embeds"].abs().sum(1).nonzero().flatten()
        moved.append((set(rows.tolist()), set().union(*read)))
        if options["step"] % 2:
            read.clear()
        update(optimizer, gradients, **options)

    monkeypatch.setattr(module, "micro_step", reading)
    monkeypatch.setattr(Optimizer, "step", noted)
    raced(config(tmp_path))
    assert len(moved) == 11 and all(rows == tokens for rows, tokens in moved[3:])  # the values' way is open from 3 on


def test_all_stages_compile_before_the_clock_and_none_later(tmp_path, monkeypatch):
    """And warming up leaves no trace: the run has the bits of one that is not compiled."""
    want, plain = raced(config(tmp_path / "plain"))
    compile_, warm_up, found = torch.compile, module.warm_up, []
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend="eager", **options))

    def and_no_more(*args):
        found.append(warm_up(*args))
        torch._dynamo.config.error_on_recompile = True
        return found[-1]

    monkeypatch.setattr(module, "warm_up", and_no_more)
    torch._dynamo.reset()
    try:
        got, weights = raced(config(tmp_path, compile=True))
    finally:
        torch._dynamo.config.error_on_recompile = False
        torch._dynamo.reset()
    assert found[0]["compile_s"] > 0
    assert [e for e in got if e[0] == "step"] == [e for e in want if e[0] == "step"]
    assert all(torch.equal(p, plain[name]) for name, p in weights.items())


def test_the_loader_gives_what_stages_say(tmp_path):
    cfg = config(tmp_path)
    plan = make_plan(cfg, 1)
    shards = open_shards(cfg, plan, lambda sentence: None)
    with RowLoader(shards, shapes(plan.stages), bos=511, vocab_size=512) as loader:
        for step in (0, 1):
            rows = loader.next_step()
            stage = plan.stages[stage_of(step, plan.stages)[0]]
            assert len(rows) == 8 and all(len(row.inputs) == stage.row_tokens for row in rows)
            assert all(row.inputs[0] == 511 and len(row.cu_seqlens) == stage.max_docs + 1 for row in rows)


def test_a_diverging_run_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "lr_multiplier", lambda step, stages: float("nan"))
    with pytest.raises(TrainingError, match="training stopped at step 1: the loss is nan"):
        raced(config(tmp_path))
    assert read_log(racer_log(config(tmp_path)))[-1]["event"] == "stop"


@pytest.mark.parametrize(
    "options, says",
    [
        (["--scale", "3"], "scale is 3: expected a divisor"),
        (["--scale", "17"], "--scale is 17: expected 1 to 16"),
        (["--val-tokens", "1000"], "--val-tokens is 1000: expected a multiple of --val-row-tokens"),
        (["--data", "nowhere"], "nowhere: expected synthetic, fineweb10B, or a folder"),
        (["--data", "nowhere", "--dry-run"], "nowhere: expected synthetic, fineweb10B, or a folder"),
        (["--kernels", "fast"], "fast"),
    ],
    ids=str,
)
def test_what_is_refused(options, says, tmp_path):
    with pytest.raises(UserError, match=says):
        train.main(["fineweb", "--device", "cpu", "--out", str(tmp_path / "run"), *options])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [(), ("--dry-run",)], ids=str)
def test_processes_that_do_not_divide_the_rows_are_refused(options, tmp_path, monkeypatch):
    monkeypatch.setattr("core.communication._meet", lambda *args: None)
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(UserError, match="8 rows a step do not divide over 5 processes"):
        train.main(["fineweb", "--device", "cpu", "--out", str(tmp_path / "run"), "--data", SYNTHETIC, *options])
    assert not (tmp_path / "run").exists()


def test_text_that_is_too_short_is_refused_before_anything_is_written(tmp_path):
    cfg = config(tmp_path)
    shards = open_shards(cfg, make_plan(cfg, 1), lambda sentence: None)
    folder = shards.path(shards.validation).parent
    for name, _ in shards.train[1:]:
        (folder / name).unlink()
    short = tuple(dataclasses.replace(s, steps=400 * SCALE) for s in STAGES)
    with pytest.raises(UserError, match="tokens are left to train on in 1 shards"):
        raced(dataclasses.replace(cfg, data=str(folder)), short, vocab=512)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_what_a_step_is_told_and_what_stages_change(tmp_path, monkeypatch):
    """The optimizer's hyperparameters, rotary frequencies, prefixes, and the last validation's windows."""
    told, stages = [], scaled(SHORT, SCALE)
    step, update, validate = module.train_step, Optimizer.step, module.validate

    def noted(optimizer, gradients, **options):
        told.append({name: options[name] for name in ("step", "lr_mult", "momentum", "decay_mult", "adam_steps")})
        update(optimizer, gradients, **options)

    def seen(racer, number, *args):
        told_before = len(told)
        outcome = step(racer, number, *args)
        assert len(told) == told_before + 1
        told[-1] |= {"frequencies": racer.model.frequencies.clone(), "prefixes": racer.model.prefixes.tolist()}
        return outcome

    ends = []
    monkeypatch.setattr(Optimizer, "step", noted)
    monkeypatch.setattr(module, "train_step", seen)
    monkeypatch.setattr(module, "validate", lambda *args: ends.append(args[3:6]) or validate(*args))
    racers = []
    build = module.build
    monkeypatch.setattr(module, "build", lambda *args: racers.append(build(*args)) or racers[-1])
    raced(config(tmp_path, eval_every=4))
    frequencies, widths = rope_frequencies(8), [24, 56, 88, 104]
    for i, now in enumerate(told):
        number, _ = stage_of(i, stages)
        if i and number != stage_of(i - 1, stages)[0]:
            frequencies = yarn(frequencies, widths[number - 1], widths[number], YARN_TURNS)
        assert now["step"] == i and now["adam_steps"] == (i // 2 if i % 2 else -1)
        assert now["lr_mult"] == now["decay_mult"] == lr_multiplier(i, stages)
        assert now["momentum"] == muon_momentum(i, stages)
        torch.testing.assert_close(now["frequencies"], frequencies)
        assert now["prefixes"][123] == 12 and now["prefixes"][7] == -1  # made-up tokens are spelled by their numbers
    scales = [softmax_scale(widths[: i + 1]) for i in range(4)]
    assert [(s, (at.short, at.long, at.scale)) for s, _, at in ends] == [
        (4, (24, 56, scales[1])), (8, (40, 88, scales[2])), (11, (48, 160, scales[3])),
    ]  # fmt: skip
    (racer,) = racers
    optimizer = racer.optimizer
    assert optimizer.lrs["value_embeds"] == pytest.approx(0.6) and optimizer.lrs[MUON] == 0.023
    assert optimizer.weight_decay == pytest.approx(1.2 * 0.023)
    group = optimizer.groups["lm_head"]
    assert group.betas == (0.5, 0.95) and group.cautious and group.decay == pytest.approx(0.008 * 0.005 * 150)


def test_the_clock_stands_still_in_validations(tmp_path, monkeypatch):
    validate = module.validate

    def slow(*args):
        time.sleep(1.0)
        return validate(*args)

    monkeypatch.setattr(module, "validate", slow)
    cfg = config(tmp_path, eval_every=2)
    raced(cfg)
    events = read_log(racer_log(cfg))
    evals = [e for e in events if e["event"] == "eval"]
    assert len(evals) == 6
    on_the_clock = events[-1]["total_training_time_s"]
    assert on_the_clock < evals[-1]["time"] - events[0]["time"] - 6.0
    assert on_the_clock > 0.95 * sum(e["step_s"] for e in events if e["event"] == "step")


def test_a_signal_ends_the_run_between_steps_or_in_a_validation(tmp_path, monkeypatch):
    step, validate = module.train_step, module.validate

    def interrupted(racer, number, *args):
        if number == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step(racer, number, *args)

    monkeypatch.setattr(module, "train_step", interrupted)
    with pytest.raises(Stopped, match="stopped by SIGINT after 6 of 11 steps; runs of this track start again"):
        raced(config(tmp_path / "a"))

    def in_it(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return validate(*args)

    monkeypatch.setattr(module, "train_step", step)
    monkeypatch.setattr(module, "validate", in_it)
    cfg = config(tmp_path / "b", eval_every=4)
    with pytest.raises(Stopped, match="stopped by SIGINT after 4 of 11 steps"):
        raced(cfg)
    assert [e["event"] for e in read_log(racer_log(cfg))][-2:] == ["step", "stop"]


def test_a_signal_in_the_last_step_ends_the_run_in_its_validation(tmp_path, monkeypatch):
    step = module.train_step

    def interrupted(racer, number, *args):
        if number == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return step(racer, number, *args)

    monkeypatch.setattr(module, "train_step", interrupted)
    with pytest.raises(Stopped, match="after 11 of 11 steps"):
        raced(config(tmp_path))


def test_the_plan(capsys):
    train.main(["fineweb", "--dry-run"])
    said = capsys.readouterr().out
    assert "parameters 636 M" in said and "steps 1285, tokens 339 M" in said and "stage 4   15 steps" in said
    assert "rates x 1 to 1," in said and "rates x 0.15 to 0.15," in said
    assert said.splitlines() == list(describe(make_plan(parse_args(["fineweb"]), 1)))
    assert total_steps(STAGES) == 1285
