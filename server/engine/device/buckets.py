"""Which shapes are captured, and how a batch is shared out among them. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_LOOSE_STEP = 256  # widths that are not captured are rounded up to multiples of this
# What a search costs beside its beams, in beam rows: weights are read for every step, which takes
# as long as computing some hundred rows with them.
_SEARCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class Buckets:
    """Shapes of searches that are captured.

    Attributes:
        requests: ascending.
        beam_widths: ascending.
        max_rows: most beam rows, requests times beam width, of one captured search; bounds the
            memory of beam KV and logits.
    """

    requests: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    beam_widths: tuple[int, ...] = (64, 256, 1024)
    max_rows: int = 4_096

    def __post_init__(self) -> None:
        for name in ("requests", "beam_widths"):
            values = getattr(self, name)
            if list(values) != sorted(set(values)) or (values and values[0] < 1):
                raise ValueError(f"{name} are {values}; they must be distinct, ascending, positive")
        if self.max_rows < 1:
            raise ValueError(f"max_rows is {self.max_rows}; it must be at least 1")

    def shapes(self) -> list[tuple[int, int]]:
        """(requests, beam width) of every search that is captured, widest rows first."""
        pairs = [
            (requests, width)
            for requests in self.requests
            for width in self.beam_widths
            if requests * width <= self.max_rows
        ]
        return sorted(pairs, key=lambda pair: -pair[0] * pair[1])


@dataclass(frozen=True, slots=True)
class Group:
    """Requests of a batch that are searched together.

    Attributes:
        members: places in the batch.
        batch: B of the search; places past the members stay empty.
        width: W of the search, at least every member's.
        captured: whether the shape is one of the buckets.
    """

    members: tuple[int, ...]
    batch: int
    width: int
    captured: bool


def group_requests(widths: Sequence[int], buckets: Buckets, max_width: int) -> list[Group]:
    """Share out a batch: like widths together, places that stay free to narrower ones.

    Args:
        widths: beam width of each request.
        buckets: what is captured.
        max_width: largest width a search may have.
    """
    order = sorted(range(len(widths)), key=lambda place: -widths[place])
    groups = []
    first = 0
    while first < len(order):
        widest = widths[order[first]]
        width = next((w for w in buckets.beam_widths if w >= widest), None)
        fitting = [n for n in buckets.requests if width and n * width <= buckets.max_rows]
        captured = width is not None and bool(fitting)
        if width is None or not fitting:
            width = min(-(-widest // _LOOSE_STEP) * _LOOSE_STEP, max_width)
            fitting = [max(buckets.max_rows // width, 1)]
        narrower = max((w for w in buckets.beam_widths if w < widest), default=0)
        alike = sum(widths[place] > narrower for place in order[first:])
        wanted = min(alike, fitting[-1])
        batch = _first_of(wanted, width, tuple(fitting)) if captured else wanted
        members = tuple(order[first : first + batch])
        groups.append(Group(members, batch, width, captured))
        first += len(members)
    return groups


def _first_of(wanted: int, width: int, sizes: tuple[int, ...]) -> int:
    """Requests of the first of the searches that together cost least for so many.

    Args:
        wanted: requests, at most the largest size.
        width: W of each.
        sizes: ascending.
    """
    cost, first = [0], [0]
    for count in range(1, wanted + 1):
        whole = next(size for size in sizes if size >= count)
        options = [(whole * width + _SEARCH_ROWS, whole)]
        options += [
            (size * width + _SEARCH_ROWS + cost[count - size], size)
            for size in reversed(sizes)
            if size < count
        ]
        least, size = min(options, key=lambda option: option[0])
        cost.append(least)
        first.append(size)
    return first[wanted]
