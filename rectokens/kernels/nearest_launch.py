"""Tile shapes and launches of the nearest-codeword kernel.

Nothing here is public. Arguments are checked by the callers; B is a run-time value, so a new batch
size compiles nothing.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from rectokens.kernels.nearest_triton import nearest_kernel, split_kernel
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
    half: torch.dtype = torch.bfloat16


def settings_for(num_rows: int, levels: int, multiprocessors: int) -> NearestSettings:
    """Few rows: smaller tiles, so that more of the device has something to do."""
    if num_rows > 32 * multiprocessors:
        return NearestSettings() if levels > 1 else NearestSettings(codes=256)
    few = NearestSettings(rows=16, codes=256, dims=64, warps=8)
    return few if levels > 1 else replace(few, codes=512, programs_per_sm=1)


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
        settings = settings_for(x.shape[0], levels, _multiprocessors(x.device))
    tiles = triton.cdiv(x.shape[0], settings.rows)
    programs = min(tiles, settings.programs_per_sm * _multiprocessors(x.device))
    high, low = (torch.empty_like(codebooks, dtype=settings.half) for _ in range(2))
    squares = x.new_empty((levels, num_codes), dtype=torch.float32)
    leftover = (programs, settings.rows, dim) if levels > 1 else (1,)
    scratch = x.new_empty(leftover, dtype=torch.float32)
    codes = x.new_empty((x.shape[0], levels), dtype=torch.long)
    distances = x.new_empty((x.shape[0],), dtype=torch.float32)
    block_d = min(settings.dims, max(16, triton.next_power_of_2(dim)))
    on = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    with on:
        split_kernel[(triton.cdiv(levels * num_codes, 4),)](
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
        nearest_kernel[(programs,)](
            x,
            codebooks,
            high,
            low,
            squares,
            scratch,
            codes,
            distances,
            x.shape[0],
            num_codes,
            tiles,
            LEVELS=levels,
            DIM=dim,
            EXACT=exact,
            WITH_DISTANCE=with_distance,
            BLOCK_B=settings.rows,
            BLOCK_N=min(settings.codes, max(16, triton.next_power_of_2(num_codes))),
            BLOCK_D=block_d,
            LOOK_N=settings.look_codes,
            LOOK_D=min(settings.look_dims, block_d),
            num_warps=settings.warps,
            num_stages=settings.stages,
        )
    return codes, distances


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    # Without a GPU this is the interpreter: few programs, so that their loop over tiles runs.
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
