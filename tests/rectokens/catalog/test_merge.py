"""The bisection of a trie against a bisection of the sorted rows themselves."""

from __future__ import annotations

from bisect import bisect_left

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.catalog.merge import find_items, merge_rows
from rectokens.schemas.catalog_trie import CatalogTrie


@settings(deadline=None, max_examples=150)
@given(data=st.data(), num_levels=st.integers(1, 4), codebook_size=st.integers(1, 6))
def test_find_items(data, num_levels, codebook_size):
    code = st.integers(0, codebook_size - 1)
    rows = data.draw(st.lists(st.tuples(*[code] * num_levels), min_size=1, max_size=30).map(sorted))
    trie = CatalogTrie.from_sorted_codes(torch.tensor(rows), codebook_size)
    depth = data.draw(st.integers(1, num_levels))
    prefixes = data.draw(st.lists(st.tuples(*[code] * depth), max_size=20))
    low, high = find_items(trie, torch.tensor(prefixes, dtype=torch.long).reshape(-1, depth))
    heads = [row[:depth] for row in rows]
    assert low.tolist() == [bisect_left(heads, prefix) for prefix in prefixes]
    assert high.tolist() == [bisect_left(heads, (*p[:-1], p[-1] + 1)) for p in prefixes]


def test_a_single_leaf():
    trie = CatalogTrie.from_sorted_codes(torch.tensor([[1, 1]] * 3), 4)
    low, high = find_items(trie, torch.tensor([[0, 3], [1, 0], [1, 1], [1, 3], [3, 0]]))
    assert low.tolist() == [0, 0, 0, 3, 3]
    assert high.tolist() == [0, 0, 3, 3, 3]


def test_merge_rows():
    kept = torch.tensor([True, False, True, False])
    # Row 6 (upsert 2) in front of all, old item 3 and row 4 between 0 and 2, row 5 at the end.
    merged = merge_rows(kept, torch.tensor([6, 3, 4, 5]), torch.tensor([0, 1, 2, 4]), 3)
    assert merged.source.tolist() == [6, 0, 3, 4, 2, 5]
    assert merged.places.tolist() == [1, -1, 4, 2, 3, 5, 0]
