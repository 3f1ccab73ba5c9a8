# Triton gives kernels no types; parameters are pointers, tensors of the shapes stated, constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202
"""Triton kernels of the constrained transitions: children of rows, their logits, masked rows.

Rows stand at any nodes. Logits are computed into (B, M) slots by one of three forms:

- `gather_kernel`: one row at a time, the weight rows of its own children;
- `shared_kernel`: a group of rows at one node, whose children are gathered once for all of them
  and multiplied on tensor cores;
- `product_kernel`: the whole product (B, V), for nodes with a large share of all tokens.

The first two are launched one after the other on the same rows: each looks at the nodes of a group
and leaves the group to the other where its form does not fit. So the nodes decide, on the device,
and the host never waits for them. `spread_kernel` writes (B, V) rows once, -inf and children in
one pass. `constrained_launch` beside this chooses shapes and launches.
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
def _group_node(cur_node_ptr, group, num_rows, GROUP: tl.constexpr):
    """The first node of a group of rows, and whether all its rows stand there."""
    rows = tl.minimum(group * GROUP + tl.arange(0, GROUP), num_rows - 1)
    nodes = tl.load(cur_node_ptr + rows)
    low = tl.min(nodes, axis=0)
    return low, low == tl.max(nodes, axis=0)


@triton.jit
def _children(edges_ptr, edge_stride, first, slot, live):
    token = tl.load(edges_ptr + first + slot, mask=live, other=-1).to(tl.int64)
    child = tl.load(edges_ptr + edge_stride + first + slot, mask=live, other=-1).to(tl.int64)
    return token, child


@triton.jit
def _product(a_ptr, w_ptr, rows, in_rows, token, live, a_row, a_col, w_token, w_hidden,
             HIDDEN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
             BLOCK_H: tl.constexpr):  # fmt: skip
    """a[rows] @ w[token].T as fp32 [BLOCK_B, BLOCK_N]; IEEE fp32 unless both are 16 bits."""
    same: tl.constexpr = a_ptr.dtype.element_ty == w_ptr.dtype.element_ty
    a_base = a_ptr + rows.to(tl.int64)[:, None] * a_row
    w_base = w_ptr + token[None, :] * w_token
    acc = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    for start in range(0, HIDDEN, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        inside = h < HIDDEN
        left = tl.load(a_base + h[None, :] * a_col, mask=in_rows[:, None] & inside[None, :],
                       other=0.0)  # fmt: skip
        right = tl.load(w_base + h[:, None] * w_hidden, mask=inside[:, None] & live[None, :],
                        other=0.0)  # fmt: skip
        if not same:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["num_nodes", "max_branches", "span"])
def spread_kernel(source_ptr, out_ptr, next_ptr, valid_ptr, row_ptrs_ptr, edges_ptr, cur_node_ptr,
                  num_nodes, edge_stride, source_row, source_col, width, max_branches, span,
                  FROM_LOGITS: tl.constexpr, BLOCK: tl.constexpr,
                  BLOCK_M: tl.constexpr):  # fmt: skip
    """`span` columns of one row of `out` (B, width): -inf, then the children among them.

    FROM_LOGITS: `source` is (B, width), read at the children's tokens, and the children are
    written to `next` and `valid` (B, M) as well. Else it is (B, M), by slot.
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
        place = token if FROM_LOGITS else slot
        value = tl.load(source_ptr + row * source_row + place * source_col, mask=here, other=0.0)
        tl.store(out_row + token, value, mask=here)
    if FROM_LOGITS:
        listed = tl.where(part == 0, max_branches, 0)
        for start in range(0, listed, BLOCK_M):
            slot = start + tl.arange(0, BLOCK_M)
            token, child = _children(edges_ptr, edge_stride, first, slot, slot < count)
            tl.store(valid_ptr + row * max_branches + slot, token, mask=slot < max_branches)
            tl.store(next_ptr + row * max_branches + slot, child, mask=slot < max_branches)


