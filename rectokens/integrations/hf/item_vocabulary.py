"""Item tokens as special tokens of a `tokenizers` backend."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken

ITEM_START = "<|item_start|>"
ITEM_END = "<|item_end|>"


def item_token(level: int, code: int) -> str:
    """The string of one item token."""
    return f"<item_L{level}_C{code}>"


def item_vocabulary(num_levels: int, codebook_size: int) -> list[str]:
    """All L·K + 2 strings in the order of their ids: level-major codes, start, end."""
    names = [item_token(level, c) for level in range(num_levels) for c in range(codebook_size)]
    return [*names, ITEM_START, ITEM_END]


def extend_backend(backend: Any, num_levels: int, codebook_size: int) -> int:
    """Give a backend the item tokens, unless it has them already.

    All tokens go in by one call: one call per token rebuilds the matcher each time, which takes
    minutes for tens of thousands.

    Args:
        backend: a ``tokenizers.Tokenizer``; changed in place.
        num_levels: L.
        codebook_size: K.

    Returns:
        Token id of (level 0, code 0).

    Raises:
        ValueError: L or K below 1; item tokens of another L or K are there; or the ids do not
            come out contiguous from the size of the vocabulary, because it has gaps or holds
            some of the strings already.
    """
    for name, value in (("num_levels", num_levels), ("codebook_size", codebook_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    names = item_vocabulary(num_levels, codebook_size)
    found = _layout(backend)
    if found is None:
        first = backend.get_vocab_size(with_added_tokens=True)
        last = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if last != first - 1:
            raise ValueError(
                f"the vocabulary has {first} tokens and largest id {last}: its ids have gaps, "
                "so item token ids could not be contiguous from its size"
            )
        backend.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    else:
        first = backend.token_to_id(item_token(0, 0))
        if found != (num_levels, codebook_size):
            raise ValueError(
                f"the tokenizer already has item tokens of {found[0]} levels x {found[1]} codes; "
                f"asked for {num_levels} x {codebook_size}"
            )
    for expected, name in enumerate(names, start=first):
        actual = backend.token_to_id(name)
        if actual != expected:
            raise ValueError(
                f"item token {name} has id {actual} instead of {expected}: the vocabulary holds "
                "this string already; item token ids must be contiguous"
            )
    return int(first)


def _layout(backend: Any) -> tuple[int, int] | None:
    """(L, K) of the item tokens that a backend has, None where it has none."""
    if backend.token_to_id(item_token(0, 0)) is None:
        return None
    codes = levels = 1
    while backend.token_to_id(item_token(0, codes)) is not None:
        codes += 1
    while backend.token_to_id(item_token(levels, 0)) is not None:
        levels += 1
    return levels, codes
