# Triton gives kernels no types; parameters are pointers, tensors of the shapes stated, constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: ANN001, ANN201
"""Log-sum-exp of a linear layer's outputs, which are never written to memory."""

from __future__ import annotations

from rectokens.kernels.optional_triton import tl, triton


@triton.jit(do_not_specialize=["rows_count", "width", "outputs", "tiles_each", "wanted"])
def linear_logsumexp_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    kind_ptr,
    out_ptr,
    rows_count,
    width,
    outputs,
    tiles_each,
    wanted,
    x_row,
    weight_row,
    factor,
    softcap,
    HIDDEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One part of the outputs of a tile of rows. Grid: (row tiles, parts).

    Args:
        kind_ptr: int32 (B,), what each request asks for; a tile none of whose requests asks for
            ``wanted`` is left as it is.
        out_ptr: float32 (parts, R).
        width: rows of a request.
        tiles_each: tiles of outputs in a part.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = rows < rows_count
    kinds = tl.load(kind_ptr + rows // width, mask=live, other=-1)
    if tl.max((kinds == wanted).to(tl.int32), 0) == 0:
        return
    rows = rows.to(tl.int64)
    columns = tl.arange(0, BLOCK_H)
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    first = tl.program_id(1) * tiles_each * BLOCK_N
    last = tl.minimum(outputs, first + tiles_each * BLOCK_N)
    for start in range(first, last, BLOCK_N):
        names = start + tl.arange(0, BLOCK_N)
        known = names < last
        names = names.to(tl.int64)
        acc = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
        for low in range(0, HIDDEN, BLOCK_H):
            inside = low + columns < HIDDEN
            x = tl.load(
                x_ptr + rows[:, None] * x_row + (low + columns)[None, :],
                mask=live[:, None] & inside[None, :],
                other=0.0,
            )
            w = tl.load(
                weight_ptr + names[:, None] * weight_row + (low + columns)[None, :],
                mask=known[:, None] & inside[None, :],
                other=0.0,
            )
            acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + names, mask=known, other=0.0).to(tl.float32)[None, :]
        acc *= factor
        if HAS_SOFTCAP:
            acc = softcap * (1.0 - 2.0 / (tl.exp(acc * (2.0 / softcap)) + 1.0))
        acc = tl.where(known[None, :], acc, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(acc, 1))
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp(peak - safe) + tl.sum(tl.exp(acc - safe[:, None]), 1)
        peak = new_peak
    tl.store(out_ptr + tl.program_id(1) * rows_count + rows, peak + tl.log(total), mask=live)


@triton.jit(do_not_specialize=["rows_count", "width", "parts", "wanted"])
def join_parts_kernel(
    part_ptr,
    kind_ptr,
    out_ptr,
    rows_count,
    width,
    parts,
    wanted,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Log-sum-exp of the parts of each row, float32 (R,); 0 where nobody asked. Grid: (tiles,)."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = rows < rows_count
    kinds = tl.load(kind_ptr + rows // width, mask=live, other=-1)
    asked = kinds == wanted
    if tl.max(asked.to(tl.int32), 0) == 0:
        tl.store(out_ptr + rows, tl.zeros([BLOCK_R], tl.float32), mask=live)
        return
    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        inside = asked[:, None] & (part < parts)[None, :]
        places = part.to(tl.int64)[None, :] * rows_count + rows[:, None]
        norms = tl.load(part_ptr + places, mask=inside, other=float("-inf"))
        new_peak = tl.maximum(peak, tl.max(norms, 1))
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp(peak - safe) + tl.sum(tl.exp(norms - safe[:, None]), 1)
        peak = new_peak
    tl.store(out_ptr + rows, tl.where(asked, peak + tl.log(total), 0.0), mask=live)
