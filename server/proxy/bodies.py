"""Bodies in JSON, as the proxy reads those of the upstream and writes its own to either side."""

from __future__ import annotations

from typing import Any

import orjson

from server.errors import ErrorKind, ServiceError


def parsed(data: bytes, what: str) -> Any:
    """JSON of the upstream.

    Raises:
        ServiceError: it is none; the message says of what.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ServiceError(ErrorKind.UPSTREAM_FAILED, f"{what} is not JSON") from error


def written(body: dict[str, Any], kind: ErrorKind, what: str) -> bytes:
    """JSON of what was read as JSON.

    Raises:
        ServiceError: of that kind: it is nested too deeply; the message says what.
    """
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError as error:
        # What orjson reads it writes, but for depths that it only reads.
        raise ServiceError(kind, f"{what} nested too deeply") from error
