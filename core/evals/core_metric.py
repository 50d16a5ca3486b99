"""CORE: 22 tasks in the few-shot setting of DCLM (arXiv 2406.11794), as one number that GPT-2 can be compared by.

    centered = (accuracy - baseline) / (1 - baseline),  CORE = mean of centered over the tasks
[nanochat 92d63d4, core_eval.py and base_eval.py: prompts, seeds, scores and their order are the same, ties and choices
without a token of their own included]

Kinds     multiple_choice: one context, several continuations; the one with the lowest mean loss is the answer.
          schema: several contexts, one continuation; the context under which its mean loss is lowest is the answer.
          language_modeling: right if every token of the continuation is the likeliest one.
Shots     examples before the question, drawn by random.Random(1234 + index) from the task's other examples. Examples
          come in the order of random.Random(1337); max_per_task keeps the first so many, shots come from these too.
Spans     what counts is what the tokens of the choices do not share: all after their common beginning
          (multiple_choice), their common end (schema), all after the tokens of the prompt without its continuation
          (language_modeling). Ties go to the first choice. The mean over an empty span is NaN, which Python's min
          keeps where it comes first and never takes later: a first choice that is the beginning of the others wins.
Layout    the choices of an example begin alike, by its shots: that trunk is run once, and each choice is a branch that
          sees the trunk and itself (`Branches` in core/layers.py). Rows of similar length run together.
Length    a model whose context is bounded sees the last tokens of a prompt. Redline's models have rotary positions and
          windows, and are not bounded.
"""

import csv
import io
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.communication import World, all_sum, gather_objects, together
from core.data.download import Say, fetch_zip
from core.data.tokenizer import Tokenizer
from core.layers import Branches
from core.models.gpt2 import GPT
from core.stopping import ScoringStopped, UserError, never

GPT2_CORE = 0.256525  # GPT-2 (1.5B) by this scorer: the threshold of the race [nanochat 92d63d4, README]
TASKS = frozenset(
    "hellaswag_zeroshot jeopardy bigbench_qa_wikidata arc_easy arc_challenge copa commonsense_qa piqa openbook_qa "
    "lambada_openai hellaswag winograd winogrande bigbench_dyck_languages agi_eval_lsat_ar bigbench_cs_algorithms "
    "bigbench_operators bigbench_repeat_copy_logic squad coqa boolq bigbench_language_identification".split()
)  # of the board
ORDER_SEED = 1337  # of a task's examples
SHOTS_SEED = 1234  # plus the example's index
FIELDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
LOGIT_ROWS = 1024  # of logits at a time, in fp32
MAX_ROWS = 64  # of one forward pass: masks take rows x length^2 bytes


# tasks


@dataclass(frozen=True)
class Task:
    """A row of the bundle's core.yaml and of its table of baselines."""

    label: str
    kind: str  # of FIELDS
    file: Path  # .jsonl, an example a line
    num_shots: int
    delimiter: str  # between a question and its answer
    baseline: float  # accuracy of guessing


def fetch_tasks(source: str, cache_dir: Path, say: Say) -> list[Task]:
    """The tasks of a bundle by its URL, archive or folder; a URL is fetched and unpacked once into the cache."""
    folder = fetch_zip(source, cache_dir / "core", say)
    inner = folder / "eval_bundle"
    try:
        return read_tasks(inner if inner.is_dir() else folder)
    except UserError as error:
        if folder == Path(source).expanduser():
            raise
        raise UserError(f"{error}; remove {folder}, and it is unpacked again") from error


def read_tasks(bundle: Path) -> list[Task]:
    """The tasks of an unpacked bundle: core.yaml, eval_meta_data.csv and eval_data/. UserError naming what is wrong."""
    import yaml  # here, since training without CORE needs none

    config, table, data = bundle / "core.yaml", bundle / "eval_meta_data.csv", bundle / "eval_data"
    try:
        rows = yaml.safe_load(config.read_text())["icl_tasks"]
        with open(table, newline="") as file:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
        tasks = [
            Task(
                label=row["label"],
                kind=row["icl_task_type"],
                file=data / row["dataset_uri"],
                num_shots=int(row["num_fewshot"][0]),
                delimiter=row.get("continuation_delimiter", " "),
                baseline=baselines[row["label"]],
            )
            for row in rows
        ]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{bundle}: its core.yaml or eval_meta_data.csv is damaged ({error})") from error
    for task in tasks:
        if task.kind not in FIELDS:
            raise UserError(f"{config}: task {task.label} is of kind {task.kind}; expected one of {', '.join(FIELDS)}")
        if not task.file.is_file():
            raise UserError(f"{task.file}: missing from the bundle")
    return tasks


