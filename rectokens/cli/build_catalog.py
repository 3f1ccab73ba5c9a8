"""``rectokens build-catalog``: items and codes to a catalog artifact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import polars as pl
import typer
from torch import Tensor

from rectokens.artifacts.catalog import CollisionPolicy
from rectokens.artifacts.tokenizer import TokenizerArtifact, load_tokenizer
from rectokens.catalog.artifact import save_catalog
from rectokens.catalog.build import build_catalog, check_item_ids
from rectokens.catalog.catalog import require_distinct
from rectokens.catalog.encode import encode_source
from rectokens.catalog.identical_rows import IdenticalRows
from rectokens.catalog.item_index import ItemIndex
from rectokens.catalog.sources import open_embeddings, require_batch_size, require_width
from rectokens.catalog.tables import read_codes, read_table
from rectokens.cli.device import checked_device
from rectokens.cli.progress import progress_bar, say


def build_catalog_command(
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer artifact (a version folder).")],
    ids: Annotated[
        Path, typer.Option(help="Item ids, row for row: .txt, .csv, .jsonl or .parquet.")
    ],
    out: Annotated[Path, typer.Option(help="Folder in which the version folder is made.")],
    embeddings: Annotated[
        Path | None, typer.Option(help="Embeddings to encode: .npy or .parquet; or give --codes.")
    ] = None,
    codes: Annotated[
        Path | None, typer.Option(help="Codes as 'encode' writes them; or give --embeddings.")
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Parquet column of embeddings or codes, if several.")
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Column of --ids; default item_id, or the only one.")
    ] = None,
    collisions: Annotated[
        CollisionPolicy, typer.Option(help="What becomes of items with equal codes.")
    ] = "share",
    prior_column: Annotated[
        str | None, typer.Option(help="Column of --ids that ranks items of equal codes.")
    ] = None,
    metadata_columns: Annotated[
        list[str] | None,
        typer.Option(help="Columns of --ids to return with items; commas or repeated; '*' = all."),
    ] = None,
    constraint_set: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="A named set and the file of its item ids."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Embeddings in memory at a time.")] = 8192,
    device: Annotated[str, typer.Option(help="Where to encode: cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Build a catalog: items in the order of their semantic IDs, and the trie over them."""
    if (embeddings is None) == (codes is None):
        raise ValueError("give one of --embeddings and --codes, not both or neither")
    require_batch_size(batch_size)
    target = checked_device(device)
    artifact = load_tokenizer(tokenizer)
    artifact.tokenizer.to(target)
    item_ids, beside = read_table(ids, id_column)
    prior = _pick(beside, [prior_column], ids)[prior_column] if prior_column else None
    metadata = _metadata(beside, metadata_columns or [], prior_column, ids)
    sets = _constraint_sets(constraint_set or [])
    # Before the long part, so that a mistake in the table is told at once.
    require_distinct(ItemIndex(check_item_ids(item_ids)))

    figures: dict[str, float | int | str] = {}
    if codes is not None:
        rows = _checked_codes(read_codes(codes, column), artifact, codes)
    else:
        assert embeddings is not None
        rows, floors = _encode(artifact, embeddings, column, batch_size, len(item_ids), ids)
        figures |= floors
    catalog = build_catalog(
        item_ids,
        rows,
        codebook_size=artifact.tokenizer.codebook_size,
        tokenizer_fingerprint=artifact.fingerprint,
        collision_policy=collisions,
        prior=prior,
        metadata=metadata,
        constraint_sets=sets,
    )
    path = save_catalog(out, catalog, tokenizer_version=artifact.manifest.version, numbers=figures)
    say(
        f"catalog {path.name}: {catalog.num_items:,} items in {catalog.trie.num_leaves:,} leaves, "
        f"{catalog.num_levels} levels of {catalog.codebook_size} codes"
    )
    typer.echo(path)


def _encode(
    artifact: TokenizerArtifact,
    embeddings: Path,
    column: str | None,
    batch_size: int,
    num_items: int,
    ids: Path,
) -> tuple[Tensor, dict[str, float]]:
    source = open_embeddings(embeddings, column)
    require_width(source, artifact.tokenizer.feature_dim, embeddings)
    if source.num_rows != num_items:
        raise ValueError(
            f"{embeddings} has {source.num_rows} rows, but {ids} has {num_items} item ids"
        )
    identical = IdenticalRows()
    with progress_bar("encoding", source.num_rows) as on_rows:
        rows = encode_source(
            artifact.tokenizer,
            source,
            num_levels=artifact.tokenizer.num_levels,
            batch_size=batch_size,
            on_rows=on_rows,
            identical=identical,
        )
    return rows, identical.report()


def _checked_codes(rows: Tensor, artifact: TokenizerArtifact, path: Path) -> Tensor:
    levels = artifact.tokenizer.num_levels
    if rows.shape[1] != levels:
        raise ValueError(f"{path} has codes of {rows.shape[1]} levels; the tokenizer has {levels}")
    return rows


def _pick(table: pl.DataFrame, columns: Sequence[str], path: Path) -> pl.DataFrame:
    for name in columns:
        if name not in table.columns:
            raise ValueError(
                f"{path} has no column {name!r} beside the ids; it has "
                f"{', '.join(table.columns) or 'none'}"
            )
    return table.select(columns)


def _metadata(
    table: pl.DataFrame, wanted: Sequence[str], prior_column: str | None, path: Path
) -> pl.DataFrame | None:
    names = [name.strip() for part in wanted for name in part.split(",") if name.strip()]
    if "*" in names:
        names = [name for name in table.columns if name != prior_column]
    names = list(dict.fromkeys(names))
    return _pick(table, names, path) if names else None


def _constraint_sets(arguments: Sequence[str]) -> dict[str, list[str]]:
    sets: dict[str, list[str]] = {}
    for argument in arguments:
        name, separator, file = argument.partition("=")
        if not separator or not name or not file:
            raise ValueError(f"--constraint-set is {argument!r}; expected NAME=FILE")
        if name in sets:
            raise ValueError(f"--constraint-set names {name!r} twice")
        sets[name] = read_table(Path(file))[0].to_list()
    return sets
