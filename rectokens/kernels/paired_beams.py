# Gluon gives kernels no types; parameters are pointers, tensors of the shapes stated, constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202
"""Attention of beams on Hopper: two groups of warps that share keys and values of a context.

How they share them is told in ``paired_stream``. A tile is 128 queries of the beams of a request
that share a key head. A tile begins with the beams' own positions, while its first keys are on
their way, so that nothing is left to be merged: no part of a context is stored.
"""

from __future__ import annotations

from rectokens.kernels import paired_stream
from rectokens.kernels.optional_triton import gl, gluon

_LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _tile(place, length_ptr, width, kv_heads, GROUP: gl.constexpr, M: gl.constexpr):
    """Request, key head and first query of a tile of 2 M; and its context's length."""
    tiles = gl.cdiv(width * GROUP, 2 * M)
    request = place // tiles // kv_heads
    return (
        request,
        place // tiles % kv_heads,
        place % tiles * (2 * M),
        gl.load(length_ptr + request),
    )


@gluon.jit
def _turns(length, half, width, GROUP: gl.constexpr, N: gl.constexpr):
    """Turns of the queries from ``half`` on; 0 where there are none."""
    return gl.where(half < width * GROUP, gl.cdiv(length, N), 0)


@gluon.jit
def _load(
    key_desc,
    value_desc,
    key_pieces,
    value_pieces,
    keys_here,
    values_here,
    done,
    length_ptr,
    table_ptr,
    table_stride,
    places,
    width,
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
    step = 0
    value_row = 0
    other_value_row = 0
    place = gl.program_id(0)
    while place < places:
        request, head, _, length = _tile(place, length_ptr, width, kv_heads, GROUP, M)
        value_row, other_value_row, step = paired_stream.copy_tile(
            key_desc, value_desc, key_pieces, value_pieces, keys_here, values_here, done,
            value_row, other_value_row, step, table_ptr + request.to(gl.int64) * table_stride,
            gl.cdiv(length, N), (length - 1) // BLOCK, head, kv_heads, PAGE, STAGES, PIECES,
        )  # fmt: skip
        place += gl.num_programs(0)
    paired_stream.copy_rest(
        value_desc, value_pieces, values_here, done, value_row, other_value_row, step, STAGES,
        PIECES,
    )  # fmt: skip


@gluon.jit
def _queries(request, head, half, width, GROUP: gl.constexpr, M: gl.constexpr, D: gl.constexpr):
    """Where the queries from ``half`` on are: they go through the beams, and each one's heads.

    Returns:
        Row of the request's first beam; and from there on and the first head's column, as far as
        32 bits go: rows (M, 1), columns (M, D) and which queries there are (M, 1).
    """
    LANES: gl.constexpr = D // 8
    memory: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // LANES, LANES], [paired_stream.WARPS, 1], [1, 0]
    )
    local = gl.expand_dims(half + gl.arange(0, M, gl.SliceLayout(1, memory)), 1)
    dims = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, memory)), 0)
    first = (request * width).to(gl.int64)
    return first, local // GROUP, local % GROUP * D + dims, local < width * GROUP


@gluon.jit
def _own_positions(
    queries,
    local,
    own_key_ptr,
    own_value_ptr,
    path_ptr,
    request,
    head,
    width,
    steps,
    own_step,
    path_row,
    kv_heads,
    unit,
    GROUP: gl.constexpr,
    SCORES: gl.constexpr,
    SUMS: gl.constexpr,
):
    """The softmax over what the beams have made themselves, at least one position.

    Args:
        queries: (M, D), where products read them.
        local: (M,), their places among those of the request and key head, in a slice of SUMS.

    Returns:
        Peaks and totals (M,) in slices of SCORES, sums (M, D) in SUMS.
    """
    M: gl.constexpr = queries.shape[0]
    D: gl.constexpr = queries.shape[1]
    LANES: gl.constexpr = D // 8
    memory: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // LANES, LANES], [paired_stream.WARPS, 1], [1, 0]
    )
    by_row: gl.constexpr = gl.SliceLayout(1, SCORES)
    of_sums: gl.constexpr = gl.SliceLayout(1, SUMS)
    dims = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, memory)), 0)
    dims_sums = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, SUMS)), 0)
    peak = gl.full([M], float("-inf"), gl.float32, by_row)
    total = gl.zeros([M], gl.float32, by_row)
    sums = gl.zeros([M, D], gl.float32, SUMS)
    first = (request * width).to(gl.int64)
    # Of a request all places fit 32 bits.
    path_ptr += first * path_row
    base = (first * kv_heads + head) * D
    live = local < width * GROUP
    path = local // GROUP * path_row
    for step in range(steps):
        slot = gl.load(path_ptr + path + step, mask=live, other=0) * (kv_heads * D)
        slot_keys = gl.expand_dims(gl.convert_layout(slot, gl.SliceLayout(1, memory)), 1)
        keys = gl.load(own_key_ptr + base + (slot_keys + dims))
        values = gl.load(own_value_ptr + base + (gl.expand_dims(slot, 1) + dims_sums))
        base += own_step
        score = gl.convert_layout(
            gl.sum(queries.load(memory).to(gl.float32) * keys.to(gl.float32), 1) * unit, by_row
        )
        new_peak = gl.maximum(peak, score)
        weight = gl.exp2(score - new_peak)
        shrink = gl.exp2(peak - new_peak)
        total = total * shrink + weight
        peak = new_peak
        shrink = gl.expand_dims(gl.convert_layout(shrink, of_sums), 1)
        weight = gl.expand_dims(gl.convert_layout(weight, of_sums), 1)
        sums = sums * shrink + values.to(gl.float32) * weight
    return peak, total, sums


