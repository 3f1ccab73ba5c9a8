"""Constraint sets put into, taken out of and carried over to a catalog."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import polars as pl
import torch
from torch import Tensor

from rectokens.catalog.catalog import UNSAVED, Catalog
from rectokens.catalog.constraint_sets import (
    UnknownConstraintSetError,
    require_set_name,
    resolve_constraint_sets,
)
from rectokens.catalog.predicates import Predicate, PredicateError, evaluate_predicate

SetDefinition = Sequence[str] | Predicate


def put_constraint_sets(catalog: Catalog, sets: Mapping[str, SetDefinition]) -> Catalog:
    """The same catalog with constraint sets added or replaced.

    Args:
        catalog: it is not changed; items, trie and index are shared.
        sets: by name, either item ids (repeats are taken once) or a predicate over the metadata
            columns, ``item_id`` and ``prior``, which is kept and worked out again whenever the
            catalog changes.

    Returns:
        The new catalog, its version ``"unsaved"``.

    Raises:
        ValueError: unusable name, or item ids that the catalog does not have.
        PredicateError: (a ValueError) naming the set, and the unknown column or other fault.
    """
    for name, definition in sets.items():
        require_set_name(name)
        if isinstance(definition, str):
            raise ValueError(
                f"constraint set {name!r} is a string; expected item ids, or a Predicate"
            )
    listed = {n: d for n, d in sets.items() if not isinstance(d, Predicate)}
    predicates = {n: d.text for n, d in sets.items() if isinstance(d, Predicate)}
    assert catalog.index is not None
    results = {**resolve_constraint_sets(listed, catalog.index), **_evaluate(catalog, predicates)}
    kept = {n: text for n, text in catalog.predicates.items() if n not in sets}
    return _with_sets(catalog, {**catalog.constraint_sets, **results}, {**kept, **predicates})


def drop_constraint_sets(catalog: Catalog, names: Sequence[str]) -> Catalog:
    """The same catalog without some of its constraint sets.

    Raises:
        UnknownConstraintSetError: (a KeyError) naming the sets there are.
    """
    for name in names:
        if name not in catalog.constraint_sets:
            raise UnknownConstraintSetError(name, sorted(catalog.constraint_sets))
    return _with_sets(
        catalog,
        {n: items for n, items in catalog.constraint_sets.items() if n not in names},
        {n: text for n, text in catalog.predicates.items() if n not in names},
    )


def carry_sets(catalog: Catalog, old: Catalog, places: Tensor) -> Catalog:
    """Give a changed catalog the constraint sets of the one it was made from.

    Args:
        catalog: the changed one; its own sets are replaced.
        old: where the sets come from.
        places: int64 (N of ``old``,), new item index of each old item, -1 for a deleted one.

    Raises:
        PredicateError: a predicate cannot be evaluated any more; names the set.
    """
    carried = {}
    for name, items in old.constraint_sets.items():
        if name not in old.predicates:
            moved = places[items]
            members = torch.zeros(catalog.num_items, dtype=torch.bool)
            members[moved[moved >= 0]] = True
            carried[name] = members.nonzero().squeeze(1)
    return _with_sets(catalog, {**carried, **_evaluate(catalog, old.predicates)}, old.predicates)


def predicate_table(catalog: Catalog) -> pl.DataFrame:
    """What predicates are evaluated over: ``item_id``, ``prior`` if there is one, metadata."""
    columns = [catalog.item_ids.alias("item_id")]
    if catalog.prior is not None:
        columns.append(pl.Series("prior", catalog.prior.numpy()))
    if catalog.metadata is not None:
        columns += catalog.metadata.get_columns()
    return pl.DataFrame(columns)


def _evaluate(catalog: Catalog, predicates: Mapping[str, str]) -> dict[str, Tensor]:
    if not predicates:
        return {}
    table = predicate_table(catalog)
    results = {}
    for name, text in predicates.items():
        try:
            results[name] = evaluate_predicate(Predicate(text), table)
        except PredicateError as error:
            raise PredicateError(f"constraint set {name!r}: {error}") from error
    return results


def _with_sets(
    catalog: Catalog, sets: Mapping[str, Tensor], predicates: Mapping[str, str]
) -> Catalog:
    return replace(
        catalog,
        version=UNSAVED,
        constraint_sets=MappingProxyType(dict(sorted(sets.items()))),
        predicates=MappingProxyType(dict(sorted(predicates.items()))),
    )
