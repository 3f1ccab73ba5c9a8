"""A replica without Ray: the service's own app, started, asked and ended."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from deploy.ray.asgi import HttpRequest, ResponseStart
from deploy.ray.replica import VariantServer, create_service_app
from server.app import create_app
from server.errors import ServiceError
from server.release import ReleaseError
from server.settings import load_settings
from tests.waiting import until

JSON = ((b"content-type", b"application/json"),)


def post(body: Any, path: str = "/v1/recommend") -> HttpRequest:
    return HttpRequest("POST", path, headers=JSON, body=orjson.dumps(body))


def server(release: Any, **flags: Any) -> VariantServer:
    # However slow the machine is just now.
    flags = {"defaults__timeout_ms": 60_000, **flags}
    settings = load_settings({key.replace("__", "."): value for key, value in flags.items()})
    return VariantServer("a", "r1", create_app(settings, lambda: release))


async def test_it_is_ready_once_started_and_says_who_it_is(dummy: Any) -> None:
    replica = server(dummy.make_release())
    await replica.start()
    answer = await replica.call(post({"history": ["B001"], "top_k": 2}))
    assert answer.status == 200
    assert [item["item_id"] for item in orjson.loads(answer.body)["items"]] == ["B000", "B002"]
    headers = dict(answer.headers)
    assert headers[b"x-variant"] == b"a"
    assert headers[b"x-replica"] == b"r1"
    assert (await replica.call(HttpRequest("GET", "/ready"))).status == 200
    await replica.stop()


async def test_a_stream_is_the_whole_answer_in_parts(dummy: Any) -> None:
    replica = server(dummy.make_release())
    await replica.start()
    request = post({"requests": [{"history": []}] * 3}, "/v1/recommend/batch")
    start, *parts = [part async for part in replica.stream(request)]
    assert isinstance(start, ResponseStart)
    assert (b"x-replica", b"r1") in start.headers
    assert len(b"".join(parts).splitlines()) == 3
    await replica.stop()


async def test_a_release_that_cannot_be_loaded_ends_the_start(dummy: Any) -> None:
    def load() -> Any:
        raise ReleaseError("the model folder is empty")

    replica = VariantServer("a", "r1", create_app(load_settings({}), load))
    with pytest.raises(ReleaseError, match="the model folder is empty"):
        await replica.start()


async def test_a_store_that_cannot_be_opened_ends_the_start(tmp_path: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ReleaseError):
        create_service_app(load_settings({"store.path": str(tmp_path / "file" / "store")}))


async def test_its_load_is_the_beam_rows_that_wait_and_run(dummy: Any) -> None:
    engine = dummy.DummyEngine()
    replica = server(dummy.make_release(engine), batching__max_requests=1)
    await replica.start()
    assert replica.load() == {"beam_rows": 0.0}
    engine.gate.clear()
    calls = [
        asyncio.create_task(replica.call(post({"history": [], "top_k": 1, "beam_width": 10})))
        for _ in range(3)
    ]
    await until(lambda: replica.load() == {"beam_rows": 30.0}, replica.load)
    engine.gate.set()
    assert {answer.status for answer in await asyncio.gather(*calls)} == {200}
    await until(lambda: replica.load() == {"beam_rows": 0.0}, replica.load)
    await replica.stop()


async def test_stopping_finishes_what_is_being_answered(dummy: Any) -> None:
    engine = dummy.DummyEngine()
    replica = server(dummy.make_release(engine))
    await replica.start()
    engine.gate.clear()
    call = asyncio.create_task(replica.call(post({"history": []})))
    await until(lambda: engine.batches)
    stopping = asyncio.create_task(replica.stop())
    await asyncio.sleep(0.05)
    assert not stopping.done()
    engine.gate.set()
    assert (await call).status == 200
    await stopping


async def test_cancelling_a_call_frees_its_place(dummy: Any) -> None:
    engine = dummy.DummyEngine()
    replica = server(dummy.make_release(engine), batching__max_requests=1)
    await replica.start()
    engine.gate.clear()
    first = asyncio.create_task(replica.call(post({"history": [], "beam_width": 20})))
    await until(lambda: engine.batches)
    second = asyncio.create_task(replica.call(post({"history": [], "beam_width": 20})))
    await until(lambda: replica.load() == {"beam_rows": 40.0}, replica.load)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert replica.load() == {"beam_rows": 20.0}
    engine.gate.set()
    assert (await first).status == 200
    await replica.stop()


async def test_a_dead_engine_fails_the_check(dummy: Any) -> None:
    engine = dummy.DummyEngine()

    def die(requests: Any) -> None:
        raise SystemExit

    engine.on_search = die
    replica = server(dummy.make_release(engine))
    await replica.start()
    replica.check()
    assert (await replica.call(post({"history": []}))).status == 503
    with pytest.raises(ServiceError, match="stopped working"):
        replica.check()
    await replica.stop()
