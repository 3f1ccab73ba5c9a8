"""A store in an object store: what is written last decides, and nothing is taken on trust."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from rectokens.artifacts.activation import next_activation, to_line
from rectokens.artifacts.errors import ArtifactError, UnreadableError
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


@pytest.fixture
def fail(monkeypatch) -> Callable[..., None]:
    """``fail("info", "manifest.json", error)``: requests for such paths get the error."""

    def fail(method: str, ending: str, error: Exception, times: int = 1) -> None:
        real = getattr(MemoryFileSystem, method)
        left = [times]

        def failing(self, path, *args, **kwargs):
            if str(path).endswith(ending) and left[0]:
                left[0] -= 1
                raise error
            return real(self, path, *args, **kwargs)

        monkeypatch.setattr(MemoryFileSystem, method, failing)

    return fail


@pytest.mark.parametrize("error", [ConnectionError("gone"), FileNotFoundError("not now")])
@pytest.mark.parametrize(
    ("method", "ending"),
    [("info", "manifest.json"), ("ls", "/tokenizers"), ("ls", "VERSION"), ("find", "VERSION")],
)
def test_one_wrong_answer_costs_no_version(
    storage, version, memory, prefix, fail, method, ending, error
):
    storage.commit(next_activation(None, A, None))
    fail(method, ending.replace("VERSION", version), error)
    with suppress(OSError):
        storage.clean(0.0)
    assert memory.exists(f"{prefix}/tokenizers/{version}/manifest.json")
    assert storage.versions("tokenizer") == [version]
    assert storage.local.versions("tokenizer") == [version]
    assert storage.fetch("tokenizer", version).is_dir()


@pytest.mark.parametrize("call", ["versions", "fetch", "manifest", "publish", "remove"])
def test_what_cannot_be_read_is_not_missing(storage, version, memory, prefix, fail, call):
    fail("info", f"{version}/manifest.json", ConnectionError("gone"))
    arguments = ("tokenizer",) if call == "versions" else ("tokenizer", version)
    with pytest.raises(ConnectionError):
        getattr(storage, call)(*arguments)
    assert storage.versions("tokenizer") == [version]
    assert memory.exists(f"{prefix}/tokenizers/{version}/top")


def test_a_listed_record_that_cannot_be_read_does_not_bring_back_the_one_before(
    storage, memory, prefix, fail, monkeypatch
):
    first = next_activation(None, A, None)
    second = next_activation(first, B, None)
    assert storage.commit(first)
    assert storage.commit(second)
    latest = f"{prefix}/activations/{2:012d}.json"
    fail("cat_file", f"{2:012d}.json", FileNotFoundError("not now"))
    with pytest.raises(UnreadableError, match=f"{2:012d}.json is listed, but cannot be read"):
        storage.current()
    assert storage.current() == second

    fail("cat_file", f"{2:012d}.json", FileNotFoundError("not now"))
    with suppress(ArtifactError):
        storage.clean(0.0)
    assert memory.exists(latest)

    whole = MemoryFileSystem.cat_file
    left = [1]

    def cut(self, path, *args, **kwargs):
        data = whole(self, path, *args, **kwargs)
        if path == latest and left[0]:
            left[0] -= 1
            return data[:-9]
        return data

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cut)
    assert storage.clean(0.0) == []
    left[0] = 1
    assert storage.current() == second


def test_a_commit_whose_answer_is_lost_has_been_made(storage, memory, monkeypatch):
    real = MemoryFileSystem.pipe_file
    # The second as of a driver that asked again by itself.
    errors = [ConnectionError("gone"), FileExistsError("there")]

    def lost(self, path, *args, **kwargs):
        real(self, path, *args, **kwargs)
        if path.endswith(".json"):
            raise errors.pop(0)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", lost)
    record = None
    while errors:
        record = next_activation(record, A, None)
        assert storage.commit(record)
        assert storage.current() == record
    monkeypatch.undo()
    assert not storage.commit(next_activation(None, B, None))


def test_a_manifest_that_was_cut_off_is_written_again(storage, version, memory, prefix):
    path = f"{prefix}/tokenizers/{version}/manifest.json"
    memory.pipe_file(path, memory.cat_file(path)[:9])
    with pytest.raises(ArtifactError):
        storage.manifest("tokenizer", version)
    storage.publish("tokenizer", version)
    assert storage.manifest("tokenizer", version).version == version


@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_a_file_that_is_gone_or_cut_is_written_again(
    storage, version, memory, prefix, tmp_path, damage
):
    path = f"{prefix}/tokenizers/{version}/deep/file"
    if damage == "removed":
        memory.rm_file(path)
    else:
        memory.pipe_file(path, b"con")
    storage.publish("tokenizer", version)
    elsewhere = RemoteStorage(memory, prefix, tmp_path / "elsewhere")
    assert (elsewhere.fetch("tokenizer", version) / "deep" / "file").read_bytes() == b"content"


def test_a_probe_of_a_killed_process_is_cleaned(storage, memory, prefix):
    record = next_activation(None, A, None)
    storage.commit(record)
    memory.pipe_file(f"{prefix}/activations/probe-0123456789abcdef", b"1")
    assert storage.clean(3600.0) == []
    assert storage.clean(0.0) == [f"{prefix}/activations/probe-0123456789abcdef"]
    assert storage.history() == [record]


def test_a_host_that_only_reads_keeps_no_more_than_the_store(
    storage, version, memory, prefix, tmp_path, monkeypatch
):
    elsewhere = RemoteStorage(memory, prefix, tmp_path / "elsewhere")
    folder = elsewhere.fetch("tokenizer", version)
    kept = elsewhere.fetch("tokenizer", publish(storage, b"another"))
    partial = folder.with_name(".partial-1-abc")
    partial.mkdir()
    storage.remove("tokenizer", version)
    memory.pipe_file(f"{prefix}/tokenizers/{version}/top", b"half")  # another's affair
    monkeypatch.setattr(MemoryFileSystem, "rm", forbidden)
    monkeypatch.setattr(MemoryFileSystem, "rm_file", forbidden)
    assert elsewhere.clean_local(3600.0) == []
    assert elsewhere.clean_local(0.0) == [str(folder), str(partial)]
    assert list(folder.parent.iterdir()) == [kept]


@pytest.mark.parametrize("name", ["info", "find", "rm", "rm_file"])
def test_two_may_clean_at_once(name, storage, version, memory, prefix, monkeypatch):
    """Of one cache, as the processes of a host that follow an activation, and of one store."""
    beside = RemoteStorage(memory, prefix, storage.local.root)
    add(storage, b"another")
    memory.rm_file(f"{prefix}/tokenizers/{version}/manifest.json")
    memory.pipe_file(f"{prefix}/activations/probe-0123456789abcdef", b"1")
    torn = f"{prefix}/activations/{1:012d}.json"
    memory.pipe_file(torn, b"{")
    partial = storage.local.path("tokenizer", version).with_name(".partial-1-abc")
    partial.mkdir()
    removed: list[str] = []
    before(name, lambda: removed.extend(beside.clean(0.0)), monkeypatch)
    removed += storage.clean(0.0)
    assert storage.local.versions("tokenizer") == []
    assert not partial.exists()
    assert memory.find(prefix) == []


def test_what_is_being_published_is_not_cleaned(storage, memory, prefix, monkeypatch):
    """However long ago it was written: a model is uploaded for minutes, its manifest last."""
    beside = RemoteStorage(memory, prefix, storage.local.root)
    version = add(storage)
    os.utime(storage.local.path("tokenizer", version), (0, 0))
    removed: list[str] = []
    before("put_file", lambda: removed.extend(beside.clean_local(3600.0)), monkeypatch)
    storage.publish("tokenizer", version)
    assert removed == []
    assert beside.fetch("tokenizer", version).is_dir()


def before(name: str, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have something done by another just before the first request of a name."""
    real = getattr(MemoryFileSystem, name)
    left = [act]

    def request(self, *args, **kwargs):
        if left:
            left.pop()()
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, name, request)


