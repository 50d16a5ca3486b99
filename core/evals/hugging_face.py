"""Any causal language model of transformers as CORE sees it, to reproduce published scores by the same scorer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core.communication import World
from core.evals.core_metric import Question, Row, judged, padded, separate
from core.stopping import UserError


class HuggingFaceScorer:
    """name: a repository of the Hugging Face hub or a folder. Its logits of all tokens are made, so that whatever the
    model does to them counts; its context is bounded by its configuration."""

    def __init__(self, name: str, world: World, *, max_tokens: int) -> None:
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError as error:
            raise UserError(f"--hf needs transformers ({error}): pip install 'redline-lm[hf]'") from error
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
            self._model: Any = AutoModelForCausalLM.from_pretrained(name).to(world.device).eval()
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{name}: transformers cannot load it ({reason})") from error
        self._bos = self._tokenizer.bos_token_id
        if self._bos is None:
            self._bos = self._tokenizer.eos_token_id
        if self._bos is None:
            raise UserError(f"{name}: its tokenizer has neither a BOS nor an EOS token to open a prompt with")
        self._context: int | None = getattr(self._model.config, "max_position_embeddings", None)
        self._device = world.device
        self.max_tokens = max_tokens

    def encode(self, text: str) -> list[int]:
        return [self._bos, *self._tokenizer.encode(text, add_special_tokens=False)]

    def rows(self, q: Question) -> list[Row]:
        return separate(q, self._context)

    def __call__(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        ids, places, targets = padded(rows, self._bos, self._device)  # causal: nothing sees the padding behind it
        logits = self._model(torch.as_tensor(ids)).logits.flatten(0, 1)[places]
        return judged(lambda chunk: chunk, logits, targets)
