from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.access.bucket import TokenBucket


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_burst_then_the_rate_then_a_debt():
    clock = Clock()
    bucket = TokenBucket(60, 3, clock)
    for _ in range(3):
        assert bucket.wait_s() == 0
        bucket.pay(1)
    assert bucket.wait_s() == pytest.approx(1)
    clock.now_s += 1
    assert bucket.wait_s() == pytest.approx(0)
    bucket.pay(10)  # one call that carries ten
    assert bucket.wait_s() == pytest.approx(10)
    clock.now_s += 1_000
    bucket.pay(3)  # and no more than the capacity was kept
    assert bucket.wait_s() == pytest.approx(1)


@given(
    per_minute=st.integers(1, 6_000),
    capacity=st.integers(1, 50),
    steps=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), min_size=1, max_size=40),
)
def test_it_counts_as_exact_arithmetic_does(per_minute, capacity, steps):
    """Against the definition in fractions; steps are (tenths of a second later, cost)."""
    clock = Clock()
    bucket = TokenBucket(per_minute, capacity, clock)
    tokens, tenths = Fraction(capacity), 0
    for later, cost in steps:
        tenths += later
        clock.now_s = tenths / 10
        tokens = min(tokens + Fraction(later * per_minute, 600), Fraction(capacity))
        wait_s = max(1 - tokens, Fraction(0)) * 60 / per_minute
        assert bucket.wait_s() == pytest.approx(float(wait_s), abs=1e-6)
        if wait_s == 0:
            bucket.pay(cost)
            tokens -= cost
