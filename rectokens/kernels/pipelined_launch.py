"""Tile shapes and launches of the pipelined attention kernels. Nothing here is public."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rectokens.kernels import pipelined_attention as kernels
from rectokens.kernels.compile_ahead import launcher
from rectokens.kernels.launch_device import on_device
from rectokens.kernels.optional_triton import gl, triton

BLOCK = 64  # positions of a block
DTYPES = (torch.float16, torch.bfloat16)
DIMS = (64, 128)


@dataclass(frozen=True)
class PipelinedTile:
    """Shape of a program: queries, warps, blocks in flight."""

    rows: int
    warps: int
    stages: int


# Two programs a multiprocessor, one of which multiplies while the other waits. One program of 128
# queries reads keys half as often, but its warps wait for one another every turn.
TILE = PipelinedTile(64, 4, 3)


# Gluon is experimental; with other versions of Triton the other kernels are taken.
VERSIONS = ("3.6.", "3.7.")


def takes(dim: int, dtype: torch.dtype, page_size: int, device: torch.device) -> bool:
    """Whether the kernels take such heads and pages on a device; windows they never take."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device)[0] == 9
        and dtype in DTYPES
        and dim in DIMS
        and page_size % BLOCK == 0
        and triton.__version__.startswith(VERSIONS)
    )


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
    cut_rows: int,
    tile: PipelinedTile = TILE,
) -> None:
    """As ``context_attention_launch.launch_prompt``."""
    heads = query.shape[1]
    with on_device(query.device):
        launcher(kernels.prompt_kernel, (heads, tile_request.shape[0], cut_rows // tile.rows))(
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
            M=tile.rows,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )


def launch_context(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    page_table: Tensor,
    partial: Tensor,
    norms: Tensor,
    width: int,
    *,
    scale: float,
    tile: PipelinedTile = TILE,
) -> None:
    """The context's part of ``context_attention_launch.launch_beams``.

    Args:
        partial: float32 (parts, B * W, Hq, D), written.
        norms: float32 (parts, B * W, Hq), written.
        width: W.
    """
    kv_heads = keys.shape[1]
    group = query.shape[1] // kv_heads
    parts = partial.shape[0]
    with on_device(query.device):
        launcher(
            kernels.context_kernel,
            (triton.cdiv(width * group, tile.rows) * parts, kv_heads, lengths.shape[0]),
        )(
            query,
            *_descriptors(keys, values),
            partial,
            norms,
            lengths,
            page_table,
            page_table.stride(0),
            width,
            query.stride(0),
            scale,
            kv_heads,
            parts,
            GROUP=group,
            PAGE=keys.shape[2],
            M=tile.rows,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )


def _descriptors(keys: Tensor, values: Tensor) -> list[Any]:
    """Keys and values as rows of D."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    dim = keys.shape[3]
    layout = gl.NVMMASharedLayout(128, 16, 2)
    block = [BLOCK, dim]
    return [TensorDescriptor.from_tensor(s.view(-1, dim), block, layout) for s in (keys, values)]
