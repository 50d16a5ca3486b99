"""The projection reproduces published step times and the work that they are published with, and takes measurements."""

import dataclasses
import json
import math
from collections import Counter

import pytest
import torch

from bench.projection import __main__ as command
from bench.projection import machine, peers, redline, report
from bench.projection.machine import CLASSES, FLOPS, HBM, TOLERANCE
from core.config import ModelConfig
from core.fp8 import Recipe
from core.models.gpt2 import GPT, dims, flops_per_token
from kernels.ops import BY_NAME
from kernels.polar_express import polar_express_cost

CHECKS = {w.name: w for w in peers.checks()}
PRODUCTS = ("bf16 product", "fp8 product")
BUDGETS = {
    "bf16": redline.redline(),
    "fp8": redline.redline(fp8=True),
    "target": redline.redline(target=True),
}


def changed(name, factor):
    return CLASSES | {name: dataclasses.replace(CLASSES[name], efficiency=factor * CLASSES[name].efficiency)}


def accounted(w, depth, short):
    """FLOPs per token as nanochat counts them: attention over whole windows, masked pairs too, without the gates."""
    d = dims(ModelConfig(depth=depth))
    windows = [n if n == d.seq_len else short for n in d.windows]
    return w.flops(*PRODUCTS) * machine.GPUS / w.tokens + sum(12 * d.d_model * n for n in windows)


# check ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, published_ms",
    [
        ("nanochat run 1: d24 bf16", 1e3 * 10949 / 16704),
        ("nanochat run 3: d26 fp8", 1373),
        ("nanochat run 6: d24 fp8", 1067),
        ("modded #85: stage 1", 32.3),
        ("modded #85: stage 2", 58.1),
        ("modded #85: stage 3", 84.0),
    ],
)
def test_published_step_times(name, published_ms):
    w = CHECKS[name]
    assert 1e3 * w.published == pytest.approx(published_ms, rel=1e-3)
    assert 1e3 * w.seconds() == pytest.approx(published_ms, rel=TOLERANCE)


@pytest.mark.parametrize(
    "name, factor",
    [(name, 0.5) for name in (*PRODUCTS, "attention forward", "attention backward", "compiled pass", "collective")]
    + [("bf16 product", 2.0)],
)
def test_the_check_can_fail(name, factor):
    assert max(abs(w.error(changed(name, factor))) for w in CHECKS.values()) > TOLERANCE


def test_efficiencies_are_shares_with_a_source():
    for c in CLASSES.values():
        assert 0 < c.efficiency < 1 and c.source


def test_nothing_of_the_check_depends_on_measurements():
    assert not any(row.cost or row.measured for w in CHECKS.values() for row in w.rows)


# work -----------------------------------------------------------------------


@pytest.mark.parametrize("name, depth, flops", [("nanochat run 6: d24 fp8", 24, 4.7752e9)])
def test_flops_per_token_of_nanochat(name, depth, flops):
    assert accounted(CHECKS[name], depth, 512) == pytest.approx(flops, rel=2e-5)


def test_flops_of_nanochats_first_run():
    w = CHECKS["nanochat run 1: d24 bf16"]
    assert accounted(w, 24, 1024) * w.tokens * w.steps == pytest.approx(4.330784e19, rel=2e-5)


@pytest.mark.parametrize("stage, tokens", [(1, 131_072), (2, 262_144), (3, 393_216)])
def test_matmul_flops_of_modded_nanogpt(stage, tokens):
    w = CHECKS[f"modded #85: stage {stage}"]
    assert w.tokens == tokens
    assert w.flops(*PRODUCTS) * machine.GPUS == pytest.approx(6 * 114.1e6 * tokens, rel=1e-3)


@pytest.mark.parametrize("name", BUDGETS)
def test_flops_of_redline_are_the_plans(name):
    w = BUDGETS[name]
    assert (w.tokens, w.steps) == (1_048_576, 5568)
    assert accounted(w, 24, 512) == pytest.approx(flops_per_token(ModelConfig(depth=24)), rel=2e-5)


