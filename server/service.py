"""The running service: what it serves, in which phase it is, and the way through it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from functools import partial

import structlog

from server.batching.batcher import Batcher, QueueLimits
from server.batching.policy import BatchLimits
from server.errors import ErrorKind, ServiceError
from server.metrics import Metrics
from server.recommender import Recommendation, Recommender, RecommendQuery
from server.release import Release, ReleaseLoader
from server.settings import Settings

_log = structlog.get_logger(__name__)

# How long the engine thread gets to finish its batch after everybody has been answered.
_ENGINE_STOP_S = 5.0


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
    """

    def __init__(self, settings: Settings, load_release: ReleaseLoader) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.load_error: BaseException | None = None
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
        self._recommender = Recommender(
            self._batcher, batching.prepare_threads, batching.max_queued_embeds
        )
        self._load_release = load_release
        self._release: Release | None = None
        self._draining = False
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._loader: threading.Thread | None = None
        self._engine_ended = True

    @property
    def phase(self) -> Phase:
        """Where in its life the service is."""
        if self._draining:
            return Phase.DRAINING
        return Phase.LOADING if self._release is None else Phase.READY

    @property
    def busy_threads(self) -> bool:
        """Whether a loader or an engine that does not end still runs."""
        loading = self._loader is not None and self._loader.is_alive()
        return loading or not self._engine_ended

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
        if self._release is None:
            raise ServiceError(ErrorKind.LOADING, "the model is being loaded", retry_after_s=1.0)
        return self._release

    async def recommend(self, query: RecommendQuery, release: Release) -> Recommendation:
        """Answer a query from the release it was admitted under.

        Raises:
            ServiceError: see ``Recommender.recommend``.
        """
        with self._answering():
            recommendation = await self._recommender.recommend(query, release)
        shortfall = recommendation.answer.result.shortfall
        reason = None if shortfall is None else shortfall.reason
        self.metrics.answered(len(recommendation.items), reason)
        return recommendation

    async def score(self, query: RecommendQuery, release: Release) -> Recommendation:
        """Answer a query for the scores of given items; not counted among recommendations.

        Raises:
            ServiceError: see ``Recommender.recommend``.
        """
        with self._answering():
            return await self._recommender.recommend(query, release)

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
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

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

    def activate(self, release: Release) -> None:
        """Serve a release from now on; requests already admitted keep theirs."""
        self._release = release
        self.metrics.release_active(release)
        _log.info(
            "release active",
            model=release.model_name,
            model_version=release.model_version,
            catalog_version=release.catalog.version,
            items=release.catalog.num_items,
        )

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
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            _log.warning("drain timed out", in_flight=self._in_flight)
            return False
        return True

    async def stop(self) -> None:
        """End the engine thread; whoever still waits gets a 503."""
        self._draining = True
        self._recommender.close()
        self._engine_ended = await self._batcher.stop(_ENGINE_STOP_S)

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
