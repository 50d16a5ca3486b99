"""The plan and the laws against the published table of nanochat's miniseries (depth 8 to 32, ratio 12)."""

import dataclasses

import pytest
import torch

from core import plan as plan_module
from core import schedule
from core.config import DataConfig, ModelConfig, preset
from core.models.gpt2 import dims
from core.plan import is_compiled, make_plan, predict_memory

# depth: parameters, scaling parameters, FLOPs per token (digits printed), batch, steps, decay
TABLE = {
    8: (125_829_354, 41_943_232, "2.957e+08", 262_144, 1920, 0.51972),
    10: (195_952_986, 70_123_820, "4.955e+08", 524_288, 1605, 0.43963),
    12: (286_261_730, 110_100_912, "7.597e+08", 524_288, 2520, 0.28000),
    16: (536_871_738, 234_881_792, "1.5855e+09", 524_288, 5376, 0.13125),
    18: (701_891_594, 324_404_172, "2.180e+09", 1_048_576, 3712, 0.13439),
    20: (896_533_746, 435_160_240, "2.886e+09", 1_048_576, 4980, 0.10019),
    24: (1_384_122_122, 729_810_624, "4.7752e+09", 1_048_576, 8352, 0.05974),
    26: (1_681_786_938, 918_423_532, "5.991e+09", 1_048_576, 10510, 0.04747),
    32: (2_818_575_450, 1_677_724_672, "1.0771e+10", 2_097_152, 9600, 0.03675),
}
GROUPS = ("wte", "value_embeds", "lm_head", "transformer_matrices", "scalars")
SPLIT = {
    12: (25_165_824, 150_994_944, 25_165_824, 84_935_088, 50),
    24: (50_331_648, 603_979_776, 50_331_648, 679_478_976, 74),
}


def gpt2(depth, **changes):
    return dataclasses.replace(preset("gpt2", "cuda"), model=ModelConfig(depth=depth), **changes)


@pytest.mark.parametrize("depth", TABLE)
def test_table(depth):
    total, scaling, flops, batch, steps, decay = TABLE[depth]
    plan = make_plan(gpt2(depth), device_type="cuda")
    assert plan.params_total == total
    assert plan.params_scaling == scaling
    digits = len(flops.split("e")[0]) - 2
    assert f"{plan.flops_per_token:.{digits}e}" == flops
    assert plan.total_batch_size == batch
    assert plan.steps == steps
    assert round(plan.weight_decay, 5) == decay


@pytest.mark.parametrize("depth", SPLIT)
def test_parameter_groups(depth):
    assert make_plan(gpt2(depth), device_type="cuda").params == dict(zip(GROUPS, SPLIT[depth]))


def test_record_run():
    """nanochat's record: depth 24, ratio 8, 5568 steps, 5.838 B tokens, 2.788e19 FLOPs."""
    plan = make_plan(gpt2(24, ratio=8.0), device_type="cuda", world_size=8)
    assert (plan.total_batch_size, plan.steps) == (1_048_576, 5568)
    assert f"{plan.tokens:.3e}" == "5.838e+09"
    assert f"{plan.flops:.3e}" == "2.788e+19"


def test_run_1_flops():
    """4.330784e19 FLOPs logged by nanochat's first record run: depth 24 with short windows of 1024, 16704 steps of
    2^19."""
    cfg = gpt2(24, steps=16704, total_batch_size=2**19)
    plan = make_plan(cfg, device_type="cuda")
    d = dims(cfg.model)
    wider = sum(12 * d.d_model * (1024 - w) for w in d.windows if w < d.seq_len)
    # that run had no smear gate
    assert (plan.flops_per_token + wider - 6 * 24) * plan.tokens == pytest.approx(4.330784e19, rel=1e-3)


@pytest.mark.parametrize("depth, long_layers", [(12, 3), (24, 6), (26, 7)])
def test_windows(depth, long_layers):
    windows = dims(ModelConfig(depth=depth)).windows
    assert windows.count(2048) == long_layers
    assert windows.count(512) == depth - long_layers
    assert windows[-1] == 2048


