"""Training windows made of histories on the device, a whole epoch at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from examples.data.batch import PADDING
from examples.scratch.settings import AugmentationSettings

_LENGTHS_TOGETHER = 6
_LEAST_THINNED = 2


@dataclass(frozen=True)
class Histories:
    """Histories end to end.

    Attributes:
        items: int64 (total,), rows of the data.
        lengths: int64 (users,), each at least 1.
    """

    items: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], device: torch.device) -> Histories:
        """Pack sequences.

        Raises:
            ValueError: there are none, or one is empty.
        """
        if not sequences or not all(sequences):
            raise ValueError("training needs at least one history, and none may be empty")
        lengths = torch.tensor([len(one) for one in sequences])
        items = torch.tensor([item for one in sequences for item in one])
        return cls(items.to(device), lengths.to(device))


def epoch_windows(
    histories: Histories,
    settings: AugmentationSettings,
    window: int,
    generator: torch.Generator,
) -> Tensor:
    """Windows of one epoch: int64 (windows, window), ``PADDING`` behind the last item.

    Args:
        histories: whole training parts.
        settings: how they are changed.
        window: most items in one.
        generator: on the histories' device; the draws of the epoch are its.
    """
    thinned = _thin(histories, settings, generator)
    lengths = thinned.lengths
    device = lengths.device
    firsts = lengths.cumsum(0) - lengths
    repeats = (lengths + window - 1) // window
    user = torch.repeat_interleave(torch.arange(len(lengths), device=device), repeats)
    n = lengths[user]
    draw = torch.rand(len(user), generator=generator, device=device, dtype=torch.float64)
    cropped = torch.rand(len(user), generator=generator, device=device) < settings.crop
    # A crop keeps two items, so that something is predicted from something.
    places = torch.where(n > window, n - window + 1, torch.where(cropped & (n > 2), n - 1, 1))
    start = (draw * places).long()
    size = (n - start).clamp(max=window)
    column = torch.arange(window, device=device)
    inside = column < size[:, None]
    order = _order(size, inside, settings, generator)
    picks = (firsts[user] + start)[:, None] + order
    items = thinned.items[picks.clamp(max=len(thinned.items) - 1)]
    return items.masked_fill(~inside, PADDING)


def batches(windows: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of windows of similar length in random order, each cut to its longest."""
    device = windows.device
    sizes = (windows != PADDING).sum(dim=1)
    shuffled = torch.randperm(len(windows), generator=generator, device=device)
    by_length = shuffled[(sizes[shuffled] // _LENGTHS_TOGETHER).argsort(stable=True)]
    chunks = by_length.split(batch_size)
    longest = torch.stack([sizes[chunk].max() for chunk in chunks]).tolist()
    for place in torch.randperm(len(chunks), generator=generator, device=device).tolist():
        yield windows[chunks[place], : longest[place]]


def _thin(
    histories: Histories, settings: AugmentationSettings, generator: torch.Generator
) -> Histories:
    """Histories without the items that are drawn; one that would lose nearly all keeps them."""
    if settings.thin == 0.0 or settings.thin_rate == 0.0:
        return histories
    lengths = histories.lengths
    device = lengths.device
    user = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
    chosen = torch.rand(len(lengths), generator=generator, device=device) < settings.thin
    chosen &= lengths > 3
    drop = torch.rand(len(user), generator=generator, device=device) < settings.thin_rate
    drop &= chosen[user]
    left = lengths - torch.zeros_like(lengths).index_add_(0, user, drop.long())
    drop &= (left >= _LEAST_THINNED)[user]
    kept = torch.zeros_like(lengths).index_add_(0, user, (~drop).long())
    return Histories(histories.items[~drop], kept)


def _order(
    size: Tensor, inside: Tensor, settings: AugmentationSettings, generator: torch.Generator
) -> Tensor:
    """Which item of its stretch stands at each place: int64 (windows, window)."""
    window = inside.shape[1]
    device = size.device
    order = torch.arange(window, device=device).expand(len(size), window)
    if settings.shuffle > 0 and settings.shuffle_span > 0:
        moved = torch.rand(order.shape, generator=generator, device=device) * settings.shuffle_span
        chosen = torch.rand(len(size), generator=generator, device=device) < settings.shuffle
        keys = order + moved * chosen[:, None]
        order = keys.masked_fill(~inside, torch.inf).argsort(dim=1, stable=True)
    if settings.reverse > 0:
        turned = torch.rand(len(size), generator=generator, device=device) < settings.reverse
        column = torch.arange(window, device=device)
        backwards = (size[:, None] - 1 - column).clamp(min=0)
        order = torch.where(turned[:, None], order.gather(1, backwards), order)
    return order