@pytest.mark.parametrize(
    "name, head, products",
    [
        ("bf16", ("lm_head_loss, gradients included", 3), ("qkv, o: wgrad", 2)),
        ("fp8", ("lm_head_loss (fp8), gradients included", 3), ("fp8_mlp (sum), backward", 4)),
        ("target", ("lm_head: forward, dgrad", 2), ("qkv, o: wgrad", 2)),
    ],
)
def test_rows_are_counted_once_for_each_micro_step_of_the_plan(name, head, products):
    """Their FLOPs do not tell: fewer micro-steps have more rows each."""
    micro = BUDGETS[name].tokens // (machine.GPUS * 16 * 2048)
    kernels = {row.op: row.kernels for row in BUDGETS[name].rows}
    assert micro == 4 and kernels[head[0]] == head[1] * micro
    attention = sum(n for op, n in kernels.items() if op.startswith("attention") and op.endswith("forward"))
    assert kernels[products[0]] == products[1] * 24 * micro and attention == 24 * micro


def test_attention_counts_visible_pairs():
    T, w = 50, 8
    pairs = sum(0 <= q - k <= w for q in range(T) for k in range(T))
    assert machine.mean_keys(w, [T]) == pairs / T
    assert machine.mean_keys(w, [T, 3]) == (pairs + 6) / (T + 3)
    forward, backward = machine.attention(tokens=100, width=256, keys=[10.0, 30.0], calls=1)
    assert forward.flops == 4 * 256 * 100 * 40
    assert backward.flops == 2.5 * forward.flops


def test_our_attention_costs_what_the_op_says():
    heads, windows = (16, 2048, 12, 12, 128), dims(ModelConfig(depth=24)).windows
    rows = redline.own_attention(heads, windows, micro=4)
    for direction, factor in (("forward", 4), ("backward", 10)):
        own = [row for row in rows if row.cost.direction == direction]
        pairs = sum(machine.mean_keys(w, [2048]) for w in windows) * 16 * 2048 * 12
        assert sum(row.flops for row in own) == pytest.approx(4 * factor * 128 * pairs)
        assert sum(row.kernels for row in own) == 4 * 24 * (1 if direction == "forward" else 2)
        assert {row.cost.shape for row in own} == {(*heads, seen, 0) for seen in (513, 2048)}
    assert all(row.fit < 1 and row.cost.form == "plain" for row in rows)


@pytest.mark.parametrize("shape", [(12, 1536, 1536), (4, 6144, 1536), (8, 256, 768)])
def test_newton_schulz_flops(shape):
    K, rows, cols = shape
    n, m = min(rows, cols), max(rows, cols)
    assert machine.newton_schulz(*shape, symmetric=True).flops == polar_express_cost(shape, machine.BF16)[0]
    assert machine.newton_schulz(*shape, symmetric=False).flops == K * 5 * (4 * m / n + 2) * n**3  # T (4 alpha + 2) n^3


def test_sharding_divides_the_optimizer():
    today, target = (report.by_group(BUDGETS[name])["optimizer"] for name in ("bf16", "target"))
    assert target == pytest.approx(today / machine.GPUS)


# today in fp8 ---------------------------------------------------------------


def calls(w, op):
    """Rows of an op by form, direction and shape: its products, then its casts."""
    found = {}
    for row in w.rows:
        if row.cost and row.cost.op == op:
            found.setdefault((row.cost.form, row.cost.direction, row.cost.shape), []).append(row)
    return found


class Chooser:
    """Notes what core/ asks for."""

    def __init__(self):
        self.asked = []

    def choose(self, op, *shape):
        self.asked.append((op.name, shape))

    choose_fitting = choose

    def choose_many(self, op, problems):
        self.asked += [(op.name, shape) for shape, _ in problems]


def test_the_ops_in_fp8_are_those_that_core_calls():
    chooser = Chooser()
    with torch.device("meta"):
        GPT(ModelConfig(depth=24), chooser, 16, fp8_head=True, recipe=Recipe())
    asked = Counter((op, shape) for op, shape in chooser.asked if op in ("fp8_linear", "fp8_mlp", "quantise_weight"))
    micro, layers, found = 4, 24, Counter()
    for op in ("fp8_linear", "fp8_mlp"):
        for (_, direction, shape), rows in calls(BUDGETS["fp8"], op).items():
            if direction == "forward":
                assert sum(r.flops for r in rows) == layers * micro * BY_NAME[op].cost(shape, machine.BF16)[0]
                found[op, shape] += 1
    for (_, _, shape), (row,) in calls(BUDGETS["fp8"], "quantise_weight").items():
        found["quantise_weight", shape] += row.kernels // 2
    assert found == asked


