"""Watch over one job: start its process, keep its record, hold it to its limits, clean up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import structlog

from server.jobs.child import memory_message
from server.jobs.insist import insist
from server.jobs.ledger import JobLedger
from server.jobs.owner import Owner, process_is_gone
from server.jobs.places import jobs_folder, open_store
from server.jobs.process import JobProcess
from server.jobs.types import (
    MAX_LOG_LINE_CHARS,
    MAX_LOG_LINES,
    Job,
    JobErrorKind,
    JobFault,
    JobState,
    now,
)
from server.settings import Settings

_log = structlog.get_logger(__name__)

_TICK_S = 0.1
_WRITE_S = 0.5
_HEARTBEAT_S = 1.0
_ERRORS_TAIL_BYTES = 8192
WORK_FOLDER = "work"

OnUpdate = Callable[[Job], None]


class Supervisor:
    """Runs claimed jobs, one after the other; see :meth:`run`.

    Args:
        settings: of the service.
        ledger: of the jobs.
        owner: this process, as the ledger knows it.
        begin: gives the process of a job; by default a fresh one.
    """

    def __init__(
        self,
        settings: Settings,
        ledger: JobLedger,
        owner: Owner,
        *,
        begin: Callable[[], JobProcess] | None = None,
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._owner = owner
        self._begin = begin or (lambda: JobProcess.begin(settings))

    def run(
        self,
        job: Job,
        *,
        ending: threading.Event | None = None,
        on_update: OnUpdate = lambda job: None,
    ) -> Job:
        """Do a job that this process has claimed, in a process of its own.

        Args:
            job: running, as ``claim`` or ``begin`` gave it.
            ending: once set, the job is stopped and put back into the queue.
            on_update: told of every change.

        Returns:
            The job as it ended.
        """
        run = _Run(
            self._settings,
            self._ledger,
            self._owner,
            self._begin,
            job,
            work_folder(self._settings, job.id),
            on_update,
            ending,
        )
        try:
            ended = run.to_the_end()
        finally:
            clean_up(self._settings, job.id, run.child_pid)
        on_update(ended)
        return ended


def work_folder(settings: Settings, job_id: str) -> Path:
    """Folder for what a job writes while it runs."""
    return jobs_folder(settings) / WORK_FOLDER / job_id


def left_folders(settings: Settings) -> list[str]:
    """Jobs that have such a folder, by id."""
    try:
        return os.listdir(jobs_folder(settings) / WORK_FOLDER)
    except OSError:
        return []


def clean_up(settings: Settings, job_id: str, child_pid: int | None) -> list[str]:
    """Remove what a job left whose process is gone.

    Args:
        settings: of the service.
        job_id: of the job.
        child_pid: of the process on this host that did it, None for none.

    Returns:
        What was removed.
    """
    removed = []
    folder = work_folder(settings, job_id)
    if folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
        removed.append(str(folder))
    if child_pid is not None and process_is_gone(child_pid):
        try:
            removed += open_store(settings).clean_after(child_pid)
        except Exception:
            # The job has ended all the same; what is left goes with what else is old, in a day.
            _log.warning("leftovers cannot be removed", job=job_id, exc_info=True)
    return removed


class _Run:
    """One attempt of one job."""

    def __init__(
        self,
        settings: Settings,
        ledger: JobLedger,
        owner: Owner,
        begin: Callable[[], JobProcess],
        job: Job,
        folder: Path,
        on_update: OnUpdate,
        ending: threading.Event | None,
    ) -> None:
        self._ending = ending
        self._settings = settings
        self._begin = begin
        self._ledger = ledger
        self._owner = owner
        self._job = job
        self._on_update = on_update
        self._folder = folder
        self._errors = folder / "errors"
        self._lines: deque[str] = deque(job.log, MAX_LOG_LINES)
        self._outcome: dict[str, Any] | None = None
        self._killed_for: JobFault | None = None
        self._stop_sent_at: float | None = None
        self._written_at = self._beat_at = self._asked_at = 0.0
        self._changed = False
        self.child_pid: int | None = None

    def to_the_end(self) -> Job:
        try:
            begun = self._start()
        except Exception as error:
            # Whatever it was: this process lives, so nobody else would find the job orphaned.
            _log.exception("job cannot be started", job=self._job.id)
            return self._interrupted(
                f"the job's process cannot be started ({error}); restart the job"
            )
        exit_code, putting_back = None, False
        try:
            exit_code, putting_back = self._watch(begun)
        except Exception as error:
            if self._outcome is None:
                _log.exception("job cannot be watched over", job=self._job.id)
                return self._interrupted(
                    f"the job cannot be watched over ({type(error).__name__}: {error}); restart it"
                )
            _log.warning("job's process cannot be ended", job=self._job.id, exc_info=True)
        return self._conclude(exit_code, putting_back)

    def _watch(self, begun: JobProcess) -> tuple[int | None, bool]:
        """Until the process has ended; its exit code, and whether the job is to wait again."""
        process = begun.process
        self.child_pid = process.pid
        self._owner = self._owner.next(process.pid)
        started = time.monotonic()
        putting_back = False
        try:
            while True:
                if not self._receive(begun.connection):
                    process.join(_TICK_S)  # it has closed its end, so it is about to be gone
                    if not begun.is_alive:
                        break
                if self._outcome is not None:
                    break
                moment = time.monotonic()
                self._beat(moment)
                if self._is_ending() and self._stop_sent_at is None:
                    putting_back = True
                    self._stop(begun, moment)
                if self._stop_sent_at is None and self._asked_to_stop(moment):
                    self._say("asked to stop")
                    self._stop(begun, moment)
                self._enforce(begun, moment - started, moment)
                self._write(moment)
            process.join(self._settings.jobs.cancel_grace_s + 1.0)
        finally:
            begun.end()
        return process.exitcode, putting_back

    def _is_ending(self) -> bool:
        return self._ending is not None and self._ending.is_set()

    def _start(self) -> JobProcess:
        self._folder.mkdir(parents=True, exist_ok=True)
        params = insist(lambda: self._ledger.params(self._job.id), self._job.id, self._ending)
        begun = self._begin()
        with suppress(OSError):  # it has died already; whoever listens to it finds that out
            begun.order(self._job.kind, params, self._errors)
        return begun

    def _receive(self, connection: Connection) -> bool:
        """Take in messages for the length of a tick; whether there may be more."""
        until = time.monotonic() + _TICK_S
        try:
            while connection.poll(max(until - time.monotonic(), 0.0)):
                self._take(json.loads(connection.recv_bytes()))
                if self._outcome is not None:
                    break
        except (EOFError, OSError):
            return False
        return True

    def _take(self, message: dict[str, Any]) -> None:
        if "progress" in message:
            self._change(progress=min(message["progress"], 1.0), message=message["message"])
        elif "log" in message:
            self._say(message["log"])
        else:
            self._outcome = message

    def _asked_to_stop(self, moment: float) -> bool:
        if moment - self._asked_at < _WRITE_S:
            return False
        self._asked_at = moment
        try:
            asked = self._ledger.cancel_requested(self._job)
        except Exception:
            _log.warning("job ledger cannot be read", job=self._job.id, exc_info=True)
            return False
        if asked:
            self._change(cancel_requested=True)
        return asked

    def _stop(self, begun: JobProcess, moment: float) -> None:
        self._stop_sent_at = moment
        begun.terminate()

    def _enforce(self, begun: JobProcess, ran_s: float, moment: float) -> None:
        """Kill the process where it has gone over a limit."""
        jobs = self._settings.jobs
        if self._killed_for is not None:
            return
        if self._stop_sent_at is not None and moment - self._stop_sent_at > jobs.cancel_grace_s:
            self._say(f"did not stop within {jobs.cancel_grace_s:g} s; killed")
            self._stop_sent_at = moment
            begun.kill()
        elif ran_s > jobs.time_limit_s:
            message = (
                f"the job took longer than it may (jobs.time_limit_s is {jobs.time_limit_s:g})"
            )
            self._kill_for(begun, JobErrorKind.TIME_LIMIT, message)
        elif _private_bytes(self.child_pid) > jobs.memory_limit_gib * 2**30:
            self._kill_for(begun, JobErrorKind.MEMORY_LIMIT, memory_message(jobs.memory_limit_gib))

    def _kill_for(self, begun: JobProcess, kind: JobErrorKind, message: str) -> None:
        self._killed_for = JobFault(type=kind, message=message)
        self._say(f"killed: {message}")
        begun.kill()

    def _conclude(self, exit_code: int | None, putting_back: bool) -> Job:
        outcome = self._outcome or {}
        self._job = self._job.model_copy(update={"log": tuple(self._lines)})
        if "done" in outcome:
            return self._finish(JobState.SUCCEEDED, "done", result=outcome["done"])
        if self._killed_for is not None:
            return self._fail(self._killed_for)
        if "failed" in outcome:
            return self._fail(JobFault.model_validate(outcome["failed"]))
        # Asked for too late to be seen before its worker was told to end, it counts all the same.
        if putting_back and not self._cancelled_meanwhile():
            return self._insist(lambda: self._ledger.put_back(self._job))
        if "cancelled" in outcome or self._stop_sent_at is not None:
            return self._finish(JobState.CANCELLED, "cancelled")
        return self._died(exit_code)

    def _cancelled_meanwhile(self) -> bool:
        return insist(lambda: self._ledger.cancel_requested(self._job), self._job.id, self._ending)

    def _died(self, exit_code: int | None) -> Job:
        """The process is gone and has not said why."""
        tail = _tail(self._errors)
        for line in tail[-10:]:
            self._say(line)
        self._job = self._job.model_copy(update={"log": tuple(self._lines)})
        text = "\n".join(tail)
        if "memory allocation of" in text or "bad_alloc" in text or "MemoryError" in text:
            message = memory_message(self._settings.jobs.memory_limit_gib)
            return self._fail(JobFault(type=JobErrorKind.MEMORY_LIMIT, message=message))
        how = f"exit code {exit_code}"
        if exit_code is not None and exit_code < 0:
            how = f"signal {signal.Signals(-exit_code).name}"
            if -exit_code == signal.SIGKILL:
                how += ", which the system sends when memory runs out"
        return self._interrupted(f"the job's process died ({how}); restart the job")

    def _interrupted(self, message: str) -> Job:
        return self._insist(lambda: self._ledger.interrupt(self._job, message))

    def _fail(self, fault: JobFault) -> Job:
        return self._finish(JobState.FAILED, fault.message, error=fault)

    def _finish(
        self,
        state: JobState,
        message: str,
        *,
        result: dict[str, Any] | None = None,
        error: JobFault | None = None,
    ) -> Job:
        def finish() -> Job:
            return self._ledger.finish(
                self._job, state, message=message, result=result, error=error
            )

        return self._insist(finish)

    def _insist(self, write: Callable[[], Job]) -> Job:
        return insist(write, self._job.id, self._ending)

    def _say(self, line: str) -> None:
        stamp = now().strftime("%H:%M:%S")
        self._lines.append(f"{stamp} {line}"[:MAX_LOG_LINE_CHARS])
        self._change(log=tuple(self._lines))

    def _change(self, **fields: Any) -> None:
        self._job = self._job.model_copy(update=fields)
        self._changed = True
        self._on_update(self._job)

    def _beat(self, moment: float) -> None:
        if moment - self._beat_at >= _HEARTBEAT_S:
            self._beat_at = moment
            self._owner = self._owner.next(self.child_pid)
            self._to_ledger(lambda: self._ledger.heartbeat(self._job, self._owner))

    def _write(self, moment: float) -> None:
        if self._changed and moment - self._written_at >= _WRITE_S:
            self._written_at = moment
            self._changed = not self._to_ledger(lambda: self._ledger.write(self._job))

    def _to_ledger(self, write: Callable[[], None]) -> bool:
        """Write; a database that is full or away for a while does not end the job."""
        try:
            write()
        except Exception:
            _log.warning("job ledger cannot be written", job=self._job.id, exc_info=True)
            return False
        return True


def _private_bytes(pid: int | None) -> int:
    """Memory that is a process's own; pages of mapped files come and go as the system likes."""
    try:
        memory = psutil.Process(pid).memory_info()
    except psutil.Error:
        return 0
    return int(memory.rss) - int(getattr(memory, "shared", 0))


def _tail(path: Path) -> list[str]:
    try:
        with open(path, "rb") as file:
            file.seek(max(path.stat().st_size - _ERRORS_TAIL_BYTES, 0))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
