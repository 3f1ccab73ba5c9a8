"""Server-sent events, written."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.disconnect import unless_disconnected
from server.errors import ErrorKind, ServiceError

MEDIA_TYPE = "text/event-stream"
DONE = b"data: [DONE]\n\n"
# A comment, which readers pass over.
KEEP_ALIVE = b": \n\n"


def event(content: Any, name: str | None = None) -> bytes:
    """One event that carries JSON (bytes are some already); named if it is no ordinary one."""
    head = b"" if name is None else f"event: {name}\n".encode()
    data = content if isinstance(content, bytes) else orjson.dumps(content)
    return head + b"data: " + data + b"\n\n"


class EventStream(Response):
    """A response whose events are sent as they come.

    Args:
        events: bytes of whole events. Closed in any case: at its end, when the client leaves,
            when the server ends.
        on_rejected: told ``client_gone`` if the client left first.
        close: lets go of what the events come from. Called in any case, even where the client
            left before the first event was asked for.
    """

    media_type = MEDIA_TYPE

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        on_rejected: Callable[[str], None],
        close: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        # No-buffering is for reverse proxies, which would hold events back.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        # The empty body's length is no property of the stream.
        del self.headers["content-length"]
        self._events = events
        self._on_rejected = on_rejected
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""

        async def pump() -> None:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            async for chunk in self._events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await unless_disconnected(Request(scope, receive), pump())
        except ServiceError as error:
            if error.kind is not ErrorKind.CLIENT_GONE:
                raise
            self._on_rejected(error.kind)
        finally:
            try:
                await self._events.aclose()
            finally:
                if self._close is not None:
                    await self._close()
