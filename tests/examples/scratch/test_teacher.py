"""The count model against counting one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.scratch.settings import TeacherSettings
from examples.scratch.teacher import NO_TARGET, Teacher
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
TEXTS = np.random.default_rng(0).normal(size=(ITEMS, 3)).astype(np.float32)


def weights_by_definition(train, texts, how):
    table = np.zeros((ITEMS, ITEMS))
    for history in train:
        for place, item in enumerate(history):
            for gap in range(1, min(how.reach, place) + 1):
                table[history[place - gap], item] += how.gap_decay ** (gap - 1)
    unit = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    for item in range(ITEMS):
        cosine = unit @ unit[item]
        near = sorted((other for other in range(ITEMS) if other != item), key=lambda o: -cosine[o])
        raised = {o: max(cosine[o], 0) ** how.text_power for o in near[: how.text_neighbours]}
        for other, value in raised.items():
            table[item, other] += how.text_weight * value / max(sum(raised.values()), 1e-12)
    return table


def dense(teacher):
    table = np.zeros((ITEMS, ITEMS))
    firsts, sums = teacher.firsts.tolist(), teacher.sums.tolist()
    for item in range(ITEMS):
        for at in range(firsts[item], firsts[item + 1]):
            table[item, int(teacher.items[at])] += sums[at + 1] - sums[at]
    return table


@settings(deadline=None, max_examples=50)
@given(SEQUENCES, st.integers(1, 4), st.sampled_from([0.0, 2.0]))
def test_weights_are_those_of_the_definition(train, reach, text_weight):
    how = TeacherSettings(weight=1, reach=reach, text_weight=text_weight, text_neighbours=3)
    teacher = Teacher.of(train, TEXTS, how, CPU)
    wanted = weights_by_definition(train, TEXTS, how)
    assert dense(teacher) == pytest.approx(wanted, abs=1e-5)
    assert teacher.mass.numpy() == pytest.approx(wanted.sum(axis=1), abs=1e-5)


def test_draws_follow_the_weights_and_leave_the_context_out():
    train = [[0, 1, 2], [0, 1, 3], [0, 4], [1, 0]]
    how = TeacherSettings(weight=1, text_weight=1.0, decay=0.5)
    teacher = Teacher.of(train, TEXTS, how, CPU)
    table = weights_by_definition(train, TEXTS, how)
    torch.manual_seed(0)
    context = [5, 0, 1]
    windows = torch.tensor([[*context, PADDING]]).repeat(20_000, 1)
    drawn = teacher.targets(windows)
    assert (drawn[:, 3] == NO_TARGET).all()
    for place in range(3):
        expected = sum(
            0.5**age * table[item] for age, item in enumerate(reversed(context[: place + 1]))
        )
        shares = expected / expected.sum()
        known = context[: place + 1]
        found = np.bincount(drawn[:, place] + 1, minlength=ITEMS + 1) / len(drawn)
        assert found[0] == pytest.approx(shares[known].sum(), abs=0.02)
        assert found[1:][known].tolist() == [0.0] * len(known)
        rest = [item for item in range(ITEMS) if item not in known]
        assert found[1:][rest] == pytest.approx(shares[rest], abs=0.02)


def test_nothing_is_drawn_where_nothing_is_known():
    teacher = Teacher.of([[0, 1]], TEXTS, TeacherSettings(weight=1, text_weight=0), CPU)
    drawn = teacher.targets(torch.tensor([[5, 6], [0, PADDING]]))
    assert drawn.tolist() == [[NO_TARGET, NO_TARGET], [1, NO_TARGET]]
