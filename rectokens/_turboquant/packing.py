"""Bit packing, least significant bits first: element 0 lies in the low bits of byte 0."""

import torch
from torch import Tensor

# Elements of a byte as one integer: on a little-endian machine, element i is its byte i.
_WIDE_TYPES = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(
    indices: Tensor, bits: int, out: Tensor | None = None, spare: Tensor | None = None
) -> Tensor:
    """Pack `(n, dim)` uint8 indices of `bits` bits each into `(n, ceil(dim * bits / 8))` uint8.

    `bits` is 1, 2, 4 or 8; bits beyond the last element are zero. The answer goes to `out` if that
    is given; `spare`, uint8 `(n, dim)`, is overwritten and saves an allocation.
    """
    per_byte = 8 // bits
    padding = -indices.shape[1] % per_byte
    if padding:
        indices, spare = torch.nn.functional.pad(indices, (0, padding)), None
    packed = indices
    if bits < 8:
        # Neighbours are merged, then pairs of them, and so on, into the low byte of the integer.
        wide = indices.contiguous().view(_WIDE_TYPES[per_byte])
        room = None if spare is None else spare.view(wide.dtype)
        merged = 1
        while merged < per_byte:
            shifted = torch.bitwise_right_shift(wide, merged * (8 - bits), out=room)
            wide, room = shifted.bitwise_or_(wide), None
            merged *= 2
        packed = wide
    return packed.to(torch.uint8) if out is None else out.copy_(packed)


def unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """The inverse of `pack`: `(n, ceil(dim * bits / 8))` uint8 to `(n, dim)` uint8."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    indices = (packed[:, :, None] >> shifts) & ((1 << bits) - 1)
    return indices.flatten(1)[:, :dim]
