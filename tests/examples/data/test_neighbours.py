import numpy as np
import pytest
import torch

from examples.data import neighbours
from examples.data.neighbours import nearest_texts, pairs_by_gap


@pytest.mark.parametrize("reach", [0, 1, 3, 9])
def test_pairs_are_those_of_every_two_places_that_near(reach):
    histories = [[4, 1, 1, 7], [], [2], [0, 3]]
    found = [
        (gap, before, after)
        for gap, earlier, later in pairs_by_gap(histories, reach)
        for before, after in zip(earlier.tolist(), later.tolist(), strict=True)
    ]
    expected = [
        (later - earlier, history[earlier], history[later])
        for history in histories
        for earlier in range(len(history))
        for later in range(earlier + 1, min(earlier + reach, len(history) - 1) + 1)
    ]
    assert sorted(found) == sorted(expected)
    assert all(one.dtype == np.int64 for _, *both in pairs_by_gap(histories, reach) for one in both)


@pytest.mark.parametrize("count", [1, 4, 50])
def test_nearest_texts_are_those_of_a_full_sort_without_oneself(count, monkeypatch):
    monkeypatch.setattr(neighbours, "_ROWS_TOGETHER", 3)
    unit = torch.nn.functional.normalize(torch.randn(10, 6, generator=torch.manual_seed(0)), dim=1)
    rows, cosines, near = (
        torch.cat(part) for part in zip(*nearest_texts(unit, count), strict=True)
    )
    assert rows.tolist() == list(range(10))
    similar = unit @ unit.T
    for row in range(10):
        others = sorted((o for o in range(10) if o != row), key=lambda o: -float(similar[row, o]))
        assert near[row].tolist() == others[:count]
        torch.testing.assert_close(cosines[row], similar[row, others[:count]])


@pytest.mark.parametrize(("items", "count"), [(0, 3), (1, 3), (5, 0)])
def test_nobody_is_near_where_there_is_nobody_or_none_is_wanted(items, count):
    assert list(nearest_texts(torch.ones(items, 2), count)) == []
