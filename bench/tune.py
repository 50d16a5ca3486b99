"""Find the configs of Triton kernels on this GPU: `python -m bench.tune [OP ...] --out DIR`.

Each config function that an op calls (`_config` and its like) is a point from which tune climbs. Neighbours of
the best config so far have one tile size or the warps halved or doubled, or one stage more or fewer.

1. Static facts   a neighbour is out if it does not compile, spills, is serialized or exceeds shared memory
2. The law        a neighbour is out if it computes something wrong, as half a tile that has to hold a whole row does
3. Time           the rest take turns with the best so far: forward plus backward, one form, one shape. The climb
                  goes on from the fastest neighbour whose speedup is above 1 beyond noise

Prints the table, the winner of each config function, and a `Measurement` for the op. DIR/tune.jsonl has a line for each
op and shape, written as it is found. `--device cpu` rehearses all of it in Triton's interpreter, on tiny shapes: its
times mean nothing.
"""

import argparse
import contextlib
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

import kernels.op
from bench import aot, history, interpreter
from bench.kernel_model import LIBRARY
from bench.law import leaves
from bench.ops import OpPrograms, has_gradients, op_item
from bench.static import LIMITS
from bench.suite import Item, Result, measure
from bench.timing import Sampler
from core.stopping import UserError, one_sentence
from kernels.op import Op
from kernels.ops import BY_NAME

ROOT = Path(__file__).resolve().parent.parent
BASE = "committed"
SECONDS = 0.2  # for each candidate and direction
MAX_STEPS = 4  # of a climb
TINY_DIM = 32  # of a rehearsal's shapes
MAX_WARPS, MAX_STAGES = 32, 6

Config = dict[str, int]
Choice = dict[str, Config]  # a config for each call of a config function; others are as committed


# config functions


def config_functions() -> Iterator[tuple[Any, str, FunctionType]]:
    """(module, name, function) of every config function that a module of kernels/ defines."""
    for module in [m for name, m in sys.modules.items() if name.startswith("kernels.")]:
        for name, function in list(vars(module).items()):
            ours = inspect.isfunction(function) and function.__module__ == module.__name__
            if ours and name.endswith("_config"):
                yield module, name, function


@contextlib.contextmanager
def chosen(choice: Mapping[str, Config], seen: Choice | None = None) -> Iterator[None]:
    """Inside, these calls of config functions return these configs; `seen` receives what every call returned."""
    functions = list(config_functions())

    def replaced(module: Any, name: str, function: FunctionType) -> Callable[..., Config]:
        def call(*args: Any, **kwargs: Any) -> Config:
            shown = ", ".join([*map(str, args), *(f"{key}={value}" for key, value in kwargs.items())])
            key = f"{module.__name__}.{name}({shown})"
            config = choice.get(key) or function(*args, **kwargs)
            if seen is not None:
                seen[key] = dict(config)
            return dict(config)

        return call

    for module, name, function in functions:
        setattr(module, name, replaced(module, name, function))
    try:
        yield
    finally:
        for module, name, function in functions:
            setattr(module, name, function)


