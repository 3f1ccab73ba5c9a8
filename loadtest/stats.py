"""Locust's statistics as counts."""

from __future__ import annotations

from collections import Counter

from locust.stats import RequestStats

from loadtest.figures import REFUSED, Counts
from loadtest.traffic import BATCH, RECOMMEND, SCORE

_PATHS = (RECOMMEND, SCORE, BATCH)


def counts_of(stats: RequestStats) -> Counts:
    """All requests so far; of every process, where there are several.

    Locust rounds times: to 1 ms below 100 ms, to two digits above.
    """
    answered = refused = failed = 0
    times: Counter[int] = Counter()
    for (name, _), entry in stats.entries.items():
        if name.endswith(REFUSED):
            refused += entry.num_requests
        elif name in _PATHS:
            answered += entry.num_requests - entry.num_failures
            failed += entry.num_failures
            times.update(entry.response_times)
    return Counts(answered, refused, failed, times)
