"""Embeddings on disk, read a batch at a time: the whole file never has to fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

# Parquet columns are read through a window of this many bytes, not a whole column chunk at once.
_READ_BUFFER_BYTES = 4 * 1024 * 1024
# Squared distances of such values, summed over any table of rows, stay finite in float32.
LARGEST_VALUE = 1e12


class EmbeddingSource(Protocol):
    """Rows of embeddings that can be read any number of times."""

    @property
    def dim(self) -> int:
        """D."""
        ...

    @property
    def num_rows(self) -> int:
        """N."""
        ...

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """All rows in order: float32 (B, D), 1 <= B <= batch_size, on the CPU.

        Raises:
            ValueError: a value that is NaN, infinite or larger than ``LARGEST_VALUE``, a row of
                another width; names the row.
        """
        ...


@dataclass(frozen=True)
class SourceBatches:
    """A source at a fixed batch size, as something to iterate over again and again.

    Attributes:
        source: where the rows come from.
        batch_size: most rows of a batch.
        on_rows: called before each batch with the number of rows handed out so far.
    """

    source: EmbeddingSource
    batch_size: int
    on_rows: Callable[[int], None] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        done = 0
        for batch in self.source.batches(self.batch_size):
            if self.on_rows is not None:
                self.on_rows(done)
            yield batch
            done += len(batch)

    def __len__(self) -> int:
        """Batches if all are full; a source in several parts may give more."""
        return -(-self.source.num_rows // self.batch_size)


def open_embeddings(path: Path, column: str | None = None) -> EmbeddingSource:
    """Open a ``.npy`` file, a ``.parquet`` file, or a folder of ``.parquet`` files.

    Args:
        path: ``.npy``: (N, D) of float16, float32 or float64. Parquet is
            streamed: a column of lists (fixed-size or not) of floats; files of a folder are read
            in the order of their names.
        column: of a Parquet file; may be left out where there is only one column of float lists.

    Raises:
        ValueError: unknown suffix, unreadable file, wrong type or shape, no rows, no or several
            such columns.
        OSError: the file is missing.
    """
    path = Path(path)
    if path.is_dir():
        parts = sorted(path.glob("*.parquet"))
        if not parts:
            raise ValueError(f"{path} is a folder without .parquet files")
        return ParquetEmbeddings(parts, column)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.suffix == ".parquet":
        return ParquetEmbeddings([path], column)
    if path.suffix == ".npy":
        return NpyEmbeddings(path)
    raise ValueError(f"{path} ends in {path.suffix!r}; embeddings are read from .npy or .parquet")


class NpyEmbeddings:
    """A ``.npy`` matrix, its shape told by its header."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows = map_npy(path)
        if self._rows.ndim != 2 or self._rows.dtype.kind != "f":
            raise ValueError(
                f"{path} holds {self._rows.dtype} of shape {self._rows.shape}; expected a matrix "
                "(rows, dim) of float16, float32 or float64"
            )
        if 0 in self._rows.shape:
            raise ValueError(f"{path} has shape {self._rows.shape}; it must not be empty")

    @property
    def dim(self) -> int:
        """D."""
        return int(self._rows.shape[1])

    @property
    def num_rows(self) -> int:
        """N."""
        return int(self._rows.shape[0])

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """See :meth:`EmbeddingSource.batches`."""
        require_batch_size(batch_size)
        for start in range(0, self.num_rows, batch_size):
            stop = min(start + batch_size, self.num_rows)
            yield finite_rows(self._read(start, stop), start, self._path)

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows by an ordinary read: a mapped file that is cut short kills whoever touches it."""
        rows = self._rows
        if not isinstance(rows, np.memmap) or not rows.flags.c_contiguous:
            return rows[start:stop]
        width = rows.shape[1]
        with open(self._path, "rb") as file:
            file.seek(rows.offset + start * width * rows.itemsize)
            values = np.fromfile(file, rows.dtype, (stop - start) * width)
        if values.size != (stop - start) * width:
            raise ValueError(
                f"{self._path} ends within rows {start} to {stop - 1}; it was cut short"
            )
        return values.reshape(-1, width)


class ParquetEmbeddings:
    """A column of lists in one or more Parquet files, streamed."""

    def __init__(self, paths: list[Path], column: str | None = None) -> None:
        self._paths = paths
        self._column = float_list_column(_read_schema(paths[0]), column, paths[0])
        self._num_rows = 0
        for path in paths:
            schema = _read_schema(path)
            float_list_column(schema, self._column, path)
            self._num_rows += _num_rows(path)
        if not self._num_rows:
            raise ValueError(f"{paths[0]} has no rows")
        first = next(_column_batches(next(p for p in paths if _num_rows(p)), self._column, 1))
        self._dim = len(first[0].as_py() or ())
        if not self._dim:
            raise ValueError(f"{paths[0]}: the first row of {self._column!r} is missing or empty")

    @property
    def column(self) -> str:
        """Name of the column."""
        return self._column

    @property
    def dim(self) -> int:
        """D."""
        return self._dim

    @property
    def num_rows(self) -> int:
        """N."""
        return self._num_rows

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """See :meth:`EmbeddingSource.batches`; no batch spans two files."""
        require_batch_size(batch_size)
        for path in self._paths:
            row = 0
            for lists in _column_batches(path, self._column, batch_size):
                yield finite_rows(list_matrix(lists, self._dim, row, path), row, path)
                row += len(lists)


def map_npy(path: Path) -> NDArray[Any]:
    """Memory-map a ``.npy`` array.

    Raises:
        ValueError: not such a file, cut short, or one that holds Python objects.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a readable .npy file: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} holds several arrays; expected a .npy file with one")
    return array


