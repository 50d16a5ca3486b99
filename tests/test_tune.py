"""bench.tune: what is refused before it is timed, where the climb ends, and what is printed and stored."""

import dataclasses
import json
import time

import pytest
import torch

import kernels.adam_update
import kernels.rms_norm
from bench import suite, tune
from bench.kernel_model import LIBRARY
from bench.timing import Spread
from kernels.ops import BY_NAME
from kernels.rms_norm import rms_norm

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bench.gpu runs bench.tune itself there")

TASK = tune.Task("rms_norm", "quickstart", (16, 32), "plain", "float32", 90)
KEY = "kernels.rms_norm._config(32, torch.float32, (9, 0))"
ALL_RIGHT = lambda task, choices: [None] * len(choices)  # noqa: E731


def run(static=ALL_RIGHT, deadline=float("inf"), op=rms_norm, task=TASK):
    lines = []
    return tune.tune(op, task, deadline=deadline, seconds=0, static=static, say=lines.append), lines


def test_neighbours_differ_in_one_number_by_one_step():
    config = {"BLOCK_M": 32, "BLOCK_N": 16, "SPLIT": 2, "num_warps": 32, "num_stages": 1}
    changes = [{k: v for k, v in n.items() if v != config[k]} for n in tune.neighbours(config)]
    tiles = [{"BLOCK_M": 16}, {"BLOCK_M": 64}, {"BLOCK_N": 8}, {"BLOCK_N": 32}]
    assert changes == [*tiles, {"num_warps": 16}, {"num_stages": 2}]
    assert list(tune.neighbours({"BLOCK_M": 1})) == [{"BLOCK_M": 2}]


def test_a_choice_reaches_the_kernel_and_leaves_nothing_behind():
    before, seen = kernels.rms_norm._config, {}
    config = {"BLOCK_M": 2, "BLOCK_N": 32, "num_warps": 2}
    with tune.chosen({KEY: config}, seen):
        assert kernels.rms_norm._config(32, torch.float32, (9, 0)) == config
        assert kernels.rms_norm._config(64, torch.float32, (9, 0))["BLOCK_N"] == 64  # another call is as committed
    assert kernels.rms_norm._config is before and seen[KEY] == config and len(seen) == 2


def test_the_configs_of_forward_and_backward_are_found():
    assert tune.committed_configs(rms_norm, TASK) == {KEY: kernels.rms_norm._config(32, torch.float32, (9, 0))}


FACTS = {"kernel": "k", "spill_bytes": 0, "serialized": False, "shared_bytes": 232_448}


@pytest.mark.parametrize(
    "change, why",
    [
        ({}, None),
        ({"spill_bytes": 8}, "spills 8 B"),
        ({"serialized": True}, "serialized"),
        ({"shared_bytes": 232_449}, "of 232448"),
    ],
)
def test_static_facts_refuse(change, why):
    found = tune.refused([FACTS, FACTS | change], 90)
    assert found is None if why is None else why in found


def test_products_of_a_library_are_not_refused():
    assert tune.refused([{"kernel": LIBRARY, "product": (1, 8, 8, 8, 2)}, FACTS], 90) is None


def test_what_spills_or_does_not_compile_is_seen_by_the_compiler():
    key = "kernels.adam_update._config(1048576, torch.float32, (9, 0))"
    good = kernels.adam_update._config(2**20, torch.float32, (9, 0))
    choices = [{key: good}, {key: good | {"BLOCK": 8192, "num_warps": 1}}, {key: good | {"BLOCK": 1000}}]
    task = tune.Task("adam_update", "x", (2**20,), "plain", "float32", 90)
    fine, spills, broken = tune.static_verdicts(task, choices)
    assert fine is None and "spills" in spills and broken.startswith("does not compile")


@pytest.fixture
def times(monkeypatch):
    """Replace measuring: seconds by a function of the config of KEY."""

    def use(seconds_of):
        def measure(item, *, seconds):
            with item.open() as programs:
                choices = programs._choices
            taken = {name: seconds_of((choices.get(name) or {}).get(KEY)) for name in item.variants}
            spreads = {name: Spread((s,) * 9) for name, s in taken.items()}
            base = spreads[item.baseline]
            return {n: suite.Result(seconds=s, over_baseline=base.over(s)) for n, s in spreads.items()}

        monkeypatch.setattr(tune, "measure", measure)

    return use


