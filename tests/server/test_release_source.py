"""Loading from a store that fails now and then."""

from __future__ import annotations

import threading

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
