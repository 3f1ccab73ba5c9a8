"""Jobs for the event loop: the ledger's blocking calls on threads, and progress as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from typing import TYPE_CHECKING, Any

from server.jobs.ledger import JobLedger
from server.jobs.params import Params
from server.jobs.types import Job, JobKind, JobState

if TYPE_CHECKING:
    from server.settings import Settings

_POLL_S = 0.25


class JobManager:
    """Submits, finds, watches and stops jobs. What runs them is a worker, another process.

    Args:
        ledger: shared with the workers.
    """

    def __init__(self, ledger: JobLedger) -> None:
        self._ledger = ledger

    @classmethod
    def open(cls, settings: Settings) -> JobManager:
        """The manager of what the settings name.

        Raises:
            BackendError: the database cannot be used.
            SettingsError: no store is named.
        """
        from server.jobs.places import open_ledger

        return cls(open_ledger(settings))

    async def submit(
        self,
        kind: JobKind,
        params: Mapping[str, Any] | Params,
        *,
        idempotency_key: str | None = None,
    ) -> Job:
        """See :meth:`JobLedger.submit`."""
        return await asyncio.to_thread(
            self._ledger.submit, kind, params, idempotency_key=idempotency_key
        )

    async def get(self, job_id: str) -> Job:
        """See :meth:`JobLedger.get`."""
        return await asyncio.to_thread(self._ledger.get, job_id)

    async def list(
        self,
        *,
        kinds: Collection[JobKind] | None = None,
        states: Collection[JobState] | None = None,
        limit: int | None = 50,
    ) -> list[Job]:
        """Jobs, latest first."""
        return await asyncio.to_thread(self._ledger.find, kinds=kinds, states=states, limit=limit)

    async def counts(self) -> dict[JobState, int]:
        """How many jobs are in each state."""
        return await asyncio.to_thread(self._ledger.counts)

    async def cancel(self, job_id: str) -> Job:
        """See :meth:`JobLedger.cancel`."""
        return await asyncio.to_thread(self._ledger.cancel, job_id)

    async def restart(self, job_id: str) -> Job:
        """See :meth:`JobLedger.restart`."""
        return await asyncio.to_thread(self._ledger.restart, job_id)

    async def subscribe(self, job_id: str) -> AsyncIterator[Job]:
        """The job now, then whenever it has changed, until it has ended.

        Raises:
            UnknownJobError: there is none of this id, or it was forgotten meanwhile.
        """
        last: Job | None = None
        while True:
            job = await self.get(job_id)
            if job != last:
                yield job
                last = job
            if job.state.finished:
                return
            await asyncio.sleep(_POLL_S)

    async def wait(self, job_id: str, timeout_s: float | None = None) -> Job:
        """The job once it has ended.

        Raises:
            UnknownJobError: there is none of this id.
            TimeoutError: it has not ended in time.
        """
        async with asyncio.timeout(timeout_s):
            async for job in self.subscribe(job_id):
                if job.state.finished:
                    return job
        raise TimeoutError

    async def close(self) -> None:
        """Close the connections."""
        await asyncio.to_thread(self._ledger.close)
