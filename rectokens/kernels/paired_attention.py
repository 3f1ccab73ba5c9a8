# Gluon gives kernels no types; parameters are pointers, tensors of the shapes stated, constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202
"""Attention of long prompts on Hopper: two groups of warps that share keys and values.

A program takes a tile of 128 queries. Two groups of four warps take half of it each, at their own
pace, with the order of ``pipelined_attention`` within a turn; one more warp copies the keys and
values of both, so that they are read half as often. One group multiplies while the other makes its
weights.

A turn takes two blocks. In step t of a group it multiplies its queries with the keys of turn t
and its weights with the values of turn t - 1; once both groups are through a step, what they read
in it may be overwritten.
"""

from __future__ import annotations

from rectokens.kernels.optional_triton import gl, gluon, hopper
from rectokens.kernels.pipelined_attention import _row, _weights

_LOG2_E = gl.constexpr(1.4426950408889634)
_WARPS = gl.constexpr(4)  # of a group


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
def _load(
    key_desc,
    value_desc,
    key_pieces,
    value_pieces,
    keys_here,
    values_here,
    done,
    table_ptr,
    turns,
    last,
    head,
    kv_heads,
    PAGE: gl.constexpr,
    STAGES: gl.constexpr,
    PIECES: gl.constexpr,
):
    """What the copying warp does: keys of turns 0 to ``turns``, values one step later.

    No block after ``last`` is read; where a turn reaches past it, that one stands there again.
    """
    N: gl.constexpr = key_desc.block_type.shape[0]
    key_row = _row(table_ptr, 0, head, kv_heads, PAGE, N)
    other_key_row = _row(table_ptr, gl.minimum(1, last), head, kv_heads, PAGE, N)
    _copy(key_desc, key_row, other_key_row, key_pieces, 0, keys_here.index(0), PIECES)
    for step in range(1, turns + 1):
        value_row = key_row
        other_value_row = other_key_row
        # Looked up before the wait.
        key_row = _row(table_ptr, gl.minimum(2 * step, last), head, kv_heads, PAGE, N)
        other_key_row = _row(table_ptr, gl.minimum(2 * step + 1, last), head, kv_heads, PAGE, N)
        place = step % STAGES
        # Of the step that used the place before; at first there was none.
        hopper.mbarrier.wait(done.index(place), (step // STAGES + 1) & 1)
        if step < turns:
            _copy(
                key_desc, key_row, other_key_row, key_pieces, place, keys_here.index(place), PIECES
            )  # fmt: skip
        before = (step - 1) % STAGES
        _copy(
            value_desc, value_row, other_value_row, value_pieces, before,
            values_here.index(before), PIECES,
        )  # fmt: skip


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
def _clean(pieces, place, end, PIECES: gl.constexpr):
    """Zero the values of a turn from row ``end`` on.

    What lies past a prompt's end may be anything, and zero times NaN is NaN. The other group may
    do the same, or read already: it finds zeros that it has written itself, and what was there.
    """
    N: gl.constexpr = pieces.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [_WARPS, 1], [1, 0])
    rows = gl.expand_dims(gl.arange(0, N, gl.SliceLayout(1, layout)), 1)
    for half in gl.static_range(2):
        if end < (half + 1) * N:
            for i in gl.static_range(PIECES):
                piece = pieces.index((place * PIECES + i) * 2 + half)
                piece.store(gl.where(rows + half * N < end, piece.load(layout), 0.0))
    hopper.fence_async_shared()


@gluon.jit
def _attend(
    own,
    query_ptr,
    out_ptr,
    queries,
    keys,
    values,
    value_pieces,
    keys_here,
    values_here,
    done,
    first,
    count,
    length,
    tile_start,
    turns,
    query_row,
    out_row,
    head,
    unit,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    PIECES: gl.constexpr,
):
    """What a group does: rows from ``tile_start`` on of a prompt, as many as ``queries`` has.

    Args:
        own: of the tile's turns, how many these rows need; 0 where there are no rows.
        first: row of the prompt's first query.
        count: the prompt's queries.
        length: its positions in the pages.
    """
    M: gl.constexpr = queries.shape[0]
    D: gl.constexpr = queries.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, D, 16])
    LANES: gl.constexpr = D // 8
    memory: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [_WARPS, 1], [1, 0])
    by_row: gl.constexpr = gl.SliceLayout(1, SCORES)
    if own > 0:
        rows = tile_start + gl.arange(0, M, gl.SliceLayout(1, memory))
        dims = gl.expand_dims(head * D + gl.arange(0, D, gl.SliceLayout(0, memory)), 0)
        live = gl.expand_dims(rows < count, 1)
        rows = gl.expand_dims((first + rows).to(gl.int64), 1)
        queries.store(gl.load(query_ptr + rows * query_row + dims, mask=live, other=0.0))
        hopper.fence_async_shared()
        start = length - count + tile_start
        positions = gl.expand_dims(start + gl.arange(0, M, by_row), 1)
        offsets = gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, SCORES)), 0)
        peak = gl.full([M], float("-inf"), gl.float32, by_row)
        total = gl.zeros([M], gl.float32, by_row)
        nothing = gl.zeros([M, N], gl.float32, SCORES)
        sums = gl.zeros([M, D], gl.float32, SUMS)
        hopper.mbarrier.wait(keys_here.index(0), 0)
        scores = hopper.warpgroup_mma(
            queries, keys.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        scores = hopper.warpgroup_mma_wait(0, deps=[scores])
        _free(done.index(0))
        last = own - 1
        unmasked = gl.minimum((start + 1) // N, last)
        for part in gl.static_range(2):
            # Twice the same, for turns that need no mask and for those that do.
            for turn in range(0 if part == 0 else unmasked, unmasked if part == 0 else last):
                place = turn % STAGES
                after = (turn + 1) % STAGES
                hopper.mbarrier.wait(keys_here.index(after), ((turn + 1) // STAGES) & 1)
                next_keys = keys.index(after).permute((1, 0))
                ahead = hopper.warpgroup_mma(
                    queries, next_keys, nothing, use_acc=False, is_async=True
                )
                # Beside that product; the next one needs the weights: neither is waited for.
                if part == 0:
                    weights, peak, total, shrink = _weights(scores, True, peak, total, unit, False)
                else:
                    seen = turn * N + offsets <= positions
                    weights, peak, total, shrink = _weights(scores, seen, peak, total, unit, True)
                hopper.mbarrier.wait(values_here.index(place), (turn // STAGES) & 1)
                sums = _sum_up(weights, shrink, sums, values.index(place))
                sums, scores = hopper.warpgroup_mma_wait(0, deps=[sums, ahead])
                _free(done.index(after))
        # The last turn has no next one, and alone may reach past the end.
        here = last * N + offsets
        seen = (here <= positions) & (here < length)
        weights, peak, total, shrink = _weights(scores, seen, peak, total, unit, True)
        place = last % STAGES
        hopper.mbarrier.wait(values_here.index(place), (last // STAGES) & 1)
        if length < own * N:
            _clean(value_pieces, place, length - last * N, PIECES)
        sums = _sum_up(weights, shrink, sums, values.index(place))
        sums = hopper.warpgroup_mma_wait(0, deps=[sums])
        _free(done.index(own % STAGES))
        out = sums / gl.expand_dims(gl.convert_layout(total, gl.SliceLayout(1, SUMS)), 1)
        queries.store(out.to(out_ptr.dtype.element_ty))
        gl.store(out_ptr + rows * out_row + dims, queries.load(memory), mask=live)
    # What only the other group needs; a step is told once the one before it in its place is over.
    for step in range(gl.where(own > 0, own + 1, 0), turns + 1):
        before = gl.maximum(step - 1, 0)
        hopper.mbarrier.wait(
            values_here.index(before % STAGES), (before // STAGES) & 1, pred=step > 0
        )
        _free(done.index(step % STAGES))


@gluon.jit(do_not_specialize=["table_stride"])
def prompt_kernel(
    query_ptr,
    key_desc,
    value_desc,
    out_ptr,
    tile_request_ptr,
    tile_start_ptr,
    query_starts_ptr,
    length_ptr,
    table_ptr,
    table_stride,
    query_row,
    out_row,
    scale,
    kv_heads,
    GROUP: gl.constexpr,
    PAGE: gl.constexpr,
    M: gl.constexpr,
    DIM: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_REGISTERS: gl.constexpr,
    COPY_REGISTERS: gl.constexpr,
):
    """One query head of a tile of 2 M rows of a prompt; see ``context_attention_triton``.

    Keys and values are rows of DIM, of which a descriptor's block takes a part. Grid: (heads that
    are computed together, tiles, such sets of heads).
    """
    BLOCK: gl.constexpr = key_desc.block_type.shape[0]
    WIDTH: gl.constexpr = key_desc.block_type.shape[1]
    PIECES: gl.constexpr = DIM // WIDTH
    N: gl.constexpr = 2 * BLOCK
    kind: gl.constexpr = key_desc.dtype
    shared: gl.constexpr = key_desc.layout
    head = gl.program_id(2) * gl.num_programs(0) + gl.program_id(0)
    request = gl.load(tile_request_ptr + gl.program_id(1))
    if request < 0:
        return
    tile_start = gl.load(tile_start_ptr + gl.program_id(1))
    first = gl.load(query_starts_ptr + request)
    count = gl.load(query_starts_ptr + request + 1) - first
    length = gl.load(length_ptr + request)
    start = length - count + tile_start
    turns_one = gl.cdiv(gl.minimum(length, start + M), N)
    turns_two = gl.where(tile_start + M < count, gl.cdiv(gl.minimum(length, start + 2 * M), N), 0)
    turns = gl.maximum(turns_one, turns_two)
    # In pieces as they are copied, and the same memory as they are multiplied.
    key_pieces = gl.allocate_shared_memory(kind, [STAGES * PIECES * 2, BLOCK, WIDTH], shared)
    value_pieces = gl.allocate_shared_memory(kind, [STAGES * PIECES * 2, BLOCK, WIDTH], shared)
    keys = key_pieces._reinterpret(kind, [STAGES, N, DIM], shared)
    values = value_pieces._reinterpret(kind, [STAGES, N, DIM], shared)
    queries = gl.allocate_shared_memory(kind, [2, M, DIM], shared)
    barriers: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    keys_here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    values_here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    done = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    for i in gl.static_range(STAGES):
        hopper.mbarrier.init(keys_here.index(i), count=1)
        hopper.mbarrier.init(values_here.index(i), count=1)
        hopper.mbarrier.init(done.index(i), count=2)
    hopper.fence_async_shared()
    table = table_ptr + request.to(gl.int64) * table_stride
    unit = scale * _LOG2_E
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    turns_one, query_ptr, out_ptr, queries.index(0), keys, values, value_pieces,
                    keys_here, values_here, done, first, count, length, tile_start, turns,
                    query_row, out_row, head, unit, N, STAGES, PIECES,
                ),
            ),
            (
                _attend,
                (
                    turns_two, query_ptr, out_ptr, queries.index(1), keys, values, value_pieces,
                    keys_here, values_here, done, first, count, length, tile_start + M, turns,
                    query_row, out_row, head, unit, N, STAGES, PIECES,
                ),
            ),
            (
                _load,
                (
                    key_desc, value_desc, key_pieces, value_pieces, keys_here, values_here, done,
                    table, turns, (length - 1) // BLOCK, head // GROUP, kv_heads, PAGE, STAGES,
                    PIECES,
                ),
            ),
        ],
        [_WARPS, 1],
        [GROUP_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip
