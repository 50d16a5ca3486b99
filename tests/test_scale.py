"""`bench.projection --gpus`: who updates what, what is sent when, and what a token costs on more GPUs."""

import dataclasses
import json
from collections import Counter

import pytest

from bench.projection import __main__ as command
from bench.projection import redline, scale
from bench.projection.machine import INSIDE_S, LATENCY_S
from bench.projection.scale import Design, Links, Pace, Sizes, exposed, scaled
from core.machine import speed
from core.models.gpt2 import parameter_table
from core.params import arenas
from core.stopping import UserError

TABLE = parameter_table(redline.planned(24, 8)[0].model)
NVLINK, ADAPTER = 0.78 * 450e9, 0.9 * 50e9


# who updates what


def test_all_matrices_are_those_of_the_optimizers_own_rows():
    mine, whole = scale.update_of(scale.matrices(arenas(TABLE))), redline.optimizer(TABLE, 1)
    for name, ours in (("polar_express", "Polar Express"), ("muon_momentum", "momentum"), ("muon_apply", "apply")):
        for field in ("flops", "nbytes"):
            if (name, field) == ("polar_express", "nbytes"):
                continue  # products count theirs
            want = sum(getattr(r, field) for r in whole if r.op == name)
            got = sum(getattr(r, field) for r in mine if r.op == ours)
            assert field == "flops" and got == 0 or got == pytest.approx(want), (name, field)


