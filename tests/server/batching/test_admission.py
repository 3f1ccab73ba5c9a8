"""Who is let into the queue, and who is told at once to come back later."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from server.errors import ErrorKind, ServiceError
from tests.server.batching.asking import ask, ask_while_busy, begun, search
from tests.waiting import LIMIT_S, until


async def test_the_queue_is_bounded_in_beam_rows(make_batcher, release):
    batcher = make_batcher(max_queued_beam_rows=100)
    head, tasks = await ask_while_busy(batcher, release, [search(beam_width=60)])
    with pytest.raises(ServiceError) as error:
        batcher.admit(41, time.monotonic() + 10)
    assert error.value.kind is ErrorKind.OVERLOADED
    assert error.value.retry_after_s >= 1
    assert "60" in error.value.message
    assert "100" in error.value.message
    with batcher.admit(40, time.monotonic() + 10):
        assert batcher.queued_beam_rows == 100
    assert batcher.queued_beam_rows == 60
    release.engine.gate.set()
    await asyncio.gather(head, *tasks)


async def test_narrow_requests_are_bounded_in_number(make_batcher, release):
    batcher = make_batcher(max_queued_requests=3)
    head, tasks = await ask_while_busy(batcher, release, [search(beam_width=1)] * 3)
    with pytest.raises(ServiceError) as error:
        batcher.admit(1, time.monotonic() + 10)
    assert error.value.kind is ErrorKind.OVERLOADED
    assert "3 requests" in error.value.message
    release.engine.gate.set()
    await asyncio.gather(head, *tasks)
    with batcher.admit(1, time.monotonic() + 10):
        pass


def take(clock, seconds):
    """What an engine does whose batches take so long."""

    def work(requests):
        clock.now += seconds

    return work


async def test_a_request_that_cannot_make_its_deadline_is_refused_at_once(
    make_batcher, release, clock
):
    batcher = make_batcher(clock=clock)
    release.engine.on_search = take(clock, 0.1)
    await ask(batcher, release, search(beam_width=10))  # 100 rows a second
    head, tasks = await ask_while_busy(batcher, release, [search(beam_width=300)])
    with pytest.raises(ServiceError) as error:
        batcher.admit(10, clock() + 0.5)
    assert error.value.kind is ErrorKind.DEADLINE_UNREACHABLE
    assert error.value.retry_after_s > 1
    with batcher.admit(10, clock() + 60):
        pass
    release.engine.gate.set()
    await asyncio.gather(head, *tasks)


async def test_who_is_let_in_makes_it_at_half_the_rate_too(make_batcher, release, clock):
    batcher = make_batcher(clock=clock)
    release.engine.on_search = take(clock, 0.1)
    await ask(batcher, release, search(beam_width=10))  # 100 rows a second
    head, tasks = await ask_while_busy(batcher, release, [search(beam_width=300)])
    # Three seconds of work are ahead.
    with pytest.raises(ServiceError) as error:
        batcher.admit(10, clock() + 6)
    assert error.value.kind is ErrorKind.DEADLINE_UNREACHABLE
    with batcher.admit(10, clock() + 7):
        pass
    release.engine.gate.set()
    await asyncio.gather(head, *tasks)


async def test_batches_whose_callers_gave_up_tell_how_slow_the_engine_is(make_batcher, release):
    """Or an overloaded service would go on letting in whom it cannot answer."""
    batcher, engine = make_batcher(), release.engine
    await ask(batcher, release)  # takes no time
    done = len(engine.batches)
    engine.gate.clear()
    gave_up = asyncio.create_task(ask(batcher, release, timeout_s=1.0))
    await begun(engine, done + 1)
    waits = asyncio.create_task(ask(batcher, release))
    (error,) = await asyncio.gather(gave_up, return_exceptions=True)
    assert error.kind is ErrorKind.DEADLINE_EXCEEDED
    second = threading.Event()
    engine.on_search = lambda requests: (
        second.wait(LIMIT_S) if len(engine.batches) > done + 1 else None
    )
    engine.gate.set()
    await begun(engine, done + 2)
    with pytest.raises(ServiceError) as refused:
        batcher.admit(10, time.monotonic() + 0.25)
    assert refused.value.kind is ErrorKind.DEADLINE_UNREACHABLE
    second.set()
    await waits


async def test_an_idle_engine_takes_a_request_however_slow_it_was(make_batcher, release, clock):
    batcher = make_batcher(clock=clock)
    release.engine.on_search = take(clock, 0.2)
    await ask(batcher, release, search(beam_width=2))
    release.engine.on_search = lambda requests: None
    # 10 rows a second were measured, which would be ten seconds.
    await ask(batcher, release, search(beam_width=100), timeout_s=5.0)


async def test_a_hitch_keeps_nobody_out_once_it_is_over(make_batcher, release, clock):
    batcher = make_batcher(clock=clock)
    release.engine.on_search = take(clock, 20.0)
    await asyncio.gather(*await _crowd(batcher, release))
    await _idle(batcher)
    release.engine.on_search = take(clock, 0.01)
    for _ in range(4):
        await ask(batcher, release, search(beam_width=10))
        await _idle(batcher)
    head, _ = await ask_while_busy(batcher, release, [])
    with batcher.admit(10, clock() + 1.0):
        pass
    release.engine.gate.set()
    await head


async def _idle(batcher):
    """A batch is over shortly after its answers are handed out."""
    await until(lambda: batcher.beam_rows == 0)


async def _crowd(batcher, release):
    """Tasks for a batch of one, and one behind it."""
    head, tasks = await ask_while_busy(batcher, release, [search()])
    release.engine.gate.set()
    return [head, *tasks]


async def test_a_batch_that_failed_at_once_is_no_measure_of_speed(make_batcher, release, clock):
    batcher = make_batcher(clock=clock)
    release.engine.on_search = take(clock, 0.1)
    await ask(batcher, release, search(beam_width=10))  # 100 rows a second
    await _idle(batcher)

    def fail(requests):
        clock.now += 0.001
        raise RuntimeError("made to order")

    release.engine.on_search = fail
    with pytest.raises(ServiceError):
        await ask(batcher, release, search(beam_width=900))
    await _idle(batcher)
    release.engine.on_search = take(clock, 0.1)
    head, tasks = await ask_while_busy(batcher, release, [search(beam_width=300)])
    with pytest.raises(ServiceError) as error:
        batcher.admit(10, clock() + 0.5)
    assert error.value.kind is ErrorKind.DEADLINE_UNREACHABLE
    release.engine.gate.set()
    await asyncio.gather(head, *tasks)
