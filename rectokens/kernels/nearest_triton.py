# Triton gives kernels no types; parameters are pointers, tensors of the shapes stated, constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202, SIM102
"""Triton kernels of the nearest-codeword search, all residual levels in one pass over x.

`split_kernel` cuts a codebook, once a call, into two bfloat16 halves whose sum has 16 of float32's
24 bits. `nearest_kernel` compares a tile of rows, cut in the same way, with all codes by three
products on the tensor cores, ||c||² - 2x·c, and knows for every score a bound on its error:

- halves: x = x1 + x2 + e with |e| <= 2^-18 |x|, so what e and x2·c2 would add is at most
  3 * 2^-18 ||x|| ||c||;
- sums: tensor cores add blocks of 16 products to the sum, all cut off at the largest one's last
  bits (Fasi et al., "Numerical behavior of NVIDIA tensor cores", 2021): at most 2^-20 of
  ||x|| ||c|| a block, and 3 D / 16 blocks.

Where only a second code is within the bounds of the best, both are compared by the squared
differences themselves, in float64; where more are, all codes are. Ties go to the lowest index.

With few rows and many codes `part_kernel` shares the codes of a tile of rows among programs, each
of which finds the nearest of its own; `merge_kernel` compares those by their float64 distances.
"""

from rectokens.kernels.optional_triton import tl, triton

_UNIT = tl.constexpr(2.0**-24)
_TINY = tl.constexpr(2.0**-126)
_NO_CODE = tl.constexpr(2147483647)
_LAST = tl.constexpr(2147483647)


@triton.jit
def _halves(value, HALF: tl.constexpr):
    """Two numbers of 16 bits, bfloat16 on a device, whose sum is `value` but for 2^-18 of it."""
    high = value.to(HALF)
    return high, (value - high.to(tl.float32)).to(HALF)


