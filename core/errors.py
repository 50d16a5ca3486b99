"""Errors a user can act on, told in one sentence."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is safe."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Ends the process with one sentence and status 2 for a ValueError that this repository raised, 1 for a TrainingError.

    Errors from libraries and failed assertions are defects, not user errors: they keep their traceback.
    """
    try:
        yield
    except TrainingError as error:
        _exit(error, 1)
    except ValueError as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if type(error) is not ValueError or not raised_in.is_relative_to(ROOT) or "site-packages" in raised_in.parts:
            raise
        _exit(error, 2)


def _exit(error: Exception, status: int) -> None:
    if os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1":
        print(f"error: {error}", file=sys.stderr)
    raise SystemExit(status)
