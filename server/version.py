"""The version of what runs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

_NOT_INSTALLED = "0+unknown"


def running_version() -> str:
    """Of the package; ``0+unknown`` where it runs from a folder and is not installed."""
    try:
        return version("rectokens")
    except PackageNotFoundError:
        return _NOT_INSTALLED
