"""How many of a history's oldest items give way to a limit.

A prompt that loses one item for every new one begins differently every time, and what was
computed of the last one serves no more. So items go in whole blocks, counted from the beginning
of the history: while it grows, its prompt keeps its beginning until the next block has to go.
"""

from __future__ import annotations

from rectokens.prompts.parts import PromptTooLongError

# Of the items that a limit leaves room for. A history at the limit keeps three quarters of them or
# more, and its prompt begins anew once every quarter.
_BLOCKS_OF_ROOM = 4


def items_to_drop(num_items: int, room: int, block: int) -> int:
    """Oldest items to leave out.

    Args:
        num_items: of the history.
        room: most items that stay, at least 1.
        block: items that go together, at least 1.

    Returns:
        The least multiple of ``block`` that leaves at most ``room`` items. Where that would leave
        none, because a block is larger than the room, what is over the room.
    """
    over = max(num_items - room, 0)
    whole = -(-over // block) * block
    return whole if whole < num_items else over


def block_of(room: int) -> int:
    """Items of a block where a limit leaves room for so many: a quarter, at least 1."""
    return max(room // _BLOCKS_OF_ROOM, 1)


def items_to_drop_by_limits(
    num_items: int,
    max_tokens: int | None,
    *,
    max_items: int,
    block: int,
    bare_tokens: int,
    tokens_of_item: int,
    text_tokens: int = 0,
) -> int:
    """Oldest items of a history to leave out, by the layout's limit and by that of the prompt.

    Where the layout's limit leaves no more items than fit, it alone decides. Both answers never
    fall while a history grows, nor does what is returned.

    Args:
        num_items: of the history.
        max_tokens: of the whole prompt, None for no such limit.
        max_items: most items that stay, at least 1.
        block: items that go together for that limit, at least 1.
        bare_tokens: of a prompt of nothing.
        tokens_of_item: that each item adds.
        text_tokens: that all texts add.

    Raises:
        PromptTooLongError: not even the newest item fits.
    """
    dropped = items_to_drop(num_items, max_items, block)
    if max_tokens is None:
        return dropped
    space = max_tokens - bare_tokens
    room = (space - text_tokens) // tokens_of_item
    least = min(num_items, 1)
    if room < least:
        tokens = bare_tokens + text_tokens + least * tokens_of_item
        raise PromptTooLongError(
            f"the prompt has {tokens} tokens even with "
            f"{'the newest item only' if least else 'no item'}; at most {max_tokens} fit"
        )
    if max_items <= room:
        return dropped
    # Texts come and go; blocks of a size that depends on the limit alone stay in place.
    return max(dropped, items_to_drop(num_items, room, block_of(space // tokens_of_item)))
