"""Named subsets of items, and what a search needs of them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rectokens.catalog.item_index import ItemIndex

MAX_SET_NAME_LENGTH = 200
# Bytes of prefix sums kept for sets asked for before: six of 20 million items.
_CACHE_BYTES = 512 * 1024 * 1024
_NAMES_SHOWN = 5


class UnknownConstraintSetError(KeyError):
    """A constraint set that the catalog does not have.

    Attributes:
        name: the set asked for.
        known: the sets there are.
    """

    def __init__(self, name: str, known: Sequence[str]) -> None:
        self.name = name
        self.known = tuple(known)
        listed = ", ".join(map(repr, self.known)) if known else "none"
        super().__init__(f"constraint set is {name!r}; the catalog has {listed}")

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show the message in quotes


def resolve_constraint_sets(
    sets: Mapping[str, Sequence[str]], index: ItemIndex
) -> dict[str, Tensor]:
    """Turn lists of item ids into lists of item indices.

    Args:
        sets: item ids by name of the set; repeats are taken once, an empty list is a set that
            allows nothing.
        index: of the catalog's item ids.

    Returns:
        By name, sorted: int64 (X,), item indices, sorted, distinct.

    Raises:
        ValueError: unusable name, or item ids that the catalog does not have.
    """
    resolved = {}
    for name in sorted(sets):
        require_set_name(name)
        item_ids = list(sets[name])
        rows = torch.from_numpy(index.find(item_ids))
        unknown = (rows < 0).nonzero().squeeze(1).tolist()
        if unknown:
            shown = ", ".join(repr(item_ids[i]) for i in unknown[:_NAMES_SHOWN])
            raise ValueError(
                f"constraint set {name!r} has {len(unknown)} item ids that the catalog does not "
                f"have, among them {shown}"
            )
        resolved[name] = torch.unique(rows)
    return resolved


def require_set_name(name: str) -> None:
    """Refuse a name that could not be stored or shown.

    Raises:
        ValueError: empty, longer than ``MAX_SET_NAME_LENGTH``, unprintable, or reserved.
    """
    if not name or len(name) > MAX_SET_NAME_LENGTH or not name.isprintable():
        raise ValueError(
            f"constraint set name is {name[:MAX_SET_NAME_LENGTH]!r}, {len(name)} characters; "
            f"allowed are 1 to {MAX_SET_NAME_LENGTH} printable characters"
        )
    if name.startswith("__"):
        raise ValueError(f"constraint set name is {name!r}; names beginning with '__' are reserved")


def allowed_prefix(sets: Sequence[Tensor], num_items: int) -> Tensor:
    """Prefix sums of the items that all sets hold.

    Args:
        sets: at least one; each int64 (X,), distinct item indices.
        num_items: N.

    Returns:
        int32 (N + 1,); entry i = items below index i that every set has.
    """
    hits = torch.zeros(num_items, dtype=torch.int32)
    for items in sets:
        hits[items] += 1
    prefix = torch.zeros(num_items + 1, dtype=torch.int32)
    torch.cumsum(hits == len(sets), dim=0, dtype=torch.int32, out=prefix[1:])
    return prefix


class PrefixCache:
    """The prefix sums of combinations of sets asked for lately; safe to use from many threads."""

    def __init__(self, max_bytes: int = _CACHE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, names: tuple[str, ...], sets: Sequence[Tensor], num_items: int) -> Tensor:
        """:func:`allowed_prefix` of ``sets``, which ``names`` (sorted) stand for."""
        with self._lock:
            if names in self._entries:
                self._entries.move_to_end(names)
                return self._entries[names]
        prefix = allowed_prefix(sets, num_items)
        with self._lock:
            # Two threads may have worked out the same one; the first stays, so it is shared.
            kept = self._entries.setdefault(names, prefix)
            self._entries.move_to_end(names)
            while len(self._entries) > 1 and len(self._entries) * prefix.nbytes > self._max_bytes:
                self._entries.popitem(last=False)
        return kept

    def names(self) -> list[tuple[str, ...]]:
        """The combinations that are kept, the one asked for last at the end."""
        with self._lock:
            return list(self._entries)
