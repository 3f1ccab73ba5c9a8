"""The next batch, prepared while the current one runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlog

from server.batching.policy import Decision
from server.batching.waiting_room import Place, WaitingRoom
from server.engine.types import EngineBrokenError

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Ahead:
    """A batch that is ready to start.

    Attributes:
        keys: of its places, in queue order.
        full: whether those who arrived since have no claim to it.
        prepared: what the engine made of it.
    """

    keys: tuple[int, ...]
    full: bool
    prepared: Any

    def holds(self, decision: Decision, live: Sequence[Place]) -> bool:
        """Whether it may start now.

        Args:
            decision: the policy's, on the queue as it is now.
            live: that queue. Its places stay in it until the batch starts, so that a caller who
                left is not there any more, and one whose time is up is expired.
        """
        if self.keys == decision.run:
            return True
        if not self.full or not decision.run:
            return False
        there = {place.key for place in live} - set(decision.expired)
        return there.issuperset(self.keys) and decision.run[0] == self.keys[0]


class Prefetcher:
    """Prepares batches on a thread of its own. A guess: the engine thread decides what runs.

    It works from a copy of the queue and takes nobody out of it, so cancellation, deadlines and
    another release meanwhile need no care here: a batch that is not the right one when its turn
    comes is prepared again.

    Args:
        lock: guards the room and everything here; methods are called with it held.
        room: where the queue is.
        decide: the policy; called without the lock.
        broken: called without the lock where preparing shows that the engine will never work
            again.
    """

    def __init__(
        self,
        lock: threading.Lock,
        room: WaitingRoom,
        decide: Callable[[Sequence[Place]], Decision],
        broken: Callable[[], None],
    ) -> None:
        self._due = threading.Condition(lock)
        self._room = room
        self._decide = decide
        self._broken = broken
        self._running = False
        self._stopping = False
        self._batch = 0  # counts the batches that started
        self._seen = 0  # length of the queue when last looked at, during this batch
        self._ahead: Ahead | None = None
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread once it has nothing in hand."""
        self._stopping = True
        self._due.notify()

    def join(self, timeout_s: float) -> bool:
        """Wait for its end, without the lock; whether it came."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def batch_started(self) -> None:
        """The engine is busy from now on."""
        self._batch += 1
        self._running, self._seen, self._ahead = True, 0, None
        self.queue_changed()

    def queue_changed(self) -> None:
        """Somebody came into the queue."""
        if self._is_due():
            self._due.notify()

    def take(self) -> Ahead | None:
        """What is ready; the engine is free."""
        self._running = False
        ahead, self._ahead = self._ahead, None
        return ahead

    def _is_due(self) -> bool:
        """Whether to look at the queue: at once, then whenever it has doubled, until full.

        So a batch is prepared a few times at most, however many requests arrive one by one.
        """
        if not self._running or (self._ahead is not None and self._ahead.full):
            return False
        return self._room.queued >= max(2 * self._seen, 1)

    def _work(self) -> None:
        # A step's own frame: while this thread waits, it keeps no release in memory.
        while self._step():
            pass

    def _step(self) -> bool:
        """Wait until there is something to prepare, and do it; False at the end."""
        with self._due:
            self._due.wait_for(lambda: self._stopping or self._is_due())
            if self._stopping:
                return False
            places, batch, ahead = self._room.snapshot(), self._batch, self._ahead
            self._seen = len(places)
        try:
            ahead = self._prepare(places, ahead)
        except EngineBrokenError:
            # The engine thread may be waiting for that device, and nobody know how long.
            self._broken()
            return False
        except Exception as error:
            # The engine thread meets the same error and knows what to do about it.
            _log.debug("next batch not prepared", error=f"{type(error).__name__}: {error}")
            return True
        with self._due:
            if batch == self._batch and self._running:
                self._ahead = ahead
        return True

    def _prepare(self, places: Sequence[Place], ahead: Ahead | None) -> Ahead | None:
        decision = self._decide(places)
        if ahead is not None and ahead.keys == decision.run:
            return replace(ahead, full=decision.full)
        by_key = {place.key: place for place in places}
        chosen = [by_key[key].work for key in decision.run]
        if not chosen:
            return None
        release = chosen[0].release
        prepared = release.engine.prepare([work.search for work in chosen], release.trie)
        return Ahead(decision.run, decision.full, prepared)
