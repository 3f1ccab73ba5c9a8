"""Nearest-codeword search as torch custom ops, ``kmeans::quantize`` and ``kmeans::quantize_mm``.

The plain PyTorch search serves every device. A device kernel takes over by registering itself on
the op below (``_quantize.register_kernel("cuda")``); checks, fakes and callers stay as they are.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from rectokens.ops.nearest_reference import nearest_exact, nearest_expanded, squared_distances

Precision = Literal["float32", "tf32"]
"""``float32``: exact to float32. ``tf32``: the implementation may round products, as the
tensor cores' TF32 does, and skip the second look at near ties: faster, not exact."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def quantize_fwd(x: Tensor, codebook: Tensor, *, precision: Precision = "float32") -> Tensor:
    """Index of the nearest codebook row in L2 distance, the lowest one on ties (scan over N).

    Args:
        x: (B, D), any real dtype, any D.
        codebook: (N, D), N >= 1, on the same device.
        precision: see :data:`Precision`.

    Returns:
        long (B,).

    Raises:
        AssertionError: ``x`` and ``codebook`` differ in D or in device.
        ValueError: not two-dimensional, an empty codebook, or an unknown precision.
    """
    _check(x, codebook, precision)
    codes: Tensor = _quantize(x.detach(), codebook.detach(), precision)
    return codes


def quantize_fwd_mm(
    x: Tensor, codebook: Tensor, *, precision: Precision = "float32"
) -> tuple[Tensor, Tensor]:
    """As :func:`quantize_fwd`, by B x N tiles, with the distance of the row found.

    Returns:
        long (B,) and float32 (B,), the squared L2 distance, summed from differences.
    """
    _check(x, codebook, precision)
    found: tuple[Tensor, Tensor] = _quantize_mm(x.detach(), codebook.detach(), precision)
    return found


def _check(x: Tensor, codebook: Tensor, precision: str) -> None:
    if x.ndim != 2 or codebook.ndim != 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and codebook {tuple(codebook.shape)}; "
            f"expected (B, D) and (N, D)"
        )
    # The contract names AssertionError; raised by hand, so that python -O keeps the checks.
    if x.shape[1] != codebook.shape[1]:
        raise AssertionError(
            f"x has D = {x.shape[1]} and codebook D = {codebook.shape[1]}; they must be equal"
        )
    if x.device != codebook.device:
        raise AssertionError(
            f"x is on {x.device} and codebook on {codebook.device}; use one device"
        )
    if codebook.shape[0] < 1:
        raise ValueError("codebook has 0 rows; it needs at least 1")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; allowed are {', '.join(PRECISIONS)}")


def _search(x: Tensor, codebook: Tensor, precision: str) -> Tensor:
    return (nearest_exact if precision == "float32" else nearest_expanded)(x, codebook)


@torch.library.custom_op("kmeans::quantize", mutates_args=())
def _quantize(x: Tensor, codebook: Tensor, precision: str = "float32") -> Tensor:
    return _search(x, codebook, precision)


@torch.library.custom_op("kmeans::quantize_mm", mutates_args=())
def _quantize_mm(x: Tensor, codebook: Tensor, precision: str = "float32") -> tuple[Tensor, Tensor]:
    codes = _search(x, codebook, precision)
    return codes, squared_distances(x, codebook, codes)


@_quantize.register_fake
def _(x: Tensor, codebook: Tensor, precision: str = "float32") -> Tensor:
    return x.new_empty((x.shape[0],), dtype=torch.long)


@_quantize_mm.register_fake
def _(x: Tensor, codebook: Tensor, precision: str = "float32") -> tuple[Tensor, Tensor]:
    size = (x.shape[0],)
    return x.new_empty(size, dtype=torch.long), x.new_empty(size, dtype=torch.float32)
