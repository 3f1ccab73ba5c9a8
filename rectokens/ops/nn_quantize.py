"""Nearest-codeword search: one codebook, or the residual codes of several."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rectokens.kernels.nn_quantize import quantize_fwd, residual_quantize_fwd


def nearest_neighbor_quantize(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest codebook row in L2 distance, exact to float32, lowest on ties.

    Args:
        x: (B, D).
        codebook: (N, D), N >= 1.

    Returns:
        long (B,).

    Raises:
        AssertionError: ``x`` and ``codebook`` differ in D or in device.
        ValueError: not two-dimensional, or an empty codebook.
    """
    return quantize_fwd(x, codebook)


def residual_quantize(x: Tensor, codebooks: Sequence[Tensor]) -> Tensor:
    """Residual codes: at each level the nearest row to what the levels before left over.

    Args:
        x: (B, D).
        codebooks: L tensors (K_l, D), in the dtype of ``x``.

    Returns:
        long (B, L).

    Raises:
        AssertionError, ValueError: as :func:`nearest_neighbor_quantize`.
        ValueError: no codebooks.
    """
    if not codebooks:
        raise ValueError("codebooks is empty; expected at least one")
    first = codebooks[0]
    if x.is_cuda and all(c.shape == first.shape and c.dtype == x.dtype for c in codebooks):
        return residual_quantize_fwd(x, torch.stack(tuple(codebooks)))
    codes = []
    residual = x
    for level, codebook in enumerate(codebooks):
        nearest = nearest_neighbor_quantize(residual, codebook)
        codes.append(nearest)
        if level + 1 < len(codebooks):
            residual = residual - codebook[nearest]
    return torch.stack(codes, dim=1)
