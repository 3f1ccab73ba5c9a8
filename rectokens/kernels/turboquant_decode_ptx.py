"""PTX that decodes one row in a warp or a few: read codes, look up, rotate back, rescale, write.

A lane holds runs of four numbers, 16 bytes of what it writes, so that a warp writes whole lines.
Up to 4 bits the centroids are selected by bytes from registers; at 8 bits they are looked up in
shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from rectokens._turboquant.assign import float32_centroids
from rectokens.kernels.hadamard_ptx import (
    AND_XOR,
    FIRST_STAGE,
    SECOND_STAGE,
    address,
    between,
    flip,
    load_signs,
    prologue,
    stage,
    v,
)
from rectokens.kernels.warp_rows import (
    DECODE_LAYOUT,
    PAIRS,
    Fused,
    Levels,
    RowShape,
)

# Bits spread over nibbles: shifts and masks of each step.
_SPREAD = {
    2: ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333)),
    1: ((12, 0x000F000F), (6, 0x03030303), (3, 0x11111111)),
}


def _load_codes(shape: RowShape, bits: int) -> Iterator[str]:
    """Codes of both runs of every slice: z0, z1, … with the first run's code lowest; raw."""
    kind = {1: "u8", 2: "u8", 4: "u16", 8: "b32"}[bits]
    for index in range(shape.slices):
        for run in (0, 1):
            offset = 16 * bits * (2 * shape.place(index) + run)
            yield f"ld.global.nc.{kind} z{2 * index + run}, [pc+{offset}];"


def _word(index: int, bits: int) -> Iterator[str]:
    """The eight codes of a slice in d0, the first run's lowest."""
    first, second = f"z{2 * index}", f"z{2 * index + 1}"
    if bits == 1:
        # Two lanes share a byte.
        for z in (first, second):
            yield f"shr.b32 {z}, {z}, nibble;"
            yield f"and.b32 {z}, {z}, 15;"
    shift = 4 * bits
    yield f"shl.b32 {second}, {second}, {shift};"
    yield f"or.b32 d0, {first}, {second};"


def _look_up_nibbles(index: int, bits: int, table: Sequence[int]) -> Iterator[str]:
    """Centroids of the eight codes in d0, as fp16 pairs.

    The codes become nibbles: bit 3 tells the sign, the low bits the magnitude, which selects both
    of its bytes from a table of at most eight.
    """
    if bits == 4:
        yield "lop3.b32 neg, d0, 0x88888888, 0, 0x0c;"  # ~a & b
        yield "shr.b32 d1, neg, 3;"
        yield "sub.s32 d1, neg, d1;"
        yield "xor.b32 d1, d1, d0;"
        yield "and.b32 m0, d1, 0x77777777;"
    else:
        for shift, mask in _SPREAD[bits]:
            yield f"shl.b32 d1, d0, {shift};"
            yield "or.b32 d0, d0, d1;"
            yield f"and.b32 d0, d0, 0x{mask:08x};"
        yield f"lop3.b32 d1, d0, 0x{0x11111111 << (bits - 1):08x}, 0, 0x0c;"
        yield f"shl.b32 neg, d1, {4 - bits};"
        yield "mov.b32 m0, 0;" if bits == 1 else "shr.b32 m0, neg, 3;"
        if bits == 2:
            yield "xor.b32 m0, m0, d0;"
            yield "and.b32 m0, m0, 0x11111111;"
    padded = [*table, *[0] * (8 - len(table))]
    for name, shift in (("lo", 0), ("hi", 8)):
        values = [value >> shift & 0xFF for value in padded]
        for part in (0, 1):
            word_value = sum(v << 8 * i for i, v in enumerate(values[4 * part : 4 * part + 4]))
            yield f"mov.b32 {name}{part}, 0x{word_value:08x};"
    for half in (0, 1):
        if half:
            yield "shr.b32 m0, m0, 16;"
            yield "shr.b32 neg, neg, 16;"
        yield "prmt.b32 d0, lo0, lo1, m0;"
        yield "prmt.b32 d1, hi0, hi1, m0;"
        yield "shl.b32 d2, neg, 4;"
        yield "prmt.b32 d2, neg, d2, 0x1504;"
        yield f"lop3.b32 d1, d2, 0x80808080, d1, {AND_XOR};"
        yield f"prmt.b32 {v(index, 2 * half)}, d0, d1, 0x5140;"
        yield f"prmt.b32 {v(index, 2 * half + 1)}, d0, d1, 0x7362;"


