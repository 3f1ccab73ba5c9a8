# Triton gives kernels no types; parameters are pointers, tensors of the shapes stated, constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202
"""Triton kernel of the nearest-codeword search, all residual levels in one pass over x.

A tile of rows is compared with all codes by a product in tiles, ||c||² - 2x·c, of which every score
has a bound on its rounding error (see `rectokens.ops.nearest_reference`, whose bounds these are).
Rows where another code's lower bound reaches below the best code's upper bound are searched again,
one by one, in float64 and from the differences themselves. Ties go to the lowest index.
"""

from rectokens.kernels.optional_triton import tl, triton

_EPSILON = tl.constexpr(2.0**-23)
_TINY = tl.constexpr(2.0**-126)


@triton.jit
def _row_by_differences(x_row_ptr, codes_ptr, num_codes, DIM: tl.constexpr, BLOCK_N: tl.constexpr,
                        BLOCK_D: tl.constexpr):  # fmt: skip
    """Nearest code of one row, float64, lowest index on ties; 0 where nothing compares."""
    best = tl.full((), float("inf"), tl.float64)
    best_code = tl.full((), 0, tl.int32)
    for start in range(0, num_codes, BLOCK_N):
        code = start + tl.arange(0, BLOCK_N)
        inside = code < num_codes
        total = tl.zeros((BLOCK_N, BLOCK_D), tl.float64)
        for d_start in range(0, DIM, BLOCK_D):
            d = d_start + tl.arange(0, BLOCK_D)
            x = tl.load(x_row_ptr + d, mask=d < DIM, other=0.0).to(tl.float64)
            c = tl.load(codes_ptr + code.to(tl.int64)[:, None] * DIM + d[None, :],
                        mask=inside[:, None] & (d < DIM)[None, :], other=0.0)  # fmt: skip
            gap = x[None, :] - c.to(tl.float64)
            total += gap * gap
        distance = tl.sum(total, axis=1)
        distance = tl.where(inside & (distance == distance), distance, float("inf"))
        least = tl.min(distance, axis=0)
        first = tl.min(tl.where(distance == least, code, 2147483647), axis=0)
        best_code = tl.where(least < best, first, best_code)
        best = tl.minimum(best, least)
    return best_code


