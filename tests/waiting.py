"""Waiting for what can be seen; how long is a limit only, for machines that do much else."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

LIMIT_S = 240.0


def wait_until(condition: Callable[[], Any], told: Callable[[], object] = lambda: "") -> Any:
    """The first true value of a condition that is looked at again and again.

    Args:
        condition: of which some value is to be true.
        told: what is to be read where none is.
    """
    ends = time.monotonic() + LIMIT_S
    while not (found := condition()):
        if time.monotonic() > ends:
            _fail(told)
        time.sleep(0.01)
    return found


async def until(condition: Callable[[], Any], told: Callable[[], object] = lambda: "") -> Any:
    """As :func:`wait_until`, while the event loop goes on; the condition may be awaited."""
    ends = time.monotonic() + LIMIT_S
    while True:
        found = condition()
        if inspect.isawaitable(found):
            found = await found
        if found:
            return found
        if time.monotonic() > ends:
            _fail(told)
        await asyncio.sleep(0.005)


def ended(process: subprocess.Popen[Any], told: Callable[[], object] = lambda: "") -> int:
    """Exit code of a process that is about to end; killed, and a failure, if it does not."""
    try:
        return process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        _fail(told)
        raise


def _fail(told: Callable[[], object]) -> None:
    pytest.fail(f"it did not come about within {LIMIT_S:g} s\n{told()}")
