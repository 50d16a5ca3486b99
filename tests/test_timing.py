"""Where a step's time goes: spans, their borders on a GPU, watts and cost, and what the log and the report show."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure

import train
from core import machine, report
from core.machine import J_PER_KWH, UNCOUNTED_STEPS, Meter
from core.timing import StepTimes
from tests.test_processes import together, trained
from tests.test_train import events, run

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """`clock(n)` lets n seconds pass."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def passes(seconds):
        now[0] += seconds

    return passes


def step(times, clock, number=0):
    """Of 21 s: data 1 + 2, compute 3 + 5, communication 4 within it, optimizer 5, nothing 1."""
    times.begin(number)
    with times.span("data"):
        clock(1)
    with times.span("compute"):
        clock(3)
        with times.span("communication"):
            clock(4)
        clock(5)
    clock(1)
    with times.span("data"):
        clock(2)
    with times.span("optimizer"):
        clock(5)
    times.end()


SECONDS = {"data": 3, "compute": 8, "communication": 4, "optimizer": 5, "step": 21}


def test_a_span_within_another_is_not_counted_in_it(clock):
    times = StepTimes(CPU)
    step(times, clock)
    clock(1000)
    assert times.take(0) == SECONDS and times.take(0) == {}


def test_spans_end_with_what_is_raised_in_them_and_a_broken_step_is_forgotten(clock):
    times = StepTimes(CPU)
    times.begin(0)
    with pytest.raises(ZeroDivisionError), times.span("compute"), times.span("communication"):
        clock(7)
        1 / 0  # noqa: B018
    assert times.place.phase == "other"
    step(times, clock, 1)
    assert times.take(0) == {} and times.take(1) == SECONDS


def test_outside_of_a_step_nothing_is_measured(clock):
    times = StepTimes(CPU)
    with times.span("compute"):
        clock(1)
    assert times.place is None
    with pytest.raises(RuntimeError, match="no step was begun"):
        times.end()
    step(times, clock)
    times.pause()
    with times.span("compute"):
        assert times.place is None
    assert times.take(0) == SECONDS


def test_steps_that_nobody_takes_do_not_pile_up(clock):
    times = StepTimes(CPU)
    for n in range(100):
        step(times, clock, n)
    assert times.take(90) == {} and times.take(98) == SECONDS and times.take(99) == SECONDS


def test_means_are_those_of_the_counted_steps(clock):
    times = StepTimes(CPU)
    for n in range(UNCOUNTED_STEPS + 3):
        counted = UNCOUNTED_STEPS <= n < UNCOUNTED_STEPS + 2
        step(times, clock if counted else lambda seconds: clock(100 * seconds), n)
        times.take(n, counts=n < UNCOUNTED_STEPS + 2)  # the last is profiled
    assert times.means() == SECONDS and StepTimes(CPU).means() == {}


def test_a_place_says_step_phase_and_how_far_it_is(clock):
    times, places = StepTimes(CPU), []
    step(times, lambda seconds: (places.append(times.place), clock(seconds)), 4)
    assert [p.phase for p in places] == "data compute communication compute other data optimizer".split()
    assert all(p.step == 4 for p in places)
    assert [p.entered for p in places] == [1, 3, 4, 5, 6, 7, 9]
    assert times.place.phase == "end" and places[0].since <= places[-1].since <= time.monotonic()


def test_a_span_may_lie_within_backward(clock):
    times, p = StepTimes(CPU), torch.ones(3, requires_grad=True)

    def wait(p):
        with times.span("communication"):
            clock(4)

    p.register_post_accumulate_grad_hook(wait)
    times.begin(0)
    with times.span("compute"):
        clock(1)
        (2 * p).sum().backward()
    times.end()
    assert times.take(0) == {"compute": 1, "communication": 4, "step": 5}


class Event:
    """Stands for torch.cuda.Event on a GPU of which `clock` is the time."""

    made = 0

    def __init__(self, enable_timing):
        assert enable_timing
        Event.made += 1

    def record(self, stream):
        assert stream == "the step's"
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return 1000 * (other.at - self.at)

    def synchronize(self):
        pytest.fail("it waits")


