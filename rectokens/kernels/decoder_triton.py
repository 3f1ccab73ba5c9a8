# Triton gives kernels no types; parameters are pointers, tensors of the shapes stated, constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202
"""The elementwise work of a decoder layer, each piece one pass over memory.

Root mean square norm with the residual added first, rotary positions with the norms of queries and
keys before and the storing of keys and values after, and the gated activation. Everything is
computed in float32 and rounded where the models' own modules round.
"""

from __future__ import annotations

from rectokens.kernels.optional_triton import tl, triton

_FP8_MAX = tl.constexpr(448.0)


@triton.jit
def _fp8_scale(values):
    """What a row of float32 is divided by so that its largest magnitude becomes FP8's."""
    largest = tl.max(tl.abs(values), 0)
    return tl.where(largest > 0.0, largest / _FP8_MAX, 1.0)


@triton.jit
def add_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,
    x_row,
    residual_row,
    out_row,
    size,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    OFFSET: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``residual += x``, then its norm; without a residual the norm of ``x``. Grid: (rows,).

    Args:
        scale_ptr: float32 (rows,), written with FP8 only: what each row was divided by.
        OFFSET: the weight is an offset from 1 and is multiplied before rounding (Gemma).
        FP8: ``out_ptr`` is of that type.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    kind = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        place = residual_ptr + row * residual_row + columns
        x += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        x = x.to(kind).to(tl.float32)
        tl.store(place, x.to(kind), mask=inside)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / size + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    x = x * (1.0 + weight) if OFFSET else x.to(kind).to(tl.float32) * weight
    x = x.to(kind)
    if FP8:
        x = x.to(tl.float32)
        scale = _fp8_scale(x)
        tl.store(scale_ptr + row, scale)
        x = (x / scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_row + columns, x, mask=inside)


