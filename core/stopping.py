"""How a program ends early: errors told in one sentence, signals, and the exit status of each.

UserError       input that the user can mend: exit status 2. Raised where we mean it; any other ValueError is a defect
TrainingError   training cannot go on: status 1
Stopped         a signal ended the program: status 128 + its number

Losing the console ends nothing: what is written to it afterwards goes nowhere.
"""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Self, TextIO

import torch

from kernels.op import UserError

CPU_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # torch raises a plain RuntimeError for it
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ECHO_S = 2.0  # within which SIGTERM under torchrun is the one that was heard
# a disk that is full, over its quota or its largest file, broken, read-only, or gone
STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE}


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is safe."""


class UnreadableData(UserError):
    """Training data of the next step that cannot be read; the steps before it are whole."""


class Stopped(RuntimeError):
    """A signal ended the program; the message says what is safe."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class ScoringStopped(Exception):
    """A process was told to stop before an evaluation or a sample was done."""


def never() -> bool:
    return False


class Terminated(KeyboardInterrupt):
    """One of SIGNALS where nothing handles it: as Ctrl-C."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signal.Signals(signum)


def signal_of(error: KeyboardInterrupt) -> signal.Signals:
    return error.signum if isinstance(error, Terminated) else signal.SIGINT


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated(signum)


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or CPU_OUT_OF_MEMORY in str(error)


@contextmanager
def out_of_memory(what: str, advice: Callable[[], str]) -> Iterator[None]:
    """Turns a lack of memory for `what` inside the block into a TrainingError that ends with the advice."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(f"out of memory for {what}: {advice()}") from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an OSError from inside the block the name of the file: a failed write carries none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def expanded(path: str | Path) -> Path:
    """`path` with its ~ replaced; UserError where there is no home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: no home folder is known for ~ (is HOME set?); give a path without it") from error


def check_utf8(argv: Iterable[str]) -> None:
    """UserError for a command line argument that is not UTF-8: it could be neither logged nor printed."""
    for i, arg in enumerate(argv, 1):
        try:
            arg.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"argument {i}, {os.fsencode(arg)!r}, is not UTF-8: rename the file or retype it"
            ) from error


@contextmanager
def one_sentence() -> Iterator[None]:
    """Ends the process with one sentence and the status above: with status 2 for a file that cannot be read or
    written, with status 1 where its disk is full or broken.

    Every other exception is a defect and keeps its traceback.
    """
    with _lasting_console():
        # a signal that the parent process set to be ignored, as nohup does with SIGHUP, stays ignored
        heard = [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
        before = [(s, signal.signal(s, _terminate)) for s in heard]
        try:
            yield
        except TrainingError as error:
            _exit(str(error), 1)
        except Stopped as stopped:
            _stop(str(stopped), stopped.signum)
        except KeyboardInterrupt as error:
            _stop(f"stopped by {signal_of(error).name}", signal_of(error))
        except OSError as error:
            if error.errno in STORAGE_ERRORS:
                _exit(f"{error.filename or 'a file'} cannot be written or read: {error.strerror}", 1)
            if error.filename is None:
                raise
            _exit(f"{error.filename}: {error.strerror}; check the path, its permissions and the space left", 2)
        except UserError as error:
            _exit(str(error), 2)
        finally:
            for s, handler in before:
                signal.signal(s, handler)


class _LastingStream:
    """Standard output or error that may go away (`| head`, a closed terminal, a full disk): nothing fails then, and
    the rest of what is written goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._unless_gone():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._unless_gone():
            self._stream.flush()

    @contextmanager
    def _unless_gone(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            # the descriptor too: the interpreter flushes what is left in the buffer at its exit, and would fail there
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


@contextmanager
def _lasting_console() -> Iterator[None]:
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:  # closed (`>&-`): the next file to be opened, such as the log, would be the console
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    before = sys.stdout, sys.stderr
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is not None:
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # a sample may have what the terminal cannot show
            setattr(sys, name, _LastingStream(stream))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()  # here, where an error is no failure
        sys.stdout, sys.stderr = before


def _exit(sentence: str, status: int) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    print(f"error: {sentence}" if rank == "0" else f"error on rank {rank}: {sentence}", file=sys.stderr)
    raise SystemExit(status)


def _stop(sentence: str, signum: int) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":  # what stops one process stops all
        print(sentence, file=sys.stderr)
    raise SystemExit(128 + signum)


class StopFlag:
    """SIGINT, SIGTERM and SIGHUP as a flag that the training loop reads between steps.

    Inside `with StopFlag() as stop:` the first signal only sets `stop.signum` (0 before). It also puts the earlier
    handlers back, so that a second signal ends the process at once. A signal that the parent process set to be ignored
    stays ignored. When torchrun dies, the kernel may send SIGTERM once for each of its threads: those are one signal.
    `stop.wanted` is whether there was a signal, or `also()` asks to stop as well.
    """

    def __init__(self, also: Callable[[], bool] = never, then: str = " and saving a checkpoint") -> None:
        """then: what follows the step, for people."""
        self.signum, self._noted, self._also, self._then = 0, 0.0, also, then  # _noted: when, by time.monotonic()
        self._before: dict[signal.Signals, Any] = {}

    @property
    def wanted(self) -> bool:
        return self.signum > 0 or self._also()

    @property
    def since_s(self) -> float:
        """Seconds since the signal; 0 where there was none."""
        return time.monotonic() - self._noted if self.signum else 0.0

    def __enter__(self) -> Self:
        for s in SIGNALS:
            if signal.getsignal(s) is not signal.SIG_IGN:  # a shell's `&` ignores SIGINT for its children, nohup SIGHUP
                self._before[s] = signal.signal(s, self._note)
        return self

    def __exit__(self, *exc: Any) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            if time.monotonic() - self._noted > ECHO_S:
                self.__exit__()
                os.kill(os.getpid(), signum)
            return
        self.signum, self._noted = signum, time.monotonic()
        if signum != signal.SIGTERM or "TORCHELASTIC_RUN_ID" not in os.environ:
            self.__exit__()
        if os.environ.get("RANK", "0") == "0":
            name = signal.Signals(signum).name
            text = f"\n{name}: finishing the step under way{self._then}; a second signal stops at once\n"
            with suppress(OSError):  # the terminal may be gone
                os.write(2, text.encode())  # print may be what was interrupted
