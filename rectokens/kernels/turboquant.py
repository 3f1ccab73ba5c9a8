# Triton gives kernels no types; parameters are pointers, tensors of the shapes stated, constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202, SIM108
"""Triton kernels of TurboQuant: one pass over a row each way.

A tile of rows is held as `[high, middle, 16]`, so that the Hadamard transform of 4,096 numbers,
H16 (x) H16 (x) H16, becomes small fp16 matrix products with fp32 accumulation on tensor cores.
A product along the middle axis hands its result to one along the last axis in registers; between
two middle axes the tile passes through shared memory once. Programs stay and loop over tiles, so
that matrices and signs are loaded once. `turboquant_launch` beside this chooses the shapes.
"""

from rectokens.kernels.optional_triton import tl, triton

# Sums of squares in this range lost nothing to overflow or underflow of a single square.
_SQUARES_LOW = tl.constexpr(1e-24)
_SQUARES_HIGH = tl.constexpr(1e30)


@triton.jit
def _hadamard(SIZE: tl.constexpr, MASK: tl.constexpr, SCALE: tl.constexpr, BATCH: tl.constexpr):
    """Scaled Hadamard matrix over the index bits in MASK, the identity over the others."""
    row = tl.arange(0, SIZE)[:, None]
    col = tl.arange(0, SIZE)[None, :]
    parity = row & col & MASK
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    value = (1 - 2 * (parity & 1)).to(tl.float32) * SCALE
    value = tl.where(((row ^ col) & (SIZE - 1 - MASK)) == 0, value, 0.0)
    return tl.broadcast_to(value.to(tl.float16)[None, :, :], (BATCH, SIZE, SIZE))


@triton.jit
def _permute_blocks(w, HIGH: tl.constexpr, MIDDLE: tl.constexpr, BLOCK: tl.constexpr,
                    NUM_BLOCKS: tl.constexpr, PADDED_BLOCKS: tl.constexpr,
                    FORWARD: tl.constexpr):  # fmt: skip
    """Element i of block b to block (b + i) mod NUM_BLOCKS, or back; w [MIDDLE, HIGH, 16]."""
    blocks: tl.constexpr = HIGH * MIDDLE * 16 // BLOCK
    w = tl.reshape(tl.permute(w, (1, 0, 2)), (blocks, BLOCK))
    slot = tl.arange(0, blocks)[:, None]
    block = slot % PADDED_BLOCKS
    shift = tl.arange(0, BLOCK)[None, :] % NUM_BLOCKS
    if FORWARD:
        source = (block + NUM_BLOCKS - shift) % NUM_BLOCKS
    else:
        source = (block + shift) % NUM_BLOCKS
    source = tl.where(block < NUM_BLOCKS, slot - block + source, slot)
    w = tl.gather(w, source, 0)
    return tl.permute(tl.reshape(w, (HIGH, MIDDLE, 16)), (1, 0, 2))


@triton.jit
def _two_rounds(tile, mid_signs, h_last_first, h_last, h_middle, h_high,
                HIGH: tl.constexpr, MIDDLE: tl.constexpr,
                HIGH_MASK: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
                PADDED_BLOCKS: tl.constexpr, FORWARD: tl.constexpr):  # fmt: skip
    """Both rounds of a tile [HIGH, MIDDLE, 16] fp16; returns [MIDDLE, HIGH, 16] fp32."""
    u = tl.dot(h_middle, tile)
    u = tl.dot(u.to(tl.float16), h_last_first)
    w = tl.permute(u.to(tl.float16), (1, 0, 2))
    if HIGH_MASK > 0:
        w = tl.dot(h_high, w).to(tl.float16)
    if not FORWARD:
        w = w * mid_signs
    if NUM_BLOCKS > 1:
        w = _permute_blocks(w, HIGH, MIDDLE, BLOCK, NUM_BLOCKS, PADDED_BLOCKS, FORWARD)
    if FORWARD:
        w = w * mid_signs
    u = tl.dot(w, h_last)
    u = tl.dot(h_middle, tl.permute(u.to(tl.float16), (1, 0, 2)))
    u = tl.permute(u, (1, 0, 2))
    if HIGH_MASK > 0:
        u = tl.dot(h_high, u.to(tl.float16))
    return u


