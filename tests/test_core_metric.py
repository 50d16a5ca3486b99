"""CORE against a plain scorer, written out here: one forward pass per prompt, no batches, no shared beginnings."""

import dataclasses
import json
import os
import random
import signal

import pytest
import torch
import torch.nn.functional as F

import train
from core.communication import World
from core.config import ModelConfig
from core.data.tokenizer import Tokenizer
from core.evals import core_metric
from core.evals.core_metric import (
    GPTScorer,
    Question,
    Row,
    answers,
    centered,
    common_prefix,
    core_score,
    packed,
    prompts,
    question,
    read_examples,
    read_tasks,
    separate,
)
from core.layers import Branches
from core.models.gpt2 import GPT
from core.stopping import Stopped, UserError
from eval import main as eval_main
from tests.test_train import events, losses

ALONE = World(0, 1, torch.device("cpu"))
WORDS = "the a of to in and cat dog sat ran mat hat on under by red blue small large tree house".split()


@pytest.fixture(scope="module")
def tokenizer():
    pieces = [bytes([i]) for i in range(256)] + [f" {word}".encode() for word in WORDS] + [b"\n\n", b"  "]
    return Tokenizer(pieces)


def make_model(tokenizer, **options):
    sizes = {"depth": 3, "d_model": 32, "d_head": 16, "seq_len": 128, "vocab_size": tokenizer.vocab_size}
    model = GPT(ModelConfig(**(sizes | options)))
    model.init_weights(1)
    with torch.no_grad():  # outputs are zero at first, and gates nearly closed
        generator = torch.Generator().manual_seed(2)
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


def sentence(rng, low, high):
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def write_bundle(folder, num_examples=14, seed=0):
    """Four tasks: every kind, an odd delimiter, ties, spaces at the ends, and prompts longer than the context."""
    rng = random.Random(seed)

    def choices(n):
        return [sentence(rng, 1, 6) for _ in range(n)]

    def some(make):
        return [make() for _ in range(num_examples)]

    def schema():
        start = sentence(rng, 2, 9)
        contexts = [f"{start} {end}" for end in choices(2)]
        return {"context_options": contexts, "continuation": sentence(rng, 2, 5), "gold": rng.randrange(2)}

    tasks = {
        "choice": some(lambda: {"query": sentence(rng, 3, 20), "choices": choices(4), "gold": rng.randrange(4)}),
        "long": some(lambda: {"query": sentence(rng, 60, 90), "choices": choices(2), "gold": rng.randrange(2)}),
        "schema": some(schema),
        "words": some(lambda: {"context": f"  {sentence(rng, 4, 12)} ", "continuation": sentence(rng, 1, 2)}),
    }
    tasks["choice"][3]["choices"] = ["same thing"] * 4  # a tie that has no token of its own
    tasks["choice"][5]["choices"] = ["ab", "abc", "xb", "yy"]  # one is the beginning of another
    kinds = {"choice": "multiple_choice", "long": "multiple_choice", "schema": "schema", "words": "language_modeling"}
    rows = []
    for label, examples in tasks.items():
        (folder / "eval_data" / "some").mkdir(parents=True, exist_ok=True)
        (folder / "eval_data" / "some" / f"{label}.jsonl").write_text("".join(json.dumps(e) + "\n" for e in examples))
        row = {"label": label, "icl_task_type": kinds[label], "dataset_uri": f"some/{label}.jsonl", "num_fewshot": [2]}
        rows.append(row | ({"continuation_delimiter": "\nAnswer: "} if label == "long" else {}))
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": rows}))  # JSON is YAML
    table = "Eval Task,Task Type,Random baseline\nchoice,x,25\nlong,x,50\nschema,x,50.0\nwords,x,0\n"
    (folder / "eval_meta_data.csv").write_text(table)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("bundle"))


# prompts


