"""Where the time and the memory of training steps go, by torch.profiler.

The folder `profile/` of a run, of the window that was profiled last:

    trace.json.gz            every op on a time line, for ui.perfetto.dev or chrome://tracing
    memory_snapshot.pickle   on a GPU: every allocation with its Python stack, for pytorch.org/memory_viz
    memory.json              on a CPU: bytes allocated over the window, their peak, the ops that allocate most

They are rank 0's; rank r of several appends `_rank<r>` to the stem.
"""

import gzip
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from core.communication import World

ATTENTION = ("scaled_dot_product", "flash_attention", "flex_attention", "efficient_attention", "cudnn_attention")
MATMUL = ("aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::baddbmm", "aten::_scaled_mm")
# parts of the names of kernels, in lower case: cuBLAS and CUTLASS (with the sums over a split K), the products of this
# repository (*_gemm_kernel, _fp8_relu2_kernel, _attention_*_kernel), Inductor's templates, attention by each library
PRODUCT_KERNELS = (
    "gemm", "gemv", "nvjet", "cutlass", "cublas", "splitk", "triton_tem_", "flash", "fmha", "sdpa", "fp8_relu2",
    "attention",
)  # fmt: skip
NAME_WIDTH = 80  # of a kernel's name where it is shown: those of templates are hundreds of characters long
COMPILED_GRAPH = "## Call CompiledFxGraph"  # and a hash
SETTLING_STEPS = 2  # of a resumed run, before its window
TIMELINE_POINTS = 500
TOP_OPS = 12
MAX_ALLOCATIONS = 200_000  # that a snapshot remembers


def longest_quiet_steps(n: int, first: int, stop: int, interrupted: Callable[[int], bool]) -> range:
    """The steps of [first, stop) to profile: the first n consecutive ones with no evaluation, sample or save
    (`interrupted`) in between; else the longest such run, the earliest of several."""
    best = row = range(first, first)
    for step in range(first, stop if n else first):
        row = range(step, step + 1) if interrupted(step) or not row else range(row.start, step + 1)
        best = row if len(row) > len(best) else best
        if len(best) == n:
            break
    return best


class StepProfile:
    """Profiles the steps run inside `with profile:`: time by kernel on a GPU, by op on a CPU (inside each itself, not
    in ops that it calls), and the files above.
    """

    def __init__(self, world: World, out: Path, seconds: dict[str, float]) -> None:
        """out: the run folder; seconds: by op, of the window that was profiled before the run was resumed."""
        # the profiler's library otherwise announces every start and stop on the terminal
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self._cuda = world.device.type == "cuda"
        self._folder = out / "profile"
        self._suffix = "" if world.is_main else f"_rank{world.rank}"
        self.seconds: Counter[str] = Counter(seconds)

    def __enter__(self) -> None:
        self._folder.mkdir(exist_ok=True)
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._cuda else [])
        if self._cuda:
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=MAX_ALLOCATIONS)
        self._profile = profile(activities=activities, profile_memory=not self._cuda)
        self._profile.__enter__()

    def __exit__(self, error: Any, *exc: Any) -> None:
        if self._cuda:
            if error is None:
                torch.cuda.synchronize()
                torch.cuda.memory._dump_snapshot(str(self._path("memory_snapshot.pickle")))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile.__exit__(error, *exc)
        if error is not None:
            return
        averages = self._profile.key_averages()
        if self._cuda:
            self.seconds = kernel_seconds(self._profile.events() or ())
        else:
            self.seconds = Counter()
            for event in averages:
                name = "compiled graph" if event.key.startswith(COMPILED_GRAPH) else event.key
                self.seconds[name] += event.self_cpu_time_total * 1e-6
        trace = self._path("trace.json.gz")
        self._profile.export_chrome_trace(str(trace))
        if not self._cuda:
            by_op = {event.key: event.self_cpu_memory_usage for event in averages}
            memory = memory_summary(json.loads(gzip.decompress(trace.read_bytes())), by_op)
            self._path("memory.json").write_text(json.dumps(memory, indent=1) + "\n")

    def _path(self, name: str) -> Path:
        stem, dot, ending = name.partition(".")
        return self._folder / f"{stem}{self._suffix}{dot}{ending}"

    def shares(self) -> dict[str, Any]:
        """non_matmul_share: time outside matrix products and attention; time_by_op: the largest shares by op;
        profile_files: where to look further. Empty when nothing was profiled."""
        total = sum(self.seconds.values())
        if not total:
            return {}
        core = sum(t for name, t in self.seconds.items() if is_product(name))
        shown = Counter[str]()
        for name, t in self.seconds.items():
            shown[name[:NAME_WIDTH]] += t
        return {
            "non_matmul_share": round(1 - core / total, 4),
            "time_by_op": {name: round(t / total, 4) for name, t in shown.most_common(TOP_OPS)},
            "profile_files": sorted(f"profile/{path.name}" for path in self._folder.glob("*")),
        }


def kernel_seconds(events: Iterable[Any]) -> Counter[str]:
    """Seconds by the name of what ran on the GPU: kernels, copies and fills.

    Their ops on the CPU and the annotations around them bear the same time once more, and are left out."""
    seconds = Counter[str]()
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            seconds[event.name] += event.time_range.elapsed_us() * 1e-6
    return seconds


def is_product(name: str) -> bool:
    """Whether an op or a kernel is a matrix product or attention."""
    return name in MATMUL or any(part in name.lower() for part in (*ATTENTION, *PRODUCT_KERNELS))


def memory_summary(trace: dict[str, Any], bytes_by_op: dict[str, int]) -> dict[str, Any]:
    """A CPU's allocations from a chrome trace's memory events and the net bytes each op itself allocated.

    Counts start at 0 with the window: what lived before it is not in them. timeline: [ms, most bytes around then].
    """
    events = sorted(
        (e["ts"], e["args"]["Total Allocated"]) for e in trace["traceEvents"] if e.get("name") == "[memory]"
    )
    start = events[0][0] if events else 0
    per_point = -(-len(events) // TIMELINE_POINTS) or 1
    groups = [events[i : i + per_point] for i in range(0, len(events), per_point)]
    largest = sorted(bytes_by_op.items(), key=lambda item: -item[1])[:TOP_OPS]
    return {
        "peak_bytes": max((size for _, size in events), default=0),
        "bytes_by_op": {name: size for name, size in largest if size > 0},
        "timeline": [[round((group[0][0] - start) * 1e-3, 3), max(size for _, size in group)] for group in groups],
    }
