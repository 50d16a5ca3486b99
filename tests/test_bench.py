"""The bench measures what it says: wrong backends get no number, 10 % is seen, 2 % of noise is not, tables hold.

Timings here are of made-up samplers, or of sleeps: what this machine does meanwhile does not matter.
"""

import dataclasses
import functools
import gc
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bench import compare, history, ops, roofline, suite
from bench.law import error
from bench.peers import PEERS, Peer
from bench.timing import MIN_ROUNDS, GraphSampler, HostSampler, Spread, interleave
from core.stopping import Stopped
from kernels.adam_update import adam_update
from kernels.fp8_linear import fp8_linear
from kernels.fp8_mlp import fp8_mlp
from kernels.op import Backend
from kernels.ops import BY_NAME
from kernels.rms_norm import RMSNorm, rms_norm
from tests.harness import DEVICE

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="bench.gpu runs the bench itself there")


# timing -------------------------------------------------------------------


@pytest.mark.parametrize("n", [6, 9, 25, 200])
def test_bounds_hold_the_median_with_95_percent(n):
    """Of an exponential distribution, which is far from normal: its median is ln 2."""
    rng = random.Random(n)
    held = 0
    for _ in range(2000):
        low, high = Spread(tuple(rng.expovariate(1) for _ in range(n))).bounds
        held += low <= 0.6931 <= high
    assert 0.94 <= held / 2000 <= (0.985 if n >= 25 else 1)


def test_bounds_of_few_samples_are_their_extremes():
    assert Spread((3.0, 1.0, 2.0)).bounds == (1.0, 3.0)


def test_variants_take_turns_and_each_round_begins_with_another():
    calls = []

    def sampler(name):
        return lambda: calls.append(name) or 1.0

    spreads = interleave({name: sampler(name) for name in "abc"}, seconds=0)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == MIN_ROUNDS and all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert [turn[0] for turn in rounds[:4]] == ["a", "b", "c", "a"]
    assert all(len(spread.samples) == MIN_ROUNDS for spread in spreads.values())


def test_a_drifting_machine_moves_times_and_not_ratios():
    slow = [1.0]

    def sampler(factor):
        def sample():
            slow[0] *= 1.02
            return factor * slow[0]

        return sample

    spreads = interleave({"a": sampler(1.0), "b": sampler(2.0)}, seconds=0)
    assert spreads["a"].samples[-1] > 1.3 * spreads["a"].samples[0]
    assert spreads["b"].over(spreads["a"]).median == pytest.approx(2, rel=0.03)


def test_twice_as_fast_as_the_baseline_is_a_speedup_of_two():
    """The direction of a ratio, through measure(): 1 s against a baseline of 2 s."""

    class Programs:
        def check(self, variant):
            return None

        def sampler(self, variant):
            return lambda: {"redline": 1.0, "plain": 2.0}[variant]

    @contextmanager
    def programs():
        yield Programs()

    item = suite.host_item("x", "y", "plain", (), programs)
    entries = [suite.row(item, name, result, None, FACTS) for name, result in suite.measure(item, seconds=0).items()]
    assert {entry["backend"]: entry.get("speedup") for entry in entries} == {"redline": 2, "plain": None}


def test_a_slow_first_call_is_no_sample():
    """Compiling must not count, nor make the sampler believe that calls are slow."""
    calls = []

    def call():
        calls.append(None)
        time.sleep(0.3 if len(calls) == 1 else 0.001)

    sampler = HostSampler(call)
    calls.clear()
    calls.append(None)
    assert sampler() < 0.1 and len(calls) > 4


def test_a_host_sample_is_seconds_per_call():
    calls = []
    sampler = HostSampler(lambda: calls.append(time.sleep(0.003)))
    calls.clear()
    assert 0.003 <= sampler() < 0.02 and len(calls) >= 3


# correctness --------------------------------------------------------------


def broken(op, function):
    """The op with another kernel in the place of its own, which the interpreter lets run here."""
    return like(op, (64, 32), triton=function)


