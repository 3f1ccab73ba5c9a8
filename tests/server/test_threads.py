"""How threads share the interpreter beside a model."""

from __future__ import annotations

import sys

import pytest
import torch

from server.threads import share_with_launches


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nobody_keeps_the_interpreter_for_milliseconds_beside_a_gpu(device):
    before = sys.getswitchinterval()
    try:
        share_with_launches(torch.device(device))
        assert (sys.getswitchinterval() < 1e-3) == (device == "cuda" or before < 1e-3)
    finally:
        sys.setswitchinterval(before)
