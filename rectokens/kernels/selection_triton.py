# Triton gives kernels no types; parameters are pointers, tensors of the shapes stated, constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202
"""Triton kernels that choose k of each row's children: the best ones, or draws without replacement.

A child is one int64 key, its rank above the number of its slot, so that keys differ, larger is
better, equal ranks go to the lower slot, and the order in which keys meet cannot matter:

- the best, and draws at temperature 0: the logit's float32 bits, all of them;
- draws: logit / temperature + Gumbel noise in float64, without its last SLOT_BITS bits.

The noise has the same bits in its uniform numbers as `rectokens.ops.counter_rng`; its two
logarithms are float64 and within a few units in the last place.

A row that fits a block is done by one program. A longer one is cut into parts, whose k best keys
are merged in as many rounds as it takes; no program waits for another.
"""

from rectokens.kernels.optional_triton import tl, triton

SLOT_BITS = 20
_SLOT_MASK = tl.constexpr((1 << SLOT_BITS) - 1)
_NO_KEY = tl.constexpr(-(1 << 63))
_INT_MIN = tl.constexpr(-(1 << 31))
_FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
_FAR = tl.constexpr(-1e308)
_LOW31 = tl.constexpr(0x7FFFFFFF)
_LOW63 = tl.constexpr(0x7FFFFFFFFFFFFFFF)
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _mix(z):
    z = (z ^ (z >> 30)) * tl.full(z.shape, _MULTIPLIER_1, tl.uint64)
    z = (z ^ (z >> 27)) * tl.full(z.shape, _MULTIPLIER_2, tl.uint64)
    return z ^ (z >> 31)


@triton.jit
def hash_of(seed, row, token):
    """SplitMix64 chained over the row and the token; uint64, shape of `token` (int64)."""
    gamma = tl.full(token.shape, _GAMMA, tl.uint64)
    state = _mix(tl.full(token.shape, 0, tl.uint64) + seed.to(tl.uint64) + gamma)
    state = _mix((state ^ row.to(tl.uint64)) + gamma)
    return _mix((state ^ token.to(tl.uint64)) + gamma)


@triton.jit
def node_hash_of(seed, node):
    """SplitMix64 chained over the node alone; uint64, shape of `node`."""
    gamma = tl.full(node.shape, _GAMMA, tl.uint64)
    state = _mix(tl.full(node.shape, 0, tl.uint64) + seed.to(tl.uint64) + gamma)
    return _mix((state ^ node.to(tl.uint64)) + gamma)


@triton.jit
def gumbel_of(seed, row, token):
    """Standard Gumbel noise, float64."""
    return gumbel_of_bits(hash_of(seed, row, token))


@triton.jit
def gumbel_of_bits(bits):
    """Standard Gumbel noise, float64, from 64 mixed bits."""
    uniform = ((bits >> 12).to(tl.int64).to(tl.float64) + 0.5) * 2.0**-52
    # log1p(-u) by the logarithm of the rounded 1 - u, put right by how far that is from 1
    # (Goldberg, "What every computer scientist should know about floating-point arithmetic", 1991).
    rounded = 1.0 - uniform
    gap = 1.0 - rounded
    ratio = uniform / tl.where(gap == 0.0, 1.0, gap)
    log1p = tl.where(gap == 0.0, -uniform, tl.log(rounded) * ratio)
    return -tl.log(-log1p)


@triton.jit
def _temperature(temperature_ptr, row, stride, HEATED: tl.constexpr):
    """A row's temperature; 1 where there are none to read."""
    if HEATED:
        temperature = tl.load(temperature_ptr + row * stride)
    else:
        temperature = tl.full((), 1.0, tl.float32)
    return temperature


@triton.jit
def _clean(logit, live):
    """NaN and what is no child to -inf."""
    return tl.where(live & (logit == logit), logit, float("-inf"))