def like(op, shape, **functions):
    backends = {name: Backend(functions.get(name, b.function), b.needs, b.limits) for name, b in op.backends.items()}
    return dataclasses.replace(op, cases={"quickstart": shape}, backends=backends)


def measured(op, form="plain", backward=False):
    item = ops.op_item(op, "quickstart", form, torch.float32, backward)
    return suite.measure(item, ["ref", "triton"], seconds=0)


ONE_ROW = torch.ones(64, 32)
ONE_ROW[17, :2] = 0  # 2 of 2048 numbers: the mean error hardly shows it in bf16
MEMORY = {}


def remembered(x):
    """What the first call returned, whatever the numbers are."""
    return MEMORY.setdefault("y", rms_norm.backends["ref"](x).y) + 0 * x


class Overwriting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        result = dy.clone()
        dy.zero_()
        return result


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: RMSNorm(rms_norm.backends["ref"](x).y * 1.0001),
        lambda x: RMSNorm(torch.zeros_like(x)),
        lambda x: RMSNorm(rms_norm.backends["ref"](x).y * torch.nan),
        lambda x: RMSNorm(rms_norm.backends["ref"](x).y.detach() + 0 * x),  # right, but its gradient is not
        lambda x: RMSNorm(rms_norm.backends["ref"](x).y, h=x),
        lambda x: RMSNorm(rms_norm.backends["ref"](x).y * (1 if torch.is_grad_enabled() else 2)),
        lambda x: RMSNorm(rms_norm.backends["ref"](x).y[None]),
        lambda x: RMSNorm(rms_norm.backends["ref"](x).y.double()),
        lambda x: RMSNorm(rms_norm.backends["ref"](x).y * ONE_ROW),
        lambda x: RMSNorm(remembered(x)),
        lambda x: RMSNorm(Overwriting.apply(rms_norm.backends["ref"](x).y)),
    ],
    ids=[
        "a factor", "zeros", "NaN", "gradient", "another output", "without gradients", "shape", "dtype",
        "a part of a row", "the first numbers for ever", "upstream gradient overwritten",
    ],
)  # fmt: skip
def test_a_wrong_backend_gets_no_number_and_the_others_do(wrong):
    """Whichever direction is timed, both are checked."""
    MEMORY.clear()
    found = measured(broken(rms_norm, wrong), backward=True)
    assert found["triton"].seconds is None and found["triton"].error
    assert found["ref"].error is None and found["ref"].seconds.median > 0


def test_a_right_backend_gets_a_number():
    found = measured(broken(rms_norm, lambda x: RMSNorm(x / (x.square().mean(-1, keepdim=True) + 1e-7).sqrt())))
    assert found["triton"].error is None and found["triton"].over_baseline.median > 0


def test_a_backend_that_raises_takes_no_number_from_the_others(capfd):
    def raising(x):
        raise RuntimeError("no kernel image\nfor this device")

    found = measured(broken(rms_norm, raising))
    assert found["triton"].error == "RuntimeError: no kernel image" and found["ref"].seconds
    assert "no kernel image" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["p", "exp_avg", "exp_avg_sq", "low"])
def test_what_is_changed_in_place_is_compared(name):
    def wrong(**inputs):
        adam_update.backends["ref"](**inputs)
        t = inputs[name]
        t.add_(1000 if name == "low" else 0.01 * t)

    op = like(adam_update, (4096,), triton=wrong)
    found = suite.measure(ops.op_item(op, "quickstart", "master", torch.bfloat16, False), ["ref", "triton"], seconds=0)
    assert found["triton"].error and found["ref"].seconds


