"""bench.gpu rehearsed: it may be stopped, times nothing wrong, names what is missing, and answers in 40 lines."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bench.ops
from bench import gpu, history, suite
from bench.answers import LINES, answers, fp8_gains
from bench.layers import layer_lines, needed
from core.command_line import parse_args
from core.fp8 import Recipe
from core.models.gpt2 import fp8_choices
from kernels.ops import BY_NAME

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bench.gpu itself runs there")


def entry(op="rms_norm", backend="triton", us=100.0, **changes):
    named = {"op": op, "case": "large", "form": "plain", "direction": "forward", "dtype": "bfloat16"}
    return named | {"backend": backend, "us": us, "roofline_fraction": 0.5, "error": None, "shape": [4]} | changes


def trained(**changes):
    run = {"depth": 24, "kernels": "auto", "mfu": 0.415, "tok_per_s": 123456.0, "step_ms": 10.0, "step_ms_low": 9.9}
    run |= {"step_ms_high": 10.1, "peak_memory_gb": 60.0, "precision": "fp8", "fp8_head": True}
    return run | changes


def in_bf16(**changes):
    return trained(precision="bfloat16", fp8_head=False, tok_per_s=100_000.0, **changes)


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
    run = gpu.Bench(1, tmp_path, "cuda")
    child = run.child
    monkeypatch.setattr(run, "child", lambda *args: child("-c", program))
    run.build()
    assert [("status 1" in text and "csrc/, which is not compiled" in text) for text in run.missing] == [True] * status
    run.close()


def test_the_answers():
    rows = [entry(), entry(backend="ref", us=300.0), entry(backend="liger", us=90.0)]
    rows += [entry("polar_express", us=50.0, roofline_fraction=0.9), entry("polar_express", "ref", 100.0)]
    rows += [entry("relu2_mlp", error="y is off by 2") | {"us": 1.0}]
    del rows[-1]["us"]
    tuned = [{"changed": {"kernels.rms_norm._config(1536)": {"num_warps": 2}}}]
    tests = {"rms_norm": "passed", "relu2_mlp": "2 tests failed: test_x"}
    runs = [in_bf16(), trained(), trained(error="ended with status 1", depth=12)]
    found = answers(tests, rows, runs, tuned, ["x"], VALUE)
    assert found == [
        "Right?",
        "  tests of 1 of 2 files passed; 5 of 6 variants keep the law",
        "  WRONG  tests of relu2_mlp: 2 tests failed: test_x",
        "  WRONG  relu2_mlp large plain forward bfloat16 triton: y is off by 2",
        "  WRONG  depth 12, --kernels auto, fp8, fp8 head: ended with status 1",
        "Faster than whom?",
        "  polar_express large plain forward: triton 50 us; 2.00x ref",
        "  rms_norm large plain forward: triton 100 us; 0.90x liger, 3.00x ref  SLOWER",
        "A layer in fp8?",
        "  nothing was measured in fp8",
        "tokens/s and MFU?",
        "  depth 24, --kernels auto: 100,000 tokens/s, MFU 41.5%, 10.0 ms [9.9, 10.1] a step, 60.0 GB",
        "  depth 24, --kernels auto, fp8, fp8 head: 123,456 tokens/s, MFU 41.5%, 10.0 ms [9.9, 10.1] a step, 60.0 GB",
        "  depth 12, --kernels auto, fp8, fp8 head: ended with status 1",
        "  depth 24: fp8 1.23x the tokens/s of bf16 (target 1.3x)",
        "Tune what next?",
        "  commit kernels.rms_norm._config(1536) -> {'num_warps': 2}",
        "  rms_norm large plain forward at 50% of the roofline: up to 50.0 ms of a step",
        "  polar_express large plain forward at 90% of the roofline: up to 20.0 ms of a step",
        "not measured: 1 items, named in table.txt",
    ]


def test_the_answers_to_a_long_run_fit_and_say_how_much_they_leave_out():
    rows = [entry(case=str(i), backend=name) for i in range(99) for name in ("triton", "ref")]
    rows += [entry(case=str(i), error="off") for i in range(99)]
    for i in range(9):
        rows += layer(f"model {i}", 1024 * (i + 1), 256)
    found = answers({}, rows, [in_bf16(), trained()] * 15, [], ["x"] * 30, VALUE)
    assert len(found) == LINES and sum("more in table.txt" in line for line in found) == 5
    assert max(map(len, found)) <= 160


@pytest.mark.parametrize(
    "fp8, bf16, lines",
    [
        ({}, {}, ["depth 24: fp8 1.23x the tokens/s of bf16 (target 1.3x)"]),
        ({"depth": 12}, {"depth": 12}, ["depth 12: fp8 1.23x the tokens/s of bf16"]),
        ({"depth": 12}, {}, []),
        ({"error": "ended with status 1"}, {}, []),
        ({}, {"kernels": "ref"}, []),
        ({"precision": "bfloat16"}, {}, []),  # the head alone
    ],
)
def test_tokens_in_fp8_are_set_against_those_in_bf16(fp8, bf16, lines):
    assert fp8_gains([in_bf16(**bf16), trained(**fp8)]) == lines


def test_the_head_alone_in_fp8_is_no_run_in_bf16():
    assert fp8_gains([in_bf16(), in_bf16() | {"fp8_head": True, "tok_per_s": 1.0}, trained()]) == [
        "depth 24: fp8 1.23x the tokens/s of bf16 (target 1.3x)"
    ]


def layer(case, M, C, scale=1.0):
    """What a layer is compared by: microseconds of forward and backward together."""
    F, qkv = 4 * C, 3 * C
    bf16 = {("linear", "sum", case, (M, C, qkv)): 300, ("relu2_mlp", "plain", case, (M, C, F)): 800}
    bf16 |= {("rms_norm", form, case, (M, C)): 100 for form in ("mix3_first", "add")}
    fp8 = {("fp8_linear", "given", case, (M, C, qkv)): 180, ("fp8_linear", "delayed", f"{case}, out", (M, C, C)): 80}
    fp8 |= {("fp8_mlp", "sum", case, (M, C, F)): 400}
    fp8 |= {("rms_norm", form, case, (M, C)): us for form, us in (("mix3_fp8", 110), ("mix_fp8", 120))}
    found = []
    for (op, form, label, shape), us in (bf16 | fp8).items():
        named = {"op": op, "form": form, "case": label, "shape": list(shape)}
        found += [
            entry(**named, direction=way, us=scale * part * us) for way, part in (("forward", 0.4), ("backward", 0.6))
        ]
    # a small one says little of what memory bounds
    for shape, us in (([4, F, C], 8.0), ([1, C, C], 100.0)):
        found.append(entry(op="quantise_weight", case=f"{case}, bank", shape=shape, us=scale * us))
    return found


def test_a_layer_in_fp8_against_one_in_bf16():
    """By hand: bf16 300 + a third of it + 800 + 100 + 100; fp8 180 + 80 + 400 + 110 + 48 forward + 60 backward, and 2
    for each matrix of F x C elements, of which all weights are three."""
    (line,) = layer_lines(layer("depth 24", 32768, 1536))
    assert line == (
        "depth 24 (M 32768, C 1536): bf16 1.4 ms, fp8 884 us, 1.58x (linear 1.54x, MLP 2.00x, norms 0.92x); "
        "target 1.5x at M 65536"
    )
    (other,) = layer_lines(layer("depth 12", 65536, 768, scale=0.5))
    assert "bf16 700 us, fp8 442 us, 1.58x" in other and "target" not in other


def test_a_layer_that_is_not_all_measured_says_so():
    rows = layer("depth 24", 32768, 1536)
    lacking = [row for row in rows if row["op"] not in ("linear", "quantise_weight")]
    (line,) = layer_lines(lacking)
    assert "bf16 1 ms, fp8 618 us, 1.62x (MLP 2.00x, norms 0.92x; without linear, weights)" in line
    wrong = [row for row in rows if (row["op"], row["direction"]) != ("fp8_mlp", "backward")]
    assert "without MLP" in layer_lines(wrong)[0]
    assert layer_lines([row for row in rows if row["op"] == "fp8_mlp"]) == []
    assert layer_lines([row | {"dtype": "float32"} for row in rows]) == []
    assert layer_lines([row | {"backend": "torchao"} for row in rows]) == []


def test_a_layer_takes_one_backend_for_both_directions_of_an_op():
    """The fastest that has both: not forward of one and backward of another."""
    rows = layer("depth 24", 32768, 1536)
    key = {"op": "fp8_mlp", "form": "sum", "case": "depth 24", "shape": [32768, 1536, 6144], "backend": "scaled_mm"}
    fast = [entry(**key, direction="forward", us=1.0), entry(**key, direction="backward", us=1000.0)]
    assert layer_lines(rows + fast) == layer_lines(rows)
    assert "MLP 4.00x" in layer_lines([*rows, fast[0], fast[1] | {"us": 199.0}])[0]


def test_what_a_layer_is_compared_by_is_measured_before_the_rest(monkeypatch):
    """As on a GPU: these items make the whole comparison at depth 24."""
    monkeypatch.setattr(bench.ops, "DEVICE", "cuda")
    monkeypatch.setattr(bench.ops.Device, "of", lambda device: bench.ops.Device("cuda", "H100", (9, 0)))
    everything = [item for op in BY_NAME.values() for item in bench.ops.op_items(op)]
    chosen = gpu.by_importance(everything)
    assert max(i for i, item in enumerate(chosen) if needed(item)) < 50 < len(chosen) / 4
    rows = [
        entry(op=item.op, case=item.case, form=item.form, direction=item.direction, shape=list(item.shape))
        for item in chosen
        if needed(item)
    ]
    (line,) = [line for line in layer_lines(rows) if line.startswith("depth 24 ")]
    assert "M 32768, C 1536" in line and "without" not in line


def test_an_empty_run_has_no_answer():
    found = answers({}, [], [], [], [], VALUE)
    assert [line for line in found if "nothing" in line or "0 of 0" in line] == found[1::2]


def test_ops_whose_tests_fail_get_no_numbers(tmp_path, capsys):
    run = gpu.Bench(1, tmp_path, "cpu")
    run.tests = {"rms_norm": "1 tests failed: test_x", "adam_update": gpu.PASSED}
    chosen = [item for item in suite.items() if item.op in ("rms_norm", "adam_update") and item.form == "plain"]
    run.ops(chosen, ["ref"], run.end)
    run.close()
    assert {row["op"] for row in history.load(tmp_path / "ops.jsonl")} == {"adam_update"}
    assert run.wrong() and "WRONG  tests of rms_norm: 1 tests failed: test_x" in (tmp_path / "table.txt").read_text()


def test_what_there_was_no_time_for_is_named(tmp_path, capsys):
    run = gpu.Bench(1, tmp_path, "cpu")
    run.tests, run.end = {"adam_update": gpu.PASSED}, time.monotonic()
    run.tune()
    run.ops([item for item in suite.items() if item.op == "adam_update"], ["ref"], run.end)
    run.train()
    run.close()
    assert not run.rows
    table = (tmp_path / "table.txt").read_text()
    assert "not measured: tuning adam_update" in table
    assert "not measured: training at depth 24, --kernels auto --precision fp8 --fp8-head" in table


def test_training_has_at_least_half_of_the_time(tmp_path):
    run = gpu.Bench(20, tmp_path, "cpu")
    run.close()
    assert run.end - run.until(gpu.OPS_END) >= 0.5 * 20 * 60
    assert [run[:2] for run in gpu.RUNS[:3]] == [("auto", 12), ("auto", 24), ("auto", 24)]
    in_fp8 = {run[1] for run in gpu.RUNS if run[2:] == ("--precision", "fp8", "--fp8-head")}
    assert in_fp8 == {12, 24} == {run[1] for run in gpu.RUNS if run[2:] == ()}
    assert len(gpu.RUNS) * gpu.MIN_TRAINING_S < 0.5 * 15 * 60  # of 15 minutes there is time for each


def test_tuning_takes_the_most_valuable_ops_whose_tests_passed(tmp_path, monkeypatch, capsys):
    run = gpu.Bench(20, tmp_path, "cpu")
    run.tests = {gpu.stem_of(op): gpu.PASSED for op in BY_NAME.values()} | {"relu2_mlp": "1 tests failed"}
    started = []

    class Child:
        def __init__(self, *args):
            started.append(args)
            (tmp_path / "tune.jsonl").write_text(
                json.dumps({"task": {"op": args[3]}, "changed": {"k": {"a": 1}}}) + "\n"
            )

        def wait(self, timeout=None):
            return 1

    monkeypatch.setattr(run, "child", Child)
    run.tune()
    run.close()
    (command,) = started
    chosen = command[3 : 3 + gpu.TUNED_OPS]
    tunable = [name for name in gpu.by_value() if "triton" in BY_NAME[name].backends]
    expected = [name for name in tunable if name != "relu2_mlp"][: gpu.TUNED_OPS]
    assert list(chosen) == expected and {"relu2_mlp", "fp8_mlp"} <= set(tunable[:3])
    assert "attention" in tunable[:3]
    table = (tmp_path / "table.txt").read_text()
    assert "commit k -> {'a': 1}" in table and f"tuning {chosen[1]}: ended with status 1" in table


@pytest.mark.parametrize("stem", dict.fromkeys(gpu.stem_of(op) for op in BY_NAME.values()))
def test_each_op_has_tests_that_a_gpu_runs(stem):
    """`-k float64` finds them by name; an op without any would be taken for one that fails."""
    text = (ROOT / "tests" / f"test_{stem}.py").read_text()
    assert re.search(r"^def test_\w*float64\w*\(", text, re.M)


def test_the_largest_items_of_valuable_ops_come_first():
    chosen = gpu.by_importance([item for item in suite.items() if item.op in BY_NAME])
    first = list(dict.fromkeys(item.op for item in chosen))
    assert first == [name for name in gpu.by_value() if name in first]
    assert chosen[0].work == max(item.work for item in chosen if item.op == chosen[0].op)


def test_a_rehearsal_trains_in_fp8():
    cfg = parse_args(["gpt2", "--no-core", *gpu.REHEARSAL.split(), *gpu.FP8])
    found = fp8_choices(cfg.model, Recipe.of(cfg))
    assert cfg.fp8_head and {c.kind for c in found if c.converts} == {"attn_qkv", "attn_out", "mlp_up", "mlp_down"}


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
