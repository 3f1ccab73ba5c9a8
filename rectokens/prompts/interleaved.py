"""Builder ``interleaved``: items and texts in the order in which they came."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rectokens.prompts import params as check
from rectokens.prompts.sequence import SequencePromptBuilder
from rectokens.prompts.text import TextEncoder
from rectokens.schemas.item_tokens import ItemTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAME = "interleaved"

DEFAULTS: dict[str, Any] = {
    "max_items": 50,
    "block_items": 1,
    "max_texts": 16,
    "max_text_tokens": 64,
    "bos_token_id": None,
    "end_token": True,
}


def interleaved_v1(
    params: Mapping[str, Any],
    item_tokens: ItemTokens,
    text_tokenizer: PreTrainedTokenizerFast | None,
) -> SequencePromptBuilder:
    """Version 1. Layout of text t, items a, b with L = 2: ``[bos] t.. S a0 a1 [E] S b0 b1 [E] S``.

    Items look as ``ItemAwareTokenizer.encode_sequence`` lays them out behind a text, with one
    difference: the start token stands before every item, not only behind a text, since a prompt
    ends with it and training must show the same (see :mod:`rectokens.prompts.sequence`). Each
    text is encoded alone, without the tokenizer's own special tokens, and cannot yield any.

    Args:
        params:
            - ``max_items`` (50; 1 to 10,000): newest items kept.
            - ``block_items`` (1; 1 to ``max_items``): items left out together, as in
              ``item_history``.
            - ``max_texts`` (16; 1 to 10,000): newest texts kept, counted apart from items.
            - ``max_text_tokens`` (64; 1 to 100,000): tokens kept of each text, its beginning.
            - ``bos_token_id`` (none): first token of every prompt.
            - ``end_token`` (true): whether the end token closes each item.
        item_tokens: the model's item tokens.
        text_tokenizer: the model's text tokenizer.

    Raises:
        ValueError: an unknown or a bad parameter, or no text tokenizer.
    """
    check.reject_unknown(f"{NAME} version 1", params, DEFAULTS)
    values = {**DEFAULTS, **params}
    if text_tokenizer is None:
        raise ValueError(f"prompt builder {NAME} version 1 needs the model's text tokenizer")
    max_text_tokens = check.integer(values, "max_text_tokens", 1, 100_000)
    return SequencePromptBuilder(
        NAME,
        1,
        item_tokens,
        max_items=check.integer(values, "max_items", 1, 10_000),
        block_items=check.integer(values, "block_items", 1, 10_000),
        bos_token_id=check.optional_integer(values, "bos_token_id", 0, 2**31 - 1),
        end_token=check.boolean(values, "end_token"),
        encode_text=TextEncoder(text_tokenizer, item_tokens, max_text_tokens),
        max_texts=check.integer(values, "max_texts", 1, 10_000),
        max_text_tokens=max_text_tokens,
    )
