"""A store of releases in a folder, shared by any number of processes of hosts that can lock it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from rectokens.artifacts.activation import Activation, from_line, from_lines, to_line
from rectokens.artifacts.errors import ArtifactError, UnreadableError
from rectokens.artifacts.json_fields import MAX_JSON_BYTES
from rectokens.artifacts.manifest import (
    ARTIFACT_KINDS,
    MANIFEST_NAME,
    ArtifactKind,
    Manifest,
    read_manifest,
    remove_partials,
)
from rectokens.artifacts.storage import StoreBusyError
from rectokens.artifacts.store import ArtifactStore
from rectokens.core.atomic_file import atomic_file, fsync_folder, partial_sibling

ACTIVE_NAME = "active.json"
HISTORY_NAME = "history.jsonl"
LOCK_NAME = ".lock"


class LocalStorage:
    """See :class:`~rectokens.artifacts.storage.Storage`.

    ``active.json`` is the pointer: one record, replaced atomically. ``history.jsonl`` has a line
    for every record there was. The pointer is written first and alone decides; a history that a
    crash left short or torn is completed by the next commit.
    """

    def __init__(self, root: Path, *, lock_timeout_s: float = 60.0) -> None:
        """Open, or begin, a store.

        Args:
            root: its folder; created if missing.
            lock_timeout_s: how long to wait for other processes.

        Raises:
            ArtifactError: ``root`` is something else than a folder.
        """
        root = Path(root)
        if root.exists() and not root.is_dir():
            raise ArtifactError(f"store {root} is not a folder")
        root.mkdir(parents=True, exist_ok=True)
        self.local = ArtifactStore(root)
        self._active = root / ACTIVE_NAME
        self._history = root / HISTORY_NAME
        # One lock a store: it counts entries of its own thread and keeps out all others.
        self._lock = FileLock(root / LOCK_NAME, timeout=lock_timeout_s)

    def versions(self, kind: ArtifactKind) -> list[str]:
        """See ``Storage.versions``."""
        folder = self.local.folder(kind)
        return [v for v in self.local.versions(kind) if (folder / v / MANIFEST_NAME).exists()]

    def manifest(self, kind: ArtifactKind, version: str) -> Manifest:
        """See ``Storage.manifest``."""
        path = self.local.path(kind, version)
        manifest = read_manifest(path)
        if (manifest.kind, manifest.version) != (kind, version):
            raise ArtifactError(f"{path} holds {manifest.kind} version {manifest.version}")
        return manifest

    def fetch(self, kind: ArtifactKind, version: str) -> Path:
        """See ``Storage.fetch``."""
        self.manifest(kind, version)
        return self.local.path(kind, version)

    def publish(self, kind: ArtifactKind, version: str) -> None:
        """See ``Storage.publish``."""
        self.manifest(kind, version)

    def remove(self, kind: ArtifactKind, version: str) -> None:
        """See ``Storage.remove``."""
        path = self.local.path(kind, version)
        doomed = partial_sibling(path.parent)
        try:
            os.rename(path, doomed)
        except FileNotFoundError:
            return
        fsync_folder(path.parent)
        if doomed.is_symlink():
            doomed.unlink()
        else:
            shutil.rmtree(doomed, ignore_errors=True)

    def clean(self, older_than_s: float) -> list[str]:
        """See ``Storage.clean``."""
        folders = [self.local.root, *(self.local.folder(kind) for kind in ARTIFACT_KINDS)]
        return [
            str(path)
            for folder in folders
            for path in remove_partials(folder, older_than_s=older_than_s)
        ]

    def clean_local(self, older_than_s: float) -> list[str]:
        """See ``Storage.clean_local``: the store's own folder is not of this host alone."""
        return []

    def current(self) -> Activation | None:
        """See ``Storage.current``."""
        data = _read(self._active)
        return None if data is None else from_line(data, str(self._active))

    def history(self) -> list[Activation]:
        """See ``Storage.history``."""
        # The pointer first: a commit in between is then at most missing, never out of order.
        current = self.current()
        records = from_lines(_read(self._history) or b"", str(self._history))
        if current is not None and (not records or records[-1].sequence < current.sequence):
            records.append(current)
        return records

    def commit(self, activation: Activation) -> bool:
        """See ``Storage.commit``."""
        with self.exclusive():
            current = self.current()
            if activation.sequence != (1 if current is None else current.sequence + 1):
                return False
            self._complete_history(current)
            try:
                with atomic_file(self._active) as partial:
                    partial.write_bytes(to_line(activation))
            except OSError:
                # It may have failed once the pointer was in its place: that is what counts.
                if self.current() != activation:
                    raise
            # Done, whatever follows; the next commit completes the history or fails itself.
            with suppress(OSError):
                self._complete_history(activation)
            return True

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """See ``Storage.exclusive``."""
        try:
            self._lock.acquire()
        except Timeout as error:
            raise StoreBusyError(
                f"{self._lock.lock_file} was held by another process for "
                f"{self._lock.timeout:g} s; try again"
            ) from error
        try:
            yield
        finally:
            self._lock.release()

    def _complete_history(self, current: Activation | None) -> None:
        """Cut off a torn last line and add the pointer's record if it is not there."""
        if current is None:
            return
        data = _read(self._history) or b""
        whole = data.rfind(b"\n") + 1
        records = from_lines(data[:whole], str(self._history))
        known = bool(records) and records[-1].sequence >= current.sequence
        if known and whole == len(data):
            return
        created = not self._history.exists()
        descriptor = os.open(self._history, os.O_RDWR | os.O_CREAT, 0o644)
        with os.fdopen(descriptor, "r+b") as file:
            file.truncate(whole)
            file.seek(whole)
            if not known:
                file.write(to_line(current))
            file.flush()
            os.fsync(file.fileno())
        if created:
            fsync_folder(self._history.parent)


def _read(path: Path) -> bytes | None:
    try:
        size = path.stat().st_size
        if path.name == ACTIVE_NAME and size > MAX_JSON_BYTES:
            raise ArtifactError(f"{path} has {size} bytes; at most {MAX_JSON_BYTES} are allowed")
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror or error}") from error
