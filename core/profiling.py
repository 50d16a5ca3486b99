"""Where the time of training steps goes, by torch.profiler."""

import os
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ATTENTION = ("scaled_dot_product", "flash_attention", "flex_attention", "efficient_attention", "cudnn_attention")
MATMUL = ("aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::baddbmm", "aten::_scaled_mm")


class StepProfile:
    """Sums, over the steps run inside `with profile:`, the time inside each op itself, not in ops it calls.

    Times are the GPU's if there is one, else the CPU's.
    """

    def __init__(self, device: torch.device, seconds: dict[str, float]) -> None:
        """seconds: by op, of steps that were profiled before."""
        # the profiler's library otherwise announces every start and stop on the terminal
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self._cuda = device.type == "cuda"
        self.seconds: Counter[str] = Counter(seconds)

    def __enter__(self) -> None:
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._cuda else [])
        self._profile = profile(activities=activities)
        self._profile.__enter__()

    def __exit__(self, *exc: Any) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        self._profile.__exit__(*exc)
        attr = "self_device_time_total" if self._cuda else "self_cpu_time_total"
        for event in self._profile.key_averages():
            self.seconds[event.key] += getattr(event, attr) * 1e-6

    def shares(self, top: int = 12) -> dict[str, Any]:
        """non_matmul_share: time outside matrix products and attention; time_by_op: the largest shares by op.
        Empty when nothing was profiled."""
        total = sum(self.seconds.values())
        if not total:
            return {}
        core = sum(t for name, t in self.seconds.items() if name in MATMUL or any(a in name for a in ATTENTION))
        return {
            "non_matmul_share": round(1 - core / total, 4),
            "time_by_op": {name: round(t / total, 4) for name, t in self.seconds.most_common(top)},
        }
