"""The ops keep torch's rules for custom ops: schema, fake shapes, no aliasing."""

import pytest
import torch

import rectokens.kernels.constrained_node_transition  # noqa: F401  (registers the ops)
from rectokens.schemas.compact_csr_trie import CompactCSRTrie

ITEMS = torch.tensor([(0, 2), (0, 3), (4, 1)])
NAMES = [
    "constrained_node_transition",
    "fused_linear_constrained_node_transition",
    "fused_linear_constrained_node_transition_sampling",
    "fused_linear_constrained_node_transition_topk",
]


def arguments(name, *, rows, with_bias, transposed, dtype):
    trie = CompactCSRTrie.from_sorted_batch(ITEMS, 5, 1)
    tables = (trie.row_ptrs, trie.stacked_cols_vals)
    node = torch.tensor([1, 2, 5, -1])[:rows]
    if name == "constrained_node_transition":
        logits = torch.randn(rows, 5, dtype=dtype)
        return (logits.T.contiguous().T if transposed else logits, *tables, node, 2)
    b = torch.randn(5, 3, dtype=dtype).T if transposed else torch.randn(3, 5, dtype=dtype)
    bias = torch.randn(5, dtype=dtype) if with_bias else None
    common = (torch.randn(rows, 3, dtype=dtype), b, bias, *tables, node, 2)
    heat = torch.ones(1, 1) if with_bias else None
    return {
        "fused_linear_constrained_node_transition": common,
        "fused_linear_constrained_node_transition_topk": (*common, 3, heat),
        "fused_linear_constrained_node_transition_sampling": (*common, 1, heat, torch.tensor(7)),
    }[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [4, 1])
@pytest.mark.parametrize("variant", [False, True])
def test_opcheck(name, rows, variant):
    dtype = torch.bfloat16 if variant else torch.float32
    args = arguments(name, rows=rows, with_bias=variant, transposed=variant, dtype=dtype)
    torch.library.opcheck(getattr(torch.ops.vtnk, name).default, args)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [0, 3])
def test_fake_results_match_real_ones(name, rows):
    args = arguments(name, rows=rows, with_bias=False, transposed=True, dtype=torch.float16)
    op = getattr(torch.ops.vtnk, name)
    real = op(*args)
    fake = op(*[a.to("meta") if isinstance(a, torch.Tensor) else a for a in args])
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


def test_a_choice_of_more_than_all_children_is_padded():
    args = arguments(NAMES[3], rows=2, with_bias=False, transposed=False, dtype=torch.float32)
    *_, logits, idxs, nodes, log_probas = (
        torch.ops.vtnk.fused_linear_constrained_node_transition_topk(*args)
    )
    assert (idxs >= 0).sum(1).tolist() == [2, 1]
    assert (nodes[0, :2].sort().values).tolist() == [3, 4]
    assert nodes[1].tolist() == [5, -1, -1]
    assert log_probas[1].tolist() == [0.0, -torch.inf, -torch.inf]
    assert logits[1, 1:].tolist() == [-torch.inf, -torch.inf]
