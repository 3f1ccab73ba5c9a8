from __future__ import annotations

import asyncio
import time
import weakref
from collections import Counter

import pytest
import torch

from rectokens.schemas.search import SearchRequest
from server.engine.types import EngineBrokenError
from server.errors import EngineFaultError, ErrorKind, ServiceError
from tests.server.batching.asking import ask, ask_while_busy, begun, prepared_ahead, search, settled
from tests.waiting import LIMIT_S


class Hog:
    """Stands for memory on the device."""


async def test_an_answer_comes_with_its_times(make_batcher, release):
    answer = await ask(make_batcher(), release)
    assert [hit.item_index for hit in answer.result.hits] == [0, 1]
    assert answer.queue_s >= 0
    assert (answer.prefill_s, answer.decode_s) == (0.001, 0.002)


async def test_requests_join_the_batch_that_forms_while_the_engine_is_busy(make_batcher, release):
    batcher = make_batcher()
    head, tasks = await ask_while_busy(batcher, release, [search() for _ in range(5)])
    assert batcher.queued_requests == 5
    assert batcher.queued_beam_rows == 50
    release.engine.gate.set()
    await asyncio.gather(head, *tasks)
    assert [len(batch) for batch in release.engine.batches] == [1, 5]
    assert batcher._observer.started == [(1, 10), (5, 50)]
    assert batcher.queued_requests == batcher.queued_beam_rows == 0


async def test_each_caller_gets_its_own_answer(make_batcher, release):
    batcher = make_batcher()
    requests = [SearchRequest(prompt=(1,), beam_width=10, top_k=k) for k in (1, 2, 3, 4, 5, 6, 7)]
    head, tasks = await ask_while_busy(batcher, release, requests)
    release.engine.gate.set()
    answers = await asyncio.gather(*tasks)
    assert [len(answer.result.hits) for answer in answers] == [1, 2, 3, 4, 5, 6, 7]
    await head


async def test_a_batch_holds_one_release(make_batcher, dummy):
    batcher = make_batcher()
    old, new = dummy.make_release(), dummy.make_release(model_version="model0000000000b")
    head, tasks = await ask_while_busy(batcher, old, [search()])
    tasks += [asyncio.create_task(ask(batcher, new)) for _ in range(3)]
    await settled()
    tasks.append(asyncio.create_task(ask(batcher, old)))
    await settled()
    old.engine.gate.set()
    await asyncio.gather(head, *tasks)
    assert [len(batch) for batch in old.engine.batches] == [1, 2]
    assert [len(batch) for batch in new.engine.batches] == [3]


async def test_a_request_that_breaks_the_batch_fails_alone(make_batcher, release):
    batcher = make_batcher()
    poison = search(prompt_tokens=7)

    def explode(requests):
        if any(len(request.prompt) == 7 for request in requests):
            raise RuntimeError("poisoned")

    release.engine.on_search = explode
    head, tasks = await ask_while_busy(batcher, release, [search(), poison, search()])
    release.engine.gate.set()
    first, broken, last = await asyncio.gather(*tasks, return_exceptions=True)
    assert len(first.result.hits) == len(last.result.hits) == 2
    assert isinstance(broken, EngineFaultError)
    assert broken.kind is ErrorKind.ENGINE_FAULT
    assert "poisoned" in broken.detail
    assert "poisoned" not in broken.message
    await head
    assert batcher.alive
    # The batch, its halves, and the halves of the one that failed.
    assert [len(batch) for batch in release.engine.batches] == [1, 3, 1, 2, 1, 1]


async def test_a_batch_the_memory_is_too_small_for_runs_in_parts(make_batcher, release):
    batcher = make_batcher()
    held = []

    def run_out(requests):
        hog = Hog()
        held.append(weakref.ref(hog))
        if len(requests) > 2:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        # What the failed batch held is free by the time a smaller one is tried.
        assert [one() for one in held[:-1] if one() is not None] == []

    head, tasks = await ask_while_busy(batcher, release, [search() for _ in range(7)])
    release.engine.on_search = run_out
    release.engine.gate.set()
    answers = await asyncio.gather(*tasks)
    assert all(len(answer.result.hits) == 2 for answer in answers)
    assert [len(batch) for batch in release.engine.batches] == [1, 7, 3, 1, 2, 4, 2, 2]
    await head


