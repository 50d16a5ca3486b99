"""The plan of a run: everything a config implies before any data or weight exists. `--dry-run` prints it.

Arithmetic on the config and the parameter table, following nanochat 92d63d4, scripts/base_train.py: width and windows
follow depth (`dims`), the batch follows parameters, the horizon follows parameters and batch, rates and decay follow
all of them.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from core import schedule
from core.config import Config, ModelConfig, RaceConfig, check_ranges
from core.data.loader import check_batch, divisors
from core.fp8 import Recipe
from core.models.gpt2 import COUNTED, GPT, SCALING, dims, flops_per_token, fp8_choices, parameter_table
from core.optim import learning_rates
from core.params import MUON, Table, arenas, num_params, state_bytes, weight_bytes
from core.sharding import deal
from core.stopping import UserError
from kernels.lm_head_loss import reference_bytes
from kernels.op import Op

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
    fp8: tuple[str, ...]  # which matrices of the layers multiply in fp8, and why the others do not

    def tokens_after(self, step: int) -> int:
        """Of all steps that follow it."""
        return (self.steps - step - 1) * self.total_batch_size


def scaling_params(cfg: ModelConfig) -> int:
    """Parameters that the scaling laws count."""
    counts = num_params(parameter_table(cfg), COUNTED)
    return sum(counts[kind] for kind in SCALING)


def _reference(cfg: ModelConfig) -> ModelConfig:
    """The depth that the laws are anchored at, with this model's other settings."""
    return dataclasses.replace(cfg, depth=schedule.DEPTH_REF, d_model=None, n_kv_head=None)


