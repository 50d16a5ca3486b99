"""What the compiled kernels cost, without a GPU: `python -m bench.static [--check | --update --reason TEXT]`.

Prints launches, registers, spills, shared memory, occupancy, tensor-core and bulk-copy instructions, wide (16 bytes or
more) and narrow global accesses, atomics, barriers, local accesses and the length of the innermost loop of every Triton
kernel at its real configs, of a product's loop for each tensor-core instruction, and of its epilogue: for sm_90 in all
cases, for other GPUs in one case per op; the same of csrc/*.cu if there is an nvcc; and the least time that an H100
needs, with what `bench/kernel_model.py` predicts, the share of the roofline that this is, and what binds.

--check   compares with bench/baselines/triton-VERSION.json: exit status 1 when a counter of HARD is worse, a kernel is
          new or gone, or one does not compile; other counters and improvements are reported. 2 on wrong usage
--update  makes that file again, with the reason on top of the earlier ones

Lines of csrc/ name the release of nvcc that compiled them, since counters differ between releases; one that has no
lines in the baseline yet is not compared, and --update adds its lines beside the others'.

Facts are cached by the source they come from, below the folder of --cache-dir.
"""

import argparse
import ast
import datetime
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from filelock import FileLock

import kernels.op
from bench import aot
from bench.kernel_model import LIBRARY, predict, tiles
from bench.projection.machine import FLOPS, FP32_FLOPS, HBM
from bench.roofline import multiplies_in
from core.config import DataConfig
from csrc import build
from kernels.fp8 import E4M3
from kernels.ops import BY_NAME

ROOT = Path(__file__).resolve().parent.parent
CAPABILITIES = (aot.MAIN, 100, 120, 80)
# of an H100, by what is multiplied: tensor cores, fp32 in CUDA cores
PEAK_FLOPS = {torch.bfloat16: FLOPS["bf16"], torch.float32: FP32_FLOPS, E4M3: FLOPS["fp8"]}
PEAK_BYTES = HBM["H100"]

# counters that may not get worse, the worst first, and whether more is worse. The others (registers, length of the
# loop, warps, blocks per SM, barriers) may move
HARD = {
    "spill_bytes": True, "local_loads": True, "local_stores": True, "serialized": True, "tensor": False, "bulk": False,
    "occupancy": False, "wide_loads": False, "narrow_loads": True, "wide_stores": False, "narrow_stores": True,
    "shared_bytes": True, "atomics": True, "launches": True,
}  # fmt: skip
KINDS = ("broken", "gone", "worse", "new", "better", "moved", "time")  # of changes, the worst first
FAILING = KINDS[:4]
LINES = 60  # of a check's output

Row = dict[str, Any]
Task = tuple[str, int]  # op, capability


class Limits(NamedTuple):
    """Of an SM [CUDA programming guide, technical specifications per compute capability]."""

    warps: int
    ctas: int
    shared: int


LIMITS = {
    80: Limits(64, 32, 167_936),
    90: Limits(64, 32, 233_472),
    100: Limits(64, 32, 233_472),
    120: Limits(48, 24, 102_400),
}


