"""The parameter table: one row for each parameter of a model, and everything that is read off it.

A model states its parameters once, as rows (`core/models/gpt2.py`, `parameter_table`). The module builds its storage
from the rows, and what counts, plans, initialises, updates or stores parameters reads the rows instead of matching
names. A new feature of a model is a row or two here and a line in the forward.

Bank      same-shaped matrices of consecutive layers share one parameter (n, rows, cols), named `<kind>.<number>`.
          Several banks over depth let the gradient of the last layers be reduced while backward reaches the first
Group     which rule and learning rate update a row; "matrices" belong to Muon, every other group to AdamW
Views     the matrices of a bank as Muon orthogonalises them: q, k and v apart although they share storage
Arena     parameters that lie side by side in one storage, as do their states and gradients, so that one launch updates
          all of them: the matrices of one shape, small parameters
Storage   a row that is multiplied or looked up (`computes`) is stored in the compute type. Where that is bf16 and the
          row is `mastered`, 16 more bits beside it make the exact fp32 master. All other rows are fp32
"""

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MUON = "matrices"
BANK_LAYERS = 4  # layers whose matrices share a bank

Init = Callable[[Tensor, torch.Generator], object]


# initialisation: each fills a tensor in place


def normal(std: float) -> Init:
    return lambda p, generator: p.normal_(0, std, generator=generator)


def uniform(low: float, high: float) -> Init:
    return lambda p, generator: p.uniform_(low, high, generator=generator)


def constant(value: float) -> Init:
    return lambda p, _: p.fill_(value)


def ramp(first: float, change: float) -> Init:
    """From `first` in layer 0 to `first + change` in the last one, linearly."""

    def fill(p: Tensor, _: torch.Generator) -> None:
        depth_frac = torch.arange(p.numel(), device=p.device) / max(p.numel() - 1, 1)
        p.copy_(first + change * depth_frac)

    return fill


def values(numbers: Sequence[float]) -> Init:
    """These numbers."""
    return lambda p, _: p.copy_(torch.tensor(numbers, device=p.device).view_as(p))


# rows


