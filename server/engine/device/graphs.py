"""CUDA graphs: captured once, replayed; where there are none, the function itself."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Held by a capture. While there is one, in whichever thread, torch gives no memory back: it fails
# who asks for that.
_capturing = threading.Lock()


class CaptureError(RuntimeError):
    """A call that runs cannot be captured."""


def empty_cache() -> None:
    """Give memory back that no tensor uses any more; waits for the end of a capture."""
    with _capturing:
        torch.cuda.empty_cache()


class CapturedCall:
    """A call whose kernels were captured and are replayed.

    Args:
        call: enqueues work that depends on nothing but memory at fixed addresses and waits for
            nothing; its result stays at one address.
        stream: to capture on, not the one that replays.
        pool: handle of the memory that captured calls share: they never run at once. A handle
            whose calls are all gone is of no use any more.

    Raises:
        CaptureError: the call runs, but cannot be captured. Nothing should be captured after
            that: what memory the attempt held is not known.
    """

    def __init__(self, call: Callable[[], Tensor], stream: torch.cuda.Stream, pool: Any) -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Once uncaptured: kernels are compiled and libraries make their workspaces.
            call()
            stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with _capturing:
                self._capture(call, stream, pool)
        torch.cuda.current_stream().wait_stream(stream)

    def _capture(self, call: Callable[[], Tensor], stream: torch.cuda.Stream, pool: Any) -> None:
        try:
            # Other threads copy prompts meanwhile, which must not end the capture.
            self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            self._result = call()
            self._graph.capture_end()
        except Exception as why:
            self._abandon(stream, pool)
            raise CaptureError(f"not captured: {why}") from why

    def _abandon(self, stream: torch.cuda.Stream, pool: Any) -> None:
        """Take the stream and the allocator out of a capture that failed."""
        with contextlib.suppress(RuntimeError):
            self._graph.capture_end()
        with contextlib.suppress(RuntimeError):
            # Where the capture ended in an error, the allocator was not told.
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)

    def __call__(self) -> Tensor:
        """Enqueue the work again; its result, overwritten by the next call."""
        self._graph.replay()
        return self._result
