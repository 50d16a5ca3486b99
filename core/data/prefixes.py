"""The prefix of each token of a vocabulary: a second, coarser target to learn [modded-nanogpt f411b3d].

The prefix of a token is the one whose bytes are the longest proper prefix of its own: of " there" maybe " the".
"""

from collections.abc import Sequence

import numpy as np
import tiktoken

from core.data.files import first_line
from core.data.token_shards import BOS
from core.stopping import UserError


def prefix_table(tokens: Sequence[bytes]) -> np.ndarray:
    """(V,) int64: id of the prefix of each of V tokens, -1 where there is none.

    Empty bytes stand for a token without a spelling, such as a special one: it has no prefix and is none. Of equal
    tokens the first is the prefix of others.
    """
    table = np.full(len(tokens), -1, np.int64)
    # sorted, a token comes behind its prefixes, and between them are only tokens that begin with them too
    spelled = sorted((i for i, token in enumerate(tokens) if token), key=lambda i: tokens[i])
    prefixes: list[int] = []  # of the last token and itself, each one of the next
    for i in spelled:
        while prefixes and not tokens[i].startswith(tokens[prefixes[-1]]):
            prefixes.pop()
        if prefixes and tokens[prefixes[-1]] == tokens[i]:
            table[i] = table[prefixes[-1]]
            continue
        if prefixes:
            table[i] = prefixes[-1]
        prefixes.append(i)
    return table


def gpt2_bytes() -> list[bytes]:
    """The bytes of GPT-2's 50,257 tokens, none for its special one. Raises UserError where tiktoken has to download
    them and cannot."""
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network or cache; or what came is not what it should be
        raise UserError(
            f"tiktoken cannot get the vocabulary of GPT-2 ({first_line(error)}): let it once where there is a "
            "network, with TIKTOKEN_CACHE_DIR set, and bring that folder here"
        ) from error
    return [b"" if i == BOS else encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
