"""From item ids and codes to a catalog."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from rectokens.artifacts.catalog import require_collision_policy
from rectokens.catalog.catalog import UNSAVED, Catalog, require_distinct
from rectokens.catalog.collisions import add_rank_level, rank_items
from rectokens.catalog.constraint_sets import resolve_constraint_sets
from rectokens.catalog.item_index import ItemIndex
from rectokens.schemas.catalog_trie import CatalogTrie

# Columns of the items table that are the catalog's own.
RESERVED_COLUMNS = ("item_id", "semantic_id", "prior")
MAX_CODEBOOK_SIZE = 2**16
_NO_JSON_FORM = (pl.Binary, pl.Object, pl.Decimal, pl.Duration, pl.Int128, pl.UInt128)


def build_catalog(
    item_ids: Sequence[str] | pl.Series,
    codes: Tensor | NDArray[np.integer],
    *,
    codebook_size: int,
    tokenizer_fingerprint: str,
    collision_policy: str = "share",
    prior: Tensor | Sequence[float] | pl.Series | None = None,
    metadata: pl.DataFrame | None = None,
    constraint_sets: Mapping[str, Sequence[str]] | None = None,
) -> Catalog:
    """Number the items by semantic ID and make the trie. Input row i is one item throughout.

    Args:
        item_ids: N strings, distinct, not empty.
        codes: integer (N, L), values in [0, K).
        codebook_size: K, 1 to 65,536.
        tokenizer_fingerprint: of the tokenizer that gave the codes.
        collision_policy: ``share``: items with equal codes share a leaf, best first;
            ``extra_level``: one more level holds the item's rank among them.
        prior: N finite numbers, higher is better; orders items of equal codes. Kept as float32.
            Items of equal prior are ordered by a hash of their id.
        metadata: N rows, to be returned with an item; types that JSON has.
        constraint_sets: item ids by name of the set.

    Returns:
        The catalog, its version ``"unsaved"``.

    Raises:
        ValueError: lengths that differ; empty, missing or repeated ids; codes out of range; a
            prior that is NaN, infinite or missing; a metadata column that is reserved or has no
            JSON form; more colliding items than an extra level holds; unknown ids or an unusable
            name in a constraint set; no items.
    """
    policy = require_collision_policy(collision_policy, "build_catalog")
    if not tokenizer_fingerprint:
        raise ValueError("tokenizer_fingerprint is empty; a catalog belongs to a tokenizer")
    ids = check_item_ids(item_ids)
    ranked_by = check_prior(prior, len(ids))
    check_metadata(metadata, len(ids))
    rows = check_codes(codes, len(ids), codebook_size)
    # Before ranking: two equal ids would be a tie that nothing breaks.
    require_distinct(ItemIndex(ids))

    order, starts = rank_items(ids, rows, codebook_size, ranked_by)
    picks = order.numpy()
    ids, rows = ids[picks].rechunk(), rows[order]
    if policy == "extra_level":
        rows = add_rank_level(rows, starts, codebook_size, ids)
    trie = CatalogTrie.from_sorted_codes(rows, codebook_size)

    index = ItemIndex(ids)
    sets = resolve_constraint_sets(constraint_sets or {}, index)
    return Catalog(
        version=UNSAVED,
        tokenizer_fingerprint=tokenizer_fingerprint,
        collision_policy=policy,
        trie=trie,
        item_ids=ids,
        prior=None if ranked_by is None else ranked_by[order],
        metadata=None if metadata is None else metadata[picks].rechunk(),
        constraint_sets=MappingProxyType(sets),
        index=index,
    )


def check_item_ids(item_ids: Sequence[str] | pl.Series) -> pl.Series:
    """The ids as one column of strings named ``item_id``.

    Raises:
        ValueError: none at all, an id that is no string, missing or empty; names its row.
    """
    if isinstance(item_ids, pl.Series):
        ids = item_ids
        if ids.dtype != pl.String:
            raise ValueError(f"item ids have type {ids.dtype}; expected strings")
    else:
        listed = list(item_ids)
        for row, item_id in enumerate(listed):
            if not isinstance(item_id, str):
                raise ValueError(f"item id of row {row} is {item_id!r}; expected a string")
        try:
            ids = pl.Series(listed, dtype=pl.String)
        except UnicodeEncodeError as error:
            raise ValueError(f"an item id is not valid Unicode: {error}") from error
    if not len(ids):
        raise ValueError("there are no item ids; a catalog needs at least one item")
    bad = (ids.is_null() | (ids == "").fill_null(value=True)).arg_true()
    if len(bad):
        row = int(bad[0])
        what = "missing" if ids[row] is None else "empty"
        raise ValueError(f"item id of row {row} is {what} ({len(bad)} such rows)")
    return ids.alias("item_id").rechunk()


def check_codes(codes: Tensor | NDArray[np.integer], num_items: int, codebook_size: int) -> Tensor:
    """The codes as int64 (N, L) on the CPU.

    Raises:
        ValueError: other types or shapes, another number of rows than ``num_items``, a code out
            of range; names its row.
    """
    if not 1 <= codebook_size <= MAX_CODEBOOK_SIZE:
        raise ValueError(f"codebook_size is {codebook_size}; allowed are 1 to {MAX_CODEBOOK_SIZE}")
    rows = torch.as_tensor(codes)
    if rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise ValueError(f"codes have type {rows.dtype}; expected integers")
    if rows.ndim != 2 or rows.shape[1] < 1:
        raise ValueError(f"codes have shape {tuple(rows.shape)}; expected (N, L) with L >= 1")
    if rows.shape[0] != num_items:
        raise ValueError(f"there are {rows.shape[0]} rows of codes, but {num_items} item ids")
    rows = rows.detach().cpu().long()
    bad = ((rows < 0) | (rows >= codebook_size)).nonzero()
    if bad.numel():
        row, level = bad[0].tolist()
        raise ValueError(
            f"code of row {row}, level {level} is {int(rows[row, level])}; allowed are 0 to "
            f"{codebook_size - 1} for codebook_size {codebook_size}"
        )
    return rows


def check_prior(
    prior: Tensor | Sequence[float] | pl.Series | None, num_items: int
) -> Tensor | None:
    """The prior as float32 (N,) on the CPU, None for none.

    Raises:
        ValueError: another shape or type, or a value that is missing or not finite; names its row.
    """
    if prior is None:
        return None
    if isinstance(prior, pl.Series):
        missing = prior.is_null().arg_true()
        if len(missing):
            raise ValueError(f"prior of row {int(missing[0])} is missing ({len(missing)} rows)")
        if not prior.dtype.is_numeric():
            raise ValueError(f"prior has type {prior.dtype}; expected numbers")
        prior = torch.from_numpy(prior.cast(pl.Float32).to_numpy().copy())
    values = torch.as_tensor(prior).detach().cpu().to(torch.float32)
    if values.shape != (num_items,):
        raise ValueError(f"prior has shape {tuple(values.shape)}; expected ({num_items},)")
    bad = (~values.isfinite()).nonzero()
    if bad.numel():
        row = int(bad[0, 0])
        raise ValueError(
            f"prior of row {row} is {float(values[row])}; it must be finite in float32 "
            f"({bad.shape[0]} such rows)"
        )
    return values


def check_metadata(metadata: pl.DataFrame | None, num_items: int) -> None:
    """Refuse a table that items cannot have beside them.

    Raises:
        ValueError: another number of rows, no columns, a name or a type that is not allowed.
    """
    if metadata is None:
        return
    if metadata.height != num_items:
        raise ValueError(f"metadata has {metadata.height} rows, but there are {num_items} item ids")
    if not metadata.width:
        raise ValueError("metadata has no columns; pass None for no metadata")
    for name, dtype in metadata.schema.items():
        if not name or name in RESERVED_COLUMNS:
            raise ValueError(
                f"metadata column is called {name!r}; not allowed are '' and "
                f"{', '.join(map(repr, RESERVED_COLUMNS))}"
            )
        if any(_contains(dtype, refused) for refused in _NO_JSON_FORM):
            raise ValueError(
                f"metadata column {name!r} has type {dtype}, which JSON does not have; cast it "
                "to a string or a number"
            )


def _contains(dtype: pl.DataType, refused: type[pl.DataType]) -> bool:
    """Whether a type is, or is nested around, another."""
    if isinstance(dtype, refused):
        return True
    if isinstance(dtype, (pl.List, pl.Array)):
        inner = dtype.inner
        return isinstance(inner, pl.DataType) and _contains(inner, refused)
    if isinstance(dtype, pl.Struct):
        return any(
            isinstance(one.dtype, pl.DataType) and _contains(one.dtype, refused)
            for one in dtype.fields
        )
    return False
