"""Upserts and deletions: a new catalog from an old one without encoding the rest again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from rectokens.catalog.build import check_codes, check_item_ids, check_metadata, check_prior
from rectokens.catalog.catalog import UNSAVED, Catalog
from rectokens.catalog.collisions import add_rank_level, group_starts, rank_items
from rectokens.catalog.edit_sets import carry_sets
from rectokens.catalog.fitted_values import fitted
from rectokens.catalog.invariants import all_leaf_codes
from rectokens.catalog.item_index import ItemIndex
from rectokens.catalog.merge import Merged, find_items, merge_rows
from rectokens.schemas.catalog_trie import CatalogTrie

UnknownDeletes = Literal["error", "ignore"]
_NAMES_SHOWN = 5


@dataclass(frozen=True, eq=False)
class ItemUpserts:
    """Items to add or change. What is None stays as it is; row i is one item throughout.

    Attributes:
        item_ids: U strings, distinct, not empty.
        codes: integer (U, L), without the extra level; None keeps the codes of items that are
            there, and only such items may then be named.
        prior: U finite numbers; only for a catalog that has a prior, and needed there for items
            that are new.
        metadata: U rows of some of the catalog's columns. Columns left out keep their values;
            they are null for items that are new.
    """

    item_ids: Sequence[str] | pl.Series
    codes: Tensor | NDArray[np.integer] | None = None
    prior: Tensor | Sequence[float] | pl.Series | None = None
    metadata: pl.DataFrame | None = None


@dataclass(frozen=True, eq=False)
class _Rows:
    """Upserts with every value filled in: U rows."""

    item_ids: pl.Series
    old: Tensor  # int64 (U,), item index in the old catalog, -1 for a new item
    codes: Tensor  # int64 (U, L without the extra level)
    prior: Tensor | None
    metadata: pl.DataFrame | None


def update_catalog(
    catalog: Catalog,
    upserts: ItemUpserts | Sequence[ItemUpserts] = (),
    deletes: Sequence[str] = (),
    *,
    unknown_deletes: UnknownDeletes = "error",
) -> Catalog:
    """The catalog that :func:`~rectokens.catalog.build.build_catalog` would make of the new items.

    Only what changed is ranked; the rest is moved. Explicit constraint sets keep their members
    but for deleted ones (an item that is added is in none); sets defined by a predicate are
    worked out again. Under the policy ``extra_level``, items that share the codes of one that
    came or went may get another code at that level, as in a full build.

    Args:
        catalog: the old one; it is not changed.
        upserts: one batch, or several that name distinct items (one batch for each combination
            of values that are given).
        deletes: item ids; repeats do not matter.
        unknown_deletes: whether an id to delete that is not there is an error.

    Returns:
        The new catalog, its version ``"unsaved"``.

    Raises:
        ValueError: an id that is empty, repeated, unknown, or both upserted and deleted; codes
            of another number of levels or out of range; codes or a prior missing for a new item;
            values that are not finite; unknown metadata columns or values of another type; no
            items left; more colliding items than the extra level holds.
        PredicateError: (a ValueError) a set's predicate no longer fits the metadata.
    """
    if unknown_deletes not in ("error", "ignore"):
        raise ValueError(f"unknown_deletes is {unknown_deletes!r}; allowed are 'error', 'ignore'")
    batches = [upserts] if isinstance(upserts, ItemUpserts) else list(upserts)
    rows = _gather(catalog, batches)
    gone = _deleted_items(catalog, deletes, unknown_deletes, rows.item_ids)
    num_left = catalog.num_items - gone.numel() + int((rows.old < 0).sum())
    if num_left < 1:
        raise ValueError(
            f"deleting {gone.numel()} items leaves none; a catalog needs at least one item"
        )
    moves = _which_move(catalog, rows)
    if not gone.numel() and not bool(moves.any()):
        return _with_values(catalog, rows)

    merged = _merge(catalog, rows, moves, gone)
    picks = merged.source.numpy()
    ids = pl.concat([catalog.item_ids, rows.item_ids])[picks].rechunk()
    index = ItemIndex(ids)
    metadata = _merged_metadata(catalog, rows, merged)
    prior = None
    if catalog.prior is not None and rows.prior is not None:
        prior = torch.cat([catalog.prior, rows.prior])[merged.source]
    places = merged.places[: catalog.num_items].clone()
    moved = moves & (rows.old >= 0)
    places[rows.old[moved]] = merged.places[catalog.num_items :][moved]
    return carry_sets(
        Catalog(
            version=UNSAVED,
            tokenizer_fingerprint=catalog.tokenizer_fingerprint,
            collision_policy=catalog.collision_policy,
            trie=_merged_trie(catalog, rows, merged, ids),
            item_ids=ids,
            prior=prior,
            metadata=metadata,
            constraint_sets=MappingProxyType({}),
            index=index,
        ),
        catalog,
        places,
    )


def _ranked_levels(catalog: Catalog) -> int:
    """Levels that come from the tokenizer."""
    return catalog.num_levels - (catalog.collision_policy == "extra_level")


def _gather(catalog: Catalog, batches: Sequence[ItemUpserts]) -> _Rows:
    """Check all batches and fill in what they leave out."""
    filled = [_fill(catalog, batch) for batch in batches if len(batch.item_ids)]
    if not filled:
        empty = torch.zeros(0, dtype=torch.long)
        return _Rows(
            item_ids=catalog.item_ids[:0],
            old=empty,
            codes=empty.reshape(0, _ranked_levels(catalog)),
            prior=None if catalog.prior is None else catalog.prior[:0],
            metadata=None if catalog.metadata is None else catalog.metadata[:0],
        )
    ids = pl.concat([one.item_ids for one in filled]).rechunk()
    repeated = ids.filter(ids.is_duplicated()).unique(maintain_order=True)
    if len(repeated):
        raise ValueError(
            f"{len(repeated)} item ids are upserted more than once, among them "
            f"{_shown(repeated.to_list())}"
        )
    priors = [one.prior for one in filled if one.prior is not None]
    tables = [one.metadata for one in filled if one.metadata is not None]
    return _Rows(
        item_ids=ids,
        old=torch.cat([one.old for one in filled]),
        codes=torch.cat([one.codes for one in filled]),
        prior=torch.cat(priors) if priors else None,
        metadata=_stacked(tables) if tables else None,
    )


def _fill(catalog: Catalog, batch: ItemUpserts) -> _Rows:
    ids = check_item_ids(batch.item_ids)
    old = catalog.index_of(ids.to_list())
    new = old < 0
    return _Rows(
        item_ids=ids,
        old=old,
        codes=_filled_codes(catalog, batch, ids, old, new),
        prior=_filled_prior(catalog, batch, ids, old, new),
        metadata=_filled_metadata(catalog, batch, old, new),
    )


def _filled_codes(
    catalog: Catalog, batch: ItemUpserts, ids: pl.Series, old: Tensor, new: Tensor
) -> Tensor:
    levels = _ranked_levels(catalog)
    if batch.codes is None:
        if bool(new.any()):
            raise ValueError(
                f"{_new_items(ids, new)} without codes; an item that is new needs them"
            )
        return catalog.codes_of(old)[:, :levels]
    codes = check_codes(batch.codes, len(ids), catalog.codebook_size)
    if codes.shape[1] != levels:
        extra = " (the extra level is not given)" if levels < catalog.num_levels else ""
        raise ValueError(f"codes have {codes.shape[1]} levels; the catalog has {levels}{extra}")
    return codes


def _filled_prior(
    catalog: Catalog, batch: ItemUpserts, ids: pl.Series, old: Tensor, new: Tensor
) -> Tensor | None:
    prior = check_prior(batch.prior, len(ids))
    if catalog.prior is None:
        if prior is not None:
            raise ValueError("a prior is given, but the catalog has none")
        return None
    if prior is None:
        if bool(new.any()):
            raise ValueError(
                f"{_new_items(ids, new)} without a prior; the catalog has one, so an item that is "
                "new needs it"
            )
        return catalog.prior[old]
    return prior


def _filled_metadata(
    catalog: Catalog, batch: ItemUpserts, old: Tensor, new: Tensor
) -> pl.DataFrame | None:
    given, own = batch.metadata, catalog.metadata
    if given is not None and given.height != len(batch.item_ids):
        raise ValueError(f"metadata has {given.height} rows, but there are {old.numel()} item ids")
    names = [] if own is None else own.columns
    unknown = [] if given is None else [name for name in given.columns if name not in names]
    if unknown:
        raise ValueError(
            f"unknown metadata columns {_shown(unknown)}; the catalog has "
            f"{_shown(names) if names else 'none'}"
        )
    if own is None:
        return None
    # Null where the item is new: gathering by a missing index gives a missing row.
    rows = pl.Series(old.numpy()).set(pl.Series(new.numpy()), None)
    table = own.select(pl.all().gather(rows))
    for column in [] if given is None else given.get_columns():
        table = table.with_columns(fitted(column, own.schema[column.name]))
    check_metadata(table, old.numel())
    return table


def _stacked(tables: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Tables of the same columns below one another; a column without a value takes any type."""
    for name in tables[0].columns:
        types = dict.fromkeys(table.schema[name] for table in tables)
        types.pop(pl.Null(), None)
        if len(types) > 1 and not all(one.is_numeric() for one in types):
            raise ValueError(
                f"metadata column {name!r} gets its first values, of types that do not go "
                f"together: {', '.join(map(str, types))}"
            )
    return pl.concat(tables, how="vertical_relaxed")


