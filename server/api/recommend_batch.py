"""``POST /v1/recommend/batch``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import ExitStack, aclosing
from functools import partial
from typing import Any

import orjson
import structlog
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.access.guard import charge
from server.api.dependencies import service_of
from server.api.limits import check_count, to_query
from server.api.recommend import SEARCH_ERRORS, to_wire
from server.api.responses import documented_errors
from server.api.schemas import (
    ErrorDetail,
    RecommendRequest,
    RecommendResponse,
    StrictRequest,
    StrictResponse,
)
from server.api.sse import EventStream
from server.api.strict_json import DirectJsonRoute
from server.errors import (
    INTERNAL_MESSAGE,
    EngineFaultError,
    ErrorKind,
    ServiceError,
    error_body,
    let_go,
)
from server.service import Service

PATH = "/v1/recommend/batch"
MEDIA_TYPE = "application/x-ndjson"
# Over the time of the whole request, for a client to read what was answered in time.
_LAST_LINES_S = 30.0

router = APIRouter(tags=["recommend"], route_class=DirectJsonRoute)
_log = structlog.get_logger(__name__)


class RecommendBatchRequest(StrictRequest):
    """Many users at once."""

    requests: list[RecommendRequest] = Field(
        min_length=1,
        description="Each as for /v1/recommend. `timeout_ms` counts from the moment a request's "
        "turn comes.",
    )


class RecommendBatchLine(StrictResponse):
    """One line of the answer: ``answer`` or ``error``, never both."""

    index: int = Field(description="Place of the request in `requests`.")
    status: int = Field(description="HTTP status that /v1/recommend would have answered with.")
    answer: RecommendResponse | None = None
    error: ErrorDetail | None = None


def _line_schema() -> dict[str, Any]:
    """Of a line; what it refers to is documented with other routes."""
    schema = RecommendBatchLine.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs")
    return schema


class LineStream(EventStream):
    """Lines of JSON, one a request, as they come.

    Args:
        lines: see ``EventStream``.
        timeout_s: a client that has not read them all by then is cut off.
        rest: see ``EventStream``.
    """

    media_type = MEDIA_TYPE

    def __init__(
        self, lines: AsyncGenerator[bytes, None], timeout_s: float, *rest: Any, **named: Any
    ) -> None:
        super().__init__(lines, *rest, **named)
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            # The server closes a connection whose answer is left open, so the client notices.
            _log.warning("bulk request cut off", timeout_s=self._timeout_s)


@router.post(
    PATH,
    summary="Recommend items to many users",
    response_class=Response,
    responses={
        200: {
            "description": "Lines of JSON, in the order in which requests finish.",
            "content": {MEDIA_TYPE: {"schema": _line_schema()}},
        },
        **documented_errors(*SEARCH_ERRORS),
    },
)
async def recommend_batch(body: RecommendBatchRequest, request: Request) -> Response:
    """What next for each of these users? One line of JSON a request, as they finish.

    A request that fails has its error in its line; the others are answered. Requests wait in the
    same queue as everybody's, a bounded number at a time, and longer where the queue is full. A
    client that reads slowly is answered slowly; one that leaves cancels what is left.
    """
    service = service_of(request)
    service.require_release()
    limits = service.settings.limits
    check_count("requests", body.requests, limits.max_bulk_requests)
    held = ExitStack()
    held.enter_context(service.bulk.stream())
    # Here, because a call that finds no room has cost nothing.
    charge(request, len(body.requests) - 1)

    async def close() -> None:
        held.close()

    return LineStream(
        _lines(body, service, time.monotonic() + limits.bulk_timeout_s),
        limits.bulk_timeout_s + _LAST_LINES_S,
        service.metrics.rejected,
        close,
    )


async def _lines(
    body: RecommendBatchRequest, service: Service, deadline_s: float
) -> AsyncGenerator[bytes, None]:
    calls: list[Callable[[], Awaitable[dict[str, Any]]]] = [
        partial(_answer, one, service) for one in body.requests
    ]
    async with aclosing(service.bulk.answers(calls, deadline_s)) as answers:
        async for index, outcome in answers:
            line = _failed(outcome, service) if isinstance(outcome, Exception) else outcome
            yield orjson.dumps({"index": index, **line}, option=orjson.OPT_APPEND_NEWLINE)


async def _answer(body: RecommendRequest, service: Service) -> dict[str, Any]:
    """One attempt, on the release that is active now."""
    begun_s = time.monotonic()
    release = service.require_release()
    query = to_query(body, service.settings, begun_s)
    found = await service.recommend(query, release)
    return {"status": 200, "answer": to_wire(found, query, time.monotonic() - begun_s)}


def _failed(error: Exception, service: Service) -> dict[str, Any]:
    if isinstance(error, EngineFaultError):
        _log.error("engine fault", detail=error.detail)
    elif not isinstance(error, ServiceError):
        _log.error("unexpected error", exc_info=error)
    let_go(error)
    if not isinstance(error, ServiceError):
        error = ServiceError(ErrorKind.INTERNAL, INTERNAL_MESSAGE)
    service.metrics.rejected(error.kind)
    return {"status": error.status, **error_body(error.kind, error.message, error.param)}
