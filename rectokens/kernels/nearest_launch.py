"""Tile shapes and launches of the nearest-codeword kernel.

Nothing here is public. Arguments are checked by the callers; B is a run-time value, so a new batch
size compiles nothing.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rectokens.kernels.nearest_triton import nearest_kernel
from rectokens.kernels.optional_triton import triton

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class NearestSettings:
    """Tile of rows, codes and dimensions; warps; programs an SM; tile of the second look."""

    rows: int = 64
    codes: int = 64
    dims: int = 32
    warps: int = 8
    stages: int = 2
    programs_per_sm: int = 2
    recheck_codes: int = 16
    recheck_dims: int = 32


DEFAULT = NearestSettings()


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
    settings: NearestSettings = DEFAULT,
) -> tuple[Tensor, Tensor]:
    """Residual codes of ``x`` in one pass.

    Args:
        x: (B, D), B > 0.
        codebooks: (L, K, D).
        exact: look again, in float64, where rounding could have decided; else products in TF32.
        with_distance: also sum the squared differences; for one level.
        settings: tile shapes.

    Returns:
        int64 (B, L), and float32 (B,), whose values mean something with ``with_distance`` only.
    """
    x, codebooks = x.contiguous(), codebooks.contiguous()
    levels, num_codes, dim = codebooks.shape
    squares = codebooks.float().square().sum(dim=-1)
    # Few rows: smaller tiles, so that more of the device has something to do.
    rows = settings.rows if x.shape[0] > 64 * 132 else 16
    tiles = triton.cdiv(x.shape[0], rows)
    programs = min(tiles, settings.programs_per_sm * _multiprocessors(x.device))
    scratch = x.new_empty((programs, rows, dim) if levels > 1 else (1,), dtype=torch.float32)
    codes = x.new_empty((x.shape[0], levels), dtype=torch.long)
    distances = x.new_empty((x.shape[0],), dtype=torch.float32)
    block_d = min(settings.dims, max(16, triton.next_power_of_2(dim)))
    on = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    with on:
        nearest_kernel[(programs,)](
            x,
            codebooks,
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
            PRECISION="ieee" if exact else "tf32",
            BLOCK_B=rows,
            BLOCK_N=min(settings.codes, max(16, triton.next_power_of_2(num_codes))),
            BLOCK_D=block_d,
            RECHECK_N=settings.recheck_codes,
            RECHECK_D=settings.recheck_dims,
            num_warps=settings.warps if rows == settings.rows else 4,
            num_stages=settings.stages,
        )
    return codes, distances


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    # Without a GPU this is the interpreter: few programs, so that their loop over tiles runs.
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