def ctas_per_sm(capability: int, registers: int, warps: int, shared: int, tensor_memory: int = 0) -> int:
    """Blocks that fit on an SM.

    Registers go to warps in granules of 256, shared memory to blocks in granules of 128 bytes with 1 KiB for the
    system; sm_100 has 512 columns of tensor memory.
    """
    limit = LIMITS[capability]
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = 4 * (65_536 // 4 // per_warp) // warps  # four partitions, each with its registers
    by_shared = limit.shared // (-(-(shared + 1024) // 128) * 128)
    by_tensor_memory = 512 // tensor_memory if tensor_memory else limit.ctas
    return min(limit.ctas, limit.warps // warps, by_registers, by_shared, by_tensor_memory)


# facts, from the cache or the compiler


def cache_name(folder: Path, root: Path, name: str, sources: Iterable[Path], *versions: object) -> Path:
    digest = hashlib.sha256(repr(versions).encode())
    for source in (*sources, root / "bench" / "aot.py"):
        digest.update(b"\0" + source.read_bytes())
    return folder / f"{name}-{digest.hexdigest()[:20]}.json"


def load(file: Path) -> list[Row] | None:
    """What `store` wrote; None if there is nothing, or nothing whole."""
    try:
        kernels = json.loads(file.read_text())["kernels"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        print(f"{file} is damaged: compiling again", file=sys.stderr)
        return None
    return kernels


def store(file: Path, text: str) -> None:
    """All of it or nothing, whoever else writes there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(file)


def compiled_ops() -> list[str]:
    return [name for name, op in BY_NAME.items() if "triton" in op.backends]


def cache_folder(cache_dir: str | Path = DataConfig.cache_dir) -> Path:
    return Path(cache_dir).expanduser() / "static"


def sources_of(op: kernels.op.Op, root: Path) -> list[Path]:
    """The files of kernels/ that an op's kernels come from: its own and, in turn, what these import."""
    waiting, found = [Path(op.cost.__code__.co_filename).stem], []
    while waiting:
        file = root / "kernels" / f"{waiting.pop()}.py"
        if file in found or not file.exists():
            continue
        found.append(file)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "kernels":
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kernels."):
                waiting.append(node.module.split(".")[1])
    return sorted(found)


def facts(
    ops: Sequence[str] | None = None,
    capabilities: Sequence[int] = CAPABILITIES,
    *,
    folder: Path | None = None,
    root: Path = ROOT,
) -> tuple[list[Row], dict[str, str]]:
    """Facts of each launch of these ops (unset: all), and what does not compile with why.

    root: the checkout they are from.
    """
    folder, files = folder or cache_folder(), {}
    for task in [(name, capability) for capability in capabilities for name in ops or compiled_ops()]:
        sources = sources_of(BY_NAME[task[0]], root)
        name = f"{task[0]}-sm_{task[1]}"
        files[task] = cache_name(folder, root, name, sources, triton.__version__, torch.__version__)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # who waits finds in the cache what the other compiled
        return compiled_facts(files, root)


def compiled_facts(files: Mapping[Task, Path], root: Path) -> tuple[list[Row], dict[str, str]]:
    """What `facts` returns: of the tasks whose files are not there, by compiling."""
    found = {task: known for task, file in files.items() if (known := load(file)) is not None}
    errors: dict[str, str] = {}
    if missing := [task for task in files if task not in found]:
        print(f"compiling {len(missing)} of {len(files)} pairs of op and GPU", file=sys.stderr)
        command = [sys.executable, "-m", "bench.aot", *(f"{name}@{capability}" for name, capability in missing)]
        # that checkout's modules, wherever this one's are found, and this process's Triton
        env = aot.environment()
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), env.get("PYTHONPATH"))))
        with subprocess.Popen(command, cwd=root, env=env, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                done = json.loads(line)
                task = done["op"], done["capability"]
                found[task] = done["kernels"]
                if done["error"]:
                    errors[f"sm_{task[1]} / {task[0]}"] = done["error"]
                else:
                    store(files[task], json.dumps({"kernels": done["kernels"]}))
        if lost := [task for task in files if task not in found]:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode} before {lost}: see above")
    return [row for task in files for row in found[task]], errors


def cuda_facts(nvcc: build.Nvcc, root: Path = ROOT, *, folder: Path | None = None) -> tuple[list[Row], dict[str, str]]:
    """The same of the kernels in csrc/*.cu, for sm_90a."""
    sources, headers = build.cuda_files(root / "csrc"), build.headers(root / "csrc")

    def compiled(source: Path) -> list[Row] | str:
        versions = nvcc.version, build.CUDA_FLAGS
        file = cache_name(
            folder or cache_folder(), root, f"{source.name}-sm_{aot.MAIN}a", (source, *headers), *versions
        )
        if (rows := load(file)) is None:
            try:
                rows = aot.compile_cuda(source, nvcc)
            except build.BuildError as error:
                return str(error)
            store(file, json.dumps({"kernels": rows}))
        return rows

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = dict(zip(sources, pool.map(compiled, sources)))
    errors = {f"sm_{aot.MAIN} / csrc/{file.name}": why for file, why in results.items() if isinstance(why, str)}
    return [row for rows in results.values() if isinstance(rows, list) for row in rows], errors


def release_of(key: str) -> str | None:
    """Such as nvcc 13.0, which stands in place of a case where a line is of csrc/; None for other lines."""
    parts = key.split(" / ")
    return parts[2] if len(parts) > 2 and parts[1].startswith("csrc/") else None


# rows: what the baseline keeps of a kernel