def test_the_climb_finds_the_fastest_and_prints_what_to_commit(times):
    committed = kernels.rms_norm._config(32, torch.float32, (9, 0))
    best = committed | {"BLOCK_M": committed["BLOCK_M"] // 4, "num_warps": 2}

    def seconds(config):
        config = config or committed
        return 1e-6 * (1 + abs(config["BLOCK_M"] - best["BLOCK_M"]) + 100 * abs(config["num_warps"] - 2))

    times(seconds)
    found, lines = run()
    assert found.changed == {KEY: best} and not found.unfinished
    assert found.us == {"ref": pytest.approx(1e6 * seconds(None)), "triton": 1.0}
    first, last = tune.to_commit(found)
    assert first == f"{KEY} -> {best}"
    assert last.startswith('Measurement((9, 0), (16, 32), torch.float32, {"ref": ') and '"triton": 1}' in last
    assert len(lines) == len(found.table) == len({row["config"] for row in found.table})  # none is timed twice
    json.dumps(found.entry())


def test_what_is_not_faster_beyond_noise_does_not_win(times, monkeypatch):
    times(lambda config: 1e-6)
    found, _ = run()
    assert not found.changed and tune.to_commit(found)[0] == "no config is faster than committed"
    noisy = suite.Result(seconds=Spread((1.0,)), over_baseline=Spread((0.9, 0.99, 1.2, 1.3, 1.3, 1.3)))
    assert noisy.over_baseline.median > 1 and not tune.faster(noisy)


def test_what_static_facts_refuse_is_never_timed(times):
    times(lambda config: 1e-6 if config is None else 1e-9)  # it would be the fastest
    found, lines = run(static=lambda task, choices: ["it spills"] * len(choices))
    assert not found.changed and all("it spills" in line for line in lines) and lines


def test_no_step_begins_after_the_deadline(times):
    times(lambda config: 1e-6)
    found, lines = run(deadline=time.monotonic() - 1)
    assert found.unfinished and not lines and "cut short" in tune.to_commit(found)[-1]


def test_a_config_that_computes_something_wrong_is_out():
    """Half a row's columns: measured for real, in the interpreter. The committed configs pass."""
    found, _ = run(static=lambda task, choices: [None if c[KEY]["BLOCK_N"] == 16 else "skipped" for c in choices])
    (row,) = (row for row in found.table if "BLOCK_N 16" in row["config"])
    assert "off by" in row["out"] and not found.changed
    assert found.us["triton"] > 0 and found.us["ref"] > 0


def test_a_wrong_kernel_is_not_tuned(monkeypatch):
    honest = rms_norm.backends["triton"]
    wrong = dataclasses.replace(honest, function=lambda x: honest(x)._replace(y=honest(x).y * 1.01))
    monkeypatch.setitem(rms_norm.backends, "triton", wrong)
    with pytest.raises(ValueError, match="rms_norm with its committed configs: .*off by"):
        run(static=lambda task, choices: ["out"] * len(choices))


def test_the_command_rehearses_and_stores(times, monkeypatch, tmp_path, capsys):
    times(lambda config: 1e-6)
    monkeypatch.setattr(tune.tune, "__kwdefaults__", tune.tune.__kwdefaults__ | {"static": ALL_RIGHT})
    monkeypatch.setattr(tune.interpreter, "install", lambda: None)  # conftest.py has
    tune.main(["rms_norm", "--device", "cpu", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "these times mean nothing" in out and "Measurement((9, 0), (32, 32)" in out
    entry = json.loads((tmp_path / "tune.jsonl").read_text())
    assert entry["task"]["op"] == "rms_norm" and entry["us"] and entry["table"] and entry["commit"]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((), "no GPU"),
        (("rms", "--device", "cpu"), "rms: expected some of"),
        (("--device", "cpu", "--minutes", "nan"), "--minutes"),
        (("rms_norm", "--device", "cpu", "--cases", "huge"), "rms_norm has"),
    ],
)
def test_what_it_cannot_do_is_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        tune.main(list(arguments))


def test_every_op_with_a_kernel_has_a_task():
    for name, op in BY_NAME.items():
        for tiny in (False, True):
            (task,) = tune.tasks_of(op, (), "float32", 90, tiny=tiny)
            assert (task.op, len(task.shape)) == (name, len(op.dims)) and task.form in op.forms
            assert (max(task.shape) <= tune.TINY_DIM) == tiny
    forms = {name: tune.tasks_of(BY_NAME[name], (), "bfloat16", 90, tiny=False)[0].form for name in BY_NAME}
    assert forms["fp8_mlp"] == forms["fp8_linear"] == forms["linear"] == "sum"  # as training adds gradients
