"""The rotation as plain PyTorch passes: the fast path of CPUs, and of devices without Triton."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rectokens._turboquant.codec import Rotation
from rectokens._turboquant.signs import signs

# A pass over a block of this radix is one small matrix product; larger ones waste arithmetic.
_MAX_RADIX = 64


@dataclass(frozen=True)
class RotationTables:
    """What a rotation needs on one device.

    `signs_first`, `signs_second`: float32 `(dim,)` of +1 and -1.
    `forward_gather`, `backward_gather`: int64 `(dim,)`, the permutation between the rounds and its
    inverse as gather indices; None with a single block.
    """

    signs_first: Tensor
    signs_second: Tensor
    forward_gather: Tensor | None
    backward_gather: Tensor | None


def rotation_tables(rotation: Rotation, device: torch.device) -> RotationTables:
    """Build the tables of `rotation` on `device`."""
    forward = backward = None
    if rotation.num_blocks > 1:
        # Element i of block b goes to element i of block (b + i) mod num_blocks: every block of
        # the second round gets an equal share of every block of the first.
        element = torch.arange(rotation.block)
        block = torch.arange(rotation.num_blocks)[:, None]
        forward = ((block - element) % rotation.num_blocks * rotation.block + element).flatten()
        backward = ((block + element) % rotation.num_blocks * rotation.block + element).flatten()
        forward, backward = forward.to(device), backward.to(device)
    return RotationTables(
        torch.from_numpy(signs(rotation.seed, 0, rotation.dim)).to(device),
        torch.from_numpy(signs(rotation.seed, 1, rotation.dim)).to(device),
        forward,
        backward,
    )


@lru_cache(maxsize=32)
def _hadamard_factor(radix: int) -> Tensor:
    """Unnormalised Walsh-Hadamard matrix, `(radix, radix)` float32 of +1 and -1, on the CPU."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < radix:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def _radices(block: int) -> list[int]:
    """Near-equal powers of two, none above the largest radix, whose product is `block`."""
    levels = block.bit_length() - 1
    passes = max(1, math.ceil(levels / (_MAX_RADIX.bit_length() - 1)))
    return [1 << (levels // passes + (i < levels % passes)) for i in range(passes)]


def _by_small_products(x: Tensor, block: int) -> Tensor:
    """Radix-64 butterfly: the block as a tensor of small axes, one small product along each."""
    radices = _radices(block)
    inner = 1
    for radix in radices:
        factor = _hadamard_factor(radix)
        if inner == 1:
            x = x.reshape(-1, radix) @ factor
        else:
            x = torch.matmul(factor, x.reshape(-1, radix, inner))
        inner *= radix
    return x


def _by_additions(x: Tensor, block: int) -> Tensor:
    """Radix-2 butterfly: `log2(block)` passes of sums and differences."""
    half = block // 2
    while half:
        pairs = x.reshape(-1, 2, half)
        x = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), 1)
        half //= 2
    return x


def _products_are_float32(device: torch.device) -> bool:
    # A program may allow float32 products to run in bf16 or TF32; one such pass would cost more
    # error than the whole quantizer at 8 bits.
    return device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"


def walsh_hadamard(x: Tensor, block: int) -> Tensor:
    """Unnormalised Walsh-Hadamard transform of each run of `block` elements.

    Args:
        x: float32, contiguous, its last dimension a multiple of `block` (a power of two).

    Returns:
        float32 of the shape of `x`: `sqrt(block)` times the orthonormal transform.
    """
    if block == 1:
        return x
    transform = _by_small_products if _products_are_float32(x.device) else _by_additions
    return transform(x, block).reshape(x.shape)


def rotate(x: Tensor, rotation: Rotation, tables: RotationTables) -> Tensor:
    """`block` times the rotation of `x`, `(n, dim)` float32; callers fold the factor in."""
    y = walsh_hadamard(x * tables.signs_first, rotation.block)
    if tables.forward_gather is not None:
        y = y.index_select(1, tables.forward_gather)
    return walsh_hadamard(y * tables.signs_second, rotation.block)


def rotate_back(y: Tensor, rotation: Rotation, tables: RotationTables) -> Tensor:
    """`block` times the inverse rotation of `y`, `(n, dim)` float32."""
    x = walsh_hadamard(y, rotation.block) * tables.signs_second
    if tables.backward_gather is not None:
        x = x.index_select(1, tables.backward_gather)
    return walsh_hadamard(x, rotation.block) * tables.signs_first
