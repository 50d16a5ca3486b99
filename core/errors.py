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
    """Ends the process with one sentence: status 1 for a TrainingError, 2 for a ValueError that this repository raised and
    for a file that cannot be read or written.

    Errors from libraries and failed assertions are defects, not user errors: they keep their traceback.
    """
    try:
        yield
    except TrainingError as error:
        _exit(str(error), 1)
    except OSError as error:
        if error.filename is None:
            raise
        _exit(f"{error.filename}: {error.strerror}; check the path, its permissions and the space left", 2)
    except ValueError as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if type(error) is not ValueError or not raised_in.is_relative_to(ROOT) or "site-packages" in raised_in.parts:
            raise
        _exit(str(error), 2)


def _exit(sentence: str, status: int) -> None:
    rank = os.environ.get("RANK", "0")
    print(f"error: {sentence}" if rank == "0" else f"error on rank {rank}: {sentence}", file=sys.stderr)
    raise SystemExit(status)
