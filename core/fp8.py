"""fp8 training: which matrices of the layers multiply in fp8, with copies and scales of theirs.

Products    of every matrix that is large enough, in training alone: forward, and both of backward
Copies      of weights, in both layouts: made when weights are written, for all micro-steps of a step (`refresh`)
Scales      of a normed input: a constant, since the norm bounds it. Of everything else by the recipe:
            dynamic   the largest size of the tensor itself, which takes a pass over memory of its own
            delayed   known before, so that whoever has the tensor in registers quantises it. Of each site follows from
                      the largest size there in the last HISTORY steps, over all micro-steps and ranks: all of them use
                      one scale, however many they are. (A gradient is that of the mean over a rank's tokens: with twice
                      as many ranks it is twice as large, and so is its scale, but for the first step's)
Saturation  what exceeds a delayed scale's range is clamped to it. Counted are the sites of a step where that happened
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from core import machine
from core.config import Config
from kernels.fp8 import E4M3, E5M2, ROW_MULTIPLE, Fp8Tensor, Site, empty_fp8
from kernels.op import Op, Shape
from kernels.quantise_weight import quantise_weight
from kernels.rms_norm import norm_scale

LEAST_SIDE = 128  # rows and columns from which a matrix converts [nanochat 92d63d4, base_train.py]
HISTORY = 16  # steps
# Range over the largest size of the history. In the first steps, where matrices that began as zeros grow, gradients
# become up to five times as large from one step to the next; e5m2 has 31 octaves to spare some
HEADROOM = {E4M3: 2.0, E5M2: 16.0}
# Before the first step is made. An activation is of the order of 1; a gradient, of a mean over hundreds of tokens or
# more, lies between 1e-12 and 3e-3, which e5m2 spans
FIRST_SCALE = {E4M3: 1.0, E5M2: 2.0**-24}
H100_BYTES = 3.35e12  # a second, of its memory

# what is quantised where, besides normed inputs: activations in forward, gradients in backward
ACTIVATIONS = ("out", "post")
GRADIENTS = ("d_qkv", "d_out", "d_pre", "d_mlp")


# the recipe


@dataclass(frozen=True)
class Recipe:
    """How a run trains in fp8."""

    scales: Literal["delayed", "dynamic"] = "delayed"
    bf16_ends: int = 0  # layers at each end whose matrices stay as they are

    @staticmethod
    def of(cfg: Config) -> "Recipe | None":
        """That of a run; None: it does not train in fp8."""
        return Recipe(cfg.fp8_scales, cfg.fp8_bf16_ends) if cfg.precision == "fp8" else None

    def layers(self, n_layer: int) -> range:
        return range(self.bf16_ends, max(self.bf16_ends, n_layer - self.bf16_ends))


class Choice(NamedTuple):
    """Matrices of one kind: whether they convert, and why, or why not."""

    kind: str
    shape: tuple[int, int]
    layers: int  # of how many layers
    converts: bool
    reason: str

    def __str__(self) -> str:
        how = "fp8" if self.converts else "bf16"
        return f"{self.kind:<9} {self.layers:>3} x {str(self.shape):<14} {how:<5} {self.reason}"


def choices(
    recipe: Recipe, matrices: Sequence[tuple[str, tuple[int, int], int]], n_layer: int, relu2: bool
) -> list[Choice]:
    """matrices: kind, shape and number of layers of each. Sizes decide, not the predicted gain, which nobody has
    measured yet."""
    found: list[Choice] = []
    inner = len(recipe.layers(n_layer))
    for kind, (rows, columns), n in matrices:
        one = Choice(kind, (rows, columns), n, False, "")
        if min(rows, columns) < LEAST_SIDE:
            found.append(one._replace(reason=f"rows or columns are fewer than {LEAST_SIDE}"))
        elif rows % ROW_MULTIPLE or columns % ROW_MULTIPLE:
            found.append(one._replace(reason=f"rows or columns are no multiples of {ROW_MULTIPLE}"))
        elif kind.startswith("mlp") and not relu2:
            found.append(one._replace(reason="the MLP in fp8 is that of squared ReLU"))
        else:
            gain = predicted_gain(kind, rows, columns, recipe.scales)
            slower = ": slower" if gain < 1 else ""
            reason = f"{gain:.2f} times as fast as bf16 at the peaks of an H100{slower}"
            if 0 < inner < n:
                found.append(one._replace(layers=n - inner, reason="first and last layers (--fp8-bf16-ends)"))
            if inner:
                found.append(one._replace(layers=inner, converts=True, reason=reason))
            else:
                found.append(one._replace(reason="all are first or last layers (--fp8-bf16-ends)"))
    return found


def predicted_gain(kind: str, rows: int, columns: int, scales: str) -> float:
    """Time of the three products in bf16 over that in fp8, where they have twice the peak, with the passes that
    quantise what no neighbour does: read in bf16 (twice with dynamic scales), written twice in fp8. An estimate;
    nothing of it was measured."""
    dynamic = scales == "dynamic"
    # numbers of a token: gradients of the result, and inputs that no norm makes; the MLP's epilogues need a known scale
    quantised = {"attn_qkv": rows, "attn_out": rows + columns, "mlp_up": 0, "mlp_down": columns}[kind]
    if dynamic and kind.startswith("mlp"):
        quantised += rows
    peak = machine.peak_flops("H100")
    assert peak is not None
    products, passes = 6.0 * rows * columns / peak, (6.0 if dynamic else 4.0) * quantised / H100_BYTES
    return products / (products / 2 + passes)


# delayed scales


def power_of_two(x: Tensor) -> Tensor:
    """The smallest power of two that is not below x > 0. Dividing by one is exact: the rounding is that of fp8's grid
    alone, and a size that moves a little changes nothing."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa 2^exponent, 0.5 <= mantissa < 1
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).to(exponent.dtype))


