"""A process that is kept ready for the next job."""

from __future__ import annotations

import json
import multiprocessing
import os
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest

from server.jobs import process as process_module
from server.jobs.owner import Owner, process_is_gone
from server.jobs.places import open_ledger
from server.jobs.process import JobProcess, ReadyProcess
from server.jobs.supervise import Supervisor
from server.jobs.types import JobKind, JobState
from tests.waiting import LIMIT_S, wait_until


@pytest.fixture(scope="module", autouse=True)
def no_origin_left():
    yield
    forkserver._forkserver._stop()


@pytest.fixture
def ready(workplace):
    one = ReadyProcess(workplace.settings())
    yield one
    one.close()


def waiting() -> list[int | None]:
    """Ids of the processes that wait or work."""
    return [one.pid for one in multiprocessing.active_children()]


def test_a_job_is_done_by_the_process_that_waits(workplace, ready: ReadyProcess):
    ready.keep()
    ready.keep()
    (pid,) = waiting()
    ledger = open_ledger(workplace.settings())
    owner = Owner.this_process()
    begun: list[JobProcess] = []

    def begin() -> JobProcess:
        begun.append(ready.take())
        return begun[-1]

    supervisor = Supervisor(workplace.settings(), ledger, owner, begin=begin)
    job, _ = ledger.begin(JobKind.UPDATE_ITEMS, {"deletes": ["W0"]}, owner)
    ended = supervisor.run(job)
    assert ended.state is JobState.SUCCEEDED, ended
    assert [one.process.pid for one in begun] == [pid]
    assert waiting() == []
    assert process_is_gone(pid)

    # The next one is there as quickly, for a change that follows at once.
    ready.keep()
    (next_pid,) = waiting()
    assert next_pid != pid
    ledger.close()


def test_where_it_is_no_copy_the_next_one_is_begun_after_the_job(workplace, monkeypatch):
    """Not beside it: the imports of the one would hold up the other."""
    monkeypatch.setattr(process_module, "_REPLACE_S", 3_600.0)
    ready = ReadyProcess(workplace.settings(gpu_share=0.5))
    ready.keep()
    (pid,) = waiting()
    taken = ready.take()
    assert taken.process.pid == pid
    ready.keep()
    assert waiting() == [pid]
    taken.end()
    ready.job_done()
    ready.keep()
    (next_pid,) = waiting()
    assert next_pid != pid
    ready.close()


def test_it_is_a_copy_of_one_that_has_loaded_torch_and_has_no_threads(ready: ReadyProcess):
    ready.keep()
    (pid,) = waiting()
    origin = psutil.Process(pid).parent()
    # With threads, a copy might wait for ever for a lock that one of them held.
    assert origin.num_threads() == 1
    loaded = {Path(file.path).name for file in origin.memory_maps()}
    assert any("torch_cpu" in name for name in loaded)
    ready.take().end()
    ready.keep()
    (next_pid,) = waiting()
    assert psutil.Process(next_pid).parent() == origin


def test_one_that_died_is_replaced(workplace, ready: ReadyProcess, monkeypatch):
    monkeypatch.setattr(process_module, "_RETRY_S", 0.0)
    ready.keep()
    (first,) = waiting()
    psutil.Process(first).kill()
    wait_until(lambda: waiting() == [], waiting)
    taken = ready.take()
    assert taken.process.pid != first
    taken.end()
    ready.job_done()
    ready.keep()
    (second,) = waiting()
    psutil.Process(second).kill()
    wait_until(lambda: waiting() == [], waiting)
    ready.keep()
    (third,) = waiting()
    assert third != second
    ready.close()
    assert waiting() == []
    ready.keep()
    assert waiting() == []  # closed for good


def taken_and_orphaned(ready: ReadyProcess) -> JobProcess:
    """One whose origin died when it was taken, so that it is thought to have ended."""
    ready.keep()
    (pid,) = waiting()
    taken = ready.take()
    psutil.Process(pid).parent().kill()
    wait_until(lambda: not taken.is_alive)
    assert taken.process.pid == pid
    assert not process_is_gone(pid)
    return taken


def test_the_origin_of_the_copies_may_die(workplace, ready: ReadyProcess):
    ledger = open_ledger(workplace.settings())
    owner = Owner.this_process()
    taken = taken_and_orphaned(ready)
    for begin, item in ((lambda: taken, "W0"), (ready.take, "W1")):
        supervisor = Supervisor(workplace.settings(), ledger, owner, begin=begin)
        job, _ = ledger.begin(JobKind.UPDATE_ITEMS, {"deletes": [item]}, owner)
        ended = supervisor.run(job)
        assert ended.state is JobState.SUCCEEDED, ended
    assert process_is_gone(taken.process.pid)
    ledger.close()


def test_a_process_whose_origin_died_is_killed_all_the_same(workplace):
    workplace.parquet("items.parquet", 100_000)
    settings = workplace.settings(batch_size=1, time_limit_s=0.5, cancel_grace_s=0)
    ledger = open_ledger(settings)
    owner = Owner.this_process()
    ready = ReadyProcess(settings)
    taken = taken_and_orphaned(ready)
    supervisor = Supervisor(settings, ledger, owner, begin=lambda: taken)
    source = {"root": "lake", "path": "items.parquet"}
    job, _ = ledger.begin(JobKind.REINDEX, {"source": source}, owner)
    ended = supervisor.run(job)
    assert ended.error is not None, ended
    assert ended.error.type == "time_limit"
    assert process_is_gone(taken.process.pid)
    ledger.close()


def test_with_a_share_of_a_gpu_it_is_no_copy(workplace):
    begun = JobProcess.begin(workplace.settings(gpu_share=0.5), copied=True)
    parent = psutil.Process(begun.process.pid).ppid()
    begun.end()
    assert parent == os.getpid()


def test_a_copy_is_held_to_its_memory_limit(workplace, ready: ReadyProcess):
    settings = workplace.settings(memory_limit_gib=0.05)
    workplace.parquet("items.parquet", 100_000)
    ledger = open_ledger(settings)
    owner = Owner.this_process()
    supervisor = Supervisor(settings, ledger, owner, begin=ready.take)
    source = {"root": "lake", "path": "items.parquet"}
    job, _ = ledger.begin(JobKind.REINDEX, {"source": source}, owner)
    ended = supervisor.run(job)
    assert ended.error is not None, ended
    assert ended.error.type == "memory_limit"
    ledger.close()


def test_an_order_that_comes_before_the_process_is_up(workplace, tmp_path: Path):
    begun = JobProcess.begin(workplace.settings())
    try:
        begun.order(JobKind.ROLLBACK, b"{}", tmp_path / "errors")
        assert begun.connection.poll(LIMIT_S)
        message = {}
        while "failed" not in message:
            message = json.loads(begun.connection.recv_bytes())
        assert "nothing to roll back to" in message["failed"]["message"]
    finally:
        begun.end()