@gluon.jit
def _attend(
    which: gl.constexpr,
    query_ptr,
    out_ptr,
    own_key_ptr,
    own_value_ptr,
    path_ptr,
    queries,
    keys,
    values,
    value_pieces,
    keys_here,
    values_here,
    done,
    length_ptr,
    places,
    width,
    steps,
    query_row,
    out_row,
    own_step,
    path_row,
    kv_heads,
    unit,
    GROUP: gl.constexpr,
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
    of_sums: gl.constexpr = gl.SliceLayout(1, SUMS)
    step = 0
    place = gl.program_id(0)
    while place < places:
        request, head, tile_start, length = _tile(place, length_ptr, width, kv_heads, GROUP, M)
        half = tile_start + which * M
        turns = gl.cdiv(length, N)
        own = _turns(length, half, width, GROUP, N)
        if half < width * GROUP:
            first, row, column, live = _queries(request, head, half, width, GROUP, M, D)
            source = query_ptr + first * query_row + head * (GROUP * D)
            query = gl.load(source + (row * query_row + column), mask=live, other=0.0)
            paired_stream.keep(queries, query)
            peak, total, sums = _own_positions(
                queries, half + gl.arange(0, M, of_sums), own_key_ptr, own_value_ptr,
                path_ptr, request, head, width, steps, own_step, path_row, kv_heads, unit, GROUP,
                SCORES, SUMS,
            )  # fmt: skip
            if own > 0:
                scores = paired_stream.first_scores(queries, keys, keys_here, step, N, STAGES)
                sums, total = paired_stream.attend(
                    queries, scores, keys, values, value_pieces, keys_here, values_here, done, step,
                    own, 0, length, peak, total, sums, unit, False, N, STAGES, PIECES,
                )  # fmt: skip
            out = sums / gl.expand_dims(gl.convert_layout(total, of_sums), 1)
            queries.store(out.to(out_ptr.dtype.element_ty))
            request, head, tile_start, _ = _tile(
                paired_stream.anew(place), length_ptr, width, kv_heads, GROUP, M
            )
            first, row, column, live = _queries(
                request, head, tile_start + which * M, width, GROUP, M, D
            )
            target = out_ptr + first * out_row + head * (GROUP * D)
            gl.store(target + (row * out_row + column), queries.load(memory), mask=live)
        paired_stream.pass_by(keys_here, values_here, done, step, own, turns, STAGES)
        step += turns
        place += gl.num_programs(0)


@gluon.jit(do_not_specialize=["table_stride", "places", "width", "steps", "path_row"])
def beam_kernel(
    query_ptr,
    key_desc,
    value_desc,
    own_key_ptr,
    own_value_ptr,
    path_ptr,
    out_ptr,
    length_ptr,
    table_ptr,
    table_stride,
    places,
    width,
    steps,
    query_row,
    out_row,
    own_step,
    path_row,
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
    """Beams over their request's context and their own positions; all that ``launch_beams`` wants.

    Keys and values are rows of DIM, of which a descriptor's block takes a part. Grid: any number of
    programs, among which the tiles are shared out.

    Args:
        places: tiles of a key head of a request, times key heads, times requests.
        own_key_ptr: (steps, B * W, Hkv, D), as the values; see ``context_attention_triton``.
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
                    0, query_ptr, out_ptr, own_key_ptr, own_value_ptr, path_ptr, queries.index(0),
                    keys, values, value_pieces, keys_here, values_here, done, length_ptr,
                    places, width, steps, query_row, out_row, own_step, path_row, kv_heads, unit,
                    GROUP, N, STAGES, PIECES,
                ),
            ),
            (
                _attend,
                (
                    1, query_ptr, out_ptr, own_key_ptr, own_value_ptr, path_ptr, queries.index(1),
                    keys, values, value_pieces, keys_here, values_here, done, length_ptr,
                    places, width, steps, query_row, out_row, own_step, path_row, kv_heads, unit,
                    GROUP, N, STAGES, PIECES,
                ),
            ),
            (
                _load,
                (
                    key_desc, value_desc, key_pieces, value_pieces, keys_here, values_here, done,
                    length_ptr, table_ptr, table_stride, places, width, kv_heads, GROUP, PAGE, M,
                    N, STAGES, PIECES,
                ),
            ),
        ],
        [paired_stream.WARPS, 1],
        [GROUP_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip
