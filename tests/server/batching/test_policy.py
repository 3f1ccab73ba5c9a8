from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.batching.cost import BatchCost, BatchShape
from server.batching.policy import BatchLimits, Waiting, form_batch

LIMITS = BatchLimits(max_requests=4, max_beam_rows=100, max_prompt_tokens=200)


def waiting(key: int, **fields: object) -> Waiting:
    base = Waiting(key=key, deadline_s=10.0, beam_rows=10, prompt_tokens=10, release="a")
    return replace(base, **fields)


def shape_of(*batch: Waiting) -> BatchShape:
    shape = BatchShape()
    for request in batch:
        shape = shape.with_request(request.prompt_tokens, request.beam_rows)
    return shape


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
costs = st.none() | st.builds(
    BatchCost, st.floats(0, 2), st.floats(0, 0.02), st.floats(0, 0.02), st.floats(0, 0.02)
)


@given(queues, limits, times, costs)
def test_nothing_is_lost_and_nothing_doubled(queue, limits, now, cost):
    decision = form_batch(queue, limits, now, cost)
    places = [*decision.run, *decision.expired, *decision.waiting]
    assert sorted(places) == [request.key for request in queue]


@given(queues, limits, times, costs)
def test_budgets_hold_but_for_a_single_request(queue, limits, now, cost):
    batch = [queue[key] for key in form_batch(queue, limits, now, cost).run]
    if len(batch) > 1:
        assert len(batch) <= limits.max_requests
        padded = len(batch) * max(request.beam_rows for request in batch)
        assert padded <= limits.max_beam_rows
        padded = len(batch) * max(request.prompt_tokens for request in batch)
        assert padded <= limits.max_prompt_tokens


@given(queues, limits, times)
def test_expired_means_expired(queue, limits, now):
    decision = form_batch(queue, limits, now)
    assert [r.key for r in queue if r.deadline_s <= now] == list(decision.expired)


@given(queues, limits, times, costs)
def test_one_release_a_batch_and_queue_order(queue, limits, now, cost):
    decision = form_batch(queue, limits, now, cost)
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
            or max(r.beam_rows for r in [*before, request]) * (len(before) + 1)
            > limits.max_beam_rows
            or tokens > limits.max_prompt_tokens
        )


@given(queues, limits, costs)
def test_a_request_waits_for_at_most_the_batches_of_those_before_it(queue, limits, cost):
    position, batches = {request.key: i for i, request in enumerate(queue)}, 0
    rest = [replace(request, deadline_s=float("inf")) for request in queue]
    while rest:
        run = form_batch(rest, limits, now_s=-1.0, cost=cost).run
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


@given(queues, st.lists(queues, max_size=12), limits, costs, st.integers(0, 29))
def test_nobody_starves_under_a_stream_that_never_ends(queue, stream, limits, cost, place):
    """However wide a request is and whatever keeps arriving, it runs in its turn at the latest."""
    if not queue:
        return
    mine = queue[place % len(queue)].key
    rest = [replace(request, deadline_s=float("inf")) for request in queue]
    for batch in range(len(queue)):
        run = form_batch(rest, limits, now_s=0.0, cost=cost).run
        if mine in run:
            assert batch <= place % len(queue)
            return
        arrivals = stream[batch % len(stream)] if stream else []
        rest = [request for request in rest if request.key not in run] + [
            replace(request, key=1_000 * (batch + 1) + i, deadline_s=float("inf"))
            for i, request in enumerate(arrivals)
        ]
    pytest.fail("its turn never came")


@given(queues, limits, times, costs)
def test_who_could_meet_a_deadline_before_still_does(queue, limits, now, cost):
    """No company makes a request late that would be in time alone."""
    if cost is None:
        return
    batch = [queue[key] for key in form_batch(queue, limits, now, cost).run]
    if not batch:
        return
    together_s = cost.seconds(shape_of(*batch))
    if all(now + cost.seconds(shape_of(r)) <= r.deadline_s for r in batch):
        assert all(now + together_s <= r.deadline_s for r in batch)


@given(queues, limits, costs)
def test_company_costs_no_more_than_running_apart(queue, limits, cost):
    if cost is None:
        return
    queue = [replace(request, deadline_s=1e9) for request in queue]
    batch = [queue[key] for key in form_batch(queue, limits, 0.0, cost).run]
    if not batch:
        return
    apart_s = sum(cost.seconds(shape_of(request)) for request in batch)
    assert cost.seconds(shape_of(*batch)) <= apart_s * (1 + 1e-9)