def float_list_column(schema: pa.Schema, column: str | None, path: Path) -> str:
    """Name of the column of float lists.

    Raises:
        ValueError: the named one is missing or of another type; or none is named and there is
            not exactly one.
    """
    return _list_column(schema, column, path, pa.types.is_floating, "float")


def integer_list_column(schema: pa.Schema, column: str | None, path: Path) -> str:
    """Name of the column of integer lists; as :func:`float_list_column`."""
    return _list_column(schema, column, path, pa.types.is_integer, "integer")


def list_matrix(lists: Any, dim: int, first_row: int, path: Path) -> NDArray[Any]:
    """The values of a pyarrow list array, (rows, dim).

    Raises:
        ValueError: a missing list, a missing value, or a list of another length; names the row.
    """
    if lists.null_count:
        row = first_row + int(np.flatnonzero(lists.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(f"{path}: row {row} is missing")
    widths = lists.value_lengths().to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero(widths != dim)
    if wrong.size:
        raise ValueError(
            f"{path}: row {first_row + int(wrong[0])} has {int(widths[wrong[0]])} values; "
            f"expected {dim}"
        )
    values = lists.flatten()
    if values.null_count:
        at = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(f"{path}: row {first_row + at // dim} has a missing value")
    matrix: NDArray[Any] = values.to_numpy(zero_copy_only=False).reshape(-1, dim)
    return matrix


def require_batch_size(batch_size: int) -> None:
    """Refuse a batch size below 1.

    Raises:
        ValueError: naming it.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")


def require_width(source: EmbeddingSource, dim: int, path: Path) -> None:
    """Refuse embeddings of another width than a tokenizer takes.

    Raises:
        ValueError: naming both widths.
    """
    if source.dim != dim:
        raise ValueError(f"{path} has embeddings of width {source.dim}; the tokenizer takes {dim}")


def _list_column(
    schema: pa.Schema, column: str | None, path: Path, is_wanted: Any, what: str
) -> str:
    wanted = [field.name for field in schema if _is_list_of(field.type, is_wanted)]
    if column is None:
        if len(wanted) != 1:
            raise ValueError(
                f"{path} has {len(wanted)} columns of {what} lists ({', '.join(wanted) or 'none'}) "
                f"among {', '.join(schema.names)}; name one"
            )
        return str(wanted[0])
    if column not in schema.names:
        raise ValueError(f"{path} has no column {column!r}; it has {', '.join(schema.names)}")
    if column not in wanted:
        raise ValueError(
            f"{path}: column {column!r} has type {schema.field(column).type}; expected lists of "
            f"{what}s"
        )
    return column


def _is_list_of(kind: Any, is_wanted: Any) -> bool:
    is_list = (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
    return is_list and bool(is_wanted(kind.value_type))


def open_parquet(path: Path) -> Any:
    """Open a Parquet file to be streamed.

    Raises:
        ValueError: not such a file.
    """
    try:
        return pq.ParquetFile(path, buffer_size=_READ_BUFFER_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from error


def _read_schema(path: Path) -> Any:
    with open_parquet(path) as file:
        return file.schema_arrow


def _num_rows(path: Path) -> int:
    with open_parquet(path) as file:
        return int(file.metadata.num_rows)


def _column_batches(path: Path, column: str, batch_size: int) -> Iterator[Any]:
    """pyarrow list arrays of at most ``batch_size`` rows."""
    with open_parquet(path) as file:
        try:
            for batch in file.iter_batches(batch_size=batch_size, columns=[column]):
                if len(batch):
                    yield batch.column(0)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error


def finite_rows(rows: NDArray[Any], first_row: int, path: Path) -> Tensor:
    """Rows as float32, on the CPU.

    Raises:
        ValueError: a value that is NaN, infinite or larger than ``LARGEST_VALUE``; names the row.
    """
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes an infinity, told below
        batch = torch.from_numpy(np.array(rows, dtype=np.float32, order="C"))
    usable = batch.abs() <= LARGEST_VALUE  # false for NaN
    if not bool(usable.all()):
        at, column = (int(index) for index in (~usable).nonzero()[0])
        raise ValueError(
            f"{path}: row {first_row + at} holds {float(batch[at, column]):g}; embeddings must be "
            f"finite, and their values at most {LARGEST_VALUE:g} in size"
        )
    return batch