@triton.jit
def _assign(y, boundaries_ptr, guess_ptr, BITS: tl.constexpr, GUESS_TERMS: tl.constexpr):
    """Index of the nearest centroid of each element of y, int32."""
    half: tl.constexpr = 1 << (BITS - 1)
    magnitude = tl.abs(y)
    if BITS == 1:
        index = tl.where(y > 0, 1, 0)
    elif BITS == 2:
        above = magnitude > tl.load(boundaries_ptr)
        index = tl.where(y > 0, tl.where(above, 3, 2), tl.where(above, 0, 1))
    elif BITS == 4:
        # A binary search over seven boundaries, in selects.
        upper = magnitude > tl.load(boundaries_ptr + 3)
        second = tl.where(upper, tl.load(boundaries_ptr + 5), tl.load(boundaries_ptr + 1))
        outer = magnitude > second
        count = tl.where(upper, tl.where(outer, 6, 4), tl.where(outer, 2, 0))
        third = tl.where(
            upper,
            tl.where(outer, tl.load(boundaries_ptr + 6), tl.load(boundaries_ptr + 4)),
            tl.where(outer, tl.load(boundaries_ptr + 2), tl.load(boundaries_ptr)),
        )
        count = tl.where(magnitude > third, count + 1, count)
        index = tl.where(y > 0, count + half, half - 1 - count)
    else:
        # A polynomial finds the nearest boundary to within one half; one comparison decides.
        inside = tl.minimum(magnitude, tl.load(boundaries_ptr + half - 2))
        square = inside * inside
        guess = tl.load(guess_ptr + GUESS_TERMS - 1) + tl.zeros_like(y)
        for term in tl.static_range(GUESS_TERMS - 1):
            guess = guess * square + tl.load(guess_ptr + GUESS_TERMS - 2 - term)
        # Adding 2**23 leaves the rounded integer in the low bits, at full rate.
        rounded = (guess * inside + 8388608.0).to(tl.int32, bitcast=True)
        nearest = tl.maximum(rounded & (2 * half - 1), 1)
        boundary = tl.load(boundaries_ptr + nearest - 1)
        count = tl.where(magnitude > boundary, nearest, nearest - 1)
        index = tl.where(y > 0, count + half, half - 1 - count)
    return index


@triton.jit
def _pack(index, HIGH: tl.constexpr, MIDDLE: tl.constexpr, BITS: tl.constexpr):
    """Bytes of [MIDDLE, HIGH, 16] indices: [HIGH, MIDDLE, 2 * BITS] uint8, in memory order."""
    if BITS == 8:
        packed = index.to(tl.uint8)
    elif BITS == 4:
        low, up = tl.split(tl.reshape(index, (MIDDLE, HIGH, 8, 2)))
        packed = (low + up * 16).to(tl.uint8)
    else:
        per_byte: tl.constexpr = 8 // BITS
        fields = tl.reshape(index, (MIDDLE, HIGH, 2 * BITS, per_byte))
        shift = tl.arange(0, per_byte)[None, None, None, :] * BITS
        packed = tl.sum(fields << shift, axis=3).to(tl.uint8)
    return tl.permute(packed, (1, 0, 2))


@triton.jit
def _load_mid_signs(signs_ptr, HIGH: tl.constexpr, MIDDLE: tl.constexpr, ROW: tl.constexpr):
    middle = tl.arange(0, MIDDLE)[:, None, None]
    high = tl.arange(0, HIGH)[None, :, None]
    last = tl.arange(0, 16)[None, None, :]
    return tl.load(signs_ptr + (high * (MIDDLE * 16) + middle * 16 + last) % ROW)


@triton.jit
def _load_rows(x_ptr, tile, num_rows, x_stride, DIM: tl.constexpr, ROW: tl.constexpr,
               ROWS: tl.constexpr):  # fmt: skip
    """A tile of rows, [ROWS, ROW] fp32; zeros beyond the matrix."""
    row = tile * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, ROW)
    return tl.load(
        x_ptr + row.to(tl.int64)[:, None] * x_stride + col[None, :],
        mask=(row < num_rows)[:, None] & (col < DIM)[None, :],
        other=0.0,
    ).to(tl.float32)


@triton.jit
def _norms(x, ROWS: tl.constexpr):
    """Norms, and rows rescaled by a power of two with the sum of their squares."""
    squares = tl.sum(x * x, axis=1)
    back = tl.full((ROWS,), 1.0, tl.float32)
    unsafe = tl.where((squares > _SQUARES_LOW) & (squares < _SQUARES_HIGH), 0, 1)
    if tl.max(unsafe, axis=0) > 0:
        # Zero, tiny, huge or not finite: scale by a power of two and sum again.
        peak = tl.max(tl.abs(x), axis=1).to(tl.int32, bitcast=True)
        exponent = tl.minimum(tl.maximum(peak >> 23, 1), 253)
        x = x * ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
        back = (exponent << 23).to(tl.float32, bitcast=True)
        squares = tl.sum(x * x, axis=1)
    return tl.sqrt_rn(squares) * back, x, squares


