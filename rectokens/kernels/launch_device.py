"""Where kernels are launched. Nothing here is public."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within, launches go to ``device``; without CUDA nothing changes."""
    # Triton launches on the current device, which need not be the tensors'.
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
