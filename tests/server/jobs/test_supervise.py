"""A job in a process of its own: how it ends, whatever happens to it, and what it leaves."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch

from server.jobs import supervise
from server.jobs.child import explain
from server.jobs.ledger import JobLedger
from server.jobs.owner import Owner, process_is_gone
from server.jobs.places import open_ledger
from server.jobs.process import JobProcess
from server.jobs.supervise import Supervisor
from server.jobs.types import Job, JobErrorKind, JobKind, JobState, UnknownJobError
from server.settings import Settings
from tests.waiting import wait_until

SOURCE = {"root": "lake", "path": "items.parquet"}
REINDEX = {"source": SOURCE, "constraint_sets": "drop"}


class Runner:
    """Runs jobs in this process's care."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.ledger: JobLedger = open_ledger(settings)
        self.owner = Owner.this_process()
        self.updates: list[Job] = []
        self.ending = threading.Event()

    def run(
        self,
        kind: JobKind,
        params: dict[str, Any],
        when: Callable[[Job], bool] = lambda job: False,
        action: Callable[[Job], None] = lambda job: None,
    ) -> Job:
        """Run a job; ``action`` is done once, when ``when`` first holds of its record."""
        job, mine = self.ledger.begin(kind, params, self.owner)
        assert mine
        return self.go_on(job, when, action)

    def go_on(
        self,
        job: Job,
        when: Callable[[Job], bool] = lambda job: False,
        action: Callable[[Job], None] = lambda job: None,
    ) -> Job:
        done: list[Job] = []

        def on_update(job: Job) -> None:
            self.updates.append(job)
            if not done and when(job):
                done.append(job)
                action(job)

        supervisor = Supervisor(self.settings, self.ledger, self.owner, begin=self._begin)
        return supervisor.run(job, ending=self.ending, on_update=on_update)

    def _begin(self) -> JobProcess:
        begun = JobProcess.begin(self.settings)
        self.child = psutil.Process(begun.process.pid)
        return begun


@pytest.fixture
def start(workplace):
    runners: list[Runner] = []

    def make(**flags: Any) -> Runner:
        runners.append(Runner(workplace.settings(**flags)))
        return runners[-1]

    yield make
    for runner in runners:
        runner.ledger.close()


def encoding(job: Job) -> bool:
    return job.message.startswith("encoding:")


def nothing_left(workplace) -> bool:
    names = [path.name for path in workplace.root.rglob("*")]
    work = workplace.root / ".jobs" / "work"
    return not any(name.startswith(".partial-") for name in names) and not list(work.iterdir())


def test_a_job_that_succeeds(workplace, start):
    workplace.parquet("items.parquet", 300)
    runner = start()
    job = runner.run(JobKind.REINDEX, {**REINDEX, "activate": True})
    assert job.state is JobState.SUCCEEDED, job
    assert runner.ledger.get(job.id) == job
    assert job.result["items"] == 300
    assert workplace.store.active().release == job.result["release"]
    shares = [one.progress for one in runner.updates]
    assert shares == sorted(shares)
    assert any("encoding 300 items" in line for line in job.log)
    assert nothing_left(workplace)


def test_a_job_that_fails(workplace, start):
    workplace.parquet("items.parquet", 300)
    job = start().run(JobKind.REINDEX, {"source": {"root": "lake", "path": "../store/x.parquet"}})
    assert (job.state, job.error.type) == (JobState.FAILED, JobErrorKind.INVALID_SOURCE)
    assert job.message == job.error.message
    assert nothing_left(workplace)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_share_of_a_gpu_that_is_not_there(workplace, start):
    job = start(gpu_share=0.5).run(JobKind.ROLLBACK, {})
    assert job.state is JobState.FAILED
    assert "jobs.gpu_share is 0.5, but torch finds no GPU here" in job.error.message


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_job_on_a_share_of_the_gpu(workplace, start):
    workplace.parquet("items.parquet", 300)
    on_gpu = start(gpu_share=0.1).run(JobKind.REINDEX, REINDEX)
    on_cpu = start().run(JobKind.REINDEX, REINDEX)
    assert on_gpu.state is on_cpu.state is JobState.SUCCEEDED, (on_gpu, on_cpu)
    assert on_gpu.result["catalog"] == on_cpu.result["catalog"]


