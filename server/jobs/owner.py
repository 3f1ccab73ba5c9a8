"""Who runs a job, and whether that process is still there."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, replace
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that watches over a job.

    Attributes:
        host: of the process; processes of equal hosts see each other's ids.
        pid: its id.
        started: when it began, in seconds, which tells it from a later process of the same id.
        child: id of the process that does the work, None before there is one.
        beat: counts up while the owner is alive.
    """

    host: str
    pid: int
    started: float
    child: int | None = None
    beat: int = 0

    @classmethod
    def this_process(cls) -> Owner:
        """The calling process."""
        return cls(_host(), os.getpid(), psutil.Process().create_time())

    def next(self, child: int | None) -> Owner:
        """A later sign of life."""
        return replace(self, child=child, beat=self.beat + 1)

    @property
    def is_here(self) -> bool:
        """Whether the owner's process would be seen from here."""
        return self.host == _host()

    @property
    def is_dead(self) -> bool:
        """Whether it is certain that the process is gone; of other hosts nothing is certain."""
        if not self.is_here:
            return False
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 1.0
            return not same or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


def process_is_gone(pid: int) -> bool:
    """Whether the process of an id has ended, even if nobody has waited for it yet."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


def _host() -> str:
    """Name of the host and, where there are such, of the space of process ids (containers)."""
    try:
        space = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        space = 0
    return f"{socket.gethostname()}/{space}"
