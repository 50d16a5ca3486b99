"""Records: what is stored of runs, its statistics, and what is refused."""

import dataclasses
import hashlib
import json
import math

import pytest

from bench import records
from bench.records import FINEWEB_LOSS, main, p_above, t_survival
from core.config import preset, to_dict
from core.evals.core_metric import GPT2_CORE
from core.stopping import UserError

SUMMARY = {
    "preset": "gpt2",
    "git": {"commit": "0123456789abcdef", "dirty": False},
    "device": "8 x NVIDIA H100 80GB HBM3",
    "precision": "bfloat16",
    "versions": {"torch": "2.13.0"},
    "data": "texts: 10 documents to train on, 2 to validate",
    "steps": 100,
    "tokens": 1000,
    "flops": 1e9,
    "params": {"total": 10},
    "command": "torchrun --nproc-per-node=8 train.py gpt2",
    "core_whole": True,
    "core_scope": "all",
    "core_tasks": {"copa": {"accuracy": 0.6}, "piqa": {"accuracy": 0.7}},
    "val_bpb": 0.71,
    "wall_time_s": 7000.0,
    "tok_per_s": 1e6,
    "mfu": 0.4,
    "peak_memory_bytes": 10**10,
    "energy_j": 3.6e7,
    "cost_dollars": None,
}
SCORES, TIMES = (0.2700, 0.2704, 0.2708), (6000.0, 6010.0, 6020.0)
FINEWEB = {
    "preset": "fineweb",
    "git": SUMMARY["git"],
    "sources_digest": "0a1b2c3d4e5f",
    "device": "8 x NVIDIA H100 80GB HBM3",
    "versions": {"torch": "2.13.0"},
    "data": {"name": "fineweb10B", "fingerprint": "abc"},
    "steps": 1285,
    "val_tokens": 10485760,
    "scale": 1,
    "command": "torchrun --nproc-per-node=8 train.py fineweb",
}
LOSSES, SECONDS = (3.2780, 3.2770, 3.2790), (73.0, 74.0, 75.5)


def put(folder, seed, summary, config):
    folder.mkdir()
    summary = {name: value for name, value in summary.items() if value != "left out"}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "log.jsonl").write_text(f'{{"seed": {seed}}}\n')
    return str(folder)


def write(folder, seed, score, seconds, config=None, **changes):
    summary = SUMMARY | {"seed": seed, "core": score, "total_training_time_s": seconds} | changes
    values = dataclasses.replace(preset("gpt2", "cuda"), seed=seed, **{"out": str(folder), **(config or {})})
    return put(folder, seed, summary, to_dict(values))


def write_fineweb(folder, seed, loss, seconds, config=None, **changes):
    summary = FINEWEB | {"seed": seed, "val_loss": loss, "total_training_time_s": seconds} | changes
    options = {"seed": seed, "out": str(folder), "model": {"layers": 11, "heads": 6}, "data": {"path": str(folder)}}
    return put(folder, seed, summary, options | (config or {}))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path / "records")
    return [write(tmp_path / f"r{i}", i, *pair) for i, pair in enumerate(zip(SCORES, TIMES))]


def test_a_record_holds_means_spreads_and_significance(runs, tmp_path, capsys):
    main(["gpt2", *runs])
    (path,) = (tmp_path / "records").iterdir()
    record = json.loads(path.read_text())
    assert path.name == f"gpt2-{record['date']}-0123456789ab.json"
    assert record["core"]["mean"] == pytest.approx(0.2704) and record["core"]["sd"] == pytest.approx(0.0004)
    assert record["core"]["min"] == 0.27 and record["core"]["n"] == 3 and record["core"]["threshold"] == GPT2_CORE
    t = (0.2704 - GPT2_CORE) / (0.0004 / math.sqrt(3))
    assert record["core"]["t"] == pytest.approx(t)
    assert record["core"]["p"] == pytest.approx(0.5 - t / 2 / math.sqrt(t * t + 2))  # the closed form for 2 degrees
    assert (
        record["total_training_time_s"]["mean"] == pytest.approx(6010) and record["core_tasks"]["copa"]["mean"] == 0.6
    )
    assert [run["seed"] for run in record["runs"]] == [0, 1, 2]
    assert str(tmp_path) not in path.read_text()
    out = capsys.readouterr().out
    assert "0.27040" in out and "6010.0" in out and "10.000" in out and ": a record, of" in out and str(path) in out
    with pytest.raises(UserError, match="is there already"):
        main(["gpt2", *runs])


