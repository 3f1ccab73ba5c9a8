# Triton gives kernels no types; parameters are pointers, tensors of the shapes stated, constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202
"""Triton kernels of the constrained transitions: children of rows, their logits, masked rows.

Rows stand at any nodes. `project_kernel` takes groups of consecutive rows and looks, on the device,
where they stand, so that the host never waits to know:

- all at one node: its children's weight rows are gathered once for the group, and multiplied with
  the group's rows on tensor cores, tile by tile;
- else, and where there are few pairs of a row and a child: pairs are counted through, and every
  program of the group takes the same number of them, however unequal the rows' children are.

`product_kernel` multiplies with all tokens, for nodes with a large share of them. Rows (B, V) are
filled with -inf by programs of their own beside those that compute, so that memory and
arithmetic overlap, and `place_kernel` puts the children in. Products of float32 are as exact as
float32: three TF32 products each. `constrained_launch` beside this chooses shapes and launches.
"""

from rectokens.kernels.optional_triton import tl, triton


@triton.jit
def _edges(row_ptrs_ptr, node, num_nodes, max_branches):
    """First edge and number of children of a node; none for a number that is no node."""
    node = node.to(tl.int64)
    is_node = (node >= 0) & (node < num_nodes)
    node = tl.where(is_node, node, 0)
    first = tl.load(row_ptrs_ptr + node).to(tl.int64)
    # There is no closing entry; the last node is a leaf, whose edges may end where they begin.
    end = tl.load(row_ptrs_ptr + tl.minimum(node + 1, num_nodes - 1)).to(tl.int64)
    count = tl.minimum(tl.where(is_node, end - first, 0), max_branches)
    return first, count.to(tl.int32)


@triton.jit
def _children(edges_ptr, edge_stride, first, slot, live):
    token = tl.load(edges_ptr + first + slot, mask=live, other=-1).to(tl.int64)
    child = tl.load(edges_ptr + edge_stride + first + slot, mask=live, other=-1).to(tl.int64)
    return token, child


@triton.jit
def _step(a_base, w_base, in_rows, live, start, a_col, w_hidden, acc, HIDDEN: tl.constexpr,
          BLOCK_H: tl.constexpr, SAME: tl.constexpr):  # fmt: skip
    """`acc` with BLOCK_H hidden columns of a product more."""
    h = start + tl.arange(0, BLOCK_H)
    inside = h < HIDDEN
    left = tl.load(a_base + h[None, :] * a_col, mask=in_rows[:, None] & inside[None, :],
                   other=0.0)  # fmt: skip
    right = tl.load(w_base + h[:, None] * w_hidden, mask=inside[:, None] & live[None, :],
                    other=0.0)  # fmt: skip
    if not SAME:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="tf32x3")


@triton.jit
def _product(a_ptr, w_ptr, rows, in_rows, token, live, a_row, a_col, w_token, w_hidden,
             HIDDEN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_H: tl.constexpr, CHAINS: tl.constexpr):  # fmt: skip
    """a[rows] @ w[token].T as fp32 [BLOCK_B, BLOCK_N].

    With two CHAINS every other step adds to a sum of its own, so that it need not wait for the one
    before.
    """
    same: tl.constexpr = a_ptr.dtype.element_ty == w_ptr.dtype.element_ty
    a_base = a_ptr + rows.to(tl.int64)[:, None] * a_row
    w_base = w_ptr + token[None, :] * w_token
    acc = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    other = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    for start in range(0, HIDDEN, BLOCK_H * CHAINS):
        acc = _step(a_base, w_base, in_rows, live, start, a_col, w_hidden, acc, HIDDEN, BLOCK_H,
                    same)  # fmt: skip
        if CHAINS == 2:
            other = _step(a_base, w_base, in_rows, live, start + BLOCK_H, a_col, w_hidden, other,
                          HIDDEN, BLOCK_H, same)  # fmt: skip
    if CHAINS == 2:
        acc += other
    return acc


