"""Designs for the race to 3.28 as data: the peers', whose times check the model, and ours with what would speed it up.

`python -m bench.projection fineweb`. Times are predicted by `fineweb.step`. How many steps a loss needs is not: where a
lever changes that, the effect is the peers' own ablation, marked as taken from there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bench.projection.fineweb import (
    Bank,
    C,
    Design,
    Layer,
    Stage,
    Table,
    V,
    exchange,
    parts,
    run_seconds,
    step,
)  # fmt: skip
from bench.projection.machine import BF16, GPUS, TOLERANCE
from kernels.muon_update import muon_apply_cost, muon_momentum_cost

GOAL_S = 36.0


# peers


def stages_89(*published_ms: float) -> tuple[Stage, ...]:
    """Of record 89, and nearly of 85."""
    first, second, third, last = (1e-3 * ms for ms in published_ms)
    return (
        Stage("stage 1", 423, 16384, 896, 128, 384, published=first),
        Stage("stage 2", 424, 32768, 2048, 384, 896, published=second),
        Stage("stage 3", 423, 49152, 2048, 640, 1408, tied=False, published=third),
        Stage("extension", 15, 49152, 2048, 768, 1664, tied=False, published=last),
    )


LAYERS_89 = (  # 6 has no attention
    Layer(paired=True),
    Layer(value=True, xsa=True),
    Layer(paired=True, value=True),
    Layer(long=True, xsa=True, gate=True),
    Layer(xsa=True),
    Layer(paired=True),
    Layer(xsa=True),
    Layer(value=True),
    Layer(paired=True, value=True),
    Layer(long=True, value=True, gate=True, local=112),
)
LAYERS_92 = (  # 4, 6, 7 and 9 have none
    Layer(paired=True, d_qk=64),
    Layer(d_qk=64, d_v=64, value=True, xsa=True),
    Layer(paired=True, d_qk=64, value=True),
    Layer(long=True, xsa=True, gate=True),
    Layer(paired=True, d_qk=64),
    Layer(d_qk=64, d_v=64, value=True),
    Layer(long=True, value=True, gate=True),
)
VALUES, BIGRAMS = Table("value embeddings", 5 * V, 5), Table("bigrams", 377_280, ngram=True)
NGRAMS = Table("n-grams", 84_602_880, 2, ngram=True, sparse=True, pulled=True, rows_adam=True)

R85 = Design(
    name="modded #85",
    source="step times of its log v3 on 8 H100s (modded-nanogpt f411b3d)",
    stages=stages_89(32.3, 58.1, 84.0, 84.5),
    layers=LAYERS_89,
    mlps=11,
    mixes=21,  # x0 and bigrams at each attention, the skip of layer 6
    mixed=5,
    banks=(Bank("qk", 64, 256, 768), Bank("vo", 24, 768, 768), Bank("MLP", 24, 3072, 768)),
    tables=(VALUES, replace(BIGRAMS, sparse=True)),
    fp8=frozenset(("head", "MLP up")),
)
R89 = replace(
    R85,
    name="modded #89",
    source="73.8 s on the board; of that its stages take the shares of a log, 13.4, 24.2, 34.9, 1.2 s (f411b3d)",
    stages=stages_89(31.7, 57.1, 82.5, 80.0),
    fp8=R85.fp8 | {"MLP down"},
    published=73.8,
)
R92 = Design(
    name="modded #92",
    source="39.914 s and its ablation, from its README; step times of its log (fd1b14a)",
    stages=(
        Stage("stage 1", 320, 16384, 896, 128, 384, candidates=10240, published=17.0e-3),
        Stage("stage 2", 361, 32768, 2048, 384, 896, candidates=10240, every=4, published=30.3e-3),
        Stage("stage 3", 284, 49152, 2560, 640, 1408, candidates=14336, every=4, published=45.0e-3),
        Stage("stage 3, more candidates", 142, 49152, 2560, 640, 1408, candidates=24576, every=4, published=47.9e-3),
        Stage("taper", 67, 40960, 2560, 640, 1408, every=4, published=46.6e-3),
        Stage("extension", 20, 16384, 2560, 768, 1664, tied=False, every=4, published=22.7e-3),
    ),
    layers=LAYERS_92,
    mlps=11,
    mixes=13,
    mixed=10,
    banks=(Bank("qk", 48, 256, 768), Bank("vo", 16, 768, 768), Bank("MLP", 24, 2816, 768)),
    tables=(Table("value embeddings", 4 * V, 4, sparse=True, pulled=True), NGRAMS),
    fp8=frozenset(("head", "logits", "qkv", "MLP up", "MLP down", "MLP backward")),
    d_ff=2816,
    fused=True,
    iterations=6,
    update_bytes=98,  # one more iteration 6, the slow rail and its blend 12
    graphs=True,
    late=True,
    besides_s=0.14 + 0.23,  # before the first step and after the last
    published=39.914,
)
PEERS = (R85, R89, R92)
# what #92 takes more without one of its mechanisms, seconds [its README, two runs each, mostly], and that design
ABLATIONS = (
    ("sampled softmax, logits in fp8", 8.80,
     replace(R92, stages=tuple(replace(s, candidates=V) for s in R92.stages), fp8=R92.fp8 - {"logits"})),
    ("fp8 in the MLP's backward", 5.02, replace(R92, fp8=R92.fp8 - {"MLP backward"})),
    ("CUDA graphs", 2.99 + 0.84, replace(R92, graphs=False)),
    ("n-gram table in place of #89's", 1.19, replace(R92, tables=(R92.tables[0], R85.tables[1]))),
    ("sparse value embeddings", 1.05, replace(R92, tables=(Table("value embeddings", 4 * V, 4), NGRAMS))),
    ("a mix of ten sources", -0.51, replace(R92, mixed=5)),
)  # fmt: skip
# its "attention package" is one figure, and nothing says whether dropped layers came back
ATTENTION_ABLATION = 4.95
ATTENTION_ABLATIONS = (
    ("narrow heads and fp8 of qkv",
     replace(R92, layers=tuple(replace(x, d_qk=128, d_v=128) for x in LAYERS_92), fp8=R92.fp8 - {"qkv"})),
    ("that, and the dropped layers: #89's attention",
     replace(R92, layers=LAYERS_89, mixes=21, banks=(*R85.banks[:2], R92.banks[2]), fp8=R92.fp8 - {"qkv"})),
)  # fmt: skip


# ours


def moved_by_muon() -> float:
    """Bytes of an element by our kernels, the rounding of the products' result included."""
    shape = (1, 768, 768)
    nbytes = muon_momentum_cost(shape, BF16, "rows")[1] + muon_apply_cost(shape, BF16, "rows")[1]
    return nbytes / (768 * 768)


