"""Which version a service says it is."""

from __future__ import annotations

import importlib.metadata

from server.app import create_app
from server.settings import load_settings


def load_nothing():
    raise AssertionError("not started")


def test_the_version_is_that_of_the_installed_package():
    app = create_app(load_settings({}), load_nothing)
    assert app.version == importlib.metadata.version("rectokens")


def test_a_folder_that_is_not_installed_can_be_served_from(monkeypatch):
    monkeypatch.setattr(importlib.metadata.Distribution, "discover", lambda **kwargs: iter(()))
    assert create_app(load_settings({}), load_nothing).version == "0+unknown"
