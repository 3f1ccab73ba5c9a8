"""A whole catalog from a source."""

from __future__ import annotations

import time
from typing import Any

from rectokens.artifacts.errors import ArtifactError, UnreadableError
from rectokens.artifacts.release_store import ANY_RELEASE, ExpectedActive
from rectokens.artifacts.tokenizer import TokenizerArtifact
from rectokens.catalog.artifact import load_catalog
from rectokens.catalog.build import build_catalog, check_item_ids
from rectokens.catalog.catalog import Catalog, require_distinct
from rectokens.catalog.edit_sets import carry_sets
from rectokens.catalog.encode import encode_source
from rectokens.catalog.identical_rows import IdenticalRows
from rectokens.catalog.item_index import ItemIndex
from server.jobs.context import JobEnvironment, JobReporter
from server.jobs.params import ReindexParams
from server.jobs.publish import publish_catalog
from server.jobs.sources import OpenSource, open_source
from server.jobs.stored import (
    ActiveConfig,
    active_config,
    changing_catalogs,
    open_tokenizer,
    require_model_speaks,
    tokenizer_of,
)
from server.jobs.types import JobErrorKind, JobFailure


def reindex(
    params: ReindexParams, environment: JobEnvironment, reporter: JobReporter
) -> dict[str, Any]:
    """Encode all items of a source into a catalog, and release it.

    Returns:
        As :func:`~server.jobs.publish.publish_catalog`, and ``items_per_s`` of the encoding.

    Raises:
        JobFailure, ArtifactError, OSError: it cannot be done; the store is as it was before, but
            for a whole catalog that could not be activated.
    """
    store = environment.store
    with changing_catalogs(store, reporter):
        active = _active(params, environment, reporter)
        tokenizer = _tokenizer(params, environment, active)
        policy = params.collisions or (
            "share" if active is None else active.config.collision_policy
        )
        model = params.model or (None if active is None else active.release.model_version)
        if params.activate and model is not None:
            require_model_speaks(store, model, tokenizer, policy == "extra_level")

        with open_source(params.source, environment.roots, environment.limits) as source:
            _check_source(source, tokenizer)
            codes, figures, encode_s = _encode(source, tokenizer, environment, reporter)
        items = source.items
        assert items is not None

        with reporter.stage(0.7, 0.85, "building the catalog"):
            started = time.perf_counter()
            try:
                catalog = build_catalog(
                    items.item_ids,
                    codes,
                    codebook_size=tokenizer.tokenizer.codebook_size,
                    tokenizer_fingerprint=tokenizer.fingerprint,
                    collision_policy=policy,
                    prior=items.prior,
                    metadata=items.metadata,
                )
                catalog = _with_sets(catalog, params, active)
            except ValueError as error:
                raise JobFailure(JobErrorKind.INVALID_SOURCE, f"{source.name}: {error}") from error
            build_s = time.perf_counter() - started

        expected: ExpectedActive = ANY_RELEASE
        if params.constraint_sets == "keep":
            # Sets that were changed meanwhile would be lost without a word.
            expected = None if active is None else active.release.manifest.version
        with reporter.stage(0.85, 1.0, "releasing the catalog"):
            result = publish_catalog(
                catalog,
                params,
                environment,
                reporter,
                tokenizer=tokenizer.manifest.version,
                model=model,
                activate=params.activate,
                expected=expected,
                numbers=figures,
            )
    result["seconds"] |= {"encode": round(encode_s, 3), "build": round(build_s, 3)}
    result["items_per_s"] = round(catalog.num_items / encode_s, 1)
    return result


def _active(
    params: ReindexParams, environment: JobEnvironment, reporter: JobReporter
) -> ActiveConfig | None:
    """The active release; None as well where it is damaged and nothing of it is asked for."""
    try:
        return active_config(environment.store)
    except UnreadableError:
        raise
    except ArtifactError as error:
        wanted = (params.tokenizer, params.model, params.collisions)
        if params.constraint_sets == "keep" or None in wanted:
            raise
        reporter.log(f"the active release cannot be opened: {error}")
        return None


def _tokenizer(
    params: ReindexParams, environment: JobEnvironment, active: ActiveConfig | None
) -> TokenizerArtifact:
    if params.tokenizer is not None:
        return open_tokenizer(environment.store, params.tokenizer)
    if active is None:
        raise JobFailure(
            JobErrorKind.INVALID_PARAMETERS,
            "no release is active, so there is no current tokenizer; name one",
        )
    return tokenizer_of(environment.store, active)


def _check_source(source: OpenSource, tokenizer: TokenizerArtifact) -> None:
    """What a mistake would spoil after everything was encoded is looked at before."""
    width = tokenizer.tokenizer.feature_dim
    if source.embeddings.dim != width:
        raise ValueError(
            f"{source.name} has embeddings of width {source.embeddings.dim}; tokenizer "
            f"{tokenizer.manifest.version} takes {width}"
        )
    assert source.items is not None
    require_distinct(ItemIndex(check_item_ids(source.items.item_ids)))


def _encode(
    source: OpenSource,
    tokenizer: TokenizerArtifact,
    environment: JobEnvironment,
    reporter: JobReporter,
) -> tuple[Any, dict[str, float | int | str], float]:
    rows = source.embeddings.num_rows
    identical = IdenticalRows()
    started = time.perf_counter()

    def on_rows(done: int) -> None:
        speed = done / max(time.perf_counter() - started, 1e-9)
        reporter.progress(
            done / rows, f"encoding: {done:,} of {rows:,} items, {speed:,.0f} a second"
        )

    with reporter.stage(0.02, 0.7, f"encoding {rows:,} items of {source.name}"):
        codes = encode_source(
            tokenizer.tokenizer.to(environment.device),
            source.embeddings,
            num_levels=tokenizer.tokenizer.num_levels,
            batch_size=environment.batch_size,
            on_rows=on_rows,
            identical=identical,
        )
    return codes, {**identical.report()}, time.perf_counter() - started


def _with_sets(catalog: Catalog, params: ReindexParams, active: ActiveConfig | None) -> Catalog:
    """The catalog with the constraint sets of the active one."""
    if params.constraint_sets == "drop" or active is None or not active.config.constraint_sets:
        return catalog
    old = load_catalog(active.release.catalog_path)
    return carry_sets(catalog, old, catalog.index_of(old.item_ids.to_list()))
