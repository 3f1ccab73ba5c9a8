"""A few recent requests, kept to try a new version on; only if an operator asks for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from rectokens.prompts.parts import TextPart
from server.queries import RecommendQuery

# Of one kept request: item ids in its history and its filters.
_MAX_IDS = 2_000
# Spread over seconds, so that one burst of one caller does not fill the sample.
_MIN_SPACING_S = 0.05


class RecentQueries:
    """The last requests that can be replayed, in memory only.

    What is kept of a request is what the search needs: item ids and numbers. Requests with text
    or with a prompt of their own are never kept, nor is anything that tells who asked, or when.

    Args:
        size: most requests kept; 0 keeps none.
        clock: monotonic seconds.
    """

    def __init__(self, size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._kept: deque[RecommendQuery] = deque(maxlen=size)
        self._size = size
        self._clock = clock
        self._next_s = 0.0

    def add(self, query: RecommendQuery) -> None:
        """A request was answered; it may be kept."""
        if not self._size:
            return
        now = self._clock()
        if now < self._next_s or not _can_be_kept(query):
            return
        self._next_s = now + _MIN_SPACING_S
        self._kept.append(anonymous(query))

    def latest(self, count: int) -> list[RecommendQuery]:
        """At most so many, the latest ones."""
        kept = list(self._kept)
        return kept[max(len(kept) - count, 0) :]

    def __len__(self) -> int:
        return len(self._kept)


def anonymous(query: RecommendQuery) -> RecommendQuery:
    """The part of a query that a replay needs, and beam search, which can be compared."""
    return replace(
        query,
        temperature=0.0,
        seed=None,
        with_metadata=False,
        with_level_scores=False,
        deadline_s=0,
    )


def _can_be_kept(query: RecommendQuery) -> bool:
    if query.prompt is not None or any(isinstance(part, TextPart) for part in query.parts):
        return False
    ids = len(query.parts) + len(query.exclude_items) + len(query.allow_items or ())
    return ids <= _MAX_IDS
