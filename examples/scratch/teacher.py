"""A count model of the training transitions, which gives language models more to learn from.

A history shows one of many items that could have come next. Counts over all histories, smoothed
with the likeness of texts, know others; a target drawn from them beside each true one is
distillation of the count model into the language model (Hinton, Vinyals & Dean 2015), and the
language model generalises beyond it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from examples.data.batch import PADDING
from examples.data.neighbours import nearest_texts, pairs_by_gap
from examples.scratch.settings import TeacherSettings

NO_TARGET = -1


@dataclass(frozen=True)
class Teacher:
    """Weights of items that may follow an item, as sparse rows.

    Attributes:
        firsts: int64 (N + 1,), where each row begins.
        items: int64 (M,), rows of the data.
        sums: float64 (M + 1,), running sums of the weights, from 0.
        mass: float64 (N,), sum of each row.
        settings: how contexts are weighed.
    """

    firsts: Tensor
    items: Tensor
    sums: Tensor
    mass: Tensor
    settings: TeacherSettings

    @classmethod
    def of(
        cls,
        train: Sequence[Sequence[int]],
        texts: NDArray[np.float32],
        settings: TeacherSettings,
        device: torch.device,
    ) -> Teacher:
        """Count the pairs of training parts, and add what texts have in common.

        Args:
            train: rows; nothing held out may be among them.
            texts: float32 (N, D), embeddings of the items' texts.
            settings: how.
            device: where the tensors go.
        """
        num_items = len(texts)
        counted, counts = _pairs(train, num_items, settings.reach, settings.gap_decay)
        near, likeness = _near_texts(texts, settings.text_neighbours, settings.text_power)
        places, where = np.unique(np.concatenate([counted, near]), return_inverse=True)
        weights = np.concatenate([counts, settings.text_weight * likeness])
        summed = np.bincount(where, weights=weights, minlength=len(places))
        places, summed = places[summed > 0], summed[summed > 0]
        rows = places // num_items
        firsts = np.zeros(num_items + 1, dtype=np.int64)
        firsts[1:] = np.bincount(rows, minlength=num_items).cumsum()
        sums = np.concatenate([[0.0], summed.cumsum()])
        mass = np.bincount(rows, weights=summed, minlength=num_items)
        return cls(
            firsts=torch.from_numpy(firsts).to(device),
            items=torch.from_numpy(places % num_items).to(device),
            sums=torch.from_numpy(sums).to(device),
            mass=torch.from_numpy(mass).to(device),
            settings=settings,
        )

    def targets(self, windows: Tensor) -> Tensor:
        """For every place of windows a drawn item that may follow the items up to it.

        An item's weight is the sum over the newest items of ``decay`` to their age times theirs
        for it. ``NO_TARGET`` stands where the draw is an item of the context, and behind the last
        item.

        Args:
            windows: int64 (B, M), ``PADDING`` at the end.

        Returns:
            int64 (B, M).
        """
        M = windows.shape[1]
        inside = windows != PADDING
        known = windows.clamp(min=0)
        mass = self.mass[known] * inside
        ages = min(self.settings.context, M)
        by_age = torch.stack(
            [
                torch.nn.functional.pad(mass[:, : M - age], (age, 0)) * self.settings.decay**age
                for age in range(ages)
            ],
            dim=2,
        )
        # A place whose items have no row at all draws at random, and the draw is not used.
        age = torch.multinomial(by_age.flatten(0, 1).clamp(min=1e-30), 1).view_as(windows)
        place = torch.arange(M, device=windows.device)
        source = known.gather(1, (place - age).clamp(min=0))
        first, end = self.firsts[source], self.firsts[source + 1]
        low, high = self.sums[first], self.sums[end]
        draw = low + (high - low) * torch.rand(
            windows.shape, device=windows.device, dtype=torch.float64
        )
        index = torch.searchsorted(self.sums, draw, right=True) - 1
        index = torch.minimum(torch.maximum(index, first), end - 1).clamp(min=0)
        drawn = self.items[index]
        earlier = place[None, :] <= place[:, None]
        seen = ((drawn[:, :, None] == windows[:, None, :]) & earlier).any(dim=2)
        usable = inside & ~seen & (by_age.sum(dim=2) > 0)
        return torch.where(usable, drawn, NO_TARGET)


def _pairs(
    train: Sequence[Sequence[int]], num_items: int, reach: int, gap_decay: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Pairs ``before * N + after`` up to ``reach`` apart, and ``gap_decay ** (gap - 1)`` each."""
    pairs, weights = [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
    for gap, before, after in pairs_by_gap(train, reach):
        pairs.append(before * num_items + after)
        weights.append(np.full(len(before), gap_decay ** (gap - 1)))
    return np.concatenate(pairs), np.concatenate(weights)


def _near_texts(
    texts: NDArray[np.float32], count: int, power: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Pairs of each item and its ``count`` nearest texts, with shares of likeness ** power."""
    unit = torch.nn.functional.normalize(torch.from_numpy(texts), dim=1)
    pairs, weights = [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
    for row, cosines, near in nearest_texts(unit, count):
        raised = cosines.double().clamp(min=0.0) ** power
        shares = raised / raised.sum(dim=1, keepdim=True).clamp(min=1e-12)
        pairs.append((row[:, None] * len(unit) + near).flatten().numpy())
        weights.append(shares.flatten().numpy())
    return np.concatenate(pairs), np.concatenate(weights)
