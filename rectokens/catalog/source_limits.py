"""How large a source may be, told from what a file says of itself before its values are read.

A few kilobytes of Parquet can stand for any number of values: runs of equal values cost nothing
on disk. So counts are compared with limits, and with each other, before anything is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rectokens.catalog.sources import float_list_column, map_npy, open_parquet

_BYTES_PER_VALUE = 4


@dataclass(frozen=True, slots=True)
class SourceLimits:
    """The most that is read.

    Attributes:
        max_rows: N.
        max_bytes: of a file, uncompressed, and of its embeddings in float32.
        max_dim: D.
    """

    max_rows: int
    max_bytes: int
    max_dim: int = 65_536


def check_embedding_limits(
    paths: Sequence[Path], limits: SourceLimits, column: str | None = None
) -> None:
    """Refuse embeddings that are larger than they may be, or not all of one width.

    Args:
        paths: one ``.npy`` file, or ``.parquet`` files that are read one after the other.
        limits: what is allowed.
        column: of the Parquet files, where there are several that could be meant.

    Raises:
        ValueError: naming the file, the number found and the number allowed; a file that cannot
            be read.
    """
    rows = num_bytes = 0
    for path in paths:
        found = _npy_shape(path) if path.suffix == ".npy" else _parquet_shape(path, column)
        if found.dim is not None and found.dim > limits.max_dim:
            raise ValueError(f"{path} has rows of {found.dim:,} values; at most {limits.max_dim:,}")
        rows += found.rows
        num_bytes += found.num_bytes
        _require_rows(path, rows, limits)
        _require_bytes(path, num_bytes, limits)


def check_table_limits(path: Path, limits: SourceLimits) -> None:
    """Refuse a table that is larger than it may be; of text formats only the file's size is known.

    Raises:
        ValueError: naming the file, the number found and the number allowed; a Parquet file that
            cannot be read.
    """
    if path.suffix == ".parquet":
        metadata = _metadata(path)
        _require_rows(path, int(metadata.num_rows), limits)
        _require_bytes(path, _uncompressed(metadata), limits)
    _require_bytes(path, path.stat().st_size, limits)


@dataclass(frozen=True, slots=True)
class _Shape:
    rows: int
    dim: int | None
    num_bytes: int


def _npy_shape(path: Path) -> _Shape:
    rows = map_npy(path)  # a header that promises more than the file holds is refused here
    if rows.ndim != 2:
        raise ValueError(f"{path} has shape {rows.shape}; expected a matrix (rows, dim)")
    return _Shape(int(rows.shape[0]), int(rows.shape[1]), int(rows.nbytes))


def _parquet_shape(path: Path, column: str | None) -> _Shape:
    with open_parquet(path) as file:
        name = float_list_column(file.schema_arrow, column, path)
        metadata = file.metadata
    dim: int | None = None
    values = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        leaves = [group.column(i) for i in range(group.num_columns)]
        # A column of lists has one leaf below its own name.
        count = sum(
            int(one.num_values) for one in leaves if one.path_in_schema.split(".")[0] == name
        )
        values += count
        if not group.num_rows:
            continue
        width, left = divmod(count, int(group.num_rows))
        if left or width != (width if dim is None else dim):
            raise ValueError(
                f"{path}: {count:,} values in {group.num_rows:,} rows of {name!r} (row group "
                f"{index}) do not make rows of {width if dim is None else dim} values each"
            )
        dim = width
    return _Shape(
        int(metadata.num_rows), dim, max(_uncompressed(metadata), values * _BYTES_PER_VALUE)
    )


def _metadata(path: Path) -> Any:
    with open_parquet(path) as file:
        return file.metadata


def _uncompressed(metadata: Any) -> int:
    groups = range(metadata.num_row_groups)
    return sum(int(metadata.row_group(index).total_byte_size) for index in groups)


def _require_rows(path: Path, rows: int, limits: SourceLimits) -> None:
    if rows > limits.max_rows:
        raise ValueError(f"{path} makes {rows:,} rows; at most {limits.max_rows:,} are read")


def _require_bytes(path: Path, num_bytes: int, limits: SourceLimits) -> None:
    if num_bytes > limits.max_bytes:
        raise ValueError(
            f"{path} makes {num_bytes:,} bytes uncompressed; at most {limits.max_bytes:,} are read"
        )
