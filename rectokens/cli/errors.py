"""How a command fails: one message, an exit code, and nothing half written."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import ParamSpec, TypeVar

import typer

TRACEBACK_VARIABLE = "RECTOKENS_TRACEBACK"
_EXPECTED = (ValueError, OSError, RuntimeError, TypeError, ImportError)

P = ParamSpec("P")
R = TypeVar("R")


def one_message(command: Callable[P, R]) -> Callable[P, R]:
    """Turn an exception of a command into one line on stderr and exit code 1.

    With the environment variable ``RECTOKENS_TRACEBACK`` set, the exception passes through.
    """

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except Exception as error:
            if isinstance(error, typer.Exit) or os.environ.get(TRACEBACK_VARIABLE):
                raise
            print(f"error: {message_of(error)}", file=sys.stderr)
            raise typer.Exit(1) from None

    return guarded


def message_of(error: Exception) -> str:
    """What to tell a user of an exception, on one line."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    elif isinstance(error, MemoryError):
        text = f"out of memory {error}".rstrip()
    else:
        text = str(error) or type(error).__name__
        if not isinstance(error, _EXPECTED):
            text = f"unexpected {type(error).__name__}: {text}"
    return " ".join(text.split())


def exit_on_sigterm() -> None:
    """Make SIGTERM unwind the stack, so that temporary files are removed on the way out."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
