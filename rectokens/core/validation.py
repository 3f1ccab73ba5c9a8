"""Checks of what callers pass in; messages name the value found and the value allowed."""

from __future__ import annotations

import torch
from torch import Tensor


def checked_vectors(
    vectors: Tensor,
    dim: int,
    *,
    name: str,
    single: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The vectors on ``device`` in ``dtype``, known to be finite and of the right width.

    Args:
        vectors: (B, dim), or (dim,) where ``single`` allows it; any real dtype.
        name: what to call them in messages.

    Raises:
        TypeError: no tensor, or a complex or boolean one.
        ValueError: another number of dimensions, another width, or NaN or infinite values.
    """
    if not isinstance(vectors, Tensor):
        raise TypeError(f"{name} is a {type(vectors).__name__}; expected a torch.Tensor")
    if vectors.dtype.is_complex or vectors.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {vectors.dtype}; expected real numbers")
    shapes = f"(B, {dim}) or ({dim},)" if single else f"(B, {dim})"
    if vectors.ndim not in ((1, 2) if single else (2,)) or vectors.shape[-1] != dim:
        raise ValueError(f"{name} has shape {tuple(vectors.shape)}; expected {shapes}")
    # After the cast: a float64 value may be finite and still overflow float32.
    cast = vectors.to(device=device, dtype=dtype)
    if not bool(torch.isfinite(cast).all()):
        bad = (~torch.isfinite(cast.reshape(-1, dim)).all(dim=1)).nonzero().flatten()
        raise ValueError(
            f"{name} has NaN or infinite values in {bad.numel()} of "
            f"{cast.reshape(-1, dim).shape[0]} rows, first in row {int(bad[0])}; "
            f"every value must be finite in {str(dtype).removeprefix('torch.')}"
        )
    return cast


def checked_codes(codes: Tensor, num_levels: int, codebook_size: int) -> Tensor:
    """Codes (B, L) or (L,), known to be of this many levels and within the codebook.

    Raises:
        ValueError: another number of levels, or a code outside [0, K).
    """
    if codes.ndim not in (1, 2) or codes.shape[-1] != num_levels:
        raise ValueError(
            f"codes have shape {tuple(codes.shape)}; expected (B, {num_levels}) or ({num_levels},)"
        )
    if codes.numel():
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= codebook_size:
            raise ValueError(f"codes span {low} to {high}; allowed are 0 to {codebook_size - 1}")
    return codes.long()


def check_at_least_one(**values: int) -> None:
    """Each named integer must be 1 or more.

    Raises:
        ValueError: naming the first that is not.
    """
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