@triton.jit
def _scores(clean, peak, temperature):
    """Logits less the row's largest over the temperature: at most 0, -inf for -inf."""
    scale = tl.where(temperature > 0, temperature, 1.0)
    return (tl.minimum(clean, _FLOAT32_MAX) - peak) / scale


@triton.jit
def _peak(clean):
    peak = tl.max(tl.minimum(clean, _FLOAT32_MAX), axis=0)
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def _keys(clean, live, peak, slot, token, row, temperature, seed_ptr, DRAW: tl.constexpr):
    if DRAW:
        # Infinite logits share all the probability; finite ones are equally far below them.
        finite = (clean != float("inf")) & (clean != float("-inf"))
        unbounded = peak >= _FLOAT32_MAX
        clean = tl.where(unbounded, tl.where(finite, -_FLOAT32_MAX, clean), clean)
    # Minus zero is zero, so that they tie.
    bits = tl.where(clean == 0.0, 0.0, clean).to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & _LOW31)
    keys = (order.to(tl.int64) << 32) | (slot ^ _LOW31).to(tl.int64)
    if DRAW:
        scale = tl.where(temperature > 0, temperature, 1.0).to(tl.float64)
        shifted = tl.minimum(clean, _FLOAT32_MAX).to(tl.float64) - peak.to(tl.float64)
        far = tl.where(clean == float("-inf"), float("-inf"), _FAR)
        shifted = tl.where(unbounded, tl.where(shifted < 0.0, far, shifted), shifted)
        noisy = shifted / scale + gumbel_of(tl.load(seed_ptr), row, token)
        bits64 = noisy.to(tl.int64, bitcast=True)
        order64 = bits64 ^ ((bits64 >> 63) & _LOW63)
        drawn = (order64 | _SLOT_MASK) - slot.to(tl.int64)
        keys = tl.where(temperature > 0, drawn, keys)
    return tl.where(live, keys, _NO_KEY)


@triton.jit
def _one_draw(clean, live, peak, slot, token, row, temperature, seed_ptr, logits_ptr, valid_ptr,
              max_branches, AGAIN: tl.constexpr):  # fmt: skip
    """The key of one draw, [1]; only its slot and whether it is _NO_KEY mean anything.

    In float32 first: where only one child is within rounding of the largest, it is the one that
    float64 would find. Else, which is rare, float64 decides, AGAIN slots at a time, so that it
    takes no registers from what is common.
    """
    drawn = hash_of(tl.load(seed_ptr), row, token) >> 12
    uniform = drawn.to(tl.int64).to(tl.float32) * 2.0**-52 + 2.0**-53
    other = (((1 << 52) - drawn.to(tl.int64)).to(tl.float32) - 0.5) * 2.0**-52
    # -log(1 - u): by its series where 1 - u is near 1. Off by a few 2^-22 of 2^-5 at most.
    series = uniform * (0.25 + uniform * 0.2)
    series = uniform * (1.0 + uniform * (0.5 + uniform * (1.0 / 3.0 + series)))
    gap = tl.where(uniform < 2.0**-5, series, -tl.log(other))
    shifted = _scores(clean, peak, temperature)
    noisy = shifted - tl.log(gap)
    error = 2.0**-13 - shifted * 2.0**-20
    least = tl.max(tl.where(live, noisy - error, float("-inf")), axis=0)
    near = live & (noisy + error >= least)
    decided = tl.sum(near.to(tl.int32), axis=0) == 1
    if (temperature > 0) & decided & (tl.abs(peak) < 2.0**60) & (least > -(2.0**60)):
        best = tl.sum(tl.where(near, slot, 0), axis=0).to(tl.int64) ^ _SLOT_MASK
    else:
        best = tl.full((), _NO_KEY, tl.int64)
        for start in range(0, max_branches, AGAIN):
            slots = start + tl.arange(0, AGAIN)
            place = row * max_branches + slots
            tokens = tl.load(valid_ptr + place, mask=slots < max_branches, other=-1)
            some = tokens >= 0
            logit = tl.load(logits_ptr + place, mask=some, other=float("-inf"))
            keys = _keys(_clean(logit, some), some, peak, slots, tokens, row, temperature, seed_ptr,
                         True)  # fmt: skip
            best = tl.maximum(best, tl.max(keys, axis=0))
    return tl.zeros((1,), tl.int64) + best


