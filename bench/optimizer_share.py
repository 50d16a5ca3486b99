"""What share of a training step the optimizer is, from the ops' costs: `python -m bench.optimizer_share`. A prediction, no measurement.

Products at PRODUCTS of an H100's bf16 peak, memory at MEMORY of its bandwidth, forward and backward at STEP of the peak, on 8
GPUs. "whole": each updates everything, as core/optim.py does; "eighth": each an eighth, communication left out.
"""

import dataclasses

import torch

from core.config import preset
from core.model import GPT
from core.optim import group_of, muon_views
from core.plan import make_plan
from kernels.adam_update import adam_update_cost
from kernels.muon_update import muon_apply_cost, muon_momentum_cost
from kernels.polar_express import polar_express_cost

PEAK_FLOPS, PEAK_BYTES = 989e12, 3.35e12
PRODUCTS, MEMORY, STEP = 0.6, 0.85, 0.5
GPUS = 8
BF16 = torch.bfloat16


def optimizer_ms(model: GPT) -> dict[str, float]:
    """Milliseconds of one update of everything on one GPU, by op."""
    ms = dict.fromkeys(("polar_express", "muon_update", "adam_update"), 0.0)
    for name, p in model.named_parameters():
        kind = group_of(name)
        if kind != "matrices":
            form = "master" if kind == "lm_head" else "plain"
            ms["adam_update"] += 1e3 * adam_update_cost((p.numel(),), BF16, form)[1] / (MEMORY * PEAK_BYTES)
            continue
        for view in muon_views(name, model.dims):
            shape = tuple(view.take(p).shape)
            ms["polar_express"] += 1e3 * polar_express_cost(shape, BF16)[0] / (PRODUCTS * PEAK_FLOPS)
            for cost in (muon_momentum_cost, muon_apply_cost):
                ms["muon_update"] += 1e3 * cost(shape, BF16)[1] / (MEMORY * PEAK_BYTES)
    return ms


def main() -> None:
    rows = []
    for depth in (12, 24):
        cfg = preset("gpt2", "cuda")
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, depth=depth))
        plan = make_plan(cfg, device_type="cuda", world_size=GPUS, compute_dtype=BF16)
        with torch.device("meta"):
            ms = optimizer_ms(GPT(cfg.model))
        step = 1e3 * plan.total_batch_size * plan.flops_per_token / GPUS / (STEP * PEAK_FLOPS)
        for how, part in (("whole", 1), ("eighth", GPUS)):
            parts = {name: t / part for name, t in ms.items()}
            rows.append({"depth": depth, "each GPU": how, "forward+backward ms": step, **parts})
            rows[-1]["share %"] = 100 * sum(parts.values()) / (step + sum(parts.values()))
    print(*rows[0], sep="  ")
    for row in rows:
        print(
            *(f"{v:>{len(name)}.2f}" if isinstance(v, float) else f"{v:>{len(name)}}" for name, v in row.items()),
            sep="  ",
        )


if __name__ == "__main__":
    main()
