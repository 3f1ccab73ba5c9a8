"""PTX of one warp that rotates a row held in its registers: the middle of both kernels.

A row is slices of 256 numbers, held as fp16 pairs. Of an element's place in a slice one bit is the
half of a pair, two are the register and five the lane; which ones is the layout's choice, since a
Hadamard transform treats all bits alike. In a product ``m16n8k16`` with H16 on the left, the data
are the right operand: k runs over the half, the lane's low two bits and one register bit, n over
the lane's high three bits. The product comes out with m where n was and n where k was, which is
just the arrangement that a second product needs to transform what n was, together with the other
register bit; after it everything is in its place again. So two products an element transform eight
bits of the index without moving anything between lanes. The remaining bits tell slices apart: they
lie in registers, where sums and differences transform them. A product can take such bits along,
because it adds to what it is given: ``H a + H b`` and ``H a - H b`` take three instead of two.

Products sum in the tensor core's wide accumulator and round to fp16 once, on the way out, unless
their results are taken in fp32.

Signs are bits that a lane holds in a few registers from the start: flipping a pair costs a shift
and a LOP3, and nothing waits for a table.

Blocks (the codec of sizes that are not powers of two) are runs of slices. The permutation between
the rounds moves an element to the same place of another block, which is another register of the
same lane: block b's element i goes to block (b + i) mod m, so a lane rotates the registers of a
place by a number of its own, in the binary steps of a barrel shifter.

A row that several warps hold is transformed between them by an exchange: the bits of the index that
tell warps apart change places with as many that tell a warp's slices apart, in the first round, and
back in the second. The permutation and the second signs come in between and take that order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rectokens.kernels.warp_rows import (
    PAIRS,
    PAIRS_OF_A_SIGN_WORD,
    SLICE,
    Layout,
    Levels,
    RowShape,
)

# LOP3 tables: inputs a, b, c are 0xF0, 0xCC, 0xAA.
AND_XOR = 0x6A  # (a & b) ^ c
XOR_OR_NOT = 0x65  # a ? b ^ c : ~c


def v(slice_index: int, pair: int) -> str:
    """Register of a pair."""
    return f"v{slice_index * PAIRS + pair}"


# Type of a product, and fragments of H16 / 4 and its negative. Only those of f16 are made here; the
# others are the encoder's.
KINDS = {
    "f16": ("f16", "ha", "hb"),
    "bf16": ("bf16", "ga", "gb"),
    "scaled": ("f16", "hc", "hd"),
}


def prologue() -> list[str]:
    """Declarations, and fragments of H16 / 4; `low` has their signs."""
    return """
.reg .b32 lane, warp, row, col, low, high, ha, hb, hc, hd, ga, gb, zero;
.reg .b32 a0, a1, a2, a3, d0, d1, d2, d3, t0, t1, t2, t3, e<32>, p<32>;
mov.u32 lane, %tid.x;
shr.b32 warp, lane, 5;
and.b32 lane, lane, 31;
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


def product(
    out: Sequence[str],
    data: tuple[str, str],
    *,
    plus: Sequence[str] = (),
    negative: bool = False,
    kind: str = "f16",
) -> str:
    """H16 / 4 times the data, or minus that, plus `plus`; four outputs are fp32, two fp16 pairs.

    `kind` is one of `KINDS`.
    """
    kind, a, b = KINDS[kind]
    if negative:
        a, b = b, a
    wide = "f32" if len(out) == 4 else "f16"
    plus = plus or ["zero"] * len(out)
    return (
        f"mma.sync.aligned.m16n8k16.row.col.{wide}.{kind}.{kind}.{wide} "
        f"{{{', '.join(out)}}}, {{{a}, {a}, {a}, {b}}}, {{{', '.join(data)}}}, "
        f"{{{', '.join(plus)}}};"
    )


# Registers of a slice that the two products of a stage take, and leave. The two stages of a round
# can come in either order. Products want their registers side by side, so the second round begins
# with the stage that ended the first.
FIRST_STAGE = ((0, 1), (2, 3))
SECOND_STAGE = ((0, 2), (1, 3))


def combined(shape: RowShape, distances: Sequence[int]) -> Iterator[list[int]]:
    """Groups of slices that levels of these distances combine; without levels, every slice."""
    places = [0]
    for distance in distances:
        places += [place + distance for place in places]
    for index in range(shape.slices):
        if not any(index & distance for distance in distances):
            yield [index + place for place in places]


