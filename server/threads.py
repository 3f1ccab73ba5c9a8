"""How threads of one process share the interpreter."""

from __future__ import annotations

import sys

import torch

# Python's own is 5 ms. A thread that launches kernels gives the interpreter up at every launch, and
# whoever computes meanwhile (bodies, prompts, answers) may keep it for that long, with the GPU idle
# and some hundred launches of the batch still to come. Shorter, and switching takes its share.
_SWITCH_S = 1e-4


def share_with_launches(device: torch.device) -> None:
    """Let nobody keep the interpreter for long from a thread that launches kernels on a GPU.

    Where the model runs on the CPU it gives the interpreter up for far longer at a time, and
    changing over more often costs more than it gains.

    Args:
        device: of the model.
    """
    if device.type == "cuda":
        sys.setswitchinterval(_SWITCH_S)
