"""Which variant answers a user: weighted, by a hash, the same one every time.

Weighted rendezvous hashing (Schindelhauer and Schomaker, 2005): every variant draws a number from
the user's hash, divided by its weight, and the smallest wins. A user therefore changes only to a
variant whose weight has grown, or away from one whose weight has shrunk; variants may be listed in
any order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping


def choose_variant(user: str, weights: Mapping[str, float], experiment: str = "") -> str:
    """The variant of a user.

    Args:
        user: anything that stays the same for one user.
        weights: of the variants, by name; shares are relative. 0 takes nobody.
        experiment: another one divides the users anew, independently of the last.

    Raises:
        ValueError: no variant has a weight above 0.
    """
    best: tuple[float, str] | None = None
    for name, weight in weights.items():
        if weight <= 0:
            continue
        # The name breaks ties, which need equal 64-bit hashes.
        drawn = (-math.log(_uniform(experiment, name, user)) / weight, name)
        if best is None or drawn < best:
            best = drawn
    if best is None:
        raise ValueError("no variant has a weight above 0")
    return best[1]


def _uniform(*parts: str) -> float:
    """In (0, 1), a function of the parts alone."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big"))
        digest.update(encoded)
    # 53 bits and a half fit a float: never 0, never 1.
    return ((int.from_bytes(digest.digest(), "big") >> 11) + 0.5) / 2**53
