"""What happens around every request: its id, its log line, its size and its unexpected end."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import TypeVar

import structlog
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.access.guard import ApiKeys, log_fields
from server.access.middleware import ApiKeyMiddleware
from server.api.responses import error_response
from server.errors import INTERNAL_MESSAGE, ErrorKind, let_go
from server.metrics import HttpMetrics
from server.settings import Settings
from server.tracing.spans import Spans

T = TypeVar("T")

_log = structlog.get_logger(__name__)

_NOTHING: Mapping[str, int] = MappingProxyType({})
_NO_TIMES: Mapping[str, float] = MappingProxyType({})
# Of an app of ours, that need no API key: what they tell is for orchestrators and readers.
OPEN_PATHS = ("/health", "/ready", "/metrics", "/openapi.json", "/docs", "/docs/")
REQUEST_ID_HEADER = "X-Request-ID"
# Printable and harmless in a log or a header; anything else is replaced, not refused.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def add_middleware(
    app: FastAPI,
    settings: Settings,
    metrics: HttpMetrics,
    *,
    max_bytes: int,
    max_bytes_below: Mapping[str, int] = _NOTHING,
    timeout_s_below: Mapping[str, float] = _NO_TIMES,
    open_paths: Collection[str],
    spans: Spans,
) -> None:
    """Put what happens around every request around an app.

    Args:
        max_bytes: see ``BodyLimitMiddleware``, and the two after it.
        open_paths: that need no API key where there are any; see ``ApiKeyMiddleware``.
        spans: told of every request.

    Raises:
        SettingsError: the file of API keys cannot be used.
    """
    # The last one added is the outermost.
    app.add_middleware(
        BodyLimitMiddleware,
        metrics=metrics,
        max_bytes=max_bytes,
        timeout_s=settings.limits.body_timeout_s,
        max_bytes_below=max_bytes_below,
        timeout_s_below=timeout_s_below,
    )
    if settings.access.keys_file is not None:
        keys = ApiKeys(settings.access, prefix=metrics.prefix)
        metrics.registry.register(keys)
        app.add_middleware(ApiKeyMiddleware, metrics=metrics, keys=keys, open_paths=open_paths)
    if settings.http.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.http.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", REQUEST_ID_HEADER],
            expose_headers=[REQUEST_ID_HEADER, "Retry-After"],
        )
    app.add_middleware(RequestContextMiddleware, metrics=metrics, spans=spans)
    app.add_middleware(_around, spans=spans)


def _around(app: ASGIApp, spans: Spans) -> ASGIApp:
    return spans.around(app)


class RequestContextMiddleware:
    """Gives each request an id, logs and counts it, and turns what nobody caught into a 500.

    A valid ``X-Request-ID`` is kept; the answer carries the id either way.
    """

    def __init__(self, app: ASGIApp, metrics: HttpMetrics, spans: Spans) -> None:
        self._app = app
        self._metrics = metrics
        self._spans = spans

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
                self._spans.routed(scope["method"], _route_template(scope))
            await send(message)

        started = time.monotonic()
        # What is below leaves there who makes the request.
        scope.setdefault("state", {})
        fields = self._spans.began(request_id)
        with structlog.contextvars.bound_contextvars(request_id=request_id, **fields):
            try:
                await self._app(scope, receive, send_with_id)
            except Exception as error:
                _log.exception("unexpected error", **log_fields(scope["state"]))
                let_go(error)
                self._metrics.rejected(ErrorKind.INTERNAL)
                if status is None:
                    response = error_response(ErrorKind.INTERNAL, INTERNAL_MESSAGE)
                    await response(scope, receive, send_with_id)
            finally:
                seconds = time.monotonic() - started
                route = _route_template(scope)
                # No status: the task was cancelled, because the server ended.
                self._metrics.request_finished(route, status or 499, seconds)
                _log.debug(
                    "request",
                    route=route,
                    status=status,
                    duration_ms=round(seconds * 1000, 2),
                    **log_fields(scope["state"]),
                )


class BodyLimitMiddleware:
    """Bounds the size of a body and the time it takes to arrive, while it streams in.

    A compressed body is refused: what it unpacks to would have no such bounds.

    Args:
        max_bytes: a body over it is refused as soon as that is known, at best from its header.
        timeout_s: seconds from the first read to the last byte.
        max_bytes_below: instead of ``max_bytes``, for paths that begin so.
        timeout_s_below: instead of ``timeout_s``, likewise.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: HttpMetrics,
        *,
        max_bytes: int,
        timeout_s: float,
        max_bytes_below: Mapping[str, int] = _NOTHING,
        timeout_s_below: Mapping[str, float] = _NO_TIMES,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._max_bytes = max_bytes
        self._max_bytes_below = max_bytes_below
        self._timeout_s = timeout_s
        self._timeout_s_below = timeout_s_below

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = _below(self._max_bytes_below, scope["path"], self._max_bytes)
        timeout_s = _below(self._timeout_s_below, scope["path"], self._timeout_s)
        headers = Headers(scope=scope)
        encoding = headers.get("content-encoding", "identity")
        if encoding.strip().lower() != "identity":
            # Unpacked, a body of few bytes may have any number of them.
            self._metrics.rejected(ErrorKind.UNSUPPORTED_MEDIA_TYPE)
            response = error_response(
                ErrorKind.UNSUPPORTED_MEDIA_TYPE,
                f"content encoding is {encoding[:80]!r}; bodies are taken uncompressed only",
            )
            await response(scope, receive, send)
            return
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            self._metrics.rejected(ErrorKind.BODY_TOO_LARGE)
            response = error_response(
                ErrorKind.BODY_TOO_LARGE, _too_large(f"has {int(declared)} bytes", limit)
            )
            await response(scope, receive, send)
            return

        received = 0
        complete = False
        deadline: float | None = None
        loop = asyncio.get_running_loop()

        async def receive_bounded() -> Message:
            nonlocal received, complete, deadline
            if complete:
                return await receive()
            deadline = loop.time() + timeout_s if deadline is None else deadline
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, f"body did not arrive within {timeout_s:g} seconds"
                ) from None
            if message["type"] == "http.disconnect":
                # Whoever reads the body would take this for a fault of ours, or of the body.
                raise HTTPException(499, "the client has gone before its body was here")
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if received > limit:
                    raise HTTPException(413, _too_large(f"has over {received - 1} bytes", limit))
            return message

        await self._app(scope, receive_bounded, send)


def _below(special: Mapping[str, T], path: str, usual: T) -> T:
    """What holds for the first entry that the path begins with, else what is usual."""
    return next((value for start, value in special.items() if path.startswith(start)), usual)


def _too_large(found: str, limit: int) -> str:
    return f"body {found}; at most {limit}"


def _route_template(scope: Scope) -> str:
    """Path of the route as declared, so that metrics have few labels whatever clients ask for."""
    path = getattr(scope.get("route"), "path", None)
    if not isinstance(path, str):
        return "other"
    # What an app is mounted below stands in the root path, behind the server's own.
    own = scope.get("app_root_path", "")
    return f"{scope.get('root_path', '').removeprefix(own)}{path}"