@triton.jit(do_not_specialize=["num_nodes", "max_branches", "span"])
def spread_kernel(source_ptr, out_ptr, next_ptr, valid_ptr, row_ptrs_ptr, edges_ptr, cur_node_ptr,
                  num_nodes, edge_stride, source_row, source_col, width, max_branches, span,
                  BLOCK: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """`span` columns of one row of `out` (B, width): -inf, then `source` at children among them.

    The first span's program also lists the row's children in `next` and `valid` (B, M).
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    low = part * span
    high = tl.minimum(low + span, width)
    out_row = out_ptr + row * width
    nothing = tl.full((BLOCK,), float("-inf"), tl.float32).to(out_ptr.dtype.element_ty)
    for start in range(low, high, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(out_row + column, nothing, mask=column < high)
    # Other threads of this program fill the places that the children go to.
    tl.debug_barrier()
    first, count = _edges(row_ptrs_ptr, tl.load(cur_node_ptr + row), num_nodes, max_branches)
    for start in range(0, count, BLOCK_M):
        slot = start + tl.arange(0, BLOCK_M)
        live = slot < count
        token = tl.load(edges_ptr + first + slot, mask=live, other=-1).to(tl.int64)
        here = live & (token >= low) & (token < high)
        value = tl.load(source_ptr + row * source_row + token * source_col, mask=here, other=0.0)
        tl.store(out_row + token, value, mask=here)
    listed = tl.where(part == 0, max_branches, 0)
    for start in range(0, listed, BLOCK_M):
        slot = start + tl.arange(0, BLOCK_M)
        token, child = _children(edges_ptr, edge_stride, first, slot, slot < count)
        tl.store(valid_ptr + row * max_branches + slot, token, mask=slot < max_branches)
        tl.store(next_ptr + row * max_branches + slot, child, mask=slot < max_branches)


@triton.jit
def _fill(out_ptr, first, size, part, parts, BLOCK: tl.constexpr, LEAVES: tl.constexpr):
    """-inf into every `parts`-th block of out[:size] from block `first` on.

    So all write in one place at a time. The last block need not be whole. LEAVES: the cache, before
    what is multiplied.
    """
    nothing = tl.full((BLOCK,), float("-inf"), tl.float32)
    whole = size // BLOCK
    # Without a mask, so that stores are wide.
    for block in range(first + part, whole, parts):
        tl.store(out_ptr + block * BLOCK + tl.arange(0, BLOCK), nothing,
                 eviction_policy="evict_first" if LEAVES else "")  # fmt: skip
    if part == 0:
        place = whole * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + place, nothing, mask=place < size)


@triton.jit
def _ids(logits_ptr, next_ptr, valid_ptr, edges_ptr, edge_stride, first, count, part, parts, size,
         max_branches, GROUP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Children of every `parts`-th row of a group; logits -inf where there is none."""
    local = tl.arange(0, GROUP)
    for r in range(part, size, parts):
        row_first = tl.sum(tl.where(local == r, first, 0), axis=0)
        row_count = tl.sum(tl.where(local == r, count, 0), axis=0)
        for start in range(0, max_branches, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            place = r * max_branches + slot
            inside = slot < max_branches
            live = slot < row_count
            token, child = _children(edges_ptr, edge_stride, row_first, slot, live)
            tl.store(valid_ptr + place, token, mask=inside)
            tl.store(next_ptr + place, child, mask=inside)
            nothing = tl.full((BLOCK,), float("-inf"), tl.float32)
            tl.store(logits_ptr + place, nothing, mask=inside & (live == 0))


@triton.jit
def _shared_ids(logits_ptr, next_ptr, valid_ptr, edges_ptr, edge_stride, first, count, begin, part,
                parts, size, max_branches, BLOCK: tl.constexpr):  # fmt: skip
    """As `_ids`, of rows that all have the same children: every `parts`-th block of the slots."""
    for start in range(part * BLOCK, size * max_branches, parts * BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < size * max_branches
        slot = (place % max_branches).to(tl.int32)
        live = inside & (slot < count)
        token, child = _children(edges_ptr, edge_stride, first, slot, live)
        to = begin * max_branches + place
        tl.store(valid_ptr + to, token, mask=inside)
        tl.store(next_ptr + to, child, mask=inside)
        nothing = tl.full((BLOCK,), float("-inf"), tl.float32)
        tl.store(logits_ptr + to, nothing, mask=inside & (live == 0))


@triton.jit
def _tiles(a_ptr, w_ptr, bias_ptr, logits_ptr, edges_ptr, count, size, part, parts, a_row, a_col,
           w_token, w_hidden, max_branches, HIDDEN: tl.constexpr, HAS_BIAS: tl.constexpr,
           GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
           CHAINS: tl.constexpr):  # fmt: skip
    """Logits of every `parts`-th tile of the children that all rows of a group share."""
    local = tl.arange(0, GROUP)
    in_rows = local < size
    for start in range(part * BLOCK_M, count, parts * BLOCK_M):
        slot = start + tl.arange(0, BLOCK_M)
        live = slot < count
        token = tl.load(edges_ptr + slot, mask=live, other=0).to(tl.int64)
        value = _product(a_ptr, w_ptr, local, in_rows, token, live, a_row, a_col, w_token,
                         w_hidden, HIDDEN, GROUP, BLOCK_M, BLOCK_K, CHAINS)  # fmt: skip
        if HAS_BIAS:
            value += tl.load(bias_ptr + token, mask=live, other=0.0).to(tl.float32)[None, :]
        tl.store(logits_ptr + local[:, None] * max_branches + slot[None, :], value,
                 mask=in_rows[:, None] & live[None, :])  # fmt: skip


@triton.jit
def _pairs(a_ptr, w_ptr, bias_ptr, logits_ptr, edges_ptr, first, count, part, parts, a_row, a_col,
           w_token, w_hidden, max_branches, HIDDEN: tl.constexpr, HAS_BIAS: tl.constexpr,
           GROUP: tl.constexpr, PAIRS: tl.constexpr, AHEAD: tl.constexpr,
           BLOCK_H: tl.constexpr):  # fmt: skip
    """Logits of every `parts`-th run of PAIRS (row, child) pairs of a group, by dot products."""
    local = tl.arange(0, GROUP)
    done = tl.cumsum(count, axis=0)
    total = tl.max(done, axis=0)
    for start in range(part * PAIRS, total, parts * PAIRS):
        pair = start + tl.arange(0, PAIRS)
        live = pair < total
        # The row of a pair is the number of rows that end before it.
        before = done[None, :] <= pair[:, None]
        row = tl.sum(before.to(tl.int32), axis=1)
        slot = pair - tl.max(tl.where(before, done[None, :], 0), axis=1)
        here = local[None, :] == row[:, None]
        edge = tl.sum(tl.where(here, first[None, :], 0), axis=1) + slot
        token = tl.load(edges_ptr + edge, mask=live, other=0).to(tl.int64)
        a_base = a_ptr + row[:, None] * a_row
        w_base = w_ptr + token[:, None] * w_token
        acc = tl.zeros((PAIRS, BLOCK_H), tl.float32)
        for h_start in tl.range(0, HIDDEN, BLOCK_H, num_stages=AHEAD):
            h = h_start + tl.arange(0, BLOCK_H)
            mask = live[:, None]
            if HIDDEN % BLOCK_H != 0:
                mask = mask & (h < HIDDEN)[None, :]
            w = tl.load(w_base + h[None, :] * w_hidden, mask=mask, other=0.0).to(tl.float32)
            a = tl.load(a_base + h[None, :] * a_col, mask=mask, other=0.0).to(tl.float32)
            acc += w * a
        value = tl.sum(acc, axis=1)
        if HAS_BIAS:
            value += tl.load(bias_ptr + token, mask=live, other=0.0).to(tl.float32)
        tl.store(logits_ptr + row * max_branches + slot, value, mask=live)


@triton.jit
def _scattered(a_ptr, w_ptr, bias_ptr, logits_ptr, next_ptr, valid_ptr, row_ptrs_ptr, edges_ptr,
               cur_node_ptr, num_rows, num_nodes, edge_stride, a_row, a_col, w_token, w_hidden,
               max_branches, begin, part, parts, HIDDEN: tl.constexpr, HAS_BIAS: tl.constexpr,
               RUNS: tl.constexpr, FEW: tl.constexpr, PAIRS: tl.constexpr, AHEAD: tl.constexpr,
               BLOCK_H: tl.constexpr, BLOCK_IDS: tl.constexpr):  # fmt: skip
    """A group of rows at several nodes, in runs of FEW rows; parts >= RUNS, so each has its own."""
    begin += (part % RUNS) * FEW
    size = tl.minimum(num_rows - begin, FEW)
    rows = begin + tl.arange(0, FEW)
    node = tl.load(cur_node_ptr + tl.minimum(rows, num_rows - 1)).to(tl.int64)
    first, count = _edges(row_ptrs_ptr, node, num_nodes, max_branches)
    count = tl.where(rows < num_rows, count, 0)
    parts = tl.cdiv(parts - part % RUNS, RUNS)
    part = part // RUNS
    skip = begin * max_branches
    _ids(logits_ptr + skip, next_ptr + skip, valid_ptr + skip, edges_ptr, edge_stride, first, count,
         part, parts, size, max_branches, FEW, BLOCK_IDS)  # fmt: skip
    # Offsets from the run's own rows fit 32 bits.
    _pairs(a_ptr + begin * a_row, w_ptr, bias_ptr, logits_ptr + skip, edges_ptr, first, count, part,
           parts, a_row, a_col, w_token, w_hidden, max_branches, HIDDEN, HAS_BIAS, FEW, PAIRS,
           AHEAD, BLOCK_H)  # fmt: skip


@triton.jit
def _alike(cur_node_ptr, rows, num_rows, together):
    """Whether rows stand at one node and may be multiplied together, as a number."""
    alike = together
    if together > 0:
        node = tl.load(cur_node_ptr + tl.minimum(rows, num_rows - 1))
        alike = (tl.min(node, axis=0) == tl.max(node, axis=0)).to(tl.int32)
    return alike


@triton.jit(do_not_specialize=["num_rows", "parts", "a_part", "a_group", "fillers", "ahead",
                               "together", "num_nodes", "max_branches"])  # fmt: skip
def project_kernel(a_ptr, w_ptr, bias_ptr, logits_ptr, next_ptr, valid_ptr, out_ptr, row_ptrs_ptr,
                   edges_ptr, cur_node_ptr, num_rows, parts, a_part, a_group, fillers, ahead,
                   together, num_nodes, edge_stride, a_row, a_col, w_token, w_hidden, max_branches,
                   width, HIDDEN: tl.constexpr, HAS_BIAS: tl.constexpr, FILL: tl.constexpr,
                   GROUP: tl.constexpr, FEW: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK_K: tl.constexpr, CHAINS: tl.constexpr, PAIRS: tl.constexpr,
                   AHEAD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_IDS: tl.constexpr,
                   BLOCK_SHARED: tl.constexpr, BLOCK_FILL: tl.constexpr,
                   LEAVES: tl.constexpr):  # fmt: skip
    """One of the `parts` programs of a group of rows: children, nodes, fp32 logits, all (B, M).

    FILL: the first `fillers` programs write -inf into `out` (B, width) instead, into its first
    `ahead` blocks, while the others compute; these fill the rest when they are done. The next part
    and the next group are `a_part` and `a_group` programs on. `together`: 0 or 1, whether rows at
    one node are multiplied as tiles.
    """
    number = tl.program_id(0) - fillers
    if number < 0:
        if FILL:
            size = (tl.full((), 0, tl.int64) + ahead) * BLOCK_FILL
            _fill(out_ptr, 0, size, tl.program_id(0).to(tl.int64), fillers, BLOCK_FILL,
                  LEAVES)  # fmt: skip
    else:
        part = number // a_part % parts
        begin = (number // a_group % tl.cdiv(num_rows, GROUP)).to(tl.int64) * GROUP
        if _alike(cur_node_ptr, begin + tl.arange(0, GROUP), num_rows, together) > 0:
            size = tl.minimum(num_rows - begin, GROUP)
            first, count = _edges(row_ptrs_ptr, tl.load(cur_node_ptr + begin), num_nodes,
                                  max_branches)  # fmt: skip
            # Programs that multiply nothing list the children, or, where there are none, all do.
            tiles = tl.cdiv(count, BLOCK_M)
            tiles = tl.where(tiles < parts, tiles, 0)
            if part >= tiles:
                _shared_ids(logits_ptr, next_ptr, valid_ptr, edges_ptr, edge_stride, first, count,
                            begin, part - tiles, parts - tiles, size, max_branches,
                            BLOCK_SHARED)  # fmt: skip
            # Offsets from the group's own rows fit 32 bits.
            _tiles(a_ptr + begin * a_row, w_ptr, bias_ptr, logits_ptr + begin * max_branches,
                   edges_ptr + first, count, size, part, parts, a_row, a_col, w_token, w_hidden,
                   max_branches, HIDDEN, HAS_BIAS, GROUP, BLOCK_M, BLOCK_K, CHAINS)  # fmt: skip
        else:
            _scattered(a_ptr, w_ptr, bias_ptr, logits_ptr, next_ptr, valid_ptr, row_ptrs_ptr,
                       edges_ptr, cur_node_ptr, num_rows, num_nodes, edge_stride, a_row, a_col,
                       w_token, w_hidden, max_branches, begin, part, parts, HIDDEN, HAS_BIAS,
                       GROUP // FEW, FEW, PAIRS, AHEAD, BLOCK_H, BLOCK_IDS)  # fmt: skip
        if FILL:
            size = (tl.full((), 0, tl.int64) + num_rows) * width
            _fill(out_ptr, tl.full((), 0, tl.int64) + ahead, size, number,
                  tl.num_programs(0) - fillers, BLOCK_FILL, LEAVES)  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "num_nodes", "max_branches"])
def place_kernel(logits_ptr, out_ptr, row_ptrs_ptr, edges_ptr, cur_node_ptr, num_rows, num_nodes,
                 width, max_branches, ROWS: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """Logits (B, M) of children to their tokens' columns of out (B, width)."""
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    node = tl.load(cur_node_ptr + tl.minimum(row, num_rows - 1))
    first, count = _edges(row_ptrs_ptr, node, num_nodes, max_branches)
    slot = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = (row < num_rows)[:, None] & (slot[None, :] < count[:, None])
    token = tl.load(edges_ptr + first[:, None] + slot[None, :], mask=live, other=0).to(tl.int64)
    place = row[:, None] * max_branches + slot[None, :]
    value = tl.load(logits_ptr + place, mask=live, other=0.0)
    tl.store(out_ptr + row[:, None] * width + token, value, mask=live)


@triton.jit(do_not_specialize=["num_rows"])
def product_kernel(a_ptr, w_ptr, bias_ptr, out_ptr, num_rows, width, a_row, a_col, w_token,
                   w_hidden, HIDDEN: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_B: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """A tile of a @ w.T + bias, fp32 (B, width)."""
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_rows = rows < num_rows
    token = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    live = token < width
    value = _product(a_ptr, w_ptr, rows, in_rows, token, live, a_row, a_col, w_token, w_hidden,
                     HIDDEN, BLOCK_B, BLOCK_N, BLOCK_H, 1)  # fmt: skip
    if HAS_BIAS:
        value += tl.load(bias_ptr + token, mask=live, other=0.0).to(tl.float32)[None, :]
    place = rows.to(tl.int64)[:, None] * width + token[None, :]
    tl.store(out_ptr + place, value, mask=in_rows[:, None] & live[None, :])


@triton.jit(do_not_specialize=["num_nodes", "max_branches"])
def pick_kernel(source_ptr, logits_ptr, next_ptr, valid_ptr, row_ptrs_ptr, edges_ptr, cur_node_ptr,
                num_nodes, edge_stride, source_row, max_branches,
                BLOCK_M: tl.constexpr):  # fmt: skip
    """Children of one row and their columns of `source` (B, V), by slot: logits (B, M)."""
    row = tl.program_id(0).to(tl.int64)
    first, count = _edges(row_ptrs_ptr, tl.load(cur_node_ptr + row), num_nodes, max_branches)
    slot = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = slot < count
    token, child = _children(edges_ptr, edge_stride, first, slot, live)
    value = tl.load(source_ptr + row * source_row + token, mask=live, other=float("-inf"))
    place = row * max_branches + slot
    tl.store(valid_ptr + place, token, mask=slot < max_branches)
    tl.store(next_ptr + place, child, mask=slot < max_branches)
    tl.store(logits_ptr + place, value, mask=slot < max_branches)
