"""Every change of a job's state, on every database."""

from __future__ import annotations

import dataclasses
import itertools
import json
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from server.jobs import insist
from server.jobs.backend import BackendError, open_backend
from server.jobs.lanes import Lane
from server.jobs.ledger import JobLedger
from server.jobs.owner import Owner
from server.jobs.params import RollbackParams
from server.jobs.types import (
    InvalidJobError,
    Job,
    JobConflictError,
    JobErrorKind,
    JobKind,
    JobQueueFullError,
    JobState,
    UnknownJobError,
)

ME = Owner.this_process()
DELETE = {"deletes": ["a"]}


@pytest.fixture(params=["sqlite", "redis", "postgres"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[JobLedger]:
    location = (
        tmp_path / "jobs.sqlite3"
        if request.param == "sqlite"
        else request.getfixturevalue(f"{request.param}_url")
    )
    backend = open_backend(location, f"t{secrets.token_hex(4)}")
    yield JobLedger(backend, max_queued=5, keep_finished=3)
    backend.close()


def claimed(ledger: JobLedger, lane: Lane = Lane.CATALOG) -> Job:
    job = ledger.claim(lane, ME)
    assert job is not None
    return job


def test_a_job_from_its_submission_to_its_end(ledger: JobLedger):
    job = ledger.submit(JobKind.UPDATE_ITEMS, {"deletes": ["a", "b"]})
    assert job.state is JobState.QUEUED
    assert ledger.get(job.id) == job
    assert json.loads(ledger.params(job.id)) == {"deletes": ["a", "b"]}
    running = claimed(ledger)
    assert (running.id, running.state) == (job.id, JobState.RUNNING)
    assert running.started_at is not None
    assert ledger.claim(Lane.CATALOG, ME) is None
    ledger.write(running.model_copy(update={"progress": 0.5, "log": ("half",)}))
    assert ledger.get(job.id).log == ("half",)
    ledger.finish(running, JobState.SUCCEEDED, message="done", result={"items": 3})
    done = ledger.get(job.id)
    assert (done.state, done.progress, done.result) == (JobState.SUCCEEDED, 1.0, {"items": 3})
    assert ledger.counts()[JobState.SUCCEEDED] == 1
    with pytest.raises(UnknownJobError, match="no such job"):
        ledger.params(job.id)
    with pytest.raises(JobConflictError, match="has succeeded"):
        ledger.cancel(job.id)
    with pytest.raises(JobConflictError, match="is succeeded"):
        ledger.restart(job.id)


def test_lanes_keep_their_order_and_do_not_wait_for_each_other(ledger: JobLedger):
    first = ledger.submit(JobKind.UPDATE_ITEMS, DELETE)
    second = ledger.submit(JobKind.DELETE_CONSTRAINT_SET, {"name": "x"})
    back = ledger.submit(JobKind.ROLLBACK, {})
    assert claimed(ledger, Lane.ACTIVATION).id == back.id
    assert claimed(ledger).id == first.id
    assert claimed(ledger).id == second.id
    assert [job.id for job in ledger.find(kinds=[JobKind.ROLLBACK])] == [back.id]
    assert {job.id for job in ledger.find(limit=2)} == {back.id, second.id}


def test_a_key_that_is_used_again_gives_the_first_job(ledger: JobLedger):
    first = ledger.submit(JobKind.UPDATE_ITEMS, DELETE, idempotency_key="k")
    claimed(ledger)
    again = ledger.submit(JobKind.UPDATE_ITEMS, DELETE, idempotency_key="k")
    assert (again.id, again.state) == (first.id, JobState.RUNNING)
    assert ledger.claim(Lane.CATALOG, ME) is None
    with pytest.raises(JobConflictError, match=f"'k' belongs to job {first.id}"):
        ledger.submit(JobKind.UPDATE_ITEMS, {"deletes": ["b"]}, idempotency_key="k")
    with pytest.raises(JobConflictError, match="belongs to job"):
        ledger.submit(JobKind.ROLLBACK, {}, idempotency_key="k")
    for key in ("", "k" * 201, "a\nb"):
        with pytest.raises(InvalidJobError, match="1 to 200 printable"):
            ledger.submit(JobKind.ROLLBACK, {}, idempotency_key=key)


def test_of_equal_requests_at_the_same_moment_one_becomes_a_job(ledger: JobLedger):
    with ThreadPoolExecutor(4) as pool:
        jobs = list(
            pool.map(
                lambda _: ledger.submit(JobKind.UPDATE_ITEMS, DELETE, idempotency_key="k"), range(8)
            )
        )
    assert len({job.id for job in jobs}) == 1
    assert len(ledger.find()) == 1
    claimed(ledger)
    assert ledger.claim(Lane.CATALOG, ME) is None


def test_every_job_is_claimed_once(ledger: JobLedger):
    ids = {ledger.submit(JobKind.UPDATE_ITEMS, DELETE).id for _ in range(5)}
    with ThreadPoolExecutor(4) as pool:
        taken = [
            job.id for job in pool.map(lambda _: ledger.claim(Lane.CATALOG, ME), range(10)) if job
        ]
    assert len(taken) == 5
    assert set(taken) == ids


def test_cancel_and_restart(ledger: JobLedger):
    waiting = ledger.submit(JobKind.UPDATE_ITEMS, DELETE)
    assert ledger.cancel(waiting.id).state is JobState.CANCELLED
    assert ledger.cancel(waiting.id).state is JobState.CANCELLED
    assert ledger.claim(Lane.CATALOG, ME) is None

    again = ledger.restart(waiting.id)
    assert (again.id, again.attempt, again.state) == (waiting.id, 2, JobState.QUEUED)
    running = claimed(ledger)
    assert running.attempt == 2
    assert not ledger.cancel_requested(running)
    assert ledger.cancel(running.id).cancel_requested
    assert ledger.cancel_requested(running)
    with pytest.raises(JobConflictError, match="is running; only failed"):
        ledger.restart(running.id)
    stopped = ledger.finish(running, JobState.CANCELLED, message="cancelled")
    assert stopped.cancel_requested
    assert not ledger.restart(running.id).cancel_requested
    with pytest.raises(UnknownJobError, match="'nobody'"):
        ledger.cancel("nobody")


def test_what_a_dying_worker_leaves(ledger: JobLedger):
    ledger.submit(JobKind.UPDATE_ITEMS, DELETE)
    running = claimed(ledger)
    assert ledger.owner(running.id) == ME
    ended = ledger.interrupt(running, "gone")
    assert ended.error is not None
    assert (ended.state, ended.error.type) == (JobState.INTERRUPTED, JobErrorKind.INTERRUPTED)
    ledger.restart(running.id)
    back = ledger.put_back(claimed(ledger))
    assert (back.state, back.attempt) == (JobState.QUEUED, 3)
    assert claimed(ledger).attempt == 3


def test_messages_that_were_lost_are_found(ledger: JobLedger):
    ids = {ledger.submit(JobKind.UPDATE_ITEMS, DELETE).id for _ in range(2)}
    for _ in ids:
        # Taken by a process that then died.
        assert ledger._backend.queues[Lane.CATALOG].take() is not None
    unlucky = ledger.get(min(ids))
    assert ledger._backend.keys.put_if_absent(f"claim:{unlucky.id}:1", b"{}")
    lost = ledger.requeue_lost(())
    assert lost == ids
    assert ledger.claim(Lane.CATALOG, ME) is None
    ledger.requeue_lost(lost)
    assert claimed(ledger).id == max(ids)
    assert ledger.get(unlucky.id).state is JobState.INTERRUPTED
    assert ledger.requeue_lost(lost) == set()


def test_a_job_whose_claimant_lives_is_not_lost(ledger: JobLedger):
    """It has made its mark, and the database went away before the record was written."""
    job = ledger.submit(JobKind.UPDATE_ITEMS, DELETE)
    assert ledger._backend.queues[Lane.CATALOG].take() is not None
    mark = {**dataclasses.asdict(ME), "claim": "0123456789abcdef"}
    ledger._backend.keys.put(f"claim:{job.id}:1", json.dumps(mark).encode())
    lost = ledger.requeue_lost(ledger.requeue_lost(()))
    assert lost == {job.id}
    assert ledger.get(job.id).state is JobState.QUEUED
    mark["started"] = ME.started + 1_000
    ledger._backend.keys.put(f"claim:{job.id}:1", json.dumps(mark).encode())
    ledger.requeue_lost(lost)
    assert ledger.get(job.id).state is JobState.INTERRUPTED


class Unsteady:
    """A table whose ``call``-th write, and the ``more`` after it, fail before or after they act."""

    def __init__(
        self,
        table: Any,
        calls: Iterator[int],
        call: int,
        more: int,
        acts: bool,
        writes: tuple[str, ...] = ("put", "put_if_absent"),
    ) -> None:
        self._table = table
        self._writes = writes
        self._calls = calls
        self._fails = range(call, call + more + 1)
        self._acts = acts

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._table, name)
        if name not in self._writes:
            return found

        def write(*arguments: Any) -> Any:
            fails = next(self._calls) in self._fails
            result = found(*arguments) if self._acts or not fails else None
            if fails:
                raise ConnectionError("the database is away")
            return result

        return write


@pytest.mark.parametrize("acts", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("more", [0, 2])
@pytest.mark.parametrize("call", [0, 1, 2])
def test_a_database_that_goes_away_within_a_claim(
    ledger: JobLedger, monkeypatch: pytest.MonkeyPatch, call: int, more: int, acts: bool
):
    monkeypatch.setattr(insist, "PAUSE_S", 0.0)
    job = ledger.submit(JobKind.UPDATE_ITEMS, DELETE)
    calls = itertools.count()
    names = ("records", "keys", "owners")
    tables = {
        name: Unsteady(getattr(ledger._backend, name), calls, call, more, acts) for name in names
    }
    claiming = JobLedger(dataclasses.replace(ledger._backend, **tables))
    running = claiming.claim(Lane.CATALOG, ME)
    assert next(calls) > 3 + more  # it did fail
    assert running is not None
    assert (running.id, running.state, running.attempt) == (job.id, JobState.RUNNING, 1)
    assert ledger.get(job.id) == running
    assert ledger.owner(job.id) == ME
    # Nobody else takes it for lost.
    assert ledger.requeue_lost({job.id}) == set()
    assert ledger.claim(Lane.CATALOG, ME) is None


def unsteady(ledger: JobLedger, *failing: Any) -> JobLedger:
    """The ledger, whose tables' writes fail as :class:`Unsteady` says."""
    calls = itertools.count()
    names = ("records", "payloads", "keys", "owners")
    tables = {name: Unsteady(getattr(ledger._backend, name), calls, *failing) for name in names}
    return JobLedger(dataclasses.replace(ledger._backend, **tables), keep_finished=1)


@pytest.mark.parametrize("acts", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", [0, 1, 2])
def test_a_submission_that_fails_and_is_repeated_is_one_job(
    ledger: JobLedger, call: int, acts: bool
):
    with pytest.raises(ConnectionError, match="is away"):
        unsteady(ledger, call, 0, acts).submit(JobKind.ROLLBACK, {}, idempotency_key="k")
    job = ledger.submit(JobKind.ROLLBACK, {}, idempotency_key="k")
    assert ledger.submit(JobKind.ROLLBACK, {}, idempotency_key="k").id == job.id
    ledger.requeue_lost(ledger.requeue_lost(()))
    assert claimed(ledger, Lane.ACTIVATION).id == job.id
    assert ledger.params(job.id) == b"{}"
    assert ledger.requeue_lost(ledger.requeue_lost(())) == set()
    assert ledger.claim(Lane.ACTIVATION, ME) is None
    assert [one.id for one in ledger.find()] == [job.id]


@pytest.mark.parametrize("call", range(7))
def test_a_job_that_is_half_forgotten_is_forgotten_by_the_next_one(ledger: JobLedger, call: int):
    first = ledger.submit(JobKind.ROLLBACK, {}, idempotency_key="k")
    failed = ledger.finish(claimed(ledger, Lane.ACTIVATION), JobState.FAILED, message="no")
    ledger.submit(JobKind.ROLLBACK, {})
    dying = unsteady(ledger, call, 10, False, ("delete",))
    with pytest.raises(ConnectionError, match="is away"):
        dying.finish(claimed(ledger, Lane.ACTIVATION), JobState.FAILED, message="no")
    again = ledger.submit(JobKind.ROLLBACK, {}, idempotency_key="k")
    if again.id == first.id:
        assert again == failed  # still known
    else:
        assert claimed(ledger, Lane.ACTIVATION).id == again.id
        ledger.finish(again, JobState.FAILED, message="no")
    ledger.submit(JobKind.ROLLBACK, {})
    JobLedger(ledger._backend, keep_finished=1).finish(
        claimed(ledger, Lane.ACTIVATION), JobState.FAILED, message="no"
    )
    assert len(ledger.find()) == 1
    assert ledger._backend.owners.values() == []
    assert len(ledger._backend.payloads.values()) == 1
    assert not [mark for mark in ledger._backend.keys.values() if first.id.encode() in mark]


def test_a_database_that_stays_away(ledger: JobLedger, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(insist, "PAUSE_S", 0.0)
    ledger.submit(JobKind.UPDATE_ITEMS, DELETE)
    keys = Unsteady(ledger._backend.keys, itertools.count(), 0, 10**6, False)
    away = JobLedger(dataclasses.replace(ledger._backend, keys=keys))  # type: ignore[arg-type]
    with pytest.raises(ConnectionError, match="is away"):
        away.claim(Lane.CATALOG, ME)
    # Its message is gone, and is found to be.
    lost = ledger.requeue_lost(())
    ledger.requeue_lost(lost)
    assert claimed(ledger).attempt == 1


def test_bounds(ledger: JobLedger):
    jobs = [ledger.submit(JobKind.ROLLBACK, {}, idempotency_key=f"k{i}") for i in range(5)]
    with pytest.raises(JobQueueFullError, match="5 jobs wait; at most 5 may"):
        ledger.submit(JobKind.ROLLBACK, {})
    assert ledger.submit(JobKind.ROLLBACK, {}, idempotency_key="k0").id == jobs[0].id
    for _ in jobs:
        ledger.finish(claimed(ledger, Lane.ACTIVATION), JobState.SUCCEEDED, message="done")
    left = ledger.find()
    assert [job.id for job in left] == [job.id for job in reversed(jobs[2:])]
    assert ledger.submit(JobKind.ROLLBACK, {}, idempotency_key="k0").id != jobs[0].id
    for job in left:
        assert ledger.submit(JobKind.ROLLBACK, {}, idempotency_key=job.idempotency_key) == job


def test_a_job_run_past_the_queue(ledger: JobLedger):
    job, mine = ledger.begin(JobKind.ROLLBACK, RollbackParams(), ME, idempotency_key="k")
    assert mine
    assert job.state is JobState.RUNNING
    assert ledger.claim(Lane.ACTIVATION, ME) is None
    other, mine = ledger.begin(JobKind.ROLLBACK, {}, ME, idempotency_key="k")
    assert not mine
    assert other.id == job.id


def test_owners():
    assert not ME.is_dead
    assert not dataclasses.replace(ME, host="elsewhere", pid=2**22 - 1).is_dead
    assert dataclasses.replace(ME, started=ME.started - 100).is_dead
    assert dataclasses.replace(ME, pid=2**22 - 1).is_dead


def test_a_database_that_cannot_be_used(tmp_path: Path):
    with pytest.raises(BackendError, match="allowed are a file, redis:// and postgresql://"):
        open_backend("mysql://user:secret@host/db", "x")
    with pytest.raises(BackendError, match=r"kept in redis://127.0.0.1:1/0: ConnectionError") as e:
        open_backend("redis://:secret@127.0.0.1:1/0", "x")
    assert "secret" not in str(e.value)
    file = tmp_path / "file"
    file.write_text("no database" * 1000)
    with pytest.raises(BackendError, match="not a database"):
        open_backend(file, "x")
