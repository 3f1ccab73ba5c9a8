"""What must hold of a catalog's tables; every check is a few vectorised passes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from rectokens.artifacts.catalog import CatalogConfig
from rectokens.artifacts.errors import ArtifactError
from rectokens.schemas.catalog_trie import CatalogTrie


def checked_trie(
    row_ptrs: Tensor, codes: Tensor, leaf_item_ptrs: Tensor, config: CatalogConfig, where: str
) -> CatalogTrie:
    """Make a trie of stored arrays if they are one.

    Together the checks mean: every node but the root has one parent, every inner node has a
    child, siblings ascend in code (so leaves are sorted and unique), every leaf has an item, and
    every item lies below exactly one leaf (so it is reachable).

    Args:
        row_ptrs: int32 (I + 1,).
        codes: uint16 (E,).
        leaf_item_ptrs: int32 (M + 1,).
        config: levels, codebook size, node counts and item count the arrays must agree with.
        where: name of the file, for messages.

    Raises:
        ArtifactError: naming file, array and what is wrong.
    """
    offsets = config.level_offsets
    _check_offsets(config, where)
    num_inner, num_edges = offsets[-2], offsets[-1] - 1
    num_leaves = offsets[-1] - offsets[-2]
    _require_array(row_ptrs, "row_ptrs", torch.int32, num_inner + 1, where)
    _require_array(codes, "codes", torch.uint16, num_edges, where)
    _require_array(leaf_item_ptrs, "leaf_item_ptrs", torch.int32, num_leaves + 1, where)
    _require_pointers(row_ptrs, "row_ptrs", num_edges, "edges", where)
    _require_pointers(leaf_item_ptrs, "leaf_item_ptrs", config.num_items, "items", where)
    for depth, first in enumerate(offsets[:-1]):
        expected = offsets[depth + 1] - 1
        if int(row_ptrs[first]) != expected:
            raise ArtifactError(
                f"{where}: row_ptrs[{first}], the first node of depth {depth}, is "
                f"{int(row_ptrs[first])}; expected {expected}"
            )
    values = codes.to(torch.int32)
    if int(values.max()) >= config.codebook_size:
        edge = int((values >= config.codebook_size).nonzero()[0, 0])
        raise ArtifactError(
            f"{where}: codes[{edge}] is {int(values[edge])}; allowed are 0 to "
            f"{config.codebook_size - 1}"
        )
    descends = values[1:] <= values[:-1]
    descends[row_ptrs[1:-1].long() - 1] = False  # the first child of a node may have any code
    if bool(descends.any()):
        edge = int(descends.nonzero()[0, 0]) + 1
        raise ArtifactError(
            f"{where}: codes[{edge}] is {int(values[edge])} after its sibling "
            f"{int(values[edge - 1])}; siblings must ascend"
        )
    fanout = torch.diff(row_ptrs)
    return CatalogTrie(
        row_ptrs=row_ptrs,
        codes=codes.view(torch.int16),
        leaf_item_ptrs=leaf_item_ptrs,
        level_offsets=offsets,
        codebook_size=config.codebook_size,
        max_children=tuple(
            int(fanout[offsets[depth] : offsets[depth + 1]].max())
            for depth in range(config.num_levels)
        ),
    )


def all_leaf_codes(trie: CatalogTrie) -> Tensor:
    """Semantic IDs of all leaves in order: int32 (M, L). What ``trie.leaf_codes`` gives, quicker.

    Goes up from the leaves a whole level at a time; ancestors of neighbours lie side by side.
    """
    edge_codes = trie.codes.to(torch.int32) & 0xFFFF
    fanout = torch.diff(trie.row_ptrs).long()
    result = torch.empty(trie.num_leaves, trie.num_levels, dtype=torch.int32)
    ancestor = torch.arange(trie.num_leaves)  # counted within its depth
    for depth in range(trie.num_levels, 0, -1):
        above, first, end = trie.level_offsets[depth - 1 : depth + 2]
        result[:, depth - 1] = edge_codes[first - 1 : end - 1][ancestor]
        parents = torch.repeat_interleave(torch.arange(first - above), fanout[above:first])
        ancestor = parents[ancestor]
    return result


def check_semantic_ids(
    semantic_ids: NDArray[np.uint16], trie: CatalogTrie, where: str, policy: str
) -> None:
    """Require the table's semantic IDs to be those of the leaves that hold the items.

    Args:
        semantic_ids: (N, L).
        trie: of the same catalog.
        where: name of the table's file.
        policy: ``extra_level`` allows a leaf one item only.

    Raises:
        ArtifactError: naming the first item that is wrong.
    """
    sizes = torch.diff(trie.leaf_item_ptrs).long()
    if policy == "extra_level" and int(sizes.max()) > 1:
        leaf = int((sizes > 1).nonzero()[0, 0])
        raise ArtifactError(
            f"{where}: leaf {leaf} holds {int(sizes[leaf])} items; under the collision policy "
            "'extra_level' it must hold one"
        )
    leaf_codes = all_leaf_codes(trie).numpy().astype(np.uint16)
    expected = np.repeat(leaf_codes, sizes.numpy(), axis=0)
    if not np.array_equal(semantic_ids, expected):
        item = int((semantic_ids != expected).any(axis=1).nonzero()[0][0])
        raise ArtifactError(
            f"{where}: item {item} has semantic ID {tuple(semantic_ids[item].tolist())}, but lies "
            f"in the leaf {tuple(expected[item].tolist())} of the trie"
        )


def check_prior(prior: Tensor, trie: CatalogTrie, where: str) -> None:
    """Require a finite prior (float32 (N,)) that does not ascend within a leaf.

    Raises:
        ArtifactError: naming the first item that is wrong.
    """
    bad = (~prior.isfinite()).nonzero()
    if bad.numel():
        item = int(bad[0, 0])
        raise ArtifactError(f"{where}: prior of item {item} is {float(prior[item])}; not finite")
    ascends = prior[1:] > prior[:-1]
    ascends[trie.leaf_item_ptrs[1:-1].long() - 1] = False  # a new leaf begins here
    if bool(ascends.any()):
        item = int(ascends.nonzero()[0, 0]) + 1
        raise ArtifactError(
            f"{where}: prior of item {item} is {float(prior[item])} after "
            f"{float(prior[item - 1])} in the same leaf; items of a leaf must be best first"
        )


def check_item_column(item_ids: pl.Series, where: str) -> None:
    """Require item ids that are there and not empty (uniqueness is the index's to tell).

    Raises:
        ArtifactError: naming the first row that is wrong.
    """
    bad = (item_ids.is_null() | (item_ids == "").fill_null(value=True)).arg_true()
    if len(bad):
        raise ArtifactError(f"{where}: item_id of row {int(bad[0])} is missing or empty")


def check_constraint_sets(sets: Mapping[str, Tensor], config: CatalogConfig, where: str) -> None:
    """Require the sets that the configuration names: int64, ascending, within the items.

    Raises:
        ArtifactError: naming the set and what is wrong.
    """
    if set(sets) != set(config.constraint_sets):
        raise ArtifactError(
            f"{where} holds the constraint sets {sorted(sets)}; catalog.json names "
            f"{sorted(config.constraint_sets)}"
        )
    for name, items in sets.items():
        _require_array(items, name, torch.int64, config.constraint_sets[name], where)
        if bool((items[1:] <= items[:-1]).any()):
            raise ArtifactError(f"{where}: constraint set {name!r} does not ascend")
        if items.numel() and not 0 <= int(items[0]) <= int(items[-1]) < config.num_items:
            raise ArtifactError(
                f"{where}: constraint set {name!r} spans {int(items[0])} to {int(items[-1])}; "
                f"allowed are 0 to {config.num_items - 1}"
            )


def _check_offsets(config: CatalogConfig, where: str) -> None:
    offsets = config.level_offsets
    counts = [after - before for before, after in pairwise(offsets)]
    grows = all(after >= before >= 1 for before, after in pairwise(counts))
    if len(offsets) != config.num_levels + 2 or offsets[:2] != (0, 1) or not grows:
        raise ArtifactError(
            f"{where}: level_offsets are {list(offsets)}; expected {config.num_levels + 2} "
            "numbers from 0, 1 on, no depth with fewer nodes than the one above it"
        )
    if counts[-1] > config.num_items:
        raise ArtifactError(
            f"{where}: the trie has {counts[-1]} leaves for {config.num_items} items"
        )


def _require_array(tensor: Tensor, name: str, dtype: torch.dtype, length: int, where: str) -> None:
    if tensor.dtype != dtype or tensor.shape != (length,):
        raise ArtifactError(
            f"{where}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}; "
            f"expected {dtype} of shape ({length},)"
        )


def _require_pointers(pointers: Tensor, name: str, end: int, what: str, where: str) -> None:
    """Pointers that ascend strictly from 0 to ``end``: no part is empty, nothing is left out."""
    if int(pointers[0]) != 0 or int(pointers[-1]) != end:
        raise ArtifactError(
            f"{where}: {name} runs from {int(pointers[0])} to {int(pointers[-1])}; "
            f"expected 0 to {end}, the number of {what}"
        )
    bad = (pointers[1:] <= pointers[:-1]).nonzero()
    if bad.numel():
        place = int(bad[0, 0]) + 1
        raise ArtifactError(
            f"{where}: {name}[{place}] is {int(pointers[place])} after "
            f"{int(pointers[place - 1])}; it must ascend"
        )
