"""Tile shapes and launches of the context attention kernels.

Nothing here is public. Head dimension, page size and group are compiled in; batch, lengths, beam
width and window are run-time values, so a new batch compiles nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rectokens.kernels import context_attention_triton as kernels
from rectokens.kernels import paired_launch, pipelined_launch
from rectokens.kernels.compile_ahead import launcher
from rectokens.kernels.launch_device import multiprocessors, on_device
from rectokens.kernels.optional_triton import triton

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_DIM = 256
MIN_BLOCK_DIM = 16  # of a matrix product; smaller heads are filled up
MAX_PARTS = 16
# Multiprocessors that the interpreter stands for: enough that contexts are cut into parts.
_INTERPRETED = 4
_MOST_PIPELINED_PARTS = 2  # shorter ones are sooner done by the other kernel
_PROGRAMS_A_MULTIPROCESSOR = 2  # of the context kernel, that run at once


@dataclass(frozen=True)
class AttentionTile:
    """Shape of a program: queries, positions a turn, warps, loads in flight."""

    rows: int
    positions: int
    warps: int
    stages: int


def prompt_tile(dim: int, dtype: torch.dtype) -> AttentionTile:
    """Tile of the prompt kernel."""
    if dtype == torch.float32:
        return AttentionTile(16, 16 if dim > 128 else 32, 4, 1)
    if dim > 128:
        return AttentionTile(64, 32, 4, 2)
    return AttentionTile(128, 64, 4, 3)


def beam_tile(dim: int, dtype: torch.dtype) -> AttentionTile:
    """Tile of the context kernel."""
    tile = prompt_tile(dim, dtype)
    return replace(tile, rows=min(tile.rows, 64))


def takes(dim: int, dtype: torch.dtype) -> bool:
    """Whether the kernels take heads of this size and type."""
    return dtype in KERNEL_DTYPES and dim <= MAX_DIM


def fits(query: Tensor, keys: Tensor) -> bool:
    """Whether the kernels take these tensors."""
    dim = query.shape[-1]
    return takes(dim, query.dtype) and keys.dtype == query.dtype and keys.shape[-1] == dim


def long_from(dim: int, dtype: torch.dtype, page_size: int, device: torch.device,
              rows: int) -> int | None:  # fmt: skip
    """Positions from which on a prompt is long, among so many rows of prompts.

    None where prompts of any length go the same way.
    """
    cut_rows = prompt_tile(dim, dtype).rows
    if not paired_launch.takes(dim, dtype, page_size, cut_rows, device):
        return None
    least = paired_launch.MIN_POSITIONS
    return least if paired_launch.is_worthwhile(rows, least) else None


def takes_bulk(dim: int, dtype: torch.dtype, page_size: int, tile: AttentionTile,
               device: torch.device) -> bool:  # fmt: skip
    """Whether positions can be loaded by bulk tensor copies, which Hopper brought."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and dtype.itemsize == 2
        and MIN_BLOCK_DIM <= dim == triton.next_power_of_2(dim)
        and page_size % tile.positions == 0
    )


def prompt_tile_in_use(
    heads: int, dim: int, rows: int, dtype: torch.dtype, device: torch.device, *, bulk: bool
) -> AttentionTile:
    """Tile of the prompt kernel's programs; its rows divide those of :func:`prompt_tile`."""
    tile = prompt_tile(dim, dtype)
    # Not by the number of tiles: a captured pass has room for many that are mostly not there.
    is_small = heads * triton.cdiv(rows, tile.rows) <= multiprocessors(device, _INTERPRETED)
    if tile.rows != 128:
        return tile
    if bulk:
        # One program a multiprocessor would leave half of it idle.
        return AttentionTile(64, 64, 4, 3) if is_small else replace(tile, stages=2)
    # One program a multiprocessor: more warps hide what other programs would.
    return replace(tile, warps=8) if is_small else tile


