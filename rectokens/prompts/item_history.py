"""Builder ``item_history``: the items a user met, oldest first, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rectokens.prompts import params as check
from rectokens.prompts.sequence import SequencePromptBuilder
from rectokens.schemas.item_tokens import ItemTokens

NAME = "item_history"

DEFAULTS: dict[str, Any] = {
    "max_items": 50,
    "block_items": 1,
    "bos_token_id": None,
    "end_token": False,
}


def item_history_v1(params: Mapping[str, Any], item_tokens: ItemTokens) -> SequencePromptBuilder:
    """Version 1. Layout of a history a, b with L = 2: ``[bos] S a0 a1 [E] S b0 b1 [E] S``.

    Args:
        params:
            - ``max_items`` (50; 1 to 10,000): newest items kept.
            - ``block_items`` (1; 1 to ``max_items``): items left out together. Above 1 a history
              longer than ``max_items`` keeps its prompt's beginning while it grows, until the
              next block goes; the prompt then has up to so many items fewer.
            - ``bos_token_id`` (none): first token of every prompt.
            - ``end_token`` (false): whether the end token closes each item.
        item_tokens: the model's item tokens.

    Raises:
        ValueError: an unknown or a bad parameter.
    """
    check.reject_unknown(f"{NAME} version 1", params, DEFAULTS)
    values = {**DEFAULTS, **params}
    return SequencePromptBuilder(
        NAME,
        1,
        item_tokens,
        max_items=check.integer(values, "max_items", 1, 10_000),
        block_items=check.integer(values, "block_items", 1, 10_000),
        bos_token_id=check.optional_integer(values, "bos_token_id", 0, 2**31 - 1),
        end_token=check.boolean(values, "end_token"),
    )
