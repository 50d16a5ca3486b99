"""Shared fixtures: a small corpus on disk and the options of a run that takes a second.

Without a GPU, Triton kernels run in Triton's interpreter, which has to be said before Triton is imported, and CUDA
kernels emulated.
"""

import os
import random
import signal

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # two workers with two spinning threads each would fight over two cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = os.environ["REDLINE_EMULATE"] = "1"
    from bench import interpreter
    from tests import races

    interpreter.install()
    races.install()

from hypothesis import HealthCheck, settings  # noqa: E402

from core.stopping import SIGNALS  # noqa: E402
from tests.harness import CUDA, NO_CUDA  # noqa: E402

# how long an example takes on a busy machine is no property of what is tested
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_xdist_auto_num_workers(config):
    """Two processes on a CPU, whose cores they share; one on a GPU, which two would share too."""
    return 0 if torch.cuda.is_available() else 2


@pytest.fixture
def cuda():
    """What is there where kernels of csrc/ run."""
    if NO_CUDA:
        pytest.skip(f"csrc/ {NO_CUDA}")


@pytest.fixture(params=["triton", CUDA])
def backend(request):
    """The two ways to run an op that has a twin in csrc/, one test each."""
    return request.param


@pytest.fixture(autouse=True)
def heard():
    """Signals as at a terminal: the parent of the tests may ignore some, as nohup and a shell's `&` do."""
    before = {s: signal.getsignal(s) for s in SIGNALS}
    for s, handler in before.items():
        if handler is signal.SIG_IGN:
            signal.signal(s, signal.default_int_handler if s == signal.SIGINT else signal.SIG_DFL)
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


LETTERS = "etaoinshrdlucmfwygpb"


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory):
    """120 text files of a few hundred words; some of them fall into the validation split of one in 10.

    Many different words: with a handful, gradients are nearly singular, and orthogonalising them amplifies rounding.
    """
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["".join(rng.choices(LETTERS, k=rng.randint(1, 9))) for _ in range(2000)]
    for i in range(120):
        text = " ".join(rng.choices(words, k=rng.randint(30, 300)))
        (folder / f"doc{i:03d}.txt").write_text(text + "\n")
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_options(corpus_dir, cache_dir):
    """Options of a quickstart run on that corpus with a model of a few thousand parameters."""
    sizes = "--depth 2 --d-model 32 --d-head 16 --seq-len 32 --vocab-size 300 --total-batch-size 512 --steps 12"
    pace = "--eval-every 5 --eval-tokens 500 --sample-every 6 --sample-tokens 4 --save-every 4 --profile 0 --device cpu"
    data = ["--val-every", "10", "--data", str(corpus_dir), "--cache-dir", str(cache_dir)]
    return [*sizes.split(), *pace.split(), *data]


@pytest.fixture
def tiny(tiny_options):
    return list(tiny_options)
