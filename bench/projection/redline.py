"""Redline's own step: the gpt2 preset from its ops' costs, and measurements of these ops in place of assumptions.

In fp8 the costs of rms_norm stand for forms that it has no case of: a sum with its norm in fp8 is, forward, mix_fp8,
which moves the same tensors, and backward add; layers without value embeddings take mix3_fp8, 12 channels more.
"""

import dataclasses
import json
import math
from collections import Counter
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
    Shape,
    Workload,
    attention,
    attention_fit,
    collectives,
    linears,
    mean_keys,
    newton_schulz,
    one_pass,
    products,
    workload,
)  # fmt: skip
from core.config import Config, ModelConfig, preset
from core.fp8 import ACTIVATIONS, GRADIENTS, Recipe
from core.models.gpt2 import dims, fp8_choices, parameter_table
from core.params import Table, arenas
from core.plan import Plan, make_plan
from kernels.adam_update import adam_update_cost
from kernels.muon_update import muon_apply_cost, muon_momentum_cost
from kernels.op import distance
from kernels.ops import BY_NAME
from kernels.polar_express import polar_express_cost
from kernels.windows import visible

RESULTS = Path(__file__).parent.parent / "results"
BASELINES = Path(__file__).parent.parent / "baselines"


# rows of ops


def op(name: str, shape: tuple[int, ...], form: str, direction: str, count: int, group: str = "passes") -> Row:
    """`count` calls of an op, as a pass over memory."""
    flops, nbytes = BY_NAME[name].cost(shape, BF16, form, direction == "backward")
    key = Cost(name, form, direction, shape)
    return Row(f"{name} ({form}), {direction}", group, "kernel pass", count * flops, count * nbytes, 1.0, 1.0, 0.0,
               count, key)  # fmt: skip


def multiplied(
    row: Row, shapes: Sequence[Shape], count: int, kind: str = "bf16 product", cast: float = 0.0
) -> list[Row]:
    """An op that multiplies: its products and, of their own, the bytes that a call casts to fp8 before."""
    kept = {"op": row.op, "flops": row.flops, "nbytes": row.nbytes - count * cast, "cost": row.cost}
    rows = [dataclasses.replace(products("", row.group, shapes, count, kind), **kept)]
    if cast:
        casts = Row(f"{row.op}: cast", "fp8 casts", "kernel pass", nbytes=count * cast, kernels=count, cost=row.cost)
        rows.append(casts)
    return rows


def layers_in_bf16(M: int, C: int, qkv: int, F: int, n: int) -> list[Row]:
    """Products of n layers on M rows. Weight gradients are added to fp32 sums by the products that make them: 8 bytes
    an element, which they hide."""
    rows = linears("qkv, o", "products", M, [(C, qkv), (C, C)], n, False)
    for direction, shapes in mlp_products(M, C, F).items():
        rows += multiplied(op("relu2_mlp", (M, C, F), "plain", direction, n, "products"), shapes, n)
    return rows


def layers_in_fp8(M: int, C: int, qkv: int, F: int, n: int) -> list[Row]:
    """The same in fp8. Inputs of qkv and the MLP come out of the norms in fp8, post and its gradient out of epilogues;
    what attention returns and the gradients of outputs are read in bf16 and written twice."""
    rows, cast = [], 2 + 2
    for form, N in (("given", qkv), ("delayed", C)):
        shapes = {"forward": [(1, M, N, C)], "backward": [(1, M, C, N), (1, N, C, M)]}
        casts = {"forward": cast * M * C if form == "delayed" else 0, "backward": cast * M * N}
        for direction in shapes:
            row = op("fp8_linear", (M, C, N), form, direction, n, "products")
            rows += multiplied(row, shapes[direction], n, "fp8 product", casts[direction])
    for direction, shapes in mlp_products(M, C, F).items():
        row = op("fp8_mlp", (M, C, F), "sum", direction, n, "products")
        rows += multiplied(row, shapes, n, "fp8 product", cast * M * C if direction == "backward" else 0)
    return rows


def own_attention(heads: tuple[int, int, int, int, int], windows: Sequence[int], micro: int) -> list[Row]:
    """Attention by our kernels: one launch forward, two backward."""
    B, T, *_ = heads
    rows = []
    for window, layers in Counter(windows).items():
        for direction, kernels in (("forward", 1), ("backward", 2)):
            n, keys = layers * micro, mean_keys(window, [T])
            row = op("attention", (*heads, visible(T, window), 0), "plain", direction, n, "attention")
            name, fit = f"attention, {window} keys back, {direction}", attention_fit(keys, direction)
            kind = f"own attention {direction}"
            rows.append(dataclasses.replace(row, op=name, kind=kind, fit=fit, kernels=n * kernels))
    return rows


def mlp_products(M: int, C: int, F: int) -> dict[str, list[Shape]]:
    up, down, wgrad = (1, M, F, C), (1, M, C, F), (1, F, C, M)
    return {"forward": [up, down], "backward": [up, down, wgrad, wgrad]}


