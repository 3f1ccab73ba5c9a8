"""The running service: what it serves, in which phase it is, and the way through it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from functools import partial

import structlog

from server.batching.batcher import Batcher, QueueLimits
from server.batching.policy import BatchLimits
from server.bulk import BulkLane
from server.errors import EngineFaultError, ErrorKind, ServiceError, let_go
from server.metrics import Metrics
from server.queries import RecommendQuery
from server.recommender import Recommendation, Recommender
from server.rehearsal.sample import RecentQueries
from server.release import Release, ReleaseError, ReleaseLoader, start_request
from server.retired import RetiredReleases
from server.settings import Settings
from server.tracing.spans import Spans

_log = structlog.get_logger(__name__)

# How long the engine thread gets to finish its batch after everybody has been answered.
_ENGINE_STOP_S = 5.0
_TRY_AGAIN_S = 0.05


class Phase(StrEnum):
    """Where in its life the service is."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class Service:
    """Holds the active release and answers queries from it.

    Args:
        settings: of the service.
        load_release: loads what is served; called on a thread of its own by ``start``.

    Attributes:
        settings: of the service.
        metrics: of the service.
        on_ready: called on the event loop once the release is loaded and active.
        on_load_failed: called on the event loop if it could not be loaded.
        load_error: why not.
        retired: what is served no more and still in memory.
        bulk: the way through for requests that come many at a time.
        recent: requests kept to try a new release on.
        active_since_s: Unix time at which the release became active, None before that.
    """

    def __init__(
        self, settings: Settings, load_release: ReleaseLoader, spans: Spans | None = None
    ) -> None:
        self.settings = settings
        self._spans = spans or Spans()
        self.metrics = Metrics()
        self.load_error: BaseException | None = None
        self.retired = RetiredReleases()
        self.recent = RecentQueries(settings.gate.sample_requests)
        self.active_since_s: float | None = None
        self.on_ready: Callable[[], None] = lambda: None
        self.on_load_failed: Callable[[], None] = lambda: None
        batching = settings.batching
        self._batcher = Batcher(
            BatchLimits(
                max_requests=batching.max_requests,
                max_beam_rows=batching.max_beam_rows,
                max_prompt_tokens=batching.max_prompt_tokens,
            ),
            QueueLimits(batching.max_queued_requests, batching.max_queued_beam_rows),
            self.metrics,
        )
        self.metrics.watch_queue(self._batcher)
        self.metrics.limits_set(batching)
        self._recommender = Recommender(
            self._batcher, batching.prepare_threads, batching.max_queued_embeds
        )
        self.bulk = BulkLane(batching.max_bulk_in_flight, batching.max_bulk_streams)
        self._load_release = load_release
        self._release: Release | None = None
        self._draining = False
        self._held = False
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._loader: threading.Thread | None = None
        self._engine_ended = True

    @property
    def phase(self) -> Phase:
        """Where in its life the service is."""
        if self._draining or self._held:
            return Phase.DRAINING
        return Phase.LOADING if self._release is None else Phase.READY

    @property
    def busy_threads(self) -> bool:
        """Whether a loader or an engine that does not end still runs."""
        loading = self._loader is not None and self._loader.is_alive()
        return loading or not self._engine_ended

    @property
    def release(self) -> Release | None:
        """The active release, in whatever phase; None while there is none."""
        return self._release

    @property
    def held(self) -> bool:
        """Whether an operator has drained the service, to resume it later."""
        return self._held

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self._in_flight == 0

    @property
    def beam_rows(self) -> int:
        """Beam rows of all requests that wait for the engine or run."""
        return self._batcher.beam_rows

    def check_alive(self) -> None:
        """Raise if the engine thread has died.

        Raises:
            ServiceError: 503.
        """
        if not self._batcher.alive:
            raise ServiceError(ErrorKind.ENGINE_DEAD, "the engine has stopped working")

    def require_release(self) -> Release:
        """The active release, for a request that is admitted now.

        Raises:
            ServiceError: 503 while loading or draining, or if the engine has died.
        """
        self.check_alive()
        if self._draining:
            raise ServiceError(ErrorKind.DRAINING, "the service is shutting down")
        if self._held:
            raise ServiceError(ErrorKind.DRAINING, "the service was drained by an operator")
        if self._release is None:
            raise ServiceError(ErrorKind.LOADING, "the model is being loaded", retry_after_s=1.0)
        return self._release

    async def recommend(self, query: RecommendQuery, release: Release) -> Recommendation:
        """Answer a query from the release it was admitted under.

        Raises:
            ServiceError: see ``Recommender.recommend``.
        """
        recommendation = await self._answer(query, release)
        self.recent.add(query)
        shortfall = recommendation.answer.result.shortfall
        reason = None if shortfall is None else shortfall.reason
        self.metrics.answered(len(recommendation.items), reason)
        return recommendation

    async def score(self, query: RecommendQuery, release: Release) -> Recommendation:
        """Answer a query for the scores of given items; not counted among recommendations.

        Raises:
            ServiceError: see ``Recommender.recommend``.
        """
        return await self._answer(query, release)

    async def recommend_all(
        self, queries: Sequence[RecommendQuery], release: Release
    ) -> list[Recommendation]:
        """Answer several queries side by side, in their order; the first failure ends them all.

        Raises:
            ServiceError: see ``Recommender.recommend``.
        """
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.recommend(query, release)) for query in queries]
        except ExceptionGroup as failures:
            let_go(failures)
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _answer(self, query: RecommendQuery, release: Release) -> Recommendation:
        with self._answering(), self._spans.search() as tell:
            recommendation = await self._recommender.recommend(query, release)
            tell(recommendation)
            return recommendation

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """A drain waits for what is done within."""
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._idle.set()

    async def replay(self, query: RecommendQuery, release: Release) -> Recommendation:
        """Answer a query from any release that is loaded, beside the callers' requests.

        It queues like theirs, but is no answer to anybody: the metrics of answers leave it out.

        Raises:
            ServiceError: see ``Recommender.recommend``.
        """
        return await self._recommender.recommend(query, release)

    async def try_release(self, release: Release, timeout_s: float) -> None:
        """Search once with a release on the engine thread, between two batches.

        Raises:
            ReleaseError: the search failed, or found no time.
        """
        search = start_request(release)
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                with self._batcher.admit(search.beam_width, deadline_s) as place:
                    await self._batcher.run(place, release, search)
                    return
            except EngineFaultError as error:
                raise ReleaseError(f"the model cannot search the catalog: {error.detail}") from None
            except ServiceError as error:
                if error.kind is not ErrorKind.OVERLOADED or time.monotonic() > deadline_s:
                    raise ReleaseError(f"the catalog could not be tried: {error}") from None
            await asyncio.sleep(_TRY_AGAIN_S)

    def activate(self, release: Release) -> None:
        """Serve a release from now on; requests already admitted keep theirs."""
        if self._release is not None:
            self.retired.add(self._release, release)
        self._release = release
        self.active_since_s = time.time()
        self.metrics.release_active(release)
        _log.info(
            "release active",
            release=release.version,
            model=release.model_name,
            model_version=release.model_version,
            catalog_version=release.catalog.version,
            items=release.catalog.num_items,
        )

    def deactivate(self) -> Release | None:
        """Serve nothing until the next ``activate``; returns what was served."""
        release, self._release = self._release, None
        return release

    async def hold(self, timeout_s: float) -> bool:
        """Take no more requests until ``resume``; then wait for those in flight.

        Returns:
            Whether all of them were answered within ``timeout_s``.
        """
        self._held = True
        _log.info("drained by an operator", in_flight=self._in_flight)
        return await self._wait_until_idle(timeout_s)

    def resume(self) -> None:
        """Take requests again after ``hold``."""
        if self._held:
            _log.info("resumed by an operator")
        self._held = False

    def start(self) -> None:
        """Start the engine thread and load the release in the background."""
        self._batcher.start()
        loop = asyncio.get_running_loop()

        def load() -> None:
            try:
                release = self._load_release()
            except BaseException as error:
                _post(loop, partial(self._load_failed, error))
            else:
                _post(loop, partial(self._loaded, release))

        # A daemon, so that a signal while loading ends the process at once.
        self._loader = threading.Thread(target=load, name="load", daemon=True)
        self._loader.start()

    async def drain(self, timeout_s: float) -> bool:
        """Stop being ready, then wait for the requests in flight.

        Returns:
            Whether all of them were answered within ``timeout_s``.
        """
        self._draining = True
        _log.info("draining", in_flight=self._in_flight)
        return await self._wait_until_idle(timeout_s)

    async def stop(self) -> None:
        """End the engine thread; whoever still waits gets a 503."""
        self._draining = True
        self._recommender.close()
        self._engine_ended = await self._batcher.stop(_ENGINE_STOP_S)

    async def _wait_until_idle(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            _log.warning("drain timed out", in_flight=self._in_flight)
            return False
        return True

    def _loaded(self, release: Release) -> None:
        self.activate(release)
        self.on_ready()

    def _load_failed(self, error: BaseException) -> None:
        self.load_error = error
        self.on_load_failed()


def _post(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:
        _log.debug("event loop closed while loading")
