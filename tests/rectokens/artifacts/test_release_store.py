"""The same behaviour in a folder and in an object store."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import fsspec
import pytest
import torch

from rectokens.artifacts.errors import ArtifactError, UnreadableError
from rectokens.artifacts.local_storage import LocalStorage
from rectokens.artifacts.open_store import open_release_store
from rectokens.artifacts.release_store import ActivationConflictError, ReleaseStore
from rectokens.artifacts.remote_storage import RemoteStorage
from rectokens.artifacts.retention import RetentionPolicy
from rectokens.catalog.artifact import load_catalog, save_catalog
from rectokens.catalog.build import build_catalog


@pytest.fixture(params=["folder", "memory", "file"])
def opener(request, tmp_path: Path) -> Callable[[str], ReleaseStore]:
    """``opener(host)``: the one store as a host sees it; object stores give each its own cache."""
    if request.param == "folder":
        return lambda host: ReleaseStore(LocalStorage(tmp_path / "shared"))
    prefix = f"/bucket-{tmp_path.name}" if request.param == "memory" else str(tmp_path / "bucket")
    filesystem = fsspec.filesystem(request.param)
    return lambda host: ReleaseStore(RemoteStorage(filesystem, prefix, tmp_path / host))


@pytest.fixture
def store(opener, model_folder: Path) -> ReleaseStore:
    """Holds a model and no release."""
    store = opener("a")
    target = store.local.path("model", model_folder.name)
    shutil.copytree(model_folder, target)
    store.publish("model", model_folder.name)
    return store


@pytest.fixture
def add_release(store: ReleaseStore, model_folder: Path, spec) -> Callable[[int], str]:
    def add(seed: int) -> str:
        codes = torch.randint(0, 8, (20, 3), generator=torch.Generator().manual_seed(seed))
        catalog = build_catalog(
            [f"B{i}" for i in range(20)],
            codes,
            codebook_size=8,
            tokenizer_fingerprint=spec.tokenizer_fingerprint,
        )
        folder = save_catalog(store.local.folder("catalog"), catalog)
        store.publish("catalog", folder.name)
        return store.bind(model_folder.name, folder.name)

    return add


def catalog_of(store: ReleaseStore, release: str) -> str:
    return store.open_release(release).catalog_version


def states(store: ReleaseStore, kind) -> dict[str, str]:
    return {one.version: one.state for one in store.versions(kind)}


def test_nothing_is_active_at_first(store: ReleaseStore):
    assert store.active() is None
    assert store.open_active() is None
    assert store.history() == []
    assert store.versions("release") == []
    assert store.apply_retention(RetentionPolicy(keep_last=1)) == []
    with pytest.raises(ArtifactError, match="no release is active"):
        store.rollback()
    with pytest.raises(ArtifactError, match="no model to keep"):
        store.bind_catalog("0" * 16)


def test_activate_and_roll_back(store, opener, add_release, model_folder):
    one, two, three = (add_release(seed) for seed in range(3))
    assert store.activate(one, note="first").sequence == 1
    assert store.activate(one).sequence == 1
    store.activate(two)
    store.activate(three)
    other = opener("b")
    assert other.active() == store.active()
    assert other.open_active().catalog_version == catalog_of(store, three)
    load_catalog(other.open_active().catalog_path)
    assert states(other, "release") == {one: "available", two: "previous", three: "active"}
    assert states(other, "model") == {model_folder.name: "active"}
    assert states(other, "catalog")[catalog_of(store, two)] == "previous"
    assert other.rollback(note="bad").release == two
    assert store.rollback().release == one
    with pytest.raises(ArtifactError, match=f"{one} is the earliest"):
        store.rollback()
    told = [(r.sequence, r.action, r.release, r.note) for r in other.history()]
    assert told == [
        (1, "activate", one, "first"),
        (2, "activate", two, None),
        (3, "activate", three, None),
        (4, "rollback", two, "bad"),
        (5, "rollback", one, None),
    ]


def test_a_catalog_with_the_model_that_is_there(store, add_release, model_folder):
    one, two = add_release(0), add_release(1)
    store.activate(one)
    assert store.bind_catalog(catalog_of(store, two)) == two
    assert store.open_release(two).model_version == model_folder.name


def test_compare_and_swap(store, opener, add_release):
    one, two = add_release(0), add_release(1)
    store.activate(one, expected_active=None)
    with pytest.raises(ActivationConflictError, match=f"is {one}, expected was none") as caught:
        store.activate(two, expected_active=None)
    assert (caught.value.expected, caught.value.found) == (None, one)
    opener("b").activate(two, expected_active=one)
    with pytest.raises(ActivationConflictError):
        store.rollback(expected_active=one)
    assert store.rollback(expected_active=two).release == one


@pytest.mark.parametrize("version", ["..", "../../etc", "", "a/b", "0123456789ABCDEF", "x" * 16])
def test_nothing_but_a_version_becomes_part_of_a_path(store, version):
    for call in (store.activate, store.open_release, store.verify, store.bind_catalog):
        with pytest.raises(ArtifactError):
            call(version)
    for call in (store.fetch, store.publish):
        with pytest.raises(ArtifactError, match="expected 16 lower-case hexadecimal digits"):
            call("catalog", version)
    with pytest.raises(ArtifactError, match="expected 16 lower-case"):
        store.bind(version, version)


def test_what_is_missing_is_named(store, add_release):
    one = add_release(0)
    store.activate(one)
    with pytest.raises(ArtifactError, match=r"f{16}.*does not exist"):
        store.activate("f" * 16)
    with pytest.raises(ArtifactError, match=r"f{16}.*does not exist"):
        store.bind_catalog("f" * 16)
    assert store.active().release == one


def test_retention(store, opener, add_release, model_folder):
    releases = [add_release(seed) for seed in range(5)]
    catalogs = [catalog_of(store, release) for release in releases]
    store.activate(releases[0])
    store.activate(releases[1])
    later = datetime.now(UTC) + timedelta(days=30)
    assert store.apply_retention(RetentionPolicy(keep_last=0)) == []  # all are young
    removed = store.apply_retention(RetentionPolicy(keep_last=0), now=later)
    assert {one.version for one in removed} == {*releases[2:], *catalogs[2:]}
    assert set(states(store, "release")) == set(releases[:2])
    assert set(states(store, "catalog")) == set(catalogs[:2])
    assert set(states(store, "model")) == {model_folder.name}
    other = opener("c")
    assert other.rollback().release == releases[0]
    other.verify(releases[0])
    # Not active any more, and nothing a rollback goes back to.
    removed = store.apply_retention(RetentionPolicy(keep_last=0), now=later)
    assert {one.version for one in removed} == {releases[1], catalogs[1]}
    with pytest.raises(ArtifactError, match="does not exist"):
        other.activate(releases[1])


def test_open_release_store(tmp_path: Path):
    assert open_release_store(tmp_path / "s").local.root == tmp_path / "s"
    assert open_release_store(f"file://{tmp_path}/s t").local.root == tmp_path / "s t"
    remote = open_release_store("memory://bucket/x", cache=tmp_path / "cache")
    assert remote.local.root == tmp_path / "cache"
    assert remote.active() is None
    with pytest.raises(ArtifactError, match="needs no cache"):
        open_release_store(tmp_path, cache=tmp_path)
    with pytest.raises(ArtifactError, match="name a local folder as its cache"):
        open_release_store("memory://bucket")
    with pytest.raises(ArtifactError, match="cannot be opened"):
        open_release_store("nonsense://bucket", cache=tmp_path)
    (tmp_path / "plain").write_text("x")
    with pytest.raises(ArtifactError, match="is not a folder"):
        open_release_store(tmp_path / "plain")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_in_a_folder_is_refused_by_name(tmp_path, model_folder, spec, damage):
    store = ReleaseStore(LocalStorage(model_folder.parent.parent))
    versions = []
    for seed in range(2):
        codes = torch.randint(0, 8, (20, 3), generator=torch.Generator().manual_seed(seed))
        catalog = build_catalog(
            [f"B{i}" for i in range(20)],
            codes,
            codebook_size=8,
            tokenizer_fingerprint=spec.tokenizer_fingerprint,
        )
        folder = save_catalog(store.local.folder("catalog"), catalog)
        versions.append(store.bind(model_folder.name, folder.name))
    store.activate(versions[0])
    for file in sorted(store.open_release(versions[1]).catalog_path.iterdir()):
        whole = file.read_bytes()
        if damage == "flip":
            middle = len(whole) // 2
            file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        elif damage == "truncate":
            os.truncate(file, len(whole) - 3)
        else:
            file.unlink()
        with pytest.raises(ArtifactError, match=file.name):
            store.activate(versions[1])
        assert store.active().release == versions[0]
        file.write_bytes(whole)
    assert store.activate(versions[1]).release == versions[1]


def test_a_release_that_cannot_be_read_just_now_keeps_its_parts(
    store, add_release, model_folder, monkeypatch
):
    releases = [add_release(seed) for seed in range(3)]
    for release in releases:
        store.activate(release)
    later = datetime.now(UTC) + timedelta(days=30)
    policy = RetentionPolicy(keep_last=0)
    path = f"releases/{releases[0]}/manifest.json"
    if isinstance(store._storage, LocalStorage):
        manifest = store.local.root / path
        manifest.rename(manifest.with_name("aside"))
        manifest.mkdir()  # what opening then says is an error of the disk's kind
    else:
        real = type(store._storage._fs).info

        def failing(self, asked, **kwargs):
            if str(asked).endswith(path):
                raise ConnectionError("gone")
            return real(self, asked, **kwargs)

        monkeypatch.setattr(type(store._storage._fs), "info", failing)
    with pytest.raises((ArtifactError, OSError), match=r"manifest\.json cannot be read|gone"):
        store.apply_retention(policy, now=later)
    if isinstance(store._storage, LocalStorage):
        assert states(store, "release")[releases[0]] == "damaged"
        manifest.rmdir()
        manifest.with_name("aside").rename(manifest)
    monkeypatch.undo()
    assert len(store.versions("catalog")) == 3
    store.verify(releases[0])
    removed = store.apply_retention(policy, now=later)
    assert [one.kind for one in removed] == ["release", "catalog"]


@pytest.mark.parametrize(("method", "call"), [("ls", 0), ("info", 0), ("info", 1), ("info", 2)])
@pytest.mark.parametrize("which", [1, 2], ids=["previous", "active"])
def test_one_wrong_answer_about_a_release_does_not_cost_its_parts(
    store, add_release, monkeypatch, which, method, call
):
    if isinstance(store._storage, LocalStorage):
        pytest.skip("a folder gives no such answers")
    releases = [add_release(seed) for seed in range(3)]
    for release in releases:
        store.activate(release)
    ending = "/releases" if method == "ls" else f"releases/{releases[which]}/manifest.json"
    real = getattr(type(store._storage._fs), method)
    calls = count()

    def wrong(self, asked, *args, **kwargs):
        if str(asked).endswith(ending) and next(calls) == call:
            raise FileNotFoundError("not now")
        return real(self, asked, *args, **kwargs)

    monkeypatch.setattr(type(store._storage._fs), method, wrong)
    later = datetime.now(UTC) + timedelta(days=30)
    with suppress(ArtifactError, OSError):
        store.apply_retention(RetentionPolicy(keep_last=0), now=later, kinds=("catalog",))
    assert next(calls) > call
    monkeypatch.undo()
    for release in releases[1:]:
        store.verify(release)
    held = {one.version for one in store.versions("release")}
    assert held == set(releases)


def test_a_damaged_release_that_is_needed_stops_retention(store, add_release):
    if not isinstance(store._storage, LocalStorage):
        pytest.skip("damage is done to a folder")
    one, two = add_release(0), add_release(1)
    store.activate(two)
    (store.local.path("release", two) / "manifest.json").write_text("{")
    assert states(store, "release") == {one: "available", two: "damaged"}
    later = datetime.now(UTC) + timedelta(days=30)
    with pytest.raises(ArtifactError, match=f"release {two} is damaged"):
        store.apply_retention(RetentionPolicy(keep_last=0), now=later)
    assert len(store.versions("catalog")) == 2


def test_a_pointer_that_cannot_be_read_just_now_is_no_damaged_one(tmp_path):
    (tmp_path / "active.json").mkdir()
    with pytest.raises(UnreadableError, match=r"active\.json cannot be read"):
        open_release_store(tmp_path).active()
