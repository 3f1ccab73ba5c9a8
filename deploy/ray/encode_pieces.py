"""A large Parquet catalog in pieces that workers encode apart. Needs no Ray.

A piece is some row groups of one file and becomes a file of its own, which appears whole or not at
all; a run that is given again does what is missing. At the end the pieces are one file, in the
order of the rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rectokens.artifacts.tokenizer import TokenizerArtifact
from rectokens.catalog.sources import (
    finite_rows,
    float_list_column,
    list_matrix,
    open_parquet,
    require_batch_size,
)
from rectokens.catalog.tables import CODES_COLUMN
from rectokens.core.atomic_file import PARTIAL_PREFIX, atomic_file

RESULT = "codes.parquet"
_PLAN = "plan.json"
_PIECES = "pieces"


class EncodeError(ValueError):
    """The source or the folder cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one file.

    Attributes:
        index: place among all pieces.
        file: the Parquet file.
        row_groups: first row group, and the one after the last.
        first_row: of the piece, in the file.
        rows: in the piece.
    """

    index: int
    file: str
    row_groups: tuple[int, int]
    first_row: int
    rows: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.index:08d}.parquet"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is encoded, in which pieces; the same for the same source.

    Attributes:
        tokenizer: fingerprint of the tokenizer.
        column: of the embeddings.
        copied: columns that go into the result as they are.
        dim: D.
        pieces: in the order of the rows.
        source: digest of the names, sizes and row groups of the files.
    """

    tokenizer: str
    column: str
    copied: tuple[str, ...]
    dim: int
    pieces: tuple[Piece, ...]
    source: str

    @property
    def rows(self) -> int:
        """N."""
        return sum(piece.rows for piece in self.pieces)

    @property
    def digest(self) -> str:
        """Of all of it."""
        return hashlib.blake2b(json.dumps(asdict(self)).encode(), digest_size=16).hexdigest()


def make_plan(
    source: Path,
    artifact: TokenizerArtifact,
    *,
    column: str | None = None,
    copied: Sequence[str] = (),
    rows_per_piece: int = 262_144,
) -> Plan:
    """Cut a source into pieces, by its files' footers alone.

    Args:
        source: a Parquet file, or a folder of them, read in the order of their names.
        artifact: of the tokenizer.
        column: of the embeddings; may be left out where one column only has float lists.
        copied: columns that go into the result: item ids and what stands beside them.
        rows_per_piece: at most, unless one row group has more.

    Raises:
        EncodeError: no files, no rows, no such columns.
    """
    if rows_per_piece < 1:
        raise EncodeError(f"rows_per_piece is {rows_per_piece}; it must be at least 1")
    files = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    if not files:
        raise EncodeError(f"{source} is a folder without .parquet files")
    pieces: list[Piece] = []
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        try:
            with open_parquet(path) as file:
                column = float_list_column(file.schema_arrow, column, path)
                _require_columns(file.schema_arrow, copied, path)
                sizes = [
                    file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)
                ]
            digest.update(json.dumps([path.name, path.stat().st_size, sizes]).encode())
        except ValueError as error:
            raise EncodeError(str(error)) from error
        except OSError as error:
            raise EncodeError(f"{path} cannot be read: {error.strerror}") from error
        for start, stop, first_row, rows in _cut(sizes, rows_per_piece):
            pieces.append(Piece(len(pieces), str(path.absolute()), (start, stop), first_row, rows))
    if not pieces:
        raise EncodeError(f"{source} has no rows")
    assert column is not None
    return Plan(
        tokenizer=artifact.fingerprint,
        column=column,
        copied=tuple(copied),
        dim=artifact.tokenizer.feature_dim,
        pieces=tuple(pieces),
        source=digest.hexdigest(),
    )


def claim_folder(plan: Plan, out: Path) -> list[Piece]:
    """Begin a run in a folder, or go on with it.

    Returns:
        The pieces that are missing.

    Raises:
        EncodeError: the folder holds a run of something else.
    """
    written = out / _PLAN
    if written.exists():
        found = written.read_text()
        if found != plan.digest:
            raise EncodeError(
                f"{out} holds a run of another source, tokenizer or cut; take another folder"
            )
    else:
        # What a run left that was killed as it began is nothing.
        if out.exists() and any(not _is_partial(path) for path in out.iterdir()):
            raise EncodeError(f"{out} is not empty and holds no run")
        with atomic_file(written) as partial:
            partial.write_text(plan.digest)
    return [piece for piece in plan.pieces if not piece_path(out, piece).exists()]


