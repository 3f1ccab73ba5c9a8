"""A catalog in memory: semantic IDs, the items they stand for, and named subsets of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from rectokens.artifacts.catalog import CollisionPolicy
from rectokens.catalog.constraint_sets import PrefixCache, UnknownConstraintSetError
from rectokens.catalog.item_codes import ItemCodes
from rectokens.catalog.item_index import ItemIndex
from rectokens.schemas.catalog_trie import CatalogTrie

# Version of a catalog that was built and not yet written.
UNSAVED = "unsaved"
_NAMES_SHOWN = 5
# So few ids are read one by one sooner than together.
_FEW = 64


@dataclass(frozen=True, eq=False)
class Catalog:
    """N items in the order (leaf, prior descending, tie-break); immutable, on the CPU.

    Make one with :func:`rectokens.catalog.build.build_catalog` or
    :func:`rectokens.catalog.artifact.load_catalog`. The tensors handed out are shared: read them
    only. All methods may be called from many threads.

    Attributes:
        version: of the artifact, ``"unsaved"`` before there is one.
        tokenizer_fingerprint: of the tokenizer that gave the codes.
        collision_policy: ``share`` (a leaf lists its items) or ``extra_level``.
        trie: the semantic IDs, the extra level included.
        item_ids: (N,) strings, distinct, not empty.
        prior: float32 (N,), finite, not ascending within a leaf; or None.
        metadata: N rows of the caller's columns, or None.
        constraint_sets: by name, int64 (X,) item indices, sorted, distinct.
        index: of ``item_ids``; made here unless given.
        predicates: by name, the condition that defines a constraint set; sets without one are
            lists of items.

    Raises:
        ValueError: an item id occurs twice.
    """

    version: str
    tokenizer_fingerprint: str
    collision_policy: CollisionPolicy
    trie: CatalogTrie
    item_ids: pl.Series
    prior: Tensor | None
    metadata: pl.DataFrame | None
    constraint_sets: Mapping[str, Tensor]
    index: ItemIndex | None = field(default=None, repr=False)
    predicates: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    _prefixes: PrefixCache = field(default_factory=PrefixCache, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.index is None:
            object.__setattr__(self, "index", ItemIndex(self.item_ids))
            require_distinct(self._index)

    @property
    def num_items(self) -> int:
        """N."""
        return len(self.item_ids)

    @property
    def num_levels(self) -> int:
        """L, the extra level included."""
        return self.trie.num_levels

    @property
    def codebook_size(self) -> int:
        """K."""
        return self.trie.codebook_size

    @property
    def _index(self) -> ItemIndex:
        assert self.index is not None
        return self.index

    @cached_property
    def _codes_of(self) -> ItemCodes:
        return ItemCodes(self.trie)

    def index_of(self, item_ids: Sequence[str]) -> Tensor:
        """Item index of each item id, -1 where the catalog does not know it.

        Args:
            item_ids: n strings.

        Returns:
            int64 (n,).

        Raises:
            TypeError: something that is no string.
        """
        return torch.from_numpy(self.find(item_ids))

    def find(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        """What :meth:`index_of` gives, as an array, which few numbers are made sooner as."""
        return self._index.find(item_ids)

    def ids_of(self, item_indices: Tensor | Sequence[int]) -> list[str]:
        """Item ids of item indices (n,).

        Raises:
            IndexError: an index outside [0, N).
        """
        indices = self._checked(item_indices)
        if len(indices) <= _FEW:
            return list(map(self.item_ids.item, indices.tolist()))
        names: list[str] = self.item_ids[indices].to_list()
        return names

    def codes_of(self, item_indices: Tensor | NDArray[np.int64] | Sequence[int]) -> Tensor:
        """Semantic IDs of item indices (n,): int64 (n, L).

        Raises:
            IndexError: an index outside [0, N).
        """
        return torch.from_numpy(self.code_rows(item_indices))

    def code_rows(
        self, item_indices: Tensor | NDArray[np.int64] | Sequence[int]
    ) -> NDArray[np.int64]:
        """What :meth:`codes_of` gives, as an array.

        Raises:
            IndexError: as there.
        """
        return self._codes_of(self._checked(item_indices))

    def items_of_leaf(self, leaf: int) -> range:
        """Item indices that share a leaf (its number among the leaves), best first.

        Raises:
            IndexError: a leaf outside [0, M).
        """
        if not 0 <= leaf < self.trie.num_leaves:
            raise IndexError(f"leaf is {leaf}; allowed are 0 to {self.trie.num_leaves - 1}")
        pointers = self.trie.leaf_item_ptrs
        return range(int(pointers[leaf]), int(pointers[leaf + 1]))

    def metadata_of(self, item_index: int) -> dict[str, Any] | None:
        """The caller's columns for one item, None if the catalog has no metadata.

        Raises:
            IndexError: an index outside [0, N).
        """
        self._checked([item_index])
        return None if self.metadata is None else self.metadata.row(item_index, named=True)

    def allowed_prefix(self, set_names: Sequence[str]) -> Tensor | None:
        """Which items may be returned when all the named constraint sets apply.

        Args:
            set_names: names, in any order; repeats do not matter.

        Returns:
            int32 (N + 1,), entry i = allowed items among the first i; None for no names. Kept
            for the next caller.

        Raises:
            UnknownConstraintSetError: (a KeyError) naming the sets there are.
        """
        names = tuple(sorted(set(set_names)))
        if not names:
            return None
        for name in names:
            if name not in self.constraint_sets:
                raise UnknownConstraintSetError(name, sorted(self.constraint_sets))
        sets = [self.constraint_sets[name] for name in names]
        return self._prefixes.get(names, sets, self.num_items)

    def prepare_sets_of(self, other: Catalog) -> None:
        """Count through the combinations of sets that another catalog was asked for lately.

        To be called before this one takes its place, so that no caller waits for it. Combinations
        with a set that this one does not have are passed over.
        """
        for names in other._prefixes.names():
            if all(name in self.constraint_sets for name in names):
                self.allowed_prefix(names)

    def _checked(
        self, item_indices: Tensor | NDArray[np.int64] | Sequence[int]
    ) -> NDArray[np.int64]:
        indices = np.asarray(item_indices, dtype=np.int64)
        if indices.ndim != 1:
            raise ValueError(f"item indices have shape {indices.shape}; expected (n,)")
        if not indices.size or (indices.min() >= 0 and indices.max() < self.num_items):
            return indices
        bad = np.flatnonzero((indices < 0) | (indices >= self.num_items))
        found = int(indices[bad[0]])
        raise IndexError(f"item index is {found}; allowed are 0 to {self.num_items - 1}")


def require_distinct(index: ItemIndex) -> None:
    """Refuse an item id that occurs twice.

    Raises:
        ValueError: with some of the ids.
    """
    repeated = index.repeated()
    if len(repeated):
        shown = ", ".join(map(repr, repeated[:_NAMES_SHOWN].to_list()))
        raise ValueError(
            f"{len(repeated)} item ids occur more than once, among them {shown}; "
            "every item id must be unique"
        )