@pytest.mark.parametrize(
    "track, scores, why",
    [
        ("gpt2", (0.2500, 0.2501, 0.2502), "mean CORE 0.250100 of 3 runs is not above 0.256525, t = -1.*, where"),
        ("gpt2", (0.2600, 0.2620, 0.2640), "is above 0.256525, t = 4.74, p = 0.021, where a record has p < 0.01"),
        ("gpt2", (0.2567, 0.2700), "of 2 runs is above"),  # a single good one among two shows nothing
        ("fineweb", (3.2810, 3.2812, 3.2811), "validation loss 3.281100 of 3 runs is not below 3.28, t = -19.*, where"),
        ("fineweb", (3.2779, 3.2799), "of 2 runs is below 3.28, t = 1.10, p = 0.23, where a record has p < 0.01"),
        ("fineweb", (3.2799, 3.2801), "of 2 runs is not below 3.28, t = .*, p = 0.5, where a record is below"),
    ],
)
def test_what_is_shown_and_is_no_record(tmp_path, monkeypatch, capsys, track, scores, why):
    monkeypatch.setattr(records, "ROOT", tmp_path / "records")
    put_one = write if track == "gpt2" else write_fineweb
    folders = [put_one(tmp_path / f"r{i}", i, score, 60.0 + i) for i, score in enumerate(scores)]
    with pytest.raises(UserError, match=f"not a record: .*{why}"):
        main([track, *folders])
    assert f"{scores[0]:.5f}" in capsys.readouterr().out and not (tmp_path / "records").exists()


# fineweb


@pytest.fixture
def fineweb_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path / "records")
    losses = (*LOSSES, 3.2775, 3.2785, 3.2776, 3.2784)
    seconds = (*SECONDS, 74.0, 74.0, 74.0, 74.0)
    return [write_fineweb(tmp_path / f"r{i}", i, *pair) for i, pair in enumerate(zip(losses, seconds))]


def test_a_record_of_fineweb(fineweb_runs, tmp_path, capsys):
    main(["fineweb", *fineweb_runs])
    (path,) = (tmp_path / "records").iterdir()
    record, out = json.loads(path.read_text()), capsys.readouterr().out
    loss, seconds = record["val_loss"], record["total_training_time_s"]
    assert loss["n"] == 7 and loss["mean"] == pytest.approx(3.278) and loss["threshold"] == 3.28
    assert (loss["min"], loss["max"], seconds["min"], seconds["max"]) == (3.277, 3.279, 73.0, 75.5)
    sd = math.sqrt((2 * 1e-3**2 + 2 * 5e-4**2 + 2 * 4e-4**2) / 6)
    assert loss["sd"] == pytest.approx(sd) and loss["t"] == pytest.approx(0.002 / sd * math.sqrt(7))
    assert loss["p"] == pytest.approx(t_survival(loss["t"], 6)) and loss["p"] < 1e-3
    assert record["sources_digest"] == "0a1b2c3d4e5f" and record["git"]["commit"] == "0123456789abcdef"
    for i, run in enumerate(record["runs"]):
        assert run["log_sha256"] == hashlib.sha256(f'{{"seed": {i}}}\n'.encode()).hexdigest()
        assert run["log_sha256"][:12] in out
    assert "3.27800" in out and "73.000" in out and "p = 0.00" in out and ": a record, of 74.07" in out
    assert str(tmp_path) not in path.read_text() and "core_tasks" not in record


