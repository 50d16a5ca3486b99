"""Configuration: frozen dataclasses, the presets, and the only place where a default lives.

A field that is `None` is derived by `core/plan.py` from the others (the depth dial). `option` states with each field
which values it may have and whether a resumed run may change it. Sources of the defaults: nanochat at 92d63d4 for the
`gpt2` preset; `quickstart` was tuned on two CPU cores (bench/LOG.md).
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import tyro

from core.stopping import UserError
from kernels.polar_express import COEFFICIENTS

T = TypeVar("T")

STDLIB = "stdlib"
CORE_BUNDLE = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"  # [nanochat 92d63d4, base_eval.py]
LEARNED_CHARS = 2_000_000_000  # that a tokenizer learns from at most [nanochat 92d63d4, scripts/tok_train.py]
DOC_CHARS = 10_000  # of a document, for the tokenizer: nanochat 92d63d4, scripts/tok_train.py, --doc-cap


@dataclass(frozen=True)
class Dataset:
    """A dataset of the Hugging Face hub: shuffled parquet shards with a column "text", the last by name for
    validation."""

    repo: str
    num_shards: int  # in all, the last one included
    shard_chars: float = 250e6  # of a shard, about

    def shard_name(self, i: int) -> str:
        """File of shard i, 0 to num_shards - 1."""
        return f"shard_{i:05d}.parquet"


@dataclass(frozen=True)
class TokenDataset(Dataset):
    """The same in tokens: files that core/data/token_shards.py reads."""

    shard_tokens: int = 100_000_000  # of a shard but the last to train on, which is shorter

    def shard_name(self, i: int) -> str:
        last = self.num_shards - 1
        return "fineweb_val_000000.bin" if i == last else f"fineweb_train_{i + 1:06d}.bin"


# [nanochat 92d63d4, nanochat/dataset.py]
DATASETS = {
    "climbmix": Dataset("karpathy/climbmix-400b-shuffle", 6543),
    "fineweb-edu": Dataset("karpathy/fineweb-edu-100b-shuffle", 1823),
}
# [modded-nanogpt f411b3d]
TOKEN_DATASETS = {"fineweb10B": TokenDataset("kjj0/fineweb10B-gpt2", 104)}


def option(default: T, low: float | None = None, high: float = math.inf, *, resumable: bool = False) -> T:
    """A field with its default. Numbers lie between low and high, both included; resumable: changing it between stop
    and resume leaves the training result as it is."""
    return field(default=default, metadata={"low": low, "high": high, "resumable": resumable})


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the transformer and one switch per departure from a plain one."""

    depth: int = option(24, 1)
    """Number of layers L; the dial that sizes everything else."""
    aspect_ratio: int = option(64, 1)
    """Channels per layer: d_model = depth * aspect_ratio, rounded up to a multiple of d_head."""
    d_model: int | None = option(None, 1)
    """Channels C of the residual stream; unset: from depth and aspect_ratio."""
    d_head: int = option(128, 2)
    """Channels D of an attention head."""
    n_kv_head: int | None = option(None, 1)
    """Key/value heads G (must divide the query heads); unset: as many as query heads."""
    seq_len: int = option(2048, 2)
    """Context length T in tokens."""
    vocab_size: int = option(32768, 1)
    """Tokens in the vocabulary, special tokens included."""
    window_pattern: str = "SSSL"
    """Attention window of each layer, tiled over depth: S short, L the whole context; the last layer is always L."""
    within_documents: bool = False
    """Attention sees nothing before the beginning (bos) of a token's document. (Smear still reads one token back.)"""
    rope: bool = True
    """Rotary position embedding (off: no positions at all)."""
    qk_norm: bool = True
    """RMSNorm of queries and keys per head, then a fixed scale."""
    relu2: bool = True
    """Squared ReLU in the MLP (off: GELU)."""
    value_embeds: bool = True
    """Gated per-token value embeddings on every other layer."""
    resid_lambdas: bool = True
    """A learned scale of the residual stream at the entry of each layer."""
    x0_lambdas: bool = True
    """A learned share of the input embedding added at the entry of each layer."""
    smear: bool = True
    """Mix a gated share of the previous token's embedding into each token's."""
    backout: bool = True
    """Subtract a learned share of the middle layer's output before the head."""
    untied_head: bool = True
    """Output projection of its own (off: shared with the input embedding)."""
    logit_softcap: float = option(15.0, 0, 1e6)
    """Logits z become c * tanh(z / c); 0 switches the softcap off."""


