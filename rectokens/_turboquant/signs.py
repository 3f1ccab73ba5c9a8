"""Random signs of the rotation, from a counter-based generator that any language can repeat."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
MAX_SEED = _MASK


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea and Flood, 2014), element by element."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sign_words(seed: int, round_index: int, num_words: int) -> npt.NDArray[np.uint64]:
    """64-bit words of sign bits, `(num_words,)` uint64.

    Word w of round r is `mix(mix(seed + G) + (r * 2**32 + w + 1) * G)` modulo 2**64, with G the
    golden-ratio constant. Each word is a function of (seed, r, w) alone, so a device may make any
    part of the stream by itself.

    Raises:
        ValueError: `seed` outside [0, 2**64).
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    # Arrays, not scalars: numpy wraps arrays modulo 2**64 silently, as the definition wants.
    key = _mix(np.array([(seed + _GOLDEN) & _MASK], dtype=np.uint64))
    counters = np.arange(1, num_words + 1, dtype=np.uint64) + np.uint64(round_index << 32)
    return _mix(key + counters * np.uint64(_GOLDEN))


@lru_cache(maxsize=256)
def sign_bytes(seed: int, round_index: int, dim: int) -> bytes:
    """Sign bits of one round, `ceil(dim / 8)` bytes, least significant bit first; 1 means minus."""
    words = sign_words(seed, round_index, -(-dim // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:dim]
    return np.packbits(bits, bitorder="little").tobytes()


def signs(seed: int, round_index: int, dim: int) -> npt.NDArray[np.float32]:
    """Signs of one round, `(dim,)` float32 of +1 and -1; a prefix of the stream of that seed."""
    packed = np.frombuffer(sign_bytes(seed, round_index, dim), dtype=np.uint8)
    bits = np.unpackbits(packed, bitorder="little")[:dim]
    return 1.0 - 2.0 * bits.astype(np.float32)