COST = BatchCost(fixed_s=0.1, token_s=0.0, padded_token_s=0.001, row_s=0.001)


def test_a_long_prompt_does_not_pad_the_short_ones():
    queue = [waiting(0), waiting(1, prompt_tokens=190), waiting(2, prompt_tokens=30)]
    roomy = BatchLimits(10, 10_000, 10_000)
    assert form_batch(queue, roomy, 0.0, COST).run == (0, 2)
    # Where starting a batch is what costs, they run together.
    slow_start = replace(COST, fixed_s=1.0)
    assert form_batch(queue, roomy, 0.0, slow_start).run == (0, 1, 2)
    # And where prompts are not padded at all.
    packed = replace(COST, token_s=0.001, padded_token_s=0.0)
    assert form_batch(queue, roomy, 0.0, packed).run == (0, 1, 2)


def test_a_wide_beam_does_not_pad_the_narrow_ones():
    queue = [waiting(0, beam_rows=5_000), waiting(1), waiting(2)]
    decision = form_batch(queue, BatchLimits(10, 50_000, 10_000), 0.0, COST)
    assert decision.run == (0,)
    assert not decision.full


def test_a_long_batch_grows_while_that_saves_something():
    roomy = BatchLimits(100, 100_000, 100_000)
    queue = [waiting(i) for i in range(40)]
    # 8 ms each; 2 ms a batch, then 50.
    cost = BatchCost(fixed_s=0.002, token_s=0.0008, padded_token_s=0.0, row_s=0.0)
    decision = form_batch(queue, roomy, 0.0, cost, long_s=0.06)
    assert decision.run == tuple(range(8))
    assert decision.full
    assert form_batch(queue, roomy, 0.0, cost).run == tuple(range(40))
    slow_start = replace(cost, fixed_s=0.05)
    assert form_batch(queue, roomy, 0.0, slow_start, long_s=0.06).run == tuple(range(40))
    # Short ones cost nobody time.
    quick = BatchCost(fixed_s=0.0, token_s=0.0001, padded_token_s=0.0, row_s=0.0)
    assert form_batch(queue, roomy, 0.0, quick, long_s=0.06).run == tuple(range(40))
    # One that is long by itself takes no company that would save nothing.
    long = [waiting(0, prompt_tokens=1_000), waiting(1)]
    assert form_batch(long, roomy, 0.0, cost, long_s=0.06).run == (0,)


@given(queues, limits, times, costs, st.floats(0, 2))
def test_where_long_batches_stop_growing_nothing_is_lost_either(queue, limits, now, cost, long_s):
    decision = form_batch(queue, limits, now, cost, long_s)
    freely = form_batch(queue, limits, now, cost)
    places = [*decision.run, *decision.expired, *decision.waiting]
    assert sorted(places) == [request.key for request in queue]
    assert decision.expired == freely.expired
    assert decision.run[:1] == freely.run[:1]
    assert len(decision.run) <= limits.max_requests


def test_who_cannot_make_it_gives_way_to_who_can():
    slow, quick = waiting(0, deadline_s=0.1), waiting(1)
    assert form_batch([slow, quick], LIMITS, 0.0, COST).expired == (0,)
    assert form_batch([slow, quick], LIMITS, 0.0).expired == ()
    # Nobody is the better off for turning it away, so it is tried.
    assert form_batch([slow], LIMITS, 0.0, COST).run == (0,)
    # Past its deadline it is never tried.
    assert form_batch([slow], LIMITS, 0.1, COST).expired == (0,)


def test_full_means_that_a_budget_kept_somebody_out():
    assert not form_batch([waiting(i) for i in range(4)], LIMITS, 0.0).full
    assert form_batch([waiting(i) for i in range(5)], LIMITS, 0.0).full
    other = waiting(4, release="b")
    assert not form_batch([*(waiting(i) for i in range(4)), other], LIMITS, 0.0).full


def test_an_empty_queue_gives_an_empty_batch():
    decision = form_batch([], LIMITS, now_s=0.0)
    assert decision.run == decision.expired == decision.waiting == ()


def test_a_request_over_every_budget_runs_alone():
    queue = [waiting(0, beam_rows=999, prompt_tokens=999), waiting(1)]
    assert form_batch(queue, LIMITS, now_s=0.0).run == (0,)
