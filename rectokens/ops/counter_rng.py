"""Counter-based random numbers: a pure function of a seed and integer counters.

Noise that depends on (seed, row, token), and on nothing else, gives a draw that no batch size,
device or order of evaluation changes, and that a kernel can recompute wherever it needs it.

The generator chains the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014)::

    mix(z):  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
             z = (z ^ (z >> 27)) * 0x94D049BB133111EB
             return z ^ (z >> 31)

    state = mix(seed + 0x9E3779B97F4A7C15)
    for c in counters:  state = mix((state ^ c) + 0x9E3779B97F4A7C15)

all modulo 2**64 with logical shifts, here in int64, whose arithmetic wraps in the same way. The
top 52 bits h become the uniform (h + 1/2) / 2**52, exact in float64 and never 0 or 1. Not for
cryptography.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


def signed64(value: int) -> int:
    """The int64 that has the low 64 bits of any Python integer."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


_GAMMA = signed64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = signed64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = signed64(0x94D049BB133111EB)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    # int64 shifts drag the sign bit along; the mask drops the copies.
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _MULTIPLIER_1
    z = (z ^ _shift_right(z, 27)) * _MULTIPLIER_2
    return z ^ _shift_right(z, 31)


def hash64(seed: Tensor | int, *counters: Tensor) -> Tensor:
    """64 well-mixed bits, as int64, for each combination of seed and counters.

    Args:
        seed: int64 tensor, or any Python integer (its low 64 bits count).
        counters: integer tensors on one device; all arguments broadcast.

    Raises:
        TypeError: a seed or counter that is not an integer.
    """
    if isinstance(seed, int):
        device = counters[0].device if counters else None
        seed = torch.full((), signed64(seed), dtype=torch.long, device=device)
    for tensor in (seed, *counters):
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            raise TypeError(f"seed or counter has dtype {tensor.dtype}; expected an integer dtype")
    state = _mix(seed.long() + _GAMMA)
    for counter in counters:
        state = _mix((state ^ counter.long()) + _GAMMA)
    return state


def uniform(seed: Tensor | int, *counters: Tensor) -> Tensor:
    """Uniform numbers in the open interval (0, 1), float64, broadcast over all arguments.

    Args:
        seed: int64 tensor, or any Python integer (its low 64 bits count).
        counters: integer tensors on one device.

    Raises:
        TypeError: a seed or counter that is not an integer.
    """
    return (_shift_right(hash64(seed, *counters), 12).double() + 0.5) * 2.0**-52


def gumbel(seed: Tensor | int, *counters: Tensor) -> Tensor:
    """Standard Gumbel numbers, float64, broadcast over all arguments.

    Adding them to log-weights and taking the largest k draws k without replacement in
    proportion to the weights (Gumbel-max; Vieira 2014, Kool et al. 2019). Computed as
    -log(-log1p(-u)): large values, the ones that win, come from small u, where floats are dense.
    """
    return -torch.log(-torch.log1p(-uniform(seed, *counters)))
