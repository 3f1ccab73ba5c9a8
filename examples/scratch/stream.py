"""The batches of a whole training, from any step on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from examples.scratch.settings import AugmentationSettings
from examples.scratch.teacher import Teacher
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
        teacher: changes where windows end, if it is set to; None leaves them.
    """

    def __init__(
        self,
        histories: Histories,
        augmentation: AugmentationSettings,
        window: int,
        batch_size: int,
        seed: int,
        teacher: Teacher | None = None,
    ) -> None:
        self._histories, self._augmentation, self._window = histories, augmentation, window
        self._batch_size, self._seed, self._teacher = batch_size, seed, teacher
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
        if self._teacher is not None:
            windows = self._teacher.resample(windows, generator)
        return list(batches(windows, self._batch_size, generator))
