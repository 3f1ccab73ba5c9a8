"""The immutable folder that every artifact is: its manifest, how it is written and opened."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from rectokens.artifacts.errors import ArtifactError, UnreadableError
from rectokens.artifacts.files import (
    flush_folder,
    names_below,
    require_plain_name,
    sha256_files,
)
from rectokens.artifacts.json_fields import JsonObject, read_json, require_finite, write_json
from rectokens.core.atomic_file import PARTIAL_PREFIX, fsync_folder, partial_sibling

ArtifactKind = Literal["tokenizer", "model", "catalog", "release"]
ARTIFACT_KINDS: tuple[ArtifactKind, ...] = get_args(ArtifactKind)

MANIFEST_NAME = "manifest.json"
FORMAT_NAME = "rectokens-artifact"
FORMAT_VERSION = 1
VERSION_LENGTH = 16

_HEX64 = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(rf"[0-9a-f]{{{VERSION_LENGTH}}}")
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of an artifact.

    Attributes:
        size: in bytes.
        sha256: of the content, 64 hexadecimal digits.
    """

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ParentRef:
    """What an artifact was made from.

    Attributes:
        version: the parent's manifest version, None where it was never an artifact.
        fingerprint: the tokenizer fingerprint the parent stands for, None where it has none.
    """

    version: str | None
    fingerprint: str | None


@dataclass(frozen=True, slots=True)
class Manifest:
    """What ``manifest.json`` says.

    Attributes:
        format: name of the folder format.
        format_version: its version; only those this code understands are ever returned.
        created: UTC time of writing, ISO 8601.
        kind: tokenizer, model, catalog or release.
        version: content hash, see :func:`content_version`.
        files: by relative POSIX path; the manifest itself is not among them.
        parents: by the parent's kind.
        numbers: counts and quality figures.
    """

    format: str
    format_version: int
    created: str
    kind: str
    version: str
    files: dict[str, FileEntry]
    parents: dict[str, ParentRef]
    numbers: dict[str, float | int | str]


def content_version(files: Mapping[str, FileEntry]) -> str:
    """Version of a set of files: the first 16 digits of a SHA-256 over names and SHA-256.

    The hashed text has a line ``<sha256>  <name>`` per file, sorted by name: what ``sha256sum``
    prints, so anyone can recompute it.
    """
    lines = [f"{files[name].sha256}  {name}\n" for name in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:VERSION_LENGTH]


def is_version(text: str) -> bool:
    """Whether ``text`` has the form of an artifact version."""
    return _VERSION.fullmatch(text) is not None


def write_artifact(
    root: Path,
    kind: str,
    populate: Callable[[Path], None],
    *,
    parents: Mapping[str, ParentRef] = _NOTHING,
    numbers: Mapping[str, float | int | str] = _NOTHING,
) -> Path:
    """Write an artifact so that it is either there and complete, or not there at all.

    ``populate`` fills a temporary sibling; its files are flushed to the disk, the manifest is
    written last, then the folder is renamed to its version. The same content gives the same
    folder: one that exists already is checked and kept or, if it is damaged, replaced. Whatever
    fails, the temporary folder is removed; a killed writer leaves a hidden one behind, which no
    reader looks at and which :func:`remove_partials` (called here for folders older than a day)
    clears away.

    Args:
        root: folder of the version folders; created if missing.
        kind: one of ``ARTIFACT_KINDS``.
        populate: writes regular files (folders below are allowed) into the folder it is given.
        parents: by kind, what the artifact was made from.
        numbers: counts and quality figures, finite.

    Returns:
        ``root/<version>``.

    Raises:
        ArtifactError: unknown kind, unusable file name, no files.
        UnreadableError: a folder of this version is there, and cannot be read just now.
    """
    _require_kind(kind)
    require_finite(numbers, f"numbers of the {kind}")
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    remove_partials(root)
    partial = partial_sibling(root)
    partial.mkdir()
    try:
        populate(partial)
        files = _survey(partial)
        version = content_version(files)
        write_json(partial / MANIFEST_NAME, _to_json(kind, version, files, parents, numbers))
        flush_folder(partial)
        target = root / version
        if target.exists():
            if _is_intact(target, kind):
                return target
            _set_aside(target)
        try:
            os.rename(partial, target)
        except OSError as error:
            # Another writer of the same content was quicker.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            open_artifact(target, kind)
        else:
            fsync_folder(root)
        return target
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_manifest(path: Path) -> Manifest:
    """Read and check ``manifest.json`` alone, without looking at the files it names.

    Raises:
        ArtifactError: missing or malformed manifest, format version not understood, a version
            that is not the hash of the files, or a file name that could leave the folder.
    """
    path = Path(path)
    if not path.is_dir():
        found = "is not a folder" if path.exists() else "does not exist"
        raise ArtifactError(f"artifact folder {path} {found}")
    if not (path / MANIFEST_NAME).exists():
        raise ArtifactError(f"{path} is not an artifact: it has no {MANIFEST_NAME}")
    fields = read_json(path / MANIFEST_NAME)
    fields.format_version(FORMAT_NAME, FORMAT_VERSION)
    manifest = Manifest(
        format=FORMAT_NAME,
        format_version=FORMAT_VERSION,
        created=fields.string("created"),
        kind=fields.string("kind"),
        version=fields.string("version"),
        files=_read_files(fields.child("files")),
        parents=_read_parents(fields.child("parents")),
        numbers=fields.scalars("numbers"),
    )
    fields.done()
    _require_kind(manifest.kind, fields.where)
    expected = content_version(manifest.files)
    if manifest.version != expected:
        raise ArtifactError(
            f"{fields.where}: version is {manifest.version!r}, but the files it lists give "
            f"{expected!r}; the manifest was altered"
        )
    return manifest


