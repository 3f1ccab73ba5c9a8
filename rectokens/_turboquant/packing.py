"""Bit packing, least significant bits first: element 0 lies in the low bits of byte 0."""

import torch
from torch import Tensor


def pack(indices: Tensor, bits: int) -> Tensor:
    """Pack `(n, dim)` uint8 indices of `bits` bits each into `(n, ceil(dim * bits / 8))` uint8.

    `bits` is 1, 2, 4 or 8; bits beyond the last element are zero.
    """
    if bits == 8:
        return indices
    per_byte = 8 // bits
    padding = -indices.shape[1] % per_byte
    if padding:
        indices = torch.nn.functional.pad(indices, (0, padding))
    packed = indices[:, 0::per_byte].clone()
    for slot in range(1, per_byte):
        packed |= indices[:, slot::per_byte] << (slot * bits)
    return packed


def unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """The inverse of `pack`: `(n, ceil(dim * bits / 8))` uint8 to `(n, dim)` uint8."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    indices = (packed[:, :, None] >> shifts) & ((1 << bits) - 1)
    return indices.flatten(1)[:, :dim]
