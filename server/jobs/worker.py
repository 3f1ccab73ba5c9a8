"""The worker: takes jobs from the queue, a thread for each lane, and looks after orphans."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from types import FrameType

import psutil
import structlog

from server.jobs.lanes import Lane
from server.jobs.ledger import JobLedger
from server.jobs.owner import Owner, process_is_gone, started_s
from server.jobs.places import open_ledger
from server.jobs.process import ReadyProcess
from server.jobs.supervise import Supervisor, clean_up, left_folders
from server.jobs.types import Job, UnknownJobError
from server.settings import Settings

_log = structlog.get_logger(__name__)

# Of SQLite's queues, which are in memory; those of others block until there is a job.
_POLL_S = 0.1
_KEEP_S = 0.25
_SWEEP_S = 5.0
# A worker on another host that gave no sign of life for so long is taken for dead.
_SILENCE_S = 30.0
_RETRY_S = 2.0
_END_S = 5.0


class Worker:
    """Runs jobs until it is told to end.

    Args:
        settings: of the service.
        ledger: of the jobs.
    """

    def __init__(self, settings: Settings, ledger: JobLedger) -> None:
        self._settings = settings
        self._ledger = ledger
        self._owner = Owner.this_process()
        self._ending = threading.Event()
        self._sweeper = Sweeper(settings, ledger)
        self._ready = ReadyProcess(settings) if settings.jobs.keep_process_ready else None

    def run(self) -> None:
        """Run jobs; returns once :meth:`end` was called and the jobs are put back."""
        threads = [
            threading.Thread(target=self._serve, args=(lane,), name=f"lane-{lane}") for lane in Lane
        ]
        for thread in threads:
            thread.start()
        if self._ready is not None:
            # Nobody waits for it: the first one takes seconds to begin.
            keeper = threading.Thread(target=self._keep, args=(self._ready,), name="keep")
            keeper.daemon = True
            keeper.start()
        while True:
            self._sweep()
            if self._ending.wait(_SWEEP_S):
                break
        for thread in threads:
            thread.join()
        if self._ready is not None:
            self._ready.close()

    def end(self) -> None:
        """Take no more jobs, stop what runs and put it back into the queue."""
        self._ending.set()

    def _serve(self, lane: Lane) -> None:
        begin = None if self._ready is None else self._ready.take
        supervisor = Supervisor(self._settings, self._ledger, self._owner, begin=begin)
        while not self._ending.is_set():
            try:
                job = self._ledger.claim(lane, self._owner, ending=self._ending)
                if job is None:
                    self._ending.wait(_POLL_S)
                    continue
                self._do(supervisor, job)
            except Exception:
                # A database that is away must not end the worker.
                _log.exception("worker failed; trying again", lane=str(lane))
                self._ending.wait(_RETRY_S)

    def _do(self, supervisor: Supervisor, job: Job) -> None:
        _log.info("job begins", job=job.id, kind=str(job.kind), attempt=job.attempt)
        started = time.monotonic()
        ended = supervisor.run(job, ending=self._ending)
        if self._ready is not None:
            self._ready.job_done()
        _log.info(
            "job ended",
            job=job.id,
            kind=str(job.kind),
            state=str(ended.state),
            seconds=round(time.monotonic() - started, 3),
            error=None if ended.error is None else ended.error.message,
        )

    def _keep(self, ready: ReadyProcess) -> None:
        while not self._ending.is_set():
            try:
                ready.keep()
            except Exception:
                _log.exception("no process can be kept ready")
                self._ending.wait(_RETRY_S)
            self._ending.wait(_KEEP_S)

    def _sweep(self) -> None:
        try:
            for job in self._sweeper.sweep():
                _log.warning("job interrupted", job=job.id, kind=str(job.kind))
        except Exception:
            _log.exception("sweep failed")


class Sweeper:
    """Finds jobs whose worker has died, marks them as interrupted and removes what they left.

    Args:
        settings: of the service.
        ledger: of the jobs.
    """

    def __init__(self, settings: Settings, ledger: JobLedger) -> None:
        self._settings = settings
        self._ledger = ledger
        # By job and attempt: the last sign of life of a worker on another host, and when it was
        # seen here.
        self._signs: dict[tuple[str, int], tuple[int, float]] = {}
        self._lost: set[str] = set()

    def sweep(self) -> list[Job]:
        """Look once; the jobs that were marked."""
        self._lost = self._ledger.requeue_lost(self._lost)
        running = self._ledger.running()
        self._remove_folders({job.id for job in running})
        orphans = [job for job in running if self._is_orphan(job)]
        known = {_attempt(job) for job in running}
        self._signs = {one: sign for one, sign in self._signs.items() if one in known}
        marked = []
        for job in orphans:
            owner = self._ledger.owner(job.id)
            # It may have ended since the list was made.
            if self._ledger.get(job.id).state.finished:
                continue
            child = owner.child if owner is not None and owner.is_here else None
            if child is not None and owner is not None:
                _end_orphan(child, owner)
            removed = clean_up(self._settings, job.id, child)
            if removed:
                _log.info("leftovers removed", job=job.id, removed=removed)
            marked.append(
                self._ledger.interrupt(
                    self._ledger.get(job.id), "the worker that ran the job died; restart the job"
                )
            )
        return marked

    def _remove_folders(self, running: Collection[str]) -> None:
        """Remove what jobs left whose worker died between the record of their end and this."""
        for job_id in left_folders(self._settings):
            if job_id in running:
                continue
            # Another database's jobs may have their folders there, too.
            with suppress(UnknownJobError):
                if self._ledger.get(job_id).state.finished:
                    clean_up(self._settings, job_id, None)

    def _is_orphan(self, job: Job) -> bool:
        owner = self._ledger.owner(job.id)
        if owner is None:
            return self._silent(job, -1)
        if owner.is_here:
            return owner.is_dead
        return self._silent(job, owner.beat)

    def _silent(self, job: Job, beat: int) -> bool:
        """Whether the same sign of life was the last one for too long."""
        moment = time.monotonic()
        last, since = self._signs.get(_attempt(job), (None, moment))
        if last != beat:
            self._signs[_attempt(job)] = (beat, moment)
            return False
        return moment - since > _SILENCE_S


def _attempt(job: Job) -> tuple[str, int]:
    return job.id, job.attempt


def _end_orphan(pid: int, owner: Owner) -> None:
    """Kill the process of a job that has not noticed that its worker died, and wait for its end."""
    try:
        process = psutil.Process(pid)
        # Another process may have the id by now. One that is ending has no command line any more.
        command = " ".join(process.cmdline())
        if started_s(pid) < owner.started or (command and "multiprocessing" not in command):
            return
        if command:
            process.kill()
        until = time.monotonic() + _END_S
        while not process_is_gone(process.pid) and time.monotonic() < until:
            time.sleep(0.05)
    except psutil.Error:
        return


def run_worker(settings: Settings) -> int:
    """Run a worker until SIGTERM or SIGINT; a second signal ends it at once.

    Returns:
        Exit code.

    Raises:
        SettingsError: no store is named.
        BackendError: the database cannot be used.
    """
    from server.logs import configure_logging

    configure_logging(settings.log_level)
    ledger = open_ledger(settings)
    worker = Worker(settings, ledger)

    def end(number: int, frame: FrameType | None) -> None:
        if worker._ending.is_set():
            os._exit(128 + number)
        worker.end()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    _log.info("worker ready", lanes=[str(lane) for lane in Lane])
    worker.run()
    ledger.close()
    _log.info("worker stopped")
    return 0
