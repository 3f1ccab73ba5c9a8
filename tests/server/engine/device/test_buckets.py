"""How a batch is shared out among captured shapes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.device.buckets import Buckets, Group, group_requests

BUCKETS = Buckets((1, 2, 4), (64, 256), 512)


@given(
    st.lists(st.integers(1, 700), min_size=1, max_size=20),
    st.lists(st.integers(1, 9), min_size=1, unique=True).map(sorted),
    st.lists(st.integers(1, 600), unique=True).map(sorted),
    st.integers(1, 2_000),
)
def test_everyone_is_searched_once_with_room_enough(widths, requests, beam_widths, max_rows):
    buckets = Buckets(tuple(requests), tuple(beam_widths), max_rows)
    groups = group_requests(widths, buckets, 8_192)
    members = [member for group in groups for member in group.members]
    assert sorted(members) == list(range(len(widths)))
    for group in groups:
        assert 0 < len(group.members) <= group.batch
        assert all(widths[member] <= group.width for member in group.members)
        assert group.captured == ((group.batch, group.width) in buckets.shapes())
        assert group.batch == 1 or group.batch * group.width <= max_rows


def test_like_widths_share_a_search():
    assert group_requests([64, 10, 64], BUCKETS, 8_192) == [Group((0, 2, 1), 4, 64, True)]


def test_free_places_are_given_to_narrower_requests():
    widths = [50, 256, 50]
    assert group_requests(widths, BUCKETS, 8_192) == [
        Group((1,), 1, 256, True),
        Group((0, 2), 2, 64, True),
    ]
    assert group_requests([256, 50, 256, 256], BUCKETS, 8_192) == [
        Group((0, 2), 2, 256, True),
        Group((3,), 1, 256, True),
        Group((1,), 1, 64, True),
    ]
    assert group_requests([200, 50, 200], Buckets((4,), (64, 256), 2_048), 8_192) == [
        Group((0, 2, 1), 4, 256, True)
    ]


@pytest.mark.parametrize(
    ("requests", "width", "expected"),
    [
        (3, 256, [4]),
        (5, 256, [4, 1]),
        (7, 256, [8]),
        (9, 256, [8, 1]),
        (12, 256, [8, 4]),
        (32, 256, [16, 16]),
        # Steps of few rows take as long as reading the weights.
        (5, 64, [8]),
        (9, 16, [16]),
    ],
)
def test_few_places_stay_empty(requests: int, width: int, expected: list[int]) -> None:
    buckets = Buckets((1, 2, 4, 8, 16, 32), (16, 64, 256), 4_096)
    groups = group_requests([width] * requests, buckets, 8_192)
    assert [group.batch for group in groups] == expected


def test_what_is_wider_than_all_buckets_is_searched_uncaptured():
    assert group_requests([5_000, 8_100, 3], BUCKETS, 8_192) == [
        Group((1,), 1, 8_192, False),
        Group((0,), 1, 5_120, False),
        Group((2,), 1, 64, True),
    ]


@pytest.mark.parametrize("values", [(2, 1), (0, 1), (1, 1)])
def test_bad_buckets_are_refused(values):
    with pytest.raises(ValueError, match="must be distinct, ascending, positive"):
        Buckets(requests=values)
