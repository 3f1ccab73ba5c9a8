"""Text of a prompt to token ids, as data only."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from rectokens.schemas.item_tokens import ItemTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TextEncoder:
    """Encodes text so that no special token can come out of it.

    A user may write ``<item_L0_C3>`` or ``</s>``; in a prompt those are characters like any
    others. The encoder therefore works on its own copy of the tokenizer with the splitting of
    special tokens switched on, and the caller's tokenizer keeps its behaviour.

    Args:
        text_tokenizer: the model's tokenizer, extended with item tokens or not.
        item_tokens: where the item tokens lie.
        max_tokens: longest result; of longer texts the **beginning** is kept.

    Raises:
        ValueError: the tokenizer is not a fast one.
    """

    def __init__(
        self, text_tokenizer: PreTrainedTokenizerFast, item_tokens: ItemTokens, max_tokens: int
    ) -> None:
        backend = getattr(text_tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"text_tokenizer is a {type(text_tokenizer).__name__}; "
                "a fast tokenizer (one with a backend_tokenizer) is needed"
            )
        self._backend: Any = copy.deepcopy(backend)
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self._items = range(item_tokens.offset, item_tokens.end)
        self._markers = {item_tokens.start_token_id, item_tokens.end_token_id} - {None}
        self._max_tokens = max_tokens

    def __call__(self, text: str) -> tuple[list[int], bool]:
        """Token ids of a text, at most ``max_tokens``, and whether it was cut short.

        Raises:
            ValueError: the text yields an item token all the same, because the tokenizer has
                those tokens as ordinary words of its vocabulary.
        """
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        cut = len(ids) > self._max_tokens
        ids = ids[: self._max_tokens]
        for token in ids:
            if token in self._items or token in self._markers:
                raise ValueError(
                    f"text encodes to the item token id {token}; item tokens must be special "
                    "tokens of the text tokenizer, not words of its vocabulary"
                )
        return ids, cut
