"""A store of releases in an object store, through fsspec, with a folder as local cache.

Object stores rename by copying and have no locks, so nothing here rests on either: an artifact is
there once its manifest is, which is written last; an activation is an object of its own, named by
its number and written only if there is none of that name, so of two processes exactly one is first.
What cannot be read is never taken for what is not there: the request fails with the driver's error.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rectokens.artifacts.activation import Activation, from_line, to_line
from rectokens.artifacts.errors import ArtifactError, UnreadableError
from rectokens.artifacts.files import flush_folder
from rectokens.artifacts.json_fields import MAX_JSON_BYTES
from rectokens.artifacts.manifest import (
    ARTIFACT_KINDS,
    MANIFEST_NAME,
    ArtifactKind,
    Manifest,
    is_version,
    open_artifact,
    read_manifest,
    remove_partials,
)
from rectokens.artifacts.store import ArtifactStore, kind_folder
from rectokens.core.atomic_file import fsync_folder, partial_sibling

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

ACTIVATIONS = "activations"
_DIGITS = 12
_PROBE = "probe-"
# Of a record whose answer is shorter than the object, while that may be on its way.
_READS = 3
# After so long nobody is still writing a record.
_TORN_S = 60.0
_SETTLE_S = 2.0
_LATEST = 16


class RemoteStorage:
    """See :class:`~rectokens.artifacts.storage.Storage`."""

    def __init__(self, filesystem: AbstractFileSystem, prefix: str, cache: Path) -> None:
        """Open, or begin, a store.

        Args:
            filesystem: an fsspec file system whose ``pipe_file`` knows ``mode="create"`` (checked
                before the first activation).
            prefix: path of the store in it, bucket included.
            cache: local folder that versions are downloaded to; several processes may share it.
        """
        self.local = ArtifactStore(Path(cache))
        self.local.root.mkdir(parents=True, exist_ok=True)
        self._fs: Any = filesystem
        self._prefix = prefix.rstrip("/")
        self._creates_exclusively = False

    def versions(self, kind: ArtifactKind) -> list[str]:
        """See ``Storage.versions``."""
        names = [name for name in self._list(kind_folder(kind)) if is_version(name)]
        return sorted(name for name in names if not self._is_gone(kind, name))

    def manifest(self, kind: ArtifactKind, version: str) -> Manifest:
        """See ``Storage.manifest``."""
        partial = self._partial(kind)
        try:
            return self._download_manifest(kind, version, partial)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def fetch(self, kind: ArtifactKind, version: str) -> Path:
        """See ``Storage.fetch``: downloads to the cache what is not there, or there damaged."""
        target = self.local.path(kind, version)
        if self._is_gone(kind, version):
            raise ArtifactError(f"{self._describe(kind, version)} does not exist")
        if target.exists():
            try:
                if open_artifact(target, kind).version == version:
                    return target
            except ArtifactError:
                pass
            self._discard(target)
        partial = self._partial(kind)
        try:
            manifest = self._download_manifest(kind, version, partial)
            for name, entry in manifest.files.items():
                source = self._path(kind, version, name)
                self._require_size(source, entry.size)
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                self._fs.get_file(source, str(partial / name))
            try:
                open_artifact(partial, kind)
            except ArtifactError as error:
                raise ArtifactError(
                    f"{self._describe(kind, version)} is damaged, or was on its way here: {error}"
                ) from error
            flush_folder(partial)
            try:
                partial.rename(target)
            except OSError:
                # Another process was quicker; what it brought is as good as ours.
                open_artifact(target, kind)
            fsync_folder(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return target

    def publish(self, kind: ArtifactKind, version: str) -> None:
        """See ``Storage.publish``: uploads the files, then the manifest.

        Of a version that is there the sizes are looked at: reading it takes as long as writing.
        """
        folder = self.local.path(kind, version)
        with suppress(OSError):
            os.utime(folder)  # else, while it is uploaded, it looks like an old copy of nothing
        manifest = open_artifact(folder, kind)
        if manifest.version != version:
            raise ArtifactError(f"{folder} holds {kind} version {manifest.version}")
        with suppress(ArtifactError):  # not there, or not whole: it is written, or mended
            for name, entry in self.manifest(kind, version).files.items():
                self._require_size(self._path(kind, version, name), entry.size)
            return
        self._fs.makedirs(self._path(kind, version), exist_ok=True)
        for name, entry in manifest.files.items():
            target = self._path(kind, version, name)
            if "/" in name:
                self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(folder / name), target)
            self._require_size(target, entry.size)
        marker = self._path(kind, version, MANIFEST_NAME)
        self._fs.pipe_file(marker, (folder / MANIFEST_NAME).read_bytes())

    def remove(self, kind: ArtifactKind, version: str) -> None:
        """See ``Storage.remove``: the manifest first, then the rest; the cached copy too."""
        if self._is_there(kind, version):
            self._fs.rm_file(self._path(kind, version, MANIFEST_NAME))
        with suppress(FileNotFoundError):
            self._fs.rm(self._path(kind, version), recursive=True)
        self._discard(self.local.path(kind, version))

    def clean(self, older_than_s: float) -> list[str]:
        """See ``Storage.clean``; also does ``clean_local``."""
        removed = self.clean_local(older_than_s)
        for kind in ARTIFACT_KINDS:
            for name in filter(is_version, self._list(kind_folder(kind))):
                folder = self._path(kind, name)
                if self._is_gone(kind, name) and self._age_s(folder) >= older_than_s:
                    with suppress(FileNotFoundError):  # another host cleans, too
                        self._fs.rm(folder, recursive=True)
                        removed.append(folder)
        # Half written, on a file system that is no object store: it would block its number. Those
        # far below the latest block nothing, and reading all would take longer with every one.
        latest = sorted(self._numbers())[-_LATEST:]
        doomed = [self._record_path(n) for n in latest if self._record(n) is None]
        probes = [name for name in self._list(ACTIVATIONS) if name.startswith(_PROBE)]
        doomed += [f"{self._prefix}/{ACTIVATIONS}/{name}" for name in probes]
        for path in doomed:
            if self._age_s(path) >= older_than_s:
                with suppress(FileNotFoundError):
                    self._fs.rm_file(path)
                    removed.append(path)
        return removed

    def clean_local(self, older_than_s: float) -> list[str]:
        """See ``Storage.clean_local``."""
        removed = []
        for kind in ARTIFACT_KINDS:
            cached = self.local.folder(kind)
            for name in self.local.versions(kind):
                # A version in the making lies here before it is in the store.
                try:
                    age_s = datetime.now(UTC).timestamp() - (cached / name).stat().st_mtime
                except FileNotFoundError:
                    continue  # another process of this host cleans, too
                if age_s >= older_than_s and self._is_gone(kind, name):
                    self._discard(cached / name)
                    removed.append(str(cached / name))
            removed += map(str, remove_partials(cached, older_than_s=older_than_s))
        return removed

    def current(self) -> Activation | None:
        """See ``Storage.current``."""
        for number in sorted(self._numbers(), reverse=True):
            record = self._record(number)
            if record is not None:
                return record
        return None

    def history(self) -> list[Activation]:
        """See ``Storage.history``."""
        records = []
        for number in sorted(self._numbers()):
            try:
                record = self._record(number)
            except UnreadableError:
                raise
            except ArtifactError:
                continue  # as in a folder's; `current` refuses it where it is the latest
            if record is not None:
                records.append(record)
        return records

    def commit(self, activation: Activation) -> bool:
        """See ``Storage.commit``."""
        self._require_exclusive_create()
        later = [number for number in self._numbers() if number >= activation.sequence]
        if not all(map(self._remove_torn, later)):
            return False
        path, line = self._record_path(activation.sequence), to_line(activation)
        made = self._make(path, line)
        if made and later:
            # Another that found the same torn record may just have removed this one for it.
            time.sleep(_SETTLE_S)
            try:
                return bool(self._fs.cat_file(path) == line)
            except FileNotFoundError:
                return False
        return made

    def _make(self, path: str, line: bytes) -> bool:
        """Write a record; whether it is this one that is there now."""
        try:
            if self._create(path, line):
                return True
        except Exception:
            # Its answer may have been lost, and it is there: whoever is told otherwise, and tries
            # again, rolls back twice.
            with suppress(Exception):
                if self._fs.cat_file(path) == line:
                    return True
            raise
        # The name may be taken by what a driver sent before it asked again by itself.
        return bool(self._fs.cat_file(path) == line)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """See ``Storage.exclusive``."""
        yield

    def _path(self, kind: ArtifactKind, version: str, name: str = "") -> str:
        self.local.path(kind, version)  # refuses what is no version
        return "/".join(filter(None, (self._prefix, kind_folder(kind), version, name)))

    def _describe(self, kind: ArtifactKind, version: str) -> str:
        return f"{kind} {version} in {self._fs.unstrip_protocol(self._prefix)}"

    def _list(self, folder: str) -> list[str]:
        path = f"{self._prefix}/{folder}"
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(path, detail=False)
        except FileNotFoundError:
            return []
        return [str(name).rstrip("/").rpartition("/")[2] for name in found]

    def _partial(self, kind: ArtifactKind) -> Path:
        folder = self.local.folder(kind)
        folder.mkdir(parents=True, exist_ok=True)
        partial = partial_sibling(folder)
        partial.mkdir()
        return partial

    def _download_manifest(self, kind: ArtifactKind, version: str, folder: Path) -> Manifest:
        path = self._path(kind, version, MANIFEST_NAME)
        if self._is_gone(kind, version):
            raise ArtifactError(f"{self._describe(kind, version)} does not exist")
        if self._fs.info(path)["size"] > MAX_JSON_BYTES:
            raise ArtifactError(f"{path} is larger than the {MAX_JSON_BYTES} bytes allowed")
        (folder / MANIFEST_NAME).write_bytes(self._fs.cat_file(path))
        try:
            manifest = read_manifest(folder)
        except ArtifactError as error:
            raise ArtifactError(f"{self._describe(kind, version)}: {error}") from error
        if (manifest.kind, manifest.version) != (kind, version):
            raise ArtifactError(f"{path} is of {manifest.kind} version {manifest.version}")
        return manifest

    def _require_size(self, path: str, size: int) -> None:
        # Before a download, so that a manifest never makes a cache take more than it says.
        try:
            found = self._fs.info(path)["size"]
        except FileNotFoundError as error:
            raise ArtifactError(f"{path} is missing; the manifest lists it") from error
        if found != size:
            raise ArtifactError(f"{path} has {found} bytes; the manifest says {size}")

    def _discard(self, path: Path) -> None:
        if not path.exists():
            return
        doomed = partial_sibling(path.parent)
        try:
            path.rename(doomed)
        except FileNotFoundError:
            return
        shutil.rmtree(doomed, ignore_errors=True)

    def _is_there(self, kind: ArtifactKind, version: str) -> bool:
        # Not `exists`: of most file systems it is False where a request fails for any reason.
        self._fs.invalidate_cache()
        try:
            self._fs.info(self._path(kind, version, MANIFEST_NAME))
        except FileNotFoundError:
            return False
        return True

    def _is_gone(self, kind: ArtifactKind, version: str) -> bool:
        """Whether a version is not there, or is what a killed writer left.

        Asked twice, for its manifest and for all of it: one wrong answer must not cost a version.
        """
        if self._is_there(kind, version):
            return False
        found: list[str] = []
        with suppress(FileNotFoundError):
            found = [str(path) for path in self._fs.find(self._path(kind, version))]
        return not any(path.endswith(f"/{version}/{MANIFEST_NAME}") for path in found)

    def _age_s(self, path: str) -> float:
        """Seconds since a file, or anything below a folder, was written; 0 where nobody says."""
        try:
            times = [self._fs.modified(one) for one in self._fs.find(path)]
            if not times and not self._fs.ls(path):
                return float("inf")  # a folder with nothing in it
        except (NotImplementedError, FileNotFoundError):
            return 0.0
        newest = max((t if t.tzinfo else t.replace(tzinfo=UTC) for t in times), default=None)
        return 0.0 if newest is None else (datetime.now(UTC) - newest).total_seconds()

    def _numbers(self) -> list[int]:
        names = (n.removesuffix(".json") for n in self._list(ACTIVATIONS) if n.endswith(".json"))
        return [int(name) for name in names if name.isascii() and name.isdigit()]

    def _record_path(self, number: int) -> str:
        return f"{self._prefix}/{ACTIVATIONS}/{number:0{_DIGITS}d}.json"

    def _record(self, number: int) -> Activation | None:
        """A record; None for one whose writer was cut off (where writing is not atomic).

        Raises:
            UnreadableError: it is there and cannot be read just now.
            ArtifactError: it is whole and says what is not understood, as of a later version.
        """
        path = self._record_path(number)
        for _ in range(_READS):
            try:
                data = self._fs.cat_file(path)
                try:
                    record = from_line(data, path)
                except ArtifactError:
                    if data.endswith(b"\n"):
                        raise
                    if self._fs.info(path)["size"] == len(data):
                        return None
                    continue  # the answer was cut short, or it is being written
            except FileNotFoundError as error:
                if number in self._numbers():
                    raise UnreadableError(f"{path} is listed, but cannot be read") from error
                return None  # cleaned away meanwhile
            return record if record.sequence == number else None
        raise UnreadableError(f"{path} is read short again and again")

    def _remove_torn(self, number: int) -> bool:
        """Remove a record whose writer was cut off some time ago; whether it was one."""
        path = self._record_path(number)
        if self._record(number) is not None or self._age_s(path) < _TORN_S:
            return False
        with suppress(FileNotFoundError):
            self._fs.rm_file(path)
        return True

    def _create(self, path: str, data: bytes) -> bool:
        try:
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        self._fs.invalidate_cache()
        return True

    def _require_exclusive_create(self) -> None:
        """Find out once whether the file system keeps a second writer from a name."""
        if self._creates_exclusively:
            return
        probe = f"{self._prefix}/{ACTIVATIONS}/{_PROBE}{secrets.token_hex(8)}"
        try:
            works = self._create(probe, b"1") and not self._create(probe, b"2")
        except (TypeError, NotImplementedError, ValueError) as error:
            raise ArtifactError(_no_exclusive_create(self._fs)) from error
        finally:
            with suppress(FileNotFoundError):
                self._fs.rm_file(probe)
        if not works:
            raise ArtifactError(_no_exclusive_create(self._fs))
        self._creates_exclusively = True


def _no_exclusive_create(filesystem: Any) -> str:
    return (
        f"the file system {type(filesystem).__name__} cannot write an object only if there is none "
        "of its name, which an activation rests on; update it, or keep the store in a folder"
    )
