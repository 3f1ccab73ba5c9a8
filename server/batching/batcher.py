"""The async batcher: callers on the event loop, the engine on a thread of its own.

A request takes a place (``admit``), is turned into a prompt by its caller, then waits for its
answer (``run``). While the engine is busy the others queue; when it is done, the policy forms
the next batch from whatever is there. Nothing sleeps.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

import structlog

from server.batching.interfaces import Answer, BatchObserver, Searchable
from server.batching.policy import BatchLimits, Waiting, form_batch
from server.batching.throughput import Throughput
from server.engine.types import BatchOutcome, EngineFault
from server.errors import EngineFaultError, ErrorKind, ServiceError

if TYPE_CHECKING:
    from rectokens.schemas.search import SearchRequest

_log = structlog.get_logger(__name__)

# Bounds of Retry-After where the recent rate says less or more, in seconds.
_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 60.0

_DEAD_MESSAGE = "the engine has stopped working"
_STOPPING_MESSAGE = "the service is shutting down"


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """The most that may wait; over it, requests are refused at once.

    Attributes:
        max_requests: requests, however narrow.
        max_beam_rows: sum of their beam widths.
    """

    max_requests: int
    max_beam_rows: int


@dataclass(frozen=True, slots=True)
class _Work:
    release: Searchable
    search: SearchRequest
    queued_s: float
    answer: asyncio.Future[Answer]


@dataclass(eq=False, slots=True)
class Place:
    """A place in the queue: ``beam_rows`` of its bound, held until a batch takes it.

    A context manager: leaving it, by whatever way, frees what is still held.

    Attributes:
        key: unique, in order of admission.
        beam_rows: W of the request.
        deadline_s: monotonic time after which its caller is told that it took too long.
    """

    key: int
    beam_rows: int
    deadline_s: float
    _batcher: Batcher = field(repr=False)
    _work: _Work | None = None

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._batcher.leave(self)


class Batcher:
    """Queues requests and runs them in batches on one engine thread.

    Args:
        limits: budgets of one batch.
        queue_limits: bounds of the queue; requests being prepared count.
        observer: hears of every batch.
        clock: monotonic seconds, the event loop's own clock unless a test says otherwise.

    ``start`` must be called on the event loop that calls ``admit`` and ``run``.
    """

    def __init__(
        self,
        limits: BatchLimits,
        queue_limits: QueueLimits,
        observer: BatchObserver,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._queue_limits = queue_limits
        self._observer = observer
        self._clock = clock
        self._keys = itertools.count()
        self._throughput = Throughput()
        # Guards everything below; held for as long as it takes to form a batch, never during one.
        self._changed = threading.Condition()
        self._admitted: dict[int, Place] = {}  # by key; in preparation or queued
        self._queue: dict[int, Place] = {}  # in order of arrival
        self._running: list[Place] = []
        self._held_rows = 0
        self._running_rows = 0
        self._stopping = False
        self._dead = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def alive(self) -> bool:
        """Whether the engine thread has not died; True before ``start`` and after ``stop``."""
        if self._dead:
            return False
        return self._thread is None or self._stopping or self._thread.is_alive()

    @property
    def queued_requests(self) -> int:
        """Requests that hold a place and are not running."""
        return len(self._admitted)

    @property
    def queued_beam_rows(self) -> int:
        """Their beam rows."""
        return self._held_rows

    def start(self) -> None:
        """Start the engine thread."""
        self._loop = asyncio.get_running_loop()
        # A daemon: an engine that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._engine_thread, name="engine", daemon=True)
        self._thread.start()

    async def stop(self, timeout_s: float) -> bool:
        """End the engine thread after its current batch; waiting callers get a 503.

        Returns:
            Whether the thread ended within ``timeout_s``.
        """
        with self._changed:
            self._stopping = True
            queued = list(self._queue.values())
            self._queue.clear()
            self._changed.notify()
        self._fail(queued, ErrorKind.DRAINING, _STOPPING_MESSAGE)
        if self._thread is None:
            return True
        await asyncio.to_thread(self._thread.join, timeout_s)
        return not self._thread.is_alive()

    def admit(self, beam_rows: int, deadline_s: float) -> Place:
        """Take a place in the queue, before any work is done for the request.

        Raises:
            ServiceError: the queue is full, the deadline cannot be met at the best recent rate
                (both 429), or the engine is dead or stopping (503).
        """
        with self._changed:
            self._refuse_if_ended()
            now = self._clock()
            surplus = self._held_rows + beam_rows - self._queue_limits.max_beam_rows
            if surplus > 0 or len(self._admitted) >= self._queue_limits.max_requests:
                raise ServiceError(
                    ErrorKind.OVERLOADED,
                    f"{len(self._admitted)} requests of {self._held_rows} beam rows are waiting "
                    f"and this one needs {beam_rows}; at most {self._queue_limits.max_requests} "
                    f"requests and {self._queue_limits.max_beam_rows} beam rows may wait",
                    retry_after_s=self._retry_after(max(surplus, 0) + self._running_rows, now),
                )
            ahead = self._held_rows + self._running_rows
            wait_s = self._throughput.seconds_for(ahead, now)
            if wait_s is not None and now + wait_s >= deadline_s:
                raise ServiceError(
                    ErrorKind.DEADLINE_UNREACHABLE,
                    f"requests already waiting need about {wait_s * 1000:.0f} ms; this request "
                    f"has {max(deadline_s - now, 0) * 1000:.0f} ms left",
                    param="timeout_ms",
                    retry_after_s=self._retry_after(ahead, now),
                )
            place = Place(next(self._keys), beam_rows, deadline_s, self)
            self._admitted[place.key] = place
            self._held_rows += beam_rows
            return place

    async def run(self, place: Place, release: Searchable, search: SearchRequest) -> Answer:
        """Wait for the answer to a request that holds a place.

        Cancelling the awaiting task frees the place; a result on its way is dropped.

        Raises:
            ServiceError: 504 past the deadline, 500 where this request failed in the engine,
                503 where the engine died or the service stopped.
        """
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        with self._changed:
            self._refuse_if_ended()
            place._work = _Work(release, search, self._clock(), answer)
            self._queue[place.key] = place
            self._changed.notify()
        try:
            async with asyncio.timeout(place.deadline_s - self._clock()):
                return await answer
        except TimeoutError:
            raise _deadline_exceeded() from None
        finally:
            self.leave(place)

    def leave(self, place: Place) -> None:
        """Give up a place: its rows count no more and no batch will take it. Idempotent."""
        with self._changed:
            self._release_place(place)
            work = place._work
        if work is not None and not work.answer.done():
            work.answer.cancel()

    def _release_place(self, place: Place) -> None:
        if self._admitted.pop(place.key, None) is not None:
            self._held_rows -= place.beam_rows
        self._queue.pop(place.key, None)

    def _refuse_if_ended(self) -> None:
        if self._stopping:
            raise ServiceError(ErrorKind.DRAINING, _STOPPING_MESSAGE)
        if not self.alive:
            raise ServiceError(ErrorKind.ENGINE_DEAD, _DEAD_MESSAGE)

    def _retry_after(self, beam_rows: int, now_s: float) -> float:
        seconds = self._throughput.seconds_for(beam_rows, now_s) or _MIN_RETRY_S
        return min(max(seconds, _MIN_RETRY_S), _MAX_RETRY_S)

    # ---- on the engine thread ----------------------------------------------------------------

    def _engine_thread(self) -> None:
        try:
            while batch := self._next_batch():
                self._run_batch(batch)
        except BaseException:
            _log.critical("engine thread died", exc_info=True)
            with self._changed:
                self._dead = True
                stranded = [*self._running, *self._queue.values()]
                self._queue.clear()
            self._post(partial(self._fail, stranded, ErrorKind.ENGINE_DEAD, _DEAD_MESSAGE))

    def _next_batch(self) -> list[Place]:
        """The next batch; waits for one, empty when the batcher stops."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stopping)
                if self._stopping:
                    return []
                now = self._clock()
                waiting = [_as_waiting(place) for place in self._queue.values()]
                decision = form_batch(waiting, self._limits, now)
                batch = [self._queue[key] for key in decision.run]
                expired = [self._queue[key] for key in decision.expired]
                for place in (*batch, *expired):
                    self._release_place(place)
                self._running = batch
                self._running_rows = sum(place.beam_rows for place in batch)
            if expired:
                self._post(partial(self._expire, expired))
            if batch:
                return batch

    def _run_batch(self, batch: list[Place]) -> None:
        started = self._clock()
        waits = [started - _work(place).queued_s for place in batch]
        self._observer.batch_started(len(batch), self._running_rows, waits)
        try:
            outcome = self._search(batch)
        except Exception as error:
            if len(batch) == 1:
                self._deliver(batch, waits, _all_faulty(error))
            else:
                _log.warning("batch failed; running its requests alone", requests=len(batch))
                self._run_alone(batch, waits)
        else:
            with self._changed:
                now = self._clock()
                self._throughput.record(self._running_rows, now - started, now)
            self._deliver(batch, waits, outcome)
        with self._changed:
            self._running, self._running_rows = [], 0

    def _run_alone(self, batch: list[Place], waits: list[float]) -> None:
        """Retry one by one, so that a request that breaks a batch breaks only itself."""
        for place, wait in zip(batch, waits, strict=True):
            if _work(place).answer.done() or place.deadline_s <= self._clock():
                continue  # its caller has gone, or its own timer tells it
            try:
                outcome = self._search([place])
            except Exception as error:
                outcome = _all_faulty(error)
            self._deliver([place], [wait], outcome)

    def _search(self, batch: list[Place]) -> BatchOutcome:
        release = _work(batch[0]).release
        requests = [_work(place).search for place in batch]
        prepared = release.engine.prepare(requests, release.trie)
        outcome = release.engine.run(prepared, lambda row: _work(batch[row]).answer.done())
        if len(outcome.results) != len(batch):
            raise RuntimeError(
                f"engine gave {len(outcome.results)} results for {len(batch)} requests"
            )
        self._observer.batch_finished(outcome.prefill_s, outcome.decode_s)
        return outcome

    def _deliver(self, batch: list[Place], waits: list[float], outcome: BatchOutcome) -> None:
        def on_loop() -> None:
            for place, wait, result in zip(batch, waits, outcome.results, strict=True):
                future = _work(place).answer
                if future.done():
                    continue
                if isinstance(result, EngineFault):
                    future.set_exception(EngineFaultError(result.message))
                else:
                    future.set_result(Answer(result, wait, outcome.prefill_s, outcome.decode_s))

        self._post(on_loop)

    def _post(self, callback: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            # The loop has closed under us: the process is ending and nobody waits any more.
            _log.debug("answer dropped, event loop closed")

    # ---- on the event loop -------------------------------------------------------------------

    def _fail(self, places: list[Place], kind: ErrorKind, message: str) -> None:
        for place in places:
            if not _work(place).answer.done():
                _work(place).answer.set_exception(ServiceError(kind, message))

    def _expire(self, places: list[Place]) -> None:
        for place in places:
            if not _work(place).answer.done():
                _work(place).answer.set_exception(_deadline_exceeded())


def _all_faulty(error: Exception) -> BatchOutcome:
    fault = EngineFault(f"{type(error).__name__}: {error}")
    return BatchOutcome((fault,), prefill_s=0.0, decode_s=0.0)


def _as_waiting(place: Place) -> Waiting:
    work = _work(place)
    return Waiting(
        key=place.key,
        deadline_s=place.deadline_s,
        beam_rows=place.beam_rows,
        prompt_tokens=work.search.prompt_length,
        # Identity, not equality: two loads of one release are two engines.
        release=id(work.release),
    )


def _work(place: Place) -> _Work:
    if place._work is None:
        raise RuntimeError("place is not queued")
    return place._work


def _deadline_exceeded() -> ServiceError:
    return ServiceError(
        ErrorKind.DEADLINE_EXCEEDED,
        "no answer within the request's timeout_ms",
        param="timeout_ms",
    )
