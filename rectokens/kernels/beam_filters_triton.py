# Triton gives kernels no types; parameters are pointers, tensors of the shapes stated, constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: ANN001, ANN201
"""Filters inside the kernels: how many allowed items a range of items, or a node, has left.

The definition is `rectokens.decoding.filters`. A request's list, of what it excludes or of what
alone it allows, was counted against its constraint set when the search began: entry i of its
counts says how many of the first i items of the list the set contains.
"""

from rectokens.kernels.beam_tables_triton import first_leaf_of, leaf_items_of, row_ptrs_of
from rectokens.kernels.optional_triton import tl, triton


@triton.jit
def listed_within(list_ptr, counts_ptr, start, count, lo, hi, live):
    """Of a request's list, those in [lo, hi) that are in its constraint set."""
    # Places of both ends in one search, so that the loads of one wait beside the other's.
    lo_from = tl.zeros_like(lo)
    lo_to = lo_from + count
    hi_from = lo_from
    hi_to = lo_to
    left = count
    while left > 0:
        lo_middle = (lo_from + lo_to) // 2
        hi_middle = (hi_from + hi_to) // 2
        lo_open = live & (lo_from < lo_to)
        hi_open = live & (hi_from < hi_to)
        lo_value = tl.load(list_ptr + start + lo_middle, mask=lo_open, other=0)
        hi_value = tl.load(list_ptr + start + hi_middle, mask=hi_open, other=0)
        lo_to = tl.where(lo_open & (lo_value >= lo), lo_middle, lo_to)
        lo_from = tl.where(lo_open & (lo_value < lo), lo_middle + 1, lo_from)
        hi_to = tl.where(hi_open & (hi_value >= hi), hi_middle, hi_to)
        hi_from = tl.where(hi_open & (hi_value < hi), hi_middle + 1, hi_from)
        left = left // 2
    within = tl.load(counts_ptr + hi_from, mask=live, other=0)
    return within - tl.load(counts_ptr + lo_from, mask=live, other=0)


@triton.jit
def filters_of(request, prefixes_ptr, allow_list_ptr, exclusion_start_ptr, exclusion_end_ptr,
               exclusion_counts_ptr):  # fmt: skip
    """Set, whether the list is one of allowed items, where the list begins, its counts, length."""
    start = tl.load(exclusion_start_ptr + request)
    count = tl.load(exclusion_end_ptr + request) - start
    # A request has one count more than items, so its counts lie one place further a request.
    counts_ptr = exclusion_counts_ptr + start + request
    return (tl.load(prefixes_ptr + request), tl.load(allow_list_ptr + request), start, counts_ptr,
            count)  # fmt: skip


@triton.jit
def items_left(lo, hi, live, prefix, listed, exclusions_ptr, counts_ptr, start, count):
    """Allowed items in [lo, hi)."""
    left = hi - lo
    if prefix != 0:
        sums = prefix.to(tl.pointer_type(tl.int32))
        left = tl.load(sums + hi, mask=live, other=0) - tl.load(sums + lo, mask=live, other=0)
    if (count > 0) | (listed != 0):
        inside = listed_within(exclusions_ptr, counts_ptr, start, count, lo, hi, live)
        left = tl.where(listed != 0, inside, left - inside)
    return left


@triton.jit
def not_filtered(child, live, table_ptr, prefix, listed, exclusions_ptr, counts_ptr, start, count,
                 BELOW: tl.constexpr):  # fmt: skip
    """Whether an allowed item is left below each child."""
    kept = live
    if (prefix != 0) | (count > 0) | (listed != 0):
        row_ptrs = row_ptrs_of(table_ptr)
        lo = child
        hi = child + 1
        for _ in tl.static_range(BELOW):
            lo = tl.load(row_ptrs + lo, mask=live, other=0) + 1
            hi = tl.load(row_ptrs + hi, mask=live, other=0) + 1
        first_leaf = first_leaf_of(table_ptr)
        leaf_items = leaf_items_of(table_ptr)
        lo = tl.load(leaf_items + (lo - first_leaf), mask=live, other=0)
        hi = tl.load(leaf_items + (hi - first_leaf), mask=live, other=0)
        kept = live & (
            items_left(lo, hi, live, prefix, listed, exclusions_ptr, counts_ptr, start, count) > 0
        )
    return kept
