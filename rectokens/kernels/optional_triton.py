"""``triton`` and Gluon with their languages, or stand-ins that let kernel modules be imported.

A kernel can be defined with the stand-ins; looking anything else up in them, as launching would,
raises ImportError.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

__all__ = ["gl", "gluon", "hopper", "tl", "triton"]

_T = TypeVar("_T")


class _MissingTriton:
    """What module level code of a kernel file touches, and nothing more."""

    @staticmethod
    def jit(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
        """A decorator that leaves a function as it is: nobody can launch it."""
        return _MissingTriton.jit if function is None else function

    @staticmethod
    def constexpr(value: _T) -> _T:
        """The value itself."""
        return value

    def __getattr__(self, name: str) -> Any:
        raise ImportError(
            f"triton is not installed, and {name!r} of it is needed; install rectokens[triton]"
        )


def _parse_alone(jit_function: Any) -> None:
    """Let one thread at a time parse sources of kernels.

    Before Python 3.12 a collection of garbage within ``ast.parse`` can let other threads run, and
    two that parse then stumble over a depth that they share ("AST constructor recursion depth
    mismatch"). Triton would not get over it: what identifies the kernel stays half made.
    """
    parse, alone = jit_function.parse, threading.RLock()

    @wraps(parse)
    def parse_alone(self: Any) -> Any:
        with alone:
            return parse(self)

    jit_function.parse = parse_alone


try:
    import triton
    import triton.language as tl

    if sys.version_info < (3, 12):
        _parse_alone(triton.JITFunction)
except ImportError:
    triton = tl = _MissingTriton()
try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
except ImportError:  # also of a Triton that has moved it
    gluon = gl = hopper = _MissingTriton()