def test_forms_of_ops_in_fp8():
    w = BUDGETS["fp8"]
    forms = {op: {form for form, _, _ in calls(w, op)} for op in ("fp8_linear", "fp8_mlp", "lm_head_loss", "relu2_mlp")}
    assert forms == {
        "fp8_linear": {"given", "delayed"},
        "fp8_mlp": {"sum"},
        "lm_head_loss": {"fp8"},
        "relu2_mlp": set(),
    }
    norms = calls(w, "rms_norm")
    forward = {form: sum(r.nbytes for r in rows) for (form, way, _), rows in norms.items() if way == "forward"}
    assert set(forward) == {"mix3_fp8", "mix_fp8"}
    # q and q_t take the place of y, so that norms move no byte more than in bf16 (but for 12 channels)
    before = sum(
        r.nbytes for (_, way, _), rows in calls(BUDGETS["bf16"], "rms_norm").items() for r in rows if way == "forward"
    )
    assert sum(forward.values()) == pytest.approx(before, rel=3e-3)


def test_fp8_lies_between_bf16_and_the_target():
    bf16, fp8, target = (w.seconds() for w in BUDGETS.values())
    assert 1.1 * target < fp8 < 0.9 * bf16


def test_products_in_fp8_take_about_half():
    """By the classes' efficiencies 1.72 times the speed, less what short sums cost; casts are counted beside them."""
    for group in ("products", "head"):
        bf16, fp8 = (report.by_group(BUDGETS[name])[group] for name in ("bf16", "fp8"))
        assert 0.5 < fp8 / bf16 < 0.65
    kinds = {row.kind for row in BUDGETS["fp8"].rows if row.group in ("products", "head")}
    assert kinds == {"fp8 product"}
    groups = report.by_group(BUDGETS["fp8"])
    assert 0.05 < groups["fp8 casts"] / groups["products"] < 0.2
    assert report.by_group(BUDGETS["bf16"])["fp8 casts"] == 0


def test_weights_are_quantised_once_a_step_and_activations_in_each_micro_step():
    many, few = redline.redline(gpus=1, fp8=True), BUDGETS["fp8"]  # 32 micro-steps, and 4
    d = dims(ModelConfig(depth=24))
    elements = d.n_layer * 12 * d.d_model**2 + d.padded_vocab * d.d_model
    for w in (many, few):
        (weights,) = [sum(r.nbytes for rows in calls(w, "quantise_weight").values() for r in rows)]
        assert weights == 6 * elements  # read twice in bf16, written twice
    casts = [
        sum(r.nbytes for r in w.rows if r.group == "fp8 casts" and r.cost.op != "quantise_weight") for w in (many, few)
    ]
    assert casts[0] == machine.GPUS * casts[1]
    # d_qkv, d_out, d_mlp and what attention returns: read in bf16, written twice, of each layer
    assert casts[1] == (2 + 2) * (3 + 1 + 1 + 1) * d.n_layer * d.d_model * few.tokens / machine.GPUS


def test_bytes_of_an_op_are_those_of_its_cost():
    for op in ("fp8_linear", "fp8_mlp"):
        for (form, direction, shape), rows in calls(BUDGETS["fp8"], op).items():
            assert all(row.nbytes > 0 for row in rows)
            cost = BY_NAME[op].cost(shape, machine.BF16, form, direction == "backward")
            assert sum(row.nbytes for row in rows) == 24 * 4 * cost[1]


def test_an_op_that_is_measured_takes_its_time_over_all_of_its_rows(tmp_path):
    """Products and casts together, at the peak of fp8."""
    shape = [32768, 1536, 1536]
    flops, nbytes = BY_NAME["fp8_linear"].cost(shape, machine.BF16, "delayed", True)
    row = {"op": "fp8_linear", "form": "delayed", "direction": "backward", "shape": shape}
    before = calls(BUDGETS["fp8"], "fp8_linear")["delayed", "backward", tuple(shape)]
    w = redline.with_measurements(BUDGETS["fp8"], results(tmp_path, row | {"flops": flops, "bytes": nbytes, "us": 700}))
    products, cast = after = calls(w, "fp8_linear")["delayed", "backward", tuple(shape)]
    assert sum(r.seconds() for r in after) == pytest.approx(24 * 4 * 700e-6)
    assert cast.seconds() / products.seconds() == pytest.approx(before[1].seconds() / before[0].seconds())
    assert sum(r.measured is not None for r in w.rows) == 2


