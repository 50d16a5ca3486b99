"""The KV cache: what the tokens so far leave behind, so that the next one costs one token's work."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """State of B rows of text, each at its own position, for up to `capacity` tokens a row.

    keys, values   per layer (B, S, G, D) in the compute type, as attention takes them. S is the layer's window and the
                   token itself, or the capacity if that is less. Position p lies in slot p mod S: keys are rotated
                   already, and softmax does not mind the order
    embedding      (B, 1, C) of the last token, normalised, before smear; zero before the first token, which smears
                   nothing
    positions      (B,) int64, of the next token; `lengths` is the same on the host
    """

    def __init__(
        self,
        rows: int,
        capacity: int,
        *,
        windows: Sequence[int],
        n_kv_head: int,
        d_head: int,
        d_model: int,
        rope: tuple[Tensor, Tensor] | None,
        like: Tensor,
    ):
        """windows: of each layer; rope: cos and sin (capacity, D/2) fp32, None without rotary positions; like: a tensor
        of the device and type of keys and values."""
        shapes = [(rows, min(capacity, window + 1), n_kv_head, d_head) for window in windows]
        self.capacity = capacity
        # zeros: to the reference a slot not yet filled has weight 0, and 0 times garbage may be NaN
        self.keys = [like.new_zeros(shape) for shape in shapes]
        self.values = [like.new_zeros(shape) for shape in shapes]
        self.embedding = like.new_zeros(rows, 1, d_model)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=like.device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device="cpu")
        self._rope = rope

    def row(self, i: int) -> "KVCache":
        """Row i as a cache of one row; what is written there is written here."""
        view = copy.copy(self)
        view.keys, view.values = [t[i : i + 1] for t in self.keys], [t[i : i + 1] for t in self.values]
        for name in ("embedding", "positions", "lengths"):
            setattr(view, name, getattr(self, name)[i : i + 1])
        return view

    def begin(self, rows: int, num_tokens: int) -> None:
        """ValueError unless every row can take that many tokens."""
        if rows != len(self.lengths):
            raise ValueError(f"{rows} rows for a cache of {len(self.lengths)}")
        if num_tokens > 1 and self.lengths.any():
            raise ValueError(f"{num_tokens} tokens for rows that have begun: they go on with one token at a time")
        if (length := int(self.lengths.max()) + num_tokens) > self.capacity:
            raise ValueError(f"{length} tokens do not fit into a cache for {self.capacity}")

    def rope_tables(self) -> tuple[Tensor | None, Tensor | None]:
        """cos and sin of the next token of each row, each (B, 1, D/2) fp32; None without rotary positions."""
        if self._rope is None:
            return None, None
        cos, sin = self._rope
        return cos[self.positions, None], sin[self.positions, None]

    def seen(self) -> list[Tensor]:
        """(B,) int64 per layer: how many slots, from the first on, are filled once the next token of each row is in."""
        sizes = [keys.size(1) for keys in self.keys]
        seen: dict[int, Tensor] = {size: (self.positions + 1).clamp(max=size) for size in dict.fromkeys(sizes)}
        return [seen[size] for size in sizes]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k and v (B, T, G, D); returns all that T queries look at: a prompt at itself, one token at the
        slots."""
        T, size = k.size(1), self.keys[layer].size(1)
        for new, slots in ((k, self.keys[layer]), (v, self.values[layer])):
            if T == 1:
                slots[torch.arange(len(new), device=new.device), self.positions % size] = new[:, 0]
            else:
                slots[:, torch.arange(max(T - size, 0), T, device=new.device) % size] = new[:, -size:]
        return (self.keys[layer], self.values[layer]) if T == 1 else (k, v)

    def swap_embedding(self, x: Tensor) -> Tensor:
        """Stores the last of x (B, T, C); returns the one (B, 1, C) stored before."""
        before = self.embedding.clone()
        self.embedding.copy_(x[:, -1:])
        return before

    def advance(self, num_tokens: int) -> None:
        self.positions += num_tokens
        self.lengths += num_tokens
