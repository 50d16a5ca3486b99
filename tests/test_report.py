"""The training clock, rates, and the report's small parts."""

import os
import sys
import time
import types

import pytest
import torch

from core import machine
from core.communication import LaggingLoss, World
from core.config import preset
from core.machine import UNCOUNTED_STEPS, TrainingClock, peak_flops, prepare_process, speed
from core.plan import make_plan
from core.report import RunLog, hours, human, longest_run, plot_loss, read_log, smoothed, step_seconds, sum_stats

CPU = torch.device("cpu")


def test_clock_leaves_out_the_first_steps_and_every_pause(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    c = TrainingClock(CPU)
    for step in range(UNCOUNTED_STEPS + 4):
        if step == UNCOUNTED_STEPS + 2:
            c.stop()
            now[0] += 100  # an evaluation
        c.before_step(step)
        now[0] += 1
        c.after_step()
    c.stop()
    assert (c.counted_s, c.counted_steps) == (4.0, 4)
    c.stop()
    assert c.counted_s == 4.0
    resumed = TrainingClock(CPU, c.counted_s, c.counted_steps)
    resumed.before_step(UNCOUNTED_STEPS + 4)
    now[0] += 2
    resumed.after_step()
    resumed.stop()
    assert (resumed.counted_s, resumed.counted_steps) == (6.0, 5)


def test_energy_is_that_of_the_counted_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = TrainingClock(CPU, energy=lambda: 1000 + 300 * now[0])
    for step in range(UNCOUNTED_STEPS + 4):
        if step == UNCOUNTED_STEPS + 2:
            clock.stop()
            now[0] += 100
        clock.before_step(step)
        now[0] += 1
        clock.after_step()
    clock.stop()
    assert clock.counted_j == pytest.approx(4 * 300)
    assert TrainingClock(CPU).counted_j is None
    assert TrainingClock(CPU, 4.0, 4, energy=lambda: 0.0).counted_j is None  # that of the steps before is not known


class NVML(types.ModuleType):
    """Stands for pynvml on a machine with a GPU of that UUID."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != "GPU-abc":
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return 5500


def test_the_energy_counter(monkeypatch):
    gpu = torch.device("cuda", 0)
    uuid = ["abc"]
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid=uuid[0]), raising=True
    )
    monkeypatch.setitem(sys.modules, "pynvml", NVML("pynvml"))
    assert machine.energy_counter(CPU) is None
    assert machine.energy_counter(gpu)() == 5.5
    uuid[0] = "of another machine"
    assert machine.energy_counter(gpu) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert machine.energy_counter(gpu) is None


def test_cost():
    assert machine.cost_dollars(1800, 8, 3.0) == 12.0
    assert machine.cost_dollars(1800, 0, 3.0) is None and machine.cost_dollars(1800, 8, None) is None


EVENTS = [
    {"event": "start", "step": 0, "time": 90.0},
    {"event": "step", "step": 0, "time": 100.0, "loss": 4.0},
    {"event": "step", "step": 1, "time": 102.0, "loss": 3.0},
    {"event": "eval", "step": 2, "time": 150.0, "val_bpb": 2.0},
    {"event": "step", "step": 2, "time": 151.0, "loss": "nan"},
    {"event": "step", "step": 3, "time": 154.0, "loss": 2.0},
]


def test_training_time_leaves_evaluations_out():
    assert step_seconds(EVENTS) == {0: 0, 1: 2, 2: 2, 3: 5}
    assert smoothed([3.0, 3.0]) == pytest.approx([3.0, 3.0]) and 2.4 < smoothed([3.0, 2.0])[1] < 2.5


def test_losses_are_drawn_over_steps_time_tokens_and_flops(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = {}
    monkeypatch.setenv("MPLBACKEND", "agg")

    def savefig(figure, path, **options):
        for ax in figure.axes:
            if ax.get_xlabel():
                drawn[ax.get_xlabel().split(",")[0]] = [list(line) for line in zip(*ax.lines[0].get_data())]
        path.touch()

    monkeypatch.setattr(Figure, "savefig", savefig)
    plot_loss(EVENTS, tmp_path / "loss.png", {"steps": 4, "tokens": 400, "flops": 8e6})
    losses = [4.0, 3.0, 2.0]
    wanted = {
        "step": [1, 2, 4],
        "training time": [0, 2, 5],
        "tokens": [100, 200, 400],
        "training FLOPs": [2e6, 4e6, 8e6],
    }
    assert drawn == {name: [list(pair) for pair in zip(at, losses)] for name, at in wanted.items()}
    assert (tmp_path / "loss.png").exists()


def test_losses_of_the_cpu_are_read_at_once():
    losses = LaggingLoss()
    losses.put(3, torch.tensor([2.5, 0]))
    losses.put(4, torch.tensor([1.5, 0.125]))
    losses.put(5, torch.tensor([1.25, 0, 3]))
    assert losses.take() == [(3, 2.5, False, None), (4, 1.5, True, None), (5, 1.25, False, 3)]
    assert losses.take(flush=True) == []


@pytest.mark.parametrize(
    "name, peak",
    [("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("AMD EPYC", None)],
)
def test_peaks(name, peak):
    assert peak_flops(name) == peak


def test_speed_is_one_formula():
    assert speed(1000, 2.0, 6e9, None) == (500.0, 3e12, None)
    assert speed(8_000_000, 8.0, 4.5e9, 8 * 989e12).mfu == pytest.approx(4.5e15 / (8 * 989e12))


def test_mfu_is_over_the_peak_of_all_devices(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(machine, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    plan = make_plan(preset("quickstart", "cpu"), device_type="cpu", world_size=8)
    log = RunLog(tmp_path, World(0, 8, torch.device("cuda", 0)), plan, log_every=1)
    for step in range(3):
        log.step(step, 1.0)
        now[0] += 0.5
    log.pause_rate()
    now[0] += 100  # an evaluation
    log.step(3, 1.0)
    log.close()
    first, _, last, after = read_log(tmp_path / "log.jsonl")
    assert "tok_per_s" not in after
    rate = plan.total_batch_size / 0.5
    assert "mfu" not in first and last["tok_per_s"] == pytest.approx(rate, rel=1e-4)
    assert last["mfu"] == pytest.approx(rate * plan.flops_per_token / (8 * 989e12), abs=1e-5)
    assert log.peak == 8 * 989e12


def test_products_on_a_gpu_are_summed_in_fp32():
    flags = torch.backends.cuda.matmul
    before = flags.allow_bf16_reduced_precision_reduction
    try:
        flags.allow_bf16_reduced_precision_reduction = True
        prepare_process("cuda", deterministic=False)
        assert not flags.allow_bf16_reduced_precision_reduction
    finally:
        flags.allow_bf16_reduced_precision_reduction = before


@pytest.mark.parametrize("deterministic", [False, True])
def test_on_a_gpu_bits_repeat_where_that_is_asked_for(deterministic, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        prepare_process("cuda", deterministic=deterministic)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_words():
    assert human(1384122122, "B") == "1.38 GB"
    assert human(0.5, "s") == "0.5 s"
    assert hours(59.6) == "1:00" and hours(3725) == "1:02:05"
    assert longest_run("a``b```", "`") == 3
    stats = [{"tokens": 4, "documents": 1, "epochs": 0.5, "crop_waste": 0.2}] * 2
    assert sum_stats(stats) == {"tokens": 8, "documents": 2, "epochs": 0.5, "crop_waste": 0.2}
