"""The beam search on static buffers on a CUDA device: eager, captured, and after a swap."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from rectokens.decoding.device_tables import StepShapes
from rectokens.ops.beam_step import beam_step_, begin_search_, child_logits, finish_search_
from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.search import SearchRequest
from tests.rectokens.ops.beam_cases import (
    TRIES,
    Search,
    check_answers,
    check_steps,
    moved,
    random_logits,
    random_requests,
    random_trie,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_device(values):
    return [value.cuda() for value in values]


def catalog(items, levels, codes, seed=0) -> CatalogTrie:
    """Random semantic IDs with a skewed first level."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(codes, (items, levels), generator=g)
    ids[:, 0] = (torch.rand(items, generator=g).square() * codes).long()
    return CatalogTrie.from_codes(ids.cuda(), codes)[0]


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("kind", TRIES)
def test_small(kind, compact):
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        width, batch, codes = (1, 7, 33)[seed % 3], 1 + seed % 4, (5, 40, 300)[seed // 2]
        trie = random_trie(kind, 3 if codes < 300 else 2, codes, g)
        requests = random_requests(batch, width, trie.num_items, g)
        logits, norms = map(
            on_device, random_logits(trie, batch + 1, width, g, ties=bool(seed % 2))
        )
        search = Search.of(trie.to("cuda"), width, batch + 1)
        search.requests.load(requests, trie.num_items)
        search.run(logits, norms, compact=compact)
        check_steps(search, trie.to("cuda"), moved(requests, "cuda"), logits, norms)
        check_answers(search, trie, requests)


@pytest.mark.parametrize(
    ("items", "codes", "batch", "width", "spread", "ties"),
    [
        (200_000, 2048, 2, 256, 2.0, False),
        (200_000, 2048, 3, 100, 2.0, True),
        (300_000, 512, 1, 2000, 1.0, False),
        (300_000, 512, 2, 500, 0.0, False),  # all equal: ties by the million
        (100_000, 8192, 1, 64, 0.001, False),  # one bin holds most of them
    ],
)
def test_large(items, codes, batch, width, spread, ties):
    g = torch.Generator().manual_seed(items + width)
    trie = catalog(items, 3, codes)
    requests = random_requests(batch, width, trie.num_items, g)
    logits, norms = map(on_device, random_logits(trie, batch, width, g, spread=spread, ties=ties))
    search = Search.of(trie, width, batch, exclusions=4 * items)
    search.requests.load(requests, trie.num_items)
    search.run(logits, norms)
    check_steps(search, trie, moved(requests, "cuda"), logits, norms)
    check_answers(search, trie, requests)


def test_a_captured_search_survives_other_catalogs_and_batches():
    g = torch.Generator().manual_seed(11)
    tries = [catalog(50_000, 3, 512, seed) for seed in range(3)]
    search = Search.of(tries[0], 64, 3, exclusions=200_000, headroom=1.5)
    assert all(search.table.shapes.refusal(trie) is None for trie in tries)
    logits, norms = map(on_device, random_logits(tries[0], 3, 64, g))
    search.requests.load(random_requests(1, 64, tries[0].num_items, g), tries[0].num_items)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        search.run(logits, norms)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            search.run(logits, norms)
    torch.cuda.current_stream().wait_stream(stream)
    for turn in range(6):
        trie = tries[turn % 3]
        requests = random_requests(1 + turn % 3, 64, trie.num_items, g)
        for values in (*logits, *norms):
            values.copy_(torch.randn(values.shape, generator=g) * 2)
        for level, norm in zip(logits, norms, strict=True):
            norm.copy_(level.logsumexp(-1) + 1)
        search.table.load(trie, checked=True)
        search.requests.load(requests, trie.num_items)
        graph.replay()
        check_steps(search, trie, moved(requests, "cuda"), logits, norms)
        check_answers(search, trie, requests)


@pytest.mark.parametrize("compact", [False, True])
def test_tables_that_hold_no_requests(compact):
    """What an engine runs to compile and to capture before the first batch is there."""
    g = torch.Generator().manual_seed(3)
    trie = catalog(50_000, 3, 2048)
    search = Search.of(trie, 256, 3, exclusions=0)
    logits, norms = map(on_device, random_logits(trie, 3, 256, g))
    search.run(logits, norms, compact=compact)
    check_answers(search, trie, [])
    assert not search.buffers.alive[1:].any()
    assert not search.buffers.poisoned.any()
    for tensor in (search.buffers.codes, search.buffers.ancestors, search.buffers.nodes):
        assert not tensor[1:].any()


def test_equal_runs_are_equal_to_the_bit():
    g = torch.Generator().manual_seed(2)
    trie = catalog(200_000, 3, 2048)
    requests = random_requests(2, 256, trie.num_items, g)
    logits, norms = map(on_device, random_logits(trie, 2, 256, g))
    search = Search.of(trie, 256, 2, exclusions=400_000)
    search.requests.load(requests, trie.num_items)
    search.run(logits, norms)
    first = search.buffers.answers.clone()
    for _ in range(10):
        search.run(logits, norms)
        assert torch.equal(search.buffers.answers, first)


def test_child_logits_in_16_bits():
    g = torch.Generator().manual_seed(4)
    trie = catalog(20_000, 3, 512)
    search = Search.of(trie, 100, 2)
    search.requests.load([SearchRequest((0,), 100, 1)] * 2, trie.num_items)
    logits, norms = map(on_device, random_logits(trie, 2, 100, g))
    search.run(logits, norms)
    assert search.buffers.shapes.levels[2].gathers
    hidden = torch.randn(2, 100, 1000, generator=g).bfloat16().cuda()
    weight = torch.randn(512, 1000, generator=g).bfloat16().cuda() / 30
    bias = torch.randn(512, generator=g).bfloat16().cuda()
    found = child_logits(search.table, search.buffers, 2, hidden, weight, bias, softcap=5.0)
    dense = hidden.double() @ weight.double().T + bias.double()
    dense = (torch.tanh(dense / 5) * 5).float()
    begin_search_(search.buffers, search.requests)
    beam_step_(search.table, search.buffers, search.requests, 2, found, compact=True)
    compact = search.buffers.scores[3].clone()
    begin_search_(search.buffers, search.requests)
    beam_step_(search.table, search.buffers, search.requests, 2, dense)
    torch.testing.assert_close(compact, search.buffers.scores[3], rtol=1e-5, atol=1e-5)


def test_draws_without_replacement_have_the_right_frequencies():
    """Pairs drawn by a beam of 2 at a temperature, against their exact probabilities."""
    ids = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 2], [2, 1]])
    trie = CatalogTrie.from_codes(ids, 3)[0].to("cuda")
    weights = torch.tensor([[0.5, -0.2, 0.9], [0.3, 1.0, -1.0]])
    temperature, batch, rounds = 0.7, 4000, 5
    search = Search.of(trie, 2, batch, exclusions=0)
    logits = [weights[level].expand(batch, 2, 3).contiguous().cuda() for level in range(2)]
    counts: Counter[tuple[int, int]] = Counter()
    for turn in range(rounds):
        requests = [
            SearchRequest((0,), 2, 1, temperature=temperature, seed=turn * batch + i)
            for i in range(batch)
        ]
        search.requests.load(requests, 5)
        begin_search_(search.buffers, search.requests)
        for depth in range(2):
            beam_step_(search.table, search.buffers, search.requests, depth, logits[depth])
        finish_search_(search.table, search.buffers, search.requests)
        leaves = search.buffers.nodes[2].cpu() - trie.level_offsets[-2]
        counts.update(map(tuple, leaves.tolist()))
    heated = weights / temperature
    first = torch.log_softmax(heated[0], 0)
    leaf = []
    for code, children in ((0, [0, 1]), (1, [0, 2]), (2, [1])):
        log_probs = torch.log_softmax(heated[1, children], 0)
        leaf += [math.exp(first[code] + value) for value in log_probs.tolist()]
    total, chi_square, cells = rounds * batch, 0.0, 0
    for a in range(5):
        for b in range(5):
            if a == b:
                assert counts[a, b] == 0
                continue
            expected = total * leaf[a] * leaf[b] / (1 - leaf[a])
            chi_square += (counts[a, b] - expected) ** 2 / expected
            cells += 1
    assert sum(counts.values()) == total
    # 19 degrees of freedom: 43.8 is exceeded once in a thousand; the seeds are fixed.
    assert cells == 20
    assert chi_square < 43.8


def test_twenty_million_items():
    """Nodes, leaves and items past 2**24, where float32 indices would fail; four levels."""
    g = torch.Generator(device="cuda").manual_seed(7)
    ids = torch.randint(8192, (20_000_000, 4), generator=g, device="cuda")
    trie, _ = CatalogTrie.from_codes(ids, 8192)
    del ids
    width = 64
    shapes = StepShapes.of(trie, width)
    assert shapes.levels[3].gathers
    cpu = torch.Generator().manual_seed(8)
    requests = [
        SearchRequest((0,), width, 1, normalization="level"),
        SearchRequest((0,), width, 1, temperature=1.0, seed=5),
    ]
    logits, norms = map(on_device, random_logits(trie, 2, width, cpu))
    # Favour the last codes, so that the last nodes are met.
    for values in logits:
        values += torch.linspace(0, 8, 8192, device="cuda")
    search = Search.of(trie, width, 2)
    search.requests.load(requests, trie.num_items)
    search.run(logits, norms)
    check_steps(search, trie, requests, logits, norms)
    assert int(search.buffers.answers[:, 3 : 3 + width].max()) > 19_000_000
