"""The batches of a whole training, from any step on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from examples.scratch.settings import AugmentationSettings
from examples.scratch.windows import Histories, batches, epoch_windows

# Seeds of the epochs of neighbouring runs stay apart.
_SEED_STRIDE = 1_000_003


class WindowStream:
    """Windows of every epoch in batches; epoch and seed alone decide what is drawn.

    Args:
        histories: whole training parts.
        augmentation: how they are changed.
        window: most items in a window.
        batch_size: windows in a batch.
        seed: of all draws.
    """

    def __init__(
        self,
        histories: Histories,
        augmentation: AugmentationSettings,
        window: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self._histories, self._augmentation, self._window = histories, augmentation, window
        self._batch_size, self._seed = batch_size, seed
        self.steps_per_epoch = len(self._epoch(0))
        """Batches of the first epoch; later ones may have a few more or fewer."""

    def from_step(self, step: int) -> Iterator[Tensor]:
        """Batches int64 (up to batch_size, up to window), without end, the first ``step`` skipped.

        ``PADDING`` stands behind a window's last item.
        """
        epoch = 0
        while True:
            plan = self._epoch(epoch)
            if step < len(plan):
                yield from plan[step:]
                step = 0
            else:
                step -= len(plan)
            epoch += 1

    def _epoch(self, epoch: int) -> list[Tensor]:
        generator = torch.Generator(self._histories.items.device)
        generator.manual_seed(self._seed * _SEED_STRIDE + epoch)
        windows = epoch_windows(self._histories, self._augmentation, self._window, generator)
        return list(batches(windows, self._batch_size, generator))