def read_examples(task: Task, max_examples: int | None) -> list[dict[str, Any]]:
    """In the order of scoring. UserError for a line without what the task's kind needs, and for too few of them."""
    return enough(task, every_example(task)[:max_examples])


def every_example(task: Task) -> list[dict[str, Any]]:
    """In the order of scoring; UserError for a line without what the task's kind needs."""
    try:
        lines = task.file.read_bytes().decode().split("\n")  # texts hold other line separators, which end no line
    except UnicodeDecodeError as error:
        raise UserError(f"{task.file}: not UTF-8 ({error.reason} at byte {error.start})") from error
    examples: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
            check_example(task.kind, example)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{task.file}, line {number}: {type(error).__name__} {error}; expected an object with "
                f"{', '.join(FIELDS[task.kind])}"
            ) from None
        examples.append(example)
    random.Random(ORDER_SEED).shuffle(examples)
    return examples


def check_example(kind: str, example: Any) -> None:
    """ValueError, KeyError or TypeError for one that cannot be asked."""
    texts = [example[name] for name in FIELDS[kind] if name not in ("choices", "context_options", "gold")]
    if kind != "language_modeling":
        choices, gold = example["choices" if kind == "multiple_choice" else "context_options"], example["gold"]
        if type(choices) is not list or type(gold) is not int or not 0 <= gold < len(choices):
            raise ValueError(f"gold is {gold!r} of choices {choices!r}")
        texts += choices if kind == "schema" else []  # a choice may be a number, which is written out
    if wrong := [text for text in texts if type(text) is not str]:
        raise TypeError(f"{wrong[0]!r} is no text")


def enough(task: Task, examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(examples) <= task.num_shots:
        raise UserError(
            f"{task.label}: {len(examples)} examples are too few for {task.num_shots} shots and a question; allow more "
            "with --core-max-per-task"
        )
    return examples


# prompts


def prompts(task: Task, example: dict[str, Any], shots: Sequence[dict[str, Any]]) -> list[str]:
    """What is tokenized for one example: a prompt for each choice; for language modelling two, without the continuation
    and with it."""
    d = task.delimiter
    if task.kind == "multiple_choice":
        before = "".join(f"{s['query']}{d}{s['choices'][s['gold']]}\n\n" for s in shots)
        return [f"{before}{example['query']}{d}{choice}" for choice in example["choices"]]
    if task.kind == "schema":
        before = "".join(f"{s['context_options'][s['gold']]}{d}{s['continuation']}\n\n" for s in shots)
        return [f"{before}{context}{d}{example['continuation']}" for context in example["context_options"]]
    before = "".join(f"{s['context'].strip()}{d}{s['continuation']}\n\n" for s in shots)
    start = f"{before}{example['context'].strip()}{d}"
    # a prompt that ends in a space would leave the continuation a first token it rarely has
    return [start.strip(), f"{start}{example['continuation']}"]


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """How many tokens all sequences begin with."""
    shortest, longest = min(sequences), max(sequences)  # in lexical order these two differ first
    return next((i for i, (a, b) in enumerate(zip(shortest, longest)) if a != b), min(len(shortest), len(longest)))


@dataclass(frozen=True)
class Question:
    """An example in tokens: a sequence for each choice and where the tokens that count begin in it."""

    index: int  # of the example
    sequences: list[list[int]]
    starts: list[int]
    gold: int | None  # None: right if every counted token is the likeliest


def question(
    task: Task, examples: Sequence[dict[str, Any]], index: int, encode: Callable[[str], list[int]]
) -> Question:
    """encode: text to tokens, BOS first."""
    others = [i for i in range(len(examples)) if i != index]
    chosen = random.Random(SHOTS_SEED + index).sample(others, task.num_shots)
    example = examples[index]
    sequences = [encode(prompt) for prompt in prompts(task, example, [examples[i] for i in chosen])]
    if task.kind == "language_modeling":
        # where tokens merge across the end of the prompt, the first that differs begins the continuation
        return Question(index, sequences[1:], [common_prefix(sequences)], None)
    if task.kind == "schema":
        shared = common_prefix([s[::-1] for s in sequences])
        return Question(index, sequences, [len(s) - shared for s in sequences], int(example["gold"]))
    return Question(index, sequences, [common_prefix(sequences)] * len(sequences), int(example["gold"]))


# rows


@dataclass(frozen=True)
class Row:
    """Token ids of one row, and what to read off it."""

    ids: list[int]
    trunk: int  # tokens that all branches see; the whole row where there is one sequence
    branches: list[int]  # length of each
    places: list[list[int]]  # of each sequence: where in the row each counted token is predicted
    targets: list[list[int]]  # these tokens


def packed(q: Question) -> Row:
    """All sequences of a question in one row: what they begin with once, then the rest of each."""
    if len(q.sequences) == 1:
        return separate(q)[0]
    trunk = common_prefix(q.sequences)
    ids = list(q.sequences[0][:trunk])
    branches: list[int] = []
    places: list[list[int]] = []
    for sequence, start in zip(q.sequences, q.starts):
        offset = len(ids) - trunk  # from a token's index in the sequence, past the trunk, to its index in the row
        ids += sequence[trunk:]
        branches.append(len(sequence) - trunk)
        # token j is predicted at j - 1; nothing predicts the first
        places.append([i if i < trunk else i + offset for i in range(max(start, 1) - 1, len(sequence) - 1)])
    targets = [s[max(start, 1) :] for s, start in zip(q.sequences, q.starts)]
    return Row(ids, trunk, branches, places, targets)


def separate(q: Question, max_tokens: int | None = None) -> list[Row]:
    """Each sequence of a question in a row of its own, its first tokens left out beyond max_tokens."""
    rows = []
    for sequence, start in zip(q.sequences, q.starts):
        cut = max(0, len(sequence) - max_tokens) if max_tokens else 0
        sequence, start = sequence[cut:], max(start - cut, 1)
        places = list(range(start - 1, len(sequence) - 1))
        rows.append(Row(sequence, len(sequence), [], [places], [sequence[start:]]))
    return rows


# scorers


class Scorer(Protocol):
    """A model as CORE sees it.

    encode      text to tokens, BOS first
    rows        those of a question
    max_tokens  of one forward pass, padding included; a longer row runs alone
    """

    max_tokens: int

    def encode(self, text: str) -> list[int]: ...

    def rows(self, q: Question) -> list[Row]: ...

    def __call__(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Of every counted token, row by row and sequence by sequence: its loss in nats (N,) fp32, and whether it is
        the likeliest (N,) bool."""
        ...


def padded(rows: Sequence[Row], fill: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (B, T), and of the counted tokens their flat places in it (N,) and themselves (N,)."""
    length = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), length), fill, dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = row.ids
    places = [i * length + place for i, row in enumerate(rows) for part in row.places for place in part]
    targets = [token for row in rows for part in row.targets for token in part]
    a, b, c = (torch.from_numpy(np.asarray(x, dtype=np.int64)).to(device) for x in (ids, places, targets))
    return a, b, c


