"""A process that is kept ready for the next job."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from server.jobs import process as process_module
from server.jobs.owner import Owner, process_is_gone
from server.jobs.places import open_ledger
from server.jobs.process import JobProcess, ReadyProcess
from server.jobs.supervise import Supervisor
from server.jobs.types import JobKind, JobState


@pytest.fixture
def ready(workplace):
    one = ReadyProcess(workplace.settings())
    yield one
    one.close()


def waiting() -> list[int | None]:
    """Ids of the processes that wait or work."""
    return [one.pid for one in multiprocessing.active_children()]


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_job_is_done_by_the_process_that_waits(workplace, ready: ReadyProcess):
    ready.keep()
    ready.keep()
    (pid,) = waiting()
    eventually(lambda: psutil.Process(pid).memory_info().rss > 150 * 2**20)  # it has torch by now
    ledger = open_ledger(workplace.settings())
    owner = Owner.this_process()
    supervisor = Supervisor(workplace.settings(), ledger, owner, begin=ready.take)
    job, _ = ledger.begin(JobKind.UPDATE_ITEMS, {"deletes": ["W0"]}, owner)
    seen: list[int | None] = []
    ended = supervisor.run(job, on_update=lambda job: seen.extend(waiting()))
    assert ended.state is JobState.SUCCEEDED, ended
    assert set(seen) == {pid}
    assert process_is_gone(pid)

    # The next one is begun once the job is done, not beside it.
    ready.keep()
    assert waiting() == []
    ready.job_done()
    ready.keep()
    assert len(waiting()) == 1
    ledger.close()


def test_one_that_died_is_replaced(workplace, ready: ReadyProcess, monkeypatch):
    monkeypatch.setattr(process_module, "_RETRY_S", 0.0)
    ready.keep()
    (first,) = waiting()
    psutil.Process(first).kill()
    eventually(lambda: process_is_gone(first))
    taken = ready.take()
    assert taken.process.pid != first
    taken.end()
    ready.job_done()
    ready.keep()
    (second,) = waiting()
    psutil.Process(second).kill()
    eventually(lambda: process_is_gone(second))
    ready.keep()
    (third,) = waiting()
    assert third != second
    ready.close()
    assert waiting() == []


def test_an_order_that_comes_before_the_process_is_up(workplace, tmp_path: Path):
    begun = JobProcess.begin(workplace.settings())
    try:
        begun.order(JobKind.ROLLBACK, b"{}", tmp_path / "errors")
        assert begun.connection.poll(60)
        message = {}
        while "failed" not in message:
            message = json.loads(begun.connection.recv_bytes())
        assert "nothing to roll back to" in message["failed"]["message"]
    finally:
        begun.end()
