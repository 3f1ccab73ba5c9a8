"""The definition of the codec: slow, dense and in double precision.

Every other path must give the same bytes, except where the rounding of float32 decides on which
side of a boundary a coordinate lies.
"""

import math

import torch
from torch import Tensor

from rectokens._turboquant.assign import float32_boundaries, float32_centroids
from rectokens._turboquant.codec import Rotation, packed_dim
from rectokens._turboquant.signs import signs


def hadamard_matrix(size: int) -> Tensor:
    """Orthonormal Walsh-Hadamard matrix, `(size, size)` float64; entry (i, j) has the sign
    `(-1)**popcount(i & j)`.
    """
    index = torch.arange(size)
    parity = torch.zeros(size, size, dtype=torch.int64)
    for bit in range(size.bit_length()):
        parity += ((index[:, None] & index) >> bit) & 1
    return (1.0 - 2.0 * (parity % 2).double()) / math.sqrt(size)


def rotation_matrix(rotation: Rotation) -> Tensor:
    """The whole rotation as one orthonormal matrix R, `(dim, dim)` float64: `y = R @ x`."""
    dim, block, count = rotation.dim, rotation.block, rotation.num_blocks
    blocks = torch.block_diag(*[hadamard_matrix(block)] * count)
    permutation = torch.zeros(dim, dim, dtype=torch.float64)
    for b in range(count):
        for i in range(block):
            permutation[(b + i) % count * block + i, b * block + i] = 1.0
    first = torch.diag(torch.from_numpy(signs(rotation.seed, 0, dim)).double())
    second = torch.diag(torch.from_numpy(signs(rotation.seed, 1, dim)).double())
    product: Tensor = blocks @ second @ permutation @ blocks @ first
    return product


def encode_reference(x: Tensor, bits: int, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Packed bytes `(n, packed_dim)` uint8 and norms `(n,)` float32 of the rows of `x` (n, dim)."""
    n, dim = x.shape
    norms = torch.linalg.vector_norm(x.double(), dim=1)
    unit = x.double() / torch.where(norms > 0, norms, 1.0)[:, None]
    y = (unit @ matrix.T) * math.sqrt(dim)
    half = 1 << (bits - 1)
    boundaries = torch.from_numpy(float32_boundaries(dim, bits)).double()
    magnitude = (
        (y.abs()[:, :, None] > boundaries).sum(2) if half > 1 else torch.zeros_like(y).long()
    )
    indices = torch.where(y > 0, half + magnitude, half - 1 - magnitude)
    packed = torch.zeros(n, packed_dim(dim, bits), dtype=torch.int64)
    for i in range(dim):
        packed[:, i * bits // 8] |= indices[:, i] << (i * bits % 8)
    return packed.to(torch.uint8), norms.float()


def decode_reference(packed: Tensor, norms: Tensor, bits: int, matrix: Tensor) -> Tensor:
    """Rows `(n, dim)` float32 from packed bytes and norms."""
    dim = matrix.shape[0]
    columns = [
        (packed[:, i * bits // 8].long() >> (i * bits % 8)) & ((1 << bits) - 1) for i in range(dim)
    ]
    centroids = torch.from_numpy(float32_centroids(dim, bits)).double()
    unit = centroids[torch.stack(columns, 1)] / math.sqrt(dim) @ matrix
    return (unit * norms.double()[:, None]).float()
