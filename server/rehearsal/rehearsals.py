"""The serving process's side: take requests for rehearsals, try releases, give signs of life."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import structlog
from pydantic import ValidationError

from server.api.limits import to_query
from server.api.schemas import RecommendRequest
from server.catalogs import ReleaseFollower
from server.errors import ServiceError
from server.queries import RecommendQuery
from server.rehearsal.board import RehearsalBoard
from server.rehearsal.gate import Thresholds, objections
from server.rehearsal.replay import Replayed, compare, replay
from server.rehearsal.sample import anonymous
from server.rehearsal.types import (
    GateOptions,
    RehearsalReport,
    RehearsalRequest,
    ReplayReport,
    ServerState,
)
from server.release import Release, ReleaseError
from server.service import Service
from server.settings import Settings

_log = structlog.get_logger(__name__)

_BEAT_S = 1.0
_LOOK_S = 0.1
_REPLAY_TIMEOUT_S = 30.0


class Rehearsals:
    """Tries releases on requests before they become active, when a job asks for it.

    Args:
        service: what serves.
        follower: what loads.
        board: shared with the jobs.
        settings: of the service.
    """

    def __init__(
        self,
        service: Service,
        follower: ReleaseFollower,
        board: RehearsalBoard,
        settings: Settings,
    ) -> None:
        self._service = service
        self._follower = follower
        self._board = board
        self._settings = settings
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        self._beat = 0
        self._reports: dict[str, RehearsalReport] = {}  # by request, not written yet
        self._ends = False

    async def run(self) -> None:
        """Give signs of life and take requests, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(_again_and_again(self.announce, self._until_next_beat))
            group.create_task(_again_and_again(self.take_one, lambda: asyncio.sleep(_LOOK_S)))

    async def stop(self) -> None:
        """Tell the others that this process is gone."""
        self._ends = True
        try:
            await asyncio.to_thread(self._board.withdraw, self.name)
        except Exception:
            _log.warning("the jobs' database cannot be written", exc_info=True)

    async def announce(self) -> None:
        """Give a sign of life."""
        if self._ends:
            return
        self._beat += 1
        serving, status = self._service.release, self._follower.status
        failure = status.failure
        state = ServerState(
            server=self.name,
            beat=self._beat,
            at_s=time.time(),
            release=None if serving is None else serving.version,
            loading=self._follower.loading,
            failed_release=None if failure is None else failure.release,
            failure=None if failure is None else failure.message,
        )
        del serving
        await asyncio.to_thread(self._board.announce, state)

    async def _until_next_beat(self) -> None:
        """Wait for a second, or until there is news: a job waits to hear what is served."""
        # Not wait_for, which Python 3.11 lets swallow a cancellation that comes with the news.
        with suppress(TimeoutError):
            async with asyncio.timeout(_BEAT_S):
                await self._follower.news.wait()
        self._follower.news.clear()

    async def take_one(self) -> None:
        """Take a request if there is one, try its release, and report.

        Reports that could not be written go first: jobs wait for them as long as this server lives.
        """
        await self._hand_in()
        if self._service.release is None or self._follower.busy:
            return
        for request in await asyncio.to_thread(self._board.open_requests, self.name):
            if await asyncio.to_thread(self._board.claim, request.id, self.name):
                self._reports[request.id] = await self._rehearse(request)
                await self._hand_in()
                return

    async def _hand_in(self) -> None:
        for request_id, report in list(self._reports.items()):
            await asyncio.to_thread(self._board.report, request_id, report)
            del self._reports[request_id]

    async def _rehearse(self, request: RehearsalRequest) -> RehearsalReport:
        _log.info("rehearsal", release=request.release, request=request.id)
        started = time.monotonic()
        try:
            queries = self._queries(request.options)
            trial = Trial(self._service, queries)
            thresholds = self._thresholds().overridden(request.options)
            await self._follower.prepare(
                request.release, trial.before, lambda new: trial.after(new, thresholds)
            )
        except (ReleaseError, ServiceError) as error:
            report = self._report("failed", str(error), started)
        except Exception as error:
            _log.exception("unexpected error in a rehearsal")
            report = self._report("failed", f"{type(error).__name__}: {error}", started)
        else:
            if trial.objections:
                message = "the gate blocks the activation: " + "; ".join(trial.objections)
                report = self._report("blocked", message, started, trial.report)
            else:
                compared = trial.report.compared if trial.report else 0
                message = f"loaded and tried; {compared} replayed requests compared"
                report = self._report("passed", message, started, trial.report)
        if report.state != "passed":
            self._service.metrics.rehearsal_refused(report.state)
            _log.error("a release was refused", release=request.release, reason=report.message)
        return report

    def _report(
        self, state: Any, message: str, started: float, replayed: ReplayReport | None = None
    ) -> RehearsalReport:
        return RehearsalReport(
            server=self.name,
            state=state,
            message=message,
            load_s=round(time.monotonic() - started, 3),
            replay=replayed,
        )

    def _queries(self, options: GateOptions) -> list[RecommendQuery]:
        """What to replay: the given requests, or the latest ones that were kept."""
        if options.skip:
            return []
        if options.requests is None:
            return self._service.recent.latest(self._settings.gate.sample_requests)
        queries = []
        for place, body in enumerate(options.requests):
            try:
                query = to_query(RecommendRequest.model_validate(body), self._settings, 0.0)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"]))
                raise ReleaseError(f"gate.requests.{place}.{where}: {first['msg']}") from None
            except ServiceError as error:
                raise ReleaseError(f"gate.requests.{place}: {error}") from None
            queries.append(anonymous(query))
        return queries

    def _thresholds(self) -> Thresholds:
        gate = self._settings.gate
        return Thresholds(
            min_requests=gate.min_requests,
            min_overlap=gate.min_overlap,
            max_shortfall=gate.max_shortfall,
            max_latency_ratio=gate.max_latency_ratio,
        )


class Trial:
    """Requests replayed on the release that is served and on its successor.

    Attributes:
        report: the comparison, None before there is one or where nothing was replayed.
        objections: of the gate.
    """

    def __init__(self, service: Service, queries: Sequence[RecommendQuery]) -> None:
        self._service = service
        self._queries = queries
        self._old: list[Replayed] | None = None
        self.report: ReplayReport | None = None
        self.objections: list[str] = []

    async def before(self, serving: Release) -> None:
        """Replay on what is served."""
        self._old = await self._replay(serving)

    async def after(self, candidate: Release, thresholds: Thresholds) -> bool:
        """Replay on the successor; whether the gate lets it through."""
        new = await self._replay(candidate)
        self.report = compare(self._old if self._old is not None else new, new)
        self.objections = objections(self.report, thresholds)
        return not self.objections

    async def _replay(self, release: Release) -> list[Replayed]:
        return await replay(
            self._queries,
            lambda query: self._service.replay(query, release),
            _REPLAY_TIMEOUT_S,
        )


async def _again_and_again(
    step: Callable[[], Awaitable[None]], pause: Callable[[], Awaitable[None]]
) -> None:
    while True:
        try:
            await step()
        except Exception:
            # The database of the jobs may be away for a while; serving goes on.
            _log.warning("a look at the jobs' database failed", exc_info=True)
        await pause()
