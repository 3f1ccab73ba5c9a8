"""Semantic IDs of single items, out of a trie that keeps none of them as such."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rectokens.schemas.catalog_trie import CatalogTrie


class ItemCodes:
    """A table of all semantic IDs: one look into memory an item, 2 bytes a code.

    Args:
        trie: on the CPU. The table of 1.5 million items of 3 codes is made in 20 ms.
    """

    def __init__(self, trie: CatalogTrie) -> None:
        offsets = trie.level_offsets
        levels = len(offsets) - 2
        edge_codes = trie.codes.numpy().view(np.uint16)
        row_ptrs = trie.row_ptrs.numpy()
        # First item below each node of a depth, the leaves to begin with, and the end.
        first = trie.leaf_item_ptrs.numpy()
        self._table = np.empty((int(first[-1]), levels), dtype=np.uint16)
        for depth in range(levels, 0, -1):
            # Edge j leads to node j + 1.
            codes = edge_codes[offsets[depth] - 1 : offsets[depth + 1] - 1]
            self._table[:, depth - 1] = np.repeat(codes, np.diff(first))
            children = row_ptrs[offsets[depth - 1] : offsets[depth] + 1]
            first = first[children - children[0]]

    def __call__(self, item_indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Semantic IDs of items.

        Args:
            item_indices: int64 (n,), in [0, N).

        Returns:
            int64 (n, L).
        """
        return self._table[item_indices].astype(np.int64)
