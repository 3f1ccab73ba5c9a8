# Gluon gives kernels no types; parameters are pointers, tensors of the shapes stated, constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, attr-defined"
# ruff: noqa: ANN001, ANN201, ANN202
"""Kernels in which a warp holds a whole row: nothing passes through shared memory.

Loads, norms and stores are written here with layouts stated; what happens to a row in registers is
the PTX of `hadamard_ptx`. For powers of two from 512 to 4,096 and up to 4 bits.
"""

from rectokens.kernels.optional_triton import gl, gluon

_SQUARES_LOW = gl.constexpr(1e-24)
_SQUARES_HIGH = gl.constexpr(1e30)


@gluon.jit
def _places(SLICES: gl.constexpr):
    """Offsets of codes [SLICES, 32], of words [SLICES, 32, 4], of sign words [1, 32, 4]."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [1, 1, 1], [2, 1, 0])
    by_lane: gl.constexpr = gl.SliceLayout(2, layout)
    slices = gl.arange(0, SLICES, gl.SliceLayout(1, by_lane))
    lanes = gl.arange(0, 32, gl.SliceLayout(0, by_lane))
    pairs = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    pairs = gl.expand_dims(gl.expand_dims(pairs, 0), 1)
    of_lane = gl.expand_dims(slices, 1) * 32 + gl.expand_dims(lanes, 0)
    of_pair = gl.expand_dims(of_lane, 2) * 4 + pairs
    of_signs = gl.expand_dims(gl.expand_dims(lanes, 0), 2) * 4 + pairs
    return of_lane, of_pair, of_signs


@gluon.jit
def _halves(words, KIND: gl.constexpr):
    """Both numbers of each word, fp32."""
    if KIND == "bf16":
        low = (words << 16).to(gl.float32, bitcast=True)
        high = (words & -65536).to(gl.float32, bitcast=True)
    elif KIND == "fp16":
        low = words.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
        high = (words >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    else:
        low = words.to(gl.int32).to(gl.float32, bitcast=True)
        high = (words >> 32).to(gl.int32).to(gl.float32, bitcast=True)
    return low, high


@gluon.jit
def _peak(words, KIND: gl.constexpr):
    """Bits of the largest magnitude as fp32."""
    if KIND == "bf16":
        peak = _largest(gl.maximum(words & 32767, (words >> 16) & 32767)) << 16
    else:
        low = words.to(gl.int32) & 2147483647
        peak = _largest(gl.maximum(low, (words >> 32).to(gl.int32) & 2147483647))
    return peak


@gluon.jit
def _rescaled(words, factor, KIND: gl.constexpr):
    """Both numbers of each word times a power of two, in place."""
    if KIND == "bf16":
        half = (factor.to(gl.int32, bitcast=True) >> 16) * 65537
        words = gl.inline_asm_elementwise(
            "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [words, half], gl.int32, True, 1
        )
    else:
        words = gl.inline_asm_elementwise(
            "{ .reg .f32 a, b; mov.b64 {a, b}, $1; mul.f32 a, a, $2; mul.f32 b, b, $2; "
            "mov.b64 $0, {a, b}; }",
            "=l,l,f", [words, factor], gl.int64, True, 1,
        )  # fmt: skip
    return words


@gluon.jit
def _total(values):
    """Sum over a warp; registers first, then lanes."""
    return gl.sum(gl.sum(gl.sum(values, axis=2), axis=0), axis=0)


@gluon.jit
def _largest(values):
    return gl.max(gl.max(gl.max(values, axis=2), axis=0), axis=0)


@gluon.jit
def encode_warp_kernel(x_ptr, packed_ptr, norms_ptr, signs_ptr, x_stride, gain,
                       SLICES: gl.constexpr, KIND: gl.constexpr, PTX: gl.constexpr,
                       CONSTRAINTS: gl.constexpr):  # fmt: skip
    """Rows of words x (n, 128 * SLICES) to one word of codes a lane and slice, and norms (n,)."""
    of_lane, of_pair, of_signs = _places(SLICES)
    first_signs = gl.load(signs_ptr + of_signs)
    second_signs = gl.load(signs_ptr + 128 + of_signs)
    row = gl.program_id(0).to(gl.int64)
    words = gl.load(x_ptr + row * x_stride + of_pair)
    low, high = _halves(words, KIND)
    squares = _total(low * low + high * high)
    back = 1.0
    if KIND != "fp16":
        # Zero, tiny, huge or not finite: scale by a power of two and sum again.
        if (squares > _SQUARES_LOW) & (squares < _SQUARES_HIGH):
            pass
        else:
            exponent = gl.minimum(gl.maximum(_peak(words, KIND) >> 23, 1), 253)
            factor = ((254 - exponent) << 23).to(gl.float32, bitcast=True)
            words = _rescaled(words, factor, KIND)
            low, high = _halves(words, KIND)
            squares = _total(low * low + high * high)
            back = (exponent << 23).to(gl.float32, bitcast=True)
    gl.store(norms_ptr + row, gl.sqrt_rn(squares) * back)
    scale = gl.where(squares > 0, gain * gl.rsqrt(gl.where(squares > 0, squares, 1.0)), 0.0)
    codes = gl.inline_asm_elementwise(
        PTX,
        CONSTRAINTS,
        [words, first_signs, second_signs, scale],
        dtype=gl.int32,
        is_pure=True,
        pack=4 * SLICES,
    )
    codes = gl.sum(codes, axis=2)
    gl.store(
        packed_ptr + row * (32 * SLICES) + of_lane,
        codes.to(packed_ptr.dtype.element_ty),
    )


@gluon.jit
def decode_warp_kernel(packed_ptr, norms_ptr, out_ptr, signs_ptr, gain,
                       SLICES: gl.constexpr, PTX: gl.constexpr,
                       CONSTRAINTS: gl.constexpr):  # fmt: skip
    """One word of codes a lane and slice, and norms (n,), to rows of pairs (n, 128 * SLICES)."""
    of_lane, of_pair, of_signs = _places(SLICES)
    first_signs = gl.load(signs_ptr + of_signs)
    second_signs = gl.load(signs_ptr + 128 + of_signs)
    row = gl.program_id(0).to(gl.int64)
    codes = gl.load(packed_ptr + row * (32 * SLICES) + of_lane).to(gl.int32)
    norm = gl.load(norms_ptr + row)
    rows = gl.inline_asm_elementwise(
        PTX,
        CONSTRAINTS,
        [gl.expand_dims(codes, 2), first_signs, second_signs, gain, norm],
        dtype=gl.int64,
        is_pure=True,
        pack=4 * SLICES,
    )
    gl.store(out_ptr + row * (128 * SLICES) + of_pair, rows)
