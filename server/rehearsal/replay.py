"""Requests replayed on a release, and two such replays compared."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, quantiles

from server.errors import ErrorKind, ServiceError
from server.queries import RecommendQuery
from server.recommender import Recommendation
from server.rehearsal.types import Latency, ReplayReport

# Callers come first: a replay that finds the queue full steps back for so long.
_STEP_BACK_S = 0.2
_TRIES = 25

Answering = Callable[[RecommendQuery], Awaitable[Recommendation]]


@dataclass(frozen=True, slots=True)
class Replayed:
    """What one request got.

    Attributes:
        items: item ids, best first; empty if it failed.
        wanted: items it asked for.
        seconds: to the answer.
        failure: why there is none.
    """

    items: tuple[str, ...]
    wanted: int
    seconds: float
    failure: str | None = None


async def replay(
    queries: Sequence[RecommendQuery], answer: Answering, timeout_s: float
) -> list[Replayed]:
    """Answer queries one after the other, so that callers hardly notice.

    Args:
        queries: what to replay.
        answer: asks one release.
        timeout_s: of one query.

    Returns:
        One result a query, in their order. A query that fails is a result too.
    """
    return [await _replay_one(query, answer, timeout_s) for query in queries]


async def _replay_one(query: RecommendQuery, answer: Answering, timeout_s: float) -> Replayed:
    for left in reversed(range(_TRIES)):
        started = time.monotonic()
        try:
            found = await answer(replace(query, deadline_s=started + timeout_s))
        except ServiceError as error:
            busy = error.kind in (ErrorKind.OVERLOADED, ErrorKind.DEADLINE_UNREACHABLE)
            if busy and left:
                await asyncio.sleep(_STEP_BACK_S)
                continue
            return Replayed((), query.top_k, time.monotonic() - started, str(error))
        seconds = time.monotonic() - started
        return Replayed(tuple(item.item_id for item in found.items), query.top_k, seconds)
    raise AssertionError("unreachable")


def overlap(old: Sequence[str], new: Sequence[str]) -> float:
    """Share of the old items that are among the new ones; 1 where there were none."""
    return len(set(old) & set(new)) / len(set(old)) if old else 1.0


def compare(old: Sequence[Replayed], new: Sequence[Replayed]) -> ReplayReport:
    """Two replays of the same queries, side by side."""
    pairs = [(a, b) for a, b in zip(old, new, strict=True) if not (a.failure or b.failure)]
    failures = [one.failure for pair in zip(old, new, strict=True) for one in pair if one.failure]
    overlaps = [overlap(a.items, b.items) for a, b in pairs]
    return ReplayReport(
        requests=len(old),
        failed=len(old) - len(pairs),
        compared=len(pairs),
        mean_overlap=fmean(overlaps) if overlaps else None,
        lowest_overlap=min(overlaps, default=None),
        shortfall_old=_shortfall([a for a, _ in pairs]),
        shortfall_new=_shortfall([b for _, b in pairs]),
        latency_old=_latency([a for a, _ in pairs]),
        latency_new=_latency([b for _, b in pairs]),
        first_failure=failures[0] if failures else None,
    )


def _shortfall(answers: Sequence[Replayed]) -> float | None:
    return fmean(len(one.items) < one.wanted for one in answers) if answers else None


def _latency(answers: Sequence[Replayed]) -> Latency | None:
    if not answers:
        return None
    milliseconds = [one.seconds * 1000 for one in answers]
    if len(milliseconds) == 1:
        return Latency(p50_ms=milliseconds[0], p95_ms=milliseconds[0])
    cuts = quantiles(milliseconds, n=20, method="inclusive")
    return Latency(p50_ms=round(cuts[9], 3), p95_ms=round(cuts[18], 3))
