"""What a model has to beat: counting, and looking for neighbours.

Every baseline gives all items a score for a history; nothing but the training parts is counted.
A score's rank among all items is the mean of the places that equal scores share, so that no order
of ties helps or harms; a mean between the last place that counts and the next one counts still.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from examples.data.neighbours import pairs_by_gap
from server.demo.data import HeldOut, item_counts

Scorer = Callable[[Sequence[Sequence[int]]], NDArray[np.floating]]
"""Histories, rows of items oldest first, to scores (B, N); higher is better."""

_CHUNK = 256
# Links are sums of products like 1/3 * 1/4: different ones differ by more.
_TIE_BREAK = 1e-3


@dataclass(frozen=True, slots=True)
class Links:
    """A sparse (N, N) matrix: what speaks for which item, and how much.

    Attributes:
        starts: int64 (N + 1,): row i has the entries from ``starts[i]`` to ``starts[i + 1]``.
        items: int64 (E,), columns.
        weights: float64 (E,).
    """

    starts: NDArray[np.int64]
    items: NDArray[np.int64]
    weights: NDArray[np.float64]

    @property
    def num_items(self) -> int:
        """N."""
        return len(self.starts) - 1


def links(
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    weights: NDArray[np.float64],
    num_items: int,
) -> Links:
    """A sparse matrix of entries, those of one place added up."""
    places, inverse = np.unique(rows * num_items + columns, return_inverse=True)
    starts = np.searchsorted(places, np.arange(num_items + 1) * num_items)
    summed = np.bincount(inverse, weights=weights, minlength=len(places))
    return Links(starts.astype(np.int64), places % num_items, summed)


def markov_links(train: Sequence[Sequence[int]], num_items: int, reach: int = 1) -> Links:
    """How often an item came after another: 1 / gap for each time, up to ``reach`` apart."""
    rows, columns, weights = [], [], []
    for gap, before, after in pairs_by_gap(train, reach):
        rows.append(before)
        columns.append(after)
        weights.append(np.full(len(before), 1.0 / gap))
    return links(_joined(rows), _joined(columns), _joined(weights, np.float64), num_items)


def cosine_links(train: Sequence[Sequence[int]], num_items: int) -> Links:
    """Cosine of two items' users: |both| / sqrt(|one| |other|); 0 between an item and itself."""
    rows, columns = [], []
    for history in train:
        items = np.unique(np.asarray(history, dtype=np.int64))
        one, other = np.repeat(items, len(items)), np.tile(items, len(items))
        rows.append(one[one != other])
        columns.append(other[one != other])
    both = links(
        _joined(rows), _joined(columns), np.ones(sum(map(len, rows)), np.float64), num_items
    )
    users = item_counts([sorted(set(history)) for history in train], num_items)
    of_row = np.repeat(np.arange(num_items), np.diff(both.starts))
    scale = np.sqrt(users[of_row].astype(np.float64) * users[both.items])
    return Links(both.starts, both.items, both.weights / scale)


def popularity_scorer(train: Sequence[Sequence[int]], num_items: int) -> Scorer:
    """Every history gets the items' counts."""
    counts = item_counts(train, num_items).astype(np.float64)
    return lambda histories: np.tile(counts, (len(histories), 1))


def linked_scorer(
    matrix: Links,
    weight_of_age: Callable[[int], float],
    tie_break: NDArray[np.int64] | None = None,
) -> Scorer:
    """Links of the history's items added up, each item weighted by its age.

    Args:
        matrix: of the links.
        weight_of_age: of the newest item (age 0), the one before (1), ...; those from the first
            0 on are not looked at.
        tie_break: (N,), counts that order items of equal score.
    """
    addition = None if tie_break is None else tie_break * (_TIE_BREAK / max(tie_break.max(), 1))

    def scores(histories: Sequence[Sequence[int]]) -> NDArray[np.floating]:
        users, items, weights = [], [], []
        for user, history in enumerate(histories):
            for age, item in enumerate(reversed(history)):
                weight = weight_of_age(age)
                if weight == 0.0:
                    break
                users.append(user)
                items.append(item)
                weights.append(weight)
        owner, edges = _edges(matrix, np.asarray(items, dtype=np.int64))
        row = np.asarray(users, dtype=np.int64)[owner]
        added = np.bincount(
            row * matrix.num_items + matrix.items[edges],
            weights=np.asarray(weights)[owner] * matrix.weights[edges],
            minlength=len(histories) * matrix.num_items,
        )
        table = added.reshape(len(histories), matrix.num_items)
        return table if addition is None else table + addition

    return scores


