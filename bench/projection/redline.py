"""Redline's own step: the gpt2 preset from its ops' costs, and measurements of these ops in place of assumptions."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.projection.machine import (
    BF16,
    FLOPS,
    GPUS,
    HBM,
    Cost,
    Measured,
    Row,
    Workload,
    attention,
    collectives,
    linears,
    mean_keys,
    newton_schulz,
    one_pass,
    products,
    workload,
)  # fmt: skip
from core.config import preset
from core.models.gpt2 import dims, parameter_table
from core.params import Table, arenas
from core.plan import make_plan
from kernels.adam_update import adam_update_cost
from kernels.embedding import embedding_cost
from kernels.lm_head_loss import lm_head_loss_cost
from kernels.muon_update import muon_apply_cost, muon_momentum_cost
from kernels.ops import BY_NAME
from kernels.polar_express import polar_express_cost
from kernels.relu2_mlp import relu2_mlp_cost
from kernels.rms_norm import rms_norm_cost
from kernels.rope_qk_norm import rope_qk_norm_cost

RESULTS = Path(__file__).parent.parent / "results"
BASELINES = Path(__file__).parent.parent / "baselines"


def redline(depth: int = 24, target: bool = False, gpus: int = GPUS, fa3: bool = False) -> Workload:
    """The gpt2 preset on H100s at ratio 8, as core/ does it today in bf16, or as it is meant to become.

    fa3: in bf16 with FlashAttention 3 installed. target: in fp8 with it, a sharded optimizer and bf16 communication of
    which backward hides 70 %.
    """
    cfg = preset("gpt2", "cuda")
    cfg = dataclasses.replace(cfg, ratio=8.0, device_batch_size=16, model=dataclasses.replace(cfg.model, depth=depth))
    plan = make_plan(cfg, device_type="cuda", world_size=gpus, compute_dtype=BF16)
    d, micro, B = dims(cfg.model), plan.grad_accum_steps, plan.device_batch_size
    L, C, F, V, T, ve = d.n_layer, d.d_model, d.d_ff, d.padded_vocab, d.seq_len, len(d.ve_layers)
    M, on_gpu, n = B * T, micro * B * T, L * micro
    stream, params = 2 * C * on_gpu, plan.params_total
    weights = plan.params_scaling

    def op(
        cost, name: str, shape: tuple[int, ...], form: str, direction: str, count: int, group: str = "passes"
    ) -> Row:
        flops, nbytes = cost(shape, BF16, form, direction == "backward")
        label = f"{name} ({form}), {direction}"
        key = Cost(name, form, direction, shape)
        return Row(label, group, "kernel pass", count * flops, count * nbytes, kernels=count, cost=key)

    heads = (B, T, d.n_head, d.n_kv_head, d.d_head)
    # weight gradients are added to fp32 sums by the products that make them: 8 bytes an element, which they hide
    rows = linears("qkv, o", "products", M, [(C, C + 2 * d.d_kv), (C, C)], n, target)
    if target:
        rows += linears("MLP", "products", M, [(C, F), (F, C)], n, True)
        rows += linears("lm_head", "head", M, [(C, V)], micro, True)
    else:
        up, down, wgrad = (1, M, F, C), (1, M, C, F), (1, F, C, M)
        for direction, shapes in (("forward", [up, down]), ("backward", [up, down, wgrad, wgrad])):
            row = op(relu2_mlp_cost, "relu2_mlp", (M, C, F), "plain", direction, n)
            kept = {"op": row.op, "flops": row.flops, "nbytes": row.nbytes, "cost": row.cost}
            rows.append(dataclasses.replace(products("", "products", shapes, n), **kept))
        row = op(lm_head_loss_cost, "lm_head_loss", (M, C, V), "mean", "backward", micro)
        shapes = [(1, M, V, C), (1, M, C, V), (1, C, V, M)]
        kept = {"op": "lm_head_loss, gradients included", "flops": row.flops, "nbytes": row.nbytes, "cost": row.cost}
        rows.append(dataclasses.replace(products("", "head", shapes, micro), **kept))
    provider = "" if target or fa3 else "torch "
    rows += attention(on_gpu, C, [mean_keys(w, [T]) for w in d.windows], micro, provider)
    # entry of a layer: the sum after the MLP, x0 and its gradient, first channels for gates; after attention a sum
    entries = {"mix3": L - ve - 1, "mix3_first": ve, "mix": 1, "add": L}
    for direction in ("forward", "backward"):
        for form, layers in entries.items():
            rows.append(op(rms_norm_cost, "rms_norm", (M, C), form, direction, layers * micro))
        for form, layers in (("plain", L - ve), ("value embeddings", ve)):
            rows.append(op(rope_qk_norm_cost, "rope_qk_norm", heads, form, direction, layers * micro))
        table = op(embedding_cost, "embedding", (M, V, C), "sum", direction, micro, "tables")
        values = op(embedding_cost, "embedding", (M, V, ve * d.d_kv), "parts", direction, micro, "tables")
        rows += [table, dataclasses.replace(values, kernels=micro * (1 if direction == "forward" else 2 * ve))]
    rows += [
        one_pass("smear, last norm, middle layer", "passes", 24 * stream, 20 * micro),
        one_pass("zeros for gradients", "weights", 4 * params, 8, "kernel pass"),
    ]
    if target:
        rows += [
            one_pass("norms' copies in fp8", "fp8 casts", 2 * L * C * on_gpu, 0, "kernel pass"),
            one_pass("attention output to fp8", "fp8 casts", 3 * L * C * on_gpu, n, "kernel pass"),
            # q, k, v: read, written, written transposed; every other operand comes from an epilogue or a norm
            one_pass("gradients to fp8 and transposed", "fp8 casts", 4 * 3 * L * C * on_gpu, n, "kernel pass"),
            one_pass("weights to fp8, once", "fp8 casts", 4 * weights, 4 * L, "kernel pass"),
            one_pass("softcap and cross-entropy, one kernel", "head", 3 * V * on_gpu, micro, "kernel pass"),
        ]
    if gpus > 1:
        exposed = {"exposed": 0.3} if target else {}
        name = "reduce-scatter, all-gather in bf16, 30 % exposed" if target else "all-reduce of gradients in bf16"
        # rounded; besides, today: divided, copied onto themselves, and back
        moved = 6 if target else 6 + 4 + 4 + 6
        rows += [
            one_pass("gradients to bf16", "weights", moved * params, 4 * 8, "kernel pass"),
            collectives(name, 2 * 2 * params, 2 * 4 * 7 if target else 2 * 8, **exposed),
        ]
    ranks = gpus if target else 1  # that share the optimizer; today each updates everything
    rows += optimizer(parameter_table(cfg.model), ranks)
    name = f"Redline d{depth}, " + ("target: fp8, sharded" if target else "today: bf16, replicated")
    if gpus == 1:
        name = f"Redline d{depth}, today: bf16, {'FA3, ' if fa3 else ''}one H100"
    return workload(name, rows, tokens=plan.total_batch_size, steps=plan.steps)


def optimizer(table: Table, ranks: int) -> list[Row]:
    """One update of every parameter, by the ops that core/optim.py calls for whole arenas, divided over ranks."""
    parts: dict[str, list[Row]] = {"polar_express": [], "muon_momentum": [], "muon_apply": [], "adam_update": []}

    def add(name: str, cost: Callable[..., tuple[int, int]], form: str, shape: tuple[int, ...], like: Row) -> None:
        flops, nbytes = cost(shape, BF16, form)
        key = Cost(name, form, "forward", shape)
        parts[name].append(dataclasses.replace(like, op=name, flops=flops, nbytes=nbytes, cost=key))

    for arena in arenas(table):
        if not arena.views:
            form, n = "master" if arena.params[0].mastered else "plain", math.prod(arena.shape)
            add("adam_update", adam_update_cost, form, (n,), one_pass("", "optimizer", 0, 1, "kernel pass"))
            continue
        for view in arena.views:
            shape = view.stored(arena.shape)
            add("polar_express", polar_express_cost, "plain", shape, newton_schulz(*shape, symmetric=True))
            for run, turn in arena.turned():
                part = (run.stop - run.start, *shape[1:])
                form = "transposed" if turn.transposed else "rows"
                row = one_pass("", "optimizer", 0, 3 if turn.transposed else 2, "kernel pass")
                add("muon_momentum", muon_momentum_cost, form, part, row)
            add("muon_apply", muon_apply_cost, "rows", shape, one_pass("", "optimizer", 0, 3, "kernel pass"))
    rows = []
    for part in parts.values():
        flops, nbytes, kernels = (sum(getattr(r, field) for r in part) for field in ("flops", "nbytes", "kernels"))
        share = {"flops": flops / ranks, "nbytes": nbytes / ranks, "kernels": math.ceil(kernels / ranks)}
        fit = flops / sum(r.flops / r.fit for r in part)
        # the largest stands for all where a measurement is looked up
        rows.append(dataclasses.replace(max(part, key=lambda r: r.nbytes), fit=fit, **share))
    return rows


def read_results(folder: Path = RESULTS) -> list[dict]:
    """The newest right result of each backend, case and direction on an H100 or H200 SXM, of all devices' ops.jsonl."""
    newest: dict[tuple, dict] = {}
    for file in sorted(folder.glob("*/ops.jsonl")):
        for line in filter(None, map(str.strip, file.read_text().splitlines())):
            r = json.loads(line)
            sxm = gpu_of(r) and not any(other in r["device"] for other in ("PCIe", "NVL"))
            if not sxm or r.get("error") or r["backend"] not in ("ref", "triton", "cuda") or r["dtype"] != "bfloat16":
                continue
            key = (r["device"], r["op"], r["form"], r["direction"], tuple(r["shape"]), r["backend"])
            if key not in newest or r["date"] >= newest[key]["date"]:
                newest[key] = r
    return list(newest.values())