@dataclass(frozen=True)
class FinewebConfig:
    """Sizes of the model of track fineweb; its features are core/models/fineweb.py."""

    n_head: int = 6
    d_head: int = 128
    vocab_size: int = 50257
    local_keys: int = 112
    """Keys that composed heads of the last layer see."""

    @property
    def d_model(self) -> int:
        return self.n_head * self.d_head


@dataclass(frozen=True)
class OptimConfig:
    """Learning rates, decay and schedules; each group's betas stand in core/optim.py."""

    scaling_laws: bool = True
    """Scale learning rates and decay from the tuned depth 12 to this depth, batch and horizon (off: take them as
    is)."""
    embedding_lr: float = option(0.3, 0, 1e6)
    """AdamW learning rate of token embeddings; value embeddings get half."""
    unembedding_lr: float = option(0.008, 0, 1e6)
    """AdamW learning rate of the output projection."""
    matrix_lr: float = option(0.02, 0, 1e6)
    """Muon learning rate of the matrices in the layers."""
    scalar_lr: float = option(0.5, 0, 1e6)
    """AdamW learning rate of x0 lambdas; residual lambdas get a hundredth."""
    gate_lr: float = option(0.2, 0, 1e6)
    """AdamW learning rate of smear and backout, never scaled."""
    weight_decay: float = option(0.28, 0, 1e6)
    """Cautious weight decay of the matrices, per unit of learning rate."""
    warmup_steps: int = option(40, 0)
    """Steps of linear learning-rate warm-up."""
    warmdown_ratio: float = option(0.65, 0, 1)
    """Share of all steps over which the learning rate falls linearly at the end."""
    final_lr_frac: float = option(0.05, 0, 1)
    """Learning rate at the last step as a share of the peak."""
    momentum_warmup_steps: int = option(400, 0)
    """Steps over which Muon's momentum rises to its plateau."""
    ns_steps: int = option(len(COEFFICIENTS), 1, len(COEFFICIENTS))
    """Polar Express iterations per Muon step."""


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes rows of tokens."""

    path: Annotated[str, tyro.conf.arg(name="data")] = option("stdlib", resumable=True)
    """'stdlib' (this Python's own source text), 'climbmix' or 'fineweb-edu' (fetched from the Hugging Face hub, as much
    as the run needs), or a path: a folder of text, .jsonl[.gz|.zst] or .parquet with a column 'text'."""
    val_every: int = option(50, 1)
    """One document in this many is validation, chosen by a hash of its path; of one document, its last part."""
    packing: Literal["continue", "crop"] = "continue"
    """continue: long documents are cut and every token is used; crop: best fit, the rest of a cut document is
    dropped."""
    buffer_docs: int = option(1000, 1)
    """Documents (pieces, when packing=continue) each stream chooses from when it fills a row."""
    num_streams: int = option(8, 1)
    """Fixed data streams; the number of processes must divide it, and results do not depend on it then."""
    cache_dir: str = option("~/.cache/redline", resumable=True)
    """Folder of trained tokenizers and unpacked data."""
    tokenizer_doc_chars: int | None = option(None, 1)
    """Characters of each document that the tokenizer learns from; unset: all (of 'stdlib' the first 10,000)."""

    @property
    def doc_cap(self) -> int | None:
        """tokenizer_doc_chars, resolved. The committed score on the standard library was made with the cap."""
        return self.tokenizer_doc_chars or (DOC_CHARS if self.path == STDLIB else None)


@dataclass(frozen=True)
class Config:
    """One training run."""

    preset: tyro.conf.Suppress[str] = "gpt2"
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)

    steps: int | None = option(None, 1)
    """Optimizer steps; unset: from target_flops, else from ratio. With --resume: the run goes on to this many."""
    target_flops: float | None = option(None, 0, 1e40)
    """Training compute in FLOPs that sets the number of steps when steps is unset."""
    ratio: float = option(12.0, 0, 1e9)
    """Training tokens per scaling parameter (layers + head) when neither steps nor target_flops is set."""
    total_batch_size: int | None = option(None, 1, 1e9)
    """Tokens per optimizer step over all processes; unset: by the batch law."""
    device_batch_size: int | None = option(None, 1, resumable=True)
    """Rows per forward pass and process; unset: 16 on a CPU, what fits on a GPU, lowered until it divides the rows per
    rank."""
    seed: int = option(42, 0, 2**62)
    """Seed of initialisation, data order and sampling."""

    device: Literal["cpu", "cuda"] | None = option(None, resumable=True)
    """Where to run; unset: cuda if there is one."""
    precision: Literal["fp32", "bf16", "fp8"] | None = None
    """Compute type; unset: bf16 on GPUs that have it, else fp32. fp8: bf16, and the layers' large matrices multiply in
    fp8 where they are trained (GPUs of capability 8.9 and newer; on a CPU the roundings are computed, slowly)."""
    fp8_scales: Literal["delayed", "dynamic"] = "delayed"
    """With --precision fp8, scales follow from earlier steps, or from each tensor itself, which costs passes."""
    fp8_bf16_ends: int = option(0, 0)
    """With --precision fp8, layers at each end of the model whose matrices stay in bf16."""
    fp8_head: bool = False
    """Train the output projection in fp8 (the same GPUs), at any precision."""
    kernels: str = option("auto", resumable=True)
    """Backend of the ops: auto, ref, triton, cuda, or op=backend pairs separated by commas."""
    compile: Annotated[bool | None, tyro.conf.arg(constructor=bool)] = option(None, resumable=True)
    """Compile the training forward and backward with torch.compile, before the clock starts; unset: on a GPU only."""
    recompute: bool = option(False, resumable=True)
    """Keep the inputs of each layer alone for backward, which makes the rest again: far less memory, a forward pass
    more, the same result."""
    graph_optimizer: bool = option(False, resumable=True)
    """On a GPU, replay the optimizer's step as one CUDA graph, so that the host launches once. It keeps the memory of
    the step's intermediate results."""
    deterministic: bool = option(False, resumable=True)
    """On a GPU, use deterministic algorithms only (slower), so that a run repeats and resumes to the same bits; on a
    CPU it always does."""

    step_timeout: float = option(600, 1, 1e6, resumable=True)
    """Seconds that a step of several processes may stand still before it ends with the ranks that did not come."""
    out: str | None = option(None, resumable=True)
    """Run folder; unset: runs/<preset>-<time>."""
    resume: str | None = option(None, resumable=True)
    """Run folder or checkpoint to continue exactly where it stopped; auto: continue what --out holds, else start."""
    mended_data: bool = option(False, resumable=True)
    """With --resume: go on although the text was changed since, as after mending a bad line. Documents come in the
    order of the text as it is now, so that some may come twice or not at all in this epoch."""
    save_every: int | None = option(None, 1, resumable=True)
    """Steps between checkpoints; unset: only at the end."""
    keep_checkpoints: int = option(2, 1, resumable=True)
    """Newest checkpoints kept."""
    async_save: bool = option(True, resumable=True)
    """Train on while a checkpoint is written, from a copy in the host's memory; off: wait for each, without a copy."""
    on_save_error: Literal["stop", "continue"] = option("stop", resumable=True)
    """When the disk takes no checkpoint: stop with the last one, or train on and say so at the end."""
    eval_every: int | None = option(250, 1, resumable=True)
    """Steps between evaluations on a fixed subset; unset: none. The end always scores the whole split."""
    eval_tokens: int = option(80 * 524288, 1, resumable=True)
    """Tokens of that subset."""
    final_eval_bytes: int | None = option(200_000_000, 1, resumable=True)
    """The final evaluation scores whole documents up to this many bytes, one at least; unset: all."""
    core: bool = option(False, resumable=True)
    """Score CORE, the tasks of DCLM by which GPT-2 is known: at the end, and every --core-every steps."""
    core_every: int | None = option(None, 1, resumable=True)
    """Steps between scores of CORE before the end; unset: none."""
    core_max_per_task: int | None = option(500, 1, resumable=True)
    """Examples of each task of CORE; unset: all, as scores on the board."""
    core_bundle: str = option(CORE_BUNDLE, resumable=True)
    """The tasks of CORE: a folder, a .zip file or its URL, which is fetched once into the cache."""
    sample_every: int | None = option(2000, 1, resumable=True)
    """Steps between text samples; unset: only at the end."""
    sample_prompts: tuple[str, ...] = option(
        ("The capital of France is", "If yesterday was Friday, then tomorrow will be"), resumable=True
    )
    """Beginnings of the sampled texts."""
    sample_tokens: int = option(64, 0, resumable=True)
    """Tokens per sample."""
    temperature: float = option(0.8, 0, 100, resumable=True)
    """Sampling temperature; 0 takes the likeliest token."""
    top_k: int = option(50, 0, resumable=True)
    """Sample among this many likeliest tokens; 0: among all."""
    log_every: int = option(1, 1, resumable=True)
    """Steps between log lines."""
    profile: int = option(0, 0, resumable=True)
    """Steps in a row, after warm-up and off the clock, to profile: time by op in the report, time line and memory in
    profile/."""

    dollars_per_gpu_hour: float | None = option(None, 0, 1e6, resumable=True)
    """Price of a GPU, for the report's cost of the whole run."""

    wandb: str | None = option(None, resumable=True)
    """Project on Weights & Biases that gets the metrics too; a resumed run goes on there as the same one."""

    dry_run: bool = option(False, resumable=True)
    """Print the plan (sizes, FLOPs, batch, steps, learning rates, memory) and stop."""
    json: bool = option(False, resumable=True)
    """With --dry-run: the plan as one JSON object."""


SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class RaceConfig:
    """One run of track fineweb. What is tuned there are stages and constants in core/stages.py and
    core/models/fineweb.py, not options: a record is of a commit."""

    preset: tyro.conf.Suppress[str] = "fineweb"
    data: str = "fineweb10B"
    """'fineweb10B' (fetched from the Hugging Face hub, as much as the run needs), a folder with such shards, or
    'synthetic' (made up, for trying the program)."""
    scale: int = option(1, 1, 16)
    """Divides steps, widths, windows and documents, and rows of tokens by its square: 16 runs on a CPU."""
    val_tokens: int | None = option(None, 1)
    """First tokens of the validation shard that are scored; unset: 10,485,760, which a record is over, divided by the
    square of --scale."""
    val_row_tokens: int | None = option(None, 1)
    """Tokens of a row of them; unset: 262,144, divided alike."""
    eval_every: int | None = option(250, 1)
    """Steps between validations, during which the clock stands still; None: at the end alone."""
    seed: int = option(42, 0, 2**62)
    """Seed of initialisation; the order of the text is fixed."""
    device: Literal["cpu", "cuda"] | None = None
    """Where to run; unset: cuda if there is one."""
    precision: Literal["fp32", "bf16"] | None = None
    """Compute type; unset: bf16 on GPUs that have it, else fp32."""
    kernels: str = "auto"
    """Backend of the ops: auto, ref, triton, cuda, or op=backend pairs separated by commas."""
    compile: Annotated[bool | None, tyro.conf.arg(constructor=bool)] = None
    """Compile all stages with torch.compile, before the clock starts; unset: on a GPU only."""
    deterministic: bool = False
    """On a GPU, use deterministic algorithms only (slower)."""
    step_timeout: float = option(600, 1, 1e6)
    """Seconds that a step of several processes may stand still before it ends with the ranks that did not come."""
    out: str | None = None
    """Run folder; unset: runs/fineweb-<time>."""
    cache_dir: str = "~/.cache/redline"
    """Folder of fetched data."""
    log_every: int = option(1, 1)
    """Steps between lines on the console."""
    dry_run: bool = False
    """Print the plan (sizes, stages, FLOPs) and stop."""


