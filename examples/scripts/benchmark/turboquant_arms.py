"""What `benchmark_turboquant` times: the library's kernels and the forms beside them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rectokens._turboquant.assign import float32_boundaries
from rectokens._turboquant.backends import Backend
from rectokens._turboquant.codec import Rotation, block_rotation, codec_for, hadamard_rotation
from rectokens._turboquant.packing import pack
from rectokens._turboquant.signs import signs
from rectokens.turboquant import DEFAULT_CODEC, packed_dim

_COLD_BYTES = 256 << 20
_MAX_BUFFER_SETS = 16

Calls = list[Callable[[], Any]]
Arm = tuple[str, str, Calls]
Transform = Callable[[Tensor], Tensor]


def rotation_of(dim: int) -> Rotation:
    """The rotation the library would use for `dim`."""
    if codec_for(dim) == DEFAULT_CODEC:
        return hadamard_rotation(dim, 42)
    return block_rotation(dim, 42)


@dataclass(frozen=True)
class Buffers:
    """One set of inputs and outputs for both directions."""

    x: Tensor
    packed: Tensor
    norms: Tensor
    x_hat: Tensor


def buffer_sets(
    dim: int, bits: int, dtype: torch.dtype, rows: int, device: torch.device
) -> list[Buffers]:
    """As many sets as it takes to outgrow the caches, with random contents."""
    width = packed_dim(dim, bits)
    set_bytes = rows * (dim * (dtype.itemsize + 4) + width + 4)
    count = min(_MAX_BUFFER_SETS, max(2, math.ceil(_COLD_BYTES / set_bytes)))
    return [
        Buffers(
            torch.randn(rows, dim, device=device).to(dtype),
            torch.randint(256, (rows, width), dtype=torch.uint8, device=device),
            torch.rand(rows, device=device) + 0.5,
            torch.empty(rows, dim, device=device),
        )
        for _ in range(count)
    ]


def dense_arm(dim: int, dtype: torch.dtype, sets: list[Buffers]) -> Calls:
    """The rotation as one product with a dense matrix of the rows' type."""
    matrix = torch.randn(dim, dim, device=sets[0].x.device).to(dtype)
    outputs = [torch.empty_like(buffers.x) for buffers in sets[:2]]
    return [
        partial(torch.mm, b.x, matrix, out=out)
        for b, out in zip(sets, itertools.cycle(outputs), strict=False)
    ]


def library_transform(dim: int) -> Transform | None:
    """The orthonormal transform of ``fast_hadamard_transform``, if that is installed."""
    try:
        from fast_hadamard_transform import hadamard_transform
    except ImportError:
        return None
    return lambda x: hadamard_transform(x, dim**-0.5)


def product_transform(dim: int, dtype: torch.dtype, device: torch.device) -> Transform:
    """The orthonormal transform of a power of two as two products with small matrices."""
    first = 1 << (dim.bit_length() - 1) // 2

    def matrix(size: int) -> Tensor:
        found = torch.ones(1, 1)
        while len(found) < size:
            found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
        return (found / math.sqrt(size)).to(device, dtype)

    left, right = matrix(first), matrix(dim // first)

    def transform(x: Tensor) -> Tensor:
        return (left @ x.view(-1, first, dim // first) @ right).view(-1, dim)

    return transform


def two_step(
    dim: int, bits: int, transform: Transform, work: torch.dtype, device: torch.device
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Codes and norms of rows by norms, two transforms of type ``work``, assignment and packing."""
    boundaries = torch.from_numpy(float32_boundaries(dim, bits)).to(device)
    first, second = (torch.from_numpy(signs(42, i, dim)).to(device, work) for i in (0, 1))
    half = 1 << (bits - 1)

    def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
        x = rows.float()
        norms = torch.linalg.vector_norm(x, dim=1)
        y = transform((x * (math.sqrt(dim) / norms[:, None])).to(work) * first)
        y = transform(y * second).float()
        count = torch.bucketize(y.abs(), boundaries, out_int32=True).to(torch.uint8)
        return pack(torch.where(y > 0, half + count, half - 1 - count), bits), norms

    return encode


def two_step_arm(dim: int, bits: int, sets: list[Buffers]) -> Calls | None:
    """The same codes in several launches, for powers of two on CUDA."""
    device = sets[0].x.device
    if device.type != "cuda" or codec_for(dim) != DEFAULT_CODEC:
        return None
    library = library_transform(dim)
    if library:
        encode = two_step(dim, bits, library, torch.float32, device)
    else:
        transform = product_transform(dim, torch.float16, device)
        encode = two_step(dim, bits, transform, torch.float16, device)
    return [partial(encode, b.x) for b in sets[:2]]


def kernel_arms(backend: Backend, sets: list[Buffers]) -> Iterator[Arm]:
    """The library's own path, below its argument checks."""
    yield "kernel", "encode", [partial(backend.encode, b.x, b.packed, b.norms) for b in sets]
    yield "kernel", "decode", [partial(backend.decode, b.packed, b.norms, b.x_hat) for b in sets]


def warp_arms(dim: int, bits: int, sets: list[Buffers]) -> Iterator[Arm]:
    """The warp kernels under other settings."""
    from rectokens.kernels import turboquant_warp_launch as launch
    from rectokens.kernels.warp_rows import (
        fits,
    )

    rotation = rotation_of(dim)
    for team, rows in ((1, 1), (1, 2), (1, 4), (2, 1), (4, 1), (8, 1)):
        if not fits(dim, rotation.block, team):
            continue
        tables = launch.warp_tables(rotation, bits, sets[0].x.device, team)
        for fused in itertools.product((False, True), repeat=4):
            rest = (bits, rotation, tables, launch.WarpSettings(rows, team, fused))
            name = f"warp rows={rows} team={team} fused={''.join(str(int(f)) for f in fused)}"
            encode = [partial(launch.launch_encode, b.x, b.packed, b.norms, *rest) for b in sets]
            decode = [
                partial(launch.launch_decode, b.packed, b.norms, b.x_hat, *rest) for b in sets
            ]
            yield name, "encode", encode
            yield name, "decode", decode


def tile_arms(dim: int, bits: int, sets: list[Buffers]) -> Iterator[Arm]:
    """The tile kernels under other settings."""
    from rectokens.kernels import turboquant_launch as launch

    rotation = rotation_of(dim)
    tables = launch.kernel_tables(rotation, bits, sets[0].x.device)
    for warps, programs, stages in itertools.product((4, 8, 16), (0, 1, 2, 3, 4), (1, 2, 3)):
        if programs == 0 and stages > 1:
            continue
        rest = (bits, rotation, tables, launch.LaunchSettings(warps, programs, stages))
        name = f"tile warps={warps} programs={programs} stages={stages}"
        encode = [partial(launch.launch_encode, b.x, b.packed, b.norms, *rest) for b in sets]
        decode = [partial(launch.launch_decode, b.packed, b.norms, b.x_hat, *rest) for b in sets]
        if bits != 8 or stages == 1:  # Looking ahead past the table look-up spills.
            yield name, "encode", encode
        if stages == 1:
            yield name, "decode", decode
