"""Launch of the log-sum-exp of a linear layer. Nothing here is public."""

from __future__ import annotations

import torch
from torch import Tensor

from rectokens.kernels.compile_ahead import launcher
from rectokens.kernels.head_norm_triton import join_parts_kernel, linear_logsumexp_kernel
from rectokens.kernels.launch_device import on_device
from rectokens.kernels.optional_triton import triton

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_JOINED = (16, 64)  # rows of a program that joins parts, and parts it takes at a time
_PROGRAMS = 264  # two for each multiprocessor of the largest devices; more parts would idle


def tile_for(rows: int, dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """Rows, outputs and hidden elements of a tile, warps, loads in flight."""
    if dtype == torch.float32:
        return 16, 32, 32, 4, 2
    if rows <= 16:
        return 16, 128, 128, 4, 3
    return (64, 128, 64, 4, 3) if rows <= 64 else (128, 128, 64, 8, 3)


def launch_linear_logsumexp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kinds: Tensor,
    wanted: int,
    *,
    factor: float,
    softcap: float | None,
) -> Tensor:
    """float32 (R,), for the rows of requests that want it; 0 for the others.

    Args:
        x: (R, H), H contiguous.
        weight: (N, H), H contiguous, of the same dtype.
        bias: (N,) or None.
        kinds: int32 (B,), R a multiple of B.
        wanted: the kind that is computed.
        factor: constant the outputs are multiplied by.
        softcap: bound of the outputs; None for none.
    """
    rows, hidden = x.shape
    outputs = weight.shape[0]
    block_r, block_n, block_h, warps, stages = tile_for(rows, x.dtype)
    row_tiles = triton.cdiv(rows, block_r)
    tiles = triton.cdiv(outputs, block_n)
    tiles_each = triton.cdiv(tiles, max(1, min(tiles, _PROGRAMS // row_tiles)))
    parts = triton.cdiv(tiles, tiles_each)
    found = x.new_empty((parts, rows), dtype=torch.float32)
    out = x.new_empty(rows, dtype=torch.float32)
    each = rows // kinds.shape[0]
    with on_device(x.device):
        launcher(linear_logsumexp_kernel, (row_tiles, parts))(
            x,
            weight,
            weight if bias is None else bias,
            kinds,
            found,
            rows,
            each,
            outputs,
            tiles_each,
            wanted,
            x.stride(0),
            weight.stride(0),
            factor,
            1.0 if softcap is None else softcap,
            HIDDEN=hidden,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            BLOCK_R=block_r,
            BLOCK_N=block_n,
            BLOCK_H=block_h,
            PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32",
            num_warps=warps,
            num_stages=stages,
        )
        launcher(join_parts_kernel, (triton.cdiv(rows, _JOINED[0]),))(
            found,
            kinds,
            out,
            rows,
            each,
            parts,
            wanted,
            BLOCK_R=_JOINED[0],
            BLOCK_P=_JOINED[1],
            num_warps=4,
        )
    return out
