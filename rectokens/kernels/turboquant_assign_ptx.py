"""PTX that turns rotated coordinates into codes, and packs them.

At 1 and 2 bits coordinates are compared with boundaries as fp16 pairs. At 4 and 8 an odd polynomial
that runs through the boundaries gives the code of an fp32 coordinate at once, to within a
thousandth of a level where coordinates lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from rectokens._turboquant.assign import float32_boundaries
from rectokens.kernels.hadamard_ptx import XOR_OR_NOT

REGISTERS = ".reg .b32 neg, mag, m0, c0, y, square, poly, k<8>;"
_TERMS = {4: 4, 8: 7}


def f32(value: float) -> str:
    """A float as PTX writes it."""
    return f"0f{int(np.float32(value).view(np.uint32)):08x}"


def _twice(half: int) -> str:
    return f"0x{half | half << 16:08x}"


@lru_cache(maxsize=64)
def index_polynomial(dim: int, bits: int) -> npt.NDArray[np.float32]:
    """Odd polynomial that is k at positive boundary k, at 4 or 8 bits; coefficients `(terms,)`.

    Fitted where coordinates lie, by least squares with their density as the weight. Coefficient j
    multiplies ``u ** (2 * j + 1)``.

    Raises:
        RuntimeError: it misses a boundary by a tenth of a level or does not rise.
    """
    boundaries = float32_boundaries(dim, bits).astype(np.float64)
    top = boundaries[-1]
    numbers = np.arange(1, boundaries.size + 1, dtype=np.float64)
    powers = 2 * np.arange(_TERMS[bits]) + 1
    weights = np.sqrt(np.exp(-(boundaries**2) / 2) + 3e-5)
    matrix = (boundaries / top)[:, None] ** powers
    fitted = np.linalg.lstsq(matrix * weights[:, None], numbers * weights, rcond=None)[0]
    missed = np.abs(matrix @ fitted - numbers).max()
    fine = np.linspace(0, 1, 4096)[:, None] ** powers @ fitted
    if missed > 0.1 or np.diff(fine).min() <= 0:
        raise RuntimeError(f"no polynomial follows the {bits}-bit codebook of dim {dim}")
    coefficients: npt.NDArray[np.float32] = (fitted / top**powers).astype(np.float32)
    return coefficients


def limit(dim: int, bits: int) -> float:
    """Where magnitudes are cut: a little above the last boundary, so that those above it stay."""
    return float(np.float32(float32_boundaries(dim, bits)[-1] * 1.005))


def assign_numbers(numbers: Sequence[str], bits: int, dim: int) -> Iterator[str]:
    """Codes of eight fp32 coordinates of a run: in d0 at 4 bits, in d0 and d1 at 8."""
    coefficients = index_polynomial(dim, bits)
    top = limit(dim, bits)
    for place, number in enumerate(numbers):
        yield f"min.xorsign.abs.f32 y, {number}, {f32(top)};"
        yield "mul.f32 square, y, y;"
        yield f"fma.rn.f32 poly, square, {f32(coefficients[-1])}, {f32(coefficients[-2])};"
        for coefficient in coefficients[-3::-1]:
            yield f"fma.rn.f32 poly, poly, square, {f32(coefficient)};"
        # Rounded up with 2**23 beside it, the code is in the low byte; zero goes to the lower one.
        yield f"fma.rp.f32 k{place}, poly, y, {f32((1 << 23) + (1 << bits - 1) - 1)};"
    if bits == 4:
        # The upper code's copy of 2**23 is shifted out of its byte, or cut off here.
        for byte in range(4):
            yield f"shl.b32 k{2 * byte + 1}, k{2 * byte + 1}, 4;"
            yield f"add.u32 k{byte}, k{2 * byte}, k{2 * byte + 1};"
        yield "prmt.b32 k0, k0, k1, 0x0040;"
        yield "prmt.b32 k2, k2, k3, 0x0040;"
        yield "prmt.b32 d0, k0, k2, 0x5410;"
        return
    for word in (0, 1):
        a, b, c, d = (f"k{4 * word + i}" for i in range(4))
        yield f"prmt.b32 {a}, {a}, {b}, 0x0040;"
        yield f"prmt.b32 {c}, {c}, {d}, 0x0040;"
        yield f"prmt.b32 d{word}, {a}, {c}, 0x5410;"


def scale_of_pairs(dim: int, bits: int) -> float:
    """The factor of fp16 coordinates with which fp16 holds the boundary of 2 bits exactly."""
    if bits != 2:
        return 1.0
    boundary = float(float32_boundaries(dim, bits)[0])
    return float(np.float16(boundary)) / boundary


def _assign_pair(register: str, out: str, bits: int, limit: str) -> Iterator[str]:
    """Codes of a pair into the low bits of the halves of `out`; other bits are left over."""
    yield f"set.le.u32.f16x2 neg, {register}, zero;"
    if bits == 1:
        yield f"not.b32 {out}, neg;"
        return
    yield f"abs.f16x2 mag, {register};"
    yield f"mov.b32 c0, {limit};"
    yield "set.gt.u32.f16x2 m0, mag, c0;"
    yield f"lop3.b32 {out}, {_twice(1)}, m0, neg, {XOR_OR_NOT};"


def assign_pairs(registers: Sequence[str], bits: int, dim: int) -> Iterator[str]:
    """Codes of the four fp16 pairs of a run, at 1 or 2 bits, in d0."""
    boundary = float32_boundaries(dim, bits).astype(np.float16).view(np.uint16)
    limit = _twice(int(boundary[0])) if bits == 2 else ""
    mask = (1 << bits) - 1
    for pair, register in enumerate(registers):
        yield from _assign_pair(register, f"d{pair}", bits, limit)
        yield f"and.b32 d{pair}, d{pair}, {_twice(mask)};"
        if pair:
            yield f"shl.b32 d{pair}, d{pair}, {2 * bits * pair};"
            yield f"or.b32 d0, d0, d{pair};"
    yield f"shr.b32 d1, d0, {16 - bits};"
    yield "or.b32 d0, d0, d1;"
