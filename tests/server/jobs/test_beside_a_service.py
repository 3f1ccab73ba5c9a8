"""A service on a store runs its jobs, tries what they made, and serves it."""

from __future__ import annotations

import re
import subprocess
import sys

import httpx

from server.jobs.places import open_ledger
from server.jobs.types import Job, JobErrorKind, JobKind, JobState
from tests.waiting import LIMIT_S, ended, wait_until

REQUESTS = [{"history": [f"W{i}"], "top_k": 5} for i in range(4)]


def test_a_service_serves_what_its_jobs_made(workplace):
    command = [sys.executable, "-m", "server", "serve", "--store.path", str(workplace.root)]
    flags = ["--port", "0", "--store.poll-s", "0.2", "--jobs.threads", "1", "--cpu-threads", "1"]
    log = workplace.root.parent / "log"
    with log.open("wb") as errors:
        service = subprocess.Popen([*command, *flags], stderr=errors)
    ledger = open_ledger(workplace.settings())

    def done(kind: JobKind, **params) -> Job:
        job = ledger.submit(kind, params)
        wait_until(lambda: ledger.get(job.id).state.finished, log.read_text)
        return ledger.get(job.id)

    try:
        base = ready(log, service)
        gate = {"requests": REQUESTS, "min_overlap": 0.0}
        upsert = {"item_id": "cold", "embedding": workplace.rows[3].tolist(), "prior": 9.0}
        job = done(JobKind.UPDATE_ITEMS, upserts=[upsert], gate=gate)
        assert job.state is JobState.SUCCEEDED, (job, log.read_text())
        assert job.result["gate"]["state"] == "passed"
        assert job.result["gate"]["replay"]["compared"] == len(REQUESTS)
        assert [one["state"] for one in job.result["servers"]] == ["serving"]
        request = {"history": ["cold"], "top_k": 201, "beam_width": 500, "exclude_history": False}
        answer = httpx.post(f"{base}/v1/recommend", json=request, timeout=LIMIT_S).json()
        assert answer["catalog_version"] == job.result["catalog"]
        assert "cold" in [item["item_id"] for item in answer["items"]]

        blocked = done(
            JobKind.UPDATE_ITEMS, deletes=["W0"], gate={**gate, "max_latency_ratio": 1e-9}
        )
        assert (blocked.state, blocked.error.type) == (JobState.FAILED, JobErrorKind.GATE)
        assert workplace.store.active().release == job.result["release"]

        back = done(JobKind.ROLLBACK)
        assert [one["state"] for one in back.result["servers"]] == ["serving"]
        answer = httpx.post(f"{base}/v1/recommend", json=REQUESTS[0], timeout=LIMIT_S).json()
        assert answer["catalog_version"] == back.result["catalog"]
    finally:
        service.terminate()
        code = ended(service, log.read_text)
        ledger.close()
    assert code == 0, log.read_text()


def ready(log, service: subprocess.Popen) -> str:
    def base_url() -> str | None:
        assert service.poll() is None, log.read_text()
        if not (found := re.search(r'"port":(\d+)', log.read_text())):
            return None
        base = f"http://127.0.0.1:{found[1]}"
        return base if httpx.get(f"{base}/ready", timeout=LIMIT_S).status_code == 200 else None

    return str(wait_until(base_url, log.read_text))
