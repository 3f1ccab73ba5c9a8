"""The index finds what a dictionary finds, whatever the hashes do."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.catalog.item_index import ItemIndex, hash_strings


def everything_collides(values: list[str]) -> np.ndarray:
    return np.full(len(values), 7, dtype=np.uint64)


def three_buckets(values: list[str]) -> np.ndarray:
    return np.array([len(value) % 3 for value in values], dtype=np.uint64) << np.uint64(62)


HASHES = {"spread": hash_strings, "one": everything_collides, "three": three_buckets}


@pytest.mark.parametrize("name", HASHES)
@settings(deadline=None, max_examples=60)
@given(
    ids=st.lists(st.text(max_size=4), max_size=30, unique=True),
    others=st.lists(st.text(max_size=4), max_size=10),
)
def test_same_answers_as_a_dictionary(name, ids, others):
    index = ItemIndex(pl.Series(ids, dtype=pl.String), HASHES[name])
    rows = {item_id: row for row, item_id in enumerate(ids)}
    queries = others + ids[::-1] + ids[:3]
    assert index.find(queries).tolist() == [rows.get(query, -1) for query in queries]
    assert len(index.repeated()) == 0


@pytest.mark.parametrize("name", HASHES)
def test_repeated_ids_are_found_and_colliding_ones_are_not_mistaken(name):
    ids = pl.Series(["b", "a", "c", "a", "b", "b", "dd"])
    assert ItemIndex(ids, HASHES[name]).repeated().to_list() == ["b", "a"]


def test_text_that_has_no_utf8_form_is_unknown():
    index = ItemIndex(pl.Series(["a", "b"]))
    assert index.find(["b", "\ud800", "a"]).tolist() == [1, -1, 0]
    assert index.find(["\ud800"]).tolist() == [-1]


def test_a_column_of_many_is_hashed_in_parts():
    ids = [f"B{row}" for row in range(9_000)]
    queries = [*ids[::-7], "C1"]
    found = ItemIndex(pl.Series(ids)).find(queries)
    assert found.tolist() == [*range(8_999, -1, -7), -1]


def test_strings_of_a_class_of_their_own_are_strings():
    class Name(str):
        def __hash__(self):
            return 5

    assert ItemIndex(pl.Series(["a", "b"])).find([Name("b"), "a"]).tolist() == [1, 0]


def test_other_types_are_refused():
    index = ItemIndex(pl.Series(["1"]))
    with pytest.raises(TypeError, match="item id is 1, a int; expected a string"):
        index.find(["1", 1])  # type: ignore[list-item]


def test_nine_bytes_an_item():
    ids = pl.select(pl.format("B{}", pl.int_range(10_000))).to_series()
    assert 80_000 < ItemIndex(ids).nbytes < 90_000
