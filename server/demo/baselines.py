"""What a model has to beat: popularity, and how ranks become figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from server.demo.data import HeldOut


@dataclass(frozen=True, slots=True)
class Figures:
    """Recall@k and NDCG@k over ``users`` questions, each with one right answer."""

    recall: float
    ndcg: float
    users: int
    k: int


def figures_of_ranks(ranks: Iterable[int | None], k: int) -> Figures:
    """Figures of the right answers' ranks.

    A rank counts from 1; None is an answer not found. Recall@k is the share of ranks up to k;
    NDCG@k adds 1 / log2(rank + 1) for those.

    Raises:
        ValueError: k below 1, or no ranks.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    places = np.array([np.inf if rank is None else rank for rank in ranks], dtype=np.float64)
    if not len(places):
        raise ValueError("there are no ranks; at least one is needed")
    found = places[places <= k]
    return Figures(
        recall=len(found) / len(places),
        ndcg=float((1.0 / np.log2(found + 1.0)).sum()) / len(places),
        users=len(places),
        k=k,
    )


def popularity_ranks(questions: Sequence[HeldOut], counts: NDArray[np.int64]) -> list[int]:
    """Rank of each target when items are ordered by count and those of the history left out.

    Items of equal count share their mean rank, so that no order of ties helps or harms; a mean
    between two places is rounded down, in favour of popularity.

    Args:
        questions: history and target; a target that is in its own history is not left out.
        counts: (N,), from training parts only.
    """
    ascending = np.sort(counts)
    ranks = []
    for question in questions:
        count = counts[question.target]
        below = int(np.searchsorted(ascending, count, side="left"))
        upto = int(np.searchsorted(ascending, count, side="right"))
        met = counts[[row for row in set(question.history) if row != question.target]]
        better = len(counts) - upto - int((met > count).sum())
        equal = upto - below - int((met == count).sum())  # the target itself is one of them
        ranks.append(better + (equal + 1) // 2)
    return ranks
