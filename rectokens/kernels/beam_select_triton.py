# Triton gives kernels no types; parameters are pointers, tensors of the shapes stated, constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202
"""Triton kernels that choose the W best keys of a request and write the beams they stand for.

The exact W best come in three steps without the host. A histogram of the keys' bins, which
`score_kernel` added up, says in which bin the W-th key lies. `pick_kernel` copies the keys of
that bin and of the better ones, somewhat more than W, to a short list. `rank_kernel` counts, for
each key of that list, how many are larger: that is its slot, and the program that has counted
writes the beam there. Keys differ, so the order in which a list was filled does not matter.

Where one bin holds more keys than the short list has room for, as with many equal scores, one
program finds the exact cut by their digits: slower, and as exact. Lists that are short from the
start go to `rank_kernel` directly.
"""

from rectokens.kernels.beam_tables_triton import UNALIGNED, codes_of, row_ptrs_of
from rectokens.kernels.beam_triton import (
    CANDIDATES,
    CURSOR,
    LOW32,
    NEG,
    NO_KEY,
    bin_of,
    wait_for_inputs,
)
from rectokens.kernels.optional_triton import tl, triton

_LOW31 = tl.constexpr(0x7FFFFFFF)
_SIGN = tl.constexpr(-(1 << 63))


@triton.jit
def _last_bin(histogram_ptr, copies, wanted, BINS_: tl.constexpr):
    """The bin that the `wanted`-th best key lies in, its keys, and those with the better bins'."""
    GROUPS: tl.constexpr = 64
    SIZE: tl.constexpr = BINS_ // GROUPS
    groups, places = tl.arange(0, GROUPS), tl.arange(0, SIZE)
    inside = tl.zeros((GROUPS, SIZE), tl.int32)
    for copy in range(copies):
        bins = copy * BINS_ + groups[:, None] * SIZE + places[None, :]
        inside += tl.load(histogram_ptr + bins)
    whole = tl.sum(inside, axis=1)
    reached = tl.cumsum(whole, axis=0, reverse=True)
    group = tl.maximum(tl.sum((reached >= wanted).to(tl.int32), axis=0) - 1, 0)
    above = tl.sum(tl.where(groups > group, whole, 0), axis=0)
    ones = tl.sum(tl.where(groups[:, None] == group, inside, 0), axis=0)
    reached = above + tl.cumsum(ones, axis=0, reverse=True)
    place = tl.maximum(tl.sum((reached >= wanted).to(tl.int32), axis=0) - 1, 0)
    with_last = tl.sum(tl.where(places == place, reached, 0), axis=0)
    return group * SIZE + place, tl.sum(tl.where(places == place, ones, 0), axis=0), with_last


@triton.jit
def _digits(key):
    """Keys as unsigned numbers of the same order."""
    return (key ^ _SIGN).to(tl.uint64)


@triton.jit
def _least_of_bin(keys_ptr, count, bin_, need, BLOCK: tl.constexpr):
    """The `need`-th best key of a bin as an unsigned number, a digit of 8 bits at a time."""
    digits = tl.arange(0, 256)
    known = tl.full((1,), 0, tl.uint64)
    for step in range(8):
        shift = tl.full((1,), 56, tl.uint64) - step * 8
        total = tl.zeros((256,), tl.int32)
        for start in range(0, count, BLOCK):
            place = start + tl.arange(0, BLOCK)
            key = tl.load(keys_ptr + place, mask=place < count, other=NO_KEY)
            number = _digits(key)
            # Shifted twice: a shift by all 64 bits is undefined.
            same = ((number >> shift) >> 8) == ((known >> shift) >> 8)
            mask = (key != NO_KEY) & (bin_of(key) == bin_) & same
            digit = ((number >> shift) & 255).to(tl.int32)
            total += tl.histogram(digit, 256, mask=mask)
        reached = tl.cumsum(total, axis=0, reverse=True)
        last = tl.sum((reached >= need).to(tl.int32), axis=0) - 1
        need -= tl.sum(tl.where(digits == last, reached - total, 0), axis=0)
        known += last.to(tl.uint64) << shift
    return known


