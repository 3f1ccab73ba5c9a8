"""Semantic IDs of single items, out of a trie that keeps none of them as such."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rectokens.catalog.sorted_numbers import SortedNumbers
from rectokens.schemas.catalog_trie import CatalogTrie


class ItemCodes:
    """Walks up from items, as ``CatalogTrie.leaf_codes`` does from leaves, in a part of its time.

    Args:
        trie: on the CPU.
    """

    def __init__(self, trie: CatalogTrie) -> None:
        self._offsets = trie.level_offsets
        self._edge_codes = trie.codes.numpy().view(np.uint16)
        row_ptrs = trie.row_ptrs.numpy()
        # First item of each leaf; first edge of each node that has a node above it and edges.
        self._leaves = SortedNumbers(trie.leaf_item_ptrs.numpy())
        self._nodes = {
            depth: SortedNumbers(row_ptrs[self._offsets[depth] : self._offsets[depth + 1]])
            for depth in range(1, trie.num_levels)
        }

    def __call__(self, item_indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Semantic IDs of items.

        Args:
            item_indices: int64 (n,), in [0, N).

        Returns:
            int64 (n, L).
        """
        levels = len(self._offsets) - 2
        codes = np.empty((len(item_indices), levels), dtype=np.int64)
        node = _holder(self._leaves, item_indices) + self._offsets[levels]
        for depth in range(levels, 0, -1):
            codes[:, depth - 1] = self._edge_codes[node - 1]
            if depth > 1:
                above = _holder(self._nodes[depth - 1], node - 1)
                node = above + self._offsets[depth - 1]
        return codes


def _holder(starts: SortedNumbers, values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of the last start that is not above each value."""
    return starts.count_below(values.astype(np.int32) + np.int32(1)) - 1
