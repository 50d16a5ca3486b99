"""Configuration: frozen dataclasses, the presets, and the only place where a default lives.

A field that is `None` is derived by `core/plan.py` from the others (the depth dial). Sources of the defaults:
nanochat at 92d63d4 for the `gpt2` preset; `quickstart` was tuned on two CPU cores (bench/LOG.md).
"""

import argparse
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the transformer and one switch per departure from a plain one."""

    depth: int = 24
    """Number of layers L; the dial that sizes everything else."""
    aspect_ratio: int = 64
    """Channels per layer: d_model = depth * aspect_ratio, rounded up to a multiple of d_head."""
    d_model: int | None = None
    """Channels C of the residual stream; unset: from depth and aspect_ratio."""
    d_head: int = 128
    """Channels D of an attention head."""
    n_kv_head: int | None = None
    """Key/value heads G (must divide the query heads); unset: as many as query heads."""
    seq_len: int = 2048
    """Context length T in tokens."""
    vocab_size: int = 32768
    """Tokens in the vocabulary, special tokens included."""
    window_pattern: str = "SSSL"
    """Attention window of each layer, tiled over depth: S short, L the whole context; the last layer is always L."""
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
    logit_softcap: float = 15.0
    """Logits z become c * tanh(z / c); 0 switches the softcap off."""


@dataclass(frozen=True)
class OptimConfig:
    """Learning rates, decay and schedules; each group's betas stand in core/optim.py."""

    scaling_laws: bool = True
    """Scale learning rates and decay from the tuned depth 12 to this depth, batch and horizon (off: take them as is)."""
    embedding_lr: float = 0.3
    """AdamW learning rate of token embeddings; value embeddings get half."""
    unembedding_lr: float = 0.008
    """AdamW learning rate of the output projection."""
    matrix_lr: float = 0.02
    """Muon learning rate of the matrices in the layers."""
    scalar_lr: float = 0.5
    """AdamW learning rate of x0 lambdas; residual lambdas get a hundredth."""
    gate_lr: float = 0.2
    """AdamW learning rate of smear and backout, never scaled."""
    weight_decay: float = 0.28
    """Cautious weight decay of the matrices, per unit of learning rate."""
    warmup_steps: int = 40
    """Steps of linear learning-rate warm-up."""
    warmdown_ratio: float = 0.65
    """Share of all steps over which the learning rate falls linearly at the end."""
    final_lr_frac: float = 0.05
    """Learning rate at the last step as a share of the peak."""
    momentum_warmup_steps: int = 400
    """Steps over which Muon's momentum rises to its plateau."""
    ns_steps: int = 5
    """Polar Express iterations per Muon step, at most 5."""


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes rows of tokens."""

    path: Annotated[str, tyro.conf.arg(name="data")] = "stdlib"
    """'stdlib' (this Python's own source text) or a path: a folder of text, .jsonl[.gz|.zst] or .parquet with a column 'text'."""
    val_every: int = 50
    """One document in this many is validation, chosen by a hash of its path."""
    packing: Literal["continue", "crop"] = "continue"
    """continue: long documents are cut and every token is used; crop: best fit, the rest of a cut document is dropped."""
    buffer_docs: int = 1000
    """Documents (pieces, when packing=continue) each stream chooses from when it fills a row."""
    num_streams: int = 8
    """Fixed data streams; the number of processes must divide it, and results do not depend on it then."""
    cache_dir: str = "~/.cache/redline"
    """Folder of trained tokenizers and unpacked data."""


@dataclass(frozen=True)
class Config:
    """One training run."""

    preset: tyro.conf.Suppress[str] = "gpt2"
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)

    steps: int | None = None
    """Optimizer steps; unset: from target_flops, else from ratio. With --resume: the run goes on to this many."""
    target_flops: float | None = None
    """Training compute in FLOPs that sets the number of steps when steps is unset."""
    ratio: float = 12.0
    """Training tokens per scaling parameter (layers + head) when neither steps nor target_flops is set."""
    total_batch_size: int | None = None
    """Tokens per optimizer step over all processes; unset: by the batch law."""
    device_batch_size: int | None = None
    """Rows per forward pass and process; unset: 16 on a CPU, what fits on a GPU, lowered until it divides."""
    seed: int = 42
    """Seed of initialisation, data order and sampling."""

    device: Literal["cpu", "cuda"] | None = None
    """Where to run; unset: cuda if there is one."""
    precision: Literal["fp32", "bf16"] | None = None
    """Compute type; unset: bf16 on GPUs that have it, else fp32."""
    fp8_head: bool = False
    """Train the output projection in fp8 (GPUs of capability 8.9 and newer; on a CPU its roundings are computed, slowly)."""
    kernels: str = "auto"
    """Backend of the ops: auto, ref, triton, cuda, or op=backend pairs separated by commas."""
    compile: Annotated[bool | None, tyro.conf.arg(constructor=bool)] = None
    """Compile the training forward and backward with torch.compile, before the clock starts; unset: on a GPU only."""
    deterministic: bool = False
    """On a GPU, use deterministic algorithms only (slower); a CPU run always is."""

    out: str | None = None
    """Run folder; unset: runs/<preset>-<time>."""
    resume: str | None = None
    """Run folder or checkpoint to continue exactly where it stopped."""
    save_every: int | None = None
    """Steps between checkpoints; unset: only at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    eval_every: int | None = 250
    """Steps between evaluations on a fixed subset; unset: none. The end always scores the whole split."""
    eval_tokens: int = 80 * 524288
    """Tokens of that subset."""
    final_eval_bytes: int | None = 200_000_000
    """The final evaluation scores whole documents up to this many bytes, one at least; unset: all."""
    sample_every: int | None = 2000
    """Steps between text samples; unset: only at the end."""
    sample_prompts: tuple[str, ...] = ("The capital of France is", "If yesterday was Friday, then tomorrow will be")
    """Beginnings of the sampled texts."""
    sample_tokens: int = 64
    """Tokens per sample."""
    temperature: float = 0.8
    """Sampling temperature; 0 takes the likeliest token."""
    top_k: int = 50
    """Sample among this many likeliest tokens; 0: among all."""
    log_every: int = 1
    """Steps between log lines."""
    profile: int = 0
    """Steps in a row, after warm-up and off the clock, to profile: time by op in the report, time line and memory in profile/."""

    wandb: str | None = None
    """Project on Weights & Biases that gets the metrics too; a resumed run goes on there as the same one."""

    dry_run: bool = False
    """Print the plan (sizes, FLOPs, batch, steps, learning rates, memory) and stop."""
    json: bool = False
    """With --dry-run: the plan as one JSON object."""


# Changing one of these between stop and resume leaves the training result as it is.
RESUMABLE_CHANGES = {
    "device_batch_size", "device", "kernels", "compile", "deterministic", "out", "resume", "save_every", "keep_checkpoints",
    "eval_every", "eval_tokens", "final_eval_bytes", "cache_dir", "path", "sample_every", "sample_prompts", "sample_tokens", "temperature",
    "top_k", "log_every", "profile", "wandb", "dry_run", "json",
}  # fmt: skip

_PYTHON_PROMPTS = ("def main(", "class TestCase(unittest.", "import os\nimport sys\n")

_GPT2 = Config(preset="gpt2", data=DataConfig(packing="crop"))

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
    raise ValueError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")


PRESETS = ("quickstart", "gpt2")
STDLIB = "stdlib"


# field: smallest and largest value
_RANGES: dict[str, tuple[float, float]] = {
    "log_every": (1, math.inf), "eval_every": (1, math.inf), "save_every": (1, math.inf), "sample_every": (1, math.inf),
    "eval_tokens": (1, math.inf), "final_eval_bytes": (1, math.inf), "keep_checkpoints": (1, math.inf),
    "sample_tokens": (0, math.inf), "profile": (0, math.inf), "temperature": (0, 100), "top_k": (0, math.inf),
    "device_batch_size": (1, math.inf), "max_bytes": (1, math.inf), "seed": (0, 2**62), "ratio": (0, 1e9), "target_flops": (0, 1e40),
    "warmup_steps": (0, math.inf), "momentum_warmup_steps": (0, math.inf), "warmdown_ratio": (0, 1),
    "final_lr_frac": (0, 1), "weight_decay": (0, 1e6), "logit_softcap": (0, 1e6),
    "embedding_lr": (0, 1e6), "unembedding_lr": (0, 1e6), "matrix_lr": (0, 1e6), "scalar_lr": (0, 1e6), "gate_lr": (0, 1e6),
}  # fmt: skip


def check_ranges(config: Any) -> None:
    """ValueError for the first value of a dataclass, or of one inside it, that is out of its range (or not a number)."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value)
        elif f.name in _RANGES and value is not None:
            low, high = _RANGES[f.name]
            if not low <= value <= high:
                expected = f"{low} or more" if high == math.inf else f"{low} to {high:g}"
                raise ValueError(f"--{f.name.replace('_', '-')} is {value}: expected {expected}")


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def from_dict(data: dict[str, Any]) -> Config:
    """Inverse of `to_dict`, through JSON or not; an unknown field is a ValueError naming it."""
    sections = {"model": ModelConfig, "optim": OptimConfig, "data": DataConfig}
    fields = dict(data)
    try:
        for name, cls in sections.items():
            fields[name] = cls(**fields[name])
        fields["sample_prompts"] = tuple(fields["sample_prompts"])
        return Config(**fields)
    except (KeyError, TypeError) as error:
        raise ValueError(f"this config was written by another version of Redline: {error}; use that version") from error


