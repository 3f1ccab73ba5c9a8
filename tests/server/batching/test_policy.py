from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.batching.policy import BatchLimits, Waiting, form_batch

LIMITS = BatchLimits(max_requests=4, max_beam_rows=100, max_prompt_tokens=200)


def waiting(key: int, **fields: object) -> Waiting:
    base = Waiting(key=key, deadline_s=10.0, beam_rows=10, prompt_tokens=10, release="a")
    return replace(base, **fields)


requests = st.builds(
    Waiting,
    key=st.just(0),
    deadline_s=st.floats(0, 20),
    beam_rows=st.integers(1, 150),
    prompt_tokens=st.integers(1, 250),
    release=st.sampled_from("ab"),
)
queues = st.lists(requests, max_size=30).map(
    lambda queue: [replace(request, key=i) for i, request in enumerate(queue)]
)
limits = st.builds(
    BatchLimits,
    max_requests=st.integers(1, 10),
    max_beam_rows=st.integers(1, 300),
    max_prompt_tokens=st.integers(1, 500),
)
times = st.floats(0, 20)


@given(queues, limits, times)
def test_nothing_is_lost_and_nothing_doubled(queue, limits, now):
    decision = form_batch(queue, limits, now)
    places = [*decision.run, *decision.expired, *decision.waiting]
    assert sorted(places) == [request.key for request in queue]


@given(queues, limits, times)
def test_budgets_hold_but_for_a_single_request(queue, limits, now):
    batch = [queue[key] for key in form_batch(queue, limits, now).run]
    if len(batch) > 1:
        assert len(batch) <= limits.max_requests
        assert sum(request.beam_rows for request in batch) <= limits.max_beam_rows
        padded = len(batch) * max(request.prompt_tokens for request in batch)
        assert padded <= limits.max_prompt_tokens


@given(queues, limits, times)
def test_expired_means_expired(queue, limits, now):
    decision = form_batch(queue, limits, now)
    assert [r.key for r in queue if r.deadline_s <= now] == list(decision.expired)


@given(queues, limits, times)
def test_one_release_a_batch_and_queue_order(queue, limits, now):
    decision = form_batch(queue, limits, now)
    assert len({queue[key].release for key in decision.run}) <= 1
    for keys in (decision.run, decision.waiting):
        assert list(keys) == sorted(keys)


@given(queues, limits, times)
def test_the_oldest_live_request_always_runs(queue, limits, now):
    live = [request.key for request in queue if request.deadline_s > now]
    assert form_batch(queue, limits, now).run[:1] == tuple(live[:1])


@given(queues, limits)
def test_nobody_is_passed_without_a_reason(queue, limits):
    """Whoever waits would not have fitted when its turn came."""
    decision = form_batch(queue, limits, now_s=-1.0)
    release = queue[decision.run[0]].release if decision.run else None
    for key in decision.waiting:
        before = [queue[other] for other in decision.run if other < key]
        request = queue[key]
        tokens = max(r.prompt_tokens for r in [*before, request]) * (len(before) + 1)
        assert (
            request.release != release
            or len(before) >= limits.max_requests
            or sum(r.beam_rows for r in before) + request.beam_rows > limits.max_beam_rows
            or tokens > limits.max_prompt_tokens
        )


@given(queues, limits)
def test_a_request_waits_for_at_most_the_batches_of_those_before_it(queue, limits):
    position, batches = {request.key: i for i, request in enumerate(queue)}, 0
    rest = list(queue)
    while rest:
        run = form_batch(rest, limits, now_s=-1.0).run
        assert all(batches <= position[key] for key in run)
        batches += 1
        rest = [request for request in rest if request.key not in run]


def test_a_wide_request_is_not_starved_by_narrow_ones_that_keep_coming():
    wide, next_key = waiting(0, beam_rows=95), 1
    queue = [waiting(-1), wide]
    for batch in range(3):
        queue += [waiting(next_key + i) for i in range(4)]
        next_key += 4
        run = form_batch(queue, LIMITS, now_s=0.0).run
        if 0 in run:
            assert batch == 1
            return
        queue = [request for request in queue if request.key not in run]
    pytest.fail("the wide request never ran")


def test_an_empty_queue_gives_an_empty_batch():
    decision = form_batch([], LIMITS, now_s=0.0)
    assert decision.run == decision.expired == decision.waiting == ()


def test_a_request_over_every_budget_runs_alone():
    queue = [waiting(0, beam_rows=999, prompt_tokens=999), waiting(1)]
    assert form_batch(queue, LIMITS, now_s=0.0).run == (0,)
