"""Which versions of a store may go: a pure function of what there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import isfinite
from typing import Literal

from rectokens.artifacts.manifest import ArtifactKind, Manifest

VersionState = Literal["active", "previous", "available", "damaged"]
_PARTS: tuple[ArtifactKind, ...] = ("model", "catalog")


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """What stays beside the active and the previous release and all that these need.

    Attributes:
        keep_last: of each kind, so many of the latest versions stay; a release that was active
            lately is late, however old it is.
        keep_younger_than_s: versions made, or active, within so many seconds stay: something may
            be about to use them.

    Raises:
        ValueError: a number below 0 or not finite.
    """

    keep_last: int = 5
    keep_younger_than_s: float = 86_400.0

    def __post_init__(self) -> None:
        if self.keep_last < 0:
            raise ValueError(f"keep_last is {self.keep_last}; it must be at least 0")
        if not isfinite(self.keep_younger_than_s) or self.keep_younger_than_s < 0:
            raise ValueError(
                f"keep_younger_than_s is {self.keep_younger_than_s}; it must be at least 0, finite"
            )


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """One version of a store.

    Attributes:
        kind: of the artifact.
        version: its name.
        state: ``active`` and ``previous``: the release that is served and the one a rollback goes
            back to, and their parts; ``damaged``: its manifest cannot be read.
        created: UTC, ISO 8601; None where it cannot be read.
        num_bytes: of its files.
        parts: for a release, the version of its model and of its catalog.
        tokenizer: fingerprint of the tokenizer it is, or that it was made with.
        numbers: counts and quality figures of its manifest.
        problem: what is wrong with a damaged one.
    """

    kind: ArtifactKind
    version: str
    state: VersionState
    created: str | None
    num_bytes: int
    parts: Mapping[ArtifactKind, str]
    tokenizer: str | None
    numbers: Mapping[str, float | int | str]
    problem: str | None = None


def stored_version(manifest: Manifest, kind: ArtifactKind, state: VersionState) -> StoredVersion:
    """What a manifest tells of its version."""
    parents = manifest.parents
    parts: dict[ArtifactKind, str] = {}
    if kind == "release":
        for part in _PARTS:
            version = parents[part].version if part in parents else None
            if version is not None:
                parts[part] = version
    own = manifest.numbers.get("fingerprint") if kind == "tokenizer" else None
    of_parent = parents["tokenizer"].fingerprint if "tokenizer" in parents else None
    return StoredVersion(
        kind=kind,
        version=manifest.version,
        state=state,
        created=manifest.created,
        num_bytes=sum(entry.size for entry in manifest.files.values()),
        parts=parts,
        tokenizer=own if isinstance(own, str) else of_parent,
        numbers=manifest.numbers,
    )


def plan_removal(
    versions: Sequence[StoredVersion],
    last_active: Mapping[str, datetime],
    policy: RetentionPolicy,
    now: datetime,
) -> list[StoredVersion]:
    """Versions that the policy lets go, in the order in which to remove them.

    Releases come first, then models and catalogs, then tokenizers, so that a crash in between
    never leaves a release without its parts. Damaged versions whose age nobody knows stay.

    Args:
        versions: all of a store, of every kind.
        last_active: by release version, when it was activated last.
        policy: what stays.
        now: the time.
    """
    releases = [one for one in versions if one.kind == "release"]
    kept = _kept(releases, last_active, policy, now)
    parts = [one for one in versions if one.kind in _PARTS]
    needed = {(kind, version) for one in kept for kind, version in one.parts.items()}
    kept_parts = [one for one in parts if (one.kind, one.version) in needed]
    for kind in _PARTS:
        kept_parts += _kept([p for p in parts if p.kind == kind], {}, policy, now)
    tokenizers = [one for one in versions if one.kind == "tokenizer"]
    spoken = {one.tokenizer for one in kept_parts}
    kept_tokenizers = [one for one in tokenizers if one.tokenizer in spoken]
    kept_tokenizers += _kept(tokenizers, {}, policy, now)
    stays = {(one.kind, one.version) for one in (*kept, *kept_parts, *kept_tokenizers)}
    return [one for one in (*releases, *parts, *tokenizers) if (one.kind, one.version) not in stays]


def _kept(
    versions: Sequence[StoredVersion],
    last_active: Mapping[str, datetime],
    policy: RetentionPolicy,
    now: datetime,
) -> list[StoredVersion]:
    """What stays of one kind for its own sake."""

    def used(one: StoredVersion) -> datetime:
        times = [datetime.fromisoformat(one.created)] if one.created is not None else [now]
        times += [last_active[one.version]] if one.version in last_active else []
        return max(times)

    latest = sorted(versions, key=used, reverse=True)
    return [
        one
        for place, one in enumerate(latest)
        if place < policy.keep_last
        or one.state in ("active", "previous")
        or one.created is None
        or (now - used(one)).total_seconds() < policy.keep_younger_than_s
    ]
