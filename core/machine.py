"""This machine: its devices and their peaks, memory, versions, and how fast a run is on it."""

import ctypes
import gc
import hashlib
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from core.stopping import UserError
from kernels.fp8 import FP8_CAPABILITY

METER_S = 1.0  # between readings of a meter: NVML renews its counters every 20 to 100 ms
J_PER_KWH = 3.6e6
UNCOUNTED_STEPS = 11  # steps 0..10 warm caches and compilers; the training clock leaves them out, as nanochat's does

# dense bf16 tensor-core peak in FLOP/s by a part of the device's name, first match counts [nanochat 92d63d4
# core/common.py]
PEAK_BF16_FLOPS = (
    ("GB200", 2.5e15), ("B200", 2.25e15), ("B100", 1.8e15),
    ("H200 NVL", 836e12), ("H200", 989e12), ("H100 NVL", 835e12), ("H100 PCIe", 756e12), ("H100", 989e12),
    ("A100", 312e12), ("L40S", 362e12), ("L4", 121e12), ("RTX 5090", 209.5e12), ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12), ("MI355", 2.5e15), ("MI300X", 1.3074e15),
)  # fmt: skip


# devices


def choose_device_type(requested: str | None) -> str:
    """ "cpu" or "cuda"; UserError when a GPU is requested and there is none."""
    if requested == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        raise UserError(
            f"--device cuda: torch {torch.__version__} ({built}) sees no GPU; use --device cpu, "
            "or install a CUDA build of torch and check nvidia-smi"
        )
    return requested or ("cuda" if torch.cuda.is_available() else "cpu")


def gpu_has_bf16() -> bool:
    """Whether the GPU has bf16; True when planning without a GPU."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)


def gpu_has_fp8() -> bool:
    """Whether the GPU has fp8; True when planning without a GPU."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= FP8_CAPABILITY


def check_fp8(option: str, remedy: str, device_type: str) -> None:
    """UserError where the option asks a GPU for fp8 that has none."""
    if device_type == "cuda" and not gpu_has_fp8():
        least = ".".join(map(str, FP8_CAPABILITY))
        raise UserError(f"{option}: this GPU is older than compute capability {least}; {remedy}")


def choose_dtype(precision: str | None, device_type: str) -> torch.dtype:
    """Compute type: as requested; unset: bf16 on GPUs of compute capability 8.0 and newer, else fp32. UserError where
    the GPU lacks what is requested."""
    if precision is None:
        return torch.bfloat16 if device_type == "cuda" and gpu_has_bf16() else torch.float32
    if precision == "bf16" and device_type == "cuda" and not gpu_has_bf16():
        raise UserError("--precision bf16: this GPU is older than compute capability 8.0; use --precision fp32")
    if precision == "fp8":
        check_fp8("--precision fp8", "use --precision bf16", device_type)
    return torch.float32 if precision == "fp32" else torch.bfloat16


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16 or AMX)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def peak_flops(device_name: str) -> float | None:
    """bf16 peak of a device in FLOP/s; None when unknown, and always for CPUs."""
    return next((peak for part, peak in PEAK_BF16_FLOPS if part in device_name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: allocated on the GPU, resident for a CPU process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def energy_counter(device: torch.device) -> Callable[[], float] | None:
    """What reads the joules that a GPU has used since its driver was loaded; None where nobody counts them: on a CPU,
    without nvidia-ml-py, on GPUs older than Volta."""
    if device.type != "cuda":
        return None
    try:
        import pynvml  # pyrefly: ignore[missing-import]  # optional
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        # by its UUID: NVML does not know of CUDA_VISIBLE_DEVICES
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000  # it counts mJ


def node_energy_counter(device: torch.device, world_size: int) -> tuple[int, Callable[[], float]] | None:
    """How many GPUs of a run are on this node, and what reads the joules of all of them; None as of one."""
    if device.type != "cuda":
        return None
    n = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size > 1 else 1
    devices = [torch.device("cuda", i) for i in range(n)] if world_size > 1 else [device]
    counters = [energy_counter(d) for d in devices]
    known = [c for c in counters if c is not None]
    return (n, lambda: sum(read() for read in known)) if len(known) == n else None


class Meter:
    """Watts, and the energy and the cost of a run so far, for the lines of its log."""

    def __init__(
        self,
        energy: Callable[[], float] | None,
        dollars: Callable[[], float | None] = lambda: None,
        kwh: float = 0.0,
        num_gpus: int = 0,
    ) -> None:
        """energy: reads joules of num_gpus GPUs, which only grow; None: not known. dollars: the cost so far. kwh: used
        before."""
        self._energy, self._dollars, self._kwh, self.num_gpus = energy, dollars, kwh, num_gpus
        self._start_j = self._last_j = energy() if energy else 0.0
        self._last = time.perf_counter()

    @property
    def kwh(self) -> float | None:
        return None if self._energy is None else self._kwh + (self._energy() - self._start_j) / J_PER_KWH

    def read(self) -> dict[str, float]:
        """watts, the mean since the last reading, kwh and dollars: those that are known; {} within METER_S of the
        last reading."""
        now = time.perf_counter()
        if now - self._last < METER_S:
            return {}
        found: dict[str, float] = {}
        if self._energy:
            joules = self._energy()
            found["watts"] = round((joules - self._last_j) / (now - self._last), 1)
            found["kwh"] = round(self._kwh + (joules - self._start_j) / J_PER_KWH, 6)
            self._last_j = joules
        if (cost := self._dollars()) is not None:
            found["dollars"] = round(cost, 4)
        self._last = now
        return found


def cost_dollars(seconds: float, num_gpus: int, dollars_per_gpu_hour: float | None) -> float | None:
    """What renting the GPUs for so long costs; None without a price or a GPU."""
    return None if dollars_per_gpu_hour is None or not num_gpus else seconds / 3600 * num_gpus * dollars_per_gpu_hour


# the process


def prepare_process(device_type: str, *, deterministic: bool) -> None:
    """Settings of the whole process, made once by a program's main. UserError on a platform that is not supported."""
    if not sys.platform.startswith("linux"):
        raise UserError(f"Redline runs on Linux only; this is {sys.platform}")
    if device_type == "cpu":
        keep_freed_memory()
        return
    # sums of products are fp32 everywhere; by default cuBLAS may add the parts of a split K in bf16
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if deterministic:
        # without it attention sums gradients in any order, and references those of embeddings by atomics
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)


def keep_freed_memory() -> None:
    """On a CPU with glibc, freed activations stay in the process.

    By default glibc gives every block over 32 MB back to the kernel at once and takes it, page fault by page fault,
    in the next layer again: the softcapped loss of 4096 x 2048 logits took 132 ms with that and 52 ms without
    (2 cores of an AMD EPYC, torch 2.13).
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return  # musl has no mallopt
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)


@contextmanager
def frozen_objects() -> Iterator[None]:
    """Inside, the garbage collector passes over all objects that were there before, those of every module: the full
    collection that now and then falls into a step would walk through them."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


# versions


def git_state() -> dict[str, Any] | None:
    """Commit of the code that runs and whether it was changed since; None outside a git checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        run = [
            subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True).stdout.strip()
            for args in (("rev-parse", "--show-toplevel"), ("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": run[1], "dirty": bool(run[2])} if Path(run[0]) == root else None


SOURCES = ("train.py", "core/**/*.py", "kernels/**/*.py", "csrc/*.py", "csrc/*.cu", "csrc/*.h")


def sources_digest() -> str:
    """What tells apart the code of two processes: 12 hex digits over names and contents of the sources."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in root.glob(pattern)):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
    }