@triton.jit
def _encode_tile(tile, x_ptr, packed_ptr, norms_ptr, first_signs, second_signs, h_last_first,
                 h_last, h_middle, h_high, boundaries_ptr, guess_ptr, num_rows, x_stride, gain,
                 DIM: tl.constexpr, ROW: tl.constexpr, ROWS: tl.constexpr, HIGH: tl.constexpr,
                 MIDDLE: tl.constexpr, HIGH_MASK: tl.constexpr, BLOCK: tl.constexpr,
                 NUM_BLOCKS: tl.constexpr, BITS: tl.constexpr,
                 GUESS_TERMS: tl.constexpr):  # fmt: skip
    """Load, measure, rotate, assign, pack and store one tile of rows."""
    row_bytes: tl.constexpr = ROW * BITS // 8
    row = tile * ROWS + tl.arange(0, ROWS)
    row_mask = row < num_rows
    x = _load_rows(x_ptr, tile, num_rows, x_stride, DIM, ROW, ROWS)
    norms, x, squares = _norms(x, ROWS)
    tl.store(norms_ptr + row, norms, mask=row_mask)
    nonzero = squares > 0
    scale = tl.where(nonzero, gain * tl.rsqrt(tl.where(nonzero, squares, 1.0)), 0.0)
    unit = (x * scale[:, None]).to(tl.float16) * first_signs[None, :]
    y = _two_rounds(
        tl.reshape(unit, (HIGH, MIDDLE, 16)), second_signs, h_last_first, h_last, h_middle,
        h_high, HIGH, MIDDLE, HIGH_MASK, BLOCK, NUM_BLOCKS, ROW // BLOCK, True,
    )  # fmt: skip
    index = _assign(y, boundaries_ptr, guess_ptr, BITS, GUESS_TERMS)
    packed = tl.reshape(_pack(index, HIGH, MIDDLE, BITS), (ROWS, row_bytes))
    byte = tl.arange(0, row_bytes)
    tl.store(
        packed_ptr + row.to(tl.int64)[:, None] * (DIM * BITS // 8) + byte[None, :],
        packed,
        mask=row_mask[:, None] & (byte < DIM * BITS // 8)[None, :],
    )


@triton.jit(do_not_specialize=["num_rows"])
def encode_kernel(x_ptr, packed_ptr, norms_ptr, first_signs_ptr, second_signs_ptr,
                  boundaries_ptr, guess_ptr, num_rows, x_stride, gain,
                  DIM: tl.constexpr, ROW: tl.constexpr, ROWS: tl.constexpr, HIGH: tl.constexpr,
                  MIDDLE: tl.constexpr, LAST_MASK: tl.constexpr, MIDDLE_MASK: tl.constexpr,
                  HIGH_MASK: tl.constexpr, LAST_SCALE: tl.constexpr, MIDDLE_SCALE: tl.constexpr,
                  HIGH_SCALE: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
                  PERSISTENT: tl.constexpr, BITS: tl.constexpr, GUESS_TERMS: tl.constexpr,
                  STAGES: tl.constexpr):  # fmt: skip
    """Rows x (n, DIM) to packed (n, DIM * BITS / 8) uint8 and norms (n,) fp32."""
    h_last = _hadamard(16, LAST_MASK, LAST_SCALE, MIDDLE)
    h_middle = _hadamard(MIDDLE, MIDDLE_MASK, MIDDLE_SCALE, HIGH)
    h_high = _hadamard(HIGH, HIGH_MASK, HIGH_SCALE, MIDDLE)
    if HIGH != MIDDLE:
        h_last_first = _hadamard(16, LAST_MASK, LAST_SCALE, HIGH)
    else:
        h_last_first = h_last
    first_signs = tl.load(first_signs_ptr + tl.arange(0, ROW))
    second_signs = _load_mid_signs(second_signs_ptr, HIGH, MIDDLE, ROW)
    if PERSISTENT:
        num_tiles = tl.cdiv(num_rows, ROWS)
        for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=STAGES):
            _encode_tile(
                tile, x_ptr, packed_ptr, norms_ptr, first_signs, second_signs, h_last_first,
                h_last, h_middle, h_high, boundaries_ptr, guess_ptr, num_rows, x_stride, gain,
                DIM, ROW, ROWS, HIGH, MIDDLE, HIGH_MASK, BLOCK, NUM_BLOCKS, BITS, GUESS_TERMS,
            )  # fmt: skip
    else:
        _encode_tile(
            tl.program_id(0), x_ptr, packed_ptr, norms_ptr, first_signs, second_signs,
            h_last_first, h_last, h_middle, h_high, boundaries_ptr, guess_ptr, num_rows,
            x_stride, gain, DIM, ROW, ROWS, HIGH, MIDDLE, HIGH_MASK, BLOCK, NUM_BLOCKS, BITS,
            GUESS_TERMS,
        )  # fmt: skip


@triton.jit
def _decode_tile(tile, packed_ptr, norms_ptr, out_ptr, first_signs, second_signs, h_last_first,
                 h_last, h_middle, h_high, centroids_ptr, num_rows, gain,
                 DIM: tl.constexpr, ROW: tl.constexpr, ROWS: tl.constexpr, HIGH: tl.constexpr,
                 MIDDLE: tl.constexpr, HIGH_MASK: tl.constexpr, BLOCK: tl.constexpr,
                 NUM_BLOCKS: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """Load, unpack, look up, rotate back, rescale and store one tile of rows."""
    row_bytes: tl.constexpr = ROW * BITS // 8
    per_byte: tl.constexpr = 8 // BITS
    row = tile * ROWS + tl.arange(0, ROWS)
    row_mask = row < num_rows
    offset = row.to(tl.int64)[:, None]
    col = tl.arange(0, ROW)
    byte = tl.arange(0, row_bytes)
    packed = tl.load(
        packed_ptr + offset * (DIM * BITS // 8) + byte[None, :],
        mask=row_mask[:, None] & (byte < DIM * BITS // 8)[None, :],
        other=0,
    ).to(tl.int32)
    shift = tl.arange(0, per_byte)[None, None, :] * BITS
    index = tl.reshape((packed[:, :, None] >> shift) & ((1 << BITS) - 1), (ROWS, ROW))
    centroid = tl.load(centroids_ptr + index)
    if DIM != ROW:
        centroid = tl.where((col < DIM)[None, :], centroid, 0.0).to(tl.float16)
    x = _two_rounds(
        tl.reshape(centroid, (HIGH, MIDDLE, 16)), second_signs, h_last_first, h_last, h_middle,
        h_high, HIGH, MIDDLE, HIGH_MASK, BLOCK, NUM_BLOCKS, ROW // BLOCK, False,
    )  # fmt: skip
    norm = tl.load(norms_ptr + row, mask=row_mask, other=0.0)
    unit = tl.reshape(tl.permute(x, (1, 0, 2)), (ROWS, ROW)) * gain
    unit = unit * first_signs[None, :].to(tl.float32)
    tl.store(
        out_ptr + offset * DIM + col[None, :],
        unit * norm[:, None],
        mask=row_mask[:, None] & (col < DIM)[None, :],
    )


@triton.jit(do_not_specialize=["num_rows"])
def decode_kernel(packed_ptr, norms_ptr, out_ptr, first_signs_ptr, second_signs_ptr,
                  centroids_ptr, num_rows, gain,
                  DIM: tl.constexpr, ROW: tl.constexpr, ROWS: tl.constexpr, HIGH: tl.constexpr,
                  MIDDLE: tl.constexpr, LAST_MASK: tl.constexpr, MIDDLE_MASK: tl.constexpr,
                  HIGH_MASK: tl.constexpr, LAST_SCALE: tl.constexpr, MIDDLE_SCALE: tl.constexpr,
                  HIGH_SCALE: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
                  PERSISTENT: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """Packed (n, DIM * BITS / 8) uint8 and norms (n,) fp32 to rows (n, DIM) fp32."""
    h_last = _hadamard(16, LAST_MASK, LAST_SCALE, MIDDLE)
    h_middle = _hadamard(MIDDLE, MIDDLE_MASK, MIDDLE_SCALE, HIGH)
    h_high = _hadamard(HIGH, HIGH_MASK, HIGH_SCALE, MIDDLE)
    if HIGH != MIDDLE:
        h_last_first = _hadamard(16, LAST_MASK, LAST_SCALE, HIGH)
    else:
        h_last_first = h_last
    first_signs = tl.load(first_signs_ptr + tl.arange(0, ROW))
    second_signs = _load_mid_signs(second_signs_ptr, HIGH, MIDDLE, ROW)
    if PERSISTENT:
        # One stage: a deeper pipeline would follow the look-up of centroids, and spill.
        num_tiles = tl.cdiv(num_rows, ROWS)
        for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=1):
            _decode_tile(
                tile, packed_ptr, norms_ptr, out_ptr, first_signs, second_signs, h_last_first,
                h_last, h_middle, h_high, centroids_ptr, num_rows, gain, DIM, ROW, ROWS, HIGH,
                MIDDLE, HIGH_MASK, BLOCK, NUM_BLOCKS, BITS,
            )  # fmt: skip
    else:
        _decode_tile(
            tl.program_id(0), packed_ptr, norms_ptr, out_ptr, first_signs, second_signs,
            h_last_first, h_last, h_middle, h_high, centroids_ptr, num_rows, gain, DIM, ROW,
            ROWS, HIGH, MIDDLE, HIGH_MASK, BLOCK, NUM_BLOCKS, BITS,
        )  # fmt: skip
