"""How a bench file runs under pytest: one test a variant, all variants of an item measured in turn when the first is reached.

pytest-benchmark then gets the samples as they were taken, through a clock that shows them. `--benchmark-max-time` is the time
for each variant; `--store` keeps the results in bench/results/<device>/.
"""

import pytest

from bench import results
from bench.suite import Item, Result, measure, row
from core import machine


class Replay:
    """A clock that moves by one sample with each call of `advance`."""

    def __init__(self) -> None:
        self.time = 0.0
        self.samples: list[float] = []

    def now(self) -> float:
        return self.time

    def advance(self) -> None:
        self.time += self.samples.pop(0)


ROWS = pytest.StashKey[list]()
CLOCK = Replay()
LAST: dict[Item, dict[str, Result]] = {}  # the item that was measured last


def pytest_addoption(parser):
    parser.addoption(
        "--store", action="store_true", help="keep results in bench/results/<device>/ (of a clean checkout)"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.stash[ROWS] = []
    config.option.benchmark_quiet = True  # our table is shorter and says more
    machine.keep_freed_memory()  # as train.py does
    if config.getoption("--store"):
        results.refuse_changed_checkout(results.facts()["commit"])


def pytest_collection_modifyitems(items):
    for test in items:
        if "record" in test.fixturenames:
            group = str(test.callspec.params["item"])
            test.add_marker(pytest.mark.benchmark(timer=CLOCK.now, group=group))


def pytest_generate_tests(metafunc):
    if "record" in metafunc.fixturenames:
        pairs = [(item, variant) for item in metafunc.module.ITEMS for variant in item.variants]
        metafunc.parametrize("item, variant", pairs, ids=[f"{item}-{variant}" for item, variant in pairs])


@pytest.fixture
def record(benchmark, request, item, variant):
    """Call it: the variant's row, or a failure or a skip with the reason why there is none."""

    def run() -> dict:
        if item not in LAST:
            wanted = [
                test.callspec.params["variant"]
                for test in request.session.items
                if hasattr(test, "callspec") and test.callspec.params.get("item") is item
            ]
            LAST.clear()
            LAST[item] = measure(item, wanted, seconds=float(request.config.getoption("benchmark_max_time")))
        result = LAST[item][variant]
        if result.absent:
            pytest.skip(result.absent)
        entry = row(item, variant, result, results.roofline_of(item), results.facts())
        request.config.stash[ROWS].append(entry)
        if result.error:
            pytest.fail(f"{item} {variant} is wrong and gets no number: {result.error}")
        benchmark.extra_info |= entry
        CLOCK.samples = list(result.seconds.samples)
        benchmark.pedantic(CLOCK.advance, rounds=len(CLOCK.samples))
        return entry

    return run


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    for line in results.console(rows):
        terminalreporter.write_line(line)
    if rows and config.getoption("--store"):
        terminalreporter.write_line(f"stored in {results.store(rows)}")
