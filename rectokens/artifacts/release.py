"""The release artifact: a model and a catalog that are served, and rolled back, as one thing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rectokens.artifacts.binding import check_binding
from rectokens.artifacts.catalog import load_catalog_manifest
from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.files import require_plain_name
from rectokens.artifacts.json_fields import JsonObject, read_json, write_json
from rectokens.artifacts.manifest import (
    ArtifactKind,
    Manifest,
    ParentRef,
    is_version,
    open_artifact,
    read_manifest,
    write_artifact,
)
from rectokens.artifacts.model import load_model_manifest
from rectokens.artifacts.store import ArtifactStore, kind_folder

RELEASE_NAME = "release.json"
_FORMAT_NAME = "rectokens-release"
_FORMAT_VERSION = 1
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ReleaseArtifact:
    """A release that was checked: both parts are there and are the versions it names.

    Attributes:
        path: the release folder.
        manifest: ``manifest.version`` is the release version.
        model_version: version of the model.
        catalog_version: version of the catalog.
        tokenizer_fingerprint: what binds the two.
        model_path: the model's folder.
        catalog_path: the catalog's folder.
    """

    path: Path
    manifest: Manifest
    model_version: str
    catalog_version: str
    tokenizer_fingerprint: str
    model_path: Path
    catalog_path: Path


def save_release(
    root: Path,
    model_version: str,
    catalog_version: str,
    *,
    allow_other_tokenizer: bool = False,
    numbers: Mapping[str, float | int | str] = _NOTHING,
) -> Path:
    """Bind a model and a catalog of a store into a release of that store.

    Args:
        root: root of the store (:class:`~rectokens.artifacts.store.ArtifactStore`).
        model_version: a version in ``<root>/models``.
        catalog_version: a version in ``<root>/catalogs``.
        allow_other_tokenizer: see :func:`~rectokens.artifacts.binding.check_binding`.
        numbers: figures to record, for example an offline recall.

    Returns:
        ``<root>/releases/<version>``. The same pair gives the same release.

    Raises:
        ArtifactError: a part is missing, damaged, or does not belong to the other.
    """
    store = ArtifactStore(Path(root))
    model = load_model_manifest(store.path("model", model_version))
    catalog = load_catalog_manifest(store.path("catalog", catalog_version))
    check_binding(model, catalog.config, allow_other_tokenizer=allow_other_tokenizer)
    fingerprint = model.spec.tokenizer_fingerprint
    versions: dict[ArtifactKind, str] = {"model": model_version, "catalog": catalog_version}
    for part in (model, catalog):
        if part.path.name != part.manifest.version:
            raise ArtifactError(f"{part.path} holds version {part.manifest.version}")
    parts: dict[str, Any] = {
        kind: {"version": version, "location": f"{kind_folder(kind)}/{version}"}
        for kind, version in versions.items()
    }
    content = {
        "format": {"name": _FORMAT_NAME, "version": _FORMAT_VERSION},
        "tokenizer_fingerprint": fingerprint,
        **parts,
    }
    return write_artifact(
        store.folder("release"),
        "release",
        lambda folder: write_json(folder / RELEASE_NAME, content),
        parents={
            "model": ParentRef(versions["model"], fingerprint),
            "catalog": ParentRef(versions["catalog"], catalog.config.tokenizer_fingerprint),
        },
        numbers=numbers,
    )


def load_release(path: Path, *, root: Path | None = None) -> ReleaseArtifact:
    """Check a release and find its model and its catalog.

    The parts themselves are checked by whoever loads them; here only that they are there and
    carry the versions that the release names.

    Args:
        path: the release folder.
        root: root of the store that the locations are relative to; by default the folder two
            levels up, as in ``<root>/releases/<version>``.

    Raises:
        ArtifactError: not an intact release; a location that leaves the root; a part that is
            missing or of another version.
    """
    path = Path(path)
    manifest = open_artifact(path, "release")
    if RELEASE_NAME not in manifest.files:
        raise ArtifactError(f"{path} lacks {RELEASE_NAME}, which a release artifact must have")
    root = path.resolve().parent.parent if root is None else Path(root)
    fields = read_json(path / RELEASE_NAME)
    fields.format_version(_FORMAT_NAME, _FORMAT_VERSION)
    fingerprint = fields.string("tokenizer_fingerprint")
    model_version, model_path = _find_part(root, "model", fields.child("model"))
    catalog_version, catalog_path = _find_part(root, "catalog", fields.child("catalog"))
    fields.done()
    return ReleaseArtifact(
        path=path,
        manifest=manifest,
        model_version=model_version,
        catalog_version=catalog_version,
        tokenizer_fingerprint=fingerprint,
        model_path=model_path,
        catalog_path=catalog_path,
    )


def _find_part(root: Path, kind: ArtifactKind, fields: JsonObject) -> tuple[str, Path]:
    version, location = fields.string("version"), fields.string("location")
    fields.done()
    if not is_version(version):
        raise ArtifactError(
            f"{fields.where}: version is {version!r}; expected 16 lower-case hexadecimal digits"
        )
    require_plain_name(location, fields.where)
    folder = root / location
    if not folder.resolve().is_relative_to(root.resolve()):
        raise ArtifactError(f"{fields.where}: location {location!r} leads out of {root}")
    if not folder.is_dir():
        raise ArtifactError(
            f"{fields.where}: {kind} {version} is not at {folder}; locations are relative to the "
            f"root of the store, taken to be {root}"
        )
    manifest = read_manifest(folder)
    if (manifest.kind, manifest.version) != (kind, version):
        raise ArtifactError(
            f"{folder} holds {manifest.kind} version {manifest.version}; "
            f"the release names {kind} version {version}"
        )
    return version, folder
