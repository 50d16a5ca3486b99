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
    table_gradients,
    workload,
)  # fmt: skip
from core.config import preset
from core.models.gpt2 import dims, parameter_table
from core.params import MUON, Table
from core.plan import make_plan
from kernels.adam_update import adam_update_cost
from kernels.lm_head_loss import chunk_rows
from kernels.muon_update import muon_apply_cost, muon_momentum_cost
from kernels.polar_express import polar_express_cost
from kernels.relu2_mlp import relu2_mlp_cost
from kernels.rms_norm import rms_norm_cost
from kernels.rope_qk_norm import rope_qk_norm_cost

RESULTS = Path(__file__).parent.parent / "results"


def redline(depth: int = 24, target: bool = False) -> Workload:
    """The gpt2 preset on 8 H100s at ratio 8, as core/ does it today in bf16, or as it is meant to become.

    target: in fp8 with FA3's attention, a sharded optimizer and bf16 communication of which backward hides 70 %.
    """
    cfg = preset("gpt2", "cuda")
    cfg = dataclasses.replace(cfg, ratio=8.0, device_batch_size=16, model=dataclasses.replace(cfg.model, depth=depth))
    plan = make_plan(cfg, device_type="cuda", world_size=GPUS, compute_dtype=BF16)
    d, micro, B = dims(cfg.model), plan.grad_accum_steps, plan.device_batch_size
    L, C, F, V, T, ve = d.n_layer, d.d_model, d.d_ff, d.padded_vocab, d.seq_len, len(d.ve_layers)
    M, on_gpu, n = B * T, micro * B * T, L * micro
    stream, params = 2 * C * on_gpu, plan.params_total
    weights, tables = plan.params_scaling, plan.params["wte"] + plan.params["value_embeds"]

    def op(cost, name: str, shape: tuple[int, ...], form: str, direction: str, count: int) -> Row:
        flops, nbytes = cost(shape, BF16, form, direction == "backward")
        label = f"{name} ({form}), {direction}"
        key = Cost(name, form, direction, shape)
        return Row(label, "passes", "kernel pass", count * flops, count * nbytes, kernels=count, cost=key)

    heads = (B, T, d.n_head, d.n_kv_head, d.d_head)
    rows = linears("qkv, o", "products", M, [(C, C + 2 * d.d_kv), (C, C)], n, target)
    if target:
        rows += linears("MLP", "products", M, [(C, F), (F, C)], n, True)
    else:
        up, down, wgrad = (1, M, F, C), (1, M, C, F), (1, F, C, M)
        for direction, shapes in (("forward", [up, down]), ("backward", [up, down, wgrad, wgrad])):
            row = op(relu2_mlp_cost, "relu2_mlp", (M, C, F), "plain", direction, n)
            kept = {"op": row.op, "flops": row.flops, "nbytes": row.nbytes, "cost": row.cost}
            rows.append(dataclasses.replace(products("", "products", shapes, n), **kept))
    rows += linears("lm_head", "head", M, [(C, V)], micro, target)
    rows += attention(on_gpu, C, [mean_keys(w, [T]) for w in d.windows], micro, "" if target else "torch ")
    for form, calls in {"mix_fp8": 2 * n}.items() if target else {"mix": n, "add": n}.items():
        rows.append(op(rms_norm_cost, "rms_norm", (M, C), form, "forward", calls))
    for form in ("mix", "add"):
        rows.append(op(rms_norm_cost, "rms_norm", (M, C), form, "backward", n))
    for form, layers in (("plain", L - ve), ("value embeddings", ve)):
        for direction in ("forward", "backward"):
            rows.append(op(rope_qk_norm_cost, "rope_qk_norm", heads, form, direction, layers * micro))
    rows += [
        one_pass("gradient of x0 summed", "passes", 2 * L * stream, n),  # rms_norm counts one of the three
        one_pass("embedding, smear, last norm", "passes", 24 * stream, 20 * micro),
        # all layers' rows are gathered at once; their gradients are joined again
        one_pass("value embeddings gathered, gradients joined", "tables", 4 * ve * stream, 2 * micro),
        table_gradients(tables, C * (1 + ve), M, micro, 0),
    ]
    if target:
        rows += [
            one_pass("attention output to fp8", "fp8 casts", 3 * L * C * on_gpu, n, "kernel pass"),
            # q, k, v: read, written, written transposed; every other operand comes from an epilogue or a norm
            one_pass("gradients to fp8 and transposed", "fp8 casts", 4 * 3 * L * C * on_gpu, n, "kernel pass"),
            one_pass("weights to fp8, once", "fp8 casts", 4 * weights, 4 * L, "kernel pass"),
            one_pass("softcap and cross-entropy, one kernel", "head", 3 * V * on_gpu, micro, "kernel pass"),
            # wgrad adds to the fp32 sum; tables' gradients are added by a pass; all are rounded once
            one_pass(
                "gradients summed", "weights", (micro - 1) * (8 * weights + 10 * tables), 4 * micro, "kernel pass"
            ),
            one_pass("gradients to bf16", "weights", 6 * params, 6 * L, "kernel pass"),
            collectives("reduce-scatter, all-gather in bf16, 30 % exposed", 2 * 2 * params, 2 * 4 * 7, exposed=0.3),
        ]
    else:
        chunks = micro * math.ceil(M / chunk_rows(M, V, C, 2))
        rows += [
            one_pass("sum after the MLP, slices of gates", "passes", (3 * L + 2 * ve) * stream, n + 2 * ve * micro),
            # logits read and overwritten; dw in fp32 read and written by each chunk
            one_pass(
                "softcap, cross-entropy, sums of dw", "head", 4 * V * on_gpu + 8 * V * C * chunks, chunks, "kernel pass"
            ),
            # Gradients: banks joined, then cast or added to the fp32 sum; for communication rounded, joined, divided,
            # copied
            one_pass("gradients summed", "weights", micro * (4 * weights + 10 * params) - 4 * params, 3 * n),
            one_pass("gradients to bf16, buckets, back", "weights", (6 + 4 + 4 + 4 + 6) * params, 6 * L),
            collectives("all-reduce of gradients in bf16", 2 * 2 * params, 2 * 44),
        ]
    ranks = GPUS if target else 1  # that share the optimizer; today each updates everything
    rows += optimizer(parameter_table(cfg.model), ranks)
    name = f"Redline d{depth}, " + ("target: fp8, sharded" if target else "today: bf16, replicated")
    return workload(name, rows, tokens=plan.total_batch_size, steps=plan.steps)


