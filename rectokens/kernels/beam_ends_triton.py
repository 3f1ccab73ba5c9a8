# Triton gives kernels no types; parameters are pointers, tensors of the shapes stated, constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202
"""Triton kernels around the beam steps: the start of a search, child logits, the items found."""

from rectokens.kernels.beam_filters_triton import filters_of, items_left
from rectokens.kernels.beam_tables_triton import (
    UNALIGNED,
    codes_of,
    first_leaf_of,
    leaf_items_of,
    row_ptrs_of,
)
from rectokens.kernels.beam_triton import NEG, finite
from rectokens.kernels.optional_triton import tl, triton


@triton.jit(do_not_specialize=["batch", "histogram_row"], do_not_specialize_on_alignment=UNALIGNED)
def begin_kernel(poisoned_ptr, counters_ptr, histogram_ptr, prefixes_ptr, exclusions_ptr,
                 exclusion_start_ptr, exclusion_end_ptr, exclusion_counts_ptr, batch,
                 histogram_row, LEVELS: tl.constexpr, COUNTERS_: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """One request: clear what a search counts in, and count its exclusions within its set."""
    request = tl.program_id(0).to(tl.int64)
    tl.store(poisoned_ptr + request, 0)
    for level in tl.static_range(LEVELS):
        counter = (level * batch + request) * COUNTERS_ + tl.arange(0, COUNTERS_)
        tl.store(counters_ptr + counter, 0)
    for start in range(0, histogram_row, BLOCK):
        tl.store(histogram_ptr + request * histogram_row + start + tl.arange(0, BLOCK), 0)
    first = tl.load(exclusion_start_ptr + request)
    count = tl.load(exclusion_end_ptr + request) - first
    prefix = tl.load(prefixes_ptr + request)
    # A request has one count more than it has exclusions, so its place moves up by one a request.
    counts_ptr = exclusion_counts_ptr + first + request
    tl.store(counts_ptr, 0)
    before = 0
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        live = place < count
        inside = live.to(tl.int32)
        if prefix != 0:
            item = tl.load(exclusions_ptr + first + place, mask=live, other=0)
            sums = prefix.to(tl.pointer_type(tl.int32))
            inside = tl.load(sums + item + 1, mask=live, other=0)
            inside -= tl.load(sums + item, mask=live, other=0)
        tl.store(counts_ptr + place + 1, before + tl.cumsum(inside, axis=0), mask=live)
        before += tl.sum(inside, axis=0)


@triton.jit(do_not_specialize=["width"])
def child_logits_kernel(table_ptr, nodes_ptr, scores_ptr, hidden_ptr, weight_ptr, bias_ptr, out_ptr,
                        hidden_batch, hidden_beam, weight_code, width, hidden_size, factor, softcap,
                        SLOTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                        BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """Logits of one beam's children, (B, W, SLOTS): their weight rows times its hidden state."""
    beam = tl.program_id(0)
    request = tl.program_id(1).to(tl.int64)
    row = request * width + beam
    live = finite(tl.load(scores_ptr + row))
    row_ptrs = row_ptrs_of(table_ptr)
    node = tl.load(nodes_ptr + row, mask=live, other=0)
    first = tl.load(row_ptrs + node, mask=live, other=0)
    count = tl.load(row_ptrs + node + 1, mask=live, other=0) - first
    count = tl.minimum(count, SLOTS)
    codes = codes_of(table_ptr)
    hidden_ptr += request * hidden_batch + beam.to(tl.int64) * hidden_beam
    for start in range(0, count, BLOCK_M):
        slot = start + tl.arange(0, BLOCK_M)
        there = slot < count
        code = tl.load(codes + first + slot, mask=there, other=0).to(tl.int32) & 0xFFFF
        total = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        for at in range(0, hidden_size, BLOCK_H):
            column = at + tl.arange(0, BLOCK_H)
            inside = column < hidden_size
            h = tl.load(hidden_ptr + column, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(weight_ptr + code.to(tl.int64)[:, None] * weight_code + column[None, :],
                        mask=there[:, None] & inside[None, :], other=0.0)  # fmt: skip
            total += w.to(tl.float32) * h[None, :]
        value = tl.sum(total, axis=1)
        if HAS_BIAS:
            value += tl.load(bias_ptr + code, mask=there, other=0.0).to(tl.float32)
        value *= factor
        if HAS_SOFTCAP:
            # tanh by the exponential, which saturates without overflow.
            scaled = value / softcap
            small = tl.exp(-2.0 * tl.abs(scaled))
            bounded = softcap * (1.0 - small) / (1.0 + small)
            value = tl.where(scaled < 0, -bounded, bounded)
        tl.store(out_ptr + row * SLOTS + slot, value, mask=there)
    every = tl.arange(0, SLOTS)
    tl.store(out_ptr + row * SLOTS + every, NEG, mask=every >= count)


@triton.jit
def _paths(part, scores_ptr, ancestors_ptr, codes_ptr, code_scores_ptr, out_ptr, request, batch,
           width, LEVELS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Scores of some leaves, their codes and code scores along the way there."""
    slot = part * BLOCK + tl.arange(0, BLOCK)
    inside = slot < width
    row = request * width + slot
    score = tl.load(scores_ptr + row, mask=inside, other=NEG)
    live = finite(score)
    tl.store(out_ptr + slot, score.to(tl.int32, bitcast=True), mask=inside)
    out_codes_ptr = out_ptr + width
    out_code_scores_ptr = out_codes_ptr + width * LEVELS
    for level in tl.static_range(LEVELS):
        through = tl.load(ancestors_ptr + row * LEVELS + level, mask=live, other=0)
        source = ((level + 1) * batch + request) * width + through
        code = tl.load(codes_ptr + source, mask=live, other=0)
        code_score = tl.load(code_scores_ptr + source, mask=live, other=NEG)
        to = slot * LEVELS + level
        tl.store(out_codes_ptr + to, code, mask=inside)
        tl.store(out_code_scores_ptr + to, code_score.to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def _items(table_ptr, nodes_ptr, scores_ptr, exclusions_ptr, out_ptr, request, width, prefix,
           listed, first, counts_ptr, excluded, BLOCK: tl.constexpr):  # fmt: skip
    """Allowed items of the leaves in order, as many as there are slots; returns how many."""
    scores_ptr += request * width
    nodes_ptr += request * width
    first_leaf = first_leaf_of(table_ptr)
    leaf_items = leaf_items_of(table_ptr)
    found = 0
    for start in range(0, width, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        live = finite(tl.load(scores_ptr + slot, mask=slot < width, other=NEG))
        leaf = tl.load(nodes_ptr + slot, mask=live, other=0) - first_leaf
        item = tl.load(leaf_items + leaf, mask=live, other=0)
        end = tl.load(leaf_items + leaf + 1, mask=live, other=0)
        left = items_left(item, end, live, prefix, listed, exclusions_ptr, counts_ptr, first,
                          excluded)  # fmt: skip
        # Leaves may hold more items together than 32 bits count; none past the width is wanted.
        left = tl.minimum(tl.where(live, left, 0), width)
        place = found + tl.cumsum(left, axis=0) - left
        found = tl.minimum(found + tl.sum(left, axis=0), width)
        more = live & (place < width) & (left > 0)
        while tl.max(more.to(tl.int32), axis=0) > 0:
            allowed = more
            if (prefix != 0) | (excluded > 0) | (listed != 0):
                allowed = more & (
                    items_left(item, item + 1, more, prefix, listed, exclusions_ptr, counts_ptr,
                               first, excluded) > 0
                )  # fmt: skip
            tl.store(out_ptr + place, item, mask=allowed)
            tl.store(out_ptr + width + place, slot, mask=allowed)
            place += allowed.to(tl.int32)
            item += 1
            more = more & (item < end) & (place < width)
    for start in range(found, width, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + slot, -1, mask=slot < width)
        tl.store(out_ptr + width + slot, 0, mask=slot < width)
    return found


@triton.jit(
    do_not_specialize=["batch", "width", "answer_row"], do_not_specialize_on_alignment=UNALIGNED
)
def finish_kernel(table_ptr, nodes_ptr, scores_ptr, ancestors_ptr, codes_ptr, code_scores_ptr,
                  poisoned_ptr, alive_ptr, prefixes_ptr, allow_list_ptr, exclusions_ptr,
                  exclusion_start_ptr, exclusion_end_ptr, exclusion_counts_ptr, answers_ptr, batch,
                  width, answer_row, LEVELS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Answers of one request: program 0 finds the items, the others write the leaves' paths."""
    request = tl.program_id(1).to(tl.int64)
    answers_ptr += request * answer_row
    part = tl.program_id(0)
    if part > 0:
        _paths(part - 1, scores_ptr, ancestors_ptr, codes_ptr, code_scores_ptr,
               answers_ptr + 3 + 2 * width, request, batch, width, LEVELS, BLOCK)  # fmt: skip
    else:
        prefix, listed, first, counts_ptr, excluded = filters_of(
            request, prefixes_ptr, allow_list_ptr, exclusion_start_ptr, exclusion_end_ptr,
            exclusion_counts_ptr)  # fmt: skip
        found = _items(table_ptr, nodes_ptr, scores_ptr, exclusions_ptr, answers_ptr + 3, request,
                       width, prefix, listed, first, counts_ptr, excluded,
                       BLOCK)  # fmt: skip
        tl.store(answers_ptr, tl.load(alive_ptr + request))
        tl.store(answers_ptr + 1, tl.load(poisoned_ptr + request))
        tl.store(answers_ptr + 2, found)
