"""Tables of item ids, priors and metadata, and files of codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from rectokens.catalog.sources import integer_list_column, list_matrix, map_npy
from rectokens.core.atomic_file import atomic_file

ID_COLUMN = "item_id"
CODES_COLUMN = "codes"
_TABLE_SUFFIXES = (".txt", ".csv", ".jsonl", ".ndjson", ".parquet")


def read_table(path: Path, id_column: str | None = None) -> tuple[pl.Series, pl.DataFrame]:
    """Read item ids and whatever stands beside them.

    Args:
        path: ``.txt`` (one id a line), ``.csv`` (with a header), ``.jsonl`` or ``.parquet``; the
            text formats also with ``.gz`` after.
        id_column: column of the ids. By default ``item_id``, or the only column.

    Returns:
        The ids as strings (integers are written out), and the other columns.

    Raises:
        ValueError: unknown suffix, unreadable file, no such column, ids of another type.
        OSError: the file is missing.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    try:
        table = _read(path, suffix, id_column or ID_COLUMN)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable {suffix} file: {error}") from error
    if id_column is None:
        id_column = table.columns[0] if table.width == 1 else ID_COLUMN
    if id_column not in table.columns:
        raise ValueError(
            f"{path} has no column {id_column!r}; it has {', '.join(table.columns)}; "
            "name the column of the item ids"
        )
    return id_strings(table[id_column], path, id_column), table.drop(id_column)


def id_strings(ids: pl.Series, path: Path, column: str) -> pl.Series:
    """Item ids as strings; integers are written out.

    Raises:
        ValueError: another type; names the file and the column.
    """
    if ids.dtype.is_integer():
        ids = ids.cast(pl.String)
    if ids.dtype != pl.String:
        raise ValueError(f"{path}: column {column!r} has type {ids.dtype}; expected strings")
    return ids


def read_codes(path: Path, column: str | None = None) -> Tensor:
    """Read codes, int64 (N, L).

    Args:
        path: ``.npy``, a matrix of integers, or ``.parquet``, a column of integer lists.
        column: of a Parquet file; may be left out where there is only one such column.

    Raises:
        ValueError: unknown suffix, unreadable file, wrong type or shape.
        OSError: the file is missing.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.suffix == ".npy":
        codes = map_npy(path)
        if codes.ndim != 2 or codes.dtype.kind not in "iu":
            raise ValueError(
                f"{path} holds {codes.dtype} of shape {codes.shape}; expected a matrix "
                "(items, levels) of integers"
            )
    elif path.suffix == ".parquet":
        try:
            schema = pq.read_schema(path)
            name = integer_list_column(schema, column, path)
            lists = pq.read_table(path, columns=[name]).column(0).combine_chunks()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a readable Parquet file: {error}") from error
        width = len(lists[0].as_py() or ()) if len(lists) else 0
        if not width:
            raise ValueError(f"{path} has no codes in its first row")
        codes = list_matrix(lists, width, 0, path)
    else:
        raise ValueError(f"{path} ends in {path.suffix!r}; codes are read from .npy or .parquet")
    return torch.from_numpy(codes.astype(np.int64))


def require_codes_suffix(path: Path) -> None:
    """Refuse a name that :func:`write_codes` could not write.

    Raises:
        ValueError: naming the suffixes there are.
    """
    if path.suffix not in (".npy", ".parquet"):
        raise ValueError(f"{path} ends in {path.suffix!r}; codes are written as .npy or .parquet")


def write_codes(path: Path, codes: Tensor) -> None:
    """Write codes (N, L), 0 to 65,535: ``.npy`` of int32, or ``.parquet`` with a column ``codes``.

    The file appears complete or not at all.

    Raises:
        ValueError: unknown suffix.
    """
    require_codes_suffix(path)
    rows = codes.to(torch.int32).numpy()
    with atomic_file(path) as partial:
        if path.suffix == ".npy":
            np.save(partial, rows)
        else:
            dtype = pl.Array(pl.UInt16, rows.shape[1])
            column = pl.Series(CODES_COLUMN, rows.astype(np.uint16), dtype=dtype)
            pl.DataFrame([column]).write_parquet(partial)


def _read(path: Path, suffix: str, id_column: str) -> pl.DataFrame:
    strings = {id_column: pl.String}
    if suffix == ".txt":
        return pl.read_lines(path, name=ID_COLUMN)
    if suffix == ".csv":
        return pl.read_csv(path, schema_overrides=strings, infer_schema_length=None)
    if suffix in (".jsonl", ".ndjson"):
        return pl.read_ndjson(path, schema_overrides=strings, infer_schema_length=None)
    if suffix == ".parquet":
        return pl.read_parquet(path, glob=False)
    raise ValueError(
        f"{path} ends in {suffix!r}; tables are read from {', '.join(_TABLE_SUFFIXES)}"
    )
