"""Answers of searches, from packed numbers on the host to hits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rectokens.decoding.device_beams import SearchAnswers, unpack_answers
from rectokens.schemas.search import SearchHit, SearchRequest, SearchResult, Shortfall
from server.engine.base import LEFT
from server.engine.device.run import Answer
from server.engine.types import EngineFault


def collect_answers(
    requests: Sequence[SearchRequest],
    waiting: Sequence[tuple[tuple[int, ...], Tensor, Any]],
    num_items: int,
) -> list[Answer]:
    """Answers to the requests of a batch, read from what its searches gave.

    Args:
        requests: of the batch.
        waiting: of each search: places of its requests, packed answers on the host, shapes.
        num_items: N of the catalog.
    """
    answers: list[Answer] = [LEFT] * len(requests)
    for members, host, shapes in waiting:
        found = _Figures(unpack_answers(host, shapes))
        for row, place in enumerate(members):
            answers[place] = _answer(requests[place], found, row, num_items)
    return answers


class _Figures:
    """Answers as arrays: what is read of a row is little, and torch takes long for that."""

    def __init__(self, found: SearchAnswers) -> None:
        self.poisoned = found.poisoned.tolist()
        self.item_count = found.item_count.tolist()
        self.items = found.items.numpy()
        self.leaves = found.leaves.numpy()
        self.scores = found.scores.numpy()
        self.codes = found.codes.numpy()
        self.code_scores = found.code_scores.numpy()


# What ``SearchHit._make`` does, without a call of Python a hit.
_hit = partial(tuple.__new__, SearchHit)


def _rows_of(table: NDArray[Any], slots: NDArray[np.int32]) -> Iterator[tuple[Any, ...]]:
    """Rows ``slots`` of a table (W, L), as tuples."""
    return zip(*table[slots].T.tolist(), strict=True)


def _answer(request: SearchRequest, found: _Figures, row: int, num_items: int) -> Answer:
    if found.poisoned[row]:
        return EngineFault("the model returned NaN or infinite logits")
    count = min(found.item_count[row], request.top_k)
    slots = found.leaves[row, :count]
    figures = zip(
        found.items[row, :count].tolist(),
        _rows_of(found.codes[row], slots),
        found.scores[row, slots].tolist(),
        _rows_of(found.code_scores[row], slots),
        strict=True,
    )
    hits = tuple(map(_hit, figures))
    if count == request.top_k:
        return SearchResult(hits)
    reason = "catalog_exhausted" if num_items < request.top_k else "filters"
    return SearchResult(hits, Shortfall(reason, count))  # type: ignore[arg-type]
