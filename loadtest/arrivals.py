"""When requests of an open loop are to be sent, whatever becomes of those before them."""

from __future__ import annotations

import random
from typing import Literal

ArrivalKind = Literal["poisson", "constant"]


class Arrivals:
    """One arrival a second on average, for ever. Streams that run side by side add up.

    Args:
        kind: ``poisson`` for arrivals that know nothing of one another, ``constant`` for one every
            second, beginning within the first.
        seed: of the draws.
        start_s: time at which the stream begins, by any clock.
    """

    def __init__(self, kind: ArrivalKind, seed: int, start_s: float) -> None:
        self._kind = kind
        self._rng = random.Random(seed)
        self._last_s = start_s - (0.0 if kind == "poisson" else self._rng.random())

    def next_s(self) -> float:
        """Time of the next arrival, by the clock of ``start_s``.

        It does not depend on when this is called: who is late finds arrivals that are overdue.
        """
        self._last_s += self._rng.expovariate(1.0) if self._kind == "poisson" else 1.0
        return self._last_s
