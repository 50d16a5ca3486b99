"""Processes and devices: who am I, where do I compute, and how gradients are averaged.

One process per device, started by torchrun or alone. Averaging is plain for now: every rank holds every parameter,
gradients are summed over ranks in a few flat buckets after backward.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 64 * 2**20
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all: rank, world_size, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def choose_device_type(requested: str | None) -> str:
    """ "cpu" or "cuda"; ValueError when a GPU is asked for and there is none."""
    if requested == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        raise ValueError(
            f"--device cuda: torch {torch.__version__} ({built}) sees no GPU; use --device cpu, "
            "or install a CUDA build of torch and check nvidia-smi"
        )
    return requested or ("cuda" if torch.cuda.is_available() else "cpu")


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun describes them in the environment; alone without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def init_world(device_type: str) -> World:
    """Joins the process group of all processes."""
    rank, world_size = rank_and_size()
    device = torch.device("cpu")
    if device_type == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank} of this node has no GPU: {torch.cuda.device_count()} found; lower --nproc-per-node"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world_size > 1:
        backend = "nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, device_id=device if device_type == "cuda" else None)
    return World(rank, world_size, device)


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def prepare_process(device_type: str, *, deterministic: bool) -> None:
    """Settings of the whole process, made once by a program's main. ValueError on a platform that is not supported."""
    if not sys.platform.startswith("linux"):
        raise ValueError(f"Redline runs on Linux only; this is {sys.platform}")
    if device_type == "cpu":
        keep_freed_memory()
    elif deterministic:
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


@torch.no_grad()
def average_(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor by its mean over ranks, in place; same tensors in the same order on every rank."""
    if not dist.is_initialized():
        return
    bucket: list[Tensor] = []
    size = 0
    for t in tensors:
        nbytes = t.numel() * t.element_size()
        if bucket and (size + nbytes > BUCKET_BYTES or t.dtype != bucket[0].dtype):
            _average_bucket_(bucket)
            bucket, size = [], 0
        bucket.append(t)
        size += nbytes
    if bucket:
        _average_bucket_(bucket)


def _average_bucket_(tensors: list[Tensor]) -> None:
    flat = torch.cat([t.reshape(-1) for t in tensors]) if len(tensors) > 1 else tensors[0].reshape(-1)
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    torch._foreach_copy_(
        tensors, [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors)]
    )


def all_sum(values: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Waits until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value`."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def main_first(work: Callable[[], T]) -> T:
    """`work()` on rank 0, then on the others; its ValueError is raised on rank 0 alone, the others end quietly."""
    value, error = None, None
    main = not dist.is_initialized() or dist.get_rank() == 0
    if main:
        try:
            value = work()
        except ValueError as e:
            error = e
    failed = broadcast_object(error is not None)
    if error is not None:
        raise error
    if failed:
        raise SystemExit(2)
    return value if main else work()


def _gpu_has_bf16() -> bool:
    """Of the GPU that is there; when a run is planned for one that is not, of the one it will have."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)


def choose_dtype(precision: str | None, device_type: str) -> torch.dtype:
    """Compute type: as asked; unset: bf16 on GPUs of compute capability 8.0 and newer, else fp32."""
    if precision is None:
        return torch.bfloat16 if device_type == "cuda" and _gpu_has_bf16() else torch.float32
    if precision == "bf16" and device_type == "cuda" and not _gpu_has_bf16():
        raise ValueError("--precision bf16: this GPU is older than compute capability 8.0; use --precision fp32")
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
