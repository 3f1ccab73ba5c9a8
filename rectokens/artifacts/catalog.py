"""``catalog.json``: what a catalog artifact says of itself before its tables are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.json_fields import JsonObject, read_json
from rectokens.artifacts.manifest import Manifest, open_artifact, require_tokenizer

CATALOG_NAME = "catalog.json"
_FORMAT_NAME = "rectokens-catalog"
_FORMAT_VERSION = 1
_MAX_COUNT = 2**31 - 1

CollisionPolicy = Literal["share", "extra_level"]
COLLISION_POLICIES: tuple[CollisionPolicy, ...] = get_args(CollisionPolicy)


def require_collision_policy(policy: str, where: str) -> CollisionPolicy:
    """The policy itself, if there is one of that name.

    Raises:
        ArtifactError: naming the policies there are.
    """
    for known in COLLISION_POLICIES:
        if policy == known:
            return known
    raise ArtifactError(
        f"{where}: collision policy is {policy!r}; allowed are "
        f"{', '.join(map(repr, COLLISION_POLICIES))}"
    )


@dataclass(frozen=True, slots=True)
class CatalogConfig:
    """The configuration of a catalog.

    Attributes:
        tokenizer_fingerprint: of the tokenizer that gave the codes.
        collision_policy: how items that share a tokenizer's codes are told apart.
        num_items: N.
        num_levels: L, the extra level included.
        codebook_size: K.
        level_offsets: L + 2 entries; first node of each depth of the trie, then the node count.
        has_prior: whether items carry a prior.
        metadata_columns: names, in order.
        constraint_sets: number of items of each named set.
        predicates: the condition that defines a set, by name; not every set has one.
    """

    tokenizer_fingerprint: str
    collision_policy: CollisionPolicy
    num_items: int
    num_levels: int
    codebook_size: int
    level_offsets: tuple[int, ...]
    has_prior: bool
    metadata_columns: tuple[str, ...]
    constraint_sets: dict[str, int]
    predicates: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of ``catalog.json``."""
        content: dict[str, Any] = {
            "format": {"name": _FORMAT_NAME, "version": _FORMAT_VERSION},
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "collision_policy": self.collision_policy,
            "num_items": self.num_items,
            "num_levels": self.num_levels,
            "codebook_size": self.codebook_size,
            "level_offsets": list(self.level_offsets),
            "has_prior": self.has_prior,
            "metadata_columns": list(self.metadata_columns),
            "constraint_sets": self.constraint_sets,
        }
        # Only where there are some, so that a catalog without any reads as it always did.
        return {**content, "predicates": self.predicates} if self.predicates else content

    @classmethod
    def from_json(cls, fields: JsonObject) -> CatalogConfig:
        """Read the content of ``catalog.json``, strictly.

        Raises:
            ArtifactError: unknown format version, or a field that is missing, unknown, of another
                type or out of range.
        """
        fields.format_version(_FORMAT_NAME, _FORMAT_VERSION)
        sets = fields.child("constraint_sets")
        config = cls(
            tokenizer_fingerprint=fields.string("tokenizer_fingerprint"),
            collision_policy=require_collision_policy(
                fields.string("collision_policy"), fields.where
            ),
            num_items=fields.integer("num_items", 1, _MAX_COUNT),
            num_levels=fields.integer("num_levels", 1, 64),
            codebook_size=fields.integer("codebook_size", 1, 2**16),
            level_offsets=fields.integers("level_offsets", 0, _MAX_COUNT),
            has_prior=fields.boolean("has_prior"),
            metadata_columns=fields.strings("metadata_columns"),
            constraint_sets={n: sets.integer(n, 0, _MAX_COUNT) for n in sets.names()},
            predicates=_predicates(fields),
        )
        fields.done()
        return config


def _predicates(fields: JsonObject) -> dict[str, str]:
    if "predicates" not in fields.names():
        return {}
    found = fields.child("predicates")
    known = fields.child("constraint_sets").names()
    for name in found.names():
        if name not in known:
            raise ArtifactError(f"{found.where}: {name!r} is not among the constraint sets")
    return {name: found.string(name) for name in found.names()}


@dataclass(frozen=True, slots=True)
class CatalogArtifact:
    """A catalog folder that was checked; its tables are not loaded.

    Attributes:
        path: the folder.
        manifest: ``manifest.version`` is the catalog version.
        config: what ``catalog.json`` says.
    """

    path: Path
    manifest: Manifest
    config: CatalogConfig


def load_catalog_manifest(path: Path, *, verify_checksums: bool = True) -> CatalogArtifact:
    """Check a catalog folder and read its configuration, without its tables.

    Raises:
        ArtifactError: not an intact catalog artifact, or a malformed ``catalog.json``.
    """
    path = Path(path)
    manifest = open_artifact(path, "catalog", verify_checksums=verify_checksums)
    if CATALOG_NAME not in manifest.files:
        raise ArtifactError(f"{path} lacks {CATALOG_NAME}, which a catalog artifact must have")
    config = CatalogConfig.from_json(read_json(path / CATALOG_NAME))
    require_tokenizer(path, manifest, CATALOG_NAME, config.tokenizer_fingerprint)
    return CatalogArtifact(path=path, manifest=manifest, config=config)
