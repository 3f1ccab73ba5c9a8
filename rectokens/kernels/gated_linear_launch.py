"""Tile shape and launch of the gated product. Nothing here is public."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rectokens.kernels import gated_linear_triton as kernels
from rectokens.kernels.compile_ahead import launcher
from rectokens.kernels.launch_device import multiprocessors, on_device
from rectokens.kernels.optional_triton import triton

DTYPES = (torch.float16, torch.bfloat16)
_ALIGNED = 8  # elements of 16 bits: rows of bulk copies begin at multiples of 16 bytes
_BUSY = 0.9  # of the programs' turns, at least; below, the last turn is too empty to pay
_BUSY_AT_ONCE = 0.7  # the same of few rows, for which there is one turn
_LEAST_TURNS = 3
_GROUP = 8  # row tiles that share columns in the cache


@dataclass(frozen=True)
class LinearTile:
    """Shape of a program's tile: rows, outputs, hidden elements a turn, warps, loads in flight."""

    rows: int
    outputs: int
    hidden: int
    warps: int
    stages: int


TILE = LinearTile(128, 256, 64, 8, 3)
# Of few rows, by their number: all programs' only turn, so that nothing but its own loads hides
# another's.
FEW = {
    64: LinearTile(64, 128, 64, 4, 5),
    128: LinearTile(128, 128, 64, 4, 4),
    256: LinearTile(128, 256, 64, 8, 4),
}
_INTERPRETED = 3  # multiprocessors that the interpreter stands for: programs then take turns


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes (R, H) rows and (2 I, H) weights."""
    return (
        x.device.type == "cuda"
        and torch.cuda.get_device_capability(x.device)[0] == 9
        and x.dtype in DTYPES
        and weight.dtype == x.dtype
        and x.is_contiguous()
        and weight.is_contiguous()
        and x.shape[1] % _ALIGNED == 0
        and weight.shape[0] % (2 * _ALIGNED) == 0
    )


def tile_for(rows: int) -> LinearTile:
    """Tile for a number of rows."""
    return next((tile for most, tile in FEW.items() if rows <= most), TILE)


def pays(rows: int, outputs: int, programs: int) -> bool:
    """Whether tiles fill the programs' turns, so that one kernel beats a product and a gate."""
    tile = tile_for(rows)
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs)
    turns = triton.cdiv(tiles, programs)
    if rows <= max(FEW):
        return bool(turns == 1 and tiles >= _BUSY_AT_ONCE * programs)
    return bool(turns >= _LEAST_TURNS and tiles >= _BUSY * turns * programs)


def pays_on(rows: int, outputs: int, device: torch.device) -> bool:
    """:func:`pays` with a program a multiprocessor."""
    return pays(rows, outputs, multiprocessors(device, _INTERPRETED))


def launch_gated_linear(
    x: Tensor, weight: Tensor, activation: str, tile: LinearTile | None = None
) -> Tensor:
    """``activation`` of outputs 0, 2, 4, .. of ``x @ weight.T`` times outputs 1, 3, 5, ..

    Args:
        x: (R, H), contiguous.
        weight: (2 I, H), contiguous.
        activation: one of ``decoder_pieces.ACTIVATIONS``.
        tile: shape of the tiles; None for :func:`tile_for` the rows.

    Returns:
        (R, I).
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    rows, hidden = x.shape
    tile = tile or tile_for(rows)
    outputs = weight.shape[0]
    out = x.new_empty((rows, outputs // 2))
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs)
    with on_device(x.device):
        launcher(
            kernels.gated_linear_kernel, (min(tiles, multiprocessors(x.device, _INTERPRETED)),)
        )(
            TensorDescriptor.from_tensor(x, [tile.rows, tile.hidden]),
            TensorDescriptor.from_tensor(weight, [tile.outputs, tile.hidden]),
            TensorDescriptor.from_tensor(out, [tile.rows, tile.outputs // 2]),
            rows,
            outputs,
            hidden,
            ACTIVATION=activation,
            GROUP=_GROUP,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.outputs,
            BLOCK_K=tile.hidden,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out
