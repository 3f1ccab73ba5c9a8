"""How long a batch takes, learned from those that ran."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

# Fewer batches than this say too little to turn anybody away for.
_MIN_BATCHES = 8


@dataclass(frozen=True, slots=True)
class BatchCost:
    """Seconds a batch takes, linear in its padded shape.

    Attributes:
        fixed_s: of any batch.
        token_s: of one prompt token, padding included.
        row_s: of one beam row over all levels, padding included.
    """

    fixed_s: float
    token_s: float
    row_s: float

    def seconds(self, requests: int, longest: int, widest: int) -> float:
        """Time of a batch of so many requests, its longest prompt and its widest beam."""
        return self.fixed_s + requests * (longest * self.token_s + widest * self.row_s)


@dataclass(slots=True)
class CostEstimate:
    """Fits a :class:`BatchCost` to the batches of the last while.

    Least squares on relative errors, so that one batch that was held up for seconds weighs no
    more than any other, with coefficients that are not negative. Old batches are forgotten: a
    slow time does not keep requests out for long.

    Attributes:
        window_s: how long a batch is remembered, in seconds.
    """

    window_s: float = 30.0
    _batches: deque[tuple[float, int, int, int, float]] = field(
        default_factory=lambda: deque(maxlen=64)
    )
    _fitted: BatchCost | None = None
    _stale: bool = False

    def record(
        self, requests: int, longest: int, widest: int, seconds: float, now_s: float
    ) -> None:
        """Remember a batch that finished at ``now_s``."""
        self._batches.append((now_s, requests, longest, widest, max(seconds, 1e-6)))
        self._stale = True

    def at(self, now_s: float) -> BatchCost | None:
        """The cost as of ``now_s``, None where too little is known."""
        while self._batches and self._batches[0][0] < now_s - self.window_s:
            self._batches.popleft()
            self._stale = True
        if self._stale:
            known = len(self._batches) >= _MIN_BATCHES
            self._fitted = fit_cost([batch[1:] for batch in self._batches]) if known else None
            self._stale = False
        return self._fitted


def fit_cost(batches: list[tuple[int, int, int, float]]) -> BatchCost:
    """The cost that explains (requests, longest, widest, seconds) of batches best."""
    count, longest, widest, seconds = np.array(batches, dtype=np.float64).T
    features = np.stack([np.ones_like(count), count * longest, count * widest], axis=1)
    relative = features / seconds[:, None]
    # Columns of one size, so that where shapes hardly differ the time is shared out evenly.
    scale = relative.mean(axis=0)
    relative = relative / scale
    best, best_error = np.zeros(3), np.inf
    # Three coefficients: all ways to hold some of them at 0 are quickly tried.
    for used in (list(u) for size in (3, 2, 1) for u in combinations(range(3), size)):
        found = np.linalg.lstsq(relative[:, used], np.ones(len(batches)), rcond=None)[0]
        error = float(((relative[:, used] @ found - 1.0) ** 2).sum())
        if (found >= 0).all() and error < best_error - 1e-12:
            best, best_error = np.zeros(3), error
            best[used] = found
    fixed_s, token_s, row_s = (best / scale).tolist()
    return BatchCost(fixed_s, token_s, row_s)
