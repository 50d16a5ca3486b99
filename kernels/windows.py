"""What the backends of attention share: which keys a query sees, a window before itself, within its document."""

from typing import NamedTuple

import torch
from torch import Tensor


def visible(seq_len: int, window: int | None) -> int:
    """W: the most keys that a query sees, itself among them."""
    return seq_len if window is None else min(window + 1, seq_len)


def in_window(q_idx: Tensor, kv_idx: Tensor, window: int) -> Tensor:
    """True where a query sees a key: itself and `window` keys before it."""
    return (kv_idx <= q_idx) & (q_idx - kv_idx <= window)


class Documents(NamedTuple):
    """The documents of B rows of T tokens, counted through all rows: make it with `documents_of`, once a forward.

    cu_seqlens  (N + 1,) int32, contiguous: where each document begins, then B T. Two equal entries are a document
                without tokens, so that N may stay the same from batch to batch. None: their number is not known
    max_seqlen  no document has more tokens
    first       (B T,) int32: of each token, the first one of its document
    last        (B T,) int32: the last one
    """

    cu_seqlens: Tensor | None
    max_seqlen: int
    first: Tensor
    last: Tensor


class Attention(NamedTuple):
    """What attention returns where its logarithms are asked for."""

    y: Tensor
    lse: Tensor


def documents_of(cu_seqlens: Tensor, max_seqlen: int, seq_len: int, tokens: int) -> Documents:
    """The documents that begin at cu_seqlens (N + 1,) among `tokens` tokens in rows of seq_len; each row begins one.

    On a CPU ValueError where they do not; on a GPU nobody looks, which would be waiting for it.
    """
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype != torch.int32:
        form = f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        raise ValueError(f"cu_seqlens is {form}; expected (documents + 1,) torch.int32")
    if max_seqlen < 1:
        raise ValueError(f"max_seqlen is {max_seqlen}; expected the most tokens of a document, 1 or more")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_documents(cu_seqlens, max_seqlen, seq_len, tokens)
    at = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    # of equal entries the last one: it begins a document that has tokens
    mine = torch.searchsorted(cu_seqlens, at, right=True, out_int32=True) - 1
    return Documents(cu_seqlens, max_seqlen, cu_seqlens[mine], cu_seqlens[mine + 1] - 1)


def documents_at(begins: Tensor) -> Documents:
    """The documents of rows (B, T), of which `begins` is True at the first token of each; so is the first of each row.

    On the device alone, and nothing waits for it: how many there are is not known.
    """
    B, T = begins.shape
    at = torch.arange(T, dtype=torch.int32, device=begins.device)
    row = T * torch.arange(B, dtype=torch.int32, device=begins.device)[:, None]
    begins = begins | (at == 0)
    first = torch.where(begins, at, 0).cummax(1).values
    # of each token the beginning after it
    after = torch.where(begins, at, T)[:, 1:].flip(1).cummin(1).values.flip(1)
    last = torch.cat((after, after.new_full((B, 1), T)), dim=1) - 1
    return Documents(None, T, (row + first).flatten(), (row + last).flatten())


def _check_documents(cu_seqlens: Tensor, max_seqlen: int, seq_len: int, tokens: int) -> None:
    begins = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in zip(begins, begins[1:])]
    if begins[0] != 0 or begins[-1] != tokens or min(lengths) < 0:
        raise ValueError(f"cu_seqlens goes from {begins[0]} to {begins[-1]}; expected 0 to {tokens}, rising")
    if max(lengths) > max_seqlen:
        raise ValueError(f"a document has {max(lengths)} tokens; expected at most max_seqlen, {max_seqlen}")
    if lacking := set(range(0, tokens, seq_len)) - set(begins):
        raise ValueError(f"no document begins at token {min(lacking)}; expected one at each row of {seq_len}")


def dense_mask(q: Tensor, window: int | None, documents: Documents | None = None) -> Tensor | None:
    """(T, T), or with documents (B, 1, T, T), bool, True where a query sees a key; None where nothing but the future is
    hidden. q: (B, T, H, D)."""
    B, T = q.shape[:2]
    seen = visible(T, window)
    if documents is None and seen == T:
        return None
    i = torch.arange(T, device=q.device)
    mask = in_window(i[:, None], i[None, :], seen - 1)
    if documents is None:
        return mask
    first = documents.first.view(B, T) - T * torch.arange(B, device=q.device)[:, None]  # counted within the row
    return (mask & (i >= first[..., None])).unsqueeze(1)
