"""TurboQuant, an online vector quantizer without training (arXiv:2504.19874, the MSE variant).

`docs/turboquant.md` defines the format to the bit, for decoders in other languages.
"""

import threading
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

from rectokens._turboquant.codec import (
    BLOCK_CODEC,
    DEFAULT_CODEC,
    DEFAULT_SEED,
    block_rotation,
    codec_for,
    hadamard_rotation,
    is_plain_int,
    packed_dim,
)
from rectokens._turboquant.quantizer import VectorQuantizer, check_bits, check_seed

__all__ = [
    "BLOCK_CODEC",
    "DEFAULT_CODEC",
    "BlockTurboQuantMSE",
    "TurboQuantMSE",
    "TurboQuantPayload",
    "codec_for",
    "encode_embeddings",
    "packed_dim",
    "quantizer_for",
    "warmup_encode",
]


class TurboQuantPayload(TypedDict):
    """Compressed prompt embeddings as they travel.

    `packed`: uint8 `(num_tokens, packed_dim(d, bits))`. `norms`: float32 `(num_tokens,)`. `bits`
    and `d`: plain ints. `codec`: names rotation, rounds, bit order and seed; missing means
    `DEFAULT_CODEC`.
    """

    packed: Tensor
    norms: Tensor
    bits: int
    d: int
    codec: NotRequired[str]


class TurboQuantMSE(VectorQuantizer):
    """TurboQuant for vectors whose size is a power of two.

    Encode: normalise, rotate by two rounds of random signs and Hadamard, assign each coordinate to
    the nearest Lloyd-Max centroid, pack. Decode: the reverse. Tensors are processed on the device
    they live on; tables are made there at first use. Safe to share between threads.

    Args:
        dim: elements of a vector; a power of two if `rotate`, else any positive int.
        bits: bits an element: 1, 2, 4 or 8.
        seed: of the rotation's signs, in [0, 2**64).
        rotate: False leaves the rotation out (for ablations).
        least_squares: store in place of each norm the scale that minimises the error of the
            decoded vector. Never worse, and decoders need not know; off by default because the
            documented `norms` are norms.

    Raises:
        ValueError: a value outside the above, which the message names.
    """

    def __init__(
        self,
        dim: int,
        bits: int,
        seed: int = DEFAULT_SEED,
        rotate: bool = True,
        *,
        least_squares: bool = False,
    ) -> None:
        check_bits(bits)
        check_seed(seed)
        if not is_plain_int(dim) or dim < 1:
            raise ValueError(f"dim must be a positive int, got {dim!r}")
        self.seed = seed
        self.rotate = rotate
        rotation = hadamard_rotation(dim, seed) if rotate else None
        codec = f"tq1/hd2/lsb/seed{seed}" if rotate else "tq1/none/lsb"
        super().__init__(dim, bits, rotation, codec, least_squares)


class BlockTurboQuantMSE(VectorQuantizer):
    """TurboQuant for sizes between powers of two, such as 2,560, 3,072 and 5,120.

    Each round transforms equal power-of-two blocks; between the rounds a permutation deals every
    block out to all the others. The error is that of `TurboQuantMSE`. A codec of its own: decoders
    must know it by its name, `tq1/bhd2/lsb/seed<seed>`.

    Args:
        dim: elements of a vector: an odd number m > 1 times a power of two of at least 16 m.
        bits: bits an element: 1, 2, 4 or 8.
        seed: of the rotation's signs, in [0, 2**64).
        least_squares: as in `TurboQuantMSE`.

    Raises:
        ValueError: a value outside the above, which the message names.
    """

    def __init__(
        self, dim: int, bits: int, seed: int = DEFAULT_SEED, *, least_squares: bool = False
    ) -> None:
        check_bits(bits)
        check_seed(seed)
        self.seed = seed
        super().__init__(
            dim, bits, block_rotation(dim, seed), f"tq1/bhd2/lsb/seed{seed}", least_squares
        )


_lock = threading.Lock()
_quantizers: dict[tuple[int, int, str], VectorQuantizer] = {}
_warmed: set[tuple[int, int, str, str]] = set()


def quantizer_for(dim: int, bits: int, codec: str = DEFAULT_CODEC) -> VectorQuantizer:
    """The shared quantizer of `(dim, bits, codec)`; made once, whichever thread asks first.

    Raises:
        ValueError: a codec other than `DEFAULT_CODEC` and `BLOCK_CODEC`, or sizes it does not take.
    """
    if codec not in (DEFAULT_CODEC, BLOCK_CODEC):
        raise ValueError(f"codec must be {DEFAULT_CODEC!r} or {BLOCK_CODEC!r}, got {codec!r}")
    check_bits(bits)
    key = (dim, bits, codec)
    with _lock:
        quantizer = _quantizers.get(key)
        if quantizer is None:
            kind = TurboQuantMSE if codec == DEFAULT_CODEC else BlockTurboQuantMSE
            quantizer = kind(dim, bits)
            _quantizers[key] = quantizer
        return quantizer


def encode_embeddings(
    x: Tensor, bits: int = 4, *, codec: str = DEFAULT_CODEC
) -> tuple[Tensor, Tensor]:
    """Compress the input embeddings of a prompt, with a quantizer shared by all callers.

    Args:
        x: floating point `(num_tokens, hidden_size)`.
        bits: bits an element: 1, 2, 4 or 8.
        codec: `DEFAULT_CODEC` for a hidden size that is a power of two, else `BLOCK_CODEC`;
            `codec_for` chooses.

    Returns:
        `packed`, uint8 `(num_tokens, packed_dim(hidden_size, bits))`, and `norms`, float32
        `(num_tokens,)`, on the device of `x`.

    Raises:
        ValueError: `x` is not two-dimensional, holds NaN or infinity, or the codec does not take
            its hidden size or `bits`.
    """
    if x.dim() != 2:
        raise ValueError(f"x must have shape (num_tokens, hidden_size), got {tuple(x.shape)}")
    return quantizer_for(x.shape[1], bits, codec).encode(x)


def warmup_encode(embedding_dim: int, bits: int = 4, *, codec: str = DEFAULT_CODEC) -> None:
    """Prepare encoding before the first request: codebook, tables and, on CUDA, kernels.

    With a CUDA device, kernels are compiled for bfloat16, float16 and float32 on the current one.
    Repeated calls return at once.

    Args:
        embedding_dim: hidden size of the model.
        bits: bits an element: 1, 2, 4 or 8.
        codec: as in `encode_embeddings`.

    Raises:
        ValueError: the codec does not take `embedding_dim` or `bits`.
    """
    quantizer = quantizer_for(embedding_dim, bits, codec)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    key = (embedding_dim, bits, codec, str(device))
    with _lock:
        if key in _warmed:
            return
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if on_gpu else (torch.float32,)
    for dtype in dtypes:
        x = torch.ones(2, embedding_dim, dtype=dtype, device=device)
        quantizer.decode(*quantizer.encode(x))
    with _lock:
        _warmed.add(key)
