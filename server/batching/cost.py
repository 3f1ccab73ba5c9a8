"""How long a batch takes, learned from those that ran."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

# Fewer batches than this say too little to turn anybody away for.
_MIN_BATCHES = 8
_COEFFICIENTS = 4


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What a batch's time depends on.

    Attributes:
        requests: B.
        tokens: of all prompts together.
        longest: tokens of the longest prompt.
        widest: beam rows of the widest request.
    """

    requests: int = 0
    tokens: int = 0
    longest: int = 0
    widest: int = 0

    def with_request(self, prompt_tokens: int, beam_rows: int) -> BatchShape:
        """The shape with one more request."""
        return BatchShape(
            self.requests + 1,
            self.tokens + prompt_tokens,
            max(self.longest, prompt_tokens),
            max(self.widest, beam_rows),
        )

    @property
    def padded_tokens(self) -> int:
        """Tokens, were all prompts as long as the longest."""
        return self.requests * self.longest

    @property
    def padded_rows(self) -> int:
        """Beam rows, were all requests as wide as the widest."""
        return self.requests * self.widest


@dataclass(frozen=True, slots=True)
class BatchCost:
    """Seconds a batch takes, linear in its shape.

    Attributes:
        fixed_s: of any batch.
        token_s: of one prompt token.
        padded_token_s: of one prompt token, padding included: what an engine that pads pays.
        row_s: of one beam row over all levels, padding included.
    """

    fixed_s: float
    token_s: float
    padded_token_s: float
    row_s: float

    def seconds(self, shape: BatchShape) -> float:
        """Time of a batch."""
        return (
            self.fixed_s
            + shape.tokens * self.token_s
            + shape.padded_tokens * self.padded_token_s
            + shape.padded_rows * self.row_s
        )


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
    _batches: deque[tuple[float, BatchShape, float]] = field(
        default_factory=lambda: deque(maxlen=64)
    )
    _fitted: BatchCost | None = None
    _stale: bool = False

    def record(self, shape: BatchShape, seconds: float, now_s: float) -> None:
        """Remember a batch that finished at ``now_s``."""
        self._batches.append((now_s, shape, max(seconds, 1e-6)))
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


def fit_cost(batches: Sequence[tuple[BatchShape, float]]) -> BatchCost:
    """The cost that explains the seconds of some batches best."""
    seconds = np.array([took for _, took in batches])
    features = np.array(
        [[1, shape.tokens, shape.padded_tokens, shape.padded_rows] for shape, _ in batches],
        dtype=np.float64,
    )
    relative = features / seconds[:, None]
    # Columns of one size, so that where shapes hardly differ the time is shared out evenly.
    scale = relative.mean(axis=0)
    relative = relative / scale
    best, best_error = np.zeros(_COEFFICIENTS), np.inf
    # Few coefficients: all ways to hold some of them at 0 are quickly tried, the fullest first.
    sizes = range(_COEFFICIENTS, 0, -1)
    for used in (list(u) for size in sizes for u in combinations(range(_COEFFICIENTS), size)):
        found = np.linalg.lstsq(relative[:, used], np.ones(len(batches)), rcond=None)[0]
        error = float(((relative[:, used] @ found - 1.0) ** 2).sum())
        if (found >= 0).all() and error < best_error - 1e-12:
            best, best_error = np.zeros(_COEFFICIENTS), error
            best[used] = found
    return BatchCost(*(best / scale).tolist())
