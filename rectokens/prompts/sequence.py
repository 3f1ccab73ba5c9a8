"""The layout that the builders share: one flat sequence, each item behind the start token.

An item is ``start c0 .. c(L-1) [end]`` and a prompt ends with the start token of the item that
is to come::

    build([item a, text t, item b])     [bos] S a0 a1 [E] t.. S b0 b1 [E] S
    training_sequence([a, t, b])        [bos] S a0 a1 [E] t.. S b0 b1 [E]
      labels                             -   -  a0 a1 [E] -   -  b0 b1 [E]

Because every item, not only the predicted one, follows a start token, what stands before an
item's codes in a training sequence is exactly the prompt of the history before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from rectokens.prompts.layout import ItemLayout
from rectokens.prompts.parts import BuiltPrompt, ItemPart, Part
from rectokens.prompts.truncation import items_to_drop_by_limits
from rectokens.schemas.item_tokens import ItemTokens

IGNORED_LABEL = -100
"""Label of a position without loss, as transformers has it."""

EncodeText = Callable[[str], tuple[list[int], bool]]


class SequencePromptBuilder:
    """Builds prompts of the shared layout (see the module's text).

    Truncation is part of the layout. The newest ``max_items`` items and, counted apart, the
    newest ``max_texts`` texts are kept, in their order: a long history does not push out what
    the user said, nor the reverse. Items are left out ``block_items`` at a time (see
    :mod:`rectokens.prompts.truncation`), in training as in serving.

    Args:
        name, version: identity in the registry.
        item_tokens: the model's item tokens.
        max_items: items kept, at least 1.
        block_items: items left out together, 1 to ``max_items``.
        bos_token_id: first token of every sequence, or None for none.
        end_token: whether the end token closes each item.
        encode_text: text to (token ids, whether cut short); None where texts are refused.
        max_texts: texts kept.
        max_text_tokens: most ids that ``encode_text`` returns.

    Raises:
        ValueError: an end token is wanted and the model has none, the bos token is an item
            token, or a block is larger than ``max_items``.
    """

    def __init__(
        self,
        name: str,
        version: int,
        item_tokens: ItemTokens,
        *,
        max_items: int,
        block_items: int = 1,
        bos_token_id: int | None = None,
        end_token: bool = False,
        encode_text: EncodeText | None = None,
        max_texts: int = 0,
        max_text_tokens: int = 0,
    ) -> None:
        self.name = name
        self.version = version
        self._item_tokens = item_tokens
        if block_items > max_items:
            raise ValueError(
                f"block_items is {block_items}; allowed are 1 to max_items, {max_items}"
            )
        self._max_items = max_items
        self._block_items = block_items
        self._max_texts = max_texts
        self._max_text_tokens = max_text_tokens
        self._encode_text = encode_text
        self._head = [] if bos_token_id is None else [bos_token_id]
        self._tail: list[int] = []
        if end_token:
            if item_tokens.end_token_id is None:
                raise ValueError("end_token is true, but the model has no end token")
            self._tail = [item_tokens.end_token_id]
        reserved = {item_tokens.start_token_id, item_tokens.end_token_id}
        if bos_token_id is not None and (
            item_tokens.offset <= bos_token_id < item_tokens.end or bos_token_id in reserved
        ):
            raise ValueError(f"bos_token_id is {bos_token_id}, which is an item token")
        start = [item_tokens.start_token_id]
        self._layout = ItemLayout(item_tokens, self._head, start, self._tail, start)

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt, in tokens."""
        texts = self._max_texts * self._max_text_tokens
        return self._bare_tokens + self._max_items * self._tokens_of_item + texts

    @property
    def _tokens_of_item(self) -> int:
        return 1 + self._item_tokens.num_levels + len(self._tail)

    @property
    def _bare_tokens(self) -> int:
        """Tokens of the start prompt."""
        return len(self._head) + 1

    def build(self, parts: Sequence[Part], *, max_tokens: int | None = None) -> BuiltPrompt:
        """See :class:`rectokens.prompts.builder.PromptBuilder`."""
        kept, items_dropped, texts_dropped = self._keep_newest(parts)
        pieces: list[tuple[bool, list[int]]] = []  # whether of an item, and its token ids
        texts_cut = text_tokens = 0
        for part in kept:
            if isinstance(part, ItemPart):
                pieces.append((True, [self._item_tokens.start_token_id, *self.target(part.codes)]))
            else:
                text_ids, cut = self._text(part.text)
                pieces.append((False, text_ids))
                texts_cut += cut
                text_tokens += len(text_ids)
        num_items = items_dropped + sum(is_item for is_item, _ in pieces)
        over = self._to_drop(num_items, max_tokens, text_tokens) - items_dropped
        ids = list(self._head)
        for is_item, piece in pieces:
            if is_item and over > 0:
                over -= 1
                items_dropped += 1
            else:
                ids += piece
        ids.append(self._item_tokens.start_token_id)
        used = num_items - items_dropped
        return BuiltPrompt(tuple(ids), used, items_dropped, texts_dropped + texts_cut)

    def build_items(
        self, codes: NDArray[np.integer], *, max_tokens: int | None = None
    ) -> BuiltPrompt:
        """See :class:`rectokens.prompts.builder.PromptBuilder`."""
        dropped = self._to_drop(len(codes), max_tokens)
        return BuiltPrompt(self._layout.prompt(codes[dropped:]), len(codes) - dropped, dropped)

    def _to_drop(self, num_items: int, max_tokens: int | None, text_tokens: int = 0) -> int:
        return items_to_drop_by_limits(
            num_items,
            max_tokens,
            max_items=self._max_items,
            block=self._block_items,
            bare_tokens=self._bare_tokens,
            tokens_of_item=self._tokens_of_item,
            text_tokens=text_tokens,
        )

    def target(self, codes: Sequence[int]) -> list[int]:
        """See :class:`rectokens.prompts.builder.PromptBuilder`."""
        return self._item_tokens.encode(codes) + self._tail

    def training_sequence(self, parts: Sequence[Part]) -> tuple[list[int], list[int]]:
        """See :class:`rectokens.prompts.builder.PromptBuilder`.

        A history is cut to what the prompt of its last item holds, so up to ``max_items`` + 1
        items. The first item that is left then gets no labels: its prefix would claim that the
        user had no history. Parts after the last item are left out, nothing follows them.
        """
        last = max((i for i, part in enumerate(parts) if isinstance(part, ItemPart)), default=-1)
        if last < 0:
            raise ValueError(f"none of the {len(parts)} parts is an item; nothing to train on")
        kept, items_dropped, _ = self._keep_newest(parts[:last])
        ids = list(self._head)
        labels = [IGNORED_LABEL] * len(ids)
        unlabelled = 1 if items_dropped else 0
        for part in [*kept, parts[last]]:
            if isinstance(part, ItemPart):
                target = self.target(part.codes)
                ids += [self._item_tokens.start_token_id, *target]
                labels.append(IGNORED_LABEL)
                labels += [IGNORED_LABEL] * len(target) if unlabelled > 0 else target
                unlabelled -= 1
            else:
                text_ids, _ = self._text(part.text)
                ids += text_ids
                labels += [IGNORED_LABEL] * len(text_ids)
        return ids, labels

    def _text(self, text: str) -> tuple[list[int], bool]:
        if self._encode_text is None:
            raise ValueError(
                f"text was given, but this model's prompts (builder {self.name} "
                f"version {self.version}) take items only"
            )
        return self._encode_text(text)

    def _keep_newest(self, parts: Sequence[Part]) -> tuple[list[Part], int, int]:
        """Parts kept, oldest first, and the numbers of items and of texts left out."""
        items = sum(isinstance(part, ItemPart) for part in parts)
        items_dropped = self._to_drop(items, None)
        texts_dropped = max(len(parts) - items - self._max_texts, 0)
        if self._encode_text is None:
            texts_dropped = 0  # they stay, so that encoding them raises
        kept: list[Part] = []
        items = texts = 0
        for part in parts:
            if isinstance(part, ItemPart):
                items += 1
                keep = items > items_dropped
            else:
                texts += 1
                keep = texts > texts_dropped
            if keep:
                kept.append(part)
        return kept, items_dropped, texts_dropped
