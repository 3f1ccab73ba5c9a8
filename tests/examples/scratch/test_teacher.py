"""The count model against counting one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.scratch.settings import TeacherSettings
from examples.scratch.teacher import Teacher
from examples.scratch.windows import PADDING

CPU = torch.device("cpu")
ITEMS = 8
SEQUENCES = st.lists(
    st.permutations(range(ITEMS)).flatmap(
        lambda order: st.integers(1, ITEMS).map(lambda size: list(order[:size]))
    ),
    min_size=1,
    max_size=8,
)


def expected(train, context, settings, left_out=None):
    """Guesses for what follows a context, as its definition says."""
    links = {}
    for history in train:
        for place, item in enumerate(history):
            for gap in range(1, min(settings.reach, place) + 1):
                pair = (history[place - gap], item)
                links[pair] = links.get(pair, 0.0) + 1 / gap
    guesses = dict.fromkeys(range(ITEMS), 0.0)
    for gap, before in enumerate(reversed(context[-settings.reach :]), start=1):
        for item in range(ITEMS):
            weight = links.get((before, item), 0.0)
            if item == left_out:
                weight = max(weight - 1 / gap, 0.0)
            if item not in context:
                guesses[item] += weight * 0.5 ** (gap - 1)
    return guesses


@settings(deadline=None, max_examples=60)
@given(SEQUENCES, st.integers(1, 4), st.booleans())
def test_guesses_are_those_of_the_definition(train, reach, leave_out):
    how = TeacherSettings(weight=0.5, reach=reach, leave_own_out=leave_out)
    teacher = Teacher.of(train, ITEMS, how, CPU)
    width = max(map(len, train))
    windows = torch.tensor([one + [PADDING] * (width - len(one)) for one in train])
    items, weights = teacher.guesses(windows)
    for row, history in enumerate(train):
        for place, item in enumerate(history):
            found = dict.fromkeys(range(ITEMS), 0.0)
            for to, weight in zip(items[row, place], weights[row, place], strict=True):
                found[int(to)] += float(weight)
            wanted = expected(train, history[:place], how, item if leave_out else None)
            assert found == pytest.approx(wanted, abs=1e-3)
        assert not weights[row, len(history) :].any()


def test_only_the_heaviest_links_are_kept():
    train = [[0, 1], [0, 1], [0, 2], [0, 2], [0, 2], [0, 3]]
    teacher = Teacher.of(train, ITEMS, TeacherSettings(weight=1, neighbours=2), CPU)
    assert teacher.items[0].tolist() == [2, 1]
    assert teacher.weights[0].tolist() == [3.0, 2.0]


def test_resampled_windows_end_at_guesses():
    train = [[0, 1, 2], [0, 1, 3], [4, 5]]
    how = TeacherSettings(sampled=1.0, leave_own_out=False)
    teacher = Teacher.of(train, ITEMS, how, CPU)
    windows = torch.tensor([[0, 1, 2], [4, 5, PADDING], [7, 6, PADDING], [1, PADDING, PADDING]])
    ends = set()
    for seed in range(60):
        found = teacher.resample(windows, torch.Generator().manual_seed(seed)).tolist()
        ends.add(tuple(found[0]))
        assert found[1] == [4, 5, PADDING]  # the one guess
        assert found[2] == [7, 6, PADDING]  # there is none
        assert found[3] == [1, PADDING, PADDING]  # nothing to guess from
    # After 0: 1 (twice 1), 2 and 3 (1/2 each). After 0, 1: 2 and 3 alone.
    assert ends == {(0, 1, PADDING), (0, 2, PADDING), (0, 3, PADDING), (0, 1, 2), (0, 1, 3)}


def test_resampling_draws_by_weight():
    train = [[0, 1]] * 3 + [[0, 2]]
    teacher = Teacher.of(train, ITEMS, TeacherSettings(sampled=1.0, leave_own_out=False), CPU)
    windows = torch.tensor([[0, 5]]).repeat(4000, 1)
    found = teacher.resample(windows, torch.Generator().manual_seed(0))
    assert float((found[:, 1] == 1).float().mean()) == pytest.approx(0.75, abs=0.03)
