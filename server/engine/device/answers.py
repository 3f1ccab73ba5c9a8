"""Answers of searches, from packed numbers on the host to hits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import overload

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


class PackedHits(Sequence[SearchHit]):
    """Hits in arrays, as the device gave them; objects are made when somebody looks at them.

    Args:
        items: int32 (n,), item indices, best first.
        codes: int32 (n, L), semantic IDs.
        scores: float32 (n,).
        code_scores: float32 (n, L), scores of the levels.
    """

    __slots__ = ("_columns", "_made")
    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self,
        items: NDArray[np.int32],
        codes: NDArray[np.int32],
        scores: NDArray[np.float32],
        code_scores: NDArray[np.float32],
    ) -> None:
        self._columns = items, codes, scores, code_scores
        self._made: tuple[SearchHit, ...] | None = None

    def __len__(self) -> int:
        return len(self._columns[0])

    @overload
    def __getitem__(self, place: int) -> SearchHit: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[SearchHit, ...]: ...
    def __getitem__(self, place: int | slice) -> SearchHit | tuple[SearchHit, ...]:
        return self._hits()[place]

    def __iter__(self) -> Iterator[SearchHit]:
        return iter(self._hits())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PackedHits):
            return self._hits() == other._hits()
        return self._hits() == other if isinstance(other, tuple) else NotImplemented

    def __repr__(self) -> str:
        return repr(self._hits())

    def _hits(self) -> tuple[SearchHit, ...]:
        if self._made is None:
            items, codes, scores, code_scores = self._columns
            fields = zip(
                items.tolist(),
                zip(*codes.T.tolist(), strict=True),
                scores.tolist(),
                zip(*code_scores.T.tolist(), strict=True),
                strict=True,
            )
            self._made = tuple(map(_hit, fields))
        return self._made


class _Figures:
    """Packed answers as arrays: little is read of a row, and torch takes long for that.

    Args:
        host: see ``BeamBuffers.answers``.
        shapes: of the search.
    """

    def __init__(self, host: Tensor, shapes: StepShapes) -> None:
        # A copy: answers may be kept for longer than pinned memory should be.
        self._integers = host.numpy().copy()
        self._floats = self._integers.view(np.float32)
        self._columns = answer_columns(shapes)
        self._levels = shapes.num_levels

    def counts(self, row: int) -> tuple[bool, int]:
        """Whether a request is poisoned, and its items."""
        _, poisoned, items = self._integers[row, :3].tolist()
        return bool(poisoned), items

    def hits(self, row: int, count: int) -> PackedHits:
        """A request's first hits."""
        integers, floats, columns = self._integers[row], self._floats[row], self._columns
        leaves = integers[columns["leaves"]][:count]
        return PackedHits(
            integers[columns["items"]][:count],
            integers[columns["codes"]].reshape(-1, self._levels)[leaves],
            floats[columns["scores"]][leaves],
            floats[columns["code_scores"]].reshape(-1, self._levels)[leaves],
        )


# What ``SearchHit._make`` does, without a call of Python a hit.
_hit = partial(tuple.__new__, SearchHit)


def _answer(request: SearchRequest, found: _Figures, row: int, num_items: int) -> Answer:
    poisoned, items = found.counts(row)
    if poisoned:
        return EngineFault("the model returned NaN or infinite logits")
    count = min(items, request.top_k)
    hits = found.hits(row, count)
    if count == request.top_k:
        return SearchResult(hits)
    reason = "catalog_exhausted" if num_items < request.top_k else "filters"
    return SearchResult(hits, Shortfall(reason, count))  # type: ignore[arg-type]
