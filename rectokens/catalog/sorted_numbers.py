"""Places among many sorted numbers, with few looks into memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_A_BUCKET = 8  # numbers, on average
# With more in a bucket the numbers are too uneven to be cut into equal ones.
_MOST_IN_A_BUCKET = 128


class SortedNumbers:
    """Finds places among sorted numbers as ``np.searchsorted`` does.

    Bisecting millions of numbers reads memory in twenty places for each query, and nobody has read
    those lately who answers a request every few milliseconds. Here the range of the numbers is cut
    into equal buckets, and a directory says where each begins: one look there, and the numbers of
    the bucket, which lie side by side. Half a byte a number.

    Args:
        values: int32 or uint64 (n,), ascending, not negative.
    """

    def __init__(self, values: NDArray[np.int32] | NDArray[np.uint64]) -> None:
        self._values = values
        self._first: NDArray[np.int32] | None = None
        if len(values) < 4 * _MOST_IN_A_BUCKET:
            return
        top = int(values[-1])
        buckets = len(values) // _A_BUCKET
        self._shift = values.dtype.type(max(top.bit_length() - buckets.bit_length(), 0))
        self._last = values.dtype.type(top >> int(self._shift))
        starts: NDArray[Any] = np.arange(int(self._last) + 1).astype(values.dtype)
        starts <<= self._shift
        first = np.searchsorted(values, starts).astype(np.int32)
        longest = int(np.diff(first, append=len(values)).max())
        if longest <= _MOST_IN_A_BUCKET:
            # A bucket that would be looked through beyond the end is entered earlier: what it holds
            # more is less.
            self._first = np.minimum(first, np.int32(len(values) - longest))
            self._longest = longest

    @property
    def nbytes(self) -> int:
        """Bytes held beside the numbers."""
        return 0 if self._first is None else self._first.nbytes

    def count_below(self, queries: NDArray[np.int32] | NDArray[np.uint64]) -> NDArray[np.int64]:
        """How many numbers are less than each query, which is where it would stand.

        Args:
            queries: (m,), of the type of the numbers, not negative.

        Returns:
            int64 (m,).
        """
        if self._first is None:
            return np.searchsorted(self._values, queries, side="left")
        places: NDArray[Any] = self._first[np.minimum(queries >> self._shift, self._last)]
        left = self._longest
        while left > 1:
            half = left // 2
            places = places + (self._values[places + (half - 1)] < queries) * np.int32(half)
            left -= half
        counts: NDArray[np.int64] = (places + (self._values[places] < queries)).astype(np.int64)
        return counts
