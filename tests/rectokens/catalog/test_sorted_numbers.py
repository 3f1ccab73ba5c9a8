"""Places by a directory are those that bisection finds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.catalog.sorted_numbers import SortedNumbers


def spread(rng, size, dtype):
    return rng.integers(0, np.iinfo(dtype).max, size, dtype=dtype, endpoint=True)


def small(rng, size, dtype):
    return rng.integers(0, 3 * size + 1, size, dtype=dtype)


def repeated(rng, size, dtype):
    return rng.integers(0, size // 20 + 1, size, dtype=dtype)


def skewed(rng, size, dtype):
    return (spread(rng, size, dtype).astype(np.float64) ** 0.3).astype(dtype)


def steps(rng, size, dtype):
    return np.cumsum(rng.integers(1, 4, size, dtype=dtype), dtype=dtype)


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from([spread, small, repeated, skewed, steps]),
    st.sampled_from([np.int32, np.uint64]),
    st.integers(0, 20) | st.integers(500, 4_000),
    st.integers(0, 2**32),
)
def test_places_of_numbers_that_are_there_and_of_others(make, dtype, size, seed):
    rng = np.random.default_rng(seed)
    values = np.sort(make(rng, size, dtype))
    top = np.iinfo(dtype).max
    queries = np.concatenate(
        [
            values,
            values[values < top] + dtype(1),
            values[values > 0] - dtype(1),
            spread(rng, 50, dtype),
            np.array([0, top], dtype=dtype),
        ]
    )
    rng.shuffle(queries)
    found = SortedNumbers(values).count_below(queries)
    assert found.tolist() == np.searchsorted(values, queries, side="left").tolist()


@pytest.mark.parametrize("make", [spread, steps])
def test_a_directory_takes_less_than_a_byte_a_number(make):
    values = np.sort(make(np.random.default_rng(0), 100_000, np.uint64))
    assert 0 < SortedNumbers(values).nbytes < 100_000


def test_there_is_none_where_most_numbers_are_in_one_bucket():
    values = np.arange(10_000, dtype=np.uint64)
    values[-1] = 2**63
    numbers = SortedNumbers(values)
    assert numbers.nbytes == 0
    assert numbers.count_below(values).tolist() == list(range(10_000))
