"""Passes over prompts: captured, so that launching one is a single call.

A pass is some three hundred kernels. Launched one by one they are slower than the device where
rows are few, and wherever other threads want the interpreter, which every launch gives up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from rectokens.kernels.compile_ahead import compile_ahead
from server.engine.device.graphs import CapturedCall, CaptureError, empty_cache
from server.engine.device.model import DeviceModel
from server.engine.device.prompt_rows import (
    Capacity,
    PromptBlock,
    PromptSlice,
    cut_into_passes,
)

logger = logging.getLogger(__name__)

# Steps of about an eighth: what fills a pass up is computed too. Beyond the last, rows are shared
# out among several passes.
DEFAULT_ROWS = (
    *(64, 128, 256, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1536, 1792, 2048),
    *(2304, 2560, 2816, 3072, 3328, 3584, 3840, 4096),
    *(4608, 5120, 5632, 6144, 6656, 7168, 7680, 8192),
)


class PromptPasses:
    """Runs prompts, by captured passes.

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
        self._rows = tuple(sorted(rows)) if capture and model.device.type == "cuda" else ()
        # By rows, then by whether prompts are long, where that makes a difference.
        self._ready: dict[tuple[int, bool], tuple[PromptBlock, Callable[[], Tensor]]] = {}
        self._long_from: dict[int, int] = {}

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture the passes; takes seconds."""
        if not self._rows:
            return
        stream = torch.cuda.Stream(self._model.device)
        memory = torch.cuda.graph_pool_handle()
        calls: dict[tuple[int, bool], tuple[PromptBlock, Callable[[], Tensor]]] = {}
        for rows in reversed(self._rows):
            long_from = self._model.long_prompts_from(rows)
            if long_from is not None:
                self._long_from[rows] = long_from
            for longest in (0,) if long_from is None else (0, long_from):
                capacity = Capacity(
                    rows, self._requests, self._pages, self._model.tile_rows, longest
                )
                block = PromptBlock(capacity, self._model.pool)
                block.fill(())  # no request: nothing is stored while the call is tried
                calls[rows, longest > 0] = block, partial(self._model.prompt_pass, block)
        compile_ahead(call for _, call in calls.values())
        for kind, (block, call) in calls.items():
            try:
                self._ready[kind] = (block, CapturedCall(call, stream, memory))
            except CaptureError as error:
                logger.warning("passes over prompts run uncaptured: %s", error)
                self._ready.clear()
                break
        empty_cache()

    def __call__(self, slices: Sequence[PromptSlice]) -> Tensor:
        """Compute prompts; see :meth:`DeviceModel.run_prompts`."""
        if not self._ready or any(piece.embeds is not None for piece in slices):
            return self._model.run_prompts(slices)
        passes = share_out(slices, self._rows, self._requests)
        found = []
        for rows, part in passes:
            block, run = self._ready[rows, is_long(part, self._long_from.get(rows))]
            block.fill(part)
            ends = run()[: sum(piece.is_end for piece in part)]
            # The next pass may use the same memory.
            found.append(ends if len(passes) == 1 else ends.clone())
        return torch.cat(found) if len(found) > 1 else found[0]


def is_long(part: Sequence[PromptSlice], long_from: int | None) -> bool:
    """Whether a pass is computed as one of long prompts.

    Args:
        part: its slices.
        long_from: positions from which on a prompt is long; None where none is.
    """
    return long_from is not None and any(piece.end >= long_from for piece in part)


def share_out(
    slices: Sequence[PromptSlice], sizes: Sequence[int], max_prompts: int
) -> list[tuple[int, list[PromptSlice]]]:
    """Passes for some prompts: full ones of the largest size, then what holds the rest.

    Args:
        slices: of the prompts, in order.
        sizes: rows of the passes that there are, ascending.
        max_prompts: of a pass.

    Returns:
        Size and slices of each pass.
    """
    passes = []
    for part in cut_into_passes(slices, sizes[-1], max_prompts):
        rows = sum(piece.count for piece in part)
        passes.append((next(size for size in sizes if size >= rows), part))
    return passes
