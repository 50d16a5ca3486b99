"""How a bench file runs under pytest: one test per variant; the first measures all variants of its item in turn.

pytest-benchmark keeps the samples that were taken. `--benchmark-max-time` is the time for each variant; `--store` keeps
the results in bench/results/<device>/.
"""

import pytest

from bench import history
from bench.layers import layer_lines
from bench.suite import Item, Result, measure, row
from core import machine

ROWS = pytest.StashKey[list]()
LAST: dict[Item, dict[str, Result]] = {}  # the item that was measured last


def pytest_addoption(parser):
    parser.addoption(
        "--store", action="store_true", help="keep results in bench/results/<device>/ (of a clean checkout)"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_xdist_auto_num_workers(config):
    """None: what is timed has the machine to itself."""
    return 0


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.stash[ROWS] = []
    config.option.benchmark_quiet = True  # our table is shorter and says more
    machine.keep_freed_memory()  # as train.py does
    if config.getoption("--store"):
        history.refuse_changed_checkout(history.facts()["commit"])


def pytest_collection_modifyitems(items):
    for test in items:
        if "record" in test.fixturenames:
            test.add_marker(pytest.mark.benchmark(group=str(test.callspec.params["item"])))


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
        entry = row(item, variant, result, history.roofline_of(item), history.facts())
        request.config.stash[ROWS].append(entry)
        if result.error:
            pytest.fail(f"{item} {variant} is wrong and gets no number: {result.error}")
        benchmark.extra_info |= entry
        stats = benchmark._make_stats(iterations=1)  # its public calls would time variants one after another
        for seconds in result.seconds.samples:
            stats.update(seconds)
        return entry

    return run


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    for line in (*history.console(rows), *layer_lines(rows)):
        terminalreporter.write_line(line)
    if rows and config.getoption("--store"):
        terminalreporter.write_line(f"stored in {history.store(rows)}")