@triton.jit
def _append(candidates_ptr, cursor_ptr, key, take, room):
    ones = take.to(tl.int32)
    number = tl.sum(ones, axis=0)
    if number > 0:
        base = tl.atomic_add(cursor_ptr, number, sem="relaxed")
        out = base + tl.cumsum(ones, axis=0) - ones
        tl.store(candidates_ptr + out, key, mask=take & (out < room))


@triton.jit(
    do_not_specialize=["capacity", "room", "copies"], do_not_specialize_on_alignment=UNALIGNED
)
def pick_kernel(keys_ptr, counters_ptr, histogram_ptr, beam_width_ptr, candidates_ptr, capacity,
                room, copies, histogram_row, COUNTERS_: tl.constexpr, BINS_: tl.constexpr,
                BLOCK: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Copy the keys that may be among the best to `candidates` (B, room).

    The last program of a request finds those of a bin that does not fit as a whole; the others
    each read a share of the keys.
    """
    wait_for_inputs(EARLY)
    request = tl.program_id(1).to(tl.int64)
    readers = tl.num_programs(0) - 1
    counters_ptr += request * COUNTERS_
    count = tl.minimum(tl.load(counters_ptr + CURSOR), capacity)
    begin = tl.program_id(0) * BLOCK
    spare = tl.program_id(0) == readers
    if (begin >= count) & (not spare):
        return
    wanted = tl.load(beam_width_ptr + request)
    last, inside, with_last = _last_bin(histogram_ptr + request * histogram_row, copies, wanted,
                                        BINS_)  # fmt: skip
    crowded = with_last > room
    keys_ptr += request * capacity
    candidates_ptr += request * room
    if spare:
        if crowded:
            need = wanted - (with_last - inside)
            least = _least_of_bin(keys_ptr, count, last, need, BLOCK)
            for start in range(0, count, BLOCK):
                place = start + tl.arange(0, BLOCK)
                key = tl.load(keys_ptr + place, mask=place < count, other=NO_KEY)
                take = (key != NO_KEY) & (bin_of(key) == last) & (_digits(key) >= least)
                _append(candidates_ptr, counters_ptr + CANDIDATES, key, take, room)
    else:
        lowest = tl.where(crowded, last + 1, last)
        for start in range(begin, count, readers * BLOCK):
            place = start + tl.arange(0, BLOCK)
            key = tl.load(keys_ptr + place, mask=place < count, other=NO_KEY)
            take = (key != NO_KEY) & (bin_of(key) >= lowest)
            _append(candidates_ptr, counters_ptr + CANDIDATES, key, take, room)


@triton.jit(
    do_not_specialize=["room", "width", "depth", "copies"], do_not_specialize_on_alignment=UNALIGNED
)
def rank_kernel(table_ptr, candidates_ptr, counters_ptr, histogram_ptr, logits_ptr, rows_ptr,
                beam_width_ptr, temperature_ptr, nodes_ptr, scores_ptr, log_probs_ptr,
                ancestors_ptr, new_nodes_ptr, new_parents_ptr, new_codes_ptr, new_scores_ptr,
                new_code_scores_ptr, new_log_probs_ptr, new_perturbed_ptr, new_ancestors_ptr,
                alive_ptr, logits_batch, logits_beam, room, width, depth, copies,
                histogram_row, COMPACT: tl.constexpr,
                DIRECT: tl.constexpr, LEVELS: tl.constexpr, COUNTERS_: tl.constexpr,
                BINS_: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr,
                EARLY: tl.constexpr):  # fmt: skip
    """Rank OWN keys of `candidates` (B, room), write the beams at their slots; fill dead slots.

    DIRECT: the candidates are all the pairs, with NO_KEY among them.
    """
    wait_for_inputs(EARLY)
    request = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    counters_ptr += request * COUNTERS_
    count = tl.load(counters_ptr + (CURSOR if DIRECT else CANDIDATES))
    count = tl.minimum(count, room)
    if not DIRECT:
        # The next step finds an empty histogram.
        histogram_ptr += request * histogram_row
        for bin_ in range(part * 256, copies * BINS_, tl.num_programs(0) * 256):
            tl.store(histogram_ptr + bin_ + tl.arange(0, 256), 0)
    own = part * OWN + tl.arange(0, OWN)
    if (part * OWN >= count) & (part * OWN >= width):
        return
    candidates_ptr += request * room
    key = tl.load(candidates_ptr + own, mask=own < count, other=NO_KEY)
    rank = tl.zeros((OWN,), tl.int32)
    real = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        other = tl.load(candidates_ptr + place, mask=place < count, other=NO_KEY)
        rank += tl.sum((other[None, :] > key[:, None]).to(tl.int32), axis=1)
        if DIRECT:
            real += (other != NO_KEY).to(tl.int32)
    found = tl.sum(real, axis=0) if DIRECT else count
    wanted = tl.load(beam_width_ptr + request)
    alive = tl.minimum(found, wanted)
    if part == 0:
        tl.store(alive_ptr + request, alive)

    take = (key != NO_KEY) & (rank < alive)
    pair = ((key & LOW32) ^ LOW32).to(tl.int32)
    beam = tl.where(take, pair >> 16, 0)
    slot = pair & 0xFFFF
    row = request * width + beam
    node = tl.load(nodes_ptr + row, mask=take, other=0)
    edge = tl.load(row_ptrs_of(table_ptr) + node, mask=take, other=0) + slot
    code = tl.load(codes_of(table_ptr) + edge, mask=take, other=0).to(tl.int32) & 0xFFFF
    logits_row = request * logits_batch + beam.to(tl.int64) * logits_beam
    if COMPACT:
        logit = tl.load(logits_ptr + logits_row + slot, mask=take, other=0.0).to(tl.float32)
    else:
        logit = tl.load(logits_ptr + logits_row + code, mask=take, other=0.0).to(tl.float32)
    code_score = logit - tl.load(rows_ptr + row * 4, mask=take, other=0.0)
    score = tl.load(scores_ptr + row, mask=take, other=0.0) + code_score
    temperature = tl.load(temperature_ptr + request)
    log_prob = tl.zeros((OWN,), tl.float32)
    perturbed = tl.zeros((OWN,), tl.float32)
    if temperature > 0:
        heat = tl.load(rows_ptr + row * 4 + 1, mask=take, other=0.0)
        log_prob = tl.load(log_probs_ptr + row, mask=take, other=0.0)
        log_prob += logit / temperature - heat
        order = (key >> 32).to(tl.int32)
        perturbed = (order ^ ((order >> 31) & _LOW31)).to(tl.float32, bitcast=True)

    to = request * width + rank
    tl.store(new_nodes_ptr + to, edge + 1, mask=take)
    tl.store(new_parents_ptr + to, beam, mask=take)
    tl.store(new_codes_ptr + to, code, mask=take)
    tl.store(new_scores_ptr + to, score, mask=take)
    tl.store(new_code_scores_ptr + to, code_score, mask=take)
    tl.store(new_log_probs_ptr + to, log_prob, mask=take)
    tl.store(new_perturbed_ptr + to, perturbed, mask=take)
    dead = (own >= alive) & (own < width)
    gone = request * width + own
    tl.store(new_nodes_ptr + gone, 0, mask=dead)
    tl.store(new_parents_ptr + gone, 0, mask=dead)
    tl.store(new_codes_ptr + gone, 0, mask=dead)
    tl.store(new_scores_ptr + gone, NEG, mask=dead)
    tl.store(new_code_scores_ptr + gone, NEG, mask=dead)
    tl.store(new_log_probs_ptr + gone, NEG, mask=dead)
    tl.store(new_perturbed_ptr + gone, NEG, mask=dead)
    for level in tl.static_range(LEVELS):
        past = take & (level < depth)
        through = tl.load(ancestors_ptr + row * LEVELS + level, mask=past, other=0)
        through = tl.where(level == depth, rank, through)
        tl.store(new_ancestors_ptr + to * LEVELS + level, through, mask=take)
        tl.store(new_ancestors_ptr + gone * LEVELS + level, 0, mask=dead)