def products(
    group: Sequence[int], pairs: tuple[int, int], outputs: Sequence[Sequence[str]], kind: str
) -> Iterator[str]:
    """One product of a stage for the slices of a group, their levels taken along.

    Output j is the sum over i of H16 / 4 times slice i, minus it where i and j have an odd number
    of bits in common. What begins alike is summed once. Outputs may be the registers of the data.
    """
    sums: dict[tuple[bool, ...], Sequence[str]] = {(): ()}
    spare = 0
    for step, index in enumerate(group):
        data = (v(index, pairs[0]), v(index, pairs[1]))
        following: dict[tuple[bool, ...], Sequence[str]] = {}
        for place, output in enumerate(outputs):
            minus = tuple(bool((i & place).bit_count() & 1) for i in range(step + 1))
            if minus in following:
                continue
            if step + 1 < len(group):
                output = [f"p{spare + i}" for i in range(len(output))]
                spare += len(output)
            yield product(output, data, plus=sums[minus[:-1]], negative=minus[-1], kind=kind)
            following[minus] = output
        sums = following


def stage(
    shape: RowShape,
    stage_pairs: Sequence[tuple[int, int]],
    distances: Sequence[int] = (),
    *,
    wide: bool = False,
    kind: str = "f16",
) -> Iterator[str]:
    """A product over all slices in place, fp16, that may take levels between slices along.

    `wide`: sums are kept in fp32 and rounded once. `kind`: ``f16`` or ``scaled``.
    """
    for group in combined(shape, distances):
        for pairs in stage_pairs:
            if not wide:
                outputs = [[v(index, pair) for pair in pairs] for index in group]
                yield from products(group, pairs, outputs, kind)
                continue
            outputs = [[f"e{4 * place + i}" for i in range(4)] for place in range(len(group))]
            yield from products(group, pairs, outputs, kind)
            for index, output in zip(group, outputs, strict=True):
                for order, pair in enumerate(pairs):
                    low, high = output[2 * order : 2 * order + 2]
                    yield f"cvt.rn.f16x2.f32 {v(index, pair)}, {high}, {low};"


def butterfly(shape: RowShape, levels: Sequence[int]) -> Iterator[str]:
    """Unnormalised transform over bits of the slice's number, in place."""
    for distance in levels:
        for index, other in combined(shape, [distance]):
            for pair in range(PAIRS):
                yield f"sub.rn.f16x2 d0, {v(index, pair)}, {v(other, pair)};"
                yield f"add.rn.f16x2 {v(index, pair)}, {v(index, pair)}, {v(other, pair)};"
                yield f"mov.b32 {v(other, pair)}, d0;"


def load_signs(shape: RowShape, base: str) -> Iterator[str]:
    """The signs of both rounds, from the table at `base`, into registers."""
    words = shape.sign_words
    yield from address("ps", base, 4, 2 * 128 * words, shape.team)
    yield f".reg .b32 signs<{2 * words}>;"
    for word in range(2 * words):
        yield f"ld.global.nc.b32 signs{word}, [ps+{128 * word}];"


def flip(round_index: int, shape: RowShape, index: int) -> Iterator[str]:
    """Give the numbers of a slice, 16 bits each, the signs of a round."""
    for pair in range(PAIRS):
        word, shift = divmod(index * PAIRS + pair, PAIRS_OF_A_SIGN_WORD)
        signs = f"signs{round_index * shape.sign_words + word}"
        if shift:
            yield f"shl.b32 d0, {signs}, {shift};"
            signs = "d0"
        yield f"lop3.b32 {v(index, pair)}, {signs}, 0x80008000, {v(index, pair)}, {AND_XOR};"


