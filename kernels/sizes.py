"""Sizes: rounding up, and those of the tracks' models, from which each op derives the shapes that it is compiled and
measured at."""

from collections.abc import Callable
from dataclasses import dataclass


def round_up(n: int, multiple: int) -> int:
    """The least multiple that is not below n, which may be a symbol of torch.compile's."""
    return (n + multiple - 1) // multiple * multiple


@dataclass(frozen=True)
class Size:
    """One model and the batch of one forward pass on one device. The letters are those of core/models/gpt2.py."""

    B: int  # rows
    T: int  # tokens of a row
    C: int  # channels
    H: int  # query heads
    G: int  # key and value heads
    D: int  # channels of a head
    F: int  # units of the MLP
    V: int  # vocabulary, padded
    L: int  # layers

    @property
    def tokens(self) -> int:
        return self.B * self.T


VE_GATE_CHANNELS = 12  # channels that the gates of value embeddings read


def _gpt2(depth: int, rows: int) -> Size:
    """nanochat's model of that depth, with its rows per forward pass on an 80 GB H100 [nanochat 92d63d4]."""
    D, width = 128, 64 * depth
    C = round_up(width, D)
    return Size(B=rows, T=2048, C=C, H=C // D, G=C // D, D=D, F=4 * C, V=32768, L=depth)


SIZES = {
    "quickstart": Size(B=8, T=256, C=128, H=2, G=2, D=64, F=512, V=4096, L=3),
    "depth 12": _gpt2(12, rows=32),
    "depth 24": _gpt2(24, rows=16),
    "depth 26": _gpt2(26, rows=16),
    # modded-nanogpt's model, and one rank's tokens in its last stage as one row
    "fineweb": Size(B=1, T=49152, C=768, H=6, G=6, D=128, F=3072, V=50304, L=11),
}


def cases(shape: Callable[[Size], tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Label -> shape of an op that works on activations, or on one matrix of a model."""
    return {label: shape(size) for label, size in SIZES.items()}


def muon_cases() -> dict[str, tuple[int, int, int]]:
    """Label -> (matrices, rows, columns) of what Muon updates at a time, all of a model that have one shape: q, k, v
    and o of attention, the MLP's, and the gates of value embeddings."""
    first = SIZES["quickstart"]
    found = {"quickstart": (4 * first.L, first.C, first.C)}
    for label, size in SIZES.items():
        if label.startswith("depth"):
            found[f"{label}, attention"] = (4 * size.L, size.C, size.C)
            found[f"{label}, MLP"] = (2 * size.L, size.F, size.C)
    size = SIZES["depth 12"]
    found["depth 12, gates"] = (size.L // 2, size.G, VE_GATE_CHANNELS)
    # q and k of two heads are one matrix there; its other matrices are those of depth 12
    size = SIZES["fineweb"]
    return found | {"fineweb, query pairs": (size.L * (size.H + size.G) // 2, 2 * size.D, size.C)}
