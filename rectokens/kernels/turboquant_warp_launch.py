"""Launches of the TurboQuant kernels that keep a row in one warp.

Nothing here is public. They take sizes of up to 16,384 with blocks of at least 256; the
kernels of `turboquant_launch` take everything else, and these too where Triton has no Gluon.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from rectokens._turboquant.assign import float32_centroids
from rectokens._turboquant.codec import Rotation, packed_dim
from rectokens._turboquant.signs import signs
from rectokens.kernels.launch_device import on_device
from rectokens.kernels.turboquant_assign_ptx import scale_of_pairs
from rectokens.kernels.turboquant_decode_ptx import decode_ptx
from rectokens.kernels.turboquant_encode_ptx import encode_ptx
from rectokens.kernels.warp_rows import (
    DECODE_LAYOUT,
    ENCODE_LAYOUT,
    PAIRS,
    PAIRS_OF_A_SIGN_WORD,
    SLICE,
    Fused,
    Layout,
    RowShape,
    fits,
)

_KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_BITS = (1, 2, 4, 8)
# Slices that a warp holds at best: with fewer, more rows are in flight and each is done sooner, but
# warps exchange more. Rows of 16-bit numbers need fewer registers.
_SLICES = 4
_SLICES_OF_16_BITS = 8
# More than four warps pay where the work on a number is largest: encoding to 8 bits, and decoding.
_TEAM_BELOW_8_BITS = 4


@dataclass(frozen=True)
class WarpSettings:
    """How a kernel is launched, and what its text is made of.

    `rows`: of a block of the launch. `team`: warps that hold a row together; with more than one,
    `rows` is 1. `fused`, `wide`: see `encode_ptx`; decoding has no `wide`.
    """

    rows: int
    team: int
    fused: Fused
    wide: bool = False


def team_of(rotation: Rotation, slices: int = _SLICES) -> int:
    """Warps that hold a row: as many as leave each so many slices, if so many can; 0 if none."""
    teams = [team for team in (1, 2, 4, 8) if fits(rotation.dim, rotation.block, team)]
    enough = (team for team in teams if rotation.dim <= team * slices * SLICE)
    return next(enough, teams[-1] if teams else 0)


def encode_settings(rotation: Rotation, bits: int, dtype: torch.dtype) -> WarpSettings:
    """The fastest measured settings; at 8 bits, with as few roundings as the indices need.

    They do not depend on the number of rows: a row's bytes are the same in any batch.
    """
    team = team_of(rotation, _SLICES if dtype == torch.float32 else _SLICES_OF_16_BITS)
    if bits < 8:
        team = min(team, _TEAM_BELOW_8_BITS)
        return WarpSettings(1, team, (0, 0, 0, 0))
    if rotation.block <= 4096:
        return WarpSettings(1, team, (1, 0, 0, 1))
    return WarpSettings(1, team, (2, 1, 1, 2), wide=True)


def decode_settings(rotation: Rotation) -> WarpSettings:
    """The fastest measured settings."""
    return WarpSettings(1, team_of(rotation), (0, 0, 0, 0))


@lru_cache(maxsize=1)
def _kernels() -> ModuleType | None:
    try:
        from rectokens.kernels import turboquant_warp
    except ImportError:
        return None
    return turboquant_warp


def supports(rotation: Rotation, bits: int, device: torch.device) -> bool:
    """Whether these kernels handle the codec on `device`."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and team_of(rotation) > 0
        and bits in _BITS
        and _kernels() is not None
    )


def takes(x: Tensor) -> bool:
    """Whether rows `(n, dim)` can be read 16 bytes at a time."""
    return (
        x.dtype in _KINDS
        and x.stride(1) == 1
        and x.stride(0) * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
    )


def _in_lanes(values: np.ndarray, layout: Layout) -> np.ndarray:
    """Numbers of a row `(dim,)` as lanes hold them, `(slices, 32, PAIRS, 2)`."""
    order = np.array(
        [
            [[layout.element(lane, pair) + half for half in (0, 1)] for pair in range(PAIRS)]
            for lane in range(32)
        ]
    )
    return np.asarray(values.reshape(-1, SLICE)[:, order])


def _after_permutation(rotation: Rotation, values: np.ndarray) -> np.ndarray:
    """What element i of block b meets in block (b + i) mod m."""
    blocks = values.reshape(rotation.num_blocks, rotation.block)
    index = np.arange(rotation.block)[None, :]
    block = np.arange(rotation.num_blocks)[:, None]
    return np.asarray(blocks[(block + index) % rotation.num_blocks, index].reshape(-1))


