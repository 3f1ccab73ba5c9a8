"""When two groups of warps share keys and values, and their launch. Nothing here is public."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rectokens.kernels import paired_attention, paired_beams, pipelined_launch
from rectokens.kernels.compile_ahead import launcher
from rectokens.kernels.launch_device import multiprocessors, on_device
from rectokens.kernels.optional_triton import gl, triton

# From here on they are sooner done. A multiprocessor holds one program, which has nothing to
# multiply at its beginning and its end: prompts must be long, and tiles enough for all.
MIN_ROWS = 2304
MIN_POSITIONS = 2048

_WIDTH = 64  # columns of a copy: what shared memory keeps together
_FEW_HALVES = 6
_INTERPRETED = 4  # multiprocessors of a device that has none


@dataclass(frozen=True)
class PairedTile:
    """Shape of a program.

    Attributes:
        rows: queries, half of them for each group.
        stages: turns of keys, and of values, in shared memory.
        group_registers: of a thread that multiplies.
        copy_registers: of one that copies.
    """

    rows: int
    stages: int
    group_registers: int
    copy_registers: int


TILE = PairedTile(128, 3, 240, 24)


def takes(
    dim: int, dtype: torch.dtype, page_size: int, cut_rows: int, device: torch.device
) -> bool:
    """Whether the kernel takes such heads, pages and tiles on a device; windows it never takes."""
    return cut_rows == TILE.rows and pipelined_launch.takes(dim, dtype, page_size, device)


def is_worthwhile(rows: int, longest: int) -> bool:
    """Whether the kernel is sooner done than the pipelined one.

    Args:
        rows: of the prompts together.
        longest: positions of the longest of them, cached ones included.
    """
    return rows >= MIN_ROWS and longest >= MIN_POSITIONS


def fills(batch_size: int, width: int, kv_heads: int, group: int, device: torch.device) -> bool:
    """Whether beams are enough for the kernel, which does not cut their contexts into parts.

    Args:
        batch_size: requests that there is room for.
        width: beams of each.
        kv_heads: of the keys.
        group: query heads of each of them.
        device: where they are.
    """
    rows = width * group
    halves = triton.cdiv(2 * rows, TILE.rows)
    # The other half of a tile costs as much where no beam is.
    is_even = halves % 2 == 0 or halves > _FEW_HALVES
    tiles = batch_size * kv_heads * triton.cdiv(rows, TILE.rows)
    return bool(is_even and tiles * 4 >= 3 * multiprocessors(device, _INTERPRETED))


def launch_prompt(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tile_request: Tensor,
    tile_start: Tensor,
    query_starts: Tensor,
    lengths: Tensor,
    page_table: Tensor,
    out: Tensor,
    *,
    scale: float,
    tile: PairedTile = TILE,
) -> None:
    """As ``context_attention_launch.launch_prompt``, of tiles of ``tile.rows``."""
    heads = query.shape[1]
    tiles = tile_request.shape[0]
    with on_device(query.device):
        launcher(paired_attention.prompt_kernel, _grid(tiles * heads, query.device))(
            query,
            *_descriptors(keys, values),
            out,
            tile_request,
            tile_start,
            query_starts,
            lengths,
            page_table,
            page_table.stride(0),
            tiles,
            heads,
            query.stride(0),
            out.stride(0),
            scale,
            keys.shape[1],
            **_common(query, keys, tile),
        )


def launch_beams(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    page_table: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    paths: Tensor,
    step: int,
    out: Tensor,
    *,
    scale: float,
    tile: PairedTile = TILE,
) -> None:
    """As ``context_attention_launch.launch_beams``, all of it, to ``out``."""
    heads = query.shape[1]
    kv_heads = keys.shape[1]
    batch_size, width = paths.shape[:2]
    of_a_head = triton.cdiv(width * (heads // kv_heads), tile.rows)
    places = of_a_head * kv_heads * batch_size
    with on_device(query.device):
        launcher(paired_beams.beam_kernel, _grid(places, query.device))(
            query,
            *_descriptors(keys, values),
            own_keys,
            own_values,
            paths,
            out,
            lengths,
            page_table,
            page_table.stride(0),
            places,
            width,
            step + 1,
            query.stride(0),
            out.stride(0),
            own_keys.stride(0),
            paths.stride(1),
            scale,
            kv_heads,
            **_common(query, keys, tile),
        )


def _grid(tiles: int, device: torch.device) -> tuple[int]:
    """No more programs than run at once; they share out the tiles."""
    return (min(tiles, multiprocessors(device, _INTERPRETED)),)


def _common(query: Tensor, keys: Tensor, tile: PairedTile) -> dict[str, Any]:
    return {
        "GROUP": query.shape[1] // keys.shape[1],
        "PAGE": keys.shape[2],
        "M": tile.rows // 2,
        "DIM": query.shape[2],
        "STAGES": tile.stages,
        "GROUP_REGISTERS": tile.group_registers,
        "COPY_REGISTERS": tile.copy_registers,
        "num_warps": 4,
    }


def _descriptors(keys: Tensor, values: Tensor) -> list[Any]:
    """Keys and values as rows of D, copied in pieces of 64 by 64."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = gl.NVMMASharedLayout(128, 16, 2)
    block = [pipelined_launch.BLOCK, _WIDTH]
    return [
        TensorDescriptor.from_tensor(side.view(-1, side.shape[3]), block, layout)
        for side in (keys, values)
    ]