@dataclass(frozen=True)
class MuonView:
    """Some of a bank's matrices as Muon sees them, given out by `take` as (K, R, C) in the bank's own storage."""

    rows: tuple[int, int] | None = None  # of each matrix; None: all
    split: int = 1  # equal matrices, one above the other, that each stored matrix consists of
    transposed: bool = False  # what is stored is the transpose of Muon's matrix
    lr: float | None = None  # factor on the learning rate; None: by its shape

    def __post_init__(self) -> None:
        assert self.rows is None or self.split == 1, "a view takes some rows of each matrix, or splits it"

    def take(self, bank: Tensor) -> Tensor:
        """Works on the bank and on every state that is shaped like it."""
        if self.split > 1:
            return bank.view(-1, bank.size(1) // self.split, bank.size(2))  # (n * split, R, C)
        return bank if self.rows is None else bank[:, self.rows[0] : self.rows[1]]

    def stored(self, bank: Sequence[int]) -> tuple[int, int, int]:
        """Shape of what `take` gives out of a bank of this shape."""
        n, rows, cols = bank
        if self.rows is not None:
            rows = self.rows[1] - self.rows[0]
        return (n * self.split, rows // self.split, cols)

    def second_shape(self, stored: Sequence[int]) -> tuple[int, int, int]:
        """Shape of NorMuon's second moment: a number for each row, or for each column of a wide matrix."""
        K, R, C = stored
        rows, cols = (C, R) if self.transposed else (R, C)
        return (K, rows, 1) if rows >= cols else (K, 1, cols)

    def second_stored(self, stored: Sequence[int]) -> tuple[int, int, int]:
        """The same with rows and columns as they are stored."""
        K, rows, cols = self.second_shape(stored)
        return (K, cols, rows) if self.transposed else (K, rows, cols)

    def lr_scale(self, stored: Sequence[int]) -> float:
        """Factor on the learning rate: tall matrices step further [nanochat 92d63d4, optim.py]."""
        if self.lr is not None:
            return self.lr
        _, R, C = stored
        rows, cols = (C, R) if self.transposed else (R, C)
        return max(1.0, rows / cols) ** 0.5


@dataclass(frozen=True)
class Param:
    """One row: a parameter, or a bank of matrices."""

    name: str  # as in checkpoints; `<kind>.<number>` of a bank
    shape: tuple[int, ...]
    init: Init
    group: str  # of the optimizer
    counts_as: str  # in reports and scaling laws
    multiplies: bool = False  # every token is multiplied by it, which costs 2 FLOPs an element forward and 4 backward
    computes: bool = False  # stored in the compute type
    mastered: bool = False  # keeps an exact fp32 master where it computes in bf16
    views: tuple[MuonView, ...] = ()  # of group "matrices"

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def dtype(self, compute: torch.dtype) -> torch.dtype:
        """Type of the stored parameter in a model that computes in `compute`."""
        return compute if self.computes else torch.promote_types(compute, torch.float32)

    def states(self, compute: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each state that the optimizer keeps beside the parameter.

        Moments are fp32 where there is an fp32 master to update, else they have the parameter's type: bf16 embeddings
        have bf16 moments [nanochat 92d63d4, optim.py]."""
        states: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        wide = torch.promote_types(compute, torch.float32)
        if self.mastered and self.dtype(compute) != wide:
            states["low"] = (self.shape, torch.int16)
        if self.group == MUON:
            states["momentum"] = (self.shape, wide)
            for i, view in enumerate(self.views):
                states[f"second.{i}"] = (view.second_shape(view.stored(self.shape)), wide)
            return states
        moments = wide if self.mastered else self.dtype(compute)
        return states | {"exp_avg": (self.shape, moments), "exp_avg_sq": (self.shape, moments)}


Table = tuple[Param, ...]


def bank(kind: str, n_layer: int, rows: int, cols: int, init: Init, *views: MuonView) -> list[Param]:
    """Rows of Muon's matrices of n_layer layers, in banks of BANK_LAYERS."""
    sizes = [min(BANK_LAYERS, n_layer - i) for i in range(0, n_layer, BANK_LAYERS)]
    return [
        Param(
            f"{kind}.{i}", (n, rows, cols), init, MUON, "transformer_matrices",
            multiplies=True, computes=True, mastered=True, views=views or (MuonView(),),
        )
        for i, n in enumerate(sizes)
    ]  # fmt: skip


# arenas


@dataclass(frozen=True)
class Arena:
    """Parameters side by side. Those of Muon are matrices (n, rows, cols) of one shape; of AdamW's, each has an arena
    of its own but for the small ones (n,), which share one.

    Its units, along the first dimension, are matrices, rows of a table, or single numbers. An arena may hold some units
    of its parameters only: those that one of several ranks owns (core/sharding.py).
    """

    shape: tuple[int, ...]
    params: Table
    # of Muon's: what it sees in the whole arena, but for which matrices are transposed
    views: tuple[MuonView, ...] = ()
    ranges: tuple[tuple[int, int], ...] | None = None  # of each parameter's units; None: all of them

    def units(self, p: Param) -> int:
        """Number of units of one of the arena's parameters, of all of it."""
        return p.numel // torch.Size(self.shape[1:]).numel()

    @property
    def held(self) -> tuple[tuple[int, int], ...]:
        """First unit and end of what is here of each parameter."""
        return self.ranges or tuple((0, self.units(p)) for p in self.params)

    def of(self, ranges: Sequence[tuple[int, int]]) -> "Arena":
        """The part of a whole arena that holds these units of each parameter."""
        count = sum(end - begin for begin, end in ranges)
        return Arena((count, *self.shape[1:]), self.params, self.views, tuple(ranges))

    def cut(self, storage: Tensor) -> dict[str, Tensor]:
        """Each parameter's part of a tensor that is shaped like the arena: shaped like the parameter where all of it is
        there, else by units."""
        parts = storage.split([end - begin for begin, end in self.held])
        whole = self.ranges is None
        return {p.name: part.view(p.shape) if whole else part for p, part in zip(self.params, parts)}

    def turned(self) -> list[tuple[slice, MuonView]]:
        """The matrices of an arena of Muon's, in runs of those that are all stored as they are, or all transposed."""
        runs: list[tuple[slice, MuonView]] = []
        begin = 0
        for p, (first, last) in zip(self.params, self.held):
            end = begin + last - first
            turn = MuonView(transposed=p.views[0].transposed)
            if runs and runs[-1][1] == turn:
                runs[-1] = (slice(runs[-1][0].start, end), turn)
            elif end > begin:
                runs.append((slice(begin, end), turn))
            begin = end
        return runs


def arenas(table: Table) -> list[Arena]:
    """All parameters of a table, each in one arena."""
    found: dict[object, list[Param]] = {}
    for p in table:
        key: object = p.name if p.computes else "small"
        if p.group == MUON:
            view = p.views[0]
            R, C = p.shape[1] // view.split, p.shape[2]
            # transposed square matrices have their second moments along the other axis
            key = (R, C, view.transposed and R == C, p.views if view.rows else None)
        found.setdefault(key, []).append(p)
    made = []
    for params in found.values():
        shape, views = params[0].shape, ()
        if params[0].group == MUON:
            params.sort(key=lambda p: p.views[0].transposed)  # two runs at most
            first = params[0].views[0]
            n = sum(p.shape[0] * p.views[0].split for p in params)
            shape, views = (n, shape[1] // first.split, shape[2]), params[0].views if first.rows else (MuonView(),)
        elif not params[0].computes:
            shape = (sum(p.numel for p in params),)
        made.append(Arena(shape, tuple(params), views))
    return made


# what is read off a table


def num_params(table: Iterable[Param], kinds: Sequence[str]) -> dict[str, int]:
    """Number of parameters by what they count as, in the order of `kinds`."""
    counts = dict.fromkeys(kinds, 0)
    for p in table:
        counts[p.counts_as] += p.numel
    return counts


def matmul_params(table: Iterable[Param]) -> int:
    """Number of parameters that every token is multiplied by."""
    return sum(p.numel for p in table if p.multiplies)


def weight_bytes(table: Iterable[Param], compute: torch.dtype) -> int:
    return sum(p.numel * p.dtype(compute).itemsize for p in table)


def state_bytes(table: Iterable[Param], compute: torch.dtype) -> int:
    """Bytes of all optimizer state, masters' low halves included."""
    states = (state for p in table for state in p.states(compute).values())
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in states)


# storage


def register(module: nn.Module, table: Iterable[Param]) -> None:
    """Gives the module an uninitialised fp32 parameter for each row: an attribute, or an item of an nn.ParameterList
    for banks."""
    banks: dict[str, list[nn.Parameter]] = {}
    for p in table:
        kind, _, number = p.name.partition(".")
        parameter = nn.Parameter(torch.empty(p.shape))
        if number:
            banks.setdefault(kind, []).append(parameter)
        else:
            module.register_parameter(kind, parameter)
    for kind, parameters in banks.items():
        setattr(module, kind, nn.ParameterList(parameters))


def alias(t: Tensor) -> Tensor:
    """The same memory as a tensor with a storage of its own, which begins where t does.

    Code of torch.compile that writes to a view of a tensor which does not begin its storage writes elsewhere (Inductor,
    torch 2.13 on a CPU: gradients of matrices went to those of others)."""
    return torch.from_dlpack(t.detach())


@torch.no_grad()
def init_weights(module: nn.Module, table: Iterable[Param], seed: int) -> None:
    """Initialises every row from a generator of its own: a feature that is switched off leaves the other values
    alone."""
    for row in table:
        p = module.get_parameter(row.name)
        # 32 bits: the CPU's generator ignores the others
        generator = torch.Generator(device=p.device).manual_seed(zlib.crc32(f"{seed} {row.name}".encode()))
        row.init(p, generator)
