"""How long a batch takes, learned from those that ran."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

# Fewer batches than this say too little to turn anybody away for.
_MIN_BATCHES = 8
# Fitted again once more than one in so many is new: while it is fitted, the next batch waits.
_FIT_PARTS = 8
_COEFFICIENTS = 4
# All ways to hold some coefficients at 0, as rows of ones and zeros, the fullest first.
_SUBSETS = np.array(
    [
        [column in used for column in range(_COEFFICIENTS)]
        for size in range(_COEFFICIENTS, 0, -1)
        for used in combinations(range(_COEFFICIENTS), size)
    ],
    dtype=np.float64,
)
# Relative size of an eigenvalue that is none, and of a difference that is none.
_SINGULAR, _ROUNDING = 1e-10, 1e-9


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
    slow time does not keep requests out for long. The fit may be behind by a few batches.

    Attributes:
        window_s: how long a batch is remembered, in seconds.
    """

    window_s: float = 30.0
    _batches: deque[tuple[float, BatchShape, float]] = field(
        default_factory=lambda: deque(maxlen=64)
    )
    _fitted: BatchCost | None = None
    _news: int = 0  # batches that came or went since the fit

    def record(self, shape: BatchShape, seconds: float, now_s: float) -> None:
        """Remember a batch that finished at ``now_s``."""
        self._batches.append((now_s, shape, max(seconds, 1e-6)))
        self._news += 1

    def at(self, now_s: float) -> BatchCost | None:
        """The cost as of ``now_s``, None where too little is known."""
        while self._batches and self._batches[0][0] < now_s - self.window_s:
            self._batches.popleft()
            self._news += 1
        if len(self._batches) < _MIN_BATCHES:
            self._fitted = None
        elif self._fitted is None or self._news > len(self._batches) // _FIT_PARTS:
            self._fitted = fit_cost([batch[1:] for batch in self._batches])
            self._news = 0
        return self._fitted


def fit_cost(batches: Sequence[tuple[BatchShape, float]]) -> BatchCost:
    """The cost that explains the seconds of some batches best.

    Done between two batches, while the device waits: all subsets of the coefficients are solved
    for in one call.
    """
    seconds = np.array([took for _, took in batches])
    features = np.array(
        [[1, shape.tokens, shape.padded_tokens, shape.padded_rows] for shape, _ in batches],
        dtype=np.float64,
    )
    relative = features / seconds[:, None]
    # Columns of one size, so that where shapes hardly differ the time is shared out evenly.
    scale = relative.mean(axis=0)
    relative = relative / scale
    # The normal equations of every subset; coefficients outside it come out as 0.
    gram = (relative.T @ relative) * _SUBSETS[:, :, None] * _SUBSETS[:, None, :]
    inverse = np.linalg.pinv(gram, rcond=_SINGULAR, hermitian=True)
    found = (inverse @ (relative.sum(axis=0) * _SUBSETS)[:, :, None])[:, :, 0]
    errors = ((found @ relative.T - 1.0) ** 2).sum(axis=1)
    errors[(found < -_ROUNDING).any(axis=1)] = np.inf
    # The first that is as good as any: the fullest.
    best = int(np.argmax(errors <= errors.min() + _ROUNDING))
    return BatchCost(*(np.maximum(found[best], 0.0) / scale).tolist())
