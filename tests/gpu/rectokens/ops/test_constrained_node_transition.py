"""The constrained ops on a CUDA device give what the references give on the CPU."""

import math

import pytest
import torch

from rectokens.kernels import constrained_node_transition as kernels
from rectokens.schemas.compact_csr_trie import CompactCSRTrie

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

INF = float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = ["uniform", "skewed", "chains", "one item", "all children"]


def random_trie(shape, vocab, g):
    if shape == "chains":
        items = torch.arange(vocab).unsqueeze(1).repeat(1, 2)
    elif shape == "one item":
        items = torch.randint(vocab, (1, 2), generator=g)
    elif shape == "all children":
        side = torch.arange(min(vocab, 64))
        items = torch.cartesian_prod(side, side)
    else:
        items = torch.randint(vocab, (4 * vocab, 2), generator=g)
        if shape == "skewed":
            items[: 3 * vocab, 0] = vocab - 1
    return CompactCSRTrie.from_sorted_batch(items, vocab, 1)


def case(shape, vocab, rows, place, seed=0):
    g = torch.Generator().manual_seed(seed)
    trie = random_trie(shape, vocab, g)
    step = 0 if place == "root" else 1
    node = torch.zeros(rows, dtype=torch.long)
    if place != "root":
        node = 1 + torch.randint(int(trie.row_ptrs[1]), (rows,), generator=g)
    if place == "any":
        draw = torch.rand(rows, generator=g)
        node[draw < 0.1] = -1
        node[draw > 0.9] = trie.num_edges
    return (trie.row_ptrs, trie.stacked_cols_vals, node, trie.layer_max_branches[step]), g


def on_gpu(args):
    return [x.cuda() if isinstance(x, torch.Tensor) else x for x in args]


def poison():
    """Leave NaN in the memory that the next outputs come from."""
    torch.full((16 << 20,), math.nan, device="cuda")


def layer(rows, hidden, vocab, dtype, g, *, with_bias=True, transposed=True):
    a = torch.randn(rows, hidden, generator=g).to(dtype)
    weight = (torch.randn(vocab, hidden, generator=g) / hidden**0.5).to(dtype)
    bias = torch.randn(vocab, generator=g).to(dtype) if with_bias else None
    return a, (weight.T if transposed else weight.T.contiguous()), bias


def device_layer(a, b, bias):
    """As on the CPU, strides kept."""
    b = b.T.cuda().T if b.stride(0) == 1 else b.cuda()
    return a.cuda(), b, None if bias is None else bias.cuda()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rows", "place"), [(1, "root"), (65, "any"), (300, "root")])
