"""How fast the engine has lately been, to tell a caller when to come back."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True)
class Throughput:
    """Best recent rate of the engine, in beam rows per second.

    The best, not the mean: a request is refused for its deadline only if it could not make it
    even then, and a batch of one says nothing about what a full batch would do. Old batches are
    forgotten, so one slow batch (a cold start) cannot keep requests out for long.

    Attributes:
        window_s: how long a batch is remembered, in seconds.
    """

    window_s: float = 30.0
    _batches: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=64))

    def record(self, beam_rows: int, seconds: float, now_s: float) -> None:
        """Remember a batch that finished at ``now_s``."""
        self._batches.append((now_s, beam_rows / max(seconds, 1e-6)))

    def rows_per_s(self, now_s: float) -> float | None:
        """Best rate in the window, None where nothing is known."""
        while self._batches and self._batches[0][0] < now_s - self.window_s:
            self._batches.popleft()
        return max((rate for _, rate in self._batches), default=None)

    def seconds_for(self, beam_rows: int, now_s: float) -> float | None:
        """Least time that many rows take, None where nothing is known."""
        rate = self.rows_per_s(now_s)
        return None if rate is None else beam_rows / rate
