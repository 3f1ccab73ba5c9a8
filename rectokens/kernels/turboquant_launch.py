"""Tile shapes, launch settings and launches of the TurboQuant kernels.

Nothing here is public: `launch_encode` and `launch_decode` expect checked arguments.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from rectokens._turboquant.assign import float32_boundaries, float32_centroids
from rectokens._turboquant.codec import Rotation
from rectokens._turboquant.signs import signs
from rectokens.kernels.launch_device import multiprocessors, on_device
from rectokens.kernels.optional_triton import triton
from rectokens.kernels.turboquant import decode_kernel, encode_kernel

MIN_DIM = 16
MAX_TILE = 16384
_TILE = 4096


@dataclass(frozen=True)
class TileShape:
    """How one rotation is laid out in tiles.

    `constants`: constant arguments of both kernels. `residual`: the power of two by which the two
    rounds, whose matrices have power-of-two entries, still exceed the orthonormal transform.
    """

    constants: dict[str, int | float]
    residual: float

    @property
    def rows(self) -> int:
        """Rows a tile holds."""
        return int(self.constants["ROWS"])

    @property
    def elements(self) -> int:
        """Elements of a tile, padding included."""
        return self.rows * int(self.constants["ROW"])


@dataclass(frozen=True)
class LaunchSettings:
    """How a kernel is launched.

    `programs_per_sm` > 0: that many programs an SM stay and loop over tiles, loads being fetched
    `stages - 1` tiles ahead. 0: one program a tile, which holds fewer registers.
    """

    num_warps: int
    programs_per_sm: int
    stages: int = 1


def _padded_row(rotation: Rotation) -> int:
    return rotation.block * int(triton.next_power_of_2(rotation.num_blocks))


def supports(rotation: Rotation) -> bool:
    """Whether the kernels can hold a row of this rotation in one tile."""
    return rotation.dim >= MIN_DIM and _padded_row(rotation) <= MAX_TILE


@lru_cache(maxsize=64)
def tile_shape(rotation: Rotation) -> TileShape:
    """Tile layout for `rotation`; rows too short for a tile share one."""
    row = _padded_row(rotation)
    tile = max(_TILE, row)
    middle = 16 if tile <= 8192 else 32
    masks = {
        "LAST": (rotation.block - 1) & 15,
        "MIDDLE": ((rotation.block - 1) // 16) & (middle - 1),
        "HIGH": (rotation.block - 1) // (16 * middle),
    }
    constants: dict[str, int | float] = {
        "DIM": rotation.dim,
        "ROW": row,
        "ROWS": tile // row,
        "HIGH": tile // (16 * middle),
        "MIDDLE": middle,
        "BLOCK": rotation.block,
        "NUM_BLOCKS": rotation.num_blocks,
    }
    odd_levels = 0
    for axis, mask in masks.items():
        levels = mask.bit_count()
        constants[f"{axis}_MASK"] = mask
        constants[f"{axis}_SCALE"] = 2.0 ** -(levels // 2)
        odd_levels += levels % 2
    return TileShape(constants, 2.0**odd_levels)


def encode_settings(rotation: Rotation, bits: int) -> LaunchSettings:
    """Settings chosen from the compiler's register counts; see the compile test.

    The search of 8 bits needs so many registers that a program which stays would leave an SM
    nearly empty, and looking ahead past its table look-up spills.
    """
    elements = tile_shape(rotation).elements
    if elements > _TILE:
        return LaunchSettings(num_warps=elements // 1024, programs_per_sm=0)
    if bits == 8 or rotation.num_blocks > 1:
        return LaunchSettings(num_warps=8 if bits == 8 else 4, programs_per_sm=0)
    return LaunchSettings(num_warps=4, programs_per_sm=3, stages=2)


def decode_settings(rotation: Rotation, bits: int) -> LaunchSettings:
    """Settings of the decode kernel, chosen in the same way."""
    elements = tile_shape(rotation).elements
    if elements > _TILE or rotation.num_blocks > 1 or bits == 8:
        return LaunchSettings(num_warps=max(4, elements // 1024), programs_per_sm=0)
    return LaunchSettings(num_warps=4, programs_per_sm=3)


def boundary_guess(dim: int, bits: int) -> Tensor:
    """Odd polynomial whose value at boundary k is within 0.4 of k; coefficients (terms,) float32.

    Coefficient j multiplies `u ** (2 * j + 1)`. Only 8 bits use it; others get one zero.

    Raises:
        RuntimeError: no polynomial of up to twelve terms is that close.
    """
    if bits < 8:
        return torch.zeros(1, dtype=torch.float32)
    boundaries = float32_boundaries(dim, bits).astype(np.float64)
    top = boundaries[-1]
    numbers = np.arange(1, boundaries.size + 1, dtype=np.float64)
    fine = np.linspace(0.0, top, 4096)
    for terms in range(2, 13):
        powers = 2 * np.arange(terms) + 1
        fitted = np.linalg.lstsq((boundaries / top)[:, None] ** powers, numbers, rcond=None)[0]
        coefficients = (fitted / top**powers).astype(np.float32)
        values = (boundaries[:, None] ** powers) @ coefficients
        rising = np.all(np.diff((fine[:, None] ** powers) @ coefficients) > 0)
        if np.abs(values - numbers).max() < 0.4 and rising:
            return torch.from_numpy(coefficients)
    raise RuntimeError(f"no polynomial follows the codebook of dim {dim}, {bits} bits")


@dataclass(frozen=True)
class KernelTables:
    """What the kernels read, on one device.

    `first_signs`, `second_signs`: float16 `(ROW,)`. `boundaries`: float32, the positive ones, at
    least one entry. `guess`: float32 `(terms,)`. `centroids`: float16 `(2**bits,)`.
    """

    first_signs: Tensor
    second_signs: Tensor
    boundaries: Tensor
    guess: Tensor
    centroids: Tensor


def kernel_tables(rotation: Rotation, bits: int, device: torch.device) -> KernelTables:
    """Build the tables on `device`. Signs are padded to the tile's row with +1."""
    row = int(tile_shape(rotation).constants["ROW"])

    def padded_signs(round_index: int) -> Tensor:
        values = torch.ones(row, dtype=torch.float16)
        values[: rotation.dim] = torch.from_numpy(signs(rotation.seed, round_index, rotation.dim))
        return values.to(device)

    boundaries = torch.from_numpy(float32_boundaries(rotation.dim, bits))
    return KernelTables(
        padded_signs(0),
        padded_signs(1),
        (boundaries if boundaries.numel() else torch.zeros(1, dtype=torch.float32)).to(device),
        boundary_guess(rotation.dim, bits).to(device),
        torch.from_numpy(float32_centroids(rotation.dim, bits)).half().to(device),
    )


