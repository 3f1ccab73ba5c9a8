"""All that ties a service to a store: what follows it, what tries releases, its jobs."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

import structlog

from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.release_store import ReleaseStore
from server.catalogs import ReleaseFollower
from server.jobs.backend import BackendError
from server.jobs.ledger import JobLedger
from server.jobs.manager import JobManager
from server.jobs.places import open_board, open_ledger, open_store, uploads_folder
from server.rehearsal.board import RehearsalBoard
from server.rehearsal.rehearsals import Rehearsals
from server.release import Release, ReleaseError
from server.release_source import ReleaseSource
from server.service import Service
from server.settings import Settings
from server.uploads import UploadFolder

_log = structlog.get_logger(__name__)

_COUNT_JOBS_S = 5.0


class StoreLink:
    """What a service that follows a store has beside one that does not.

    Args:
        settings: of the service.
        store: the store.
        source: loads its releases.
        ledger: of the jobs on it.
        board: shared with the jobs.

    Attributes:
        store: the store.
        jobs: submits and watches jobs.
        uploads: files sent to be their sources.
        follower: keeps the service on the active release; there once ``start`` was called.
    """

    def __init__(
        self,
        settings: Settings,
        store: ReleaseStore,
        source: ReleaseSource,
        ledger: JobLedger,
        board: RehearsalBoard,
    ) -> None:
        self.store = store
        self.jobs = JobManager(ledger)
        self.uploads = UploadFolder(uploads_folder(settings), settings.admin.max_uploads_bytes)
        self.follower: ReleaseFollower | None = None
        self._settings = settings
        self._source = source
        self._board = board
        self._rehearsals: Rehearsals | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stop = threading.Event()

    @classmethod
    def open(cls, settings: Settings) -> StoreLink:
        """Open the store and the database of the jobs that the settings name.

        Raises:
            ReleaseError: one of them cannot be opened.
        """
        try:
            store = open_store(settings)
            ledger, board = open_ledger(settings), open_board(settings)
        except (ArtifactError, BackendError, OSError) as error:
            raise ReleaseError(str(error)) from error
        return cls(settings, store, ReleaseSource(settings, store), ledger, board)

    def load_first(self) -> Release:
        """Load what is served first; see ``ReleaseSource.load_first``."""
        return self._source.load_first(self._settings.store.poll_s, self._stop)

    def start(self, service: Service) -> None:
        """Begin to follow, to take rehearsals and to count jobs; on the event loop."""
        settings = self._settings
        self.follower = ReleaseFollower(
            service,
            self._source,
            poll_s=settings.store.poll_s,
            max_request_s=settings.limits.max_timeout_ms / 1000,
        )
        self._rehearsals = Rehearsals(service, self.follower, self._board, settings)
        for work in (
            self.follower.run(),
            self._rehearsals.run(),
            self._count_again_and_again(service),
        ):
            self._tasks.append(asyncio.create_task(work))

    async def stop(self) -> None:
        """End all of it."""
        self._stop.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._rehearsals is not None:
            await self._rehearsals.stop()
        if self.follower is not None:
            await self.follower.stop()
        with suppress(Exception):
            await self.jobs.close()
            await asyncio.to_thread(self._board.close)

    async def count_jobs(self, service: Service) -> None:
        """Tell the metrics how many jobs are in each state."""
        counts = await self.jobs.counts()
        service.metrics.jobs_counted({str(state): n for state, n in counts.items()})

    async def _count_again_and_again(self, service: Service) -> None:
        while True:
            try:
                await self.count_jobs(service)
            except Exception:
                _log.warning("jobs cannot be counted", exc_info=True)
            await asyncio.sleep(_COUNT_JOBS_S)
