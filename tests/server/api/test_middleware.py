from __future__ import annotations

import asyncio
import gzip

import httpx
import pytest


@pytest.fixture
async def running(start_app, dummy):
    return await start_app(
        dummy.make_release(), limits__max_body_bytes=2_000, limits__body_timeout_s=0.2
    )


def assert_error(response, status, code):
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    return response.json()["error"]["message"]


async def test_a_usable_request_id_is_kept(running):
    for given in ("abc", "a-B_c.1:2", "x" * 128):
        response = await running.client.get("/health", headers={"X-Request-ID": given})
        assert response.headers["X-Request-ID"] == given


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a;b", '{"a":1}', "é".encode()])
async def test_any_other_request_id_is_replaced(running, given):
    response = await running.client.get("/health", headers={"X-Request-ID": given})
    assert response.status_code == 200
    assert len(response.headers["X-Request-ID"]) == 32


async def test_every_answer_has_an_id_of_its_own(running):
    ids = {
        (await running.client.get(path)).headers["X-Request-ID"]
        for path in ("/health", "/ready", "/nowhere", "/v1/recommend")
    }
    assert len(ids) == 4


JSON = {"Content-Type": "application/json"}


async def test_a_body_too_large_by_its_header_is_refused_unread(running):
    message = assert_error(
        await running.client.post("/v1/recommend", content=b"x" * 2_001, headers=JSON),
        413,
        "body_too_large",
    )
    assert "2001" in message
    assert "2000" in message


async def test_a_body_of_the_largest_size_is_read(running):
    content = b'{"history": []' + b" " * 1_985 + b"}"
    assert len(content) == 2_000
    response = await running.client.post("/v1/recommend", content=content, headers=JSON)
    assert response.status_code == 200


async def test_a_chunked_body_is_refused_once_it_is_too_large(running):
    sent = 0

    async def chunks():
        nonlocal sent
        for _ in range(1_000):
            sent += 1
            yield b" " * 500

    response = await running.client.post("/v1/recommend", content=chunks(), headers=JSON)
    assert "2000" in assert_error(response, 413, "body_too_large")
    assert sent <= 5
    assert await running.metric('rectokens_rejected_total{reason="body_too_large"}') == 1


async def test_a_body_that_does_not_come_is_a_408(running):
    async def chunks():
        yield b'{"history"'
        await asyncio.sleep(30)
        yield b": []}"

    response = await running.client.post("/v1/recommend", content=chunks(), headers=JSON)
    assert "0.2 seconds" in assert_error(response, 408, "body_timeout")


async def test_a_slow_answer_is_no_slow_body(start_app, dummy):
    """The time for the body ends with the body."""
    engine = dummy.DummyEngine()
    running = await start_app(dummy.make_release(engine), limits__body_timeout_s=0.05)
    engine.gate.clear()
    task = asyncio.create_task(running.post({"history": []}))
    await asyncio.sleep(0.2)
    engine.gate.set()
    assert (await task).status_code == 200


async def preflight(running) -> httpx.Response:
    return await running.client.options(
        "/v1/recommend",
        headers={"Origin": "https://a.example", "Access-Control-Request-Method": "POST"},
    )


async def test_browsers_are_let_in_by_the_settings_only(start_app, dummy):
    closed = await start_app(dummy.make_release())
    assert "access-control-allow-origin" not in (await preflight(closed)).headers
    opened = await start_app(dummy.make_release(), http__cors_origins="https://a.example")
    response = await preflight(opened)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://a.example"


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "br", "identity, gzip", ""])
async def test_a_compressed_body_is_refused_by_its_name(running, encoding):
    headers = {**JSON, "Content-Encoding": encoding}
    response = await running.client.post(
        "/v1/recommend", content=gzip.compress(b"{}"), headers=headers
    )
    assert repr(encoding) in assert_error(response, 415, "unsupported_media_type")


async def test_identity_is_no_compression(running):
    headers = {**JSON, "Content-Encoding": "Identity"}
    response = await running.client.post(
        "/v1/recommend", content=b'{"history": []}', headers=headers
    )
    assert response.status_code == 200
