"""Requests that wait, fail, share a batch or are given up."""

from __future__ import annotations

import asyncio

from tests.server.api.answers import assert_error, begun, ids, metric_is
from tests.server.asgi import http_scope
from tests.waiting import LIMIT_S


async def test_a_full_queue_is_a_429_with_retry_after(start_app, dummy, engine):
    running = await start_app(
        dummy.make_release(engine),
        limits__max_beam_width=60,
        limits__max_top_k=60,
        batching__max_queued_beam_rows=60,
    )
    engine.gate.clear()
    first = asyncio.create_task(running.post({"history": [], "beam_width": 10}))
    await begun(engine, 1)
    second = asyncio.create_task(running.post({"history": [], "beam_width": 50}))
    await metric_is(running, "rectokens_queue_beam_rows", 50)
    refused = await running.post({"history": [], "beam_width": 20})
    message = assert_error(refused, 429, "overloaded")
    assert "50 beam rows" in message
    assert int(refused.headers["Retry-After"]) >= 1
    assert await running.metric('rectokens_rejected_total{reason="overloaded"}') == 1
    engine.gate.set()
    assert {(await first).status_code, (await second).status_code} == {200}


async def test_a_deadline_that_passes_is_a_504(running, engine):
    engine.gate.clear()
    response = await running.post({"history": [], "timeout_ms": 30})
    assert_error(response, 504, "deadline_exceeded", "timeout_ms")
    engine.gate.set()


async def test_a_faulty_request_is_a_500_with_an_id_and_no_details(running, engine):
    engine.fault_if = lambda request: True
    response = await running.post({"history": []}, headers={"X-Request-ID": "abc-1"})
    message = assert_error(response, 500, "engine_fault")
    assert "made to order" not in response.text
    assert "request id" in message
    assert response.headers["X-Request-ID"] == "abc-1"
    engine.fault_if = lambda request: False
    assert (await running.post({"history": []})).status_code == 200


async def test_an_unforeseen_error_is_a_500_without_a_traceback(running, monkeypatch):
    def explode(*args):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("server.recommender.present", explode)
    response = await running.post({"history": []})
    assert_error(response, 500, "internal")
    assert "secret" not in response.text
    assert response.headers["X-Request-ID"]
    assert await running.metric('rectokens_rejected_total{reason="internal"}') == 1


async def test_concurrent_requests_share_a_batch(running, engine):
    engine.gate.clear()
    first = asyncio.create_task(running.post({"history": []}))
    await begun(engine, 1)
    others = [
        asyncio.create_task(running.post({"history": [f"B{i:03d}"], "top_k": i + 1}))
        for i in range(6)
    ]
    await metric_is(running, "rectokens_queue_requests", 6)
    engine.gate.set()
    responses = await asyncio.gather(first, *others)
    assert [len(ids(response)) for response in responses] == [10, 1, 2, 3, 4, 5, 6]
    assert [len(batch) for batch in engine.batches] == [1, 6]


async def test_a_request_keeps_the_release_it_was_admitted_under(running, engine, dummy):
    engine.gate.clear()
    before = asyncio.create_task(running.post({"history": []}))
    await begun(engine, 1)
    queued = asyncio.create_task(running.post({"history": []}))
    await metric_is(running, "rectokens_queue_requests", 1)
    running.service.activate(dummy.make_release(model_version="model0000000000b"))
    after = asyncio.create_task(running.post({"history": []}))
    await metric_is(running, "rectokens_queue_requests", 2)
    engine.gate.set()
    versions = [(await task).json()["model_version"][-1] for task in (before, queued, after)]
    assert versions == ["a", "a", "b"]


async def call_asgi(app, messages, scope_headers=()):
    """Drive the app with hand-made messages; returns what it sent."""
    sent = []
    headers = [(b"content-type", b"application/json"), *scope_headers]
    scope = http_scope("/v1/recommend", headers)

    async def send(message):
        sent.append(message)

    await app(scope, messages, send)
    return sent


async def test_a_client_that_leaves_while_it_sends_is_no_fault_of_ours(running):
    body = iter([{"type": "http.request", "body": b'{"hist', "more_body": True}])

    async def receive():
        return next(body, {"type": "http.disconnect"})

    start, _ = await call_asgi(running.app, receive)
    assert start["status"] == 499
    assert await running.metric('rectokens_rejected_total{reason="client_gone"}') == 1


async def test_a_client_that_leaves_frees_its_place_in_the_queue(running, engine):
    engine.gate.clear()
    head = asyncio.create_task(running.post({"history": []}))
    await begun(engine, 1)
    leave = asyncio.Event()
    body = iter([{"type": "http.request", "body": b'{"history": []}', "more_body": False}])

    async def receive():
        message = next(body, None)
        if message is None:
            await leave.wait()
            return {"type": "http.disconnect"}
        return message

    leaver = asyncio.create_task(call_asgi(running.app, receive))
    await metric_is(running, "rectokens_queue_requests", 1)
    leave.set()
    await leaver
    assert await running.metric("rectokens_queue_requests") == 0
    assert await running.metric("rectokens_queue_beam_rows") == 0
    assert await running.metric('rectokens_rejected_total{reason="client_gone"}') == 1
    engine.gate.set()
    assert (await head).status_code == 200
    assert [len(batch) for batch in engine.batches] == [1]


async def test_health_answers_while_requests_are_being_prepared(start_app, dummy, monkeypatch):
    """A long request is turned into a prompt off the event loop."""
    import threading

    import server.recommender

    entered, go_on, prepare = threading.Event(), threading.Event(), server.recommender.prepare

    def slow(query, release):
        entered.set()
        assert go_on.wait(timeout=LIMIT_S)
        return prepare(query, release)

    monkeypatch.setattr("server.recommender.prepare", slow)
    running = await start_app(dummy.make_release())
    body = {"history": ["B001"] * 1_000, "exclude_items": ["B002"] * 1_100}
    task = asyncio.create_task(running.post(body))
    await asyncio.to_thread(entered.wait, LIMIT_S)
    assert (await running.client.get("/health")).status_code == 200
    go_on.set()
    assert (await task).status_code == 200
