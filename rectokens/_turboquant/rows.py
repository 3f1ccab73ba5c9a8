"""Encode and decode rows with plain PyTorch: CPUs, and devices without Triton."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rectokens._turboquant.assign import assign, float32_centroids
from rectokens._turboquant.codec import Rotation
from rectokens._turboquant.packing import pack, unpack
from rectokens._turboquant.rotation import RotationTables, rotate, rotate_back, rotation_tables

# Rows are handled a few at a time so that the passes of one group stay in the CPU's cache.
_CHUNK_ELEMENTS = 1 << 17
# Between these norms no square of a coordinate that matters overflows or underflows in float32.
_SAFE_NORMS = (1e-12, 1e15)


@dataclass(frozen=True)
class RowTables:
    """Tables of one codec on one device.

    `byte_centroids`: float32 `(256, 8 / bits)`, the centroids a packed byte stands for, scaled so
    that an unnormalised rotation gives unit-norm coordinates.
    """

    rotation: RotationTables | None
    byte_centroids: Tensor


def row_tables(dim: int, bits: int, rotation: Rotation | None, device: torch.device) -> RowTables:
    """Build the tables on `device`."""
    gain = math.sqrt(dim) * (rotation.block if rotation else 1)
    centroids = torch.from_numpy(float32_centroids(dim, bits)) / gain
    every_byte = torch.arange(256, dtype=torch.uint8)[:, None]
    byte_centroids = centroids[unpack(every_byte, bits, 8 // bits).long()]
    return RowTables(
        rotation_tables(rotation, device) if rotation else None, byte_centroids.to(device)
    )


def _unit_scale(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Norms `(n,)`, and rows with their multipliers `(n, 1)` that make them unit vectors."""
    norms = torch.linalg.vector_norm(x, dim=1)
    low, high = _SAFE_NORMS
    if x.device.type == "cpu" and bool(((norms > low) & (norms < high)).all()):
        return norms, x, norms.reciprocal()[:, None]
    # A power of two near the largest magnitude, so the division loses nothing.
    peak = x.abs().amax(1)
    exponent = torch.where(peak > 0, torch.frexp(peak).exponent, 0)
    # Two steps: 2**-exponent itself may lie beyond float32.
    half = -exponent // 2
    x = torch.ldexp(torch.ldexp(x, half[:, None]), (-exponent - half)[:, None])
    scaled = torch.linalg.vector_norm(x, dim=1)
    norms = torch.ldexp(torch.ldexp(scaled, -half), exponent + half)
    return norms, x, torch.where(scaled > 0, scaled.reciprocal(), 0.0)[:, None]


def _encode_chunk(
    x: Tensor, dim: int, bits: int, rotation: Rotation | None, tables: RowTables
) -> tuple[Tensor, Tensor]:
    norms, x, multiplier = _unit_scale(x.float().contiguous())
    gain = math.sqrt(dim) / (rotation.block if rotation else 1)
    y = x * (multiplier * gain)
    if rotation is not None and tables.rotation is not None:
        y = rotate(y, rotation, tables.rotation)
    return pack(assign(y, dim, bits), bits), norms


def _decode_chunk(
    packed: Tensor, norms: Tensor, dim: int, rotation: Rotation | None, tables: RowTables
) -> Tensor:
    centroids = torch.nn.functional.embedding(packed.int(), tables.byte_centroids)
    unit = centroids.flatten(1)[:, :dim]
    if rotation is not None and tables.rotation is not None:
        unit = rotate_back(unit.contiguous(), rotation, tables.rotation)
    return unit * norms[:, None]


def _chunk_rows(dim: int, device: torch.device, rows: int) -> int:
    return max(1, _CHUNK_ELEMENTS // dim) if device.type == "cpu" else max(1, rows)


def encode_rows(
    x: Tensor,
    packed: Tensor,
    norms: Tensor,
    bits: int,
    rotation: Rotation | None,
    tables: RowTables,
) -> None:
    """Encode `x`, `(n, dim)` of any float type, into `packed` `(n, packed_dim)` and `norms` `(n,)`.

    A row with NaN or infinity leaves a norm that is not finite; the caller looks at that.
    """
    step = _chunk_rows(x.shape[1], x.device, x.shape[0])
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        packed[rows], norms[rows] = _encode_chunk(x[rows], x.shape[1], bits, rotation, tables)


def decode_rows(
    packed: Tensor, norms: Tensor, x_hat: Tensor, rotation: Rotation | None, tables: RowTables
) -> None:
    """Decode `packed` `(n, packed_dim)` and `norms` `(n,)` into `x_hat`, `(n, dim)` float32."""
    step = _chunk_rows(x_hat.shape[1], x_hat.device, x_hat.shape[0])
    for start in range(0, x_hat.shape[0], step):
        rows = slice(start, start + step)
        x_hat[rows] = _decode_chunk(packed[rows], norms[rows], x_hat.shape[1], rotation, tables)
