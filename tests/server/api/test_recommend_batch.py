"""Many users at once: a line each, beside everybody else, no faster than they are read."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest

from server.api.recommend_batch import RecommendBatchLine
from tests.server.asgi import http_scope
from tests.waiting import LIMIT_S, until

URL = "/v1/recommend/batch"


@pytest.fixture
async def running(start_app, dummy, engine):
    return await start_app(dummy.make_release(engine), batching__max_bulk_in_flight=8)


def lines_of(text: str) -> list[dict[str, Any]]:
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


async def batch(running, *bodies, **kwargs):
    return await running.client.post(URL, json={"requests": list(bodies)}, **kwargs)


async def test_every_request_has_its_line(running):
    bodies = [{"history": [f"B{i:03d}"], "top_k": 1 + i % 5} for i in range(30)]
    response = await batch(running, *bodies)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = lines_of(response.text)
    for line in lines:
        RecommendBatchLine.model_validate_json(json.dumps(line), strict=True)
    assert sorted(line["index"] for line in lines) == list(range(30))
    for line in lines:
        alone = (await running.post(bodies[line["index"]])).json()
        assert line["status"] == 200
        assert line["answer"]["items"] == alone["items"]


async def test_a_request_that_fails_fails_in_its_line(running, engine):
    engine.fault_if = lambda request: request.beam_width == 13
    response = await batch(
        running,
        {"history": ["B001"]},
        {"history": ["nope"]},
        {"history": [], "top_k": 2_000, "beam_width": 2_000},
        {"history": [], "beam_width": 13},
        {"history": [], "constraint_set": "odd"},
    )
    lines = {line["index"]: line for line in lines_of(response.text)}
    assert lines[0]["status"] == 200
    found = {i: (line["status"], line["error"]["code"]) for i, line in lines.items() if i}
    assert found == {
        1: (422, "no_known_items"),
        2: (422, "invalid_value"),
        3: (500, "engine_fault"),
        4: (422, "invalid_value"),
    }
    assert lines[2]["error"]["param"] == "top_k"
    assert await running.metric('rectokens_rejected_total{reason="engine_fault"}') == 1


async def test_what_is_no_batch_is_refused_as_a_whole(start_app, dummy):
    running = await start_app(
        dummy.make_release(), limits__max_bulk_requests=3, limits__max_bulk_body_bytes=2_000
    )
    for body, status, param, message in [
        ({}, 422, "requests", "missing"),
        ({"requests": []}, 422, "requests", "at least 1"),
        ({"requests": [{"history": []}] * 4}, 422, "requests", "4 entries; at most 3"),
        ({"requests": [{}, {"history": []}]}, 422, "requests.0", "neither history nor input"),
        (
            {"requests": [{"history": []}, {"history": [], "topk": 3}]},
            422,
            "requests.1.topk",
            "did you mean top_k?",
        ),
        ({"requests": [{"history": [], "top_k": "3"}]}, 422, "requests.0.top_k", "integer"),
        (
            {"requests": [{"input": [{"item": "a"}, {"txt": "b"}]}]},
            422,
            "requests.0.input.1",
            "unknown field requests.0.input.1.txt; did you mean text?",
        ),
        ({"request": []}, 422, "request", "unknown field"),
        ({"requests": [{"history": ["x" * 2_000]}]}, 413, None, "at most 2000"),
    ]:
        response = await running.client.post(URL, json=body)
        error = response.json()["error"]
        assert response.status_code == status, error
        assert (error["param"] or "").startswith(param or "")
        assert message in error["message"]
    await running.service.hold(0)
    response = await running.client.post(URL, json={"requests": [{"history": []}]})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")


async def test_no_more_are_in_flight_than_allowed(running, engine):
    most = 0

    def look(requests):
        nonlocal most
        most = max(most, len(requests) + running.service._batcher.queued_requests)

    engine.on_search = look
    response = await batch(running, *[{"history": [], "beam_width": 20}] * 60)
    assert len(lines_of(response.text)) == 60
    assert most <= 8


async def test_an_online_request_waits_for_few_of_them_only(running, engine):
    """Eight may be in flight, so however many there are, the next batch but one has room."""
    engine.on_search = lambda requests: engine.gate.clear() if len(engine.batches) == 3 else None
    bulk = asyncio.create_task(batch(running, *[{"history": [], "beam_width": 20}] * 200))
    await asyncio.to_thread(engine.wait_for_batches, 4)
    online = asyncio.create_task(running.post({"history": [], "beam_width": 33}))
    await until(lambda: running.service._batcher.queued_beam_rows % 20 == 13)
    before = len(engine.batches)
    engine.gate.set()
    assert (await online).status_code == 200
    mine = next(i for i, b in enumerate(engine.batches) if any(r.beam_width == 33 for r in b))
    assert mine - before <= 2
    assert len(lines_of((await bulk).text)) == 200


async def test_a_full_queue_is_waited_out(start_app, dummy, engine):
    running = await start_app(dummy.make_release(engine), batching__max_queued_requests=1)
    engine.gate.clear()
    online = asyncio.create_task(running.post({"history": []}))
    await asyncio.to_thread(engine.wait_for_batches, 1)
    queued = asyncio.create_task(running.post({"history": []}))
    await until(lambda: running.service._batcher.queued_requests == 1)
    bulk = asyncio.create_task(batch(running, *[{"history": []}] * 5))
    await asyncio.sleep(0.05)
    engine.gate.set()
    assert [line["status"] for line in lines_of((await bulk).text)] == [200] * 5
    assert (await online).status_code == (await queued).status_code == 200


async def test_what_had_no_turn_in_time_fails(start_app, dummy, engine):
    running = await start_app(
        dummy.make_release(engine), limits__bulk_timeout_s=0.5, batching__max_bulk_in_flight=1
    )
    engine.on_search = lambda requests: time.sleep(0.6)
    lines = lines_of((await batch(running, *[{"history": []}] * 3)).text)
    assert [line["status"] for line in lines] == [200, 504, 504]
    assert "bulk request" in lines[1]["error"]["message"]


async def test_bulk_requests_are_bounded_in_number(start_app, dummy, engine):
    running = await start_app(dummy.make_release(engine), batching__max_bulk_streams=1)
    engine.gate.clear()
    first = asyncio.create_task(batch(running, {"history": []}))
    await asyncio.to_thread(engine.wait_for_batches, 1)
    response = await batch(running, {"history": []})
    assert response.status_code == 429
    assert response.headers["retry-after"]
    assert "1 bulk requests" in response.json()["error"]["message"]
    engine.gate.set()
    assert (await first).status_code == 200
    assert (await batch(running, {"history": []})).status_code == 200


class Connection:
    """A client of the ASGI app that reads no faster than it is told to."""

    def __init__(self, app: Any, body: Any) -> None:
        self.lines: list[Any] = []
        self.may_read = asyncio.Semaphore(0)
        self.gone = asyncio.Event()
        self._body = json.dumps(body).encode()
        self._sent = False
        scope = http_scope(URL, [(b"content-type", b"application/json")])
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> Any:
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.body" and message["body"]:
            await self.may_read.acquire()
            self.lines.append(json.loads(message["body"]))


async def test_a_client_that_does_not_read_stops_the_work(running, engine):
    connection = Connection(running.app, {"requests": [{"history": []}] * 500})
    done = quiet = 0
    while quiet < 5:
        await asyncio.sleep(0.02)
        before, done = done, sum(map(len, engine.batches))
        at_rest = 0 < done == before and running.service._batcher.queued_requests == 0
        quiet = quiet + 1 if at_rest else 0
    # One being sent, eight answers kept, eight workers that hold one each.
    assert done <= 8 * 2 + 1
    # Meanwhile the lane is free for others.
    assert (await batch(running, {"history": []})).status_code == 200
    for _ in range(500):
        connection.may_read.release()
    await connection.task
    assert sorted(line["index"] for line in connection.lines) == list(range(500))


async def test_a_client_that_leaves_cancels_the_rest(running, engine):
    engine.on_search = lambda requests: time.sleep(0.01)
    connection = Connection(running.app, {"requests": [{"history": []}] * 500})
    connection.may_read.release()
    await asyncio.to_thread(engine.wait_for_batches, 2)
    connection.gone.set()
    await connection.task
    assert running.service._batcher.queued_requests == 0
    done = sum(map(len, engine.batches))
    assert done < 100
    await running.post({"history": []})
    assert sum(map(len, engine.batches)) == done + 1
    assert await running.metric('rectokens_rejected_total{reason="client_gone"}') == 1
    assert running.service.bulk._streams == 0


async def test_a_client_that_never_reads_is_cut_off(start_app, dummy, monkeypatch):
    from server.api import recommend_batch

    monkeypatch.setattr(recommend_batch, "_LAST_LINES_S", 0.05)
    running = await start_app(dummy.make_release(), limits__bulk_timeout_s=0.05)
    connection = Connection(running.app, {"requests": [{"history": []}] * 50})
    await asyncio.wait_for(connection.task, LIMIT_S)
    assert connection.lines == []
    assert running.service.bulk._streams == 0


def test_over_a_socket_lines_come_as_they_finish(start_process):
    """Each is there before the next one is worked at."""
    server = start_process("told", "batching.max_requests=1")
    server.read_until("release active")
    server.tell("hold")
    body = {"requests": [{"history": []}] * 3}
    server.tell("step")  # who asks may not hear anything before that
    with httpx.stream("POST", server.url + URL, json=body, timeout=LIMIT_S) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert json.loads(next(lines))["status"] == 200
        for _ in range(2):
            server.tell("step")
            assert json.loads(next(lines))["status"] == 200
        assert list(lines) == []
