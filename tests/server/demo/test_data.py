"""The demo's data: checks, and a split that leaks nothing."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.demo.data import DemoData, item_counts, leave_one_out


def make_data(sequences=((0, 1, 2),), num_items=3, **changes):
    fields = {
        "name": "test",
        "item_ids": tuple(f"I{i}" for i in range(num_items)),
        "texts": tuple(f"text {i}" for i in range(num_items)),
        "embeddings": np.eye(num_items, 4, dtype=np.float32),
        "sequences": tuple(tuple(s) for s in sequences),
        "metadata": pl.DataFrame({c: [""] * num_items for c in ("title", "brand", "category")}),
    }
    return DemoData(**{**fields, **changes})


@given(
    st.lists(
        st.lists(st.integers(0, 30), max_size=8, unique=True).map(tuple), min_size=1, max_size=20
    )
)
def test_no_held_out_item_reaches_the_training_part_of_its_user(sequences):
    split = leave_one_out(sequences)
    usable = [s for s in sequences if len(s) >= 3]

    assert split.skipped == len(sequences) - len(usable)
    assert len(split.train) == len(split.validation) == len(split.test) == len(usable)
    parts = zip(usable, split.train, split.validation, split.test, strict=True)
    for sequence, train, validation, test in parts:
        assert (*train, validation.target, test.target) == sequence
        assert test.target not in train
        assert test.target not in validation.history
        assert test.target != validation.target
        assert validation.target not in train
        assert validation.history == train
        assert test.history == (*train, validation.target)


def test_counts_are_of_training_parts_only():
    split = leave_one_out([(0, 1, 2), (0, 3, 4, 2), (5, 6)])
    assert item_counts(split.train, 8).tolist() == [2, 0, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": ("a",)}, "texts has 1 rows; there are 3 item ids"),
        ({"item_ids": ("a", "a", "b")}, "item ids repeat"),
        ({"embeddings": np.full((3, 4), np.nan, np.float32)}, "the embedding of item I0"),
        ({"sequences": ((0, 3),)}, "sequence 0 names rows 0 to 3; allowed are 0 to 2"),
        ({"metadata": pl.DataFrame({"title": ["", "", ""]})}, "lacks the columns brand, category"),
    ],
)
def test_data_that_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_data(**changes)
