"""The proxy's routes."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import httpx
import orjson
import structlog
from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from server.access.guard import charge
from server.api.disconnect import unless_disconnected
from server.api.responses import JSONResponse, documented_errors
from server.api.sse import EventStream
from server.api.strict_json import StrictJsonRoute
from server.errors import ErrorKind, ServiceError
from server.proxy.bodies import parsed
from server.proxy.chat import ChatStream, to_chat
from server.proxy.events import Convert, relay
from server.proxy.requests import ProxyRequest, read_chat, read_completion
from server.proxy.service import Proxy
from server.proxy.upstream import Answer
from server.tracing.spans import Spans

router = APIRouter(tags=["proxy"], route_class=StrictJsonRoute)
# What orchestrators ask; no key is needed.
open_router = APIRouter(tags=["operations"])

_COMPLETIONS = "v1/completions"
_ANSWER = "the upstream's answer"
_ERRORS = documented_errors(
    ErrorKind.MALFORMED_JSON,
    ErrorKind.UNAUTHORIZED,
    ErrorKind.BODY_TIMEOUT,
    ErrorKind.BODY_TOO_LARGE,
    ErrorKind.UNSUPPORTED_MEDIA_TYPE,
    ErrorKind.INVALID_VALUE,
    ErrorKind.PROMPT_TOO_LONG,
    ErrorKind.OVERLOADED,
    ErrorKind.RATE_LIMITED,
    ErrorKind.DRAINING,
    ErrorKind.UPSTREAM_UNREACHABLE,
    ErrorKind.UPSTREAM_FAILED,
    ErrorKind.UPSTREAM_UNAVAILABLE,
    ErrorKind.UPSTREAM_TIMEOUT,
)
_JSON_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"type": "object"}}},
    }
}


@router.post(
    "/v1/completions", summary="Complete a prompt", responses=_ERRORS, openapi_extra=_JSON_BODY
)
async def completions(request: Request) -> Response:
    """OpenAI's completions. The prompt travels as embeddings, all else as it is."""
    return await _answer(request, chat=False)


@router.post(
    "/v1/chat/completions",
    summary="Continue a chat",
    responses=_ERRORS,
    openapi_extra=_JSON_BODY,
)
async def chat_completions(request: Request) -> Response:
    """OpenAI's chats. The model's own template makes a prompt of the messages; the upstream
    completes it, and the completion comes back in the shape of a chat.
    """
    return await _answer(request, chat=True)


@router.get("/v1/models", summary="What the upstream serves", responses=_ERRORS)
async def models(request: Request) -> Response:
    """The upstream's own answer."""
    proxy = proxy_of(request)
    with proxy.in_flight():
        work = proxy.upstream.get("v1/models", _headers(request, proxy))
        answer = await unless_disconnected(request, work)
        parsed(answer.content, _ANSWER)
        return _passed_on(answer)


@open_router.get("/health", summary="Is the process alive?", responses=documented_errors())
async def health() -> Response:
    """Nothing else is looked at."""
    return JSONResponse({"status": "ok"})


@open_router.get(
    "/ready",
    summary="Are requests being answered?",
    responses=documented_errors(ErrorKind.DRAINING, ErrorKind.UPSTREAM_UNAVAILABLE),
)
async def ready(request: Request) -> Response:
    """503 while shutting down, or while the upstream does not answer."""
    proxy = proxy_of(request)
    proxy.require_running()
    if not await proxy.upstream.is_ready():
        raise ServiceError(
            ErrorKind.UPSTREAM_UNAVAILABLE, "the upstream is not ready", retry_after_s=1.0
        )
    return JSONResponse(
        {
            "status": "ready",
            "hidden_size": proxy.hidden_size,
            "embedding_compression": proxy.settings.embedding_compression,
            "embedding_bits": proxy.settings.embedding_bits,
        }
    )


@open_router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}, **documented_errors()},
)
async def metrics(request: Request) -> Response:
    """Everything with the prefix `rectokens_proxy_`, beside the process's own figures."""
    body = proxy_of(request).metrics.render()
    return Response(body, headers={"Content-Type": CONTENT_TYPE_LATEST})


def proxy_of(request: Request) -> Proxy:
    """The proxy of the app that answers this request."""
    proxy = request.app.state.proxy
    if not isinstance(proxy, Proxy):
        raise TypeError(f"app.state.proxy is a {type(proxy).__name__}, not a Proxy")
    return proxy


async def _answer(request: Request, *, chat: bool) -> Response:
    proxy = proxy_of(request)
    with ExitStack() as held:
        held.enter_context(proxy.in_flight())
        body = await _json_object(request)
        asked = (read_chat if chat else read_completion)(body, proxy.settings)
        charge(request, asked.num_prompts - 1)
        headers = _headers(request, proxy)
        if asked.stream:
            opening = _open_stream(proxy, asked, headers)
            opened = await unless_disconnected(request, opening)
            if isinstance(opened, Answer):
                return _passed_on(opened)
            convert: Convert = ChatStream() if chat else _as_it_is
            rejected = proxy.metrics.rejected
            events = relay(opened, proxy.settings.max_response_bytes, convert, rejected)
            # The request is in flight until its stream has ended.
            release = held.pop_all()

            async def close() -> None:
                with release:
                    await opened.aclose()

            return EventStream(events, rejected, close)
        answer = await unless_disconnected(request, _whole(proxy, asked, headers))
        if answer.status == 200 and chat:
            content = to_chat(parsed(answer.content, _ANSWER))
            return Response(content, media_type="application/json")
        return _passed_on(answer)


async def _open_stream(
    proxy: Proxy, asked: ProxyRequest, headers: dict[str, str]
) -> httpx.Response | Answer:
    body = await proxy.in_pool(proxy.upstream_body, asked)
    return await proxy.upstream.stream(_COMPLETIONS, body, headers)


async def _whole(proxy: Proxy, asked: ProxyRequest, headers: dict[str, str]) -> Answer:
    body = await proxy.in_pool(proxy.upstream_body, asked)
    answer = await proxy.upstream.post(_COMPLETIONS, body, headers)
    if answer.status == 200:
        parsed(answer.content, _ANSWER)
    return answer


def _as_it_is(raw: bytes, chunk: Any) -> bytes:
    return raw


async def _json_object(request: Request) -> dict[str, Any]:
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise ServiceError(
            ErrorKind.UNSUPPORTED_MEDIA_TYPE,
            f"content type is {content_type[:80]!r}; expected 'application/json'",
        )
    try:
        body = orjson.loads(await request.body())
    except orjson.JSONDecodeError as error:
        raise ServiceError(ErrorKind.MALFORMED_JSON, f"body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ServiceError(ErrorKind.INVALID_VALUE, "body must be a JSON object")
    return body


def _headers(request: Request, proxy: Proxy) -> dict[str, str]:
    """What the upstream learns of the client."""
    headers: dict[str, str] = {}
    request_id = structlog.contextvars.get_contextvars().get("request_id")
    if request_id is not None:
        headers["X-Request-ID"] = str(request_id)
    authorization = request.headers.get("authorization")
    if authorization is not None and proxy.settings.forward_authorization:
        headers["Authorization"] = authorization
    spans: Spans = request.app.state.spans
    spans.pass_on(headers)
    return headers


def _passed_on(answer: Answer) -> Response:
    return Response(answer.content, answer.status, dict(answer.headers), "application/json")
