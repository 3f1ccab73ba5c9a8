"""Server-sent events, read from an upstream and passed on."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import httpx

from server.api.sse import DONE, event
from server.errors import ErrorKind, ServiceError, error_body
from server.proxy.bodies import parsed
from server.proxy.upstream import mapped_failures

_EVENT = "an event of the upstream"
_BLANK_LINE = re.compile(rb"\r?\n\r?\n")
# What an upstream may take to end its answer after it has said that it is done.
_END_S = 1.0

Convert = Callable[[bytes, Any], bytes]


async def relay(
    response: httpx.Response,
    max_event_bytes: int,
    convert: Convert,
    on_rejected: Callable[[str], None],
) -> AsyncGenerator[bytes, None]:
    """The events of an upstream as they arrive.

    What goes wrong on the way becomes a last event in the shape of all errors, for the status
    has been sent by then; ``[DONE]`` is then missing.

    Args:
        response: an open stream; closing it is the caller's.
        max_event_bytes: most bytes of one event.
        convert: event and its JSON to what is sent instead.
        on_rejected: told the kind of what went wrong.
    """
    try:
        async with contextlib.aclosing(_events(response.aiter_raw(), max_event_bytes)) as events:
            async for raw in events:
                data = event_data(raw)
                if data == b"[DONE]":
                    break
                yield (
                    raw if data is None else convert(raw, parsed(data, "an event of the upstream"))
                )
            else:
                raise ServiceError(ErrorKind.UPSTREAM_FAILED, "the upstream's stream ended early")
            yield DONE
            # A connection whose answer was read to its end can be used again.
            with contextlib.suppress(TimeoutError, ServiceError):
                async with asyncio.timeout(_END_S):
                    async for _ in events:
                        pass
    except ServiceError as error:
        on_rejected(error.kind)
        yield event(error_body(error.kind, error.message))


async def _events(chunks: AsyncIterator[bytes], max_bytes: int) -> AsyncGenerator[bytes, None]:
    """Whole events, the blank line behind each included.

    Raises:
        ServiceError: the connection fails, or an event has over ``max_bytes``.
    """
    buffer = bytearray()
    with mapped_failures():
        async for chunk in chunks:
            # The blank line may have begun in the chunk before.
            searched = max(len(buffer) - 3, 0)
            buffer += chunk
            while found := _BLANK_LINE.search(buffer, searched):
                yield bytes(buffer[: found.end()])
                del buffer[: found.end()]
                searched = 0
            if len(buffer) > max_bytes:
                raise ServiceError(
                    ErrorKind.UPSTREAM_FAILED,
                    f"an event of the upstream has over {max_bytes} bytes",
                )
    if buffer.strip():
        raise ServiceError(ErrorKind.UPSTREAM_FAILED, "the upstream's stream ended inside an event")


def event_data(raw: bytes) -> bytes | None:
    """The data of an event, None for one without (a comment that keeps a connection alive)."""
    lines = [line[5:].removeprefix(b" ") for line in raw.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines).strip() if lines else None
