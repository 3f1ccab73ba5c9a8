"""Uploads: streamed, bounded, and nothing left of one that fails."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from server.uploads import UploadError, UploadFolder, UploadWriter
from tests.full_disk import file_size_limit
from tests.waiting import until


def files_in(small_store):
    folder = small_store.root / ".jobs" / "uploads"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


async def chunks(number, size=1_000):
    for _ in range(number):
        yield b"x" * size


async def test_an_upload_is_there_under_a_name_of_ours(admin, small_store):
    content = os.urandom(9_000_000)
    response = await admin.request("POST", "/uploads?format=parquet", content=content)
    assert response.status_code == 201, response.text
    body = response.json()
    assert body["root"] == "uploads"
    assert body["bytes"] == len(content)
    assert body["sha256"] == hashlib.sha256(content).hexdigest()
    assert files_in(small_store) == [body["path"]]
    assert body["path"].endswith(".parquet")
    path = small_store.root / ".jobs" / "uploads" / body["path"]
    assert path.read_bytes() == content

    assert (await admin.get("/uploads")).json()["uploads"] == [
        {"root": "uploads", "path": body["path"], "bytes": len(content)}
    ]
    assert (await admin.request("DELETE", f"/uploads/{body['path']}")).status_code == 204
    assert files_in(small_store) == []
    assert (await admin.request("DELETE", f"/uploads/{body['path']}")).status_code == 404


async def test_nothing_but_an_upload_is_deleted(admin, small_store):
    await admin.request("POST", "/uploads?format=npy", content=b"x")
    for path in ("..%2f..%2factive.json", "active.json", ".partial-x", "%2e%2e"):
        response = await admin.request("DELETE", f"/uploads/{path}")
        assert response.status_code in (404, 405)
    assert (small_store.root / "active.json").exists()
    assert len(files_in(small_store)) == 1


async def test_the_format_is_one_of_a_few_and_there_is_something_in_it(admin, small_store):
    for query in ("", "?format=", "?format=exe", "?format=..%2fx"):
        response = await admin.request("POST", f"/uploads{query}", content=b"x")
        assert response.status_code == 422
    response = await admin.request("POST", "/uploads?format=npy", content=b"")
    assert (response.status_code, response.json()["error"]["code"]) == (422, "invalid_value")
    assert files_in(small_store) == []


async def limited(start_app, small_store, **flags):
    running = await start_app(
        store__path=str(small_store.root),
        admin__keys="k" * 20,
        jobs__start_worker=False,
        **flags,
    )
    running.client.headers["Authorization"] = "Bearer " + "k" * 20
    return running


@pytest.mark.parametrize("declared", [True, False])
async def test_over_the_limit_nothing_is_left_behind(start_app, small_store, declared):
    running = await limited(start_app, small_store, admin__max_upload_bytes="50000")
    content = b"x" * 60_000 if declared else chunks(60)
    response = await running.client.post("/admin/uploads?format=npy", content=content)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert files_in(small_store) == []


async def test_all_uploads_together_are_bounded(start_app, small_store):
    running = await limited(start_app, small_store, admin__max_uploads_bytes="50000")
    url = "/admin/uploads?format=npy"
    assert (await running.client.post(url, content=chunks(30))).status_code == 201
    response = await running.client.post(url, content=chunks(30))
    assert (response.status_code, response.json()["error"]["code"]) == (507, "disk_full")
    assert "at most 50000" in response.json()["error"]["message"]
    assert len(files_in(small_store)) == 1


async def test_a_client_that_is_too_slow_or_leaves_leaves_nothing_behind(start_app, small_store):
    running = await limited(start_app, small_store, admin__upload_timeout_s="0.2")

    async def slow():
        yield b"x" * 5_000_000
        await asyncio.sleep(1)
        yield b"x"

    response = await running.client.post("/admin/uploads?format=npy", content=slow())
    assert (response.status_code, response.json()["error"]["code"]) == (408, "body_timeout")
    assert files_in(small_store) == []

    # That one time was short is nothing to the other.
    running = await limited(start_app, small_store)

    async def endless():
        while True:
            yield b"x" * 100_000
            await asyncio.sleep(0.001)

    task = asyncio.create_task(running.client.post("/admin/uploads?format=npy", content=endless()))
    await until(lambda: files_in(small_store))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until(lambda: not files_in(small_store))


async def test_an_upload_that_is_given_up_as_it_begins_leaves_nothing_behind(
    start_app, small_store, monkeypatch
):
    running = await limited(start_app, small_store)
    begin, entered, go = UploadFolder.begin, threading.Event(), threading.Event()

    def slow(self, suffix):
        entered.set()
        go.wait(60)
        return begin(self, suffix)

    monkeypatch.setattr(UploadFolder, "begin", slow)
    sending = asyncio.create_task(running.client.post("/admin/uploads?format=npy", content=b"x"))
    await asyncio.to_thread(entered.wait, 60)
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    gone = asyncio.Event()
    discard = UploadWriter.discard

    def told(self):
        discard(self)
        gone.set()

    monkeypatch.setattr(UploadWriter, "discard", told)
    go.set()
    async with asyncio.timeout(60):
        await gone.wait()
    assert files_in(small_store) == []


def test_a_full_disk_leaves_nothing(tmp_path):
    folder = UploadFolder(tmp_path, 6_000)
    writer = folder.begin("npy")
    with file_size_limit(4_096):
        with pytest.raises(UploadError, match="disk is full"):
            writer.write(b"x" * 5_000)
        writer.discard()  # what it still had to write has no room either
    assert list(tmp_path.iterdir()) == []
    writer = folder.begin("npy")
    writer.write(b"x" * 5_000)
    assert writer.finish().num_bytes == 5_000


def test_a_file_that_cannot_be_renamed_is_not_left(tmp_path, monkeypatch):
    folder = UploadFolder(tmp_path, 6_000)
    writer = folder.begin("npy")
    writer.write(b"x" * 5_000)

    def full(source, target):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(UploadError, match="disk is full"):
        writer.finish()
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_old_uploads_and_stale_partials_go_with_the_next(tmp_path):
    folder = UploadFolder(tmp_path, 1 << 30)
    writer = folder.begin("csv")
    writer.write(b"x")
    old = tmp_path / writer.finish().name
    stale = tmp_path / ".partial-of-a-dead-process"
    stale.write_bytes(b"x")
    foreign = tmp_path / "not-ours.txt"
    foreign.write_bytes(b"x")
    for path in (old, stale, foreign):
        os.utime(path, (time.time() - 10 * 86_400,) * 2)
    folder.begin("csv").discard()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["not-ours.txt"]


def test_what_a_killed_process_was_sent_takes_no_room_for_long(tmp_path):
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from server.uploads import UploadFolder\n"
        "UploadFolder(Path(sys.argv[1]), 1_000).begin('npy').write(b'x' * 900)\n"
        "os._exit(9)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == 9
    (left,) = tmp_path.iterdir()
    folder = UploadFolder(tmp_path, 1_000)
    live = folder.begin("csv")
    (ours,) = set(tmp_path.iterdir()) - {left}
    for path in (left, ours):
        os.utime(path, (time.time() - 120,) * 2)
    writer = folder.begin("npy")
    writer.write(b"y" * 900)
    writer.finish()
    live.write(b"z")
    assert live.finish().num_bytes == 1
    assert not left.exists()


def test_uploads_side_by_side_do_not_see_each_other_go(tmp_path, monkeypatch):
    """Between the listing of a folder and the look at its files, others may have ended."""
    folder = UploadFolder(tmp_path, 1 << 30)
    writer, other = folder.begin("npy"), folder.begin("npy")
    other.write(b"x")
    gone = other.finish()
    listed = list(tmp_path.iterdir())
    folder.remove(gone.name)
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(listed))
    writer.write(b"x")
    stored = writer.finish()
    assert folder.stored() == []  # what was listed before it was whole
    folder.remove_old()
    monkeypatch.undo()
    assert [one.name for one in folder.stored()] == [stored.name]
