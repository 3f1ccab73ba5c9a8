"""``triton`` and Gluon with their languages, or stand-ins that let kernel modules be imported.

A kernel can be defined with the stand-ins; looking anything else up in them, as launching would,
raises ImportError.
"""

from __future__ import annotations

from collections.abc import Callable
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


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = _MissingTriton()
try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
except ImportError:  # also of a Triton that has moved it
    gluon = gl = hopper = _MissingTriton()
