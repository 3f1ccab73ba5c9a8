"""Kernels run where their tensors are, also when that is not the current device."""

import pytest
import torch

from rectokens.kernels import constrained_node_transition as constrained
from rectokens.kernels.nn_quantize import quantize_fwd
from rectokens.ops.nearest_reference import nearest_exact
from rectokens.schemas.compact_csr_trie import CompactCSRTrie
from rectokens.turboquant import codec_for, quantizer_for
from tests.rectokens.ops.beam_cases import (
    Search,
    check_answers,
    check_steps,
    moved,
    random_logits,
    random_requests,
    random_trie,
)

SECOND = "cuda:1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.fixture(autouse=True)
def on_the_first():
    """The first device is current, and stays so."""
    torch.cuda.set_device(0)
    yield
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("compact", [False, True])
def test_a_beam_search(compact):
    g = torch.Generator().manual_seed(5)
    trie = random_trie("skewed", 3, 300, g)
    requests = random_requests(2, 33, trie.num_items, g)
    logits, norms = ([x.to(SECOND) for x in some] for some in random_logits(trie, 2, 33, g))
    search = Search.of(trie.to(SECOND), 33, 2)
    search.requests.load(requests, trie.num_items)
    search.run(logits, norms, compact=compact)
    check_steps(search, trie.to(SECOND), moved(requests, SECOND), logits, norms)
    check_answers(search, trie, requests)


def test_constrained_transitions():
    g = torch.Generator().manual_seed(6)
    trie = CompactCSRTrie.from_sorted_batch(torch.randint(517, (2000, 2), generator=g), 517, 1)
    node = torch.randint(200, (65,), generator=g)
    tables = (trie.row_ptrs, trie.stacked_cols_vals, node, max(trie.layer_max_branches))
    a, b = torch.randn(65, 96, generator=g), torch.randn(517, 96, generator=g).T
    heat, seed = torch.ones(1, 1), torch.tensor(7)
    for op, args in (
        (constrained.transition, (torch.randn(65, 517, generator=g), *tables)),
        (constrained.linear, (a, b, None, *tables)),
        (constrained.topk, (a, b, None, *tables, 5, None)),
        (constrained.sampling, (a, b, None, *tables, 1, heat, seed)),
    ):
        there = [x.to(SECOND) if isinstance(x, torch.Tensor) else x for x in args]
        for got, wanted in zip(op(*there), op(*args), strict=True):
            assert got.device == torch.device(SECOND)
            torch.testing.assert_close(got.cpu(), wanted, atol=1e-4, rtol=1e-4)


def test_nearest_codewords():
    g = torch.Generator().manual_seed(7)
    x, book = torch.randn(500, 64, generator=g), torch.randn(256, 64, generator=g)
    found = quantize_fwd(x.to(SECOND), book.to(SECOND))
    assert torch.equal(found.cpu(), nearest_exact(x, book))


@pytest.mark.parametrize("dim", [640, 1024])
def test_turboquant(dim):
    """Of both sets of kernels: of blocks, and of a row a warp."""
    quantizer = quantizer_for(dim, 4, codec_for(dim))
    x = torch.randn(300, dim, generator=torch.Generator().manual_seed(dim))
    packed, norms = quantizer.encode(x.to(SECOND))
    back = quantizer.decode(packed, norms)
    assert back.device == torch.device(SECOND)
    torch.testing.assert_close(norms.cpu(), quantizer.encode(x)[1], rtol=4e-6, atol=0)
    assert (back.cpu() - x).norm() < 0.11 * x.norm()
