"""The profiled window, and what a profile leaves behind."""

import gzip
import json

import pytest
import torch

import train
from core.communication import World
from core.profiling import StepProfile, longest_quiet_steps, memory_summary
from tests.test_train import events, losses, run

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "n, first, stop, interrupted, expected",
    [
        (3, 11, 100, (), (11, 14)),
        (3, 11, 100, (11,), (11, 14)),  # due at the window's first step is fine
        (3, 11, 100, (12,), (12, 15)),
        (3, 11, 100, (12, 14, 16), (16, 19)),
        (3, 11, 18, (12, 14, 16), (12, 14)),  # none has room: the longest, the earliest of equals
        (3, 11, 12, (), (11, 12)),
        (3, 11, 11, (), (11, 11)),
        (3, 11, 5, (), (11, 11)),
        (0, 11, 100, (), (11, 11)),
        (2, 4, 9, range(100), (4, 5)),
    ],
)
def test_profiled_steps(n, first, stop, interrupted, expected):
    assert longest_quiet_steps(n, first, stop, lambda step: step in interrupted) == range(*expected)


def test_files_of_a_profile(tmp_path):
    (tmp_path / "run").mkdir()
    profile = StepProfile(World(1, 2, CPU), tmp_path / "run", {"aten::earlier": 1.0})
    assert profile.shares()["profile_files"] == []
    a = torch.ones(512, 512)
    with profile:
        b = [a @ a for _ in range(4)]
        del b[1:]
    shares = profile.shares()
    assert shares["profile_files"] == ["profile/memory_rank1.json", "profile/trace_rank1.json.gz"]
    assert max(shares["time_by_op"], key=shares["time_by_op"].get) == "aten::mm" and shares["non_matmul_share"] < 0.5
    memory = json.loads((tmp_path / "run/profile/memory_rank1.json").read_text())
    assert memory["bytes_by_op"]["aten::mm"] == 4 * 2**20
    # threads of the process that runs the tests may allocate a few bytes meanwhile
    assert 0 <= memory["peak_bytes"] - 4 * 2**20 < 1024
    assert 0 <= memory["timeline"][-1][1] - 2**20 < 1024
    trace = json.loads(gzip.decompress((tmp_path / "run/profile/trace_rank1.json.gz").read_bytes()))
    assert any(e.get("name") == "aten::mm" for e in trace["traceEvents"])


def test_a_failed_window_leaves_no_files_and_no_profiler(tmp_path):
    profile = StepProfile(World(0, 1, CPU), tmp_path, {})
    with pytest.raises(KeyError), profile:
        raise KeyError
    assert profile.shares() == {} and not any((tmp_path / "profile").iterdir())
    with profile:
        torch.ones(3) + 1
    assert profile.shares()


def test_long_timelines_are_thinned_and_keep_the_peak():
    sizes = [i % 977 for i in range(5000)]
    trace = {
        "traceEvents": [{"name": "[memory]", "ts": i, "args": {"Total Allocated": n}} for i, n in enumerate(sizes)]
    }
    memory = memory_summary(trace, {"a": 3, "b": -3})
    assert len(memory["timeline"]) == 500 and max(n for _, n in memory["timeline"]) == memory["peak_bytes"] == 976
    assert memory["bytes_by_op"] == {"a": 3}
    assert memory_summary({"traceEvents": []}, {})["timeline"] == []


def test_profiling_leaves_the_losses_alone_and_is_off_the_clock(tiny, tmp_path, capsys):
    every = ["--eval-every", "100", "--save-every", "14", "--sample-every", "100", "--steps", "17"]
    plain = run(tiny, tmp_path / "plain", *every)
    out = run(tiny, tmp_path / "run", *every, "--profile", "4")
    assert "note: 3 of 4 steps are profiled" in capsys.readouterr().out  # 11 to 13: 14 saves, 14 to 16 come later
    assert losses(out) == losses(plain)
    summaries = [json.loads((d / "summary.json").read_text()) for d in (plain, out)]
    assert [s["counted_steps"] for s in summaries] == [6, 3]
    assert "`profile/trace.json.gz`" in (out / "report.md").read_text()
    train.main(["--resume", str(out / "checkpoints" / "step_000014"), "--profile", "1"])
    assert json.loads((out / "summary.json").read_text())["counted_steps"] == 2 + 0 and losses(out) == losses(plain)
    assert len(events(out, "resume")) == 1
