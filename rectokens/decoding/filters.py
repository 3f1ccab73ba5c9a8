"""Filters of a batch: which items each request may be given (counted, never scored)."""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True, slots=True)
class BatchFilters:
    """The filters of B requests over one catalog of N items, on one device.

    Attributes:
        num_items: N.
        set_index: int64 (B,), position in ``prefixes``, -1 for requests without a set.
        prefixes: the distinct prefix sums in use, each int32 (N + 1,).
        excluded_keys: int64 (X,), ascending; ``request * (N + 1) + item`` of every exclusion.
    """

    num_items: int
    set_index: Tensor
    prefixes: tuple[Tensor, ...]
    excluded_keys: Tensor

    @classmethod
    def from_requests(
        cls, requests: Sequence[SearchRequest], num_items: int, device: torch.device
    ) -> BatchFilters:
        """Collect the filters of a batch.

        Raises:
            ValueError: a filter made for a catalog of another size.
        """
        prefixes: list[Tensor] = []
        set_index = []
        keys = []
        for row, request in enumerate(requests):
            prefix = request.allowed_prefix
            if prefix is None:
                set_index.append(-1)
            else:
                if prefix.shape != (num_items + 1,):
                    raise ValueError(
                        f"allowed_prefix has shape {tuple(prefix.shape)}; "
                        f"expected ({num_items + 1},) for a catalog of {num_items} items"
                    )
                known = next((i for i, p in enumerate(prefixes) if p is prefix), None)
                if known is None:
                    known = len(prefixes)
                    prefixes.append(prefix)
                set_index.append(known)
            if request.excluded_items is not None and request.excluded_items.numel():
                excluded = excluded_within(request.excluded_items, prefix)
                if excluded.numel():
                    keys.append(excluded + row * (num_items + 1))
        return cls(
            num_items=num_items,
            set_index=torch.tensor(set_index, device=device),
            prefixes=tuple(prefix.to(device) for prefix in prefixes),
            excluded_keys=(
                torch.cat(keys).to(device)
                if keys
                else torch.empty(0, dtype=torch.long, device=device)
            ),
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
        if self.excluded_keys.numel():
            base = request * (self.num_items + 1)
            left = left - (
                torch.searchsorted(self.excluded_keys, base + hi)
                - torch.searchsorted(self.excluded_keys, base + lo)
            )
        return left