def open_artifact(path: Path, kind: str, *, verify_checksums: bool = True) -> Manifest:
    """Check that a folder is a complete artifact of the given kind.

    Sizes are always verified; so is that there is no file beside those of the manifest (hidden
    ones excepted), since a stray file can change what a reader of the folder loads. The folder's
    own name does not matter: the identity is the manifest's version, recomputed.

    Args:
        path: the artifact folder.
        kind: kind it must be.
        verify_checksums: hash every file, several at a time in threads.

    Raises:
        ArtifactError: as :func:`read_manifest`; another kind; a file that is missing, of another
            size or content, not a regular file inside the folder, or not in the manifest.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if manifest.kind != kind:
        raise ArtifactError(f"{path} is a {manifest.kind} artifact; expected a {kind} artifact")
    folder = path.resolve()
    for name, entry in manifest.files.items():
        _require_file(folder, name, entry)
    extra = sorted(set(names_below(folder, hidden=False)) - set(manifest.files) - {MANIFEST_NAME})
    if extra:
        raise ArtifactError(
            f"{path} has {len(extra)} files that its manifest does not list: {', '.join(extra[:5])}"
        )
    if verify_checksums:
        _verify_checksums(folder, manifest)
    return manifest


def remove_partials(
    root: Path, *, older_than_s: float = 86_400.0, writer: int | None = None
) -> list[Path]:
    """Remove what killed writers left in ``root``.

    Args:
        root: folder of the version folders.
        older_than_s: only those in which nothing was written for so many seconds.
        writer: only those of the process of this id.

    Returns:
        What was removed.
    """
    removed = []
    now = time.time()
    whose = "" if writer is None else f"{writer}-"
    for partial in sorted(Path(root).glob(f"{PARTIAL_PREFIX}{whose}*")):
        try:
            newest = max(p.lstat().st_mtime for p in (partial, *partial.rglob("*")))
            if now - newest < older_than_s:
                continue
            if partial.is_dir() and not partial.is_symlink():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink(missing_ok=True)
        except OSError:
            # Its writer is alive and has just moved or removed something; or it is not ours to
            # remove, which must keep nobody from writing.
            continue
        removed.append(partial)
    return removed


def _require_kind(kind: str, where: str = "artifact") -> None:
    if kind not in ARTIFACT_KINDS:
        raise ArtifactError(
            f"{where}: kind is {kind!r}; allowed are {', '.join(map(repr, ARTIFACT_KINDS))}"
        )


def _is_intact(target: Path, kind: str) -> bool:
    try:
        open_artifact(target, kind)
    except UnreadableError:
        raise
    except ArtifactError:
        return False
    return True


def _set_aside(target: Path) -> None:
    """Remove a damaged folder, of which the content is at hand."""
    doomed = partial_sibling(target.parent)
    with suppress(FileNotFoundError):
        os.rename(target, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _survey(folder: Path) -> dict[str, FileEntry]:
    """Hash the files that ``populate`` wrote."""
    names = list(names_below(folder, hidden=True))
    if not names:
        raise ArtifactError("an artifact needs at least one file; none was written")
    for name in names:
        require_plain_name(name, "artifact")
        if name == MANIFEST_NAME:
            raise ArtifactError(f"file name {MANIFEST_NAME!r} is taken by the manifest")
        if not stat.S_ISREG(os.lstat(folder / name).st_mode):
            raise ArtifactError(f"artifact file {name!r} is not a regular file")
    hashes = sha256_files(folder, names)
    return {
        name: FileEntry(size=os.path.getsize(folder / name), sha256=digest)
        for name, digest in sorted(zip(names, hashes, strict=True))
    }


def _require_file(folder: Path, name: str, entry: FileEntry) -> None:
    path = folder / name
    if not path.exists():
        raise ArtifactError(f"{path} is missing; the manifest lists it")
    if not path.resolve().is_relative_to(folder):
        raise ArtifactError(f"{path} is a link that leads out of the artifact folder")
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ArtifactError(f"{path} is not a regular file")
    if found.st_size != entry.size:
        raise ArtifactError(f"{path} has {found.st_size} bytes; the manifest says {entry.size}")


def _verify_checksums(folder: Path, manifest: Manifest) -> None:
    try:
        hashes = sha256_files(folder, list(manifest.files))
    except OSError as error:
        raise UnreadableError(f"{error.filename} cannot be read: {error.strerror}") from error
    for (name, entry), digest in zip(manifest.files.items(), hashes, strict=True):
        if digest != entry.sha256:
            raise ArtifactError(
                f"{folder / name} has SHA-256 {digest}; the manifest says {entry.sha256}"
            )


def _to_json(
    kind: str,
    version: str,
    files: Mapping[str, FileEntry],
    parents: Mapping[str, ParentRef],
    numbers: Mapping[str, float | int | str],
) -> dict[str, Any]:
    return {
        "format": {"name": FORMAT_NAME, "version": FORMAT_VERSION},
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "kind": kind,
        "version": version,
        "files": {n: {"size": f.size, "sha256": f.sha256} for n, f in files.items()},
        "parents": {
            n: {"version": p.version, "fingerprint": p.fingerprint} for n, p in parents.items()
        },
        "numbers": dict(numbers),
    }


def _read_files(fields: JsonObject) -> dict[str, FileEntry]:
    files = {}
    for name in fields.names():
        require_plain_name(name, fields.where)
        if name == MANIFEST_NAME:
            raise ArtifactError(f"{fields.where}: {MANIFEST_NAME} must not list itself")
        one = fields.child(name)
        entry = FileEntry(size=one.integer("size"), sha256=one.string("sha256"))
        if not _HEX64.fullmatch(entry.sha256):
            raise ArtifactError(
                f"{one.where}: sha256 is {entry.sha256!r}; expected 64 hexadecimal digits"
            )
        one.done()
        files[name] = entry
    if not files:
        raise ArtifactError(f"{fields.where} lists no files")
    return files


def _read_parents(fields: JsonObject) -> dict[str, ParentRef]:
    parents = {}
    for kind in fields.names():
        one = fields.child(kind)
        parents[kind] = ParentRef(
            version=one.optional_string("version"), fingerprint=one.optional_string("fingerprint")
        )
        one.done()
    return parents


def require_tokenizer(path: Path, manifest: Manifest, name: str, fingerprint: str) -> None:
    """Check that a manifest's parent is the tokenizer that a file of the artifact names.

    Raises:
        ArtifactError: it names another, or none.
    """
    parent = manifest.parents.get("tokenizer")
    found = None if parent is None else parent.fingerprint
    if found != fingerprint:
        raise ArtifactError(
            f"{path}: the manifest names tokenizer {found or 'none'}, {name} names {fingerprint}"
        )