def test_every_reference_and_kernel_passes_its_own_check():
    """At small sizes, with the kernels in the interpreter: the gate is no stricter than the tests."""
    small = {
        "lm_head_loss": (12, 32, 40),
        "quantise_weight": (2, 40, 32),
        "rms_norm": (32, 64),
        "rope_qk_norm": (1, 16, 2, 2, 16),
        "embedding": (40, 12, 32),
        "linear": (32, 32, 48),
        "fp8_linear": (32, 32, 48),
        "fp8_mlp": (48, 32, 64),
        "relu2_mlp": (32, 32, 64),
        "attention": (1, 24, 2, 1, 16, 7, 0),
        "decode_attention": (2, 40, 4, 2, 16, 33),
        "polar_express": (2, 32, 32),
    }
    small |= {"muon_momentum": (2, 32, 48), "muon_apply": (2, 32, 48), "adam_update": (500,)}
    assert small.keys() == BY_NAME.keys()
    for name, op in BY_NAME.items():
        op = like(op, small[name])
        for form in op.forms:
            item = ops.op_item(op, "quickstart", form, torch.float32, False)
            with item.open() as programs:
                for variant in ("ref", "triton"):
                    assert variant not in op.backends or programs.check(variant) is None, (name, form, variant)


def test_optimizer_ops_have_no_backward():
    assert {item.op: item.direction for item in suite.items() if item.op.startswith(("muon", "adam", "polar"))} == {
        name: "forward" for name in ("adam_update", "muon_momentum", "muon_apply", "polar_express")
    }
    assert {item.direction for item in suite.items() if item.op == "rms_norm"} == {"forward", "backward"}


def test_unwritten_memory_gets_no_number():
    def lazy(x):
        y = torch.empty_like(x)
        y[:63] = rms_norm.backends["ref"](x).y[:63]
        return RMSNorm(y)

    assert "is off by" in measured(broken(rms_norm, lazy))["triton"].error


def test_nothing_but_wrong_variants_is_no_error():
    item = ops.op_item(broken(rms_norm, lambda x: RMSNorm(2 * x)), "quickstart", "plain", torch.float32, False)
    found = suite.measure(item, ["triton"], seconds=0)
    assert found["triton"].error and found["triton"].seconds is None


def test_a_signal_is_no_error_of_a_backend():
    def stopped(x):
        raise Stopped("stopped by SIGTERM", 15)

    with pytest.raises(Stopped):
        measured(broken(rms_norm, stopped))


def test_a_graph_keeps_what_it_reads_alive(monkeypatch):
    """On a GPU that is not there: the closures own the outputs and gradients whose addresses a graph has."""

    events = []

    class Fake:
        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def record(self):
            events.append("record")

        def replay(self):
            events.append("replay")

        def synchronize(self):
            events.append("synchronize")

        def elapsed_time(self, other):
            return 1.5  # ms

    for name in ("Event", "CUDAGraph", "graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, Fake)
    honest = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **options: honest(1, **options))
    monkeypatch.setattr(torch.Tensor, "zero_", lambda t: events.append("flush") or t)
    tensor, calls = torch.ones(3), []

    def call(tensor=tensor):
        calls.append(tensor)
        return tensor

    kept = weakref.ref(call)
    sampler = GraphSampler([call, lambda: None], Fake())
    del call, tensor
    gc.collect()
    assert kept() is not None and calls
    events.clear()
    assert sampler() == pytest.approx(1.5e-3 / 4)  # two replays of two calls make 2 ms
    assert events == ["flush", "record", "replay", "record", "synchronize"]


def test_a_program_that_returns_something_else_gets_no_number():
    @contextmanager
    def programs():
        yield suite.HostPrograms({"redline": lambda: 1, "plain": lambda: 2}, "plain")

    found = suite.measure(suite.host_item("x", "y", "plain", (), programs), seconds=0)
    assert found["redline"].error == "redline does not return what plain returns" and found["plain"].seconds


# peers --------------------------------------------------------------------


def test_absent_peers_are_listed_with_the_reason():
    item = next(item for item in suite.items() if item.op == "rms_norm" and item.form == "plain")
    assert {"liger", "quack", "torch.compile"} <= item.variants.keys()
    found = suite.measure(item, ["liger"], seconds=0)
    assert found["liger"].absent == "liger-kernel needs an NVIDIA GPU"
    nowhere = Peer("a_package_that_is_nowhere", "nowhere", (), lambda form, inputs: None)
    assert nowhere.absent("cuda") == "nowhere is not installed"


