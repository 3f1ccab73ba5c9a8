"""Queued jobs survive whatever happens to the workers."""

from __future__ import annotations

import errno
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import SpawnProcess

import psutil
import pytest

from server.jobs.ledger import JobLedger
from server.jobs.owner import process_is_gone
from server.jobs.places import open_ledger
from server.jobs.types import Job, JobKind, JobState
from server.jobs.worker_process import WorkerProcess
from tests.waiting import ended, wait_until

REINDEX = {"source": {"root": "lake", "path": "items.parquet"}, "constraint_sets": "drop"}


@contextmanager
def worker(workplace, **flags) -> Iterator[Callable[[Callable[[], bool]], None]]:
    """A worker that is told to end when the block does; yields what waits for something of it."""
    command = [sys.executable, "-m", "server", "worker", "--store", str(workplace.root)]
    options = {"admin.sources": f"lake={workplace.lake}", "jobs.threads": 1, **flags}
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    log = workplace.root.parent / "log"
    with log.open("ab") as errors:
        process = subprocess.Popen(command, stderr=errors)

    def wait_for(condition: Callable[[], bool]) -> None:
        def met() -> bool:
            assert process.poll() is None, log.read_text()
            return condition()

        wait_until(met, log.read_text)

    try:
        yield wait_for
        process.terminate()
        assert ended(process, log.read_text) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


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
    with worker(workplace, **flags) as wait_for:
        wait_for(lambda: encoding(ledger, running))
    assert [job.state for job in ledger.find()] == [JobState.QUEUED] * 2
    # The rest would take long one by one.
    workplace.parquet("items.parquet", 100)
    with worker(workplace, **flags) as wait_for:
        for job in (running, waiting):
            wait_for(lambda job=job: ledger.get(job.id).state.finished)
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
        wait_until(lambda: encoding(ledger, job), ledger.find)
        first = workers.pid
        assert first is not None
        children = [child.pid for child in psutil.Process(first).children(recursive=True)]
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: ledger.get(job.id).state is JobState.INTERRUPTED, ledger.find)
        assert workers.pid not in (None, first)
        wait_until(lambda: all(process_is_gone(pid) for pid in children))
        assert list((workplace.root / ".jobs" / "work").iterdir()) == []
        assert list(workplace.root.rglob(".partial-*")) == []
        workplace.parquet("items.parquet", 100)
        ledger.restart(job.id)
        wait_until(lambda: ledger.get(job.id).state is JobState.SUCCEEDED, ledger.find)
    finally:
        workers.stop()
        ledger.close()
    assert workers.pid is None


def test_a_worker_that_could_not_be_started_again_is_tried_again(workplace, monkeypatch):
    workers = WorkerProcess(workplace.settings())
    workers.start()
    try:
        first = workers.pid
        assert first is not None
        real = SpawnProcess.start
        failures = [BlockingIOError(errno.EAGAIN, "too many processes")] * 2

        def start(process: SpawnProcess) -> None:
            if failures:
                raise failures.pop()
            real(process)

        monkeypatch.setattr(SpawnProcess, "start", start)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: workers.pid not in (None, first), lambda: failures)
        assert not failures
    finally:
        workers.stop()


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
    log = workplace.root.parent / "log"
    with log.open("wb") as errors:
        service = subprocess.Popen(
            [sys.executable, str(file), str(workplace.root)],
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    try:
        assert service.stdout is not None
        line = service.stdout.readline()
        assert line, log.read_text()
        pid = int(line)
        database = workplace.root / ".jobs" / "jobs.sqlite3"
        wait_until(database.exists, log.read_text)
        service.kill()
        service.wait()
        wait_until(lambda: process_is_gone(pid), log.read_text)
    finally:
        service.kill()
        service.communicate()
