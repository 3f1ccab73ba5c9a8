from __future__ import annotations

import asyncio

import pytest

from server.jobs.lanes import Lane
from server.jobs.ledger import JobLedger
from server.jobs.manager import JobManager
from server.jobs.owner import Owner
from server.jobs.types import Job, JobKind, JobState, UnknownJobError
from server.settings import SettingsError, load_settings
from tests.waiting import LIMIT_S


async def test_progress_is_a_stream(ledger: JobLedger):
    manager = JobManager(ledger)
    job = await manager.submit(JobKind.ROLLBACK, {})
    seen: list[Job] = []

    async def watch() -> None:
        async for one in manager.subscribe(job.id):
            assert one not in seen
            seen.append(one)

    async with asyncio.timeout(LIMIT_S):
        watching = asyncio.create_task(watch())
        while len(seen) < 1:
            await asyncio.sleep(0.01)
        running = ledger.claim(Lane.ACTIVATION, Owner.this_process())
        assert running is not None
        while len(seen) < 2:
            await asyncio.sleep(0.01)
        ledger.finish(running, JobState.SUCCEEDED, message="done")
        await watching
        assert (await manager.wait(job.id)).message == "done"
    assert [one.state for one in seen] == ["queued", "running", "succeeded"]
    assert [one.id for one in await manager.list(states=[JobState.SUCCEEDED])] == [job.id]
    assert (await manager.counts())[JobState.SUCCEEDED] == 1


async def test_waiting_ends(ledger: JobLedger):
    manager = JobManager(ledger)
    job = await manager.submit(JobKind.ROLLBACK, {})
    with pytest.raises(TimeoutError):
        await manager.wait(job.id, timeout_s=0.3)
    await manager.cancel(job.id)
    assert (await manager.wait(job.id)).state is JobState.CANCELLED
    assert (await manager.restart(job.id)).attempt == 2
    with pytest.raises(UnknownJobError):
        await manager.get("x")


async def test_it_is_opened_by_settings(tmp_path):
    manager = JobManager.open(load_settings({"store.path": str(tmp_path)}))
    job = await manager.submit(JobKind.ROLLBACK, {})
    await manager.close()
    again = JobManager.open(load_settings({"store.path": str(tmp_path)}))
    assert await again.get(job.id) == job
    await again.close()
    assert (tmp_path / ".jobs" / "jobs.sqlite3").exists()
    with pytest.raises(SettingsError, match=r"--store\.path"):
        JobManager.open(load_settings({}))
