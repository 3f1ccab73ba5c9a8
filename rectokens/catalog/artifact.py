"""The catalog on disk: written once, checked whenever it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rectokens.artifacts.catalog import (
    CATALOG_NAME,
    CatalogArtifact,
    CatalogConfig,
    load_catalog_manifest,
)
from rectokens.artifacts.errors import ArtifactError
from rectokens.artifacts.json_fields import write_json
from rectokens.artifacts.manifest import ParentRef, write_artifact
from rectokens.catalog.catalog import Catalog, require_distinct
from rectokens.catalog.collisions import report_of_group_sizes
from rectokens.catalog.invariants import (
    all_leaf_codes,
    check_constraint_sets,
    check_item_column,
    check_prior,
    check_semantic_ids,
    checked_trie,
)
from rectokens.catalog.item_index import ItemIndex
from rectokens.schemas.catalog_trie import CatalogTrie

ITEMS_NAME = "items.parquet"
TRIE_NAME = "trie.safetensors"
SETS_NAME = "constraint_sets.safetensors"
_TRIE_ARRAYS = ("row_ptrs", "codes", "leaf_item_ptrs")
_NOTHING: Mapping[str, Any] = MappingProxyType({})


def save_catalog(
    root: Path,
    catalog: Catalog,
    *,
    tokenizer_version: str | None = None,
    numbers: Mapping[str, float | int | str] = _NOTHING,
) -> Path:
    """Write a catalog artifact.

    Args:
        root: folder of the version folders.
        catalog: built or loaded; its ``version`` is not looked at.
        tokenizer_version: of the tokenizer artifact that gave the codes, if it is known.
        numbers: figures to record beside counts and collision rates.

    Returns:
        ``root/<version>``.

    Raises:
        ArtifactError: ``numbers`` are not finite, or that version is there and cannot be read.
        OSError: a file cannot be written, for example because the disk is full; nothing is left.
    """

    def populate(folder: Path) -> None:
        with _writing(folder / ITEMS_NAME) as path:
            _items_table(catalog).write_parquet(path, compression="zstd")
        trie = catalog.trie
        arrays = {
            "row_ptrs": trie.row_ptrs,
            "codes": trie.codes.view(torch.uint16),
            "leaf_item_ptrs": trie.leaf_item_ptrs,
        }
        with _writing(folder / TRIE_NAME) as path:
            save_file({name: a.contiguous() for name, a in arrays.items()}, path)
        if catalog.constraint_sets:
            with _writing(folder / SETS_NAME) as path:
                save_file(dict(catalog.constraint_sets), path)
        write_json(folder / CATALOG_NAME, _config_of(catalog).to_json())

    return write_artifact(
        root,
        "catalog",
        populate,
        parents={"tokenizer": ParentRef(tokenizer_version, catalog.tokenizer_fingerprint)},
        numbers={**_numbers_of(catalog), **numbers},
    )


def load_catalog(path: Path, *, verify_checksums: bool = True) -> Catalog:
    """Read a catalog artifact and check everything that searching it relies on.

    Args:
        path: the artifact folder.
        verify_checksums: hash the files; sizes and invariants are checked in any case.

    Raises:
        ArtifactError: the folder is not an intact catalog artifact, or an invariant does not
            hold; names the file and what is wrong.
    """
    artifact = load_catalog_manifest(path, verify_checksums=verify_checksums)
    config = artifact.config
    expected = {CATALOG_NAME, ITEMS_NAME, TRIE_NAME}
    if config.constraint_sets:
        expected.add(SETS_NAME)
    if set(artifact.manifest.files) != expected:
        raise ArtifactError(
            f"{artifact.path} holds {sorted(artifact.manifest.files)}; expected {sorted(expected)}"
        )
    trie = read_trie(artifact)
    items = _read_items(artifact)

    where = str(artifact.path / ITEMS_NAME)
    check_semantic_ids(items["semantic_id"].to_numpy(), trie, where, config.collision_policy)
    prior = None
    if config.has_prior:
        if items["prior"].null_count():
            raise ArtifactError(f"{where}: prior is missing in {items['prior'].null_count()} rows")
        prior = torch.from_numpy(items["prior"].to_numpy().copy())
        check_prior(prior, trie, where)
    item_ids = items["item_id"]
    check_item_column(item_ids, where)
    index = ItemIndex(item_ids)
    try:
        require_distinct(index)
    except ValueError as error:
        raise ArtifactError(f"{where}: {error}") from error
    return Catalog(
        version=artifact.manifest.version,
        tokenizer_fingerprint=config.tokenizer_fingerprint,
        collision_policy=config.collision_policy,
        trie=trie,
        item_ids=item_ids,
        prior=prior,
        metadata=items.select(config.metadata_columns) if config.metadata_columns else None,
        constraint_sets=MappingProxyType(_read_sets(artifact)),
        index=index,
        predicates=MappingProxyType(dict(sorted(config.predicates.items()))),
    )


def read_trie(artifact: CatalogArtifact) -> CatalogTrie:
    """Read the trie alone of a catalog that :func:`load_catalog_manifest` has checked.

    Raises:
        ArtifactError: the arrays are no trie, or not the one ``catalog.json`` describes.
    """
    path = artifact.path / TRIE_NAME
    arrays = _read_tensors(path)
    if set(arrays) != set(_TRIE_ARRAYS):
        raise ArtifactError(f"{path} holds {sorted(arrays)}; expected {sorted(_TRIE_ARRAYS)}")
    return checked_trie(
        arrays["row_ptrs"], arrays["codes"], arrays["leaf_item_ptrs"], artifact.config, str(path)
    )


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """Let a writer's own kind of error be the OSError that it stands for."""
    try:
        yield path
    except (pl.exceptions.PolarsError, SafetensorError) as error:
        raise OSError(f"{path.name} cannot be written: {error}") from error


