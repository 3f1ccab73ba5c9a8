"""A release that was replaced leaves memory with its last request, however that ends.

Nothing waits for the garbage collector: what stays in memory in a cycle stays there, a catalog or a
whole model, for as long as the service is asked little.
"""

from __future__ import annotations

import asyncio
import gc

import pytest

from tests.server.api.answers import assert_error, begun


@pytest.fixture
async def running(start_app, dummy, engine):
    # Loaded, not given: the fixture itself would keep it.
    return await start_app(
        load=lambda: dummy.make_release(engine),
        limits__max_beam_width=60,
        limits__max_top_k=60,
        batching__max_queued_beam_rows=60,
    )


async def answered(running, engine):
    assert (await running.post({"history": ["B001"]})).status_code == 200


async def timed_out(running, engine):
    engine.gate.clear()
    response = await running.post({"history": [], "timeout_ms": 30})
    assert_error(response, 504, "deadline_exceeded", "timeout_ms")
    engine.gate.set()


async def at_fault(running, engine):
    engine.fault_if = lambda request: True
    assert_error(await running.post({"history": []}), 500, "engine_fault")


async def broke_its_batch(running, engine):
    def explode(requests):
        raise RuntimeError("made to order")

    engine.on_search = explode
    assert_error(await running.post({"history": []}), 500, "engine_fault")


async def refused(running, engine):
    response = await running.post({"history": [], "constraint_set": "nope"})
    assert_error(response, 422, "invalid_value", "constraint_set")
    response = await running.post({"history": ["nope"]})
    assert_error(response, 422, "no_known_items", "history")


async def overloaded(running, engine):
    engine.gate.clear()
    first = asyncio.create_task(running.post({"history": [], "beam_width": 10}))
    await begun(engine, 1)
    second = asyncio.create_task(running.post({"history": [], "beam_width": 50}))
    while await running.metric("rectokens_queue_beam_rows") != 50:
        await asyncio.sleep(0.005)
    assert_error(await running.post({"history": [], "beam_width": 20}), 429, "overloaded")
    engine.gate.set()
    assert {(await first).status_code, (await second).status_code} == {200}


async def unforeseen(running, engine):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.recommender.present", lambda *args: 1 / 0)
        assert_error(await running.post({"history": []}), 500, "internal")


async def score_at_fault(running, engine):
    engine.fault_if = lambda request: True
    response = await running.client.post("/v1/score", json={"history": [], "items": ["B001"]})
    assert_error(response, 500, "engine_fault")


async def completion_at_fault(running, engine):
    engine.fault_if = lambda request: True
    body = {"model": "dummy", "prompt": [[1], [1], [1]], "beam_width": 10}
    assert_error(await running.client.post("/v1/completions", json=body), 500, "engine_fault")


async def bulk(running, engine):
    engine.fault_if = lambda request: request.beam_width == 13
    body = [
        {"history": ["B001"]},
        {"history": ["nope"]},
        {"history": [], "beam_width": 13},
        {"history": [], "constraint_set": "odd"},
    ]
    response = await running.client.post("/v1/recommend/batch", json={"requests": body})
    assert response.status_code == 200
    assert response.text.count('"status":200') == 1


@pytest.mark.parametrize(
    "request_made",
    [
        answered,
        timed_out,
        at_fault,
        broke_its_batch,
        refused,
        overloaded,
        unforeseen,
        score_at_fault,
        completion_at_fault,
        bulk,
    ],
    ids=lambda made: made.__name__,
)
async def test_a_replaced_release_is_freed_without_the_garbage_collector(
    running, engine, dummy, request_made
):
    await running.post({"history": []})
    gc.collect()
    gc.disable()
    try:
        await request_made(running, engine)
        running.service.activate(dummy.make_release())
        await assert_gone(running)
    finally:
        gc.enable()


async def test_a_client_that_left_leaves_nothing_behind(running, engine, dummy):
    engine.gate.clear()
    gc.collect()
    gc.disable()
    try:
        posted = [asyncio.create_task(running.post({"history": []})) for _ in range(2)]
        await begun(engine, 1)  # one runs, one waits
        running.service.activate(dummy.make_release())
        for task in posted:
            task.cancel()
        await asyncio.gather(*posted, return_exceptions=True)
        del posted, task
        engine.gate.set()
        await assert_gone(running)
    finally:
        gc.enable()


async def assert_gone(running):
    """The engine is the test's own, so that only the release and its catalog have to go."""
    for _ in range(300):
        left = [type(one).__name__ for one in running.service.retired._alive]
        if "Release" not in left and "Catalog" not in left:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"still in memory: {left}")
