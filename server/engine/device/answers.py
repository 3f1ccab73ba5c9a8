"""Answers of searches, from packed numbers on the host to hits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rectokens.decoding.device_beams import answer_columns
from rectokens.decoding.device_tables import StepShapes
from rectokens.schemas.search import SearchHit, SearchRequest, SearchResult, Shortfall
from server.engine.base import LEFT
from server.engine.device.run import Answer
from server.engine.types import EngineFault


def collect_answers(
    requests: Sequence[SearchRequest],
    waiting: Sequence[tuple[tuple[int, ...], Tensor, StepShapes]],
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
        found = _Figures(host, shapes)
        for row, place in enumerate(members):
            answers[place] = _answer(requests[place], found, row, num_items)
    return answers


class _Figures:
    """Packed answers as arrays: little is read of a row, and torch takes long for that.

    Args:
        host: see ``BeamBuffers.answers``.
        shapes: of the search.
    """

    def __init__(self, host: Tensor, shapes: StepShapes) -> None:
        self._integers = host.numpy()
        self._floats = self._integers.view(np.float32)
        self._columns = answer_columns(shapes)
        self._levels = shapes.num_levels

    def counts(self, row: int) -> tuple[bool, int]:
        """Whether a request is poisoned, and its items."""
        _, poisoned, items = self._integers[row, :3].tolist()
        return bool(poisoned), items

    def hits(self, row: int, count: int) -> Iterator[tuple[Any, ...]]:
        """The fields of its first hits."""
        integers, floats, columns = self._integers[row], self._floats[row], self._columns
        slots = integers[columns["leaves"]][:count]
        return zip(
            integers[columns["items"]][:count].tolist(),
            self._by_level(integers[columns["codes"]], slots),
            floats[columns["scores"]][slots].tolist(),
            self._by_level(floats[columns["code_scores"]], slots),
            strict=True,
        )

    def _by_level(self, table: NDArray[Any], slots: NDArray[np.int32]) -> Iterator[Any]:
        """Rows ``slots`` of a table (W, L), as tuples."""
        return zip(*table.reshape(-1, self._levels)[slots].T.tolist(), strict=True)


# What ``SearchHit._make`` does, without a call of Python a hit.
_hit = partial(tuple.__new__, SearchHit)


def _answer(request: SearchRequest, found: _Figures, row: int, num_items: int) -> Answer:
    poisoned, items = found.counts(row)
    if poisoned:
        return EngineFault("the model returned NaN or infinite logits")
    count = min(items, request.top_k)
    hits = tuple(map(_hit, found.hits(row, count)))
    if count == request.top_k:
        return SearchResult(hits)
    reason = "catalog_exhausted" if num_items < request.top_k else "filters"
    return SearchResult(hits, Shortfall(reason, count))  # type: ignore[arg-type]
