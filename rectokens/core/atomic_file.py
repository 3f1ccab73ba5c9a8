"""Single files written so that a crash cannot leave them half."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
            os.fchmod(file.fileno(), ordinary_mode())
            os.fsync(file.fileno())
        os.replace(partial, path)
        fsync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def ordinary_mode() -> int:
    """Permissions of a new file as the process's umask says.

    Some writers make their files private to their owner, and a reader is often another user.
    """
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def fsync_folder(path: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
