"""Tile shapes and launches of the nearest-codeword kernels.

Nothing here is public. Arguments are checked by the callers; B is a run-time value, so a new batch
size compiles nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rectokens.kernels import nearest_triton as kernels
from rectokens.kernels.launch_device import multiprocessors, on_device
from rectokens.kernels.optional_triton import triton

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class NearestSettings:
    """Shape of a program's work.

    Attributes:
        rows, codes, dims: of a tile of the product.
        warps, stages: of a program.
        programs_per_sm: that stay on a multiprocessor and take tile after tile.
        look_codes, look_dims: tile of a comparison by differences.
        length_dims: of a tile of rows whose lengths are summed.
        parts: programs that share the codes of a tile of rows; for one level.
        half: of the halves; Triton's interpreter knows no bfloat16.
    """

    rows: int = 64
    codes: int = 128
    dims: int = 32
    warps: int = 4
    stages: int = 2
    programs_per_sm: int = 2
    look_codes: int = 64
    look_dims: int = 32
    length_dims: int = 32
    parts: int = 1
    half: torch.dtype = torch.bfloat16


_PART = 64
_WHOLE = 128


def settings_for(
    num_rows: int, levels: int, multiprocessors: int, num_codes: int
) -> NearestSettings:
    """Few rows: smaller tiles, and codes in parts, so that more of the device has work."""
    if num_rows > 32 * multiprocessors:
        return NearestSettings() if levels > 1 else NearestSettings(codes=256)
    few = NearestSettings(rows=16, codes=256, dims=64, warps=8, length_dims=256)
    if levels > 1:
        return few
    tiles = triton.cdiv(num_rows, few.rows)
    parts = int(triton.cdiv(num_codes, _PART))
    if parts * tiles > multiprocessors:
        # Larger ones, of which two still fit a multiprocessor.
        parts = int(triton.cdiv(num_codes, 2 * _PART))
    if num_codes <= _WHOLE or parts * tiles > 2 * multiprocessors:
        return replace(few, codes=512, programs_per_sm=1)
    return replace(few, warps=4, parts=parts)


def fits(x: Tensor, codebook: Tensor) -> bool:
    """Whether the kernel takes this search; indices inside a codebook are 32 bits."""
    wide = torch.float64 in (x.dtype, codebook.dtype)
    known = x.dtype in KERNEL_DTYPES and codebook.dtype in KERNEL_DTYPES
    return known and not wide and x.shape[1] > 0 and codebook.numel() < 2**31


def launch_nearest(
    x: Tensor,
    codebooks: Tensor,
    *,
    exact: bool = True,
    with_distance: bool = False,
    settings: NearestSettings | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual codes of ``x`` in one pass.

    Args:
        x: (B, D), B > 0; what is not float32 is converted first.
        codebooks: (L, K, D).
        exact: look again, in float64, where rounding could have decided.
        with_distance: also sum the squared differences; for one level.
        settings: tile shapes; None chooses them by the number of rows.

    Returns:
        int64 (B, L), and float32 (B,), whose values mean something with ``with_distance`` only.
    """
    # Every number of 16 bits is one of float32 too.
    x, codebooks = x.float().contiguous(), codebooks.float().contiguous()
    levels, num_codes, dim = codebooks.shape
    if settings is None:
        sms = multiprocessors(x.device)
        settings = settings_for(x.shape[0], levels, sms, num_codes)
    high, low = (torch.empty_like(codebooks, dtype=settings.half) for _ in range(2))
    squares = x.new_empty((levels, num_codes), dtype=torch.float32)
    codes = x.new_empty((x.shape[0], levels), dtype=torch.long)
    distances = x.new_empty((x.shape[0],), dtype=torch.float32)
    with on_device(x.device):
        kernels.split_kernel[(triton.cdiv(levels * num_codes, 4),)](
            codebooks,
            high,
            low,
            squares,
            levels * num_codes,
            DIM=dim,
            BLOCK_N=4,
            BLOCK_D=min(256, max(16, triton.next_power_of_2(dim))),
            num_warps=4,
        )
        cut = (high, low, squares)
        if settings.parts == 1 or levels > 1:
            _in_one(x, codebooks, cut, codes, distances, exact, with_distance, settings)
        else:
            _in_parts(x, codebooks, cut, codes, distances, exact, settings)
    return codes, distances


def _in_one(
    x: Tensor,
    codebooks: Tensor,
    cut: tuple[Tensor, Tensor, Tensor],
    codes: Tensor,
    distances: Tensor,
    exact: bool,
    with_distance: bool,
    settings: NearestSettings,
) -> None:
    """A program compares a tile of rows with all codes."""
    levels, num_codes, dim = codebooks.shape
    tiles = triton.cdiv(x.shape[0], settings.rows)
    programs = min(tiles, settings.programs_per_sm * multiprocessors(x.device))
    leftover = (programs, settings.rows, dim) if levels > 1 else (1,)
    scratch = x.new_empty(leftover, dtype=torch.float32)
    kernels.nearest_kernel[(programs,)](
        x,
        codebooks,
        *cut,
        scratch,
        codes,
        distances,
        x.shape[0],
        num_codes,
        tiles,
        LEVELS=levels,
        EXACT=exact,
        WITH_DISTANCE=with_distance,
        **_shapes(dim, num_codes, settings),
    )


def _in_parts(
    x: Tensor,
    codebooks: Tensor,
    cut: tuple[Tensor, Tensor, Tensor],
    codes: Tensor,
    distances: Tensor,
    exact: bool,
    settings: NearestSettings,
) -> None:
    """Programs share the codes; distances come with the comparison of what they find."""
    _, num_codes, dim = codebooks.shape
    num_rows = x.shape[0]
    span = triton.next_power_of_2(triton.cdiv(num_codes, settings.parts))
    parts = triton.cdiv(num_codes, span)
    found = x.new_empty((num_rows, parts), dtype=torch.int32)
    gaps = x.new_empty((num_rows, parts), dtype=torch.float64)
    kernels.part_kernel[(triton.cdiv(num_rows, settings.rows), parts)](
        x,
        codebooks,
        *cut,
        found,
        gaps,
        num_rows,
        num_codes,
        span,
        EXACT=exact,
        **_shapes(dim, span, settings),
    )
    kernels.merge_kernel[(triton.cdiv(num_rows, 32),)](
        found,
        gaps,
        codes,
        distances,
        num_rows,
        parts,
        PARTS=triton.next_power_of_2(parts),
        BLOCK_B=32,
        num_warps=1,
    )


def _shapes(dim: int, num_codes: int, settings: NearestSettings) -> dict[str, Any]:
    """Constants of a program that compares a tile of rows with so many codes."""
    widest = max(16, triton.next_power_of_2(dim))
    block_d = min(settings.dims, widest)
    return {
        "DIM": dim,
        "BLOCK_B": settings.rows,
        "BLOCK_N": min(settings.codes, max(16, triton.next_power_of_2(num_codes))),
        "BLOCK_D": block_d,
        "LENGTH_D": min(settings.length_dims, widest),
        "LOOK_N": settings.look_codes,
        "LOOK_D": min(settings.look_dims, block_d),
        "num_warps": settings.warps,
        "num_stages": settings.stages,
    }
