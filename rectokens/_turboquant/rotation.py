"""The rotation as plain PyTorch passes: the fast path of CPUs, and of devices without Triton."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rectokens._turboquant.codec import Rotation
from rectokens._turboquant.signs import signs

# Larger radices waste arithmetic, smaller ones passes; a short block takes one pass.
_MAX_RADIX = 16
_MAX_SINGLE_RADIX = 64


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
    matrix = torch.ones(1, 1, dtype=torch.float32)
    while matrix.shape[0] < radix:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


@lru_cache(maxsize=32)
def _radices(block: int) -> tuple[int, ...]:
    """Near-equal powers of two, as few as the largest radix allows, whose product is `block`."""
    levels = block.bit_length() - 1
    if block <= _MAX_SINGLE_RADIX:
        return (block,)
    passes = math.ceil(levels / (_MAX_RADIX.bit_length() - 1))
    return tuple(1 << (levels // passes + (i < levels % passes)) for i in range(passes))


def _by_small_products(x: Tensor, block: int, spare: Tensor) -> tuple[Tensor, Tensor]:
    """One small product an axis: each pass transforms the first axis of a block and puts it last.

    After as many passes as there are axes they are in their order again.
    """
    for radix in _radices(block):
        factor, rest = _hadamard_factor(radix), block // radix
        if rest == 1:
            torch.mm(x.view(-1, radix), factor, out=spare.view(-1, radix))
        else:
            columns = x.view(-1, radix, rest)
            torch.bmm(
                columns.mT,
                factor.expand(columns.shape[0], radix, radix),
                out=spare.view(-1, rest, radix),
            )
        x, spare = spare, x
    return x, spare


def _by_additions(x: Tensor, block: int, spare: Tensor) -> tuple[Tensor, Tensor]:
    """Radix-2 butterfly: `log2(block)` passes of sums and differences."""
    half = block // 2
    while half:
        pairs, out = x.view(-1, 2, half), spare.view(-1, 2, half)
        torch.add(pairs[:, 0], pairs[:, 1], out=out[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=out[:, 1])
        x, spare = spare, x
        half //= 2
    return x, spare


def _products_are_float32(device: torch.device) -> bool:
    # A program may allow float32 products to run in bf16 or TF32; one such pass would cost more
    # error than the whole quantizer at 8 bits.
    return device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"


def walsh_hadamard(x: Tensor, block: int, spare: Tensor) -> tuple[Tensor, Tensor]:
    """Unnormalised Walsh-Hadamard transform of each run of `block` elements.

    Args:
        x: float32, contiguous, its last dimension a multiple of `block` (a power of two);
            overwritten.
        spare: like `x`, overwritten.

    Returns:
        `sqrt(block)` times the orthonormal transform, in the memory of one of the two; and the
        other.
    """
    if block == 1:
        return x, spare
    transform = _by_small_products if _products_are_float32(x.device) else _by_additions
    return transform(x, block, spare)


def rotate(
    x: Tensor, rotation: Rotation, tables: RotationTables, spare: Tensor
) -> tuple[Tensor, Tensor]:
    """`block` times the rotation of `x`, `(n, dim)` float32; callers fold the factor in.

    Memory is used as in `walsh_hadamard`.
    """
    x, spare = walsh_hadamard(x.mul_(tables.signs_first), rotation.block, spare)
    if tables.forward_gather is not None:
        x, spare = torch.index_select(x, 1, tables.forward_gather, out=spare), x
    return walsh_hadamard(x.mul_(tables.signs_second), rotation.block, spare)


def rotate_back(
    y: Tensor, rotation: Rotation, tables: RotationTables, spare: Tensor
) -> tuple[Tensor, Tensor]:
    """`block` times the inverse rotation of `y`, `(n, dim)` float32.

    Memory is used as in `walsh_hadamard`.
    """
    y, spare = walsh_hadamard(y, rotation.block, spare)
    y.mul_(tables.signs_second)
    if tables.backward_gather is not None:
        y, spare = torch.index_select(y, 1, tables.backward_gather, out=spare), y
    y, spare = walsh_hadamard(y, rotation.block, spare)
    return y.mul_(tables.signs_first), spare