@triton.jit
def _nearest(x_ptr, rows, in_rows, codes_ptr, squares_ptr, num_codes, DIM: tl.constexpr,
             EXACT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr,
             BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Nearest code of each of a tile's rows of x (., DIM): int32 [BLOCK_B], and the undecided."""
    relative = (DIM + 16) * 0.5 * _EPSILON
    slack = 16 * DIM * _TINY
    x_base = x_ptr + rows.to(tl.int64)[:, None] * DIM
    norm = tl.zeros((BLOCK_B,), tl.float32)
    if EXACT:
        for d_start in range(0, DIM, BLOCK_D):
            d = d_start + tl.arange(0, BLOCK_D)
            mask = in_rows[:, None] & (d < DIM)[None, :]
            x = tl.load(x_base + d[None, :], mask=mask, other=0.0).to(tl.float32)
            norm += tl.sum(x * x, axis=1)
        # The bound's own roundings are covered by its factors; a root rounds by one half ulp.
        norm = tl.sqrt(norm)
    best = tl.full((BLOCK_B,), float("inf"), tl.float32)
    best_upper = tl.full((BLOCK_B,), float("inf"), tl.float32)
    second = tl.full((BLOCK_B,), float("inf"), tl.float32)
    best_code = tl.full((BLOCK_B,), 0, tl.int32)
    for start in range(0, num_codes, BLOCK_N):
        code = start + tl.arange(0, BLOCK_N)
        inside = code < num_codes
        c_base = codes_ptr + code.to(tl.int64)[None, :] * DIM
        acc = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
        for d_start in range(0, DIM, BLOCK_D):
            d = d_start + tl.arange(0, BLOCK_D)
            x = tl.load(x_base + d[None, :], mask=in_rows[:, None] & (d < DIM)[None, :],
                        other=0.0).to(tl.float32)  # fmt: skip
            c = tl.load(c_base + d[:, None], mask=(d < DIM)[:, None] & inside[None, :], other=0.0)
            acc = tl.dot(x, c.to(tl.float32), acc, input_precision=PRECISION)
        square = tl.load(squares_ptr + code, mask=inside, other=0.0)
        score = square[None, :] - 2.0 * acc
        if EXACT:
            length = tl.sqrt(square)
            error = relative * (3.0 * norm[:, None] * length[None, :] + 2.0 * square[None, :])
            error += slack
            score -= error
        # A score that overflowed compares with nothing; its row stays undecided.
        score = tl.where(inside[None, :] & (score == score), score, float("inf"))
        least = tl.min(score, axis=1)
        first = tl.min(tl.where(score == least[:, None], code[None, :], 2147483647), axis=1)
        here = code[None, :] == first[:, None]
        better = least < best
        if EXACT:
            others = tl.min(tl.where(here, float("inf"), score), axis=1)
            upper = least + 2.0 * tl.sum(tl.where(here, error, 0.0), axis=1)
            second = tl.minimum(tl.minimum(second, others), tl.where(better, best, least))
            best_upper = tl.where(better, upper, best_upper)
        best_code = tl.where(better, first, best_code)
        best = tl.where(better, least, best)
    decided = (second > best_upper) & (best < float("inf")) & (best > float("-inf"))
    undecided = in_rows & (decided == 0)
    return best_code, undecided


@triton.jit
def _level(source, codes, squares, scratch_ptr, local, rows, in_rows, out_ptr, distance_ptr,
           num_codes, leaves_over, LEVELS: tl.constexpr, DIM: tl.constexpr, EXACT: tl.constexpr,
           WITH_DISTANCE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr,
           BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, RECHECK_N: tl.constexpr,
           RECHECK_D: tl.constexpr):  # fmt: skip
    """One level of one tile: codes to `out`; what is left over to `scratch`, if the next needs it.

    `source` and `scratch` are those of the tile and may be one: a barrier parts reads and writes.
    """
    best, undecided = _nearest(source, local, in_rows, codes, squares, num_codes, DIM, EXACT,
                               PRECISION, BLOCK_B, BLOCK_N, BLOCK_D)  # fmt: skip
    if EXACT:
        flags = undecided.to(tl.int32)
        if tl.max(flags, axis=0) > 0:
            for r in range(BLOCK_B):
                if tl.sum(tl.where(local == r, flags, 0), axis=0) > 0:
                    found = _row_by_differences(source + r * DIM, codes, num_codes, DIM,
                                                RECHECK_N, RECHECK_D)  # fmt: skip
                    best = tl.where(local == r, found, best)
    tl.store(out_ptr + rows * LEVELS, best.to(tl.int64), mask=in_rows)
    if WITH_DISTANCE or LEVELS > 1:
        tl.debug_barrier()
        total = tl.zeros((BLOCK_B,), tl.float32)
        for start in range(0, tl.where(leaves_over, DIM, 0), BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
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


@triton.jit(do_not_specialize=["num_rows", "tiles"])
def nearest_kernel(x_ptr, codes_ptr, squares_ptr, scratch_ptr, out_ptr, distance_ptr, num_rows,
                   num_codes, tiles, LEVELS: tl.constexpr, DIM: tl.constexpr,
                   EXACT: tl.constexpr, WITH_DISTANCE: tl.constexpr, PRECISION: tl.constexpr,
                   BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                   RECHECK_N: tl.constexpr, RECHECK_D: tl.constexpr):  # fmt: skip
    """Codes (B, LEVELS) of x (B, DIM) in codebooks (LEVELS, num_codes, DIM), all contiguous.

    A program stays and takes tile after tile. What a level leaves over goes to the program's own
    place in `scratch` (programs, BLOCK_B, DIM) fp32, small enough for the cache.
    """
    local = tl.arange(0, BLOCK_B)
    my_scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * BLOCK_B * DIM
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        first_row = tl.full((), 0, tl.int64) + tile * BLOCK_B
        rows = first_row + local
        in_rows = rows < num_rows
        _level(x_ptr + first_row * DIM, codes_ptr, squares_ptr, my_scratch,
               local, rows, in_rows, out_ptr, distance_ptr, num_codes,
               WITH_DISTANCE or LEVELS > 1, LEVELS, DIM, EXACT, WITH_DISTANCE, PRECISION,
               BLOCK_B, BLOCK_N, BLOCK_D, RECHECK_N, RECHECK_D)  # fmt: skip
        if LEVELS > 1:
            for level in range(1, LEVELS):
                _level(my_scratch, codes_ptr + level * num_codes * DIM,
                       squares_ptr + level * num_codes, my_scratch, local, rows, in_rows,
                       out_ptr + level, distance_ptr, num_codes, level + 1 < LEVELS, LEVELS, DIM,
                       EXACT, False, PRECISION, BLOCK_B, BLOCK_N, BLOCK_D, RECHECK_N,
                       RECHECK_D)  # fmt: skip