def piece_path(out: Path, piece: Piece) -> Path:
    """The file of a piece."""
    return out / _PIECES / piece.name


def encode_piece(
    artifact: TokenizerArtifact, plan: Plan, piece: Piece, out: Path, batch_size: int = 8_192
) -> None:
    """Encode a piece into its file; a batch of embeddings is in memory at a time.

    Args:
        artifact: of the tokenizer, on the device that is to be used.
        plan: that the piece is of.
        piece: to encode.
        out: folder of the run.
        batch_size: rows at a time.

    Raises:
        EncodeError: a row that cannot be encoded, named; or the file has changed or is damaged.
    """
    require_batch_size(batch_size)
    path = Path(piece.file)
    tables = []
    row = piece.first_row
    try:
        with open_parquet(path) as file:
            batches = file.iter_batches(
                batch_size=batch_size,
                row_groups=range(*piece.row_groups),
                columns=[plan.column, *plan.copied],
            )
            for batch in batches:
                vectors = finite_rows(
                    list_matrix(batch.column(plan.column), plan.dim, row, path), row, path
                )
                codes = artifact.tokenizer.encode(vectors).codes.cpu().numpy()
                tables.append(_table(batch, plan.copied, codes))
                row += len(batch)
    except ValueError as error:
        raise EncodeError(str(error)) from error
    except (pa.ArrowException, OSError) as error:
        raise EncodeError(f"{path} is damaged: {error}") from error
    if row - piece.first_row != piece.rows:
        raise EncodeError(f"{path} has changed: {row - piece.first_row} rows for {piece.rows}")
    with atomic_file(piece_path(out, piece)) as partial:
        pq.write_table(pa.concat_tables(tables), partial)


def join_pieces(plan: Plan, out: Path, on_rows: Callable[[int], None] = lambda done: None) -> Path:
    """All pieces as one file, in the order of the rows; one piece is in memory at a time.

    Raises:
        EncodeError: a piece is missing or damaged.
    """
    result = out / RESULT
    done = 0
    try:
        with atomic_file(result) as partial:
            writer = None
            for piece in plan.pieces:
                table = pq.read_table(piece_path(out, piece))
                if len(table) != piece.rows:
                    raise EncodeError(
                        f"piece {piece.index} has {len(table)} rows, not {piece.rows}"
                    )
                if writer is None:
                    writer = pq.ParquetWriter(partial, table.schema)
                # Files of one source may differ in what their columns say beside their types.
                writer.write_table(table.cast(writer.schema))
                done += len(table)
                on_rows(done)
            assert writer is not None
            writer.close()
    except (pa.ArrowException, OSError) as error:
        raise EncodeError(f"the pieces cannot be joined: {error}") from error
    # All are there, so nothing is being written that is still needed.
    for folder in (out, out / _PIECES):
        for path in filter(_is_partial, folder.iterdir()):
            path.unlink(missing_ok=True)
    return result


def _is_partial(path: Path) -> bool:
    return path.name.startswith(PARTIAL_PREFIX)


def _table(batch: Any, copied: Sequence[str], codes: Any) -> Any:
    lists = pa.FixedSizeListArray.from_arrays(
        pa.array(codes.astype(np.uint16).reshape(-1)), codes.shape[1]
    )
    columns = {name: batch.column(name) for name in copied} | {CODES_COLUMN: lists}
    return pa.table(columns)


def _cut(sizes: Sequence[int], most: int) -> list[tuple[int, int, int, int]]:
    """Row groups from, to, first row and rows of each piece; empty groups are in no piece alone."""
    pieces = []
    start = first_row = rows = 0
    for group, size in enumerate(sizes):
        if rows and rows + size > most:
            pieces.append((start, group, first_row, rows))
            start, first_row, rows = group, first_row + rows, 0
        rows += size
    if rows:
        pieces.append((start, len(sizes), first_row, rows))
    return pieces


def _require_columns(schema: Any, names: Sequence[str], path: Path) -> None:
    for name in names:
        if name == CODES_COLUMN:
            raise EncodeError(f"{path}: a column {CODES_COLUMN!r} would meet that of the codes")
        if name not in schema.names:
            raise EncodeError(f"{path} has no column {name!r}; it has {', '.join(schema.names)}")