def row(kernel: Row) -> Row:
    """Counters that are zero are left out."""
    counts, warps = kernel["instructions"], kernel["num_warps"]
    tensor = {f"tensor {name}": n for name, n in counts.items() if aot.TENSOR.fullmatch(name)}
    bulk = {f"bulk {name}": n for name, n in counts.items() if name in aot.BULK}
    loads, wide_loads = (counts.get(f"LDG{end}", 0) + counts.get(f"LDGSTS{end}", 0) for end in ("", ".E.128"))
    stores, wide_stores = counts.get("STG", 0), counts.get("STG.E.128", 0)
    made = {name: kernel[name] for name in ("registers", "spill_bytes", "shared_bytes", "loop")}
    made |= {"epilogue": kernel.get("epilogue", 0)}
    if products := sum(tensor.values()):
        made |= {"loop_per_product": round((made["loop"] - kernel.get("flat", False) * made["epilogue"]) / products, 1)}
    if cut := tiles(kernel):
        made |= {"waves": cut.waves, "l2_mb": round(cut.l2_bytes / 1e6), "hbm_mb": round((cut.hbm_bytes or 0) / 1e6)}
    made |= {"warps": warps, "serialized": int(kernel["serialized"]), **tensor, **bulk}
    made |= {"wide_loads": wide_loads, "narrow_loads": loads - wide_loads}
    made |= {"wide_stores": wide_stores, "narrow_stores": stores - wide_stores, "barriers": counts.get("BAR", 0)}
    made |= {"atomics": sum(counts.get(name, 0) for name in aot.ATOMICS)}
    made |= {"local_loads": counts.get("LDL", 0), "local_stores": counts.get("STL", 0)}
    if warps:
        ctas = ctas_of(kernel)
        made |= {"ctas": ctas, "occupancy": round(ctas * warps / LIMITS[kernel["capability"]].warps, 4)}
    return {name: n for name, n in made.items() if n}


def ctas_of(k: Row) -> int:
    return ctas_per_sm(k["capability"], k["registers"], k["num_warps"], k["shared_bytes"], k["tensor_memory"])


def count(row: Row, name: str) -> int:
    """What a row leaves out is zero; of launches, one."""
    return row.get(name, 1 if name == "launches" else 0)


def table(kernels: Sequence[Row]) -> dict[str, Row]:
    """GPU / op / case / form / dtype / kernel: its row.

    A kernel launched in several variants has #2, #3 behind its name. Products of libraries are no kernels of ours.
    """
    rows: dict[str, Row] = {}
    variants: dict[str, list[int]] = {}  # of a key, in the order of their launches
    for k in kernels:
        if k["kernel"] == LIBRARY:
            continue
        parts = f"sm_{k['capability']}", k["op"], k["case"], k["form"], k["dtype"], k["kernel"]
        key = " / ".join(part for part in parts if part)
        known = variants.setdefault(key, [])
        if k["variant"] not in known:
            known.append(k["variant"])
        number = known.index(k["variant"])
        name = f"{key} #{number + 1}" if number else key
        launches = count(rows[name], "launches") + 1 if name in rows else 1
        rows[name] = row(k) | ({"launches": launches} if launches > 1 else {})
    return dict(sorted(rows.items()))


def roofline(kernels: Sequence[Row]) -> dict[str, Row]:
    """Op / case / form / dtype / direction: the least microseconds on an H100 and what binds, and those that the model
    of the compiled kernels predicts, with what binds most of them.

    An op has a backward where its gradients launched something.
    """
    rows: dict[str, Row] = {}
    predicted: dict[str, Counter[str]] = {}
    for k in kernels:
        if k["capability"] != aot.MAIN or k["op"] not in BY_NAME:
            continue
        op, dtype = BY_NAME[k["op"]], getattr(torch, k["dtype"])
        backward = k["backward"] or op.gradients_in_forward
        flops, nbytes = op.cost(op.cases[k["case"]], dtype, k["form"], backward)
        products, memory = flops / PEAK_FLOPS[multiplies_in(op, k["form"], dtype)], nbytes / PEAK_BYTES
        direction = "backward" if backward else "forward"
        us, bound = float(f"{1e6 * max(products, memory):.4g}"), "flops" if products > memory else "memory"
        key = f"{op.name} / {k['case']} / {k['form']} / {k['dtype']} / {direction}"
        rows[key] = {"us": us, "bound": bound}
        launch = predict(k if k["kernel"] == LIBRARY else k | {"ctas": ctas_of(k)})
        predicted.setdefault(key, Counter())[launch.bound] += launch.us
    for key, parts in predicted.items():
        total = float(f"{parts.total():.4g}")
        rows[key] |= {
            "predicted_us": total,
            "share": round(rows[key]["us"] / total, 2),
            "by": max(parts, key=parts.get),
        }
    return dict(sorted(rows.items()))


