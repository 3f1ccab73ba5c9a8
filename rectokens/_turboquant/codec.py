"""Which rotation belongs to which size, and the string that names it on the wire.

A codec string is `tq1/<rotation>/<bit order>/seed<seed>`. `tq1` fixes the sign generator and the
codebooks; the rotation is `hd2` (two rounds of signs and Hadamard), `bhd2` (the same on equal
blocks with a permutation between the rounds) or `none`; `lsb` packs element 0 in the low bits.
"""

from dataclasses import dataclass

DEFAULT_SEED = 42
DEFAULT_CODEC = f"tq1/hd2/lsb/seed{DEFAULT_SEED}"
BLOCK_CODEC = f"tq1/bhd2/lsb/seed{DEFAULT_SEED}"

# Every block of the second round must draw enough elements from every block of the first, or
# sparse rows come out lumpy. At 16 the table of errors still holds; see the tests.
MIN_DRAWS_PER_BLOCK = 16

_PACKED_BITS = (1, 2, 3, 4, 8)


def is_plain_int(value: object) -> bool:
    """True for an int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def packed_dim(dim: int, bits: int) -> int:
    """Bytes of one packed vector: `ceil(dim * bits / 8)`.

    Args:
        dim: elements of the vector, positive.
        bits: bits an element: 1, 2, 3, 4 or 8 (3: eight elements in three bytes).

    Raises:
        ValueError: another `bits`, or a `dim` that is not a positive int.
    """
    if not is_plain_int(bits) or bits not in _PACKED_BITS:
        raise ValueError(f"bits must be one of {_PACKED_BITS}, got {bits!r}")
    if not is_plain_int(dim) or dim < 1:
        raise ValueError(f"dim must be a positive int, got {dim!r}")
    return -(-dim * bits // 8)


@dataclass(frozen=True)
class Rotation:
    """An orthonormal map of `dim` numbers: two rounds of signs and blockwise Hadamard.

    `block` is a power of two that divides `dim`; with one block there is no permutation.
    """

    dim: int
    block: int
    seed: int

    @property
    def num_blocks(self) -> int:
        """Blocks of a vector, `dim / block`."""
        return self.dim // self.block


def power_of_two_part(dim: int) -> int:
    """The largest power of two that divides `dim`."""
    return dim & -dim


def hadamard_rotation(dim: int, seed: int) -> Rotation:
    """The rotation of `hd2`.

    Raises:
        ValueError: `dim` is not a power of two.
    """
    if not is_plain_int(dim) or dim < 1 or power_of_two_part(dim) != dim:
        raise ValueError(f"dim must be a power of two when rotate=True, got {dim!r}")
    return Rotation(dim, dim, seed)


def block_rotation(dim: int, seed: int) -> Rotation:
    """The rotation of `bhd2`.

    Raises:
        ValueError: `dim` is a power of two (that is what `hd2` is for), or its power-of-two part
            is under 16 times the number of blocks.
    """
    if not is_plain_int(dim) or dim < 1:
        raise ValueError(f"dim must be a positive int, got {dim!r}")
    block = power_of_two_part(dim)
    num_blocks = dim // block
    if num_blocks == 1:
        raise ValueError(f"dim {dim} is a power of two: the block codec is for the sizes between")
    if block < MIN_DRAWS_PER_BLOCK * num_blocks:
        raise ValueError(
            f"dim {dim} = {num_blocks} x {block} cannot be rotated in blocks: the power-of-two "
            f"part must be at least {MIN_DRAWS_PER_BLOCK} x {num_blocks}"
        )
    return Rotation(dim, block, seed)


def codec_for(dim: int) -> str:
    """The codec this package would choose for vectors of `dim` elements.

    Raises:
        ValueError: no codec can rotate vectors of that size.
    """
    if is_plain_int(dim) and dim >= 1 and power_of_two_part(dim) == dim:
        return DEFAULT_CODEC
    block_rotation(dim, DEFAULT_SEED)
    return BLOCK_CODEC
