"""Redis dies under a service and a worker that keep their jobs in it, and comes back."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.jobs.backend import BackendError, open_backend
from tests.waiting import until

KEY = "a-key-of-the-tests"
ITEMS = {"deletes": ["1-0"], "activate": True}


class Redis:
    """Of our own, on a socket file, its data on disk."""

    def __init__(self, folder: Path) -> None:
        binary = shutil.which("redis-server")
        if binary is None:
            pytest.skip("redis-server is not installed")
        pytest.importorskip("redis")
        self._folder = folder
        self._command = [binary, "--port", "0", "--unixsocket", str(folder / "s")]
        self._command += ["--appendonly", "yes", "--appendfsync", "always"]
        self.url = f"unix://{folder / 's'}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, cwd=self._folder, stdout=subprocess.DEVNULL)
        ends = time.monotonic() + 30
        while True:
            try:
                open_backend(self.url, "ping").close()
                return
            except BackendError:
                assert time.monotonic() < ends
                time.sleep(0.05)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    server = Redis(tmp_path_factory.mktemp("r"))
    server.start()
    yield server
    server.kill()


async def test_requests_go_on_and_jobs_wait_for_it(
    start_app: Callable[..., Any], small_store: Any, redis: Redis, tmp_path: Path
) -> None:
    flags = {"jobs.database": redis.url, "jobs.keep-process-ready": None}
    running = await start_app(
        store__path=str(small_store.root),
        store__poll_s="0.05",
        jobs__database=redis.url,
        jobs__folder=str(tmp_path / "service"),
        admin__keys=KEY,
    )
    running.client.headers["Authorization"] = f"Bearer {KEY}"
    command = [sys.executable, "-m", "server", "worker", "--store", str(small_store.root)]
    command += ["--jobs.database", flags["jobs.database"], "--jobs.no-keep-process-ready"]
    log = tmp_path / "worker.log"
    with log.open("wb") as file:
        worker = subprocess.Popen(command, stderr=file)

    def alive() -> bool:
        assert worker.poll() is None, log.read_text()
        return True

    def ready() -> bool:
        return alive() and "worker ready" in log.read_text()

    async def ended(job_id: str) -> Any:
        async def job() -> Any:
            alive()
            response = await running.client.get(f"/admin/jobs/{job_id}")
            known = response.status_code == 200
            return response.json() if known and response.json()["finished_at"] else None

        return await until(job, log.read_text)

    try:
        # One that found no database when it began would have ended, and rightly.
        await until(ready, log.read_text)
        redis.kill()
        for response in (
            await running.client.get("/admin/jobs"),
            await running.client.patch("/admin/items", json=ITEMS),
        ):
            assert response.status_code == 503, response.text
            assert response.json()["error"]["code"] == "store_unavailable"
        assert (await running.post({"history": ["1-3"], "top_k": 2})).status_code == 200
        assert (await running.client.get("/ready")).status_code == 200
        assert worker.poll() is None, log.read_text()

        redis.start()
        response = await running.client.patch("/admin/items", json=ITEMS)
        assert response.status_code == 202, response.text
        job = response.json()["id"]
        # Dies again with the job in it, which is on its disk.
        redis.kill()
        redis.start()
        done = await ended(job)
        assert done["state"] == "succeeded", (done, log.read_text())
        assert worker.poll() is None
        assert (await running.post({"history": ["1-3"], "top_k": 2})).status_code == 200
    finally:
        worker.terminate()
        worker.wait(60)