def test_transition(shape, dtype, rows, place):
    tables, g = case(shape, 517, rows, place)
    logits = torch.randn(rows, 520, generator=g).to(dtype)
    poison()
    for got, wanted in zip(
        kernels.transition(*on_gpu((logits, *tables))),
        kernels.transition(logits, *tables),
        strict=True,
    ):
        assert torch.equal(got.cpu(), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rows", "place"), [(1, "root"), (65, "any"), (129, "root")])
@pytest.mark.parametrize(("hidden", "vocab"), [(96, 517), (1024, 4099)])
@pytest.mark.parametrize("plain", [False, True])
def test_linear(shape, dtype, rows, place, hidden, vocab, plain):
    tables, g = case(shape, vocab, rows, place)
    args = layer(rows, hidden, vocab, dtype, g, with_bias=not plain, transposed=not plain)
    wanted = kernels.linear(*args, *tables)
    poison()
    got = kernels.linear(*device_layer(*args), *on_gpu(tables))
    assert torch.equal(got[0].cpu(), wanted[0])
    assert torch.equal(got[1].cpu(), wanted[1])
    torch.testing.assert_close(got[2].cpu(), wanted[2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "children"), [(37, 2000), (300, 200), (1030, 1100), (1500, 60), (5000, 9)]
)
def test_rows_at_one_node_are_multiplied_as_tiles(dtype, rows, children):
    """Enough rows and children that no dot products are made one by one."""
    g = torch.Generator().manual_seed(rows)
    vocab, hidden = 9001, 256
    tokens = torch.randperm(vocab, generator=g)[:children].sort().values
    trie = CompactCSRTrie.from_sorted_batch(tokens.unsqueeze(1), vocab, 1)
    node = torch.zeros(rows, dtype=torch.long)
    tables = (trie.row_ptrs, trie.stacked_cols_vals, node, trie.layer_max_branches[0])
    args = layer(rows, hidden, vocab, dtype, g)
    wanted = kernels.linear(*args, *tables)
    poison()
    got = kernels.linear(*device_layer(*args), *on_gpu(tables))
    assert torch.equal(got[0].cpu(), wanted[0])
    assert torch.equal(got[1].cpu(), wanted[1])
    torch.testing.assert_close(got[2].cpu(), wanted[2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rows", "place"), [(1, "root"), (65, "any"), (129, "root")])
@pytest.mark.parametrize("k", [1, 5, 50, 512, 700])
def test_topk(shape, dtype, rows, place, k):
    """Values to rounding; the set of tokens wherever rounding cannot have decided."""
    tables, g = case(shape, 4099, rows, place)
    args = layer(rows, 256, 4099, dtype, g)
    heat = torch.full((1, 1), 0.7)
    wanted = kernels.topk(*args, *tables, k, heat)
    poison()
    got = [x.cpu() for x in kernels.topk(*device_layer(*args), *on_gpu((*tables, k, heat)))]
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])
    torch.testing.assert_close(got[2], wanted[2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[5], wanted[5], atol=2e-4, rtol=1e-4)
    differ = got[3] != wanted[3]
    # Two that swapped places have neighbours within rounding.
    gaps = (wanted[2][:, 1:] - wanted[2][:, :-1]).abs().nan_to_num(nan=INF)
    near = torch.zeros_like(differ)
    near[:, 1:] |= gaps < 2e-4
    near[:, :-1] |= gaps < 2e-4
    near[:, -1] = True
    assert not (differ & ~near).any()
    assert torch.equal(got[3] >= 0, wanted[3] >= 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 7])
@pytest.mark.parametrize("heat", [0.0, 0.5, 1.0])
def test_draws_are_those_of_the_reference(shape, dtype, k, heat):
    """The same noise on the same logits: but for a rare near tie, the same tokens."""
    tables, g = case(shape, 4099, 257, "any")
    args = layer(257, 256, 4099, dtype, g)
    extra = (k, torch.full((1, 1), heat), torch.tensor(1234))
    wanted = kernels.sampling(*args, *tables, *extra)
    got = [x.cpu() for x in kernels.sampling(*device_layer(*args), *on_gpu((*tables, *extra)))]
    assert (got[3] == wanted[3]).double().mean() > 0.995
    assert torch.equal(got[3] >= 0, wanted[3] >= 0)


def test_draws_follow_the_softmax():
    """Chi-square of 200,000 draws over 50 children; 99.99 % quantile of 49 degrees is 95."""
    vocab, rows = 500, 200_000
    items = torch.arange(0, vocab, 10).unsqueeze(1)
    trie = CompactCSRTrie.from_sorted_batch(items, vocab, 1)
    node = torch.zeros(rows, dtype=torch.long)
    tables = on_gpu((trie.row_ptrs, trie.stacked_cols_vals, node, 50))
    bias = torch.randn(vocab, generator=torch.Generator().manual_seed(2)).cuda()
    for heat in (0.3, 1.0, 4.0):
        extra = on_gpu((1, torch.full((1, 1), heat), torch.tensor(7)))
        a, b = torch.zeros(rows, 16, device="cuda"), torch.zeros(16, vocab, device="cuda")
        tokens = kernels.sampling(a, b, bias, *tables, *extra)[3].view(-1)
        counts = tokens.bincount(minlength=vocab).double().cpu()
        assert counts[torch.arange(vocab) % 10 != 0].sum() == 0
        expected = (bias[::10].double().cpu() / heat).softmax(0) * rows
        assert ((counts[::10] - expected).square() / expected).sum() < 95


@pytest.mark.parametrize("name", ["topk", "sampling"])
def test_not_finite_logits(name):
    values = torch.tensor([1.0, INF, -INF, math.nan, 2.0, 2.0, INF, -1.0, 0.0, -0.0])
    trie = CompactCSRTrie.from_sorted_batch(torch.arange(10).unsqueeze(1), 10, 1)
    tables = (trie.row_ptrs, trie.stacked_cols_vals, torch.zeros(70, dtype=torch.long), 10)
    extra = (torch.tensor(3),) if name == "sampling" else ()
    for chosen in (values, torch.full((10,), math.nan), torch.full((10,), 2.0)):
        args = (torch.zeros(70, 16), torch.zeros(16, 10), chosen, *tables, 10)
        args = (*args, torch.ones(1, 1), *extra)
        wanted = getattr(kernels, name)(*args)
        for got, right in zip(getattr(kernels, name)(*on_gpu(args)), wanted, strict=True):
            torch.testing.assert_close(got.cpu(), right, atol=1e-5, rtol=1e-5)


def test_same_answer_twice_and_in_a_graph():
    tables, g = case("uniform", 4099, 300, "any")
    args = (*device_layer(*layer(300, 256, 4099, torch.bfloat16, g)), *on_gpu(tables))
    extra = on_gpu((9, torch.ones(1, 1), torch.tensor(5)))
    first = kernels.sampling(*args, *extra)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.sampling(*args, *extra)
    graph.replay()
    torch.cuda.synchronize()
    for left, right in zip(first, captured, strict=True):
        assert torch.equal(left, right)


def test_a_new_batch_size_compiles_nothing():
    from rectokens.kernels.constrained_triton import place_kernel, project_kernel, spread_kernel

    def compiled():
        kernels_ = (project_kernel, place_kernel, spread_kernel)
        return [sum(len(c[0]) for c in k.device_caches.values()) for k in kernels_]

    tables, g = case("uniform", 517, 400, "any")
    a, b, bias = device_layer(*layer(400, 96, 517, torch.bfloat16, g))
    row_ptrs, edges, node, most = on_gpu(tables)
    kernels.linear(a, b, bias, row_ptrs, edges, node, most)
    before = compiled()
    for rows in (1, 16, 17, 128, 399):
        kernels.linear(a[:rows], b, bias, row_ptrs, edges, node[:rows], most)
    assert compiled() == before
