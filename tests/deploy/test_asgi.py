"""One request to an app in the same process."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from deploy.ray.asgi import AppError, HttpRequest, ResponseStart, respond, stream


async def echo(request: Request) -> JSONResponse:
    body = await request.body()
    return JSONResponse(
        {
            "method": request.method,
            "path": request.url.path,
            "query": dict(request.query_params),
            "header": request.headers.get("x-one"),
            "body": body.decode(),
            "client": list(request.client or ()),
        },
        201,
    )


async def parts(request: Request) -> StreamingResponse:
    async def generate() -> Any:
        for number in range(40):
            yield f"{number},"

    return StreamingResponse(generate(), 206)


APP = Starlette(routes=[Route("/echo/it", echo, methods=["POST"]), Route("/parts", parts)])
REQUEST = HttpRequest(
    "POST", "/echo/it", b"a=1&b=%20", ((b"x-one", b"two"),), b"hello", ("10.0.0.1", 99)
)


async def test_the_app_sees_the_request_and_the_caller_its_answer() -> None:
    answer = await respond(APP, REQUEST)
    assert answer.status == 201
    assert dict(answer.headers)[b"content-type"] == b"application/json"
    assert JSONResponse(
        {
            "method": "POST",
            "path": "/echo/it",
            "query": {"a": "1", "b": " "},
            "header": "two",
            "body": "hello",
            "client": ["10.0.0.1", 99],
        }
    ).body == (answer.body)


async def test_streamed_it_is_the_same() -> None:
    got = [part async for part in stream(APP, HttpRequest("GET", "/parts"))]
    assert isinstance(got[0], ResponseStart)
    assert got[0].status == 206
    whole = await respond(APP, HttpRequest("GET", "/parts"))
    assert b"".join(got[1:]) == whole.body == "".join(f"{n}," for n in range(40)).encode()


async def test_cancelling_cancels_the_app() -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    calling = asyncio.create_task(respond(app, REQUEST))
    await began.wait()
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert ended.is_set()


async def test_who_reads_no_further_is_not_written_to_for_ever() -> None:
    """The app waits where parts lie unread, and is cancelled when the reader leaves."""
    sent, ended = 0, asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
                sent += 1
        finally:
            ended.set()

    reading = stream(app, REQUEST)
    await anext(reading)
    await anext(reading)
    for _ in range(200):
        await asyncio.sleep(0)
    assert sent < 40
    await reading.aclose()
    assert ended.is_set()


@pytest.mark.parametrize("call", ["whole", "streamed"])
async def test_half_an_answer_is_an_error(call: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})

    async def read() -> None:
        async for _ in stream(app, REQUEST):
            pass

    with pytest.raises(AppError):
        await (respond(app, REQUEST) if call == "whole" else read())


async def test_errors_of_the_app_reach_the_caller() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise KeyError("gone")

    with pytest.raises(KeyError):
        await respond(app, REQUEST)
    with pytest.raises(KeyError):
        await anext(stream(app, REQUEST))