def test_a_job_that_is_cancelled(workplace, start):
    workplace.parquet("items.parquet", 30_000)
    runner = start(batch_size=1)
    job = runner.run(JobKind.REINDEX, REINDEX, encoding, lambda job: runner.ledger.cancel(job.id))
    assert (job.state, job.error) == (JobState.CANCELLED, None)
    assert job.cancel_requested
    assert 0 < job.progress < 1
    assert nothing_left(workplace)


def test_a_job_that_does_not_stop_is_killed(workplace, start):
    workplace.parquet("items.parquet", 30_000)
    runner = start(batch_size=1, cancel_grace_s=0.5)

    def stop(job: Job) -> None:
        # It cannot hear that it is asked to stop.
        runner.child.suspend()
        runner.ledger.cancel(job.id)

    job = runner.run(JobKind.REINDEX, REINDEX, encoding, stop)
    assert job.state is JobState.CANCELLED
    assert any("did not stop within 0.5 s; killed" in line for line in job.log)
    assert nothing_left(workplace)


@pytest.mark.parametrize(
    ("flags", "kind", "setting"),
    [
        ({"memory_limit_gib": 0.01}, JobErrorKind.MEMORY_LIMIT, "jobs.memory_limit_gib is 0.01"),
        ({"time_limit_s": 0.5}, JobErrorKind.TIME_LIMIT, "jobs.time_limit_s is 0.5"),
    ],
)
def test_a_job_that_goes_over_a_limit(workplace, start, flags, kind, setting):
    workplace.parquet("items.parquet", 30_000)
    job = start(batch_size=1, **flags).run(JobKind.REINDEX, REINDEX)
    assert (job.state, job.error.type) == (JobState.FAILED, kind)
    assert setting in job.error.message
    assert nothing_left(workplace)


def test_a_job_whose_process_is_killed(workplace, start):
    workplace.parquet("items.parquet", 30_000)
    runner = start(batch_size=1)
    job = runner.run(JobKind.REINDEX, REINDEX, encoding, lambda job: runner.child.kill())
    assert (job.state, job.error.type) == (JobState.INTERRUPTED, JobErrorKind.INTERRUPTED)
    assert "SIGKILL" in job.error.message
    assert nothing_left(workplace)

    workplace.parquet("items.parquet", 100)
    runner.ledger.restart(job.id)
    claimed = None
    while claimed is None:
        claimed = runner.ledger.claim("catalog", runner.owner)
    again = runner.go_on(claimed)
    assert (again.id, again.state, again.attempt) == (job.id, JobState.SUCCEEDED, 2)


def test_a_job_whose_worker_is_told_to_end(workplace, start):
    workplace.parquet("items.parquet", 30_000)
    runner = start(batch_size=1)
    job = runner.run(JobKind.REINDEX, REINDEX, encoding, lambda job: runner.ending.set())
    assert (job.state, job.attempt) == (JobState.QUEUED, 2)
    assert nothing_left(workplace)


def test_a_job_that_is_cancelled_as_its_worker_ends_stays_so(workplace, start):
    workplace.parquet("items.parquet", 30_000)
    runner = start(batch_size=1)

    def both(job: Job) -> None:
        runner.ending.set()
        runner.ledger.cancel(job.id)

    job = runner.run(JobKind.REINDEX, REINDEX, encoding, both)
    assert (job.state, job.attempt) == (JobState.CANCELLED, 1)
    assert nothing_left(workplace)


def test_a_database_that_is_away_does_not_end_a_job(workplace, start, monkeypatch):
    workplace.parquet("items.parquet", 100)
    runner = start()
    real = runner.ledger.write
    failures = iter(range(3))

    def write(job: Job) -> None:
        if next(failures, None) is not None:
            raise OSError("database or disk is full")
        real(job)

    job, _ = runner.ledger.begin(JobKind.REINDEX, REINDEX, runner.owner)
    monkeypatch.setattr(runner.ledger, "write", write)
    assert runner.go_on(job).state is JobState.SUCCEEDED
    assert next(failures, None) is None