def test_a_published_mean_reaches_the_published_p():
    """Record 92: 3.27731 +- 0.00099 of 18 runs, p = 9.4e-10 [its README]."""
    t = (FINEWEB_LOSS - 3.27731) / (0.00099 / math.sqrt(18))
    assert t_survival(t, 17) == pytest.approx(9.4e-10, rel=0.1)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"git": {"commit": "0123456789abcdef", "dirty": True}}, "no commit names"),
        ({"git": None}, "no commit names"),
        ({"git": {"commit": "fedcba", "dirty": False}}, "in git"),
        ({"sources_digest": "ffff"}, "in sources_digest: ffff instead of 0a1b2c3d4e5f"),
        ({"data": {"name": "fineweb10B", "fingerprint": "def"}}, "in data: .*def"),
        ({"val_tokens": 10485761}, "on 10485761 tokens: the race is over the first 10,485,760"),
        ({"scale": 0.5}, "at scale 0.5: the race is at scale 1"),
        ({"device": "1 x NVIDIA H100 80GB HBM3"}, "ran on 1 x .*the race is on 8 x NVIDIA H100"),
        ({"device": "8 x NVIDIA H200"}, "ran on 8 x NVIDIA H200"),
        ({"device": "8 x NVIDIA H100 NVL"}, "in device: 8 x NVIDIA H100 NVL instead of"),
        ({"steps": 1300}, "in steps: 1300 instead of 1285"),
        ({"preset": "gpt2"}, "a run of gpt2, not of fineweb"),
        ({"val_loss": "left out"}, "has no val_loss"),
        ({"val_tokens": "left out"}, "summary has no val_tokens"),
        ({"scale": "left out"}, "summary has no scale"),
        ({"loss": float("nan")}, "val_loss NaN: expected a finite number"),
        ({"loss": None}, "val_loss null: expected a finite number"),
        ({"config": {"lr": 0.02}}, "in lr; a record's runs differ by their seed alone"),
        ({"config": {"model": {"layers": 12, "heads": 6}}}, "in layers; a record's"),
        ({"seed": 1}, "2 of the runs have seed 1"),
    ],
)
def test_what_cannot_be_a_record_of_fineweb(fineweb_runs, tmp_path, changes, says):
    bad = write_fineweb(tmp_path / "bad", **{"seed": 9, "loss": 3.27, "seconds": 1.0, **changes})
    with pytest.raises(UserError, match=says):
        main(["fineweb", *fineweb_runs, bad])
    assert not (tmp_path / "records").exists()


def test_runs_that_their_seeds_do_not_change(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path / "records")
    runs = [write_fineweb(tmp_path / f"r{i}", i, 3.27, 70.0 + i) for i in range(3)]
    with pytest.raises(UserError, match="all 3 runs have validation loss 3.27 to the last digit"):
        main(["fineweb", *runs])
    with pytest.raises(UserError, match="two runs or more, got 1"):
        main(["fineweb", runs[0]])


# statistics


# a table of Student's t: one-sided 5 %, 1 % and 0.1 %
@pytest.mark.parametrize(
    "df, critical",
    [(1, (6.314, 31.82, 318.3)), (2, (2.920, 6.965, 22.33)), (3, (2.353, 4.541, 10.215)), (4, (2.132, 3.747, 7.173)),
     (6, (1.943, 3.143, 5.208)), (9, (1.833, 2.821, 4.297)), (30, (1.697, 2.457, 3.385))],
)  # fmt: skip
def test_students_t(df, critical):
    for t, p in zip(critical, (0.05, 0.01, 0.001)):
        assert t_survival(t, df) == pytest.approx(p, rel=2e-3)
        assert t_survival(-t, df) == pytest.approx(1 - p, rel=2e-3)
    assert t_survival(0, df) == 0.5


def test_equal_scores():
    assert p_above([0.3, 0.3], 0.25) == 0 and p_above([0.25, 0.25], 0.25) == 1


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"git": {"commit": "fedcba", "dirty": False}}, "differs from .* in git"),
        ({"git": {"commit": "0123456789abcdef", "dirty": True}}, "no commit names"),
        ({"git": None}, "no commit names"),
        ({"device": "1 x NVIDIA H100"}, "in device: 1 x NVIDIA H100 instead of 8 x"),
        ({"steps": 50}, "in steps: 50 instead of 100"),
        ({"preset": "quickstart"}, "a run of quickstart, not of gpt2"),
        ({"core": "left out"}, "has no CORE"),
        ({"core_whole": False, "core_scope": "not comparable with the board: 500"}, "not comparable.*--core-max-per"),
        ({"command": "left out"}, "has no command"),
        ({"config": {"ratio": 8.0}}, "in ratio; a record's runs differ by their seed alone"),
        ({"seed": 1}, "2 of the runs have seed 1"),
    ],
)
def test_what_cannot_be_a_record(runs, tmp_path, changes, says):
    bad = write(tmp_path / "bad", **{"seed": 9, "score": 0.26, "seconds": 1.0, **changes})
    with pytest.raises(UserError, match=says):
        main(["gpt2", *runs, bad])
    assert not (tmp_path / "records").exists()


def test_what_is_no_run(runs, tmp_path):
    with pytest.raises(UserError, match="two runs or more, got 1"):
        main(["gpt2", runs[0]])
    for file in ("log.jsonl", "config.json", "summary.json"):
        (tmp_path / "r1" / file).unlink()
        with pytest.raises(UserError, match=f"r1 has no {file}"):
            main(["gpt2", *runs])