def test_a_measurement_at_another_shape_counts_by_what_bounds_this_one(tmp_path):
    """A large product is bound by arithmetic, so that its ratio is of fp8's peak; the output projection with its cast
    is bound by memory, which in bf16 it would not be."""
    shape = [32768, 8192, 8192]
    flops, nbytes = BY_NAME["fp8_linear"].cost(shape, machine.BF16, "delayed")
    row = {"op": "fp8_linear", "form": "delayed", "direction": "forward", "shape": shape, "us": 4000}
    w = redline.with_measurements(BUDGETS["fp8"], results(tmp_path, row | {"flops": flops, "bytes": nbytes}))
    here = 32768, 1536, 1536
    least = BY_NAME["fp8_linear"].cost(here, machine.BF16, "delayed")[1] / HBM["H100"]
    rows = calls(w, "fp8_linear")["delayed", "forward", here]
    assert sum(r.seconds() for r in rows) == pytest.approx(24 * 4 * least * 4e-3 / (flops / FLOPS["fp8"]))


def test_products_in_fp8_are_measured_against_the_peak_of_fp8(tmp_path):
    shape = [32768, 1536, 32768]
    row = {"op": "lm_head_loss", "form": "fp8", "direction": "backward", "shape": shape, "flops": 10**13, "bytes": 1}
    w = redline.with_measurements(BUDGETS["fp8"], results(tmp_path, row | {"us": 10_000}))
    (head,) = (r for r in w.rows if r.measured)
    assert head.measured.ratio == pytest.approx(1e13 / FLOPS["fp8"] / 1e-2)


# laws -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "direction, S, tflops",
    [
        ("forward", 1024, 364), ("forward", 2048, 560), ("forward", 4096, 667), ("forward", 8192, 685),
        ("backward", 1024, 182), ("backward", 2048, 316), ("backward", 4096, 444), ("backward", 8192, 539),
    ],
)  # fmt: skip
def test_attention_law_gives_published_speeds(direction, S, tflops):
    c = CLASSES[f"attention {direction}"]
    keys = machine.mean_keys(S, [S])
    got = 1e-12 * c.peak * c.efficiency * machine.attention_fit(keys, direction)
    assert got == pytest.approx(tflops, rel=0.05 if S > 1024 else 0.2)


def test_product_law_gives_nanochats_microbenchmark():
    """65536 x 1664 @ 1664 x 6656 forward: 2.00 ms in bf16, 1.45 ms in fp8 with its casts."""
    M, K, N = 65536, 1664, 6656
    assert 1e3 * machine.products("", "", [(1, M, N, K)]).seconds() == pytest.approx(2.00, rel=0.05)
    fp8 = machine.products("", "", [(1, M, N, K)], kind="fp8 product")
    casts = machine.one_pass("", "", 5 * M * K + 9 * N * K, 4)
    assert 1e3 * (fp8.seconds() + casts.seconds()) == pytest.approx(1.45, rel=0.05)


def test_product_law():
    fit = machine.product_fit
    assert fit(1, 128 * machine.SMS, 256, 2**20, 2) == pytest.approx(1, abs=1e-3)  # one whole wave, long
    assert fit(1, 32768, 1536, 768, 2) < fit(1, 32768, 1536, 3072, 2)  # short K costs
    assert fit(1, 1536, 1536, 32768, 2) > 72 / machine.SMS  # 72 tiles alone would leave most idle: K is split


# measurements ---------------------------------------------------------------

ROW = {
    "op": "rms_norm", "form": "mix", "case": "depth 24", "shape": [65536, 1536], "dtype": "bfloat16",
    "direction": "forward", "backend": "triton", "us": 500.0, "flops": 6 * 65536 * 1536,
    "bytes": 4 * 2 * 65536 * 1536, "device": "NVIDIA H100 80GB HBM3",
    "commit": "abc1234", "date": "2026-12-01T10:00:00",
}  # fmt: skip


def results(tmp_path, *rows):
    folder = tmp_path / "h100"
    folder.mkdir()
    (folder / "ops.jsonl").write_text("".join(json.dumps(ROW | row) + "\n" for row in rows) + "\n")
    return redline.read_results(tmp_path)


def mix(w):
    return next(
        r for r in w.rows if r.cost and (r.cost.op, r.cost.form, r.cost.direction) == ("rms_norm", "mix", "forward")
    )


def test_measured_rows_replace_assumed_ones(tmp_path):
    before = BUDGETS["bf16"]
    after = redline.with_measurements(before, results(tmp_path, {}))
    ratio = ROW["bytes"] / HBM["H100"] / 500e-6
    assert mix(after).measured.ratio == pytest.approx(ratio)
    assert mix(after).seconds() == pytest.approx(mix(before).nbytes / HBM["H100"] / ratio)
    assert report.entry(mix(after))["efficiency"] == pytest.approx(ratio)
    assert report.entry(mix(after))["basis"] == "measured (NVIDIA H100 80GB HBM3, abc1234)"
    assert sum(row.measured is not None for row in after.rows) == 1
    assert after.seconds() - before.seconds() == pytest.approx(mix(after).seconds() - mix(before).seconds())


