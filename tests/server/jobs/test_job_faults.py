"""Killed at any moment, raced, out of disk: the store opens and its active release is whole.

``CHAOS_ROUNDS`` sets how many times the workers are killed.
"""

from __future__ import annotations

import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

from rectokens.artifacts.manifest import ARTIFACT_KINDS
from rectokens.artifacts.release_store import ReleaseStore
from rectokens.catalog.artifact import load_catalog
from server.jobs.child import explain
from server.jobs.context import JobReporter
from server.jobs.kinds import FUNCTIONS
from server.jobs.ledger import JobLedger
from server.jobs.owner import Owner, process_is_gone
from server.jobs.params import checked_params
from server.jobs.places import open_ledger
from server.jobs.process import JobProcess, ReadyProcess
from server.jobs.stored import CATALOG_LOCK
from server.jobs.supervise import Supervisor
from server.jobs.types import JobErrorKind, JobKind, JobState
from server.jobs.worker import Sweeper
from tests.full_disk import file_size_limit
from tests.waiting import LIMIT_S, wait_until

WORKER = Path(__file__).with_name("job_worker.py")
ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "3"))
SOURCE = {"root": "lake", "path": "items.parquet"}
REINDEX = {"source": SOURCE, "constraint_sets": "drop"}


def check(store: ReleaseStore) -> None:
    """What must hold whenever nobody is at work."""
    current = store.active()
    assert current is not None
    release = store.verify(current.release)
    assert load_catalog(release.catalog_path).version == release.catalog_version
    if current.action == "activate" and current.previous is not None:
        store.verify(current.previous)
    numbers = [record.sequence for record in store.history()]
    assert numbers == list(range(1, current.sequence + 1))
    for kind in ARTIFACT_KINDS:
        for one in store.versions(kind):
            assert one.state != "damaged", one


class Workers:
    """Two at a time on one store; see ``job_worker.py``."""

    def __init__(self, workplace) -> None:
        command = [sys.executable, str(WORKER), str(workplace.root), str(workplace.lake)]
        self._parent = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "POLARS_MAX_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._errors: list[str] = []
        self._threads = [threading.Thread(target=one) for one in (self._read, self._read_errors)]
        for thread in self._threads:
            thread.start()
        self._pids: set[int] = set()

    def begin(self, *seeds: int) -> None:
        assert self._parent.stdin is not None
        self._parent.stdin.write("".join(f"{seed}\n" for seed in seeds))
        self._parent.stdin.flush()
        while len(self._pids) < len(seeds):
            self._next()

    def wait_for_a_job(self) -> None:
        while self._next().isdigit():
            pass

    def kill(self) -> None:
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: all(process_is_gone(pid) for pid in self._pids))
        self._pids.clear()
        while not self._lines.empty():
            self._lines.get()
        self._check()

    def end(self) -> None:
        os.killpg(self._parent.pid, signal.SIGKILL)
        self._parent.wait()
        for thread in self._threads:
            thread.join()
        self._check()

    def _next(self) -> str:
        """What one of them said."""
        word = wait_until(self._line, lambda: "".join(self._errors)).split()[1]
        if word.isdigit():
            self._pids.add(int(word))
        return str(word)

    def _line(self) -> str | None:
        self._check()
        with suppress(queue.Empty):
            return self._lines.get(timeout=1)
        return None

    def _check(self) -> None:
        text = "".join(self._errors)
        assert "Traceback" not in text, text

    def _read(self) -> None:
        assert self._parent.stdout is not None
        for line in self._parent.stdout:
            self._lines.put(line)

    def _read_errors(self) -> None:
        assert self._parent.stderr is not None
        self._errors.extend(self._parent.stderr)


def test_kill_9_of_two_workers_on_one_store(workplace):
    for name in "ab":
        workplace.parquet(f"{name}.parquet", 500, seed=ord(name))
    chance = random.Random(0)
    workers = Workers(workplace)
    try:
        for round_number in range(ROUNDS):
            workers.begin(2 * round_number, 2 * round_number + 1)
            # Every other time some work is done first, however slow this machine is just now.
            if round_number % 2:
                workers.wait_for_a_job()
            time.sleep(chance.random())
            workers.kill()
            check(workplace.store)
    finally:
        workers.end()
    workplace.store.clean(older_than_s=0.0)
    assert list(workplace.root.rglob(".partial-*")) == []
    check(workplace.store)