class DelayedScales(nn.Module):
    """Scales of the sites of all layers that are quantised to one fp8 type."""

    amax: Tensor  # (layers, sites): largest size so far in this step
    scale: Tensor  # (layers, sites): of this step
    history: Tensor  # (HISTORY, layers, sites): amax of the last steps, the newest last

    def __init__(self, n_layer: int, names: Sequence[str], dtype: torch.dtype) -> None:
        super().__init__()
        self.names, self.limit, self.headroom = tuple(names), torch.finfo(dtype).max, HEADROOM[dtype]
        sizes = n_layer, len(names)
        self.register_buffer("amax", torch.zeros(sizes), persistent=False)
        self.register_buffer("scale", torch.full(sizes, FIRST_SCALE[dtype]), persistent=False)
        self.register_buffer("history", torch.zeros(HISTORY, *sizes), persistent=False)

    def sites(self) -> list[dict[str, Site]]:
        """Of each layer, by name."""
        layers = zip(self.amax.unbind(), self.scale.unbind())
        return [
            {name: Site(*numbers) for name, *numbers in zip(self.names, amax.unbind(), scale.unbind())}
            for amax, scale in layers
        ]

    @torch.no_grad()
    def next_step(self) -> Tensor:
        """Scales of the next step from the sizes of this one. Returns how many sites were saturated.

        A size that is not finite tells nothing (the loss is not finite either, and training stops), and a site where
        nothing but zeros was keeps its scale."""
        saturated = (self.amax > self.limit * self.scale).sum()
        known = torch.where(self.amax.isfinite(), self.amax, 0.0)
        self.history.copy_(torch.cat((self.history[1:], known[None])))
        largest = self.history.amax(0)
        wanted = power_of_two((self.headroom / self.limit * largest).clamp_min(torch.finfo(torch.float32).tiny))
        self.scale.copy_(torch.where(largest > 0, wanted, self.scale))
        self.amax.zero_()
        return saturated


# the layers


class ManyChooser(Protocol):
    def choose_many(self, op: Op, problems: Sequence[tuple[Shape, torch.dtype | None]]) -> Callable[..., None]: ...


class Fp8Layers(nn.Module):
    """Copies and scales of a model whose layers train in fp8."""

    def __init__(
        self,
        recipe: Recipe,
        found: Sequence[Choice],
        banks: dict[str, Sequence[nn.Parameter]],
        n_layer: int,
        backends: ManyChooser,
    ) -> None:
        """found: the choices for the model; banks: of the matrices of each kind."""
        super().__init__()
        self.recipe = recipe
        # lists, in a dict: they are no parameters of this module
        self._banks = {choice.kind: list(banks[choice.kind]) for choice in found if choice.converts}
        self._n_layer, self._layers = n_layer, recipe.layers(n_layer)
        for kind, parameters in self._banks.items():
            for i, bank in enumerate(parameters):
                for name, t in empty_fp8(bank.detach())._asdict().items():
                    self.register_buffer(f"{kind}_{i}_{name}", t, persistent=False)
        # the banks of the same layers together, by number
        self._quantise: list[Callable[[Sequence[dict[str, Any]]], None]] = []
        for i in range(max((len(parameters) for parameters in self._banks.values()), default=0)):
            shapes = [tuple(parameters[i].shape) for parameters in self._banks.values()]
            self._quantise.append(backends.choose_many(quantise_weight, [(shape, None) for shape in shapes]))
        self.register_buffer("norm_scale", torch.tensor(norm_scale(banks["attn_qkv"][0].size(2))), persistent=False)
        self.activations: DelayedScales | None = None
        self.gradients: DelayedScales | None = None
        if recipe.scales == "delayed":
            self.activations = DelayedScales(n_layer, ACTIVATIONS, E4M3)
            self.gradients = DelayedScales(n_layer, GRADIENTS, E5M2)

    def refresh(self, names: Container[str] | None = None) -> None:
        """Makes the copies anew from the weights, or those of some layers: names holds at least one of their banks."""
        for i, quantise in enumerate(self._quantise):
            if names is None or any(f"{kind}.{i}" in names for kind in self._banks):
                banks = self._banks.items()
                quantise([{"w": bank[i].detach(), **self._bank(kind, i)._asdict()} for kind, bank in banks])

    def _bank(self, kind: str, i: int) -> Fp8Tensor:
        return Fp8Tensor(*(self.get_buffer(f"{kind}_{i}_{part}") for part in Fp8Tensor._fields))

    def layers(self) -> "list[LayerInFp8]":
        """What the ops of each layer are given. Once per forward, as banks are unbound once."""
        copies: dict[str, list[Fp8Tensor]] = {}
        for kind, parameters in self._banks.items():
            banks = [self._bank(kind, i) for i in range(len(parameters))]
            copies[kind] = [Fp8Tensor(*parts) for bank in banks for parts in zip(*(t.unbind() for t in bank))]
        sites: list[dict[str, Site]] = [{} for _ in range(self._n_layer)]
        for scales in self._delayed().values():
            for of_layer, more in zip(sites, scales.sites()):
                of_layer.update(more)
        return [
            LayerInFp8({kind: of[i] for kind, of in copies.items()} if i in self._layers else {}, sites[i])
            for i in range(self._n_layer)
        ]

    def _delayed(self) -> dict[str, DelayedScales]:
        both = {"activations": self.activations, "gradients": self.gradients}
        return {name: scales for name, scales in both.items() if scales is not None}

    def next_step(self, over_ranks: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Scales of the next step; over_ranks takes maxima over ranks, in place. Returns how many sites were saturated
        in this step, and None where no scale is delayed."""
        delayed = list(self._delayed().values())
        if not delayed:
            return None
        sizes = [scales.amax for scales in delayed]
        flat = over_ranks(torch.cat([t.reshape(-1) for t in sizes]))
        for t, part in zip(sizes, flat.split([t.numel() for t in sizes])):
            t.copy_(part.view_as(t))
        return torch.stack([scales.next_step() for scales in delayed]).sum()

    def forget(self) -> None:
        """Sizes of this step so far."""
        for scales in self._delayed().values():
            scales.amax.zero_()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the copies follow from the weights."""
        return {
            f"{name}.{part}": scales.get_buffer(part)
            for name, scales in self._delayed().items()
            for part in ("scale", "history")
        }


class LayerInFp8(NamedTuple):
    """Copies of a layer's weights by kind, those that convert, and its sites by name, where scales are delayed."""

    copies: dict[str, Fp8Tensor]
    sites: dict[str, Site]

    def has(self, kind: str) -> bool:
        return kind in self.copies

    def linear(self, kind: str, dy: str, x: str | None = None) -> dict[str, Any]:
        """Keyword arguments of `fp8_linear`: dy and x are the names of sites; None: x is quantised already."""
        options: dict[str, Any] = {"fp8": self.copies[kind], "dy_site": self.sites.get(dy)}
        return options if x is None else options | {"x_site": self.sites.get(x)}

    def mlp(self) -> dict[str, Any]:
        """Keyword arguments of `fp8_mlp`."""
        sites = {"post": self.sites["post"], "dpre": self.sites["d_pre"], "dy": self.sites["d_mlp"]}
        return {"up_fp8": self.copies["mlp_up"], "down_fp8": self.copies["mlp_down"], **sites}


IN_BF16 = LayerInFp8({}, {})