def _deleted_items(
    catalog: Catalog, deletes: Sequence[str], policy: UnknownDeletes, upserted: pl.Series
) -> Tensor:
    """Sorted, distinct item indices to delete."""
    names = list(dict.fromkeys(deletes))
    both = set(names) & set(upserted.to_list()) if names else set()
    if both:
        raise ValueError(
            f"{len(both)} item ids are both upserted and deleted, among them {_shown(sorted(both))}"
        )
    found = catalog.index_of(names)
    unknown = (found < 0).nonzero().squeeze(1).tolist()
    if unknown and policy == "error":
        raise ValueError(
            f"{len(unknown)} item ids to delete are not in the catalog, among them "
            f"{_shown([names[i] for i in unknown])}"
        )
    return found[found >= 0].sort().values


def _which_move(catalog: Catalog, rows: _Rows) -> Tensor:
    """Which upserts can change the order of items: bool (U,)."""
    moves = rows.old < 0
    there = (~moves).nonzero().squeeze(1)
    old = rows.old[there]
    levels = _ranked_levels(catalog)
    differs = (catalog.codes_of(old)[:, :levels] != rows.codes[there]).any(dim=1)
    if catalog.prior is not None and rows.prior is not None:
        differs |= catalog.prior[old] != rows.prior[there]
    moves[there] = differs
    return moves


