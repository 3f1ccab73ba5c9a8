"""The beam step: exact top-W, the three normalizations, filters, stochastic beam search."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rectokens.decoding.beam_step import Beams, BeamStep, StepOptions, beam_step, segment_logsumexp
from rectokens.decoding.filters import BatchFilters, excluded_within
from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.schemas.search import SearchRequest

CPU = torch.device("cpu")


def run(
    trie: CatalogTrie, requests: list[SearchRequest], logits: Tensor, norm: Tensor | None = None
) -> BeamStep:
    """One step from the root: logits (B, 1, K)."""
    return beam_step(
        trie,
        0,
        Beams.root(len(requests), CPU),
        logits,
        StepOptions.from_requests(requests, CPU),
        BatchFilters.from_requests(requests, trie.num_items, CPU),
        norm,
    )


def request(width: int, **options: object) -> SearchRequest:
    return SearchRequest((0,), width, 1, **options)  # type: ignore[arg-type]


def prefix_of(allowed: list[int], num_items: int) -> Tensor:
    mask = torch.zeros(num_items, dtype=torch.int32)
    mask[allowed] = 1
    return torch.cat([torch.zeros(1, dtype=torch.int32), mask.cumsum(0).int()])


ONE_LEVEL, _ = CatalogTrie.from_codes(torch.tensor([[0], [2], [3]]), 5)
LOGITS = torch.tensor([[[1.0, 9.0, 3.0, 2.0, -1.0]]])


def test_children_normalises_over_the_trie_children_only() -> None:
    step = run(ONE_LEVEL, [request(3)], LOGITS)
    expected = torch.log_softmax(torch.tensor([3.0, 2.0, 1.0]), 0)
    assert step.codes.tolist() == [[2, 3, 0]]
    torch.testing.assert_close(step.beams.scores[0], expected)


def test_level_normalises_over_all_codes() -> None:
    step = run(ONE_LEVEL, [request(1, normalization="level")], LOGITS)
    assert step.beams.scores.item() == pytest.approx(float(LOGITS[0, 0].log_softmax(0)[2]))


def test_vocab_normalises_by_the_given_log_norm() -> None:
    step = run(ONE_LEVEL, [request(1, normalization="vocab")], LOGITS, torch.tensor([[10.0]]))
    assert step.beams.scores.item() == pytest.approx(3.0 - 10.0)


def test_vocab_without_a_log_norm_is_an_error() -> None:
    with pytest.raises(ValueError, match="vocab_log_norm is None"):
        run(ONE_LEVEL, [request(1, normalization="vocab")], LOGITS)


def test_a_chain_of_single_children_costs_nothing_under_children() -> None:
    trie, _ = CatalogTrie.from_codes(torch.tensor([[4]]), 5)
    step = run(trie, [request(1)], LOGITS)
    assert step.beams.scores.item() == 0.0


def test_filters_mask_and_never_change_a_score() -> None:
    free = run(ONE_LEVEL, [request(3)], LOGITS)
    filtered = run(ONE_LEVEL, [request(3, excluded_items=torch.tensor([1]))], LOGITS)
    assert filtered.codes[0, :2].tolist() == [3, 0]
    torch.testing.assert_close(filtered.beams.scores[0, :2], free.beams.scores[0, 1:])
    assert filtered.alive.tolist() == [2]
    assert filtered.beams.scores[0, 2] == -torch.inf


def test_excluding_one_of_two_colliding_items_leaves_the_other_reachable() -> None:
    trie, _ = CatalogTrie.from_codes(torch.tensor([[2], [2], [3]]), 5)
    one = run(trie, [request(2, excluded_items=torch.tensor([0]))], LOGITS)
    both = run(trie, [request(2, excluded_items=torch.tensor([0, 1]))], LOGITS)
    assert one.codes[0].tolist() == [2, 3]
    assert both.alive.tolist() == [1]
    assert both.codes[0, 0] == 3


def test_ties_go_to_the_smaller_code() -> None:
    step = run(ONE_LEVEL, [request(2)], torch.zeros(1, 1, 5))
    assert step.codes.tolist() == [[0, 2]]


def test_nan_logits_poison_their_request_only() -> None:
    logits = LOGITS.repeat(3, 1, 1)
    logits[0, 0, 2] = float("nan")
    logits[1, 0, 1] = float("nan")  # not a child: never looked at
    step = run(ONE_LEVEL, [request(2)] * 3, logits)
    assert step.beams.poisoned.tolist() == [True, False, False]
    assert step.codes[1].tolist() == step.codes[2].tolist() == [2, 3]
    assert set(step.codes[0].tolist()) <= {0, 2, 3}


def test_a_request_with_no_live_beam_stays_dead() -> None:
    trie, _ = CatalogTrie.from_codes(torch.tensor([[0, 1], [2, 2]]), 5)
    requests = [request(2, excluded_items=torch.tensor([0, 1])), request(2)]
    first = run(trie, requests, LOGITS.repeat(2, 1, 1))
    second = beam_step(
        trie,
        1,
        first.beams,
        torch.randn(2, 2, 5),
        StepOptions.from_requests(requests, CPU),
        BatchFilters.from_requests(requests, 2, CPU),
    )
    assert first.alive.tolist() == second.alive.tolist() == [0, 2]
    assert torch.isneginf(second.beams.scores[0]).all()


def test_exclusions_outside_the_set_do_not_count_against_it() -> None:
    prefix = prefix_of([1, 2], 4)
    assert excluded_within(torch.tensor([0, 1, 3]), prefix).tolist() == [1]
    # Items 0 and 1 share a leaf, only 1 is in the set and 0 is excluded: 1 must stay.
    trie, _ = CatalogTrie.from_codes(torch.tensor([[2], [2], [3]]), 5)
    wanted = request(2, excluded_items=torch.tensor([0]), allowed_prefix=prefix_of([1], 3))
    assert run(trie, [wanted], LOGITS).codes[0, 0] == 2


def test_a_filter_of_another_catalog_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(5,\); expected \(4,\)"):
        run(ONE_LEVEL, [request(1, allowed_prefix=prefix_of([0], 4))], LOGITS)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_items_left_equals_counting(data: st.DataObject) -> None:
    items = data.draw(st.integers(1, 12))
    index = st.integers(0, items - 1)
    requests, allowed_sets, excluded_sets = [], [], []
    for _ in range(data.draw(st.integers(1, 3))):
        allowed = data.draw(st.none() | st.sets(index))
        listed = data.draw(st.none() | st.sets(index))
        excluded = data.draw(st.sets(index))
        allowed_sets.append(
            (set(range(items)) if allowed is None else allowed)
            & (set(range(items)) if listed is None else listed)
        )
        excluded_sets.append(excluded)
        requests.append(
            request(
                1,
                excluded_items=torch.tensor(sorted(excluded), dtype=torch.long),
                allowed_prefix=None if allowed is None else prefix_of(sorted(allowed), items),
                allowed_items=None if listed is None else torch.tensor(sorted(listed)).long(),
            )
        )
    filters = BatchFilters.from_requests(requests, items, CPU)
    spans = list(itertools.combinations(range(items + 1), 2))
    for row, (allowed, excluded) in enumerate(zip(allowed_sets, excluded_sets, strict=True)):
        left = filters.items_left(
            torch.full((len(spans),), row),
            torch.tensor([lo for lo, _ in spans]),
            torch.tensor([hi for _, hi in spans]),
        )
        assert left.tolist() == [len(allowed & set(range(*span)) - excluded) for span in spans]


def test_segment_logsumexp_survives_empty_and_dead_segments() -> None:
    values = torch.tensor([1000.0, 1000.0, -torch.inf, 0.0])
    found = segment_logsumexp(values, torch.tensor([0, 0, 1, 3]), 4)
    torch.testing.assert_close(
        found, torch.tensor([1000.0 + math.log(2), -torch.inf, -torch.inf, 0.0])
    )


class TestStochasticBeamSearch:
    """Draws without replacement with exactly the right probabilities."""

    codes = torch.tensor([[0, 0], [0, 1], [1, 0], [2, 1], [2, 2]])
    trie, _ = CatalogTrie.from_codes(codes, 3)
    level_logits = (
        torch.tensor([0.5, -0.3, 0.2]),
        torch.tensor([[0.1, 1.0, 0.0], [0.7, 0.2, 0.0], [0.0, -0.5, 0.8]]),
    )

    def draw(self, seeds: range, width: int, temperature: float, **filters: object) -> Tensor:
        """Leaves drawn, in order: (seeds, width), -1 where there is none."""
        requests = [request(width, temperature=temperature, seed=seed, **filters) for seed in seeds]
        options = StepOptions.from_requests(requests, CPU)
        batch = BatchFilters.from_requests(requests, self.trie.num_items, CPU)
        root = Beams.root(len(requests), CPU)
        first = beam_step(
            self.trie, 0, root, self.level_logits[0].expand(len(seeds), 1, 3), options, batch
        )
        second = beam_step(
            self.trie, 1, first.beams, self.level_logits[1][first.codes], options, batch
        )
        leaves = second.beams.nodes - self.trie.level_offsets[-2]
        return torch.where(torch.isfinite(second.beams.scores), leaves, -1)

    def leaf_probabilities(self, temperature: float, allowed: list[int]) -> list[float]:
        codes = [tuple(self.codes[leaf].tolist()) for leaf in allowed]
        first_codes = sorted({first for first, _ in codes})
        level0 = dict(
            zip(
                first_codes,
                (self.level_logits[0][first_codes] / temperature).softmax(0).tolist(),
                strict=True,
            )
        )
        result = []
        for first, second in codes:
            siblings = [b for a, b in codes if a == first]
            level1 = (self.level_logits[1][first][siblings] / temperature).softmax(0)
            result.append(level0[first] * float(level1[siblings.index(second)]))
        return result

    @staticmethod
    def chi_square(
        counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]
    ) -> float:
        total = sum(counts.values())
        assert set(counts) <= set(expected)
        return sum((counts[k] - total * p) ** 2 / (total * p) for k, p in expected.items())

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    @pytest.mark.parametrize("excluded", [[], [0], [3, 4]])
    def test_pairs_have_the_probability_of_sampling_without_replacement(
        self, temperature: float, excluded: list[int]
    ) -> None:
        allowed = [leaf for leaf in range(5) if leaf not in excluded]
        p = dict(zip(allowed, self.leaf_probabilities(temperature, allowed), strict=True))
        expected = {(a, b): p[a] * p[b] / (1 - p[a]) for a, b in itertools.permutations(allowed, 2)}
        drawn = self.draw(range(6000), 2, temperature, excluded_items=torch.tensor(excluded).long())
        counts = Counter(tuple(pair) for pair in drawn.tolist())
        # 99.99th percentile of chi-square with 19 degrees of freedom is 51; seeds are fixed.
        assert self.chi_square(counts, expected) < 51

    def test_scores_are_plain_log_probabilities(self) -> None:
        requests = [request(5, temperature=0.3, seed=1), request(5)]
        batch = BatchFilters.from_requests(requests, 5, CPU)
        options = StepOptions.from_requests(requests, CPU)
        step = beam_step(
            self.trie,
            0,
            Beams.root(2, CPU),
            self.level_logits[0].expand(2, 1, 3),
            options,
            batch,
        )
        noisy, plain = step.codes.tolist(), step.codes[1].tolist()
        expected = self.level_logits[0].log_softmax(0)
        torch.testing.assert_close(step.beams.scores[0, :3], expected[noisy[0][:3]])
        torch.testing.assert_close(step.beams.scores[1, :3], expected[plain[:3]])

    def test_same_seed_same_draw_whatever_the_batch(self) -> None:
        together = self.draw(range(50), 3, 1.0)
        for seed in range(0, 50, 7):
            assert self.draw(range(seed, seed + 1), 3, 1.0)[0].tolist() == together[seed].tolist()

    def test_all_leaves_come_back_once_when_the_beam_holds_them(self) -> None:
        drawn = self.draw(range(20), 8, 1.5)
        for row in drawn.tolist():
            assert sorted(row[:5]) == [0, 1, 2, 3, 4]
            assert row[5:] == [-1, -1, -1]
