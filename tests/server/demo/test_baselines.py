"""Ranks and figures against the slow and obvious way."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.demo.amazon import load_amazon
from server.demo.baselines import figures_of_ranks, popularity_ranks
from server.demo.data import HeldOut, item_counts, leave_one_out


@st.composite
def questions(draw):
    counts = draw(st.lists(st.integers(0, 4), min_size=1, max_size=12))
    rows = st.integers(0, len(counts) - 1)
    return HeldOut(tuple(draw(st.lists(rows, max_size=6))), draw(rows)), np.array(counts)


@given(questions())
def test_popularity_ranks_are_mean_ranks_over_all_orders_of_ties(case):
    question, counts = case
    left = [
        row for row in range(len(counts)) if row == question.target or row not in question.history
    ]
    better = [row for row in left if counts[row] > counts[question.target]]
    equal = [row for row in left if counts[row] == counts[question.target]]
    places = range(len(better) + 1, len(better) + len(equal) + 1)
    assert popularity_ranks([question], counts) == [math.floor(np.mean(places))]


def test_figures():
    figures = figures_of_ranks([1, 3, None, 11], 10)
    assert figures.recall == 0.5
    assert figures.ndcg == pytest.approx((1 / math.log2(2) + 1 / math.log2(4)) / 4)
    assert (figures.users, figures.k) == (4, 10)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="k is 0"):
        figures_of_ranks([1], 0)
    with pytest.raises(ValueError, match="no ranks"):
        figures_of_ranks([], 10)


def test_popularity_on_the_real_data_has_its_known_figures():
    root = os.environ.get("RECTOKENS_DATA_DIR")
    if not root:
        pytest.skip("RECTOKENS_DATA_DIR is not set: no folder with amazon-beauty to read")
    data = load_amazon(Path(root))
    split = leave_one_out(data.sequences)
    counts = item_counts(split.train, len(data.item_ids))
    figures = figures_of_ranks(popularity_ranks(split.test, counts), 10)
    assert (round(figures.recall, 4), round(figures.ndcg, 4)) == (0.0120, 0.0056)
