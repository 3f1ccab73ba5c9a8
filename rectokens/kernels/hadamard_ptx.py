"""PTX of one warp that rotates a row held in its registers: the inside of both kernels.

A row of ``256 * slices`` numbers is held as fp16 pairs: lane l keeps elements ``8 * l`` to
``8 * l + 7`` of every 256, which is what 16-byte loads bring. Of an element's index, bit 0 is then
the place in the pair, bits 1 and 2 the register, bits 3 to 7 the lane and the rest the register.
In a product ``m16n8k16`` with H16 on the left, the data are the right operand: k runs over the
pair, the lane's low two bits and one register bit, n over the lane's high three bits. The product
comes out with m where n was and n where k was, which is just the arrangement that a second product
needs to transform what n was, together with another register bit; after it everything is in its
place again. So two products an element transform eight bits of the index without moving anything
between lanes, and the remaining bits lie in registers, where sums and differences transform them.

Products sum in the tensor core's wide accumulator and round to fp16 once, on the way out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from rectokens._turboquant.assign import float32_boundaries, float32_centroids

PAIRS = 4
LANE_ELEMENTS = 2 * PAIRS
SLICE = 32 * LANE_ELEMENTS
MAX_SLICES = 16
SIGN_WORDS = 4
_PAIRS_A_WORD = 16
# LOP3 tables: inputs a, b, c are 0xF0, 0xCC, 0xAA.
_AND_XOR = 0x6A  # (a & b) ^ c
_SELECT = 0xCA  # a ? b : c
_XOR_OR_NOT = 0x65  # a ? b ^ c : ~c

_PROLOGUE = """
mov.u32 lane, %laneid;
shr.b32 row, lane, 2;
and.b32 col, lane, 3;
shl.b32 col, col, 1;
and.b32 low, row, col;
popc.b32 low, low;
and.b32 low, low, 1;
xor.b32 high, low, row;
shl.b32 low, low, 15;
shl.b32 high, high, 31;
or.b32 low, low, high;
xor.b32 ha, low, 0x34003400;
xor.b32 hb, ha, 0x80008000;
mov.b32 zero, 0;
""".strip().splitlines()


def _product(out: tuple[str, str], data: tuple[str, str]) -> str:
    return (
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 "
        f"{{{out[0]}, {out[1]}}}, {{ha, ha, ha, hb}}, {{{data[0]}, {data[1]}}}, {{zero, zero}};"
    )


def _slice_products(slice_index: int) -> Iterator[str]:
    """H256 / 16 of one slice, in place."""
    v = [f"v{slice_index * PAIRS + pair}" for pair in range(PAIRS)]
    yield _product(("d0", "d1"), (v[0], v[1]))
    yield _product(("d2", "d3"), (v[2], v[3]))
    yield _product((v[0], v[2]), ("d0", "d2"))
    yield _product((v[1], v[3]), ("d1", "d3"))


def _register_butterfly(slices: int) -> Iterator[str]:
    """Unnormalised Hadamard transform over the slices, in place."""
    half = 1
    while half < slices:
        for low in range(slices):
            if low & half:
                continue
            for pair in range(PAIRS):
                a, b = f"v{low * PAIRS + pair}", f"v{(low + half) * PAIRS + pair}"
                yield f"sub.rn.f16x2 d0, {a}, {b};"
                yield f"add.rn.f16x2 {a}, {a}, {b};"
                yield f"mov.b32 {b}, d0;"
        half *= 2


def _flip_signs(pairs: int, word: Sequence[str]) -> Iterator[str]:
    """Negate what the sign words say; pair q is bits 15 and 31, less q mod 16, of word q div 16."""
    for pair in range(pairs):
        source, place = word[pair // _PAIRS_A_WORD], pair % _PAIRS_A_WORD
        yield f"shl.b32 d0, {source}, {place};"
        yield f"lop3.b32 v{pair}, d0, 0x80008000, v{pair}, {_AND_XOR};"


def _to_half(kind: str, pairs: int, word: Sequence[str], scale: str) -> Iterator[str]:
    """Scaled fp16 pairs of the words as they were loaded."""
    for pair in range(pairs):
        if kind == "bf16":
            yield f"shl.b32 d0, {word[pair]}, 16;"
            yield f"and.b32 d1, {word[pair]}, 0xffff0000;"
        elif kind == "fp16":
            yield f"mov.b32 {{h0, h1}}, {word[pair]};"
            yield "cvt.f32.f16 d0, h0;"
            yield "cvt.f32.f16 d1, h1;"
        else:
            yield f"mov.b64 {{d0, d1}}, {word[pair]};"
        yield f"mul.f32 d0, d0, {scale};"
        yield f"mul.f32 d1, d1, {scale};"
        yield f"cvt.rn.f16x2.f32 v{pair}, d1, d0;"


def _twice(half: int) -> str:
    return f"0x{half | half << 16:08x}"


def _assign_pair(register: str, out: str, bits: int, boundary: Sequence[int]) -> Iterator[str]:
    """Codes of a pair into the low bits of the halves of `out`; other bits are left over."""
    yield f"set.le.u32.f16x2 neg, {register}, zero;"
    if bits == 1:
        yield f"not.b32 {out}, neg;"
        return
    yield f"abs.f16x2 mag, {register};"
    if bits == 2:
        yield f"mov.b32 c0, {_twice(boundary[0])};"
        yield "set.gt.u32.f16x2 m0, mag, c0;"
        yield f"lop3.b32 {out}, {_twice(1)}, m0, neg, {_XOR_OR_NOT};"
        return
    # A binary search over seven boundaries: masks m0, m1, m2 are the bits of their count.
    b = [_twice(value) for value in boundary]
    d = {(i, j): _twice(boundary[i] ^ boundary[j]) for i, j in ((1, 5), (0, 4), (2, 6))}
    yield f"mov.b32 c0, {b[3]};"
    yield "set.gt.u32.f16x2 m0, mag, c0;"
    yield f"lop3.b32 c0, m0, {d[1, 5]}, {b[1]}, {_AND_XOR};"
    yield "set.gt.u32.f16x2 m1, mag, c0;"
    yield f"lop3.b32 c0, m0, {d[0, 4]}, {b[0]}, {_AND_XOR};"
    yield f"lop3.b32 c1, m0, {d[2, 6]}, {b[2]}, {_AND_XOR};"
    yield f"lop3.b32 c0, m1, c1, c0, {_SELECT};"
    yield "set.gt.u32.f16x2 m2, mag, c0;"
    yield f"lop3.b32 m0, {_twice(4)}, m0, m1, {_SELECT};"
    yield f"lop3.b32 m0, {_twice(6)}, m0, m2, {_SELECT};"
    yield f"lop3.b32 {out}, {_twice(7)}, m0, neg, {_XOR_OR_NOT};"


def _pack_slice(slice_index: int, bits: int, boundary: Sequence[int]) -> Iterator[str]:
    """A lane's eight codes of a slice to its first output, zeros to the other three."""
    for pair in range(PAIRS):
        yield from _assign_pair(f"v{slice_index * PAIRS + pair}", f"d{pair}", bits, boundary)
    out = f"${slice_index * PAIRS}"
    if bits == 4:
        yield "prmt.b32 d0, d0, d1, 0x6240;"
        yield "prmt.b32 d2, d2, d3, 0x6240;"
        yield "prmt.b32 d1, d0, d2, 0x7632;"
        yield "prmt.b32 d0, d0, d2, 0x5410;"
        yield "shl.b32 d1, d1, 4;"
        yield f"lop3.b32 {out}, 0x0f0f0f0f, d0, d1, {_SELECT};"
    else:
        mask = (1 << bits) - 1
        for pair in range(PAIRS):
            yield f"and.b32 d{pair}, d{pair}, {_twice(mask)};"
            if pair:
                yield f"shl.b32 d{pair}, d{pair}, {2 * bits * pair};"
                yield f"or.b32 d0, d0, d{pair};"
        yield f"shr.b32 d1, d0, {16 - bits};"
        yield f"or.b32 {out}, d0, d1;"
    for pair in range(1, PAIRS):
        yield f"mov.b32 ${slice_index * PAIRS + pair}, 0;"