async def test_a_request_that_no_memory_is_enough_for_fails_alone(make_batcher, release):
    batcher = make_batcher()

    def run_out(requests):
        if any(request.beam_width > 50 for request in requests):
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    release.engine.on_search = run_out
    requests = [search(), search(beam_width=99), search(), search()]
    head, tasks = await ask_while_busy(batcher, release, requests)
    release.engine.gate.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(outcome, EngineFaultError) for outcome in outcomes] == [
        False,
        True,
        False,
        False,
    ]
    assert "OutOfMemoryError" in outcomes[1].detail
    await head
    assert len((await ask(batcher, release)).result.hits) == 2


async def test_a_broken_device_ends_the_engine_thread(make_batcher, release):
    batcher = make_batcher()

    def break_down(requests):
        raise EngineBrokenError("illegal memory access")

    head, tasks = await ask_while_busy(batcher, release, [search(), search()])
    release.engine.on_search = break_down
    release.engine.gate.set()
    errors = await asyncio.gather(head, *tasks, return_exceptions=True)
    assert [error.kind for error in errors] == [ErrorKind.ENGINE_DEAD] * 3
    assert not batcher.alive
    assert len(release.engine.batches) == 1


async def test_a_device_that_is_lost_while_a_batch_is_prepared_ends_the_engine(
    make_batcher, release
):
    """At once: the batch that runs may never come back."""
    batcher = make_batcher()

    def lost(requests, trie):
        raise EngineBrokenError("unspecified launch failure")

    head, _ = await ask_while_busy(batcher, release, [])
    release.engine.prepare = lost
    tasks = [head, *(asyncio.create_task(ask(batcher, release)) for _ in range(2))]
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [error.kind for error in errors] == [ErrorKind.ENGINE_DEAD] * 3
    assert not batcher.alive
    assert batcher.queued_beam_rows == 0
    release.engine.gate.set()
    assert await batcher.stop(timeout_s=LIMIT_S)
    assert len(release.engine.batches) == 1
    assert not batcher.alive


async def test_a_device_found_lost_when_a_batch_is_prepared_at_its_turn(make_batcher, release):
    batcher = make_batcher()

    def lost(requests, trie):
        raise EngineBrokenError("unspecified launch failure")

    release.engine.prepare = lost
    (error,) = await asyncio.gather(ask(batcher, release), return_exceptions=True)
    assert error.kind is ErrorKind.ENGINE_DEAD
    assert not batcher.alive


async def test_the_next_batch_is_prepared_while_one_runs(make_batcher, release):
    batcher = make_batcher()
    request = search()
    head, tasks = await ask_while_busy(batcher, release, [request])
    await prepared_ahead(batcher, release.engine, [request])
    release.engine.gate.set()
    await asyncio.gather(head, *tasks)
    assert release.engine.run_ahead == [[request]]


async def test_a_full_batch_is_prepared_however_many_arrive_after_it(make_batcher, release):
    batcher = make_batcher()
    requests = [search(beam_width=i + 2) for i in range(20)]
    head, tasks = await ask_while_busy(batcher, release, requests)
    await prepared_ahead(batcher, release.engine, requests[:8])
    release.engine.gate.set()
    await asyncio.gather(head, *tasks)
    assert release.engine.run_ahead[0] == requests[:8]
    assert [len(batch) for batch in release.engine.batches] == [1, 8, 8, 4]
    # Looked at again only when the queue has doubled.
    assert len(release.engine.prepared) <= 12


async def test_who_leaves_after_the_next_batch_was_prepared_is_not_in_it(make_batcher, release):
    batcher = make_batcher()
    stays, leaves = search(beam_width=3), search(beam_width=4)
    head, (staying, leaving) = await ask_while_busy(batcher, release, [stays, leaves])
    await prepared_ahead(batcher, release.engine, [stays, leaves])
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    release.engine.gate.set()
    await asyncio.gather(head, staying)
    assert release.engine.batches[1:] == [[stays]]
    assert release.engine.run_ahead == []


