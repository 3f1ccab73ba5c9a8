"""What a worker that died left behind."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from types import SimpleNamespace

import psutil

from server.jobs import worker
from server.jobs.lanes import LANES
from server.jobs.owner import Owner, process_is_gone
from server.jobs.places import open_ledger
from server.jobs.supervise import work_folder
from server.jobs.types import JobKind, JobState
from server.jobs.worker import Sweeper


def test_a_process_that_is_ending_is_waited_for(workplace, monkeypatch):
    """It has no command line any more to be known by, and what it was writing is removed."""
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: [])
    settings = workplace.settings()
    ledger = open_ledger(settings)
    worker = subprocess.Popen([sys.executable, "-c", ""])
    worker.wait()
    child = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    )
    assert child.stdin is not None
    ending = threading.Timer(0.3, child.stdin.close)
    try:
        owner = dataclasses.replace(Owner.this_process(), pid=worker.pid)
        job, _ = ledger.begin(JobKind.ROLLBACK, {}, owner)
        ledger.heartbeat(job, owner.next(child.pid))
        partial = workplace.root / "catalogs" / f".partial-{child.pid}-abc"
        partial.mkdir()
        ending.start()
        (marked,) = Sweeper(settings, ledger).sweep()
        assert (marked.id, marked.state) == (job.id, JobState.INTERRUPTED)
        assert process_is_gone(child.pid)
        assert not partial.exists()
    finally:
        ending.join()
        child.kill()
        child.wait()
        ledger.close()


def test_a_job_that_runs_again_elsewhere_is_not_held_to_its_first_sign_of_life(
    workplace, monkeypatch
):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: clock.now))
    settings = workplace.settings()
    ledger = open_ledger(settings)
    there = dataclasses.replace(Owner.this_process(), host="elsewhere")
    sweeper = Sweeper(settings, ledger)
    try:
        job, _ = ledger.begin(JobKind.ROLLBACK, {}, there)
        assert sweeper.sweep() == []
        ledger.finish(job, JobState.CANCELLED, message="cancelled")
        clock.now = 40.0
        ledger.restart(job.id)
        again = ledger.claim(LANES[JobKind.ROLLBACK], there)
        assert again is not None
        assert sweeper.sweep() == []
        assert ledger.get(job.id).state is JobState.RUNNING
        clock.now = 71.0
        assert [one.id for one in sweeper.sweep()] == [job.id]
    finally:
        ledger.close()


def test_the_folder_of_a_job_whose_worker_died_as_it_ended_is_removed(workplace):
    settings = workplace.settings()
    ledger = open_ledger(settings)
    try:
        folders = {}
        for name in ("ended", "running"):
            job, _ = ledger.begin(JobKind.ROLLBACK, {}, Owner.this_process())
            folders[name] = work_folder(settings, job.id)
            folders[name].mkdir(parents=True)
            (folders[name] / "errors").write_text("")
            if name == "ended":
                ledger.finish(job, JobState.SUCCEEDED, message="done")
        foreign = folders["ended"].with_name("of-another-database")
        foreign.mkdir()
        assert Sweeper(settings, ledger).sweep() == []
        assert not folders["ended"].exists()
        assert folders["running"].exists()
        assert foreign.exists()
    finally:
        ledger.close()
