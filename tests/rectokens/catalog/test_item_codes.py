"""Semantic IDs of items are those of their leaves."""

from __future__ import annotations

import pytest
import torch

from rectokens.catalog.item_codes import ItemCodes
from rectokens.schemas.catalog_trie import CatalogTrie


@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize("codebook_size", [3, 20, 1_000])
def test_of_all_items(levels, codebook_size):
    generator = torch.Generator().manual_seed(levels)
    # Squared, so that some nodes have many children and some leaves many items.
    drawn = torch.rand(6_000, levels, generator=generator) ** 2
    codes = (drawn * codebook_size).long()
    trie, order = CatalogTrie.from_codes(codes, codebook_size)
    found = ItemCodes(trie)(torch.arange(len(codes)).flip(0).numpy())
    assert torch.equal(torch.from_numpy(found).flip(0), codes[order])


def test_of_no_items():
    trie, _ = CatalogTrie.from_codes(torch.zeros(1, 2, dtype=torch.long), 4)
    assert ItemCodes(trie)(torch.arange(0).numpy()).shape == (0, 2)
