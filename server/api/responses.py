"""JSON responses, and the one shape of every error response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from starlette.responses import Response

from server.api.schemas import ErrorResponse
from server.errors import ERROR_TABLE, ErrorKind, error_body


class JSONResponse(Response):
    """A body that orjson writes."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Bytes of the body."""
        return orjson.dumps(content)


def error_response(
    kind: ErrorKind,
    message: str,
    *,
    param: str | None = None,
    status: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error as every route answers it.

    Args:
        kind: what went wrong.
        message: for the caller.
        param: the field at fault.
        status: HTTP status where the framework chose one that stands for several kinds.
        headers: of the response.
    """
    return JSONResponse(
        error_body(kind, message, param),
        status_code=ERROR_TABLE[kind].status if status is None else status,
        headers=dict(headers or {}),
    )


def documented_errors(*kinds: ErrorKind) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries of the errors a route may answer."""
    codes: dict[int, list[str]] = {}
    for kind in (*kinds, ErrorKind.INTERNAL):
        codes.setdefault(ERROR_TABLE[kind].status, []).append(kind.value)
    return {
        status: {"model": ErrorResponse, "description": "`code`: " + ", ".join(names)}
        for status, names in sorted(codes.items())
    }
