"""Changes of a job's record that must not be lost because its database is away for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from server.jobs.types import (
    InvalidJobError,
    JobConflictError,
    JobQueueFullError,
    UnknownJobError,
)

_log = structlog.get_logger(__name__)

_T = TypeVar("_T")

PAUSE_S = 1.0
_TRIES = 60
# What the ledger itself says; trying again would change nothing.
_ANSWERS = (InvalidJobError, JobConflictError, JobQueueFullError, UnknownJobError)


def insist(step: Callable[[], _T], job_id: str, ending: threading.Event | None = None) -> _T:
    """Take a step of a job's record again until it succeeds.

    Args:
        step: reads or writes the ledger; safe to repeat.
        job_id: for the log.
        ending: until it is set there is no limit, since without its database a worker could do
            nothing else; after that, and without it, a minute.

    Raises:
        Exception: of the step: an answer of the ledger at once, another one after the last try.
    """
    left = _TRIES
    while True:
        try:
            return step()
        except _ANSWERS:
            raise
        except Exception:
            if ending is None or ending.is_set():
                left -= 1
                if left == 0:
                    raise
            _log.warning("job ledger cannot be used; trying again", job=job_id, exc_info=True)
            time.sleep(PAUSE_S)
