"""Launches of the TurboQuant kernels that keep a row in one warp.

Nothing here is public. They take powers of two from 512 to 4,096 at up to 4 bits; the kernels of
`turboquant_launch` take everything else, and these too where Triton has no Gluon.
"""

from __future__ import annotations

import math
from functools import lru_cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from rectokens._turboquant.codec import Rotation
from rectokens._turboquant.signs import signs
from rectokens.kernels.hadamard_ptx import (
    MAX_SLICES,
    PAIRS,
    SIGN_WORDS,
    SLICE,
    decode_ptx,
    encode_ptx,
)
from rectokens.kernels.launch_device import on_device

_KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_WORDS = {"bf16": torch.int32, "fp16": torch.int32, "fp32": torch.int64}
_CODES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@lru_cache(maxsize=1)
def _kernels() -> ModuleType | None:
    try:
        from rectokens.kernels import turboquant_warp
    except ImportError:
        return None
    return turboquant_warp


def supports(rotation: Rotation, bits: int, device: torch.device) -> bool:
    """Whether these kernels handle the codec on `device`."""
    slices = rotation.dim // SLICE
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and rotation.num_blocks == 1
        and 2 <= slices <= MAX_SLICES
        and bits in _CODES
        and _kernels() is not None
    )


def takes(x: Tensor) -> bool:
    """Whether rows `(n, dim)` can be read as words: whole words, aligned, next to each other."""
    return (
        x.dtype in _KINDS
        and x.stride(1) == 1
        and x.stride(0) % 2 == 0
        and x.storage_offset() % 2 == 0
        and x.data_ptr() % (2 * x.element_size()) == 0
    )


def lane_signs(rotation: Rotation) -> Tensor:
    """Sign bits as the lanes hold them, int32 `(2, 32, 4)`: round, lane, word.

    Bit ``15 - i`` of word j is 1 where the first number of pair ``16 * j + i`` is negated, bit
    ``31 - i`` where its second is.
    """
    slices = rotation.dim // SLICE
    words = np.zeros((2, 32, SIGN_WORDS), dtype=np.uint32)
    for round_index in (0, 1):
        minus = signs(rotation.seed, round_index, rotation.dim) < 0
        # (lane, pair, number): pairs of a lane in the order in which it holds them.
        minus = minus.reshape(slices, 32, PAIRS, 2).transpose(1, 0, 2, 3).reshape(32, -1, 2)
        for pair in range(slices * PAIRS):
            place = pair % 16
            bits = minus[:, pair].astype(np.uint32)
            words[round_index, :, pair // 16] |= bits[:, 0] << np.uint32(15 - place)
            words[round_index, :, pair // 16] |= bits[:, 1] << np.uint32(31 - place)
    return torch.from_numpy(words.view(np.int32))


def launch_encode(
    x: Tensor, packed: Tensor, norms: Tensor, bits: int, rotation: Rotation, sign_table: Tensor
) -> None:
    """Encode the rows of `x`, which `takes` accepts, into `packed` and `norms`, in one launch.

    Args:
        x: `(n, dim)`, n > 0.
        packed: uint8 `(n, packed_dim(dim, bits))`, contiguous, written.
        norms: float32 `(n,)`, contiguous, written; not finite for rows that are not.
        sign_table: `lane_signs` of the rotation, on the device of `x`.
    """
    kind, dim = _KINDS[x.dtype], rotation.dim
    text, constraints = encode_ptx(dim, bits, kind)
    words = x.view(_WORDS[kind])
    kernels = _kernels()
    assert kernels is not None
    with on_device(x.device):
        kernels.encode_warp_kernel[(len(x),)](
            words,
            packed.view(_CODES[bits]),
            norms,
            sign_table,
            words.stride(0),
            SLICE / math.sqrt(dim),
            SLICES=dim // SLICE,
            KIND=kind,
            PTX=text,
            CONSTRAINTS=constraints,
            num_warps=1,
        )


def launch_decode(
    packed: Tensor, norms: Tensor, out: Tensor, bits: int, rotation: Rotation, sign_table: Tensor
) -> None:
    """Decode `packed` and `norms`, contiguous, into `out`, float32 `(n, dim)` contiguous."""
    dim = rotation.dim
    text, constraints = decode_ptx(dim, bits)
    kernels = _kernels()
    assert kernels is not None
    with on_device(packed.device):
        kernels.decode_warp_kernel[(len(norms),)](
            packed.view(_CODES[bits]),
            norms,
            out.view(torch.int64),
            sign_table,
            SLICE / math.sqrt(dim) / dim,
            SLICES=dim // SLICE,
            PTX=text,
            CONSTRAINTS=constraints,
            num_warps=1,
        )
