"""The error of artifacts on disk."""

from __future__ import annotations


class ArtifactError(ValueError):
    """An artifact cannot be read, written or used together with another.

    The message names the file, the value found and the value allowed, and stands on its own:
    start-up prints it as it is.
    """


class UnreadableError(ArtifactError):
    """It is there, but the disk does not give it just now: nobody knows what it says."""
