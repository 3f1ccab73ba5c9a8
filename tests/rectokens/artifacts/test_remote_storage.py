"""A store in an object store: what is written last decides, and nothing is taken on trust."""

from __future__ import annotations

import json
import os
from pathlib import Path
from threading import Thread

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from rectokens.artifacts.activation import next_activation
from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.manifest import write_artifact
from rectokens.artifacts.remote_storage import RemoteStorage

A, B = ("a" * 16, "b" * 16)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return f"/remote-{tmp_path.name}"


@pytest.fixture
def memory() -> MemoryFileSystem:
    return fsspec.filesystem("memory")


@pytest.fixture
def storage(tmp_path, memory, prefix) -> RemoteStorage:
    return RemoteStorage(memory, prefix, tmp_path / "cache")


def add(storage: RemoteStorage, content: bytes = b"content") -> str:
    def populate(folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_bytes(content)
        (folder / "top").write_bytes(b"top")

    return write_artifact(storage.local.folder("tokenizer"), "tokenizer", populate).name


@pytest.fixture
def version(storage: RemoteStorage) -> str:
    version = add(storage)
    storage.publish("tokenizer", version)
    return version


def test_there_once_the_manifest_is(storage, memory, prefix, tmp_path, monkeypatch):
    version = add(storage)
    real = MemoryFileSystem.pipe_file

    def killed(self, path, *args, **kwargs):
        if path.endswith("manifest.json"):
            raise ConnectionError("gone")
        real(self, path, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", killed)
    with pytest.raises(ConnectionError):
        storage.publish("tokenizer", version)
    monkeypatch.undo()
    assert memory.exists(f"{prefix}/tokenizers/{version}/deep/file")
    assert storage.versions("tokenizer") == []
    elsewhere = RemoteStorage(memory, prefix, tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=f"tokenizer {version} in memory://.* does not exist"):
        elsewhere.fetch("tokenizer", version)
    assert elsewhere.clean(3600.0) == []
    assert elsewhere.clean(0.0) == [f"{prefix}/tokenizers/{version}"]
    assert not memory.exists(f"{prefix}/tokenizers/{version}")
    storage.publish("tokenizer", version)
    storage.publish("tokenizer", version)
    assert elsewhere.versions("tokenizer") == [version]
    folder = elsewhere.fetch("tokenizer", version)
    assert (folder / "deep" / "file").read_bytes() == b"content"


@pytest.mark.parametrize("name", ["deep/file", "top", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_refused_by_name(version, memory, prefix, tmp_path, name, damage):
    path = f"{prefix}/tokenizers/{version}/{name}"
    whole = memory.cat_file(path)
    if damage == "remove":
        memory.rm_file(path)
    else:
        flipped = bytes([whole[0] ^ 1]) + whole[1:]
        memory.pipe_file(path, flipped if damage == "flip" else whole[:-3])
    elsewhere = RemoteStorage(memory, prefix, tmp_path / "elsewhere")
    known = version if (name, damage) == ("manifest.json", "remove") else name.split("/")[-1]
    with pytest.raises(ArtifactError, match=known):
        elsewhere.fetch("tokenizer", version)
    assert elsewhere.local.versions("tokenizer") == []
    assert list((tmp_path / "elsewhere").glob("tokenizers/*")) == []


def test_a_manifest_cannot_write_outside_the_cache(version, memory, prefix, tmp_path):
    path = f"{prefix}/tokenizers/{version}/manifest.json"
    content = json.loads(memory.cat_file(path))
    content["files"]["../../../evil"] = content["files"].pop("top")
    memory.pipe_file(path, json.dumps(content).encode())
    elsewhere = RemoteStorage(memory, prefix, tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=r"file name '\.\./.*/evil' is not allowed"):
        elsewhere.fetch("tokenizer", version)
    assert not list(tmp_path.rglob("evil"))


def test_one_version_under_the_name_of_another(storage, version, memory, prefix, tmp_path):
    other = add(storage, b"other")
    memory.copy(f"{prefix}/tokenizers/{version}", f"{prefix}/tokenizers/{other}", recursive=True)
    elsewhere = RemoteStorage(memory, prefix, tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=f"of tokenizer version {version}"):
        elsewhere.fetch("tokenizer", other)


def test_a_damaged_cache_is_filled_again(storage, version):
    folder = storage.fetch("tokenizer", version)
    (folder / "top").write_bytes(b"tip")
    assert storage.fetch("tokenizer", version) == folder
    assert (folder / "top").read_bytes() == b"top"
    os.remove(folder / "manifest.json")
    storage.fetch("tokenizer", version)
    assert (folder / "manifest.json").exists()


def test_several_fetch_into_one_cache(tmp_path):
    # Not in memory: that file system hands one file position to all readers.
    bucket = (fsspec.filesystem("file"), str(tmp_path / "bucket"))
    origin = RemoteStorage(*bucket, tmp_path / "cache")
    version = add(origin)
    origin.publish("tokenizer", version)
    shared = [RemoteStorage(*bucket, tmp_path / "shared") for _ in range(4)]
    found, threads = [], []
    for one in shared:
        threads.append(Thread(target=lambda s=one: found.append(s.fetch("tokenizer", version))))
        threads[-1].start()
    for thread in threads:
        thread.join(240)
    assert found == [tmp_path / "shared" / "tokenizers" / version] * 4
    assert [p.name for p in found[0].parent.iterdir()] == [version]


def test_removal(storage, version, memory, prefix):
    storage.remove("tokenizer", version)
    assert storage.versions("tokenizer") == []
    assert memory.find(f"{prefix}/tokenizers") == []
    assert storage.local.versions("tokenizer") == []
    storage.remove("tokenizer", version)


def test_the_cache_follows_the_store(storage, version, memory, prefix, tmp_path):
    elsewhere = RemoteStorage(memory, prefix, tmp_path / "elsewhere")
    folder = elsewhere.fetch("tokenizer", version)
    storage.remove("tokenizer", version)
    assert elsewhere.clean(3600.0) == []
    assert elsewhere.clean(0.0) == [str(folder)]


def test_exactly_one_is_first(storage, memory, prefix, tmp_path):
    other = RemoteStorage(memory, prefix, tmp_path / "other")
    first = next_activation(None, A, "mine")
    assert storage.commit(first)
    assert not other.commit(next_activation(None, B, "yours"))
    assert other.current() == first
    assert other.commit(next_activation(first, B, None))
    assert [record.release for record in storage.history()] == [A, B]


def test_a_half_written_record_decides_nothing(storage, memory, prefix):
    first = next_activation(None, A, None)
    storage.commit(first)
    memory.pipe_file(f"{prefix}/activations/{2:012d}.json", b'{"format"')
    assert storage.current() == first
    assert not storage.commit(next_activation(first, B, None))
    assert storage.clean(0.0) == [f"{prefix}/activations/{2:012d}.json"]
    assert storage.commit(next_activation(first, B, None))


def test_a_file_system_that_overwrites_is_refused(tmp_path, prefix):
    class Careless(MemoryFileSystem):
        protocol = "careless"

        def pipe_file(self, path, value, mode="overwrite", **kwargs):
            super().pipe_file(path, value)

    storage = RemoteStorage(Careless(), prefix, tmp_path / "cache")
    with pytest.raises(ArtifactError, match="Careless cannot write an object only if"):
        storage.commit(next_activation(None, A, None))
    assert storage.current() is None
