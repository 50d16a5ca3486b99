"""What models share: rotary tables, attention over masks that no window describes, the layers of banks."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.windows import in_window

ROPE_BASE = 100_000.0


def unbind_banks(banks: nn.ParameterList) -> list[Tensor]:
    """The matrix of each layer. Once per forward: indexing a bank per layer would build its whole gradient n times."""
    return [matrix for bank in banks for matrix in bank.unbind(0)]


# positions


def rope_tables(seq_len: int, d_head: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, each (T, D/2) fp32."""
    j = torch.arange(d_head // 2, dtype=torch.float32, device=device)
    inv_freq = ROPE_BASE ** (-2 * j / d_head)
    angle = torch.arange(seq_len, dtype=torch.float32, device=device)[:, None] * inv_freq
    return angle.cos(), angle.sin()


def yarn(frequencies: Tensor, before: int, after: int, turns: tuple[float, float]) -> Tensor:
    """Angles a position for a context that grows from `before` tokens to `after` [Peng et al. 2023, YaRN, "NTK by
    parts"]: frequencies that turn less than turns[0] times in the old one are stretched with it, of more than turns[1]
    left alone, linearly between."""
    low, high = turns
    kept = ((before * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return frequencies * (before / after + kept * (1 - before / after))


# attention that is not causal in whole sequences


class Branches:
    """Rows of several continuations of one beginning, side by side: a trunk, then branches, which see the trunk and
    themselves, at the positions that follow it.

    positions  (B, T) int64: of each token in its own text
    before     (B, T) int64: index of the token before it in its text; 0 for the first
    """

    def __init__(self, positions: Tensor, branch: Tensor, before: Tensor, max_position: int) -> None:
        """branch: (B, T) int64, 0 in the trunk, then 1, 2, ...; padding has a number of its own."""
        self.positions, self.before, self.max_position = positions, before, max_position
        self._branch = branch

    @staticmethod
    def of(rows: Sequence[tuple[int, Sequence[int]]], length: int, device: torch.device) -> "Branches":
        """rows: the length of each row's trunk, at least 1, and of its branches; length: that of all rows, padded."""
        positions = torch.zeros(len(rows), length, dtype=torch.int64)
        branch = torch.full((len(rows), length), -1)
        before = torch.zeros(len(rows), length, dtype=torch.int64)
        for i, (trunk, branches) in enumerate(rows):
            begin = 0
            for number, size in enumerate((trunk, *branches)):
                start, end = (0 if number == 0 else trunk), begin + size
                positions[i, begin:end] = torch.arange(start, start + size)
                branch[i, begin:end] = number
                before[i, begin:end] = torch.arange(begin - 1, end - 1)
                if size:
                    before[i, begin] = max(start - 1, 0)
                begin = end
        longest = int(positions.max())
        return Branches(positions.to(device), branch.to(device), before.to(device), longest)

    def masks(self, windows: Sequence[int]) -> list[Tensor]:
        """(B, 1, T, T) bool per layer, for the windows of the layers."""
        q, k = self.positions[:, :, None], self.positions[:, None, :]
        branch_q, branch_k = self._branch[:, :, None], self._branch[:, None, :]
        related = (branch_k == 0) | (branch_k == branch_q)
        masks = {w: (related & in_window(q, k, w))[:, None] for w in dict.fromkeys(windows)}
        return [masks[w] for w in windows]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q (B, T, H, D), k and v (B, S, G, D) -> (B, T, H, D), softmax scale 1/sqrt(D).

    mask: bool that broadcasts to (B, H, T, S), True where a query sees a key.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, D)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2)
