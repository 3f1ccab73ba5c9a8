"""The serving catalog's trie: all semantic IDs, and the items below every node."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_UINT16 = 1 << 16


@dataclass(frozen=True, slots=True)
class CatalogTrie:
    """A CSR trie over semantic IDs of one length, numbered breadth first.

    Root is node 0; edge j leads to node j + 1, so child ids are not stored. Because of that
    numbering the nodes below node n at any deeper level are one contiguous range, found by
    chasing row pointers from n and n + 1. Leaves are in lexicographic order of semantic ID and
    items are numbered in (leaf, rank within the leaf) order, so the items below a node are one
    contiguous range too.

    Example, semantic IDs (0,2), (0,3), (4,1) with two items sharing (0,3)::

        node            0      1      2    | 3  4  5  (leaves)
        row_ptrs        0      2      4  5 |           (closing entry 5 = number of edges)
        codes by edge   0 4    2 3    1
        leaf_item_ptrs  0 1 3 4

    Attributes:
        row_ptrs: int32 (I + 1,), first edge of each of the I inner nodes, then the edge count.
        codes: int16 (E,), code of each edge, bit pattern of an unsigned 16-bit integer.
        leaf_item_ptrs: int32 (M + 1,), first item index of each of the M leaves, then N.
        level_offsets: L + 2 entries; first node id of each depth 0..L, then the node count.
        codebook_size: K, at most 65,536.
        max_children: L entries; most children of any node at each depth 0..L-1.
    """

    row_ptrs: Tensor
    codes: Tensor
    leaf_item_ptrs: Tensor
    level_offsets: tuple[int, ...]
    codebook_size: int
    max_children: tuple[int, ...]

    @property
    def num_levels(self) -> int:
        """L, the length of every semantic ID."""
        return len(self.level_offsets) - 2

    @property
    def num_leaves(self) -> int:
        """M, the number of distinct semantic IDs."""
        return self.level_offsets[-1] - self.level_offsets[-2]

    @property
    def num_items(self) -> int:
        """N, the number of items; several may share a leaf."""
        return int(self.leaf_item_ptrs[-1])

    @property
    def device(self) -> torch.device:
        """Where the arrays live."""
        return self.row_ptrs.device

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays on the device."""
        return sum(t.nbytes for t in (self.row_ptrs, self.codes, self.leaf_item_ptrs))

    def to(self, device: torch.device | str) -> CatalogTrie:
        """The same trie with its arrays on ``device``."""
        return replace(
            self,
            row_ptrs=self.row_ptrs.to(device),
            codes=self.codes.to(device),
            leaf_item_ptrs=self.leaf_item_ptrs.to(device),
        )

    def edge_codes(self, edges: Tensor) -> Tensor:
        """Codes (int64) of the given edge indices, any shape."""
        return self.codes[edges].long() & (_UINT16 - 1)

    def item_range(self, nodes: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """Range [lo, hi) of item indices below each node, all nodes at the same depth.

        Args:
            nodes: int64, any shape.
            depth: 0 (root) to L (leaves).
        """
        lo, hi = nodes, nodes + 1
        for _ in range(depth, self.num_levels):
            lo = self.row_ptrs[lo].long() + 1
            hi = self.row_ptrs[hi].long() + 1
        first_leaf = self.level_offsets[-2]
        return (
            self.leaf_item_ptrs[lo - first_leaf].long(),
            self.leaf_item_ptrs[hi - first_leaf].long(),
        )

    def leaf_codes(self, leaves: Tensor) -> Tensor:
        """Semantic IDs of the given leaf numbers (0..M-1): int64 (..., L).

        Walks up: the parent of node n is the inner node whose edges hold edge n - 1.
        """
        node = leaves + self.level_offsets[-2]
        codes = []
        for _ in range(self.num_levels):
            edge = node - 1
            codes.append(self.edge_codes(edge))
            node = torch.searchsorted(self.row_ptrs, edge.to(torch.int32), right=True) - 1
        return torch.stack(codes[::-1], dim=-1)

    def find_leaves(self, codes: Tensor) -> Tensor:
        """Leaf number of each semantic ID, -1 where the catalog has none.

        Args:
            codes: int64 (n, L).
        """
        if codes.ndim != 2 or codes.shape[1] != self.num_levels:
            raise ValueError(
                f"codes have shape {tuple(codes.shape)}; expected (n, {self.num_levels})"
            )
        node = torch.zeros(codes.shape[0], dtype=torch.long, device=self.device)
        found = torch.ones_like(node, dtype=torch.bool)
        last_edge = max(self.codes.numel() - 1, 0)
        for level in range(self.num_levels):
            # Binary search among each node's own edges, which are in ascending order of code.
            lo = self.row_ptrs[node].long()
            end = self.row_ptrs[node + 1].long()
            hi = end
            for _ in range(self.max_children[level].bit_length()):
                mid = (lo + hi) // 2
                go_right = (lo < hi) & (self.edge_codes(mid.clamp(max=last_edge)) < codes[:, level])
                lo, hi = torch.where(go_right, mid + 1, lo), torch.where(go_right, hi, mid)
            found &= lo < end
            found &= self.edge_codes(lo.clamp(max=last_edge)) == codes[:, level]
            node = torch.where(found, lo + 1, 0)
        return torch.where(found, node - self.level_offsets[-2], -1)

    @classmethod
    def from_codes(cls, codes: Tensor, codebook_size: int) -> tuple[CatalogTrie, Tensor]:
        """Build the trie of N items' semantic IDs, in any order, repeats allowed.

        Args:
            codes: integer (N, L), N >= 1, values in [0, K).
            codebook_size: K, at most 65,536.

        Returns:
            The trie, on the device of ``codes``, and ``order``, int64 (N,): row of ``codes``
            that became item 0, 1, ... The sort is stable: rows that share a semantic ID keep
            their order, so a caller ranks them by passing them in rank order.

        Raises:
            ValueError: wrong shape, no rows, or a code out of range.
        """
        _check_rows(codes, codebook_size)
        order = lexicographic_order(codes, codebook_size)
        return cls._of_sorted(codes[order], codebook_size, check_order=False), order

    @classmethod
    def from_sorted_codes(cls, codes: Tensor, codebook_size: int) -> CatalogTrie:
        """Build the trie of semantic IDs that are in lexicographic order already.

        Args:
            codes: integer (N, L), N >= 1, values in [0, K), rows ascending, repeats allowed.
            codebook_size: K, at most 65,536.

        Raises:
            ValueError: as :meth:`from_codes`; or a row that comes before the one above it.
        """
        _check_rows(codes, codebook_size)
        return cls._of_sorted(codes, codebook_size, check_order=True)

    @classmethod
    def _of_sorted(cls, codes: Tensor, codebook_size: int, *, check_order: bool) -> CatalogTrie:
        """The trie of rows in order. Waits for a device once a level, for the number of nodes."""
        num_items, num_levels = codes.shape
        device = codes.device

        # A prefix of length d starts where any of the first d codes differs from the row above.
        starts = torch.zeros(num_items, dtype=torch.bool, device=device)
        starts[:1] = True
        level_codes, level_rows, level_first, level_most = [], [], [], []
        descends = torch.zeros(num_levels, dtype=torch.bool, device=device)
        parents = torch.zeros(1, dtype=torch.long, device=device)
        for level in range(num_levels):
            column = codes[:, level].contiguous()
            if check_order:
                descends[level] = ((column[1:] < column[:-1]) & ~starts[1:]).any()
            starts[1:] |= column[1:] != column[:-1]
            rows = starts.nonzero().squeeze(1)
            level_rows.append(rows)
            # Parents start where children start too, so a running count finds their first child.
            first = (starts.cumsum(0, dtype=torch.int32) - 1)[parents]
            closing = torch.full((1,), rows.numel(), dtype=torch.int32, device=device)
            level_most.append(torch.diff(first, append=closing).max())
            level_first.append(first)
            parents = rows
            level_codes.append(column[rows].to(torch.int32).to(torch.int16))
        if check_order and bool(descends.any()):
            raise ValueError(_first_descent(codes))

        counts = [1] + [rows.numel() for rows in level_rows]
        offsets = [0]
        for count in counts:
            offsets.append(offsets[-1] + count)
        if offsets[-1] >= 2**31:
            raise ValueError(f"trie has {offsets[-1]} nodes; at most {2**31 - 1}")

        row_ptrs = torch.empty(offsets[-2] + 1, dtype=torch.int32, device=device)
        for level, first in enumerate(level_first):
            # First edge of each node of this depth.
            row_ptrs[offsets[level] : offsets[level + 1]] = first + (offsets[level + 1] - 1)
        row_ptrs[-1] = offsets[-1] - 1

        leaf_item_ptrs = torch.empty(counts[-1] + 1, dtype=torch.int32, device=device)
        leaf_item_ptrs[:-1] = level_rows[-1]
        leaf_item_ptrs[-1] = num_items
        return cls(
            row_ptrs=row_ptrs,
            codes=torch.cat(level_codes),
            leaf_item_ptrs=leaf_item_ptrs,
            level_offsets=tuple(offsets),
            codebook_size=codebook_size,
            max_children=tuple(torch.stack(level_most).tolist()),
        )


def _first_descent(codes: Tensor) -> str:
    """What to say of rows that are not in lexicographic order."""
    tied = torch.ones(codes.shape[0] - 1, dtype=torch.bool, device=codes.device)
    for level in range(codes.shape[1]):
        before, after = codes[:-1, level], codes[1:, level]
        rows = (tied & (after < before)).nonzero()
        if rows.numel() > 0:
            break
        tied &= after == before
    row = int(rows[0, 0]) + 1
    return (
        f"codes of row {row} come before those of row {row - 1}; rows must be in "
        "lexicographic order"
    )


def _check_rows(codes: Tensor, codebook_size: int) -> None:
    """Refuse codes that no trie can be made of."""
    if codes.ndim != 2 or codes.shape[1] < 1:
        raise ValueError(f"codes have shape {tuple(codes.shape)}; expected (N, L) with L >= 1")
    if codes.shape[0] < 1:
        raise ValueError("codes have no rows; a catalog needs at least one item")
    if not 1 <= codebook_size <= _UINT16:
        raise ValueError(f"codebook_size is {codebook_size}; allowed are 1 to {_UINT16}")
    low, high = torch.stack(codes.aminmax()).tolist()
    if low < 0 or high >= codebook_size:
        raise ValueError(
            f"codes span {low} to {high}; allowed are 0 to {codebook_size - 1} "
            f"for codebook_size {codebook_size}"
        )
    if codes.shape[0] >= 2**31:
        raise ValueError(f"catalog has {codes.shape[0]} items; at most {2**31 - 1}")


def lexicographic_order(codes: Tensor, codebook_size: int) -> Tensor:
    """Stable lexicographic argsort of the rows of ``codes`` (N, L), level 0 first.

    Packs as many levels as 63 bits hold into one key and sorts from the last group of levels to
    the first, so no key can overflow whatever K and L are.

    Returns:
        int64 (N,).
    """
    bits = max(codebook_size - 1, 1).bit_length()
    group = max(63 // bits, 1)
    num_levels = codes.shape[1]
    order: Tensor | None = None
    end = num_levels
    while end > 0:
        start = max(end - group, 0)
        key = torch.zeros(codes.shape[0], dtype=torch.long, device=codes.device)
        for level in range(start, end):
            key = (key << bits) | codes[:, level].long()
        if order is None:
            order = torch.argsort(key, stable=True)
        else:
            order = order[torch.argsort(key[order], stable=True)]
        end = start
    assert order is not None
    return order