def test_peers_are_for_ops_and_forms_that_exist():
    for name, peers in PEERS.items():
        for peer in peers.values():
            assert set(peer.forms) <= BY_NAME[name].forms.keys()


@pytest.mark.parametrize("form", ["plain", "sum"])
@pytest.mark.parametrize(
    "op, shape", [(fp8_linear, (32, 48, 64)), (fp8_mlp, (256, 128, 512))], ids=["fp8_linear", "fp8_mlp"]
)
def test_nanochats_fp8_layers_compute_what_ours_do(op, shape, form):
    """Through PyTorch's own product in fp8, which runs on a CPU; as the bench checks it, but not compiled."""
    op = like(op, shape)
    item = ops.op_item(op, "quickstart", form, torch.bfloat16, False)
    with torch.compiler.set_stance("force_eager"), item.open() as programs:
        assert programs.check("nanochat") is None
        programs._functions["nanochat"] = lambda **args: 1.04 * op.backends["ref"](**args)
        assert "is off by" in programs.check("nanochat")


def test_nanochats_fp8_mlp_has_a_relu():
    """On numbers of mean 0, which half of its units do not pass: those of the bench nearly all do."""
    inputs = {"x": torch.randn(64, 32), "up": torch.randn(128, 32), "down": torch.randn(128, 32)}
    inputs = {name: t.bfloat16() for name, t in inputs.items()}
    with torch.compiler.set_stance("force_eager"):
        got = PEERS["fp8_mlp"]["nanochat"].make("plain", inputs)(**inputs, x_fp8=None, post=None)
    x, up, down = (t.double() for t in inputs.values())
    assert error(got, (x @ up.T).relu().square() @ down) < 0.15


# rows ---------------------------------------------------------------------


def item_of(**changes):
    named = {
        "op": "op",
        "case": "depth 24",
        "form": "plain",
        "direction": "forward",
        "dtype": "bfloat16",
        "shape": (4, 8),
    }
    rest = {"work": (2 * 10**9, 10**6), "baseline": "ref", "ours": "triton", "variants": {}, "open": None}
    return suite.Item(**{**named, **rest, **changes})


FACTS = {"commit": "abc123", "date": "2026-01-01", "device": "NVIDIA H100 80GB HBM3"}


def test_a_row_has_rates_and_its_fraction_of_the_roofline():
    result = suite.Result(seconds=Spread((1e-3,) * 9), over_baseline=Spread((2.0,) * 9))
    entry = suite.row(item_of(), "triton", result, roofline.Roofline(copy=1e9, gemm=4e12), FACTS)
    assert (entry["us"], entry["tflops"], entry["gb_per_s"]) == pytest.approx((1000, 2, 1))
    assert entry["roofline_fraction"] == pytest.approx(1)  # 1 MB at 1 GB/s takes longer than 2 GFLOP at 4 TFLOP/s
    assert entry["speedup"] == 2 and entry["commit"] == "abc123"
    json.dumps(entry)


def test_a_wrong_row_has_no_number_in_any_table():
    entry = suite.row(item_of(), "triton", suite.Result(error="y is off by 2"), None, FACTS)
    assert not {"us", "tflops", "speedup"} & entry.keys()
    assert "wrong, no number: y is off by 2" in history.console([entry])[1]
    assert "wrong" in history.cells(entry) and not any("us" in cell for cell in history.cells(entry))


@pytest.fixture
def stored(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "ROOT", tmp_path)

    def store(commit, us, error=None):
        result = suite.Result(error=error) if error else suite.Result(seconds=Spread((us * 1e-6,) * 9))
        return history.store([suite.row(item_of(), "triton", result, None, FACTS | {"commit": commit})])

    return store


