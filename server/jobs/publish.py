"""A catalog that a job has built: into the store, into a release, and active if that is wanted."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.release_store import ExpectedActive
from rectokens.catalog.artifact import save_catalog
from rectokens.catalog.catalog import Catalog
from server.jobs.activation import activate_release, forget_old_versions
from server.jobs.context import JobEnvironment, JobReporter
from server.jobs.params import GatedParams
from server.jobs.types import JobErrorKind, JobFailure

_NOTHING: Mapping[str, float | int | str] = {}


def publish_catalog(
    catalog: Catalog,
    params: GatedParams,
    environment: JobEnvironment,
    reporter: JobReporter,
    *,
    tokenizer: str | None,
    model: str | None,
    activate: bool,
    expected: ExpectedActive,
    numbers: Mapping[str, float | int | str] = _NOTHING,
) -> dict[str, Any]:
    """Save a catalog, release it with a model, and activate that.

    Args:
        catalog: built.
        params: of the job.
        environment: of the job.
        reporter: of the job.
        tokenizer: version of the artifact that gave the codes, None if it is not known.
        model: to release it with; None where there is none, which leaves a catalog by itself.
        activate: whether to make the release active.
        expected: release that must be active until then.
        numbers: figures for the manifest.

    Returns:
        ``catalog``, ``items``, ``leaves``, ``tokenizer``; ``release`` and ``model``, or
        ``not_released`` with the reason; ``activated``, and as of an activation
        ``sequence``, ``gate`` and ``servers``; ``removed``,
        old versions that were let go, and ``not_removed`` where that failed, with the reason;
        ``seconds``.

    Raises:
        JobFailure: it was to be activated and cannot be.
        OSError: the disk is full, for example; nothing is left.
    """
    store = environment.store
    reporter.progress(0.0, "saving the catalog")
    started = time.perf_counter()
    path = save_catalog(
        store.local.folder("catalog"), catalog, tokenizer_version=tokenizer, numbers=numbers
    )
    version = path.name
    store.publish("catalog", version)
    saved_s = time.perf_counter() - started
    reporter.log(f"catalog {version}: {catalog.num_items:,} items in {catalog.trie.num_leaves:,} "
                 f"leaves, saved in {saved_s:.2f} s")  # fmt: skip
    result: dict[str, Any] = {
        "catalog": version,
        "items": catalog.num_items,
        "leaves": catalog.trie.num_leaves,
        "tokenizer": tokenizer,
        "activated": False,
    }
    reporter.progress(0.4, "making the release")
    release = _bind(model, version, environment, activate, result)
    if activate:
        assert release is not None
        with reporter.stage(0.5, 1.0, "activating the release"):
            outcome = activate_release(release, params, environment, reporter, expected=expected)
        told = {name: outcome[name] for name in ("sequence", "gate", "servers")}
        result |= {"activated": True, **told}
    result |= forget_old_versions(environment, reporter)
    result["seconds"] = {
        "save": round(saved_s, 3),
        "release": round(time.perf_counter() - started - saved_s, 3),
    }
    return result


def _bind(
    model: str | None,
    catalog: str,
    environment: JobEnvironment,
    activate: bool,
    result: dict[str, Any],
) -> str | None:
    if model is None:
        reason = "no release is active and no model was named, so there is none to release it with"
        if activate:
            raise JobFailure(JobErrorKind.CONFLICT, f"catalog {catalog} is made, but {reason}")
        result["not_released"] = reason
        return None
    try:
        release = environment.store.bind(model, catalog)
    except ArtifactError as error:
        if activate:
            raise
        result["not_released"] = str(error)
        return None
    result |= {"release": release, "model": model}
    return release
