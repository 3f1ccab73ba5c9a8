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
    (a cold start) cannot keep requests out for long. Nor for as long as that, where the few since
    were faster and nobody had to wait behind them, as nobody was let in: what made it slow has
    passed, and a full one would have been as fast as they were, at least.

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
        full = self._full(now_s)
        if full:
            return min(_mean_rate(full), _mean_rate(full[-_FEW:]))
        return max((rows / seconds for _, rows, seconds, _ in self._batches), default=None)

    def seconds_for(self, beam_rows: int, now_s: float) -> float | None:
        """Time until that many rows are through, None where nothing is known."""
        rate = self.rows_per_s(now_s)
        return None if rate is None else beam_rows / rate

    def batch_seconds(self, now_s: float) -> float:
        """Time of one batch under load, 0 where there was none."""
        full = [seconds for _, seconds in self._full(now_s)]
        return max(median(full), median(full[-_FEW:])) if full else 0.0

    def _full(self, now_s: float) -> list[tuple[int, float]]:
        """Rows of the batches that left somebody waiting, and the seconds that count of each."""
        self._forget(now_s)
        full: list[tuple[int, float]] = []
        since: list[tuple[int, float]] = []
        for _, rows, seconds, left_waiting in self._batches:
            if left_waiting:
                full.append((rows, seconds))
                since = []
            else:
                since.append((rows, seconds))
        if len(since) < _FEW:
            return full
        rate = _mean_rate(since[-_FEW:])
        return [(rows, min(seconds, rows / rate)) for rows, seconds in full]

    def _forget(self, now_s: float) -> None:
        while self._batches and self._batches[0][0] < now_s - self.window_s:
            self._batches.popleft()


def _mean_rate(batches: Sequence[tuple[int, float]]) -> float:
    return sum(rows for rows, _ in batches) / sum(seconds for _, seconds in batches)
