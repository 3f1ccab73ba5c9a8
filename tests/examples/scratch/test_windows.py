"""Training windows against what they are made of."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.scratch.settings import AugmentationSettings
from examples.scratch.stream import WindowStream
from examples.scratch.windows import PADDING, Histories, batches, epoch_windows

CPU = torch.device("cpu")

# Histories whose items are all different, so that a window tells where it is from.
HISTORIES = st.lists(st.integers(1, 30), min_size=1, max_size=8).map(
    lambda lengths: [
        list(range(100 * user, 100 * user + length)) for user, length in enumerate(lengths)
    ]
)


def epoch(sequences, how, window, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return epoch_windows(Histories.of(sequences, CPU), how, window, generator)


def unpadded(row):
    items = [item for item in row.tolist() if item != PADDING]
    assert row.tolist() == items + [PADDING] * (len(row) - len(items))
    return items


@settings(deadline=None, max_examples=60)
@given(HISTORIES, st.integers(2, 12), st.integers(0, 5), st.floats(0, 1))
def test_windows_are_stretches_of_histories(sequences, window, seed, crop):
    how = AugmentationSettings(crop=crop, thin=0, shuffle=0)
    rows = [unpadded(row) for row in epoch(sequences, how, window, seed)]
    expected = [-(-len(one) // window) for one in sequences]
    assert len(rows) == sum(expected)
    for items in rows:
        whole = sequences[items[0] // 100]
        first = whole.index(items[0])
        assert items == whole[first : first + len(items)]
        assert len(items) == window or items[-1] == whole[-1]
        assert len(items) >= min(2, len(whole))


@settings(deadline=None, max_examples=60)
@given(HISTORIES, st.integers(2, 12), st.integers(0, 5))
def test_changed_windows_hold_items_of_one_history_once(sequences, window, seed):
    how = AugmentationSettings(thin=1.0, thin_rate=0.5, shuffle=1.0, shuffle_span=3.0, reverse=0.5)
    for row in epoch(sequences, how, window, seed):
        items = unpadded(row)
        assert items
        assert len({item // 100 for item in items}) == 1
        assert len(set(items)) == len(items)


def test_shuffling_moves_no_item_further_than_told():
    how = AugmentationSettings(crop=0, shuffle=1.0, shuffle_span=2.0)
    (row,) = epoch([list(range(20))], how, 20)
    assert row.tolist() != list(range(20))
    assert max(abs(place - item) for place, item in enumerate(row.tolist())) <= 2


def test_reversing_turns_windows_around():
    how = AugmentationSettings(crop=0, reverse=1.0)
    (row,) = epoch([[4, 7, 9]], how, 5)
    assert row.tolist() == [9, 7, 4, PADDING, PADDING]


@settings(deadline=None, max_examples=40)
@given(HISTORIES, st.integers(1, 5), st.integers(0, 3))
def test_batches_hold_every_window_once_without_needless_padding(sequences, size, seed):
    windows = epoch(sequences, AugmentationSettings(), 12, seed)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for batch in batches(windows, size, generator):
        assert len(batch) <= size
        assert bool((batch[:, -1] != PADDING).any())
        found += [tuple(unpadded(row)) for row in batch]
    assert sorted(found) == sorted(tuple(unpadded(row)) for row in windows)


@pytest.mark.parametrize("start", [0, 1, 3, 8, 17])
def test_a_stream_from_a_step_is_the_rest_of_the_whole(start):
    sequences = [list(range(user, user + 3 + user % 9)) for user in range(40)]
    how = AugmentationSettings(thin_rate=0.3, shuffle_span=1.0)
    stream = WindowStream(Histories.of(sequences, CPU), how, 8, 8, 3)
    whole = list(itertools.islice(stream.from_step(0), 24))
    rest = list(itertools.islice(stream.from_step(start), 24 - start))
    assert all(a.equal(b) for a, b in zip(whole[start:], rest, strict=True))
    assert not all(
        a.equal(b) for a, b in zip(whole[: stream.steps_per_epoch], whole[-8:], strict=False)
    )


@pytest.mark.parametrize("bad", [[], [[1], []]])
def test_histories_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="at least one history"):
        Histories.of(bad, CPU)