def test_stored_results_are_history_with_a_table_and_a_plot(stored, tmp_path):
    path = stored("aaaaaaa", 100.0)
    stored("bbbbbbb", 90.0)
    assert path == tmp_path / "nvidia-h100-80gb-hbm3" / "ops.jsonl"
    assert [entry["us"] for entry in history.load(path)] == pytest.approx([100, 90])
    text = (path.parent / "README.md").read_text()
    assert "| 90 us |" in text and "| 100 us |" not in text and "op.png" in text
    assert (path.parent / "op.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(path.parent.glob(".*"))


@pytest.mark.parametrize("commit", [None, "abc123+changes"])
def test_changed_code_is_not_stored(stored, tmp_path, commit):
    with pytest.raises(ValueError, match="clean commit"):
        stored(commit, 1.0)
    assert not list(tmp_path.iterdir())


def test_results_of_a_gpu_run_are_added(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(history, "ROOT", tmp_path / "results")
    entry = suite.row(item_of(), "triton", suite.Result(seconds=Spread((1e-6,) * 9)), None, FACTS)
    (tmp_path / "ops.jsonl").write_text(json.dumps(entry) + "\n")
    trained = {"depth": 24, "kernels": "auto", "tok_per_s": 123456.0, "mfu": 0.5, **FACTS}
    (tmp_path / "train.jsonl").write_text(json.dumps(trained) + "\n")
    history.main(["--add", str(tmp_path)])
    assert "1.235e+05" in (tmp_path / "results" / "nvidia-h100-80gb-hbm3" / "README.md").read_text()
    with pytest.raises(ValueError, match="bench.gpu --out"):
        history.main(["--add", str(tmp_path / "results")])


def test_the_newest_run_of_each_precision_is_shown():
    runs = [
        {"depth": 24, "precision": p, "kernels": "auto", "compiled": True, "fp8_head": p == "fp8", "tok_per_s": n}
        for p, n in (("bfloat16", 1), ("fp8", 2), ("bfloat16", 3))
    ]
    assert sorted((run["precision"], run["tok_per_s"]) for run in history.newest(runs)) == [("bfloat16", 3), ("fp8", 2)]
    assert "fp8" in history.train_cells(runs[1] | FACTS)


# compare ------------------------------------------------------------------


def ratio(factor, noise, n=20, seed=0):
    rng = random.Random(seed)
    return Spread(tuple(factor * rng.gauss(1, noise) for _ in range(n)))


@pytest.mark.parametrize("seed", range(20))
def test_ten_percent_is_reported_and_two_percent_of_noise_is_not(seed):
    assert compare.verdict(ratio(1.10, 0.02, seed=seed), compare.THRESHOLD) == "slower"
    assert compare.verdict(ratio(1.00, 0.02, seed=seed), compare.THRESHOLD) == "same"
    assert compare.verdict(ratio(1 / 1.10, 0.02, seed=seed), compare.THRESHOLD) == "faster"


def test_two_percent_slower_is_below_the_threshold():
    assert compare.verdict(ratio(1.02, 0.005), compare.THRESHOLD) == "same"


def test_noise_that_could_hide_a_slowdown_is_called_unclear():
    assert compare.verdict(ratio(1.0, 0.3), compare.THRESHOLD) == "unclear"


def outcome(*factors):
    base = Spread((1.0,) * 12)
    new = [Spread((factor,) * 12) for factor in factors]
    return [compare.Outcome("x", "unclear", base=base, new=n) for n in new]


@pytest.mark.parametrize(
    "factors, verdict",
    [
        ((1.1, 1.08, 1.2), "slower"),
        ((1.1, 1.02, 1.06), "slower"),  # on one side in all, and beyond the threshold in the middle
        ((1.1, 1.01, 1.02), "unclear"),
        ((1.1, 1.3, 0.99), "unclear"),
        ((1.1, 1.1), "unclear"),  # not all pairs yet
        ((0.9, 0.8, 0.85), "faster"),
        ((0.9, 1.1, 0.85), "unclear"),
    ],
)
def test_pairs_of_processes_must_agree(factors, verdict):
    assert compare.agreed(outcome(*factors), 0.05, 3).verdict == verdict


def test_the_ratio_that_is_judged_is_the_one_reported():
    """Within turns new is 1.2 times slower; the medians of both sides would say that it is faster."""
    base, new = Spread((1.0, 2.0, 9.0)), Spread((1.2, 1.8, 10.8))
    assert new.median / base.median == pytest.approx(0.9)
    found = compare.agreed([compare.Outcome("x", "unclear", base=base, new=new)] * 3, 0.05, 3)
    assert found.verdict == "slower" and found.ratio.median == pytest.approx(1.2)
    assert " 1.200x " in compare.line(found)


class FakeSide:
    """A process of a checkout that takes no time: named after its folder, it samples what `seconds` says."""

    def __init__(self, folder, *, known=("op",), opened=None, seconds=None):
        self.known, self.opened = known, opened or {"variant": "triton"}
        self.seconds = seconds or (lambda: 1.0)

    def ask(self, command, argument=None):
        if command == "sample":
            return self.seconds(), None
        replies = {"items": list(self.known), "open": self.opened, "close": None}
        return (
            (None, self.opened["raised"]) if command == "open" and "raised" in self.opened else (replies[command], None)
        )

    def close(self):
        pass


def run_fakes(monkeypatch, base=None, new=None, pairs=3):
    sides = {"base": base or {}, "next": new or {}}
    monkeypatch.setattr(compare, "Side", lambda folder: FakeSide(folder, **sides[folder.name]))
    return compare.run((Path("base"), Path("next")), "", compare.THRESHOLD, pairs, lambda text: None)


@pytest.mark.parametrize(
    "base, new, verdict, failed",
    [
        ({}, {}, "same", False),
        ({}, {"seconds": lambda: 1.1}, "slower", True),
        ({}, {"seconds": lambda: 0.9}, "faster", False),
        ({}, {"opened": {"error": "y is off by 2"}}, "wrong", True),
        ({}, {"opened": {"raised": "RuntimeError: no"}}, "broken", True),
        ({}, {"known": ()}, "gone", True),
        ({"known": ()}, {}, "new", False),
        ({"opened": {"error": "y is off by 2"}}, {}, "unmeasured", False),
    ],
)
def test_each_verdict_of_two_sides(monkeypatch, base, new, verdict, failed):
    (found,) = run_fakes(monkeypatch, base, new)
    assert (found.verdict, found.failed) == (verdict, failed)


@pytest.mark.parametrize("factor, verdict", [(1.1, "slower"), (1.02, "same"), (0.9, "faster")])
def test_noisy_processes_are_judged_alike_every_time(monkeypatch, factor, verdict):
    """3 % of noise in each sample, on a machine whose speed drifts by a half."""
    for seed in range(10):
        rng, clock = random.Random(seed), itertools.count()

        def sample(factor, rng=rng, clock=clock):
            return factor * (1 + 0.5 * math.sin(next(clock) / 100)) * rng.gauss(1, 0.03)

        sides = [{"seconds": functools.partial(sample, f)} for f in (1.0, factor)]
        (found,) = run_fakes(monkeypatch, *sides)
        assert found.verdict == verdict and compare.verdict_of(found.ratio.median, compare.THRESHOLD) == verdict


CONSTANT = """
from contextlib import contextmanager
from core.constant import SECONDS
from bench.suite import host_item

class Programs:
    def check(self, variant):
        return None

    def sampler(self, variant):
        return lambda: SECONDS

@contextmanager
def programs():
    yield Programs()

ITEMS = [host_item("constant", "x", "plain", (), programs)]
"""


@pytest.fixture(scope="module")
def constant(tmp_path_factory):
    """A clone with this bench, whose commits differ in the time that their one item says it takes."""
    repo = tmp_path_factory.mktemp("repo") / "redline"
    author = ["-c", "user.name=x", "-c", "user.email=x@example.org"]

    def git(*args):
        done = subprocess.run(["git", "-C", str(repo), *author, *args], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    subprocess.run(["git", "clone", "-q", str(ROOT), str(repo)], check=True)
    shutil.rmtree(repo / "bench")
    shutil.copytree(ROOT / "bench", repo / "bench", ignore=shutil.ignore_patterns("__pycache__", "results"))
    for path in (repo / "bench").glob("bench_*.py"):
        path.unlink()
    (repo / "bench" / "bench_constant.py").write_text(CONSTANT)
    commits = {}
    for name, seconds in (("base", 0.02), ("ten", 0.022)):
        (repo / "core" / "constant.py").write_text(f"SECONDS = {seconds}\n")
        git("add", "-A")
        git("commit", "-qm", name)
        commits[name] = git("rev-parse", "HEAD")

    def run(monkeypatch, *args):
        monkeypatch.setattr(compare, "ROOT", repo)
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        status = compare.main([commits.get(a, a) for a in args])
        assert len(git("worktree", "list").splitlines()) == 1, "a worktree was left behind"
        return status

    return run


def test_a_commit_that_is_ten_percent_slower_is_red(constant, monkeypatch, tmp_path, capsys):
    """Two real checkouts, measured by two real processes; what these say is given."""
    assert constant(monkeypatch, "base", "ten", "--pairs", "2", "--json", str(tmp_path / "out.json")) == 1
    assert "1 slower" in capsys.readouterr().out
    (outcome,) = json.loads((tmp_path / "out.json").read_text())["outcomes"]
    assert outcome["verdict"] == "slower" and outcome["ratio"] == pytest.approx(1.1)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("no-such-commit",), "no-such-commit"),
        (("base", "ten", "--only", "nothing"), "matches no item"),
        (("base", "--threshold", "0"), "expected a share"),
        (("base", "--threshold", "nan"), "expected a share"),
        (("base", "--only", "("), "no regular expression"),
        (("base", "--json", "/nowhere/at/all.json"), "there is no folder"),
    ],
)
def test_compare_says_what_it_cannot_do(constant, monkeypatch, arguments, sentence):
    monkeypatch.setattr(compare, "Side", FakeSide)
    with pytest.raises(ValueError, match=sentence):
        constant(monkeypatch, *arguments)


