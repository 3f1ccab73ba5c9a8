"""What callers ask for, in their own ids, and the prompts that they bring ready."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from rectokens.prompts.parts import TextPart
from rectokens.schemas.search import Normalization

# A query with at most this much in it is prepared on the event loop: that takes about a millisecond
# at most, a change of threads a quarter of one, and the engine has one thread less to share with.
_QUICK_IDS = 2_048
# Texts among the items are laid out part by part.
_QUICK_PARTS, _QUICK_CHARS = 256, 2_000


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A whole prompt as token ids, start token at its end."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EmbedsPrompt:
    """A whole prompt as input embeddings, still as a stranger sent them.

    Attributes:
        data: see ``rectokens.prompt_embeds``.
        max_tokens: most tokens it may hold.
        max_bytes: most bytes it may have, after base64.
    """

    data: str
    max_tokens: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class RecommendQuery:
    """What a caller wants, defaults filled in and limits checked.

    Attributes:
        parts: the history, oldest first, items by the caller's ids; empty for the model's start
            prompt.
        parts_param: name of the request field it came from, for error messages.
        top_k: items wanted, at most ``beam_width``.
        beam_width: W.
        temperature: 0 is beam search.
        seed: of the sample; None lets the server draw one.
        exclude_history: keep the known items of ``parts`` out of the answer.
        exclude_items: item ids to keep out.
        allow_items: only these item ids are returned; None for no such list.
        constraint_sets: names; only items in all of them are returned. Empty for no constraint.
        normalization: see ``SearchRequest``.
        with_metadata: tell each item's metadata.
        with_level_scores: tell each item's score by level.
        deadline_s: monotonic time after which the answer is not wanted.
        prompt: the whole prompt, ready; instead of ``parts``, which are then empty.
        refuse_unknown_items: an item of ``parts`` that the catalog does not know is an error.
        cut_long_prompt: leave the oldest items out where the prompt is longer than the model
            takes; False makes that an error.
    """

    parts: tuple[str | TextPart, ...]
    parts_param: str
    top_k: int
    beam_width: int
    temperature: float
    seed: int | None
    exclude_history: bool
    exclude_items: tuple[str, ...]
    constraint_sets: tuple[str, ...]
    normalization: Normalization
    with_metadata: bool
    with_level_scores: bool
    deadline_s: float
    prompt: TokenPrompt | EmbedsPrompt | None = None
    refuse_unknown_items: bool = False
    allow_items: tuple[str, ...] | None = None
    cut_long_prompt: bool = True

    @property
    def item_ids(self) -> Sequence[str]:
        """The items of the history, oldest first."""
        if not self._has_texts:
            return cast("tuple[str, ...]", self.parts)
        return [part for part in self.parts if isinstance(part, str)]

    @property
    def is_quick(self) -> bool:
        """Whether turning it into a prompt takes about a millisecond at most."""
        # The first use of an intersection counts through the whole catalog.
        if isinstance(self.prompt, EmbedsPrompt) or self.constraint_sets:
            return False
        ids = len(self.parts) + len(self.exclude_items) + len(self.allow_items or ())
        if not self._has_texts:
            return ids <= _QUICK_IDS
        return ids <= _QUICK_PARTS and self._text_chars <= _QUICK_CHARS

    @property
    def _has_texts(self) -> bool:
        return TextPart in set(map(type, self.parts))

    @property
    def _text_chars(self) -> int:
        return sum(len(part.text) for part in self.parts if isinstance(part, TextPart))
