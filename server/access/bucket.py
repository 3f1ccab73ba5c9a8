"""A token bucket that may be overdrawn."""

from __future__ import annotations

import time
from collections.abc import Callable


class TokenBucket:
    """How many requests a caller may still make.

    Tokens come at a steady rate, up to the capacity. A request passes while there is at least one
    token, and pays its cost even where that is more than there are: one that carries many
    requests passes, and its caller waits until the debt is paid. (Packages that count requests in
    windows have no debt: a call that costs more than a window holds would never pass.)

    Args:
        per_minute: tokens that come in a minute.
        capacity: tokens that are kept, at least 1; it begins full.
        clock: seconds that never go back.
    """

    def __init__(
        self, per_minute: float, capacity: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_s = per_minute / 60
        self._capacity = max(capacity, 1.0)
        self._clock = clock
        self._tokens = self._capacity
        self._then = clock()

    def wait_s(self) -> float:
        """Seconds until a request passes; 0 if one does now."""
        self._refill()
        return max(1.0 - self._tokens, 0.0) / self._per_s

    def pay(self, cost: float) -> None:
        """Take the cost of a request that has passed."""
        self._refill()
        self._tokens -= cost

    def _refill(self) -> None:
        now = self._clock()
        earned = (now - self._then) * self._per_s
        self._tokens = min(self._tokens + earned, self._capacity)
        self._then = now
