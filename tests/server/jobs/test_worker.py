"""Queued jobs survive whatever happens to the workers."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest

from server.jobs.ledger import JobLedger
from server.jobs.owner import process_is_gone
from server.jobs.places import open_ledger
from server.jobs.types import Job, JobKind, JobState
from server.jobs.worker_process import WorkerProcess

REINDEX = {"source": {"root": "lake", "path": "items.parquet"}, "constraint_sets": "drop"}


def eventually(condition: Callable[[], bool], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


@contextmanager
def worker(workplace, **flags) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "server", "worker", "--store", str(workplace.root)]
    options = {"admin.sources": f"lake={workplace.lake}", "jobs.threads": 1, **flags}
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def encoding(ledger: JobLedger, job: Job) -> bool:
    return ledger.get(job.id).message.startswith("encoding:")


@pytest.mark.parametrize("database", ["sqlite", "redis"])
def test_jobs_survive_a_restart(workplace, database: str, request: pytest.FixtureRequest):
    flags = {"jobs.batch_size": 1}
    if database == "redis":
        url = request.getfixturevalue("redis_url")
        flags |= {"jobs.database": url, "jobs.namespace": f"n{secrets.token_hex(4)}"}
    settings = workplace.settings(**{name.partition(".")[2]: v for name, v in flags.items()})
    workplace.parquet("items.parquet", 30_000)
    ledger = open_ledger(settings)
    running = ledger.submit(JobKind.REINDEX, REINDEX)
    waiting = ledger.submit(JobKind.UPDATE_ITEMS, {"deletes": ["W0"]})
    with worker(workplace, **flags) as process:
        eventually(lambda: encoding(ledger, running))
        process.terminate()
        assert process.wait(30) == 0
    assert [job.state for job in ledger.find()] == [JobState.QUEUED] * 2
    # The rest would take long one by one.
    workplace.parquet("items.parquet", 100)
    with worker(workplace, **flags) as process:
        for job in (running, waiting):
            eventually(lambda job=job: ledger.get(job.id).state.finished)
        process.terminate()
        assert process.wait(30) == 0
    assert {ledger.get(job.id).state for job in (running, waiting)} == {JobState.SUCCEEDED}
    assert ledger.get(running.id).attempt == 2
    ledger.close()


def test_a_worker_that_is_killed_is_replaced_and_its_job_is_marked(workplace):
    workplace.parquet("items.parquet", 30_000)
    settings = workplace.settings(batch_size=1)
    ledger = open_ledger(settings)
    job = ledger.submit(JobKind.REINDEX, REINDEX)
    workers = WorkerProcess(settings)
    workers.start()
    try:
        eventually(lambda: encoding(ledger, job))
        first = workers.pid
        assert first is not None
        children = [child.pid for child in psutil.Process(first).children(recursive=True)]
        os.kill(first, signal.SIGKILL)
        eventually(lambda: ledger.get(job.id).state is JobState.INTERRUPTED)
        assert workers.pid not in (None, first)
        eventually(lambda: all(process_is_gone(pid) for pid in children))
        assert list((workplace.root / ".jobs" / "work").iterdir()) == []
        assert list(workplace.root.rglob(".partial-*")) == []
        workplace.parquet("items.parquet", 100)
        ledger.restart(job.id)
        eventually(lambda: ledger.get(job.id).state is JobState.SUCCEEDED)
    finally:
        workers.stop()
        ledger.close()
    assert workers.pid is None


def test_a_worker_goes_when_its_service_is_killed(workplace):
    script = (
        "import sys, time\n"
        "from server.jobs.worker_process import WorkerProcess\n"
        "from server.settings import load_settings\n"
        "if __name__ == '__main__':\n"
        "    worker = WorkerProcess(load_settings({'store.path': sys.argv[1]}))\n"
        "    worker.start()\n"
        "    print(worker.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    file = workplace.root.parent / "service.py"
    file.write_text(script)
    service = subprocess.Popen(
        [sys.executable, str(file), str(workplace.root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert service.stdout is not None
        pid = int(service.stdout.readline())
        database = workplace.root / ".jobs" / "jobs.sqlite3"
        eventually(database.exists)
        service.kill()
        service.wait()
        eventually(lambda: process_is_gone(pid))
    finally:
        service.kill()
        service.communicate()