def _items_table(catalog: Catalog) -> pl.DataFrame:
    trie = catalog.trie
    sizes = torch.diff(trie.leaf_item_ptrs).long()
    codes = torch.repeat_interleave(all_leaf_codes(trie), sizes, dim=0)
    columns = [
        catalog.item_ids.alias("item_id"),
        pl.Series(
            "semantic_id",
            codes.numpy().astype(np.uint16),
            dtype=pl.Array(pl.UInt16, trie.num_levels),
        ),
    ]
    if catalog.prior is not None:
        columns.append(pl.Series("prior", catalog.prior.numpy(), dtype=pl.Float32))
    if catalog.metadata is not None:
        columns += catalog.metadata.get_columns()
    return pl.DataFrame(columns)


def _config_of(catalog: Catalog) -> CatalogConfig:
    return CatalogConfig(
        tokenizer_fingerprint=catalog.tokenizer_fingerprint,
        collision_policy=catalog.collision_policy,
        num_items=catalog.num_items,
        num_levels=catalog.num_levels,
        codebook_size=catalog.codebook_size,
        level_offsets=catalog.trie.level_offsets,
        has_prior=catalog.prior is not None,
        metadata_columns=tuple(catalog.metadata.columns) if catalog.metadata is not None else (),
        constraint_sets={n: items.numel() for n, items in catalog.constraint_sets.items()},
        predicates=dict(catalog.predicates),
    )


def _numbers_of(catalog: Catalog) -> dict[str, float | int | str]:
    """Counts, and collisions among the codes that the tokenizer gave."""
    trie = catalog.trie
    depth = trie.num_levels - (catalog.collision_policy == "extra_level")
    nodes = torch.arange(trie.level_offsets[depth], trie.level_offsets[depth + 1])
    low, high = trie.item_range(nodes, depth)
    return {
        **report_of_group_sizes(high - low),
        "num_levels": trie.num_levels,
        "codebook_size": trie.codebook_size,
        "num_leaves": trie.num_leaves,
    }


def _read_sets(artifact: CatalogArtifact) -> dict[str, Tensor]:
    if not artifact.config.constraint_sets:
        return {}
    path = artifact.path / SETS_NAME
    sets = _read_tensors(path)
    check_constraint_sets(sets, artifact.config, str(path))
    return dict(sorted(sets.items()))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        # Copies: a mapped file that is overwritten in place would change under a running search.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{path} is not a readable safetensors file: {error}") from error


def _read_items(artifact: CatalogArtifact) -> pl.DataFrame:
    path, config = artifact.path / ITEMS_NAME, artifact.config
    required: dict[str, pl.DataType] = {
        "item_id": pl.String(),
        "semantic_id": pl.Array(pl.UInt16, config.num_levels),
    }
    if config.has_prior:
        required["prior"] = pl.Float32()
    columns = (*required, *config.metadata_columns)
    try:
        lazy = pl.scan_parquet(path, glob=False)
        schema = lazy.collect_schema()
        # Counted before the table is read: a few bytes can stand for any number of rows.
        num_rows = int(lazy.select(pl.len()).collect().item())
        if num_rows == config.num_items and tuple(schema.names()) == columns:
            items = pl.read_parquet(path, glob=False).rechunk()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        raise ArtifactError(f"{path} is not a readable Parquet file: {error}") from error
    if num_rows != config.num_items:
        raise ArtifactError(f"{path} has {num_rows} rows; {CATALOG_NAME} says {config.num_items}")
    if tuple(schema.names()) != columns:
        raise ArtifactError(f"{path} has the columns {schema.names()}; expected {list(columns)}")
    for name, dtype in required.items():
        if schema[name] != dtype:
            raise ArtifactError(f"{path}: {name} has type {schema[name]}; expected {dtype}")
    if items["semantic_id"].null_count() or items["semantic_id"].explode().null_count():
        raise ArtifactError(f"{path}: semantic_id is missing in some rows")
    return items
