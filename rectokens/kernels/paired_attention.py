# Gluon gives kernels no types; parameters are pointers, tensors of the shapes stated, constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202
"""Attention of long prompts on Hopper: two groups of warps that share keys and values.

How they share them is told in ``paired_stream``. A tile is 128 queries of a prompt.
"""

from __future__ import annotations

from rectokens.kernels import paired_stream
from rectokens.kernels.optional_triton import gl, gluon

_LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _request(tile_request_ptr, place, heads, tiles):
    """Request of the tile at a place among tiles times heads; -1 past the last tile.

    Tiles without a request come last, so that none follows the first of them.
    """
    tile = place // heads
    return gl.load(tile_request_ptr + tile, mask=tile < tiles, other=-1)


@gluon.jit
def _tile(
    request,
    place,
    heads,
    tile_start_ptr,
    query_starts_ptr,
    length_ptr,
    M: gl.constexpr,
    N: gl.constexpr,
):
    """Where a tile of 2 M rows lies, and how many turns its halves need; 0 where it has no rows."""
    tile_start = gl.load(tile_start_ptr + place // heads)
    first = gl.load(query_starts_ptr + request)
    count = gl.load(query_starts_ptr + request + 1) - first
    length = gl.load(length_ptr + request)
    start = length - count + tile_start
    one = gl.cdiv(gl.minimum(length, start + M), N)
    two = gl.where(tile_start + M < count, gl.cdiv(gl.minimum(length, start + 2 * M), N), 0)
    return tile_start, first, count, length, one, two


@gluon.jit
def _load(
    key_desc,
    value_desc,
    key_pieces,
    value_pieces,
    keys_here,
    values_here,
    done,
    tile_request_ptr,
    tile_start_ptr,
    query_starts_ptr,
    length_ptr,
    table_ptr,
    table_stride,
    tiles,
    heads,
    kv_heads,
    GROUP: gl.constexpr,
    PAGE: gl.constexpr,
    M: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    PIECES: gl.constexpr,
):
    """What the copying warp does."""
    BLOCK: gl.constexpr = key_desc.block_type.shape[0]
    number = 0
    step = 0
    value_row = 0
    other_value_row = 0
    place = paired_stream.place_of(number)
    request = _request(tile_request_ptr, place, heads, tiles)
    while request >= 0:
        _, _, _, length, one, two = _tile(
            request, place, heads, tile_start_ptr, query_starts_ptr, length_ptr, M, N
        )
        value_row, other_value_row, step = paired_stream.copy_tile(
            key_desc, value_desc, key_pieces, value_pieces, keys_here, values_here, done,
            value_row, other_value_row, step, table_ptr + request.to(gl.int64) * table_stride,
            gl.maximum(one, two), (length - 1) // BLOCK, place % heads // GROUP, kv_heads, PAGE,
            STAGES, PIECES,
        )  # fmt: skip
        number += 1
        place = paired_stream.place_of(number)
        request = _request(tile_request_ptr, place, heads, tiles)
    paired_stream.copy_rest(
        value_desc, value_pieces, values_here, done, value_row, other_value_row, step, STAGES,
        PIECES,
    )  # fmt: skip


@gluon.jit
def _attend(
    which: gl.constexpr,
    query_ptr,
    out_ptr,
    queries,
    keys,
    values,
    value_pieces,
    keys_here,
    values_here,
    done,
    tile_request_ptr,
    tile_start_ptr,
    query_starts_ptr,
    length_ptr,
    tiles,
    heads,
    query_row,
    out_row,
    unit,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    PIECES: gl.constexpr,
):
    """What a group does: the half number ``which`` of each tile."""
    M: gl.constexpr = queries.shape[0]
    D: gl.constexpr = queries.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [paired_stream.WARPS, 1], [16, N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [paired_stream.WARPS, 1], [16, D, 16])
    LANES: gl.constexpr = D // 8
    memory: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // LANES, LANES], [paired_stream.WARPS, 1], [1, 0]
    )
    by_row: gl.constexpr = gl.SliceLayout(1, SCORES)
    number = 0
    step = 0
    place = paired_stream.place_of(number)
    request = _request(tile_request_ptr, place, heads, tiles)
    while request >= 0:
        tile_start, first, count, length, one, two = _tile(
            request, place, heads, tile_start_ptr, query_starts_ptr, length_ptr, M, N
        )
        own = one if which == 0 else two
        if own > 0:
            half = tile_start + which * M
            rows = half + gl.arange(0, M, gl.SliceLayout(1, memory))
            dims = place % heads * D + gl.arange(0, D, gl.SliceLayout(0, memory))
            dims = gl.expand_dims(dims, 0)
            live = gl.expand_dims(rows < count, 1)
            rows = gl.expand_dims((first + rows).to(gl.int64), 1)
            paired_stream.keep(
                queries, gl.load(query_ptr + rows * query_row + dims, mask=live, other=0.0)
            )
            scores = paired_stream.first_scores(queries, keys, keys_here, step, N, STAGES)
            sums, total = paired_stream.attend(
                queries, scores, keys, values, value_pieces, keys_here, values_here, done, step,
                own, length - count + half, length,
                gl.full([M], float("-inf"), gl.float32, by_row),
                gl.zeros([M], gl.float32, by_row), gl.zeros([M, D], gl.float32, SUMS), unit,
                True, N, STAGES, PIECES,
            )  # fmt: skip
            out = sums / gl.expand_dims(gl.convert_layout(total, gl.SliceLayout(1, SUMS)), 1)
            queries.store(out.to(out_ptr.dtype.element_ty))
            gl.store(out_ptr + rows * out_row + dims, queries.load(memory), mask=live)
        turns = gl.maximum(one, two)
        paired_stream.pass_by(keys_here, values_here, done, step, own, turns, STAGES)
        step += turns
        number += 1
        place = paired_stream.place_of(number)
        request = _request(tile_request_ptr, place, heads, tiles)


