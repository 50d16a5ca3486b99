"""Who keeps what, where tensors are shared out over ranks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Shard(NamedTuple):
    """What this rank keeps of a tensor that ranks share out."""

    shape: tuple[int, ...]  # of the whole
    dtype: torch.dtype
    # where each begins in the whole, and its storage: hyper-rectangles of full rank, disjoint over ranks; may be none
    pieces: Sequence[tuple[tuple[int, ...], Tensor]]
