"""The references against a walk of the pointer trie, one row and one token at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.decoding.trie import Trie
from rectokens.decoding.vntk import sparse_linear_pytorch, vtnk_pytorch
from rectokens.schemas.compact_csr_trie import CompactCSRTrie

INF = float("inf")
SHAPES = ["uniform", "skewed", "chains", "one item", "all children"]


def nodes_by_depth(items):
    """Per depth: node id -> {token: child id}, by walking a pointer trie breadth first."""
    trie = Trie()
    for item in items.tolist():
        trie.insert(item)
    layers, number, layer = [], 0, [trie.root]
    while layer:
        first_child = number + len(layer)
        table, below = {}, []
        for node in layer:
            table[number] = {}
            for token in sorted(node.children):
                table[number][token] = first_child + len(below)
                below.append(node.children[token])
            number += 1
        layers.append(table)
        layer = below
    return layers


def expected_rows(table, cur_node, width, max_branches):
    next_node, tokens, allowed = [], [], torch.zeros(len(cur_node), width, dtype=torch.bool)
    for row, node in enumerate(cur_node):
        children = table.get(node, {})
        padding = [-1] * (max_branches - len(children))
        tokens.append([*children, *padding])
        next_node.append([*children.values(), *padding])
        for token in children:
            allowed[row, token] = True
    shape = (len(cur_node), max_branches)
    return (
        torch.tensor(next_node, dtype=torch.long).view(shape),
        torch.tensor(tokens, dtype=torch.long).view(shape),
        allowed,
    )


cases = st.tuples(
    st.sampled_from(SHAPES),
    st.integers(2, 7),
    st.integers(1, 3),
    st.integers(0, 10_000),
    st.integers(0, 9),
)


def draw_case(random_items, case):
    """A trie, a step, and rows at that depth mixed with -1 and, below the root, with leaves."""
    shape, vocab_size, num_levels, seed, rows = case
    items = random_items(shape, vocab_size, num_levels, seed)
    trie = CompactCSRTrie.from_sorted_batch(items, vocab_size, 1)
    layers = nodes_by_depth(items)
    generator = torch.Generator().manual_seed(seed)
    step = int(torch.randint(num_levels, (), generator=generator))
    candidates = [*layers[step], -1, trie.num_edges]
    pick = torch.randint(len(candidates), (rows,), generator=generator)
    cur_node = torch.tensor([candidates[i] for i in pick.tolist()], dtype=torch.long)
    return trie, step, layers[step], cur_node, generator


@settings(max_examples=150, deadline=None)
@given(cases, st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_vtnk_equals_the_walk(random_items, case, dtype):
    trie, step, table, cur_node, generator = draw_case(random_items, case)
    width = trie.vocab_size + case[3] % 3  # a head may be padded past the vocabulary
    logits = torch.randn(len(cur_node), width, generator=generator).to(dtype)
    before = logits.clone()
    next_node, valid_idxs, corrected = vtnk_pytorch(logits, cur_node, trie, step)
    max_branches = trie.layer_max_branches[step]
    nodes, tokens, allowed = expected_rows(table, cur_node.tolist(), width, max_branches)
    assert next_node.dtype == valid_idxs.dtype == torch.long
    assert torch.equal(next_node, nodes)
    assert torch.equal(valid_idxs, tokens)
    assert corrected.dtype == dtype
    assert torch.equal(corrected, logits.masked_fill(~allowed, -INF))
    assert torch.equal(logits, before)


@settings(max_examples=100, deadline=None)
@given(cases, st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_sparse_linear_equals_the_masked_product(random_items, case, dtype):
    trie, step, table, cur_node, generator = draw_case(random_items, case)
    a = torch.randn(len(cur_node), 5, generator=generator).to(dtype)
    weight = torch.randn(trie.vocab_size, 5, generator=generator).to(dtype)
    next_node, valid_idxs, logits = sparse_linear_pytorch(a, weight, cur_node, trie, step)
    max_branches = trie.layer_max_branches[step]
    nodes, tokens, allowed = expected_rows(table, cur_node.tolist(), trie.vocab_size, max_branches)
    assert torch.equal(next_node, nodes)
    assert torch.equal(valid_idxs, tokens)
    assert logits.dtype == torch.float32
    expected = (a.float() @ weight.float().T).masked_fill(~allowed, -INF)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def trie():
    return CompactCSRTrie.from_sorted_batch(torch.tensor([(0, 2), (0, 3), (4, 1)]), 5, 1)


def test_the_last_nodes_stay_inside_the_edge_arrays(trie):
    # 5 is the last leaf; 99 is no node at all.
    cur_node = torch.tensor([5, 4, 99, -7])
    next_node, valid_idxs, corrected = vtnk_pytorch(torch.zeros(4, 5), cur_node, trie, 1)
    assert (next_node == -1).all()
    assert (valid_idxs == -1).all()
    assert (corrected == -INF).all()


def test_the_last_node_may_have_the_last_edges():
    trie = CompactCSRTrie.from_sorted_batch(torch.tensor([[1], [2]]), 3, 1)
    only_root = trie._replace(
        row_ptrs=torch.tensor([0]), stacked_cols_vals=torch.tensor([[-1], [-1]])
    )
    assert vtnk_pytorch(torch.zeros(1, 3), torch.zeros(1).long(), only_root, 0)[0].tolist() == [
        [-1, -1]
    ]


def test_a_trie_without_items():
    trie = CompactCSRTrie.from_sorted_batch(torch.empty(0, 2, dtype=torch.long), 5, 1)
    cur_node = torch.tensor([0, -1])
    next_node, valid_idxs, corrected = vtnk_pytorch(torch.zeros(2, 5), cur_node, trie, 0)
    assert next_node.shape == valid_idxs.shape == (2, 0)
    assert (corrected == -INF).all()
    assert (
        sparse_linear_pytorch(torch.ones(2, 3), torch.ones(5, 3), cur_node, trie, 0)[2] == -INF
    ).all()


def test_nan_logits_stay_where_they_are(trie):
    logits = torch.full((1, 5), float("nan"))
    next_node, valid_idxs, corrected = vtnk_pytorch(logits, torch.tensor([0]), trie, 0)
    assert valid_idxs.tolist() == [[0, 4]]
    assert next_node.tolist() == [[1, 2]]
    assert corrected.isnan().tolist() == [[True, False, False, False, True]]


def test_int32_arrays_give_the_same_answer(trie):
    small = trie._replace(
        row_ptrs=trie.row_ptrs.int(), stacked_cols_vals=trie.stacked_cols_vals.int()
    )
    logits, node = torch.randn(2, 5), torch.tensor([1, 2])
    for a, b in zip(
        vtnk_pytorch(logits, node, trie, 1),
        vtnk_pytorch(logits, node.int(), small, 1),
        strict=True,
    ):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_vtnk_passes_gradients_to_the_children_only(trie):
    logits = torch.zeros(1, 5, requires_grad=True)
    vtnk_pytorch(logits, torch.tensor([1]), trie, 1)[2].softmax(-1)[0, 2].backward()
    assert (logits.grad != 0).tolist() == [[False, False, True, True, False]]


@pytest.mark.parametrize("function", ["vtnk", "sparse"])
def test_compiles_without_a_break(trie, function):
    node = torch.tensor([1, 2, -1])
    if function == "vtnk":
        call, first = vtnk_pytorch, (torch.randn(3, 5),)
    else:
        call, first = sparse_linear_pytorch, (torch.randn(3, 4), torch.randn(5, 4))
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(*first, node, trie, 1), call(*first, node, trie, 1), strict=True):
        torch.testing.assert_close(a, b)


def test_refusals(trie):
    node = torch.tensor([0, 0])
    good = torch.zeros(2, 5)
    with pytest.raises(TypeError, match=r"logits has dtype torch\.int64"):
        vtnk_pytorch(good.long(), node, trie, 0)
    with pytest.raises(ValueError, match=r"logits has shape \(5,\)"):
        vtnk_pytorch(good[0], node, trie, 0)
    with pytest.raises(ValueError, match="4 tokens; the trie's vocab_size is 5"):
        vtnk_pytorch(good[:, :4], node, trie, 0)
    with pytest.raises(ValueError, match=r"cur_node has shape \(1,\); expected \(2,\)"):
        vtnk_pytorch(good, node[:1], trie, 0)
    with pytest.raises(TypeError, match=r"cur_node has dtype torch\.float32"):
        vtnk_pytorch(good, node.float(), trie, 0)
    for step in (-1, 2):
        with pytest.raises(ValueError, match=f"step is {step}; allowed are 0 to 1"):
            vtnk_pytorch(good, node, trie, step)
    with pytest.raises(ValueError, match="logits is on meta, the trie on cpu"):
        vtnk_pytorch(good.to("meta"), node, trie, 0)
    with pytest.raises(ValueError, match="a has 3 columns, weight has 4"):
        sparse_linear_pytorch(torch.ones(2, 3), torch.ones(5, 4), node, trie, 0)
