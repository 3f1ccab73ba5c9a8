# Gluon gives kernels no types; parameters are pointers, tensors of the shapes stated, constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202
"""Keys and values on their way through a multiprocessor: one warp copies, two groups multiply.

What the paired attention kernels have in common. A program takes tiles of queries one after
another. Two groups of four warps take half of a tile each, at their own pace, with the order of
``pipelined_attention`` within a turn; one more warp copies the keys and values of both, so that
they are read half as often.

A turn takes two blocks, and turns are counted through all tiles of a program. In step t a group
multiplies its queries with the keys of turn t, once it has multiplied its weights with the values
of turn t - 1, be that of another tile; once both groups are through a step, what they read in it
may be overwritten. So the next tile's keys are copied while results of this one are stored.
"""

from __future__ import annotations

from rectokens.kernels.optional_triton import gl, gluon, hopper
from rectokens.kernels.pipelined_attention import _row, _weights

WARPS = gl.constexpr(4)  # of a group


@gluon.jit
def allocate(key_desc, DIM: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory of a ring of turns, and its barriers.

    Returns:
        Pieces of keys and of values, as they are copied; barriers that tell which of them are
        here, and which steps are done.
    """
    BLOCK: gl.constexpr = key_desc.block_type.shape[0]
    WIDTH: gl.constexpr = key_desc.block_type.shape[1]
    PIECES: gl.constexpr = DIM // WIDTH
    shape: gl.constexpr = [STAGES * PIECES * 2, BLOCK, WIDTH]
    key_pieces = gl.allocate_shared_memory(key_desc.dtype, shape, key_desc.layout)
    value_pieces = gl.allocate_shared_memory(key_desc.dtype, shape, key_desc.layout)
    barriers: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    keys_here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    values_here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    done = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    for i in gl.static_range(STAGES):
        hopper.mbarrier.init(keys_here.index(i), count=1)
        hopper.mbarrier.init(values_here.index(i), count=1)
        hopper.mbarrier.init(done.index(i), count=2)
    hopper.fence_async_shared()
    return key_pieces, value_pieces, keys_here, values_here, done


@gluon.jit
def place_of(number):
    """Place among all tiles of the one that this program takes as its ``number``-th.

    To and fro, so that programs that take the longest tile of one round take the shortest of the
    next.
    """
    programs = gl.num_programs(0)
    own = gl.program_id(0)
    return number * programs + gl.where(number % 2 == 0, own, programs - 1 - own)


@gluon.jit
def anew(number):
    """The number, of which the compiler does not know that what is made of it was made before.

    It would keep that in registers meanwhile, of which there are none to spare.
    """
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _copy(desc, row, other_row, pieces, place, barrier, PIECES: gl.constexpr):
    """Copy two blocks of N rows, in pieces of their columns, to where they are one of 2 N."""
    N: gl.constexpr = desc.block_type.shape[0]
    WIDTH: gl.constexpr = desc.block_type.shape[1]
    hopper.mbarrier.expect(barrier, 2 * N * PIECES * WIDTH * 2)
    for i in gl.static_range(PIECES):
        at = (place * PIECES + i) * 2
        hopper.tma.async_copy_global_to_shared(desc, [row, i * WIDTH], barrier, pieces.index(at))
        hopper.tma.async_copy_global_to_shared(
            desc, [other_row, i * WIDTH], barrier, pieces.index(at + 1)
        )


@gluon.jit
def copy_values(
    desc, row, other_row, pieces, here, step, STAGES: gl.constexpr, PIECES: gl.constexpr
):
    """Copy the values of the turn before a step."""
    if step > 0:
        place = (step - 1) % STAGES
        _copy(desc, row, other_row, pieces, place, here.index(place), PIECES)


@gluon.jit
def copy_tile(
    key_desc,
    value_desc,
    key_pieces,
    value_pieces,
    keys_here,
    values_here,
    done,
    value_row,
    other_value_row,
    step,
    table_ptr,
    turns,
    last,
    head,
    kv_heads,
    PAGE: gl.constexpr,
    STAGES: gl.constexpr,
    PIECES: gl.constexpr,
):
    """What the copying warp does for a tile: its keys, and one step later its values.

    Those of the tile's last turn are left to the next step. No block after ``last`` is read;
    where a turn reaches past it, that one stands there again.

    Returns:
        Rows of the values that are left, and the next step.
    """
    N: gl.constexpr = key_desc.block_type.shape[0]
    for turn in range(turns):
        # Looked up before the wait.
        row = _row(table_ptr, 2 * turn, head, kv_heads, PAGE, N)
        other_row = _row(table_ptr, gl.minimum(2 * turn + 1, last), head, kv_heads, PAGE, N)
        place = step % STAGES
        # Of the step that used the place before; at first there was none.
        hopper.mbarrier.wait(done.index(place), (step // STAGES + 1) & 1)
        _copy(key_desc, row, other_row, key_pieces, place, keys_here.index(place), PIECES)
        copy_values(
            value_desc, value_row, other_value_row, value_pieces, values_here, step, STAGES, PIECES
        )
        value_row = row
        other_value_row = other_row
        step += 1
    return value_row, other_value_row, step


@gluon.jit
def copy_rest(
    value_desc,
    value_pieces,
    values_here,
    done,
    value_row,
    other_value_row,
    step,
    STAGES: gl.constexpr,
    PIECES: gl.constexpr,
):
    """After a program's last tile: the values that are left."""
    hopper.mbarrier.wait(done.index(step % STAGES), (step // STAGES + 1) & 1)
    copy_values(
        value_desc, value_row, other_value_row, value_pieces, values_here, step, STAGES, PIECES
    )


@gluon.jit
def _sum_up(weights, shrink, sums, values):
    """Enqueue the weighted sums of a turn's values."""
    of_sums: gl.constexpr = gl.SliceLayout(1, sums.type.layout)
    operand: gl.constexpr = gl.DotOperandLayout(0, sums.type.layout, 2)
    sums = sums * gl.expand_dims(gl.convert_layout(shrink, of_sums), 1)
    weights = gl.convert_layout(weights.to(values.dtype), operand)
    return hopper.warpgroup_mma(weights, values, sums, is_async=True)


@gluon.jit
def _free(barrier):
    """Tell that this group needs no more of what it read in a step.

    One thread tells; Triton has the group's warps meet before that.
    """
    hopper.mbarrier.arrive(barrier, count=1)


@gluon.jit
def pass_by(keys_here, values_here, done, step, begin, turns, STAGES: gl.constexpr):
    """Go through the turns of a tile, from ``begin`` on, that only the other group needs.

    All that is copied is waited for: barriers tell of the last but one time as of the next.
    """
    for turn in range(begin, turns):
        now = step + turn
        place = now % STAGES
        hopper.mbarrier.wait(keys_here.index(place), (now // STAGES) & 1)
        _free(done.index(place))
        hopper.mbarrier.wait(values_here.index(place), (now // STAGES) & 1)


@gluon.jit
def _clean(pieces, place, end, PIECES: gl.constexpr):
    """Zero the values of a turn from row ``end`` on.

    What lies past a prompt's end may be anything, and zero times NaN is NaN. The other group may
    do the same, or read already: it finds zeros that it has written itself, and what was there.
    """
    N: gl.constexpr = pieces.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    rows = gl.expand_dims(gl.arange(0, N, gl.SliceLayout(1, layout)), 1)
    for half in gl.static_range(2):
        if end < (half + 1) * N:
            for i in gl.static_range(PIECES):
                piece = pieces.index((place * PIECES + i) * 2 + half)
                piece.store(gl.where(rows + half * N < end, piece.load(layout), 0.0))
    hopper.fence_async_shared()


@gluon.jit
def keep(queries, given):
    """Put queries where products read them."""
    queries.store(given)
    hopper.fence_async_shared()


@gluon.jit
def first_scores(queries, keys, keys_here, step, N: gl.constexpr, STAGES: gl.constexpr):
    """Enqueue the products with the keys of a tile's first turn, once they are here."""
    M: gl.constexpr = queries.shape[0]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 16])
    nothing = gl.zeros([M, N], gl.float32, SCORES)
    place = step % STAGES
    hopper.mbarrier.wait(keys_here.index(place), (step // STAGES) & 1)
    return hopper.warpgroup_mma(
        queries, keys.index(place).permute((1, 0)), nothing, use_acc=False, is_async=True
    )


@gluon.jit
def attend(
    queries,
    scores,
    keys,
    values,
    value_pieces,
    keys_here,
    values_here,
    done,
    step,
    own,
    start,
    length,
    peak,
    total,
    sums,
    unit,
    CAUSAL: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    PIECES: gl.constexpr,
):
    """What a group does for its half of a tile: ``own`` turns, at least one, from ``step`` on.

    Args:
        scores: what :func:`first_scores` has enqueued.
        start: position of the first query, where queries see no later ones.
        length: positions that there are.
        peak: (M,) in a slice of the scores' layout, as total; before the first turn.
        sums: (M, D).

    Returns:
        Sums and totals after the last turn.
    """
    M: gl.constexpr = queries.shape[0]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, SCORES)
    positions = gl.expand_dims(start + gl.arange(0, M, by_row), 1)
    offsets = gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, SCORES)), 0)
    nothing = gl.zeros([M, N], gl.float32, SCORES)
    scores = hopper.warpgroup_mma_wait(0, deps=[scores])
    _free(done.index(step % STAGES))
    last = own - 1
    unmasked = last
    if CAUSAL:
        unmasked = gl.minimum((start + 1) // N, last)
    for part in gl.static_range(2 if CAUSAL else 1):
        # Twice the same, for turns that need no mask and for those that do.
        for turn in range(0 if part == 0 else unmasked, unmasked if part == 0 else last):
            now = step + turn
            place = now % STAGES
            after = (now + 1) % STAGES
            hopper.mbarrier.wait(keys_here.index(after), ((now + 1) // STAGES) & 1)
            next_keys = keys.index(after).permute((1, 0))
            ahead = hopper.warpgroup_mma(queries, next_keys, nothing, use_acc=False, is_async=True)
            # Beside that product; the next one needs the weights: neither is waited for.
            if part == 0:
                weights, peak, total, shrink = _weights(scores, True, peak, total, unit, False)
            else:
                seen = turn * N + offsets <= positions
                weights, peak, total, shrink = _weights(scores, seen, peak, total, unit, True)
            hopper.mbarrier.wait(values_here.index(place), (now // STAGES) & 1)
            sums = _sum_up(weights, shrink, sums, values.index(place))
            sums, scores = hopper.warpgroup_mma_wait(0, deps=[sums, ahead])
            _free(done.index(after))
    # The last turn has no next one, and alone may reach past the end.
    here = last * N + offsets
    seen = here < length
    if CAUSAL:
        seen = seen & (here <= positions)
    weights, peak, total, shrink = _weights(scores, seen, peak, total, unit, True)
    now = step + last
    place = now % STAGES
    hopper.mbarrier.wait(values_here.index(place), (now // STAGES) & 1)
    if length < own * N:
        _clean(value_pieces, place, length - last * N, PIECES)
    sums = _sum_up(weights, shrink, sums, values.index(place))
    sums = hopper.warpgroup_mma_wait(0, deps=[sums])
    return sums, total