def forbidden(*arguments, **options):
    raise PermissionError("read only")


def publish(storage: RemoteStorage, content: bytes) -> str:
    version = add(storage, content)
    storage.publish("tokenizer", version)
    return version


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


def test_a_half_written_record_is_in_nobodys_way_for_long(storage, memory, prefix, monkeypatch):
    first = next_activation(None, A, None)
    storage.commit(first)
    torn = f"{prefix}/activations/{2:012d}.json"
    memory.pipe_file(torn, b'{"format"')
    second = next_activation(first, B, None)
    assert not storage.commit(second)  # its writer may be at it
    memory.store[torn].modified -= timedelta(minutes=2)
    other = next_activation(first, A, None)

    def meanwhile(seconds):
        # One that had found the torn record, too, and removes it only now.
        memory.rm_file(torn)
        memory.pipe_file(torn, to_line(other), mode="create")

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", meanwhile)
        assert not storage.commit(second)
    assert storage.history() == [first, other]

    memory.pipe_file(torn, b"")
    memory.store[torn].modified -= timedelta(minutes=2)
    assert storage.commit(second)
    assert storage.history() == [first, second]


def test_a_record_of_a_later_version_is_kept(storage, memory, prefix):
    first = next_activation(None, A, None)
    storage.commit(first)
    second = next_activation(first, B, None)
    later = f"{prefix}/activations/{2:012d}.json"
    line = json.loads(to_line(second))
    line["format"]["version"] += 1
    memory.pipe_file(later, json.dumps(line).encode() + b"\n")
    memory.store[later].modified -= timedelta(days=2)
    for use in (storage.current, lambda: storage.commit(second), lambda: storage.clean(0.0)):
        with pytest.raises(ArtifactError, match=f"{2:012d}.json.*version"):
            use()
        assert memory.exists(later)


def test_a_file_system_that_overwrites_is_refused(tmp_path, prefix):
    class Careless(MemoryFileSystem):
        protocol = "careless"

        def pipe_file(self, path, value, mode="overwrite", **kwargs):
            super().pipe_file(path, value)

    storage = RemoteStorage(Careless(), prefix, tmp_path / "cache")
    with pytest.raises(ArtifactError, match="Careless cannot write an object only if"):
        storage.commit(next_activation(None, A, None))
    assert storage.current() is None