@gluon.jit(do_not_specialize=["table_stride", "tiles"])
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
    tiles,
    heads,
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
    """Query heads of tiles of 2 M rows of a prompt; see ``context_attention_triton``.

    Keys and values are rows of DIM, of which a descriptor's block takes a part. All heads of a tile
    come one after another, so that what they read stays in the cache. Grid: any number of
    programs, among which the tiles are shared out.
    """
    PIECES: gl.constexpr = DIM // key_desc.block_type.shape[1]
    N: gl.constexpr = 2 * key_desc.block_type.shape[0]
    kind: gl.constexpr = key_desc.dtype
    shared: gl.constexpr = key_desc.layout
    key_pieces, value_pieces, keys_here, values_here, done = paired_stream.allocate(
        key_desc, DIM, STAGES
    )
    # The same memory as it is multiplied.
    keys = key_pieces._reinterpret(kind, [STAGES, N, DIM], shared)
    values = value_pieces._reinterpret(kind, [STAGES, N, DIM], shared)
    queries = gl.allocate_shared_memory(kind, [2, M, DIM], shared)
    unit = scale * _LOG2_E
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    0, query_ptr, out_ptr, queries.index(0), keys, values, value_pieces, keys_here,
                    values_here, done, tile_request_ptr, tile_start_ptr, query_starts_ptr,
                    length_ptr, tiles, heads, query_row, out_row, unit, N, STAGES, PIECES,
                ),
            ),
            (
                _attend,
                (
                    1, query_ptr, out_ptr, queries.index(1), keys, values, value_pieces, keys_here,
                    values_here, done, tile_request_ptr, tile_start_ptr, query_starts_ptr,
                    length_ptr, tiles, heads, query_row, out_row, unit, N, STAGES, PIECES,
                ),
            ),
            (
                _load,
                (
                    key_desc, value_desc, key_pieces, value_pieces, keys_here, values_here, done,
                    tile_request_ptr, tile_start_ptr, query_starts_ptr, length_ptr, table_ptr,
                    table_stride, tiles, heads, kv_heads, GROUP, PAGE, M, N, STAGES, PIECES,
                ),
            ),
        ],
        [paired_stream.WARPS, 1],
        [GROUP_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip
