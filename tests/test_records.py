"""Records: what is stored of runs, its statistics, and what is refused."""

import dataclasses
import json
import math

import pytest

from bench import records
from bench.records import main, p_above, t_survival
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
SCORES, TIMES = (0.260, 0.262, 0.264), (6000.0, 6010.0, 6020.0)


def write(folder, seed, score, seconds, config=None, **changes):
    folder.mkdir()
    summary = SUMMARY | {"seed": seed, "core": score, "total_training_time_s": seconds} | changes
    summary = {name: value for name, value in summary.items() if value != "left out"}
    (folder / "summary.json").write_text(json.dumps(summary))
    values = dataclasses.replace(preset("gpt2", "cuda"), seed=seed, **{"out": str(folder), **(config or {})})
    (folder / "config.json").write_text(json.dumps(to_dict(values)))
    return str(folder)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path / "records")
    return [write(tmp_path / f"r{i}", i, *pair) for i, pair in enumerate(zip(SCORES, TIMES))]


def test_a_record_holds_means_spreads_and_significance(runs, tmp_path, capsys):
    main(["gpt2", *runs])
    (path,) = (tmp_path / "records").iterdir()
    record = json.loads(path.read_text())
    assert path.name == f"gpt2-{record['date']}-0123456789ab.json"
    assert record["core"]["mean"] == pytest.approx(0.262) and record["core"]["sd"] == pytest.approx(0.002)
    assert record["core"]["min"] == 0.26 and record["core"]["n"] == 3
    t = (0.262 - GPT2_CORE) / (0.002 / math.sqrt(3))
    assert record["core"]["p"] == pytest.approx(0.5 - t / 2 / math.sqrt(t * t + 2))  # the closed form for 2 degrees
    assert not record["beaten"] and 0.01 < record["core"]["p"] < 0.05
    assert (
        record["total_training_time_s"]["mean"] == pytest.approx(6010) and record["core_tasks"]["copa"]["mean"] == 0.6
    )
    assert [run["seed"] for run in record["runs"]] == [0, 1, 2]
    assert str(tmp_path) not in path.read_text()
    out = capsys.readouterr().out
    assert "0.26200" in out and "6010.0" in out and "10.000" in out and "not beaten" in out and str(path) in out
    with pytest.raises(UserError, match="is there already"):
        main(["gpt2", *runs])


@pytest.mark.parametrize("scores, beaten", [((0.2700, 0.2701, 0.2702), True), ((0.2500, 0.2501, 0.2502), False)])
def test_the_threshold(tmp_path, monkeypatch, capsys, scores, beaten):
    monkeypatch.setattr(records, "ROOT", tmp_path / "records")
    main(["gpt2", *(write(tmp_path / f"r{i}", i, score, 6000.0) for i, score in enumerate(scores))])
    assert (": beaten" in capsys.readouterr().out) == beaten


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
    (tmp_path / "r1" / "summary.json").unlink()
    with pytest.raises(UserError, match="r1 has no summary.json"):
        main(["gpt2", *runs])
