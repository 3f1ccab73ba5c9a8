"""When two groups of warps share keys and values, and their launch. Nothing here is public."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rectokens.kernels import paired_attention as kernels
from rectokens.kernels import pipelined_launch
from rectokens.kernels.compile_ahead import launcher
from rectokens.kernels.launch_device import on_device
from rectokens.kernels.optional_triton import gl

# From here on they are sooner done. A multiprocessor holds one program, which has nothing to
# multiply at its beginning and its end: prompts must be long, and tiles enough for all.
MIN_ROWS = 2304
MIN_POSITIONS = 2048

_WIDTH = 64  # columns of a copy: what shared memory keeps together
_MOST_TOGETHER = 16


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


def together(heads: int) -> int:
    """Heads that are computed at once, so that what they read stays in the cache.

    All of them where they are few, otherwise equal shares.
    """
    return next(n for n in range(min(heads, _MOST_TOGETHER), 0, -1) if heads % n == 0)


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
    heads, dim = query.shape[1:]
    at_once = together(heads)
    with on_device(query.device):
        launcher(kernels.prompt_kernel, (at_once, tile_request.shape[0], heads // at_once))(
            query,
            *_descriptors(keys, values),
            out,
            tile_request,
            tile_start,
            query_starts,
            lengths,
            page_table,
            page_table.stride(0),
            query.stride(0),
            out.stride(0),
            scale,
            keys.shape[1],
            GROUP=heads // keys.shape[1],
            PAGE=keys.shape[2],
            M=tile.rows // 2,
            DIM=dim,
            STAGES=tile.stages,
            GROUP_REGISTERS=tile.group_registers,
            COPY_REGISTERS=tile.copy_registers,
            num_warps=4,
        )


def _descriptors(keys: Tensor, values: Tensor) -> list[Any]:
    """Keys and values as rows of D, copied in pieces of 64 by 64."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = gl.NVMMASharedLayout(128, 16, 2)
    block = [pipelined_launch.BLOCK, _WIDTH]
    return [
        TensorDescriptor.from_tensor(side.view(-1, side.shape[3]), block, layout)
        for side in (keys, values)
    ]
