"""How a program ends early: errors told in one sentence, signals, and the exit status of each.

UserError       input that the user can mend: exit status 2. Raised where we mean it; any other ValueError is a defect
TrainingError   training cannot go on: status 1
Stopped         a signal ended the program: status 128 + its number
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, Self

import torch

from kernels.op import UserError

CPU_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # torch raises a plain RuntimeError for it
SIGNALS = (signal.SIGINT, signal.SIGTERM)


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


def _terminate(*_: Any) -> NoReturn:
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
def one_sentence() -> Iterator[None]:
    """Ends the process with one sentence and the status above, and with status 2 for a file that cannot be read or
    written.

    Every other exception is a defect and keeps its traceback.
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
    except UserError as error:
        _exit(str(error), 2)
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(sentence: str, status: int) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    print(f"error: {sentence}" if rank == "0" else f"error on rank {rank}: {sentence}", file=sys.stderr)
    raise SystemExit(status)


def _stop(sentence: str, signum: int) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":  # what stops one process stops all
        print(sentence, file=sys.stderr)
    raise SystemExit(128 + signum)


class StopFlag:
    """SIGINT and SIGTERM as a flag that the training loop reads between steps.

    Inside `with StopFlag() as stop:` the first signal only sets `stop.signum` (0 before). It also puts the earlier
    handlers back, so that a second signal ends the process at once. A signal that the parent process set to be ignored
    stays ignored.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for s in SIGNALS:
            if signal.getsignal(s) is not signal.SIG_IGN:  # a shell's `&` ignores SIGINT for its children
                self._before[s] = signal.signal(s, self._note)
        return self

    def __exit__(self, *exc: Any) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self.__exit__()
        if os.environ.get("RANK", "0") == "0":
            name = signal.Signals(signum).name
            text = f"\n{name}: finishing the step under way and saving a checkpoint; a second signal stops at once\n"
            os.write(2, text.encode())  # print may be what was interrupted