def weights_to_fp8(model: ModelConfig) -> list[Row]:
    """Copies of weights and of the head, once a step for all micro-steps: largest sizes, then both layouts."""
    kinds = {choice.kind for choice in fp8_choices(model, Recipe()) if choice.converts}
    d = dims(model)
    shapes = [row.shape for row in parameter_table(model) if row.name.partition(".")[0] in kinds]
    shapes.append((1, d.padded_vocab, d.d_model))
    found = []
    for shape, count in Counter(shapes).items():
        row = op("quantise_weight", shape, "plain", "forward", count, "fp8 casts")
        found.append(dataclasses.replace(row, kernels=2 * count))
    return found


# the step


def redline(depth: int = 24, target: bool = False, gpus: int = GPUS, fa3: bool = False, fp8: bool = False) -> Workload:
    """The gpt2 preset on H100s at ratio 8, as core/ does it today, in bf16 or fp8, or as it is meant to become.

    fa3: today with FlashAttention 3 installed. fp8: layers and head. target: in fp8 with it, a sharded optimizer and
    bf16 communication of which backward hides 70 %; products at cuBLAS's efficiency, fewer casts.
    """
    cfg, plan = planned(depth, gpus)
    rows = compute(cfg.model, plan, target, fa3, fp8)
    params = plan.params_total
    if gpus > 1:
        exposed = {"exposed": 0.3} if target else {}
        name = "reduce-scatter, all-gather in bf16, 30 % exposed" if target else "all-reduce of gradients in bf16"
        # rounded; besides, today: divided, copied onto themselves, and back
        moved = 6 if target else 6 + 4 + 4 + 6
        rows += [
            one_pass("gradients to bf16", "weights", moved * params, 4 * 8, "kernel pass"),
            collectives(name, 2 * 2 * params, 2 * 4 * 7 if target else 2 * 8, **exposed),
        ]
        if fp8:
            sites = dims(cfg.model).n_layer * len(ACTIVATIONS + GRADIENTS)
            rows.append(collectives("largest sizes of fp8 sites", 2 * 4 * sites, 2))
    ranks = gpus if target else 1  # that share the optimizer; today each updates everything
    rows += optimizer(parameter_table(cfg.model), ranks)
    name = f"Redline d{depth}, " + ("target: fp8, sharded" if target else f"today: {'fp8' if fp8 else 'bf16'}, ")
    if not target:
        name += ("FA3, " if fa3 else "") + ("replicated" if gpus > 1 else "one H100")
    return workload(name, rows, tokens=plan.total_batch_size, steps=plan.steps)


def planned(depth: int, gpus: int, batch: int | None = None) -> tuple[Config, Plan]:
    """The gpt2 preset at ratio 8, 16 rows at a time or as many as a GPU has. batch: tokens of a step; None: by law."""
    cfg = preset("gpt2", "cuda")
    model = dataclasses.replace(cfg.model, depth=depth)
    data = dataclasses.replace(cfg.data, num_streams=max(cfg.data.num_streams, gpus))
    cfg = dataclasses.replace(cfg, ratio=8.0, model=model, data=data, total_batch_size=batch)
    if batch is None:  # a batch by law knows no rows yet
        law = make_plan(cfg, device_type="cuda", world_size=1, compute_dtype=BF16)
        cfg = dataclasses.replace(cfg, total_batch_size=law.total_batch_size)
    rows = cfg.total_batch_size // cfg.model.seq_len // gpus
    cfg = dataclasses.replace(cfg, device_batch_size=math.gcd(16, rows))
    return cfg, make_plan(cfg, device_type="cuda", world_size=gpus, compute_dtype=BF16)


