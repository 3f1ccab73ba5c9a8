"""A store of releases: what is there, what is active, and how that changes.

    store = open_release_store("/srv/store")
    save_catalog(store.local.folder("catalog"), catalog)
    release = store.bind_catalog(catalog_version)       # with the model of the active release
    store.activate(release)
    store.rollback()

All changes are safe beside other processes on the same store, and beside a process that is killed
at any moment: the active release is always one that was verified whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from rectokens.artifacts.activation import Activation, next_activation, next_rollback
from rectokens.artifacts.errors import ArtifactError, UnreadableError
from rectokens.artifacts.manifest import (
    ARTIFACT_KINDS,
    ArtifactKind,
    open_artifact,
    remove_partials,
)
from rectokens.artifacts.release import ReleaseArtifact, load_release, save_release
from rectokens.artifacts.retention import (
    RetentionPolicy,
    StoredVersion,
    VersionState,
    plan_removal,
    stored_version,
)
from rectokens.artifacts.storage import Storage
from rectokens.artifacts.store import ArtifactStore

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_MAX_ATTEMPTS = 100
_RETRY_S = 0.05


class _Any(Enum):
    ANY = "any"


ANY_RELEASE: Final = _Any.ANY
"""Whatever is active may be replaced."""

ExpectedActive = str | None | _Any


class ActivationConflictError(ArtifactError):
    """Another release is active than the caller took for granted.

    Attributes:
        expected: version the caller expected, None for none.
        found: version that is active, None for none.
    """

    def __init__(self, expected: str | None, found: str | None) -> None:
        self.expected = expected
        self.found = found
        super().__init__(
            f"the active release is {found or 'none'}, expected was {expected or 'none'}; "
            "somebody else has changed it, look again before deciding"
        )


class ReleaseStore:
    """Releases and their parts, one of them active."""

    def __init__(self, storage: Storage) -> None:
        """Use a storage; see :func:`~rectokens.artifacts.open_store.open_release_store`."""
        self._storage = storage

    @property
    def local(self) -> ArtifactStore:
        """Where new artifacts are written to, to be published then."""
        return self._storage.local

    def active(self) -> Activation | None:
        """The record of the active release, None if none was ever activated. Cheap to poll.

        Raises:
            ArtifactError: the record cannot be read.
        """
        return self._storage.current()

    def history(self) -> list[Activation]:
        """All activations, oldest first."""
        return self._storage.history()

    def publish(self, kind: ArtifactKind, version: str) -> None:
        """Put an artifact that was written below ``local`` into the store.

        In a folder that is where it lies already.

        Raises:
            ArtifactError: it is not there or is damaged.
        """
        self._storage.publish(kind, version)

    def fetch(self, kind: ArtifactKind, version: str) -> Path:
        """Local folder of a version, downloaded first where the store is remote.

        Raises:
            ArtifactError: no such version, or it is damaged.
        """
        return self._storage.fetch(kind, version)

    def open_release(self, version: str) -> ReleaseArtifact:
        """A release whose parts lie in local folders.

        Raises:
            ArtifactError: the release or a part of it is missing or damaged.
        """
        folder = self._storage.fetch("release", version)
        parents = self._storage.manifest("release", version).parents
        for kind in ("model", "catalog"):
            part = parents[kind].version if kind in parents else None
            if part is not None:
                self._storage.fetch(kind, part)
        return load_release(folder, root=self.local.root)

    def open_active(self) -> ReleaseArtifact | None:
        """The active release, None if there is none.

        Raises:
            ArtifactError: it is missing or damaged.
        """
        current = self.active()
        return None if current is None else self.open_release(current.release)

    def bind(
        self,
        model_version: str,
        catalog_version: str,
        *,
        allow_other_tokenizer: bool = False,
        numbers: Mapping[str, float | int | str] = _NOTHING,
    ) -> str:
        """Make a release of a model and a catalog of the store.

        Args:
            model_version: a model in the store.
            catalog_version: a catalog in the store.
            allow_other_tokenizer: see :func:`~rectokens.artifacts.binding.check_binding`.
            numbers: figures to record.

        Returns:
            Version of the release. The same pair gives the same release.

        Raises:
            ArtifactError: a part is missing, damaged, or does not belong to the other.
        """
        with self._storage.exclusive():
            self._storage.fetch("model", model_version)
            self._storage.fetch("catalog", catalog_version)
            folder = save_release(
                self.local.root,
                model_version,
                catalog_version,
                allow_other_tokenizer=allow_other_tokenizer,
                numbers=numbers,
            )
            self._storage.publish("release", folder.name)
        return folder.name

    def bind_catalog(self, catalog_version: str, *, allow_other_tokenizer: bool = False) -> str:
        """Make a release of a catalog and the model of the active release.

        Raises:
            ArtifactError: no release is active; otherwise as :meth:`bind`.
        """
        current = self.active()
        if current is None:
            raise ArtifactError("no release is active, so there is no model to keep; bind both")
        model = self._storage.manifest("release", current.release).parents["model"].version
        assert model is not None
        return self.bind(model, catalog_version, allow_other_tokenizer=allow_other_tokenizer)

    def verify(self, version: str) -> ReleaseArtifact:
        """Check every file of a release, of its model and of its catalog.

        Raises:
            ArtifactError: naming the file that is missing or damaged.
        """
        release = self.open_release(version)
        open_artifact(release.model_path, "model")
        open_artifact(release.catalog_path, "catalog")
        return release

    def activate(
        self,
        version: str,
        *,
        expected_active: ExpectedActive = ANY_RELEASE,
        note: str | None = None,
    ) -> Activation:
        """Make a release the active one, once all its files were verified.

        Args:
            version: of the release. Activating the active one changes nothing.
            expected_active: do so only if this release is active (None: none is); by default
                whatever is.
            note: free text for the history.

        Returns:
            The record of the active release.

        Raises:
            ActivationConflictError: another release is active than expected.
            ArtifactError: the release or a part of it is missing or damaged.
        """

        def step(current: Activation | None) -> Activation:
            if current is not None and current.release == version:
                return current
            return next_activation(current, version, note)

        return self._change(step, expected_active)

    def rollback(
        self, *, expected_active: ExpectedActive = ANY_RELEASE, note: str | None = None
    ) -> Activation:
        """Go back to the release that was active before; two in a row go back two.

        Raises:
            ActivationConflictError: another release is active than expected.
            ArtifactError: there is nothing to go back to, or it is missing or damaged.
        """

        def step(current: Activation | None) -> Activation:
            if current is None:
                raise ArtifactError("there is nothing to roll back; no release is active")
            return next_rollback(current, note)

        return self._change(step, expected_active)

    def versions(self, kind: ArtifactKind) -> list[StoredVersion]:
        """Versions of a kind, latest first. Manifests are read, files are not."""
        found = [one for one in self._survey() if one.kind == kind]
        return sorted(found, key=lambda one: (one.created or "", one.version), reverse=True)

    def apply_retention(
        self,
        policy: RetentionPolicy,
        *,
        now: datetime | None = None,
        kinds: Collection[ArtifactKind] = ARTIFACT_KINDS,
    ) -> list[StoredVersion]:
        """Remove what a policy lets go.

        Never the active or the previous release, nor what a release that stays refers to.

        Args:
            policy: what stays.
            now: the time, by default the clock's.
            kinds: only versions of these are removed.

        Returns:
            What was removed.

        Raises:
            ArtifactError: the active release is missing, it or the previous one is damaged, or
                another version cannot be read just now, so nobody knows what it needs. Nothing was
                removed.
            OSError: the same, of a request to the store.
        """
        removed = []
        with self._storage.exclusive():
            current = self._storage.current()
            versions = self._survey(all_readable=True)
            if current is not None and not any(
                (one.kind, one.version) == ("release", current.release) for one in versions
            ):
                raise ArtifactError(f"release {current.release} is active, but is not in the store")
            for one in versions:
                if one.kind == "release" and one.state == "damaged":
                    protected = (current.release, current.previous) if current else ()
                    if one.version in protected:
                        raise ArtifactError(f"release {one.version} is damaged: {one.problem}")
            last_active = {
                record.release: datetime.fromisoformat(record.at) for record in self.history()
            }
            moment = datetime.now(UTC) if now is None else now
            for one in plan_removal(versions, last_active, policy, moment):
                if one.kind not in kinds:
                    continue
                if self._storage.current() != current:
                    break  # an object store has no lock: the plan may no longer be right
                self._storage.remove(one.kind, one.version)
                removed.append(one)
        return removed

    def clean(self, *, older_than_s: float = 86_400.0) -> list[str]:
        """Remove what killed writers left behind.

        Args:
            older_than_s: only what was not written to for so many seconds.

        Returns:
            What was removed.
        """
        return list(self._storage.clean(older_than_s))

    def clean_local(self, *, older_than_s: float = 86_400.0) -> list[str]:
        """Remove what this host has copied of a store and the store has no more.

        Args:
            older_than_s: only what was not written to for so many seconds.

        Returns:
            What was removed; nothing of a folder, which nobody copies.
        """
        return list(self._storage.clean_local(older_than_s))

    def clean_after(self, process_id: int) -> list[str]:
        """Remove what a process of this host left behind that is known to be dead.

        Returns:
            What was removed.
        """
        folders = [self.local.root, *(self.local.folder(kind) for kind in ARTIFACT_KINDS)]
        return [
            str(path)
            for folder in folders
            for path in remove_partials(folder, older_than_s=0.0, writer=process_id)
        ]

    def _change(
        self, step: Callable[[Activation | None], Activation], expected: ExpectedActive
    ) -> Activation:
        verified = set()
        for _ in range(_MAX_ATTEMPTS):
            current = self._storage.current()
            found = None if current is None else current.release
            if not isinstance(expected, _Any) and found != expected:
                raise ActivationConflictError(expected, found)
            record = step(current)
            if record is current:
                return record
            # Takes long, so it is done before others are kept waiting.
            if record.release not in verified:
                self.verify(record.release)
                verified.add(record.release)
            with self._storage.exclusive():
                self._require_present(record.release)
                if self._storage.current() == current and self._storage.commit(record):
                    return record
            time.sleep(_RETRY_S)
        raise ArtifactError(
            f"others changed the active release {_MAX_ATTEMPTS} times meanwhile; try again"
        )

    def _require_present(self, version: str) -> None:
        parents = self._storage.manifest("release", version).parents
        for kind in ("model", "catalog"):
            part = parents[kind].version if kind in parents else None
            if part is not None:
                self._storage.manifest(kind, part)

    def _survey(self, *, all_readable: bool = False) -> list[StoredVersion]:
        """Every version of every kind, with its state.

        Raises:
            UnreadableError: with ``all_readable``, a version that else counts as damaged.
        """
        current = self._storage.current()
        states: dict[tuple[str, str], VersionState] = {}
        if current is not None:
            states[("release", current.release)] = "active"
            if current.previous is not None:
                states.setdefault(("release", current.previous), "previous")
        found = []
        # Releases first: they tell the state of their parts.
        for kind in sorted(ARTIFACT_KINDS, key=lambda one: one != "release"):
            for version in self._storage.versions(kind):
                state = states.get((kind, version), "available")
                one = self._describe(kind, version, state, all_readable)
                found.append(one)
                for part, of_part in one.parts.items():
                    if state == "active" or (
                        state == "previous" and states.get((part, of_part)) != "active"
                    ):
                        states[(part, of_part)] = state
        return found

    def _describe(
        self, kind: ArtifactKind, version: str, state: VersionState, readable: bool
    ) -> StoredVersion:
        try:
            return stored_version(self._storage.manifest(kind, version), kind, state)
        except ArtifactError as error:
            if readable and isinstance(error, UnreadableError):
                raise
            return StoredVersion(
                kind=kind,
                version=version,
                state="damaged",
                created=None,
                num_bytes=0,
                parts={},
                tokenizer=None,
                numbers={},
                problem=str(error),
            )
