"""What is compared, and what blocks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rectokens.prompts.parts import TextPart
from server.errors import ErrorKind, ServiceError
from server.queries import RecommendQuery
from server.rehearsal.gate import Thresholds, objections
from server.rehearsal.replay import Replayed, compare, overlap, replay
from server.rehearsal.sample import RecentQueries
from server.rehearsal.types import GateOptions

QUERY = RecommendQuery(
    parts=("a",),
    parts_param="history",
    top_k=3,
    beam_width=8,
    temperature=0.7,
    seed=5,
    exclude_history=True,
    exclude_items=("b",),
    constraint_sets=(),
    normalization="vocab",
    with_metadata=True,
    with_level_scores=True,
    deadline_s=12.0,
)


def answered(items, wanted=3, seconds=0.01):
    return Replayed(tuple(items), wanted, seconds)


def test_figures_are_of_requests_that_both_answered():
    old = [answered("abc"), answered("ab"), Replayed((), 3, 0.0, "old fell over"), answered("xyz")]
    new = [answered("abd", seconds=0.03), answered("abc"), answered("a"), Replayed((), 3, 1, "no")]
    report = compare(old, new)
    assert (report.requests, report.compared, report.failed) == (4, 2, 2)
    assert report.mean_overlap == pytest.approx((2 / 3 + 1) / 2)
    assert report.lowest_overlap == pytest.approx(2 / 3)
    assert (report.shortfall_old, report.shortfall_new) == (0.5, 0.0)
    assert report.latency_ratio == pytest.approx(2.0)
    assert report.first_failure == "old fell over"


def test_without_requests_there_is_nothing_to_object_to_unless_some_are_asked_for():
    report = compare([], [])
    strict = Thresholds(min_overlap=1, max_shortfall=0, max_latency_ratio=1)
    assert objections(report, strict) == []
    assert objections(report, replace(strict, min_requests=1)) == [
        "0 requests were compared; at least 1 must be"
    ]


def test_each_threshold_blocks_with_the_figure_and_the_limit():
    report = compare([answered("abc")], [answered("a", seconds=0.05)])
    found = objections(
        report, Thresholds(min_overlap=0.5, max_shortfall=0.1, max_latency_ratio=1.5)
    )
    assert found == [
        "mean overlap is 0.3333; allowed is at least 0.5",
        "shortfall is 1; allowed is at most 0.1",
        "latency ratio is 5; allowed is at most 1.5",
    ]
    assert objections(report, Thresholds(min_overlap=0.33, max_shortfall=1)) == []


def test_a_request_s_options_go_before_the_settings():
    settings = Thresholds(min_requests=5, min_overlap=0.9, max_latency_ratio=2)
    options = GateOptions(min_requests=0, min_overlap=0.0)
    assert settings.overridden(options) == Thresholds(
        min_requests=0, min_overlap=0.0, max_latency_ratio=2
    )


@given(st.lists(st.text(), unique=True), st.lists(st.text(), unique=True))
def test_overlap_is_a_share(old, new):
    share = overlap(old, new)
    assert 0 <= share <= 1
    assert overlap(old, old) == 1
    assert (share == 1) == (set(old) <= set(new))


async def test_a_full_queue_is_stepped_back_from_and_an_error_is_a_result(monkeypatch):
    monkeypatch.setattr("server.rehearsal.replay._STEP_BACK_S", 0.0)
    outcomes = iter(
        [
            ServiceError(ErrorKind.OVERLOADED, "full"),
            SimpleNamespace(items=[SimpleNamespace(item_id="a")]),
            ServiceError(ErrorKind.NO_KNOWN_ITEMS, "none known"),
        ]
    )

    async def answer(query):
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    first, second = await replay([QUERY, QUERY], answer, 1.0)
    assert (first.items, first.failure) == (("a",), None)
    assert (second.items, second.failure) == ((), "none known")


class TestSample:
    def test_nothing_is_kept_unless_it_is_asked_for(self):
        kept = RecentQueries(0)
        kept.add(QUERY)
        assert len(kept) == 0

    def test_who_asked_and_when_is_not_kept_nor_any_text(self):
        kept = RecentQueries(9, clock=iter(range(100)).__next__)
        kept.add(QUERY)
        kept.add(replace(QUERY, parts=("a", TextPart("my name is"))))
        kept.add(replace(QUERY, parts=("a",) * 3_000))
        (only,) = kept.latest(9)
        assert (only.deadline_s, only.seed, only.temperature) == (0, None, 0.0)
        assert (only.with_metadata, only.with_level_scores) == (False, False)
        assert (only.parts, only.exclude_items) == (QUERY.parts, QUERY.exclude_items)

    def test_it_is_bounded_and_a_burst_does_not_fill_it(self):
        now = [0.0]
        kept = RecentQueries(4, clock=lambda: now[0])
        for _ in range(50):
            kept.add(QUERY)
        assert len(kept) == 1
        for number in range(10):
            now[0] += 1
            kept.add(replace(QUERY, parts=(str(number),)))
        assert [query.parts[0] for query in kept.latest(2)] == ["8", "9"]
        assert len(kept) == 4
        assert kept.latest(0) == []
