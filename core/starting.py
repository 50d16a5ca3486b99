"""What a program does before its imports: torch alone takes seconds, in which Ctrl-C would end in a traceback."""

import os
import signal
from types import FrameType


def hear_signals() -> None:
    """Ends the process at once, with one sentence, on SIGINT, SIGTERM and SIGHUP; `core.stopping.one_sentence` takes
    them over. One that the parent process set to be ignored stays ignored."""
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(s) is not signal.SIG_IGN:
            signal.signal(s, _end)


def _end(signum: int, frame: FrameType | None) -> None:
    try:
        if os.environ.get("RANK", "0") == "0":
            os.write(2, f"stopped by {signal.Signals(signum).name}\n".encode())
    finally:
        os._exit(128 + signum)  # an exception could be caught by the import that it interrupts
