"""Sampling: what is drawn how often, and what it is scored."""

import math

import pytest
import torch

from rectokens.decoding.constrained_decoding import autoregressive_generate
from rectokens.schemas.compact_csr_trie import CompactCSRTrie
from rectokens.schemas.config import GenerationConfig
from tests.rectokens.decoding.small_search import (
    ITEMS,
    distinct,
)


@pytest.mark.parametrize("kernel", ["default", "topk", "sample"])
def test_scores_are_log_probabilities_at_the_temperature(
    random_items, recurrent, beam_search, kernel
):
    items = random_items("uniform", 5, 3, 1)
    leaves, trie = distinct(items), CompactCSRTrie.from_sorted_batch(items, 5, 1)
    model, prompts = recurrent(5, 1), torch.tensor([[1, 2]] * 4)
    exact = dict(beam_search(model, [1, 2], leaves, 3, 99, 99, 2.0))
    config = GenerationConfig(3, k=3, beam_size=3, temperature=2.0, csr_kernel=kernel)
    ids, scores = autoregressive_generate(model, trie, prompts, config, "head", return_scores=True)
    for b in range(4):
        found = [tuple(i) for i in ids[b].tolist()]
        assert len(set(found)) == 3
        for sequence, score in zip(found, scores[b].tolist(), strict=True):
            assert score == pytest.approx(exact[sequence], abs=1e-4)


@pytest.mark.parametrize(("kernel", "path"), [("default", None), ("sample", "head")])
def test_one_beam_draws_exactly(markov, beam_search, kernel, path):
    rows, temperature = 20_000, 1.5
    trie = CompactCSRTrie.from_sorted_batch(torch.tensor(ITEMS), 5, 1)
    model = markov(5, 2)
    with torch.no_grad():
        model.head.weight.mul_(0.2)
    exact = beam_search(model, [1], ITEMS, 2, 9, 9, temperature)
    config = GenerationConfig(2, 1, 1, temperature, kernel)
    torch.manual_seed(0)
    ids = autoregressive_generate(model, trie, torch.ones(rows, 1).long(), config, path)[:, 0]
    counts = torch.bincount(ids[:, 0] * 5 + ids[:, 1], minlength=25)
    chi_square = sum(
        (counts[a * 5 + b].item() - rows * math.exp(s)) ** 2 / (rows * math.exp(s))
        for (a, b), s in exact
    )
    assert counts.sum() == sum(counts[a * 5 + b] for a, b in ITEMS)
    assert chi_square < 13.8  # 2 degrees of freedom, p = 0.001


def test_draws_follow_torchs_generator(markov, random_items):
    trie = CompactCSRTrie.from_sorted_batch(random_items("all children", 8, 2, 0), 8, 1)
    model, prompts = markov(8), torch.zeros(20, 1, dtype=torch.long)
    for kernel in ("default", "sample"):
        config = GenerationConfig(2, 1, 1, 5.0, kernel)
        results = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            results.append(autoregressive_generate(model, trie, prompts, config, "head"))
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])
