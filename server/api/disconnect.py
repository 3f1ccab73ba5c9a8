"""Stop working for a client that has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from server.errors import ErrorKind, ServiceError

T = TypeVar("T")


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled if the client leaves first.

    The body must have been read: what comes next from the client can only be its leaving.

    Raises:
        ServiceError: the client has gone.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ServiceError(ErrorKind.CLIENT_GONE, "the client has gone")
    finally:
        # Nobody waits for the watcher to end: the answer would wait behind whatever else is due.
        leaving.add_done_callback(_forget)
        leaving.cancel()
        if not working.done():
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _forget(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()  # or it would be logged as never looked at
