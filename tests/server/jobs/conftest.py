from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.jobs.backend import Backend, BackendError, open_backend
from server.jobs.ledger import JobLedger


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[Backend]:
    opened = open_backend(tmp_path / "jobs.sqlite3", "test")
    yield opened
    opened.close()


@pytest.fixture
def ledger(backend: Backend) -> JobLedger:
    return JobLedger(backend, max_queued=5, keep_finished=3)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis of our own, on a socket file."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed")
    pytest.importorskip("redis")
    # A socket's path must be short.
    socket = Path(tmp_path_factory.mktemp("r", numbered=True)) / "s"
    command = [binary, "--port", "0", "--unixsocket", str(socket), "--save", ""]
    process = subprocess.Popen(command, cwd=socket.parent, stdout=subprocess.DEVNULL)
    url = f"unix://{socket}"
    try:
        _wait_for(url)
        yield url
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL of our own, on a socket file."""
    initdb, postgres = shutil.which("initdb"), shutil.which("postgres")
    if initdb is None or postgres is None:
        pytest.skip("PostgreSQL is not installed")
    pytest.importorskip("psycopg")
    # It refuses to run as root, and a socket's path must be short.
    user = "nobody" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    data = folder / "data"
    if user is not None:
        shutil.chown(folder, user)
    made = subprocess.run(
        [initdb, "-D", str(data), "-A", "trust", "-U", "test", "--no-sync"],
        user=user,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        shutil.rmtree(folder)
        pytest.skip(f"initdb does not run here: {made.stderr.strip().splitlines()[-1:]}")
    command = [postgres, "-D", str(data), "-k", str(folder), "-c", "listen_addresses=", "-F"]
    process = subprocess.Popen(
        command, user=user, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"postgresql://test@/postgres?host={folder}"
    try:
        _wait_for(url)
        yield url
    finally:
        process.send_signal(signal.SIGINT)  # ends without waiting for connections
        process.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(url: str) -> None:
    for _ in range(400):
        try:
            open_backend(url, "ping").close()
        except BackendError:
            time.sleep(0.05)
        else:
            return
    pytest.fail(f"{url} does not answer")
