"""The commands on a store without a server: what they print, and how they exit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from rectokens.catalog.source_limits import SourceLimits
from server.cli import app
from server.jobs import insist
from server.jobs.commands import located, run_command
from server.jobs.lanes import Lane
from server.jobs.ledger import JobLedger
from server.jobs.owner import Owner
from server.jobs.params import ItemSourceParams
from server.jobs.places import open_ledger
from server.jobs.sources import open_source
from server.jobs.types import Job, JobFailure, JobKind, JobState
from server.settings import load_settings
from tests.waiting import LIMIT_S, wait_until


@pytest.fixture
def invoke(workplace):
    runner = CliRunner()

    def run(command: str, *arguments: str):
        flags = ["--store", str(workplace.root), "--jobs.threads", "1"]
        return runner.invoke(app, [command, *arguments, *flags])

    return run


def test_from_training_to_a_rollback(workplace, invoke):
    np.save(workplace.lake / "e.npy", workplace.rows)
    trained = invoke(
        "train-tokenizer", "--source", str(workplace.lake / "e.npy"), "--epochs", "1",
        "--codebook-size", "4",
    )  # fmt: skip
    assert trained.exit_code == 0, trained.output
    version = trained.stdout.strip()
    assert version in {one.version for one in workplace.store.versions("tokenizer")}

    workplace.parquet("items.parquet", 50)
    source = ("--source", str(workplace.lake / "items.parquet"), "--drop-constraint-sets")
    refused = invoke("reindex", *source, "--tokenizer", version, "--activate")
    assert refused.exit_code == 1
    assert "cannot speak of what tokenizer" in refused.stderr

    # A link to a file elsewhere may be named on the command line, though not in a request.
    link = workplace.root.parent / "latest.parquet"
    link.symlink_to(workplace.lake / "items.parquet")
    source = ("--source", str(link), "--drop-constraint-sets")
    made = invoke("reindex", *source, "--metadata-columns", "stock,popularity")
    assert made.exit_code == 0, made.output
    catalog = made.stdout.strip()
    assert "50 items" in made.stderr
    before = workplace.store.active().release
    activated = invoke("activate", "--catalog", catalog, "--note", "by hand", "--json")
    assert activated.exit_code == 0, activated.output
    job = json.loads(activated.stdout)
    assert (job["state"], job["result"]["catalog"]) == ("succeeded", catalog)
    assert job["parameters"] == {"catalog": catalog, "note": "by hand"}
    assert workplace.store.active().note == "by hand"
    back = json.loads(invoke("rollback", "--skip-gate", "--json").stdout)
    assert back["result"]["release"] == before
    assert back["parameters"] == {"gate": {"skip": True}}

    listed = invoke("jobs")
    assert listed.exit_code == 0
    assert listed.stdout.count("succeeded") == 4
    shown = invoke("jobs", job["id"])
    assert "state: succeeded\n" in shown.stdout
    again = invoke("jobs", job["id"], "--restart")
    assert again.exit_code == 1
    assert "only failed, cancelled and interrupted" in again.stderr


def test_jobs_are_cancelled_and_restarted(workplace, invoke):
    ledger = open_ledger(workplace.settings())
    job = ledger.submit(JobKind.UPDATE_ITEMS, {"deletes": ["W0"]})
    assert "state: cancelled" in invoke("jobs", job.id, "--cancel").stdout
    assert "attempt: 2" in invoke("jobs", job.id, "--restart").stdout
    listed = invoke("jobs", "--json")
    assert [json.loads(line)["state"] for line in listed.stdout.splitlines()] == ["queued"]
    ledger.close()


@pytest.mark.parametrize(
    ("state", "code"), [(JobState.SUCCEEDED, 0), (JobState.CANCELLED, 1)], ids=str
)
def test_a_job_is_followed_to_its_end(workplace, invoke, state: JobState, code: int):
    ledger = open_ledger(workplace.settings())
    job = ledger.submit(JobKind.UPDATE_ITEMS, {"deletes": ["W0"]})
    running = ledger.claim(Lane.CATALOG, Owner.this_process())
    assert running is not None
    ending = threading.Timer(1.0, ledger.finish, (running, state), {"message": "it is over"})
    ending.start()
    followed = invoke("jobs", job.id, "--follow")
    ending.join()
    ledger.close()
    assert followed.exit_code == code, followed.output
    assert f"state: {state}\nattempt: 1\nmessage: it is over\n" in followed.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("activate",), 2, "give one of release and catalog"),
        (("activate", "--release", "../x"), 2, "release is '../x'"),
        (("activate", "--release", "0" * 16), 1, "does not exist"),
        (("rollback",), 1, "nothing to roll back to"),
        (("jobs", "nobody"), 1, "there is no such job"),
        (("jobs", "--cancel"), 2, "name the job"),
        (("reindex", "--source", "/nowhere/x.parquet"), 1, "error: /nowhere: No such file"),
        (("jobs", "--jobs.database", "mysql://x"), 1, "allowed are a file"),
        (("jobs", "--jobs.namespace", "a b"), 2, "RECTOKENS_JOBS__NAMESPACE"),
    ],
)
def test_mistakes(invoke, arguments, code: int, message: str):
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr


def test_a_source_is_named_as_it_was_given(workplace, monkeypatch):
    lake, limits = workplace.lake, SourceLimits(1_000, 1_000_000)
    workplace.parquet("items.parquet", 50)
    (lake / "ids.txt").write_text("a\nb\n")
    # Of a link it is what it leads to that is read.
    (lake.parent / "link.parquet").symlink_to(lake / "items.parquet")
    here = str(lake / "items.parquet")

    def refused(*files: str, **params: str) -> str:
        settings, root, paths = located(load_settings({}), *map(Path, files))
        ids = {"ids": paths[1]} if len(paths) > 1 else {}
        source = ItemSourceParams(root=root, path=paths[0], **ids, **params)
        with (
            pytest.raises(JobFailure) as error,
            open_source(source, settings.admin.source_folders, limits),
        ):
            pass
        return error.value.message

    monkeypatch.chdir(lake.parent)
    for given, shown in [("lake/items.parquet", None), (here, None), ("link.parquet", here)]:
        message = refused(given, id_column="name")
        assert message.startswith(f"{shown or given} has no column 'name'")
    few = "lake/items.parquet has 50 embeddings, but there are 2"
    assert refused("lake/items.parquet", "lake/ids.txt").startswith(few)
    few = f"{here} has 50 embeddings, but there are 2"
    assert refused("lake/items.parquet", str(lake / "ids.txt")).startswith(few)
    assert refused("lake/no.parquet") == "lake/no.parquet: No such file or directory"
    assert refused("nowhere/no.parquet") == "nowhere: No such file or directory"
    monkeypatch.chdir(lake)
    assert refused("items.parquet", id_column="name").startswith("items.parquet has no column")
    assert refused("../lake/no.parquet") == "../lake/no.parquet: No such file or directory"


def test_without_a_store():
    result = CliRunner().invoke(app, ["jobs"])
    assert result.exit_code == 2
    assert "--store.path" in result.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("jobs",),
        ("jobs", "some"),
        ("activate", "--release", "0" * 16),
        ("rollback",),
        ("reindex", "--source", "x.npy"),
    ],
)
def test_a_mistyped_store_is_not_begun(tmp_path: Path, command):
    result = CliRunner().invoke(app, [*command, "--store", str(tmp_path / "stroe")])
    assert result.exit_code == 2, result.output
    assert "there is no such folder" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_cancels(workplace):
    workplace.parquet("items.parquet", 30_000)
    command = [sys.executable, "-m", "server", "reindex", "--store", str(workplace.root)]
    flags = ["--source", str(workplace.lake / "items.parquet"), "--jobs.batch-size", "1"]
    process = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True)
    ledger = open_ledger(workplace.settings())

    def encodes() -> bool:
        assert process.poll() is None, process.communicate()
        return any(job.message.startswith("encoding:") for job in ledger.running())

    wait_until(encodes)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=LIMIT_S)[1]
    assert process.returncode == 130, error
    assert "error: cancelled" in error
    assert ledger.find()[0].state == "cancelled"
    ledger.close()


@pytest.fixture
def not_for_ever() -> Iterator[None]:
    """What waits for itself is ended."""

    def end(number: int, frame: object) -> None:
        raise TimeoutError("still waiting")

    handlers = {
        one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    }
    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, 30.0)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    for one, handler in handlers.items():
        signal.signal(one, handler)


@pytest.mark.parametrize("away", [False, True])
def test_a_signal_while_the_record_is_written_cancels(
    workplace, not_for_ever, monkeypatch, away: bool
):
    """A record is written under a lock, and by the thread that handles signals."""
    workplace.parquet("items.parquet", 30_000)
    monkeypatch.setattr(insist, "PAUSE_S", 0.01)
    heartbeat, cancel = JobLedger.heartbeat, JobLedger.cancel
    sent: list[int] = []
    failures = [ConnectionError("the database is away")] if away else []

    def interrupted(self: JobLedger, job: Job, owner: Owner) -> None:
        heartbeat(self, job, owner)
        if owner.child is not None and not sent:
            sent.append(1)
            with self._backend.records._storage.lock:
                signal.raise_signal(signal.SIGTERM)

    def unsteady(self: JobLedger, job_id: str) -> Job:
        if failures:
            raise failures.pop()
        return cancel(self, job_id)

    monkeypatch.setattr(JobLedger, "heartbeat", interrupted)
    monkeypatch.setattr(JobLedger, "cancel", unsteady)
    settings = workplace.settings(batch_size=1)
    params = {"source": {"root": "lake", "path": "items.parquet"}, "constraint_sets": "drop"}
    code = run_command(settings, JobKind.REINDEX, params, printed="catalog")
    assert code == 128 + signal.SIGTERM
    ledger = open_ledger(settings)
    assert [job.state for job in ledger.find()] == [JobState.CANCELLED]
    ledger.close()
