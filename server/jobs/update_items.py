"""Items added, changed and deleted: a new catalog without encoding the rest again."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import date
from datetime import time as time_of_day
from typing import Any

import polars as pl
import torch

from rectokens.artifacts.errors import ArtifactError
from rectokens.catalog.artifact import load_catalog
from rectokens.catalog.catalog import Catalog
from rectokens.catalog.update import ItemUpserts, update_catalog
from rectokens.core.tokenizer import Tokenizer
from server.jobs.context import JobEnvironment, JobReporter
from server.jobs.params import GatedParams, ItemUpsert, UpdateItemsParams
from server.jobs.publish import publish_catalog
from server.jobs.stored import ActiveConfig, changing_catalogs, require_active, tokenizer_of
from server.jobs.types import JobErrorKind, JobFailure

Change = Callable[[Catalog, ActiveConfig], Catalog]


def update_items(
    params: UpdateItemsParams, environment: JobEnvironment, reporter: JobReporter
) -> dict[str, Any]:
    """Apply upserts and deletions to the active catalog, and release the result.

    Returns:
        As :func:`~server.jobs.publish.publish_catalog`, and ``upserted`` and ``deleted``.

    Raises:
        JobFailure, ArtifactError, OSError: it cannot be done; the store is as it was before, but
            for a whole catalog that could not be activated.
    """

    def change(catalog: Catalog, active: ActiveConfig) -> Catalog:
        batches = upsert_batches(
            params.upserts,
            catalog,
            lambda: tokenizer_of(environment.store, active).tokenizer,
            environment,
        )
        return update_catalog(
            catalog, batches, params.deletes, unknown_deletes=params.unknown_deletes
        )

    result = change_active_catalog(change, params, params.activate, environment, reporter)
    return {**result, "upserted": len(params.upserts), "deleted": len(params.deletes)}


def change_active_catalog(
    change: Change,
    params: GatedParams,
    activate: bool,
    environment: JobEnvironment,
    reporter: JobReporter,
) -> dict[str, Any]:
    """Make a catalog out of the active one and release it with the same model.

    Args:
        change: makes the new catalog; a ``ValueError`` of it is the caller's mistake.
        params: of the job.
        activate: whether to make the release active; only if the one that was changed still is.
        environment: of the job.
        reporter: of the job.

    Raises:
        JobFailure: no release is active, ``change`` refused, or the result cannot be activated.
    """
    store = environment.store
    with changing_catalogs(store, reporter):
        started = time.perf_counter()
        active = require_active(store)
        release = active.release
        reporter.progress(0.05, f"loading catalog {release.catalog_version}")
        old = load_catalog(release.catalog_path)
        load_s = time.perf_counter() - started
        reporter.progress(0.3, "changing the catalog")
        try:
            catalog = change(old, active)
        except ArtifactError:
            raise
        except ValueError as error:
            raise JobFailure(JobErrorKind.INVALID_PARAMETERS, str(error)) from error
        change_s = time.perf_counter() - started - load_s
        del old
        with reporter.stage(0.5, 1.0, "releasing the catalog"):
            result = publish_catalog(
                catalog,
                params,
                environment,
                reporter,
                tokenizer=active.tokenizer,
                model=release.model_version,
                activate=activate,
                expected=release.manifest.version,
            )
    result["base"] = release.catalog_version
    result["seconds"] |= {"load": round(load_s, 3), "change": round(change_s, 3)}
    return result


def upsert_batches(
    upserts: Sequence[ItemUpsert],
    catalog: Catalog,
    tokenizer: Callable[[], Tokenizer],
    environment: JobEnvironment,
) -> list[ItemUpserts]:
    """One batch for each combination of values that are given.

    Args:
        upserts: as a caller gave them.
        catalog: they are for.
        tokenizer: asked for if there are embeddings.
        environment: of the job.

    Raises:
        ValueError: embeddings of another width; names the item.
    """
    groups: dict[tuple[Any, ...], list[ItemUpsert]] = defaultdict(list)
    for one in upserts:
        names = tuple(sorted(one.metadata or ()))
        how = "embedding" if one.embedding is not None else "codes" if one.codes is not None else ""
        groups[(how, one.prior is not None, names)].append(one)
    batches = []
    for (how, has_prior, names), group in groups.items():
        codes = None
        if how == "embedding":
            codes = _encode(group, tokenizer(), environment.batch_size)
        elif how == "codes":
            codes = _code_rows(group)
        batches.append(
            ItemUpserts(
                [one.item_id for one in group],
                codes,
                prior=[one.prior for one in group if one.prior is not None] if has_prior else None,
                metadata=_table(group, names, catalog) if names else None,
            )
        )
    return batches


def _encode(group: Sequence[ItemUpsert], tokenizer: Any, batch_size: int) -> torch.Tensor:
    width = tokenizer.feature_dim
    for one in group:
        assert one.embedding is not None
        if len(one.embedding) != width:
            raise ValueError(
                f"embedding of item {one.item_id!r} has {len(one.embedding)} values; the catalog's "
                f"tokenizer takes {width}"
            )
    rows = torch.tensor([one.embedding for one in group], dtype=torch.float32)
    finite = rows.isfinite().all(dim=1)
    if not bool(finite.all()):
        first = group[int((~finite).nonzero()[0, 0])]
        raise ValueError(
            f"embedding of item {first.item_id!r} has a value that is not finite in float32"
        )
    return torch.cat([tokenizer.encode(part).codes.cpu() for part in rows.split(batch_size)])


def _code_rows(group: Sequence[ItemUpsert]) -> torch.Tensor:
    width = len(group[0].codes or ())
    for one in group:
        if len(one.codes or ()) != width:
            raise ValueError(
                f"item {one.item_id!r} has {len(one.codes or ())} codes, item "
                f"{group[0].item_id!r} has {width}"
            )
        for code in one.codes or ():
            if not 0 <= code < 2**31:
                raise ValueError(f"item {one.item_id!r} has the code {code}; that is no code")
    return torch.tensor([one.codes for one in group], dtype=torch.long)


def _table(group: Sequence[ItemUpsert], names: Sequence[str], catalog: Catalog) -> pl.DataFrame:
    schema = {} if catalog.metadata is None else catalog.metadata.schema
    columns = []
    for name in names:
        values = [(one.metadata or {})[name] for one in group]
        column = _column(name, values, schema.get(name))
        if column is None or not _same(values, column.to_list()):
            # The catalog's type does not take them as they are; the update casts or refuses.
            column = _column(name, values, None)
        if column is None:
            raise ValueError(f"metadata {name!r} has values that make no column: {values!r:.200}")
        columns.append(column)
    return pl.DataFrame(columns)


def _column(name: str, values: list[Any], dtype: pl.DataType | None) -> pl.Series | None:
    try:
        return pl.Series(name, values, dtype=dtype, strict=True)
    except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError):
        return None


def _same(given: Any, taken: Any) -> bool:
    """Whether a value of JSON is what polars has taken it for, but for digits of a float."""
    if given is None or taken is None or isinstance(given, bool) or isinstance(taken, bool):
        return given is taken
    if isinstance(given, list):
        pairs = zip(given, taken, strict=False) if isinstance(taken, list) else ()
        return (
            isinstance(taken, list) and len(given) == len(taken) and all(_same(*p) for p in pairs)
        )
    if isinstance(given, dict):
        return isinstance(taken, dict) and all(
            name in taken and _same(value, taken[name]) for name, value in given.items()
        )
    if isinstance(taken, float):
        return isinstance(given, (int, float))
    if isinstance(taken, (date, time_of_day)):
        return isinstance(given, str)
    return type(given) is type(taken) and bool(given == taken)
