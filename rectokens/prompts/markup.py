"""Items inside text: ``likes <item:B001> but not <item:B002>``.

The one way in which text may name items. An item id is whatever stands between ``<item:`` and
the next ``>``; ids that hold ``<`` or ``>`` cannot be written so. Everything else is text, item
tokens spelled out included.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_MENTION = re.compile(r"<item:([^<>]+)>")


@dataclass(frozen=True, slots=True)
class ItemMention:
    """An item named in a text, by its item id; whether a catalog has it is not known here."""

    item_id: str


def split_mentions(text: str, *, keep_blank: bool = False) -> tuple[str | ItemMention, ...]:
    """A text cut at the items that it names, in order.

    Args:
        text: of any length.
        keep_blank: keep text that is only white space; left out, the blank between two items
            is not text.
    """
    pieces = _MENTION.split(text)
    # re.split with one group: text, id, text, id, ..., text.
    parts: list[str | ItemMention] = []
    for position, piece in enumerate(pieces):
        if position % 2:
            parts.append(ItemMention(piece))
        elif piece if keep_blank else piece.strip():
            parts.append(piece)
    return tuple(parts)
