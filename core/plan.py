"""The plan of a run: everything a config implies before any data or weight exists. `--dry-run` prints it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from core import schedule
from core.config import Config, ModelConfig
from core.model import GPT, dims
from core.optim import learning_rates
from kernels.lm_head_loss import reference_bytes

MAX_DEVICE_BATCH = {"cpu": 16, "cuda": 64}  # rows per forward pass when unset; lowered until it divides, and fits a GPU
DEFAULT_GPU_BYTES = 80e9  # when planning for a GPU that is not there
USABLE_MEMORY = 0.85  # of a GPU: the rest is for temporaries and fragmentation


@dataclass(frozen=True)
class Plan:
    """Sizes and rates of a run. Batches and steps count tokens, rows and optimizer steps over all processes."""

    params: dict[str, int]
    params_total: int
    params_scaling: int
    flops_per_token: int
    total_batch_size: int
    device_batch_size: int
    grad_accum_steps: int
    rows_per_step: int
    seq_len: int
    world_size: int
    steps: int
    tokens: int
    flops: int
    lr: dict[str, float]
    weight_decay: float
    memory_bytes: dict[str, int]


def meta_model(cfg: ModelConfig) -> GPT:
    """The model without storage, for counting."""
    with torch.device("meta"):
        return GPT(cfg)


def scaling_params(model: GPT) -> int:
    counts = model.num_params()
    return counts["transformer_matrices"] + counts["lm_head"]


def _reference(cfg: ModelConfig) -> ModelConfig:
    """The depth that the laws are anchored at, with this model's other settings."""
    return dataclasses.replace(cfg, depth=schedule.DEPTH_REF, d_model=None, n_kv_head=None)


def make_plan(
    cfg: Config, *, device_type: str, world_size: int = 1, compute_dtype: torch.dtype = torch.float32
) -> Plan:
    """Derives every unset size; ValueError, naming sizes that would work, when the given ones do not fit together."""
    for name in ("steps", "total_batch_size", "device_batch_size", "target_flops"):
        value = getattr(cfg, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}: expected a positive number")
    if not cfg.ratio > 0:
        raise ValueError(f"ratio is {cfg.ratio}: expected a positive number of tokens per parameter")
    model = meta_model(cfg.model)
    counts, n_scaling, flops_per_token = model.num_params(), scaling_params(model), model.flops_per_token()
    n_scaling_ref = scaling_params(meta_model(_reference(cfg.model)))
    batch = cfg.total_batch_size or schedule.batch_tokens(n_scaling, n_scaling_ref)
    rows = _rows_per_step(cfg, batch, world_size)

    def memory(device_batch: int) -> dict[str, int]:
        return predict_memory(cfg.model, counts, device_batch, compute_dtype, device_type, fp8_head=cfg.fp8_head)

    device_batch = _device_batch(cfg, rows // world_size, device_type, lambda n: memory(n)["total"])
    steps = schedule.horizon(
        steps=cfg.steps,
        target_flops=cfg.target_flops,
        ratio=cfg.ratio,
        params_scaling=n_scaling,
        flops_per_token=flops_per_token,
        batch=batch,
    )
    if steps < 1:
        raise ValueError(f"the horizon is {steps} steps of {batch} tokens: raise --steps, --target-flops or --ratio")
    tokens, tokens_ref = int(cfg.ratio * n_scaling), int(cfg.ratio * n_scaling_ref)
    decay = cfg.optim.weight_decay
    if cfg.optim.scaling_laws:
        decay = schedule.muon_weight_decay(decay, batch, tokens, tokens_ref)
    return Plan(
        params=counts,
        params_total=sum(counts.values()),
        params_scaling=n_scaling,
        flops_per_token=flops_per_token,
        total_batch_size=batch,
        device_batch_size=device_batch,
        grad_accum_steps=rows // (world_size * device_batch),
        rows_per_step=rows,
        seq_len=cfg.model.seq_len,
        world_size=world_size,
        steps=steps,
        tokens=steps * batch,
        flops=steps * batch * flops_per_token,
        lr=learning_rates(cfg.optim, model.dims.d_model, batch),
        weight_decay=decay,
        memory_bytes=memory(device_batch),
    )


def smaller_device_batch(plan: Plan) -> int | None:
    """The next smaller device batch that divides the rows of a process; None below one row."""
    rows = plan.device_batch_size * plan.grad_accum_steps
    return max((n for n in _divisors(rows) if n < plan.device_batch_size), default=None)


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def _rows_per_step(cfg: Config, batch: int, world_size: int) -> int:
    streams, seq_len = cfg.data.num_streams, cfg.model.seq_len
    if streams < 1 or streams % world_size:
        raise ValueError(
            f"{streams} data streams do not divide over {world_size} processes: "
            f"start one of {_divisors(streams) if streams > 0 else [1]} processes, or set --num-streams to a multiple"
        )
    unit = seq_len * streams
    if batch % unit:
        below, above = batch // unit * unit, (batch // unit + 1) * unit
        good = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"total_batch_size is {batch} tokens: expected a multiple of {unit} "
            f"(seq_len {seq_len} x {streams} streams), such as {good}"
        )
    return batch // seq_len


