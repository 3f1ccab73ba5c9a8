"""Which release is active, and how it came to be: one numbered record per change."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.json_fields import parse_json
from rectokens.artifacts.manifest import is_version

FORMAT_NAME = "rectokens-activation"
FORMAT_VERSION = 1
# Steps that can be rolled back one after the other.
MAX_EARLIER = 32
MAX_NOTE_LENGTH = 1_000

Action = Literal["activate", "rollback"]


@dataclass(frozen=True, slots=True)
class Activation:
    """A release became the active one.

    Attributes:
        sequence: 1, 2, ...; the record of the highest number names the active release.
        action: what was asked for.
        release: version of the release that is active from then on.
        earlier: releases that a rollback goes back to, the next one first. A rollback takes its
            target off this list, so two in a row go back two steps.
        at: UTC time, ISO 8601.
        note: free text of whoever asked, None for none.
    """

    sequence: int
    action: Action
    release: str
    earlier: tuple[str, ...]
    at: str
    note: str | None

    @property
    def previous(self) -> str | None:
        """The release that a rollback goes back to."""
        return self.earlier[0] if self.earlier else None


def next_activation(current: Activation | None, release: str, note: str | None) -> Activation:
    """The record that makes ``release`` active after ``current``."""
    earlier: tuple[str, ...] = ()
    if current is not None:
        rest = tuple(version for version in current.earlier if version != release)
        earlier = (current.release, *rest)[:MAX_EARLIER]
    return _record(current, "activate", release, earlier, note)


def next_rollback(current: Activation, note: str | None) -> Activation:
    """The record that goes back to the release before ``current``.

    Raises:
        ArtifactError: there is none.
    """
    if not current.earlier:
        raise ArtifactError(
            f"there is nothing to roll back to; {current.release} is the earliest active release"
        )
    return _record(current, "rollback", current.earlier[0], current.earlier[1:], note)


def to_line(activation: Activation) -> bytes:
    """One line of JSON, its newline included."""
    value = {
        "format": {"name": FORMAT_NAME, "version": FORMAT_VERSION},
        "sequence": activation.sequence,
        "action": activation.action,
        "release": activation.release,
        "earlier": list(activation.earlier),
        "at": activation.at,
        "note": activation.note,
    }
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def from_line(data: bytes, where: str) -> Activation:
    """Read what :func:`to_line` wrote.

    Raises:
        ArtifactError: not such a record; names ``where``, the field and what is allowed.
    """
    fields = parse_json(data, where)
    fields.format_version(FORMAT_NAME, FORMAT_VERSION)
    action = fields.string("action")
    if action not in ("activate", "rollback"):
        raise ArtifactError(f"{where}: action is {action!r}; allowed are 'activate' and 'rollback'")
    activation = Activation(
        sequence=fields.integer("sequence", 1),
        action="activate" if action == "activate" else "rollback",
        release=fields.string("release"),
        earlier=fields.strings("earlier"),
        at=fields.string("at"),
        note=fields.optional_string("note"),
    )
    fields.done()
    for version in (activation.release, *activation.earlier):
        if not is_version(version):
            raise ArtifactError(
                f"{where}: release is {version!r}; expected 16 lower-case hexadecimal digits"
            )
    return activation


def from_lines(data: bytes, where: str) -> list[Activation]:
    """Records of a history, oldest first; what a crash left half written is passed over."""
    records = []
    for line in data.splitlines():
        try:
            records.append(from_line(line, where))
        except ArtifactError:
            continue
    return records


def _record(
    current: Activation | None,
    action: Action,
    release: str,
    earlier: tuple[str, ...],
    note: str | None,
) -> Activation:
    if note is not None and not 0 < len(note) <= MAX_NOTE_LENGTH:
        raise ArtifactError(
            f"note has {len(note)} characters; allowed are 1 to {MAX_NOTE_LENGTH}, or no note"
        )
    return Activation(
        sequence=1 if current is None else current.sequence + 1,
        action=action,
        release=release,
        earlier=earlier,
        at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        note=note,
    )