def test_commands_that_are_killed_at_any_moment(workplace):
    """As a whole: the process that watches is killed, and what it leaves is found and cleaned."""
    workplace.parquet("items.parquet", 3_000)
    chance = random.Random(1)
    ledger = open_ledger(workplace.settings())
    source = ["--source", str(workplace.lake / "items.parquet"), "--drop-constraint-sets"]
    command = [sys.executable, "-m", "server", "reindex", *source, "--activate"]
    flags = ["--store", str(workplace.root), "--jobs.batch-size", "8", "--jobs.threads", "1"]
    ends = set()
    for round_number in range(max(2, ROUNDS // 5)):
        process = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE)
        # The first one early; the others once there is a job, at some moment of it.
        if round_number:
            wait_until(lambda process=process: ledger.running() or process.poll() is not None)
        time.sleep(chance.random() * 3.0)
        process.kill()
        process.communicate()
        Sweeper(workplace.settings(), ledger).sweep()
        assert not ledger.running()
        check(workplace.store)
        assert list(workplace.root.rglob(".partial-*")) == []
        work = workplace.root / ".jobs" / "work"
        assert not work.exists() or list(work.iterdir()) == []
        ends |= {job.state for job in ledger.find(limit=1)}
    ledger.close()
    assert ends <= {JobState.INTERRUPTED, JobState.SUCCEEDED, JobState.QUEUED}


def test_a_job_and_what_it_was_copied_from_are_killed_at_any_moment(workplace):
    """By the one that watches it is found, whichever of the two has gone first."""
    workplace.parquet("items.parquet", 3_000)
    chance = random.Random(2)
    settings = workplace.settings(batch_size=8)
    ledger = open_ledger(settings)
    owner = Owner.this_process()
    ready = ReadyProcess(settings)
    killers: list[threading.Timer] = []
    states: list[JobState] = []

    def begin() -> JobProcess:
        taken = ready.take()
        job = psutil.Process(taken.process.pid)
        # Where the origin has died, the process is no copy or an orphan: its parent is this one, or
        # none of ours.
        origin = [job.parent()] if job.ppid() == forkserver._forkserver._forkserver_pid else []
        doomed = [[job], [*origin, job], origin][len(states) % 3]
        killers.append(threading.Timer(chance.random(), kill, (doomed,)))
        killers[-1].start()
        return taken

    def kill(doomed: list[psutil.Process]) -> None:
        for process in doomed:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    try:
        # What they are copied from takes seconds to begin.
        for _ in range(max(1, ROUNDS // 3)):
            job, _ = ledger.begin(JobKind.REINDEX, {**REINDEX, "activate": True}, owner)
            ended = Supervisor(settings, ledger, owner, begin=begin).run(job)
            killers[-1].join()
            states.append(ended.state)
            if ended.state is JobState.INTERRUPTED:
                assert ended.error is not None
                assert "process died" in ended.error.message
            assert not ledger.running()
            check(workplace.store)
            assert list(workplace.root.rglob(".partial-*")) == []
            assert list((workplace.root / ".jobs" / "work").iterdir()) == []
    finally:
        ready.close()
        forkserver._forkserver._stop()
        ledger.close()
    assert set(states) <= {JobState.INTERRUPTED, JobState.SUCCEEDED}
    assert all(state is JobState.SUCCEEDED for state in states[2::3])  # only its origin died


@pytest.mark.parametrize("limit", [300, 3_000, 20_000])
def test_files_that_cannot_be_written(workplace, limit: int):
    workplace.parquet("items.parquet", 20_000)
    environment = workplace.environment()
    before = environment.store.active()
    params = checked_params(JobKind.REINDEX, {**REINDEX, "activate": True})
    with pytest.raises(OSError) as error, file_size_limit(limit):
        FUNCTIONS[JobKind.REINDEX](params, environment, JobReporter())
    assert explain(error.value, workplace.settings())[0] is JobErrorKind.DISK_FULL
    assert environment.store.active() == before
    assert list(workplace.root.rglob(".partial-*")) == []
    check(environment.store)


@pytest.fixture
def small_disk(workplace, tmp_path: Path) -> Iterator[Path]:
    """The workplace's store on a file system with a megabyte to spare."""
    place = tmp_path / "small"
    place.mkdir()
    size = sum(path.stat().st_size for path in workplace.root.rglob("*")) // 1024
    command = ["mount", "-t", "tmpfs", "-o", f"size={size + 1_500}k", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    subprocess.run(["cp", "-r", f"{workplace.root}/.", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(workplace, small_disk: Path):
    """The jobs' database lies on it, too."""
    workplace.parquet("items.parquet", 300_000)
    settings = workplace.settings()
    store_settings = settings.store.model_copy(update={"path": str(small_disk)})
    settings = settings.model_copy(update={"store": store_settings})
    ledger: JobLedger = open_ledger(settings)
    owner = Owner.this_process()
    before = sorted(path.name for path in (small_disk / "catalogs").iterdir())

    def run(kind: JobKind, params: dict[str, Any]) -> Any:
        job, _ = ledger.begin(kind, params, owner)
        return Supervisor(settings, ledger, owner).run(job)

    try:
        source = {**SOURCE, "metadata_columns": ["*"]}
        failed = run(JobKind.REINDEX, {**REINDEX, "source": source})
        assert failed.error is not None, failed
        assert failed.error.type is JobErrorKind.DISK_FULL
        assert "nothing was left behind" in failed.error.message
        assert sorted(path.name for path in (small_disk / "catalogs").iterdir()) == before
        done = run(JobKind.UPDATE_ITEMS, {"deletes": ["W0"]})
        assert done.state is JobState.SUCCEEDED, done
    finally:
        ledger.close()


def test_a_reindex_waits_for_the_one_before(workplace):
    """And the next one for that."""
    workplace.parquet("items.parquet", 3_000)
    source = ["--source", str(workplace.lake / "items.parquet"), "--drop-constraint-sets"]
    command = [sys.executable, "-m", "server", "reindex", *source, "--activate", "--json"]
    flags = ["--store", str(workplace.root), "--jobs.batch-size", "64", "--jobs.threads", "1"]
    ledger = open_ledger(workplace.settings())
    with FileLock(workplace.root / CATALOG_LOCK):  # as the one before
        racers = [
            subprocess.Popen(
                [*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for _ in range(2)
        ]
        wait_until(
            lambda: (
                sum(job.message.startswith("waits for another") for job in ledger.running()) == 2
                or any(racer.poll() is not None for racer in racers)
            )
        )
    outputs = [racer.communicate(timeout=LIMIT_S) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], outputs
    for out, _ in outputs:
        assert "another job changes the catalog; waiting for it" in out
    jobs = ledger.find()
    ledger.close()
    assert {job.state for job in jobs} == {JobState.SUCCEEDED}
    assert len({job.result["catalog"] for job in jobs}) == 1
    check(workplace.store)