def test_prompts_are_those_of_nanochat():
    task = core_metric.Task("t", "multiple_choice", None, 1, "\nAnswer: ", 0.25)
    shot, item = {"query": "Q1", "choices": ["a", "b"], "gold": 1}, {"query": "Q2 ", "choices": ["c", 4], "gold": 0}
    assert prompts(task, item, [shot]) == ["Q1\nAnswer: b\n\nQ2 \nAnswer: c", "Q1\nAnswer: b\n\nQ2 \nAnswer: 4"]
    task = core_metric.Task("t", "schema", None, 1, " ", 0.5)
    shot = {"context_options": ["A", "B"], "continuation": "ran.", "gold": 0}
    item = {"context_options": ["C ", "D"], "continuation": "sat.", "gold": 1}
    assert prompts(task, item, [shot]) == ["A ran.\n\nC  sat.", "A ran.\n\nD sat."]
    task = core_metric.Task("t", "language_modeling", None, 1, " ", 0)
    shot, item = {"context": " x ", "continuation": "y "}, {"context": "\tz ", "continuation": "w"}
    assert prompts(task, item, [shot]) == ["x y \n\nz", "x y \n\nz w"]


def test_shots_are_drawn_by_the_index():
    task = core_metric.Task("t", "language_modeling", None, 2, " ", 0)
    examples = [{"context": str(i), "continuation": "c"} for i in range(9)]
    seen = []
    question(task, examples, 3, lambda text: seen.append(text) or [0, *text.encode()])
    a, b = random.Random(1234 + 3).sample([i for i in range(9) if i != 3], 2)
    assert seen == [f"{a} c\n\n{b} c\n\n3", f"{a} c\n\n{b} c\n\n3 c"]


def test_examples_come_in_the_seeded_order_and_shots_from_those_kept(bundle):
    task = read_tasks(bundle)[0]
    everything = [json.loads(line) for line in task.file.read_text().splitlines()]
    random.Random(1337).shuffle(everything)
    assert read_examples(task, None) == everything and read_examples(task, 5) == everything[:5]
    with pytest.raises(UserError, match="2 examples are too few for 2 shots"):
        read_examples(task, 2)


def test_centering():
    assert centered(0.25, 0.25) == 0 and centered(1, 0.62) == 1 and centered(0.1, 0.5) == pytest.approx(-0.8)


# rows


def test_common_prefix():
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2
    assert common_prefix([[1, 2]]) == 2 and common_prefix([[], [1]]) == 0


def test_a_question_in_one_row():
    row = packed(Question(0, [[9, 1, 2, 3], [9, 1, 4], [9, 1]], [2, 2, 2], 0))
    assert row == Row([9, 1, 2, 3, 4], 2, [2, 1, 0], [[1, 2], [1], []], [[2, 3], [4], []])
    # schema: what counts is at the end
    row = packed(Question(0, [[9, 1, 5, 6], [9, 2, 3, 5, 6]], [2, 3], 0))
    assert row == Row([9, 1, 5, 6, 2, 3, 5, 6], 1, [3, 4], [[1, 2], [5, 6]], [[5, 6], [5, 6]])


def test_a_bounded_context_keeps_the_end():
    rows = separate(Question(0, [[9, 1, 2, 3, 4], [9, 7]], [3, 1], 0), max_tokens=3)
    assert rows == [Row([2, 3, 4], 3, [], [[0, 1]], [[3, 4]]), Row([9, 7], 2, [], [[0]], [[7]])]
    # of a continuation longer than the context the first token is not predicted
    (row,) = separate(Question(0, [[9, 1, 2, 3, 4]], [1], None), max_tokens=2)
    assert row == Row([3, 4], 2, [], [[0]], [[4]])


