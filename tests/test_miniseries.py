"""The sweep over depths: laws through scores that are known, and runs that are made once."""

import csv
import json

import pytest

from bench import miniseries
from bench.miniseries import fit_best, fit_law, laws, main, table
from core.stopping import TrainingError, UserError


def row(depth, params, flops, bpb, budget=None):
    tokens = flops / (6 * params)
    return {"depth": depth, "budget": budget, "params_scaling": params, "tokens": tokens, "flops": flops} | {
        "total_training_time_s": 1.0, "val_bpb": bpb, "core": None
    }  # fmt: skip


def test_a_power_law_is_found():
    law = fit_law([1, 10, 1000], [3 * x**-0.05 for x in (1, 10, 1000)])
    assert law.factor == pytest.approx(3) and law.exponent == pytest.approx(-0.05)
    found = dict(laws([row(d, d**3, 1e15 * d**6, 2 * (1e15 * d**6) ** -0.04) for d in (4, 6, 8)], []))
    assert found["bits per byte by FLOPs"].exponent == pytest.approx(-0.04)
    assert found["scaling parameters by FLOPs"].exponent == pytest.approx(0.5)
    assert laws([row(4, 64, 1e15, 1.0)], []) == []


def bowl(budget):
    """Scores with their lowest, 0.9, at sizes that grow as the root of the budget."""
    best = 0.1 * budget**0.5
    sizes = [best * factor for factor in (0.3, 0.8, 1.5, 4)]
    return [row(i, n, budget, 0.9 + 0.02 * miniseries.math.log(n / best) ** 2, budget) for i, n in enumerate(sizes)]


def test_the_best_size_of_a_budget_is_the_bottom_of_its_parabola():
    best = fit_best(bowl(1e18))
    assert best.params == pytest.approx(1e8, rel=1e-6) and best.bpb == pytest.approx(0.9)
    assert best.tokens == pytest.approx(1e18 / 6e8, rel=1e-6)
    found = dict(laws([*bowl(1e18), *bowl(1e20)], [1e18, 1e20]))
    assert found["best scaling parameters by FLOPs"].exponent == pytest.approx(0.5)
    assert found["best tokens by FLOPs"].exponent == pytest.approx(0.5)
    falling = [row(i, n, 1e18, bpb, 1e18) for i, (n, bpb) in enumerate([(1e7, 1.0), (2e7, 0.9), (4e7, 0.85)])]
    assert fit_best(falling) is None and fit_best(falling[:2]) is None
    assert "no best size" in table(falling, [1e18]) and "best at 1e+08" in table(bowl(1e18), [1e18])


@pytest.fixture
def trained(monkeypatch):
    """train.py in place of which a summary is written; commands that were run."""
    commands = []

    class Done:
        returncode = 0

    def run(command):
        commands.append(command)
        folder = miniseries.Path(command[command.index("--out") + 1])
        depth = int(command[command.index("--depth") + 1])
        if depth == 9:
            failed = Done()
            failed.returncode = 1
            return failed
        folder.mkdir(parents=True)
        flops = float(command[command.index("--target-flops") + 1]) if "--target-flops" in command else 1e15 * depth**6
        summary = row(depth, 1000 * depth**3, flops, 3 / depth) | {"params": {"scaling": 1000 * depth**3}}
        (folder / "summary.json").write_text(json.dumps(summary))
        return Done()

    monkeypatch.setattr(miniseries.subprocess, "run", run)
    return commands


def test_each_run_is_made_once(trained, tmp_path, capsys):
    argv = ["--depths", "6,4", "--ratio", "8", "--out", str(tmp_path), "--", "--data", "texts", "--no-core"]
    main(argv)
    assert [c[c.index("gpt2") :] for c in trained] == [
        ["gpt2", "--depth", d, "--ratio", "8", "--data", "texts", "--no-core", "--out", str(tmp_path / f"d{d}")]
        + ["--resume", "auto"]
        for d in ("4", "6")
    ]
    rows = list(csv.DictReader(open(tmp_path / "miniseries.csv")))
    assert [r["depth"] for r in rows] == ["4", "6"] and rows[1]["val_bpb"] == "0.5" and rows[0]["core"] == ""
    assert (tmp_path / "miniseries.png").stat().st_size > 5000
    assert "scaling parameters by FLOPs: " in (tmp_path / "miniseries.md").read_text()
    main(argv)
    assert len(trained) == 2 and "done before" in capsys.readouterr().out
    main([*argv[:1], "4,6,8", *argv[2:]])
    assert len(trained) == 3


def test_budgets_take_the_place_of_the_ratio(trained, tmp_path):
    main(["--depths", "4,6,8", "--flops", "1e18,3e18", "--out", str(tmp_path), "--nproc-per-node", "2"])
    assert len(trained) == 6 and "--nproc-per-node=2" in trained[0] and "--ratio" not in trained[0]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir())[:2] == ["d4-1e+18", "d4-3e+18"]


def test_a_run_that_fails_ends_the_sweep_with_what_there_is(trained, tmp_path):
    with pytest.raises(TrainingError, match="d9: train.py ended with 1"):
        main(["--depths", "4,9", "--out", str(tmp_path)])
    assert len((tmp_path / "miniseries.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize("argv", [["--depths", "4,x"], ["--depths", "4,4"], ["--depths", "4", "--flops", "0"]], ids=str)
def test_wrong_numbers_are_a_sentence(argv, tmp_path):
    with pytest.raises(UserError, match="expected"):
        main([*argv, "--out", str(tmp_path)])