# comparison


class Change(NamedTuple):
    """Of one kernel, or of one least time."""

    kind: str  # of KINDS
    rank: int  # of those of a kind: the smaller, the worse
    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind:<6}  {self.key}: {self.text}"


def op_of(key: str) -> str:
    return key.split(" / ")[key.startswith("sm_")]


def compare(old: dict[str, Row], new: dict[str, Row], errors: dict[str, str]) -> list[Change]:
    """The worst first, one for each kernel that changed."""
    changes = [Change("broken", 0, key, f"does not compile: {gist(why)}") for key, why in errors.items()]
    lost = tuple(f"{key} / " for key in errors)
    changes += [
        Change("gone", 0, key, "was not compiled") for key in old.keys() - new.keys() if not key.startswith(lost)
    ]
    changes += [Change("new", 0, key, "has no baseline") for key in new.keys() - old.keys()]
    changes += [difference(key, old[key], new[key]) for key in old.keys() & new.keys() if moved(old[key], new[key])]
    return sorted(changes, key=lambda change: (KINDS.index(change.kind), change.rank, change.key))


def gist(why: str) -> str:
    """The line of a compiler's message that says what is wrong: nvcc's last one counts errors."""
    lines = why.splitlines()
    return next((line.strip() for line in lines if "error:" in line), lines[-1])


def moved(old: Row, new: Row) -> list[str]:
    """The counters that differ."""
    return sorted(name for name in old.keys() | new.keys() if count(old, name) != count(new, name))


def difference(key: str, old: Row, new: Row) -> Change:
    parts = []
    for name in moved(old, new):
        before, now, family = count(old, name), count(new, name), name.split()[0]
        kind = "moved" if family not in HARD else "worse" if (now > before) == HARD[family] else "better"
        rank = list(HARD).index(family) if family in HARD else len(HARD)
        parts.append((KINDS.index(kind), rank, f"{name} {before} → {now}"))
    parts.sort()
    return Change(KINDS[parts[0][0]], parts[0][1], key, ", ".join(text for _, _, text in parts))


def least_times(old: dict[str, Row], new: dict[str, Row]) -> list[Change]:
    """They are those of a cost function and of a model: no reason to fail."""
    keys = sorted(key for key in old.keys() & new.keys() if old[key] != new[key])

    def text(row: Row) -> str:
        return f"at least {row['us']} us, {row['bound']}; predicted {row.get('predicted_us')}, {row.get('by')}"

    return [Change("time", 0, key, " → ".join(text(r[key]) for r in (old, new))) for key in keys]


def summary(changes: Sequence[Change]) -> str:
    """Such as: 3 worse (rms_norm), 1 better (adam_update)."""
    ops = {kind: sorted({op_of(c.key) for c in changes if c.kind == kind}) for kind in KINDS}
    counts = Counter(change.kind for change in changes)
    return (
        ", ".join(f"{counts[kind]} {kind} ({', '.join(ops[kind])})" for kind in KINDS if ops[kind]) or "nothing changed"
    )


# the baseline


def baseline_file(folder: Path, version: str = triton.__version__) -> Path:
    return folder / f"triton-{version}.json"


def write_baseline(file: Path, baseline: dict[str, Any]) -> None:
    """A line for each reason, kernel and time, so that a diff shows what changed."""
    reasons = [json.dumps(reason, ensure_ascii=False) for reason in baseline["reasons"]]
    parts = [f'{{\n"triton": "{baseline["triton"]}",\n"reasons": [\n' + ",\n".join(reasons) + "\n]"]
    for name in ("roofline", "kernels"):
        rows = sorted(baseline[name].items())
        lines = [f"{json.dumps(key)}: {json.dumps(line, separators=(',', ':'))}" for key, line in rows]
        parts.append(f'"{name}": {{\n' + ",\n".join(lines) + "\n}")
    store(file, ",\n".join(parts) + "\n}\n")


