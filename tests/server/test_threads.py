"""How threads share the interpreter while the service runs."""

from __future__ import annotations

import sys

from server.threads import share_evenly


def test_no_thread_keeps_the_interpreter_for_milliseconds():
    before = sys.getswitchinterval()
    try:
        share_evenly()
        assert sys.getswitchinterval() < 1e-3
    finally:
        sys.setswitchinterval(before)
