"""Users and their variants."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.ray.routing import choose_variant

USERS = [f"user-{n}" for n in range(4_000)]

names = st.text(min_size=1, max_size=8)
weights = st.dictionaries(names, st.floats(0.01, 100), min_size=1, max_size=5)


@given(st.text(max_size=20), weights, st.text(max_size=5), st.randoms(use_true_random=False))
def test_a_user_keeps_its_variant_in_whatever_order_they_are_listed(user, given_weights, name, rng):
    entries = list(given_weights.items())
    rng.shuffle(entries)
    first = choose_variant(user, given_weights, name)
    assert choose_variant(user, dict(entries), name) == first
    assert first in given_weights


@given(st.text(max_size=20), weights, st.data())
def test_users_move_to_a_variant_that_grows_and_nowhere_else(user, given_weights, data):
    grown = data.draw(st.sampled_from(sorted(given_weights)))
    before = choose_variant(user, given_weights)
    after = choose_variant(user, {**given_weights, grown: given_weights[grown] * 3})
    assert after in (before, grown)


@given(st.text(max_size=20), weights, st.data())
def test_taking_a_variant_away_moves_its_users_only(user, given_weights, data):
    gone = data.draw(st.sampled_from(sorted(given_weights)))
    rest = {name: weight for name, weight in given_weights.items() if name != gone}
    before = choose_variant(user, given_weights)
    if before != gone:
        assert choose_variant(user, rest) == before
    if rest:
        assert choose_variant(user, {**rest, gone: 0.0}) in rest


def test_shares_are_those_of_the_weights() -> None:
    found = [choose_variant(user, {"a": 90, "b": 9, "c": 1, "off": 0}) for user in USERS]
    for name, share in (("a", 0.9), ("b", 0.09), ("c", 0.01)):
        # Four standard deviations of a sample of so many.
        margin = 4 * (share * (1 - share) / len(USERS)) ** 0.5
        assert abs(found.count(name) / len(USERS) - share) < margin


def test_experiments_divide_users_independently() -> None:
    halves = {"a": 1, "b": 1}
    first = {u for u in USERS if choose_variant(u, halves, "one") == "a"}
    both = {u for u in first if choose_variant(u, halves, "two") == "a"}
    assert 0.42 < len(both) / len(first) < 0.58


def test_users_do_not_depend_on_the_process() -> None:
    """A value that a release must not change: users would move."""
    halves = {"control": 1, "candidate": 1}
    found = "".join(choose_variant(f"user-{n}", halves)[1] for n in range(24))
    assert found == "oaaaaoaooaaaooaoaaaoaaoo"


def test_somebody_must_be_there() -> None:
    with pytest.raises(ValueError, match="above 0"):
        choose_variant("u", {"a": 0})
