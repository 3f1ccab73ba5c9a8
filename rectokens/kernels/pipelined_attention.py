# Gluon gives kernels no types; parameters are pointers, tensors of the shapes stated, constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202
"""Attention over context KV in pages on Hopper: products of one block beside another's softmax.

While the weights of a block are made, the tensor cores multiply the queries with the keys of the
next block and the weights of the last one with its values; keys and values arrive by bulk copies,
some blocks ahead. The order within a block is that of Shah et al., "FlashAttention-3: Fast and
Accurate Attention with Asynchrony and Low-precision" (2024), without specialised warps.

The results are those of ``context_attention_triton``, which also takes what these do not: windows,
bounded scores, float32, other head dimensions, other devices.
"""

from __future__ import annotations

from rectokens.kernels.optional_triton import gl, gluon, hopper

_LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _row(table_ptr, block, head, kv_heads, PAGE: gl.constexpr, N: gl.constexpr):
    """First row of a block of positions in keys or values as (P * Hkv * page size, D)."""
    start = block * N
    return (gl.load(table_ptr + start // PAGE) * kv_heads + head) * PAGE + start % PAGE


@gluon.jit
def _fetch(
    key_desc, key_row, keys, value_desc, value_row, values, barrier, wanted, BYTES: gl.constexpr
):
    """Copy a block of keys and one of values; the barrier tells when both are there."""
    hopper.mbarrier.expect(barrier, 2 * BYTES, pred=wanted)
    hopper.tma.async_copy_global_to_shared(key_desc, [key_row, 0], barrier, keys, pred=wanted)
    hopper.tma.async_copy_global_to_shared(value_desc, [value_row, 0], barrier, values, pred=wanted)


@gluon.jit
def _weights(scores, seen, peak, total, unit, MASKED: gl.constexpr):
    """Weights of a block, the new peak and total, and what is left of the old ones."""
    if MASKED:
        scores = gl.where(seen, scores, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(scores, 1) * unit)
    safe = new_peak
    if MASKED:
        # A row that has seen nothing yet must not compute -inf - -inf.
        safe = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = gl.exp2(scores * unit - gl.expand_dims(safe, 1))
    shrink = gl.exp2(peak - safe)
    return weights, new_peak, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def _stream(
    query,
    positions,
    key_desc,
    value_desc,
    table_ptr,
    begin,
    full,
    blocks,
    length,
    head,
    kv_heads,
    unit,
    CAUSAL: gl.constexpr,
    PAGE: gl.constexpr,
    STAGES: gl.constexpr,
    SCORES: gl.constexpr,
    SUMS: gl.constexpr,
):
    """Blocks ``begin`` to ``begin + blocks``, at least one, through the softmax.

    The first ``full`` of them need no mask, and only the last one may reach past ``length``.

    Returns:
        Sums (M, D) in the layout SUMS, peaks and totals (M,) in slices of the layout SCORES.
    """
    N: gl.constexpr = key_desc.block_type.shape[0]
    D: gl.constexpr = key_desc.block_type.shape[1]
    M: gl.constexpr = query.shape[0]
    kind: gl.constexpr = key_desc.dtype
    BYTES: gl.constexpr = N * D * 2
    by_row: gl.constexpr = gl.SliceLayout(1, SCORES)
    of_sums: gl.constexpr = gl.SliceLayout(1, SUMS)
    operand: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    cleaning: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    keys = gl.allocate_shared_memory(kind, [STAGES, N, D], key_desc.layout)
    values = gl.allocate_shared_memory(kind, [STAGES, N, D], value_desc.layout)
    # A barrier for the keys of the first block, and one for each pair of a block's values and the
    # next one's keys; after the last block its own keys again, which nobody uses.
    bars = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], hopper.mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES + 1):
        hopper.mbarrier.init(bars.index(i), count=1)
    hopper.fence_async_shared()
    last = begin + blocks - 1
    row = _row(table_ptr, begin, head, kv_heads, PAGE, N)
    hopper.mbarrier.expect(bars.index(STAGES), BYTES)
    hopper.tma.async_copy_global_to_shared(key_desc, [row, 0], bars.index(STAGES), keys.index(0))
    for i in gl.static_range(STAGES - 1):
        next_row = _row(table_ptr, gl.minimum(begin + i + 1, last), head, kv_heads, PAGE, N)
        _fetch(
            key_desc, next_row, keys.index(i + 1), value_desc, row, values.index(i),
            bars.index(i), i < blocks, BYTES,
        )  # fmt: skip
        row = next_row
    # Rows of the keys and of the values that are fetched next: looked up a turn ahead. Not one
    # value under two names at first: the second would not be carried from turn to turn.
    value_row = _row(table_ptr, gl.minimum(begin + STAGES - 1, last), head, kv_heads, PAGE, N)
    key_row = _row(table_ptr, gl.minimum(begin + STAGES, last), head, kv_heads, PAGE, N)
    query = gl.convert_layout(query, gl.DotOperandLayout(0, SCORES, 2))
    offsets = gl.expand_dims(begin * N + gl.arange(0, N, gl.SliceLayout(0, SCORES)), 0)
    peak = gl.full([M], float("-inf"), gl.float32, by_row)
    total = gl.zeros([M], gl.float32, by_row)
    nothing = gl.zeros([M, N], gl.float32, SCORES)
    sums = gl.zeros([M, D], gl.float32, SUMS)
    hopper.mbarrier.wait(bars.index(STAGES), 0)
    first_keys = keys.index(0).permute((1, 0))
    scores = hopper.warpgroup_mma(query, first_keys, nothing, use_acc=False, is_async=True)
    scores = hopper.warpgroup_mma_wait(0, deps=[scores])
    for part in gl.static_range(2):
        # Twice the same, for blocks that need no mask and for those that do.
        for block in range(0 if part == 0 else full, full if part == 0 else blocks):
            place = block % STAGES
            before = (block + STAGES - 1) % STAGES
            # All warps are done with this block's keys and with the values of the one before.
            _fetch(
                key_desc, key_row, keys.index(place), value_desc, value_row, values.index(before),
                bars.index(before), block + STAGES - 1 < blocks, BYTES,
            )  # fmt: skip
            value_row = key_row
            wanted = gl.minimum(begin + block + STAGES + 1, last)
            key_row = _row(table_ptr, wanted, head, kv_heads, PAGE, N)
            hopper.mbarrier.wait(bars.index(place), (block // STAGES) & 1)
            next_keys = keys.index((block + 1) % STAGES).permute((1, 0))
            ahead = hopper.warpgroup_mma(query, next_keys, nothing, use_acc=False, is_async=True)
            # Beside that product; the next one needs the weights, so that neither is waited for.
            if part == 0:
                weights, peak, total, shrink = _weights(scores, True, peak, total, unit, False)
            else:
                here = block * N + offsets
                seen = here < length
                if CAUSAL:
                    seen = seen & (here <= positions)
                weights, peak, total, shrink = _weights(scores, seen, peak, total, unit, True)
            sums = sums * gl.expand_dims(gl.convert_layout(shrink, of_sums), 1)
            weights = gl.convert_layout(weights.to(kind), operand)
            if part == 1:
                end = length - (begin + block) * N
                if end < N:
                    # What lies past the end may be anything, and zero times NaN is NaN.
                    stored = values.index(place).load(cleaning)
                    inside = gl.arange(0, N, gl.SliceLayout(1, cleaning)) < end
                    values.index(place).store(gl.where(gl.expand_dims(inside, 1), stored, 0.0))
                    hopper.fence_async_shared()
            sums = hopper.warpgroup_mma(weights, values.index(place), sums, is_async=True)
            sums, scores = hopper.warpgroup_mma_wait(0, deps=[sums, ahead])
    return sums, peak, total


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
    STAGES: gl.constexpr,
):
    """One query head of one part of a tile of a prompt; see ``context_attention_triton``.

    Grid: (Hq, tiles, parts of a tile).
    """
    N: gl.constexpr = key_desc.block_type.shape[0]
    D: gl.constexpr = key_desc.block_type.shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    LANES: gl.constexpr = D // 8
    memory: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    head = gl.program_id(0)
    request = gl.load(tile_request_ptr + gl.program_id(1))
    if request < 0:
        return
    tile_start = gl.load(tile_start_ptr + gl.program_id(1)) + gl.program_id(2) * M
    first = gl.load(query_starts_ptr + request)
    count = gl.load(query_starts_ptr + request + 1) - first
    if tile_start >= count:
        return
    length = gl.load(length_ptr + request)
    start = length - count + tile_start
    rows = tile_start + gl.arange(0, M, gl.SliceLayout(1, memory))
    dims = gl.expand_dims(head * D + gl.arange(0, D, gl.SliceLayout(0, memory)), 0)
    live = gl.expand_dims(rows < count, 1)
    rows = gl.expand_dims((first + rows).to(gl.int64), 1)
    query = gl.load(query_ptr + rows * query_row + dims, mask=live, other=0.0)
    sums, _, total = _stream(
        query,
        gl.expand_dims(start + gl.arange(0, M, gl.SliceLayout(1, SCORES)), 1),
        key_desc,
        value_desc,
        table_ptr + request.to(gl.int64) * table_stride,
        0,
        gl.minimum((start + 1) // N, length // N),
        gl.cdiv(gl.minimum(length, start + M), N),
        length,
        head // GROUP,
        kv_heads,
        scale * _LOG2_E,
        True,
        PAGE,
        STAGES,
        SCORES,
        SUMS,
    )
    out = sums / gl.expand_dims(gl.convert_layout(total, gl.SliceLayout(1, SUMS)), 1)
    out = gl.convert_layout(out.to(out_ptr.dtype.element_ty), memory)
    gl.store(out_ptr + rows * out_row + dims, out, mask=live)


@gluon.jit(do_not_specialize=["table_stride", "width", "parts"])
def context_kernel(
    query_ptr,
    key_desc,
    value_desc,
    part_ptr,
    part_norm_ptr,
    length_ptr,
    table_ptr,
    table_stride,
    width,
    query_row,
    scale,
    kv_heads,
    parts,
    GROUP: gl.constexpr,
    PAGE: gl.constexpr,
    M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A tile of a request's beams against one part of its context.

    As ``context_attention_triton.context_kernel``, whose results ``merge_kernel`` joins. Grid:
    (tiles * parts, Hkv, B).
    """
    N: gl.constexpr = key_desc.block_type.shape[0]
    D: gl.constexpr = key_desc.block_type.shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    LANES: gl.constexpr = D // 8
    memory: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [WARPS, 1], [1, 0])
    part = gl.program_id(0) % parts
    kv_head = gl.program_id(1)
    request = gl.program_id(2)
    length = gl.load(length_ptr + request)
    local = gl.program_id(0) // parts * M + gl.arange(0, M, gl.SliceLayout(1, memory))
    live = local < width * GROUP
    row = (request * width + local // GROUP).to(gl.int64)
    head = kv_head * GROUP + local % GROUP
    dims = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, memory)), 0)
    all_rows = gl.num_programs(2) * width
    places = (part * all_rows + row) * (kv_heads * GROUP) + head
    each = gl.cdiv(gl.cdiv(length, N), parts)
    begin = part * each
    blocks = gl.minimum(gl.cdiv(length, N) - begin, each)
    if blocks <= 0:
        never = gl.full([M], float("-inf"), gl.float32, gl.SliceLayout(1, memory))
        gl.store(part_norm_ptr + places, never, mask=live)
        nothing = gl.zeros([M, D], gl.float32, memory)
        targets = part_ptr + gl.expand_dims(places * D, 1) + dims
        gl.store(targets, nothing, mask=gl.expand_dims(live, 1))
        return
    query = gl.load(
        query_ptr + gl.expand_dims(row * query_row + head * D, 1) + dims,
        mask=gl.expand_dims(live, 1),
        other=0.0,
    )
    sums, peak, total = _stream(
        query,
        0,
        key_desc,
        value_desc,
        table_ptr + request.to(gl.int64) * table_stride,
        begin,
        gl.minimum(length // N - begin, blocks),
        blocks,
        length,
        kv_head,
        kv_heads,
        scale * _LOG2_E,
        False,
        PAGE,
        STAGES,
        SCORES,
        SUMS,
    )
    out = sums / gl.expand_dims(gl.convert_layout(total, gl.SliceLayout(1, SUMS)), 1)
    norm = gl.convert_layout(peak + gl.log2(total), gl.SliceLayout(1, memory))
    gl.store(part_norm_ptr + places, norm, mask=live)
    out = gl.convert_layout(out, memory)
    gl.store(part_ptr + gl.expand_dims(places * D, 1) + dims, out, mask=gl.expand_dims(live, 1))
