"""Every way a request can fail, and the HTTP status of each: one table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

INTERNAL_MESSAGE = "internal error; quote the request id when reporting it"


class ErrorKind(StrEnum):
    """What went wrong. The value is the ``code`` of the error body and the metrics' reason."""

    MALFORMED_JSON = "malformed_json"
    BAD_REQUEST = "bad_request"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    CONFLICT = "conflict"
    NO_STORE = "no_store"
    BODY_TIMEOUT = "body_timeout"
    HEAD_TIMEOUT = "head_timeout"
    BODY_TOO_LARGE = "body_too_large"
    HEAD_TOO_LARGE = "head_too_large"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    INVALID_VALUE = "invalid_value"
    NO_KNOWN_ITEMS = "no_known_items"
    PROMPT_TOO_LONG = "prompt_too_long"
    OVERLOADED = "overloaded"
    DEADLINE_UNREACHABLE = "deadline_unreachable"
    RATE_LIMITED = "rate_limited"
    CLIENT_GONE = "client_gone"
    INTERNAL = "internal"
    ENGINE_FAULT = "engine_fault"
    LOADING = "loading"
    DRAINING = "draining"
    ENGINE_DEAD = "engine_dead"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    STORE_UNAVAILABLE = "store_unavailable"
    DISK_FULL = "disk_full"
    UPSTREAM_UNREACHABLE = "upstream_unreachable"
    UPSTREAM_FAILED = "upstream_failed"
    UPSTREAM_UNAVAILABLE = "upstream_unavailable"
    UPSTREAM_TIMEOUT = "upstream_timeout"


@dataclass(frozen=True, slots=True)
class ErrorSpec:
    """HTTP status and the broad ``type`` a client may branch on."""

    status: int
    type: str


_INVALID = "invalid_request_error"
_OVERLOAD = "overloaded_error"
_RATE = "rate_limit_error"
_UNAVAILABLE = "unavailable_error"
_SERVER = "server_error"
_TIMEOUT = "timeout_error"

ERROR_TABLE: dict[ErrorKind, ErrorSpec] = {
    ErrorKind.MALFORMED_JSON: ErrorSpec(400, _INVALID),
    ErrorKind.BAD_REQUEST: ErrorSpec(400, _INVALID),
    ErrorKind.UNAUTHORIZED: ErrorSpec(401, _INVALID),
    ErrorKind.FORBIDDEN: ErrorSpec(403, _INVALID),
    ErrorKind.NOT_FOUND: ErrorSpec(404, _INVALID),
    ErrorKind.METHOD_NOT_ALLOWED: ErrorSpec(405, _INVALID),
    ErrorKind.CONFLICT: ErrorSpec(409, _INVALID),
    ErrorKind.NO_STORE: ErrorSpec(409, _INVALID),
    ErrorKind.BODY_TIMEOUT: ErrorSpec(408, _INVALID),
    ErrorKind.HEAD_TIMEOUT: ErrorSpec(408, _INVALID),
    ErrorKind.BODY_TOO_LARGE: ErrorSpec(413, _INVALID),
    ErrorKind.UNSUPPORTED_MEDIA_TYPE: ErrorSpec(415, _INVALID),
    ErrorKind.INVALID_VALUE: ErrorSpec(422, _INVALID),
    ErrorKind.NO_KNOWN_ITEMS: ErrorSpec(422, _INVALID),
    ErrorKind.PROMPT_TOO_LONG: ErrorSpec(422, _INVALID),
    ErrorKind.HEAD_TOO_LARGE: ErrorSpec(431, _INVALID),
    ErrorKind.OVERLOADED: ErrorSpec(429, _OVERLOAD),
    ErrorKind.DEADLINE_UNREACHABLE: ErrorSpec(429, _OVERLOAD),
    ErrorKind.RATE_LIMITED: ErrorSpec(429, _RATE),
    # Nobody reads this answer; the status is for the log and the metrics.
    ErrorKind.CLIENT_GONE: ErrorSpec(499, _INVALID),
    ErrorKind.INTERNAL: ErrorSpec(500, _SERVER),
    ErrorKind.ENGINE_FAULT: ErrorSpec(500, _SERVER),
    ErrorKind.LOADING: ErrorSpec(503, _UNAVAILABLE),
    ErrorKind.DRAINING: ErrorSpec(503, _UNAVAILABLE),
    ErrorKind.ENGINE_DEAD: ErrorSpec(503, _UNAVAILABLE),
    ErrorKind.DEADLINE_EXCEEDED: ErrorSpec(504, _TIMEOUT),
    ErrorKind.STORE_UNAVAILABLE: ErrorSpec(503, _UNAVAILABLE),
    ErrorKind.DISK_FULL: ErrorSpec(507, _SERVER),
    ErrorKind.UPSTREAM_UNREACHABLE: ErrorSpec(502, _SERVER),
    ErrorKind.UPSTREAM_FAILED: ErrorSpec(502, _SERVER),
    ErrorKind.UPSTREAM_UNAVAILABLE: ErrorSpec(503, _UNAVAILABLE),
    ErrorKind.UPSTREAM_TIMEOUT: ErrorSpec(504, _TIMEOUT),
}

# What the framework itself answers knows a status only; the first kind with that status is it.
_KIND_OF_STATUS: dict[int, ErrorKind] = {
    spec.status: kind for kind, spec in reversed(ERROR_TABLE.items())
} | {400: ErrorKind.BAD_REQUEST}


class ServiceError(Exception):
    """A request that fails for a reason the caller is told.

    Args:
        kind: what went wrong.
        message: for the caller; names the value found and the value allowed.
        param: the field at fault, dotted (``input.3.text``), or None.
        retry_after_s: seconds after which a retry has a chance; becomes ``Retry-After``.
    """

    def __init__(
        self,
        kind: ErrorKind,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def status(self) -> int:
        """HTTP status of this kind."""
        return ERROR_TABLE[self.kind].status

    @property
    def headers(self) -> dict[str, str]:
        """Response headers that belong to the error."""
        if self.kind is ErrorKind.UNAUTHORIZED:
            return {"WWW-Authenticate": "Bearer"}
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


class EngineFaultError(ServiceError):
    """One request failed in the engine; ``detail`` is for the log, never for the caller."""

    def __init__(self, detail: str) -> None:
        super().__init__(
            ErrorKind.ENGINE_FAULT,
            "the engine could not answer this request; quote the request id when reporting it",
        )
        self.detail = detail


def invalid(param: str, message: str) -> ServiceError:
    """A value of the request that is not allowed."""
    return ServiceError(ErrorKind.INVALID_VALUE, message, param=param)


def let_go(error: BaseException) -> None:
    """Forget where an error came from, once it is answered and logged.

    A future or a task keeps its exception, that the frames it passed, and one of those the future:
    a cycle, and a request's frames hold a release, which only the garbage collector would free.
    """
    error.__traceback__ = error.__context__ = error.__cause__ = None


def error_body(kind: ErrorKind, message: str, param: str | None = None) -> dict[str, Any]:
    """The one shape of every error body."""
    return {
        "error": {
            "message": message,
            "type": ERROR_TABLE[kind].type,
            "param": param,
            "code": kind.value,
        }
    }


def kind_of_status(status: int) -> ErrorKind:
    """The kind that stands for a bare HTTP status, for errors the framework raises."""
    if status in _KIND_OF_STATUS:
        return _KIND_OF_STATUS[status]
    return ErrorKind.BAD_REQUEST if status < 500 else ErrorKind.INTERNAL