async def test_a_deadline_holds_until_the_prepared_batch_starts(make_batcher, release):
    batcher = make_batcher()
    stays, expires = search(beam_width=3), search(beam_width=4)
    head, (staying,) = await ask_while_busy(batcher, release, [stays])
    expiring = asyncio.create_task(ask(batcher, release, expires, timeout_s=1.0))
    await prepared_ahead(batcher, release.engine, [stays, expires])
    (error,) = await asyncio.gather(expiring, return_exceptions=True)
    assert error.kind is ErrorKind.DEADLINE_EXCEEDED
    release.engine.gate.set()
    await asyncio.gather(head, staying)
    assert release.engine.batches[1:] == [[stays]]


async def test_a_prepared_batch_runs_on_the_release_it_was_prepared_for(make_batcher, dummy):
    batcher = make_batcher()
    old, new = dummy.make_release(), dummy.make_release(model_version="model0000000000b")
    request = search()
    head, tasks = await ask_while_busy(batcher, old, [request])
    await prepared_ahead(batcher, old.engine, [request])
    # The service serves another release from now on.
    tasks += [asyncio.create_task(ask(batcher, new, request)) for _ in range(2)]
    await settled()
    old.engine.gate.set()
    await asyncio.gather(head, *tasks)
    assert old.engine.run_ahead == [[request]]
    assert [len(batch) for batch in new.engine.batches] == [2]


async def test_the_engine_is_told_who_left_while_it_runs(make_batcher, release):
    batcher = make_batcher()
    head, (leaver, stayer) = await ask_while_busy(batcher, release, [search(), search()])
    release.engine.on_search = lambda requests: release.engine.gate.clear()
    release.engine.gate.set()
    await begun(release.engine, 2)
    leaver.cancel()
    await asyncio.gather(leaver, return_exceptions=True)
    release.engine.gate.set()
    await asyncio.gather(head, stayer)
    assert release.engine.left == [[False], [True, False]]


async def test_a_fault_of_one_request_needs_no_retry(make_batcher, release):
    batcher = make_batcher()
    release.engine.fault_if = lambda request: len(request.prompt) == 7
    head, tasks = await ask_while_busy(batcher, release, [search(), search(prompt_tokens=7)])
    release.engine.gate.set()
    fine, broken = await asyncio.gather(*tasks, return_exceptions=True)
    assert len(fine.result.hits) == 2
    assert isinstance(broken, EngineFaultError)
    await head
    assert [len(batch) for batch in release.engine.batches] == [1, 2]


async def test_an_engine_that_answers_too_little_fails_its_callers_not_itself(
    make_batcher, release, monkeypatch
):
    from server.engine.types import BatchOutcome

    monkeypatch.setattr(release.engine, "run", lambda prepared, left: BatchOutcome((), 0.0, 0.0))
    batcher = make_batcher()
    with pytest.raises(EngineFaultError):
        await ask(batcher, release)
    assert batcher.alive


async def test_a_caller_that_leaves_the_queue_frees_its_place(make_batcher, release):
    batcher = make_batcher(max_queued_beam_rows=20)
    head, (leaver,) = await ask_while_busy(batcher, release, [search(beam_width=20)])
    with pytest.raises(ServiceError):
        await ask(batcher, release, search(beam_width=1))
    leaver.cancel()
    await asyncio.gather(leaver, return_exceptions=True)
    assert batcher.queued_beam_rows == batcher.queued_requests == 0
    stayer = asyncio.create_task(ask(batcher, release, search(beam_width=20)))
    await settled()
    release.engine.gate.set()
    await asyncio.gather(head, stayer)
    assert [[r.beam_width for r in batch] for batch in release.engine.batches] == [[10], [20]]


