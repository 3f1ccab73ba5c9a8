"""Counts, thresholds and the knee."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.figures import Counts, Step, Thresholds, knee

TIMES = st.lists(st.integers(0, 10_000), max_size=40)


def counts(times, refused=0, failed=0) -> Counts:
    return Counts(len(times) - failed, refused, failed, Counter(times))


@given(TIMES, TIMES, st.floats(0.01, 1.0))
def test_what_was_added_since_is_what_was_added(before, added, part):
    both = counts(before + added) - counts(before)
    assert both == counts(added)
    expected = sorted(added)
    if not added:
        assert both.percentile_ms(part) == float("inf")
        return
    found = both.percentile_ms(part)
    assert sum(taken <= found for taken in expected) >= part * len(expected)
    assert sum(taken < found for taken in expected) < part * len(expected)


@pytest.mark.parametrize(
    ("found", "lines"),
    [
        (counts([100] * 100), []),
        (counts([100] * 98 + [500] * 2), ["p99 is 500 ms; at most 200 ms is allowed"]),
        (counts([100] * 98, refused=2), ["2.00 % of 100 requests had no right answer (2 refused"]),
        (counts([100] * 100, failed=2), ["(0 refused, 2 failed); at most 1 % is allowed"]),
        (counts([], refused=5), ["p99 is inf", "100.00 %"]),
        (counts([]), ["no request was made"]),
    ],
)
def test_thresholds_say_what_was_found_and_what_is_allowed(found, lines):
    broken = Thresholds(p99_ms=200, error_percent=1).broken_by(found)
    assert len(broken) == len(lines)
    assert all(part in line for part, line in zip(lines, broken, strict=True))


def test_the_knee_is_the_last_step_before_the_first_bad_one():
    thresholds = Thresholds(p99_ms=200, error_percent=1)
    steps = [Step(users, 10.0, counts([ms] * 100)) for users, ms in ((10, 50), (20, 90), (40, 900))]
    lucky = Step(80, 10.0, counts([10] * 100))
    assert knee([*steps, lucky], thresholds) is steps[1]
    assert knee(steps[2:], thresholds) is None
    assert knee([], thresholds) is None
    assert steps[1].row() == {
        "users": 20,
        "answered_per_s": 10.0,
        "p50_ms": 90,
        "p95_ms": 90,
        "p99_ms": 90,
        "refused": 0,
        "failed": 0,
    }
