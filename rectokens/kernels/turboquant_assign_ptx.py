"""PTX that turns rotated coordinates into codes, and packs them.

At 1 and 2 bits coordinates are compared with boundaries as fp16 pairs. At 4 and 8 an odd polynomial
that runs through the boundaries gives the code at once, to within a thousandth of a level where
coordinates lie: at 8 bits of an fp32 coordinate, at 4 of two in fp16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from rectokens._turboquant.assign import float32_boundaries
from rectokens.kernels.hadamard_ptx import XOR_OR_NOT

REGISTERS = ".reg .b32 neg, mag, m0, c<4>, top, magic, y, square, poly, k<8>;"
_TERMS = 7
_HALF_TERMS = 3
# fp16 has only integers from here to twice this.
_HALF_INTEGERS = 1024


def f32(value: float) -> str:
    """A float as PTX writes it."""
    return f"0f{int(np.float32(value).view(np.uint32)):08x}"


def _twice(half: int) -> str:
    return f"0x{half | half << 16:08x}"


def _weights(boundaries: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """What a miss at a boundary weighs: the root of the density there, and a little."""
    return np.asarray(np.sqrt(np.exp(-(boundaries**2) / 2) + 3e-5))


@lru_cache(maxsize=64)
def index_polynomial(dim: int) -> npt.NDArray[np.float32]:
    """Odd polynomial that is k at positive boundary k of 8 bits; coefficients `(terms,)`.

    Fitted where coordinates lie, by least squares with their density as the weight. Coefficient j
    multiplies ``u ** (2 * j + 1)``.

    Raises:
        RuntimeError: it misses a boundary by a tenth of a level or does not rise.
    """
    boundaries = float32_boundaries(dim, 8).astype(np.float64)
    top = boundaries[-1]
    numbers = np.arange(1, boundaries.size + 1, dtype=np.float64)
    powers = 2 * np.arange(_TERMS) + 1
    weights = _weights(boundaries)
    matrix = (boundaries / top)[:, None] ** powers
    fitted = np.linalg.lstsq(matrix * weights[:, None], numbers * weights, rcond=None)[0]
    missed = np.abs(matrix @ fitted - numbers).max()
    fine = np.linspace(0, 1, 4096)[:, None] ** powers @ fitted
    if missed > 0.1 or np.diff(fine).min() <= 0:
        raise RuntimeError(f"no polynomial follows the 8-bit codebook of dim {dim}")
    coefficients: npt.NDArray[np.float32] = (fitted / top**powers).astype(np.float32)
    return coefficients


@dataclass(frozen=True)
class HalfIndex:
    """How fp16 coordinates, multiplied by `scale`, become 4-bit codes in fp16 arithmetic.

    `coefficients`: of an odd polynomial that falls, -k at boundary k. `limit`: where magnitudes are
    cut, above the last boundary. All but `scale` are numbers that fp16 has.
    """

    scale: float
    coefficients: tuple[float, ...]
    limit: float

    def codes(self, coordinates: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Codes of numbers that fp16 has, scaled, rounding where the kernel does."""

        def rounded(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            return x.astype(np.float16).astype(np.float64)

        y = np.clip(coordinates, -self.limit, self.limit)
        square = rounded(y * y)
        falling = np.full_like(y, self.coefficients[-1])
        for coefficient in self.coefficients[-2::-1]:
            falling = rounded(falling * square + coefficient)
        # To the nearest integer, of two the even one: zero has the lower code of the middle.
        return np.asarray(15 - np.rint(rounded(falling * y - 0.5) + 8))


def _half_index(boundaries: npt.NDArray[np.float64], scale: float) -> HalfIndex:
    """Coefficients are rounded one after the other, and the rest fitted to what that leaves."""
    places = boundaries * scale
    rest = np.arange(1.0, boundaries.size + 1)
    weights = _weights(boundaries)
    coefficients = []
    for first in range(_HALF_TERMS):
        matrix = places[:, None] ** (2 * np.arange(first, _HALF_TERMS) + 1)
        fitted = np.linalg.lstsq(matrix * weights[:, None], rest * weights, rcond=None)[0]
        coefficients.append(-float(np.float16(fitted[0])))
        rest = rest + coefficients[-1] * matrix[:, 0]
    return HalfIndex(scale, tuple(coefficients), float(np.float16(places[-1] * 1.005)))


def _misplaced(
    index: HalfIndex, boundaries: npt.NDArray[np.float64], halves: npt.NDArray[np.float64]
) -> float:
    """Share of normal coordinates that `index` puts on the wrong side of a boundary."""
    density = np.exp(-(boundaries**2) / 2) / math.sqrt(2 * math.pi)
    share = 0.0
    for sign in (1, -1):
        magnitudes = sign * (index.codes(sign * halves) - 7.5) - 0.5
        # The last number below each boundary, and what is between it and the next.
        last = np.searchsorted(magnitudes, np.arange(boundaries.size), side="right") - 1
        edges = (halves[last] + halves[last + 1]) / 2 / index.scale
        share += float(np.abs(edges - boundaries) @ density)
    return share


@lru_cache(maxsize=64)
def half_index(dim: int) -> HalfIndex:
    """The scale and polynomial that misplace least.

    With coordinates in fp16 and rounding at every step a tenth of a percent of codes are off by
    one; at which scale the rounded coefficients fit best is tried.

    Raises:
        RuntimeError: more than 0.15 % would be.
    """
    boundaries = float32_boundaries(dim, 4).astype(np.float64)
    every = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    halves = every[(every > boundaries[0] / 4) & (every < boundaries[-1] * 1.6)]
    scales = np.linspace(0.7, 1.4, 71)
    share, index = min(
        (
            (_misplaced(index, boundaries, halves), index)
            for index in (_half_index(boundaries, float(scale)) for scale in scales)
        ),
        key=lambda found: found[0],
    )
    if share > 0.0015:
        raise RuntimeError(f"no fp16 polynomial follows the 4-bit codebook of dim {dim}")
    return index


def limit(dim: int) -> float:
    """Where magnitudes are cut at 8 bits: a little above the last boundary, so that those above it
    stay.
    """
    return float(np.float32(float32_boundaries(dim, 8)[-1] * 1.005))


def assign_numbers(numbers: Sequence[str], dim: int) -> Iterator[str]:
    """8-bit codes of eight fp32 coordinates of a run, in d0 and d1."""
    coefficients = index_polynomial(dim)
    top = limit(dim)
    for place, number in enumerate(numbers):
        yield f"min.xorsign.abs.f32 y, {number}, {f32(top)};"
        yield "mul.f32 square, y, y;"
        yield f"fma.rn.f32 poly, square, {f32(coefficients[-1])}, {f32(coefficients[-2])};"
        for coefficient in coefficients[-3::-1]:
            yield f"fma.rn.f32 poly, poly, square, {f32(coefficient)};"
        # Rounded up with 2**23 beside it, the code is in the low byte; zero goes to the lower one.
        yield f"fma.rp.f32 k{place}, poly, y, {f32((1 << 23) + 127)};"
    for word in (0, 1):
        a, b, c, d = (f"k{4 * word + i}" for i in range(4))
        yield f"prmt.b32 {a}, {a}, {b}, 0x0040;"
        yield f"prmt.b32 {c}, {c}, {d}, 0x0040;"
        yield f"prmt.b32 d{word}, {a}, {c}, 0x5410;"


def half_constants(dim: int) -> Iterator[str]:
    """What `assign_halves` needs, into registers."""
    index = half_index(dim)
    named = {f"c{place}": value for place, value in enumerate(index.coefficients)}
    named |= {"c3": -0.5, "top": index.limit, "magic": _HALF_INTEGERS + 8}
    for name, value in named.items():
        yield f"mov.b32 {name}, {_twice(int(np.float16(value).view(np.uint16)))};"


def assign_halves(registers: Sequence[str]) -> Iterator[str]:
    """4-bit codes of the four fp16 pairs of a run, in d0; see `HalfIndex.codes`."""
    for place, register in enumerate(registers):
        yield f"min.xorsign.abs.f16x2 y, {register}, top;"
        yield "mul.rn.f16x2 square, y, y;"
        yield "fma.rn.f16x2 poly, square, c2, c1;"
        yield "fma.rn.f16x2 poly, poly, square, c0;"
        yield "fma.rn.f16x2 poly, poly, y, c3;"
        # The low byte of each half is 15 minus the code.
        yield f"add.rn.f16x2 k{place}, poly, magic;"
    yield "prmt.b32 k0, k0, k1, 0x6240;"
    yield "prmt.b32 k2, k2, k3, 0x6240;"
    yield "prmt.b32 k1, k0, k2, 0x5410;"
    yield "prmt.b32 k3, k0, k2, 0x7632;"
    yield "shl.b32 k3, k3, 4;"
    yield "lop3.b32 d0, k1, k3, k3, 0x03;"  # ~(a | b)


def scale_of_pairs(dim: int, bits: int) -> float:
    """The factor of fp16 coordinates with which fp16 holds what they are compared with best."""
    if bits == 4:
        return half_index(dim).scale
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
