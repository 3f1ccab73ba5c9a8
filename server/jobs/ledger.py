"""The record of all jobs and every change of their state; shared by any number of processes.

Nothing here locks: a claim is an atomic insert, so every attempt of a job is run by one process at
most, and every other change is safe to repeat or to lose against a later one.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from server.jobs.backend import Backend
from server.jobs.insist import insist
from server.jobs.lanes import LANES, Lane
from server.jobs.owner import Owner
from server.jobs.params import Params, checked_params, shown
from server.jobs.types import (
    InvalidJobError,
    Job,
    JobConflictError,
    JobErrorKind,
    JobFault,
    JobKind,
    JobQueueFullError,
    JobState,
    UnknownJobError,
    now,
)

MAX_KEY_CHARS = 200


class JobLedger:
    """See the module's docstring. Blocking, safe to use from several threads.

    Args:
        backend: where it is kept.
        max_queued: most jobs that wait.
        keep_finished: finished jobs that are remembered; the oldest are forgotten first.
    """

    def __init__(
        self, backend: Backend, *, max_queued: int = 100, keep_finished: int = 200
    ) -> None:
        self._backend = backend
        self._max_queued = max_queued
        self._keep_finished = keep_finished

    # For whoever wants jobs done

    def submit(
        self,
        kind: JobKind,
        params: Mapping[str, Any] | Params,
        *,
        idempotency_key: str | None = None,
    ) -> Job:
        """Queue a job; with a key that was used before for the same, give that job instead.

        Raises:
            InvalidJobError: parameters or key that are not allowed.
            JobConflictError: the key was used for another request.
            JobQueueFullError: too many jobs wait.
        """
        job, is_new = self._record(kind, params, idempotency_key)
        if is_new:
            self._enqueue(job)
        return job

    def get(self, job_id: str) -> Job:
        """One job.

        Raises:
            UnknownJobError: there is none of this id.
        """
        data = self._backend.records.get(job_id)
        if data is None:
            raise UnknownJobError(job_id)
        return Job.model_validate_json(data)

    def find(
        self,
        *,
        kinds: Collection[JobKind] | None = None,
        states: Collection[JobState] | None = None,
        limit: int | None = None,
    ) -> list[Job]:
        """Jobs, latest first."""
        jobs = [Job.model_validate_json(data) for data in self._backend.records.values()]
        wanted = [
            job
            for job in jobs
            if (kinds is None or job.kind in kinds) and (states is None or job.state in states)
        ]
        wanted.sort(key=lambda job: (job.created_at, job.id), reverse=True)
        return wanted[:limit]

    def counts(self) -> dict[JobState, int]:
        """How many jobs are in each state."""
        found = Counter(job.state for job in self.find())
        return {state: found[state] for state in JobState}

    def cancel(self, job_id: str) -> Job:
        """Ask a job to stop; one that waits is cancelled at once, one that is cancelled stays so.

        Raises:
            UnknownJobError: there is none of this id.
            JobConflictError: it has ended otherwise.
        """
        job = self.get(job_id)
        if job.state is JobState.CANCELLED:
            return job
        if job.state.finished:
            raise JobConflictError(f"job {job_id} has {job.state}; there is nothing to cancel")
        # The mark first: whoever claims the job meanwhile sees it and stops.
        self._backend.keys.put(_cancel_key(job), b"1")
        if job.state is JobState.QUEUED:
            return self.finish(job, JobState.CANCELLED, message="cancelled before it began")
        return job.model_copy(update={"cancel_requested": True})

    def cancel_requested(self, job: Job) -> bool:
        """Whether somebody asked for this attempt to stop."""
        return self._backend.keys.get(_cancel_key(job)) is not None

    def restart(self, job_id: str) -> Job:
        """Queue a job again that did not succeed.

        Raises:
            UnknownJobError: there is none of this id.
            JobConflictError: it waits, runs or has succeeded.
            JobQueueFullError: too many jobs wait.
        """
        job = self.get(job_id)
        if not job.state.finished or job.state is JobState.SUCCEEDED:
            raise JobConflictError(
                f"job {job_id} is {job.state}; only failed, cancelled and interrupted jobs can be "
                "restarted"
            )
        return self._again(job, "restarted")

    # For whoever does them

    def params(self, job_id: str) -> bytes:
        """All parameters of a job, JSON; they were checked when it was submitted.

        Raises:
            UnknownJobError: there is none of this id, or it has succeeded long ago.
        """
        data = self._backend.payloads.get(job_id)
        if data is None:
            raise UnknownJobError(job_id)
        return data

    def begin(
        self,
        kind: JobKind,
        params: Mapping[str, Any] | Params,
        owner: Owner,
        *,
        idempotency_key: str | None = None,
    ) -> tuple[Job, bool]:
        """Record a job that its owner runs itself, past the queue.

        Returns:
            The job, and whether it is to be run: not if the key belongs to an earlier one.
        """
        job, is_new = self._record(kind, params, idempotency_key)
        claimed = self._claim(job, owner) if is_new else None
        return claimed or job, claimed is not None

    def claim(
        self, lane: Lane, owner: Owner, *, ending: threading.Event | None = None
    ) -> Job | None:
        """Take the next job of a lane, None if none waits. May block for a second.

        A job is the caller's or nobody's: should the database go away between the steps of a claim,
        they are repeated until it is back, see :func:`~server.jobs.insist.insist`.
        """
        message = self._backend.queues[lane].take()
        if message is None:
            return None
        job_id, _, attempt = message.partition(":")
        try:
            job = self.get(job_id)
        except UnknownJobError:
            return None
        if job.state is not JobState.QUEUED or str(job.attempt) != attempt:
            return None
        return self._claim(job, owner, ending)

    def write(self, job: Job) -> None:
        """Write the record of a job that the caller has claimed."""
        self._backend.records.put(job.id, job.model_dump_json().encode())

    def heartbeat(self, job: Job, owner: Owner) -> None:
        """Tell that the owner is alive."""
        self._backend.owners.put(job.id, json.dumps(asdict(owner)).encode())

    def owner(self, job_id: str) -> Owner | None:
        """Who runs a job, None if nobody does."""
        data = self._backend.owners.get(job_id)
        return None if data is None else Owner(**json.loads(data))

    def finish(
        self,
        job: Job,
        state: JobState,
        *,
        message: str,
        result: dict[str, Any] | None = None,
        error: JobFault | None = None,
    ) -> Job:
        """Write how a job ended, and forget the oldest ones."""
        done = job.model_copy(
            update={
                "state": state,
                "progress": 1.0 if state is JobState.SUCCEEDED else job.progress,
                "message": message,
                "finished_at": now(),
                "result": result,
                "error": error,
                "cancel_requested": self.cancel_requested(job),
            }
        )
        self.write(done)
        self._backend.owners.delete(job.id)
        if state is JobState.SUCCEEDED:
            self._backend.payloads.delete(job.id)  # nobody restarts it
        self._forget_oldest()
        return done

    def put_back(self, job: Job) -> Job:
        """Queue a running job again because its worker is told to end."""
        return self._again(job, "waits again; its worker ended", bounded=False)

    def interrupt(self, job: Job, message: str) -> Job:
        """Mark a job whose process died."""
        fault = JobFault(type=JobErrorKind.INTERRUPTED, message=message)
        return self.finish(job, JobState.INTERRUPTED, message=message, error=fault)

    def running(self) -> list[Job]:
        """Jobs that somebody is said to run."""
        return self.find(states=[JobState.RUNNING])

    def requeue_lost(self, seen_before: Collection[str]) -> set[str]:
        """Queue jobs again whose message was lost between two steps of a process that died.

        Args:
            seen_before: what the call before this one returned, some seconds ago: a job that is
                being submitted or claimed right now looks the same for a moment.

        Returns:
            Jobs that look lost now.
        """
        waiting = {m for queue in self._backend.queues.values() for m in queue.waiting()}
        lost = set()
        for job in self.find(states=[JobState.QUEUED]):
            if f"{job.id}:{job.attempt}" in waiting:
                continue
            lost.add(job.id)
            if job.id in seen_before:
                claim = self._backend.keys.get(_claim_key(job))
                if claim is None:
                    self._enqueue(job)
                elif not _is_alive(claim):
                    self.interrupt(job, "its worker died when it was about to begin")
        return lost

    def close(self) -> None:
        """Close the connections."""
        self._backend.close()

    def _record(
        self, kind: JobKind, params: Mapping[str, Any] | Params, key: str | None
    ) -> tuple[Job, bool]:
        checked = checked_params(kind, params)
        _require_key(key)
        content = checked.model_dump_json(exclude_unset=True)
        digest = hashlib.sha256(f"{kind}\n{content}".encode()).hexdigest()
        if key is not None and (earlier := self._earlier(key, digest)) is not None:
            return earlier, False
        self._require_room()
        job = Job(
            id=secrets.token_hex(8) if key is None else self._reserved(key, digest),
            kind=kind,
            state=JobState.QUEUED,
            message="waits",
            created_at=now(),
            parameters=shown(checked),
            idempotency_key=key,
        )
        self._backend.payloads.put(job.id, content.encode())
        if not self._backend.records.put_if_absent(job.id, job.model_dump_json().encode()):
            return self.get(job.id), False  # somebody was quicker with the same key
        return job, True

    def _reserved(self, key: str, digest: str) -> str:
        """The id of the job that a key belongs to, from now on or already.

        Before the job is recorded: should that fail, or whoever submits it die, the request that is
        repeated goes on where it was, and does not become a second job.
        """
        mark = json.dumps({"job": secrets.token_hex(8), "digest": digest}).encode()
        if not self._backend.keys.put_if_absent(f"key:{key}", mark):
            mark = self._backend.keys.get(f"key:{key}") or b""
        if not mark:
            raise JobConflictError(f"idempotency key {key!r} is being used right now")
        return self._job_of(key, mark, digest)

    def _earlier(self, key: str, digest: str) -> Job | None:
        data = self._backend.keys.get(f"key:{key}")
        if data is None:
            return None
        try:
            return self.get(self._job_of(key, data, digest))
        except UnknownJobError:
            return None  # it is not recorded yet

    def _job_of(self, key: str, data: bytes, digest: str) -> str:
        mark = json.loads(data)
        if mark["digest"] != digest:
            raise JobConflictError(
                f"idempotency key {key!r} belongs to job {mark['job']}, which has another kind or "
                "other parameters; use a new key"
            )
        return str(mark["job"])

    def _claim(self, job: Job, owner: Owner, ending: threading.Event | None = None) -> Job | None:
        # Its own at every attempt: whoever reads it back knows that the mark is this one.
        mark = json.dumps({**asdict(owner), "claim": secrets.token_hex(8)}).encode()
        key = _claim_key(job)

        def put_mark() -> bool:
            return self._backend.keys.put_if_absent(key, mark) or (
                # A write whose answer was lost has happened all the same.
                self._backend.keys.get(key) == mark
            )

        if not insist(put_mark, job.id, ending):
            return None
        running = job.model_copy(
            update={
                "state": JobState.RUNNING,
                "message": "starting",
                "progress": 0.0,
                "started_at": now(),
            }
        )

        def record() -> None:
            self.heartbeat(job, owner)
            self.write(running)

        insist(record, job.id, ending)
        return running

    def _again(self, job: Job, message: str, *, bounded: bool = True) -> Job:
        if bounded:
            self._require_room()
        self._backend.keys.delete(_cancel_key(job))
        again = job.model_copy(
            update={
                "state": JobState.QUEUED,
                "attempt": job.attempt + 1,
                "progress": 0.0,
                "message": message,
                "started_at": None,
                "finished_at": None,
                "result": None,
                "error": None,
                "cancel_requested": False,
            }
        )
        self.write(again)
        self._backend.owners.delete(job.id)
        self._backend.keys.delete(_claim_key(job))
        self._enqueue(again)
        return again

    def _enqueue(self, job: Job) -> None:
        self._backend.queues[LANES[job.kind]].put(f"{job.id}:{job.attempt}")

    def _require_room(self) -> None:
        waiting = sum(job.state is JobState.QUEUED for job in self.find())
        if waiting >= self._max_queued:
            raise JobQueueFullError(
                f"{waiting} jobs wait; at most {self._max_queued} may; try again later"
            )

    def _forget_oldest(self) -> None:
        finished = [job for job in self.find() if job.state.finished]
        for job in finished[self._keep_finished :]:
            self._forget(job)

    def _forget(self, job: Job) -> None:
        # The key first, or it would belong to no job; the record last, or nobody would come back
        # for what is left should this process die meanwhile.
        if job.idempotency_key is not None:
            mark = self._backend.keys.get(f"key:{job.idempotency_key}")
            if mark is not None and json.loads(mark)["job"] == job.id:
                self._backend.keys.delete(f"key:{job.idempotency_key}")
        for key in (_cancel_key(job), _claim_key(job)):
            self._backend.keys.delete(key)
        self._backend.payloads.delete(job.id)
        self._backend.owners.delete(job.id)
        self._backend.records.delete(job.id)


def _cancel_key(job: Job) -> str:
    return f"cancel:{job.id}:{job.attempt}"


def _claim_key(job: Job) -> str:
    return f"claim:{job.id}:{job.attempt}"


def _is_alive(claim: bytes) -> bool:
    """Whether whoever made a claim is certain to be there, and will write the record yet."""
    mark = json.loads(claim)
    mark.pop("claim", None)
    try:
        owner = Owner(**mark)
    except TypeError:
        return False
    return owner.is_here and not owner.is_dead


def _require_key(key: str | None) -> None:
    if key is not None and not (0 < len(key) <= MAX_KEY_CHARS and key.isprintable()):
        raise InvalidJobError(
            f"idempotency key has {len(key)} characters; allowed are 1 to {MAX_KEY_CHARS} "
            "printable characters",
            "idempotency_key",
        )
