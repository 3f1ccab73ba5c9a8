"""The process that does one job: within its limits, and gone when whoever watches it is."""

from __future__ import annotations

import errno
import faulthandler
import json
import math
import os
import resource
import signal
import sys
import threading
import traceback
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from server.jobs.types import JobCancelledError, JobErrorKind, JobFailure, JobKind

if TYPE_CHECKING:
    from server.settings import Settings

# The watcher looks at what the process really holds; this is for a single allocation that would
# overrun the machine before it looks again. Address space that is set aside and never touched
# counts here, hence the room.
_HARD_LIMIT_FACTOR = 1.25
_HARD_LIMIT_ROOM = 2 * 2**30


def run_job(
    connection: Connection,
    settings: Settings,
    kind: JobKind,
    params: bytes,
    errors: Path,
) -> None:
    """Do one job and tell how it went; the last thing that the process does.

    Args:
        connection: to the watcher; JSON messages with one of the fields ``progress`` (and
            ``message``), ``log``, ``done``, ``failed``, ``cancelled``.
        settings: of the service.
        kind: of the job.
        params: JSON.
        errors: file that takes what native code writes before it dies.
    """
    stop = threading.Event()
    _redirect_stderr(errors)
    _stop_on_signals(stop)
    sender = _Sender(connection)
    try:
        _limit_memory(settings)
        result = _run(settings, kind, params, sender, stop)
        sender.send({"done": _without_nan(result)})
    except JobCancelledError:
        sender.send({"cancelled": True})
    except BaseException as error:
        traceback.print_exc()
        kind_of_error, message = explain(error, settings)
        sender.send({"failed": {"type": kind_of_error, "message": message}})
    finally:
        connection.close()
        sys.stderr.flush()
        # Nothing is left to be done that tearing everything down would add to.
        os._exit(0)


def explain(error: BaseException, settings: Settings) -> tuple[JobErrorKind, str]:
    """The kind of an exception that ended a job, and what to tell of it."""
    from rectokens.artifacts.errors import ArtifactError

    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, JobFailure):
        return error.kind, error.message
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return JobErrorKind.MEMORY_LIMIT, memory_message(settings.jobs.memory_limit_gib)
    if type(error).__name__ == "OutOfMemoryError":
        share = settings.jobs.gpu_share
        return (
            JobErrorKind.MEMORY_LIMIT,
            f"the job needs more than its share of the GPU's memory (jobs.gpu_share is {share:g})",
        )
    if is_disk_full(error):
        return JobErrorKind.DISK_FULL, f"the disk is full: {text}; nothing was left behind"
    if isinstance(error, ArtifactError):
        return JobErrorKind.ARTIFACT, text
    return JobErrorKind.INTERNAL, f"unexpected {type(error).__name__}: {text}"


def memory_message(limit_gib: float) -> str:
    """What is told of a job that wanted too much memory."""
    return (
        f"the job needs more memory than it may take (jobs.memory_limit_gib is {limit_gib:g}); "
        "raise the limit, or make the source smaller"
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says that there is no room on a disk."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if "No space left on device" in str(seen) or "File too large" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _run(
    settings: Settings, kind: JobKind, params: bytes, sender: _Sender, stop: threading.Event
) -> dict[str, Any]:
    import torch

    from server.jobs.context import JobReporter, environment_of
    from server.jobs.kinds import FUNCTIONS
    from server.jobs.params import checked_params

    torch.set_num_threads(settings.jobs.threads)
    if settings.jobs.gpu_share:
        if not torch.cuda.is_available():
            raise JobFailure(
                JobErrorKind.INVALID_PARAMETERS,
                f"jobs.gpu_share is {settings.jobs.gpu_share:g}, but torch finds no GPU here; set "
                "it to 0",
            )
        torch.cuda.set_per_process_memory_fraction(settings.jobs.gpu_share)
    reporter = JobReporter(sender.progress, sender.log, stop.is_set)
    reporter.check()
    environment = environment_of(settings)
    return FUNCTIONS[kind](checked_params(kind, json.loads(params)), environment, reporter)


class _Sender:
    """Writes messages to the watcher."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send(self, message: dict[str, Any]) -> None:
        self._connection.send_bytes(json.dumps(message).encode())

    def progress(self, share: float, message: str) -> None:
        self.send({"progress": share, "message": message})

    def log(self, line: str) -> None:
        self.send({"log": line})


def _redirect_stderr(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.enable()


def follow_parent() -> None:
    """End when the parent does, even if that is killed."""
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _stop_on_signals(stop: threading.Event) -> None:
    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, ask)
    # The watcher decides what becomes of the job when somebody presses Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _limit_memory(settings: Settings) -> None:
    if settings.jobs.gpu_share:
        return  # drivers set aside far more than they use
    limit = settings.jobs.memory_limit_gib * 2**30 * _HARD_LIMIT_FACTOR + _HARD_LIMIT_ROOM
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = int(limit) if hard == resource.RLIM_INFINITY else min(int(limit), hard)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinities."""
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