def test_learning_rates_scale_with_batch_and_width():
    lr = make_plan(gpt2(24), device_type="cuda").lr
    b, m = 2**0.5, (1536 / 768) ** -0.5
    expected = {
        "lm_head": 0.008 * b * m,
        "wte": 0.3 * b * m,
        "value_embeds": 0.15 * b * m,
        "resid_lambdas": 0.005 * b,
        "x0_lambdas": 0.5 * b,
        "gates": 0.2,
        "matrices": 0.02 * b,
    }
    assert lr == pytest.approx(expected)


def test_horizon_precedence():
    sizes = dict(ratio=8.0, params_scaling=729_810_624, flops_per_token=4_775_225_616, batch=2**20)
    assert schedule.horizon(steps=None, target_flops=None, **sizes) == 5568
    assert schedule.horizon(steps=None, target_flops=1e19, **sizes) == round(1e19 / (4_775_225_616 * 2**20))
    assert schedule.horizon(steps=7, target_flops=1e19, **sizes) == 7


def test_lr_schedule():
    def lr(step):
        return schedule.lr_multiplier(step, 1000, warmup_steps=40, warmdown_ratio=0.65, final_lr_frac=0.05)

    assert lr(0) == 1 / 40
    assert lr(39) == 1.0
    assert lr(350) == 1.0
    assert lr(675) == pytest.approx(0.5 + 0.5 * 0.05)
    assert lr(1000) == pytest.approx(0.05)
    assert lr(351) < 1.0
    # the warm-down of 12 steps has round(7.8) = 8, from step 4 on
    short = [schedule.lr_multiplier(s, 12, warmup_steps=1, warmdown_ratio=0.65, final_lr_frac=0.0) for s in (4, 5, 8)]
    assert short == pytest.approx([1.0, 7 / 8, 4 / 8])


def test_momentum_schedule():
    def momentum(step):
        return schedule.muon_momentum(step, 2000, warmup_steps=400, warmdown_ratio=0.65)

    assert momentum(0) == 0.85
    assert momentum(200) == pytest.approx(0.91)
    assert momentum(400) == momentum(699) == 0.97
    assert momentum(1350) == pytest.approx(0.935)
    assert momentum(2000) == pytest.approx(0.90)
    # the warm-up takes priority over the warm-down of a short run
    assert schedule.muon_momentum(300, 100, warmup_steps=400, warmdown_ratio=0.65) == pytest.approx(0.94)


def test_decay_schedule():
    assert schedule.weight_decay_multiplier(0, 100) == 1.0
    assert schedule.weight_decay_multiplier(25, 100) == pytest.approx(0.5 + 0.5**1.5)  # a cosine, not a line
    assert schedule.weight_decay_multiplier(50, 100) == pytest.approx(0.5)
    assert schedule.weight_decay_multiplier(100, 100) == pytest.approx(0.0)


def small(**changes):
    model = ModelConfig(depth=2, d_model=32, d_head=16, seq_len=32, vocab_size=300)
    return dataclasses.replace(preset("quickstart", "cpu"), **{"model": model, "total_batch_size": 1024, **changes})


def test_device_batch_is_lowered_until_it_divides():
    plan = make_plan(small(total_batch_size=24 * 32), device_type="cpu")  # 24 rows
    assert (plan.device_batch_size, plan.grad_accum_steps) == (12, 2)
    plan = make_plan(small(total_batch_size=24 * 32), device_type="cpu", world_size=2)
    assert (plan.device_batch_size, plan.grad_accum_steps) == (12, 1)


