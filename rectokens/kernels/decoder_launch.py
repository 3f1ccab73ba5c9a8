"""Launches of the kernels for a decoder layer's elementwise work. Nothing here is public."""

from __future__ import annotations

import torch
from torch import Tensor

from rectokens.kernels import decoder_triton as kernels
from rectokens.kernels.compile_ahead import launcher
from rectokens.kernels.launch_device import on_device
from rectokens.kernels.optional_triton import triton

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_NORM_SIZE = 16_384
MAX_FP8_GATE = 32_768


def launch_add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, offset: bool
) -> Tensor:
    """Norm of ``x``, or of ``residual`` after ``x`` was added to it; both (R, H)."""
    out = x.new_empty(x.shape)
    _add_norm(x, residual, weight, eps, offset, out, None)
    return out


def launch_add_norm_fp8(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, offset: bool
) -> tuple[Tensor, Tensor]:
    """The same in FP8, (R, H), and what each row was divided by, float32 (R, 1)."""
    out = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    scale = x.new_empty((x.shape[0], 1), dtype=torch.float32)
    _add_norm(x, residual, weight, eps, offset, out, scale)
    return out, scale


def _add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    offset: bool,
    out: Tensor,
    scale: Tensor | None,
) -> None:
    rows, size = x.shape
    block = triton.next_power_of_2(size)
    other = x if residual is None else residual
    with on_device(x.device):
        launcher(kernels.add_norm_kernel, (rows,))(
            x,
            other,
            weight,
            out,
            weight if scale is None else scale,
            x.stride(0),
            other.stride(0),
            out.stride(0),
            size,
            eps,
            HAS_RESIDUAL=residual is not None,
            OFFSET=offset,
            FP8=scale is not None,
            BLOCK=block,
            num_warps=max(1, min(16, block // 512)),
        )


def launch_rotate_store(
    rows: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    query_heads: int,
    *,
    offset: bool,
) -> None:
    """Rotate queries in place and store keys and values.

    Args:
        rows: (R, (Hq + 2 Hkv) D), contiguous rows.
        cos: (positions, D / 2), contiguous.
        sin: likewise.
        positions: integer (R,).
        norms: weights (D,) of the norms of queries and keys, or None.
        eps: of the norms.
        keys: (P, Hkv, page size, D), contiguous pages.
        values: likewise.
        slots: integer (R,), page * page size + place in it; -1 for nowhere.
        query_heads: Hq.
        offset: norm weights are offsets from 1.
    """
    count = rows.shape[0]
    _, kv_heads, page_size, dim = keys.shape
    query_norm, key_norm = (rows, rows) if norms is None else norms
    block_r = 8 if count < 4096 else 16
    with on_device(rows.device):
        launcher(
            kernels.rotate_store_kernel, (triton.cdiv(count, block_r), query_heads + 2 * kv_heads)
        )(
            rows,
            cos,
            sin,
            positions.contiguous(),
            query_norm,
            key_norm,
            keys,
            values,
            slots.contiguous(),
            count,
            rows.stride(0),
            keys.stride(0),
            keys.stride(1),
            eps,
            query_heads,
            kv_heads,
            HAS_NORM=norms is not None,
            OFFSET=offset,
            PAGE_SIZE=page_size,
            DIM=dim,
            BLOCK_R=block_r,
            BLOCK_HALF=triton.next_power_of_2(dim // 2),
            num_warps=4,
        )


def launch_store(
    source_keys: Tensor, source_values: Tensor, keys: Tensor, values: Tensor, slots: Tensor
) -> None:
    """Store (R, Hkv, D) keys and values; D contiguous. Pages and slots as above."""
    count = source_keys.shape[0]
    _, kv_heads, page_size, dim = keys.shape
    with on_device(keys.device):
        launcher(kernels.store_kernel, (triton.cdiv(count, 16), kv_heads))(
            source_keys,
            source_values,
            keys,
            values,
            slots.contiguous(),
            count,
            source_keys.stride(0),
            source_values.stride(0),
            source_keys.stride(1),
            source_values.stride(1),
            keys.stride(0),
            keys.stride(1),
            PAGE_SIZE=page_size,
            DIM=dim,
            BLOCK_R=16,
            BLOCK_D=triton.next_power_of_2(dim),
            num_warps=4,
        )


def launch_gate(x: Tensor, activation: str) -> Tensor:
    """``activation`` of columns 0, 2, 4, .. of ``x`` (R, 2 I) times columns 1, 3, 5, .."""
    rows, size = x.shape[0], x.shape[1] // 2
    out = x.new_empty((rows, size))
    block = min(1024, triton.next_power_of_2(size))
    # Rows are the second dimension of the grid, which has 65,535 places.
    with on_device(x.device):
        for first in range(0, rows, 65_535):
            part = x[first : first + 65_535]
            launcher(kernels.gate_kernel, (triton.cdiv(size, block), part.shape[0]))(
                part,
                out[first:],
                x.stride(0),
                size,
                ACTIVATION=activation,
                BLOCK=block,
                num_warps=4,
            )
    return out


def launch_gate_fp8(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The same in FP8, (R, I), and what each row was divided by, float32 (R, 1)."""
    rows, size = x.shape[0], x.shape[1] // 2
    out = x.new_empty((rows, size), dtype=torch.float8_e4m3fn)
    scale = x.new_empty((rows, 1), dtype=torch.float32)
    block = triton.next_power_of_2(size)
    with on_device(x.device):
        launcher(kernels.gate_fp8_kernel, (rows,))(
            x,
            out,
            scale,
            x.stride(0),
            size,
            ACTIVATION=activation,
            BLOCK=block,
            num_warps=max(1, min(16, block // 1024)),
        )
    return out, scale
