"""Beam search, against one that enumerates."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectokens.decoding.constrained_decoding import autoregressive_generate
from rectokens.schemas.compact_csr_trie import CompactCSRTrie
from rectokens.schemas.config import GenerationConfig
from tests.rectokens.decoding.small_search import (
    INF,
    TRIE,
    assert_beams,
    distinct,
    run,
)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["uniform", "skewed", "chains", "one item", "all children"]),
    st.integers(2, 5),
    st.integers(1, 4),
    st.integers(0, 10_000),
    st.integers(1, 7),
    st.integers(0, 4),
    st.integers(0, 4),
)
def test_beam_search_equals_the_slow_one(
    random_items, recurrent, beam_search, shape, vocab, levels, seed, k, extra, dense
):
    items = random_items(shape, vocab, levels, seed)
    trie = CompactCSRTrie.from_sorted_batch(items, vocab, dense)
    model = recurrent(vocab, seed)
    steps = 1 + seed % levels
    config = GenerationConfig(steps, k=k, beam_size=k + extra, temperature=0.0)
    prompts = torch.randint(vocab, (2, 3), generator=torch.Generator().manual_seed(seed))
    last = run(model, config, prompts, trie)[-1].generation_state
    for b in range(2):
        slow = beam_search(model, prompts[b].tolist(), distinct(items), steps, k, k + extra)
        assert_beams(last.generated_ids[b], last.log_probas.view(2, k)[b], slow, k)


@pytest.mark.parametrize("kernel", ["default", "topk", "sample"])
@pytest.mark.parametrize("dense", [1, 2])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_enough_beams_find_and_rank_every_item(
    random_items, recurrent, beam_search, kernel, dense, temperature
):
    items = random_items("uniform", 5, 3, 7)
    leaves = distinct(items)
    trie = CompactCSRTrie.from_sorted_batch(items, 5, dense)
    k = len(leaves) + 2
    config = GenerationConfig(3, k, k, temperature, kernel)
    model, prompts = recurrent(5, 3), torch.tensor([[1, 2], [3, 0]])
    for path in ("head", None):
        ids, scores = autoregressive_generate(
            model, trie, prompts, config, attr_path=path, return_scores=True
        )
        for b in range(2):
            slow = beam_search(model, prompts[b].tolist(), leaves, 3, k, k, temperature)
            assert_beams(ids[b], scores[b], slow, k)


@pytest.mark.parametrize("kernel", ["default", "topk", "sample"])
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(0, 3))
def test_at_temperature_0_all_kernels_search_alike(random_items, recurrent, kernel, seed, k, extra):
    trie = CompactCSRTrie.from_sorted_batch(random_items("uniform", 6, 3, seed), 6, 1)
    model = recurrent(6, seed)
    config = GenerationConfig(3, k=k, beam_size=k + extra, temperature=0.0)
    prompts = torch.tensor([[1, 2], [3, 0]])
    plain = autoregressive_generate(model, trie, prompts, config, return_scores=True)
    fused = autoregressive_generate(
        model, trie, prompts, config._replace(csr_kernel=kernel), "head", return_scores=True
    )
    assert torch.equal(plain[0], fused[0])
    torch.testing.assert_close(plain[1], fused[1], atol=1e-5, rtol=1e-5)


def test_a_lone_child_costs_nothing(recurrent):
    trie = CompactCSRTrie.from_sorted_batch(torch.tensor([[3, 1, 2]]), 5, 1)
    config = GenerationConfig(3, temperature=0.0)
    ids, scores = autoregressive_generate(
        recurrent(5), trie, torch.tensor([[0]]), config, return_scores=True
    )
    assert ids.tolist() == [[[3, 1, 2]]]
    assert scores.tolist() == [[0.0]]


def test_a_trie_without_items_gives_dead_beams(recurrent):
    trie = CompactCSRTrie.from_sorted_batch(torch.empty(0, 2, dtype=torch.long), 5, 1)
    config = GenerationConfig(2, k=2, beam_size=2)
    for path in (None, "head"):
        ids, scores = autoregressive_generate(
            recurrent(5), trie, torch.tensor([[0]]), config, path, return_scores=True
        )
        assert ids.tolist() == [[[-1, -1], [-1, -1]]]
        assert (scores == -INF).all()


def test_fan_out_beyond_the_vocabulary_is_clamped(recurrent):
    config = GenerationConfig(2, k=3, beam_size=1000, temperature=0.0)
    wide = autoregressive_generate(recurrent(5), TRIE, torch.tensor([[1]]), config)
    exact = autoregressive_generate(
        recurrent(5), TRIE, torch.tensor([[1]]), config._replace(beam_size=5)
    )
    assert torch.equal(wide, exact)


def test_a_wider_search_returns_the_best_of_more(random_items, recurrent, beam_search):
    items = random_items("uniform", 6, 3, 2)
    trie = CompactCSRTrie.from_sorted_batch(items, 6, 1)
    model, prompt = recurrent(6, 8), torch.tensor([[1, 2]])
    config = GenerationConfig(3, k=2, beam_size=2, temperature=0.0)
    ids, scores = autoregressive_generate(
        model, trie, prompt, config, return_scores=True, search_width=500
    )
    assert_beams(ids[0], scores[0], beam_search(model, [1, 2], distinct(items), 3, 999, 999)[:2], 2)
    with pytest.raises(ValueError, match="search_width is 1; it must be at least k = 2"):
        autoregressive_generate(model, trie, prompt, config, search_width=1)


def test_fewer_steps_give_prefixes(random_items, recurrent):
    items = random_items("uniform", 6, 4, 5)
    trie = CompactCSRTrie.from_sorted_batch(items, 6, 2)
    ids = autoregressive_generate(
        recurrent(6), trie, torch.tensor([[1]]), GenerationConfig(2, 3, 3, 0.0)
    )
    assert ids.shape == (1, 3, 2)
    assert {tuple(i) for i in ids[0].tolist()} <= {i[:2] for i in distinct(items)}