@lru_cache(maxsize=64)
def encode_ptx(dim: int, bits: int, kind: str) -> tuple[str, str]:
    """The text and the operand constraints of the encoder of one row.

    Operands, each once an fp16 pair of the row: the codes (out; the first of every four holds a
    lane's eight), the row's words as loaded, sign words of both rounds, the scale.

    Args:
        dim: 512 to 4,096, a power of two.
        bits: 1, 2 or 4.
        kind: ``bf16`` or ``fp16`` (32-bit words), ``fp32`` (64-bit words).
    """
    slices = dim // SLICE
    pairs = slices * PAIRS
    boundary = float32_boundaries(dim, bits).astype(np.float16).view(np.uint16).tolist()

    def operands(group: int, count: int) -> list[str]:
        return [f"${group * pairs + i}" for i in range(count)]

    lines = [
        ".reg .b16 h0, h1;",
        ".reg .b32 lane, row, col, low, high, ha, hb, zero;",
        ".reg .b32 d0, d1, d2, d3, neg, mag, m0, m1, m2, c0, c1;",
        f".reg .b32 v<{pairs}>;",
        *_PROLOGUE,
        *_to_half(kind, pairs, operands(1, pairs), operands(4, 1)[0]),
        *_flip_signs(pairs, operands(2, SIGN_WORDS)),
    ]
    for index in range(slices):
        lines += _slice_products(index)
    lines += _register_butterfly(slices)
    lines += _flip_signs(pairs, operands(3, SIGN_WORDS))
    lines += _register_butterfly(slices)
    for index in range(slices):
        lines += _slice_products(index)
        lines += _pack_slice(index, bits, boundary)
    word = "l" if kind == "fp32" else "r"
    constraints = ["=r"] * pairs + [word] * pairs + ["r"] * (2 * pairs) + ["f"] * pairs
    return "{\n" + "\n".join(lines) + "\n}", ",".join(constraints)


