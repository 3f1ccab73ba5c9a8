"""Jobs as commands: the same functions, in a process of their own, watched from the terminal."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

from rectokens.cli.progress import progress_bar, say
from server.jobs.insist import insist
from server.jobs.ledger import JobLedger
from server.jobs.owner import Owner
from server.jobs.params import COMMAND_ROOT, checked_params
from server.jobs.places import open_ledger, require_store
from server.jobs.supervise import Supervisor
from server.jobs.types import Job, JobConflictError, JobKind, JobState
from server.jobs.worker import Sweeper
from server.settings import Settings

FAILED = 1
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_command(
    settings: Settings,
    kind: JobKind,
    params: Mapping[str, Any],
    *,
    printed: str,
    as_json: bool = False,
) -> int:
    """Do a job now, past the queue, with a progress bar; a signal cancels it.

    Args:
        settings: of the service.
        kind: of the job.
        params: of the job, None for what was not given.
        printed: field of the result that goes to stdout.
        as_json: the whole job goes to stdout instead.

    Returns:
        Exit code: 0, 1 if the job failed, 128 and the signal's number if one ended it.

    Raises:
        InvalidJobError: parameters that are not allowed.
        BackendError: the database cannot be used.
        SettingsError: no store is named, or one that is not there.
    """
    checked = checked_params(kind, {n: v for n, v in params.items() if v is not None})
    if kind is not JobKind.TRAIN_TOKENIZER:
        require_store(settings)
    ledger = open_ledger(settings)
    owner = Owner.this_process()
    got: list[int] = []
    try:
        Sweeper(settings, ledger).sweep()
        job, _ = ledger.begin(kind, checked, owner)

        def cancel(number: int, frame: FrameType | None) -> None:
            if got:
                os._exit(128 + number)
            got.append(number)
            # Not by this thread: it may be writing the record, and hold the lock that takes.
            Thread(target=_cancel, args=(ledger, job.id), name="cancel", daemon=True).start()

        for one in _SIGNALS:
            signal.signal(one, cancel)
        with progress_bar(kind.replace("_", " "), 1.0) as show:
            ended = Supervisor(settings, ledger, owner).run(
                job, on_update=lambda one: show(one.progress, one.message)
            )
    finally:
        ledger.close()
    if as_json:
        print_job(ended)
    if ended.state is not JobState.SUCCEEDED:
        print(f"error: {ended.message}", file=sys.stderr)
        return 128 + got[0] if got else FAILED
    result = ended.result or {}
    for line in _summary(result):
        say(line)
    if not as_json:
        print(result[printed])
    return 0


def located(settings: Settings, *files: Path) -> tuple[Settings, str, list[str]]:
    """Files named on the command line, as sources of jobs.

    Args:
        settings: of the service.
        files: they share a root: a registered one if all lie in it, else their common folder.

    Returns:
        Settings in which the root is registered, its name, and the paths below it.
    """
    absolute = [Path(os.path.abspath(file)) for file in files]
    for name, folder in settings.admin.source_folders.items():
        root = Path(os.path.abspath(folder))
        if all(file.is_relative_to(root) and file != root for file in absolute):
            return settings, name, [file.relative_to(root).as_posix() for file in absolute]
    # Whoever names a link here means what it leads to.
    real = [Path(os.path.realpath(file)) for file in files]
    for paths in (files, absolute, real):  # as they were given, so that messages name them so
        try:
            root = Path(os.path.commonpath([path.parent for path in paths]))
        except ValueError:  # some begin at the root of the disk, some do not
            continue
        below = [path.relative_to(root) for path in paths]
        if [Path(os.path.realpath(root), path) for path in below] == real:
            break
    sources = (*settings.admin.sources, f"{COMMAND_ROOT}={root}")
    admin = settings.admin.model_copy(update={"sources": sources})
    extended = settings.model_copy(update={"admin": admin})
    return extended, COMMAND_ROOT, [path.as_posix() for path in below]


def list_jobs(settings: Settings, *, limit: int, as_json: bool) -> int:
    """Print the latest jobs.

    Returns:
        Exit code 0.

    Raises:
        SettingsError: no store is named, or one that is not there.
    """
    require_store(settings)
    ledger = open_ledger(settings)
    try:
        Sweeper(settings, ledger).sweep()
        jobs = ledger.find(limit=limit)
    finally:
        ledger.close()
    if as_json:
        for job in jobs:
            print(job.model_dump_json())
        return 0
    table = Table("id", "kind", "state", "done", "created (UTC)", "message")
    for job in jobs:
        created = job.created_at.strftime("%Y-%m-%d %H:%M:%S")
        done = f"{job.progress:.0%}"
        table.add_row(job.id, str(job.kind), str(job.state), done, created, job.message)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0


def one_job(
    settings: Settings, job_id: str, *, cancel: bool, restart: bool, follow: bool, as_json: bool
) -> int:
    """Print a job, after doing to it what was asked for.

    Returns:
        Exit code: 0; with ``follow`` 1 unless the job succeeds.

    Raises:
        UnknownJobError: there is none of this id.
        JobConflictError: it is not in a state for this.
        SettingsError: no store is named, or one that is not there.
    """
    require_store(settings)
    ledger = open_ledger(settings)
    try:
        Sweeper(settings, ledger).sweep()
        job = ledger.get(job_id)
        if cancel:
            job = ledger.cancel(job_id)
        if restart:
            job = ledger.restart(job_id)
        if follow:
            job = _follow(settings, ledger, job)
    finally:
        ledger.close()
    if as_json:
        print_job(job)
    else:
        _print_details(job)
    return FAILED if follow and job.state is not JobState.SUCCEEDED else 0


def print_job(job: Job) -> None:
    """Print a job as JSON."""
    print(json.dumps(job.model_dump(mode="json"), indent=2, ensure_ascii=False))


def _cancel(ledger: JobLedger, job_id: str) -> None:
    with suppress(JobConflictError):  # it has ended meanwhile
        insist(lambda: ledger.cancel(job_id), job_id)


def _follow(settings: Settings, ledger: JobLedger, job: Job) -> Job:
    sweeper = Sweeper(settings, ledger)
    with progress_bar(str(job.kind), 1.0) as show:
        while not job.state.finished:
            show(job.progress, job.message)
            time.sleep(0.5)
            sweeper.sweep()
            job = ledger.get(job.id)
    return job


def _print_details(job: Job) -> None:
    for name in ("id", "kind", "state", "attempt", "message", "created_at", "started_at",
                 "finished_at", "idempotency_key"):  # fmt: skip
        value = getattr(job, name)
        if value is not None:
            print(f"{name}: {value}")
    for name in ("parameters", "result"):
        value = getattr(job, name)
        if value:
            print(f"{name}: {json.dumps(value, indent=2, ensure_ascii=False)}")
    if job.error is not None:
        print(f"error: {job.error.type}: {job.error.message}")
    for line in job.log:
        print(f"  {line}")


def _summary(result: Mapping[str, Any]) -> list[str]:
    lines = []
    if "items" in result:
        speed = f", {result['items_per_s']:,.0f} items a second" if "items_per_s" in result else ""
        lines.append(
            f"catalog {result['catalog']}: {result['items']:,} items in {result['leaves']:,} "
            f"leaves{speed}"
        )
    if "report" in result:
        report = result["report"]
        lines.append(
            f"tokenizer {result['tokenizer']}: collision rate {report['collision_rate']:.4f}, "
            f"reconstruction error {report['reconstruction_error'][-1]:.4f} of the variance"
        )
    if "not_released" in result:
        lines.append(f"not released: {result['not_released']}")
    elif result.get("release"):
        active = "active" if result.get("activated", "sequence" in result) else "not active"
        lines.append(f"release {result['release']}, {active}")
    if "not_removed" in result:
        lines.append(f"what is old stays until the next job: {result['not_removed']}")
    return lines