@pytest.mark.parametrize("ranks", [1, 8, 16, 64])
def test_the_rank_with_the_most_work_is_what_a_step_waits_for(ranks):
    most, each = scale.dealt(TABLE, ranks), scale.matrices(arenas(TABLE))
    assert scale.seconds(scale.update_of(most)) >= scale.seconds(scale.update_of(each)) / ranks
    large = Counter(r * c // 1536**2 for r, c, _ in most.elements() if r * c >= 1536**2)
    if ranks == 1:
        assert most == each
    if ranks == 8:  # 48 of 4C x C and 96 of C x C
        assert large == {4: 6, 1: 12}
    if ranks == 64:
        assert large == {4: 1, 1: 1}  # where 2.25 would be even


def test_sizes_are_all_parameters_in_bf16():
    sizes = Sizes.of(TABLE)
    total = sum(sizes.banks) + sum(sizes.values) + sizes.embedding + sizes.head + sizes.small
    assert total == 2 * sum(p.numel for p in TABLE) and len(sizes.banks) == 6
    assert sizes.embedding == sizes.head == 2 * 32768 * 1536 and sum(sizes.values) == 12 * sizes.head


# what is sent when


def test_an_adapter_carries_an_eighth_of_the_bytes():
    inside = INSIDE_S + 1e9 * 7 / 8 / NVLINK
    between = LATENCY_S + 1e9 / 8 * 3 / 4 / ADAPTER
    assert Links(8).reduce(1.0, 1e9) == pytest.approx(1 + inside)
    assert Links(32).reduce(1.0, 1e9) == Links(32).gather(1.0, 1e9) == pytest.approx(1 + inside + between)
    assert Links(1).reduce(1.0, 1e9) == 1.0
    links = Links(32)
    first, second = links.reduce(0.0, 1e9), links.reduce(0.0, 1e9)  # the second's first leg beside the first's second
    assert second - first == pytest.approx(max(inside, between)) and links.busy == pytest.approx(2 * (inside + between))
    assert Links(2).reduce(0.0, 1e9) == pytest.approx(INSIDE_S + 0.5e9 / NVLINK)


NOTHING = Sizes((0.0,), (0.0,), 0.0, 0.0, 0.0)


def test_a_single_bank_hides_behind_nothing_and_many_behind_backward():
    pace = Pace(forward=1.0, backward=2.0, tables=0.0, muon=0.1, adam=0.1)
    idle, _ = exposed(NOTHING, pace, 8)
    assert 0 < idle < 20 * INSIDE_S
    one, _ = exposed(dataclasses.replace(NOTHING, banks=(8e9,)), pace, 8)
    wire = 8e9 * 7 / 8 / NVLINK
    # back behind AdamW; the other weights are queued behind it
    assert one == pytest.approx(wire + max(0, wire - 0.1), abs=20 * INSIDE_S)
    many, beside = exposed(dataclasses.replace(NOTHING, banks=(1e9,) * 8, values=(0.0,) * 8), pace, 8)
    assert many < wire / 8 + 40 * INSIDE_S and many + beside == pytest.approx(2 * wire, rel=0.02)
    assert exposed(NOTHING, pace, 1) == (0.0, 0.0)


def test_a_bank_is_awaited_where_it_is_used():
    """By hand: the first bank's gradient is the last to be ready, and its weight the first to be used."""
    pace = Pace(forward=10.0, backward=2.0, tables=0.0, muon=0.1, adam=0.0)
    waits, _ = exposed(dataclasses.replace(NOTHING, banks=(8e9, 8e9), values=(0.0, 0.0)), pace, 8, Design(True, True))
    assert waits == pytest.approx(2 * 8e9 * 7 / 8 / NVLINK, abs=10 * INSIDE_S)


def test_tables_that_leave_early_are_hidden_and_more_nodes_expose_more():
    sizes = Sizes.of(TABLE)
    pace = Pace(forward=36e-3, backward=80e-3, tables=1e-3, muon=0.7e-3, adam=0.1e-3)
    late, early, used = (exposed(sizes, pace, 64, d)[0] for d in (Design(), Design(True), Design(True, True)))
    assert late > early > used > 0
    values = sum(sizes.values)
    assert late - early == pytest.approx(values * 7 / 8 / NVLINK, rel=0.35)
    waits = [exposed(sizes, pace, gpus)[0] for gpus in (1, 8, 16, 64)]
    assert waits == sorted(waits) and waits[0] == 0
    assert exposed(sizes, dataclasses.replace(pace, backward=0.0), 64)[0] > late


# the step


POINTS = {n: scaled(n, fp8=True) for n in (1, 8, 16, 64)}


def test_the_work_of_a_token_is_the_same_on_all():
    flops = {n: n * p.work.flops("bf16 product", "fp8 product") / p.work.tokens for n, p in POINTS.items()}
    assert all(f == pytest.approx(flops[1]) for f in flops.values())
    assert {p.work.tokens for p in POINTS.values()} == {2**20} and POINTS[64].plan.grad_accum_steps == 1
    one, whole = POINTS[1], redline.redline(gpus=1, fp8=True)
    assert scale.by_group(one.work)["products"] == scale.by_group(whole)["products"]
    assert scale.by_group(one.work)["communication"] == 0


def test_backward_is_about_two_thirds_of_the_layers():
    rows = [r for r in POINTS[8].work.rows if r.group in ("products", "attention", "passes", "fp8 casts")]
    shares = sum(r.seconds() * scale.backward_share(r) for r in rows) / scale.seconds(rows)
    assert 0.6 < shares < 0.75


def test_an_entry_agrees_with_the_formulas_of_the_report():
    p, base = POINTS[64], POINTS[8]
    e = scale.entry(p, base)
    v = speed(p.work.tokens, p.work.seconds(), p.plan.flops_per_token, 64 * 989e12)
    assert (e["tok_per_s"], e["mfu"]) == pytest.approx((v.tok_per_s, v.mfu))
    assert e["gpu_hours_per_1e9_tokens"] == pytest.approx(64 * p.work.seconds() / 3600 / 2**20 * 1e9)
    assert sum(scale.growth(p, base).values()) == pytest.approx(e["more"])
    assert scale.entry(base, base)["more"] == 0
    assert p.work.seconds() == pytest.approx(sum(scale.by_group(p.work).values()))


def test_cost_grows_with_the_nodes_less_so_with_the_batch():
    more = [scale.entry(p, POINTS[8])["more"] for p in POINTS.values()]
    assert more == sorted(more) and more[-1] > 0.02
    grown = scaled(64, fp8=True, batch=8 * 2**20)
    assert scale.entry(grown, POINTS[8])["more"] < 0.02 and grown.plan.grad_accum_steps == 4


def test_a_bf16_gradient_needs_a_single_micro_step():
    lean = Design(no_sums=True)
    assert scaled(64, design=lean).work.seconds() < scaled(64).work.seconds()
    assert scaled(8, design=lean).work.seconds() == scaled(8).work.seconds()


def test_the_goal_is_judged():
    at_64 = scale.judged(POINTS[64], POINTS[8])[0]
    more = 100 * scale.entry(POINTS[64], POINTS[8])["more"]
    assert (
        f"costs {more:+.1f} % against 8" in at_64 and ("met" if more <= 10 else f"missed by {more - 10:.1f}") in at_64
    )
    slow = dataclasses.replace(POINTS[64].work, tokens=POINTS[64].work.tokens // 2)
    assert "missed by" in scale.judged(dataclasses.replace(POINTS[64], work=slow), POINTS[8])[0]
    assert "met" in scale.judged(POINTS[8], POINTS[8])[0]


def test_the_command(capsys):
    command.main(["--gpus", "1,8,16,64"])
    text = capsys.readouterr().out
    assert text.count("| 64 | 1,048,576 |") == 2 and "not a measurement" in text and text.count("goal: at most") == 2
    command.main(["--gpus", "64,8", "--json", "--grow", "--depth", "12"])
    out = json.loads(capsys.readouterr().out)
    assert [p["gpus"] for p in out["bf16"]["points"]] == [8, 64] and out["fp8"]["points"][1]["tokens"] > 2**20
    assert list(out["fp8"]["levers"].values()) == sorted(out["fp8"]["levers"].values(), reverse=True)
    for bad in ("12", "0", "8,x", ""):
        with pytest.raises(UserError, match="expected numbers of up to 8 or multiples of it"):
            command.main(["--gpus", bad or ","])