def _unpack_slice(slice_index: int, bits: int, table: Sequence[int], word: str) -> Iterator[str]:
    """Centroids of a lane's eight codes of a slice, as fp16 pairs.

    The codes become nibbles: bit 3 tells the sign, the low bits the magnitude, which selects both
    of its bytes from a table of at most eight.
    """
    if bits == 4:
        yield f"lop3.b32 neg, {word}, 0x88888888, 0, 0x0c;"  # ~a & b
        yield "shr.b32 d0, neg, 3;"
        yield "sub.s32 d0, neg, d0;"
        yield f"xor.b32 d0, d0, {word};"
        yield "and.b32 m0, d0, 0x77777777;"
    else:
        steps = {
            2: ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333)),
            1: ((12, 0x000F000F), (6, 0x03030303), (3, 0x11111111)),
        }[bits]
        # 16-bit codes come with their sign extended.
        yield f"and.b32 d0, {word}, 0x{(1 << 8 * bits) - 1:x};"
        for shift, mask in steps:
            yield f"shl.b32 d1, d0, {shift};"
            yield "or.b32 d0, d0, d1;"
            yield f"and.b32 d0, d0, 0x{mask:08x};"
        flag = 0x11111111 << (bits - 1)
        yield f"lop3.b32 d1, d0, 0x{flag:08x}, 0, 0x0c;"
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
        yield f"lop3.b32 d1, d2, 0x80808080, d1, {_AND_XOR};"
        first = slice_index * PAIRS + 2 * half
        yield f"prmt.b32 v{first}, d0, d1, 0x5140;"
        yield f"prmt.b32 v{first + 1}, d0, d1, 0x7362;"


@lru_cache(maxsize=64)
def decode_ptx(dim: int, bits: int) -> tuple[str, str]:
    """The text and the operand constraints of the decoder of one row.

    Operands, each once a pair of the row: both numbers (out, 64 bits), the codes (the first of
    every four holds a lane's eight), sign words of both rounds, the two factors of a number.
    """
    slices = dim // SLICE
    pairs = slices * PAIRS
    centroids = float32_centroids(dim, bits)[1 << (bits - 1) :]
    table = centroids.astype(np.float16).view(np.uint16).tolist()

    def operands(group: int, count: int) -> list[str]:
        return [f"${group * pairs + i}" for i in range(count)]

    lines = [
        ".reg .b16 h0, h1;",
        ".reg .b32 lane, row, col, low, high, ha, hb, zero;",
        ".reg .b32 d0, d1, d2, d3, neg, m0, lo0, lo1, hi0, hi1;",
        f".reg .b32 v<{pairs}>;",
        *_PROLOGUE,
    ]
    codes = operands(1, pairs)
    for index in range(slices):
        lines += _unpack_slice(index, bits, table, codes[index * PAIRS])
        lines += _slice_products(index)
    lines += _register_butterfly(slices)
    lines += _flip_signs(pairs, operands(3, SIGN_WORDS))
    lines += _register_butterfly(slices)
    for index in range(slices):
        lines += _slice_products(index)
    lines += _flip_signs(pairs, operands(2, SIGN_WORDS))
    gain, norm = operands(4, 1)[0], operands(5, 1)[0]
    for pair in range(pairs):
        lines.append(f"mov.b32 {{h0, h1}}, v{pair};")
        for number in (0, 1):
            lines.append(f"cvt.f32.f16 d{number}, h{number};")
            lines.append(f"mul.f32 d{number}, d{number}, {gain};")
            lines.append(f"mul.f32 d{number}, d{number}, {norm};")
        lines.append(f"mov.b64 ${pair}, {{d0, d1}};")
    # Outputs are written while factors are still read.
    constraints = ["=&l"] * pairs + ["r"] * (3 * pairs) + ["f"] * (2 * pairs)
    return "{\n" + "\n".join(lines) + "\n}", ",".join(constraints)