def changed_fields(old: Config, new: Config) -> list[str]:
    """Names of fields whose values differ and that would change the result of a resumed run."""
    names = []
    for f in dataclasses.fields(Config):
        a, b = getattr(old, f.name), getattr(new, f.name)
        if dataclasses.is_dataclass(a):
            fields = [g.name for g in dataclasses.fields(a) if g.name not in RESUMABLE_CHANGES]
            names += [name for name in fields if getattr(a, name) != getattr(b, name)]
        elif a != b and f.name not in RESUMABLE_CHANGES:
            names.append(f.name)
    return names


def parse_args(argv: list[str], device_type: Callable[[str | None], str], saved: Callable[[str], Config]) -> Config:
    """Command line `[preset] [options]` -> Config. Exits with help or one error in tyro's words on a wrong option.

    device_type chooses the device for `--device`, since a preset depends on it; saved gives the config of a run to resume.
    """
    name, options = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--device")
    peek.add_argument("--resume")
    peek.add_argument("--dry-run", action="store_true")
    known, _ = peek.parse_known_args(options)
    if known.resume:
        default = saved(known.resume)
        if name not in (None, default.preset):
            raise ValueError(f"{known.resume} is a run of preset {default.preset}, not {name}: leave the preset out")
    else:
        planned = known.dry_run and known.device  # a plan needs no device
        default = preset(name or PRESETS[0], planned or device_type(known.device))
    config = tyro.cli(
        Config,
        prog="train.py [preset]",
        description=f"Train a language model. Presets: {', '.join(PRESETS)} (default {PRESETS[0]}); shown values are those of "
        f"{default.preset} on this machine.",
        default=default,
        args=options,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    check_ranges(config)
    if config.data.path != STDLIB:  # a run can be resumed from another folder
        path = str(Path(config.data.path).expanduser().resolve())
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=path))
    return config
