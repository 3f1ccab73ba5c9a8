"""What stands near what: items in histories, and items by their texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ROWS_TOGETHER = 2048


def pairs_by_gap(
    histories: Sequence[Sequence[int]], reach: int
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    """Items of each history that come so many places after others, up to ``reach``.

    Yields:
        The gap from 1, the earlier items and the later ones, int64 (pairs,), of one history.
    """
    for history in histories:
        items = np.asarray(history, dtype=np.int64)
        for gap in range(1, min(reach, len(items) - 1) + 1):
            yield gap, items[:-gap], items[gap:]


def nearest_texts(unit: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The ``count`` other items (or all, where there are fewer) of most similar text.

    Args:
        unit: float32 (N, D), rows of unit length.
        count: of neighbours; there is nothing without any.

    Yields:
        Some rows in order, int64 (B,); their neighbours' cosines, the largest first, and rows,
        (B, count).
    """
    count = min(count, len(unit) - 1)
    for first in range(0, len(unit) if count > 0 else 0, _ROWS_TOGETHER):
        similar = unit[first : first + _ROWS_TOGETHER] @ unit.T
        row = torch.arange(len(similar))
        similar[row, first + row] = -torch.inf
        values, near = similar.topk(count, dim=1)
        yield first + row, values, near
