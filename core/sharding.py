"""Which rank owns what: every rank computes with all weights, and one updates each.

The owner of a matrix, or of rows of a table, alone keeps the low half of its fp32 master and its moments, receives its
gradient, and gives out its new value. Small parameters have no owner: every rank keeps and updates them.

Units      whole matrices, since Muon orthogonalises each as one, and rows of AdamW's tables
Balance    matrices are dealt by the arithmetic of their update, the largest first, each to the rank with the least so
           far. Rows of the tables then level what ranks own: memory, and what each receives and sends
Order      of a parameter, the units of one rank are neighbours, and the ranks follow each other by their places: those
           of local rank 0 on all nodes first. So what goes to a rank, or to all ranks of one local rank, is one piece
           of memory, and exchanging needs no permutation (core/exchange.py)
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from core.params import MUON, Arena, Param, Table, arenas
from kernels.polar_express import polar_express_cost

LEAST_MATRIX = 512  # elements from which a matrix has an owner: those of gates have a few hundred


class Shard(NamedTuple):
    """What this rank keeps of a tensor that ranks share out."""

    shape: tuple[int, ...]  # of the whole
    dtype: torch.dtype
    # where each begins in the whole, and its storage: hyper-rectangles of full rank, disjoint over ranks; may be none
    pieces: Sequence[tuple[tuple[int, ...], Tensor]]


@dataclass(frozen=True)
class Grid:
    """Ranks as nodes of equally many: rank = node * local_size + local rank, as torchrun counts them."""

    nodes: int
    local_size: int

    @property
    def size(self) -> int:
        return self.nodes * self.local_size

    def place(self, rank: int) -> int:
        """Where a rank comes among all in the order of owners."""
        node, local = divmod(rank, self.local_size)
        return local * self.nodes + node


@dataclass(frozen=True)
class Dealing:
    """Units of each parameter that has owners. bounds: of place i, from bounds[i] on and before bounds[i + 1]."""

    bounds: dict[str, tuple[int, ...]]
    elements: tuple[int, ...]  # that each place owns
    flops: tuple[int, ...]  # of its matrices' orthogonalisation

    def own(self, arena: Arena, place: int) -> Arena:
        """What a place has of a whole arena."""
        if arena.params[0].name not in self.bounds:
            return arena
        return arena.of([(self.bounds[p.name][place], self.bounds[p.name][place + 1]) for p in arena.params])


def deal(table: Table, places: int) -> Dealing:
    """Shares the parameters of a table out to that many ranks."""
    matrices: list[tuple[Param, Arena]] = []
    tables: list[Param] = []
    for arena in arenas(table):
        for p in arena.params:
            if p.group == MUON and torch.Size(arena.shape[1:]).numel() >= LEAST_MATRIX:
                matrices.append((p, arena))
            elif p.group != MUON and p.computes:
                tables.append(p)
    # matrices: one by one to whoever has the least work, the costliest first; banks of the same layers one after the
    # other, so that what these layers exchange is level too
    counts = {p.name: [0] * places for p, _ in matrices}
    flops, elements = [0] * places, [0] * places
    least = [(0, place) for place in range(places)]
    costs = {p.name: sum(_flops(view.stored((1, *arena.shape[1:]))) for view in arena.views) for p, arena in matrices}
    for p, arena in sorted(matrices, key=lambda item: (-costs[item[0].name], int(item[0].name.partition(".")[2]))):
        for _ in range(arena.units(p)):
            done, place = heapq.heappop(least)
            heapq.heappush(least, (done + costs[p.name], place))
            counts[p.name][place] += 1
            flops[place] = done + costs[p.name]
            elements[place] += torch.Size(arena.shape[1:]).numel()
    bounds: dict[str, tuple[int, ...]] = {name: (0, *accumulate(n)) for name, n in counts.items()}
    # rows: what is missing to the common level
    missing = _level(elements, sum(p.numel for p in tables))
    for p in tables:
        ends = [round(p.shape[0] * part) for part in accumulate(missing)]
        bounds[p.name] = (0, *ends[:-1], p.shape[0])
        for place, (begin, end) in enumerate(zip(bounds[p.name], bounds[p.name][1:])):
            elements[place] += (end - begin) * (p.numel // p.shape[0])
    return Dealing(bounds, tuple(elements), tuple(flops))


def _flops(shape: tuple[int, int, int]) -> int:
    return polar_express_cost(shape, torch.bfloat16)[0]


def _level(heights: Sequence[int], amount: int) -> list[float]:
    """How so much water spreads over ground of these heights: the share of it that stands on each."""
    if not amount:
        return [1 / len(heights)] * len(heights)
    level, ground = 0.0, sorted(heights)
    for i in range(1, len(ground) + 1):  # over the i lowest
        level = (amount + sum(ground[:i])) / i
        if i == len(ground) or level <= ground[i]:
            break
    return [max(level - height, 0.0) / amount for height in heights]
