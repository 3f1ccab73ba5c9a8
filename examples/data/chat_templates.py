"""Seven ways to ask a model about items and semantic IDs, as chats.

A chat is ``{"messages": [{"role", "content"}]}``; a content is a list of parts, either
``{"type": "text", "text": str}`` or ``{"type": "item", "codes": [int, ...]}``. The assistant's
turn is what a model learns to answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Part = dict[str, Any]
Chat = dict[str, list[dict[str, Any]]]

_NEXT = "You recommend products. Answer with the product that comes next."
_NEXT_DESCRIBED = (
    "You recommend products. Answer with the product that comes next, then describe it."
)
_HISTORY = "A customer chose these products, oldest first:"


def description_to_sid(text: str, codes: Sequence[int]) -> Chat:
    """Which item is described?"""
    return _chat(
        "You know products by their descriptions. Answer with the product that is described.",
        [_text("Which product is this?\n"), _text(text)],
        [_item(codes)],
    )


def sid_to_description(codes: Sequence[int], text: str) -> Chat:
    """What is known of an item?"""
    return _chat(
        "You know products. Answer with a description of the product.",
        [_text("Describe this product: "), _item(codes)],
        [_text(text)],
    )


def sid_sequence_to_sid(codes_list: Sequence[Sequence[int]], next: Sequence[int]) -> Chat:  # noqa: A002  the documented name
    """Items in order, then the one that comes next."""
    return _chat(_NEXT, [_text(_HISTORY), *_sids(codes_list)], [_item(next)])


def description_sequence_to_sid(texts: Sequence[str], next: Sequence[int]) -> Chat:  # noqa: A002
    """Descriptions in order, then the item that comes next."""
    return _chat(_NEXT, [_text(_HISTORY), *_descriptions(texts)], [_item(next)])


def mixed_sequence_to_sid(
    described: Sequence[tuple[str, Sequence[int]]],
    next: Sequence[int],  # noqa: A002
) -> Chat:
    """Descriptions with their items in order, then the item that comes next."""
    parts: list[Part] = [_text(_HISTORY)]
    for text, codes in described:
        parts += [_text("\n- "), _text(text), _text(": "), _item(codes)]
    return _chat(_NEXT, parts, [_item(next)])


def description_sequence_to_sid_and_description(
    texts: Sequence[str],
    next: Sequence[int],  # noqa: A002
    next_text: str,
) -> Chat:
    """Descriptions in order, then the item that comes next and what is known of it."""
    return _chat(
        _NEXT_DESCRIBED,
        [_text(_HISTORY), *_descriptions(texts)],
        [_item(next), _text("\n"), _text(next_text)],
    )


def sid_sequence_to_sid_and_description(
    codes_list: Sequence[Sequence[int]],
    next: Sequence[int],  # noqa: A002
    next_text: str,
) -> Chat:
    """Items in order, then the one that comes next and what is known of it."""
    return _chat(
        _NEXT_DESCRIBED,
        [_text(_HISTORY), *_sids(codes_list)],
        [_item(next), _text("\n"), _text(next_text)],
    )


def _chat(system: str, asked: list[Part], answer: list[Part]) -> Chat:
    return {
        "messages": [
            {"role": "system", "content": [_text(system)]},
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answer},
        ]
    }


def _text(text: str) -> Part:
    return {"type": "text", "text": text}


def _item(codes: Sequence[int]) -> Part:
    return {"type": "item", "codes": [int(code) for code in codes]}


def _sids(codes_list: Sequence[Sequence[int]]) -> list[Part]:
    parts: list[Part] = []
    for codes in codes_list:
        parts += [_text(" "), _item(codes)]
    return parts


def _descriptions(texts: Sequence[str]) -> list[Part]:
    parts: list[Part] = []
    for text in texts:
        parts += [_text("\n- "), _text(text)]
    return parts