def gpu_of(result: dict) -> str | None:
    return next((gpu for gpu in HBM if gpu in result["device"]), None)


def read_models(folder: Path = BASELINES) -> list[dict]:
    """What bench/kernel_model.py predicted of the compiled kernels, as the newest baseline of bench.static keeps it."""
    files = sorted(folder.glob("triton-*.json"), key=lambda file: [int(n) for n in file.stem[7:].split(".")])
    if not files:
        return []
    found, source = [], f"model, {files[-1].stem}"
    for key, row in json.loads(files[-1].read_text())["roofline"].items():
        name, case, form, dtype, direction = key.split(" / ")
        if dtype != "bfloat16" or "predicted_us" not in row or case not in BY_NAME[name].cases:
            continue
        shape = BY_NAME[name].cases[case]
        found.append({"op": name, "form": form, "direction": direction, "shape": shape, "source": source} | row)
    return found


def with_measurements(w: Workload, results: Sequence[dict], models: Sequence[dict] = ()) -> Workload:
    """The workload with the results' efficiencies: at the nearest shape, an H100's first, of the fastest backend. Where
    nothing was measured, with those that a model of the compiled kernels predicts."""

    def nearest(row: Row, candidates: Sequence[dict]) -> list[dict]:
        c = row.cost
        same = [r for r in candidates if c and (r["op"], r["form"], r["direction"]) == (c.op, c.form, c.direction)]
        far = {id(r): sum(abs(math.log(a / b)) for a, b in zip(r["shape"], c.shape)) for r in same}
        return sorted(same, key=lambda r: far[id(r)])

    def measured(row: Row) -> Measured | None:
        if same := nearest(row, results):
            first = [r for r in same if r["shape"] == same[0]["shape"]]
            best = min(first, key=lambda r: (gpu_of(r), r["us"]))
            least = max(best["flops"] / FLOPS["bf16"], best["bytes"] / HBM[gpu_of(best)])
            return Measured(least / (1e-6 * best["us"]), f"measured ({best['device']}, {best['commit']})")
        if same := nearest(row, models):
            return Measured(same[0]["us"] / same[0]["predicted_us"], same[0]["source"])
        return None

    return dataclasses.replace(w, rows=tuple(dataclasses.replace(row, measured=measured(row)) for row in w.rows))
