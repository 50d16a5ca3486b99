"""Errors a user can act on, told in one sentence."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kernels.op import UserError

ROOT = Path(__file__).resolve().parent.parent
CPU_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # torch raises a plain RuntimeError for it


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is safe."""


class Stopped(RuntimeError):
    """A signal ended the program; the message says what is safe."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class Terminated(KeyboardInterrupt):
    """SIGTERM, where nothing handles it: as Ctrl-C."""


def signal_of(error: KeyboardInterrupt) -> signal.Signals:
    return signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT


def _terminate(*_: Any) -> None:
    raise Terminated


@contextmanager
def out_of_memory(what: str, advice: Callable[[], str]) -> Iterator[None]:
    """Turns a lack of memory for `what` inside the block into a TrainingError that ends with the advice."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and CPU_OUT_OF_MEMORY not in str(error):
            raise
        raise TrainingError(f"out of memory for {what}: {advice()}") from error


@contextmanager
def user_errors() -> Iterator[None]:
    """Ends the process with one sentence: status 1 for a TrainingError, 2 for a ValueError that this repository raised and
    for a file that cannot be read or written, 128 + n for signal n.

    Errors from libraries and failed assertions are defects, not user errors: they keep their traceback.
    """
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except TrainingError as error:
        _exit(str(error), 1)
    except Stopped as stopped:
        _stop(str(stopped), stopped.signum)
    except KeyboardInterrupt as error:
        _stop(f"stopped by {signal_of(error).name}", signal_of(error))
    except OSError as error:
        if error.filename is None:
            raise
        _exit(f"{error.filename}: {error.strerror}; check the path, its permissions and the space left", 2)
    except ValueError as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if (
            type(error) not in (ValueError, UserError)
            or not raised_in.is_relative_to(ROOT)
            or "site-packages" in raised_in.parts
        ):
            raise
        _exit(str(error), 2)
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(sentence: str, status: int) -> None:
    rank = os.environ.get("RANK", "0")
    print(f"error: {sentence}" if rank == "0" else f"error on rank {rank}: {sentence}", file=sys.stderr)
    raise SystemExit(status)


def _stop(sentence: str, signum: int) -> None:
    if os.environ.get("RANK", "0") == "0":  # what stops one process stops all
        print(sentence, file=sys.stderr)
    raise SystemExit(128 + signum)
