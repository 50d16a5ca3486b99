"""Evaluates or exports a trained model: `python eval.py RUN_OR_CHECKPOINT [--metrics core,bpb,sample] [--prompt TEXT
...] [--export DIR]`."""

# ruff: noqa: E402
from core.starting import hear_signals

if __name__ == "__main__":
    hear_signals()  # before the imports, which take seconds

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

import torch
import tyro

from core import checkpoint, communication, machine
from core.communication import World, joined_world
from core.config import CORE_BUNDLE, DATASETS, STDLIB, Config, DataConfig, ModelConfig, check_ranges, from_dict, option
from core.data.corpus import Corpus, open_corpus, open_validation
from core.data.download import silent
from core.data.shards import open_validation_shard
from core.data.tokenizer import Tokenizer
from core.evals.bits_per_byte import score, validation_whole
from core.evals.core_metric import GPTScorer, Scorer, TaskScore, core_score, fetch_tasks
from core.evals.hugging_face import HuggingFaceScorer
from core.generate import sample_texts, stream_text
from core.models.gpt2 import GPT
from core.run import State
from core.share.export import check_free, export, is_exported, load_exported, push
from core.stopping import UserError, check_utf8, expanded, one_sentence, out_of_memory
from kernels.dispatch import Backends

METRICS = ("core", "bpb", "sample")
HF_ROW_TOKENS = 512  # of logits of a model of transformers, for each row of --device-batch-size


@dataclass(frozen=True)
class EvalConfig:
    """What to evaluate and how. Under torchrun, processes share the work of bpb."""

    path: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")] = None
    """A run folder (its newest checkpoint counts), one checkpoint, or an exported folder."""
    export: str | None = None
    """Write the model into this new folder, as transformers and others read it, instead of evaluating it."""
    push: str | None = None
    """Upload what --export wrote, or the exported folder given instead of a run, to the Hugging Face hub as
    NAME/MODEL, private where it is new."""
    metrics: str | None = None
    """Which, separated by commas: core answers the 22 tasks of CORE, bpb scores the validation text, sample writes
    text; unset: bpb and sample, of an exported folder without --data sample, of --hf core."""
    hf: str | None = None
    """Instead of a run: a causal language model of Hugging Face's transformers, by name or folder."""
    prompt: list[str] = field(default_factory=list)
    """Beginnings of texts to continue; unset: those of the training run."""
    data: str | None = None
    """Text for bpb, as for train.py: its validation split, or all of one document; unset: that of the training run,
    which an exported folder does not know."""
    core_max_per_task: int | None = option(None, 1)
    """Examples of each task of CORE; unset: all, as scores on the board."""
    core_bundle: str = CORE_BUNDLE
    """The tasks of CORE: a folder, a .zip file or its URL, which is fetched once into the cache."""
    core_csv: str | None = None
    """Where to write CORE's table, task by task."""
    max_bytes: int | None = option(None, 1)
    """Score whole documents up to this many bytes, one at least; unset: all."""
    sample_tokens: int = option(200, 0)
    """Tokens per sample."""
    temperature: float = option(0.8, 0, 100)
    """Sampling temperature; 0 takes the likeliest token."""
    top_k: int = option(50, 0)
    """Sample among this many likeliest tokens; 0: among all."""
    seed: int = option(42, 0, 2**62)
    """Seed of sampling."""
    device_batch_size: int = option(16, 1)
    """Rows per forward pass."""
    device: Literal["cpu", "cuda"] | None = None
    """Where to run; unset: cuda if there is one."""
    kernels: str = "auto"
    """Backend of the ops, as for train.py."""
    json: bool = False
    """Print one JSON object instead of text."""


def load_model(folder: Path, world: World, kernels: str, batch_size: int) -> tuple[GPT, Tokenizer, State]:
    """The model of a checkpoint, in the types it was trained in, its tokenizer and its state."""
    state = State.read(folder)
    communication.main_first(lambda: checkpoint.verify(folder) if world.is_main else None, "the checkpoint's checksums")
    backends = Backends(kernels, device=world.device, dtype=state.dtype)
    with world.device:
        model = GPT(ModelConfig(**state.model), backends, batch_size)
    checkpoint.load_model(folder, model)
    return model, Tokenizer.load(folder), state


