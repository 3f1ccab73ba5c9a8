"""Many requests of one caller, let through a few at a time beside everybody else's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from server.errors import ErrorKind, ServiceError

T = TypeVar("T")

# What a caller in a hurry is told at once, a bulk request waits out.
_PASSING = frozenset({ErrorKind.OVERLOADED, ErrorKind.DEADLINE_UNREACHABLE})
_TRY_AGAIN_S = 0.2


class BulkLane:
    """Bounds how much of the queue bulk requests take, all of them together.

    Args:
        max_in_flight: most single requests that wait or run at once.
        max_streams: most bulk requests that are answered at once.
        clock: monotonic seconds.
    """

    def __init__(
        self, max_in_flight: int, max_streams: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_in_flight = max_in_flight
        self._max_streams = max_streams
        self._clock = clock
        self._slots = asyncio.Semaphore(max_in_flight)
        self._streams = 0

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Count one bulk request for as long as it is answered.

        Raises:
            ServiceError: 429, as many as may are being answered.
        """
        if self._streams >= self._max_streams:
            raise ServiceError(
                ErrorKind.OVERLOADED,
                f"{self._streams} bulk requests are being answered; at most {self._max_streams}",
                retry_after_s=5.0,
            )
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1

    async def answers(
        self, calls: Sequence[Callable[[], Awaitable[T]]], deadline_s: float
    ) -> AsyncGenerator[tuple[int, T | Exception], None]:
        """The outcome of each call with its place, as they come.

        Calls begin in order. A call that the queue has no room for is tried again. Where
        outcomes are not taken, no more calls begin. Closing the generator cancels what is left.

        Args:
            calls: each makes one attempt at its request.
            deadline_s: on the clock; from then on, calls fail at once.
        """
        places = iter(range(len(calls)))
        # Whoever reads slowly holds as many answers here as he has requests in flight.
        done: asyncio.Queue[tuple[int, T | Exception]] = asyncio.Queue(self._max_in_flight)

        async def work() -> None:
            for place in places:
                try:
                    outcome: T | Exception = await self._patiently(calls[place], deadline_s)
                except Exception as error:
                    outcome = error
                await done.put((place, outcome))

        count = min(self._max_in_flight, len(calls))
        workers = [asyncio.create_task(work()) for _ in range(count)]
        try:
            for _ in calls:
                yield await done.get()
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _patiently(self, call: Callable[[], Awaitable[T]], deadline_s: float) -> T:
        while True:
            async with self._slots:
                if self._clock() >= deadline_s:
                    raise ServiceError(
                        ErrorKind.DEADLINE_EXCEEDED,
                        "the time of the bulk request was over before this request's turn",
                    )
                try:
                    return await call()
                except ServiceError as error:
                    if error.kind not in _PASSING:
                        raise
            await asyncio.sleep(_TRY_AGAIN_S)
