"""One side of bench.compare: measures what it is asked to, of the commit whose checkout it runs in.

A line of JSON in, a line of JSON out: {"items": null} -> names, {"open": name} -> what would be measured or why not,
{"sample": null} -> seconds per call, {"close": null}. Anything that is printed meanwhile goes to stderr.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import traceback
from typing import Any

from bench.suite import Item, items
from core import machine


class Worker:
    def __init__(self) -> None:
        self._items: dict[str, Item] = {}
        self._open = contextlib.ExitStack()

    def items(self, _: None) -> list[str]:
        self._items = {str(item): item for item in items()}
        return list(self._items)

    def open(self, name: str) -> dict[str, Any]:
        item = self._items[name]
        programs = self._open.enter_context(item.open())
        if error := programs.check(item.ours):
            return {"error": error}
        self._sampler = programs.sampler(item.ours)
        return {"variant": item.ours}

    def sample(self, _: None) -> float:
        return self._sampler()

    def close(self, _: None) -> None:
        self._sampler = None
        self._open.close()


def main() -> None:
    PR_SET_PDEATHSIG = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # stopped, it could not end with the side that asks
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    machine.keep_freed_memory()
    worker = Worker()
    for line in sys.stdin:
        ((command, argument),) = json.loads(line).items()
        try:
            reply = {"ok": getattr(worker, command)(argument)}
        except Exception as error:  # the other side reports it
            traceback.print_exc()
            reply = {"raised": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
