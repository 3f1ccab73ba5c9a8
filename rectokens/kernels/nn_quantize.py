"""Nearest-codeword search as torch custom ops, namespace ``kmeans::``.

``quantize``, ``quantize_mm`` (with distances) and ``residual_quantize`` (all levels). The plain
PyTorch search serves every device; on CUDA, where triton is installed, the kernel of
``nearest_launch`` takes over for all dtypes but float64.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from rectokens.ops.dispatch import define_op, triton_is_installed
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


def residual_quantize_fwd(
    x: Tensor, codebooks: Tensor, *, precision: Precision = "float32"
) -> Tensor:
    """Residual codes: at each level the nearest row to what the levels before left over.

    Args:
        x: (B, D).
        codebooks: (L, K, D), L and K at least 1, on the same device, of the same dtype.
        precision: see :data:`Precision`.

    Returns:
        long (B, L).

    Raises:
        AssertionError, ValueError: as :func:`quantize_fwd`; ValueError also for another rank, no
            levels, or another dtype.
    """
    if codebooks.ndim != 3 or codebooks.shape[0] < 1:
        raise ValueError(f"codebooks has shape {tuple(codebooks.shape)}; expected (L, K, D), L > 0")
    if codebooks.dtype != x.dtype:
        raise ValueError(f"codebooks has dtype {codebooks.dtype}, x {x.dtype}; use one dtype")
    _check(x, codebooks[0], precision)
    codes: Tensor = _residual(x.detach(), codebooks.detach(), precision)
    return codes


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


def _one(x: Tensor, codebook: Tensor, precision: str = "float32") -> Tensor:
    _check(x, codebook, precision)
    return _search(x, codebook, precision)


def _one_with_distance(
    x: Tensor, codebook: Tensor, precision: str = "float32"
) -> tuple[Tensor, Tensor]:
    _check(x, codebook, precision)
    codes = _search(x, codebook, precision)
    return codes, squared_distances(x, codebook, codes)


def _all_levels(x: Tensor, codebooks: Tensor, precision: str = "float32") -> Tensor:
    codes = []
    for codebook in codebooks.unbind(0):
        codes.append(_search(x, codebook, precision))
        x = x - codebook[codes[-1]]
    return torch.stack(codes, dim=1)


def _fake_one(x: Tensor, codebook: Tensor, precision: str = "float32") -> Tensor:
    return x.new_empty((x.shape[0],), dtype=torch.long)


def _fake_one_with_distance(
    x: Tensor, codebook: Tensor, precision: str = "float32"
) -> tuple[Tensor, Tensor]:
    size = (x.shape[0],)
    return x.new_empty(size, dtype=torch.long), x.new_empty(size, dtype=torch.float32)


def _fake_all_levels(x: Tensor, codebooks: Tensor, precision: str = "float32") -> Tensor:
    return x.new_empty((x.shape[0], codebooks.shape[0]), dtype=torch.long)


def _kernel_fits(x: Tensor, codebook: Tensor) -> bool:
    if x.shape[0] == 0 or not triton_is_installed():
        return False
    from rectokens.kernels.nearest_launch import fits

    return fits(x, codebook)


def _one_cuda(x: Tensor, codebook: Tensor, precision: str = "float32") -> Tensor:
    if not _kernel_fits(x, codebook):
        return _one(x, codebook, precision)
    from rectokens.kernels.nearest_launch import launch_nearest

    codes, _ = launch_nearest(x, codebook.unsqueeze(0), exact=precision == "float32")
    return codes.view(-1)


def _one_with_distance_cuda(
    x: Tensor, codebook: Tensor, precision: str = "float32"
) -> tuple[Tensor, Tensor]:
    if not _kernel_fits(x, codebook):
        return _one_with_distance(x, codebook, precision)
    from rectokens.kernels.nearest_launch import launch_nearest

    codes, distances = launch_nearest(
        x, codebook.unsqueeze(0), exact=precision == "float32", with_distance=True
    )
    return codes.view(-1), distances


def _all_levels_cuda(x: Tensor, codebooks: Tensor, precision: str = "float32") -> Tensor:
    # The kernel keeps float32 between levels; the definition, the dtype of x.
    if x.dtype != torch.float32 or not _kernel_fits(x, codebooks):
        codes = []
        for codebook in codebooks.unbind(0):
            codes.append(_one_cuda(x, codebook, precision))
            x = x - codebook[codes[-1]]
        return torch.stack(codes, dim=1)
    from rectokens.kernels.nearest_launch import launch_nearest

    return launch_nearest(x, codebooks, exact=precision == "float32")[0]


_quantize = define_op("kmeans::quantize", _one, fake=_fake_one, cuda=_one_cuda)
_quantize_mm = define_op(
    "kmeans::quantize_mm",
    _one_with_distance,
    fake=_fake_one_with_distance,
    cuda=_one_with_distance_cuda,
)
_residual = define_op(
    "kmeans::residual_quantize", _all_levels, fake=_fake_all_levels, cuda=_all_levels_cuda
)
