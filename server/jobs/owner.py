"""Who runs a job, and whether that process is still there."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

# Of /proc/PID/stat, counted from 1: clock ticks from the machine's start to the process's.
_START_FIELD = 22
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# The clock has 100 ticks a second at least.
_SAME_S = 0.02


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that watches over a job.

    Attributes:
        host: of the process; processes of equal hosts see each other's ids.
        pid: its id.
        started: when it began, see :func:`started_s`, which tells it from a later process of the
            same id.
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
        return cls(_host(), os.getpid(), started_s(os.getpid()))

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
            same = abs(started_s(self.pid) - self.started) < _SAME_S
            return not same or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


def started_s(pid: int) -> float:
    """When a process began, in seconds since the machine started where that is known.

    By that clock, and not as psutil works it out of the time of day, because a process must stay
    the same one when somebody sets the clock.

    Raises:
        psutil.NoSuchProcess: there is none.
        psutil.AccessDenied: it may not be asked.
    """
    try:
        # The name, in brackets, may hold anything; what begins after it is field 3.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return int(fields[_START_FIELD - 3]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return float(psutil.Process(pid).create_time())


def process_is_gone(pid: int) -> bool:
    """Whether the process of an id has ended, even if nobody has waited for it yet."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


def _host() -> str:
    """Name of the host since its start and, where there are such, of the space of process ids.

    Times are counted from the start of the machine, so those of an earlier one say nothing.
    """
    try:
        space = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        space = 0
    try:
        boot = _BOOT_ID.read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()}/{space}/{boot}"