def test_on_a_gpu_borders_are_events_of_the_steps_stream(clock, monkeypatch):
    stream = ["the step's"]
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream[0])
    times, Event.made = StepTimes(torch.device("cuda", 0)), 0
    for n in range(6):
        stream[0] = "the step's"
        times.begin(n)
        stream[0] = "another"  # as inside of an exchange
        times._border("other")
        stream[0] = "the step's"
        step(times, clock, n)
        if n:
            assert times.take(n - 1) == SECONDS
    assert Event.made == 12 + 12  # two steps are under way; what was read or forgotten is used again


# energy and cost


def test_a_meter_reads_watts_energy_and_cost(clock):
    joules = [5e6]
    meter = Meter(lambda: joules[0], lambda: joules[0] / 1e6, kwh=2.0, num_gpus=8)
    assert meter.read() == {}
    clock(2)
    joules[0] += 0.5 * J_PER_KWH
    assert meter.read() == {"watts": 0.25 * J_PER_KWH, "kwh": 2.5, "dollars": 6.8}
    clock(0.9)
    assert meter.read() == {}
    clock(0.2)
    joules[0] += 1100
    assert meter.read()["watts"] == 1000.0 and meter.kwh == pytest.approx(2.5 + 1100 / J_PER_KWH)


def test_what_is_not_known_is_absent(clock):
    nothing, price = Meter(None), Meter(None, lambda: 3.0)
    clock(2)
    assert nothing.read() == {} and nothing.kwh is None and price.read() == {"dollars": 3.0}


def test_the_gpus_of_a_node(monkeypatch):
    counters = {"cuda:0": lambda: 5.0, "cuda:1": lambda: 7.0, "cuda:2": None}
    monkeypatch.setattr(machine, "energy_counter", lambda device: counters[str(device)])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    n, read = machine.node_energy_counter(torch.device("cuda", 0), 4)
    assert (n, read()) == (2, 12.0)
    n, read = machine.node_energy_counter(torch.device("cuda", 1), 1)
    assert (n, read()) == (1, 7.0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert machine.node_energy_counter(torch.device("cuda", 0), 4) is None
    assert machine.node_energy_counter(CPU, 2) is None


# log and report


def test_log_summary_and_report_of_a_run(tiny, tmp_path, monkeypatch):
    """On a node whose meter reads 500 W."""
    out, drawn = tmp_path / "run", []
    honest = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **k: (drawn.append(self), honest(self, path, **k)))
    monkeypatch.setattr(machine, "METER_S", 0.0)
    monkeypatch.setattr(machine, "node_energy_counter", lambda *_: (2, lambda: 500 * time.perf_counter()))
    monkeypatch.setattr(machine, "cost_dollars", lambda seconds, *_: 7.0)
    run(tiny, out, "--steps", "15", "--save-every", "13")
    logged = events(out, "step")
    for e in logged:
        spans = [e[f"{name}_s"] for name in ("data", "compute", "optimizer")]
        assert all(s >= 0 for s in spans) and 0.5 * e["step_s"] < sum(spans) <= e["step_s"] + 3e-6
        assert e["watts"] == pytest.approx(500, rel=0.01) and e["dollars"] == 7.0 and "communication_s" not in e
    assert [e["kwh"] for e in logged] == sorted(e["kwh"] for e in logged) and logged[0]["kwh"] > 0
    summary = json.loads((out / "summary.json").read_text())
    times = summary["step_times"]
    assert list(times) == ["data", "compute", "optimizer", "other", "step"]
    counted = [e for e in logged if e["step"] >= UNCOUNTED_STEPS]
    assert times["compute"]["mean_s"] == pytest.approx(sum(e["compute_s"] for e in counted) / len(counted), abs=2e-6)
    assert sum(t["share"] for name, t in times.items() if name != "step") == pytest.approx(1)
    assert summary["gpus_metered"] == 2 and summary["kwh"] > logged[-1]["kwh"]
    text = (out / "report.md").read_text()
    assert "![shares of a step over steps](time.png)" in text and "| energy of 2 GPUs, command to report |" in text
    row = f"| forward and backward | {1e3 * times['compute']['mean_s']:.1f} | {100 * times['compute']['share']:.1f} % |"
    assert row in text.splitlines() and "slowest rank" not in text
    (ax,) = next(f.axes for f in drawn if len(f.axes) == 1)
    assert [c.get_label() for c in ax.collections] == ["waiting for data", "forward and backward", "optimizer", "other"]
    top = ax.collections[-1].get_paths()[0].get_extents()
    assert top.y1 == pytest.approx(1) and (top.x0, top.x1) == (1, 15)
    assert (out / "time.png").read_bytes().startswith(b"\x89PNG")
    # a resumed run counts on from the checkpoint's line
    before = max(e["kwh"] for e in logged if e["step"] < 13)
    train.main(["--resume", str(out / "checkpoints" / "step_000013"), "--steps", "16"])
    later = [e["kwh"] for e in events(out, "step") if e["step"] >= 13]
    assert len(later) == 3 and before < min(later) and min(later) < before + 500 * 60 / J_PER_KWH


