"""Who holds a place, and who of them waits in the queue. No locks: its owner has one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from server.batching.interfaces import Answer, Searchable
from server.batching.policy import Waiting
from server.errors import ServiceError

# An answer, or what makes the error. Not the error: a future that keeps one, which keeps the frames
# it passes, which keep the future, is a cycle, and its release stays in memory with it.
Outcome = Answer | Callable[[], ServiceError]

if TYPE_CHECKING:
    from rectokens.schemas.search import SearchRequest


@dataclass(frozen=True, slots=True)
class Work:
    """What a place is held for, once its request is ready for the engine.

    Attributes:
        release: what it is run on.
        search: the request.
        queued_s: monotonic time at which it came into the queue.
        answer: what its caller waits for; done when nobody waits any more.
        waiting: the request as the policy sees it.
    """

    release: Searchable
    search: SearchRequest
    queued_s: float
    answer: asyncio.Future[Outcome]
    waiting: Waiting


@dataclass(eq=False, slots=True)
class Place:
    """A place in the queue: ``beam_rows`` of its bound, held until a batch takes it.

    A context manager: leaving it, by whatever way, frees what is still held.

    Attributes:
        key: unique, in order of admission.
        beam_rows: W of the request.
        deadline_s: monotonic time after which its caller is told that it took too long.
        leave: gives it up.
        queued: its work, None until it is in the queue.
    """

    key: int
    beam_rows: int
    deadline_s: float
    leave: Callable[[Place], None]
    queued: Work | None = None

    @property
    def work(self) -> Work:
        """Its work, once it is in the queue."""
        if self.queued is None:
            raise RuntimeError("place is not queued")
        return self.queued

    @property
    def is_wanted(self) -> bool:
        """Whether its caller still waits. May be asked by any thread."""
        return not self.work.answer.done()

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.leave(self)


class WaitingRoom:
    """Places held, and the queue of those whose request is ready, in order of arrival."""

    def __init__(self) -> None:
        self._held: dict[int, Place] = {}
        self._queue: dict[int, Place] = {}
        self._rows = 0

    @property
    def held(self) -> int:
        """Requests that hold a place."""
        return len(self._held)

    @property
    def held_rows(self) -> int:
        """Their beam rows."""
        return self._rows

    @property
    def queued(self) -> int:
        """Requests that are ready to run."""
        return len(self._queue)

    def add(self, place: Place) -> None:
        """Hold a place."""
        self._held[place.key] = place
        self._rows += place.beam_rows

    def enqueue(self, place: Place) -> None:
        """Its request is ready."""
        self._queue[place.key] = place

    def remove(self, place: Place) -> bool:
        """Give a place up; whether it was in the queue. Idempotent."""
        if self._held.pop(place.key, None) is not None:
            self._rows -= place.beam_rows
        return self._queue.pop(place.key, None) is not None

    def snapshot(self) -> list[Place]:
        """The queue, oldest first."""
        return list(self._queue.values())

    def clear_queue(self) -> list[Place]:
        """Empty the queue; its places stay held until their callers leave."""
        queued = self.snapshot()
        self._queue.clear()
        return queued