def neighbours(config: Config) -> Iterator[Config]:
    """Configs that differ from this one in one number by one step."""
    for key, value in config.items():
        steps: list[int] = []
        if key.startswith("BLOCK"):  # too small for a tensor core does not compile
            steps = [step for step in (value // 2, value * 2) if step >= 1]
        elif key == "num_warps":
            steps = [step for step in (value // 2, value * 2) if 1 <= step <= MAX_WARPS]
        elif key == "num_stages":
            steps = [step for step in (value - 1, value + 1) if 1 <= step <= MAX_STAGES]
        for step in steps:
            yield config | {key: step}


def shown(config: Config) -> str:
    return ", ".join(f"{key} {value}" for key, value in config.items())


# static facts


@dataclass(frozen=True)
class Task:
    """What is tuned: one form of an op at one shape."""

    op: str
    case: str
    shape: tuple[int, ...]
    form: str
    dtype: str
    capability: int


def refused(kernels: Sequence[Mapping[str, Any]], capability: int) -> str | None:
    """Why these compiled kernels are out by their static facts; None if they are not."""
    limit = LIMITS[capability].shared - 1024
    for k in kernels:
        if k["kernel"] == LIBRARY:
            continue
        if k["spill_bytes"]:
            return f"{k['kernel']} spills {k['spill_bytes']} B"
        if k["serialized"]:
            return f"{k['kernel']} has its products serialized"
        if k["shared_bytes"] > limit:
            return f"{k['kernel']} takes {k['shared_bytes']} B of shared memory, of {limit}"
    return None


def compile_choices(request: Mapping[str, Any]) -> Iterator[str | None]:
    """Why each choice of a request is out; None if it is not. Runs in a process of its own, which has no GPU."""
    task = Task(**request["task"])
    shape, dtype = tuple(task.shape), getattr(torch, task.dtype)
    kernels.op.COMPILED_FOR = divmod(task.capability, 10)
    for choice in request["choices"]:
        try:
            with chosen(choice):
                compiled = aot.launches(BY_NAME[task.op], shape, dtype, task.form, task.capability)
        except Exception as error:  # whatever a compiler raises of a config that it cannot compile
            lines = f"{type(error).__name__}: {error}".strip().splitlines()
            yield f"does not compile: {lines[0][:160]}"
        else:
            yield refused(compiled, task.capability)


def static_verdicts(task: Task, choices: Sequence[Choice]) -> list[str | None]:
    """What `compile_choices` says, in as many processes as there are cores."""
    n = min(len(choices), os.cpu_count() or 1)
    command = [sys.executable, "-m", "bench.tune", "--compile"]
    parts = [choices[i::n] for i in range(n)]
    running = []
    for part in parts:
        process = subprocess.Popen(
            command, cwd=ROOT, env=aot.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        process.stdin.write(json.dumps({"task": vars(task), "choices": part}))
        process.stdin.close()
        running.append(process)
    verdicts: list[str | None] = [None] * len(choices)
    for i, process in enumerate(running):
        lines = process.stdout.read().splitlines()
        if process.wait() or len(lines) != len(parts[i]):
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: see above")
        verdicts[i::n] = [json.loads(line) for line in lines]
    return verdicts


# time


class CandidatePrograms:
    """An op's Triton backend under several choices of configs, each variant timed forward plus backward."""

    def __init__(self, directions: Sequence[OpPrograms], choices: Mapping[str, Choice]) -> None:
        self._directions, self._choices = directions, choices

    def check(self, variant: str) -> str | None:
        if variant not in self._choices:
            return self._directions[-1].check(variant)
        with chosen(self._choices[variant]):
            return self._directions[-1].check("triton")

    def sampler(self, variant: str) -> Sampler:
        backend = "triton" if variant in self._choices else variant
        choice = self._choices.get(variant, {})
        with chosen(choice):
            samplers = [programs.sampler(backend) for programs in self._directions]

        def sample() -> float:
            with chosen(choice):
                return sum(sampler() for sampler in samplers)

        return sample


def candidates_item(op: Op, task: Task, choices: Mapping[str, Choice], reference: bool = False) -> Item:
    """The choices (and the reference, if wanted) as variants of an item, the committed configs as its baseline."""
    dtype = getattr(torch, task.dtype)
    # gradients that forward makes are in the time of backward
    backward = [True] if op.gradients_in_forward else [False, True] if has_gradients(op, task.form) else [False]
    items = [op_item(op, task.case, task.form, dtype, direction, shape=task.shape) for direction in backward]

    @contextlib.contextmanager
    def open_all() -> Iterator[CandidatePrograms]:
        with contextlib.ExitStack() as stack:
            yield CandidatePrograms([stack.enter_context(item.open()) for item in items], choices)

    variants = dict.fromkeys([*(["ref"] if reference else []), *choices])
    named = {"op": op.name, "case": task.case, "form": task.form, "direction": "both", "dtype": task.dtype}
    return Item(**named, shape=task.shape, work=None, baseline=BASE, ours=BASE, variants=variants, open=open_all)


# the climb


@dataclass
class Tuned:
    """What was found for one task."""

    task: Task
    configs: Choice  # of each config function, the best
    committed: Choice
    us: dict[str, float] = field(default_factory=dict)  # backend: microseconds, forward plus backward
    table: list[dict[str, Any]] = field(default_factory=list)
    unfinished: bool = False

    @property
    def changed(self) -> Choice:
        return {key: config for key, config in self.configs.items() if config != self.committed[key]}

    def entry(self) -> dict[str, Any]:
        stored = {"task": vars(self.task), "configs": self.configs, "changed": self.changed, "us": self.us}
        return stored | {"table": self.table, "unfinished": self.unfinished, **history.facts()}


def committed_configs(op: Op, task: Task) -> Choice:
    """Every config that a call and its backward take, by the call of the config function."""
    seen: Choice = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, task.dtype)

    def make(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.ones(size, dtype=dtype, device=device, requires_grad=dtype.is_floating_point)

    inputs = op.forms[task.form](make, *task.shape)
    with chosen({}, seen):
        outputs = op.backends["triton"](**inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        heads = [t for t in outputs if isinstance(t, torch.Tensor) and t.requires_grad]
        if heads and leaves(inputs):
            torch.autograd.backward(heads, [torch.zeros_like(t) for t in heads])
    return seen


def tune(
    op: Op,
    task: Task,
    *,
    deadline: float,
    seconds: float = SECONDS,
    static: Callable[[Task, Sequence[Choice]], list[str | None]] = static_verdicts,
    say: Callable[[str], None] = print,
) -> Tuned:
    """Climb from the committed configs until no neighbour wins or the deadline (of time.monotonic) has passed."""
    committed = committed_configs(op, task)
    found = Tuned(task, dict(committed), committed)
    for key in committed:
        for _ in range(MAX_STEPS):
            if time.monotonic() > deadline:
                found.unfinished = True
                break
            if not climb(op, found, key, seconds, static, say):
                break
    labels = {BASE: {}} | ({"tuned": found.configs} if found.changed else {})
    results = measure(candidates_item(op, task, labels, reference=True), seconds=seconds)
    found.us = {
        name: round(results[label].seconds.median * 1e6, 2)
        for name, label in (("ref", "ref"), ("triton", list(labels)[-1]))
        if results[label].seconds
    }
    return found


def climb(
    op: Op,
    found: Tuned,
    key: str,
    seconds: float,
    static: Callable[[Task, Sequence[Choice]], list[str | None]],
    say: Callable[[str], None],
) -> bool:
    """One step: time the neighbours of the best config for `key`, and take the fastest that wins. Whether one did."""
    here = found.configs[key]
    tried = {row["config"] for row in found.table if row["key"] == key}
    configs = [config for config in neighbours(here) if shown(config) not in tried]
    choices = [found.configs | {key: config} for config in configs]
    results: dict[str, Result] = {}
    timed: dict[str, Choice] = {BASE: dict(found.configs)}
    for config, choice, why in zip(configs, choices, static(found.task, choices) if choices else []):
        if why:
            results[shown(config)] = Result(error=why)
        else:
            timed[shown(config)] = choice
    measured = measure(candidates_item(op, found.task, timed), seconds=seconds)
    if measured[BASE].error:
        raise UserError(f"{op.name} with its committed configs: {measured[BASE].error}")
    results |= {label: result for label, result in measured.items() if label != BASE}
    found.table += [row_of(key, label, result) for label, result in results.items()]
    for row in found.table[len(found.table) - len(results) :]:
        say(line(row))
    wins = {label: r.over_baseline.median for label, r in results.items() if r.over_baseline and faster(r)}
    if not wins:
        return False
    found.configs[key] = timed[max(wins, key=wins.get)][key]
    return True


def faster(result: Result) -> bool:
    """Whether even the lower bound of the speedup is above 1."""
    return result.over_baseline is not None and result.over_baseline.bounds[0] > 1


def row_of(key: str, label: str, result: Result) -> dict[str, Any]:
    row: dict[str, Any] = {"key": key, "config": label, "out": result.error}
    if result.seconds and result.over_baseline:
        low, high = result.over_baseline.bounds
        row |= {"us": result.seconds.median * 1e6, "speedup": result.over_baseline.median, "low": low, "high": high}
    return row


# report


def line(row: Mapping[str, Any]) -> str:
    if row["out"]:
        return f"  out     {row['config']}: {row['out']}"
    return f"  {row['speedup']:.3f}x  [{row['low']:.3f}, {row['high']:.3f}]  {row['us']:.1f} us  {row['config']}"


def to_commit(found: Tuned) -> list[str]:
    """The lines to commit: the configs that won, and the measurement that `auto` reads."""
    task, facts = found.task, history.facts()
    source = f"{facts['device']} at {facts['commit']}"
    lines = [f"{key} -> {config}" for key, config in found.changed.items()] or ["no config is faster than committed"]
    us = ", ".join(f'"{name}": {us:g}' for name, us in found.us.items())
    capability = divmod(task.capability, 10)
    lines += [f'Measurement({capability}, {task.shape}, torch.{task.dtype}, {{{us}}}, "{source}"),']
    return lines + (["(cut short: more neighbours were left)"] if found.unfinished else [])


def tasks_of(op: Op, cases: Sequence[str], dtype: str, capability: int, *, tiny: bool) -> list[Task]:
    """The form with the most memory traffic, forward plus backward, at each case: by default the one that does the most
    work."""

    def work(case: str, form: str) -> int:
        directions = (False, True) if has_gradients(op, form) else (False,)
        return sum(sum(op.cost(op.cases[case], getattr(torch, dtype), form, d)) for d in directions)

    labels = list(cases) or ["quickstart" if tiny else max(op.cases, key=lambda c: work(c, next(iter(op.forms))))]
    found = []
    for case in labels if aot.forms(op, capability) else ():  # fp8 is not for every GPU
        forms = [*aot.forms(op, capability), *(form for form in op.forms if (op.name, form) in aot.KNOWN)]
        form = max(forms, key=lambda form: work(case, form))
        shape = tuple(min(n, TINY_DIM) for n in op.cases[case]) if tiny else op.cases[case]
        found.append(Task(op.name, case, shape, form, dtype, capability))
    return found


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help="unset: all")
    parser.add_argument("--cases", nargs="+", default=[], metavar="CASE", help="unset: the one with the most work")
    parser.add_argument("--minutes", type=float, default=10.0, help="no step of a climb begins later (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where tune.jsonl is written")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal on tiny shapes")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.compile:
        for verdict in compile_choices(json.load(sys.stdin)):
            print(json.dumps(verdict), flush=True)
        return
    tiny = args.device == "cpu"
    if not tiny and not torch.cuda.is_available():
        raise UserError("there is no GPU here that torch can use: --device cpu rehearses")
    if tiny and not kernels.op.interpreted():  # it has to be said before the kernels are imported
        os.execve(sys.executable, [sys.executable, "-m", "bench.tune", *argv], os.environ | {"TRITON_INTERPRET": "1"})
    known = {name: op for name, op in BY_NAME.items() if "triton" in op.backends}
    if unknown := set(args.ops) - known.keys():
        raise UserError(f"{', '.join(sorted(unknown))}: expected some of {', '.join(known)}")
    major, minor = kernels.op.capability(torch.device(args.device))
    if 10 * major + minor not in LIMITS:
        raise UserError(f"compute capability {major}.{minor}: limits are known of {', '.join(map(str, LIMITS))}")
    if not args.minutes > 0:
        raise UserError(f"--minutes is {args.minutes}: expected more than 0")
    tasks = []
    for name in args.ops or known:
        if absent := [case for case in args.cases if case not in known[name].cases]:
            raise UserError(f"--cases {absent[0]}: {name} has {', '.join(known[name].cases)}")
        dtype = "float32" if tiny else "bfloat16"
        tasks += tasks_of(known[name], args.cases, dtype, 10 * major + minor, tiny=tiny)
    if tiny:
        interpreter.install()
        print("rehearsal in Triton's interpreter: these times mean nothing")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    for i, task in enumerate(tasks):  # each op may take its share of what is left
        left = start + 60 * args.minutes - time.monotonic()
        deadline = time.monotonic() + left / (len(tasks) - i)
        print(f"{task.op}, {task.case} {task.shape}, {task.form}, {task.dtype}", flush=True)
        found = tune(known[task.op], task, deadline=deadline, seconds=0.0 if tiny else SECONDS)
        for text in to_commit(found):
            print(text, flush=True)
        if args.out:
            with open(args.out / "tune.jsonl", "a") as file:
                file.write(json.dumps(found.entry()) + "\n")


if __name__ == "__main__":
    with one_sentence():
        main(sys.argv[1:])
