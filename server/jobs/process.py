"""The process of a job: begun when it is wanted, or before, so that the job need not wait for it.

A fresh process spends three seconds of a core on imports. A worker therefore has one that is past
most of them, :mod:`~server.jobs.preload`, of which processes of jobs are copies, and keeps a copy
that is past the rest of them: a change of a few items is served that much sooner.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import (
    ForkServerContext,
    ForkServerProcess,
    SpawnContext,
    SpawnProcess,
)
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import structlog

from server.jobs.child import follow_parent, run_job
from server.jobs.owner import process_is_gone
from server.jobs.types import JobKind

if TYPE_CHECKING:
    from server.settings import Settings

_log = structlog.get_logger(__name__)

_PRELOAD = ["server.jobs.preload"]
# A process that is no copy is replaced once the job of the one before is done, or after so long:
# its imports would want the cores that the job wants.
_REPLACE_S = 10.0
# After one that died by itself.
_RETRY_S = 30.0
_END_S = 5.0


@dataclass(frozen=True, eq=False)
class JobProcess:
    """A process that does the one job it is told of.

    Attributes:
        process: of the operating system.
        connection: orders to it, messages from it; see :func:`~server.jobs.child.run_job`.
    """

    process: SpawnProcess | ForkServerProcess
    connection: Connection
    _system: psutil.Process | None

    @classmethod
    def begin(cls, settings: Settings, *, copied: bool = False) -> JobProcess:
        """Start one.

        Args:
            settings: of the service.
            copied: from a process that has loaded :mod:`~server.jobs.preload`, which the first
                call starts and waits for. A fresh one all the same for jobs with a share of the
                GPU, as what its driver holds cannot be copied, and on systems other than Linux,
                whose own libraries do not bear it.
        """
        if copied and _can_be_copied(settings):
            try:
                return cls._begin(settings, copied=True)
            except (EOFError, OSError) as error:
                _log.warning("a job's process cannot be copied", reason=repr(error))
        return cls._begin(settings, copied=False)

    @classmethod
    def _begin(cls, settings: Settings, *, copied: bool) -> JobProcess:
        threads = settings.jobs.threads
        limits = {"OMP_NUM_THREADS": threads, "POLARS_MAX_THREADS": threads}
        context: SpawnContext | ForkServerContext = get_context("spawn")
        if copied:
            # Its threads would not be copied with it.
            limits["OPENBLAS_NUM_THREADS"] = 1
            context = get_context("forkserver")
            context.set_forkserver_preload(_PRELOAD)
        ours, theirs = context.Pipe()
        process = context.Process(target=_wait_for_job, args=(theirs, settings), name="job")
        try:
            with _environment(limits):
                process.start()
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        try:
            system = psutil.Process(process.pid)
        except psutil.Error:
            system = None  # it has ended already
        return cls(process, ours, system)

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended, as far as is known."""
        return self.process.is_alive()

    def order(self, kind: JobKind, params: bytes, errors: Path) -> None:
        """Tell it which job to do; see :func:`~server.jobs.child.run_job`.

        Raises:
            OSError: it is gone.
        """
        header = {"kind": kind, "errors": str(errors)}
        self.connection.send_bytes(json.dumps(header).encode())
        self.connection.send_bytes(params)

    def terminate(self) -> None:
        """Ask it to stop."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it."""
        self._send(signal.SIGKILL)

    def end(self) -> None:
        """Kill it, unless it has ended."""
        pid = self.process.pid
        assert pid is not None
        if not process_is_gone(pid):
            self.kill()
        self.process.join()
        until = time.monotonic() + _END_S
        while self._system is not None and not process_is_gone(pid) and time.monotonic() < until:
            time.sleep(0.01)
        self.connection.close()

    def _send(self, number: signal.Signals) -> None:
        """Send a signal.

        Not by ``multiprocessing``, for which a process has ended as soon as the one has that it
        was copied from; and never to a later process of the same id.
        """
        with suppress(psutil.Error):
            if self._system is not None:
                self._system.send_signal(number)


class ReadyProcess:
    """One process that waits for a job; safe to use from several threads.

    Args:
        settings: of the service.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._state = threading.Condition()
        self._waiting: JobProcess | None = None
        self._beginning = False
        self._closed = False
        self._not_before = 0.0

    def take(self) -> JobProcess:
        """The one that waits, or a fresh one."""
        with self._state:
            self._state.wait_for(lambda: not self._beginning)
            taken, self._waiting = self._waiting, None
            pause_s = 0.0 if _can_be_copied(self._settings) else _REPLACE_S
            self._not_before = time.monotonic() + pause_s
        if taken is not None and taken.is_alive:
            return taken
        if taken is not None:
            taken.end()
        return JobProcess.begin(self._settings, copied=True)

    def job_done(self) -> None:
        """The next one may be begun."""
        self._not_before = 0.0

    def keep(self) -> None:
        """See that there is one, if it is time; to be called again and again.

        Takes as long as it takes to begin one, seconds at first.
        """
        with self._state:
            if self._waiting is not None and not self._waiting.is_alive:
                self._waiting.end()
                self._waiting = None
                self._not_before = time.monotonic() + _RETRY_S
            due = self._waiting is None and time.monotonic() >= self._not_before
            if self._closed or self._beginning or not due:
                return
            self._beginning = True
        begun = None
        try:
            begun = JobProcess.begin(self._settings, copied=True)
        finally:
            self._began(begun)

    def _began(self, begun: JobProcess | None) -> None:
        with self._state:
            self._beginning = False
            closed = self._closed
            self._waiting = None if closed else begun
            self._state.notify_all()
        if closed and begun is not None:
            begun.end()

    def close(self) -> None:
        """End the one that waits; there will be no other."""
        with self._state:
            self._closed = True
            waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.end()


def _can_be_copied(settings: Settings) -> bool:
    return sys.platform == "linux" and not settings.jobs.gpu_share


def _wait_for_job(connection: Connection, settings: Settings) -> None:
    """Entry point of the process."""
    follow_parent()
    # Ctrl-C reaches the whole group; the watcher decides what becomes of this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not connection.poll():
        _import_everything(settings.jobs.threads)
    try:
        header = json.loads(connection.recv_bytes())
        params = connection.recv_bytes()
    except (EOFError, OSError):
        return
    run_job(connection, settings, JobKind(header["kind"]), params, Path(header["errors"]))


def _import_everything(threads: int) -> None:
    """Load what jobs need and takes long."""
    # What cannot be imported fails again when the job needs it, and is reported there.
    with suppress(Exception):
        import torch

        import server.jobs.context
        import server.jobs.kinds
        import server.jobs.preload
        import server.jobs.rehearse  # noqa: F401

        torch.set_num_threads(threads)


@contextmanager
def _environment(values: dict[str, int]) -> Iterator[None]:
    """Set variables for a process that is started within; its libraries read them once."""
    with _ENVIRONMENT:
        before = {name: os.environ.get(name) for name in values}
        os.environ.update({name: str(value) for name, value in values.items()})
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


_ENVIRONMENT = threading.Lock()
