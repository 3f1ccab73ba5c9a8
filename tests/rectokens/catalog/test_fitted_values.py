"""What becomes of values that come in another type than the catalog's: the same, or an error."""

from __future__ import annotations

import datetime
from typing import Any

import polars as pl
import pytest

from rectokens.catalog.fitted_values import fitted

DAY = datetime.date(2026, 1, 31)


@pytest.mark.parametrize(
    ("given", "dtype", "expected"),
    [
        ([1, None], pl.Float32(), [1.0, None]),
        ([2.0], pl.Int8(), [2]),
        ([1, 0], pl.Boolean(), [True, False]),
        ([7], pl.String(), ["7"]),
        (["7"], pl.Int64(), [7]),
        (["a"], pl.Enum(["a", "b"]), ["a"]),
        ([DAY], pl.Datetime("us"), [datetime.datetime(2026, 1, 31)]),
        ([None], pl.Date(), [None]),
        ([[1]], pl.List(pl.Float64()), [[1.0]]),
        ([{"a": 2, "b": 1}], pl.Struct({"a": pl.String(), "b": pl.Int8()}), [{"a": "2", "b": 1}]),
        # No value has been there yet, so the first ones say what the column is of.
        ([9.5], pl.Null(), [9.5]),
    ],
)
def test_what_says_the_same(given: list[Any], dtype: pl.DataType, expected: list[Any]) -> None:
    found = fitted(pl.Series("x", given), dtype)
    assert found.to_list() == expected
    assert found.dtype == (dtype if dtype != pl.Null else pl.Float64)


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ([1.5], pl.Int64()),
        ([300], pl.Int8()),
        ([-1], pl.UInt8()),
        ([300], pl.Boolean()),
        ([1], pl.Date()),
        ([True], pl.Time()),
        ([datetime.datetime(2026, 1, 31, 12)], pl.Date()),
        ([[1]], pl.Int64()),
        ([1], pl.List(pl.Int64())),
        ([1], pl.Struct({"a": pl.Int64()})),
        ([{"a": 1}], pl.Int64()),
        ([{"a": 1}], pl.String()),
        ([{"b": 1}], pl.Struct({"a": pl.Int64()})),
        (["x"], pl.Int64()),
        (["c"], pl.Enum(["a", "b"])),
    ],
)
def test_what_would_say_something_else(given: list[Any], dtype: pl.DataType) -> None:
    with pytest.raises(ValueError, match=r"metadata column 'x' has type .* the catalog's type"):
        fitted(pl.Series("x", given), dtype)
