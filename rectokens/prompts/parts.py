"""What a prompt is built from and what comes out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ItemPart:
    """One item of a history, by its semantic ID: codes (L,), level 0 first."""

    codes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TextPart:
    """One piece of text. It is data: nothing in it can become an item token."""

    text: str


Part = ItemPart | TextPart


class PromptTooLongError(ValueError):
    """A prompt that is too long even without the items that may be left out of it."""


@dataclass(frozen=True, slots=True)
class BuiltPrompt:
    """A prompt ready for the model, and what was left out of it.

    Attributes:
        token_ids: the prompt, at least one token; the model continues it with an item's codes.
        items_used: items of the history that are in the prompt.
        items_truncated: older items that were left out.
        texts_truncated: texts that were left out or cut short.
    """

    token_ids: tuple[int, ...]
    items_used: int
    items_truncated: int
    texts_truncated: int = 0
