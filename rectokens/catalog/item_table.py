"""What is known of the items beside their embeddings, without reading anything else of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from rectokens.catalog.tables import ID_COLUMN, id_strings, read_table

ALL_COLUMNS = "*"


@dataclass(frozen=True, eq=False)
class ItemTable:
    """N items, in the order of the file.

    Attributes:
        item_ids: N strings.
        prior: N values as they stand, None where no column was named.
        metadata: N rows, None where no columns were named.
    """

    item_ids: pl.Series
    prior: pl.Series | None
    metadata: pl.DataFrame | None


def read_item_table(
    paths: Sequence[Path],
    *,
    id_column: str | None = None,
    prior_column: str | None = None,
    metadata_columns: Sequence[str] = (),
    leave_out: Sequence[str] = (),
) -> ItemTable:
    """Read item ids, a prior and metadata.

    Args:
        paths: one table (``.txt``, ``.csv``, ``.jsonl``, ``.parquet``), or several Parquet files
            of the same columns, read one after the other.
        id_column: default ``item_id``, or the only column.
        prior_column: of numbers.
        metadata_columns: ``*`` stands for all that are not named here otherwise.
        leave_out: columns that are not read and not part of ``*``, such as the embeddings.

    Raises:
        ValueError: unknown suffix, unreadable file, no such column, ids that are no strings,
            files whose columns differ.
        OSError: a file is missing.
    """
    if len(paths) == 1 and paths[0].suffix != ".parquet":
        ids, beside = read_table(paths[0], id_column)
        wanted = _metadata_names(metadata_columns, beside.columns, prior_column, leave_out)
        _require(paths[0], [*([prior_column] if prior_column else []), *wanted], beside.columns)
        table = beside
    else:
        names = _parquet_columns(paths)
        if id_column is None:
            rest = [name for name in names if name not in leave_out]
            id_column = rest[0] if len(rest) == 1 else ID_COLUMN
        others = [name for name in names if name != id_column]
        wanted = _metadata_names(metadata_columns, others, prior_column, leave_out)
        needed = [id_column, *([prior_column] if prior_column else []), *wanted]
        _require(paths[0], needed, names)
        table = _read_parquet(paths, list(dict.fromkeys(needed)))
        ids = id_strings(table[id_column], paths[0], id_column)
    return ItemTable(
        item_ids=ids,
        prior=table[prior_column] if prior_column else None,
        metadata=table.select(wanted) if wanted else None,
    )


def _metadata_names(
    wanted: Sequence[str],
    there: Sequence[str],
    prior_column: str | None,
    leave_out: Sequence[str],
) -> list[str]:
    if ALL_COLUMNS in wanted:
        return [name for name in there if name != prior_column and name not in leave_out]
    return list(dict.fromkeys(wanted))


def _require(path: Path, names: Sequence[str], there: Sequence[str]) -> None:
    for name in names:
        if name not in there:
            raise ValueError(
                f"{path} has no column {name!r}; it has {', '.join(there) or 'no other'}"
            )


def _parquet_columns(paths: Sequence[Path]) -> list[str]:
    try:
        names = pl.scan_parquet(paths[0], glob=False).collect_schema().names()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise ValueError(f"{paths[0]} is not a readable Parquet file: {error}") from error
    return list(names)


def _read_parquet(paths: Sequence[Path], columns: Sequence[str]) -> pl.DataFrame:
    parts = []
    for path in paths:
        try:
            parts.append(pl.scan_parquet(path, glob=False).select(columns).collect())
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if parts[-1].schema != parts[0].schema:
            raise ValueError(
                f"{path} has columns of types {dict(parts[-1].schema)}; {paths[0]} has "
                f"{dict(parts[0].schema)}"
            )
    return pl.concat(parts)