def show(kernels: Sequence[Row]) -> None:
    for key, facts in table(kernels).items():
        print(f"{key}: " + ", ".join(f"{name} {n}" for name, n in facts.items()))
    print(
        "\nleast time on an H100 SXM at nominal peaks, what binds; time predicted by bench/kernel_model.py (not "
        "measured), its share of the roofline, what binds most of it"
    )
    for key, facts in roofline(kernels).items():
        print(
            f"{facts['us']:>10.4g} us  {facts['bound']:<6}  {facts['predicted_us']:>10.4g} us  {facts['share']:>4.0%}  "
            f"{facts['by']:<12}  {key}"
        )


def main(argv: list[str], *, root: Path = ROOT, baselines: Path = ROOT / "bench" / "baselines") -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="compare with the baseline")
    what.add_argument("--update", action="store_true", help="make the baseline again")
    parser.add_argument("--reason", help="why the numbers may change: a sentence for the baseline")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="unset: all, and csrc/*.cu")
    parser.add_argument("--cache-dir", default=DataConfig.cache_dir, help="default %(default)s")
    args = parser.parse_args(argv)
    if args.update != bool((args.reason or "").strip()):
        parser.error("--update and --reason TEXT go together: say in a sentence why the numbers may change")
    if unknown := [name for name in args.ops or [] if name not in compiled_ops()]:
        parser.error(f"--ops {' '.join(unknown)}: expected some of {', '.join(compiled_ops())}")
    file, command = baseline_file(baselines), "python -m bench.static --update --reason TEXT"
    if args.check and not file.exists():
        have = ", ".join(sorted(f.stem.removeprefix("triton-") for f in baselines.glob("triton-*.json"))) or "none"
        print(f"no baseline for Triton {triton.__version__} (there are: {have}); {command} makes one")
        return 1
    folder, found = cache_folder(args.cache_dir), None if args.ops else build.find_nvcc()
    kernels, errors = facts(args.ops, folder=folder, root=root)
    nvcc, why = None, "there is no nvcc"
    if found:
        try:
            nvcc = build.Nvcc.of(found)
        except build.BuildError as error:  # too old
            why = str(error)
    if nvcc:
        more, failed = cuda_facts(nvcc, root, folder=folder)
        kernels, errors = kernels + more, errors | failed
    elif not args.ops and (left := build.cuda_files(root / "csrc")):
        print(f"{len(left)} files csrc/*.cu were not compiled: {why}")
    if not (args.check or args.update):
        show(kernels)
    if not args.check:
        for key, why in errors.items():
            print(f"{key} does not compile: {why}")
        if errors or not args.update:
            return int(bool(errors))
    nothing = {"triton": triton.__version__, "reasons": [], "roofline": {}, "kernels": {}}
    try:
        baseline = json.loads(file.read_text()) if file.exists() else nothing
    except ValueError as error:
        print(f"{file} is not JSON ({error}): check it out again")
        return 1

    def asked(key: str) -> bool:
        """Whether this run compiled what that line of the baseline is of."""
        if args.ops:
            return op_of(key) in args.ops
        return release_of(key) in (None, release)

    release = nvcc and f"nvcc {nvcc.release}"
    releases = {known for key in baseline["kernels"] if (known := release_of(key))}
    if args.check and release and releases and release not in releases:
        kernels = [k for k in kernels if not k["op"].startswith("csrc/")]
        print(f"csrc/*.cu: {file.name} has lines of {', '.join(sorted(releases))}, this is {release}: not compared")
    made = {"kernels": table(kernels), "roofline": roofline(kernels)}
    known = {name: {key: line for key, line in baseline[name].items() if asked(key)} for name in made}
    changes = compare(known["kernels"], made["kernels"], errors) + least_times(known["roofline"], made["roofline"])
    counted = f"{len(made['kernels'])} kernels against {file.name}: {summary(changes)}"
    if args.check:
        for change in changes[:LINES]:
            print(change)
        print(f"and {len(changes) - LINES} more\n" * (len(changes) > LINES) + counted)
        if changes:
            print(f"{command} takes these numbers as the baseline")
        return int(any(change.kind in FAILING for change in changes))
    if changes:
        today = datetime.date.today().isoformat()
        baseline["reasons"].insert(0, {"date": today, "reason": args.reason.strip(), "changed": summary(changes)})
        for name in made:
            baseline[name] = {key: line for key, line in baseline[name].items() if not asked(key)} | made[name]
        write_baseline(file, baseline)
    print(counted + ("" if changes else "; the file stays as it is"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