@pytest.mark.parametrize("options", [{}, {"n_kv_head": 1, "window_pattern": "SL"}, {"rope": False}, {"smear": False}])
def test_a_branch_computes_what_its_text_alone_does(tokenizer, options):
    model = make_model(tokenizer, **options)
    texts = [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 8], [1, 2, 3, 9, 9]]
    rows = [(3, [4, 1, 2]), (1, [3])]
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9, 9], [5, 1, 2, 3, 0, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        together = model.hidden(ids, branches=Branches.of(rows, 10, ids.device))
        for text, places in zip(texts, ([0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 7], [0, 1, 2, 8, 9])):
            alone = model.hidden(torch.tensor([text]))
            torch.testing.assert_close(together[0, places], alone[0], rtol=1e-4, atol=1e-5)
        alone = model.hidden(torch.tensor([[5, 1, 2, 3]]))
        torch.testing.assert_close(together[1, :4], alone[0], rtol=1e-4, atol=1e-5)
    assert together.isfinite().all()


def test_windows_are_counted_in_the_text_not_in_the_row(tokenizer):
    model = make_model(tokenizer, window_pattern="S", seq_len=512, depth=2)  # short windows of 128
    text = torch.arange(150) % 250
    ids = torch.cat((text[:140], torch.full((100,), 3), text[140:]))[None]
    with torch.no_grad():
        together = model.hidden(ids, branches=Branches.of([(140, [100, 10])], 250, ids.device))
        alone = model.hidden(text[None])
    assert model.dims.windows[0] == 128
    torch.testing.assert_close(together[0, -10:], alone[0, -10:], rtol=1e-4, atol=1e-5)


# scores


def plain(model, tokenizer, task, examples, index):
    """Right or not, and how far the best two choices are apart; as the metric is described, prompt by prompt."""
    others = [i for i in range(len(examples)) if i != index]
    shots = [examples[i] for i in random.Random(1234 + index).sample(others, task.num_shots)]
    sequences = [[tokenizer.bos_id, *tokenizer.encode(p)] for p in prompts(task, examples[index], shots)]

    def logits(ids):
        return model(torch.tensor([ids]))[0]

    if task.kind == "language_modeling":
        without, whole = sequences
        n = common_prefix(sequences)
        assert n >= len(without) - 1
        return logits(whole).argmax(-1)[n - 1 : -1].tolist() == whole[n:], 1.0
    if task.kind == "schema":
        n = common_prefix([s[::-1] for s in sequences])
        starts = [len(s) - n for s in sequences]
    else:
        starts = [common_prefix(sequences)] * len(sequences)
    means = []
    for ids, start in zip(sequences, starts):
        losses = F.cross_entropy(logits(ids)[:-1], torch.tensor(ids[1:]), reduction="none")[start - 1 :]
        means.append(losses.mean().item())
    known = sorted(mean for mean in means if mean == mean)
    apart = 1.0 if means[0] != means[0] or len(known) < 2 else known[1] - known[0]
    return means.index(min(means)) == examples[index]["gold"], apart  # so written by nanochat: NaN, too


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("max_tokens", [100_000, 600])
def test_decisions_are_those_of_the_plain_scorer(model, tokenizer, bundle, share, max_tokens):
    scorer = GPTScorer(model, tokenizer, max_tokens=max_tokens, share=share)
    compared = 0
    for task in read_tasks(bundle):
        examples = read_examples(task, None)
        with torch.no_grad():
            got = answers(scorer, task, examples, ALONE).tolist()
            for i in range(len(examples)):
                want, apart = plain(model, tokenizer, task, examples, i)
                if apart > 1e-5:
                    assert got[i] == want, (task.label, i)
                    compared += 1
        assert task.label != "long" or min(len(tokenizer.encode(e["query"])) for e in examples) > 50
    assert compared >= 53  # of 56: ties are left


def test_a_tie_goes_to_the_first(model, tokenizer, bundle):
    task = read_tasks(bundle)[0]
    examples = [{"query": "a cat", "choices": ["x y", "x y", "x y"], "gold": gold} for gold in (0, 1, 2)]
    with torch.no_grad():
        got = answers(GPTScorer(model, tokenizer, max_tokens=1000), task, examples, ALONE)
    assert got.tolist() == [True, False, False]


def test_a_known_model_gets_a_known_score(tokenizer, bundle):
    """One that always continues with the gold answers scores 1, and one that never does its baseline's share."""

    class Known:
        max_tokens = 10_000

        def __init__(self, right):
            self.right = right

        def encode(self, text):
            return [tokenizer.bos_id, *tokenizer.encode(text)]

        def rows(self, q):
            self.golds.append(q.gold)
            return separate(q)

        golds: list

        def __call__(self, rows):
            n = [len(part) for row in rows for part in row.targets]
            hits = torch.full((sum(n),), self.right)
            return torch.arange(sum(n), dtype=torch.float32), hits

    words = [t for t in read_tasks(bundle) if t.label == "words"]
    for right, accuracy in ((True, 1.0), (False, 0.0)):
        scorer = Known(right)
        scorer.golds = []
        score = core_score(scorer, words, ALONE)
        assert score.core == accuracy and score.tasks[0].num_examples == 14


def test_core_is_the_mean_of_centered_accuracies(model, tokenizer, bundle):
    seen = []
    tasks = read_tasks(bundle)
    scorer = GPTScorer(model, tokenizer, max_tokens=4096)
    score = core_score(scorer, tasks, ALONE, max_per_task=7, on_task=seen.append)
    assert seen == score.tasks and [t.num_examples for t in seen] == [7] * 4
    for t, baseline in zip(score.tasks, (0.25, 0.5, 0.5, 0.0)):
        assert t.centered == pytest.approx((t.accuracy - baseline) / (1 - baseline))
        assert t.accuracy * 7 == pytest.approx(round(t.accuracy * 7))
    assert score.core == pytest.approx(sum(t.centered for t in score.tasks) / 4)
    lines = score.csv().splitlines()
    assert lines[0] == "Task,Accuracy,Centered" and lines[-1] == f"CORE,,{score.core:.6f}" and len(lines) == 6


def test_ranks_share_the_examples(model, tokenizer, bundle):
    task = read_tasks(bundle)[0]
    examples = read_examples(task, None)
    scorer = GPTScorer(model, tokenizer, max_tokens=2000)
    with torch.no_grad():
        whole = answers(scorer, task, examples, ALONE)
        parts = [answers(scorer, task, examples, World(rank, 3, torch.device("cpu"))) for rank in range(3)]
    assert torch.equal(sum(parts), whole) and whole.any() and not whole.all()
    for rank, part in enumerate(parts):
        others = [i for i in range(len(examples)) if i % 3 != rank]
        assert not part[others].any()


# the bundle


@pytest.mark.parametrize(
    "file, damage, said",
    [
        ("core.yaml", None, "cannot be read"),
        ("core.yaml", "icl_tasks: [{label: x}]", "damaged"),
        ("core.yaml", "icl_tasks: {", "damaged"),
        ("eval_meta_data.csv", "Eval Task,Random baseline\nchoice,25\n", "damaged"),
        ("eval_data/some/words.jsonl", None, "words.jsonl: missing"),
    ],
)
def test_a_damaged_bundle_is_a_sentence(tmp_path, file, damage, said):
    write_bundle(tmp_path)
    (tmp_path / file).unlink()
    if damage is not None:
        (tmp_path / file).write_text(damage)
    with pytest.raises(UserError, match=said):
        read_tasks(tmp_path)


@pytest.mark.parametrize(
    "label, line, said",
    [
        ("choice", '{"query": "x", "choices": []}', "line 15: KeyError 'gold'"),
        ("choice", '{"query": "x", "choices": ["a"], "gold": 1}', "line 15: ValueError gold is 1"),
        ("choice", '{"query": "x", "choices": ["a"], "gold": "A"}', "line 15: ValueError gold is 'A'"),
        ("choice", '{"query": 7, "choices": ["a"], "gold": 0}', "line 15: TypeError 7 is no text"),
        ("schema", '{"context_options": ["a", 3], "continuation": "b", "gold": 0}', "line 15: TypeError 3 is no text"),
        ("words", '{"context": null, "continuation": "b"}', "line 15: TypeError None is no text"),
        ("words", "[]", "line 15: TypeError"),
        ("words", '{"context": ', "line 15: JSONDecodeError"),
    ],
)
def test_a_damaged_line_is_named_before_anything_is_scored(tmp_path, model, tokenizer, label, line, said):
    tasks = read_tasks(write_bundle(tmp_path))
    (task,) = [task for task in tasks if task.label == label]
    task.file.write_text(task.file.read_text() + line + "\n")
    seen = []
    with pytest.raises(UserError, match=f"{label}.jsonl, {said}"):
        core_score(GPTScorer(model, tokenizer, max_tokens=100), tasks, ALONE, on_task=seen.append)
    assert not seen


def test_lines_end_at_newlines_alone(tmp_path):
    task = next(t for t in read_tasks(write_bundle(tmp_path)) if t.label == "words")
    example = {"context": "a\u2028b\x85c", "continuation": "d"}
    task.file.write_text(json.dumps(example, ensure_ascii=False) + "\n\n" + task.file.read_text())
    assert example in read_examples(task, None) and len(read_examples(task, None)) == 15
    task.file.write_bytes(b"\xff")
    with pytest.raises(UserError, match="words.jsonl: not UTF-8"):
        read_examples(task, None)


def test_the_board_knows_its_tasks(model, tokenizer, tmp_path):
    """Whole: all of its 22 tasks, with every example."""
    assert len(core_metric.TASKS) == 22
    (words,) = [task for task in read_tasks(write_bundle(tmp_path, num_examples=6)) if task.label == "words"]
    tasks = [dataclasses.replace(words, label=label) for label in sorted(core_metric.TASKS)]
    scorer = GPTScorer(model, tokenizer, max_tokens=4000)
    assert core_score(scorer, tasks, ALONE).whole and core_score(scorer, tasks, ALONE, max_per_task=6).whole
    assert not core_score(scorer, tasks, ALONE, max_per_task=5).whole
    tasks[0] = words
    assert not core_score(scorer, tasks, ALONE).whole


def test_scoring_stops_when_it_is_told_to(model, tokenizer, bundle):
    asked, seen = [], []

    def stopped():
        asked.append(None)
        return len(asked) > 6

    scorer = GPTScorer(model, tokenizer, max_tokens=600)
    with pytest.raises(core_metric.ScoringStopped):
        core_score(scorer, read_tasks(bundle), ALONE, on_task=seen.append, stopped=stopped)
    assert len(seen) < 4 and len(asked) < 12


# train.py and eval.py


@pytest.fixture(scope="module")
def run_folder(tiny_options, bundle, tmp_path_factory):
    """12 steps, CORE after 4 and 8 of them and at the end."""
    out = tmp_path_factory.mktemp("runs") / "run"
    asks = ["--core", "--core-every", "4", "--core-max-per-task", "5", "--core-bundle", str(bundle)]
    train.main([*tiny_options, *asks, "--out", str(out)])
    return out


def test_a_run_scores_core(run_folder):
    found = events(run_folder, "core")
    assert [e["step"] for e in found] == [4, 8, 12] and {
        t["num_examples"] for t in found[0]["core_tasks"].values()
    } == {5}
    summary = json.loads((run_folder / "summary.json").read_text())
    assert summary["core"] == found[-1]["core"] and summary["core_tasks"].keys() == found[-1]["core_tasks"].keys()
    report = (run_folder / "report.md").read_text()
    assert f"## CORE: {summary['core']:.4f}" in report and "not comparable with the board: 20 examples" in report
    for label, t in summary["core_tasks"].items():
        assert f"| {label} | {t['accuracy']:.4f} | {t['centered']:.4f} | 5 |" in report
    assert (run_folder / "core.csv").read_text().splitlines()[-1] == f"CORE,,{summary['core']:.6f}"


def test_scoring_leaves_training_as_it_is(run_folder, tiny_options, tmp_path):
    train.main([*tiny_options, "--core-every", "4", "--out", str(tmp_path / "plain")])  # without --core
    assert losses(tmp_path / "plain") == losses(run_folder) and not events(tmp_path / "plain", "core")


def test_a_signal_during_core_saves_and_is_scored_again(run_folder, tiny_options, bundle, tmp_path, monkeypatch):
    out, told = tmp_path / "run", []
    asks = ["--core", "--core-every", "4", "--core-max-per-task", "5", "--core-bundle", str(bundle)]

    def score(*args, stopped, **options):
        if not told:
            told.append(os.kill(os.getpid(), signal.SIGTERM))
        return core_score(*args, stopped=stopped, **options)

    monkeypatch.setattr(train, "core_score", score)
    with pytest.raises(Stopped, match="stopped by SIGTERM after 4 of 12 steps"):
        train.main([*tiny_options, *asks, "--out", str(out)])
    train.main(["--resume", str(out)])
    assert [e["core"] for e in events(out, "core")] == [e["core"] for e in events(run_folder, "core")]
    assert losses(out) == losses(run_folder)


def test_tasks_that_are_not_there_are_a_sentence_before_training(tiny_options, tmp_path):
    with pytest.raises(UserError, match="does not exist.*--no-core"):
        train.main([*tiny_options, "--core", "--core-bundle", "none", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_eval_scores_a_run(run_folder, bundle, tmp_path, capsys):
    table = tmp_path / "core.csv"
    argv = [str(run_folder), "--metrics", "core", "--core-bundle", str(bundle), "--core-csv", str(table)]
    capsys.readouterr()
    eval_main([*argv, "--core-max-per-task", "5"])
    shown = capsys.readouterr().out
    eval_main([*argv, "--core-max-per-task", "5", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert set(result["core_tasks"]) == {"choice", "long", "schema", "words"} and not result["core_whole"]
    assert f"CORE {result['core']:.4f} (not comparable with the board: 20 examples of 4 tasks" in shown
    assert shown.count("5 examples") == 4 and table.read_text().splitlines()[-1] == f"CORE,,{result['core']:.6f}"


@pytest.mark.parametrize(
    "argv, said",
    [
        ([], "give a run folder"),
        (["run", "--hf", "gpt2"], "give a run folder"),
        (["--hf", "gpt2", "--metrics", "bpb"], "only core is known"),
        (["--hf", "./no-such-folder", "--core-bundle", "x"], "cannot load it"),
    ],
)
def test_eval_refuses(argv, said):
    with pytest.raises(UserError, match=said):
        eval_main(argv)


def test_a_model_of_transformers_is_scored_by_the_same_rules(bundle, tmp_path, capsys):
    """A tiny GPT-2 with a byte vocabulary, against a loop over its prompts; its context is 96 tokens."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"<|endoftext|>": 256}
    fast = Fast(models.BPE(vocab=letters, merges=[]))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<|endoftext|>").save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=257, n_positions=96, bos_token_id=256)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    capsys.readouterr()
    eval_main(["--hf", str(tmp_path), "--core-bundle", str(bundle), "--json", "--device", "cpu"])
    result = json.loads(capsys.readouterr().out)
    task = next(t for t in read_tasks(bundle) if t.label == "choice")
    examples = read_examples(task, None)
    right = undecided = 0
    for i, example in enumerate(examples):
        q = question(task, examples, i, lambda text: [256, *fast.encode(text).ids])
        means = []
        for ids, start in zip(q.sequences, q.starts):
            ids, cut = ids[-96:], max(0, len(ids) - 96)
            with torch.no_grad():
                losses = F.cross_entropy(
                    model(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="none"
                )
            means.append(losses[max(start - cut - 1, 0) :].mean().item())
        known = sorted(mean for mean in means if mean == mean)
        undecided += len(known) > 1 and known[1] - known[0] < 1e-5
        right += means.index(min(means)) == example["gold"]
    assert result["model"] == str(tmp_path)
    assert abs(result["core_tasks"]["choice"]["accuracy"] * len(examples) - right) <= undecided <= 2
    import kernels.rms_norm  # ours, beside transformers, which knows another package of that name

    assert hasattr(kernels.rms_norm, "rms_norm")
