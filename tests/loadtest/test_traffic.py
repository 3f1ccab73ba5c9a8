"""Visitors: what they ask, that they come back with more, and which answers they refuse."""

from __future__ import annotations

import random
import statistics
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.arrivals import Arrivals
from loadtest.traffic import BATCH, RECOMMEND, SCORE, Traffic, Visit, what_is_wrong

ITEMS = [f"item-{row}" for row in range(500)]


def walk(traffic: Traffic, visits: int) -> list[Visit]:
    made = []
    for _ in range(visits):
        visit = traffic.visit()
        made.append(visit)
        traffic.answered(visit, ITEMS[:10])
    return made


def test_it_looks_like_traffic():
    made = walk(Traffic(ITEMS, ["even"], seed=1), 4_000)
    paths = Counter(visit.path for visit in made)
    assert paths[RECOMMEND] > 10 * paths[SCORE] > 0
    assert paths[BATCH] > 0
    bodies = [visit.body for visit in made if visit.path == RECOMMEND]
    top_k = Counter(body["top_k"] for body in bodies)
    assert set(top_k) == {10, 20, 50, 100}
    assert top_k[10] > len(bodies) / 2
    lengths = [len(body["history"]) for body in bodies]
    assert min(lengths) < 3 < statistics.median(lengths) < 40 < max(lengths)
    for field, share in {
        "exclude_items": 0.2,
        "constraint_set": 0.15,
        "allow_items": 0.0425,
    }.items():
        assert sum(field in body for body in bodies) / len(bodies) == pytest.approx(share, abs=0.03)
    asked = Counter(item for body in bodies for item in body["history"])
    assert asked["item-0"] > 10 * asked["item-400"] > 0
    assert set(asked) <= set(ITEMS)


def test_who_comes_back_has_a_longer_history_that_begins_as_before():
    known: dict[int, list[str]] = {}
    returned = 0
    traffic = Traffic(ITEMS, seed=2)
    for _ in range(1_000):
        visit = traffic.visit()
        traffic.answered(visit, ["recommended"])
        if visit.visitor is None or visit.path != RECOMMEND:
            continue
        before = known.get(id(visit.visitor))
        if before is not None:
            returned += 1
            assert visit.body["history"][: len(before)] == before
            assert len(visit.body["history"]) > len(before)
        # Kept alive, so that no other one gets its id.
        known[id(visit.visitor)] = visit.body["history"]
        known.setdefault(-id(visit.visitor), visit.visitor)
    assert returned > 300


def test_the_same_seed_asks_the_same():
    first, second, other = (walk(Traffic(ITEMS, seed=seed), 50) for seed in (3, 3, 4))
    assert [visit.body for visit in first] == [visit.body for visit in second]
    assert [visit.body for visit in first] != [visit.body for visit in other]


def test_limits_of_the_server_and_of_memory():
    traffic = Traffic(ITEMS[:1], max_top_k=5, max_visitors=3, timeout_ms=70)
    made = walk(traffic, 200)
    assert {v.body["top_k"] for v in made if v.path == RECOMMEND} == {1}
    assert {v.body.get("timeout_ms") for v in made if v.path != BATCH} == {70}
    assert len(traffic._away) <= 3
    with pytest.raises(ValueError, match="no items"):
        Traffic([])


def visit(path: str = RECOMMEND, **body) -> Visit:
    return Visit(path, {"history": ["a"], "top_k": 2, **body}, None)


def answer(*items: str, shortfall=None):
    return {"items": [{"item_id": item} for item in items], "shortfall": shortfall}


@pytest.mark.parametrize(
    ("asked", "given_answer", "wrong"),
    [
        (visit(), answer("b", "c"), None),
        (visit(), answer("b", "b"), "twice"),
        (visit(), answer("b"), "1 items for top_k 2"),
        (visit(), answer("b", shortfall={"reason": "filters"}), None),
        (visit(), answer("b", "c", "d"), "3 items"),
        (visit(), answer("a", "b"), "'a' was to be left out"),
        (visit(exclude_items=["c"]), answer("b", "c"), "'c' was to be left out"),
        (visit(allow_items=["b"]), answer("b", "c"), "not allowed"),
        (visit(SCORE, items=["x", "y"]), answer("x", "y"), None),
        (visit(SCORE, items=["x", "y"]), answer("y", "x"), "were to be scored"),
        (
            Visit(BATCH, {"requests": [visit().body] * 2}, None),
            [
                {"index": 1, "status": 200, "answer": answer("b", "c")},
                {"index": 0, "status": 429, "error": {}},
            ],
            None,
        ),
        (
            Visit(BATCH, {"requests": [visit().body] * 2}, None),
            [{"index": 0, "status": 200, "answer": answer("b", "c")}],
            "answered with 1 lines",
        ),
        (
            Visit(BATCH, {"requests": [visit().body]}, None),
            [{"index": 0, "status": 200, "answer": answer("a", "c")}],
            "left out",
        ),
    ],
)
def test_wrong_answers_are_found(asked, given_answer, wrong):
    found = what_is_wrong(asked, given_answer)
    assert (found is None) if wrong is None else (wrong in found)


@given(st.integers(0, 2**63 - 1), st.sampled_from(["poisson", "constant"]))
def test_arrivals_go_on_whatever_the_caller_does(seed, kind):
    stream, again = Arrivals(kind, seed, 100.0), Arrivals(kind, seed, 100.0)
    times = [stream.next_s() for _ in range(50)]
    assert times == [again.next_s() for _ in range(50)]
    gaps = [after - before for before, after in zip([100.0, *times], times, strict=False)]
    assert min(gaps) >= 0
    if kind == "constant":
        assert gaps[1:] == pytest.approx([1.0] * 49)
        assert 100.0 <= times[0] <= 101.0


def test_poisson_arrivals_are_one_a_second_and_do_not_know_of_one_another():
    rng = random.Random(5)
    gaps = []
    for _ in range(100):
        stream = Arrivals("poisson", rng.randrange(2**32), 0.0)
        times = [stream.next_s() for _ in range(100)]
        gaps += [after - before for before, after in zip([0.0, *times], times, strict=False)]
    assert statistics.fmean(gaps) == pytest.approx(1.0, abs=0.05)
    assert statistics.pstdev(gaps) == pytest.approx(1.0, abs=0.08)