def us(measured):
    """Time that a ratio stands for, of ROW's work on an H100."""
    return 1e6 * ROW["bytes"] / HBM["H100"] / measured.ratio


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([{}, {"backend": "cuda", "us": 450.0}, {"backend": "ref", "us": 900.0}], 450.0),  # the fastest
        ([{}, {"backend": "torch.compile", "us": 100.0}, {"backend": "liger", "us": 90.0}], 500.0),  # of Redline's
        ([{}, {"backend": "cuda", "us": 1.0, "error": "off by 0.3"}], 500.0),  # that is right
        ([{}, {"us": 600.0, "date": "2026-12-02T10:00:00"}], 600.0),  # as measured last
        ([{}, {"us": 1.0, "shape": [2048, 128], "case": "quickstart"}], 500.0),  # on the nearest shape
        ([{}, {"us": 1.0, "device": "NVIDIA H200"}], 500.0),  # an H100 first
        ([{"us": 600.0, "device": "NVIDIA H200"}], 600.0 * HBM["H200"] / HBM["H100"]),  # by that device's own peak
        (
            [{}, {"us": 1.0, "dtype": "float32"}, {"us": 1.0, "form": "add"}, {"us": 1.0, "direction": "backward"}],
            500.0,
        ),
    ],
)
def test_which_measurement_counts(tmp_path, rows, expected):
    w = redline.with_measurements(BUDGETS["bf16"], results(tmp_path, *rows))
    assert us(mix(w).measured) == pytest.approx(expected)


@pytest.mark.parametrize("device", ["NVIDIA A100-SXM4-80GB", "cpu", "NVIDIA H100 PCIe"])
def test_other_devices_count_nothing(tmp_path, device):
    assert results(tmp_path, {"device": device}) == []


def test_arithmetic_is_measured_against_its_peak(tmp_path):
    flops = 2 * 65536 * 1536 * 6144 * 2
    row = {"op": "relu2_mlp", "form": "plain", "shape": [65536, 1536, 6144], "flops": flops, "bytes": 1, "us": 5000.0}
    w = redline.with_measurements(BUDGETS["bf16"], results(tmp_path, row))
    (measured,) = (r for r in w.rows if r.measured)
    assert measured.measured.ratio == pytest.approx(flops / FLOPS["bf16"] / 5e-3)
    assert measured.seconds() == pytest.approx(measured.flops / FLOPS["bf16"] / measured.measured.ratio)


def test_where_nothing_is_measured_the_model_of_the_kernel_counts(tmp_path):
    """At the nearest shape; a measurement comes first."""
    baseline = {
        "rms_norm / depth 24 / mix / bfloat16 / forward": {"us": 50.0, "bound": "memory", "predicted_us": 150.0},
        "rms_norm / depth 12 / mix / bfloat16 / forward": {"us": 50.0, "bound": "memory", "predicted_us": 500.0},
        "rms_norm / depth 24 / mix / float32 / forward": {"us": 50.0, "bound": "memory", "predicted_us": 500.0},
        "rms_norm / depth 24 / add / bfloat16 / forward": {"us": 50.0, "bound": "memory"},
    }
    for version, rows in (("3.9.0", {}), ("3.10.0", baseline)):
        (tmp_path / f"triton-{version}.json").write_text(json.dumps({"roofline": rows}))
    models = redline.read_models(tmp_path)
    w = redline.with_measurements(BUDGETS["bf16"], [], models)
    assert mix(w).measured.ratio == pytest.approx(1e6 * 4 * 2 * 32768 * 1536 / HBM["H100"] / 150)
    assert report.entry(mix(w))["basis"] == "model, triton-3.10.0"
    assert sum(row.measured is not None for row in w.rows) == 1
    both = redline.with_measurements(BUDGETS["bf16"], results(tmp_path, {}), models)
    assert us(mix(both).measured) == pytest.approx(500.0)
    assert redline.read_models(tmp_path / "none") == []


def test_the_committed_model_explains_redlines_own_kernels():
    """Every row of an op that launches kernels of ours has a prediction, none above the peak. The forward of embeddings
    is PyTorch's gather."""
    w = redline.with_measurements(BUDGETS["bf16"], [], redline.read_models())
    own = [row for row in w.rows if row.cost and (row.cost.op, row.cost.direction) != ("embedding", "forward")]
    assert len(own) > 15 and all(row.measured and 0.2 < row.measured.ratio <= 1 for row in own), own


