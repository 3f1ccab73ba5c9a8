"""What a load test found, what was allowed, and where the knee is. Knows nothing of Locust."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# Requests that were refused have a name of their own: they are quick, and would make the others
# look so too.
REFUSED = " (refused)"


@dataclass(frozen=True, slots=True)
class Counts:
    """Of a stretch of time.

    Attributes:
        answered: requests with a right answer.
        refused: requests refused with a 429.
        failed: all others: wrong answers, errors, no answer, not sent.
        times: how many of the answered and failed ones took so many milliseconds.
    """

    answered: int = 0
    refused: int = 0
    failed: int = 0
    times: Mapping[int, int] = field(default_factory=dict)

    def __sub__(self, earlier: Counts) -> Counts:
        """What has been added since."""
        times = Counter(self.times)
        times.subtract(earlier.times)
        return Counts(
            self.answered - earlier.answered,
            self.refused - earlier.refused,
            self.failed - earlier.failed,
            +times,
        )

    @property
    def total(self) -> int:
        """All requests."""
        return self.answered + self.refused + self.failed

    @property
    def error_percent(self) -> float:
        """Share of requests without a right answer; 100 where there were no requests."""
        return 100.0 if not self.total else 100 * (self.refused + self.failed) / self.total

    def percentile_ms(self, part: float) -> float:
        """Milliseconds that so large a part did not exceed; infinite where there are none."""
        rank = part * sum(self.times.values())
        seen = 0
        for taken in sorted(self.times):
            seen += self.times[taken]
            if seen >= rank:
                return float(taken)
        return float("inf")


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What is allowed.

    Attributes:
        p99_ms: largest 99th percentile of what was not refused.
        error_percent: largest share of requests without a right answer.
    """

    p99_ms: float
    error_percent: float

    def broken_by(self, counts: Counts) -> list[str]:
        """One line for each threshold that does not hold, with the value found and allowed."""
        if not counts.total:
            return ["no request was made"]
        lines = []
        p99 = counts.percentile_ms(0.99)
        if p99 > self.p99_ms:
            lines.append(f"p99 is {p99:g} ms; at most {self.p99_ms:g} ms is allowed")
        if counts.error_percent > self.error_percent:
            lines.append(
                f"{counts.error_percent:.2f} % of {counts.total} requests had no right answer "
                f"({counts.refused} refused, {counts.failed} failed); at most "
                f"{self.error_percent:g} % is allowed"
            )
        return lines


@dataclass(frozen=True, slots=True)
class Step:
    """One level of load.

    Attributes:
        users: of the step; arrivals a second in an open loop.
        seconds: that were counted.
        counts: of them.
    """

    users: int
    seconds: float
    counts: Counts

    def row(self) -> dict[str, float | int]:
        """Its figures, by name."""
        counts = self.counts
        return {
            "users": self.users,
            "answered_per_s": round(counts.answered / self.seconds, 1),
            "p50_ms": counts.percentile_ms(0.5),
            "p95_ms": counts.percentile_ms(0.95),
            "p99_ms": counts.percentile_ms(0.99),
            "refused": counts.refused,
            "failed": counts.failed,
        }


def knee(steps: Sequence[Step], thresholds: Thresholds) -> Step | None:
    """The last step before the first that breaks a threshold; None if the first one does."""
    found = None
    for step in steps:
        if thresholds.broken_by(step.counts):
            break
        found = step
    return found