def _merge(catalog: Catalog, rows: _Rows, moves: Tensor, gone: Tensor) -> Merged:
    """Rank what moved together with the items it now shares codes with; the rest stays."""
    levels = _ranked_levels(catalog)
    moving = moves.nonzero().squeeze(1)
    low, high = find_items(catalog.trie, rows.codes[moving])
    kept = torch.ones(catalog.num_items, dtype=torch.bool)
    kept[gone] = False
    replaced = rows.old[moving]
    kept[replaced[replaced >= 0]] = False
    # Items of the semantic IDs that something moves to; several may move to one.
    edges = torch.zeros(catalog.num_items + 1, dtype=torch.int32)
    ones = torch.ones_like(low, dtype=torch.int32)
    edges.index_add_(0, low, ones).index_add_(0, high, -ones)
    beside = ((edges[:-1].cumsum(0) > 0) & kept).nonzero().squeeze(1)
    kept[beside] = False

    codes = torch.cat([rows.codes[moving], catalog.codes_of(beside)[:, :levels]])
    ids = pl.concat([rows.item_ids[moving.numpy()], catalog.item_ids[beside.numpy()]])
    prior = None
    if catalog.prior is not None and rows.prior is not None:
        prior = torch.cat([rows.prior[moving], catalog.prior[beside]])
    sources = torch.cat([catalog.num_items + moving, beside])
    if sources.numel():
        order, _ = rank_items(ids.rechunk(), codes, catalog.codebook_size, prior)
        before = find_items(catalog.trie, codes)[0][order]
        sources = sources[order]
    else:
        before = sources
    return merge_rows(kept, sources, before, len(rows.item_ids))


def _merged_trie(catalog: Catalog, rows: _Rows, merged: Merged, ids: pl.Series) -> CatalogTrie:
    levels = _ranked_levels(catalog)
    leaves = all_leaf_codes(catalog.trie)[:, :levels]
    sizes = torch.diff(catalog.trie.leaf_item_ptrs).long()
    old_codes = torch.repeat_interleave(leaves, sizes, dim=0)
    codes = torch.cat([old_codes, rows.codes.to(old_codes.dtype)])[merged.source]
    if levels < catalog.num_levels:
        codes = add_rank_level(codes, group_starts(codes), catalog.codebook_size, ids)
    return CatalogTrie.from_sorted_codes(codes, catalog.codebook_size)


def _merged_metadata(catalog: Catalog, rows: _Rows, merged: Merged) -> pl.DataFrame | None:
    if catalog.metadata is None or rows.metadata is None:
        return None
    # An item may stay where it is and have new values all the same.
    newest = torch.arange(catalog.num_items + len(rows.item_ids))
    there = (rows.old >= 0).nonzero().squeeze(1)
    newest[rows.old[there]] = catalog.num_items + there
    table = _stacked([catalog.metadata, rows.metadata])
    return table[newest[merged.source].numpy()].rechunk()


def _with_values(catalog: Catalog, rows: _Rows) -> Catalog:
    """Only metadata changed: order, trie and index are shared with the old catalog."""
    metadata = catalog.metadata
    if metadata is not None and rows.metadata is not None and len(rows.item_ids):
        newest = torch.arange(catalog.num_items)
        newest[rows.old] = catalog.num_items + torch.arange(len(rows.item_ids))
        metadata = _stacked([metadata, rows.metadata])[newest.numpy()].rechunk()
    return carry_sets(
        replace(catalog, version=UNSAVED, metadata=metadata),
        catalog,
        torch.arange(catalog.num_items),
    )


def _new_items(ids: pl.Series, new: Tensor) -> str:
    names = ids.filter(pl.Series(new.numpy())).to_list()
    return f"{len(names)} items are not in the catalog ({_shown(names)}) and come"


def _shown(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _NAMES_SHOWN else ""
    return ", ".join(map(repr, names[:_NAMES_SHOWN])) + more
