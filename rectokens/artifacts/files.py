"""Files and folders on disk: plain names, hashing, and writes that a crash cannot leave half."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from rectokens.artifacts.errors import ArtifactError

PARTIAL_PREFIX = ".partial-"


def partial_sibling(root: Path) -> Path:
    """A fresh hidden name in ``root`` for something not finished yet."""
    return root / f"{PARTIAL_PREFIX}{os.getpid()}-{secrets.token_hex(6)}"


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write a single file so that ``path`` appears complete or not at all.

    Yields:
        A temporary sibling (same suffix) to write to; renamed to ``path`` when the block ends,
        removed when it raises.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_sibling(path.parent)
    partial = partial.with_name(partial.name + path.suffix)
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.fsync(file.fileno())
        os.replace(partial, path)
        fsync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def require_plain_name(name: str, where: str) -> None:
    """Accept only a relative POSIX path of ordinary names, which cannot leave its folder.

    Raises:
        ArtifactError: naming ``where`` and the name.
    """
    parts = name.split("/")
    plain = all(part and not part.startswith(".") for part in parts)
    if not plain or "\\" in name or not name.isprintable() or PurePosixPath(name).is_absolute():
        raise ArtifactError(
            f"{where}: file name {name!r} is not allowed; it must be a relative path of names "
            "that are not empty and do not begin with a dot"
        )


def names_below(folder: Path, *, hidden: bool) -> Iterator[str]:
    """Relative POSIX paths of all that is not a folder (links to folders count as files).

    Args:
        folder: where to look, at any depth.
        hidden: whether names that begin with a dot are listed too.
    """
    for parent, folders, names in os.walk(folder):
        if not hidden:
            folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in (*names, *links):
            if hidden or not name.startswith("."):
                yield Path(parent, name).relative_to(folder).as_posix()


def sha256_files(folder: Path, names: Sequence[str]) -> list[str]:
    """SHA-256 of each file, hexadecimal, in the order of ``names``."""
    # hashlib releases the interpreter lock, so files are hashed side by side.
    with ThreadPoolExecutor(max(1, min(len(names), os.cpu_count() or 1, 8))) as pool:
        return list(pool.map(lambda name: _sha256(folder / name), names))


def flush_folder(folder: Path) -> None:
    """Flush every file and folder below to the disk, and the folder itself.

    Files get the permissions that the process's umask says: some writers make them private to
    their owner, and a server is often another user.
    """
    mode = 0o666 & ~_umask()
    for name in names_below(folder, hidden=True):
        with open(folder / name, "rb") as file:
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
    for parent, _, _ in os.walk(folder):
        fsync_folder(Path(parent))


def fsync_folder(path: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
