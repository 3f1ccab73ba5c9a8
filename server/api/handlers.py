"""Every exception to the one error shape, the framework's own included."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, get_args

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server.api.responses import error_response
from server.errors import EngineFaultError, ErrorKind, ServiceError, kind_of_status
from server.metrics import HttpMetrics

_log = structlog.get_logger(__name__)

_MAX_REPORTED = 5
_MAX_SHOWN_CHARS = 60
# The field of a body that holds bodies.
_MANY = "requests"
# A field of one of the parts of ``input``.
_INPUT_PART = re.compile(r"(^|\.)input\.\d+\.")


def install_error_handlers(app: FastAPI, metrics: HttpMetrics) -> None:
    """Answer every exception of the app's routes in the one shape, and count it.

    What is no known error at all is left to ``RequestContextMiddleware``.
    """

    async def on_service_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceError)
        metrics.rejected(error.kind)
        if isinstance(error, EngineFaultError):
            _log.error("engine fault", detail=error.detail)
        return error_response(error.kind, error.message, param=error.param, headers=error.headers)

    async def on_invalid_body(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        kind, message, param = _explain(
            error.errors(), request.headers.get("content-type"), _known_fields(request)
        )
        metrics.rejected(kind)
        return error_response(kind, message, param=param)

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind, message = kind_of_status(error.status_code), str(error.detail)
        if error.status_code == 400 and isinstance(error.__cause__, (ValueError, RecursionError)):
            # The framework's own words for a body that json cannot read do not say why.
            kind, message = ErrorKind.MALFORMED_JSON, f"body is not JSON: {error.__cause__}"
        elif error.status_code in (404, 405):
            message = f"{message}: {request.method} {request.url.path[:_MAX_SHOWN_CHARS]}"
        metrics.rejected(kind)
        return error_response(kind, message, status=error.status_code, headers=error.headers)

    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(RequestValidationError, on_invalid_body)
    app.add_exception_handler(HTTPException, on_http_exception)


def _known_fields(request: Request) -> list[str]:
    """Fields of the body that the request's route takes."""
    body = getattr(request.scope.get("route"), "body_field", None)
    model = getattr(getattr(body, "field_info", None), "annotation", None)
    fields = getattr(model, "model_fields", {})
    if _MANY in fields:
        # The only field of such a body; what is misspelt is a field of one of its requests.
        (model,) = get_args(fields[_MANY].annotation)
        fields = model.model_fields
    return list(fields)


def _explain(
    errors: Sequence[Any], content_type: str | None, known: Sequence[str]
) -> tuple[ErrorKind, str, str | None]:
    """Kind, message and parameter of the errors pydantic found."""
    first = errors[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return (
            ErrorKind.MALFORMED_JSON,
            f"body is not JSON: {reason} at character {first['loc'][-1]}",
            None,
        )
    if isinstance(first.get("input"), bytes):
        # FastAPI reads a body as JSON only if its content type says so.
        return (
            ErrorKind.UNSUPPORTED_MEDIA_TYPE,
            f"content type is {content_type!r}; expected 'application/json'",
            None,
        )
    messages = dict.fromkeys(_describe(error, known) for error in errors)
    shown = list(messages)[:_MAX_REPORTED]
    if len(messages) > len(shown):
        shown.append(f"and {len(messages) - len(shown)} more")
    return ErrorKind.INVALID_VALUE, "; ".join(shown), _param(first["loc"])


def _describe(error: Any, known: Sequence[str]) -> str:
    param = _param(error["loc"])
    message = str(error["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if error["type"] == "missing":
        return f"{param} is missing" if param else "body is missing; expected a JSON object"
    if error["type"] == "extra_forbidden":
        return _unknown_field(str(param), known)
    if param is None:
        return message
    value = error.get("input")
    if value is None or isinstance(value, (str, int, float)):
        shown = repr(value)
        if len(shown) > _MAX_SHOWN_CHARS:
            shown = shown[:_MAX_SHOWN_CHARS] + "…"
        return f"{param} is {shown}: {message}"
    return f"{param}: {message}"


def _unknown_field(param: str, known: Sequence[str]) -> str:
    name = param.rpartition(".")[2]
    if _INPUT_PART.search(param):
        part = param.rpartition(".")[0]
        known = ["item", "text"]
        if name in known:
            return f"{part} has both item and text; give one of them"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(known)}"
    return f"unknown field {param[:_MAX_SHOWN_CHARS]}; {hint}"


def _param(loc: Sequence[str | int]) -> str | None:
    """``input.3.text`` of a pydantic location, without the names of union members in it."""
    path = list(loc[1:]) if loc and loc[0] in ("body", "query", "path", "header") else list(loc)
    if not path:
        return None
    if len(path) > 2 and path[0] == _MANY and isinstance(path[1], int):
        return f"{_MANY}.{path[1]}.{_param(path[2:])}"
    parts = [str(path[0])]
    index = next((i for i, part in enumerate(path) if isinstance(part, int)), None)
    if index is not None:
        parts.append(str(path[index]))
        # After the index stands the member of the union, then the field.
        parts.extend(str(part) for part in path[index + 2 :])
    return ".".join(parts)
