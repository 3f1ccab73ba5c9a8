"""An engine that begins batches: the next one is begun while the one before it is at its end."""

from __future__ import annotations

import asyncio
import threading

import pytest

from server.engine.types import EngineBrokenError
from server.errors import EngineFaultError, ErrorKind
from tests.server.batching.asking import ask, search, settled
from tests.server.beginning_engine import BeginningEngine
from tests.server.dummy_service import make_release
from tests.waiting import LIMIT_S, until


@pytest.fixture
def engine():
    return BeginningEngine()


@pytest.fixture
def release(engine):
    yield make_release(engine)
    engine.prompts.set()
    engine.gate.set()


async def asked(batcher, release, *requests):
    tasks = [asyncio.create_task(ask(batcher, release, request)) for request in requests]
    await settled()
    return tasks


async def one_behind_another(batcher, engine, release, *requests):
    """Tasks: a batch of one that is at its end, and one of some requests begun behind it."""
    head = await asked(batcher, release, search())
    await engine.wait_for_begun(1)
    tasks = await asked(batcher, release, *requests)
    engine.prompts.set()
    await engine.wait_for_begun(2)
    return [*head, *tasks]


async def test_the_next_batch_is_begun_at_the_end_of_the_one_before(make_batcher, engine, release):
    batcher = make_batcher()
    head, early, late = search(beam_width=2), search(beam_width=3), search(beam_width=4)
    tasks = await asked(batcher, release, head)
    await engine.wait_for_begun(1)
    for request in (early, late):
        tasks += await asked(batcher, release, request)
        assert engine.begun == [[head]]
    engine.prompts.set()
    await engine.wait_for_begun(2)
    assert engine.begun == [[head], [early, late]]
    assert batcher.beam_rows == 9
    assert batcher.queued_requests == 0
    engine.gate.set()
    await asyncio.gather(*tasks)
    assert engine.batches == engine.begun
    # Counted until shortly after the answers are handed out.
    await until(lambda: batcher.beam_rows == 0)
    assert batcher._observer.started == [(1, 2), (2, 7)]


async def test_a_batch_is_answered_while_the_next_one_runs(make_batcher, engine, release):
    held = threading.Event()
    engine.on_search = lambda requests: held.wait(LIMIT_S) if len(engine.batches) == 2 else None
    first, second = await one_behind_another(make_batcher(), engine, release, search())
    engine.gate.set()
    await first
    assert not second.done()
    held.set()
    await second


async def test_until_the_engine_turns_to_a_batch_its_requests_wait(make_batcher, engine, release):
    first, second = await one_behind_another(make_batcher(), engine, release, search())
    await asyncio.sleep(0.2)
    engine.gate.set()
    await first
    assert (await second).queue_s >= 0.2


async def test_one_at_a_time_needs_nobody_behind_it(make_batcher, engine, release):
    batcher = make_batcher()
    engine.prompts.set()
    engine.gate.set()
    for _ in range(3):
        await ask(batcher, release)
    assert [len(batch) for batch in engine.batches] == [1, 1, 1]


async def test_who_leaves_before_the_beginning_is_not_in_it(make_batcher, engine, release):
    batcher = make_batcher()
    tasks = await asked(batcher, release, search())
    await engine.wait_for_begun(1)
    stays, leaves = search(beam_width=3), search(beam_width=4)
    staying, leaving = await asked(batcher, release, stays, leaves)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    engine.prompts.set()
    await engine.wait_for_begun(2)
    assert engine.begun[1] == [stays]
    assert engine.had_left == [[False], [False]]
    engine.gate.set()
    await asyncio.gather(*tasks, staying)


async def test_what_cannot_be_begun_is_run_by_itself(make_batcher, engine, release):
    def no_room(requests):
        if len(engine.begun) == 1:
            raise MemoryError("with another batch there")

    engine.on_begin = no_room
    batcher = make_batcher()
    head = await asked(batcher, release, search())
    await engine.wait_for_begun(1)
    tasks = await asked(batcher, release, search(), search())
    engine.prompts.set()
    engine.gate.set()
    await asyncio.gather(*head, *tasks)
    assert [len(batch) for batch in engine.begun] == [1]
    assert [len(batch) for batch in engine.batches] == [1, 2]


async def test_a_batch_that_fails_at_its_end_is_run_in_halves(make_batcher, engine, release):
    """And the one behind it is none the worse."""
    poison = search(prompt_tokens=7)

    def explode(requests):
        if any(len(request.prompt) == 7 for request in requests):
            raise RuntimeError("poisoned")

    engine.on_search = explode
    batcher = make_batcher()
    head = await asked(batcher, release, search())
    await engine.wait_for_begun(1)
    broken = await asked(batcher, release, search(), poison, search())
    engine.prompts.set()
    await engine.wait_for_begun(2)
    engine.prompts.clear()
    engine.gate.set()
    await asyncio.gather(*head)
    behind = await asked(batcher, release, search(beam_width=3))
    engine.prompts.set()
    outcomes = await asyncio.gather(*broken, return_exceptions=True)
    assert [type(one) is EngineFaultError for one in outcomes] == [False, True, False]
    await asyncio.gather(*behind)
    assert batcher.alive


async def test_a_broken_device_fails_all_that_was_begun(make_batcher, engine, release):
    def break_down(requests):
        raise EngineBrokenError("illegal memory access")

    engine.on_search = break_down
    batcher = make_batcher()
    tasks = await one_behind_another(batcher, engine, release, search(), search())
    tasks += await asked(batcher, release, search())
    engine.gate.set()
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [error.kind for error in errors] == [ErrorKind.ENGINE_DEAD] * 4
    assert not batcher.alive


async def test_what_was_begun_is_answered_before_the_threads_end(make_batcher, engine, release):
    batcher = make_batcher()
    tasks = await one_behind_another(batcher, engine, release, search())
    stopping = asyncio.create_task(batcher.stop(timeout_s=LIMIT_S))
    await settled()
    engine.gate.set()
    assert await stopping
    assert [len(answer.result.hits) for answer in await asyncio.gather(*tasks)] == [2, 2]