def main(argv: list[str]) -> None:
    check_utf8(argv)
    cfg = tyro.cli(EvalConfig, prog="eval.py", description=__doc__, args=argv)
    if (cfg.path is None) == (cfg.hf is None):
        raise UserError("give a run folder or a checkpoint, or --hf NAME for a model of Hugging Face's transformers")
    if cfg.export is not None or cfg.push is not None:
        share(cfg)
        return
    exported = expanded(cfg.path) if cfg.path and is_exported(expanded(cfg.path)) else None
    usual = "core" if cfg.hf else "sample" if exported and cfg.data is None else "bpb,sample"
    asked = cfg.metrics if cfg.metrics is not None else usual
    metrics = [name.strip() for name in asked.split(",") if name.strip()]
    if unknown := sorted(set(metrics) - set(METRICS)):
        raise UserError(f"--metrics {cfg.metrics}: unknown {', '.join(unknown)}; choose from {', '.join(METRICS)}")
    if not metrics:
        raise UserError(f"--metrics is empty: choose from {', '.join(METRICS)}")
    if cfg.hf and metrics != ["core"]:
        raise UserError(f"--metrics {cfg.metrics}: of a model of transformers only core is known")
    if exported and "bpb" in metrics and cfg.data is None:
        raise UserError(f"{exported} does not know the text of its training: give bpb a text with --data")
    check_ranges(cfg)
    folder = exported or (checkpoint.find(cfg.path) if cfg.path else None)
    with joined_world(cfg.device) as world:
        talks = world.is_main and not cfg.json
        result = evaluate_run(cfg, folder, metrics, world, talks) if folder else evaluate_hf(cfg, world, talks)
        if world.is_main and cfg.json:
            print(json.dumps(result))


def share(cfg: EvalConfig) -> None:
    """Writes a model for others, uploads one, or both."""
    if cfg.path is None or cfg.metrics is not None:
        raise UserError("--export and --push take a run folder or a checkpoint, and go without --metrics and --hf")
    path, rank = expanded(cfg.path), communication.rank_and_size()[0]
    if rank:
        return
    if cfg.export is None:
        if not is_exported(path):
            raise UserError(f"{path} is no exported folder: write one with --export DIR first, or in the same command")
        folder = path
    else:
        folder, found = expanded(cfg.export), checkpoint.find(path)
        check_free(folder)
        model, tokenizer, state = load_model(found, World(0, 1, torch.device("cpu")), "ref", 1)
        summary = summary_of(found, state)
        export(folder, model, tokenizer, state.dtype, summary)
        scores = "" if summary else "; its model card has no scores, for the run did not end with this checkpoint"
        print(f"{found} is exported to {folder}{scores}")
    if cfg.push is not None:
        print(push(folder, cfg.push, print))


def summary_of(folder: Path, state: State) -> dict[str, Any] | None:
    """summary.json of the run that ended with this checkpoint."""
    path = folder.parent.parent / "summary.json"
    if not path.exists():
        return None
    summary = checkpoint.load_json(path)
    return summary if summary["steps"] == state.step else None


def evaluate_run(cfg: EvalConfig, folder: Path, metrics: list[str], world: World, talks: bool) -> dict[str, Any]:
    """The metrics of a checkpoint or an exported folder, in the order of METRICS. talks: print them as they are
    known."""
    if is_exported(folder):
        model, tokenizer = load_exported(folder, world.device, kernels=cfg.kernels, batch_size=cfg.device_batch_size)
        trained, text = Config(model=model.cfg), None
    else:
        model, tokenizer, state = load_model(folder, world, cfg.kernels, cfg.device_batch_size)
        trained, text = from_dict(state.config), state.loader["corpus"]
    device = machine.device_name(world.device)
    result: dict[str, Any] = {"checkpoint": str(folder), "device": device}
    if talks:
        print(f"{folder} on {device}")
    if "core" in metrics:
        max_tokens = cfg.device_batch_size * model.dims.seq_len
        cache_dir = expanded(trained.data.cache_dir)
        result |= score_core(cfg, GPTScorer(model, tokenizer, max_tokens=max_tokens), cache_dir, world, talks)
    if "bpb" in metrics:
        result |= score_text(cfg, model, tokenizer, trained, text, world)
        if talks:
            print(f"{result['data']}: {result['val_bpb']:.4f} bits per byte\n  ({result['val_scope']})")
    if "sample" in metrics and world.is_main:
        prompts = list(cfg.prompt or trained.sample_prompts)
        with out_of_memory("samples", lambda: "try shorter prompts, fewer of them, or fewer --sample-tokens"):
            result["samples"] = write_samples(cfg, model, tokenizer, prompts, shown=talks)
    return result


