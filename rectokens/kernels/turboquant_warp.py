# Gluon gives kernels no types; parameters are pointers, tensors of the shapes stated, constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, attr-defined"
# ruff: noqa: ANN001, ANN201, ANN202
"""Kernels in which one warp, or a team of them, holds a row: what happens to it is their text.

Here are only the addresses of a row. Warps past the last row do that row once more and
write the same bytes.
"""

from rectokens.kernels.optional_triton import gl, gluon


@gluon.jit
def _rows(num_rows, ROWS: gl.constexpr, TEAM: gl.constexpr):
    """The row of each thread, int64 (32 * ROWS * TEAM,)."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [ROWS * TEAM], [0])
    thread = gl.arange(0, 32 * ROWS * TEAM, layout)
    row = gl.program_id(0) * ROWS + thread // (32 * TEAM)
    return gl.minimum(row, num_rows - 1).to(gl.int64)


@gluon.jit(do_not_specialize=["num_rows", "x_stride"])
def encode_warp_kernel(x_ptr, packed_ptr, norms_ptr, signs_ptr, num_rows, x_stride, gain,
                       ROW_BYTES: gl.constexpr, PTX: gl.constexpr,
                       ROWS: gl.constexpr, TEAM: gl.constexpr):  # fmt: skip
    """Rows x (n, ·), x_stride numbers apart, to bytes (n, ROW_BYTES) and norms (n,)."""
    row = _rows(num_rows, ROWS, TEAM)
    gl.inline_asm_elementwise(
        PTX,
        "=r,l,l,l,l,f",
        [
            (x_ptr + row * x_stride).to(gl.int64),
            (packed_ptr + row * ROW_BYTES).to(gl.int64),
            (norms_ptr + row).to(gl.int64),
            (signs_ptr + row * 0).to(gl.int64),
            gain,
        ],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit(do_not_specialize=["num_rows"])
def decode_warp_kernel(packed_ptr, norms_ptr, out_ptr, signs_ptr, centroids_ptr, num_rows, gain,
                       DIM: gl.constexpr, ROW_BYTES: gl.constexpr, PTX: gl.constexpr,
                       ROWS: gl.constexpr, TEAM: gl.constexpr):  # fmt: skip
    """Bytes (n, ROW_BYTES) and norms (n,) to rows (n, DIM) fp32."""
    row = _rows(num_rows, ROWS, TEAM)
    gl.inline_asm_elementwise(
        PTX,
        "=r,l,l,l,l,l,f",
        [
            (packed_ptr + row * ROW_BYTES).to(gl.int64),
            (norms_ptr + row).to(gl.int64),
            (out_ptr + row * DIM).to(gl.int64),
            (signs_ptr + row * 0).to(gl.int64),
            (centroids_ptr + row * 0).to(gl.int64),
            gain,
        ],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