# the trainer's own configuration goes here
OURS = Design(
    name="Redline",
    source="the model and schedule of #89, as core/ runs things",
    stages=tuple(replace(s, published=None) for s in R89.stages),
    layers=LAYERS_89,
    mlps=11,
    mixes=21,
    mixed=5,
    banks=(Bank("qk", 60, 256, 768), Bank("vo", 20, 768, 768), Bank("MLP", 22, 3072, 768)),
    tables=(VALUES, BIGRAMS),
    fp8=frozenset(("head", "MLP up", "MLP down", "MLP backward")),
    fused=True,
    chunks=True,
    update_bytes=moved_by_muon(),
    early=4,  # stages of the model, as in gpt2; assumption
    late=True,
    sums=True,
)


@dataclass(frozen=True)
class Lever:
    """A change of a design. millinats: by how much it lowers the loss at as many steps, from the source."""

    name: str
    change: Callable[[Design], Design]
    millinats: float = 0.0
    source: str = ""


def sampled(d: Design) -> Design:
    """Candidates as in #92, the whole softmax in its last 87 steps; d has the stages of #89."""
    first, second, third, last = d.stages
    steps = third.steps - (87 - last.steps)
    third = [
        replace(third, steps=n, candidates=P) for n, P in ((steps * 2 // 3, 14336), (steps - steps * 2 // 3, 24576))
    ]
    whole = replace(d.stages[2], name="stage 3, whole softmax", steps=d.stages[2].steps - steps)
    first, second = (replace(s, candidates=10240) for s in (first, second))
    return replace(d, stages=(first, second, *third, whole, last), fp8=d.fp8 | {"logits"})


def slower(d: Design, table_every: int) -> Design:
    return replace(d, stages=tuple(replace(s, every=table_every if i else 2) for i, s in enumerate(d.stages)))


def with_ngrams(d: Design) -> Design:
    return slower(replace(d, tables=(d.tables[0], NGRAMS)), 4)


def with_sparse_values(d: Design) -> Design:
    return replace(d, tables=(replace(d.tables[0], sparse=True, pulled=True), *d.tables[1:]))


def with_sparse_bigrams(d: Design) -> Design:
    """Gradients alone: AdamW moves every row."""
    return replace(d, tables=(d.tables[0], replace(d.tables[1], sparse=True)))


def with_attention_of_92(d: Design) -> Design:
    banks = (Bank("qk", 42, 256, 768), Bank("vo", 14, 768, 768), *d.banks[2:])
    tables = (replace(d.tables[0], rows=4 * V, lookups=4), *d.tables[1:])
    return replace(d, layers=LAYERS_92, mixes=13, banks=banks, tables=tables, fp8=d.fp8 | {"qkv"})


def narrowed(layer: Layer) -> Layer:
    """As #92 has it: long windows keep their width."""
    if layer.long:
        return layer
    return replace(layer, d_qk=64, d_v=128 if layer.paired else 64)


def without_layers(d: Design) -> Design:
    gone = (4, 6, 8)  # places in LAYERS_89 of the layers 4, 7 and 9
    return replace(d, layers=tuple(replace(x, local=0) for i, x in enumerate(d.layers) if i not in gone))


def with_mlp_of_92(d: Design) -> Design:
    return replace(d, d_ff=2816, banks=(*d.banks[:2], Bank("MLP", 22, 2816, 768)))


ABLATION, UNKNOWN = "#92's ablation", "no ablation says what it does to the loss"
LEVERS = (
    Lever("n-gram table of 84.6 M rows, pulled row by row", with_ngrams, 35.8, ABLATION),
    Lever("weights averaged at the end", lambda d: d, 20.2, ABLATION),
    Lever("sampled softmax, logits in fp8", sampled, -2.4, ABLATION),
    Lever("attention of #92: narrow heads, 7 layers, qkv in fp8", with_attention_of_92, -6.9, ABLATION),
    Lever("CUDA graphs of the whole step", lambda d: replace(d, graphs=True)),
    Lever("sparse value embeddings, both ways", with_sparse_values),
    Lever("sparse gradients of the bigram table", with_sparse_bigrams),
    Lever("MLP of 2816", with_mlp_of_92, 0.0, UNKNOWN),
    Lever("the last mix of ten sources", lambda d: replace(d, mixed=10), 6.1, ABLATION),
    Lever("ANVIL's update", lambda d: replace(d, iterations=6, update_bytes=d.update_bytes + 12), 4.9, ABLATION),
    Lever("passes over the residual stream by kernels of our own", lambda d: replace(d, passes="kernel pass")),
    Lever("o in fp8, too", lambda d: replace(d, fp8=d.fp8 | {"o"}), 0.0, UNKNOWN),
)
# parts of the lever on attention, alone
OF_ATTENTION = (
    Lever("narrow heads", lambda d: replace(d, layers=tuple(map(narrowed, d.layers)))),
    Lever("without attention in the layers 4, 7 and 9, and DC-MHA", without_layers),
    Lever("qkv in fp8", lambda d: replace(d, fp8=d.fp8 | {"qkv"})),
)
WITHOUT = Lever("attention by our own kernels instead of FlashAttention 3", lambda d: replace(d, kernels="own "))


@dataclass(frozen=True)
class Claim:
    """What an entry states of itself: the share of its base's steps that it needs, and a factor on a step's time."""

    name: str
    steps: float
    time: float = 1.0
    source: str = "open pull request, confirmed by nobody"


CLAIMS = (
    Claim("continuations of repeated contexts, from all training shards (#367)", 610 / 1194),
    Claim("continuations within the document as inputs (DocCopy)", 1132 / 1194, 1.024),
    Claim("n-grams hashed over normalised tokens (#375)", 1179 / 1194),
    Claim("tokens that no encoder emits are masked in validation", 1300 / 1315, source="record 91"),
)


def share_of_millinat() -> float:
    """Of a run's time, what buys a thousandth of a nat: 164 ms of 39.9 s [#92's ablation]."""
    return 0.164 / 39.914


def fewer(d: Design, share: float) -> Design:
    return replace(d, stages=tuple(replace(s, steps=s.steps * (1 - share)) for s in d.stages))


@dataclass(frozen=True)
class Gain:
    """Seconds of a run. predicted: by the step's time; steps: by fewer steps, from the source; after: of the run
    with all levers up to this one."""

    lever: Lever
    predicted: float
    steps: float
    after: float

    @property
    def total(self) -> float:
        return self.predicted + self.steps


def gains(d: Design = OURS, levers: Sequence[Lever] = LEVERS) -> list[Gain]:
    """Each lever alone, the largest first, and all up to each.

    Alone, a thousandth of a nat is worth what #92's authors say. Together, all of a run's levers need as many steps as
    #92, which has them: their effects on the loss do not add up.
    """
    base, rate = run_seconds(d), share_of_millinat()
    alone = []
    for lever in levers:
        after = run_seconds(lever.change(d))
        alone.append((lever, base - after, after * rate * lever.millinats))
    alone.sort(key=lambda item: -(item[1] + item[2]))
    steps = [sum(s.steps for s in x.stages) for x in (R92, d)]
    together = (1 - steps[0] / steps[1]) / sum(lever.millinats for lever in levers)
    found, share = [], 0.0
    for lever, predicted, fewer_steps in alone:
        d, share = lever.change(d), share + together * lever.millinats
        found.append(Gain(lever, predicted, fewer_steps, run_seconds(fewer(d, share))))
    return found


# words


def race_lines(design: Design = OURS, rows: bool = False) -> list[str]:
    """rows: steps op by op, too."""
    lines = ["## Check", "", "| design | stage | published ms | predicted ms | error | |", "|---|---|--:|--:|--:|---|"]
    for d in PEERS:
        for s in d.stages:
            lines.append(checked(d.name, s.name, 1e3 * (s.published or 0), 1e3 * step(d, s).seconds()))
        if d.published:
            lines.append(checked(d.name, "**run, s**", d.published, run_seconds(d)))
    lines += ["", "| #92 without | published s | predicted s |", "|---|--:|--:|"]
    packages = [(name, ATTENTION_ABLATION, changed) for name, changed in ATTENTION_ABLATIONS]
    for name, published, changed in (*ABLATIONS, *packages):
        lines.append(f"| {name} | {published:+.2f} | {run_seconds(changed) - run_seconds(R92):+.2f} |")
    lines += ["", "Sources:", ""]
    lines += [f"- {d.name}: {d.source}" for d in PEERS]
    lines += ["", "## Where the time goes, s of a run", "", *breakdown([*PEERS[1:], design])]
    lines += ["", f"## {design.name}, {design.source}", "", *by_stage(design)]
    if rows:
        for d in (*PEERS, design):
            for s in d.stages:
                lines += ["", f"### {d.name}: {s.name}", "", "| op | part | ms |", "|---|---|--:|"]
                found = sorted(step(d, s).rows, key=lambda row: -row.seconds())
                lines += [f"| {row.op} | {row.group} | {1e3 * row.seconds():.3f} |" for row in found]
    return [*lines, "", *lever_lines(design), "", *exchange_lines(design)]


def checked(name: str, stage: str, published: float, predicted: float) -> str:
    error = predicted / published - 1
    verdict = "" if abs(error) <= TOLERANCE else f"**not within {100 * TOLERANCE:.0f} %**"
    return f"| {name} | {stage} | {published:.1f} | {predicted:.1f} | {100 * error:+.1f} % | {verdict} |"


def breakdown(designs: Sequence[Design]) -> list[str]:
    """By part, the last design's largest first."""
    found = [parts(d) for d in designs]
    lines = [f"| part | {' | '.join(d.name for d in designs)} |", "|---|" + "--:|" * len(designs)]
    lines += [f"| {part} | {' | '.join(f'{f[part]:.2f}' for f in found)} |" for part in found[-1]]
    if any(d.besides_s for d in designs):
        lines.append(f"| before and after the steps | {' | '.join(f'{d.besides_s:.2f}' for d in designs)} |")
    return [*lines, f"| **sum** | {' | '.join(f'**{run_seconds(d):.1f}**' for d in designs)} |"]


def by_stage(d: Design) -> list[str]:
    lines = ["| stage | steps | tokens a rank | ms | s |", "|---|--:|--:|--:|--:|"]
    for s in d.stages:
        ms = 1e3 * step(d, s).seconds()
        lines.append(f"| {s.name} | {s.steps} | {s.tokens:,} | {ms:.1f} | {1e-3 * ms * s.steps:.1f} |")
    return lines


def lever_lines(d: Design) -> list[str]:
    found, base = gains(d), run_seconds(d)
    lines = [
        f"## What would bring {d.name} from {base:.1f} to below {GOAL_S:.0f} s",
        "",
        "Alone, in seconds of a run: by the step's time (predicted) and by fewer steps (taken from the peers' "
        f"ablation, a thousandth of a nat for {1e3 * share_of_millinat():.1f} thousandths of a run). Then all up to "
        "each; together they need #92's number of steps, as effects on the loss do not add up.",
        "",
        "| lever | step time | steps (theirs) | alone | all up to here | |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for g in found:
        steps = f"{g.steps:+.1f}" if g.lever.millinats else ""
        lines.append(
            f"| {g.lever.name} | {g.predicted:+.1f} | {steps} | {g.total:+.1f} | {g.after:.1f} | {g.lever.source} |"
        )
    after = found[-1].after
    for claim in CLAIMS:
        total = after * claim.steps * claim.time
        alone = base * (1 - claim.steps * claim.time)
        lines.append(
            f"| {claim.name} | | {alone:+.1f} | {alone:+.1f} | {total:.1f} with the levers above | {claim.source} |"
        )
    lines += ["", "Of the lever on attention, step time alone, s of a run:", ""]
    lines += [f"- {lever.name}: {base - run_seconds(lever.change(d)):+.1f}" for lever in OF_ATTENTION]
    lines += ["", f"A{WITHOUT.name[1:]}: {run_seconds(WITHOUT.change(d)) - base:.1f} s more."]
    return lines


def exchange_lines(d: Design) -> list[str]:
    """Of #89's tables, by the tokens of each of d's stages."""
    lines = [
        "## Lookup tables: sparse against dense communication, updated every second step",
        "",
        "ms a step, nothing hidden: all rows both ways; gradients of touched rows alone; weights of the next cycle's "
        "rows alone, too.",
        "",
        "| table | tokens a rank | rows touched | dense | gradients sparse | both sparse |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for t in (VALUES, BIGRAMS):
        for tokens in sorted({s.tokens for s in d.stages}):
            e = exchange(t, tokens)
            lines.append(
                f"| {t.name}, {t.rows:,} x {C} | {tokens:,} | {e.rows:,.0f} ({100 * e.rows / t.rows:.0f} %) | "
                f"{1e3 * e.dense:.2f} | {1e3 * e.gradients:.2f} | {1e3 * e.both:.2f} |"
            )
    lines += ["", "Sparse gradients of a bigram table pay from so many rows on:", ""]
    lines += [f"- {tokens:,} tokens a rank: {pays_from(tokens):,}" for tokens in sorted({s.tokens for s in d.stages})]
    return lines


def pays_from(tokens: int) -> int:
    """The fewest rows of a bigram table, in thousands, of which gradients are sent faster sparse than dense."""
    rows = range(1000, BIGRAMS.rows, 1000)
    found = ((n, exchange(replace(BIGRAMS, rows=n), tokens)) for n in rows)
    return next(n for n, e in found if e.gradients < e.dense)


def as_dict(d: Design) -> dict:
    stages = [
        {"stage": s.name, "steps": s.steps, "tokens": s.tokens * GPUS, "step_ms": 1e3 * step(d, s).seconds()}
        | ({"published_ms": 1e3 * s.published} if s.published else {})
        for s in d.stages
    ]
    total = {"total_s": run_seconds(d)} | ({"published_s": d.published} if d.published else {})
    return {"name": d.name, "source": d.source, "stages": stages, "parts_s": parts(d)} | total


def race_dict(design: Design = OURS) -> dict:
    levers = [
        {"lever": g.lever.name, "step_time_s": g.predicted, "steps_s_by_peers": g.steps, "all_to_here_s": g.after}
        for g in gains(design)
    ]
    tables = [
        {"table": t.name, "tokens": tokens} | exchange(t, tokens).in_ms()
        for t in (VALUES, BIGRAMS)
        for tokens in sorted({s.tokens for s in design.stages})
    ]
    return {"designs": [as_dict(d) for d in (*PEERS, design)], "levers": levers, "tables_ms": tables}
