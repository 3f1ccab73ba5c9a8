"""The async batcher: callers on the event loop, the engine on a thread of its own.

A request takes a place (``admit``), is turned into a prompt by its caller, then waits for its
answer (``run``). While the engine is busy the others queue, and the batch that will be next is
prepared; when the engine is done, the policy forms the next batch from whoever is there.
Nothing sleeps.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from server.batching.attempts import begin_batch, run_batch
from server.batching.cost import BatchShape, CostEstimate
from server.batching.interfaces import Answer, BatchObserver, Searchable
from server.batching.policy import BatchLimits, Decision, Waiting, form_batch
from server.batching.prefetch import Ahead, Prefetcher
from server.batching.throughput import Throughput
from server.batching.waiting_room import Outcome, Place, WaitingRoom, Work
from server.engine.types import BatchOutcome, EngineFault, RunningBatch
from server.errors import EngineFaultError, ErrorKind, ServiceError

if TYPE_CHECKING:
    from rectokens.schemas.search import SearchRequest

_log = structlog.get_logger(__name__)

# Bounds of Retry-After where the recent rate says less or more, in seconds.
_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 60.0

# The rate is that of the past, and more load makes it worse: refusals, waiting callers and other
# processes take their share. Who is let in has to make it even where the queue moves half as
# fast; whoever would only just make it is refused, rather than let in to wait for a 504. It costs
# no throughput: an engine works as well off a queue of half a deadline as off one of a whole.
_QUEUE_MARGIN = 2.0
# Where batches are begun before others end: one that takes so long is long, see the policy.
_LONG_S = 0.06
# Of the batch of one's own.
_BATCH_MARGIN = 1.15

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


@dataclass(eq=False, slots=True)
class _Batch:
    """A batch that the engine has, or is about to have.

    Attributes:
        places: of it.
        prepared: by the engine for exactly these; None if it has yet to be.
        running: what the engine has begun, None where it runs batches whole.
        started_s: when the engine turned to it.
        waits: seconds that each place waited in the queue until then, by key.
    """

    places: list[Place]
    prepared: Any = None
    running: RunningBatch | None = None
    started_s: float = 0.0
    waits: dict[int, float] = field(default_factory=dict)

    @property
    def beam_rows(self) -> int:
        """Of all its requests."""
        return sum(place.beam_rows for place in self.places)

    @property
    def shape(self) -> BatchShape:
        """What its time depends on."""
        shape = BatchShape()
        for place in self.places:
            shape = shape.with_request(place.work.waiting.prompt_tokens, place.beam_rows)
        return shape


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
        self._cost = CostEstimate()
        # Guards everything below; held for as long as it takes to look at the queue, never while
        # a batch is chosen, prepared or run.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._room = WaitingRoom()
        self._prefetcher = Prefetcher(self._lock, self._room, self._decide, self._die)
        self._running: list[_Batch] = []  # at most two: one that was begun behind the other
        self._begins = False  # whether the last batch was begun before it was waited for
        # When the last batch ended, if it left somebody waiting.
        self._queue_since_s: float | None = None
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
        return self._room.held

    @property
    def queued_beam_rows(self) -> int:
        """Their beam rows."""
        return self._room.held_rows

    @property
    def beam_rows(self) -> int:
        """Beam rows of all requests that wait or run."""
        with self._lock:
            return self._room.held_rows + self._running_rows()

    def start(self) -> None:
        """Start the engine thread and the one that prepares its next batch."""
        self._loop = asyncio.get_running_loop()
        # Daemons: an engine that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._engine_thread, name="engine", daemon=True)
        self._thread.start()
        self._prefetcher.start()

    async def stop(self, timeout_s: float) -> bool:
        """End the threads after the current batch; waiting callers get a 503.

        Returns:
            Whether they ended within ``timeout_s``.
        """
        with self._lock:
            self._stopping = True
            queued = self._room.clear_queue()
            self._changed.notify()
            self._prefetcher.stop()
        self._fail(queued, ErrorKind.DRAINING, _STOPPING_MESSAGE)
        if self._thread is None:
            return True
        deadline_s = time.monotonic() + timeout_s
        await asyncio.to_thread(self._thread.join, timeout_s)
        left_s = max(deadline_s - time.monotonic(), 0.0)
        prefetched = await asyncio.to_thread(self._prefetcher.join, left_s)
        return prefetched and not self._thread.is_alive()

    def admit(self, beam_rows: int, deadline_s: float) -> Place:
        """Take a place in the queue, before any work is done for the request.

        Raises:
            ServiceError: the queue is full, the deadline cannot be met at the recent rate (both
                429), or the engine is dead or stopping (503).
        """
        with self._lock:
            self._refuse_if_ended()
            now = self._clock()
            held, held_rows = self._room.held, self._room.held_rows
            surplus = held_rows + beam_rows - self._queue_limits.max_beam_rows
            if surplus > 0 or held >= self._queue_limits.max_requests:
                raise ServiceError(
                    ErrorKind.OVERLOADED,
                    f"{held} requests of {held_rows} beam rows are waiting "
                    f"and this one needs {beam_rows}; at most {self._queue_limits.max_requests} "
                    f"requests and {self._queue_limits.max_beam_rows} beam rows may wait",
                    retry_after_s=self._retry_after(max(surplus, 0) + self._running_rows(), now),
                )
            ahead = held_rows + self._running_rows()
            drained_s = self._drained_s(ahead, now)
            if drained_s is not None and now + self._latest_s(drained_s, now) >= deadline_s:
                raise ServiceError(
                    ErrorKind.DEADLINE_UNREACHABLE,
                    f"requests already waiting need about {drained_s * 1000:.0f} ms, up to "
                    f"{_QUEUE_MARGIN:g} times that if the load goes on; this request has "
                    f"{max(deadline_s - now, 0) * 1000:.0f} ms left",
                    param="timeout_ms",
                    retry_after_s=self._retry_after(ahead, now),
                )
            place = Place(next(self._keys), beam_rows, deadline_s, self.leave)
            self._room.add(place)
            return place

    async def run(self, place: Place, release: Searchable, search: SearchRequest) -> Answer:
        """Wait for the answer to a request that holds a place.

        Cancelling the awaiting task frees the place; where the request is running by then, it is
        dropped at the next level, or its result is.

        Raises:
            ServiceError: 504 past the deadline or where it cannot be met any more, 500 where
                this request failed in the engine, 503 where the engine died or the service
                stopped.
        """
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        waiting = Waiting(
            key=place.key,
            deadline_s=place.deadline_s,
            beam_rows=place.beam_rows,
            prompt_tokens=search.prompt_length,
            # Identity, not equality: two loads of one release are two engines.
            release=id(release),
        )
        with self._lock:
            self._refuse_if_ended()
            place.queued = Work(release, search, self._clock(), answer, waiting)
            self._room.enqueue(place)
            self._changed.notify()
            self._prefetcher.queue_changed()
        try:
            async with asyncio.timeout(place.deadline_s - self._clock()):
                outcome = await answer
        except TimeoutError:
            raise _deadline_exceeded() from None
        finally:
            self.leave(place)
        if isinstance(outcome, Answer):
            return outcome
        raise outcome()

    def leave(self, place: Place) -> None:
        """Give up a place: its rows count no more and no batch will take it. Idempotent."""
        with self._lock:
            self._room.remove(place)
            queued = place.queued
        if queued is not None and not queued.answer.done():
            queued.answer.cancel()

    def _running_rows(self) -> int:
        return sum(batch.beam_rows for batch in self._running)

    def _drained_s(self, beam_rows: int, now_s: float) -> float | None:
        """Time until so many rows are through, None where nothing is known or ahead."""
        return self._throughput.seconds_for(beam_rows, now_s) if beam_rows else None

    def _latest_s(self, drained_s: float, now_s: float) -> float:
        """Time that an answer may take to whoever is behind that; both margins included."""
        # The request's own batch comes after those of the others.
        return drained_s * _QUEUE_MARGIN + self._throughput.batch_seconds(now_s) * _BATCH_MARGIN

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
            self._run_batches()
        except BaseException:
            self._die()

    def _die(self) -> None:
        """Answer everybody; the thread that found the engine dead ends, and so does the other."""
        _log.critical("the engine died", exc_info=True)
        with self._lock:
            self._dead = True
            running = [place for batch in self._running for place in batch.places]
            stranded = [*running, *self._room.clear_queue()]
            self._changed.notify()
            self._prefetcher.stop()
        self._post(partial(self._fail, stranded, ErrorKind.ENGINE_DEAD, _DEAD_MESSAGE))

    def _run_batches(self) -> None:
        """Run batches until the batcher stops.

        Where the engine can, a batch is begun while the one before it is at its last part, so
        that the device is never without work; it is chosen no earlier, so that whoever arrives
        until then can be in it.
        """
        current: _Batch | None = None
        while True:
            following = self._next_batch(wait=current is None)
            if current is None and following is None:
                return
            if following is not None:
                self._begin(following)
            if current is not None:
                self._end(current)
            if following is not None and following.running is None:
                self._end(following)
                following = None
            # Whoever holds on to a batch keeps its release in memory until the next one comes.
            current, following = following, None
            if current is not None and current.running is not None:
                current.running.wait_for_prompts()

    def _decide(self, places: Sequence[Place]) -> Decision:
        now, cost = self._clock(), None
        if len(places) > 1:  # who is alone runs, whatever it costs
            with self._lock:
                cost = self._cost.at(now)
        waiting = [place.work.waiting for place in places]
        long_s = _LONG_S if self._begins else math.inf
        return form_batch(waiting, self._limits, now, cost, long_s)

    def _next_batch(self, *, wait: bool) -> _Batch | None:
        """The next batch; None when the batcher stops or is dead, or nobody is there.

        Args:
            wait: for somebody to come.
        """
        while True:
            with self._lock:
                if not self._room.queued:
                    if not wait:
                        return None
                    # Everybody it was made for has left; it would keep their release in memory.
                    self._prefetcher.take()
                    self._queue_since_s = None
                self._changed.wait_for(lambda: self._room.queued or self._stopping or self._dead)
                if self._stopping or self._dead:
                    return None
                places = self._room.snapshot()
                ahead = self._prefetcher.take()
            decision = self._decide(places)
            if ahead is not None and not ahead.holds(decision, places):
                ahead = None
            batch, expired = self._commit(places, decision, ahead)
            if expired:
                self._post(partial(self._expire, expired))
            if batch is not None:
                return batch
            # All of them were expired; see above.
            del places, ahead, decision, batch, expired

    def _commit(
        self, places: Sequence[Place], decision: Decision, ahead: Ahead | None
    ) -> tuple[_Batch | None, list[Place]]:
        """Take the batch and the expired out of the queue, but for those who just left it."""
        by_key = {place.key: place for place in places}
        run = decision.run if ahead is None else ahead.keys
        with self._lock:
            chosen = [by_key[key] for key in run if self._room.remove(by_key[key])]
            expired = [by_key[key] for key in decision.expired if self._room.remove(by_key[key])]
            if not chosen:
                return None, expired
            whole = ahead is not None and len(chosen) == len(ahead.keys)
            batch = _Batch(chosen, ahead.prepared if whole and ahead is not None else None)
            self._running.append(batch)
            self._prefetcher.batch_started()
        return batch, expired

    def _begin(self, batch: _Batch) -> None:
        """Begin the batch that was chosen last, behind the one that runs."""
        is_next = len(self._running) == 1
        if is_next:
            self._is_on(batch)
        batch.prepared, batch.running = begin_batch(batch.places, batch.prepared)
        if is_next:
            self._tell(batch)  # the device need not wait for that
        self._begins = batch.running is not None

    def _is_on(self, batch: _Batch) -> None:
        """The engine works at a batch from now on; until then its requests were waiting."""
        batch.started_s = self._clock()
        batch.waits = {p.key: batch.started_s - p.work.queued_s for p in batch.places}

    def _tell(self, batch: _Batch) -> None:
        self._observer.batch_started(len(batch.places), batch.beam_rows, list(batch.waits.values()))

    def _end(self, batch: _Batch) -> None:
        """Wait for a batch that was begun, or run it, and hand its answers out."""
        complete = True

        def deliver(part: Sequence[Place], outcome: BatchOutcome) -> None:
            nonlocal complete
            # Asked before its answer may have reached anybody: after that, nobody waits.
            complete = complete and all(place.is_wanted for place in part)
            self._post(partial(_deliver, part, batch.waits, outcome))

        def is_live(place: Place) -> bool:
            return place.is_wanted and place.deadline_s > self._clock()

        prepared, batch.prepared = batch.prepared, None
        running, batch.running = batch.running, None
        whole = run_batch(batch.places, prepared, deliver, self._observer, is_live, running)
        with self._lock:
            now = self._clock()
            if whole and complete:
                self._cost.record(batch.shape, now - batch.started_s, now)
            self._running.remove(batch)
            # Whoever waits behind a batch waits however it ends, and for what lies between two.
            begun = batch.started_s if self._queue_since_s is None else self._queue_since_s
            full = self._room.queued > 0 or bool(self._running)
            # What failed, or nobody wanted, is no measure but of how long others waited for it.
            if full or (whole and complete):
                self._throughput.record(batch.beam_rows, now - begun, now, full=full)
            self._queue_since_s = now if full else None
        if self._running:
            self._is_on(self._running[0])
            self._tell(self._running[0])

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
            if place.is_wanted:
                place.work.answer.set_result(partial(ServiceError, kind, message))

    def _expire(self, places: list[Place]) -> None:
        for place in places:
            if place.is_wanted:
                place.work.answer.set_result(_deadline_exceeded)


def _deliver(places: Sequence[Place], waits: dict[int, float], outcome: BatchOutcome) -> None:
    cached = outcome.cached_tokens or (0,) * len(places)
    for place, result, tokens in zip(places, outcome.results, cached, strict=True):
        if not place.is_wanted:
            continue
        if isinstance(result, EngineFault):
            place.work.answer.set_result(partial(EngineFaultError, result.message))
        else:
            place.work.answer.set_result(
                Answer(result, waits[place.key], outcome.prefill_s, outcome.decode_s, tokens)
            )


def _deadline_exceeded() -> ServiceError:
    return ServiceError(
        ErrorKind.DEADLINE_EXCEEDED,
        "no answer within the request's timeout_ms",
        param="timeout_ms",
    )
