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

from rectokens.prompts.parts import BuiltPrompt, ItemPart, Part
from rectokens.schemas.item_tokens import ItemTokens

IGNORED_LABEL = -100
"""Label of a position without loss, as transformers has it."""

EncodeText = Callable[[str], tuple[list[int], bool]]


class SequencePromptBuilder:
    """Builds prompts of the shared layout (see the module's text).

    Truncation is part of the layout. The newest ``max_items`` items and, counted apart, the
    newest ``max_texts`` texts are kept, in their order: a long history does not push out what
    the user said, nor the reverse.

    Args:
        name, version: identity in the registry.
        item_tokens: the model's item tokens.
        max_items: items kept, at least 1.
        bos_token_id: first token of every sequence, or None for none.
        end_token: whether the end token closes each item.
        encode_text: text to (token ids, whether cut short); None where texts are refused.
        max_texts: texts kept.
        max_text_tokens: most ids that ``encode_text`` returns.

    Raises:
        ValueError: an end token is wanted and the model has none, or the bos token is an item
            token.
    """

    def __init__(
        self,
        name: str,
        version: int,
        item_tokens: ItemTokens,
        *,
        max_items: int,
        bos_token_id: int | None = None,
        end_token: bool = False,
        encode_text: EncodeText | None = None,
        max_texts: int = 0,
        max_text_tokens: int = 0,
    ) -> None:
        self.name = name
        self.version = version
        self._item_tokens = item_tokens
        self._max_items = max_items
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

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt, in tokens."""
        item = 1 + self._item_tokens.num_levels + len(self._tail)
        texts = self._max_texts * self._max_text_tokens
        return len(self._head) + self._max_items * item + texts + 1

    def build(self, parts: Sequence[Part]) -> BuiltPrompt:
        """See :class:`rectokens.prompts.builder.PromptBuilder`."""
        kept, items_dropped, texts_dropped = self._keep_newest(parts)
        ids = list(self._head)
        items = texts_cut = 0
        for part in kept:
            if isinstance(part, ItemPart):
                ids.append(self._item_tokens.start_token_id)
                ids += self.target(part.codes)
                items += 1
            else:
                text_ids, cut = self._text(part.text)
                ids += text_ids
                texts_cut += cut
        ids.append(self._item_tokens.start_token_id)
        return BuiltPrompt(tuple(ids), items, items_dropped, texts_dropped + texts_cut)

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
        kept: list[Part] = []
        items = texts = 0
        for part in reversed(parts):
            if isinstance(part, ItemPart):
                items += 1
                keep = items <= self._max_items
            else:
                texts += 1
                # Without an encoder texts stay, so that encoding them raises.
                keep = texts <= self._max_texts or self._encode_text is None
            if keep:
                kept.append(part)
        return kept[::-1], max(items - self._max_items, 0), max(texts - self._max_texts, 0)
