"""Filters of a batch: which items each request may be given (counted, never scored)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rectokens.schemas.search import SearchRequest


def excluded_within(excluded: Tensor, allowed_prefix: Tensor | None) -> Tensor:
    """The excluded items that the constraint set contains: only those count against it.

    Args:
        excluded: int64 (X,), sorted and unique.
        allowed_prefix: int32 (N + 1,), or None for all items.
    """
    if allowed_prefix is None:
        return excluded
    return excluded[allowed_prefix[excluded + 1] > allowed_prefix[excluded]]


def listed_within(
    allowed: Tensor, allowed_prefix: Tensor | None, excluded: Tensor | None
) -> Tensor:
    """The items of an allow-list that the request's other filters let through.

    What is left of a request's filters once this is done is a list of items to count, however
    large the catalog and its sets are.

    Args:
        allowed: int64 (A,), sorted and unique.
        allowed_prefix: int32 (N + 1,), or None for all items.
        excluded: int64 (X,), sorted and unique, or None.

    Returns:
        int64 (A',), sorted and unique.
    """
    allowed = excluded_within(allowed, allowed_prefix)
    if excluded is None or excluded.numel() == 0:
        return allowed
    return allowed[torch.isin(allowed, excluded, assume_unique=True, invert=True)]


@dataclass(frozen=True, slots=True)
class BatchFilters:
    """The filters of B requests over one catalog of N items, on one device.

    A request with an allow-list has its other filters worked into the list, so it has neither a
    set nor exclusions here: what is allowed in a range of items is what the list has there.

    Attributes:
        num_items: N.
        set_index: int64 (B,), position in ``prefixes``, -1 for requests without a set.
        prefixes: the distinct prefix sums in use, each int32 (N + 1,).
        excluded_keys: int64 (X,), ascending; ``request * (N + 1) + item`` of every exclusion.
        has_allow_list: bool (B,).
        allowed_keys: int64 (A,), ascending; likewise, of every item of an allow-list.
    """

    num_items: int
    set_index: Tensor
    prefixes: tuple[Tensor, ...]
    excluded_keys: Tensor
    has_allow_list: Tensor
    allowed_keys: Tensor

    @classmethod
    def from_requests(
        cls,
        requests: Sequence[SearchRequest],
        num_items: int,
        device: torch.device,
        place: Callable[[Tensor], Tensor] | None = None,
    ) -> BatchFilters:
        """Collect the filters of a batch.

        Args:
            requests: the B requests.
            num_items: N.
            device: where the filters shall lie.
            place: copies a prefix sum to the device, or finds the copy made before (see
                :class:`~rectokens.decoding.device_prefixes.DevicePrefixes`); copies each time
                if left out.

        Raises:
            ValueError: a filter made for a catalog of another size.
        """
        prefixes: list[Tensor] = []
        set_index = []
        excluded_keys = []
        allowed_keys = []
        for row, request in enumerate(requests):
            prefix, excluded = request.allowed_prefix, request.excluded_items
            if prefix is not None and prefix.shape != (num_items + 1,):
                raise ValueError(
                    f"allowed_prefix has shape {tuple(prefix.shape)}; "
                    f"expected ({num_items + 1},) for a catalog of {num_items} items"
                )
            if request.allowed_items is not None:
                listed = listed_within(request.allowed_items, prefix, excluded)
                allowed_keys.append(listed + row * (num_items + 1))
                set_index.append(-1)
                continue
            if prefix is None:
                set_index.append(-1)
            else:
                known = next((i for i, p in enumerate(prefixes) if p is prefix), None)
                if known is None:
                    known = len(prefixes)
                    prefixes.append(prefix)
                set_index.append(known)
            if excluded is not None and excluded.numel():
                excluded_keys.append(excluded_within(excluded, prefix) + row * (num_items + 1))
        return cls(
            num_items=num_items,
            set_index=torch.tensor(set_index, dtype=torch.long, device=device),
            prefixes=tuple(place(p) if place is not None else p.to(device) for p in prefixes),
            excluded_keys=_joined(excluded_keys).to(device),
            has_allow_list=torch.tensor(
                [request.allowed_items is not None for request in requests], device=device
            ),
            allowed_keys=_joined(allowed_keys).to(device),
        )

    def items_left(self, request: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        """Allowed items with index in [lo, hi), for each query.

        Args:
            request: int64 (Q,), row of the batch each query belongs to.
            lo: int64 (Q,).
            hi: int64 (Q,), at least ``lo``, at most N.

        Returns:
            int64 (Q,).
        """
        left = hi - lo
        for index, prefix in enumerate(self.prefixes):
            inside = (prefix[hi] - prefix[lo]).long()
            left = torch.where(self.set_index[request] == index, inside, left)
        base = request * (self.num_items + 1)
        if self.excluded_keys.numel():
            left = left - _count_within(self.excluded_keys, base + lo, base + hi)
        listed = torch.zeros_like(left)
        if self.allowed_keys.numel():
            listed = _count_within(self.allowed_keys, base + lo, base + hi)
        return torch.where(self.has_allow_list[request], listed, left)


def _count_within(keys: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """How many of the ascending ``keys`` (n,) lie in [lo, hi), for each query: int64 (Q,)."""
    return torch.searchsorted(keys, hi) - torch.searchsorted(keys, lo)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.empty(0, dtype=torch.long)
