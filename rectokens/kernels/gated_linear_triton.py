# Triton gives kernels no types; parameters are pointers, tensors of the shapes stated, constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202
"""A product and its gate in one kernel, for Hopper: the (rows, 2 I) product is never written.

Gates and ups take turns in the weight, so that both halves of an output meet in one thread's
accumulators. Operands come and results go by bulk tensor copies; programs stay and take one tile
after another, so that the loads of the next tile run beside the gates of this one.
"""

from __future__ import annotations

from rectokens.kernels.decoder_triton import gated
from rectokens.kernels.optional_triton import tl, triton


@triton.jit
def _place(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of a tile: within a group of row tiles columns take turns, for the cache."""
    width = GROUP * column_tiles
    first = tile // width * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    return first + (tile % width) % size, (tile % width) // size


@triton.jit(do_not_specialize=["rows_count"])
def gated_linear_kernel(
    x_desc,
    weight_desc,
    out_desc,
    rows_count,
    outputs,
    hidden,
    ACTIVATION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``activation`` of outputs 0, 2, 4, .. of rows times outputs 1, 3, 5, ... Grid: (programs,).

    Args:
        x_desc: descriptor of (R, H), a block of (BLOCK_M, BLOCK_K).
        weight_desc: of (2 I, H), a block of (BLOCK_N, BLOCK_K).
        out_desc: of (R, I), a block of (BLOCK_M, BLOCK_N / 2).
        outputs: 2 I.
        GROUP: row tiles that share columns.
    """
    row_tiles = tl.cdiv(rows_count, BLOCK_M)
    column_tiles = tl.cdiv(outputs, BLOCK_N)
    kind: tl.constexpr = out_desc.dtype
    for tile in tl.range(
        tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True
    ):
        row, column = _place(tile, row_tiles, column_tiles, GROUP)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in tl.range(0, hidden, BLOCK_K):
            x = x_desc.load([row * BLOCK_M, start])
            weight = weight_desc.load([column * BLOCK_N, start])
            acc = tl.dot(x, tl.trans(weight), acc)
        # Rounded as the product would be.
        acc = acc.to(kind).to(tl.float32)
        gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2)))
        out = gated(gate, up, kind, ACTIVATION)
        out_desc.store([row * BLOCK_M, column * (BLOCK_N // 2)], out)
