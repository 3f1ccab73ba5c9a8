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

    The body must have been read: what comes next from the client can only be its leaving. The work
    is done in the task of the caller, which its result then wakes without a way round.

    Raises:
        ServiceError: the client has gone.
    """
    task = asyncio.current_task()
    assert task is not None
    cancelling = task.cancelling()
    watched: asyncio.Task[Any] | None = task
    has_left = False

    def on_leaving(watcher: asyncio.Future[Any]) -> None:
        nonlocal has_left
        if watcher.cancelled():
            return
        watcher.exception()  # or it would be logged as never looked at
        if watched is not None:
            has_left = True
            watched.cancel()

    leaving = asyncio.ensure_future(_disconnected(request))
    leaving.add_done_callback(on_leaving)
    try:
        return await work
    except asyncio.CancelledError:
        if has_left and task.cancelling() == cancelling + 1:  # nobody else cancelled it
            raise ServiceError(ErrorKind.CLIENT_GONE, "the client has gone") from None
        raise
    finally:
        if has_left:
            task.uncancel()
        # A task keeps what cancelled it, that this frame, and it shall not keep the task.
        del task
        watched = None
        # Nobody waits for the watcher to end: the answer would wait behind whatever else is due.
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
