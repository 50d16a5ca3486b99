"""The tokenizer as the files of Hugging Face's `tokenizers`, by hand: no need of that library to write them."""

from typing import Any

from core.data.tokenizer import SPECIAL_TOKENS, Tokenizer


def byte_letters() -> list[str]:
    """The visible character that stands for each byte [GPT-2, encoder.py, bytes_to_unicode]."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(b) if b in shown else chr(next(hidden)) for b in range(256)]


def tokenizer_files(tokenizer: Tokenizer, context: int) -> dict[str, dict[str, Any]]:
    """Content of each file by its name. context: tokens that the model was trained to see."""
    letters = byte_letters()
    tokens = tokenizer.tokens
    spelled = ["".join(letters[b] for b in token) for token in tokens]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    # tiktoken merges any two neighbours that make a token, that of the lowest rank first: so all ways to halve a token
    # are merges, in the order of the tokens
    merges: list[list[str]] = []
    for token, name in zip(tokens, spelled):
        cuts = [cut for cut in range(1, len(token)) if token[:cut] in ranks and token[cut:] in ranks]
        cuts.sort(key=lambda cut: (ranks[token[:cut]], ranks[token[cut:]]))
        merges += [[name[:cut], name[cut:]] for cut in cuts]
    bos = SPECIAL_TOKENS[0]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    opening = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": tokenizer.bos_id + i, "content": name, **plain} for i, name in enumerate(SPECIAL_TOKENS)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": opening,
            "pair": [*opening, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a piece that is a token is that token, as in tiktoken
            "vocab": {name: rank for rank, name in enumerate(spelled)},
            "merges": merges,
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": bos,  # the next document's beginning is this one's end
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # special tokens have no spelling: their names in a text are text
    }
    return {"tokenizer.json": content, "tokenizer_config.json": settings}