def text_scorer(embeddings: NDArray[np.float32], last: int = 1) -> Scorer:
    """Cosine between an item's text and the mean text vector of the newest ``last`` items."""
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)

    def scores(histories: Sequence[Sequence[int]]) -> NDArray[np.floating]:
        means = np.stack([unit[list(history[-last:])].mean(axis=0) for history in histories])
        return means @ unit.T

    return scores


@dataclass(frozen=True, slots=True)
class TargetRanks:
    """Ranks of the targets among all items, from 1; halves where places are shared.

    Attributes:
        history_left_out: float64 (Q,), the history's items not ranked; a target that is in its
            own history is.
        all_items: float64 (Q,), every item ranked.
    """

    history_left_out: NDArray[np.float64]
    all_items: NDArray[np.float64]


def target_ranks(scorer: Scorer, questions: Sequence[HeldOut]) -> TargetRanks:
    """Rank each question's target by a baseline's scores."""
    parts: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    for chunk in _chunks(questions):
        scores = scorer([question.history for question in chunk])
        targets = np.array([question.target for question in chunk])
        wanted = scores[np.arange(len(chunk)), targets][:, None]
        better = (scores > wanted).sum(axis=1)
        equal = (scores == wanted).sum(axis=1)
        unfiltered = better + (equal + 1) / 2
        for row, question in enumerate(chunk):
            seen = [item for item in set(question.history) if item != question.target]
            better[row] -= (scores[row, seen] > wanted[row]).sum()
            equal[row] -= (scores[row, seen] == wanted[row]).sum()
        parts.append((better + (equal + 1) / 2, unfiltered))
    left_out, everything = zip(*parts, strict=True) if parts else ((), ())
    return TargetRanks(_joined([*left_out], np.float64), _joined([*everything], np.float64))


def rank_figures(ranks: NDArray[np.float64], ks: Sequence[int] = (5, 10)) -> dict[str, float]:
    """``recall@k`` and ``ndcg@k`` of ranks from 1.

    Recall@k is the share of ranks below k + 1; NDCG@k adds 1 / log2(rank + 1) for those.

    Raises:
        ValueError: no ranks.
    """
    if not len(ranks):
        raise ValueError("there are no ranks; at least one is needed")
    figures = {}
    for k in ks:
        found = ranks[ranks < k + 1]
        figures[f"recall@{k}"] = len(found) / len(ranks)
        figures[f"ndcg@{k}"] = float((1.0 / np.log2(found + 1.0)).sum()) / len(ranks)
    return figures


def standard_baselines(
    train: Sequence[Sequence[int]], embeddings: NDArray[np.float32]
) -> dict[str, Scorer]:
    """The baselines of the table, by name; none of their settings was tuned.

    The Markov models order items without links by popularity.

    Args:
        train: training parts of the histories.
        embeddings: float32 (N, D), of the items' texts.
    """
    num_items = len(embeddings)
    counts = item_counts(train, num_items)
    cosine = cosine_links(train, num_items)
    return {
        "popularity": popularity_scorer(train, num_items),
        "Markov, last item": linked_scorer(
            markov_links(train, num_items), lambda age: float(age == 0), counts
        ),
        "skip Markov, 3 apart, last 3 items": linked_scorer(
            markov_links(train, num_items, reach=3),
            lambda age: 0.5**age if age < 3 else 0.0,
            counts,
        ),
        "item-item cosine, whole history": linked_scorer(cosine, lambda age: 1.0),
        "item-item cosine, 0.7 to the age": linked_scorer(cosine, lambda age: 0.7**age),
        "text neighbours of the last item": text_scorer(embeddings),
        "text neighbours of the mean of the last 3": text_scorer(embeddings, last=3),
    }


def _edges(matrix: Links, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All entries of given rows: which of ``rows`` each belongs to, and its place."""
    sizes = matrix.starts[rows + 1] - matrix.starts[rows]
    owner = np.repeat(np.arange(len(rows)), sizes)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return owner, matrix.starts[rows][owner] + within


def _joined(parts: list[NDArray], dtype: type = np.int64) -> NDArray:
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _chunks(questions: Sequence[HeldOut]) -> Iterator[Sequence[HeldOut]]:
    for first in range(0, len(questions), _CHUNK):
        yield questions[first : first + _CHUNK]
