"""What a worker that died left behind."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading

import psutil

from server.jobs.owner import Owner, process_is_gone
from server.jobs.places import open_ledger
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