_PYTHON_PROMPTS = ("def main(", "class TestCase(unittest.", "import os\nimport sys\n")

_GPT2 = Config(
    preset="gpt2",
    core=True,
    core_every=2000,
    data=DataConfig(path="climbmix", packing="crop", tokenizer_doc_chars=DOC_CHARS),
)

_QUICKSTART_CPU = Config(
    preset="quickstart",
    model=ModelConfig(depth=3, d_model=128, d_head=64, seq_len=256, vocab_size=4096, window_pattern="L"),
    optim=OptimConfig(
        scaling_laws=False,
        embedding_lr=0.4,
        unembedding_lr=0.01,
        matrix_lr=0.03,
        scalar_lr=0.05,
        weight_decay=0.05,
        momentum_warmup_steps=200,
    ),
    steps=1000,
    total_batch_size=2048,
    eval_every=100,
    eval_tokens=16384,
    save_every=250,
    final_eval_bytes=None,
    sample_every=250,
    sample_prompts=_PYTHON_PROMPTS,
    sample_tokens=120,
    temperature=1.0,
    log_every=10,
    profile=3,
)

# Not yet run on a GPU. The rates are those of the gpt2 preset at its tuned depth.
_QUICKSTART_CUDA = dataclasses.replace(
    _QUICKSTART_CPU,
    model=ModelConfig(depth=8, d_head=64, seq_len=1024, vocab_size=8192),
    optim=OptimConfig(scaling_laws=False, warmup_steps=40, momentum_warmup_steps=200),
    steps=500,
    total_batch_size=65536,
    eval_tokens=262144,
    eval_every=100,
    save_every=250,
    sample_every=250,
)


