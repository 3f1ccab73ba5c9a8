"""The options of a batch in static device tensors, for beam steps that were captured once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rectokens.decoding.device_tables import copy_to_device
from rectokens.ops.counter_rng import signed64
from rectokens.schemas.search import NORMALIZATIONS, SearchRequest

_INT32_FIELDS = 6


class RequestTables:
    """What each of up to B requests asked for; their addresses never change.

    ``load`` fills them for a batch with one small copy, enqueued on the current stream: the host
    does not wait. Rows past the batch ask for no beams, so they cost next to nothing.

    Args:
        batch: B, requests of a batch at most.
        max_exclusions: items that the requests of a batch exclude, or list as the only ones
            allowed, all together at most.
        device: where to search.

    Attributes:
        beam_width: int32 (B,), 0 in rows that hold no request.
        normalization: int32 (B,), position in ``NORMALIZATIONS``.
        temperature: float32 (B,).
        seed: int64 (B,).
        prefixes: int64 (B,), address of the request's constraint set, int32 (N + 1,) prefix sums
            on ``device``; 0 for none.
        exclusions: int32 (max_exclusions,), item indices, ascending in each request: those it
            excludes; or those of its allow-list less what it excludes.
        allow_list: int32 (B,), 1 where they are an allow-list.
        exclusion_start: int32 (B,), first of a request's own among them.
        exclusion_end: int32 (B,), one past the last.
        exclusion_counts: int32 (max_exclusions + B,), scratch of the steps: how many of the
            first i of a request's exclusions its constraint set contains.
        requests: the batch loaded last.
    """

    def __init__(self, batch: int, max_exclusions: int, device: torch.device | str) -> None:
        if batch < 1 or max_exclusions < 0:
            raise ValueError(
                f"batch is {batch} and max_exclusions {max_exclusions}; "
                "they must be at least 1 and 0"
            )
        self.batch = batch
        self.max_exclusions = max_exclusions
        self.requests: tuple[SearchRequest, ...] = ()
        # One block of 64-bit words, so that loading a batch is one copy.
        words = 2 * batch + (_INT32_FIELDS * batch + max_exclusions + 1) // 2
        self._block = torch.zeros(words, dtype=torch.long, device=device)
        self._fields(self._block)
        self.exclusion_counts = torch.zeros(
            max_exclusions + batch, dtype=torch.int32, device=self._block.device
        )
        self._kept: list[Tensor] = []

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self._block.device

    def load(self, requests: Sequence[SearchRequest], num_items: int) -> None:
        """Make ``requests`` the batch.

        A constraint set that is on the device already is used where it lies and kept alive until
        the next batch is loaded; another one is copied there first.

        Args:
            requests: at most B, whose filters are for the catalog that is searched.
            num_items: N of that catalog.

        Raises:
            ValueError: too many requests or exclusions, or a filter for another catalog.
        """
        if len(requests) > self.batch:
            raise ValueError(f"the batch has {len(requests)} requests; at most {self.batch} fit")
        host = torch.zeros_like(self._block, device="cpu")
        view = _Fields(host, self.batch, self.max_exclusions)
        kept = []
        filled = 0
        for row, request in enumerate(requests):
            view.beam_width[row] = request.beam_width
            view.normalization[row] = NORMALIZATIONS.index(request.normalization)
            view.temperature[row] = request.temperature
            view.seed[row] = signed64(request.seed)
            if request.allowed_prefix is not None:
                prefix = _prefix_on(request.allowed_prefix, num_items, self.device)
                kept.append(prefix)
                view.prefixes[row] = prefix.data_ptr()
            view.allow_list[row] = request.allowed_items is not None
            # From here on, so that rows past the batch have a place of their own too.
            view.exclusion_start[row:] = view.exclusion_end[row:] = filled
            items = _listed_items(request, num_items)
            if items is not None:
                end = filled + items.numel()
                if end > self.max_exclusions:
                    raise ValueError(
                        f"the requests list {end} items or more to exclude or allow; "
                        f"at most {self.max_exclusions} fit"
                    )
                view.exclusions[filled:end] = items
                filled = end
                view.exclusion_start[row + 1 :] = view.exclusion_end[row:] = filled
        self.requests = tuple(requests)
        self._kept = kept
        copy_to_device(self._block, host)

    def _fields(self, block: Tensor) -> None:
        view = _Fields(block, self.batch, self.max_exclusions)
        self.seed, self.prefixes = view.seed, view.prefixes
        self.beam_width, self.normalization = view.beam_width, view.normalization
        self.temperature = view.temperature
        self.exclusion_start, self.exclusion_end = view.exclusion_start, view.exclusion_end
        self.allow_list, self.exclusions = view.allow_list, view.exclusions


class _Fields:
    """Views of one block of 64-bit words."""

    def __init__(self, block: Tensor, batch: int, max_exclusions: int) -> None:
        self.seed, self.prefixes = block[: 2 * batch].view(2, batch).unbind()
        narrow = block[2 * batch :].view(torch.int32)
        columns = narrow[: _INT32_FIELDS * batch].view(_INT32_FIELDS, batch)
        self.beam_width, self.normalization, heat = columns[:3].unbind()
        self.temperature = heat.view(torch.float32)
        self.exclusion_start, self.exclusion_end, self.allow_list = columns[3:].unbind()
        self.exclusions = narrow[_INT32_FIELDS * batch :][:max_exclusions]


def _prefix_on(prefix: Tensor, num_items: int, device: torch.device) -> Tensor:
    if prefix.shape != (num_items + 1,) or prefix.dtype != torch.int32:
        raise ValueError(
            f"allowed_prefix is {prefix.dtype} of shape {tuple(prefix.shape)}; expected "
            f"torch.int32 ({num_items + 1},) for a catalog of {num_items} items"
        )
    return prefix.to(device, non_blocking=True).contiguous()


def _listed_items(request: SearchRequest, num_items: int) -> Tensor | None:
    """What a request excludes, or what is left of its allow-list; int32, None for neither."""
    excluded = _checked("excluded_items", request.excluded_items, num_items)
    allowed = _checked("allowed_items", request.allowed_items, num_items)
    if allowed is None:
        return excluded
    if excluded is not None:
        allowed = allowed[torch.isin(allowed, excluded, assume_unique=True, invert=True)]
    return allowed


def _checked(name: str, items: Tensor | None, num_items: int) -> Tensor | None:
    if items is None or not items.numel():
        return None if items is None else torch.empty(0, dtype=torch.int32)
    items = items.to("cpu", torch.int64)
    low, high = int(items[0]), int(items[-1])
    if low < 0 or high >= num_items or bool((items.diff() <= 0).any()):
        raise ValueError(
            f"{name} span {low} to {high} and must be ascending, distinct and within 0 to "
            f"{num_items - 1}, the items of the catalog"
        )
    return items.to(torch.int32)
