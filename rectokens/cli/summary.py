"""What there is to say of an artifact, as plain data."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rectokens.artifacts.catalog import load_catalog_manifest
from rectokens.artifacts.manifest import Manifest, read_manifest
from rectokens.artifacts.model import load_model_manifest
from rectokens.artifacts.release import load_release
from rectokens.artifacts.tokenizer import load_tokenizer
from rectokens.catalog.artifact import load_catalog, read_trie
from rectokens.catalog.collisions import report_of_group_sizes
from rectokens.catalog.invariants import all_leaf_codes
from rectokens.schemas.catalog_trie import CatalogTrie
from rectokens.tokenizers.quality import code_use


def summarize(path: Path, *, verify: bool) -> dict[str, Any]:
    """Manifest and content of an artifact of any kind, JSON values only.

    Args:
        path: the artifact folder.
        verify: check checksums, and for a catalog every invariant.

    Returns:
        The manifest's fields with ``path``, ``verified`` and ``details``, which depend on the
        kind.

    Raises:
        ArtifactError: not an artifact, or a damaged one.
    """
    manifest = read_manifest(path)
    details = {
        "tokenizer": _tokenizer,
        "model": _model,
        "catalog": _catalog,
        "release": _release,
    }[manifest.kind](path, manifest, verify)
    return {"path": str(path), "verified": verify, **asdict(manifest), "details": details}


def _tokenizer(path: Path, manifest: Manifest, verify: bool) -> dict[str, Any]:
    artifact = load_tokenizer(path, verify_checksums=verify)
    report = dict(artifact.report)
    levels = report.pop("code_use", None)
    return {
        "class": type(artifact.tokenizer).__name__,
        "fingerprint": artifact.fingerprint,
        "fitted_on": artifact.fitted_on,
        "report": report,
        **({"levels": levels} if levels else {}),
    }


def _model(path: Path, manifest: Manifest, verify: bool) -> dict[str, Any]:
    return {"spec": load_model_manifest(path, verify_checksums=verify).spec.to_json()}


def _catalog(path: Path, manifest: Manifest, verify: bool) -> dict[str, Any]:
    if verify:
        trie = load_catalog(path).trie
    artifact = load_catalog_manifest(path, verify_checksums=False)
    if not verify:
        trie = read_trie(artifact)
    items_of_leaf = torch.diff(trie.leaf_item_ptrs).long()
    return {
        "config": artifact.config.to_json(),
        "leaves": report_of_group_sizes(items_of_leaf),
        "levels": _levels(trie, items_of_leaf),
    }


def _release(path: Path, manifest: Manifest, verify: bool) -> dict[str, Any]:
    release = load_release(path)
    if verify:
        load_model_manifest(release.model_path)
        load_catalog(release.catalog_path)
    return {
        "tokenizer_fingerprint": release.tokenizer_fingerprint,
        "model": {"version": release.model_version, "path": str(release.model_path)},
        "catalog": {"version": release.catalog_version, "path": str(release.catalog_path)},
    }


def _levels(trie: CatalogTrie, items_of_leaf: Tensor) -> list[dict[str, Any]]:
    codes = all_leaf_codes(trie).long()
    levels = []
    for level in range(trie.num_levels):
        counts = torch.zeros(trie.codebook_size, dtype=torch.long)
        levels.append(code_use(counts.index_add_(0, codes[:, level], items_of_leaf)))
    return levels
