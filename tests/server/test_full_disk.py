"""A store on a disk without a byte to spare, under a service that follows it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

KEY = "a-key-of-the-tests"


@pytest.fixture
def small_disk(small_store: Any, tmp_path: Path) -> Iterator[Path]:
    """The store, moved to a file system with little to spare."""
    place = tmp_path / "small"
    place.mkdir()
    used = sum(path.stat().st_size for path in small_store.root.rglob("*")) // 1024
    command = ["mount", "-t", "tmpfs", "-o", f"size={used + 2_000}k", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    shutil.copytree(small_store.root, place, dirs_exist_ok=True)
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(folder: Path) -> Path:
    """Take every byte that is left."""
    name = folder / "ballast"
    descriptor = os.open(name, os.O_CREAT | os.O_WRONLY)
    try:
        for size in (1 << 16, 1 << 12, 1):
            while True:
                try:
                    os.write(descriptor, b"x" * size)
                except OSError as error:
                    if error.errno == errno.ENOSPC:
                        break
                    raise
    finally:
        os.close(descriptor)
    return name


async def test_requests_are_answered_and_changes_refused_until_there_is_room(
    start_app: Callable[..., Any], small_disk: Path
) -> None:
    running = await start_app(store__path=str(small_disk), store__poll_s="0.02", admin__keys=KEY)
    running.client.headers["Authorization"] = f"Bearer {KEY}"
    assert (await running.client.get("/admin/jobs")).status_code == 200
    ballast = fill(small_disk)
    for _ in range(20):
        assert (await running.post({"history": ["1-3"], "top_k": 2})).status_code == 200
    upload = await running.client.post("/admin/uploads?format=npy", content=b"x" * 200_000)
    assert (upload.status_code, upload.json()["error"]["code"]) == (507, "disk_full")
    change = await running.client.patch("/admin/items", json={"deletes": ["1-0"]})
    assert change.status_code in (202, 503), change.text
    if change.status_code == 503:  # the jobs' database needs room as well
        assert change.json()["error"]["code"] == "store_unavailable"
    assert (await running.client.get("/ready")).status_code == 200
    assert await running.metric("rectokens_release_behind") == 0

    ballast.unlink()
    upload = await running.client.post("/admin/uploads?format=npy", content=b"x" * 200_000)
    assert upload.status_code == 201
    assert (
        await running.client.patch("/admin/items", json={"deletes": ["1-1"]})
    ).status_code == 202
    assert (await running.post({"history": ["1-3"], "top_k": 2})).status_code == 200
