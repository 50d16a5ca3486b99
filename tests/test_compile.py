"""Training with torch.compile: the same run, from weights that its warm-up has not touched."""

import functools
import json

import pytest
import torch

import train
from core.checkpoint import training_tensors
from core.config import ModelConfig, OptimConfig
from core.models.gpt2 import GPT
from core.optim import Gradients, Optimizer, learning_rates
from core.stopping import TrainingError, UserError
from tests.test_train import events, losses, run


@pytest.fixture
def backend(monkeypatch):
    """Sets the backend of torch.compile: code generation takes minutes, tracing seconds."""
    honest = torch.compile
    torch._dynamo.reset()

    def choose(name):
        monkeypatch.setattr(torch, "compile", functools.partial(honest, backend=name))

    yield choose
    torch._dynamo.reset()


def test_compiled_training_is_the_same_run(tiny, tmp_path, monkeypatch, capsys, backend):
    before, loop = [], train.loop

    def spied(run, text, trainer, *options):
        assert not any(total.any() for total in trainer.gradients.sums)
        tensors = training_tensors(trainer.model, trainer.optimizer.state)
        before.append({"rng": torch.get_rng_state(), **{name: t.clone() for name, t in tensors.items()}})
        loop(run, text, trainer, *options)

    monkeypatch.setattr(train, "loop", spied)
    eager = run(tiny, tmp_path / "eager")
    capsys.readouterr()
    backend("aot_eager")
    out = run(tiny, tmp_path / "run", "--compile")
    text = capsys.readouterr().out
    assert text.index("compiling the model, once") < text.index("compiled in") < text.index("step 0/12")
    assert all(torch.equal(t, before[1][name]) for name, t in before[0].items())
    a, b = losses(eager), losses(out)
    assert b[0] == pytest.approx(a[0], abs=1e-6) and b == pytest.approx(a, abs=1e-4)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["compiled"] and summary["compile_s"] == events(out, "compile")[0]["seconds"] > 0
    assert summary["total_training_time_s"] < summary["compile_s"]
    assert not events(eager, "compile") and not json.loads((eager / "summary.json").read_text())["compiled"]
    train.main(["--resume", str(out / "checkpoints" / "step_000008"), "--no-compile"])
    assert losses(out) == pytest.approx(a, abs=1e-4) and len(events(out, "compile")) == 1


def test_the_model_compiles_once(tiny, tmp_path, backend):
    """In warm-up, for good: not again in the first step, after an evaluation, a sample or a save, or in the last
    step."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    backend(counting)
    out = run(tiny, tmp_path / "run", "--compile")
    assert len(graphs) == 1 and len(losses(out)) == 12
    torch._dynamo.reset()
    train.main(["--resume", str(out / "checkpoints" / "step_000008")])
    assert len(graphs) == 2 and len(losses(out)) == 12


def test_a_compiler_that_fails_is_one_sentence(tiny, tmp_path, backend):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler\nmore lines")

    backend(broken)
    with pytest.raises(
        TrainingError,
        match=r"torch.compile fails here \(no C\+\+ compiler\): --no-compile trains without it; .*start again$",
    ):
        run(tiny, tmp_path / "run", "--compile")


def test_a_cuda_graph_is_for_gpus(tiny, tmp_path):
    says = "--graph-optimizer records a CUDA graph: give --device cuda, or --no-graph-optimizer"
    with pytest.raises(UserError, match=says):
        run(tiny, tmp_path / "run", "--graph-optimizer")


def test_compiled_code_adds_gradients_where_they_belong(backend):
    """Inductor's, to sums that lie side by side with those of other banks; over two micro-steps, matrix by matrix."""
    cfg = ModelConfig(
        depth=2, d_model=32, d_head=16, seq_len=16, vocab_size=100, value_embeds=False, smear=False, backout=False
    )
    tokens = torch.randint(100, (2, 2, 17), generator=torch.Generator().manual_seed(0))
    sums = []
    for compiled in (False, True):
        model = GPT(cfg)
        model.init_weights(0)
        for bank in (*model.attn_out, *model.mlp_down):  # at first, what adds to the stream is zero
            bank.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        lrs = learning_rates(OptimConfig(), 32, 1)
        optimizer = Optimizer(model, lrs=lrs, weight_decay=0.0, ns_steps=1, compute_dtype=torch.float32)
        gradients = Gradients(model, optimizer)
        call = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
        for batch in tokens:
            call(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()).backward()
        sums.append({name: gradients(p) for name, p in optimizer.params.items()})
    for name, want in sums[0].items():
        for i, matrix in enumerate(want if want.dim() == 3 else want[None]):
            got = sums[1][name][i] if want.dim() == 3 else sums[1][name]
            assert (got - matrix).norm() <= 1e-5 * matrix.norm() + 1e-9, (name, i)
