"""A count model of the training transitions, whose guesses may soften the targets.

The skip-Markov model: two items of a history that are ``gap`` apart count 1 / gap, up to ``reach``
apart; of a context the newest item counts 1, the one before 1/2, then 1/4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from examples.scratch.settings import TeacherSettings
from examples.scratch.windows import PADDING


@dataclass(frozen=True)
class Teacher:
    """Links from each item, heaviest first.

    Attributes:
        items: int64 (N, M), rows of the data; any where the weight is 0.
        weights: float32 (N, M).
        settings: how it is used.
    """

    items: Tensor
    weights: Tensor
    settings: TeacherSettings

    @classmethod
    def of(
        cls,
        train: Sequence[Sequence[int]],
        num_items: int,
        settings: TeacherSettings,
        device: torch.device,
    ) -> Teacher:
        """Count the links of training parts.

        Args:
            train: rows; nothing held out may be among them.
            num_items: N.
            settings: how far links reach, and how many are kept of an item.
            device: where the tensors go.
        """
        links: dict[int, dict[int, float]] = {}
        for history in train:
            for place, item in enumerate(history):
                for gap in range(1, min(settings.reach, place) + 1):
                    row = links.setdefault(history[place - gap], {})
                    row[item] = row.get(item, 0.0) + 1.0 / gap
        width = min(settings.neighbours, max(map(len, links.values()), default=1))
        items = np.zeros((num_items, width), dtype=np.int64)
        weights = np.zeros((num_items, width), dtype=np.float32)
        for item, row in links.items():
            heaviest = sorted(row.items(), key=lambda link: (-link[1], link[0]))[:width]
            items[item, : len(heaviest)] = [to for to, _ in heaviest]
            weights[item, : len(heaviest)] = [weight for _, weight in heaviest]
        return cls(
            torch.from_numpy(items).to(device), torch.from_numpy(weights).to(device), settings
        )

    def guesses(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """What the counts expect at every place of a window, from the items before it.

        With ``leave_own_out`` the links that this very place added to the counts are taken off:
        what is left is what the other users say. Items that the window has before that place are
        no guesses.

        Args:
            windows: int64 (B, T), ``PADDING`` at the end.

        Returns:
            Items int64 (B, T, reach * M) and weights float32 of the same shape, 0 where there is
            no guess; an item may occur more than once.
        """
        found, weighed = [], []
        for gap in range(1, self.settings.reach + 1):
            before = torch.full_like(windows, PADDING)
            before[:, gap:] = windows[:, :-gap]
            items = self.items[before.clamp(min=0)]
            weights = self.weights[before.clamp(min=0)]
            if self.settings.leave_own_out:
                own = items == windows[..., None]
                weights = (weights - own.float() / gap).clamp(min=0.0)
            known = (before != PADDING) & (windows != PADDING)
            # What is left of a difference of sums like 1/3 + 1/2 is not quite 0.
            weights = weights.where(weights > 1e-4, 0.0) * known[..., None]
            found.append(items)
            weighed.append(weights * 0.5 ** (gap - 1))
        items, weights = torch.cat(found, dim=2), torch.cat(weighed, dim=2)
        for age in range(1, windows.shape[1]):
            earlier = torch.full_like(windows, PADDING)
            earlier[:, age:] = windows[:, :-age]
            weights = weights.masked_fill(items == earlier[..., None], 0.0)
        return items, weights

    def resample(self, windows: Tensor, generator: torch.Generator) -> Tensor:
        """Windows of which some end earlier, at an item drawn from the guesses for that place.

        Args:
            windows: int64 (B, T), ``PADDING`` at the end.
            generator: on their device.
        """
        if self.settings.sampled == 0.0 or windows.shape[1] < 2:
            return windows
        device = windows.device
        sizes = (windows != PADDING).sum(dim=1)
        chosen = torch.rand(len(windows), generator=generator, device=device)
        chosen = (chosen < self.settings.sampled) & (sizes >= 2)
        rows = chosen.nonzero()[:, 0]
        if not len(rows):
            return windows
        draw = torch.rand(len(rows), generator=generator, device=device, dtype=torch.float64)
        last = 1 + (draw * (sizes[rows] - 1)).long()
        column = torch.arange(windows.shape[1], device=device)
        cut = windows[rows].masked_fill(column > last[:, None], PADDING)
        items, weights = self.guesses(cut)
        place = torch.arange(len(rows), device=device)
        items, weights = items[place, last], weights[place, last]
        guessed = weights.sum(dim=1) > 0
        # A row without any guess is drawn from at random, and the draw is not used.
        drawn = torch.multinomial(weights + (~guessed).float()[:, None], 1, generator=generator)
        cut[place, last] = torch.where(guessed, items.gather(1, drawn)[:, 0], cut[place, last])
        out = windows.clone()
        out[rows[guessed]] = cut[guessed]
        return out
