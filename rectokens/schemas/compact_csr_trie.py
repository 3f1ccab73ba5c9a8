"""The library's trie over token ids, packed into arrays a device can walk."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rectokens.core.tokenizer import TokenSequence
from rectokens.decoding.trie import Trie, TrieNode
from rectokens.schemas.catalog_trie import lexicographic_order

# 128 GiB of int64: past this a dense table is a slip of the caller's, not a plan.
_MAX_DENSE_ENTRIES = 1 << 34


class CompactCSRTrie(NamedTuple):
    """A trie over token ids in compressed sparse row form, with dense tables for its first levels.

    Nodes are numbered breadth first, root 0, siblings by ascending token; edge j leads to node
    j + 1. The edges of node n are ``row_ptrs[n]`` up to ``row_ptrs[n + 1]``, or up to the number
    of edges for the last node: there is no closing entry.

    Example, items (0,2), (0,3), (4,1) with V = 5 and one dense layer::

        node                 0      1      2    3  4  5
        row_ptrs             0      2      4    5  5  5
        tokens by edge       0 4    2 3    1   -1         (row 0 of stacked_cols_vals)
        children by edge     1 2    3 4    5   -1         (row 1)
        layer_max_branches   [2, 2]
        dense_states         1 0 0 0 2

    Attributes:
        row_ptrs: int64 (E + 1,), first edge of each node; E, the number of edges, for leaves.
        stacked_cols_vals: int64 (2, E + 1), token and child node of each edge, then (-1, -1).
        layer_max_branches: most children of any node at each depth 0..L-1.
        dense_mask_by_layer: d bool tensors, entry l of shape (V,) * (l + 1): does that prefix
            occur?
        dense_states: int64 (V,) * d, node of each prefix of length d, 0 where there is none.
        vocab_size: V. The dense tables hold V ** d entries: choose d by V.
    """

    row_ptrs: Tensor
    stacked_cols_vals: Tensor
    layer_max_branches: list[int]
    dense_mask_by_layer: list[Tensor]
    dense_states: Tensor
    vocab_size: int

    @property
    def num_edges(self) -> int:
        """E; the trie has E + 1 nodes."""
        return self.row_ptrs.shape[0] - 1

    @property
    def num_levels(self) -> int:
        """L, the length of the longest item; trailing zeros of ``layer_max_branches`` do not count.

        A trie without items reports the number of entries it has.
        """
        inner = [depth for depth, most in enumerate(self.layer_max_branches) if most > 0]
        return inner[-1] + 1 if inner else len(self.layer_max_branches)

    @property
    def num_dense_layers(self) -> int:
        """d, the number of first levels that have a dense table."""
        return len(self.dense_mask_by_layer)

    @property
    def device(self) -> torch.device:
        """Where the arrays live."""
        return self.row_ptrs.device

    @classmethod
    def from_trie(cls, trie: Trie, vocab_size: int, dense_lookup_layers: int = 2) -> CompactCSRTrie:
        """Pack a pointer trie, on the CPU.

        Args:
            trie: sequences over [0, V); they may differ in length.
            vocab_size: V.
            dense_lookup_layers: d, at least 0; clamped to the longest sequence.

        Raises:
            ValueError: a token outside [0, V), or dense tables that no memory holds.
        """
        _check_sizes(vocab_size, dense_lookup_layers)
        layers: list[list[tuple[tuple[int, ...], TrieNode]]] = [[((), trie.root)]]
        row_ptrs: list[int] = []
        tokens: list[int] = []
        max_branches: list[int] = []
        while layers[-1]:
            below: list[tuple[tuple[int, ...], TrieNode]] = []
            for prefix, node in layers[-1]:
                row_ptrs.append(len(tokens))
                for token in sorted(node.children):
                    if not 0 <= token < vocab_size:
                        raise ValueError(_outside(token, token, vocab_size))
                    tokens.append(token)
                    below.append(((*prefix, token), node.children[token]))
            max_branches.append(max(len(node.children) for _, node in layers[-1]))
            layers.append(below)
        layers.pop()
        if len(max_branches) > 1:
            max_branches.pop()  # the deepest layer has leaves only

        num_dense = min(dense_lookup_layers, max(len(layers) - 1, 1))
        prefixes = [
            torch.tensor([p for p, _ in nodes], dtype=torch.long).reshape(len(nodes), depth)
            for depth, nodes in enumerate(layers[: num_dense + 1])
        ]
        prefixes += [torch.empty(0, 1, dtype=torch.long)] * (num_dense + 1 - len(prefixes))
        first_node = sum(len(nodes) for nodes in layers[:num_dense])
        masks, states = _dense_tables(prefixes, first_node, vocab_size, torch.device("cpu"))
        return cls(
            row_ptrs=torch.tensor(row_ptrs, dtype=torch.long),
            stacked_cols_vals=_edges(torch.tensor(tokens, dtype=torch.long)),
            layer_max_branches=max_branches,
            dense_mask_by_layer=masks,
            dense_states=states,
            vocab_size=vocab_size,
        )

    @classmethod
    def from_sorted_batch(
        cls, sem_ids: Tensor | TokenSequence, vocab_size: int, dense_lookup_layers: int = 2
    ) -> CompactCSRTrie:
        """Build the trie of N items of one length.

        Args:
            sem_ids: integer (N, L), L >= 1, or what a tokenizer's ``encode`` returns. Rows in
                lexicographic order are the usual case; any other order is sorted first.
                Repeated rows collapse. N = 0 gives a lone root.
            vocab_size: V; all ids lie in [0, V).
            dense_lookup_layers: d, at least 0; clamped to L.

        Returns:
            The trie, on the device of ``sem_ids``; equal to what ``from_trie`` makes of the
            same items.

        Raises:
            TypeError: ``sem_ids`` is not an integer tensor.
            ValueError: wrong shape, an id outside [0, V), or dense tables that no memory holds.
        """
        _check_sizes(vocab_size, dense_lookup_layers)
        codes = sem_ids.codes if isinstance(sem_ids, TokenSequence) else sem_ids
        ranked = _sorted_rows(codes, vocab_size)
        num_rows, num_levels = ranked.shape
        device = ranked.device

        # A prefix of length l starts at each row where one of the first l ids changes.
        starts = torch.zeros(num_rows, dtype=torch.bool, device=device)
        starts[:1] = True
        rows_by_level = []
        for level in range(num_levels):
            starts[1:] |= ranked[1:, level] != ranked[:-1, level]
            rows_by_level.append(starts.nonzero().squeeze(1))

        tokens = torch.cat([ranked[rows, level] for level, rows in enumerate(rows_by_level)])
        row_ptrs = torch.full(
            (tokens.numel() + 1,), tokens.numel(), dtype=torch.long, device=device
        )
        max_branches = []
        parents = torch.zeros(1, dtype=torch.long, device=device)
        first_node, first_edge = 0, 0
        for rows in rows_by_level:
            # First edge of each node: where the node's first row lies among its children's.
            first_child = torch.searchsorted(rows, parents)
            row_ptrs[first_node : first_node + parents.numel()] = first_edge + first_child
            closing = torch.full((1,), rows.numel(), dtype=torch.long, device=device)
            branches = torch.diff(first_child, append=closing)
            max_branches.append(int(branches.max()) if branches.numel() else 0)
            first_node += parents.numel()
            first_edge += rows.numel()
            parents = rows

        num_dense = min(dense_lookup_layers, num_levels)
        prefixes = [ranked[:1, :0]]
        prefixes += [ranked[rows_by_level[level], : level + 1] for level in range(num_dense)]
        first_dense = sum(p.shape[0] for p in prefixes[:-1]) if num_rows else 1
        masks, states = _dense_tables(prefixes, first_dense, vocab_size, device)
        return cls(
            row_ptrs=row_ptrs,
            stacked_cols_vals=_edges(tokens),
            layer_max_branches=max_branches,
            dense_mask_by_layer=masks,
            dense_states=states,
            vocab_size=vocab_size,
        )


def _sorted_rows(sem_ids: Tensor, vocab_size: int) -> Tensor:
    """``sem_ids`` checked, as int64 (N, L) in lexicographic order of rows."""
    dtype = sem_ids.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype is torch.bool:
        raise TypeError(f"sem_ids have dtype {dtype}; expected an integer dtype")
    if sem_ids.ndim != 2 or sem_ids.shape[1] < 1:
        raise ValueError(
            f"sem_ids have shape {tuple(sem_ids.shape)}; expected (N, L) with L at least 1"
        )
    ids = sem_ids.long()
    if ids.shape[0] == 0:
        return ids
    low, high = torch.stack(ids.aminmax()).tolist()
    if low < 0 or high >= vocab_size:
        raise ValueError(_outside(low, high, vocab_size))
    return ids[lexicographic_order(ids, vocab_size)]


def _outside(low: int, high: int, vocab_size: int) -> str:
    return (
        f"ids span {low} to {high}; allowed are 0 to {vocab_size - 1} for vocab_size {vocab_size}"
    )


def _edges(tokens: Tensor) -> Tensor:
    """Edge table (2, E + 1): tokens, children (edge j leads to node j + 1), then (-1, -1)."""
    children = torch.arange(1, tokens.numel() + 1, device=tokens.device)
    return torch.nn.functional.pad(torch.stack([tokens, children]), (0, 1), value=-1)


def _dense_tables(
    prefixes: list[Tensor], first_node: int, vocab_size: int, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Tables of the first d = len(prefixes) - 1 levels.

    Args:
        prefixes: entry l is int64 (n_l, l): the prefixes of length l, in node order.
        first_node: node of the first prefix of length d; the others follow.
        vocab_size: V.
        device: where to put the tables.
    """
    num_dense = len(prefixes) - 1
    if vocab_size**num_dense > _MAX_DENSE_ENTRIES:
        raise ValueError(
            f"dense_lookup_layers {num_dense} over vocab_size {vocab_size} needs "
            f"{vocab_size**num_dense} entries; at most {_MAX_DENSE_ENTRIES}: use fewer layers"
        )
    masks = []
    flat = torch.zeros(prefixes[0].shape[0], dtype=torch.long, device=device)
    for depth in range(1, num_dense + 1):
        flat = torch.zeros(prefixes[depth].shape[0], dtype=torch.long, device=device)
        for level in range(depth):
            flat = flat * vocab_size + prefixes[depth][:, level]
        mask = torch.zeros(vocab_size**depth, dtype=torch.bool, device=device)
        mask[flat] = True
        masks.append(mask.view((vocab_size,) * depth))
    states = torch.zeros(vocab_size**num_dense, dtype=torch.long, device=device)
    if num_dense:
        states[flat] = torch.arange(first_node, first_node + flat.numel(), device=device)
    return masks, states.view((vocab_size,) * num_dense)


def _check_sizes(vocab_size: int, dense_lookup_layers: int) -> None:
    if vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size}; it must be at least 1")
    if dense_lookup_layers < 0:
        raise ValueError(f"dense_lookup_layers is {dense_lookup_layers}; it must be at least 0")
