from __future__ import annotations

import asyncio
import threading

import pytest

from tests.waiting import LIMIT_S, until


def assert_unavailable(response, code):
    assert response.status_code == 503
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.json()["error"]["code"] == code


async def test_ready_tells_the_versions(start_app, dummy):
    running = await start_app(dummy.make_release())
    response = await running.client.get("/ready")
    assert response.status_code == 200
    body = response.json()
    assert 0 <= body.pop("active_s") < 60
    assert body == {
        "status": "ready",
        "model": "dummy",
        "model_version": "model0000000000a",
        "catalog_version": "unsaved",
        "tokenizer_fingerprint": dummy.FINGERPRINT,
        "num_items": 30,
        "release_version": None,
        "catalog_age_s": None,
        "store": None,
    }
    assert (await running.client.get("/health")).json() == {"status": "ok"}


async def test_while_loading_it_is_alive_but_not_ready(start_app, dummy):
    go_on = threading.Event()

    def load():
        assert go_on.wait(timeout=LIMIT_S)
        return dummy.make_release()

    running = await start_app(None, load=load, wait=False)
    assert (await running.client.get("/health")).status_code == 200
    assert (await running.client.get("/metrics")).status_code == 200
    for response in (
        await running.client.get("/ready"),
        await running.client.get("/v1/models"),
        await running.post({"history": []}),
    ):
        assert_unavailable(response, "loading")
        assert response.headers["Retry-After"] == "1"
    go_on.set()
    await until(lambda: running.service.phase == "ready")
    assert (await running.client.get("/ready")).status_code == 200
    assert (await running.post({"history": []})).status_code == 200


async def test_a_failed_load_is_told_and_never_becomes_ready(start_app):
    from server.release import ReleaseError

    def load():
        raise ReleaseError("no such folder")

    running = await start_app(None, load=load, wait=False)
    await until(lambda: running.service.load_error is not None)
    assert_unavailable(await running.client.get("/ready"), "loading")


async def test_while_draining_it_is_alive_but_not_ready_and_finishes_what_it_has(start_app, dummy):
    engine = dummy.DummyEngine()
    running = await start_app(dummy.make_release(engine))
    engine.gate.clear()
    task = asyncio.create_task(running.post({"history": []}))
    await asyncio.to_thread(engine.wait_for_batches, 1)
    draining = asyncio.create_task(running.service.drain(timeout_s=LIMIT_S))
    await asyncio.sleep(0)
    assert_unavailable(await running.client.get("/ready"), "draining")
    assert_unavailable(await running.post({"history": []}), "draining")
    assert (await running.client.get("/health")).status_code == 200
    assert not draining.done()
    engine.gate.set()
    assert (await task).status_code == 200
    assert await draining


async def test_a_drain_is_bounded(start_app, dummy):
    engine = dummy.DummyEngine()
    running = await start_app(dummy.make_release(engine))
    engine.gate.clear()
    task = asyncio.create_task(running.post({"history": []}))
    await asyncio.to_thread(engine.wait_for_batches, 1)
    assert not await running.service.drain(timeout_s=0.05)
    engine.gate.set()
    await task


async def test_a_dead_engine_thread_fails_health(start_app, dummy):
    engine = dummy.DummyEngine()

    def die(requests):
        raise SystemExit("gone")

    engine.on_search = die
    running = await start_app(dummy.make_release(engine))
    assert_unavailable(await running.post({"history": []}), "engine_dead")
    assert_unavailable(await running.client.get("/health"), "engine_dead")
    assert_unavailable(await running.client.get("/ready"), "engine_dead")
    assert_unavailable(await running.post({"history": []}), "engine_dead")


async def test_models_in_the_openai_shape(start_app, dummy):
    running = await start_app(dummy.make_release())
    response = await running.client.get("/v1/models")
    assert response.json() == {
        "object": "list",
        "data": [
            {
                "id": "dummy",
                "object": "model",
                "created": 1_700_000_000,
                "owned_by": "rectokens",
                "model_version": "model0000000000a",
                "catalog_version": "unsaved",
                "tokenizer_fingerprint": dummy.FINGERPRINT,
                "num_items": 30,
                "num_levels": 3,
                "codebook_size": 4,
                "constraint_sets": ["early", "even"],
                "max_prompt_tokens": 64,
            }
        ],
    }


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models"])
async def test_two_apps_in_one_process_do_not_meet(start_app, dummy, path):
    first = await start_app(dummy.make_release())
    second = await start_app(dummy.make_release(num_items=20))
    assert (await first.client.get(path)).status_code == 200
    assert (await second.client.get(path)).status_code == 200
    assert await first.metric("rectokens_catalog_items") == 30
    assert await second.metric("rectokens_catalog_items") == 20
