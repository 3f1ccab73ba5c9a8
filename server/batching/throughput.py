"""How fast the engine has lately been, to tell a caller when to come back."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

_FEW = 4

# (end, rows, seconds, whether somebody had to wait)
Batch = tuple[float, int, float, bool]


@dataclass(slots=True)
class Throughput:
    """Recent rate of the engine, in beam rows per second.

    Batches that left somebody waiting tell the rate under load: their mean is what a queue
    drains at, or the mean of the last few, if those were slower: who is let in on too good a
    rate waits for nothing. As long as there was none, the best batch counts, because a batch of
    one says nothing about what a full one would do. Old batches are forgotten, so one slow batch
    (a cold start) cannot keep requests out for long.

    Attributes:
        window_s: how long a batch is remembered, in seconds.
    """

    window_s: float = 30.0
    _batches: deque[Batch] = field(default_factory=lambda: deque(maxlen=64))

    def record(self, beam_rows: int, seconds: float, now_s: float, *, full: bool = False) -> None:
        """Remember a batch that finished at ``now_s``, ``seconds`` after the queue could move."""
        self._batches.append((now_s, beam_rows, max(seconds, 1e-6), full))

    def rows_per_s(self, now_s: float) -> float | None:
        """Rate in the window, None where nothing is known."""
        self._forget(now_s)
        full = [batch for batch in self._batches if batch[3]]
        if full:
            return min(_mean_rate(full), _mean_rate(full[-_FEW:]))
        return max((rows / seconds for _, rows, seconds, _ in self._batches), default=None)

    def seconds_for(self, beam_rows: int, now_s: float) -> float | None:
        """Time until that many rows are through, None where nothing is known."""
        rate = self.rows_per_s(now_s)
        return None if rate is None else beam_rows / rate

    def batch_seconds(self, now_s: float) -> float:
        """Time of one batch under load, 0 where there was none."""
        self._forget(now_s)
        full = [seconds for _, _, seconds, full in self._batches if full]
        return max(median(full), median(full[-_FEW:])) if full else 0.0

    def _forget(self, now_s: float) -> None:
        while self._batches and self._batches[0][0] < now_s - self.window_s:
            self._batches.popleft()


def _mean_rate(batches: Sequence[Batch]) -> float:
    return sum(rows for _, rows, _, _ in batches) / sum(seconds for _, _, seconds, _ in batches)
