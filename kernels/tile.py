"""What kernels share: the launch, tensors as rows, and a constant of Muon's ops."""

from typing import Any

import torch
from torch import Tensor

# Polar Express starts from matrices of Frobenius norm 1 / SAFETY. That norm bounds the largest singular value; dividing
# by 1.01 keeps it below 1 after rounding [nanochat 92d63d4, optim.py]
SAFETY = 1.01

Grid = tuple[int, ...]


def launch(kernel: Any, grid: Grid, first: Tensor, *args: Any, **options: Any) -> None:
    """Launches a Triton kernel on the device of its first argument.

    Triton launches on the current device: without the guard, a tensor of another GPU would be an illegal access.
    """
    with torch.cuda.device_of(first):
        kernel[grid](first, *args, **options)


def as_rows(t: Tensor) -> Tensor:
    """(M, N) of t, elements of a row side by side; a copy only where no single stride leads from row to row."""
    rows = t.reshape(-1, t.size(-1))
    return rows if rows.stride(1) == 1 or rows.size(1) == 1 else rows.contiguous()
