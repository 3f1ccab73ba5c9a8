"""Baselines against slow, obvious ones, and against published figures on real data."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.data.amazon import AmazonReviews
from examples.evaluation.baselines import (
    cosine_links,
    linked_scorer,
    markov_links,
    popularity_scorer,
    rank_figures,
    target_ranks,
    text_scorer,
)
from server.demo.data import HeldOut, item_counts

ITEMS = 7
histories = st.lists(
    st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=6), min_size=1, max_size=6
)


def dense(links):
    matrix = np.zeros((links.num_items, links.num_items))
    for row in range(links.num_items):
        for at in range(links.starts[row], links.starts[row + 1]):
            assert matrix[row, links.items[at]] == 0.0
            matrix[row, links.items[at]] = links.weights[at]
    return matrix


@settings(max_examples=60, deadline=None)
@given(histories, st.integers(1, 4))
def test_markov_links_are_weighted_counts_of_pairs(train, reach):
    wanted = np.zeros((ITEMS, ITEMS))
    for history in train:
        for at, one in enumerate(history):
            for gap in range(1, reach + 1):
                if at + gap < len(history):
                    wanted[one, history[at + gap]] += 1 / gap
    np.testing.assert_allclose(dense(markov_links(train, ITEMS, reach)), wanted)


@settings(max_examples=60, deadline=None)
@given(histories)
def test_cosine_links_are_cosines_of_user_sets(train):
    users = [{u for u, history in enumerate(train) if item in history} for item in range(ITEMS)]
    wanted = np.zeros((ITEMS, ITEMS))
    for one in range(ITEMS):
        for other in range(ITEMS):
            if one != other and users[one] and users[other]:
                both = len(users[one] & users[other])
                wanted[one, other] = both / math.sqrt(len(users[one]) * len(users[other]))
    np.testing.assert_allclose(dense(cosine_links(train, ITEMS)), wanted)


@settings(max_examples=60, deadline=None)
@given(histories, histories)
def test_linked_scores_add_up_links_by_age(train, asked):
    matrix = dense(markov_links(train, ITEMS, 3))
    scores = linked_scorer(markov_links(train, ITEMS, 3), lambda age: 0.5**age if age < 3 else 0.0)(
        asked
    )
    for row, history in enumerate(asked):
        wanted = sum(0.5**age * matrix[item] for age, item in enumerate(history[::-1][:3]))
        np.testing.assert_allclose(scores[row], wanted, atol=1e-12)


def test_equal_scores_are_ordered_by_the_tie_break_and_others_are_not():
    train = [[0, 1], [0, 2], [3, 2], [4, 2], [0, 5], [0, 5]]
    counts = item_counts(train, ITEMS)
    scores = linked_scorer(markov_links(train, ITEMS), lambda age: float(age == 0), counts)([[0]])
    assert np.argsort(-scores[0])[:3].tolist() == [5, 2, 1]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 2), min_size=ITEMS, max_size=ITEMS),
    st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=4),
    st.integers(0, ITEMS - 1),
)
def test_ranks_are_means_over_shared_places(scores, history, target):
    table = np.array([scores], dtype=float)
    ranks = target_ranks(lambda asked: table, [HeldOut(tuple(history), target)])
    for found, left_out in (
        (ranks.all_items, set()),
        (ranks.history_left_out, set(history) - {target}),
    ):
        rest = sorted((scores[i] for i in range(ITEMS) if i not in left_out), reverse=True)
        places = [at + 1 for at, score in enumerate(rest) if score == scores[target]]
        assert found.tolist() == [sum(places) / len(places)]


def test_figures_of_ranks():
    figures = rank_figures(np.array([1.0, 5.5, 6.0, 11.0]), ks=(5, 10))
    assert figures["recall@5"] == 0.5
    assert figures["recall@10"] == 0.75
    assert figures["ndcg@5"] == pytest.approx((1 + 1 / math.log2(6.5)) / 4)
    with pytest.raises(ValueError, match="no ranks"):
        rank_figures(np.array([]))


def test_text_neighbours_are_by_cosine():
    vectors = np.array([[1.0, 0.0], [5.0, 0.5], [0.0, 1.0]], dtype=np.float32)
    assert np.argsort(-text_scorer(vectors)([[2, 0]])[0]).tolist() == [0, 1, 2]
    assert text_scorer(vectors, last=2)([[2, 0]])[0].argmax() == 1


def test_popularity_does_not_look_at_the_history():
    scores = popularity_scorer([[0, 1], [1]], 3)([[2], [0, 1]])
    assert scores.tolist() == [[1, 2, 0], [1, 2, 0]]


def test_published_figures_of_the_skip_markov_model_on_real_data():
    root = os.environ.get("RECTOKENS_DATA_DIR")
    if not root:
        pytest.skip("RECTOKENS_DATA_DIR is not set: no folder with amazon-beauty to read")
    reviews = AmazonReviews(root, download=False)
    train = reviews.leave_one_out.train
    scorer = linked_scorer(
        markov_links(train, reviews.num_items, reach=3),
        lambda age: 0.5**age if age < 3 else 0.0,
        item_counts(train, reviews.num_items),
    )
    ranks = target_ranks(scorer, reviews.leave_one_out.test)
    left_out = tuple(rank_figures(ranks.history_left_out).values())
    assert left_out == pytest.approx((0.0594, 0.0441, 0.0807, 0.0510), abs=6e-5)
    everything = tuple(rank_figures(ranks.all_items).values())
    assert everything == pytest.approx((0.0569, 0.0412, 0.0785, 0.0481), abs=6e-5)
