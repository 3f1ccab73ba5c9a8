"""Where new items belong among sorted ones, and the order of both together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rectokens.schemas.catalog_trie import CatalogTrie


def find_items(trie: CatalogTrie, prefixes: Tensor) -> tuple[Tensor, Tensor]:
    """Range [lo, hi) of the items whose semantic ID begins with each prefix.

    A prefix that the trie does not have gets the empty range at the place its items would take,
    which is what makes this a bisection of the items without their codes.

    Args:
        trie: on the CPU.
        prefixes: int64 (n, d), 1 <= d <= L, values in [0, K).

    Returns:
        ``lo`` and ``hi``, int64 (n,) each.
    """
    num_rows, depth = prefixes.shape
    low = torch.empty(num_rows, dtype=torch.long)
    high = torch.empty(num_rows, dtype=torch.long)
    rows = torch.arange(num_rows)  # those whose prefix was found so far
    node = torch.zeros(num_rows, dtype=torch.long)
    for level in range(depth):
        edge, end = _first_edge_from(trie, node, level, prefixes[rows, level])
        hit = edge < end
        hit[hit.clone()] = trie.edge_codes(edge[hit]) == prefixes[rows[hit], level]
        # The child that would come after: at the end of a depth, one past its last node.
        low[rows[~hit]] = high[rows[~hit]] = _first_item(trie, edge[~hit] + 1, level + 1)
        rows, node = rows[hit], edge[hit] + 1
    low[rows] = _first_item(trie, node, depth)
    high[rows] = _first_item(trie, node + 1, depth)
    return low, high


@dataclass(frozen=True, slots=True)
class Merged:
    """The order of kept and inserted items together.

    Attributes:
        source: int64 (N',), for each place the kept item (its index below N) or N + the row
            that was inserted.
        places: int64 (N + U,), the inverse; -1 for what is left out.
    """

    source: Tensor
    places: Tensor


def merge_rows(kept: Tensor, rows: Tensor, before: Tensor, num_rows: int) -> Merged:
    """Put sorted rows between the items that stay.

    Args:
        kept: bool (N,), the old items that stay and keep their order.
        rows: int64 (P,), in the order they are to have: old items (below N) that were taken out,
            or N + an upserted row.
        before: int64 (P,), ascending, the old place (0..N) in front of which each goes.
        num_rows: U, upserted rows there are.
    """
    num_items = kept.numel()
    stay = kept.nonzero().squeeze(1)
    kept_before = torch.zeros(num_items + 1, dtype=torch.long)
    torch.cumsum(kept, dim=0, out=kept_before[1:])
    inserted = torch.zeros(stay.numel() + rows.numel(), dtype=torch.bool)
    inserted[kept_before[before] + torch.arange(rows.numel())] = True
    source = torch.empty(inserted.numel(), dtype=torch.long)
    source[inserted] = rows
    source[~inserted] = stay
    places = torch.full((num_items + num_rows,), -1, dtype=torch.long)
    places[source] = torch.arange(source.numel())
    return Merged(source=source, places=places)


def _first_edge_from(
    trie: CatalogTrie, node: Tensor, level: int, code: Tensor
) -> tuple[Tensor, Tensor]:
    """First edge of each node whose code is at least ``code``, and the end of its edges."""
    low, end = trie.row_ptrs[node].long(), trie.row_ptrs[node + 1].long()
    high = end
    last_edge = trie.codes.numel() - 1
    for _ in range(trie.max_children[level].bit_length()):
        middle = (low + high) // 2
        right = (low < high) & (trie.edge_codes(middle.clamp(max=last_edge)) < code)
        low, high = torch.where(right, middle + 1, low), torch.where(right, high, middle)
    return low, end


def _first_item(trie: CatalogTrie, node: Tensor, depth: int) -> Tensor:
    """First item below each node of a depth; N for one past the depth's last node."""
    for _ in range(depth, trie.num_levels):
        node = trie.row_ptrs[node].long() + 1
    return trie.leaf_item_ptrs[node - trie.level_offsets[-2]].long()
