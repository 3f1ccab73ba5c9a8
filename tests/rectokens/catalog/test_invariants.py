"""The quick way to all semantic IDs agrees with the trie's own."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.catalog.invariants import all_leaf_codes
from rectokens.schemas.catalog_trie import CatalogTrie


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_all_leaf_codes(data, catalog_inputs):
    _, codes, codebook_size, _ = data.draw(catalog_inputs)
    trie, _ = CatalogTrie.from_codes(torch.tensor(codes), codebook_size)
    expected = trie.leaf_codes(torch.arange(trie.num_leaves))
    assert torch.equal(all_leaf_codes(trie).long(), expected)
    assert expected.tolist() == sorted(map(list, set(map(tuple, codes))))


def test_codes_above_32767():
    trie, _ = CatalogTrie.from_codes(torch.tensor([[65_535, 40_000], [1, 2]]), 65_536)
    assert all_leaf_codes(trie).tolist() == [[1, 2], [65_535, 40_000]]