# speed


class Speed(NamedTuple):
    tok_per_s: float
    flop_per_s: float
    mfu: float | None  # FLOPs of the model over the bf16 peak of all devices; None where that is unknown


def speed(tokens: float, seconds: float, flops_per_token: float, peak: float | None) -> Speed:
    """How fast so many tokens were trained on.

    The one formula of the log, the report and the bench. FLOPs are those of `flops_per_token` in the plan: what
    recomputation or padding costs besides is not counted [Chowdhery et al. 2022, appendix B]."""
    tok_per_s = tokens / seconds
    flop_per_s = tok_per_s * flops_per_token
    return Speed(tok_per_s, flop_per_s, flop_per_s / peak if peak else None)


class TrainingClock:
    """Training time as the races count it: optimizer steps from data to update, without evaluation, samples and saves.

    The device is synchronised where the clock starts and stops, not at every step. Steps 0 to UNCOUNTED_STEPS - 1 are
    left out. Over the same time energy counts joules of this process's GPU; None where they are not known, as of a
    resumed run.
    """

    def __init__(
        self,
        device: torch.device,
        counted_s: float = 0.0,
        counted_steps: int = 0,
        energy: Callable[[], float] | None = None,
    ) -> None:
        """energy: reads joules that only grow."""
        self.device = device
        self._read_energy = energy if counted_steps == 0 else None
        self.counted_j = None if self._read_energy is None else 0.0
        self._start_j = 0.0
        self.counted_s, self.counted_steps = counted_s, counted_steps
        self._start: float | None = None
        self._counts = False
        self._steps = 0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def before_step(self, step: int) -> None:
        counts = step >= UNCOUNTED_STEPS
        if self._start is not None and counts != self._counts:
            self.stop()
        if self._start is None:
            self._start, self._counts, self._steps = self._now(), counts, 0
            self._start_j = self._read_energy() if self._read_energy else 0.0

    def after_step(self) -> None:
        self._steps += 1

    def stop(self) -> None:
        if self._start is None:
            return
        if self._counts:
            self.counted_s += self._now() - self._start
            self.counted_steps += self._steps
            if self._read_energy and self.counted_j is not None:
                self.counted_j += self._read_energy() - self._start_j
        self._start = None
