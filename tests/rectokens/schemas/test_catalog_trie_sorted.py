"""A trie of rows that are sorted already is the trie of the same rows in any order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.schemas.catalog_trie import CatalogTrie


@settings(deadline=None, max_examples=60)
@given(data=st.data(), num_levels=st.integers(1, 4), codebook_size=st.integers(1, 5))
def test_equal_to_from_codes(data, num_levels, codebook_size):
    code = st.integers(0, codebook_size - 1)
    rows = data.draw(st.lists(st.tuples(*[code] * num_levels), min_size=1, max_size=30))
    shuffled = torch.tensor(data.draw(st.permutations(rows)))
    one, order = CatalogTrie.from_codes(shuffled, codebook_size)
    other = CatalogTrie.from_sorted_codes(torch.tensor(sorted(rows)).int(), codebook_size)
    assert shuffled[order].tolist() == [list(row) for row in sorted(rows)]
    for name in ("row_ptrs", "codes", "leaf_item_ptrs"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert (one.level_offsets, one.max_children) == (other.level_offsets, other.max_children)


@pytest.mark.parametrize(
    ("rows", "row"), [([[0, 1], [0, 0]], 1), ([[0, 0], [1, 0], [0, 3]], 2), ([[2], [1]], 1)]
)
def test_rows_out_of_order_are_named(rows, row):
    with pytest.raises(ValueError, match=f"codes of row {row} come before those of row {row - 1}"):
        CatalogTrie.from_sorted_codes(torch.tensor(rows), 4)


@pytest.mark.parametrize(
    ("codes", "size", "message"),
    [
        (torch.zeros(0, 2).int(), 4, "no rows"),
        (torch.zeros(2).int(), 4, "expected .N, L."),
        (torch.tensor([[0, 4]]), 4, "allowed are 0 to 3"),
        (torch.tensor([[0]]), 0, "codebook_size is 0"),
    ],
)
def test_codes_no_trie_can_be_made_of(codes, size, message):
    with pytest.raises(ValueError, match=message):
        CatalogTrie.from_sorted_codes(codes, size)
