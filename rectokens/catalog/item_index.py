"""From item ids to item indices, for tens of millions of items."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray

from rectokens.catalog.sorted_numbers import SortedNumbers

HashFunction: TypeAlias = Callable[[Sequence[str]], NDArray[np.uint64]]

# Strings of a column that are hashed at a time: Python objects of no more of them exist at once,
# and other threads wait half a millisecond at most.
_CHUNK = 4_096


def hash_strings(values: Sequence[str]) -> NDArray[np.uint64]:
    """64-bit hash of each string; stable within a process, which is all an index needs.

    Python's own, which strangers cannot foresee. For the few strings of a request it takes a
    fraction of the time of a call that shares work out among threads.
    """
    return np.fromiter(map(hash, values), dtype=np.int64, count=len(values)).view(np.uint64)


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
            hash_ids: hashes of strings.
        """
        num_rows = len(item_ids)
        self._item_ids = item_ids
        self._hash_ids = hash_ids
        self._row_mask = np.uint64((1 << max(num_rows - 1, 0).bit_length()) - 1)
        # Numbers are sorted ten times as fast as hashes and the order of their rows beside them.
        hashes = np.empty(num_rows, dtype=np.uint64)
        for start in range(0, num_rows, _CHUNK):
            chunk = slice(start, start + _CHUNK)
            hashes[chunk] = hash_ids(item_ids[chunk].to_list())
        self._entries = np.sort((hashes & ~self._row_mask) | np.arange(num_rows, dtype=np.uint64))
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
        if set(map(type, queries)) - {str}:
            queries = [_as_string(query) for query in queries]
        if not self._entries.size or not len(queries):
            return np.full(len(queries), -1, dtype=np.int64)
        sought = list(queries)
        hashes = self._hash_ids(sought) & ~self._row_mask
        places = self._places.count_below(hashes)
        candidates, names = self._at(places)
        if names == sought:  # most often: all of them are known, each the first with its bits
            return candidates
        found = np.full(len(sought), -1, dtype=np.int64)
        rows = np.arange(len(sought))
        while True:
            wanted = map(sought.__getitem__, rows.tolist())
            equal = np.fromiter(map(operator.eq, names, wanted), dtype=np.bool_, count=len(names))
            found[rows[equal]] = candidates[equal]
            # Another string with these bits: look at the next entry, if that has the same.
            rows = rows[~equal]
            places[rows] += 1
            rows = rows[places[rows] < self._entries.size]
            rows = rows[(self._entries[places[rows]] ^ hashes[rows]) <= self._row_mask]
            if not rows.size:
                return found
            candidates, names = self._at(places[rows])

    def _at(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[str]]:
        """Rows and strings of entries; of the last one for places beyond it."""
        rows = self._entries.take(places, mode="clip") & self._row_mask
        # A series of this type is taken as it is; an array would be looked through first.
        names: list[str] = self._item_ids[pl.Series(rows.astype(np.uint32))].to_list()
        return rows.view(np.int64), names

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


def _as_string(query: Any) -> str:
    if not isinstance(query, str):
        raise TypeError(f"item id is {query!r}, a {type(query).__name__}; expected a string")
    return "".join((query,))  # without what its class may add
