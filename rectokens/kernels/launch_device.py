"""Where kernels are launched. Nothing here is public."""

from __future__ import annotations

import contextlib
from functools import lru_cache
from typing import Any

import torch


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within, launches go to ``device``; without CUDA nothing changes."""
    # Triton launches on the current device, which need not be the tensors'.
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device, interpreted: int = 1) -> int:
    """Of a CUDA device; ``interpreted`` elsewhere: few programs, so that their loops run."""
    if device.type != "cuda":
        return interpreted
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
