"""A store in a folder: the pointer, the history, the lock, and disks that fill up."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from rectokens.artifacts import files
from rectokens.artifacts.activation import next_activation, to_line
from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.local_storage import LocalStorage
from rectokens.artifacts.manifest import write_artifact
from rectokens.artifacts.storage import StoreBusyError
from rectokens.core import atomic_file

A, B, C = ("a" * 16, "b" * 16, "c" * 16)


def commit(storage: LocalStorage, version: str) -> bool:
    return storage.commit(next_activation(storage.current(), version, None))


def add_tokenizer(storage: LocalStorage, content: bytes) -> Path:
    return write_artifact(
        storage.local.folder("tokenizer"),
        "tokenizer",
        lambda folder: (folder / "file").write_bytes(content),
    )


def test_only_the_next_number_is_committed(tmp_path: Path):
    storage = LocalStorage(tmp_path)
    first = next_activation(None, A, None)
    second = next_activation(first, B, None)
    assert not storage.commit(second)
    assert storage.current() is None
    assert storage.commit(first)
    assert not storage.commit(first)
    assert storage.commit(second)
    assert LocalStorage(tmp_path).history() == [first, second]
    assert (tmp_path / "history.jsonl").read_bytes() == to_line(first) + to_line(second)


@pytest.mark.parametrize("cut", [1, 10, 10_000])
def test_a_history_cut_short_is_repaired(tmp_path: Path, cut: int):
    storage = LocalStorage(tmp_path)
    commit(storage, A)
    commit(storage, B)
    history = tmp_path / "history.jsonl"
    os.truncate(history, max(history.stat().st_size - cut, 0))
    releases = [record.release for record in storage.history()]
    assert releases == ([B] if cut > 1000 else [A, B])  # the pointer's own record is never lost
    commit(storage, C)
    assert [record.release for record in storage.history()] == [*releases, C]
    assert history.read_bytes().count(b"\n") == len(releases) + 1
    assert history.read_bytes().endswith(to_line(storage.current()))


def test_garbage_in_the_history_harms_nobody(tmp_path: Path):
    storage = LocalStorage(tmp_path)
    commit(storage, A)
    with open(tmp_path / "history.jsonl", "ab") as file:
        file.write(b"\xff\x00 nonsense\n{}\nhalf a li")
    commit(storage, B)
    assert [record.release for record in storage.history()] == [A, B]


def test_a_damaged_pointer_is_named(tmp_path: Path):
    storage = LocalStorage(tmp_path)
    commit(storage, A)
    (tmp_path / "active.json").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"active\.json is not valid JSON"):
        storage.current()
    with pytest.raises(ArtifactError, match=r"active\.json"):
        storage.commit(next_activation(None, B, None))


def test_full_disk_while_the_pointer_is_written(tmp_path: Path, monkeypatch):
    storage = LocalStorage(tmp_path)
    commit(storage, A)
    before = (tmp_path / "active.json").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        commit(storage, B)
    monkeypatch.undo()
    assert (tmp_path / "active.json").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} <= {"active.json", "history.jsonl", ".lock"}
    assert commit(storage, B)


def test_a_commit_whose_folder_cannot_be_synced_has_been_made(tmp_path: Path, monkeypatch):
    """Whoever is told otherwise, and tries again, rolls back twice."""
    storage = LocalStorage(tmp_path)
    assert commit(storage, A)

    def broken(folder: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(atomic_file, "fsync_folder", broken)
    assert commit(storage, B)
    monkeypatch.undo()
    assert [record.release for record in storage.history()] == [A, B]


def test_a_real_full_disk(tmp_path: Path):
    """Where a small file system can be mounted."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        storage = LocalStorage(tmp_path)
        small = add_tokenizer(storage, b"small")
        commit(storage, A)
        with pytest.raises(OSError, match="No space left"):
            add_tokenizer(storage, os.urandom(200_000))
        assert [path.name for path in storage.local.folder("tokenizer").iterdir()] == [small.name]
        assert storage.current().release == A
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "rest").write_bytes(os.urandom(200_000))
        with pytest.raises(OSError, match="No space left"):
            commit(storage, B)
        assert storage.current().release == A
        storage.manifest("tokenizer", small.name)
        (tmp_path / "rest").unlink()
        assert commit(storage, B)
        assert [record.release for record in storage.history()] == [A, B]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_the_lock(tmp_path: Path):
    one, two = LocalStorage(tmp_path), LocalStorage(tmp_path, lock_timeout_s=0.1)
    with one.exclusive(), one.exclusive():
        assert commit(one, A)  # may be entered again
        with pytest.raises(StoreBusyError, match=r"held by another process for 0\.1 s"):
            commit(two, B)
        answers = []
        other = threading.Thread(target=lambda: answers.append(commit(one, B)))
        other.start()
        time.sleep(0.1)
        assert answers == []
    other.join(60)
    assert answers == [True]
    assert two.current().release == B


def test_removal_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch):
    storage = LocalStorage(tmp_path)
    folder = add_tokenizer(storage, b"x")
    monkeypatch.setattr("shutil.rmtree", lambda *args, **kwargs: None)  # killed in the middle
    storage.remove("tokenizer", folder.name)
    monkeypatch.undo()
    assert storage.versions("tokenizer") == []
    assert storage.local.versions("tokenizer") == []
    (leftover,) = storage.local.folder("tokenizer").iterdir()
    storage.remove("tokenizer", folder.name)  # once more does no harm
    assert storage.clean(3600.0) == []
    assert storage.clean(0.0) == [str(leftover)]
    assert add_tokenizer(storage, b"x") == folder


def test_leftovers_of_killed_writers(tmp_path: Path):
    storage = LocalStorage(tmp_path)
    folder = storage.local.folder("catalog")
    (folder / ".partial-1-abc").mkdir(parents=True)
    (folder / ("0" * 16)).mkdir()  # no manifest: not a version
    (tmp_path / ".partial-2-abc.json").write_text("x")
    assert storage.versions("catalog") == []
    old = time.time() - 7200
    os.utime(tmp_path / ".partial-2-abc.json", (old, old))
    assert storage.clean(3600.0) == [str(tmp_path / ".partial-2-abc.json")]
    assert storage.clean(0.0) == [str(folder / ".partial-1-abc")]
