"""Passes over prompts: captured for few rows, where launching costs more than computing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from server.engine.device.graphs import CapturedCall, CaptureError
from server.engine.device.model import DeviceModel
from server.engine.device.prompt_rows import Capacity, PromptBlock, PromptSlice

logger = logging.getLogger(__name__)

DEFAULT_ROWS = (64, 128, 256, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1536, 1792, 2048)


class PromptPasses:
    """Runs prompts, by a captured pass where one fits.

    Args:
        model: what computes them.
        rows: numbers of rows that passes are captured for, ascending.
        requests: most prompts of a captured pass.
        pages: most pages of a prompt.
        capture: whether to capture at all.
    """

    def __init__(
        self, model: DeviceModel, rows: Sequence[int], requests: int, pages: int, *, capture: bool
    ) -> None:
        self._model = model
        self._requests = requests
        self._pages = pages
        self._rows = tuple(rows) if capture and model.device.type == "cuda" else ()
        self._ready: dict[int, tuple[PromptBlock, Callable[[], Tensor]]] = {}

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture the passes; takes seconds."""
        if not self._rows:
            return
        stream = torch.cuda.Stream(self._model.device)
        memory = torch.cuda.graph_pool_handle()
        for rows in reversed(self._rows):
            capacity = Capacity(rows, self._requests, self._pages, self._model.tile_rows)
            block = PromptBlock(capacity, self._model.pool)
            block.fill(())  # no request: nothing is stored while the call is tried

            def call(block: PromptBlock = block) -> Tensor:
                return self._model.prompt_pass(block)

            try:
                self._ready[rows] = (block, CapturedCall(call, stream, memory))
            except CaptureError as error:
                logger.warning("passes over prompts run uncaptured: %s", error)
                self._ready.clear()
                break
        torch.cuda.empty_cache()

    def __call__(self, slices: Sequence[PromptSlice]) -> Tensor:
        """Compute prompts; see :meth:`DeviceModel.run_prompts`."""
        rows = sum(piece.count for piece in slices)
        bucket = next((size for size in sorted(self._ready) if size >= rows), None)
        if (
            bucket is None
            or len(slices) > self._requests
            or any(piece.embeds is not None for piece in slices)
        ):
            return self._model.run_prompts(slices)
        block, run = self._ready[bucket]
        block.fill(slices)
        return run()[: len(slices)]
