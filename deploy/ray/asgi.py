"""One HTTP request to an ASGI app in this process, as plain data that travels between processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Scope

Headers = tuple[tuple[bytes, bytes], ...]

# Parts of an answer that may lie unread before the app waits.
_UNREAD_PARTS = 16


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A request that has been read.

    Attributes:
        method: ``POST``.
        path: decoded, ``/v1/recommend``.
        query: what follows the question mark.
        headers: names in lower case.
        body: all of it.
        client: host and port of the caller, where known.
    """

    method: str
    path: str
    query: bytes = b""
    headers: Headers = ()
    body: bytes = b""
    client: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class ResponseStart:
    """What comes before the body."""

    status: int
    headers: Headers


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """An answer with its body."""

    status: int
    headers: Headers
    body: bytes


class AppError(RuntimeError):
    """The app ended without a whole answer."""


async def respond(app: ASGIApp, request: HttpRequest) -> HttpResponse:
    """The app's answer; cancelling cancels what the app does.

    Raises:
        AppError: the app ended without one.
        Exception: whatever the app raises.
    """
    start: ResponseStart | None = None
    body = bytearray()
    ended = False

    async def send(message: Message) -> None:
        nonlocal start, ended
        if message["type"] == "http.response.start":
            start = _start(message)
        elif message["type"] == "http.response.body":
            body.extend(message.get("body", b""))
            ended = not message.get("more_body", False)

    await app(_scope(request), _Receiver(request), send)
    if start is None or not ended:
        raise AppError("the app left its answer open")
    return HttpResponse(start.status, start.headers, bytes(body))


async def stream(app: ASGIApp, request: HttpRequest) -> AsyncGenerator[ResponseStart | bytes]:
    """The app's answer as it comes: its start, then parts of its body.

    Closing the generator tells the app that the caller has gone, and cancels it.

    Raises:
        AppError: the app left its answer open.
        Exception: whatever the app raises.
    """
    parts: asyncio.Queue[ResponseStart | bytes | None] = asyncio.Queue()
    room = asyncio.Semaphore(_UNREAD_PARTS)
    ended = gone = False

    async def put(part: ResponseStart | bytes) -> None:
        if not gone:
            await room.acquire()
        if gone:
            raise ConnectionError("the caller has gone")
        parts.put_nowait(part)

    async def send(message: Message) -> None:
        nonlocal ended
        if message["type"] == "http.response.start":
            await put(_start(message))
        elif message["type"] == "http.response.body":
            if message.get("body"):
                await put(bytes(message["body"]))
            ended = not message.get("more_body", False)

    async def run() -> None:
        try:
            await app(_scope(request), _Receiver(request), send)
        finally:
            parts.put_nowait(None)

    running = asyncio.create_task(run())
    try:
        while (part := await parts.get()) is not None:
            room.release()
            yield part
        await running
        if not ended:
            raise AppError("the app left its answer open")
    finally:
        gone = True
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


class _Receiver:
    """The body at once, then nothing: whoever leaves cancels."""

    def __init__(self, request: HttpRequest) -> None:
        self._body: bytes | None = request.body

    async def __call__(self) -> Message:
        body, self._body = self._body, None
        if body is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": body, "more_body": False}


def _start(message: Message) -> ResponseStart:
    headers = tuple((bytes(name), bytes(value)) for name, value in message.get("headers", ()))
    return ResponseStart(message["status"], headers)


def _scope(request: HttpRequest) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": request.query,
        "root_path": "",
        "headers": list(request.headers),
        "client": request.client,
        "server": None,
        "state": {},
    }
