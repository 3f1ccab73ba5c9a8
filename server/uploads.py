"""Files that were sent: in one folder, under names of ours, within bounds, for a few days."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rectokens.core.atomic_file import fsync_folder

KEEP_S = 3 * 86_400.0
# A partial file that nobody writes to any more belongs to a process that was killed. Where files
# can be locked that is seen much sooner: one that lives has locked its file by then.
_MAYBE_STALE_S = 30.0
_STALE_PARTIAL_S = 3_600.0
_PARTIAL = ".partial-"
_NAME = re.compile(r"[0-9a-f]{32}\.[a-z]{1,8}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UploadError(Exception):
    """There is no room for an upload; the message names what there is and what is allowed."""


class EmptyUploadError(UploadError):
    """A file with nothing in it."""


@dataclass(frozen=True, slots=True)
class StoredUpload:
    """A file that arrived whole.

    Attributes:
        name: in the folder.
        num_bytes: its size.
        sha256: of its content, None where it was not computed.
        modified_s: when it arrived, in Unix seconds.
    """

    name: str
    num_bytes: int
    sha256: str | None
    modified_s: float


class UploadFolder:
    """The folder of uploads. Everything here blocks.

    Args:
        folder: created when the first upload begins.
        max_bytes: of all uploads together, those on their way included.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes

    def begin(self, suffix: str) -> UploadWriter:
        """Begin a file; old ones go first.

        Args:
            suffix: lower-case letters.

        Raises:
            OSError: the folder cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self.remove_old()
        name = f"{secrets.token_hex(16)}.{suffix}"
        if not _NAME.fullmatch(name):
            raise ValueError(f"suffix is {suffix!r}; allowed are 1 to 8 lower-case letters")
        return UploadWriter(self, self._folder, name)

    def stored(self) -> list[StoredUpload]:
        """Files that arrived whole, latest first."""
        if not self._folder.is_dir():
            return []
        found = [
            StoredUpload(path.name, state.st_size, None, state.st_mtime)
            for path, state in self._files()
            if _NAME.fullmatch(path.name)
        ]
        return sorted(found, key=lambda one: (one.modified_s, one.name), reverse=True)

    def remove(self, name: str) -> bool:
        """Remove a file; whether it was there. A name that is not one of ours is never there."""
        if not _NAME.fullmatch(name):
            return False
        try:
            (self._folder / name).unlink()
        except FileNotFoundError:
            return False
        return True

    def remove_old(self) -> None:
        """Remove files past their days, and what killed processes left."""
        now = time.time()
        for path, state in self._files():
            age_s = now - state.st_mtime
            if path.name.startswith(_PARTIAL):
                old = age_s > _STALE_PARTIAL_S or (age_s > _MAYBE_STALE_S and _is_nobodys(path))
            else:
                old = _NAME.fullmatch(path.name) is not None and age_s > KEEP_S
            if old:
                path.unlink(missing_ok=True)

    def require_room(self, more: int) -> None:
        """Refuse what would exceed the bound.

        Raises:
            UploadError: it would.
        """
        used = sum(state.st_size for _, state in self._files())
        if used + more > self._max_bytes:
            raise UploadError(
                f"uploads take {used} bytes, and this one needs more; at most {self._max_bytes} "
                "are allowed together; delete some"
            )

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Files that are there; other uploads begin, end and go meanwhile."""
        for path in self._folder.iterdir():
            try:
                state = path.stat()
            except FileNotFoundError:
                continue
            if stat.S_ISREG(state.st_mode):
                yield path, state


class UploadWriter:
    """One file on its way. Hidden from jobs until it is finished."""

    def __init__(self, uploads: UploadFolder, folder: Path, name: str) -> None:
        self._uploads = uploads
        self._target = folder / name
        self._partial = folder / f"{_PARTIAL}{name}"
        self._digest = hashlib.sha256()
        self._num_bytes = 0
        # Exclusively: a name that is taken, a link included, is never written through.
        self._file: BinaryIO | None = self._partial.open("xb")
        with suppress(OSError):
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def write(self, data: bytes) -> None:
        """Append bytes.

        Raises:
            UploadError: there is no room.
            OSError: the file cannot be written.
        """
        assert self._file is not None
        if not data:
            return
        self._uploads.require_room(len(data))
        with _told_if_full():
            self._file.write(data)
            self._file.flush()
        self._digest.update(data)
        self._num_bytes += len(data)

    def finish(self) -> StoredUpload:
        """Make the file lasting and visible.

        Raises:
            EmptyUploadError: it is empty.
            UploadError: the disk is full.
            OSError: it cannot be written.
        """
        assert self._file is not None
        if not self._num_bytes:
            raise EmptyUploadError("the file is empty")
        with _told_if_full():
            os.fsync(self._file.fileno())
            os.rename(self._partial, self._target)
            fsync_folder(self._target.parent)
        self._file.close()
        self._file = None
        return StoredUpload(
            self._target.name, self._num_bytes, self._digest.hexdigest(), time.time()
        )

    def discard(self) -> None:
        """Remove a file that was not finished; nothing if it was."""
        if self._file is not None:
            file, self._file = self._file, None
            # Closing writes what a disk that is full has not taken before: it fails once more.
            with suppress(OSError):
                file.close()
            for path in (self._partial, self._target):
                path.unlink(missing_ok=True)


def _is_nobodys(partial: Path) -> bool:
    """Whether no process holds a partial file, as far as locks tell."""
    try:
        with partial.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def _told_if_full() -> Iterator[None]:
    """Raise an ``UploadError`` where there is no room on the disk."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UploadError("the disk is full") from error
        raise