def compute(model: ModelConfig, plan: Plan, target: bool, fa3: bool, fp8: bool) -> list[Row]:
    """All of a step of one GPU but communication and update."""
    d, micro, B = dims(model), plan.grad_accum_steps, plan.device_batch_size
    L, C, F, V, T, ve = d.n_layer, d.d_model, d.d_ff, d.padded_vocab, d.seq_len, len(d.ve_layers)
    M, on_gpu, n = B * T, micro * B * T, L * micro
    stream, params = 2 * C * on_gpu, plan.params_total
    weights = plan.params_scaling
    qkv = C + 2 * d.d_kv
    heads = (B, T, d.n_head, d.n_kv_head, d.d_head)
    if target:
        rows = linears("qkv, o", "products", M, [(C, qkv), (C, C)], n, True)
        rows += linears("MLP", "products", M, [(C, F), (F, C)], n, True)
        rows += linears("lm_head", "head", M, [(C, V)], micro, True)
    else:
        rows = (layers_in_fp8 if fp8 else layers_in_bf16)(M, C, qkv, F, n)
        head = op("lm_head_loss", (M, C, V), "fp8" if fp8 else "mean", "backward", micro, "head")
        head = dataclasses.replace(head, op=f"lm_head_loss{' (fp8)' if fp8 else ''}, gradients included")
        shapes = [(1, M, V, C), (1, M, C, V), (1, C, V, M)]
        rows += multiplied(head, shapes, micro, "fp8 product" if fp8 else "bf16 product")
    if target or fa3:
        rows += attention(on_gpu, C, [mean_keys(w, [T]) for w in d.windows], micro)
    else:
        rows += own_attention(heads, d.windows, micro)
    # entry of a layer: the sum after the MLP, x0 and its gradient, first channels for gates; after attention a sum
    entries = {"mix3": L - ve - 1, "mix3_first": ve, "mix": 1, "add": L}
    norms = {"forward": entries, "backward": entries}
    if target or fp8:  # q and q_t take the place of y: no byte more
        norms = {
            "forward": {"mix3_fp8": L - 1, "mix_fp8": 1 + L},
            "backward": {"mix3_fp8": L - 1, "mix_fp8": 1, "add": L},
        }
    for direction in ("forward", "backward"):
        for form, layers in norms[direction].items():
            rows.append(op("rms_norm", (M, C), form, direction, layers * micro))
        for form, layers in (("plain", L - ve), ("value embeddings", ve)):
            rows.append(op("rope_qk_norm", heads, form, direction, layers * micro))
        table = op("embedding", (M, V, C), "sum", direction, micro, "tables")
        values = op("embedding", (M, V, ve * d.d_kv), "parts", direction, micro, "tables")
        rows += [table, dataclasses.replace(values, kernels=micro * (1 if direction == "forward" else 2 * ve))]
    rows += [
        one_pass("smear, last norm, middle layer", "passes", 24 * stream, 20 * micro),
        one_pass("zeros for gradients", "weights", 4 * params, 8, "kernel pass"),
    ]
    if target:
        rows += [
            one_pass("attention output to fp8", "fp8 casts", 3 * L * C * on_gpu, n, "kernel pass"),
            # q, k, v: read, written, written transposed; every other operand comes from an epilogue or a norm
            one_pass("gradients to fp8 and transposed", "fp8 casts", 4 * 3 * L * C * on_gpu, n, "kernel pass"),
            one_pass("weights to fp8, once", "fp8 casts", 4 * weights, 4 * L, "kernel pass"),
            one_pass("softcap and cross-entropy, one kernel", "head", 3 * V * on_gpu, micro, "kernel pass"),
        ]
    elif fp8:
        rows += weights_to_fp8(model)
    return rows


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
    """What bench/kernel_model.py predicted of the compiled kernels, as the newest baseline of bench.static keeps it.
    They are Triton's: nothing of an op for which auto means a library where nothing is measured."""
    files = sorted(folder.glob("triton-*.json"), key=lambda file: [int(n) for n in file.stem[7:].split(".")])
    if not files:
        return []
    found, source = [], f"model, {files[-1].stem}"
    for key, row in json.loads(files[-1].read_text())["roofline"].items():
        name, case, form, dtype, direction = key.split(" / ")
        if dtype != "bfloat16" or "predicted_us" not in row or case not in BY_NAME[name].cases:
            continue
        if isinstance(means := BY_NAME[name].unmeasured, str) and means != "triton":
            continue
        shape = BY_NAME[name].cases[case]
        flops, nbytes = BY_NAME[name].cost(shape, BF16, form, direction == "backward")
        where = {"op": name, "form": form, "direction": direction, "shape": shape, "source": source}
        found.append(where | {"us": row["predicted_us"], "flops": flops, "bytes": nbytes})
    return found


def with_measurements(w: Workload, results: Sequence[dict], models: Sequence[dict] = ()) -> Workload:
    """The workload with the results' efficiencies: at the nearest shape, an H100's first, of the fastest backend. Where
    nothing was measured, with those that a model of the compiled kernels predicts.

    Several rows of one op, its products and its casts, share its time as the assumptions would have them.
    """

    def nearest(c: Cost, candidates: Sequence[dict]) -> list[dict]:
        same = [r for r in candidates if (r["op"], r["form"], r["direction"]) == (c.op, c.form, c.direction)]
        return sorted(same, key=lambda r: distance(r["shape"], c.shape))

    def known(c: Cost) -> tuple[dict, str, str] | None:
        """What was measured or predicted, of which GPU, and the source."""
        if same := nearest(c, results):
            first = [r for r in same if r["shape"] == same[0]["shape"]]
            best = min(first, key=lambda r: (gpu_of(r), r["us"]))
            return best, gpu_of(best), f"measured ({best['device']}, {best['commit']})"
        if same := nearest(c, models):
            return same[0], "H100", same[0]["source"]
        return None

    def measured(row: Row) -> Measured | None:
        found = row.cost and known(row.cost)
        if not found:
            return None
        best, gpu, source = found
        rows = [r for r in w.rows if r.cost == row.cost]
        peak = FLOPS["fp8" if any(r.kind == "fp8 product" for r in rows) else "bf16"]
        # the share of its roofline that the whole op reached, here its time, and of that the row's
        ratio = max(best["flops"] / peak, best["bytes"] / HBM[gpu]) / (1e-6 * best["us"])
        least = max(sum(r.flops for r in rows) / peak, sum(r.nbytes for r in rows) / HBM["H100"])
        own = least / ratio * row.seconds() / sum(r.seconds() for r in rows)
        return Measured(row.roofline() / own, source)

    return dataclasses.replace(w, rows=tuple(dataclasses.replace(row, measured=measured(row)) for row in w.rows))