@triton.jit
def _threshold(values, live, wanted, lowest: tl.constexpr):
    """The `wanted`-th largest of int32 values where `live`; `lowest` where fewer are."""
    found = tl.full((), lowest, tl.int32)
    # Bit by bit from the highest: is the answer in the upper half of what is left?
    for bit in range(31, -1, -1):
        # 2^31 wraps the lowest number to 0, which is the middle.
        middle = found + (tl.full((), 1, tl.int32) << bit)
        enough = tl.sum((live & (values >= middle)).to(tl.int32), axis=0) >= wanted
        found = tl.where(enough, middle, found)
    return found


@triton.jit
def _low_threshold(values, wanted):
    """The `wanted`-th largest of fewer than 1,024 int32 values without its 12 lowest bits.

    _INT_MIN where fewer are larger than that. Two bits at a time: three counts share a sum.
    """
    found = tl.full((), _INT_MIN, tl.int32)
    for pair in range(15, 5, -1):
        quarter = tl.full((), 1, tl.int32) << (2 * pair)
        # The sums wrap around zero, as they must from the lowest number.
        first = found + quarter
        second = first + quarter
        third = second + quarter
        counts = (values >= first).to(tl.int32) + ((values >= second).to(tl.int32) << 10)
        counts = tl.sum(counts + ((values >= third).to(tl.int32) << 20), axis=0)
        found = tl.where((counts & 1023) >= wanted, first, found)
        found = tl.where(((counts >> 10) & 1023) >= wanted, second, found)
        found = tl.where((counts >> 20) >= wanted, third, found)
    return found


@triton.jit
def _gathered(keys, taken, kept_ptr, ROOM: tl.constexpr):
    """Keys where `taken`, at most ROOM, as a tensor of that size by way of `kept` (ROOM,)."""
    place = tl.arange(0, ROOM)
    tl.store(kept_ptr + place, tl.full((ROOM,), _NO_KEY, tl.int64))
    tl.debug_barrier()
    tl.store(kept_ptr + tl.cumsum(taken.to(tl.int32), axis=0) - 1, keys, mask=taken)
    tl.debug_barrier()
    return tl.load(kept_ptr + place)


@triton.jit
def _reaching(keys, live, upper, K: tl.constexpr):
    """Which of the keys are the K largest of those that live, all where there are fewer.

    A threshold is searched for on the upper halves of the keys, then on the lower halves of those
    that are equal in the upper ones, if not all of them are wanted.
    """
    least = _threshold(upper, live, K, _INT_MIN)
    taken = live & (upper > least)
    equal = live & (upper == least)
    left = K - tl.sum(taken.to(tl.int32), axis=0)
    if tl.sum(equal.to(tl.int32), axis=0) > left:
        # Unsigned order is signed order with the highest bit turned.
        lower = (keys & 0xFFFFFFFF).to(tl.int32) ^ _INT_MIN
        equal = equal & (lower >= _threshold(lower, equal, left, _INT_MIN))
    return taken | equal


