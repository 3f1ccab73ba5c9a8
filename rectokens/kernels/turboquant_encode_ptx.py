"""PTX that encodes one row in a warp or a few: read, measure, rotate, assign, pack, write.

Rows of bfloat16 and float16 go to the first product as they come, and their norm is the diagonal
of a product of the row with itself; only sums, in fp32, are converted. Below 8 bits, where rounding
it to fp16 changes few indices, the factor that makes a row of bfloat16 a unit vector is part of the
matrices: its power of two of the first product's, the rest of the second's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from rectokens.kernels.hadamard_ptx import (
    FIRST_STAGE,
    SECOND_STAGE,
    address,
    between,
    combined,
    flip,
    load_signs,
    products,
    prologue,
    stage,
    v,
)
from rectokens.kernels.turboquant_assign_ptx import (
    REGISTERS,
    assign_halves,
    assign_numbers,
    assign_pairs,
    f32,
    half_constants,
)
from rectokens.kernels.warp_rows import (
    ENCODE_LAYOUT,
    PAIRS,
    SLICE,
    Fused,
    Levels,
    RowShape,
)

_SQUARES_LOW = 1e-24
_SQUARES_HIGH = 1e30
# fp32 rows of more slices than this are read twice: their words would not fit in registers.
_MOST_FP32_SLICES = 16
_STORES = {1: "u8", 2: "u16", 4: "b32", 8: "v2.b32"}


def _load(kind: str, shape: RowShape, index: int, *, again: bool = False) -> Iterator[str]:
    """Words of a slice: four pairs, or eight fp32 numbers.

    `again` is an ordinary load: the compiler would keep what read-only ones brought before.
    """
    if kind != "fp32":
        names = ", ".join(v(index, pair) for pair in range(PAIRS))
        yield f"ld.global.nc.L1::no_allocate.v4.b32 {{{names}}}, [px+{512 * shape.place(index)}];"
        return
    for half in (0, 1):
        names = ", ".join(_number(index, 4 * half + i) for i in range(4))
        way = "ld.global" if again else "ld.global.nc"
        yield f"{way}.v4.b32 {{{names}}}, [px+{1024 * shape.place(index) + 16 * half}];"


def _number(index: int, place: int) -> str:
    return f"f{index * 2 * PAIRS + place}"


def _squares_by_products(kind: str, slices: int) -> Iterator[str]:
    """Sum of squares of a lane's share in t0.

    With two registers on the left of a product and one of them on the right, the diagonal of an
    upper or a lower half holds the sums of that one's squares; each lane holds two numbers a half.
    """
    product_kind = {"bf16": "bf16", "fp16": "f16"}[kind]
    for index in range(slices):
        for pair in range(PAIRS):
            names = [f"q{4 * pair + i}" for i in range(4)]
            plus = names if index else ["zero"] * 4
            left = v(index, pair & 2), v(index, pair | 1)
            yield (
                f"mma.sync.aligned.m16n8k8.row.col.f32.{product_kind}.{product_kind}.f32 "
                f"{{{', '.join(names)}}}, {{{left[0]}, {left[1]}}}, {{{v(index, pair)}}}, "
                f"{{{', '.join(plus)}}};"
            )
    for i in (0, 1):
        for pair in range(1, PAIRS):
            yield f"add.f32 q{i}, q{i}, q{4 * pair + 2 * (pair % 2) + i};"
    # The diagonal lies where twice the lane's column is its row, or one less.
    yield "and.b32 t0, lane, 4;"
    yield "setp.ne.u32 some, t0, 0;"
    yield "selp.b32 t0, q1, q0, some;"
    yield "and.b32 t1, lane, 3;"
    yield "shr.b32 t2, lane, 3;"
    yield "setp.eq.u32 some, t1, t2;"
    yield "selp.b32 t0, t0, zero, some;"


def _squares_of_numbers(shape: RowShape, *, reread: bool, rescale: bool) -> Iterator[str]:
    for chain in range(4):
        yield f"mov.b32 q{chain}, 0;"
    for index in range(shape.slices):
        if reread:
            yield from _load("fp32", shape, index)
        for place in range(2 * PAIRS):
            number, chain = _number(index, place), place % 4
            if rescale and reread:
                yield f"mul.f32 {number}, {number}, factor;"
            yield f"fma.rn.f32 q{chain}, {number}, {number}, q{chain};"
    yield "add.f32 q0, q0, q1;"
    yield "add.f32 q2, q2, q3;"
    yield "add.f32 t0, q0, q2;"


def _over_lanes(shape: RowShape, slot: int) -> Iterator[str]:
    """The sum over the row of t0, in `squares`, the same in every lane."""
    for distance in (16, 8, 4, 2, 1):
        yield f"shfl.sync.bfly.b32 t1, t0, {distance}, 31, -1;"
        yield "add.f32 t0, t0, t1;"
    yield "mov.b32 squares, t0;"
    yield from _over_warps(shape, slot, "squares", "add.f32")


def _over_warps(shape: RowShape, slot: int, register: str, operation: str) -> Iterator[str]:
    """What warps have in the register, taken together; every use has a slot of its own."""
    if shape.team == 1:
        return
    place = 4 * shape.team * slot
    yield "shl.b32 t0, warp, 2;"
    yield "mov.u32 t1, sums;"
    yield "add.u32 t0, t0, t1;"
    yield f"st.shared.b32 [t0+{place}], {register};"
    yield "bar.sync 0;"
    yield f"ld.shared.b32 {register}, [t1+{place}];"
    for warp in range(1, shape.team):
        yield f"ld.shared.b32 t0, [t1+{place + 4 * warp}];"
        yield f"{operation} {register}, {register}, t0;"


def _largest(kind: str, shape: RowShape, *, reread: bool) -> Iterator[str]:
    """Bits of the largest magnitude as fp32, in `peak`."""
    yield "mov.b32 t0, 0;"
    for index in range(shape.slices):
        if kind == "bf16":
            for pair in range(PAIRS):
                yield f"and.b32 t1, {v(index, pair)}, 0x7fff7fff;"
                yield "max.u16x2 t0, t0, t1;"
            continue
        if reread:
            yield from _load(kind, shape, index)
        for place in range(2 * PAIRS):
            yield f"and.b32 t1, {_number(index, place)}, 0x7fffffff;"
            yield "max.u32 t0, t0, t1;"
    if kind == "bf16":
        yield "shl.b32 t1, t0, 16;"
        yield "and.b32 t0, t0, 0xffff0000;"
        yield "max.u32 t0, t0, t1;"
    yield "redux.sync.max.u32 peak, t0, -1;"
    yield from _over_warps(shape, 1, "peak", "max.u32")


def _measure(kind: str, shape: RowShape, *, reread: bool) -> Iterator[str]:
    """The norm, stored; `scale`; rows far from 1 rescaled by a power of two first."""

    slices = shape.slices

    def squares(*, rescale: bool) -> Iterator[str]:
        if kind == "fp32":
            yield from _squares_of_numbers(shape, reread=reread, rescale=rescale)
        else:
            yield from _squares_by_products(kind, slices)
        yield from _over_lanes(shape, 2 if rescale else 0)

    if shape.team > 1:
        yield f".shared .align 4 .b8 sums[{3 * 4 * shape.team}];"
    yield from squares(rescale=False)
    yield f"mov.b32 back, {f32(1)};"
    yield f"mov.b32 factor, {f32(1)};"
    if kind != "fp16":
        # Zero, tiny, huge or not finite: scale by a power of two and sum again.
        yield f"setp.gt.f32 some, squares, {f32(_SQUARES_LOW)};"
        yield f"setp.lt.and.f32 some, squares, {f32(_SQUARES_HIGH)}, some;"
        yield "@some bra MEASURED;"
        yield from _largest(kind, shape, reread=reread)
        yield "shr.b32 peak, peak, 23;"
        yield "max.u32 peak, peak, 1;"
        yield "min.u32 peak, peak, 253;"
        yield "shl.b32 back, peak, 23;"
        yield "sub.u32 factor, 254, peak;"
        if kind == "bf16":
            yield "shl.b32 t0, factor, 7;"
            yield "shl.b32 t1, factor, 23;"
            yield "or.b32 t0, t0, t1;"
            for index in range(slices):
                for pair in range(PAIRS):
                    yield f"mul.rn.bf16x2 {v(index, pair)}, {v(index, pair)}, t0;"
        yield "shl.b32 factor, factor, 23;"
        if kind == "fp32" and not reread:
            for number in range(slices * 2 * PAIRS):
                yield f"mul.f32 f{number}, f{number}, factor;"
        yield from squares(rescale=True)
        yield "MEASURED:"
    yield "sqrt.rn.f32 t0, squares;"
    yield "mul.f32 t0, t0, back;"
    yield "mov.u32 t1, %tid.x;"
    yield f"and.b32 t1, t1, {32 * shape.team - 1};"
    yield "setp.eq.u32 some, t1, 0;"
    yield "@some st.global.b32 [$3], t0;"
    yield f"setp.gt.f32 some, squares, {f32(0)};"
    yield "rsqrt.approx.f32 t0, squares;"
    yield "mul.f32 t0, t0, $5;"
    yield "selp.b32 scale, t0, zero, some;"


def _scaled_matrices() -> Iterator[str]:
    """`scale` in two factors: a power of two in ga and gb, at most 2 in hc and hd."""
    # A row of zeros has none.
    yield f"selp.b32 scale, scale, {f32(1)}, some;"
    yield "and.b32 t0, scale, 0x7f800000;"
    yield "sub.u32 t0, t0, 0x01000000;"
    yield "shr.b32 t1, t0, 16;"
    yield "or.b32 t0, t0, t1;"
    yield "xor.b32 ga, t0, low;"
    yield "and.b32 t0, scale, 0x007fffff;"
    yield "or.b32 t0, t0, 0x3e800000;"
    yield "cvt.rn.f16x2.f32 t0, t0, t0;"
    yield "xor.b32 hc, t0, low;"
    yield "xor.b32 hd, hc, 0x80008000;"


def _first_products(
    shape: RowShape, kind: str, distances: Sequence[int], *, reread: bool, folded: bool
) -> Iterator[str]:
    """Signs of the first round and its first product; fp16 pairs come out, scaled.

    `folded`: by the power of two of the scale alone, which is part of the matrix.
    """
    if folded:
        yield from _scaled_matrices()
    elif kind == "bf16":
        yield "xor.b32 ga, low, 0x3e803e80;"
    if kind == "bf16":
        yield "xor.b32 gb, ga, 0x80008000;"
    product_kind = "bf16" if kind == "bf16" else "f16"
    for group in combined(shape, distances):
        for index in group:
            if kind == "fp32":
                if reread:
                    yield from _load(kind, shape, index, again=True)
                yield from _scaled_pairs(index, reread=reread)
            yield from flip(0, shape, index)
        for pairs in FIRST_STAGE:
            outputs = [[f"e{4 * place + i}" for i in range(4)] for place in range(len(group))]
            if kind == "fp32" and len(group) == 1:
                # Nothing to scale, nothing to sum: the product itself rounds to fp16.
                outputs = [[v(index, pair) for pair in pairs] for index in group]
            yield from products(group, pairs, outputs, product_kind)
            for index, output in zip(group, outputs, strict=True):
                if len(output) == 2:
                    continue
                for order, pair in enumerate(pairs):
                    low, high = output[2 * order : 2 * order + 2]
                    if kind != "fp32" and not folded:
                        yield f"mul.f32 {low}, {low}, scale;"
                        yield f"mul.f32 {high}, {high}, scale;"
                    yield f"cvt.rn.f16x2.f32 {v(index, pair)}, {high}, {low};"


def _scaled_pairs(index: int, *, reread: bool) -> Iterator[str]:
    """Numbers of a slice as fp16 pairs of a row of the right length."""
    for pair in range(PAIRS):
        for half in (0, 1):
            number = _number(index, 2 * pair + half)
            if reread:
                yield f"mul.f32 {number}, {number}, factor;"
            yield f"mul.f32 d{half}, {number}, scale;"
        yield f"cvt.rn.f16x2.f32 {v(index, pair)}, d1, d0;"


def _last_products(shape: RowShape, bits: int, distances: Sequence[int]) -> Iterator[str]:
    """The last product, codes and their stores."""
    numbers = bits == 8
    if bits == 4:
        yield from half_constants(shape.dim)
    for group in combined(shape, distances):
        if numbers:
            outputs = [[f"e{8 * place + i}" for i in range(8)] for place in range(len(group))]
            for turn, pairs in enumerate(FIRST_STAGE):
                # Pairs 0 and 1 hold numbers 0 to 3 of a run, pairs 2 and 3 the others.
                half = [output[4 * turn : 4 * turn + 4] for output in outputs]
                yield from products(group, pairs, half, "f16")
        else:
            outputs = [[v(index, pair) for pair in range(PAIRS)] for index in group]
            for pairs in FIRST_STAGE:
                half = [[v(index, pair) for pair in pairs] for index in group]
                yield from products(group, pairs, half, "f16")
        for index, output in zip(group, outputs, strict=True):
            if numbers:
                yield from assign_numbers(output, shape.dim)
            elif bits == 4:
                yield from assign_halves(output)
            else:
                yield from assign_pairs(output, bits, shape.dim)
            value = "{d0, d1}" if bits == 8 else "d0"
            yield f"st.global.{_STORES[bits]} [po+{32 * bits * shape.place(index)}], {value};"


@lru_cache(maxsize=64)
def encode_ptx(
    dim: int,
    block: int,
    bits: int,
    kind: str,
    fused: Fused,
    team: int = 1,
    wide: bool = False,
) -> str:
    """The text of the encoder of one row.

    Operands: $0 a 32-bit result of no meaning, $1 to $4 addresses of the row's numbers, of its
    bytes, of its norm and of the signs, $5 the factor (fp32) of a unit vector.

    Args:
        dim: size of a row that `warp_rows.fits`, in blocks of `block`.
        bits: 1, 2, 4 or 8.
        kind: ``bf16``, ``fp16`` or ``fp32``, the type of the row's numbers.
        fused: how many levels between slices each of the four products takes along.
        team: warps a row; more than one must be all of the launch's block.
        wide: keep fp32 sums in the two inner products as well, which rounds less often.
    """
    shape = RowShape(dim, block, team)
    slices = shape.slices
    reread = kind == "fp32" and slices > _MOST_FP32_SLICES
    folded = kind == "bf16" and bits < 8
    levels = Levels.of(shape, fused)
    number_bytes = 4 if kind == "fp32" else 2
    lines = [
        *prologue(),
        REGISTERS,
        f".reg .b32 v<{slices * PAIRS}>, q<{4 * PAIRS}>;",
        ".reg .b32 squares, back, factor, peak, scale;",
        f".reg .b32 f<{slices * 2 * PAIRS}>;",
        ".reg .pred some;",
        *address("px", "$1", 8 * number_bytes, SLICE * number_bytes * shape.slices_per_block, team),
        *address("po", "$2", bits, 32 * bits * shape.slices_per_block, team),
        *load_signs(shape, "$4"),
    ]
    if not reread:
        for index in range(slices):
            lines += _load(kind, shape, index)
    lines += _measure(kind, shape, reread=reread)
    lines += _first_products(shape, kind, levels.products[0], reread=reread, folded=folded)
    second = "scaled" if folded else "f16"
    lines += stage(shape, SECOND_STAGE, levels.products[1], wide=wide, kind=second)
    lines += between(shape, ENCODE_LAYOUT, levels, forward=True)
    lines += stage(shape, SECOND_STAGE, levels.products[2], wide=wide)
    lines += _last_products(shape, bits, levels.products[3])
    lines.append("mov.b32 $0, 0;")
    return "{\n" + "\n".join(lines) + "\n}"