@triton.jit(do_not_specialize=["count"])
def rotate_store_kernel(
    rows_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    query_norm_ptr,
    key_norm_ptr,
    key_ptr,
    value_ptr,
    slot_ptr,
    count,
    row_stride,
    page_stride,
    head_stride,
    eps,
    query_heads,
    kv_heads,
    HAS_NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Queries normed and rotated in place; keys likewise, and values as they are, to their pages.

    A row is the queries, keys and values of one position side by side. Rows with slot -1 are
    rotated but not stored. Grid: (row tiles, Hq + 2 Hkv).
    """
    HALF: tl.constexpr = DIM // 2
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    half = tl.arange(0, BLOCK_HALF)
    live = rows < count
    inside = live[:, None] & (half < HALF)[None, :]
    places = (rows.to(tl.int64) * row_stride)[:, None] + head * DIM + half[None, :]
    low = tl.load(rows_ptr + places, mask=inside, other=0.0)
    high = tl.load(rows_ptr + places + HALF, mask=inside, other=0.0)
    kind = rows_ptr.dtype.element_ty
    is_query = head < query_heads
    is_value = head >= query_heads + kv_heads
    if not is_value:
        a, b = low.to(tl.float32), high.to(tl.float32)
        if HAS_NORM:
            scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / DIM + eps)[:, None]
            # The same address either way but for the head's kind; a select of two loads.
            known = half < HALF
            wq_low = tl.load(query_norm_ptr + half, mask=known, other=0.0).to(tl.float32)
            wq_high = tl.load(query_norm_ptr + HALF + half, mask=known, other=0.0).to(tl.float32)
            wk_low = tl.load(key_norm_ptr + half, mask=known, other=0.0).to(tl.float32)
            wk_high = tl.load(key_norm_ptr + HALF + half, mask=known, other=0.0).to(tl.float32)
            w_low = tl.where(is_query, wq_low, wk_low)[None, :]
            w_high = tl.where(is_query, wq_high, wk_high)[None, :]
            a, b = a * scale, b * scale
            if OFFSET:
                a, b = a * (1.0 + w_low), b * (1.0 + w_high)
            else:
                a = a.to(kind).to(tl.float32) * w_low
                b = b.to(kind).to(tl.float32) * w_high
            a, b = a.to(kind).to(tl.float32), b.to(kind).to(tl.float32)
        positions = tl.load(position_ptr + rows, mask=live, other=0).to(tl.int64)
        angles = (positions * HALF)[:, None] + half[None, :]
        cos = tl.load(cos_ptr + angles, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angles, mask=inside, other=0.0).to(tl.float32)
        low = (a * cos - b * sin).to(kind)
        high = (b * cos + a * sin).to(kind)
    if is_query:
        tl.store(rows_ptr + places, low, mask=inside)
        tl.store(rows_ptr + places + HALF, high, mask=inside)
    else:
        slots = tl.load(slot_ptr + rows, mask=live, other=-1).to(tl.int64)
        stored = inside & (slots >= 0)[:, None]
        kv_head = (head - query_heads) % kv_heads
        target = slots // PAGE_SIZE * page_stride + slots % PAGE_SIZE * DIM + kv_head * head_stride
        target = target[:, None] + half[None, :]
        if is_value:
            tl.store(value_ptr + target, low, mask=stored)
            tl.store(value_ptr + target + HALF, high, mask=stored)
        else:
            tl.store(key_ptr + target, low, mask=stored)
            tl.store(key_ptr + target + HALF, high, mask=stored)


@triton.jit(do_not_specialize=["count", "key_row", "value_row", "key_head", "value_head"])
def store_kernel(
    source_key_ptr,
    source_value_ptr,
    key_ptr,
    value_ptr,
    slot_ptr,
    count,
    key_row,
    value_row,
    key_head,
    value_head,
    page_stride,
    head_stride,
    PAGE_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Keys and values of rows to their pages; a row with slot -1 goes nowhere. (tiles, Hkv)."""
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    live = rows < count
    slots = tl.load(slot_ptr + rows, mask=live, other=-1).to(tl.int64)
    inside = (slots >= 0)[:, None] & (dims < DIM)[None, :]
    target = slots // PAGE_SIZE * page_stride + slots % PAGE_SIZE * DIM + head * head_stride
    target = target[:, None] + dims[None, :]
    rows = rows.to(tl.int64)
    keys = tl.load(
        source_key_ptr + (rows * key_row)[:, None] + head * key_head + dims[None, :], mask=inside
    )
    tl.store(key_ptr + target, keys, mask=inside)
    values = tl.load(
        source_value_ptr + (rows * value_row)[:, None] + head * value_head + dims[None, :],
        mask=inside,
    )
    tl.store(value_ptr + target, values, mask=inside)


@triton.jit
def gated(gate, up, kind: tl.constexpr, ACTIVATION: tl.constexpr):
    """``activation(gate) * up``, rounded to ``kind`` where the models' modules round."""
    if ACTIVATION == "silu":
        gate = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        gate = gate * (1.0 - 1.0 / (tl.exp(2.0 * inner) + 1.0))
    else:
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    return (gate.to(kind).to(tl.float32) * up).to(kind)


@triton.jit
def _pairs(row_ptr, first, size, BLOCK: tl.constexpr):
    """Gates and ups ``first`` to ``first + BLOCK`` of a row of ``size`` of each, float32."""
    columns = 2 * first + tl.arange(0, 2 * BLOCK)
    pairs = tl.load(row_ptr + columns, mask=columns < 2 * size, other=0.0).to(tl.float32)
    return tl.split(tl.reshape(pairs, (BLOCK, 2)))


@triton.jit
def gate_kernel(
    x_ptr,
    out_ptr,
    x_row,
    size,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``activation(x[:, 0::2]) * x[:, 1::2]``. Grid: (blocks, rows)."""
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate, up = _pairs(x_ptr + row * x_row, tl.program_id(0) * BLOCK, size, BLOCK)
    out = gated(gate, up, out_ptr.dtype.element_ty, ACTIVATION)
    tl.store(out_ptr + row * size + columns, out, mask=inside)


@triton.jit
def gate_fp8_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    x_row,
    size,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same in FP8, with what each row was divided by. Grid: (rows,); BLOCK spans a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    gate, up = _pairs(x_ptr + row * x_row, 0, size, BLOCK)
    out = gated(gate, up, x_ptr.dtype.element_ty, ACTIVATION).to(tl.float32)
    scale = _fp8_scale(out)
    tl.store(scale_ptr + row, scale)
    tl.store(
        out_ptr + row * size + columns, (out / scale).to(out_ptr.dtype.element_ty), mask=inside
    )
