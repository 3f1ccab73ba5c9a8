"""The search on static buffers, in plain PyTorch: equal to the definition, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.decoding.device_beams import BeamBuffers, unpack_answers
from rectokens.decoding.device_requests import RequestTables
from rectokens.decoding.device_tables import StepShapes, TrieTable
from rectokens.ops.beam_step import beam_step_, begin_search_, child_logits
from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.search import SearchRequest
from tests.rectokens.ops.beam_cases import (
    TRIES,
    Search,
    check_answers,
    check_steps,
    near,
    prefix_of,
    random_logits,
    random_requests,
    random_trie,
)


@given(
    kind=st.sampled_from(TRIES),
    levels=st.integers(1, 4),
    codes=st.integers(1, 12),
    width=st.integers(1, 20),
    batch=st.integers(1, 4),
    spare=st.integers(0, 2),
    ties=st.booleans(),
    compact=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_equal_to_the_definition(
    kind, levels, codes, width, batch, spare, ties, compact, seed
) -> None:
    g = torch.Generator().manual_seed(seed)
    trie = random_trie(kind, levels, codes, g)
    requests = random_requests(batch, width, trie.num_items, g)
    logits, norms = random_logits(trie, batch + spare, width, g, ties=ties)
    search = Search.of(trie, width, batch + spare)
    search.requests.load(requests, trie.num_items)
    search.run(logits, norms, compact=compact)
    check_steps(search, trie, requests, logits, norms)
    check_answers(search, trie, requests)


def test_another_catalog_in_the_same_table() -> None:
    g = torch.Generator().manual_seed(1)
    first, second = (random_trie("random", 3, 16, g) for _ in range(2))
    search = Search.of(first, 8, 2, headroom=4.0)
    logits, norms = random_logits(first, 2, 8, g)
    for trie in (first, second, first):
        search.table.load(trie)
        requests = random_requests(2, 8, trie.num_items, g)
        search.requests.load(requests, trie.num_items)
        search.run(logits, norms)
        check_steps(search, trie, requests, logits, norms)
        check_answers(search, trie, requests)


def test_nan_poisons_its_request_until_the_next_search() -> None:
    trie, _ = CatalogTrie.from_codes(torch.tensor([[0, 1], [2, 2], [3, 1]]), 5)
    search = Search.of(trie, 2, 2)
    requests = [SearchRequest((0,), 2, 1)] * 2
    search.requests.load(requests, trie.num_items)
    logits, norms = random_logits(trie, 2, 2, torch.Generator().manual_seed(0))
    logits[0][0, 0, 2] = torch.nan
    logits[0][1, 0, 1] = torch.nan  # no child: never looked at
    search.run(logits, norms)
    check_steps(search, trie, requests, logits, norms)
    answers = unpack_answers(search.buffers.answers, search.buffers.shapes)
    assert answers.poisoned.tolist() == [1, 0]
    logits[0][0, 0, 2] = 0.0
    search.run(logits, norms)
    assert search.buffers.poisoned.tolist() == [0, 0]


def test_child_logits_are_the_heads() -> None:
    g = torch.Generator().manual_seed(3)
    trie = random_trie("random", 3, 9, g)
    search = Search.of(trie, 5, 2)
    requests = random_requests(2, 5, trie.num_items, g, filtered=0.0)
    search.requests.load(requests, trie.num_items)
    logits, norms = random_logits(trie, 2, 5, g)
    search.run(logits, norms)
    hidden, weight = torch.randn(2, 5, 7, generator=g), torch.randn(9, 7, generator=g)
    bias = torch.randn(9, generator=g)
    found = child_logits(
        search.table, search.buffers, 2, hidden, weight, bias, factor=0.5, softcap=3.0
    )
    dense = torch.tanh((hidden @ weight.T + bias) * 0.5 / 3.0) * 3.0
    for row in range(2):
        for beam in range(5):
            node = int(search.buffers.nodes[2, row, beam])
            codes = trie.edge_codes(
                torch.arange(int(trie.row_ptrs[node]), int(trie.row_ptrs[node + 1]))
            )
            if torch.isneginf(search.buffers.scores[2, row, beam]):
                codes = codes[:0]
            near(found[row, beam, : len(codes)], dense[row, beam, codes])
            assert torch.isneginf(found[row, beam, len(codes) :]).all()


def test_a_catalog_that_outgrows_the_shapes_is_noticed() -> None:
    codes = 64
    small, _ = CatalogTrie.from_codes(torch.arange(8)[:, None].repeat(1, 2), codes)
    shapes = StepShapes.of(small, 4)
    table = TrieTable(small, shapes)
    assert shapes.refusal(small) is None
    wide, _ = CatalogTrie.from_codes(torch.arange(codes)[:, None].repeat(1, 2), codes)
    assert "depth 0 has 64 children" in str(shapes.refusal(wide))
    with pytest.raises(ValueError, match="depth 0 has 64 children; the shapes are for at most 16"):
        table.load(wide)
    bushy = torch.cartesian_prod(torch.arange(8), torch.arange(9))
    with pytest.raises(ValueError, match="4 nodes of depth 1 have up to 36 children together"):
        table.load(CatalogTrie.from_codes(bushy, codes)[0])
    with pytest.raises(ValueError, match="3 levels of 64 codes; the shapes are for 2 of 64"):
        table.load(CatalogTrie.from_codes(torch.arange(8)[:, None].repeat(1, 3), codes)[0])
    assert table.trie is small


def test_few_children_are_gathered_and_many_are_not() -> None:
    ids = torch.cat([torch.arange(600)[:, None], torch.arange(600)[:, None] % 7], 1)
    trie, _ = CatalogTrie.from_codes(ids, 1024)
    assert [level.gathers for level in StepShapes.of(trie, 16).levels] == [False, True]


def test_refused_sizes() -> None:
    trie, _ = CatalogTrie.from_codes(torch.arange(4)[:, None], 4)
    with pytest.raises(ValueError, match="width is 9000"):
        StepShapes.of(trie, 9000)
    with pytest.raises(ValueError, match=r"headroom is 0\.5"):
        StepShapes.of(trie, 2, 0.5)
    shapes = StepShapes.of(trie, 2)
    with pytest.raises(ValueError, match="batch is 0"):
        BeamBuffers(0, shapes, "cpu")
    with pytest.raises(ValueError, match="batch is 0"):
        RequestTables(0, 4, "cpu")


def test_refused_batches() -> None:
    tables = RequestTables(1, 2, "cpu")
    ask = SearchRequest((0,), 1, 1)
    with pytest.raises(ValueError, match="2 requests; at most 1 fit"):
        tables.load([ask, ask], 10)
    with pytest.raises(ValueError, match="list 3 items or more to exclude or allow; at most 2 fit"):
        tables.load([SearchRequest((0,), 1, 1, excluded_items=torch.arange(3))], 10)
    with pytest.raises(ValueError, match="allowed_items span 3 to 2 and must be ascending"):
        tables.load([SearchRequest((0,), 1, 1, allowed_items=torch.tensor([3, 2]))], 10)
    with pytest.raises(ValueError, match="within 0 to 9"):
        tables.load([SearchRequest((0,), 1, 1, excluded_items=torch.tensor([3, 10]))], 10)
    with pytest.raises(ValueError, match=r"expected torch.int32 \(11,\)"):
        tables.load([SearchRequest((0,), 1, 1, allowed_prefix=prefix_of(torch.ones(9)))], 10)


def test_refused_steps() -> None:
    trie, _ = CatalogTrie.from_codes(torch.arange(4)[:, None], 4)
    search = Search.of(trie, 2, 1)
    step = (search.table, search.buffers, search.requests)
    with pytest.raises(ValueError, match="depth is 1; allowed are 0 to 0"):
        beam_step_(*step, 1, torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match=r"logits is torch.float32 \(1, 2, 5\)"):
        beam_step_(*step, 0, torch.zeros(1, 2, 5))
    with pytest.raises(ValueError, match=r"logits is torch\.int64"):
        beam_step_(*step, 0, torch.zeros(1, 2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="stride 2 in its last dimension"):
        beam_step_(*step, 0, torch.zeros(1, 4, 2).transpose(1, 2))
    with pytest.raises(ValueError, match="vocab_log_norm"):
        beam_step_(*step, 0, torch.zeros(1, 2, 4), vocab_log_norm=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="hidden"):
        child_logits(search.table, search.buffers, 0, torch.zeros(1, 2, 3), torch.zeros(4, 5))
    with pytest.raises(ValueError, match="batches of 3"):
        begin_search_(search.buffers, RequestTables(3, 1, "cpu"))
    other = StepShapes.of(trie, 1)
    with pytest.raises(ValueError, match="other shapes"):
        beam_step_(TrieTable(trie, other), *step[1:], 0, torch.zeros(1, 2, 4))