@triton.jit(do_not_specialize=["num_rows", "num_nodes", "max_branches", "slots"])
def gather_kernel(a_ptr, w_ptr, bias_ptr, logits_ptr, next_ptr, valid_ptr, row_ptrs_ptr, edges_ptr,
                  cur_node_ptr, num_rows, num_nodes, edge_stride, a_row, a_col, w_token, w_hidden,
                  max_branches, slots, HIDDEN: tl.constexpr, HAS_BIAS: tl.constexpr,
                  GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """`slots` slots of one row: children, their nodes, fp32 logits. Not of groups at one node."""
    row = tl.program_id(0).to(tl.int64)
    _, shared = _group_node(cur_node_ptr, tl.program_id(0) // GROUP, num_rows, GROUP)
    begin = tl.program_id(1) * slots
    stop = tl.where(shared, begin, tl.minimum(begin + slots, max_branches))
    first, count = _edges(row_ptrs_ptr, tl.load(cur_node_ptr + row), num_nodes, max_branches)
    for start in range(begin, stop, BLOCK_M):
        slot = start + tl.arange(0, BLOCK_M)
        live = slot < tl.minimum(count, stop)
        token, child = _children(edges_ptr, edge_stride, first, slot, live)
        acc = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        # A tile without children has nothing to read.
        hidden = tl.where(start < count, HIDDEN, 0)
        for h_start in range(0, hidden, BLOCK_H):
            h = h_start + tl.arange(0, BLOCK_H)
            inside = h < HIDDEN
            x = tl.load(a_ptr + row * a_row + h * a_col, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(w_ptr + token[:, None] * w_token + h[None, :] * w_hidden,
                        mask=live[:, None] & inside[None, :], other=0.0)  # fmt: skip
            acc += w.to(tl.float32) * x[None, :]
        value = tl.sum(acc, axis=1)
        if HAS_BIAS:
            value += tl.load(bias_ptr + token, mask=live, other=0.0).to(tl.float32)
        value = tl.where(live, value, float("-inf"))
        place = row * max_branches + slot
        tl.store(valid_ptr + place, token, mask=slot < stop)
        tl.store(next_ptr + place, child, mask=slot < stop)
        tl.store(logits_ptr + place, value, mask=slot < stop)


@triton.jit(do_not_specialize=["num_rows", "num_nodes", "max_branches"])
def shared_kernel(a_ptr, w_ptr, bias_ptr, logits_ptr, next_ptr, valid_ptr, row_ptrs_ptr, edges_ptr,
                  cur_node_ptr, num_rows, num_nodes, edge_stride, a_row, a_col, w_token, w_hidden,
                  max_branches, HIDDEN: tl.constexpr, HAS_BIAS: tl.constexpr,
                  GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """BLOCK_M slots of a group of rows that stand at one node; nothing for other groups."""
    group = tl.program_id(0)
    node, shared = _group_node(cur_node_ptr, group, num_rows, GROUP)
    if shared:
        first, count = _edges(row_ptrs_ptr, node, num_nodes, max_branches)
        rows = group * GROUP + tl.arange(0, GROUP)
        in_rows = rows < num_rows
        slot = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        live = slot < count
        token, child = _children(edges_ptr, edge_stride, first, slot, live)
        value = _product(a_ptr, w_ptr, rows, in_rows, token, live, a_row, a_col, w_token, w_hidden,
                         HIDDEN, GROUP, BLOCK_M, BLOCK_H)  # fmt: skip
        if HAS_BIAS:
            value += tl.load(bias_ptr + token, mask=live, other=0.0).to(tl.float32)[None, :]
        value = tl.where(live[None, :], value, float("-inf"))
        place = rows.to(tl.int64)[:, None] * max_branches + slot[None, :]
        inside = in_rows[:, None] & (slot < max_branches)[None, :]
        tl.store(valid_ptr + place, tl.broadcast_to(token[None, :], place.shape), mask=inside)
        tl.store(next_ptr + place, tl.broadcast_to(child[None, :], place.shape), mask=inside)
        tl.store(logits_ptr + place, value, mask=inside)


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
                     HIDDEN, BLOCK_B, BLOCK_N, BLOCK_H)  # fmt: skip
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