def test_errors_are_told_apart(workplace):
    settings = workplace.settings(memory_limit_gib=3)
    for error, kind, text in (
        (MemoryError(), JobErrorKind.MEMORY_LIMIT, "memory_limit_gib is 3"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            JobErrorKind.MEMORY_LIMIT,
            "memory_limit_gib is 3",
        ),
        (OSError(28, "No space left on device", "/x"), JobErrorKind.DISK_FULL, "disk is full"),
        (OSError(27, "File too large", "/x"), JobErrorKind.DISK_FULL, "disk is full"),
        (KeyError("x"), JobErrorKind.INTERNAL, "unexpected KeyError"),
    ):
        found, message = explain(error, settings)
        assert found is kind
        assert text in message


def test_the_process_of_a_job_goes_when_its_watcher_is_killed(workplace, tmp_path):
    """And whoever looks next marks the job and removes what was left."""
    import subprocess
    import sys

    from server.jobs.worker import Sweeper

    workplace.parquet("items.parquet", 30_000)
    command = [sys.executable, "-m", "server", "reindex", "--source"]
    flags = ["--store", str(workplace.root), "--jobs.batch-size", "1", "--jobs.threads", "1"]
    watcher = subprocess.Popen(
        [*command, str(workplace.lake / "items.parquet"), *flags],
        stderr=subprocess.PIPE,
        text=True,
    )
    settings = workplace.settings()
    ledger = open_ledger(settings)
    try:

        def encodes() -> bool:
            assert watcher.poll() is None, watcher.communicate()
            return any(encoding(job) for job in ledger.running())

        wait_until(encodes, ledger.find)
        (job,) = ledger.running()
        child = ledger.owner(job.id).child
        watcher.send_signal(signal.SIGKILL)
        watcher.wait()
        (marked,) = Sweeper(settings, ledger).sweep()
    finally:
        watcher.kill()
        watcher.communicate()
        ledger.close()
    assert (marked.id, marked.state) == (job.id, JobState.INTERRUPTED)
    assert "restart" in marked.message
    assert process_is_gone(child)
    assert nothing_left(workplace)
    assert os.path.exists(workplace.root / ".jobs" / "jobs.sqlite3")


def test_a_job_whose_process_cannot_be_started(workplace, start):
    runner = start()

    def full() -> Any:
        raise BlockingIOError(errno.EAGAIN, "too many processes")

    supervisor = Supervisor(runner.settings, runner.ledger, runner.owner, begin=full)
    job, _ = runner.ledger.begin(JobKind.UPDATE_ITEMS, {"deletes": ["W0"]}, runner.owner)
    ended = supervisor.run(job)
    assert (ended.state, ended.error.type) == (JobState.INTERRUPTED, JobErrorKind.INTERRUPTED)
    assert "too many processes" in ended.error.message
    assert runner.ledger.get(job.id) == ended
    assert nothing_left(workplace)


def test_a_job_that_cannot_be_begun_does_not_run_for_ever(workplace, start, monkeypatch):
    runner = start()
    work = workplace.root / ".jobs" / "work"
    work.write_text("in the way, as a disk that is full would be")
    job = runner.run(JobKind.ROLLBACK, {})
    assert (job.state, job.error.type) == (JobState.INTERRUPTED, JobErrorKind.INTERRUPTED)
    assert "cannot be started" in job.message
    assert runner.ledger.running() == []

    work.unlink()

    def broken() -> JobProcess:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_begin", broken)
        job = runner.run(JobKind.ROLLBACK, {})
    assert job.state is JobState.INTERRUPTED
    assert "can't start new thread" in job.message
    assert runner.ledger.get(job.id) == job

    # What is still known of it may have been forgotten since it was queued.
    job, _ = runner.ledger.begin(JobKind.ROLLBACK, {}, runner.owner)
    with monkeypatch.context() as patch:
        patch.setattr(runner.ledger, "params", lambda job_id: raised(UnknownJobError(job_id)))
        job = runner.go_on(job)
    assert job.state is JobState.INTERRUPTED
    assert runner.ledger.running() == []
    assert nothing_left(workplace)


def raised(error: Exception) -> Any:
    raise error


def test_a_job_whose_leftovers_cannot_be_removed_has_ended(workplace, start, monkeypatch):
    runner = start()
    workplace.parquet("items.parquet", 30)
    monkeypatch.setattr(supervise, "open_store", lambda settings: raised(OSError("away")))
    job = runner.run(JobKind.REINDEX, REINDEX)
    assert job.state is JobState.SUCCEEDED, job
    assert runner.updates[-1] == job == runner.ledger.get(job.id)
