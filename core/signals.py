"""SIGINT and SIGTERM during training: a wish to stop after the step under way, not an end in the middle of it."""

import os
import signal
import sys
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Inside `with stop:` the first signal only sets `signum` (0 before). The handlers from before are back from then on,
    so that a second signal ends the process at once, and after the block."""

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        self._before = {s: signal.signal(s, self._note) for s in SIGNALS}

    def __exit__(self, *exc: Any) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self.__exit__()
        if os.environ.get("RANK", "0") == "0":
            name = signal.Signals(signum).name
            text = f"\n{name}: the step under way is finished and a checkpoint saved; a second signal stops at once\n"
            os.write(sys.__stderr__.fileno(), text.encode())  # print may be what was interrupted
