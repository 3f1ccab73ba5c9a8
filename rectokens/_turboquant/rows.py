"""Encode and decode rows with plain PyTorch: CPUs, and devices without Triton."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rectokens._turboquant.assign import Scratch, assign, float32_centroids
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


def _all_between(values: npt.NDArray[np.float32], low: float, high: float) -> bool:
    return bool(values.min() > low and values.max() < high)


def _set_lengths(x: Tensor, length: float) -> Tensor:
    """Scale rows (float32, in place) to `length`, zero rows not; the norms `(n,)` they had."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=1)
    if x.device.type == "cpu" and _all_between(norms.numpy(), *_SAFE_NORMS):
        x.mul_((length / norms)[:, None])
        return norms
    # A power of two near the largest magnitude, so the division loses nothing.
    peak = x.abs().amax(1)
    exponent = torch.where(peak > 0, torch.frexp(peak).exponent, 0)
    # Two steps: 2**-exponent itself may lie beyond float32.
    half = -exponent // 2
    x.copy_(torch.ldexp(torch.ldexp(x, half[:, None]), (-exponent - half)[:, None]))
    scaled = torch.linalg.vector_norm(x, dim=1)
    x.mul_(torch.where(scaled > 0, length / scaled, 0.0)[:, None])
    return torch.ldexp(torch.ldexp(scaled, -half), exponent + half)


def _groups(rows: int, dim: int, device: torch.device) -> Iterator[tuple[slice, Tensor, Scratch]]:
    """Slices of the rows, each with float32 rows and memory to work in, the same for all."""
    step = min(rows, max(1, _CHUNK_ELEMENTS // dim)) if device.type == "cpu" else rows
    y = torch.empty((step, dim), dtype=torch.float32, device=device)
    scratch = Scratch.like(y)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        if count < step:
            y, scratch = y[:count], scratch.first(count)
        yield slice(start, start + count), y, scratch


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
    dim = x.shape[1]
    length = math.sqrt(dim) / (rotation.block if rotation else 1)
    for rows, y, scratch in _groups(x.shape[0], dim, x.device):
        y.copy_(x[rows])
        norms[rows] = _set_lengths(y, length)
        if rotation is not None and tables.rotation is not None:
            y, spare = rotate(y, rotation, tables.rotation, scratch.floats)
            scratch = Scratch(spare, scratch.bytes)
        indices = assign(y, dim, bits, scratch)
        pack(indices, bits, out=packed[rows], spare=scratch.bytes[1])


def decode_rows(
    packed: Tensor, norms: Tensor, x_hat: Tensor, rotation: Rotation | None, tables: RowTables
) -> None:
    """Decode `packed` `(n, packed_dim)` and `norms` `(n,)` into `x_hat`, `(n, dim)` float32."""
    dim = x_hat.shape[1]
    for rows, y, scratch in _groups(x_hat.shape[0], dim, x_hat.device):
        centroids = torch.nn.functional.embedding(packed[rows].int(), tables.byte_centroids)
        y.copy_(centroids.flatten(1)[:, :dim])
        if rotation is not None and tables.rotation is not None:
            y, _ = rotate_back(y, rotation, tables.rotation, scratch.floats)
        torch.mul(y, norms[rows, None], out=x_hat[rows])
