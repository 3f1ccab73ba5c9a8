"""The one place where a kernel or a reference is picked for an op.

Every op is a torch custom op whose implementation on every device is its plain PyTorch
reference. A kernel is given here as ``cuda=`` and takes over for tensors on a CUDA device; torch's
dispatcher does the picking, call by call, from then on.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch


def define_op(
    name: str,
    reference: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register an op that returns new tensors and changes none, and return it to be called.

    Args:
        name: ``namespace::op``.
        reference: plain PyTorch, annotated with types that make a schema; the definition.
        fake: shapes and dtypes of the results, without computing them (for ``torch.compile``).
        cuda: a faster implementation for CUDA tensors, or None where there is none: the
            reference then runs there too.
    """
    op = torch.library.custom_op(name, reference, mutates_args=())
    op.register_fake(fake)
    if cuda is not None:
        op.register_kernel("cuda", cuda)
    return op


@lru_cache(maxsize=1)
def triton_is_installed() -> bool:
    """Whether kernels can run; modules of kernels import triton only once one does."""
    return importlib.util.find_spec("triton") is not None