def _launch(
    kernel: Any, shape: TileShape, settings: LaunchSettings, num_rows: int, device: torch.device
) -> Callable[..., None]:
    programs = triton.cdiv(num_rows, shape.rows)
    if settings.programs_per_sm:
        programs = min(programs, settings.programs_per_sm * multiprocessors(device))
    return cast("Callable[..., None]", kernel[(programs,)])


def launch_encode(
    x: Tensor,
    packed: Tensor,
    norms: Tensor,
    bits: int,
    rotation: Rotation,
    tables: KernelTables,
    settings: LaunchSettings | None = None,
) -> None:
    """Encode the rows of `x` into `packed` and `norms`, in one launch.

    Args:
        x: bf16, fp16 or fp32 `(n, dim)`, n > 0, its last dimension contiguous.
        packed: uint8 `(n, packed_dim(dim, bits))`, contiguous, written.
        norms: float32 `(n,)`, contiguous, written; not finite for rows that are not.
        settings: launch settings other than the default ones.
    """
    shape = tile_shape(rotation)
    settings = settings or encode_settings(rotation, bits)
    with on_device(x.device):
        _launch(encode_kernel, shape, settings, x.shape[0], x.device)(
            x,
            packed,
            norms,
            tables.first_signs,
            tables.second_signs,
            tables.boundaries,
            tables.guess,
            x.shape[0],
            x.stride(0),
            math.sqrt(rotation.dim) / shape.residual,
            **shape.constants,
            PERSISTENT=int(settings.programs_per_sm > 0),
            BITS=bits,
            GUESS_TERMS=tables.guess.numel(),
            STAGES=settings.stages,
            num_warps=settings.num_warps,
        )


def launch_decode(
    packed: Tensor,
    norms: Tensor,
    out: Tensor,
    bits: int,
    rotation: Rotation,
    tables: KernelTables,
    settings: LaunchSettings | None = None,
) -> None:
    """Decode `packed` and `norms` into `out`, in one launch.

    Args:
        packed: uint8 `(n, packed_dim(dim, bits))`, n > 0, contiguous.
        norms: float32 `(n,)`, contiguous.
        out: float32 `(n, dim)`, contiguous, written.
        settings: launch settings other than the default ones.
    """
    shape = tile_shape(rotation)
    settings = settings or decode_settings(rotation, bits)
    with on_device(packed.device):
        _launch(decode_kernel, shape, settings, packed.shape[0], packed.device)(
            packed,
            norms,
            out,
            tables.first_signs,
            tables.second_signs,
            tables.centroids,
            packed.shape[0],
            1.0 / (math.sqrt(rotation.dim) * shape.residual),
            **shape.constants,
            PERSISTENT=int(settings.programs_per_sm > 0),
            BITS=bits,
            num_warps=settings.num_warps,
        )