def permute_blocks(shape: RowShape, layout: Layout, *, forward: bool) -> Iterator[str]:
    """Element i of block b to block (b + i) mod m, or back, in place."""
    m = shape.num_blocks
    if m == 1:
        return
    steps = [1 << bit for bit in range((m - 1).bit_length())]
    way = -1 if forward else 1
    yield ".reg .b32 turn, turned;"
    yield f".reg .b32 w<{m}>, u<{m}>;"
    yield f".reg .pred {', '.join(f'turn{step}' for step in steps)};"
    yield f"mul.lo.u32 turn, lane, {layout.run};"
    if shape.team > 1:
        yield f"mul.lo.u32 turned, warp, {SLICE * shape.exchanged};"
        yield "add.u32 turn, turn, turned;"
    yield f"rem.u32 turn, turn, {m};"
    for step in steps:
        yield f"and.b32 turned, turn, {step};"
        yield f"setp.ne.u32 turn{step}, turned, 0;"
    for inner in range(shape.slices_per_block):
        for pair in range(PAIRS):
            held = [v(block * shape.slices_per_block + inner, pair) for block in range(m)]
            # What every lane turns by, which only renames registers.
            common = (SLICE * shape.exchanged_place(inner) + layout.element(0, pair)) % m
            if forward:
                # The second number of a pair is one element further.
                for block in range(m):
                    yield f"prmt.b32 u{block}, {held[block]}, {held[block - 1]}, 0x7610;"
            else:
                for block in range(m):
                    yield f"mov.b32 u{block}, {held[block]};"
            source, target = "u", "w"
            for step in steps:
                for block in range(m):
                    turned = (block + way * step) % m
                    yield (
                        f"selp.b32 {target}{block}, {source}{turned}, {source}{block}, turn{step};"
                    )
                source, target = target, source
            for block in range(m):
                chosen = f"{source}{(block + way * common) % m}"
                if forward:
                    yield f"mov.b32 {held[block]}, {chosen};"
                else:
                    following = f"{source}{(block + common + 1) % m}"
                    yield f"prmt.b32 {held[block]}, {chosen}, {following}, 0x7610;"


def exchange(shape: RowShape, *, back: bool) -> Iterator[str]:
    """Swap the number of the warp with as many bits of the slice's number, through memory.

    On the way back a warp writes where it read on the way there, so nobody waits before writing.
    """
    if shape.team == 1:
        return
    if not back:
        yield f".shared .align 16 .b8 exchanged[{2 * shape.dim}];"
        yield ".reg .b32 own, others;"
        yield "mov.u32 d0, exchanged;"
        yield "shl.b32 d1, lane, 4;"
        yield "add.u32 d0, d0, d1;"
        yield f"mul.lo.u32 own, warp, {512 * shape.slices_per_block};"
        yield "add.u32 own, own, d0;"
        yield f"mul.lo.u32 others, warp, {512 * shape.exchanged};"
        yield "add.u32 others, others, d0;"
    ways = [("own", shape.place), ("others", shape.exchanged_place)]
    (write, to), (read, source) = ways[::-1] if back else ways
    for index in range(shape.slices):
        registers = ", ".join(v(index, pair) for pair in range(PAIRS))
        yield f"st.shared.v4.b32 [{write}+{512 * to(index)}], {{{registers}}};"
    yield "bar.sync 0;"
    for index in range(shape.slices):
        registers = ", ".join(v(index, pair) for pair in range(PAIRS))
        yield f"ld.shared.v4.b32 {{{registers}}}, [{read}+{512 * source(index)}];"


def between(shape: RowShape, layout: Layout, levels: Levels, *, forward: bool) -> Iterator[str]:
    """From the products of the first round to those of the second."""
    yield from butterfly(shape, levels.own)
    yield from exchange(shape, back=False)
    yield from butterfly(shape, levels.team)
    yield from permute_blocks(shape, layout, forward=forward)
    for index in range(shape.slices):
        yield from flip(1, shape, index)
    yield from butterfly(shape, levels.again)
    yield from exchange(shape, back=True)
    yield from butterfly(shape, levels.last)


def address(
    name: str, base: str, lane_bytes: int, warp_bytes: int, team: int, *, half: bool = False
) -> Iterator[str]:
    """A 64-bit register with an address of the lane's own, a byte every two lanes if `half`."""
    yield f".reg .b64 {name};"
    if half:
        yield "shr.b32 d0, lane, 1;"
    else:
        yield f"mul.lo.u32 d0, lane, {lane_bytes};"
    if team > 1:
        yield f"mul.lo.u32 d1, warp, {warp_bytes};"
        yield "add.u32 d0, d0, d1;"
    yield f"mul.wide.u32 {name}, d0, 1;"
    yield f"add.s64 {name}, {name}, {base};"
