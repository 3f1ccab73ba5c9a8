"""Items as the model writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rectokens.schemas.item_tokens import ItemTokens


def item_text(codes: Sequence[int], item_tokens: ItemTokens, text_tokenizer: Any) -> str:
    """The item tokens of a semantic ID, codes (L,), as text.

    Args:
        codes: level 0 first.
        item_tokens: their token ids.
        text_tokenizer: the model's own, or None for a model that has none; then the tokens have
            the names that ``ItemAwareTokenizer`` gives them.
    """
    if text_tokenizer is not None:
        return "".join(text_tokenizer.convert_ids_to_tokens(item_tokens.encode(codes)))
    # Imports transformers, which a service that serves a model has done long before.
    from rectokens.integrations.hf.item_vocabulary import item_token

    return "".join(item_token(level, code) for level, code in enumerate(codes))