def preset(name: str, device_type: str) -> Config:
    """The preset `name` for `device_type` ("cpu" or "cuda")."""
    if name == "quickstart":
        return _QUICKSTART_CUDA if device_type == "cuda" else _QUICKSTART_CPU
    if name == "gpt2":
        return _GPT2
    raise UserError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")


PRESETS = ("quickstart", "gpt2")
RACE = "fineweb"  # has options of its own


def check_ranges(config: Any) -> None:
    """UserError for the first value of a dataclass, or of one inside it, that is out of its range (or not a
    number)."""
    for f in dataclasses.fields(config):
        value, low, high = getattr(config, f.name), f.metadata.get("low"), f.metadata.get("high")
        if dataclasses.is_dataclass(value):
            check_ranges(value)
        elif low is not None and value is not None and not low <= value <= high:
            expected = f"{low} or more" if high == math.inf else f"{low} to {high:g}"
            raise UserError(f"--{f.name.replace('_', '-')} is {value}: expected {expected}")


MAY_DIFFER = {"data", "cache_dir", "core_bundle"}  # between ranks: paths of machines


def flat(config: Any) -> dict[str, Any]:
    """The options by their names on the command line, with what JSON holds of them."""
    options: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            options |= flat(value)
        elif (name := "data" if f.name == "path" else f.name) not in MAY_DIFFER:
            options[f"--{name.replace('_', '-')}"] = list(value) if isinstance(value, tuple) else value
    return options


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def from_dict(data: dict[str, Any]) -> Config:
    """Inverse of `to_dict`, through JSON or not; an unknown field is a UserError naming it."""
    sections = {"model": ModelConfig, "optim": OptimConfig, "data": DataConfig}
    fields = dict(data)
    try:
        for name, cls in sections.items():
            fields[name] = cls(**fields[name])
        fields["sample_prompts"] = tuple(fields["sample_prompts"])
        return Config(**fields)
    except (KeyError, TypeError) as error:
        raise UserError(f"this config was written by another version of Redline: {error}; use that version") from error


def changed_fields(old: Any, new: Any) -> list[str]:
    """Names of fields whose values differ and that would change the result of a resumed run."""
    names: list[str] = []
    for f in dataclasses.fields(new):
        a, b = getattr(old, f.name), getattr(new, f.name)
        if dataclasses.is_dataclass(a):
            names += changed_fields(a, b)
        elif a != b and not f.metadata.get("resumable"):
            names.append(f.name)
    return names