@triton.jit
def _largest(keys, kept_ptr, K: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr):
    """The K largest of [BLOCK] keys that differ, descending; `kept` (ROOM,) is this program's own.

    With ROOM for twice as many, a threshold of the largest keys of 4 K groups comes first, and a
    little below it: K groups reach it, and few of their other keys do. Where too many do, or there
    is no room, an exact one.
    """
    if K == 1:
        best = tl.zeros((1,), tl.int64) + tl.max(keys, axis=0)
    elif K == BLOCK:
        best = tl.sort(keys, descending=True)
    elif BLOCK < 4 * K or BLOCK < 256:
        best = tl.topk(keys, K)
    else:
        live = keys != _NO_KEY
        upper = (keys >> 32).to(tl.int32)
        if ROOM >= 2 * K and BLOCK >= 16 * K and K <= 128:
            heads = tl.reshape(tl.where(live, upper, _INT_MIN), (4 * K, BLOCK // (4 * K)),
                               can_reorder=True)  # fmt: skip
            heads = tl.max(heads, axis=1)
            near = live & (upper >= _low_threshold(heads, K))
            if tl.sum(near.to(tl.int32), axis=0) > ROOM:
                near = _reaching(keys, live, upper, K)
            best = tl.topk(_gathered(keys, near, kept_ptr, ROOM), K)
        else:
            taken = live
            if tl.sum(live.to(tl.int32), axis=0) > K:
                taken = _reaching(keys, live, upper, K)
            best = tl.sort(_gathered(keys, taken, kept_ptr, K), descending=True)
    return best


@triton.jit
def _emit(best, row, peak, log_sum, temperature, logits_ptr, next_ptr, valid_ptr,
          out_logits_ptr, out_tokens_ptr, out_nodes_ptr, out_log_probas_ptr, max_branches, k,
          K: tl.constexpr):  # fmt: skip
    place = tl.arange(0, K)
    chosen = best != _NO_KEY
    source = row * max_branches + ((best & _SLOT_MASK) ^ _SLOT_MASK)
    logit = _clean(tl.load(logits_ptr + source, mask=chosen, other=float("-inf")), chosen)
    token = tl.load(valid_ptr + source, mask=chosen, other=-1)
    node = tl.load(next_ptr + source, mask=chosen, other=-1)
    log_proba = tl.minimum(_scores(logit, peak, temperature) - log_sum, 0.0)
    log_proba = tl.where(logit == float("-inf"), float("-inf"), log_proba)
    asked = place < k
    tl.store(out_logits_ptr + row * k + place, logit, mask=asked)
    tl.store(out_tokens_ptr + row * k + place, token, mask=asked)
    tl.store(out_nodes_ptr + row * k + place, node, mask=asked)
    tl.store(out_log_probas_ptr + row * k + place, log_proba, mask=asked)


@triton.jit(do_not_specialize=["max_branches", "k", "temperature_stride"])
def select_kernel(logits_ptr, next_ptr, valid_ptr, temperature_ptr, seed_ptr, out_logits_ptr,
                  out_tokens_ptr, out_nodes_ptr, out_log_probas_ptr, kept_ptr, max_branches, k,
                  temperature_stride, HEATED: tl.constexpr, DRAW: tl.constexpr, K: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """Choices of one row of at most BLOCK slots: four outputs (B, k)."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK)
    inside = slot < max_branches
    token = tl.load(valid_ptr + row * max_branches + slot, mask=inside, other=-1)
    live = token >= 0
    logit = tl.load(logits_ptr + row * max_branches + slot, mask=inside, other=float("-inf"))
    temperature = _temperature(temperature_ptr, row, temperature_stride, HEATED)
    clean = _clean(logit, live)
    peak = _peak(clean)
    log_sum = tl.log(tl.sum(tl.exp(_scores(clean, peak, temperature)), axis=0))
    if DRAW and K == 1:
        best = _one_draw(clean, live, peak, slot, token, row, temperature, seed_ptr, logits_ptr,
                         valid_ptr, max_branches, 256 if BLOCK > 256 else BLOCK)  # fmt: skip
    else:
        keys = _keys(clean, live, peak, slot, token, row, temperature, seed_ptr, DRAW)
        best = _largest(keys, kept_ptr + row * 2 * K, K, 2 * K, BLOCK)
    _emit(best, row, peak, log_sum, temperature, logits_ptr, next_ptr, valid_ptr, out_logits_ptr,
          out_tokens_ptr, out_nodes_ptr, out_log_probas_ptr, max_branches, k, K)  # fmt: skip


@triton.jit(do_not_specialize=["max_branches", "temperature_stride"])
def stats_kernel(logits_ptr, temperature_ptr, stats_ptr, max_branches, temperature_stride,
                 HEATED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A row's largest logit, and the log of the sum of its scores' exponentials: (B, 2)."""
    row = tl.program_id(0).to(tl.int64)
    temperature = _temperature(temperature_ptr, row, temperature_stride, HEATED)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, max_branches, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        live = slot < max_branches
        logit = tl.load(logits_ptr + row * max_branches + slot, mask=live, other=float("-inf"))
        largest = tl.maximum(largest, _clean(logit, live))
    peak = _peak(largest)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, max_branches, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        live = slot < max_branches
        logit = tl.load(logits_ptr + row * max_branches + slot, mask=live, other=float("-inf"))
        total += tl.exp(_scores(_clean(logit, live), peak, temperature))
    tl.store(stats_ptr + row * 2, peak)
    tl.store(stats_ptr + row * 2 + 1, tl.log(tl.sum(total, axis=0)))


@triton.jit(do_not_specialize=["max_branches", "temperature_stride"])
def part_kernel(logits_ptr, valid_ptr, temperature_ptr, seed_ptr, stats_ptr, keys_ptr,
                max_branches, temperature_stride, HEATED: tl.constexpr, DRAW: tl.constexpr,
                K: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The K best keys of BLOCK slots of one row, to `keys` (B, parts, K)."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slot = part * BLOCK + tl.arange(0, BLOCK)
    inside = slot < max_branches
    token = tl.load(valid_ptr + row * max_branches + slot, mask=inside, other=-1)
    live = token >= 0
    logit = tl.load(logits_ptr + row * max_branches + slot, mask=inside, other=float("-inf"))
    temperature = _temperature(temperature_ptr, row, temperature_stride, HEATED)
    peak = tl.load(stats_ptr + row * 2)
    keys = _keys(_clean(logit, live), live, peak, slot, token, row, temperature, seed_ptr, DRAW)
    out_at = keys_ptr + (row * tl.num_programs(1) + part) * K
    best = _largest(keys, out_at, K, K, BLOCK)
    # Every thread has read what was gathered there.
    tl.debug_barrier()
    tl.store(out_at + tl.arange(0, K), best)


@triton.jit(do_not_specialize=["count"])
def merge_kernel(keys_ptr, out_ptr, count, K: tl.constexpr, BLOCK: tl.constexpr):
    """The K best of BLOCK keys of one row of `keys` (B, count), to `out` (B, parts, K)."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    place = part * BLOCK + tl.arange(0, BLOCK)
    keys = tl.load(keys_ptr + row * count + place, mask=place < count, other=_NO_KEY)
    out_at = out_ptr + (row * tl.num_programs(1) + part) * K
    best = _largest(keys, out_at, K, K, BLOCK)
    # Every thread has read what was gathered there.
    tl.debug_barrier()
    tl.store(out_at + tl.arange(0, K), best)


@triton.jit(do_not_specialize=["max_branches", "k", "temperature_stride"])
def emit_kernel(keys_ptr, stats_ptr, logits_ptr, next_ptr, valid_ptr, temperature_ptr,
                out_logits_ptr, out_tokens_ptr, out_nodes_ptr, out_log_probas_ptr, max_branches, k,
                temperature_stride, HEATED: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """Choices of one row from its merged keys (B, K)."""
    row = tl.program_id(0).to(tl.int64)
    best = tl.load(keys_ptr + row * K + tl.arange(0, K))
    temperature = _temperature(temperature_ptr, row, temperature_stride, HEATED)
    _emit(best, row, tl.load(stats_ptr + row * 2), tl.load(stats_ptr + row * 2 + 1), temperature,
          logits_ptr, next_ptr, valid_ptr, out_logits_ptr, out_tokens_ptr, out_nodes_ptr,
          out_log_probas_ptr, max_branches, k, K)  # fmt: skip