def test_the_device_batch_leaves_some_of_a_gpu_for_temporaries(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = gpt2(4)
    fits = make_plan(cfg, device_type="cuda")
    needed = fits.memory_bytes["total"]
    assert fits.device_batch_size == 64
    for size, rows in ((1.001 * needed / 0.85, 64), (0.999 * needed / 0.85, 32)):
        monkeypatch.setattr(plan_module, "DEFAULT_GPU_BYTES", size)
        assert make_plan(cfg, device_type="cuda").device_batch_size == rows


def test_memory_that_the_update_needs():
    """Of the two phases the larger counts: at depth 24, 3.62 GB for what Polar Express starts from, and its work on all
    MLPs, against one row's activations and loss; both, where a CUDA graph of the update keeps its memory."""
    model = ModelConfig(depth=24)
    n, F, C = 48, 6144, 1536  # up and down of every layer; q, k, v and o are 96 squares; 12 gates, of as many channels
    gates = 12 * dims(model).n_kv_head * 12
    polar = 2 * (n * F * C + 96 * C * C + gates + n * (2 * F * C + 2 * C * C))
    assert polar == pytest.approx(3.62e9, rel=2e-3) and n * (2 * F * C + 2 * C * C) > 96 * 4 * C * C
    one, more = (predict_memory(model, rows, torch.bfloat16, "cuda") for rows in (1, 2))
    assert 0 < one["update"] == polar - one["activations"] - one["loss"]
    assert more["update"] == 0 and polar < more["activations"] + more["loss"]
    kept = predict_memory(model, 2, torch.bfloat16, "cuda", graph_optimizer=True)
    assert kept == more | {"update": polar, "total": more["total"] + polar}
    wide = predict_memory(model, 1, torch.float32, "cuda", graph_optimizer=True)
    assert wide["update"] == 2 * polar
    for memory in (one, more, kept, wide):
        assert memory["total"] == sum(memory.values()) - memory["total"]


@pytest.mark.parametrize("depth", [4, 12, 24, 32])
def test_exchanged_gradients_are_never_the_peak(depth):
    """In bf16, beside their fp32 sums, when activations are gone."""
    memory = predict_memory(ModelConfig(depth=depth), 1, torch.bfloat16, "cuda")
    assert memory["gradients"] / 2 < memory["activations"] + memory["loss"] + memory["update"]


@pytest.mark.parametrize("compile, on", [(None, (False, True)), (True, (True, True)), (False, (False, False))])
def test_what_is_compiled(compile, on):
    cfg = small(compile=compile)
    assert tuple(is_compiled(cfg, device) for device in ("cpu", "cuda")) == on


def test_a_graph_of_the_update_is_planned():
    plain, graph = (make_plan(small(graph_optimizer=g), device_type="cuda").memory_bytes for g in (False, True))
    assert plain["update"] == 0 < graph["update"]


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(device_batch_size=5), "1, 2, 4, 8, 16, 32"),
        (dict(device_batch_size=64), "1, 2, 4, 8, 16, 32"),
        (dict(total_batch_size=1000), "768 or 1024"),
        (dict(total_batch_size=100), "such as 256"),
        (dict(steps=0), "steps is 0: expected 1 or more"),
        (dict(steps=None, ratio=1e-9), "horizon is 0 steps"),
        (dict(ratio=0.0), "positive"),
        (dict(model=ModelConfig(depth=0)), "depth is 0"),
        (dict(model=ModelConfig(depth=2, d_model=100)), "multiple of d_head"),
        (dict(model=ModelConfig(depth=2, n_kv_head=3, d_model=256)), "divisor of the 2"),
        (dict(model=ModelConfig(depth=2, window_pattern="SX")), "window_pattern"),
        (dict(model=ModelConfig(depth=2, d_model=12, d_head=4)), "smear"),
    ],
)
def test_impossible_sizes_are_refused_with_those_that_work(changes, says):
    with pytest.raises(ValueError, match=says):
        make_plan(small(**changes), device_type="cpu")


def test_processes_must_divide_the_streams():
    with pytest.raises(ValueError, match=r"\[1, 2, 4, 8\]"):
        make_plan(small(), device_type="cpu", world_size=3)
    streams = small(data=DataConfig(num_streams=6), total_batch_size=6 * 32)
    assert make_plan(streams, device_type="cpu", world_size=3).rows_per_step == 6
