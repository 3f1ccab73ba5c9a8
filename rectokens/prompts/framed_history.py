"""Builder ``framed_history``: items between a beginning and an end that never change.

For models that learned to answer chats: the chat template's text around the history is fixed, so
it is kept as token ids and serving needs no template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rectokens.prompts import params as check
from rectokens.prompts.layout import ItemLayout
from rectokens.prompts.parts import BuiltPrompt, ItemPart, Part
from rectokens.prompts.sequence import IGNORED_LABEL
from rectokens.prompts.truncation import items_to_drop_by_limits
from rectokens.schemas.item_tokens import ItemTokens

NAME = "framed_history"

DEFAULTS: dict[str, Any] = {
    "max_items": 50,
    "block_items": 1,
    "head_token_ids": [],
    "before_item_token_ids": [],
    "tail_token_ids": [],
    "end_token": True,
}


class FramedHistoryBuilder:
    """See :func:`framed_history_v1` and :class:`rectokens.prompts.builder.PromptBuilder`."""

    def __init__(
        self,
        item_tokens: ItemTokens,
        *,
        max_items: int,
        block_items: int,
        head: Sequence[int],
        before_item: Sequence[int],
        tail: Sequence[int],
        end_token: bool,
    ) -> None:
        if block_items > max_items:
            raise ValueError(
                f"block_items is {block_items}; allowed are 1 to max_items, {max_items}"
            )
        if end_token and item_tokens.end_token_id is None:
            raise ValueError("end_token is true, but the model has no end token")
        for name, ids in (("head", head), ("before_item", before_item), ("tail", tail)):
            codes = [token for token in ids if item_tokens.offset <= token < item_tokens.end]
            if codes:
                raise ValueError(f"{name}_token_ids has {codes[0]}, which is the token of a code")
        self.name = NAME
        self.version = 1
        self._items = item_tokens
        self._max_items, self._block_items = max_items, block_items
        self._head, self._before, self._tail = list(head), list(before_item), list(tail)
        end = item_tokens.end_token_id
        self._end = [end] if end_token and end is not None else []
        start = [item_tokens.start_token_id]
        self._layout = ItemLayout(
            item_tokens, self._head, self._before + start, self._end, self._tail + start
        )

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt, in tokens."""
        return self._bare_tokens + self._max_items * self._tokens_of_item

    @property
    def _bare_tokens(self) -> int:
        return len(self._head) + len(self._tail) + 1

    @property
    def _tokens_of_item(self) -> int:
        return len(self._before) + 1 + self._items.num_levels + len(self._end)

    def build(self, parts: Sequence[Part], *, max_tokens: int | None = None) -> BuiltPrompt:
        """See :class:`rectokens.prompts.builder.PromptBuilder`."""
        items = _items_only(parts)
        dropped = self._to_drop(len(items), max_tokens)
        ids = list(self._head)
        for item in items[dropped:]:
            ids += [*self._before, self._items.start_token_id, *self.target(item.codes)]
        ids += [*self._tail, self._items.start_token_id]
        return BuiltPrompt(tuple(ids), len(items) - dropped, dropped, 0)

    def build_items(
        self, codes: NDArray[np.integer], *, max_tokens: int | None = None
    ) -> BuiltPrompt:
        """See :class:`rectokens.prompts.builder.PromptBuilder`."""
        dropped = self._to_drop(len(codes), max_tokens)
        return BuiltPrompt(self._layout.prompt(codes[dropped:]), len(codes) - dropped, dropped)

    def _to_drop(self, num_items: int, max_tokens: int | None) -> int:
        return items_to_drop_by_limits(
            num_items,
            max_tokens,
            max_items=self._max_items,
            block=self._block_items,
            bare_tokens=self._bare_tokens,
            tokens_of_item=self._tokens_of_item,
        )

    def target(self, codes: Sequence[int]) -> list[int]:
        """See :class:`rectokens.prompts.builder.PromptBuilder`."""
        return [*self._items.encode(codes), *self._end]

    def training_sequence(self, parts: Sequence[Part]) -> tuple[list[int], list[int]]:
        """See :class:`rectokens.prompts.builder.PromptBuilder`.

        The last item alone has labels: before the others stands no prompt's end.
        """
        items = _items_only(parts)
        if not items:
            raise ValueError(f"none of the {len(parts)} parts is an item; nothing to train on")
        prompt = list(self.build(items[:-1]).token_ids)
        target = self.target(items[-1].codes)
        return prompt + target, [IGNORED_LABEL] * len(prompt) + target


def framed_history_v1(params: Mapping[str, Any], item_tokens: ItemTokens) -> FramedHistoryBuilder:
    """Version 1. Layout of items a, b: ``[head] [before] S a.. [E] [before] S b.. [E] [tail] S``.

    Args:
        params:
            - ``max_items`` (50; 1 to 10,000): newest items kept.
            - ``block_items`` (1; 1 to ``max_items``): items left out together, as in
              ``item_history``.
            - ``head_token_ids`` (none): how every prompt begins.
            - ``before_item_token_ids`` (none): in front of each item's start token.
            - ``tail_token_ids`` (none): behind the history; the start token follows.
            - ``end_token`` (true): whether the end token closes each item.
        item_tokens: the model's item tokens.

    Raises:
        ValueError: an unknown or a bad parameter.
    """
    check.reject_unknown(f"{NAME} version 1", params, DEFAULTS)
    values = {**DEFAULTS, **params}
    return FramedHistoryBuilder(
        item_tokens,
        max_items=check.integer(values, "max_items", 1, 10_000),
        block_items=check.integer(values, "block_items", 1, 10_000),
        head=check.token_ids(values, "head_token_ids"),
        before_item=check.token_ids(values, "before_item_token_ids"),
        tail=check.token_ids(values, "tail_token_ids"),
        end_token=check.boolean(values, "end_token"),
    )


def _items_only(parts: Sequence[Part]) -> list[ItemPart]:
    for part in parts:
        if not isinstance(part, ItemPart):
            raise ValueError(
                f"text was given, but this model's prompts (builder {NAME} version 1) take items "
                "only"
            )
    return [part for part in parts if isinstance(part, ItemPart)]
