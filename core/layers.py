"""What models share: rotary tables, windows and their masks, attention, the layers of banks."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

ROPE_BASE = 100_000.0
FLEX_TILE = 128  # FlexAttention takes sequences of whole tiles

Mask = Tensor | BlockMask | None


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


# windows


def in_window(q_idx: Tensor, kv_idx: Tensor, window: int) -> Tensor:
    """True where a query sees a key: itself and `window` keys before it."""
    return (kv_idx <= q_idx) & (q_idx - kv_idx <= window)


def dense_mask(seq_len: int, window: int, device: torch.device) -> Tensor | None:
    """(T, T) bool, True where a query sees a key; None where the window hides nothing that causality shows."""
    if window >= seq_len - 1:
        return None
    i = torch.arange(seq_len, device=device)
    return in_window(i[:, None], i[None, :], window)


def block_mask(seq_len: int, window: int, device: torch.device) -> BlockMask | None:
    """The same for FlexAttention, which skips tiles that are wholly hidden."""
    if window >= seq_len - 1:
        return None

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return in_window(q_idx, kv_idx, window)

    return create_block_mask(mask_mod, None, None, seq_len, seq_len, device=device)


class WindowMasks:
    """The masks of a model's layers.

    On a GPU FlexAttention serves sequences of the training length, if those are whole tiles; its masks are made here,
    since in a compiled graph they would cost every step. Other lengths use dense masks to avoid recompiling.
    """

    def __init__(self, windows: Sequence[int], seq_len: int, device: torch.device, *, flex: bool | None = None) -> None:
        """flex: whether FlexAttention serves the training length; None: on a GPU."""
        self._windows, self._device = windows, device
        flex = device.type == "cuda" if flex is None else flex
        self._flex_len = seq_len if flex and seq_len % FLEX_TILE == 0 else None
        self._block_masks = {w: block_mask(seq_len, w, device) for w in set(windows)} if self._flex_len else {}

    def __call__(self, seq_len: int) -> list[Mask]:
        """What `attention` takes in each layer for whole sequences of this length."""
        if seq_len == self._flex_len:
            return [self._block_masks[w] for w in self._windows]
        masks = {w: dense_mask(seq_len, w, self._device) for w in dict.fromkeys(self._windows)}
        return [masks[w] for w in self._windows]


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

    def masks(self, windows: Sequence[int]) -> list[Mask]:
        """(B, 1, T, T) bool per layer, for the windows of the layers."""
        q, k = self.positions[:, :, None], self.positions[:, None, :]
        branch_q, branch_k = self._branch[:, :, None], self._branch[:, None, :]
        related = (branch_k == 0) | (branch_k == branch_q)
        masks = {w: (related & in_window(q, k, w))[:, None] for w in dict.fromkeys(windows)}
        return [masks[w] for w in windows]


# attention


@functools.cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """q (B, T, H, D), k and v (B, S, G, D) -> (B, T, H, D), softmax scale 1/sqrt(D).

    mask: bool that broadcasts to (B, H, T, S), True where a query sees a key; a BlockMask takes FlexAttention; None is
    causal.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, D)
    gqa = q.size(1) != k.size(1)
    if isinstance(mask, BlockMask):
        # uncompiled, FlexAttention makes all scores; within a compiled model it is compiled already
        flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
        y = flex(q, k, v, block_mask=mask, enable_gqa=gqa)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
    return y.transpose(1, 2)