async def test_the_result_of_a_caller_that_left_a_running_batch_is_dropped(make_batcher, release):
    batcher = make_batcher()
    head, _ = await ask_while_busy(batcher, release, [])
    head.cancel()
    await asyncio.gather(head, return_exceptions=True)
    release.engine.gate.set()
    assert len((await ask(batcher, release)).result.hits) == 2
    assert batcher.queued_requests == 0


async def test_a_queued_request_past_its_deadline_never_reaches_the_engine(make_batcher, release):
    batcher = make_batcher()
    head, _ = await ask_while_busy(batcher, release, [])
    with pytest.raises(ServiceError) as error:
        await ask(batcher, release, search(beam_width=3), timeout_s=0.05)
    assert error.value.kind is ErrorKind.DEADLINE_EXCEEDED
    assert batcher.queued_beam_rows == 0
    release.engine.gate.set()
    await head
    await ask(batcher, release)
    assert all(request.beam_width != 3 for batch in release.engine.batches for request in batch)


async def test_a_running_request_past_its_deadline_is_answered_so(make_batcher, release):
    batcher = make_batcher()
    release.engine.gate.clear()
    with pytest.raises(ServiceError) as error:
        await ask(batcher, release, timeout_s=0.05)
    assert error.value.kind is ErrorKind.DEADLINE_EXCEEDED
    release.engine.gate.set()


async def test_a_dead_engine_thread_answers_everybody_at_once(make_batcher, release):
    batcher = make_batcher()

    def die(requests):
        raise SystemExit("the thread is gone")

    head, tasks = await ask_while_busy(batcher, release, [search(), search()])
    release.engine.on_search = die
    release.engine.gate.set()
    errors = await asyncio.gather(head, *tasks, return_exceptions=True)
    assert [error.kind for error in errors] == [ErrorKind.ENGINE_DEAD] * 3
    assert not batcher.alive
    assert batcher.queued_beam_rows == 0
    with pytest.raises(ServiceError) as error:
        batcher.admit(1, time.monotonic() + 10)
    assert error.value.kind is ErrorKind.ENGINE_DEAD


async def test_stopping_answers_those_who_wait(make_batcher, release):
    batcher = make_batcher()
    head, (queued,) = await ask_while_busy(batcher, release, [search()])
    stopping = asyncio.create_task(batcher.stop(timeout_s=LIMIT_S))
    (error,) = await asyncio.gather(queued, return_exceptions=True)
    assert error.kind is ErrorKind.DRAINING
    release.engine.gate.set()
    assert await stopping
    assert len((await head).result.hits) == 2
    with pytest.raises(ServiceError):
        batcher.admit(1, time.monotonic() + 10)


async def test_an_engine_that_hangs_does_not_keep_stop_waiting(make_batcher, release):
    batcher = make_batcher()
    head, _ = await ask_while_busy(batcher, release, [])
    assert not await batcher.stop(timeout_s=0.05)
    release.engine.gate.set()
    await asyncio.gather(head, return_exceptions=True)


async def test_a_storm_of_callers_that_stay_leave_and_fail(make_batcher, release):
    """Every caller hears exactly once, every row is given back."""
    batcher = make_batcher(max_queued_beam_rows=200)

    def sometimes_explode(requests):
        if any(len(request.prompt) == 5 for request in requests):
            raise RuntimeError("poisoned")

    release.engine.on_search = sometimes_explode
    tasks = []
    for i in range(300):
        request = search(beam_width=1 + i % 7, prompt_tokens=1 + i % 5)
        tasks.append(asyncio.create_task(ask(batcher, release, request)))
        if i % 4 == 0:
            await asyncio.sleep(0)
        if i % 11 == 0:
            tasks[i // 2].cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    kinds = Counter(
        outcome.kind if isinstance(outcome, ServiceError) else type(outcome).__name__
        for outcome in outcomes
    )
    allowed = {"Answer", "CancelledError", ErrorKind.ENGINE_FAULT, ErrorKind.OVERLOADED}
    assert set(kinds) <= allowed
    assert kinds["Answer"] > 0
    assert kinds[ErrorKind.ENGINE_FAULT] > 0
    assert batcher.queued_requests == batcher.queued_beam_rows == 0
    assert batcher.alive
