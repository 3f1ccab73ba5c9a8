"""What a store of releases needs of the place that holds it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from rectokens.artifacts.activation import Activation
from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.manifest import ArtifactKind, Manifest
from rectokens.artifacts.store import ArtifactStore


class StoreBusyError(ArtifactError):
    """Another process holds the store's lock for too long."""


class Storage(Protocol):
    """Versions and activation records, in a folder or in an object store.

    Versions are immutable and there is at most one record of each sequence number. An artifact
    counts as there once its manifest is, which is written last and removed first.

    Attributes:
        local: where artifacts lie to be opened, and where new ones are written before they are
            published.
    """

    local: ArtifactStore

    def versions(self, kind: ArtifactKind) -> list[str]:
        """Versions that are complete, sorted."""
        ...

    def manifest(self, kind: ArtifactKind, version: str) -> Manifest:
        """The manifest of one version.

        Raises:
            ArtifactError: no such version, or its manifest is damaged.
        """
        ...

    def fetch(self, kind: ArtifactKind, version: str) -> Path:
        """Make a version available in ``local`` and give its folder.

        Raises:
            ArtifactError: no such version, or it arrived damaged.
        """
        ...

    def publish(self, kind: ArtifactKind, version: str) -> None:
        """Put a version that lies in ``local`` into the store; one that is there stays.

        Raises:
            ArtifactError: it is not in ``local``, or is damaged.
        """
        ...

    def remove(self, kind: ArtifactKind, version: str) -> None:
        """Remove a version so that a crash leaves nothing that looks whole."""
        ...

    def clean(self, older_than_s: float) -> Sequence[str]:
        """Remove what writers that were killed left behind.

        Args:
            older_than_s: only what was not written to for so many seconds.

        Returns:
            What was removed.
        """
        ...

    def clean_local(self, older_than_s: float) -> Sequence[str]:
        """As ``clean``, of what lies on this host alone; nothing is written to an object store.

        Copies of versions that the store has no more go, too.
        """
        ...

    def current(self) -> Activation | None:
        """The record of the highest sequence number, None for none.

        Raises:
            ArtifactError: it cannot be read.
        """
        ...

    def history(self) -> list[Activation]:
        """All records, oldest first."""
        ...

    def commit(self, activation: Activation) -> bool:
        """Write the next record, whole and lasting, or not at all.

        Returns:
            False if somebody else has written a record of this number (or a higher one).
        """
        ...

    def exclusive(self) -> AbstractContextManager[None]:
        """Keep other processes from committing, binding and removing meanwhile.

        May be entered again by the thread that is in it. An object store has no locks: there it
        does nothing, ``commit`` alone decides who is first, and versions are removed only when
        they are old.

        Raises:
            StoreBusyError: the lock was not free in time.
        """
        ...
