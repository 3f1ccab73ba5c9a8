"""What the store holds that jobs build on: the active catalog, its tokenizer, the model to keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from filelock import FileLock, Timeout

from rectokens.artifacts.catalog import CatalogConfig, load_catalog_manifest
from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.model import load_model_manifest
from rectokens.artifacts.release import ReleaseArtifact
from rectokens.artifacts.release_store import ReleaseStore
from rectokens.artifacts.tokenizer import TokenizerArtifact, load_tokenizer
from server.jobs.context import JobReporter
from server.jobs.types import JobErrorKind, JobFailure

CATALOG_LOCK = ".catalog.lock"
_WAIT_S = 0.25


@contextmanager
def changing_catalogs(store: ReleaseStore, reporter: JobReporter) -> Iterator[None]:
    """One job at a time makes a catalog out of the active one; the next waits here.

    The lock is the operating system's, so a process that dies lets go of it. Hosts that share an
    object store share no lock: there, what was built on a release that is not active any more is
    found out when it is activated.
    """
    lock = FileLock(store.local.root / CATALOG_LOCK)
    waiting = False
    while True:
        try:
            lock.acquire(timeout=_WAIT_S)
            break
        except Timeout:
            if not waiting:
                reporter.log("another job changes the catalog; waiting for it")
                waiting = True
            reporter.progress(0.0, "waits for another job that changes the catalog")
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True, eq=False)
class ActiveConfig:
    """The active release and what its catalog says of itself; the items are not read.

    Attributes:
        release: the active one.
        config: of its catalog.
        tokenizer: version of the artifact that gave the codes, None if that is not known.
    """

    release: ReleaseArtifact
    config: CatalogConfig
    tokenizer: str | None


def active_config(store: ReleaseStore) -> ActiveConfig | None:
    """The active release, None for none."""
    release = store.open_active()
    if release is None:
        return None
    catalog = load_catalog_manifest(release.catalog_path, verify_checksums=False)
    parent = catalog.manifest.parents.get("tokenizer")
    return ActiveConfig(release, catalog.config, None if parent is None else parent.version)


def require_active(store: ReleaseStore) -> ActiveConfig:
    """The active release.

    Raises:
        JobFailure: there is none.
    """
    active = active_config(store)
    if active is None:
        raise JobFailure(
            JobErrorKind.CONFLICT,
            "no release is active, so there is no catalog to change; activate one first",
        )
    return active


def tokenizer_of(store: ReleaseStore, active: ActiveConfig) -> TokenizerArtifact:
    """The tokenizer that the active catalog was encoded with.

    Raises:
        ArtifactError: the store does not have it.
    """
    fingerprint = active.config.tokenizer_fingerprint
    candidates = [
        one.version
        for one in store.versions("tokenizer")
        if one.numbers.get("fingerprint") == fingerprint
    ]
    if active.tokenizer is not None and active.tokenizer not in candidates:
        candidates.append(active.tokenizer)
    for version in candidates:
        try:
            found = open_tokenizer(store, version)
        except ArtifactError:
            continue
        if found.fingerprint == fingerprint:
            return found
    raise ArtifactError(
        f"the store has no tokenizer of fingerprint {fingerprint}, that of the active catalog; "
        "name one that is there, or put it into the store"
    )


def open_tokenizer(store: ReleaseStore, version: str) -> TokenizerArtifact:
    """A tokenizer of the store.

    Raises:
        ArtifactError: there is none of this version, or it is damaged.
    """
    return load_tokenizer(store.fetch("tokenizer", version))


def require_model_speaks(
    store: ReleaseStore, model_version: str, tokenizer: TokenizerArtifact, extra_level: bool
) -> None:
    """Refuse codes that a model does not know, before they are worked out.

    Raises:
        JobFailure: levels, codebook size or fingerprint differ.
        ArtifactError: no such model.
    """
    spec = load_model_manifest(store.fetch("model", model_version), verify_checksums=False).spec
    levels = tokenizer.tokenizer.num_levels + extra_level
    problems = [
        f"{name} {ours} of the model is not {theirs} of the tokenizer"
        for name, ours, theirs in (
            ("num_levels", spec.item_tokens.num_levels, levels),
            ("codebook_size", spec.item_tokens.codebook_size, tokenizer.tokenizer.codebook_size),
            ("fingerprint", spec.tokenizer_fingerprint, tokenizer.fingerprint),
        )
        if ours != theirs
    ]
    if problems:
        raise JobFailure(
            JobErrorKind.CONFLICT,
            f"model {model_version} cannot speak of what tokenizer {tokenizer.manifest.version} "
            "encodes, so the catalog could not be activated: " + "; ".join(problems),
        )
