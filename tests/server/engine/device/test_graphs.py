"""Captures beside other threads: torch fails who asks for memory to be given back meanwhile."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from server.engine.device.graphs import CapturedCall, CaptureError
from server.heap import free_garbage


class Device:
    """As torch is with a GPU, as far as captures and cached memory go."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.underway = False
        self.emptied: list[bool] = []  # whether a capture was underway
        device = self

        class Graph:
            def capture_begin(self, **_: Any) -> None:
                device.underway = True

            def capture_end(self) -> None:
                device.underway = False

        for name, fake in {
            "CUDAGraph": Graph,
            "stream": lambda stream: nullcontext(),
            "current_stream": MagicMock(),
            "is_available": lambda: True,
            "empty_cache": lambda: self.emptied.append(self.underway),
        }.items():
            patch.setattr(torch.cuda, name, fake)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *_: None, raising=False)


@pytest.mark.parametrize("fails", [False, True])
def test_memory_is_given_back_between_captures(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    device = Device(monkeypatch)
    other = threading.Thread(target=free_garbage, args=(lambda: None,))

    def call() -> torch.Tensor:
        if device.underway:
            other.start()
            other.join(0.3)
            if fails:
                raise RuntimeError("made to order")
        return torch.zeros(1)

    try:
        CapturedCall(call, MagicMock(), None)
    except CaptureError:
        assert fails
    other.join()
    assert device.emptied == [False]