@triton.jit
def split_kernel(codes_ptr, high_ptr, low_ptr, squares_ptr, num_rows, DIM: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Halves (num_rows, DIM) and fp32 squared lengths (num_rows,) of codes (num_rows, DIM)."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < num_rows
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float64)
    for start in range(0, DIM, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        place = row[:, None].to(tl.int64) * DIM + d[None, :]
        mask = inside[:, None] & (d < DIM)[None, :]
        value = tl.load(codes_ptr + place, mask=mask, other=0.0).to(tl.float32)
        high, low = _halves(value, high_ptr.dtype.element_ty)
        tl.store(high_ptr + place, high, mask=mask)
        tl.store(low_ptr + place, low, mask=mask)
        wide = value.to(tl.float64)
        total += wide * wide
    tl.store(squares_ptr + row, tl.sum(total, axis=1).to(tl.float32), mask=inside)


@triton.jit
def _scores(x_base, in_rows, high_base, low_base, inside, squares, DIM: tl.constexpr,
            BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """||c||² - 2x·c of a tile of rows and codes: fp32 [BLOCK_B, BLOCK_N]."""
    acc = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    for start in range(0, DIM, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        left = in_rows[:, None]
        right = inside[None, :]
        if DIM % BLOCK_D != 0:
            left = left & (d < DIM)[None, :]
            right = right & (d < DIM)[:, None]
        x = tl.load(x_base + d[None, :], mask=left, other=0.0).to(tl.float32)
        high = tl.load(high_base + d[:, None], mask=right, other=0.0)
        low = tl.load(low_base + d[:, None], mask=right, other=0.0)
        x_high, x_low = _halves(x, high.dtype)
        acc = tl.dot(x_low, high, acc)
        acc = tl.dot(x_high, low, acc)
        acc = tl.dot(x_high, high, acc)
    return squares[None, :] - 2.0 * acc


@triton.jit
def _ordered(value):
    """int32 in the order of float32 numbers."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _number(order):
    """The float32 number of `_ordered`."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _merge(a1, a2, a3, b1, b2, b3):
    """The three least of two ascending threes, ascending."""
    third = tl.minimum(tl.minimum(a3, tl.maximum(a2, b1)), tl.minimum(tl.maximum(a1, b2), b3))
    second = tl.minimum(tl.minimum(a2, tl.maximum(a1, b1)), b2)
    return tl.minimum(a1, b1), second, third


@triton.jit
def _candidates(x_ptr, local, in_rows, high_ptr, low_ptr, squares_ptr, num_codes,
                DIM: tl.constexpr, EXACT: tl.constexpr, BLOCK_B: tl.constexpr,
                BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                LENGTH_D: tl.constexpr):  # fmt: skip
    """Each row's best code and the second, whether the two must be compared, whether all must."""
    by_lengths = 1.01 * (6.0 * 2.0**-18 + 2.0 * (1.25 * DIM + 32) * 2.0**-23 + 16 * _UNIT)
    by_square = 8 * _UNIT
    slack = 16 * DIM * _TINY
    x_base = x_ptr + local[:, None] * DIM
    reach = tl.zeros((BLOCK_B,), tl.float32)
    if EXACT:
        for start in range(0, DIM, LENGTH_D):
            d = start + tl.arange(0, LENGTH_D)
            mask = in_rows[:, None] & (d < DIM)[None, :]
            x = tl.load(x_base + d[None, :], mask=mask, other=0.0).to(tl.float32)
            reach += tl.sum(x * x, axis=1)
        reach = by_lengths * tl.sqrt(reach)
    # Scores in the order of integers, their last bits replaced by the place in the tile of codes,
    # so that minima carry their codes along; cut off downwards, they still are lower bounds.
    last_bits: tl.constexpr = BLOCK_N - 1
    place = tl.arange(0, BLOCK_N)
    best = tl.full((BLOCK_B,), _LAST, tl.int32)
    second = tl.full((BLOCK_B,), _LAST, tl.int32)
    third = tl.full((BLOCK_B,), _LAST, tl.int32)
    best_code = tl.full((BLOCK_B,), 0, tl.int32)
    second_code = tl.full((BLOCK_B,), 0, tl.int32)
    for start in range(0, num_codes, BLOCK_N):
        code = start + place
        inside = code < num_codes
        skip = code.to(tl.int64)[None, :] * DIM
        square = tl.load(squares_ptr + code, mask=inside, other=0.0)
        low = _scores(x_base, in_rows, high_ptr + skip, low_ptr + skip, inside,
                      square * (1.0 - by_square) - slack if EXACT else square,
                      DIM, BLOCK_B, BLOCK_N, BLOCK_D)  # fmt: skip
        if EXACT:
            low -= reach[:, None] * tl.sqrt(square)[None, :]
            # What overflowed can be anything.
            low = tl.where(low < float("inf"), low, float("-inf"))
        else:
            low = tl.where(low == low, low, float("inf"))
        key = (_ordered(low) & ~last_bits) | place[None, :]
        key = tl.where(inside[None, :], key, _LAST)
        if EXACT:
            none = tl.full((BLOCK_B, BLOCK_N), _LAST, tl.int32)
            first, next_, last = tl.reduce((key, none, none), 1, _merge)
            first_code, next_code = start + (first & last_bits), start + (next_ & last_bits)
            first, next_, last = first & ~last_bits, next_ & ~last_bits, last & ~last_bits
            better = first < best
            ahead, behind = tl.where(better, next_, second), tl.where(better, best, first)
            ahead_code = tl.where(better, next_code, second_code)
            behind_code = tl.where(better, best_code, first_code)
            third = tl.where(
                behind < ahead,
                tl.minimum(ahead, tl.where(better, second, next_)),
                tl.minimum(behind, tl.where(better, last, third)),
            )
            second_code = tl.where(behind < ahead, behind_code, ahead_code)
            second = tl.minimum(behind, ahead)
        else:
            first = tl.min(key, axis=1)
            first_code = start + (first & last_bits)
            first = first & ~last_bits
            better = first < best
        best_code = tl.where(better, first_code, best_code)
        best = tl.minimum(best, first)
    undecided = in_rows & (best_code < 0)
    several = undecided
    if EXACT:
        square = tl.load(squares_ptr + best_code, mask=in_rows, other=0.0)
        error = reach * tl.sqrt(square) + by_square * square + slack
        # Minus infinity without its last bits is no number: nothing is known then.
        least = _number(best)
        upper = least + tl.abs(least) * (BLOCK_N * 2.0**-23) + 2.0 * error
        upper = tl.where((least > float("-inf")) & (upper < float("inf")), upper, float("inf"))
        limit = _ordered(upper)
        undecided = in_rows & (second <= limit)
        several = in_rows & (third <= limit)
    return best_code, second_code, undecided, several


@triton.jit
def _closer(x_ptr, local, codes_ptr, first_code, second_code, rows, DIM: tl.constexpr,
            BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Of two codes for each row where `rows`, the nearer one by float64 differences."""
    first = tl.zeros((BLOCK_B,), tl.float64)
    second = tl.zeros((BLOCK_B,), tl.float64)
    for start in range(0, DIM, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = rows[:, None] & (d < DIM)[None, :]
        x = tl.load(x_ptr + local[:, None] * DIM + d[None, :], mask=mask, other=0.0)
        one = tl.load(codes_ptr + first_code[:, None] * DIM + d[None, :], mask=mask, other=0.0)
        two = tl.load(codes_ptr + second_code[:, None] * DIM + d[None, :], mask=mask, other=0.0)
        gap = x.to(tl.float64) - one.to(tl.float64)
        first += tl.sum(gap * gap, axis=1)
        gap = x.to(tl.float64) - two.to(tl.float64)
        second += tl.sum(gap * gap, axis=1)
    take = (second < first) | ((second == first) & (second_code < first_code))
    return tl.where(rows & take, second_code, first_code)


@triton.jit
def _of_all(x_row_ptr, codes_ptr, num_codes, DIM: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_D: tl.constexpr):  # fmt: skip
    """Nearest code of one row by float64 differences; 0 where nothing compares."""
    best = tl.full((), float("inf"), tl.float64)
    best_code = tl.full((), 0, tl.int32)
    for start in range(0, num_codes, BLOCK_N):
        code = start + tl.arange(0, BLOCK_N)
        inside = code < num_codes
        total = tl.zeros((BLOCK_N, BLOCK_D), tl.float64)
        for d_start in range(0, DIM, BLOCK_D):
            d = d_start + tl.arange(0, BLOCK_D)
            x = tl.load(x_row_ptr + d, mask=d < DIM, other=0.0).to(tl.float64)
            c = tl.load(codes_ptr + code[:, None] * DIM + d[None, :],
                        mask=inside[:, None] & (d < DIM)[None, :], other=0.0)  # fmt: skip
            gap = x[None, :] - c.to(tl.float64)
            total += gap * gap
        distance = tl.sum(total, axis=1)
        distance = tl.where(inside & (distance == distance), distance, float("inf"))
        least = tl.min(distance, axis=0)
        first = tl.min(tl.where(distance == least, code, _NO_CODE), axis=0)
        best_code = tl.where(least < best, first, best_code)
        best = tl.minimum(best, least)
    return best_code


@triton.jit
def _nearest(source, codes, high, low, squares, local, in_rows, num_codes, DIM: tl.constexpr,
             EXACT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_D: tl.constexpr, LENGTH_D: tl.constexpr, LOOK_N: tl.constexpr,
             LOOK_D: tl.constexpr):  # fmt: skip
    """The nearest code of each row of a tile: int32 [BLOCK_B]."""
    best, second, undecided, several = _candidates(source, local, in_rows, high, low, squares,
                                                   num_codes, DIM, EXACT, BLOCK_B, BLOCK_N,
                                                   BLOCK_D, LENGTH_D)  # fmt: skip
    if EXACT:
        if tl.max(undecided.to(tl.int32), axis=0) > 0:
            best = _closer(source, local, codes, best, second, undecided & (several == 0), DIM,
                           BLOCK_B, LOOK_D)  # fmt: skip
            left = tl.where(several, local, BLOCK_B)
            for _ in range(tl.sum(several.to(tl.int32), axis=0)):
                row = tl.min(left, axis=0)
                found = _of_all(source + row * DIM, codes, num_codes, DIM, LOOK_N, LOOK_D)
                best = tl.where(local == row, found, best)
                left = tl.where(local == row, BLOCK_B, left)
    return best


@triton.jit
def _level(source, codes, high, low, squares, scratch_ptr, local, rows, in_rows, out_ptr,
           distance_ptr, num_codes, leaves_over, LEVELS: tl.constexpr, DIM: tl.constexpr,
           EXACT: tl.constexpr, WITH_DISTANCE: tl.constexpr, BLOCK_B: tl.constexpr,
           BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, LENGTH_D: tl.constexpr,
           LOOK_N: tl.constexpr, LOOK_D: tl.constexpr):  # fmt: skip
    """One level of one tile: codes to `out`; what is left over to `scratch`, if the next needs it.

    `source` and `scratch` are those of the tile and may be one: a barrier parts reads and writes.
    """
    best = _nearest(source, codes, high, low, squares, local, in_rows, num_codes, DIM, EXACT,
                    BLOCK_B, BLOCK_N, BLOCK_D, LENGTH_D, LOOK_N, LOOK_D)  # fmt: skip
    tl.store(out_ptr + rows * LEVELS, best.to(tl.int64), mask=in_rows)
    if WITH_DISTANCE or LEVELS > 1:
        tl.debug_barrier()
        total = tl.zeros((BLOCK_B,), tl.float32)
        for start in range(0, tl.where(leaves_over, DIM, 0), LOOK_D):
            d = start + tl.arange(0, LOOK_D)
            mask = in_rows[:, None] & (d < DIM)[None, :]
            place = local[:, None] * DIM + d[None, :]
            x = tl.load(source + place, mask=mask, other=0.0).to(tl.float32)
            c = tl.load(codes + best[:, None] * DIM + d[None, :], mask=mask, other=0.0)
            gap = x - c.to(tl.float32)
            if WITH_DISTANCE:
                total += tl.sum(gap * gap, axis=1)
            else:
                tl.store(scratch_ptr + place, gap, mask=mask)
        if WITH_DISTANCE:
            tl.store(distance_ptr + rows, total, mask=in_rows)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["num_rows", "tiles", "num_codes"])
def nearest_kernel(x_ptr, codes_ptr, high_ptr, low_ptr, squares_ptr, scratch_ptr, out_ptr,
                   distance_ptr, num_rows, num_codes, tiles, LEVELS: tl.constexpr,
                   DIM: tl.constexpr, EXACT: tl.constexpr, WITH_DISTANCE: tl.constexpr,
                   BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                   LENGTH_D: tl.constexpr, LOOK_N: tl.constexpr,
                   LOOK_D: tl.constexpr):  # fmt: skip
    """Codes (B, LEVELS) of x (B, DIM) in codebooks (LEVELS, num_codes, DIM), all contiguous.

    A program stays and takes tile after tile. What a level leaves over goes to the program's own
    place in `scratch` (programs, BLOCK_B, DIM) fp32, small enough for the cache. With more than
    one level x is fp32 too.
    """
    local = tl.arange(0, BLOCK_B)
    my_scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * BLOCK_B * DIM
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first_row = tl.full((), 0, tl.int64) + tile * BLOCK_B
        rows = first_row + local
        in_rows = rows < num_rows
        source = x_ptr + first_row * DIM
        if LEVELS == 1:
            _level(source, codes_ptr, high_ptr, low_ptr, squares_ptr, my_scratch, local, rows,
                   in_rows, out_ptr, distance_ptr, num_codes, WITH_DISTANCE, LEVELS, DIM, EXACT,
                   WITH_DISTANCE, BLOCK_B, BLOCK_N, BLOCK_D, LENGTH_D, LOOK_N,
                   LOOK_D)  # fmt: skip
        else:
            for level in range(LEVELS):
                skip = level * num_codes * DIM
                _level(source, codes_ptr + skip, high_ptr + skip, low_ptr + skip,
                       squares_ptr + level * num_codes, my_scratch, local, rows, in_rows,
                       out_ptr + level, distance_ptr, num_codes, level + 1 < LEVELS, LEVELS, DIM,
                       EXACT, False, BLOCK_B, BLOCK_N, BLOCK_D, LENGTH_D, LOOK_N,
                       LOOK_D)  # fmt: skip
                source = my_scratch


@triton.jit(do_not_specialize=["num_rows", "num_codes", "span"])
def part_kernel(x_ptr, codes_ptr, high_ptr, low_ptr, squares_ptr, found_ptr, gaps_ptr, num_rows,
                num_codes, span, DIM: tl.constexpr, EXACT: tl.constexpr, BLOCK_B: tl.constexpr,
                BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, LENGTH_D: tl.constexpr,
                LOOK_N: tl.constexpr, LOOK_D: tl.constexpr):  # fmt: skip
    """Of a tile of rows and `span` codes: the nearest code and its float64 distance, (B, parts)."""
    local = tl.arange(0, BLOCK_B)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_B
    rows = first_row + local
    in_rows = rows < num_rows
    source = x_ptr + first_row * DIM
    first = tl.program_id(1) * span
    codes = codes_ptr + first * DIM
    best = _nearest(source, codes, high_ptr + first * DIM, low_ptr + first * DIM,
                    squares_ptr + first, local, in_rows, tl.minimum(num_codes - first, span), DIM,
                    EXACT, BLOCK_B, BLOCK_N, BLOCK_D, LENGTH_D, LOOK_N, LOOK_D)  # fmt: skip
    total = tl.zeros((BLOCK_B,), tl.float64)
    for start in range(0, DIM, LENGTH_D):
        d = start + tl.arange(0, LENGTH_D)
        mask = in_rows[:, None] & (d < DIM)[None, :]
        x = tl.load(source + local[:, None] * DIM + d[None, :], mask=mask, other=0.0)
        c = tl.load(codes + best[:, None] * DIM + d[None, :], mask=mask, other=0.0)
        gap = x.to(tl.float64) - c.to(tl.float64)
        total += tl.sum(gap * gap, axis=1)
    place = rows * tl.num_programs(1) + tl.program_id(1)
    tl.store(found_ptr + place, first + best, mask=in_rows)
    tl.store(gaps_ptr + place, total, mask=in_rows)


@triton.jit(do_not_specialize=["num_rows", "parts"])
def merge_kernel(found_ptr, gaps_ptr, out_ptr, distance_ptr, num_rows, parts,
                 PARTS: tl.constexpr, BLOCK_B: tl.constexpr):  # fmt: skip
    """Codes (B,) and float32 distances (B,): the nearest of all parts, the lowest on ties."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    part = tl.arange(0, PARTS)[None, :]
    mask = (rows < num_rows)[:, None] & (part < parts)
    place = rows[:, None] * parts + part
    code = tl.load(found_ptr + place, mask=mask, other=_NO_CODE)
    gap = tl.load(gaps_ptr + place, mask=mask, other=float("inf"))
    order = tl.where(gap == gap, gap, float("inf"))
    least = tl.min(order, axis=1)
    best = tl.min(tl.where(order == least[:, None], code, _NO_CODE), axis=1)
    chosen = tl.sum(tl.where(code == best[:, None], gap, 0.0), axis=1)
    tl.store(out_ptr + rows, best.to(tl.int64), mask=rows < num_rows)
    tl.store(distance_ptr + rows, chosen.to(tl.float32), mask=rows < num_rows)
