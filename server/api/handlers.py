"""Every exception to the one error shape, the framework's own included."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server.api.locations import known_fields, models_within, param_of
from server.api.responses import error_response
from server.errors import EngineFaultError, ErrorKind, ServiceError, kind_of_status, let_go
from server.metrics import HttpMetrics

_log = structlog.get_logger(__name__)

_MAX_REPORTED = 5
_MAX_SHOWN_CHARS = 60


def install_error_handlers(app: FastAPI, metrics: HttpMetrics) -> None:
    """Answer every exception of the app's routes in the one shape, and count it.

    What is no known error at all is left to ``RequestContextMiddleware``.
    """

    async def on_service_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceError)
        metrics.rejected(error.kind)
        if isinstance(error, EngineFaultError):
            _log.error("engine fault", detail=error.detail)
        let_go(error)
        return error_response(error.kind, error.message, param=error.param, headers=error.headers)

    async def on_invalid_body(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        kind, message, param = _explain(
            error.errors(), request.headers.get("content-type"), _body_model(request)
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


def _body_model(request: Request) -> type[BaseModel] | None:
    """The model of the body that the request's route takes."""
    body = getattr(request.scope.get("route"), "body_field", None)
    annotation = getattr(getattr(body, "field_info", None), "annotation", None)
    models = models_within(annotation)
    return models[0] if models else None


def _explain(
    errors: Sequence[Any], content_type: str | None, model: type[BaseModel] | None
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
    messages = dict.fromkeys(_describe(error, model) for error in errors)
    shown = list(messages)[:_MAX_REPORTED]
    if len(messages) > len(shown):
        shown.append(f"and {len(messages) - len(shown)} more")
    return ErrorKind.INVALID_VALUE, "; ".join(shown), param_of(first["loc"], model)


def _describe(error: Any, model: type[BaseModel] | None) -> str:
    param = param_of(error["loc"], model)
    message = str(error["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if error["type"] == "missing":
        return f"{param} is missing" if param else "body is missing; expected a JSON object"
    if error["type"] == "extra_forbidden":
        return _unknown_field(str(param), known_fields(error["loc"], model))
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
    if name in known:  # of another member of the union
        part = param.rpartition(".")[0]
        return f"{part} has both {' and '.join(known)}; give one of them"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(known)}"
    return f"unknown field {param[:_MAX_SHOWN_CHARS]}; {hint}"
