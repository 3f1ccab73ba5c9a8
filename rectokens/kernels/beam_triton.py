# Triton gives kernels no types; parameters are pointers, tensors of the shapes stated, constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202, SIM102
"""Triton kernels of the beam step on static buffers: pairs, their scores and their keys.

A (beam, child) pair is one int64 key, larger is better and no two are equal: above, the float32
bits of what orders the search (the score, or the perturbed score), turned so that they sort as
integers; below, the pair's place in the order of ties, 13 bits of slot and 16 bits of child.

`score_kernel` computes the keys of all pairs and appends them to the request's list. Where each
row's children fit one tile it finds the row's normalisers by itself; otherwise `stats_kernel`
finds them first, and several programs share a row's tiles. The order of the list depends on which
program came first; nothing that is made of it does (`beam_select_triton` beside this).
"""

from rectokens.kernels.beam_filters_triton import filters_of, not_filtered
from rectokens.kernels.beam_tables_triton import UNALIGNED, codes_of, row_ptrs_of
from rectokens.kernels.optional_triton import tl, triton
from rectokens.kernels.selection_triton import gumbel_of_bits, node_hash_of

BINS = 4096
COUNTERS = 2
CURSOR = tl.constexpr(0)
CANDIDATES = tl.constexpr(1)
NO_KEY = tl.constexpr(-(1 << 63))
LOW32 = tl.constexpr(0xFFFFFFFF)
NEG = tl.constexpr(float("-inf"))
_LOW31 = tl.constexpr(0x7FFFFFFF)
_QUIET_NAN = tl.constexpr(0x7FC00000)
_HALF = tl.constexpr(BINS // 2)
# Bins are 1/128 of an octave, 2^-6 <= |value| < 2^10; what is outside falls into the end bins.
_FIRST_OCTAVE = tl.constexpr((127 - 6) * 128)
_VOCAB = tl.constexpr(0)
_LEVEL = tl.constexpr(1)


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr):
    """Of a kernel that was launched early: let the next one come, wait for the one before."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def finite(x):
    """Neither infinite nor NaN."""
    return (x > float("-inf")) & (x < float("inf"))


@triton.jit
def key_of(ranking, beam, slot):
    """The key of a pair; NaN sorts above all, minus zero is zero."""
    bits = tl.where(ranking == 0.0, 0.0, ranking).to(tl.int32, bitcast=True)
    bits = tl.where(ranking == ranking, bits, _QUIET_NAN)
    order = bits ^ ((bits >> 31) & _LOW31)
    place = (beam.to(tl.int64) << 16) | slot.to(tl.int64)
    return (order.to(tl.int64) << 32) | (place ^ LOW32)


@triton.jit
def bin_of(key):
    """Monotone in the key, 0 to BINS - 1."""
    top = (key >> 48).to(tl.int32)
    over = tl.minimum(tl.maximum(top - _FIRST_OCTAVE, 0), _HALF - 1)
    under = tl.minimum(tl.maximum(-1 - top - _FIRST_OCTAVE, 0), _HALF - 1)
    return tl.where(top >= 0, _HALF + over, _HALF - 1 - under)


@triton.jit
def _columns(table_ptr, edge, slot, there, COMPACT: tl.constexpr):
    """Where in its row each child's logit lies."""
    column = slot
    if not COMPACT:
        column = tl.load(codes_of(table_ptr) + edge, mask=there, other=0).to(tl.int32) & 0xFFFF
    return column


@triton.jit
def _clean(logit, there):
    """Logits with NaN and +inf as -inf; which of them were."""
    logit = logit.to(tl.float32)
    bad = there & ((logit != logit) | (logit == float("inf")))
    return tl.where(bad, NEG, logit), bad


@triton.jit
def _merge(peak, total, values):
    """Running maximum and sum of exponentials of rows, with one more tile (rows, block)."""
    higher = tl.maximum(peak, tl.max(values, axis=1))
    safe = tl.where(higher == NEG, 0.0, higher)
    total = total * tl.exp(peak - safe) + tl.sum(tl.exp(values - safe[:, None]), axis=1)
    return higher, total


@triton.jit
def _log_sum(peak, total):
    return tl.where(peak == NEG, 0.0, peak) + tl.log(total)