def evaluate_hf(cfg: EvalConfig, world: World, talks: bool) -> dict[str, Any]:
    """CORE of a model of transformers."""
    assert cfg.hf
    scorer = HuggingFaceScorer(cfg.hf, world, max_tokens=cfg.device_batch_size * HF_ROW_TOKENS)
    result = {"model": cfg.hf, "device": machine.device_name(world.device)}
    return result | score_core(cfg, scorer, expanded(DataConfig.cache_dir), world, talks)


def score_core(cfg: EvalConfig, scorer: Scorer, cache_dir: Path, world: World, talks: bool) -> dict[str, Any]:
    say = print if talks else silent
    tasks = communication.main_first(lambda: fetch_tasks(cfg.core_bundle, cache_dir, say), "the tasks of CORE")
    on_task = show_task if talks else None
    with out_of_memory("CORE", lambda: "try a smaller --device-batch-size"):
        score = core_score(scorer, tasks, world, max_per_task=cfg.core_max_per_task, on_task=on_task)
    if talks:
        print(score.line())
    if cfg.core_csv and world.is_main:
        checkpoint.write_text(expanded(cfg.core_csv), score.csv())
    return score.summary()


def show_task(score: TaskScore) -> None:
    print(score.line(), flush=True)


def score_text(
    cfg: EvalConfig, model: GPT, tokenizer: Tokenizer, trained: Config, text: str | None, world: World
) -> dict[str, Any]:
    """Bits per byte. text: fingerprint of what it was trained on, where that is to be scored."""
    cache_dir = expanded(trained.data.cache_dir)
    source = cfg.data or trained.data.path
    options: dict[str, Any] = {"seed": trained.seed, "val_every": trained.data.val_every, "cache_dir": cache_dir}
    options["row_tokens"] = trained.model.seq_len
    if world.is_main and not cfg.json:
        options["progress"] = print

    def open_text() -> Corpus:
        changed = UserError(
            f"{source} has changed since it was trained on: score it as it is now with --data {quote(source)}"
        )
        if source in DATASETS:
            say = print if world.is_main and not cfg.json else silent
            found, corpus = open_validation_shard(source, seed=trained.seed, cache_dir=cache_dir, say=say)
            if cfg.data is None and found != text:
                raise changed
            return corpus
        if source != STDLIB and Path(source).resolve() != Path(trained.data.path).resolve():
            return open_validation(source, **options)
        train, corpus = open_corpus(source, **options)
        if cfg.data is None and train.fingerprint != text:  # some of it may have been trained on
            raise changed
        return corpus

    corpus = communication.main_first(open_text, "the text")
    for note in corpus.notes if world.is_main and not cfg.json else ():
        print(note)
    valset, _ = validation_whole(corpus, tokenizer, model.dims.seq_len, cfg.max_bytes)
    rows = cfg.device_batch_size
    advice = f"try --device-batch-size {rows // 2}" if rows > 1 else "fewer than one is impossible; try --device cpu"
    with out_of_memory(f"{rows} rows per forward pass", lambda: advice):
        bpb = score(model, valset, tokenizer, batch_size=rows, world=world)
    return {"data": source, "val_bpb": bpb.bpb, "val_bytes": bpb.num_bytes, "val_tokens": bpb.num_tokens} | {
        "val_scope": valset.scope
    }


def write_samples(
    cfg: EvalConfig, model: GPT, tokenizer: Tokenizer, prompts: list[str], *, shown: bool
) -> list[dict[str, str]]:
    """Continues the prompts together; a single one that is shown appears as it is written."""
    options = {"temperature": cfg.temperature, "top_k": cfg.top_k, "seed": cfg.seed}
    if shown and len(prompts) == 1:
        show_sample(prompts[0], stream_text(model, tokenizer, prompts[0], cfg.sample_tokens, **options))
        return []
    texts = sample_texts(model, tokenizer, prompts, cfg.sample_tokens, **options)
    for p, t in zip(prompts, texts) if shown else ():
        show_sample(p, [t])
    return [{"prompt": p, "text": t} for p, t in zip(prompts, texts)]


def show_sample(prompt: str, pieces: Iterable[str]) -> None:
    """Prints a prompt and each piece of what follows as it comes."""
    print(f"--- {prompt!r}\n{prompt}", end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print("\n---")


if __name__ == "__main__":
    with one_sentence():
        main(sys.argv[1:])
