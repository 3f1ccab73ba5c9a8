"""The device a command computes on."""

from __future__ import annotations

import torch


def checked_device(name: str) -> torch.device:
    """A device that is there.

    Raises:
        ValueError: a name torch does not know, or CUDA on a machine without it.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; expected cpu, cuda or cuda:<number>") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; expected cpu, cuda or cuda:<number>")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but torch sees {torch.cuda.device_count()} GPUs")
    return device
