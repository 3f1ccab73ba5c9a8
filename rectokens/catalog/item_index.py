"""From item ids to item indices, for tens of millions of items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray

from rectokens.catalog.sorted_numbers import SortedNumbers

HashFunction: TypeAlias = Callable[[pl.Series], NDArray[np.uint64]]


def hash_strings(values: pl.Series) -> NDArray[np.uint64]:
    """64-bit hash of each string; stable within a process, which is all an index needs."""
    # Of rows, which are strings here, because that does not go through a query for each call.
    return pl.DataFrame([values]).hash_rows(seed=0).to_numpy()


class ItemIndex:
    """Finds strings in a fixed column: 9 bytes an item beside the column itself.

    An entry is one number: the upper bits of a string's hash, its row in the bits below. They are
    kept sorted and found by a directory; a hit counts only if the strings are equal, so hashes
    whose upper bits collide (a few hundred pairs among 2 * 10^7 items) cost time and never a wrong
    answer.
    """

    def __init__(self, item_ids: pl.Series, hash_ids: HashFunction = hash_strings) -> None:
        """Index a column.

        Args:
            item_ids: (N,) strings, N < 2**31, no nulls, one chunk.
            hash_ids: hash of a string column, uint64 of the same length.
        """
        num_rows = len(item_ids)
        self._item_ids = item_ids
        self._hash_ids = hash_ids
        self._row_mask = np.uint64((1 << max(num_rows - 1, 0).bit_length()) - 1)
        # Numbers are sorted ten times as fast as hashes and the order of their rows beside them.
        self._entries = np.sort(
            (hash_ids(item_ids) & ~self._row_mask) | np.arange(num_rows, dtype=np.uint64)
        )
        self._places = SortedNumbers(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes the index holds beside the column."""
        return self._entries.nbytes + self._places.nbytes

    def find(self, queries: Sequence[str]) -> NDArray[np.int64]:
        """Row of each query, -1 where the column has none.

        If the column repeats a string, its first row is found.

        Args:
            queries: n strings.

        Returns:
            int64 (n,).

        Raises:
            TypeError: something that is no string.
        """
        found = np.full(len(queries), -1, dtype=np.int64)
        wanted, rows = _encodable(queries)
        if not rows.size:
            return found
        hashes = self._hash_ids(wanted) & ~self._row_mask
        places = self._places.count_below(hashes)
        undecided = np.arange(rows.size)
        while undecided.size:
            undecided = undecided[places[undecided] < self._entries.size]
            entries = self._entries[places[undecided]]
            near = (entries & ~self._row_mask) == hashes[undecided]
            undecided = undecided[near]
            candidates = (entries[near] & self._row_mask).astype(np.int64)
            sought = wanted if undecided.size == rows.size else wanted[undecided]
            equal = (self._item_ids[candidates] == sought).to_numpy().astype(np.bool_)
            found[rows[undecided[equal]]] = candidates[equal]
            # Another string with these bits: look at the next one with the same.
            undecided = undecided[~equal]
            places[undecided] += 1
        return found

    def repeated(self) -> pl.Series:
        """Strings that the column holds more than once, each once, in the order of the column."""
        hashes = self._entries & ~self._row_mask
        same = hashes[1:] == hashes[:-1]
        suspect = np.zeros(hashes.size, dtype=np.bool_)
        suspect[1:] |= same
        suspect[:-1] |= same
        rows = np.sort((self._entries[suspect] & self._row_mask).astype(np.int64))
        strings = self._item_ids[rows]
        return strings.filter(strings.is_duplicated()).unique(maintain_order=True)


def _encodable(queries: Sequence[str]) -> tuple[pl.Series, NDArray[np.intp]]:
    """The queries as a column, and the position of each among all of them.

    Lone surrogates, which JSON can smuggle into a Python string, have no UTF-8 form; no item id
    can be equal to such a string.
    """
    if set(map(type, queries)) != {str}:
        for query in queries:
            if not isinstance(query, str):
                raise TypeError(
                    f"item id is {query!r}, a {type(query).__name__}; expected a string"
                )
    try:
        return pl.Series(queries, dtype=pl.String), np.arange(len(queries))
    except UnicodeEncodeError:
        good = [i for i, query in enumerate(queries) if _has_utf8(query)]
        chosen: list[Any] = [queries[i] for i in good]
        return pl.Series(chosen, dtype=pl.String), np.array(good, dtype=np.intp)


def _has_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
