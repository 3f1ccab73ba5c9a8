"""A worker as a process of the service: started with it, restarted when it dies, gone with it."""

from __future__ import annotations

import os
import signal
import threading
import time
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess

import structlog

from server.settings import Settings

_log = structlog.get_logger(__name__)

_RESTART_S = 2.0
_STOP_ROOM_S = 5.0


class WorkerProcess:
    """A worker beside the service; its threads and memory are not the service's.

    Args:
        settings: of the service.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: SpawnProcess | None = None
        self._ending = threading.Event()
        self._keeper: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """Id of the worker's process, None if it does not run."""
        process = self._process
        return process.pid if process is not None and process.is_alive() else None

    def start(self) -> None:
        """Start the worker and a thread that starts it again should it die."""
        self._spawn()
        self._keeper = threading.Thread(target=self._keep, name="worker", daemon=True)
        self._keeper.start()

    def stop(self) -> None:
        """End the worker; what it runs is put back into its queue. Blocking."""
        self._ending.set()
        if self._keeper is not None:
            self._keeper.join()
        process = self._process
        if process is None:
            return
        process.terminate()
        process.join(self._settings.jobs.cancel_grace_s + _STOP_ROOM_S)
        if process.is_alive():
            process.kill()
            process.join()

    def _spawn(self) -> None:
        process = get_context("spawn").Process(target=_work, args=(self._settings,), name="worker")
        process.start()
        self._process = process

    def _keep(self) -> None:
        while not self._ending.wait(0.5):
            process = self._process
            if process is not None and not process.is_alive():
                _log.error("worker died; starting another", exit_code=process.exitcode)
                if self._ending.wait(_RESTART_S):
                    break
                try:
                    self._spawn()
                except Exception:
                    # Without memory for it just now, for example: the next look tries again.
                    _log.exception("worker cannot be started again")


def _work(settings: Settings) -> None:
    """Entry point of the process."""
    from server.jobs.worker import run_worker

    parent = parent_process()
    if parent is not None:

        def follow() -> None:
            wait([parent.sentinel])
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=follow, name="parent", daemon=True).start()
    while True:
        try:
            raise SystemExit(run_worker(settings))
        except (OSError, RuntimeError):
            _log.exception("worker cannot start; trying again")
            time.sleep(_RESTART_S)