def _can_pipeline(
    query: Tensor,
    keys: Tensor,
    tile: AttentionTile | None,
    window: int | None,
    softcap: float | None,
    bulk: bool | None,
) -> bool:
    """Whether the pipelined kernels take a call in which nothing else was asked for."""
    if not (tile is None and window is None and softcap is None and bulk is None):
        return False
    return pipelined_launch.takes(query.shape[-1], query.dtype, keys.shape[2], query.device)


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
    window: int | None,
    softcap: float | None,
    tile: AttentionTile | None = None,
    cut_rows: int | None = None,
    bulk: bool | None = None,
    pipelined: bool | None = None,
    longest: int = 0,
    paired: bool | None = None,
) -> None:
    """Causal attention of packed prompts; rows of ``out`` that no tile covers are left alone.

    Args:
        query: (R, Hq, D); heads of a row are contiguous.
        keys: (P, Hkv, page size, D), contiguous.
        values: likewise.
        tile_request: int32 (tiles,), request of each tile of queries, then -1 where there is none.
        tile_start: int32 (tiles,), its first query, counted within the request.
        query_starts: int32 (B + 1,), first row of each request.
        lengths: int32 (B,), positions of each request in the pages, its queries included.
        page_table: int32 (B, most pages).
        out: (R, Hq, D).
        scale: of the scores.
        window: positions a query sees, itself included; None for all.
        softcap: bound of the scores; None for none.
        tile: shape of the programs; None for what is best.
        cut_rows: rows that tiles were cut to, a multiple of the programs'; None for those of
            ``tile``, or without it of :func:`prompt_tile`.
        bulk: whether to load by bulk tensor copies; None for where that is possible.
        pipelined: whether to overlap blocks, which goes without ``tile`` and ``bulk``; None for
            where that is possible.
        longest: positions of the longest prompt; 0 where that is not known.
        paired: whether two groups of warps share keys and values, which goes where blocks can
            overlap; None for where that is possible and prompts are long.
    """
    rows, heads, dim = query.shape
    usual = tile or prompt_tile(dim, query.dtype)
    cut_rows = cut_rows or usual.rows
    overlaps = _can_pipeline(query, keys, tile, window, softcap, bulk)
    if paired is None:
        paired = (
            pipelined is None
            and overlaps
            and paired_launch.takes(dim, query.dtype, keys.shape[2], cut_rows, query.device)
            and paired_launch.is_worthwhile(rows, longest)
        )
    if paired:
        paired_launch.launch_prompt(
            query,
            keys,
            values,
            tile_request,
            tile_start,
            query_starts,
            lengths,
            page_table,
            out,
            scale=scale,
        )
        return
    if overlaps if pipelined is None else pipelined:
        pipelined_launch.launch_prompt(
            query,
            keys,
            values,
            tile_request,
            tile_start,
            query_starts,
            lengths,
            page_table,
            out,
            scale=scale,
            cut_rows=cut_rows,
        )
        return
    if bulk is None:
        bulk = takes_bulk(dim, query.dtype, keys.shape[2], usual, query.device)
    if tile is None:
        tile = prompt_tile_in_use(heads, dim, rows, query.dtype, query.device, bulk=bulk)
    with on_device(query.device):
        launcher(
            kernels.prompt_kernel,
            (heads, tile_request.shape[0], cut_rows // tile.rows),
        )(
            query,
            keys,
            values,
            *_descriptors(keys, values, tile, bulk),
            out,
            tile_request,
            tile_start,
            query_starts,
            lengths,
            page_table,
            page_table.stride(0),
            query.stride(0),
            out.stride(0),
            keys.stride(0),
            keys.stride(1),
            scale,
            1.0 if softcap is None else softcap,
            0 if window is None else window,
            keys.shape[1],
            BULK=bulk,
            BLOCK_M=tile.rows,
            **_common(query, keys, tile, window, softcap),
        )


def parts_for(batch_size: int, width: int, kv_heads: int, group: int, tile: AttentionTile,
              device: torch.device) -> int:  # fmt: skip
    """Parts of the context that fill the device, given the programs there are without."""
    programs = batch_size * kv_heads * triton.cdiv(width * group, tile.rows)
    room = _PROGRAMS_A_MULTIPROCESSOR * multiprocessors(device, _INTERPRETED)
    parts = room // programs if programs else 1
    return max(1, min(MAX_PARTS, parts))


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
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    tile: AttentionTile | None = None,
    parts: int | None = None,
    bulk: bool | None = None,
    pipelined: bool | None = None,
    paired: bool | None = None,
) -> Tensor:
    """Beams over their request's context and their own positions.

    Args:
        query: (B * W, Hq, D); heads of a row are contiguous.
        keys: (P, Hkv, page size, D), contiguous.
        values: likewise.
        lengths: int32 (B,), context lengths; 0 for a request that is not there.
        page_table: int32 (B, most pages).
        own_keys: (steps, B * W, Hkv, D), contiguous; steps 0 to ``step`` are read.
        own_values: likewise.
        paths: int32 (B, W, at least step + 1), slot of each beam's ancestor at steps 0 to ``step``,
            at ``step`` its own; the last two dimensions are contiguous.
        step: generated positions before this one.
        scale: of the scores.
        window: positions a query sees, itself included; None for all.
        softcap: bound of the scores; None for none.
        tile: shape of the context kernel's programs.
        parts: parts the context is cut in; None for as many as fill the device.
        bulk: whether to load by bulk tensor copies; None for where that is possible.
        pipelined: whether to overlap blocks, which goes without ``tile`` and ``bulk``; None for
            where that is possible and parts are long.
        paired: whether two groups of warps share keys and values of whole contexts, which goes
            where blocks can overlap; None for where that is possible and beams are many.

    Returns:
        (B * W, Hq, D).
    """
    rows, heads, dim = query.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    batch_size, width = paths.shape[:2]
    usual = tile or beam_tile(dim, query.dtype)
    out = query.new_empty((rows, heads, dim))
    if paired is None:
        paired = (
            pipelined is None
            and parts is None
            and _can_pipeline(query, keys, tile, window, softcap, bulk)
            and paired_launch.fills(batch_size, width, kv_heads, group, query.device)
        )
    if paired:
        paired_launch.launch_beams(
            query,
            keys,
            values,
            lengths,
            page_table,
            own_keys,
            own_values,
            paths,
            step,
            out,
            scale=scale,
        )
        return out
    if parts is None:
        parts = parts_for(batch_size, width, kv_heads, group, usual, query.device)
    if pipelined is None:
        pipelined = parts <= _MOST_PIPELINED_PARTS and _can_pipeline(
            query, keys, tile, window, softcap, bulk
        )
    tile = usual
    if bulk is None:
        bulk = takes_bulk(dim, query.dtype, keys.shape[2], tile, query.device)
    partial = query.new_empty((parts, rows, heads, dim), dtype=torch.float32)
    norms = query.new_empty((parts, rows, heads), dtype=torch.float32)
    cap, seen = 1.0 if softcap is None else softcap, 0 if window is None else window
    block_r = 16
    with on_device(query.device):
        if pipelined:
            pipelined_launch.launch_context(
                query,
                keys,
                values,
                lengths,
                page_table,
                partial,
                norms,
                width,
                scale=scale,
            )
        else:
            launcher(
                kernels.context_kernel,
                (triton.cdiv(width * group, tile.rows) * parts, kv_heads, batch_size),
            )(
                query,
                keys,
                values,
                *_descriptors(keys, values, tile, bulk),
                partial,
                norms,
                lengths,
                page_table,
                page_table.stride(0),
                width,
                step,
                query.stride(0),
                keys.stride(0),
                keys.stride(1),
                scale,
                cap,
                seen,
                kv_heads,
                parts,
                BULK=bulk,
                BLOCK_M=tile.rows,
                **_common(query, keys, tile, window, softcap),
            )
        launcher(kernels.merge_kernel, (triton.cdiv(rows, block_r), heads))(
            query,
            partial,
            norms,
            own_keys,
            own_values,
            paths,
            out,
            rows,
            width,
            query.stride(0),
            out.stride(0),
            own_keys.stride(0),
            paths.stride(1),
            scale,
            cap,
            seen,
            heads,
            parts,
            step + 1,
            GROUP=group,
            HAS_WINDOW=window is not None,
            HAS_SOFTCAP=softcap is not None,
            DIM=dim,
            BLOCK_R=block_r,
            BLOCK_D=triton.next_power_of_2(dim),
            num_warps=4,
        )
    return out


def _descriptors(keys: Tensor, values: Tensor, tile: AttentionTile, bulk: bool) -> list[Any]:
    """Keys and values as rows of D for bulk copies; where there are none, anything."""
    if not bulk:
        return [keys, values]
    from triton.tools.tensor_descriptor import TensorDescriptor

    dim = keys.shape[3]
    block = [tile.positions, dim]
    return [TensorDescriptor.from_tensor(side.view(-1, dim), block) for side in (keys, values)]


def _common(
    query: Tensor, keys: Tensor, tile: AttentionTile, window: int | None, softcap: float | None
) -> dict[str, Any]:
    dim = query.shape[-1]
    return {
        "GROUP": query.shape[1] // keys.shape[1],
        "HAS_WINDOW": window is not None,
        "HAS_SOFTCAP": softcap is not None,
        "PAGE_SIZE": keys.shape[2],
        "DIM": dim,
        "BLOCK_N": tile.positions,
        "BLOCK_D": max(triton.next_power_of_2(dim), MIN_BLOCK_DIM),
        # float32 stays float32 to about 1e-6: three TF32 products in place of one.
        "PRECISION": "tf32x3" if query.dtype == torch.float32 else "tf32",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