def _fill_table() -> list[str]:
    """256 fp16 centroids to shared memory; each warp writes all and sees its own writes."""
    return [
        ".shared .align 16 .b8 centroids[512];",
        ".reg .b32 table;",
        "ld.global.nc.v4.b32 {a0, a1, a2, a3}, [pt];",
        "mov.u32 table, centroids;",
        "shl.b32 d0, lane, 4;",
        "add.u32 d0, d0, table;",
        "st.shared.v4.b32 [d0], {a0, a1, a2, a3};",
        "bar.warp.sync -1;",
    ]


def _look_up_bytes(index: int) -> Iterator[str]:
    """Centroids of the eight codes of a slice."""
    for run in (0, 1):
        word = f"z{2 * index + run}"
        for half in (0, 1):
            for number in (0, 1):
                shift = 16 * half + 8 * number
                if shift:
                    yield f"shr.b32 d{number}, {word}, {shift - 1};"
                else:
                    yield f"shl.b32 d{number}, {word}, 1;"
                yield f"and.b32 d{number}, d{number}, 0x1fe;"
                yield f"add.u32 d{number}, d{number}, table;"
                yield f"ld.shared.b16 h{number}, [d{number}];"
            yield f"mov.b32 {v(index, 2 * run + half)}, {{h0, h1}};"


def _store_numbers(shape: RowShape, index: int) -> Iterator[str]:
    """Signs of the first round, the norm, and both runs of a slice."""
    yield from flip(0, shape, index)
    for pair in range(PAIRS):
        yield f"mov.b32 {{h0, h1}}, {v(index, pair)};"
        for half in (0, 1):
            yield f"cvt.f32.f16 e{2 * pair + half}, h{half};"
            yield f"mul.f32 e{2 * pair + half}, e{2 * pair + half}, norm;"
    for run in (0, 1):
        names = ", ".join(f"e{4 * run + i}" for i in range(4))
        offset = 1024 * shape.place(index) + 512 * run
        yield f"st.global.v4.b32 [po+{offset}], {{{names}}};"


@lru_cache(maxsize=64)
def decode_ptx(dim: int, block: int, bits: int, fused: Fused, team: int = 1) -> str:
    """The text of the decoder of one row.

    Operands: $0 a 32-bit result of no meaning, $1 to $4 addresses of the row's bytes, of its norm,
    of its numbers (fp32, written) and of the signs, $5 that of the fp16 centroids (8 bits), $6 the
    factor (fp32) by which a result and the norm are multiplied.

    Args:
        dim: size of a row that `warp_rows.fits`, in blocks of `block`.
        bits: 1, 2, 4 or 8.
        fused: how many levels between slices each of the four products takes along.
        team: warps a row; more than one must be all of the launch's block.
    """
    shape = RowShape(dim, block, team)
    slices = shape.slices
    positive = float32_centroids(dim, bits)[1 << (bits - 1) :]
    table = positive.astype(np.float16).view(np.uint16).tolist()
    levels = Levels.of(shape, fused)
    lines = [
        *prologue(),
        f".reg .b32 v<{slices * PAIRS}>, z<{2 * slices}>;",
        ".reg .b16 h0, h1;",
        ".reg .b32 neg, m0, lo0, lo1, hi0, hi1, norm, nibble;",
        # At 1 bit two lanes share a byte.
        *address("pc", "$1", bits // 2, 32 * bits * shape.slices_per_block, team, half=bits == 1),
        *address("po", "$3", 16, 1024 * shape.slices_per_block, team),
        *load_signs(shape, "$4"),
        *address("pt", "$5", 16, 0, 1),
    ]
    if bits == 1:
        lines += ["and.b32 nibble, lane, 1;", "shl.b32 nibble, nibble, 2;"]
    lines += _load_codes(shape, bits)
    lines += ["ld.global.nc.b32 norm, [$2];", "mul.f32 norm, norm, $6;"]
    if bits == 8:
        lines += _fill_table()
    for index in range(slices):
        if bits == 8:
            lines += _look_up_bytes(index)
        else:
            lines += _word(index, bits)
            lines += _look_up_nibbles(index, bits, table)
    lines += stage(shape, FIRST_STAGE, levels.products[0])
    lines += stage(shape, SECOND_STAGE, levels.products[1])
    lines += between(shape, DECODE_LAYOUT, levels, forward=False)
    lines += stage(shape, SECOND_STAGE, levels.products[2])
    lines += stage(shape, FIRST_STAGE, levels.products[3])
    for index in range(slices):
        lines += _store_numbers(shape, index)
    lines.append("mov.b32 $0, 0;")
    return "{\n" + "\n".join(lines) + "\n}"
