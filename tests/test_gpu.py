"""bench.gpu rehearsed: it may be stopped, times nothing wrong, names what is missing, and answers in 40 lines."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, history, suite
from bench.answers import LINES, answers
from kernels.ops import BY_NAME

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bench.gpu itself runs there")


def entry(op="rms_norm", backend="triton", us=100.0, **changes):
    named = {"op": op, "case": "large", "form": "plain", "direction": "forward", "dtype": "bfloat16"}
    return named | {"backend": backend, "us": us, "roofline_fraction": 0.5, "error": None, "shape": [4]} | changes


def trained(**changes):
    run = {"depth": 24, "kernels": "auto", "mfu": 0.415, "tok_per_s": 123456.0, "step_ms": 10.0, "step_ms_low": 9.9}
    return run | {"step_ms_high": 10.1, "peak_memory_gb": 60.0, "fp8_head": True} | changes


VALUE = {"polar_express": 0.2, "rms_norm": 0.1}


@pytest.mark.parametrize("status", [0, 1])
def test_kernels_of_csrc_that_cannot_be_compiled_are_missing(status, tmp_path, monkeypatch):
    """The compiler is another process, whose status and result count."""
    built = tmp_path / "built"

    def missing():
        return None if built.exists() else "is not compiled"

    missing.cache_clear = lambda: None
    monkeypatch.setattr(gpu.extension, "missing", missing)
    program = f"open({str(built)!r}, 'w').close()" if not status else "raise SystemExit(1)"
    bench = gpu.Bench(1, tmp_path, "cuda")
    child = bench.child
    monkeypatch.setattr(bench, "child", lambda *args: child("-c", program))
    bench.build()
    assert [("status 1" in text and "csrc/, which is not compiled" in text) for text in bench.missing] == [
        True
    ] * status
    bench.close()


def test_the_four_answers():
    rows = [entry(), entry(backend="ref", us=300.0), entry(backend="liger", us=90.0)]
    rows += [entry("polar_express", us=50.0, roofline_fraction=0.9), entry("polar_express", "ref", 100.0)]
    rows += [entry("relu2_mlp", error="y is off by 2") | {"us": 1.0}]
    del rows[-1]["us"]
    tuned = [{"changed": {"kernels.rms_norm._config(1536)": {"num_warps": 2}}}]
    tests = {"rms_norm": "passed", "relu2_mlp": "2 tests failed: test_x"}
    found = answers(tests, rows, [trained(), trained(error="ended with status 1")], tuned, ["x"], VALUE)
    assert found == [
        "Right?",
        "  tests of 1 of 2 files passed; 5 of 6 variants keep the law",
        "  WRONG  tests of relu2_mlp: 2 tests failed: test_x",
        "  WRONG  relu2_mlp large plain forward bfloat16 triton: y is off by 2",
        "  WRONG  depth 24, --kernels auto, fp8 head: ended with status 1",
        "Faster than whom?",
        "  polar_express large plain forward: triton 50 us; 2.00x ref",
        "  rms_norm large plain forward: triton 100 us; 0.90x liger, 3.00x ref  SLOWER",
        "tokens/s and MFU?",
        "  depth 24, --kernels auto, fp8 head: 123,456 tokens/s, MFU 41.5%, 10.0 ms [9.9, 10.1] a step, 60.0 GB",
        "  depth 24, --kernels auto, fp8 head: ended with status 1",
        "Tune what next?",
        "  commit kernels.rms_norm._config(1536) -> {'num_warps': 2}",
        "  rms_norm large plain forward at 50% of the roofline: up to 50.0 ms of a step",
        "  polar_express large plain forward at 90% of the roofline: up to 20.0 ms of a step",
        "not measured: 1 items, named in table.txt",
    ]


def test_the_answers_to_a_long_run_fit_and_say_how_much_they_leave_out():
    rows = [entry(case=str(i), backend=name) for i in range(99) for name in ("triton", "ref")]
    rows += [entry(case=str(i), error="off") for i in range(99)]
    found = answers({}, rows, [trained()] * 30, [], ["x"] * 30, VALUE)
    assert len(found) == LINES and sum("more in table.txt" in line for line in found) == 4
    assert max(map(len, found)) <= 160


def test_an_empty_run_has_no_answer():
    found = answers({}, [], [], [], [], VALUE)
    assert [line for line in found if "nothing" in line or "0 of 0" in line] == found[1::2]


def test_ops_whose_tests_fail_get_no_numbers(tmp_path, capsys):
    bench = gpu.Bench(1, tmp_path, "cpu")
    bench.tests = {"rms_norm": "1 tests failed: test_x", "adam_update": gpu.PASSED}
    chosen = [item for item in suite.items() if item.op in ("rms_norm", "adam_update") and item.form == "plain"]
    bench.ops(chosen, ["ref"], bench.end)
    bench.close()
    assert {row["op"] for row in history.load(tmp_path / "ops.jsonl")} == {"adam_update"}
    assert bench.wrong() and "WRONG  tests of rms_norm: 1 tests failed: test_x" in (tmp_path / "table.txt").read_text()


def test_what_there_was_no_time_for_is_named(tmp_path, capsys):
    bench = gpu.Bench(1, tmp_path, "cpu")
    bench.tests, bench.end = {"adam_update": gpu.PASSED}, time.monotonic()
    bench.tune()
    bench.ops([item for item in suite.items() if item.op == "adam_update"], ["ref"], bench.end)
    bench.train()
    bench.close()
    assert not bench.rows
    table = (tmp_path / "table.txt").read_text()
    assert "not measured: tuning adam_update" in table
    assert "not measured: training at depth 24, --kernels auto --fp8-head" in table


def test_training_has_at_least_half_of_the_time(tmp_path):
    bench = gpu.Bench(20, tmp_path, "cpu")
    bench.close()
    assert bench.end - bench.until(gpu.OPS_END) >= 0.5 * 20 * 60
    assert [run[:2] for run in gpu.RUNS[:2]] == [("auto", 12), ("auto", 24)]


def test_tuning_takes_the_most_valuable_ops_whose_tests_passed(tmp_path, monkeypatch, capsys):
    bench = gpu.Bench(20, tmp_path, "cpu")
    bench.tests = {gpu.stem_of(op): gpu.PASSED for op in BY_NAME.values()} | {"relu2_mlp": "1 tests failed"}
    started = []

    class Child:
        def __init__(self, *args):
            started.append(args)
            (tmp_path / "tune.jsonl").write_text(
                json.dumps({"task": {"op": args[3]}, "changed": {"k": {"a": 1}}}) + "\n"
            )

        def wait(self, timeout=None):
            return 1

    monkeypatch.setattr(bench, "child", Child)
    bench.tune()
    bench.close()
    (command,) = started
    chosen = command[3 : 3 + gpu.TUNED_OPS]
    tunable = [name for name in gpu.by_value() if "triton" in BY_NAME[name].backends]
    expected = [name for name in tunable if name != "relu2_mlp"][: gpu.TUNED_OPS]
    assert list(chosen) == expected and "relu2_mlp" in tunable[:3]
    assert "attention" in gpu.by_value()[:3]  # which has no kernel to tune
    table = (tmp_path / "table.txt").read_text()
    assert "commit k -> {'a': 1}" in table and f"tuning {chosen[1]}: ended with status 1" in table


def test_the_largest_items_of_valuable_ops_come_first():
    chosen = gpu.by_importance([item for item in suite.items() if item.op in BY_NAME])
    first = list(dict.fromkeys(item.op for item in chosen))
    assert first == [name for name in gpu.by_value() if name in first]
    assert chosen[0].work == max(item.work for item in chosen if item.op == chosen[0].op)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("new",), "no GPU"),
        (("", "--device", "cpu"), "not empty"),
        (("new", "--device", "cpu", "--minutes", "nan"), "--minutes"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(tmp_path, arguments, sentence):
    (tmp_path / "x").write_text("")
    with pytest.raises(ValueError, match=sentence):
        gpu.main(["--out", str(tmp_path / arguments[0]), *arguments[1:]])


def test_the_command_may_be_stopped_at_any_time(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-u", "-m", "bench.gpu", "--device", "cpu", "--minutes", "8", "--out", tmp_path / "out"]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "8 minutes" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM" in errors, errors
    assert "Right?" in output
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["log.txt", "table.txt"]
