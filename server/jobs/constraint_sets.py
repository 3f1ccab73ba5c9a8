"""Constraint sets put and deleted.

A set is part of the catalog, which never changes: putting one makes a new catalog version, so an
answer's ``catalog_version`` tells which sets it was filtered by, and a rollback brings them back.
"""

from __future__ import annotations

from typing import Any

from rectokens.catalog.catalog import Catalog
from rectokens.catalog.constraint_sets import UnknownConstraintSetError
from rectokens.catalog.edit_sets import SetDefinition, drop_constraint_sets, put_constraint_sets
from rectokens.catalog.predicates import Predicate
from server.jobs.context import JobEnvironment, JobReporter
from server.jobs.params import DeleteConstraintSetParams, PutConstraintSetParams
from server.jobs.stored import ActiveConfig
from server.jobs.types import JobErrorKind, JobFailure
from server.jobs.update_items import change_active_catalog


def put_constraint_set(
    params: PutConstraintSetParams, environment: JobEnvironment, reporter: JobReporter
) -> dict[str, Any]:
    """Add or replace a constraint set of the active catalog.

    Returns:
        As :func:`~server.jobs.publish.publish_catalog`, and ``name`` and ``set_items``.

    Raises:
        JobFailure: unknown items, an unusable name or predicate; otherwise as ``update_items``.
    """
    sizes: list[int] = []

    def change(catalog: Catalog, active: ActiveConfig) -> Catalog:
        definition: SetDefinition
        if params.predicate is not None:
            definition = Predicate(params.predicate)
        else:
            assert params.item_ids is not None
            definition = params.item_ids
        changed = put_constraint_sets(catalog, {params.name: definition})
        sizes.append(changed.constraint_sets[params.name].numel())
        return changed

    result = change_active_catalog(change, params, params.activate, environment, reporter)
    return {**result, "name": params.name, "set_items": sizes[-1]}


def delete_constraint_set(
    params: DeleteConstraintSetParams, environment: JobEnvironment, reporter: JobReporter
) -> dict[str, Any]:
    """Remove a constraint set from the active catalog.

    Returns:
        As :func:`~server.jobs.publish.publish_catalog`, and ``name``.

    Raises:
        JobFailure: there is no such set; otherwise as ``update_items``.
    """

    def change(catalog: Catalog, active: ActiveConfig) -> Catalog:
        try:
            return drop_constraint_sets(catalog, [params.name])
        except UnknownConstraintSetError as error:
            raise JobFailure(JobErrorKind.INVALID_PARAMETERS, str(error)) from error

    result = change_active_catalog(change, params, params.activate, environment, reporter)
    return {**result, "name": params.name}