def judged(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What a scorer returns, of hidden states (N, C) by a head that makes them logits (N, V)."""
    losses: list[Tensor] = []
    hits: list[Tensor] = []
    for h, t in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS)):
        logits = head(h).float()
        losses.append(F.cross_entropy(logits, t, reduction="none"))
        hits.append(logits.argmax(-1) == t)
    return torch.cat(losses), torch.cat(hits)


class GPTScorer:
    """Redline's model: the sequences of a question share their trunk."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, *, max_tokens: int, share: bool = True):
        """share: False runs every sequence whole, the plain way that the other is measured against."""
        self.max_tokens = max_tokens
        self._model, self._tokenizer, self._share = model, tokenizer, share

    def encode(self, text: str) -> list[int]:
        return [self._tokenizer.bos_id, *self._tokenizer.encode(text)]

    def rows(self, q: Question) -> list[Row]:
        return [packed(q)] if self._share else separate(q)

    def __call__(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        model = self._model
        ids, places, targets = padded(rows, self._tokenizer.bos_id, model.wte.device)
        branches = None
        if any(row.branches for row in rows):
            branches = Branches.of([(row.trunk, row.branches) for row in rows], ids.size(1), ids.device)
        hidden = model.hidden(ids, branches=branches).flatten(0, 1)[places]  # (N, C)
        return judged(model.logits, hidden, targets)


# scores


@dataclass(frozen=True)
class TaskScore:
    label: str
    accuracy: float
    centered: float
    num_examples: int
    seconds: float

    def line(self) -> str:
        return (
            f"{self.label:<36} accuracy {self.accuracy:.4f}  centered {self.centered:+.4f}  {self.num_examples:,} "
            f"examples, {self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class CoreScore:
    """core is the mean of the tasks' centered accuracies."""

    core: float
    tasks: list[TaskScore]
    whole: bool  # every example of every task, and no task missing

    def scope(self) -> str:
        """In words, for people."""
        n = sum(t.num_examples for t in self.tasks)
        return f"{'all' if self.whole else 'not comparable with the board:'} {n:,} examples of {len(self.tasks)} tasks"

    def line(self) -> str:
        return f"CORE {self.core:.4f} ({self.scope()}; GPT-2: {GPT2_CORE})"

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        parts = {t.label: {k: v for k, v in asdict(t).items() if k != "label"} for t in self.tasks}
        return {"core": self.core, "core_scope": self.scope(), "core_whole": self.whole, "core_tasks": parts}

    def csv(self) -> str:
        """Task, accuracy and centered accuracy, a task a line, CORE last."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["Task", "Accuracy", "Centered"])
        writer.writerows([t.label, f"{t.accuracy:.6f}", f"{t.centered:.6f}"] for t in self.tasks)
        writer.writerow(["CORE", "", f"{self.core:.6f}"])
        return out.getvalue()


def centered(accuracy: float, baseline: float) -> float:
    return (accuracy - baseline) / (1 - baseline)


@torch.no_grad()
def core_score(
    scorer: Scorer,
    tasks: Sequence[Task],
    world: World,
    *,
    max_per_task: int | None = None,
    on_task: Callable[[TaskScore], None] | None = None,
    stopped: Callable[[], bool] = never,
) -> CoreScore:
    """Scores every task; ranks share the examples of each.

    on_task: called with each score as it is known. stopped: asked between batches; ScoringStopped on all ranks where it
    was true on one. An error on one rank is one on all.
    """
    everything = [every_example(task) for task in tasks]  # a damaged one is found before the first is scored
    asked = [enough(task, found[:max_per_task]) for task, found in zip(tasks, everything)]
    scores = []
    for task, examples in zip(tasks, asked):
        started = time.perf_counter()
        right = together(lambda: answers(scorer, task, examples, world, stopped), f"task {task.label} of CORE")  # noqa: B023
        if any(gather_objects(stopped())):
            raise ScoringStopped
        accuracy = (all_sum(right) > 0).double().mean().item()
        seconds = time.perf_counter() - started
        scores.append(TaskScore(task.label, accuracy, centered(accuracy, task.baseline), len(examples), seconds))
        if on_task:
            on_task(scores[-1])
    whole = asked == everything and {task.label for task in tasks} == TASKS and len(tasks) == len(TASKS)
    return CoreScore(sum(s.centered for s in scores) / len(scores), scores, whole)


def answers(
    scorer: Scorer,
    task: Task,
    examples: Sequence[dict[str, Any]],
    world: World,
    stopped: Callable[[], bool] = never,
) -> Tensor:
    """(N,) int32: 1 where an example of this rank was answered right, or 0."""
    right = torch.zeros(len(examples), dtype=torch.int32, device=world.device)
    asked = [question(task, examples, i, scorer.encode) for i in range(len(examples))[world.rank :: world.world_size]]
    for batch in batches(asked, scorer):
        if stopped():
            break
        losses, hits = scorer([row for _, rows in batch for row in rows])
        sizes = [len(part) for _, rows in batch for row in rows for part in row.targets]
        # of an empty span the mean is NaN, see the top of this file
        means = torch.stack([part.mean() for part in losses.split(sizes)]).tolist()
        all_hit = torch.stack([part.all() for part in hits.split(sizes)]).tolist()
        at = 0
        for q, rows in batch:
            n = sum(len(row.targets) for row in rows)
            best = min(range(at, at + n), key=means.__getitem__) - at
            right[q.index] = all_hit[at] if q.gold is None else best == q.gold
            at += n
    return right


def batches(questions: Sequence[Question], scorer: Scorer) -> Iterator[list[tuple[Question, list[Row]]]]:
    """Questions with their rows, those of similar length together: little padding."""
    found = [(q, scorer.rows(q)) for q in questions]
    found.sort(key=lambda pair: max(len(row.ids) for row in pair[1]), reverse=True)
    batch: list[tuple[Question, list[Row]]] = []
    num_rows = length = 0
    for q, rows in found:
        length = length or max(len(row.ids) for row in rows)  # the first of a batch is its longest
        if batch and (num_rows + len(rows) > MAX_ROWS or (num_rows + len(rows)) * length > scorer.max_tokens):
            yield list(batch)
            batch.clear()
            num_rows, length = 0, max(len(row.ids) for row in rows)
        batch.append((q, rows))
        num_rows += len(rows)
    if batch:
        yield batch
