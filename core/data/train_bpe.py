"""Learns a byte-pair vocabulary: texts on standard input, tokens on standard output. A program of its own, because
rustbpe holds Python's lock until it is done and hears no signal meanwhile: this one can be killed.

    python train_bpe.py SIZE TEXTS_HELD PATTERN

Input    each text as 8 bytes of length (little-endian) and UTF-8
Output   JSON: the bytes of every token in hex, in order of rank
"""

import ctypes
import json
import signal
import sys
from collections.abc import Iterator

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def texts() -> Iterator[str]:
    while head := sys.stdin.buffer.read(8):
        yield sys.stdin.buffer.read(int.from_bytes(head, "little")).decode()


def main(size: int, texts_held: int, pattern: str) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))  # do not outlive who asked
    import rustbpe

    trainer = rustbpe.Tokenizer()  # pyrefly: ignore[missing-attribute]  # a compiled module without stubs
    trainer.train_from_iterator(texts(), size, texts_held, pattern)
    ranks = sorted((rank, bytes(token)) for token, rank in trainer.get_mergeable_ranks())
    json.dump([token.hex() for _, token in ranks], sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