def optimizer(table: Table, ranks: int) -> list[Row]:
    """One update of every parameter, by the ops that core/optim.py calls, divided over ranks."""
    parts: dict[str, list[Row]] = {"polar_express": [], "muon_momentum": [], "muon_apply": [], "adam_update": []}

    def add(name: str, cost: Callable[..., tuple[int, int]], form: str, shape: tuple[int, ...], like: Row) -> None:
        flops, nbytes = cost(shape, BF16, form)
        key = Cost(name, form, "forward", shape)
        parts[name].append(dataclasses.replace(like, op=name, flops=flops, nbytes=nbytes, cost=key))

    for p in table:
        if p.group != MUON:
            form = "master" if p.mastered else "plain"
            add("adam_update", adam_update_cost, form, (p.numel,), one_pass("", "optimizer", 0, 1, "kernel pass"))
            continue
        for view in p.views:
            shape, form = view.stored(p.shape), "transposed" if view.transposed else "rows"
            add("polar_express", polar_express_cost, "plain", shape, newton_schulz(*shape, symmetric=True))
            for op, cost in (("muon_momentum", muon_momentum_cost), ("muon_apply", muon_apply_cost)):
                add(op, cost, form, shape, one_pass("", "optimizer", 0, 2, "kernel pass"))
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


def with_measurements(w: Workload, results: Sequence[dict]) -> Workload:
    """The workload with the results' efficiencies: at the nearest shape, an H100's first, of the fastest backend."""

    def measured(row: Row) -> Measured | None:
        c = row.cost
        same = [r for r in results if c and (r["op"], r["form"], r["direction"]) == (c.op, c.form, c.direction)]
        if not same:
            return None
        far = {id(r): sum(abs(math.log(a / b)) for a, b in zip(r["shape"], c.shape)) for r in same}
        best = min(same, key=lambda r: (far[id(r)], gpu_of(r), r["us"]))
        least = max(best["flops"] / FLOPS["bf16"], best["bytes"] / HBM[gpu_of(best)])
        return Measured(least / (1e-6 * best["us"]), f"{best['device']}, {best['commit']}")

    return dataclasses.replace(w, rows=tuple(dataclasses.replace(row, measured=measured(row)) for row in w.rows))
