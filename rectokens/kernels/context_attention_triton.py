# Triton gives kernels no types; parameters are pointers, tensors of the shapes stated, constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202
"""Attention over context KV that lies in pages: prompts, and beams that share a prompt.

Three kernels. ``prompt_kernel`` is causal attention of packed prompts of unequal length over keys
already in the pages, whose first positions may come from an earlier request. ``context_kernel``
lets all beams of a request read its one context, in parts when beams alone would not fill the
device. ``merge_kernel`` joins those parts with each beam's own few positions, found along its
path, by log-sum-exp. The softmax is the streaming one of Milakov and Gimelshein, "Online
normalizer calculation for softmax" (2018), in base 2.

Keys and values: (P, Hkv, page size, D), a position's page by the request's row of the page table.
"""

from __future__ import annotations

from rectokens.kernels.optional_triton import tl, triton

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _products(query, keys, scale, softcap, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Products (M, N); times ``_unit`` they are scores in units of log 2."""
    products = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), right at both ends of the range.
        heated = tl.exp2(products * (scale * 2.0 * _LOG2_E / softcap))
        products = 1.0 - 2.0 / (heated + 1.0)
    return products


@triton.jit
def _unit(scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """What products are multiplied by, positive: where it joins the exponent, it costs nothing."""
    if HAS_SOFTCAP:
        return softcap * _LOG2_E
    return scale * _LOG2_E


@triton.jit
def _key_rows(
    table_ptr,
    start,
    offsets,
    limit,
    page_stride,
    PAGE_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Offsets of ``WIDTH`` neighbouring positions: page start as (1,) or (N,), row in the page."""
    if PAGE_SIZE % WIDTH == 0:
        page = tl.load(table_ptr + start // PAGE_SIZE).to(tl.int64)
        return page * page_stride + tl.zeros_like(offsets), start % PAGE_SIZE + offsets
    positions = start + offsets
    pages = tl.load(table_ptr + positions // PAGE_SIZE, mask=positions < limit, other=0)
    return pages.to(tl.int64) * page_stride, positions % PAGE_SIZE


@triton.jit
def _bulk_rows(descriptor, table_ptr, start, head, kv_heads, PAGE_SIZE: tl.constexpr):
    """Neighbouring positions of one page by one bulk copy, from (P * Hkv * page size, D)."""
    page = tl.load(table_ptr + start // PAGE_SIZE)
    return descriptor.load([(page * kv_heads + head) * PAGE_SIZE + start % PAGE_SIZE, 0])


@triton.jit
def _attend(
    query,
    query_positions,
    low,
    high,
    length,
    acc,
    peak,
    total,
    key_ptr,
    value_ptr,
    key_desc,
    value_desc,
    kv_head,
    kv_heads,
    table_ptr,
    page_stride,
    scale,
    softcap,
    window,
    BULK: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Stream positions [low, high), ``low`` a multiple of BLOCK_N, through the softmax."""
    offsets = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    unit = _unit(scale, softcap, HAS_SOFTCAP)
    for start in tl.range(low, high, BLOCK_N):
        positions = start + offsets
        if not BULK:
            base, rows = _key_rows(
                table_ptr, start, offsets, length, page_stride, PAGE_SIZE, BLOCK_N
            )
            places = (base + rows * DIM)[:, None] + dims[None, :]
        if BULK:
            keys = _bulk_rows(key_desc, table_ptr, start, kv_head, kv_heads, PAGE_SIZE)
        elif MASKED:
            inside = (positions < length)[:, None]
            if BLOCK_D != DIM:
                inside = inside & (dims < DIM)[None, :]
            keys = tl.load(key_ptr + places, mask=inside, other=0.0)
        elif BLOCK_D != DIM:
            keys = tl.load(key_ptr + places, mask=(dims < DIM)[None, :], other=0.0)
        else:
            keys = tl.load(key_ptr + places)
        products = _products(query, keys, scale, softcap, HAS_SOFTCAP, PRECISION)
        if MASKED:
            seen = (positions < length)[None, :]
            if CAUSAL:
                seen = seen & (positions[None, :] <= query_positions[:, None])
            if HAS_WINDOW:
                seen = seen & (positions[None, :] > query_positions[:, None] - window)
            products = tl.where(seen, products, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(products, 1) * unit)
        # A row that has seen nothing yet must not compute -inf - -inf.
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
        weights = tl.exp2(products * unit - safe[:, None])
        shrink = tl.exp2(peak - safe)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        if BULK:
            values = _bulk_rows(value_desc, table_ptr, start, kv_head, kv_heads, PAGE_SIZE)
        elif MASKED:
            values = tl.load(value_ptr + places, mask=inside, other=0.0)
        elif BLOCK_D != DIM:
            values = tl.load(value_ptr + places, mask=(dims < DIM)[None, :], other=0.0)
        else:
            values = tl.load(value_ptr + places)
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
        peak = new_peak
    return acc, peak, total


@triton.jit(do_not_specialize=["table_stride", "window"])
def prompt_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
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
    page_stride,
    head_stride,
    scale,
    softcap,
    window,
    kv_heads,
    BULK: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One query head of one part of a tile of a prompt. Grid: (Hq, tiles, parts of a tile).

    Args:
        key_desc: descriptor of the keys as (P * Hkv * page size, D), a block of BLOCK_N rows;
            with BULK only.
        value_desc: likewise.
        BULK: positions that need no mask are loaded by bulk copies.
    """
    head = tl.program_id(0)
    request = tl.load(tile_request_ptr + tl.program_id(1))
    if request < 0:
        return
    tile_start = tl.load(tile_start_ptr + tl.program_id(1)) + tl.program_id(2) * BLOCK_M
    first = tl.load(query_starts_ptr + request)
    count = tl.load(query_starts_ptr + request + 1) - first
    if tile_start >= count:
        return
    length = tl.load(length_ptr + request)
    cached = length - count
    dims = tl.arange(0, BLOCK_D)
    local = tile_start + tl.arange(0, BLOCK_M)
    rows = (first + local).to(tl.int64)
    live = (local < count)[:, None]
    inside = live if BLOCK_D == DIM else live & (dims < DIM)[None, :]
    query = tl.load(
        query_ptr + rows[:, None] * query_row + head * DIM + dims[None, :], mask=inside, other=0.0
    )
    query_positions = cached + local
    kv_head = (head // GROUP).to(tl.int64)
    key_ptr += kv_head * head_stride
    value_ptr += kv_head * head_stride
    table_ptr += request.to(tl.int64) * table_stride
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    high = tl.minimum(length, cached + tile_start + BLOCK_M)
    # Positions that every row sees need no mask; with a window there are none such for sure.
    full = (cached + tile_start + 1) // BLOCK_N * BLOCK_N
    full = tl.minimum(full, length // BLOCK_N * BLOCK_N)
    if HAS_WINDOW:
        full = tl.maximum(cached + tile_start - window + 1, 0) // BLOCK_N * BLOCK_N
    else:
        acc, peak, total = _attend(
            query, query_positions, 0, full, length, acc, peak, total,
            key_ptr, value_ptr, key_desc, value_desc, head // GROUP, kv_heads,
            table_ptr, page_stride, scale, softcap, window, BULK,
            False, True, HAS_WINDOW, HAS_SOFTCAP, PAGE_SIZE, DIM, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
    acc, peak, total = _attend(
        query, query_positions, full, high, length, acc, peak, total,
        key_ptr, value_ptr, key_desc, value_desc, head // GROUP, kv_heads,
        table_ptr, page_stride, scale, softcap, window, False,
        True, True, HAS_WINDOW, HAS_SOFTCAP, PAGE_SIZE, DIM, BLOCK_N, BLOCK_D, PRECISION,
    )  # fmt: skip
    out = acc / total[:, None]
    tl.store(
        out_ptr + rows[:, None] * out_row + head * DIM + dims[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=inside,
    )


@triton.jit(do_not_specialize=["table_stride", "width", "step", "window", "parts"])
def context_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    key_desc,
    value_desc,
    part_ptr,
    part_norm_ptr,
    length_ptr,
    table_ptr,
    table_stride,
    width,
    step,
    query_row,
    page_stride,
    head_stride,
    scale,
    softcap,
    window,
    kv_heads,
    parts,
    BULK: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of a request's beams against one part of its context.

    Rows of a tile are (beam, query head of the kv head). Grid: (tiles * parts, Hkv, B).

    Args:
        key_desc: as in ``prompt_kernel``; value_desc and BULK likewise.
        part_ptr: float32 (parts, B * W, Hq, D), softmax-weighted values of the part alone.
        part_norm_ptr: float32 (parts, B * W, Hq), its log-sum-exp, base 2; -inf if it is empty.
        step: generated positions before this one.
    """
    tile = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    kv_head = tl.program_id(1).to(tl.int64)
    request = tl.program_id(2).to(tl.int64)
    length = tl.load(length_ptr + request)
    local = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    rows = request * width + local // GROUP
    heads = kv_head * GROUP + local % GROUP
    live = local < width * GROUP
    inside = live[:, None] if BLOCK_D == DIM else live[:, None] & (dims < DIM)[None, :]
    query = tl.load(
        query_ptr + (rows * query_row + heads * DIM)[:, None] + dims[None, :],
        mask=inside,
        other=0.0,
    )
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(length + step - window + 1, 0)
    blocks = tl.cdiv(length, BLOCK_N) - first // BLOCK_N
    each = tl.cdiv(tl.maximum(blocks, 0), parts)
    low = (first // BLOCK_N + part * each) * BLOCK_N
    high = tl.minimum(length, low + each * BLOCK_N)
    full = tl.minimum(high, length // BLOCK_N * BLOCK_N)
    query_positions = length + step + local * 0
    key_ptr += kv_head * head_stride
    value_ptr += kv_head * head_stride
    table_ptr += request * table_stride
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_WINDOW:
        full = low
    else:
        acc, peak, total = _attend(
            query, query_positions, low, full, length, acc, peak, total,
            key_ptr, value_ptr, key_desc, value_desc, tl.program_id(1), kv_heads,
            table_ptr, page_stride, scale, softcap, window, BULK,
            False, False, HAS_WINDOW, HAS_SOFTCAP, PAGE_SIZE, DIM, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
        full = tl.maximum(full, low)
    acc, peak, total = _attend(
        query, query_positions, full, high, length, acc, peak, total,
        key_ptr, value_ptr, key_desc, value_desc, tl.program_id(1), kv_heads,
        table_ptr, page_stride, scale, softcap, window, False,
        True, False, HAS_WINDOW, HAS_SOFTCAP, PAGE_SIZE, DIM, BLOCK_N, BLOCK_D, PRECISION,
    )  # fmt: skip
    some = total > 0
    out = acc / tl.where(some, total, 1.0)[:, None]
    norm = tl.where(some, peak + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
    # NaN scores must stay NaN, so that the request is found to be poisoned.
    norm = tl.where(total != total, total, norm)
    out = tl.where((total != total)[:, None], total[:, None], out)
    all_rows = tl.num_programs(2) * width
    query_heads = kv_heads * GROUP
    places = (part * all_rows + rows) * query_heads + heads
    tl.store(part_norm_ptr + places, norm, mask=live)
    tl.store(part_ptr + places[:, None] * DIM + dims[None, :], out, mask=inside)


@triton.jit(
    do_not_specialize=["rows_count", "width", "own_step", "path_row", "window", "parts", "steps"]
)
def merge_kernel(
    query_ptr,
    part_ptr,
    part_norm_ptr,
    own_key_ptr,
    own_value_ptr,
    path_ptr,
    out_ptr,
    rows_count,
    width,
    query_row,
    out_row,
    own_step,
    path_row,
    scale,
    softcap,
    window,
    query_heads,
    parts,
    steps,
    GROUP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Each beam's own positions, and the parts of its context. Grid: (row tiles, Hq).

    Args:
        own_key_ptr: (steps, B * W, Hkv, D); step s of a beam lies in the slot its path names.
        path_ptr: int32 (B, W, at least steps), slot of the beam's ancestor at each step; at the
            last it is the beam's own.
        parts: parts of the context.
        steps: own positions, the current one included.
    """
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    live = rows < rows_count
    inside = live[:, None] if BLOCK_D == DIM else live[:, None] & (dims < DIM)[None, :]
    rows = rows.to(tl.int64)
    query = tl.load(
        query_ptr + (rows * query_row)[:, None] + head * DIM + dims[None, :], mask=inside, other=0.0
    ).to(tl.float32)
    request = rows // width
    kv_heads = query_heads // GROUP
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for step in range(steps):
        slot = tl.load(path_ptr + rows * path_row + step, mask=live, other=0)
        slots = request * width + slot
        places = (
            step * own_step + ((slots * kv_heads + head // GROUP) * DIM)[:, None] + dims[None, :]
        )
        keys = tl.load(own_key_ptr + places, mask=inside, other=0.0).to(tl.float32)
        score = tl.sum(query * keys, 1) * (scale * _LOG2_E)
        if HAS_SOFTCAP:
            heated = tl.exp2(score * (2.0 / softcap))
            score = softcap * _LOG2_E * (1.0 - 2.0 / (heated + 1.0))
        if HAS_WINDOW:
            score = tl.where(steps - 1 - step < window, score, float("-inf"))
        new_peak = tl.maximum(peak, score)
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(score - safe)
        shrink = tl.exp2(peak - safe)
        values = tl.load(own_value_ptr + places, mask=inside, other=0.0).to(tl.float32)
        acc = acc * shrink[:, None] + weight[:, None] * values
        total = total * shrink + weight
        peak = new_peak
    for part in range(parts):
        places = (part * rows_count + rows) * query_heads + head
        norm = tl.load(part_norm_ptr + places, mask=live, other=float("-inf"))
        values = tl.load(part_ptr + (places * DIM)[:, None] + dims[None, :], mask=inside, other=0.0)
        new_peak = tl.maximum(peak, norm)
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(norm - safe)
        shrink = tl.exp2(peak - safe)
        acc = acc * shrink[:, None] + weight[:, None] * values
        total = total * shrink + weight
        peak = new_peak
    out = acc / total[:, None]
    tl.store(
        out_ptr + (rows * out_row)[:, None] + head * DIM + dims[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=inside,
    )
