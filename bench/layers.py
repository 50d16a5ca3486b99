"""A layer in fp8 against the same layer in bf16, forward and backward, by what was measured of its ops.

Counted are its products, with every cast, and the norms, which make fp8 of what the first products take. Copies of
weights are counted once for each forward, though the micro-steps of a step share them. Attention itself is alike.
Where a shape was not measured, the time of another number of outputs stands for it, in proportion.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.history import microseconds
from bench.suite import Item

OURS = ("triton", "cuda", "cublas", "scaled_mm")
TARGET, TARGET_M, TARGET_C = 1.5, 65536, 1536
CASE = "depth 24"  # of TARGET_C
FORMS = {
    ("linear", "sum"), ("relu2_mlp", "plain"), ("fp8_linear", "given"), ("fp8_linear", "delayed"), ("fp8_mlp", "sum"),
    ("rms_norm", "mix3_first"), ("rms_norm", "mix3_fp8"), ("rms_norm", "mix_fp8"), ("rms_norm", "add"),
    ("quantise_weight", "plain"),
}  # fmt: skip

Row = Mapping[str, Any]
Shape = tuple[int, ...]


def needed(item: Item) -> bool:
    """Whether the comparison at the target's width takes it."""
    return (item.op, item.form) in FORMS and item.case.startswith(CASE) and item.dtype == "bfloat16"


class Times:
    """Microseconds of our fastest backend, bf16 results."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._us: dict[tuple[str, str, Shape], dict[str, dict[str, float]]] = {}
        for row in rows:
            if "us" in row and row["backend"] in OURS and row["dtype"] == "bfloat16":
                key = row["op"], row["form"], tuple(row["shape"])
                self._us.setdefault(key, {}).setdefault(row["backend"], {})[row["direction"]] = row["us"]

    def shapes(self, op: str, form: str) -> list[Shape]:
        return [shape for name, of, shape in self._us if (name, of) == (op, form)]

    def us(self, op: str, form: str, shape: Shape, *directions: str) -> float | None:
        """Of one backend, in these directions together."""
        found = self._us.get((op, form, shape), {}).values()
        return min((sum(t[d] for d in directions) for t in found if t.keys() >= set(directions)), default=None)

    def both(self, op: str, form: str, shape: Shape) -> float | None:
        return self.us(op, form, shape, "forward", "backward")

    def linear(self, op: str, form: str, shape: Shape) -> float | None:
        """Also of a shape (M, K, N) that was measured with other N alone: the nearest one, in proportion."""
        M, K, N = shape
        near = sorted((s for s in self.shapes(op, form) if s[:2] == (M, K)), key=lambda s: abs(s[2] - N))
        times = ((self.both(op, form, s), s[2]) for s in near)
        return next((us * N / n for us, n in times if us is not None), None)

    def weights(self, elements: int) -> float | None:
        """Of copies of that many elements, by the largest weight that was measured: memory bounds it."""
        times = [
            (self.us("quantise_weight", "plain", s, "forward"), s) for s in self.shapes("quantise_weight", "plain")
        ]
        rates = [(n, us / n) for us, (K, V, C) in times if us is not None and (n := K * V * C)]
        return elements * max(rates)[1] if rates else None


@dataclass(frozen=True)
class Part:
    """Microseconds of one part of a layer; None: not measured."""

    name: str
    bf16: float | None
    fp8: float | None


def parts(times: Times, M: int, C: int, F: int, qkv: int) -> list[Part]:
    def total(*us: float | None) -> float | None:
        known = [t for t in us if t is not None]
        return sum(known) if len(known) == len(us) else None

    linear, norm, forms = times.linear, (M, C), ("mix3_first", "mix3_fp8")
    entry, entry_fp8 = (times.both("rms_norm", form, norm) for form in forms)
    # no case adds in fp8: mix_fp8 moves the same tensors, and backward is alike
    second = times.us("rms_norm", "mix_fp8", norm, "forward"), times.us("rms_norm", "add", norm, "backward")
    return [
        Part(
            "linear",
            total(linear("linear", "sum", (M, C, qkv)), linear("linear", "sum", (M, C, C))),
            total(linear("fp8_linear", "given", (M, C, qkv)), linear("fp8_linear", "delayed", (M, C, C))),
        ),
        Part("MLP", times.both("relu2_mlp", "plain", (M, C, F)), times.both("fp8_mlp", "sum", (M, C, F))),
        Part("norms", total(entry, times.both("rms_norm", "add", norm)), total(entry_fp8, *second)),
        Part("weights", 0.0, times.weights((qkv + C + 2 * F) * C)),
    ]


def layer_lines(rows: Sequence[Row]) -> list[str]:
    """A line for each model whose MLP was measured in fp8."""
    times, lines = Times(rows), []
    for case, (M, C, F) in {row["case"]: row["shape"] for row in rows if row["op"] == "fp8_mlp"}.items():
        qkv = max((s[2] for s in times.shapes("fp8_linear", "given") if s[:2] == (M, C)), default=3 * C)
        found = parts(times, M, C, F, qkv)
        known = [p for p in found if p.bf16 is not None and p.fp8 is not None]
        if not any(p.bf16 for p in known):
            continue
        bf16, fp8 = sum(p.bf16 for p in known), sum(p.fp8 for p in known)
        each = ", ".join(f"{p.name} {p.bf16 / p.fp8:.2f}x" for p in known if p.bf16 and p.fp8)
        lacking = [p.name for p in found if p not in known]
        text = f"{case} (M {M}, C {C}): bf16 {microseconds(bf16)}, fp8 {microseconds(fp8)}, {bf16 / fp8:.2f}x ({each}"
        text += f"; without {', '.join(lacking)})" if lacking else ")"
        lines.append(text + (f"; target {TARGET}x at M {TARGET_M}" if C == TARGET_C else ""))
    return lines