def _device_batch(cfg: Config, rows_per_rank: int, device_type: str, memory: Callable[[int], int]) -> int:
    asked = cfg.device_batch_size
    if asked is not None:
        if rows_per_rank % asked:
            raise ValueError(
                f"device_batch_size is {asked} rows: each process has {rows_per_rank} rows per step, "
                f"so one of {_divisors(rows_per_rank)} works"
            )
        return asked
    candidates = [n for n in _divisors(rows_per_rank) if n <= MAX_DEVICE_BATCH[device_type]]
    if device_type == "cuda":
        there = torch.cuda.is_available()
        total = torch.cuda.get_device_properties(0).total_memory if there else DEFAULT_GPU_BYTES
        candidates = [n for n in candidates if memory(n) <= USABLE_MEMORY * total] or candidates[:1]
    return candidates[-1]


def predict_memory(
    cfg: ModelConfig,
    counts: dict[str, int],
    device_batch: int,
    dtype: torch.dtype,
    device_type: str,
    *,
    fp8_head: bool = False,
) -> dict[str, int]:
    """Bytes per process at the peak: weights, gradients (fp32), optimizer state, activations kept for backward, loss.

    Activations count what autograd keeps in the reference path; the peak of the optimizer's own temporaries is not in it.
    """
    d, width = dims(cfg), torch.empty((), dtype=dtype).element_size()
    matrices, head = counts["transformer_matrices"], counts["lm_head"]
    tables = counts["wte"] + counts["value_embeds"]
    low = 2 if width == 2 else 0
    tokens = device_batch * d.seq_len
    memory = {
        "weights": (matrices + head + tables) * width + counts["scalars"] * 4,
        "gradients": sum(counts.values()) * 4,
        "optimizer": matrices * (4 + low) + head * (8 + low) + tables * 2 * width + counts["scalars"] * 8,
        "activations": tokens * _activation_bytes_per_token(cfg, width),
        # with the gradient of the last hidden state; copies of the head in fp8
        "loss": reference_bytes(tokens, d.d_model, d.padded_vocab, device_type)
        + tokens * d.d_model * width
        + 2 * fp8_head * d.padded_vocab * d.d_model,
    }
    return memory | {"total": sum(memory.values())}


def _activation_bytes_per_token(cfg: ModelConfig, width: int) -> int:
    """What autograd keeps of one token between forward and backward, statistics of one number per head or row left out."""
    d = dims(cfg)
    elements = 5 * d.d_model  # embedding, smear and its input, the sum under the last norm, its output
    for layer in range(d.n_layer):
        # entry sum, norm, attention output, residual sum, second norm; the stream that a lambda scales
        elements += (5 + cfg.resid_lambdas) * d.d_model
        elements += (cfg.rope + cfg.qk_norm) * (d.d_model + d.d_kv)  # q and k after each
        elements += 2 * d.d_ff
        if layer in d.ve_layers:
            elements += 2 * d.d_kv  # mixed values and the embeddings they came from
        if layer not in d.ve_layers or not cfg.rope:
            elements += d.d_model + 2 * d.d_kv  # v (or q) is a view that keeps the whole projection
    return width * elements