@triton.jit
def _over_codes(logits_ptr, logits_row, live, codebook_size, start, step, ROWS: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """Maximum and sum of exponentials of rows over every `step`-th block of the level's codes."""
    peak = tl.full((ROWS,), NEG, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(start, codebook_size, step):
        code = first + tl.arange(0, BLOCK)
        inside = live[:, None] & (code < codebook_size)[None, :]
        values = tl.load(logits_ptr + logits_row[:, None] + code[None, :], mask=inside, other=NEG)
        peak, total = _merge(peak, total, values.to(tl.float32))
    return peak, total


@triton.jit
def _given_norm(log_norm, kind, place, live, vocab_ptr, level_ptr, HAS_VOCAB: tl.constexpr,
                HAS_LEVEL: tl.constexpr, COMPACT: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """The rows' normaliser under the request's rule, given the one that was found."""
    if kind == _VOCAB:
        log_norm = tl.full((ROWS,), float("nan"), tl.float32)
        if HAS_VOCAB:
            log_norm = tl.load(vocab_ptr + place, mask=live, other=0.0).to(tl.float32)
    if kind == _LEVEL:
        if HAS_LEVEL:
            log_norm = tl.load(level_ptr + place, mask=live, other=0.0).to(tl.float32)
        elif COMPACT:
            log_norm = tl.full((ROWS,), float("nan"), tl.float32)
    return log_norm


@triton.jit
def _heated(logit, allowed, temperature, seed, child):
    """Logits at the temperature, and those plus the child's own Gumbel value."""
    hot = tl.where(allowed, logit / temperature, NEG)
    noise = gumbel_of_bits(node_hash_of(seed, child.to(tl.int64))).to(tl.float32)
    return hot, hot + noise


@triton.jit
def _conditioned(noisy, largest, allowed, parent):
    """Gumbel values shifted so that the largest of the siblings is the parent's.

    The stable form of Kool et al., appendix B.3; float64 stands in for expm1 and log1p.
    """
    gap = tl.where(allowed, noisy - largest, -1.0).to(tl.float64)
    v = (parent - noisy).to(tl.float64) + tl.log(1.0 - tl.exp(gap))
    shifted = parent.to(tl.float64) - tl.maximum(v, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(v)))
    return shifted.to(tl.float32)


@triton.jit(
    do_not_specialize=["width_in", "width", "codebook_size"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def stats_kernel(table_ptr, nodes_ptr, scores_ptr, logits_ptr, beam_width_ptr, normalization_ptr,
                 temperature_ptr, seed_ptr, prefixes_ptr, allow_list_ptr, exclusions_ptr,
                 exclusion_start_ptr, exclusion_end_ptr, exclusion_counts_ptr, poisoned_ptr,
                 parts_ptr, logits_batch, logits_beam, width_in, width, codebook_size,
                 BELOW: tl.constexpr, COMPACT: tl.constexpr, HAS_LEVEL: tl.constexpr,
                 PARTS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Of a part of one row, (B, width_in, PARTS, 8): what `score_kernel` makes the whole row's of.

    The maximum and the sum of exponentials that the normaliser takes; of the allowed children,
    the same at the temperature, and the largest with noise.
    """
    wait_for_inputs(EARLY)
    beam = tl.program_id(0) + tl.zeros((1,), tl.int32)
    part = tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    score = tl.load(scores_ptr + request * width + beam)
    live = finite(score) & (tl.load(beam_width_ptr + request) > 0)
    if tl.max(live.to(tl.int32), axis=0) == 0:
        return
    row_ptrs = row_ptrs_of(table_ptr)
    node = tl.load(nodes_ptr + request * width + beam)
    first = tl.load(row_ptrs + node)
    children = tl.max(tl.load(row_ptrs + node + 1) - first, axis=0)
    logits_row = request * logits_batch + beam.to(tl.int64) * logits_beam
    prefix, listed, start_, counts_ptr, excluded = filters_of(
        request, prefixes_ptr, allow_list_ptr, exclusion_start_ptr, exclusion_end_ptr,
        exclusion_counts_ptr)  # fmt: skip
    temperature = tl.load(temperature_ptr + request)
    seed = tl.load(seed_ptr + request)
    kind = tl.load(normalization_ptr + request)

    peak = tl.full((1,), NEG, tl.float32)
    total = tl.zeros((1,), tl.float32)
    hot_peak = tl.full((1,), NEG, tl.float32)
    hot_total = tl.zeros((1,), tl.float32)
    largest = tl.full((1,), NEG, tl.float32)
    for start in range(part * BLOCK, children, PARTS * BLOCK):
        slot = start + tl.arange(0, BLOCK)[None, :]
        there = slot < children
        edge = first[:, None] + slot
        column = _columns(table_ptr, edge, slot, there, COMPACT)
        logit = tl.load(logits_ptr + logits_row[:, None] + column, mask=there, other=NEG)
        logit, bad = _clean(logit, there)
        if tl.max(tl.max(bad.to(tl.int32), axis=1), axis=0) > 0:
            tl.store(poisoned_ptr + request, 1)
        peak, total = _merge(peak, total, logit)
        if temperature > 0:
            allowed = not_filtered(edge + 1, there & finite(logit), table_ptr, prefix, listed,
                                   exclusions_ptr, counts_ptr, start_, excluded,
                                   BELOW)  # fmt: skip
            hot, noisy = _heated(logit, allowed, temperature, seed, edge + 1)
            hot_peak, hot_total = _merge(hot_peak, hot_total, hot)
            largest = tl.maximum(largest, tl.max(noisy, axis=1))
    if not (HAS_LEVEL or COMPACT):
        if kind == _LEVEL:
            peak, total = _over_codes(logits_ptr, logits_row, live, codebook_size, part * BLOCK,
                                      PARTS * BLOCK, 1, BLOCK)  # fmt: skip
    out = parts_ptr + ((request * width_in + beam) * PARTS + part) * 8
    tl.store(out, peak)
    tl.store(out + 1, total)
    tl.store(out + 2, hot_peak)
    tl.store(out + 3, hot_total)
    tl.store(out + 4, largest)


@triton.jit
def _of_parts(parts_ptr, place, PARTS: tl.constexpr):
    """Log-sums of one row without and with temperature, and its largest noisy child, (1,)."""
    at = parts_ptr + (place[:, None] * PARTS + tl.arange(0, PARTS)[None, :]) * 8
    peak, total = tl.load(at), tl.load(at + 1)
    top = tl.max(peak, axis=1)
    total = tl.sum(total * tl.exp(peak - tl.where(top == NEG, 0.0, top)[:, None]), axis=1)
    hot_peak, hot_total = tl.load(at + 2), tl.load(at + 3)
    hot_top = tl.max(hot_peak, axis=1)
    safe = tl.where(hot_top == NEG, 0.0, hot_top)[:, None]
    hot_total = tl.sum(hot_total * tl.exp(hot_peak - safe), axis=1)
    largest = tl.max(tl.load(at + 4), axis=1)
    return _log_sum(top, total), _log_sum(hot_top, hot_total), largest


@triton.jit(
    do_not_specialize=["width_in", "width", "codebook_size", "capacity", "copies"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def score_kernel(table_ptr, nodes_ptr, scores_ptr, log_probs_ptr, perturbed_ptr, logits_ptr,
                 vocab_ptr, level_ptr, beam_width_ptr, normalization_ptr, temperature_ptr,
                 seed_ptr, prefixes_ptr, allow_list_ptr, exclusions_ptr, exclusion_start_ptr,
                 exclusion_end_ptr, exclusion_counts_ptr, poisoned_ptr, parts_ptr, rows_ptr,
                 keys_ptr, counters_ptr, histogram_ptr, logits_batch, logits_beam, width_in, width,
                 codebook_size, capacity, copies, histogram_row, BELOW: tl.constexpr,
                 COMPACT: tl.constexpr, HAS_VOCAB: tl.constexpr, HAS_LEVEL: tl.constexpr,
                 PARTS: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                 LEVEL_BLOCK: tl.constexpr, COUNTERS_: tl.constexpr, BINS_: tl.constexpr,
                 EARLY: tl.constexpr):  # fmt: skip
    """Keys of tiles of pairs, (ROWS, BLOCK), appended to `keys` (B, capacity).

    Also the rows' log-normalisers, without and with temperature, to `rows` (B, W, 4). PARTS, if
    not 0: programs share the tiles of one row, whose parts `stats_kernel` has seen; otherwise a
    tile holds all children of its rows. COUNT: also add up the bins of the keys.
    """
    wait_for_inputs(EARLY)
    request = tl.program_id(2).to(tl.int64)
    beam = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = request * width + beam
    score = tl.load(scores_ptr + row, mask=beam < width_in, other=NEG)
    live = finite(score) & (tl.load(beam_width_ptr + request) > 0)
    if tl.max(live.to(tl.int32), axis=0) == 0:
        return
    row_ptrs = row_ptrs_of(table_ptr)
    node = tl.load(nodes_ptr + row, mask=live, other=0)
    first = tl.load(row_ptrs + node, mask=live, other=0)
    children = tl.load(row_ptrs + node + 1, mask=live, other=0) - first
    if PARTS:
        # Of programs that share a row, the first one also writes its normalisers.
        if (tl.program_id(1) > 0) & (tl.program_id(1) * BLOCK >= tl.max(children, axis=0)):
            return
    logits_row = request * logits_batch + beam.to(tl.int64) * logits_beam
    prefix, listed, start_, counts_ptr, excluded = filters_of(
        request, prefixes_ptr, allow_list_ptr, exclusion_start_ptr, exclusion_end_ptr,
        exclusion_counts_ptr)  # fmt: skip
    temperature = tl.load(temperature_ptr + request)
    kind = tl.load(normalization_ptr + request)
    out = rows_ptr + row * 4
    # Programs take turns at several copies, so that they queue less at the fullest bins.
    copy = (tl.program_id(0) + tl.program_id(1)) % copies
    histogram_ptr += request * histogram_row + copy * BINS_

    place = request * width_in + beam
    from_ = tl.program_id(1) * BLOCK
    if PARTS:
        to = tl.max(children, axis=0)
        log_norm, heat, largest = _of_parts(parts_ptr, place, PARTS)
        log_norm = _given_norm(log_norm, kind, place, live, vocab_ptr, level_ptr, HAS_VOCAB,
                               HAS_LEVEL, COMPACT, ROWS)  # fmt: skip
        if tl.program_id(1) == 0:
            tl.store(out, log_norm)
            tl.store(out + 1, heat)
    else:
        to = from_ + 1
    for start in range(from_, to, tl.num_programs(1) * BLOCK):
        # A tile takes a part of each row's children.
        count = tl.minimum(tl.maximum(children - start, 0), BLOCK)
        offset = tl.arange(0, BLOCK)[None, :]
        slot = start + offset
        there = offset < count[:, None]
        edge = first[:, None] + slot
        column = _columns(table_ptr, edge, slot, there, COMPACT)
        # Early, so that it is known by the time that the logits are.
        base = tl.atomic_add(counters_ptr + request * COUNTERS_ + CURSOR, tl.sum(count, axis=0),
                             sem="relaxed")  # fmt: skip
        logit = tl.load(logits_ptr + logits_row[:, None] + column, mask=there, other=NEG)
        logit, bad = _clean(logit, there)
        if not PARTS:
            if tl.max(tl.max(bad.to(tl.int32), axis=1), axis=0) > 0:
                tl.store(poisoned_ptr + request, 1)
            peak = tl.full((ROWS,), NEG, tl.float32)
            peak, total = _merge(peak, tl.zeros((ROWS,), tl.float32), logit)
            if not (HAS_LEVEL or COMPACT):
                if kind == _LEVEL:
                    peak, total = _over_codes(logits_ptr, logits_row, live, codebook_size, 0,
                                              LEVEL_BLOCK, ROWS, LEVEL_BLOCK)  # fmt: skip
            log_norm = _given_norm(_log_sum(peak, total), kind, place, live, vocab_ptr, level_ptr,
                                   HAS_VOCAB, HAS_LEVEL, COMPACT, ROWS)  # fmt: skip
            tl.store(out, log_norm, mask=live)
        ranking = score[:, None] + (logit - log_norm[:, None])
        allowed = not_filtered(edge + 1, there & finite(ranking), table_ptr, prefix, listed,
                               exclusions_ptr, counts_ptr, start_, excluded, BELOW)  # fmt: skip

        if temperature > 0:
            seed = tl.load(seed_ptr + request)
            parent_log_prob = tl.load(log_probs_ptr + row, mask=live, other=0.0)
            parent = tl.load(perturbed_ptr + row, mask=live, other=0.0)
            hot, noisy = _heated(logit, allowed, temperature, seed, edge + 1)
            if not PARTS:
                peak = tl.full((ROWS,), NEG, tl.float32)
                peak, total = _merge(peak, tl.zeros((ROWS,), tl.float32), hot)
                heat = _log_sum(peak, total)
                tl.store(out + 1, heat, mask=live)
                largest = tl.max(noisy, axis=1)
            at_parent = (parent_log_prob - heat)[:, None]
            ranking = _conditioned(at_parent + noisy, at_parent + largest[:, None], allowed,
                                   parent[:, None])  # fmt: skip

        key = key_of(ranking, beam[:, None], slot)
        to_key = base + (tl.cumsum(count, axis=0) - count)[:, None] + offset
        tl.store(keys_ptr + request * capacity + to_key, tl.where(allowed, key, NO_KEY),
                 mask=there & (to_key < capacity))  # fmt: skip
        if COUNT:
            tl.atomic_add(histogram_ptr + bin_of(key), 1, mask=allowed, sem="relaxed")
