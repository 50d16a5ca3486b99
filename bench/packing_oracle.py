"""The packing rules read literally: a list, scanned at every placement. Oracle of the tests, rival in the bench."""

from collections.abc import Iterator

import numpy as np

from core.data.packing import random_bits


def literal_rows(
    documents: Iterator[np.ndarray], row_len: int, num_rows: int, *, mode: str, buffer_docs: int, seed: int = 0
) -> np.ndarray:
    """(num_rows, row_len) int64."""
    buffer: list[np.ndarray] = []
    takes = 0
    rows = np.empty((num_rows, row_len), dtype=np.int64)
    for row in rows:
        filled = 0
        while filled < row_len:
            while len(buffer) < buffer_docs:
                document = next(documents)
                if mode == "crop":
                    buffer.append(document)
                else:
                    buffer.extend(document[i : i + row_len] for i in range(0, len(document), row_len))
            space = row_len - filled
            if mode == "crop":
                best, best_len = -1, 0
                for i, document in enumerate(buffer):
                    if best_len < len(document) <= space:
                        best, best_len = i, len(document)
                if best < 0:
                    best = min(range(len(buffer)), key=lambda i: len(buffer[i]))
            else:
                best_len = max((len(document) for document in buffer if len(document) <= space), default=0)
                wanted = best_len or min(len(document) for document in buffer)
                ties = [i for i, document in enumerate(buffer) if len(document) == wanted]
                best = ties[random_bits(seed, takes) % len(ties)]
                takes += 1
            document = buffer.pop(best)
            if best_len:
                row[filled : filled + best_len] = document
                filled += best_len
                continue
            row[filled:] = document[:space]
            filled = row_len
            if mode == "continue":
                buffer.append(document[space:])
    return rows