def lane_signs(rotation: Rotation, layout: Layout, team: int) -> Tensor:
    """Signs as lanes hold them, bits that are 1 for -1: int32 `(team, 2, words, 32)` by round.

    Of the warp's pair 16 * word + k the first number has bit 15 - k, the second bit 31 - k. In the
    second round slices are those that a warp has after the exchange. In the order of decoding the
    second round's apply once the permutation is undone.
    """
    shape = RowShape(rotation.dim, rotation.block, team)
    local = range(shape.slices)
    there = [shape.place(i) + warp * shape.slices_per_block for warp in range(team) for i in local]
    after = [
        shape.exchanged_place(i) + warp * shape.exchanged for warp in range(team) for i in local
    ]
    table = np.zeros((team, 2, shape.sign_words * PAIRS_OF_A_SIGN_WORD, 32), np.uint32)
    places = np.arange(shape.slices * PAIRS) % PAIRS_OF_A_SIGN_WORD
    lower = np.uint32(1) << (15 - places).astype(np.uint32)[:, None]
    for round_index, order in enumerate((there, after)):
        values = np.asarray(signs(rotation.seed, round_index, rotation.dim), np.float32)
        if layout is DECODE_LAYOUT and round_index == 1:
            values = _after_permutation(rotation, values)
        lanes = _in_lanes(values, layout)[order].reshape(team, shape.slices, 32, PAIRS, 2)
        first, second = (lanes < 0).transpose(4, 0, 1, 3, 2).reshape(2, team, -1, 32)
        table[:, round_index, : len(places)] = first * lower | second * (lower << np.uint32(16))
    words = np.bitwise_or.reduce(table.reshape(team, 2, shape.sign_words, -1, 32), axis=3)
    return torch.from_numpy(words.view(np.int32))


@dataclass(frozen=True)
class WarpTables:
    """What these kernels read, on one device; see `lane_signs`. `centroids`: fp16 `(256,)`.

    Signs for encoding are by the number of warps that hold a row.
    """

    encode: dict[int, Tensor]
    decode: Tensor
    centroids: Tensor


def warp_tables(rotation: Rotation, bits: int, device: torch.device, team: int = 0) -> WarpTables:
    """Build the tables on `device`, for the default teams unless another is asked for."""
    centroids = torch.zeros(256, dtype=torch.float16)
    centroids[: 1 << bits] = torch.from_numpy(float32_centroids(rotation.dim, bits)).half()
    teams = {team} if team else {encode_settings(rotation, bits, t).team for t in _KINDS}
    return WarpTables(
        {each: lane_signs(rotation, ENCODE_LAYOUT, each).to(device) for each in teams},
        lane_signs(rotation, DECODE_LAYOUT, team or team_of(rotation)).to(device),
        centroids.to(device),
    )


def _gain(rotation: Rotation) -> float:
    """The factor of a unit vector after which coordinates come out with a variance of one.

    The products are orthonormal, the levels between the slices of a block are not, in two rounds.
    """
    return math.sqrt(rotation.dim) * SLICE / rotation.block


def encode_gain(rotation: Rotation, bits: int) -> float:
    """The factor of a unit vector: coordinates come out as the assignment wants them."""
    return _gain(rotation) * scale_of_pairs(rotation.dim, bits)


def decode_gain(rotation: Rotation) -> float:
    """The factor of results: what a rotation there and back, with the first factor, leaves."""
    return _gain(rotation) / rotation.dim


def launch_encode(
    x: Tensor,
    packed: Tensor,
    norms: Tensor,
    bits: int,
    rotation: Rotation,
    tables: WarpTables,
    settings: WarpSettings | None = None,
) -> None:
    """Encode the rows of `x`, which `takes` accepts, into `packed` and `norms`, in one launch.

    Args:
        x: `(n, dim)`, n > 0.
        packed: uint8 `(n, packed_dim(dim, bits))`, contiguous, at a multiple of 8 bytes, written.
        norms: float32 `(n,)`, contiguous, written; not finite for rows that are not.
        settings: launch settings other than the default ones.
    """
    settings = settings or encode_settings(rotation, bits, x.dtype)
    kernels = _kernels()
    assert kernels is not None
    with on_device(x.device):
        kernels.encode_warp_kernel[(-(-len(x) // settings.rows),)](
            x,
            packed,
            norms,
            tables.encode[settings.team],
            len(x),
            x.stride(0),
            encode_gain(rotation, bits),
            ROW_BYTES=packed_dim(rotation.dim, bits),
            PTX=encode_ptx(
                rotation.dim,
                rotation.block,
                bits,
                _KINDS[x.dtype],
                settings.fused,
                settings.team,
                settings.wide,
            ),
            ROWS=settings.rows,
            TEAM=settings.team,
            num_warps=settings.rows * settings.team,
        )


def launch_decode(
    packed: Tensor,
    norms: Tensor,
    out: Tensor,
    bits: int,
    rotation: Rotation,
    tables: WarpTables,
    settings: WarpSettings | None = None,
) -> None:
    """Decode `packed`, at a multiple of 4 bytes, and `norms` into `out`, float32 `(n, dim)`."""
    settings = settings or decode_settings(rotation)
    kernels = _kernels()
    assert kernels is not None
    with on_device(packed.device):
        kernels.decode_warp_kernel[(-(-len(norms) // settings.rows),)](
            packed,
            norms,
            out,
            tables.decode,
            tables.centroids,
            len(norms),
            decode_gain(rotation),
            DIM=rotation.dim,
            ROW_BYTES=packed_dim(rotation.dim, bits),
            PTX=decode_ptx(rotation.dim, rotation.block, bits, settings.fused, settings.team),
            ROWS=settings.rows,
            TEAM=settings.team,
            num_warps=settings.rows * settings.team,
        )