def make_plan(
    cfg: Config, *, device_type: str, world_size: int = 1, compute_dtype: torch.dtype = torch.float32
) -> Plan:
    """Derives every unset size; UserError, naming sizes that would work, when the given ones do not fit together."""
    check_ranges(cfg)
    if not cfg.ratio > 0:
        raise UserError(f"ratio is {cfg.ratio}: expected a positive number of tokens per parameter")
    table = parameter_table(cfg.model)
    n_scaling, n_scaling_ref = scaling_params(cfg.model), scaling_params(_reference(cfg.model))
    flops = flops_per_token(cfg.model)

    # 1. tokens a step: a power of two that grows with the model
    batch = cfg.total_batch_size or schedule.batch_tokens(n_scaling, n_scaling_ref)
    sizes = {"num_streams": cfg.data.num_streams, "world_size": world_size}
    check_batch(batch, cfg.model.seq_len, 1, **sizes)
    rows = batch // cfg.model.seq_len

    # 2. rows a forward pass: as asked, else what divides and fits
    def memory(device_batch: int) -> dict[str, int]:
        return predict_memory(
            cfg.model, device_batch, compute_dtype, device_type,
            fp8_head=cfg.fp8_head, recipe=Recipe.of(cfg), graph_optimizer=cfg.graph_optimizer, recompute=cfg.recompute,
            world_size=world_size,
        )  # fmt: skip

    device_batch = _device_batch(cfg, rows // world_size, device_type, lambda n: memory(n)["total"])
    check_batch(batch, cfg.model.seq_len, device_batch, **sizes)

    # 3. the horizon, and a decay that depends on it
    steps = schedule.horizon(
        steps=cfg.steps,
        target_flops=cfg.target_flops,
        ratio=cfg.ratio,
        params_scaling=n_scaling,
        flops_per_token=flops,
        batch=batch,
    )
    if steps < 1:
        raise UserError(f"the horizon is {steps} steps of {batch} tokens: raise --steps, --target-flops or --ratio")
    tokens, tokens_ref = int(cfg.ratio * n_scaling), int(cfg.ratio * n_scaling_ref)
    decay = cfg.optim.weight_decay
    if cfg.optim.scaling_laws:
        decay = schedule.muon_weight_decay(decay, batch, tokens, tokens_ref)
    return Plan(
        params=num_params(table, COUNTED),
        params_total=sum(p.numel for p in table),
        params_scaling=n_scaling,
        flops_per_token=flops,
        total_batch_size=batch,
        device_batch_size=device_batch,
        grad_accum_steps=rows // (world_size * device_batch),
        rows_per_step=rows,
        seq_len=cfg.model.seq_len,
        world_size=world_size,
        steps=steps,
        tokens=steps * batch,
        flops=steps * batch * flops,
        lr=learning_rates(cfg.optim, dims(cfg.model).d_model, batch),
        weight_decay=decay,
        memory_bytes=memory(device_batch),
        fp8=_fp8(cfg),
    )


def _fp8(cfg: Config) -> tuple[str, ...]:
    """A line for each kind of matrix; none of a run that is not in fp8. UserError where nothing would be."""
    recipe = Recipe.of(cfg)
    if recipe is None:
        if Recipe(cfg.fp8_scales, cfg.fp8_bf16_ends) != Recipe():
            raise UserError("--fp8-scales and --fp8-bf16-ends are of --precision fp8: give it too, or leave them out")
        return ()
    found = fp8_choices(cfg.model, recipe)
    if not any(choice.converts for choice in found):
        first = found[0]
        raise UserError(
            f"--precision fp8: no matrix of the layers converts ({first.kind} {first.shape}: {first.reason}); use "
            "--precision bf16, or a wider or deeper model"
        )
    return tuple(map(str, found))


def smaller_device_batch(plan: Plan) -> int | None:
    """The next smaller device batch that divides the rows of a process; None below one row."""
    rows = plan.device_batch_size * plan.grad_accum_steps
    return max((n for n in divisors(rows) if n < plan.device_batch_size), default=None)


def _device_batch(cfg: Config, rows_per_rank: int, device_type: str, memory: Callable[[int], int]) -> int:
    """Rows as asked for, or the most that divide those of a rank and fit a GPU. UserError where they cannot fit the GPU
    that is there: before anything is built or compiled."""
    candidates = [n for n in divisors(rows_per_rank) if n <= MAX_DEVICE_BATCH[device_type]]
    if device_type == "cpu":
        return cfg.device_batch_size or candidates[-1]
    there = torch.cuda.is_available()
    total = torch.cuda.get_device_properties(0).total_memory if there else DEFAULT_GPU_BYTES
    fitting = [n for n in candidates if memory(n) <= USABLE_MEMORY * total]
    asked = cfg.device_batch_size or (fitting or candidates[:1])[-1]
    if there and memory(asked) > total:
        rest = [] if cfg.recompute else ["--recompute"]
        rest += [f"--device-batch-size {fitting[-1]}"] if fitting else ["a shorter --seq-len", "a smaller model"]
        raise UserError(
            f"{asked} rows per forward pass need {memory(asked) / 1e9:.1f} GB by prediction, the GPU has "
            f"{total / 1e9:.1f}: try {' or '.join(rest)}"
        )
    return asked


def is_compiled(cfg: Config | RaceConfig, device_type: str) -> bool:
    """Whether training goes through torch.compile: unset, on a GPU. On a CPU it takes longer than the quickstart."""
    return device_type == "cuda" if cfg.compile is None else cfg.compile


def predict_memory(
    cfg: ModelConfig,
    device_batch: int,
    dtype: torch.dtype,
    device_type: str,
    *,
    fp8_head: bool = False,
    recipe: Recipe | None = None,
    graph_optimizer: bool = False,
    recompute: bool = False,
    world_size: int = 1,
) -> dict[str, int]:
    """Bytes per process at the peak: weights, gradients (their fp32 sums), optimizer state, copies of weights in fp8,
    activations kept for backward, loss, and what the optimizer's temporaries need besides. Of several processes, each
    has its share of the state, side by side with copies of its weights and gradients, and what is exchanged of a stage
    at a time.

    The loss is at its peak when all activations are there. Temporaries come when both are gone, so only what they need
    more counts, unless a CUDA graph of the update keeps their memory. Backward adds gradients of weights to their sums
    where they are made, compiled or not, so it holds no others but those of a few small parameters.
    """
    d, table = dims(cfg), parameter_table(cfg)
    tokens = device_batch * d.seq_len
    memory = {
        "weights": weight_bytes(table, dtype),
        "gradients": sum(p.numel for p in table) * 4,
        "optimizer": state_bytes(table, dtype),
        "activations": activation_bytes(cfg, device_batch, dtype, device_type, recipe, recompute),
        # with the gradient of the last hidden state
        "loss": reference_bytes(tokens, d.d_model, d.padded_vocab, device_type) + tokens * d.d_model * dtype.itemsize,
    }
    if recipe or fp8_head:
        chosen = fp8_choices(cfg, recipe) if recipe else []
        # of all layers, also where the first and last stay in bf16
        converting = {choice.kind for choice in chosen if choice.converts}
        banks = sum(p.numel for p in table if p.name.partition(".")[0] in converting)
        memory["fp8 weights"] = 2 * (banks + fp8_head * d.padded_vocab * d.d_model)
    free = 0 if graph_optimizer else memory["activations"] + memory["loss"]
    update = _update_bytes(table, dtype, world_size)
    if world_size > 1:
        bounds = deal(table, world_size).bounds
        owned = [p for p in table if p.name in bounds]
        shared = state_bytes(owned, dtype) - state_bytes(owned, dtype) // world_size
        memory["optimizer"] -= shared
        memory["owned"] = (weight_bytes(owned, dtype) + 4 * sum(p.numel for p in owned)) // world_size
        # what leaves, of all banks, since the host is far ahead of the GPU, and what has come, of those of the same
        # layers; or both of tables after backward
        banks = Counter[str]()
        for p in owned:
            if p.group == MUON:
                banks[p.name.partition(".")[2]] += p.numel
        memory["exchange"] = dtype.itemsize * (sum(banks.values()) + max(banks.values(), default=0))
        update = max(update, 2 * dtype.itemsize * sum(p.numel for p in owned if p.group != MUON))
    memory["update"] = max(update - free, 0)
    return memory | {"total": sum(memory.values())}


def _update_bytes(table: Table, dtype: torch.dtype, ranks: int = 1) -> int:
    """What Polar Express is given, or has made of it, for the matrices of every shape; and of one shape the matrices of
    a step and of the next, and two Gram matrices. AdamW's kernel has no temporaries."""
    counts = Counter[tuple[int, int]]()
    for arena in arenas(table):
        for view in arena.views:
            K, R, C = view.stored(arena.shape)
            counts[R, C] += -(-K // ranks)
    all_shapes = sum(K * R * C for (R, C), K in counts.items())
    one_shape = max((2 * K * (R * C + min(R, C) ** 2) for (R, C), K in counts.items()), default=0)
    return (all_shapes + one_shape) * dtype.itemsize


class _KernelsOfGPU:
    """Stands for `Backends` where the plan is for a GPU that need not be there."""

    def choose(self, op: Op, *shape: int) -> Callable[..., Any]:
        return op.backends.get("triton", op.backends["ref"])

    choose_fitting = choose

    def choose_many(self, op: Op, problems: Sequence[Any]) -> Callable[..., Any]:
        return op.checked_many("triton")


def activation_bytes(
    cfg: ModelConfig,
    rows: int,
    dtype: torch.dtype,
    device_type: str,
    recipe: Recipe | None = None,
    recompute: bool = False,
) -> int:
    """Bytes that autograd keeps of `rows` rows between forward and backward; where layers are recomputed, with what one
    of them keeps.

    They grow linearly from two rows on (one row has fewer copies: more of its views are contiguous)."""
    first, second = (_count_saved(cfg, min(rows, n), dtype, device_type, recipe, recompute) for n in (2, 3))
    return first + max(rows - 2, 0) * (second - first)


@functools.cache
def _count_saved(
    cfg: ModelConfig, rows: int, dtype: torch.dtype, device_type: str, recipe: Recipe | None, recompute: bool
) -> int:
    """Runs the model's forward on tensors without storage and counts what is saved for backward: on a CPU by the
    references, on a GPU by the Triton kernels, whose attention needs no mask in memory (dense masks are a third of what
    24 layers of one row of 2048 tokens keep on a CPU)."""
    saved: dict[StorageWeakRef, int] = {}
    within: list[dict[StorageWeakRef, int]] = []  # recomputed layers, each by itself

    def keep(t: Tensor, into: dict[StorageWeakRef, int] = saved) -> Tensor:
        storage = t.untyped_storage()
        into[StorageWeakRef(storage)] = storage.nbytes()
        return t

    def layer_alone(layer: Callable[..., Any], *state: Any) -> Any:
        """Keeps a layer's inputs, and counts what it keeps beside these while it is recomputed."""
        for t in state:
            if isinstance(t, Tensor):
                keep(t)
        own: dict[StorageWeakRef, int] = {}
        within.append(own)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: keep(t, own), lambda t: t):
            return layer(*state)

    with FakeTensorMode():
        model = GPT(cfg, _KernelsOfGPU() if device_type == "cuda" else None, rows, recipe=recipe)
        for row in model.table:
            p = model.get_parameter(row.name)
            p.data = p.data.to(row.dtype(dtype))
        if recompute:
            model.run_layer = layer_alone
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            hidden = model.hidden(torch.zeros(rows, cfg.seq_len, dtype=torch.int64))
        for t in (*model.parameters(), *model.buffers()):
            for kept in (saved, *within):
                kept.pop(StorageWeakRef(t.untyped_storage()), None)
        assert hidden.requires_grad
        alone = [sum(size for storage, size in own.items() if storage not in saved) for own in within]
    return sum(saved.values()) + max(alone, default=0)
