"""The process of a job: begun when it is wanted, or before, so that the job need not wait for it.

A fresh process spends two seconds of a core on imports. A worker therefore keeps one that is past
them, and a change of a few items is served that much sooner.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import TYPE_CHECKING

from server.jobs.child import follow_parent, run_job
from server.jobs.types import JobKind

if TYPE_CHECKING:
    from server.settings import Settings

# A process that was taken is replaced once its job is done, or after so long: not while both
# would want the same cores.
_REPLACE_S = 10.0
# After one that died by itself.
_RETRY_S = 30.0


@dataclass(frozen=True, eq=False)
class JobProcess:
    """A process that does the one job it is told of.

    Attributes:
        process: of the operating system.
        connection: orders to it, messages from it; see :func:`~server.jobs.child.run_job`.
    """

    process: SpawnProcess
    connection: Connection

    @classmethod
    def begin(cls, settings: Settings) -> JobProcess:
        """Start one."""
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_wait_for_job, args=(theirs, settings), name="job")
        with _threads(settings.jobs.threads):
            process.start()
        theirs.close()
        return cls(process, ours)

    def order(self, kind: JobKind, params: bytes, errors: Path) -> None:
        """Tell it which job to do; see :func:`~server.jobs.child.run_job`.

        Raises:
            OSError: it is gone.
        """
        header = {"kind": kind, "errors": str(errors)}
        self.connection.send_bytes(json.dumps(header).encode())
        self.connection.send_bytes(params)

    def end(self) -> None:
        """Kill it, unless it has ended."""
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


class ReadyProcess:
    """One process that waits for a job; safe to use from several threads.

    Args:
        settings: of the service.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._waiting: JobProcess | None = None
        self._not_before = 0.0

    def take(self) -> JobProcess:
        """The one that waits, or a fresh one."""
        with self._lock:
            taken, self._waiting = self._waiting, None
            self._not_before = time.monotonic() + _REPLACE_S
        if taken is not None and taken.process.is_alive():
            return taken
        if taken is not None:
            taken.end()
        return JobProcess.begin(self._settings)

    def job_done(self) -> None:
        """The next one may be begun."""
        self._not_before = 0.0

    def keep(self) -> None:
        """See that there is one, if it is time; to be called again and again."""
        with self._lock:
            waiting = self._waiting
            if waiting is not None and not waiting.process.is_alive():
                waiting.end()
                self._waiting = None
                self._not_before = time.monotonic() + _RETRY_S
            if self._waiting is None and time.monotonic() >= self._not_before:
                self._waiting = JobProcess.begin(self._settings)

    def close(self) -> None:
        """End the one that waits."""
        with self._lock:
            if self._waiting is not None:
                self._waiting.end()
                self._waiting = None


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
        import server.jobs.params
        import server.jobs.places
        import server.jobs.rehearse  # noqa: F401
        from rectokens.tokenizers.rq_kmeans import RQKMeansTokenizer

        # The first use of a tokenizer makes torch load as much again.
        torch.set_num_threads(threads)
        rows = torch.eye(2)
        RQKMeansTokenizer(num_levels=1, codebook_size=2, dim=2, seed=0).fit_step(rows).encode(rows)


class _threads:  # noqa: N801 (a context manager, used as a function)
    """Limit the threads of a process that is started within; its libraries read this once."""

    _NAMES = ("OMP_NUM_THREADS", "POLARS_MAX_THREADS")
    _LOCK = threading.Lock()

    def __init__(self, number: int) -> None:
        self._number = number
        self._before: dict[str, str | None] = {}

    def __enter__(self) -> None:
        self._LOCK.acquire()
        for name in self._NAMES:
            self._before[name] = os.environ.get(name)
            os.environ[name] = str(self._number)

    def __exit__(self, *_: object) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._LOCK.release()