def test_one_gpu_communicates_nothing():
    alone = redline.redline(gpus=1)
    assert alone.tokens == BUDGETS["bf16"].tokens
    groups = report.by_group(alone)
    assert groups["communication"] == 0 and groups["products"] == pytest.approx(
        machine.GPUS * report.by_group(BUDGETS["bf16"])["products"]
    )
    assert groups["optimizer"] == pytest.approx(report.by_group(BUDGETS["bf16"])["optimizer"])


def test_flash_attention_3_changes_attention_alone():
    with_it, without = (redline.redline(gpus=1, fa3=fa3) for fa3 in (True, False))
    groups, others = report.by_group(with_it), report.by_group(without)
    # it launches a kernel more in each backward than ours
    assert {name for name in groups if groups[name] != others[name]} == {"attention", "host"}
    assert groups["host"] - others["host"] == pytest.approx(24 * 32 * machine.GAP_S)
    assert groups["attention"] == pytest.approx(report.by_group(BUDGETS["target"])["attention"] * machine.GPUS)
    assert groups["attention"] < 0.6 * others["attention"] and "FA3" in with_it.name and "FA3" not in without.name


def test_levers_are_what_the_target_saves():
    gains = dict(report.levers(BUDGETS["fp8"], BUDGETS["target"], 99))
    difference = BUDGETS["fp8"].seconds() - BUDGETS["target"].seconds()
    assert sum(gains.values()) == pytest.approx(difference)
    few = report.levers(BUDGETS["fp8"], BUDGETS["target"])
    assert [gain for _, gain in few] == sorted(gains.values(), reverse=True)[:5] and few[0][0] == "attention"


def test_progress_is_what_fp8_brings_of_the_way_to_the_target():
    p = report.Progress(1000.0, 850.0, 600.0)
    assert p.share == pytest.approx(150 / 400)
    text = "\n".join(report.progress_lines(p))
    assert "150 of the 400 ms" in text and "38 %; 250 ms remain" in text and "850 ms, 1.18 times" in text


def test_every_measurable_row_is_a_case_of_an_op():
    for w in BUDGETS.values():
        for row in w.rows:
            if row.cost:
                op = BY_NAME[row.cost.op]
                assert row.cost.form in op.forms and len(row.cost.shape) == len(op.dims), row.op


# output ---------------------------------------------------------------------


def test_output(capsys, tmp_path):
    command.main([])
    short = capsys.readouterr().out
    assert all((f"### {w.name}" in short) == (w in BUDGETS.values()) for w in (*CHECKS.values(), *BUDGETS.values()))
    assert (
        "bf16, one H100" in short
        and "bf16, FA3, one H100" in short
        and "tokens/s" in short
        and "The next levers" in short
        and "fp8, one H100" in short
        and "fp8 brings" in short
    )
    command.main(["--rows", "--plot", str(tmp_path / "bars.png")])
    text = capsys.readouterr().out
    assert "not a measurement" in text
    for w in (*CHECKS.values(), *BUDGETS.values()):
        assert f"### {w.name}" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} <= {5, 7}
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_json(capsys):
    command.main(["--json"])
    out = json.loads(capsys.readouterr().out)
    assert "not a measurement" in out["note"]
    assert [w["name"] for w in out["checks"]] == list(CHECKS)
    times = {w["name"]: w["step_ms"] for w in out["budgets"]}
    steps = out["step_ms"]
    assert [steps[name] for name in BUDGETS] == [times[w.name] for w in BUDGETS.values()]
    assert steps["share_of_fp8"] == pytest.approx((steps["bf16"] - steps["fp8"]) / (steps["bf16"] - steps["target"]))
    for w in out["checks"] + out["budgets"]:
        assert math.isclose(sum(row["ms"] for row in w["rows"]), w["step_ms"])
        assert math.isclose(sum(w["groups_ms"].values()), w["step_ms"])
        assert w["total_s"] == pytest.approx(1e-3 * w["step_ms"] * w["steps"])


def test_a_check_that_fails_says_so():
    far = dataclasses.replace(CHECKS["modded #85: stage 1"], published=1.0)
    assert "**not within 15 %**" in report.report([far], [], None, [], rows=False)
    assert "**not within" not in report.report(list(CHECKS.values()), [], None, [], rows=False)
