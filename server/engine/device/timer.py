"""How long parts of a batch take."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch


class Timer:
    """Seconds between marks, without waiting in between."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._events: list[Any] = []
        self._times: list[float] = []
        self.mark()

    def mark(self) -> None:
        """Note the time at which the device gets here."""
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def wait_for(self, mark: int) -> None:
        """Wait until the device gets to a mark, by number; raises nothing."""
        if self._is_cuda:
            # What failed is told by whoever reads the results.
            with contextlib.suppress(RuntimeError):
                self._events[mark].synchronize()

    def wait(self) -> tuple[float, ...]:
        """Wait for the device; seconds between neighbouring marks."""
        if not self._is_cuda:
            return tuple(b - a for a, b in zip(self._times, self._times[1:], strict=False))
        self._events[-1].synchronize()
        pairs = zip(self._events, self._events[1:], strict=False)
        return tuple(a.elapsed_time(b) / 1e3 for a, b in pairs)