def test_on_a_cpu_energy_and_cost_are_absent(tiny, tmp_path):
    out = run(tiny, tmp_path / "run", "--dollars-per-gpu-hour", "3")
    assert not any({"watts", "kwh", "dollars"} & e.keys() for e in events(out))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["kwh"] is None and "kWh" not in (out / "report.md").read_text()


def test_two_ranks_log_their_communication_and_report_the_slowest(tiny, tmp_path):
    out = tmp_path / "run"
    assert together(trained, [*tiny, "--steps", "14", "--out", str(out)]) == [None, None]
    assert all(0 < e["communication_s"] < e["step_s"] for e in events(out, "step"))
    times = json.loads((out / "summary.json").read_text())["step_times"]
    assert list(times) == ["data", "compute", "communication", "optimizer", "other", "step"]
    assert all(t["slowest_rank_s"] >= t["mean_s"] for t in times.values())
    lines = (out / "report.md").read_text().splitlines()
    at = lines.index("| | ms | share | slowest rank, ms |")
    assert lines[at + 4].startswith("| communication, exposed | ") and lines[at + 4].count("|") == 5


def test_the_slowest_rank_is_found_span_by_span():
    means = [{"data": 1.0, "compute": 2.0, "step": 4.0}, {"data": 0.5, "compute": 3.0, "step": 4.5}]
    times = train.step_times(means)
    assert times["data"] == {"mean_s": 1.0, "share": 0.25, "slowest_rank_s": 1.0}
    assert times["compute"] == {"mean_s": 2.0, "share": 0.5, "slowest_rank_s": 3.0}
    assert times["other"] == {"mean_s": 1.0, "share": 0.25, "slowest_rank_s": 1.0}
    assert train.step_times([{}, {}]) == {}


def test_shares_of_a_log_with_gaps():
    log = [
        {"event": "step", "step": 0, "loss": 4.0},  # of an earlier version
        {"event": "step", "step": 1, "data_s": 1.0, "compute_s": 2.0, "step_s": 4.0},
        {"event": "eval", "step": 2},
        {"event": "step", "step": 2, "compute_s": 4.0, "step_s": 4.0},
    ]
    steps, shares = report.span_shares(log)
    assert steps == [2, 3] and shares == {"data": [0.25, 0.0], "compute": [0.5, 1.0], "other": [0.25, 0.0]}


def test_metrics_of_spans_are_mirrored(monkeypatch):
    from core.wandb_mirror import WandbMirror

    rows, mirror = [], WandbMirror.__new__(WandbMirror)
    mirror._run, mirror._lost = SimpleNamespace(log=rows.append), False
    monkeypatch.setattr("core.wandb_mirror.load_wandb", lambda: SimpleNamespace(Error=KeyError))
    mirror.event({"event": "step", "step": 4, "time": 1.0, "loss": 2.0, "data_s": 0.1, "watts": 700.0})
    assert rows == [{"step": 5, "loss": 2.0, "data_s": 0.1, "watts": 700.0}]
