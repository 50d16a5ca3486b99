"""The packing rules read literally: a plain list, scanned at every placement. Oracle of the tests, rival of the bench."""

from collections.abc import Iterator

import numpy as np


def literal_rows(
    documents: Iterator[np.ndarray], row_len: int, num_rows: int, *, mode: str, buffer_docs: int
) -> np.ndarray:
    """(num_rows, row_len) int64."""
    buffer: list[np.ndarray] = []
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
            best, best_len = -1, 0
            for i, document in enumerate(buffer):
                if best_len < len(document) <= space:
                    best, best_len = i, len(document)
            if best >= 0:
                row[filled : filled + best_len] = buffer.pop(best)
                filled += best_len
                continue
            shortest = min(range(len(buffer)), key=lambda i: len(buffer[i]))
            document = buffer.pop(shortest)
            row[filled:] = document[:space]
            filled = row_len
            if mode == "continue":
                buffer.append(document[space:])
    return rows
