"""Which checkpoints of a training are whole, and whose they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rectokens.core.atomic_file import atomic_file

PREFIX = "checkpoint-"
_MARKER = "complete.json"


class CheckpointError(ValueError):
    """A checkpoint that this run cannot go on from."""


def last_checkpoint(
    folder: Path, settings: Mapping[str, Any], *, some: bool = False
) -> Path | None:
    """The newest whole checkpoint of a run, None where there is none; half ones are removed.

    Args:
        folder: of the run, which holds ``checkpoint-<step>`` folders.
        settings: of the run, JSON values.
        some: these are not all of its settings; the others are not looked at.

    Raises:
        CheckpointError: it is of a run with other settings; names them.
    """
    whole: list[tuple[int, Path]] = []
    for path in folder.glob(f"{PREFIX}*"):
        step = path.name.removeprefix(PREFIX)
        if not step.isdigit() or not path.is_dir():
            continue
        if (path / _MARKER).is_file():
            whole.append((int(step), path))
        else:
            shutil.rmtree(path)
    if not whole:
        return None
    newest = max(whole)[1]
    found = json.loads((newest / _MARKER).read_text(encoding="utf-8"))["settings"]
    wanted = json.loads(json.dumps(settings))
    names = set(wanted) if some else {*found, *wanted}
    differing = sorted(name for name in names if found.get(name) != wanted.get(name))
    if differing:
        told = ", ".join(f"{n} {found.get(n)!r}, now {wanted.get(n)!r}" for n in differing[:5])
        raise CheckpointError(
            f"{newest} is of a run with other settings: {told}; use another output_dir, or remove "
            "the checkpoints to begin anew"
        )
    return newest


def unmark(checkpoint: Path) -> None:
    """Say that a checkpoint is about to be written over."""
    (checkpoint / _MARKER).unlink(missing_ok=True)


def mark_whole(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Say that everything in a checkpoint has been written."""
    with atomic_file(checkpoint / _MARKER) as partial:
        partial.write_text(json.dumps({"settings": dict(settings)}), encoding="utf-8")