# commands -----------------------------------------------------------------


def run_bench(*args, **options):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True, **options)


def test_pytest_bench_reports_samples_to_pytest_benchmark(tmp_path):
    report = tmp_path / "report.json"
    arguments = ("bench/bench_ops.py", "-k", "adam_update and plain and ref", "--benchmark-max-time=0.05")
    done = run_bench("-m", "pytest", *arguments, f"--benchmark-json={report}", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout
    (entry,) = json.loads(report.read_text())["benchmarks"]
    info = entry["extra_info"]
    assert entry["stats"]["median"] * 1e6 == pytest.approx(info["us"], rel=1e-3)
    assert entry["stats"]["rounds"] == info["samples"] >= MIN_ROUNDS
    assert {"commit", "device", "tflops", "gb_per_s", "flops", "bytes", "shape"} <= info.keys()


WIDE = ("--d-model", "128", "--d-head", "32")  # so that matrices convert


@pytest.mark.parametrize("precision, options", [("float32", ()), ("fp8", ("--precision", "fp8", *WIDE))])
def test_a_training_step_is_measured_as_train_py_makes_it(tiny, cache_dir, precision, options):
    done = run_bench("-m", "bench.train_step", "quickstart", *tiny, *options)
    assert done.returncode == 0, done.stderr
    entry = json.loads(done.stdout)
    assert (
        entry["precision"] == precision
        and entry["depth"] == 2
        and entry["tok_per_s"] == pytest.approx(512e3 / entry["step_ms"])
    )
    assert len(entry["losses"]) == 4 + 6 * 2 + 2 and entry["losses"][-1] < entry["losses"][0]
    assert entry["peak_memory_gb"] > 0 and sum(entry["time_by_op"].values()) <= 1.001
    assert {choice["backend"] for choice in entry["backends"]} == {"ref"}
