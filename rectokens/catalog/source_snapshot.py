"""Whether files stayed as they were while they were read."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# File systems tell times in steps as long as a tick of the kernel's clock: a change within the
# step in which the snapshot was taken would not show.
_CLOCK_STEP_S = 0.02


@dataclass(frozen=True, slots=True)
class _State:
    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int


@dataclass(frozen=True, slots=True)
class SourceSnapshot:
    """What the file system told of some files at one moment.

    Size and modification time can be kept by whoever rewrites a file; the time of change, which
    is the file system's own, cannot.
    """

    _states: dict[Path, _State]

    @classmethod
    def take(cls, paths: Sequence[Path]) -> SourceSnapshot:
        """The files now.

        Raises:
            OSError: one is missing.
        """
        states = {path: _state(path) for path in paths}
        newest = max((one.changed_ns for one in states.values()), default=0)
        age_s = time.time() - newest / 1e9
        if 0 <= age_s < _CLOCK_STEP_S:
            time.sleep(_CLOCK_STEP_S)
            states = {path: _state(path) for path in paths}
        return cls(states)

    def require_unchanged(self) -> None:
        """Refuse what was read if a file is not the one it was.

        Raises:
            ValueError: naming the file and what changed.
        """
        for path, before in self._states.items():
            try:
                after = _state(path)
            except OSError as error:
                raise ValueError(f"{path} changed while it was read: {error.strerror}") from error
            if after != before:
                what = "it was written to"
                if after.size != before.size:
                    what = f"it had {before.size:,} bytes and now has {after.size:,}"
                elif after.inode != before.inode:
                    what = "it was replaced by another file"
                raise ValueError(f"{path} changed while it was read: {what}; read it again")


def _state(path: Path) -> _State:
    found = os.stat(path)
    return _State(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
