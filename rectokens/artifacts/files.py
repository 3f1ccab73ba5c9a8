"""Files and folders on disk: plain names, hashing, flushing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from rectokens.artifacts.errors import ArtifactError
from rectokens.core.atomic_file import fsync_folder, ordinary_mode


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

    Files get ordinary permissions, so that a server may be another user than their writer.
    """
    mode = ordinary_mode()
    for name in names_below(folder, hidden=True):
        with open(folder / name, "rb") as file:
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
    for parent, _, _ in os.walk(folder):
        fsync_folder(Path(parent))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
