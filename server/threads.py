"""How threads of one process share the interpreter."""

from __future__ import annotations

import sys

# Python's own is 5 ms. A thread that launches kernels gives the interpreter up at every launch, and
# whoever computes meanwhile (bodies, prompts, answers) keeps it for that long, so that a batch of
# some hundred launches waits for all that work. Shorter, and switching itself takes its share.
_SWITCH_S = 1e-4


def share_evenly() -> None:
    """Let no thread of this process keep the interpreter for long while another one wants it."""
    sys.setswitchinterval(_SWITCH_S)
