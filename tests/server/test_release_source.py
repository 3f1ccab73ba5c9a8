"""Loading from a store that fails now and then."""

from __future__ import annotations

import os
import threading

import fsspec

from rectokens.artifacts.open_store import open_release_store
from server.release_source import ReleaseSource
from server.settings import load_settings


class DriverError(Exception):
    """As drivers of object stores have of their own."""


def test_a_wait_for_a_first_release_outlasts_a_store_that_is_away(small_store):
    store = small_store.store
    answers = [lambda: None, DriverError("away"), OSError("away"), lambda: None, store.active]

    class Unsteady:
        def active(self):
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer()

        def open_release(self, version):
            return store.open_release(version)

    source = ReleaseSource(load_settings({"device": "cpu"}), Unsteady())
    release = source.load_first(0.01, threading.Event())
    assert (release.version, answers) == (small_store.releases[1], [])


def test_a_release_that_a_driver_cannot_get_is_passed_over_for_the_one_before(small_store):
    small_store.add(2)
    small_store.activate(2)
    store = small_store.store

    class Unsteady:
        def active(self):
            return store.active()

        def open_release(self, version):
            if version == small_store.releases[2]:
                raise DriverError("no answer")
            return store.open_release(version)

    source = ReleaseSource(load_settings({"device": "cpu"}), Unsteady())
    release = source.load_first(0.01, threading.Event())
    assert release.version == small_store.releases[1]
    version, error = source.first_failure
    assert (version, "DriverError: no answer" in str(error)) == (small_store.releases[2], True)


def test_what_is_copied_here_goes_with_the_store(small_store, tmp_path):
    url, bucket = f"memory://{tmp_path.name}/store", fsspec.filesystem("memory")
    bucket.put(f"{small_store.root}/", f"/{tmp_path.name}/store/", recursive=True)
    store = open_release_store(url, cache=tmp_path / "cache")
    source = ReleaseSource(load_settings({"device": "cpu"}), store)
    first = source.load(small_store.releases[1], None)
    old = tmp_path / "cache" / "catalogs" / small_store.catalogs[1]
    small_store.add(2)
    bucket.put(f"{small_store.root}/", f"/{tmp_path.name}/store/", recursive=True)
    bucket.rm(f"/{tmp_path.name}/store/catalogs/{small_store.catalogs[1]}", recursive=True)
    source.load(small_store.releases[2], first)
    assert old.exists()  # it may be young because it is on its way into the store
    os.utime(old, (0, 0))
    source.load(small_store.releases[2], first)
    assert not old.exists()
    assert (tmp_path / "cache" / "catalogs" / small_store.catalogs[2]).exists()
